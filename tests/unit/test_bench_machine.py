"""What a report says of the machine and the software."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from pathlib import Path

import pytest
from lifl_bench import machine


def test_the_facts_are_what_a_reader_needs_to_place_figures() -> None:
    facts = machine.machine_facts()

    assert {"processor", "cores", "memory", "swap", "kernel", "virtual machine"} <= set(facts)
    assert all(value and "\n" not in value for value in facts.values())
    assert facts["kernel"] == f"Linux {os.uname().release}"
    assert facts["cores"].startswith(f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")
    assert facts["memory"].split()[1].startswith("GiB")


def test_versions_are_numbers_of_what_is_installed_and_nothing_is_imported_for_them() -> None:
    loaded = set(sys.modules)

    versions = machine.versions()

    assert versions["python"] == sys.version.split()[0]
    assert {"lifl", "numpy", "kernel"} <= set(versions)
    assert all(version and "\n" not in version for version in versions.values())
    assert "torch" not in set(sys.modules) - loaded


def test_a_report_gives_away_no_host_user_or_path() -> None:
    published = " ".join([*machine.machine_facts().values(), *machine.versions().values()])

    for secret in (socket.gethostname(), str(Path.home()), getpass.getuser(), str(Path.cwd()), sys.prefix):
        assert secret not in published.split() and (len(secret) < 8 or secret not in published)


def test_a_machine_that_tells_nothing_has_few_facts_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, *arguments: object, **options: object) -> str:
        raise PermissionError("not for you")

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setenv("PATH", str(tmp_path))

    facts, versions = machine.machine_facts(), machine.versions()

    assert "memory" not in facts and "cores" in facts
    assert "python" in versions


def test_the_default_congestion_control_is_named_where_another_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = tmp_path / "tcp_congestion_control"
    setting.write_text("cubic\n")
    monkeypatch.setattr(machine, "_CONGESTION_CONTROL", setting)

    assert machine.machine_facts("bbr")["TCP congestion control"] == "cubic (the machine's default is bbr)"
    assert machine.machine_facts("cubic")["TCP congestion control"] == "cubic"
    assert machine.machine_facts()["TCP congestion control"] == "cubic"


def test_programs_are_asked_for_their_version_and_believed_only_in_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = {
        "nats-server": "echo nats-server: v2.10.1-beta",
        "nginx": "echo cannot open /home/somebody/nginx.conf >&2; exit 1",
    }
    for name, script in scripts.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    versions = machine.versions()

    assert versions["nats-server"] == "2.10.1-beta"
    assert "nginx" not in versions

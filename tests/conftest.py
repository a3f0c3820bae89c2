"""What tests of every kind share: where the project is, and which data planes this machine can run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hosts import make_hosts as make_hosts

ROOT = Path(__file__).resolve().parent.parent


def usable_data_planes() -> list[str]:
    """`unix` always; `ebpf` where the kernel lets us. Under CI=true eBPF is required."""
    from lifl_ebpf.preflight import ebpf_reason

    reason = ebpf_reason()
    if reason is None:
        return ["unix", "ebpf"]
    if os.environ.get("CI") == "true":
        raise pytest.UsageError(f"CI=true needs the eBPF data plane, but: {reason}")
    return ["unix"]


def pytest_itemcollected(item: pytest.Item) -> None:
    """With several workers (`make test`), only unit tests run beside others.

    The rest start nodes, load eBPF and make hosts, and look afterwards whether anything of that is left.
    """
    if not item.path.is_relative_to(ROOT / "tests" / "unit"):
        item.add_marker(pytest.mark.xdist_group("nodes"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "data_plane" in metafunc.fixturenames:
        metafunc.parametrize("data_plane", usable_data_planes(), scope="session")

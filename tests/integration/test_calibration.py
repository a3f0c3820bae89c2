"""Calibration against a real node: what it measures, what it keeps, and that it leaves nothing running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lifl.calibration import Level, Options, calibrate
from lifl.errors import InvalidInput

from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(60)
QUICK = {"model_bytes": 400_000, "seconds": 0.8, "most_senders": 3}


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def children() -> set[int]:
    return {
        int(pid)
        for thread in os.listdir("/proc/self/task")
        for pid in Path(f"/proc/self/task/{thread}/children").read_text().split()
    }


def test_each_level_is_measured_at_the_node(tmp_path: Path) -> None:
    before = children()
    heard: list[Level] = []

    result = calibrate(Options(**QUICK, growth=100.0, data_plane="unix"), heard.append)  # type: ignore[arg-type]

    assert result.levels == heard and [level.senders for level in heard] == [1, 2, 3]
    for level in heard:
        assert level.updates >= 1
        assert 0 < level.arrival_rate <= level.updates / QUICK["seconds"]
        assert 0 < level.execution_seconds < 1
        assert level.concurrency == level.arrival_rate * level.execution_seconds
    assert not result.is_limit
    assert result.capacity == max(1, round(heard[-1].concurrency))
    assert result.execution_seconds == heard[-1].execution_seconds
    assert children() == before
    assert list(tmp_path.iterdir()) == []


def test_a_function_that_gathers_a_round_cannot_be_measured() -> None:
    function = ROOT / "functions/trimmed_mean.py"

    with pytest.raises(InvalidInput, match=r"cannot be measured: .* gathering function"):
        calibrate(Options(function_file=function, data_plane="unix", **QUICK))  # type: ignore[arg-type]


def test_as_a_program_it_keeps_the_result_and_prints_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lifl.calibration", "--state-directory", str(tmp_path / "state")]
    command += ["--model", "400kB", "--seconds", "0.3", "--most-senders", "2", "--data-plane", "unix"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert json.loads((tmp_path / "state/calibration.json").read_text()) == printed
    assert printed["capacity"] >= 1 and printed["model_bytes"] == 400_000 and len(printed["levels"]) == 2


def test_terminating_it_ends_all_that_it_started(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lifl.calibration", "--state-directory", str(tmp_path / "state")]
    command += ["--model", "400kB", "--seconds", "30", "--data-plane", "unix"]
    mark = f"TMPDIR={tmp_path}".encode()

    def processes() -> list[int]:
        found = []
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                environment = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in environment and int(name) != os.getpid():
                found.append(int(name))
        return found

    def wait_for(condition: bool) -> None:
        end = time.monotonic() + 20
        while (len(processes()) > 36) != condition:  # 32 senders, and a node
            assert time.monotonic() < end
            time.sleep(0.02)

    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as program:
        wait_for(True)
        program.terminate()
        assert program.wait(20) == 1
    end = time.monotonic() + 5
    while processes():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert not (tmp_path / "state").exists()

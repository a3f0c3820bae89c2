"""`func bench` as users run it: real brokers, proxies, servers and nodes, with small models."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lifl_bench.hosts import why_not

from tests.e2e.node_harness import ROOT, Watch, until
from tests.hosts import require_hosts

BENCH = [sys.executable, "-m", "lifl.cli", "bench"]
COMPARE_POLICIES = [sys.executable, str(ROOT / "bench" / "cluster.py")]
ALL_MODES = "lifl,lifl-unix,broker,broker-wire,broker-stock,grpc"
pytestmark = pytest.mark.timeout(240)  # a minute where the machine is quiet, but tests run beside it

MEGABYTES = "2MB"
"""More than fits in a message of the stock broker, so that every mode has to move data and not only messages."""


@pytest.fixture
def watch() -> Iterator[Watch]:
    with Watch() as watching:
        yield watching


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the run puts its files, none of which may stay."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    yield directory
    assert list(directory.iterdir()) == []


@pytest.fixture
def short_temporary(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same for clusters, whose sockets lie below it: a UNIX socket's path has 107 bytes at most."""
    directory = watch.runtime_base / "tmp"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    yield directory
    assert list(directory.iterdir()) == []
    directory.rmdir()


def bench(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*BENCH, *arguments], capture_output=True, text=True, timeout=230)
    assert done.returncode == code, done.stderr[-4000:]
    return done


def measure(*arguments: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(bench(*arguments, "-o", "json").stdout)
    return document


def test_every_mode_aggregates_the_same_updates_to_the_right_model(watch: Watch, temporary: Path) -> None:
    results = measure("--modes", ALL_MODES, "--models", MEGABYTES, "--updates", "5", "--repeat", "2")

    cells = {cell["mode"]: cell for cell in results["cells"]}
    assert list(cells) == ALL_MODES.split(",")
    for mode, cell in cells.items():
        assert not cell["failure"], mode
        assert len(cell["rounds"]) == 2 and cell["copies"] >= 2 and cell["copies_detail"]
        for round_ in cell["rounds"]:
            assert round_["error"] < 1e-5 and len(round_["latencies_s"]) == 5
            assert 0 < min(round_["latencies_s"]) <= max(round_["latencies_s"]) <= round_["act_s"] + 0.01
            assert round_["cpu_s"]["clients"] > 0 and len(round_["cpu_s"]) > 1
        assert cell["peak_memory_bytes"] > 1 << 20
    assert {"gateway", "coordinator", "worker"} <= set(cells["lifl"]["rounds"][0]["cpu_s"])
    assert {"ingress", "nats-server", "filter", "sidecar", "function"} <= set(
        cells["broker"]["rounds"][0]["cpu_s"]
    )


def test_one_update_and_one_level_work_in_every_mode(watch: Watch, temporary: Path) -> None:
    results = measure("--modes", "lifl,broker,grpc", "--cell", "100000:1:1", "--repeat", "1")

    assert [cell["failure"] for cell in results["cells"]] == ["", "", ""]


def test_a_report_is_written_and_can_be_shown_again(watch: Watch, temporary: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"

    first = bench(
        *("--modes", "lifl,grpc", "--models", "100kB", "--updates", "2,4", "--repeat", "2"),
        *("--arrival", "poisson", "--report", str(report)),
    )

    assert max(map(len, first.stdout.splitlines())) <= 80
    page = (report / "report.html").read_text()
    assert "data:image/png;base64," in page and not re.search(r'(src|href)="(?!data:|#)', page)
    assert list(report.glob("*.png"))
    again = bench("--from", str(report / "results.json"))
    assert again.stdout == first.stdout


def test_each_step_of_the_ablation_works(watch: Watch, short_temporary: Path) -> None:
    results = measure("--modes", "lifl", "--cell", f"{MEGABYTES}:4:2", "--repeat", "1", "--ablation")

    rows = results["ablation"]
    assert [row["name"] for row in rows if row["nodes"] == 1] == [
        "broker",
        "+ shared memory",
        "+ eBPF routing",
        "+ eager",
        "+ reuse, warm zygote",
    ]
    assert [row["result"]["failure"] for row in rows] == [""] * len(rows)
    if reason := why_not():
        assert len(rows) == 5 and any(reason in note for note in results["notes"])
        return
    assert [row["name"] for row in rows if row["nodes"] == 2] == [
        "2 nodes, round-robin",
        "+ placement",
        "+ planning",
        "+ reuse, warm zygote",
        "+ eager",
    ]
    assert all(round_["error"] < 1e-5 for row in rows for round_ in row["result"]["rounds"])
    assert {"gateway", "coordinator", "worker"} <= set(rows[-1]["result"]["rounds"][0]["cpu_s"])


def test_placement_policies_are_compared_on_a_real_cluster(
    watch: Watch, short_temporary: Path, tmp_path: Path
) -> None:
    require_hosts()
    plot = tmp_path / "plot.png"
    options = ["--nodes", "2", "--updates", "4", "--model", "1MB", "--rounds", "2", "--plot", str(plot)]
    options += ["--policy", "best-fit", "--policy", "worst-fit", "-o", "json"]
    done = subprocess.run([*COMPARE_POLICIES, *options], capture_output=True, text=True, timeout=90)

    assert done.stdout, done.stderr[-4000:]
    results = json.loads(done.stdout)
    (cell,) = results["cells"]
    best, worst = cell["policies"]
    assert (best["policy"], worst["policy"]) == ("best-fit", "worst-fit") and not results["failures"]
    for each in (best, worst):
        assert len(each["rounds"]) == 2
        for round_ in each["rounds"]:
            assert round_["error"] < 1e-5 and sum(round_["updates"]) == 4 and 0 < round_["act_s"] < 10
    assert best["medians"]["nodes"] == 1 and worst["medians"]["nodes"] == 2
    assert best["medians"]["internode_bytes"] < worst["medians"]["internode_bytes"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_training_ends_with_the_same_model_in_every_mode(watch: Watch, temporary: Path) -> None:
    results = measure(
        *("--modes", "lifl,lifl-unix,broker,grpc", "--cell", "4:1:1", "--repeat", "1"),
        *("--train", "--rounds", "3", "--target", "0.3"),
    )

    trained = results["training"]
    assert [one["failure"] for one in trained] == [""] * 4
    assert all(one["largest_difference"] <= 1e-6 for one in trained)
    assert len({one["model_sha256"] for one in trained}) == 1
    assert all(len(one["rounds"]) == 3 and one["rounds"][-1]["accuracy"] > 0.3 for one in trained)


@pytest.mark.parametrize("mode", ["lifl", "broker", "grpc"])
def test_ctrl_c_ends_everything_and_leaves_nothing(watch: Watch, temporary: Path, mode: str) -> None:
    command = [*BENCH, "--modes", mode, "--models", "4MB", "--updates", "4", "--repeat", "500"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        # Clients are there: the deployment is up and rounds are about to run.
        until(lambda: sum("bench" in line for line in watch.processes().values()) > 5, "clients")
        time.sleep(1.0)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all in the foreground
        _, errors = run.communicate(timeout=30)
    finally:
        if run.poll() is None:
            run.kill()
            run.communicate()
    assert run.returncode == 130, errors.decode()[-2000:]
    assert b"Traceback" not in errors


# --- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "kafka"], "unknown mode 'kafka'"),
        (["--models", "resnet19"], "unknown model 'resnet19'"),
        (["--models", "8GiB", "--updates", "1000"], "GB of memory, and"),
        (["--updates", "many"], "--updates takes whole numbers"),
        (["--arrival", "slowly"], "unknown arrival"),
        (["--levels", "3"], "the tree has 1"),
        (["--report", "/proc/report"], "the report cannot be written to '/proc/report'"),
        (["--nats-url", "nats://127.0.0.1:1", "--modes", "broker"], "127.0.0.1:1"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_starts(
    watch: Watch, temporary: Path, arguments: list[str], message: str
) -> None:
    done = bench(*arguments, code=1)

    assert message in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout

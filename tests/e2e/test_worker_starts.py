"""How workers come and go: forked or spawned, for a round or for longer; none stays, and their time is counted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.e2e.node_harness import (
    PATIENCE,
    SMALL,
    LiveNode,
    assert_mean,
    create_job,
    make_round,
    model_after,
    run_round,
    submit,
    submit_all,
    until,
)

pytestmark = pytest.mark.timeout(90)

BUSY_SECONDS = 0.03
BUSY = f"""
import time
from lifl import aggregator

@aggregator
def busy(total, update):
    end = time.process_time() + {BUSY_SECONDS}
    while time.process_time() < end:
        pass
    total.add(update)
"""


@pytest.fixture(params=["fork", "spawn"])
def way_node(request: pytest.FixtureRequest, make_node: Callable[..., LiveNode], tmp_path: Path) -> LiveNode:
    """A node that starts workers in each of the ways; its function `busy` uses much time for each update."""
    (tmp_path / "busy.py").write_text(BUSY)
    return make_node(start_workers=request.param, functions={"busy": tmp_path / "busy.py"})


@pytest.fixture
def spawning(make_node: Callable[..., LiveNode]) -> LiveNode:
    """A node each of whose workers is a fresh interpreter."""
    return make_node(start_workers="spawn")


def zygote_of(node: LiveNode) -> int:
    return next(pid for name, pid in node.node.processes().items() if name.startswith("zygote-"))


def children(node: LiveNode) -> list[int]:
    """Every child of the zygote, zombies too."""
    zygote = zygote_of(node)
    return [int(pid) for pid in Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()]


def reaped_seconds(node: LiveNode) -> float:
    """CPU time of the zygote's children that have ended and were waited for."""
    fields = Path(f"/proc/{zygote_of(node)}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def updates_of(node: LiveNode, job: str, number: int) -> list[dict[str, Any]]:
    with urlopen(f"{node.address}/v1/jobs/{job}/rounds/{number}/updates", timeout=PATIENCE) as answer:
        return list(json.load(answer)["updates"])


def test_rounds_without_reuse_are_right_leave_no_process_and_have_their_time_counted(way_node: LiveNode) -> None:
    create_job(way_node, "job", SMALL, goal=6, reuse=False, function="busy")
    seen: set[int] = set()
    for number in (1, 2, 3):
        before = reaped_seconds(way_node)
        round_ = make_round(SMALL, 6, seed=number)
        submit_all(way_node, "job", round_, range(5), number)
        workers = until(lambda: len(found := way_node.workers()) == 2 and found, "two workers")
        assert not seen & set(workers)
        seen |= set(workers)
        submit(way_node, "job", round_, 5, number)
        assert_mean(model_after(way_node, "job", number), round_.updates, round_.weights)
        last = way_node.describe("job")["last"]
        assert (last["round"], last["started"], last["reused"]) == (number, 2, 0)
        until(lambda: not children(way_node), "end of the workers, zombies too")
        assert reaped_seconds(way_node) - before > 6 * BUSY_SECONDS - 0.02  # 0.02: it is told in ticks
    way_node.assert_all_slots_free("job")


def test_a_worker_that_was_killed_is_no_zombie_and_is_counted(way_node: LiveNode) -> None:
    create_job(way_node, "job", SMALL, goal=8, function="busy")
    round_ = make_round(SMALL, 8)
    submit_all(way_node, "job", round_, range(7))
    until(lambda: way_node.describe("job")["current"]["folded"] == 7, "folds")
    for pid in until(way_node.workers, "workers"):
        os.kill(pid, signal.SIGKILL)
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "end of the worker", seconds=5)
    assert reaped_seconds(way_node) > 7 * BUSY_SECONDS - 0.02
    submit(way_node, "job", round_, 7)
    assert_mean(model_after(way_node, "job", 1), round_.updates, round_.weights)


def test_spawned_workers_killed_while_they_start_are_replaced(spawning: LiveNode) -> None:
    create_job(spawning, "job", SMALL, goal=4)
    round_ = make_round(SMALL, 4)
    submit(spawning, "job", round_, 0)
    for _ in range(3):
        victims = set(until(spawning.workers, "workers that start"))
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        assert spawning.describe("job")["current"]["folded"] == 0, "they came too far to test anything"
        until(lambda victims=victims: not victims & set(spawning.workers()), "end of the victims")
    submit_all(spawning, "job", round_, range(1, 4))
    assert_mean(model_after(spawning, "job", 1), round_.updates, round_.weights)
    spawning.assert_all_slots_free("job")
    run_round(spawning, "job", SMALL, 4, 2)


def test_spawned_workers_killed_between_folds_lose_nothing(spawning: LiveNode) -> None:
    create_job(spawning, "job", SMALL, goal=12)
    round_ = make_round(SMALL, 12)
    for first in (0, 4, 8):
        submit_all(spawning, "job", round_, range(first, first + 3))
        until(lambda least=first: spawning.describe("job")["current"]["folded"] > least, "folds")
        spawning.kill_workers()
        submit(spawning, "job", round_, first + 3)
    assert_mean(model_after(spawning, "job", 1), round_.updates, round_.weights)
    spawning.assert_all_slots_free("job")


@pytest.mark.parametrize("victim", ["zygote-fedavg", "agent"])
def test_a_process_killed_while_workers_are_spawned_leaves_none_behind(spawning: LiveNode, victim: str) -> None:
    create_job(spawning, "job", SMALL, goal=4)
    round_ = make_round(SMALL, 4)
    submit(spawning, "job", round_, 0)
    starting = until(spawning.workers, "workers that start")
    spawning.kill(victim)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in starting), "end of the workers")
    submit_all(spawning, "job", round_, range(1, 4))
    assert_mean(model_after(spawning, "job", 1), round_.updates, round_.weights)


def test_spawned_workers_end_with_a_job_that_is_deleted_while_they_start(spawning: LiveNode) -> None:
    create_job(spawning, "job", SMALL, goal=4)
    submit(spawning, "job", make_round(SMALL, 4), 0)
    until(spawning.workers, "workers that start")
    with spawning.client("job") as client:
        client.delete()
    until(lambda: not children(spawning), "end of the workers")


def test_a_node_stopped_while_workers_are_spawned_leaves_nothing(spawning: LiveNode) -> None:
    create_job(spawning, "job", SMALL, goal=4)
    submit(spawning, "job", make_round(SMALL, 4), 0)
    until(spawning.workers, "workers that start")
    spawning.stop()
    assert not spawning.watch.processes()


def test_a_function_that_only_a_spawned_worker_cannot_load_fails_the_job(
    make_node: Callable[..., LiveNode], tmp_path: Path
) -> None:
    file = tmp_path / "fickle.py"
    file.write_text(
        "from lifl import aggregator\n\n@aggregator\ndef fickle(total, update):\n    total.add(update)\n"
    )
    node = make_node(start_workers="spawn", functions={"fickle": file})
    create_job(node, "job", SMALL, goal=2, function="fickle")
    file.write_text("this is no Python")
    with contextlib.suppress(Exception):  # the job may have failed before the second one
        submit_all(node, "job", make_round(SMALL, 2))
    state = until(lambda: state if (state := node.describe("job"))["status"] == "failed" else None, "failure")
    assert "died 5 times" in state["detail"]


def test_each_update_has_its_times_and_the_metrics_count_them(node: LiveNode) -> None:
    create_job(node, "job", SMALL, goal=8)
    begin = time.monotonic()
    run_round(node, "job", SMALL, 8, 1)
    updates = updates_of(node, "job", 1)
    assert sorted(update["client"] for update in updates) == [f"client-{number}" for number in range(8)]
    for update in updates:
        assert update["status"] == "folded"
        assert begin < update["first_byte"] < update["folded"] < time.monotonic()
        assert update["latency"] == update["folded"] - update["first_byte"]
    last = node.describe("job")["last"]
    assert 0 < last["latency_median"] <= last["latency_p95"] <= last["latency_max"]
    assert last["latency_max"] == max(update["latency"] for update in updates)
    assert node.metric("lifl_update_latency_seconds_count", "job") == 8

"""What tests ask a running cluster, and waiting for what its processes bring about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lifl_bench.cluster import Cluster

from tests.e2e.cluster_clients import JOB


def until(condition: Callable[[], Any], seconds: float = 20.0, what: str = "condition") -> Any:
    """Poll a condition that real processes bring about; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come true within {seconds} s"
        time.sleep(0.02)
    return value


def job_state(cluster: Cluster) -> dict[str, Any]:
    """The job as the coordinator shows it."""
    state: dict[str, Any] = cluster.get(f"/v1/jobs/{JOB}")
    return state


def round_of(cluster: Cluster, number: int) -> dict[str, Any]:
    """One of its rounds."""
    state: dict[str, Any] = cluster.get(f"/v1/jobs/{JOB}/rounds/{number}")
    return state


def accepted(cluster: Cluster) -> int:
    """Updates that count in the open round."""
    current = job_state(cluster)["current"]
    return int(current["accepted"]) if current else 0


def spread(cluster: Cluster, count: int, first: int = 0) -> list[tuple[int, int]]:
    """(node, client) pairs that share `count` clients evenly among the nodes."""
    nodes = list(cluster.numbers)
    return [(nodes[client % len(nodes)], client) for client in range(first, first + count)]


def restart_coordinator(cluster: Cluster) -> None:
    """Kill it and start it again."""
    cluster.kill_coordinator()
    cluster.start_coordinator()

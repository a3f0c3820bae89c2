"""The coordinator's Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from typing import Final

from lifl.cluster.coordinator import ClusterCoordinator
from lifl.cluster.service import ClusterService
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class CoordinatorMetrics:
    """Counts requests, and reads the rest when Prometheus asks."""

    def __init__(self, service: ClusterService) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "lifl_coordinator_requests", "HTTP requests answered", ["method", "status"], registry=self._registry
        )
        self.sent_bytes = Counter("lifl_coordinator_sent_bytes", "Bytes of models sent", registry=self._registry)
        self._registry.register(_StateCollector(service))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)


class _StateCollector(Collector):
    def __init__(self, service: ClusterService) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        """Nothing is known before it is asked for."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield jobs, rounds and nodes as they are now, and what happened so far."""
        yield from self._service.call(
            lambda coordinator, now: [*_gauges(coordinator, now), *_counters(coordinator)]
        )


def _gauges(coordinator: ClusterCoordinator, now: float) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("lifl_coordinator_jobs", "Jobs by status", labels=["status"])
    for status, count in Tally(job.status for job in coordinator.jobs.by_name.values()).items():
        jobs.add_metric([status], count)
    yield jobs
    nodes = GaugeMetricFamily("lifl_coordinator_nodes", "Nodes by status", labels=["status"])
    for node_status, count in Tally(node.status for node in coordinator.requests.nodes(now).nodes).items():
        nodes.add_metric([node_status], count)
    yield nodes
    rounds = GaugeMetricFamily("lifl_coordinator_round", "The open round", labels=["job"])
    accepted = GaugeMetricFamily("lifl_coordinator_accepted", "Updates that count in it", labels=["job"])
    for job in coordinator.jobs.by_name.values():
        if job.round is not None:
            rounds.add_metric([job.name], job.round.number)
            accepted.add_metric([job.name], job.round.accepted)
    yield rounds
    yield accepted


def _counters(coordinator: ClusterCoordinator) -> Iterator[Metric]:
    totals = coordinator.jobs.totals
    for name, text, value in (
        ("updates_counted", "Updates that were counted", totals.counted),
        ("updates_lost", "Counted updates that were lost with their node", totals.lost),
        ("updates_rejected", "Counted updates that were not finite", totals.rejected),
        ("rounds", "Rounds whose model was made", totals.rounds),
        ("rollbacks", "Times that a job went back to a stored model", totals.rollbacks),
    ):
        family = CounterMetricFamily(f"lifl_coordinator_{name}", text)
        family.add_metric([], value)
        yield family

"""The gateway's Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from lifl.errors import LiflError
from lifl.messages import DescribeLatencies, Latencies
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lifl_gateway.coordinator_client import CoordinatorClient
from lifl_gateway.node_link import NodeLink

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_COORDINATOR_SECONDS: Final = 2.0
"""A scrape waits no longer for what the coordinator counts."""
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counts what the gateway does."""

    def __init__(self, link: NodeLink, coordinator: CoordinatorClient) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "lifl_gateway_requests", "HTTP requests answered", ["method", "status"], registry=self._registry
        )
        self.updates = Counter(
            "lifl_gateway_updates",
            "Model updates by what became of them",
            ["outcome"],  # accepted, duplicate, late, early, refused, full, incomplete
            registry=self._registry,
        )
        self.received_bytes = Counter(
            "lifl_gateway_received_bytes", "Bytes of accepted updates", registry=self._registry
        )
        self.sent_bytes = Counter("lifl_gateway_sent_bytes", "Bytes of models sent", registry=self._registry)
        self.partial_bytes = Counter(
            "lifl_gateway_partial_bytes",
            "Bytes of partial aggregates that went from node to node",
            ["direction"],  # in, out
            registry=self._registry,
        )
        self.partial_attempts = Counter(
            "lifl_gateway_partial_attempts",
            "Attempts to send a partial aggregate to another node",
            ["outcome"],  # sent, failed
            registry=self._registry,
        )
        self.ingest_seconds = Histogram(
            "lifl_gateway_ingest_seconds",
            "Head of an update in, to 202 out",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_SlotCollector(link))
        self._registry.register(_LatencyCollector(coordinator))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)


class _SlotCollector(Collector):
    """Reads the slots when Prometheus asks; nothing is counted in between."""

    def __init__(self, link: NodeLink) -> None:
        self._link = link

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges."""
        total = GaugeMetricFamily("lifl_gateway_slots", "Update slots of this seat", labels=["job"])
        free = GaugeMetricFamily("lifl_gateway_slots_free", "Free update slots of this seat", labels=["job"])
        for pool in self._link.pools():
            total.add_metric([pool.memory.info.job], pool.slots.total)
            free.add_metric([pool.memory.info.job], pool.slots.free)
        yield total
        yield free


class _LatencyCollector(Collector):
    """Asks the coordinator, which hears when an update is folded, when Prometheus asks."""

    def __init__(self, coordinator: CoordinatorClient) -> None:
        self._coordinator = coordinator

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram of each running job; nothing while the coordinator is away."""
        try:
            latencies = self._coordinator.ask(DescribeLatencies(), Latencies, _COORDINATOR_SECONDS)
        except LiflError:
            return
        family = HistogramMetricFamily(
            "lifl_update_latency_seconds", "First byte of an update in, to folded", labels=["job"]
        )
        bounds = [*map(str, latencies.bounds), "+Inf"]
        for job in latencies.jobs:
            buckets = list(zip(bounds, accumulate(job.counts), strict=True))
            family.add_metric([job.job], buckets, job.seconds)
        yield family

"""How busy a node is, and how many more updates it can take: RC = MC - k E (paper: residual capacity).

MC is what the node can aggregate at once, k how many updates reach its aggregators in a second, E how long each of
them stays; by Little's law k E are there at a time. Nothing here reads a clock: time is a parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from lifl.cluster.messages import NodeLoad
from lifl.messages import EndpointTraffic, endpoint_role

EXECUTION_WEIGHT: Final = 1 / 8
"""Weight of the newest value in the smoothed execution time; the router has the same for inter-arrival times."""

_NANOSECONDS: Final = 1e9


def arrival_rate(traffic: Iterable[EndpointTraffic], now_nanoseconds: int) -> float:
    """Descriptors a second that reach the workers of a node (k), from the router's counters.

    `now_nanoseconds` is CLOCK_MONOTONIC of the node, as in the counters. Rows of endpoints that are no workers do
    not count.
    """
    return sum(_rate_of(row, now_nanoseconds) for row in traffic if endpoint_role(row.endpoint) == "worker")


def _rate_of(row: EndpointTraffic, now_nanoseconds: int) -> float:
    """Rate at one endpoint; 0 before two arrivals, for one has no distance to another."""
    if not row.interarrival_nanoseconds:
        return 0.0
    # The router only computes when something arrives. A silence longer than the mean is the better estimate:
    # without it a node would stay as busy for ever as it was in its last burst.
    silence = now_nanoseconds - row.last_nanoseconds
    return _NANOSECONDS / max(row.interarrival_nanoseconds, silence)


def limit_rate(rate: float, execution_seconds: float, present: int) -> float:
    """k, lowered where k E would be more than the `present` updates that are at the node's aggregators now.

    Little's law is about averages. Just after a burst k is still high while nothing is there any more: a node that
    says so looks full to the next round, which is then spread over more nodes than it needs.
    """
    return min(rate, present / execution_seconds) if execution_seconds > 0 else rate


class ExecutionEstimate:
    """Exponentially smoothed time from an update's arrival at an aggregator to folded (E)."""

    def __init__(self, weight: float = EXECUTION_WEIGHT) -> None:
        self._weight = weight
        self.seconds = 0.0
        """The estimate; 0 before there was an update."""

    def observe(self, seconds: float) -> float:
        """Take the time of one update and return the estimate; the first one is taken as it is."""
        if self.seconds:
            self.seconds += self._weight * (seconds - self.seconds)
        else:
            self.seconds = seconds
        return self.seconds


def residual_capacity(capacity: float, load: NodeLoad, in_flight: int = 0) -> float:
    """Updates that a node can still take (RC); negative when it has more than it can work on at once.

    `in_flight` are those that were placed on it and are not in its memory yet. They count one by one, because k
    only learns of them when they arrive: without them a burst would go to one node.
    """
    return capacity - load.arrival_rate * load.execution_seconds - in_flight

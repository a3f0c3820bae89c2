"""Plans the tree of aggregators of one node (paper: hierarchy planning)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

SMOOTHING: Final = 0.7
"""Share of the old estimate in the smoothed number of pending updates (LIFL paper, alpha)."""


@dataclass(frozen=True)
class Hierarchy:
    """A two-level tree: `leaves` aggregators fold updates; the first of them is also the top and merges the
    partial aggregates of the others. A leaf that serves as top costs no start and no copy."""

    leaves: int

    @property
    def top(self) -> int:
        """Index of the aggregator that finishes the round."""
        return 0


def plan_hierarchy(pending_updates: float, updates_per_leaf: int, cores: int, *, gather: bool) -> Hierarchy:
    """Return the tree for Q pending updates: ceil(Q / I) leaves, and no more than the cores can run at once.

    A gathering function needs all updates in one place, so it gets one aggregator.
    """
    if gather or pending_updates <= 0:
        return Hierarchy(1)
    wanted = math.ceil(pending_updates / max(1, updates_per_leaf))
    return Hierarchy(max(1, min(wanted, cores)))


class PendingEstimate:
    """Exponentially smoothed number of pending updates, Q_t = a Q_(t-1) + (1 - a) Q_observed."""

    def __init__(self, smoothing: float = SMOOTHING) -> None:
        self._smoothing = smoothing
        self.value: float | None = None

    def observe(self, pending: float) -> float:
        """Take a new observation and return the estimate; the first one is taken as it is."""
        if self.value is None:
            self.value = pending
        else:
            self.value = self._smoothing * self.value + (1 - self._smoothing) * pending
        return self.value

"""What comes out of a simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lifl.cluster.placement import Policy

from lifl_bench.results import median, percentile


@dataclass
class RoundOutcome:
    """One simulated round. Times in seconds."""

    number: int
    opened_s: float
    selected: int
    accepted: int = 0
    late: int = 0
    """Clients whose update came when the round was closed."""
    nodes: int = 0
    """Nodes that had updates."""
    top: str = ""
    act_s: float = 0.0
    """From the first update that was placed until the model was made."""
    tail_s: float = 0.0
    """From the last update that was counted until the model was made: what merging and transfers add."""
    round_s: float = 0.0
    """From the opening until every node in use had the new model."""
    partial_bytes: int = 0
    model_bytes: int = 0
    aggregators: int = 0
    """Leaves on the nodes that had updates; one of each node is its middle, one of these the top."""
    started: int = 0
    """Workers started."""
    cold: int = 0
    """Of these, those for which an update already waited."""
    reused: int = 0
    """Roles (leaf, middle, top) that a worker took over that was there."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """CPU seconds by component."""

    @property
    def internode_bytes(self) -> int:
        """Bytes that nodes sent each other, or the coordinator sent them."""
        return self.partial_bytes + self.model_bytes

    @property
    def total_cpu_s(self) -> float:
        """CPU seconds of the platform: clients are not part of it."""
        return sum(seconds for name, seconds in self.cpu_s.items() if name != "clients")


@dataclass
class PolicyOutcome:
    """All rounds under one policy."""

    policy: Policy
    rounds: list[RoundOutcome] = field(default_factory=list)
    workers: list[tuple[float, int]] = field(default_factory=list)
    """Simulated seconds, and how many workers there are from then on."""
    arrivals: list[float] = field(default_factory=list)
    """Simulated seconds at which updates were complete on a node."""
    placed: dict[str, int] = field(default_factory=dict)
    """Accepted updates of each node, over all rounds."""
    simulated_s: float = 0.0
    events: int = 0
    seconds: float = 0.0
    """Real time that the simulation took."""

    def values(self, of: Callable[[RoundOutcome], float]) -> list[float]:
        """One number of each round."""
        return [of(each) for each in self.rounds]

    def median(self, of: Callable[[RoundOutcome], float]) -> float:
        """Median over the rounds."""
        return median(self.values(of))

    def p95(self, of: Callable[[RoundOutcome], float]) -> float:
        """95th percentile over the rounds."""
        return percentile(self.values(of), 0.95)

    def total(self, of: Callable[[RoundOutcome], float]) -> float:
        """Sum over the rounds."""
        return sum(self.values(of))

    @property
    def peak_workers(self) -> int:
        """Most workers at a time."""
        return max((number for _, number in self.workers), default=0)

"""What is simulated: the cluster, the job, and its clients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from lifl.cli.common import CommandError
from lifl.cluster.coordinator import LEASE_SECONDS
from lifl.cluster.placement import Policy
from lifl.control.hierarchy import SMOOTHING
from lifl.messages import JobSpec

from lifl_bench.simulation.arrivals import Trace

RESNET18_BYTES: Final = 44_695_848
MOST_CLIENTS: Final = 1_000_000
MOST_NODES: Final = 10_000


@dataclass(frozen=True)
class Scenario:
    """A cluster, a job and its clients. Raises CommandError for what cannot be."""

    updates: int = 60
    """Aggregation goal of a round."""
    nodes: int = 5
    clients: int = 2800
    """All that there are; each round some of them are selected at random."""
    rounds: int = 5
    policy: Policy = "best-fit"
    model_bytes: int = RESNET18_BYTES
    """Of an update, a partial aggregate and a model alike."""
    trace: Trace = field(default_factory=Trace)
    capacities: tuple[float, ...] = (20.0,)
    """MC of the nodes, in turn if there are fewer than nodes."""
    cores: tuple[int, ...] = (8,)
    """Of the nodes, likewise."""
    over_selection: float = 0.0
    """Clients that are selected beyond the goal, as a share of it."""
    quorum: int = 0
    """Updates that suffice after the deadline; 0 means the goal."""
    deadline_s: float = 0.0
    """From the opening of a round; 0 means none."""
    updates_per_leaf: int = 2
    smoothing: float = SMOOTHING
    idle_s: float = 60.0
    """Time without updates after which a node's workers stop and its memory is given back."""
    link_gbit: float = 10.0
    """Of each node, in each direction; 0 stands for no limit."""
    client_mbit: float = 0.0
    """Of each client; 0 stands for no limit."""
    shared_cores: int = 0
    """Cores that all nodes, the coordinator's machine and the clients share, as network namespaces on one machine
    do; 0 gives each node its own."""
    heartbeat_s: float = LEASE_SECONDS / 3
    """How often a node tells its load, besides whenever it hears of something."""
    seed: int = 1

    def __post_init__(self) -> None:
        for is_wrong, text in (
            (not 1 <= self.nodes <= MOST_NODES, f"a cluster has 1 to {MOST_NODES:,} nodes"),
            (not 1 <= self.clients <= MOST_CLIENTS, f"there are 1 to {MOST_CLIENTS:,} clients"),
            (self.updates < 1, "a round has one update at least"),
            (self.rounds < 1, "there is one round at least"),
            (self.model_bytes < 4, "a model has 4 bytes at least"),
            (not all(0 < each < math.inf for each in self.capacities), "capacities are numbers above 0"),
            (not self.cores or min(self.cores) < 1, "a node has one core at least"),
            (self.quorum > self.updates, "the quorum cannot be above the number of updates"),
            (bool(self.quorum) and not self.deadline_s, "a quorum needs a deadline, after which it suffices"),
        ):
            if is_wrong:
                raise CommandError(text, [("func simulate --help", "the options, with examples")])
        if self.selected > self.clients:
            raise CommandError(
                f"a round selects {self.selected:,} clients, but there are {self.clients:,}",
                [(f"func simulate --updates {self.updates} --clients {self.selected}", "clients enough")],
            )

    @property
    def selected(self) -> int:
        """Clients that a round asks for an update."""
        return math.ceil(round(self.updates * (1 + self.over_selection), 6))

    def capacity_of(self, node: int) -> float:
        """MC of a node."""
        return self.capacities[node % len(self.capacities)]

    def cores_of(self, node: int) -> int:
        """Cores of a node."""
        return self.cores[node % len(self.cores)]

    def spec(self) -> JobSpec:
        """The job; it has no end, the simulation has."""
        return JobSpec(
            "simulated",
            "fedavg",
            self.updates,
            quorum=self.quorum,
            deadline=self.deadline_s,
            updates_per_leaf=self.updates_per_leaf,
            smoothing=self.smoothing,
            idle_seconds=self.idle_s,
            placement=self.policy,
        )

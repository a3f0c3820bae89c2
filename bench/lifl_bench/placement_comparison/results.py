"""What a comparison of placement policies has found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from lifl.cluster.placement import Policy

from lifl_bench.results import median

FORMAT: Final = "lifl-cluster/1"


@dataclass
class PlacedRound:
    """One measured round of one policy."""

    act_s: float
    """First update placed, to global model made: as the coordinator tells it."""
    round_s: float
    """First client begins to send, to every client has the new model."""
    internode_bytes: int
    """From node to node, counted at the links, with all protocols' headers."""
    reported_bytes: int
    """Of partial aggregates and models that came from elsewhere, as the nodes tell it."""
    nodes: int
    """Nodes that had updates."""
    aggregators: int
    started: int
    """Workers started for the round."""
    reused: int
    cold: int
    """Workers that an update had to wait for."""
    cpu_s: float
    """Of the coordinator and all nodes, until all is quiet again; clients are not part of it."""
    updates: list[int]
    """How many of them each node had, most first."""
    error: float
    """Largest error against the weighted mean in float64, relative to the mean magnitude of the summands."""


@dataclass
class PolicyResult:
    """All rounds of one policy."""

    policy: Policy
    rounds: list[PlacedRound] = field(default_factory=list)
    failure: str = ""
    """Why there are no more rounds."""

    def values(self, of: Callable[[PlacedRound], float]) -> list[float]:
        """One number of each round."""
        return [of(each) for each in self.rounds]

    def median(self, of: Callable[[PlacedRound], float]) -> float:
        """Median over the rounds; nan without any."""
        return median(self.values(of))


@dataclass
class Predicted:
    """What the simulator says of one policy: medians."""

    act_s: float
    internode_bytes: float
    nodes: float
    aggregators: float


@dataclass
class PlacementCell:
    """One number of nodes with one number of updates."""

    nodes: int
    updates: int
    policies: list[PolicyResult] = field(default_factory=list)
    predicted: dict[Policy, Predicted] = field(default_factory=dict)

    def of(self, policy: Policy) -> PolicyResult | None:
        """A policy's rounds; None if it has none."""
        return next((each for each in self.policies if each.policy == policy and each.rounds), None)


@dataclass
class ClusterResults:
    """A whole run."""

    date: str
    machine: dict[str, str]
    model: str
    model_bytes: int
    capacity: float
    """MC of each node: updates that it can aggregate at once."""
    rounds: int
    """Measured rounds of each policy."""
    data_plane: str = ""
    cells: list[PlacementCell] = field(default_factory=list)
    seconds: float = 0.0

    def failures(self) -> list[str]:
        """What went wrong, a sentence each."""
        return [
            f"{cell.nodes} nodes, {cell.updates} updates, {each.policy}: {each.failure}"
            for cell in self.cells
            for each in cell.policies
            if each.failure
        ]


def to_document(results: ClusterResults, losses: list[str]) -> dict[str, Any]:
    """The results for JSON, with medians beside the rounds; what is no finite number is null."""
    document = {"format": FORMAT, **asdict(results), "losses": losses, "failures": results.failures()}
    for cell, shown in zip(results.cells, document["cells"], strict=True):
        for each, row in zip(cell.policies, shown["policies"], strict=True):
            row["medians"] = {
                name: each.median(lambda one, name=name: getattr(one, name))  # type: ignore[misc]
                for name in PlacedRound.__dataclass_fields__
                if name not in ("updates", "error")
            }
    plain: dict[str, Any] = json.loads(json.dumps(document), parse_constant=lambda _: None)
    return plain

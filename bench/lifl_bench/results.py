"""What a run of `func bench` found out; `-o json` prints it, the tables and the report are made of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

TOLERANCE = 1e-5
"""Largest error of a model, relative to the mean magnitude of its summands: some roundings of float32."""


@dataclass
class Round:
    """One measured round of one cell."""

    act_s: float
    """Aggregation completion time: first byte of the first update sent, to new model ready to be fetched."""
    latencies_s: list[float]
    """Of each update: its client's first byte sent, to folded."""
    cpu_s: dict[str, float]
    """CPU seconds by component, from before the first byte until everything is quiet again; `clients` is one."""
    written_bytes: int
    """Bytes that all processes together had written to disk."""
    error: float
    """Largest error against the weighted mean in float64, relative to the mean magnitude of the summands."""

    @property
    def total_cpu_s(self) -> float:
        """CPU seconds of all components."""
        return sum(self.cpu_s.values())


@dataclass
class CellResult:
    """One mode with one model, number of updates and tree."""

    mode: str
    model: str
    model_bytes: int
    updates: int
    levels: int
    leaves: int
    rounds: list[Round] = field(default_factory=list)
    """Measured rounds; the warm-up round is not among them."""
    peak_memory_bytes: int = 0
    """Of all the mode's processes together (Pss), in rounds that were not timed."""
    copies: float = 0
    """Times an update is copied, in user space or across a socket, from the client's buffer to the fold."""
    copies_detail: str = ""
    """Which copies those are."""
    failure: str = ""
    """Why the cell has no figures; empty if it has."""

    @property
    def acts_s(self) -> list[float]:
        return [round_.act_s for round_ in self.rounds]

    @property
    def cpus_s(self) -> list[float]:
        return [round_.total_cpu_s for round_ in self.rounds]

    @property
    def latencies_s(self) -> list[float]:
        return [latency for round_ in self.rounds for latency in round_.latencies_s]


@dataclass
class AblationRow:
    """One step on the way from the broker to LIFL; each adds one mechanism to the row before."""

    name: str
    result: CellResult
    nodes: int = 1
    """Rows of as many nodes belong together; with several, the first one has LIFL's data plane already."""


@dataclass
class TrainingRound:
    """One round of federated training."""

    accuracy: float
    """On the test set, 0..1."""
    elapsed_s: float
    """Since the first round began."""
    cpu_s: float
    """CPU seconds of the mode's own processes (not the clients' training) since the first round began."""
    client_cpu_s: float
    """CPU seconds of the clients, training included, since the first round began."""


@dataclass
class TrainingResult:
    """Federated training through one mode."""

    mode: str
    target: float
    rounds: list[TrainingRound] = field(default_factory=list)
    model_sha256: str = ""
    """Of the last model's tensor bytes."""
    largest_difference: float = 0.0
    """From the last model of the first mode in the run, any parameter."""
    failure: str = ""

    def reached(self) -> TrainingRound | None:
        """The first round that met the target; None if none did."""
        return next((round_ for round_ in self.rounds if round_.accuracy >= self.target), None)


@dataclass
class Results:
    """A whole run."""

    command: str
    """As the user typed it."""
    date: str
    """UTC, ISO 8601."""
    machine: dict[str, str]
    """Facts by name, in the order in which to show them."""
    versions: dict[str, str]
    arrival: str
    repeat: int
    cells: list[CellResult] = field(default_factory=list)
    ablation: list[AblationRow] = field(default_factory=list)
    training: list[TrainingResult] = field(default_factory=list)
    modes: dict[str, str] = field(default_factory=dict)
    """What each mode is, in a few words."""
    notes: list[str] = field(default_factory=list)
    """What a reader has to know: modes that could not run and why, choices made for this machine."""
    seconds: float = 0.0


def median(values: Sequence[float]) -> float:
    """The median; nan of nothing."""
    return statistics.median(values) if values else float("nan")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0..1) of the values do not exceed; nan of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]

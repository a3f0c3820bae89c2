"""`make bench`: every figure that LIFL promises, on one node and on several, against its goal, in one table.

    python bench/run.py                        # all, about fifteen minutes
    python bench/run.py --only compare         # LIFL against broker and gRPC alone; report in bench/results
    python bench/run.py --only fold --only round
    python bench/run.py -o json > figures.json

Each row comes from the benchmark of the same name in this directory; run that one for details and its options.
Ratios compare with a bound measured in the same run. Absolute figures are of this machine and of this hour.
Several nodes are network namespaces, which need root; without it they are left out.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from lifl_bench.hosts import why_not
from lifl_bench.placement_comparison.judgement import byte_goal
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

DIRECTORY = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Figure:
    """One measured figure with its goal: at most, or at least, so much."""

    benchmark: str
    name: str
    measured: float
    goal: float
    at_most: bool
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached."""
        return self.measured <= self.goal if self.at_most else self.measured >= self.goal


def fold_figures(data: dict[str, Any]) -> Iterator[Figure]:
    """Weighted sums against the read limit."""
    goals = {2: 0.6, 4: 0.75, 8: 0.9, 16: 0.9}
    for row in data["rows"]:
        if row["what"] == "kernel" and row["dtype"] == "F32":
            name = f"{row['model']}, K = {row['updates']}, of the read limit"
            yield Figure("fold", name, row["ratio"], goals[row["updates"]], at_most=False)


def round_figures(data: dict[str, Any]) -> Iterator[Figure]:
    """A round of 16 ResNet-18 updates against raw transfer plus reading."""
    yield Figure("round", "ACT of the bound", statistics.median(data["ratios"]["wall"]), 1.3, at_most=True)
    yield Figure("round", "CPU of the bound", statistics.median(data["ratios"]["cpu"]), 1.3, at_most=True)


def start_figures(data: dict[str, Any]) -> Iterator[Figure]:
    """Cold start of a worker."""
    times = {name: statistics.median(values) for name, values in data["ms"].items()}
    yield Figure("start", "to the first Python line", times["first line"], 6, at_most=True, unit="ms")
    yield Figure("start", "to 4 updates folded", times["4 folded"], 50, at_most=True, unit="ms")


def idle_figures(data: dict[str, Any]) -> Iterator[Figure]:
    """A deployed function without traffic."""
    yield Figure("idle", f"CPU in {data['seconds']:g} s", data["cpu_seconds"], 0.1, at_most=True, unit="s")
    memory = data["shared_bytes_idle"] / 1e6
    yield Figure("idle", "memory of the pools", memory, 1.0, at_most=True, unit="MB")


def ingest_figures(data: list[dict[str, Any]]) -> Iterator[Figure]:
    """HTTP body to slot against a raw receive loop."""
    for row in data:
        name = f"{row['clients']} at once, of raw recv_into"
        yield Figure("ingest", name, row["ratio_median"], 0.85, at_most=False)


def hop_figures(data: dict[str, Any]) -> Iterator[Figure]:
    """A descriptor between two workers against a bare SK_MSG ping-pong."""
    for place, variants in data["round_trip"].items():
        for variant in ("router", "endpoint"):
            name = f"{variant}, {place}, of a bare one"
            yield Figure("hop", name, variants[variant]["ratio_to_bare"], 1.2, at_most=True)


def plan_figures(data: dict[str, Any]) -> Iterator[Figure]:
    """The coordinator's plan of a whole round, with the policy that takes longest."""
    slowest: dict[int, dict[str, Any]] = {}
    for row in data["rows"]:
        if row["goal_s"] is not None:
            slowest[row["nodes"]] = max(row, slowest.get(row["nodes"], row), key=lambda one: one["median_s"])
    for nodes, row in slowest.items():
        name = f"{row['updates']:,} updates on {nodes:,} nodes"
        yield Figure("plan", name, 1e3 * row["median_s"], 1e3 * row["goal_s"], at_most=True, unit="ms")


def transfer_figures(data: dict[str, Any]) -> Iterator[Figure]:
    """Node to node against a bare sendfile and recv_into over the same link."""
    for row in data["rows"]:
        if row["mode"] in ("push", "pull"):
            name = f"{row['mode']} of {row['megabytes']} MB, of raw"
            yield Figure("transfer", name, row["ratio"], data["goal"], at_most=False)


def cluster_figures(data: dict[str, Any]) -> Iterator[Figure]:
    """BestFit against policies that spread updates: a clear win in bytes where fewer nodes than all are enough."""
    for cell in data["cells"]:
        goal = byte_goal(cell["nodes"], cell["updates"], data["capacity"])
        sent = {each["policy"]: each["medians"]["internode_bytes"] for each in cell["policies"]}
        for other in ("worst-fit", "round-robin"):
            ours, theirs = sent["best-fit"], sent[other]
            ratio = float("inf") if ours is None or not theirs else ours / theirs
            name = f"{cell['updates']} updates, {cell['nodes']} nodes: bytes / {other}"
            yield Figure("cluster", name, ratio, goal, at_most=True)
    yield Figure("cluster", "figures that best-fit loses in", len(data["losses"]), 0, at_most=True)
    yield Figure("cluster", "policies that failed", len(data["failures"]), 0, at_most=True)


_ACT, _CPU = "act_s", "cpu_s"


def compare_figures(data: dict[str, Any]) -> Iterator[Figure]:
    """LIFL against the baselines: how many times faster, and how many times less CPU, by medians."""
    medians = {
        (cell["model"], cell["updates"], cell["mode"], what): median_of(cell, what)
        for cell in data["cells"]
        for what in (_ACT, _CPU)
    }
    for model, updates, baseline, what, goal in (
        ("resnet152", 1, "broker", _ACT, 5.8),
        ("resnet152", 1, "grpc", _ACT, 3.0),
        ("resnet18", 20, "broker", _ACT, 5.0),
        ("resnet18", 20, "grpc", _ACT, 2.5),
        ("resnet18", 20, "broker", _CPU, 8.0),
        ("resnet18", 20, "grpc", _CPU, 3.0),
    ):
        ratio = medians[model, updates, baseline, what] / medians[model, updates, "lifl", what]
        name = f"{updates} x {model}, {'ACT' if what == _ACT else 'CPU'}: {baseline} / lifl"
        yield Figure("compare", name, ratio, goal, at_most=False)


def median_of(cell: dict[str, Any], what: str) -> float:
    """The median over the rounds of a cell of `func bench`; infinite if it failed."""
    rounds = [sum(one[what].values()) if what == _CPU else one[what] for one in cell["rounds"]]
    return statistics.median(rounds) if rounds else float("inf")


_FAST_MODES = "lifl+lifl-unix+broker+broker-wire+grpc"
COMPARE_ARGUMENTS = [
    *("--cell", f"resnet152:1:1:{_FAST_MODES}"),
    *("--cell", f"resnet18:20:2:{_FAST_MODES}"),
    *("--cell", "resnet18:4:2", "--repeat", "4", "--ablation", "--train"),
    *("--report", str(DIRECTORY / "results" / "comparison")),
]
"""The stock broker takes part with four updates only: with more it takes minutes for a round."""

CLUSTER_ARGUMENTS = [
    *("--policy", "best-fit", "--policy", "worst-fit", "--policy", "round-robin"),
    *("--plot", str(DIRECTORY / "results" / "placement.png")),
]

BENCHMARKS: dict[str, tuple[list[str], Callable[[Any], Iterator[Figure]]]] = {
    "fold": ([], fold_figures),
    "ingest": ([], ingest_figures),
    "hop": ([], hop_figures),
    "start": ([], start_figures),
    "round": ([], round_figures),
    "idle": ([], idle_figures),
    "plan": ([], plan_figures),
    "transfer": ([], transfer_figures),
    "cluster": (CLUSTER_ARGUMENTS, cluster_figures),
    "compare": (COMPARE_ARGUMENTS, compare_figures),
}

NEED_HOSTS = ("transfer", "cluster")
GOALS_IN_STATUS = ("plan", "cluster")
"""Their exit status is 1 when a goal is missed, too; then they have said all."""
LONGEST_SECONDS = 900


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "kernel": platform.release()}


def run_one(name: str) -> Any:
    """What a benchmark says, decoded. Raises ClickException if it fails."""
    program = ["-m", "lifl.cli", "bench"] if name == "compare" else [str(DIRECTORY / f"{name}.py")]
    command = [sys.executable, *program, *BENCHMARKS[name][0], "-o", "json"]
    (DIRECTORY / "results").mkdir(exist_ok=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=LONGEST_SECONDS)
    has_missed = done.returncode == 1 and name in GOALS_IN_STATUS and done.stdout
    if done.returncode and not has_missed:
        raise click.ClickException(f"benchmark {name} failed; run it alone to see why")
    return json.loads(done.stdout)


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(BENCHMARKS)), help="Only these benchmarks.")
@click.option("-o", "--output", type=click.Choice(["human", "json"]), default="human")
def main(only: tuple[str, ...], output: str) -> None:
    figures: list[Figure] = []
    raw: dict[str, Any] = {}
    names = [name for name in BENCHMARKS if not only or name in only]
    if (reason := why_not()) and any(name in NEED_HOSTS for name in names):
        click.echo(f"Left out: {', '.join(NEED_HOSTS)}: {reason}", err=True)
        names = [name for name in names if name not in NEED_HOSTS]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            raw[name] = run_one(name)
            figures += BENCHMARKS[name][1](raw[name])
            progress.advance(task)
    if output == "json":
        print(json.dumps({"machine": machine(), "figures": [asdict(figure) for figure in figures], "raw": raw}))
        return
    facts = machine()
    table = Table(title=f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}", width=78)
    for heading in ("benchmark", "figure", "measured", "goal", ""):
        table.add_column(heading, justify="right" if heading in ("measured", "goal") else "left")
    for figure in figures:
        sign = "<=" if figure.at_most else ">="
        table.add_row(
            figure.benchmark,
            figure.name,
            f"{figure.measured:.3g} {figure.unit}".strip(),
            f"{sign} {figure.goal:g} {figure.unit}".strip(),
            "met" if figure.is_met else "MISSED",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

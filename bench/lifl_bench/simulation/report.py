"""What simulations found: tables of 80 columns, JSON, and a directory with both and the plots."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from lifl.cli.common import CommandError

from lifl_bench.simulation.costs import Costs, to_document
from lifl_bench.simulation.outcome import PolicyOutcome
from lifl_bench.simulation.scenario import Scenario
from lifl_bench.tables import WIDTH, cpu_seconds, duration, megabytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FORMAT: Final = "lifl-simulation/1"
SERIES_POINTS: Final = 400
"""Times at which workers are counted."""
INTERVALS: Final = 100
"""In which arrivals are counted."""
_NAMED_NODES: Final = 100
"""Clusters up to this size have the updates of each node in the JSON."""

Series = tuple[list[float], list[float]]
"""Simulated seconds and values."""


def workers_over_time(outcome: PolicyOutcome) -> Series:
    """How many workers there were, at evenly spaced times."""
    times = np.linspace(0.0, outcome.simulated_s, SERIES_POINTS)
    if not outcome.workers:
        return times.tolist(), [0.0] * SERIES_POINTS
    changes, numbers = (np.asarray(column) for column in zip(*outcome.workers, strict=True))
    before = np.searchsorted(changes, times, side="right") - 1
    return times.tolist(), np.where(before >= 0, numbers[before], 0).astype(float).tolist()


def arrivals_over_time(outcome: PolicyOutcome) -> Series:
    """Updates a second that were counted, in evenly long intervals."""
    edges = np.linspace(0.0, max(outcome.simulated_s, 1e-9), INTERVALS + 1)
    counts, _ = np.histogram(outcome.arrivals, edges)
    return edges[:-1].tolist(), (counts / (edges[1] - edges[0])).tolist()


# --- JSON ----------------------------------------------------------------------------------------------------


def to_json(scenario: Scenario, costs: Costs, outcomes: Sequence[PolicyOutcome]) -> str:
    """Everything, as one line."""
    document = {
        "format": FORMAT,
        "scenario": _scenario(scenario),
        "costs": to_document(costs)["costs"],
        "policies": [_policy(scenario, outcome) for outcome in outcomes],
    }
    return json.dumps(document)


def _scenario(scenario: Scenario) -> dict[str, Any]:
    found = asdict(scenario) | {"selected": scenario.selected}
    del found["policy"]
    found["trace"] = {name: value for name, value in found["trace"].items() if name != "offsets"} | {
        "description": scenario.trace.describe()
    }
    return found


def _policy(scenario: Scenario, outcome: PolicyOutcome) -> dict[str, Any]:
    workers, arrivals = workers_over_time(outcome), arrivals_over_time(outcome)
    found = {
        "policy": outcome.policy,
        "summary": summary(outcome),
        "rounds": [
            asdict(each) | {"internode_bytes": each.internode_bytes, "total_cpu_s": each.total_cpu_s}
            for each in outcome.rounds
        ],
        "workers": {"seconds": workers[0], "number": workers[1]},
        "arrivals": {"seconds": arrivals[0], "updates_per_second": arrivals[1]},
        "simulated_s": outcome.simulated_s,
        "events": outcome.events,
        "seconds": outcome.seconds,
    }
    return found | ({"updates": outcome.placed} if scenario.nodes <= _NAMED_NODES else {})


def summary(outcome: PolicyOutcome) -> dict[str, float]:
    """The figures of the tables."""
    return {
        "nodes": outcome.median(lambda each: each.nodes),
        "internode_bytes": outcome.median(lambda each: each.internode_bytes),
        "act_median_s": outcome.median(lambda each: each.act_s),
        "act_p95_s": outcome.p95(lambda each: each.act_s),
        "tail_s": outcome.median(lambda each: each.tail_s),
        "round_s": outcome.median(lambda each: each.round_s),
        "cpu_s": outcome.median(lambda each: each.total_cpu_s),
        "aggregators": outcome.median(lambda each: each.aggregators),
        "started": outcome.total(lambda each: each.started),
        "cold": outcome.total(lambda each: each.cold),
        "reused": outcome.total(lambda each: each.reused),
        "peak_workers": outcome.peak_workers,
        "accepted": outcome.total(lambda each: each.accepted),
        "late": outcome.total(lambda each: each.late),
    }


# --- tables --------------------------------------------------------------------------------------------------


def print_report(scenario: Scenario, outcomes: Sequence[PolicyOutcome], console: Console) -> None:
    """Print the scenario and the tables."""
    for line in _headings(scenario):
        console.print(line, width=WIDTH, highlight=False)
    console.print(_round_table(outcomes), width=WIDTH)
    console.print(_worker_table(outcomes), width=WIDTH)
    events, seconds = sum(each.events for each in outcomes), sum(each.seconds for each in outcomes)
    simulated = max(each.simulated_s for each in outcomes)
    rate = f"{events:,} events in {duration(seconds)}, {events / seconds:,.0f} a second"
    console.print(f"{duration(simulated)} simulated: {rate}", width=WIDTH, highlight=False)


def _headings(scenario: Scenario) -> Iterator[str]:
    capacities = ", ".join(f"{value:g}" for value in scenario.capacities)
    cores = f"{scenario.shared_cores} shared" if scenario.shared_cores else "/".join(map(str, scenario.cores))
    link = f"{scenario.link_gbit:g} Gbit/s" if scenario.link_gbit else "no limit"
    yield f"{_counted(scenario.nodes, 'node')}; cores: {cores}; capacity: {capacities}; link: {link}"
    extra = f" ({scenario.selected:,} selected)" if scenario.selected > scenario.updates else ""
    yield (
        f"{_counted(scenario.clients, 'client')}, {_counted(scenario.updates, 'update')} a round{extra} of "
        f"{megabytes(scenario.model_bytes)} MB"
    )
    deadline = f"; deadline {scenario.deadline_s:g} s" if scenario.deadline_s else ""
    arrivals = f"arrivals: {scenario.trace.describe()}{deadline}"
    yield f"{_counted(scenario.rounds, 'round')}; {arrivals}; seed {scenario.seed}"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _table(title: str, headings: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _round_table(outcomes: Sequence[PolicyOutcome]) -> Table:
    headings = ("nodes", "MB sent", "ACT", "p95", "tail", "round", "CPU s")
    table = _table("A round, medians (tail: after the last update)", headings)
    for outcome in outcomes:
        found = summary(outcome)
        table.add_row(
            outcome.policy,
            f"{found['nodes']:,.0f}",
            megabytes(found["internode_bytes"]),
            duration(found["act_median_s"]),
            duration(found["act_p95_s"]),
            duration(found["tail_s"]),
            duration(found["round_s"]),
            cpu_seconds(found["cpu_s"]),
        )
    return table


def _worker_table(outcomes: Sequence[PolicyOutcome]) -> Table:
    headings = ("a round", "started", "cold", "reused", "at a time", "late updates")
    table = _table("Aggregators: median of a round, then totals, and the most at a time", headings)
    for outcome in outcomes:
        found = summary(outcome)
        names = ("aggregators", "started", "cold", "reused", "peak_workers", "late")
        table.add_row(outcome.policy, *(f"{found[name]:,.0f}" for name in names))
    return table


# --- a directory ---------------------------------------------------------------------------------------------


def write_report(
    scenario: Scenario, costs: Costs, outcomes: Sequence[PolicyOutcome], directory: Path
) -> list[Path]:
    """Write report.txt, results.json and the plots; returns the files. Raises CommandError if that fails."""
    from rich.console import Console

    try:
        from lifl_bench.simulation.plots import draw_all
    except ImportError:
        hint = ("pip install 'lifl[bench]'", "what the plots are drawn with")
        raise CommandError("the plots need matplotlib", [hint]) from None
    text = io.StringIO()
    print_report(scenario, outcomes, Console(file=text, width=WIDTH))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = [directory / "report.txt", directory / "results.json"]
        files[0].write_text(text.getvalue(), encoding="utf-8")
        files[1].write_text(to_json(scenario, costs, outcomes) + "\n", encoding="utf-8")
        return files + draw_all(scenario, outcomes, directory)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CommandError(f"the report cannot be written to '{directory}': {reason}") from None

"""Plots of simulations, as PNG files. A policy has one colour, line and order in all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import matplotlib
from lifl.cluster.placement import Policy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lifl_bench.plots import _GREY as GREY
from lifl_bench.plots import _STYLE as STYLE
from lifl_bench.plots import DPI, WIDTH_INCHES
from lifl_bench.results import median
from lifl_bench.simulation.outcome import PolicyOutcome, RoundOutcome
from lifl_bench.simulation.report import arrivals_over_time, workers_over_time
from lifl_bench.simulation.scenario import Scenario

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class _Look(NamedTuple):
    colour: str
    line: Any
    width: float
    marker: str


_LOOKS: Final[dict[Policy, _Look]] = {
    "best-fit": _Look("#0072b2", "-", 2.4, "o"),
    "first-fit": _Look("#56b4e9", (0, (5, 1)), 2.0, "s"),
    "worst-fit": _Look("#d55e00", "--", 1.6, "^"),
    "round-robin": _Look("#e69f00", ":", 1.8, "D"),
}


class _Measure(NamedTuple):
    title: str
    of: Callable[[RoundOutcome], float]
    is_total: bool = False
    """The sum of all rounds counts, in place of the median round."""


_MEASURES: Final = (
    _Measure("Nodes used", lambda each: each.nodes),
    _Measure("Sent between nodes, GB", lambda each: each.internode_bytes / 1e9),
    _Measure("Aggregation completion time, seconds", lambda each: each.act_s),
    _Measure("From the last update to the model, seconds", lambda each: each.tail_s),
    _Measure("CPU without clients, seconds", lambda each: each.total_cpu_s),
    _Measure("Workers started, all rounds together", lambda each: each.started, is_total=True),
)
_ACT, _BYTES = _MEASURES[2], _MEASURES[1]


def draw_all(scenario: Scenario, outcomes: Sequence[PolicyOutcome], directory: Path) -> list[Path]:
    """Write every figure to the directory; returns the files. Raises OSError if one cannot be written."""
    with matplotlib.rc_context(STYLE):
        figures = {
            "comparison.png": _draw_comparison(scenario, outcomes),
            "workers.png": _draw_workers(scenario, outcomes),
        }
        if scenario.rounds > 1:
            figures["rounds.png"] = _draw_rounds(scenario, outcomes)
        for name, figure in figures.items():
            figure.savefig(directory / name, dpi=DPI)
    return [directory / name for name in figures]


def _figure(height: float, title: str, scenario: Scenario, note: str = "") -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold")
    subject = (
        f"{scenario.nodes:,} nodes, {scenario.updates:,} updates of {scenario.model_bytes / 1e6:,.1f} MB a round, "
        f"arrivals: {scenario.trace.describe()}"
    )
    figure.supxlabel(f"{subject}\n{note}".strip(), x=0.012, ha="left", fontsize=8.5, color=GREY)
    return figure


def _draw_comparison(scenario: Scenario, outcomes: Sequence[PolicyOutcome]) -> Figure:
    """A panel for each measure: medians of the rounds, from the lowest to the highest a whisker."""
    rows = (len(_MEASURES) + 1) // 2
    height = 1.2 + rows * (0.75 + 0.24 * len(outcomes))
    note = f"Bars: the median of {scenario.rounds} rounds, and from the lowest to the highest a whisker."
    figure = _figure(height, "Placement policies", scenario, note if scenario.rounds > 1 else "")
    for axes, measure in zip(figure.subplots(rows, 2).flat, _MEASURES, strict=False):
        _draw_measure(axes, measure, outcomes)
    return figure


def _draw_measure(axes: Axes, measure: _Measure, outcomes: Sequence[PolicyOutcome]) -> None:
    highest = 0.0
    for y, outcome in enumerate(outcomes):
        values = [outcome.total(measure.of)] if measure.is_total else outcome.values(measure.of)
        middle = median(values)
        highest = max(highest, *values)
        axes.barh(y, middle, height=0.62, color=_LOOKS[outcome.policy].colour)
        if max(values) > min(values):
            axes.plot([min(values), max(values)], [y, y], color="#222222", linewidth=1.1, marker="|", markersize=6)
        text = f"{middle:,.3g}" if middle < 1000 else f"{middle:,.0f}"
        axes.annotate(text, (max(values), y), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(outcomes)), [outcome.policy for outcome in outcomes])
    axes.set_ylim(len(outcomes) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * highest or 1)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_title(measure.title)


def _draw_workers(scenario: Scenario, outcomes: Sequence[PolicyOutcome]) -> Figure:
    """Arrivals above, workers below: do they follow the load?"""
    figure = _figure(5.2, "Workers over time", scenario)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.6))
    times, rates = arrivals_over_time(outcomes[0])
    above.fill_between(times, rates, step="post", color="#c4c4c4", linewidth=0)
    above.set_ylabel("updates / s")
    above.set_title(f"Updates that were counted ({outcomes[0].policy})")
    for outcome in outcomes:
        look = _LOOKS[outcome.policy]
        times, numbers = workers_over_time(outcome)
        below.step(
            times, numbers, where="post", label=outcome.policy, color=look.colour, linestyle=look.line,
            linewidth=look.width,
        )  # fmt: skip
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
    below.set_title("Workers")
    below.set_ylabel("workers")
    below.set_xlabel("seconds")
    below.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    below.legend(ncols=len(outcomes), loc="upper left", bbox_to_anchor=(0, -0.2), borderaxespad=0)
    return figure


def _draw_rounds(scenario: Scenario, outcomes: Sequence[PolicyOutcome]) -> Figure:
    """ACT and bytes of every round."""
    figure = _figure(3.6, "Round by round", scenario)
    panels = figure.subplots(1, 2)
    for axes, measure in zip(panels, (_ACT, _BYTES), strict=True):
        for outcome in outcomes:
            look = _LOOKS[outcome.policy]
            axes.plot(
                [each.number for each in outcome.rounds], outcome.values(measure.of), label=outcome.policy,
                color=look.colour, linestyle=look.line, linewidth=look.width, marker=look.marker, markersize=4,
            )  # fmt: skip
        axes.set_title(measure.title)
        axes.set_xlabel("round")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panels[0].legend(ncols=2, loc="lower left")  # the lines are far above 0
    return figure

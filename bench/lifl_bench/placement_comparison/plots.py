"""The plot of a comparison: bytes, ACT and aggregators of each policy, for each number of nodes and updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from lifl.cluster.placement import POLICIES, Policy

from lifl_bench.placement_comparison.results import ClusterResults, PlacedRound, PlacementCell
from lifl_bench.plots import _GREY as GREY
from lifl_bench.plots import _STYLE as STYLE
from lifl_bench.plots import DPI, WIDTH_INCHES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class _Look(NamedTuple):
    """As the policies look in the simulator's plots; hatches tell them apart in grey."""

    colour: str
    hatch: str


_LOOKS: Final[dict[Policy, _Look]] = {
    "best-fit": _Look("#0072b2", ""),
    "first-fit": _Look("#56b4e9", "...."),
    "worst-fit": _Look("#d55e00", "////"),
    "round-robin": _Look("#e69f00", "\\\\\\\\"),
}


class _Measure(NamedTuple):
    title: str
    of: Callable[[PlacedRound], float]


_MEASURES: Final = (
    _Measure("Between nodes, MB", lambda one: one.internode_bytes / 1e6),
    _Measure("ACT, ms", lambda one: 1e3 * one.act_s),
    _Measure("Aggregators", lambda one: one.aggregators),
)
_ROW_INCHES: Final = 2.25


def draw(results: ClusterResults, file: Path) -> Path:
    """Write the plot. Needs matplotlib: ImportError without. Raises OSError if it cannot be written."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = sorted({cell.nodes for cell in results.cells})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 1.1 + _ROW_INCHES * len(counts)), layout="constrained")
        FigureCanvasAgg(figure)
        note = (
            f"Updates of {results.model_bytes / 1e6:,.1f} MB, capacity {results.capacity:g} a node. Bars: medians "
            f"of {results.rounds} rounds, from the lowest to the highest a whisker."
        )
        figure.supxlabel(note, x=0.012, ha="left", fontsize=8.5, color=GREY)
        for nodes, row in zip(counts, figure.subplots(len(counts), len(_MEASURES), squeeze=False), strict=True):
            cells = sorted((cell for cell in results.cells if cell.nodes == nodes), key=lambda cell: cell.updates)
            for axes, measure in zip(row, _MEASURES, strict=True):
                _draw_panel(axes, cells, measure)
            row[0].set_ylabel(f"{nodes} node{'s' if nodes > 1 else ''}", fontweight="bold")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        # The title is the legend's: the layout keeps no room for both, one above the other.
        legend = figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=len(labels),
            title="Placement policies, measured",
            title_fontproperties={"size": 12.5, "weight": "bold"},
        )
        legend.set_alignment("left")
        figure.savefig(file, dpi=DPI)
    return file


def _draw_panel(axes: Axes, cells: Sequence[PlacementCell], measure: _Measure) -> None:
    policies = [policy for policy in POLICIES if any(cell.of(policy) for cell in cells)]
    width = 0.8 / max(1, len(policies))
    for number, policy in enumerate(policies):
        look = _LOOKS[policy]
        for place, cell in enumerate(cells):
            result = cell.of(policy)
            if result is None:
                continue
            x = place + (number - (len(policies) - 1) / 2) * width
            values, middle = result.values(measure.of), result.median(measure.of)
            label = policy if place == 0 else None
            axes.bar(x, middle, 0.9 * width, color=look.colour, hatch=look.hatch, edgecolor="white", label=label)
            if middle == 0:
                axes.annotate("0", (x, 0), (0, 1), textcoords="offset points", ha="center", fontsize=8)
            if max(values) > min(values):
                axes.plot(
                    [x, x], [min(values), max(values)], color="#222222", linewidth=1.0, marker="_", markersize=4
                )
    axes.set_xticks(range(len(cells)), [str(cell.updates) for cell in cells])
    axes.set_xlim(-0.6, len(cells) - 0.4)
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set_title(measure.title)
    axes.set_xlabel("updates")

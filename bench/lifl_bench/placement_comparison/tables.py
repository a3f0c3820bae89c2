"""What a comparison found, as tables of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lifl_bench.placement_comparison.judgement import verdict
from lifl_bench.placement_comparison.results import ClusterResults, PlacedRound, PlacementCell, PolicyResult
from lifl_bench.results import median
from lifl_bench.tables import WIDTH, cpu_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXPLANATION = (
    "Medians over the rounds, of ACT with [lowest..highest]. ACT: first update placed to new model made. "
    "ROUND: first client begins to send to every client has the new model. MB: bytes from node to node, counted "
    "at the links; TOLD: partial aggregates and models from elsewhere, as nodes report them. AGGR: aggregators. "
    "NEW: workers started, COLD: of these, those that an update waited for. CPU of the coordinator and all nodes, "
    "without clients."
)
RULE = (
    "BestFit loses in a figure if its median is worse (bytes: by a twentieth and 0.1 MB, ACT: by a tenth) and "
    "most pairs of its rounds with the other policy's are (ACT: 95 %). It clearly wins in bytes if it needs no "
    "more than the fewest possible nodes do, and a tenth of the other policy's."
)
PREDICTION = (
    "Beside each other: what the simulator says with costs measured on this machine (SIM), and the medians "
    "measured (REAL)."
)


def print_comparison(results: ClusterResults, console: Console) -> None:
    """All tables, what BestFit loses and wins, and what failed."""
    console.print(EXPLANATION, width=WIDTH, markup=False, highlight=False)
    for cell in results.cells:
        console.print()
        console.print(_cell_table(results, cell), width=WIDTH)
    if any(cell.predicted for cell in results.cells):
        console.print()
        console.print(PREDICTION, width=WIDTH, markup=False, highlight=False)
        console.print()
        console.print(_prediction_table(results.cells), width=WIDTH)
    said = [*verdict(results), *(f"FAILED: {text}" for text in results.failures())]
    if said:
        console.print()
        console.print(RULE, width=WIDTH, markup=False, highlight=False)
    for text in said:
        console.print(f"* {text}", width=WIDTH, markup=False, highlight=False)


def title_of(results: ClusterResults, cell: PlacementCell) -> str:
    """What a cell is, in words."""
    nodes = "1 node" if cell.nodes == 1 else f"{cell.nodes} nodes"
    return (
        f"{cell.updates} updates of {results.model_bytes / 1e6:,.1f} MB, {nodes} of capacity "
        f"{results.capacity:g}, {results.rounds} rounds"
    )


def _cell_table(results: ClusterResults, cell: PlacementCell) -> Table:
    table = _table(title_of(results, cell))
    table.add_column("POLICY", justify="left", no_wrap=True)
    for head in ("ACT ms", "ROUND ms", "MB", "TOLD", "NODES", "AGGR", "NEW", "COLD", "CPU s"):
        table.add_column(head, justify="right", no_wrap=True)
    for each in cell.policies:
        table.add_row(each.policy, *(_figures(each) if each.rounds else ["failed"]))
    return table


def _figures(each: PolicyResult) -> list[str]:
    columns: list[Callable[[PlacedRound], float]] = [
        lambda one: one.nodes,
        lambda one: one.aggregators,
        lambda one: one.started,
        lambda one: one.cold,
    ]
    return [
        milliseconds(each.values(lambda one: one.act_s)),
        f"{1e3 * each.median(lambda one: one.round_s):.0f}",
        megabytes(each.median(lambda one: one.internode_bytes)),
        megabytes(each.median(lambda one: one.reported_bytes)),
        *(f"{each.median(column):g}" for column in columns),
        cpu_seconds(each.median(lambda one: one.cpu_s)),
    ]


def _prediction_table(cells: Sequence[PlacementCell]) -> Table:
    table = _table()
    for head in ("NODES", "UPDATES"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("POLICY", justify="left", no_wrap=True)
    for head in ("ACT ms SIM", "REAL", "MB SIM", "REAL", "USED SIM", "REAL", "AGGR SIM", "REAL"):
        table.add_column(head, justify="right", max_width=6)
    for cell in cells:
        for policy, predicted in cell.predicted.items():
            measured = cell.of(policy)
            if measured is not None:
                pairs = (
                    (f"{1e3 * predicted.act_s:.0f}", f"{1e3 * measured.median(lambda one: one.act_s):.0f}"),
                    (
                        megabytes(predicted.internode_bytes),
                        megabytes(measured.median(lambda one: one.internode_bytes)),
                    ),
                    (f"{predicted.nodes:g}", f"{measured.median(lambda one: one.nodes):g}"),
                    (f"{predicted.aggregators:g}", f"{measured.median(lambda one: one.aggregators):g}"),
                )
                table.add_row(
                    str(cell.nodes), str(cell.updates), policy, *(text for pair in pairs for text in pair)
                )
    return table


def milliseconds(seconds: Sequence[float]) -> str:
    """`123 [110..150]` of times in seconds."""
    digits = 0 if median(seconds) >= 0.1 else 1
    numbers = [f"{1e3 * value:.{digits}f}" for value in (median(seconds), min(seconds), max(seconds))]
    return numbers[0] if len(seconds) == 1 else f"{numbers[0]} [{numbers[1]}..{numbers[2]}]"


def megabytes(size: float) -> str:
    """Bytes in MB of 10^6."""
    return f"{size / 1e6:.1f}" if size < 99.95e6 else f"{size / 1e6:.0f}"


def _table(title: str | None = None) -> Table:
    from rich.table import Table
    from rich.text import Text

    return Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="dim",
    )

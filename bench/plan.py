"""How long the coordinator takes to plan: placement and hierarchy of a round, and the placement of single updates.

    python bench/plan.py [--repeats 9] [--policy best-fit ...] [-o json]

Nodes differ in capacity (20 to 21.5 updates) and have eight cores. Nothing is sent anywhere. Measured are

* `plan`: a whole round at once, `lifl.cluster.hierarchy.plan_cluster`
* `singly`: the same updates one after another, each chosen and taken off its node's residual, without leaves
* `choose` and `set`: one choice, and one change of a residual, while updates come and go

The goals are 17 ms for 10,000 updates on 50 nodes and 1 s for 1,000,000 on 10,000. The exit status is 1 when a
plan misses its goal.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Final

import click
from lifl.cluster.hierarchy import Candidate, plan_cluster
from lifl.cluster.placement import POLICIES, PlacementIndex, Policy
from rich import box
from rich.console import Console
from rich.table import Table

CORES: Final = 8
UPDATES_PER_LEAF: Final = 2
ONLINE_UPDATES: Final = 10_000
UNDER_WAY: Final = 1_000
"""Updates that are being uploaded at a time while single operations are measured."""

SIZES: Final = ((50, 10_000, 0.017), (10_000, 1_000_000, 1.0))
"""Nodes, updates, and the seconds that planning may take."""


@dataclass
class Row:
    """One measurement: the median of all repeats and their extremes."""

    what: str
    policy: Policy
    nodes: int
    updates: int
    median_s: float
    lowest_s: float
    highest_s: float
    goal_s: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached, if there is one."""
        return self.goal_s is None or self.median_s <= self.goal_s


def candidates(nodes: int) -> list[Candidate]:
    return [Candidate(f"node{number:05}", CORES, 20.0 + number % 7 / 4) for number in range(nodes)]


def index(nodes: int) -> PlacementIndex:
    return PlacementIndex({candidate.node: candidate.residual for candidate in candidates(nodes)})


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plan_once(nodes: int, updates: int, policy: Policy) -> dict[str, float]:
    """Seconds of planning a whole round."""
    cluster = candidates(nodes)
    return {"plan": seconds(lambda: plan_cluster(updates, cluster, policy, UPDATES_PER_LEAF))}


def place_singly(nodes: int, updates: int, policy: Policy) -> dict[str, float]:
    """Seconds of placing the updates of a round one after another."""
    cluster = index(nodes)

    def work() -> None:
        for _ in range(updates):
            cluster.take(cluster.choose(policy))

    return {"singly": seconds(work)}


def come_and_go(nodes: int, policy: Policy) -> dict[str, float]:
    """Seconds of one choice, and of one change of a residual, while updates come and go."""
    cluster = index(nodes)
    under_way: list[str] = []
    choosing = setting = 0.0
    for _ in range(ONLINE_UPDATES):
        before = time.perf_counter()
        node = cluster.choose(policy)
        chosen = time.perf_counter()
        cluster.set_residual(node, cluster.residual(node) - 1)
        choosing += chosen - before
        setting += time.perf_counter() - chosen
        under_way.append(node)
        if len(under_way) == UNDER_WAY:
            done = under_way.pop(0)
            cluster.set_residual(done, cluster.residual(done) + 1)
    return {"choose": choosing / ONLINE_UPDATES, "set": setting / ONLINE_UPDATES}


def measure(policies: tuple[Policy, ...], repeats: int) -> Iterator[Row]:
    """All rows; the policies take turns within each repeat."""
    for nodes, updates, goal in SIZES:
        times: dict[tuple[str, Policy], list[float]] = {}
        for _ in range(repeats):
            for policy in policies:
                found = (
                    plan_once(nodes, updates, policy)
                    | place_singly(nodes, updates, policy)
                    | come_and_go(nodes, policy)
                )
                for what, value in found.items():
                    times.setdefault((what, policy), []).append(value)
        for what in ("plan", "singly", "choose", "set"):
            for policy in policies:
                values = times[what, policy]
                limit = goal if what == "plan" else None
                middle = statistics.median(values)
                yield Row(what, policy, nodes, updates, middle, min(values), max(values), limit)


def show(rows: list[Row]) -> None:
    for nodes, updates, _ in SIZES:
        title = f"{updates:,} updates on {nodes:,} nodes"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in ("what", "policy"):
            table.add_column(heading)
        for heading in ("median", "lowest..highest", "goal"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("")
        for row in rows:
            if row.nodes == nodes:
                table.add_row(*cells(row))
        Console(width=80).print(table)


def cells(row: Row) -> tuple[str, ...]:
    factor, unit = (1e6, "us") if row.what in ("choose", "set") else (1e3, "ms")
    return (
        row.what,
        row.policy,
        f"{factor * row.median_s:,.2f} {unit}",
        f"{factor * row.lowest_s:,.2f}..{factor * row.highest_s:,.2f}",
        "" if row.goal_s is None else f"{1e3 * row.goal_s:,g} ms",
        "" if row.goal_s is None else "met" if row.is_met else "MISSED",
    )


@click.command(help=__doc__)
@click.option("--repeats", default=9, type=click.IntRange(min=3), show_default=True, help="Of each measurement.")
@click.option("--policy", "policies", multiple=True, type=click.Choice(POLICIES), help="All by default.")
@click.option("-o", "--output", default="table", type=click.Choice(["table", "json"]))
def main(repeats: int, policies: tuple[Policy, ...], output: str) -> None:
    rows = list(measure(policies or POLICIES, repeats))
    if output == "json":
        click.echo(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show(rows)
    sys.exit(0 if all(row.is_met for row in rows) else 1)


if __name__ == "__main__":
    main()

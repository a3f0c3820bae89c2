"""Whether BestFit loses against another policy, and where it clearly wins.

A policy loses in a figure if its median is the worse one, beyond a tolerance, and if it is worse in most of all
pairs of its rounds with the other one's: what a second run may well turn round is no loss. Bytes may differ by a
twentieth, for some are the protocols'. ACT may differ by a tenth, which neighbours on the host move it by, and has
to be worse in 95 % of all pairs: with seven rounds each chance alone does that once in a thousand comparisons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from lifl.cluster.placement import Policy

from lifl_bench.placement_comparison.results import ClusterResults, PlacedRound, PlacementCell, PolicyResult

JUDGED: Final[Policy] = "best-fit"
ALLOWANCE: Final = 0.1
"""A clear win in bytes: what the fewest possible nodes need, and this share of the other one's bytes at most."""


class Figure(NamedTuple):
    """What is compared; less is better."""

    name: str
    of: Callable[[PlacedRound], float]
    tolerance: float
    """Share by which medians may differ without meaning anything."""
    slack: float = 0.0
    """The same as an absolute number."""
    pairs: float = 0.5
    """Share of all pairs of rounds that have to be worse."""


FIGURES: Final = (
    Figure("inter-node bytes", lambda one: one.internode_bytes, 0.05, 100_000),
    Figure("nodes", lambda one: one.nodes, 0.0),
    Figure("aggregators", lambda one: one.aggregators, 0.0),
    Figure("ACT", lambda one: one.act_s, 0.1, pairs=0.95),
)


def losses(results: ClusterResults) -> list[str]:
    """Where BestFit loses, a sentence each; empty if it was not measured or never loses."""
    return [text for cell in results.cells for text in _losses_of(cell)]


def _losses_of(cell: PlacementCell) -> Iterator[str]:
    ours = cell.of(JUDGED)
    for other in cell.policies:
        if ours is None or other is ours or not other.rounds:
            continue
        for figure in FIGURES:
            if is_worse(ours, other, figure):
                yield (
                    f"{cell.nodes} nodes, {cell.updates} updates: {JUDGED} loses against {other.policy} in "
                    f"{figure.name}, {ours.median(figure.of):.4g} against {other.median(figure.of):.4g}"
                )


def is_worse(ours: PolicyResult, other: PolicyResult, figure: Figure) -> bool:
    """Whether the first one loses in a figure."""
    mine, theirs = ours.values(figure.of), other.values(figure.of)
    bound = statistics.median(theirs) * (1 + figure.tolerance) + figure.slack
    worse = sum(one > two for one in mine for two in theirs)
    return statistics.median(mine) > bound and worse >= figure.pairs * len(mine) * len(theirs)


def byte_goal(nodes: int, updates: int, capacity: float) -> float:
    """What BestFit may need for a clear win, as a share of the bytes of a policy that uses all nodes.

    Each node but the top sends a partial aggregate and gets the new model, so n nodes need n - 1 of each. Where
    the updates fill all nodes nothing can be won: 1.05, which is no loss.
    """
    fewest = math.ceil(updates / capacity)
    return 1.05 if fewest >= nodes else (fewest - 1) / (nodes - 1) + ALLOWANCE


def byte_wins(results: ClusterResults) -> Iterator[tuple[PlacementCell, Policy, bool]]:
    """For each cell whose updates fit on fewer nodes than there are, and each policy that spreads them: whether
    BestFit clearly wins in bytes."""
    for cell in results.cells:
        ours = cell.of(JUDGED)
        goal = byte_goal(cell.nodes, cell.updates, results.capacity)
        if ours is None or goal > 1:
            continue
        for policy in ("worst-fit", "round-robin"):
            other = cell.of(policy)
            if other is not None:
                theirs = other.median(lambda one: one.internode_bytes)
                yield cell, other.policy, ours.median(lambda one: one.internode_bytes) <= goal * theirs


def verdict(results: ClusterResults) -> list[str]:
    """All of it in sentences, for people."""
    found = losses(results)
    texts = found or [f"{JUDGED} loses nowhere, by the rule above"]
    wins = list(byte_wins(results))
    if not any(cell.of(JUDGED) for cell in results.cells):
        return []
    if wins:
        count = sum(is_win for _, _, is_win in wins)
        texts.append(
            f"where the updates fit on fewer nodes, {JUDGED} clearly wins in inter-node bytes in {count} of "
            f"{len(wins)} comparisons with worst-fit and round-robin"
        )
        texts += [
            f"no clear win in bytes: {cell.nodes} nodes, {cell.updates} updates, against {policy}"
            for cell, policy, is_win in wins
            if not is_win
        ]
    return texts

"""Plans the tree of aggregators of a whole cluster (paper: hierarchy planning).

On each node that has updates `lifl.control.hierarchy` plans the leaves. The first leaf of a node is its middle
too, which costs no start: it merges the node's partial aggregates into one, so that each node sends at most one.
The middle of the node with the most to merge is also the top. Only routes differ between the three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lifl.cluster.placement import NoNode, Policy, plan_counts
from lifl.control.hierarchy import plan_hierarchy


class Candidate(NamedTuple):
    """A node that takes updates."""

    node: str
    cores: int
    """Leaves that can run at once."""
    residual: float
    """RC, as `lifl.cluster.load.residual_capacity` tells it."""


class NodePlan(NamedTuple):
    """What a plan gives one node."""

    node: str
    updates: int
    leaves: int
    """Aggregators; the first one is the node's middle too."""


class ClusterPlan(NamedTuple):
    """A cluster's tree for the updates that are expected."""

    nodes: tuple[NodePlan, ...]
    """Those with updates, in the order of registration; empty when none are expected."""
    top: str
    """The node whose middle is the top, should the updates come as expected; empty without updates."""

    @property
    def leaves(self) -> int:
        """Aggregators on all nodes together: all that have to be started."""
        return sum(plan.leaves for plan in self.nodes)


def plan_cluster(
    pending_updates: float,
    candidates: Sequence[Candidate],
    policy: Policy,
    updates_per_leaf: int,
    *,
    gather: bool = False,
) -> ClusterPlan:
    """Return the tree for Q pending updates: Q placed on nodes, and on each ceil(Q_i / I) leaves within its cores.

    Q is what `PendingEstimate` says: no whole number, so it is rounded up. `candidates` are in the order of
    registration; a node that is not among them gets nothing. A gathering function needs all updates in one place,
    so all go to one node, as one item of this size. Raises NoNode if updates are expected and nobody takes them.
    """
    # 20.000000000000004 is 20 that was smoothed, and no reason for another update.
    pending = math.ceil(round(pending_updates, 6))
    if pending <= 0:
        return ClusterPlan((), "")
    residuals = {candidate.node: candidate.residual for candidate in candidates}
    if gather:
        counts = dict.fromkeys(plan_counts(1, residuals, policy, size=pending), pending)
    else:
        counts = plan_counts(pending, residuals, policy)
    cores = {candidate.node: candidate.cores for candidate in candidates}
    plans = tuple(
        NodePlan(node, count, plan_hierarchy(count, updates_per_leaf, cores[node], gather=gather).leaves)
        for node, count in counts.items()
    )
    return ClusterPlan(plans, choose_top(counts))


def choose_top(updates_by_node: Mapping[str, int]) -> str:
    """The node with the most updates to merge; of equal ones the first, so give them in the order of registration.

    What has the most stays where it is. Raises NoNode if there is no node.
    """
    if not updates_by_node:
        raise NoNode
    return max(updates_by_node, key=updates_by_node.__getitem__)

"""The tree of a cluster."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifl.cluster.hierarchy import Candidate, ClusterPlan, NodePlan, choose_top, plan_cluster
from lifl.cluster.placement import POLICIES, NoNode, Policy
from lifl.control.hierarchy import PendingEstimate, plan_hierarchy


def nodes(*residuals: float, cores: int = 4) -> list[Candidate]:
    return [Candidate(f"node{number}", cores, residual) for number, residual in enumerate(residuals)]


def test_updates_fill_one_node_after_the_other_and_the_top_is_where_most_are():
    assert plan_cluster(25, nodes(20, 20, 20), "best-fit", 2) == ClusterPlan(
        (NodePlan("node0", 20, 4), NodePlan("node1", 5, 3)), "node0"
    )


def test_spreading_gives_every_node_a_few():
    plan = plan_cluster(25, nodes(20, 20, 20), "worst-fit", 2)
    assert [(each.updates, each.leaves) for each in plan.nodes] == [(9, 4), (8, 4), (8, 4)]
    assert (plan.top, plan.leaves) == ("node0", 12)


def test_a_single_update_takes_one_node_with_one_aggregator():
    assert plan_cluster(1, nodes(20, 20), "best-fit", 2) == ClusterPlan((NodePlan("node0", 1, 1),), "node0")


def test_one_node_is_what_the_nodes_own_planner_makes_of_it():
    for pending in (1, 3, 7, 100):
        (plan,) = plan_cluster(pending, nodes(20, cores=3), "best-fit", 2).nodes
        assert plan == NodePlan("node0", pending, plan_hierarchy(pending, 2, 3, gather=False).leaves)


@pytest.mark.parametrize("pending", [0, -1, 0.0, 1e-9])
def test_without_updates_the_plan_is_empty_even_without_nodes(pending: float):
    assert plan_cluster(pending, [], "best-fit", 2) == ClusterPlan((), "")
    assert plan_cluster(pending, nodes(20), "best-fit", 2).leaves == 0


def test_updates_without_a_node_are_an_error():
    with pytest.raises(NoNode):
        plan_cluster(1, [], "best-fit", 2)
    with pytest.raises(NoNode):
        choose_top({})


def test_nodes_that_get_nothing_are_not_in_the_plan():
    plan = plan_cluster(4, nodes(0.5, 20, 20), "first-fit", 2)
    assert [each.node for each in plan.nodes] == ["node1"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gathering_function_gets_one_aggregator_on_one_node(policy: Policy):
    plan = plan_cluster(12, nodes(20, 15, 30), policy, 2, gather=True)
    chosen = {"best-fit": "node1", "first-fit": "node0", "worst-fit": "node2", "round-robin": "node0"}[policy]
    assert plan == ClusterPlan((NodePlan(chosen, 12, 1),), chosen)


def test_a_gathering_function_that_fits_nowhere_goes_where_there_is_most_room():
    assert plan_cluster(50, nodes(20, 15, 30), "best-fit", 2, gather=True).top == "node2"


def test_a_smoothed_number_of_updates_is_rounded_up_but_not_for_a_rounding_error():
    assert sum(each.updates for each in plan_cluster(12.4, nodes(20), "best-fit", 2).nodes) == 13
    estimate = PendingEstimate(0.9)
    for _ in range(50):
        estimate.observe(20.1)
        estimate.observe(19.9)
    assert plan_cluster(20.000000000000004, nodes(20, 20), "best-fit", 2).nodes == (NodePlan("node0", 20, 4),)


def test_the_top_is_the_node_with_the_most_and_of_equal_ones_the_first():
    assert choose_top({"a": 3, "b": 7, "c": 7}) == "b"
    assert choose_top({"c": 7, "b": 7}) == "c"


@settings(max_examples=150, deadline=None)
@given(
    pending=st.integers(1, 500),
    residuals=st.lists(st.floats(-10, 60), min_size=1, max_size=10),
    policy=st.sampled_from(POLICIES),
    per_leaf=st.integers(1, 5),
    cores=st.integers(1, 16),
    gather=st.booleans(),
)
def test_every_update_has_a_node_and_no_node_more_leaves_than_cores_or_updates(
    pending: int, residuals: list[float], policy: Policy, per_leaf: int, cores: int, gather: bool
):
    plan = plan_cluster(pending, nodes(*residuals, cores=cores), policy, per_leaf, gather=gather)
    assert sum(each.updates for each in plan.nodes) == pending
    assert all(1 <= each.leaves <= min(cores, each.updates) for each in plan.nodes)
    assert plan.top in {each.node for each in plan.nodes}
    assert max(plan.nodes, key=lambda each: each.updates).node == plan.top
    if gather:
        assert len(plan.nodes) == plan.leaves == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_ten_thousand_nodes_are_planned_and_share_all_updates(policy: Policy):
    plan = plan_cluster(1_000_000, nodes(*[20.0] * 10_000, cores=8), policy, 2)
    assert len(plan.nodes) == 10_000
    assert {each.updates for each in plan.nodes} == {100}
    assert plan.leaves == 80_000

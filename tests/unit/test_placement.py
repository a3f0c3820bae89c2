"""Which node an update is placed on."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifl.cluster.placement import POLICIES, NoNode, PlacementIndex, Policy, plan_counts
from lifl.errors import Busy, LiflError

RESIDUALS = {"a": 3.0, "b": 1.5, "c": 9.0, "d": 1.5}
policies = pytest.mark.parametrize("policy", POLICIES)
any_policy = st.sampled_from(POLICIES)
any_residual = st.one_of(
    st.integers(-5, 30).map(float), st.floats(-50, 50), st.sampled_from([0.0, 1.0, 1 - 2**-21, 1e30, -1e30])
)
any_residuals = st.lists(any_residual, min_size=1, max_size=12).map(
    lambda values: {f"node{number}": value for number, value in enumerate(values)}
)


def place_one_by_one(index: PlacementIndex, count: int, policy: Policy) -> list[str]:
    """What the coordinator does when updates come one at a time."""
    chosen = []
    for _ in range(count):
        chosen.append(index.choose(policy))
        index.take(chosen[-1])
    return chosen


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("best-fit", ["b", "d", "a", "a", "a", "c"]),
        ("first-fit", ["a", "a", "a", "b", "c", "c"]),
        ("worst-fit", ["c", "c", "c", "c", "c", "c"]),
        ("round-robin", ["a", "b", "c", "d", "a", "b"]),
    ],
)
def test_each_policy_chooses_as_its_name_says(policy: Policy, expected: list[str]):
    assert place_one_by_one(PlacementIndex(RESIDUALS), 6, policy) == expected


@policies
def test_equal_nodes_come_in_the_order_of_registration(policy: Policy):
    index = PlacementIndex(dict.fromkeys(("z", "m", "a"), 5.0))
    assert index.choose(policy) == "z"


@pytest.mark.parametrize("policy", ["best-fit", "first-fit", "worst-fit"])
def test_when_none_fits_the_largest_residual_is_chosen_and_nothing_refused(policy: Policy):
    index = PlacementIndex({"a": -7.0, "b": 0.75, "c": 0.5, "d": -0.25})
    assert place_one_by_one(index, 4, policy) == ["b", "c", "b", "d"]


def test_round_robin_is_blind_to_load():
    assert place_one_by_one(PlacementIndex({"a": -9.0, "b": 9.0}), 4, "round-robin") == ["a", "b", "a", "b"]


@policies
def test_without_a_node_there_is_a_clear_error_that_asks_to_come_again(policy: Policy):
    for fails in (lambda: PlacementIndex().choose(policy), lambda: plan_counts(3, {}, policy)):
        with pytest.raises(NoNode, match="no node of the cluster takes updates") as caught:
            fails()
        assert isinstance(caught.value, LiflError)
        assert isinstance(caught.value, Busy) and caught.value.status == 503


@policies
def test_a_node_that_was_removed_is_not_chosen(policy: Policy):
    index = PlacementIndex({"a": 2.0, "b": 2.0})
    index.remove("a")
    index.remove("a")
    index.remove("never there")
    assert place_one_by_one(index, 5, policy) == ["b"] * 5
    assert "a" not in index and "b" in index and len(index) == 1
    index.remove("b")
    with pytest.raises(NoNode):
        index.choose(policy)
    index.add("a", 1.0)
    assert index.choose(policy) == "a"


def test_a_node_that_joins_again_comes_last_and_one_that_is_added_twice_stays():
    index = PlacementIndex({"a": 2.0, "b": 2.0})
    index.add("a", 2.0)
    assert index.choose("first-fit") == "a"
    index.remove("a")
    index.add("a", 2.0)
    assert index.choose("first-fit") == "b"


def test_residuals_can_be_read_and_set_and_must_be_numbers():
    index = PlacementIndex({"a": 2.0})
    index.set_residual("a", 7.25)
    index.take("a")
    assert index.residual("a") == 6.25
    for unknown in (index.residual, index.take, lambda node: index.set_residual(node, 1.0)):
        with pytest.raises(KeyError):
            unknown("b")
    with pytest.raises(ValueError):
        index.set_residual("a", math.nan)


def test_round_robin_goes_on_where_it_was_when_nodes_come_and_go():
    index = PlacementIndex(dict.fromkeys("abcd", 1.0))
    assert place_one_by_one(index, 2, "round-robin") == ["a", "b"]
    index.remove("c")
    index.remove("a")
    for node in "efghij":  # more than there was room for
        index.add(node, 1.0)
    assert place_one_by_one(index, 8, "round-robin") == [*"defghij", "b"]


@settings(max_examples=300, deadline=None)
@given(residuals=any_residuals, count=st.integers(0, 120), policy=any_policy, size=st.integers(1, 4))
def test_placing_many_at_once_is_the_same_as_one_after_another(residuals, count: int, policy: Policy, size: int):
    index = PlacementIndex(residuals, size=size)
    chosen = place_one_by_one(index, count, policy)
    at_once = PlacementIndex(residuals, size=size)
    counts = at_once.place_all(count, policy)
    assert counts == {node: chosen.count(node) for node in residuals if node in chosen}
    assert list(counts) == [node for node in residuals if node in counts]
    assert plan_counts(count, residuals, policy, size=size) == counts
    # Both leave the same state behind.
    assert [at_once.residual(node) for node in residuals] == [index.residual(node) for node in residuals]
    assert place_one_by_one(at_once, 5, policy) == place_one_by_one(index, 5, policy)


def by_definition(residuals: dict[str, float], policy: Policy) -> str:
    """The rules as the module's first lines tell them, for residuals that are multiples of 2^-20."""
    order = list(residuals)
    fitting = [node for node in order if residuals[node] >= 1]
    if policy == "worst-fit" or not fitting:
        return max(order, key=lambda node: residuals[node])
    return min(fitting, key=lambda node: residuals[node]) if policy == "best-fit" else fitting[0]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 30), policy=st.sampled_from(["best-fit", "first-fit", "worst-fit"]))
def test_the_choice_is_right_whatever_joined_left_and_changed_before(seed: int, policy: Policy):
    chance = random.Random(seed)
    index, residuals = PlacementIndex(), {}
    for step in range(150):
        node = f"node{chance.randint(0, 30)}"
        residual = chance.randint(-8, 24) / 4
        if node not in residuals and chance.random() < 0.7:
            index.add(node, residual)
            residuals[node] = residual
        elif node in residuals and chance.random() < 0.3:
            index.remove(node)
            del residuals[node]
        elif node in residuals:
            index.set_residual(node, residual)
            residuals[node] = residual
        if residuals:
            chosen = index.choose(policy)
            assert chosen == by_definition(residuals, policy), step
            index.take(chosen)
            residuals[chosen] -= 1
        assert len(index) == len(residuals)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_round_robin_takes_every_node_once_before_any_twice(seed: int):
    chance = random.Random(seed)
    names = [f"node{number}" for number in range(chance.randint(1, 40))]
    index = PlacementIndex(dict.fromkeys(names, 1.0))
    for name in chance.sample(names, chance.randint(0, len(names) - 1)):
        index.remove(name)
        names.remove(name)
    turns = place_one_by_one(index, 3 * len(names), "round-robin")
    assert turns == names * 3


@given(nodes=st.integers(1, 20), room=st.integers(1, 20), count=st.integers(0, 500))
def test_best_fit_uses_as_few_equal_nodes_as_possible(nodes: int, room: int, count: int):
    residuals = {f"node{number}": float(room) for number in range(nodes)}
    assert len(plan_counts(count, residuals, "best-fit")) == min(math.ceil(count / room), nodes)


@policies
def test_a_million_updates_are_placed_on_ten_thousand_nodes_and_each_counts_once(policy: Policy):
    residuals = {f"node{number}": 20.0 + number % 7 / 4 for number in range(10_000)}
    counts = plan_counts(1_000_000, residuals, policy)
    assert sum(counts.values()) == 1_000_000
    assert max(counts.values()) - min(counts.values()) <= 2

"""The account of a round: every update counts once, whatever the order of events."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifl.control.earlier_updates import EarlierUpdates
from lifl.control.hierarchy import Hierarchy, PendingEstimate, plan_hierarchy
from lifl.control.job import Job
from lifl.control.job_store import JobStore
from lifl.control.latencies import BOUNDS, LatencyHistogram, describe_updates
from lifl.control.round import Round
from lifl.control.selection import places_of
from lifl.messages import JobSpec
from lifl.staleness import contributor_of


def make_round(goal: int = 4, leaves: int = 2, **spec: float) -> Round:
    return Round(1, JobSpec("job", "fedavg", goal, **spec), Hierarchy(leaves), opened=100.0)  # type: ignore[arg-type]


def accept(round_: Round, client: str, slot: int) -> int:
    assert round_.admit(client) == "open"
    return round_.accept(client, slot, 7, 1.0, 100.5).aggregator


def test_a_client_is_counted_once():
    round_ = make_round()
    accept(round_, "a", 0)
    assert round_.admit("a") == "duplicate"
    assert (round_.accepted, round_.duplicates) == (1, 1)


def test_the_goal_closes_the_round_and_what_comes_after_is_late():
    round_ = make_round(goal=2)
    accept(round_, "a", 0)
    assert not round_.try_close(101.0)
    accept(round_, "b", 1)
    assert round_.try_close(101.0)
    assert not round_.try_close(101.0)
    assert round_.admit("c") == "late"
    assert round_.admit("a") == "duplicate"


def test_the_quorum_suffices_only_after_the_deadline():
    round_ = make_round(goal=4, quorum=2, deadline=10.0)
    accept(round_, "a", 0)
    accept(round_, "b", 1)
    assert not round_.try_close(109.9)
    assert round_.try_close(110.0)


def test_after_the_deadline_the_round_waits_for_its_quorum():
    round_ = make_round(goal=4, quorum=2, deadline=10.0)
    accept(round_, "a", 0)
    assert not round_.try_close(200.0)
    accept(round_, "b", 1)
    assert round_.try_close(200.0)


def test_updates_are_spread_over_the_leaves():
    round_ = make_round(goal=8, leaves=2)
    places = [accept(round_, str(client), client) for client in range(8)]
    assert sorted(places) == [0] * 4 + [1] * 4


def test_a_round_gets_more_leaves_until_it_has_been_closed():
    round_ = make_round(goal=4, leaves=1)
    assert accept(round_, "a", 0) == 0
    assert round_.raise_leaves(2)
    assert not round_.raise_leaves(2)
    assert accept(round_, "b", 1) == 1
    accept(round_, "c", 2), accept(round_, "d", 3)
    assert round_.try_close(101.0)
    assert round_.expected_inputs(round_.top) == 3
    assert not round_.raise_leaves(3), "the top was told already how many partial aggregates there are"


def test_a_rejected_client_may_send_again_and_its_replacement_goes_to_the_top():
    round_ = make_round(goal=2, leaves=2)
    first, second = accept(round_, "a", 0), accept(round_, "b", 1)
    assert {first, second} == {0, 1}
    assert round_.try_close(101.0)
    assert round_.mark_rejected(1, 7) is not None
    assert round_.status == "open"
    assert round_.rejected_clients == ["b"]
    assert accept(round_, "b", 2) == round_.top.index
    assert round_.try_close(102.0)


def test_a_message_about_an_older_use_of_a_slot_is_ignored():
    round_ = make_round()
    accept(round_, "a", 0)
    assert round_.mark_folded(0, 6, 101.0) is None
    assert round_.mark_folded(0, 7, 102.0) is not None
    assert round_.mark_folded(0, 7, 103.0) is None
    assert round_.updates["a"].folded == 102.0
    assert round_.folded == 1


def test_the_top_expects_a_partial_of_each_leaf_that_has_updates():
    round_ = make_round(goal=1, leaves=3)
    accept(round_, "a", 0)
    busy = next(place for place in round_.aggregators if place.updates)
    assert round_.expected_inputs(round_.top) == 1
    assert [round_.sends_partial(place) for place in round_.aggregators] == [
        place is busy and place is not round_.top for place in round_.aggregators
    ]


def test_the_latencies_are_those_of_the_folded_updates_by_nearest_rank():
    round_ = make_round(goal=100)
    assert (round_.state().latency_median, round_.state().latency_max) == (0.0, 0.0)
    for number in range(21):
        accept(round_, str(number), number)  # their first bytes came at 100.5
    for number in range(20):
        round_.mark_folded(number, 7, 101.5 + (7 * number) % 20)
        round_.state()  # may be asked for at any time
    state = round_.state()
    assert (state.latency_median, state.latency_p95, state.latency_max) == (10.0, 19.0, 20.0)


def test_every_update_is_told_with_its_times_the_rejected_ones_too():
    round_ = make_round(goal=3, leaves=1)
    for slot, client in enumerate("abc"):
        accept(round_, client, slot)
    round_.mark_rejected(1, 7)
    accept(round_, "b", 3)
    round_.mark_folded(0, 7, 102.0)
    told = describe_updates(round_, 0)
    assert [(update.client, update.status) for update in told.updates] == [
        ("a", "folded"),
        ("b", "rejected"),
        ("c", "accepted"),
        ("b", "accepted"),
    ]
    assert (told.updates[0].first_byte, told.updates[0].folded, told.updates[0].latency) == (100.5, 102.0, 1.5)
    assert (told.updates[2].folded, told.updates[2].latency) == (0.0, 0.0)
    assert (told.total, told.next) == (4, 0)


def test_the_updates_of_a_large_round_are_told_in_parts_that_fit_a_message():
    round_ = make_round(goal=3000)
    clients = ["\x01" * 256 if number % 7 == 0 else str(number) for number in range(3000)]
    for number, client in enumerate(clients):
        round_.accept(f"{client}{number}", number, 7, 1e300 / 3, 100.123456789)
    found: list[str] = []
    while True:
        part = describe_updates(round_, len(found))
        assert len(msgspec.json.encode(part)) < 150_000
        found += [update.client for update in part.updates]
        if not part.next:
            break
        assert part.next == len(found)
    assert found == [update.client for update in round_.log]
    assert describe_updates(round_, 5000).updates == ()


def test_a_histogram_counts_each_update_in_the_first_bucket_that_holds_it():
    histogram = LatencyHistogram()
    for seconds in (0.0, BOUNDS[0], BOUNDS[1], 1e9):
        histogram.observe(seconds)
    state = histogram.state("job")
    assert state.counts == (2, 1, *[0] * (len(BOUNDS) - 2), 1)
    assert state.seconds == pytest.approx(1e9)


def complete_round(number: int, updates: int) -> Round:
    round_ = Round(number, JobSpec("job", "fedavg", updates), Hierarchy(1), opened=0.0)
    for update in range(updates):
        round_.accept(str(update), update, 1, 1.0, 0.0)
    round_.complete(1.0)
    return round_


@pytest.mark.parametrize(("sizes", "kept"), [([1] * 9, [6, 7, 8, 9]), ([1, 30_000, 30_000], [3]), ([60_000], [])])
def test_a_job_keeps_the_updates_of_few_rounds_and_not_of_huge_ones(
    tmp_path: Path, sizes: list[int], kept: list[int]
):
    store = JobStore.of(tmp_path, "job")
    job = Job(JobSpec("job", "fedavg", 1), store, store)
    for number, size in enumerate(sizes, 1):
        job.remember(complete_round(number, size))
    assert list(job.rounds_with_updates()) == kept
    assert len(job.history) == len(sizes)


@settings(max_examples=200, deadline=None)
@given(goal=st.integers(1, 30), leaves=st.integers(1, 4), seed=st.integers(0, 1 << 30))
def test_any_order_of_events_ends_with_exactly_the_goal(goal: int, leaves: int, seed: int):
    """Commits, folds, rejections and repeats in random order never lose or double an update."""
    chance = random.Random(seed)
    round_ = make_round(goal=goal, leaves=leaves)
    slot = 0
    rejections = chance.randint(0, 5)
    while round_.status != "closing" or round_.in_slot:
        client = str(chance.randint(0, 2 * goal))
        if chance.random() < 0.5 and round_.admit(client) == "open":
            round_.accept(client, slot, slot & 0xFF, float(chance.randint(1, 9)), 100.0)
            slot += 1
            round_.try_close(101.0)
        elif round_.in_slot:
            update = chance.choice(list(round_.in_slot.values()))
            if rejections and chance.random() < 0.2:
                rejections -= 1
                assert round_.mark_rejected(update.slot, update.generation) is update
                round_.try_close(101.0)
            else:
                assert round_.mark_folded(update.slot, update.generation, 101.0) is update
                assert round_.mark_folded(update.slot, update.generation, 101.0) is None
    assert round_.accepted == round_.folded == goal
    assert sum(place.updates for place in round_.aggregators) == goal
    assert round_.weight == sum(update.num_samples for update in round_.updates.values())
    statuses = [update.state().status for update in round_.log]
    assert (statuses.count("folded"), statuses.count("rejected")) == (goal, len(round_.rejected_clients))
    assert len(statuses) == goal + len(round_.rejected_clients)


# --- clients that are selected ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "share", "places"),
    [
        (10, 0.1, 11),
        (10, 0.3, 13),
        (10, 0.01, 11),
        (3, 0.5, 5),
        (1, 10, 11),
        (7, 0, 7),
        (1_000_000, 0.3, 1_300_000),
    ],
)
def test_the_goal_and_so_many_more_are_selected(goal: int, share: float, places: int):
    assert places_of(JobSpec("job", "fedavg", goal, over_selection=share)) == places


def test_so_many_clients_are_selected_and_no_more_but_each_may_ask_again():
    round_ = make_round(goal=2, over_selection=0.5)
    assert [round_.select(client) for client in "abcd"] == ["selected", "selected", "selected", "enough"]
    assert [round_.select(client) for client in "abcd"] == ["again", "again", "again", "enough"]
    assert round_.state().selected == 3


def test_an_update_of_an_unselected_client_takes_a_place_if_there_is_one():
    round_ = make_round(goal=2, over_selection=0.5)
    round_.select("a")
    round_.select("b")
    assert round_.judge(1, "c") == "open"
    assert round_.judge(1, "d") == "unselected"
    assert round_.select("c") == "again"
    accept(round_, "a", 0)
    assert round_.judge(1, "a") == "duplicate"
    assert round_.judge(1, "d") == "unselected"


def test_a_client_whose_update_was_rejected_leaves_its_place_to_another():
    round_ = make_round(goal=2, over_selection=0.5)
    for slot, client in enumerate("abc"):
        accept(round_, client, slot)
    round_.mark_rejected(1, 7)
    assert round_.select("d") == "selected"
    assert round_.judge(1, "b") == "unselected"


def test_selected_clients_that_are_too_slow_are_late():
    round_ = make_round(goal=2, over_selection=0.5)
    for client in "abc":
        round_.select(client)
    accept(round_, "a", 0)
    accept(round_, "c", 1)
    assert round_.try_close(101.0)
    assert round_.judge(1, "b") == "late"


def test_a_deadline_closes_a_round_that_selected_more_clients_than_came():
    round_ = make_round(goal=4, quorum=2, deadline=10.0, over_selection=0.5)
    for client in "abcdef":
        round_.select(client)
    accept(round_, "b", 0)
    accept(round_, "e", 1)
    assert not round_.try_close(109.9)
    assert round_.try_close(110.0)
    assert round_.judge(1, "a") == "late"


# --- buffers of asynchronous jobs ------------------------------------------------------------------------------


def make_buffer(number: int, earlier: EarlierUpdates | None = None, goal: int = 2) -> Round:
    spec = JobSpec("job", "fedavg", goal, mode="async", max_staleness=3)
    known = EarlierUpdates() if earlier is None else earlier
    return Round(number, spec, Hierarchy(2), opened=100.0, earlier=known)


def judge(round_: Round, client: str, base: int) -> str:
    return round_.judge(base, contributor_of(round_.spec, client, base))


def test_a_round_takes_updates_of_its_own_model_only():
    round_ = Round(5, JobSpec("job", "fedavg", 2), Hierarchy(1), opened=0.0)
    assert [round_.judge(base, "a") for base in (4, 5, 6)] == ["late", "open", "early"]
    assert round_.late == 1


def test_a_buffer_takes_differences_to_models_that_are_not_too_old():
    round_ = make_buffer(10)
    assert [judge(round_, "a", base) for base in (1, 6, 7, 10, 11)] == ["late", "late", "open", "open", "early"]
    assert round_.late == 2
    assert judge(make_buffer(2), "a", 1) == "open"


def test_a_client_may_be_in_a_buffer_twice_with_two_bases_and_not_with_one():
    round_ = make_buffer(4)
    for slot, base in enumerate((4, 3)):
        assert judge(round_, "a", base) == "open"
        round_.accept(contributor_of(round_.spec, "a", base), slot, 7, 1.0, 100.5)
    assert [judge(round_, "a", base) for base in (4, 3, 2)] == ["duplicate", "duplicate", "open"]
    assert round_.accepted == 2


@pytest.mark.parametrize(("one", "other"), [(("a@1", 2), ("a", 1)), (("a", 12), ("a@1", 2)), (("", 1), ("@1", 1))])
def test_no_two_updates_have_the_same_contributor(one: tuple[str, int], other: tuple[str, int]):
    spec = JobSpec("job", "fedavg", 2, mode="async")
    assert contributor_of(spec, *one) != contributor_of(spec, *other)


def test_what_comes_while_a_buffer_is_being_closed_is_neither_late_nor_taken():
    round_ = make_buffer(4, goal=1)
    round_.accept("a@4", 0, 7, 1.0, 100.5)
    assert round_.try_close(101.0)
    assert [judge(round_, "b", 4), judge(round_, "a", 4), judge(round_, "b", 0)] == [
        "closing",
        "duplicate",
        "late",
    ]
    assert round_.late == 1
    # A rejection opens it once more, and then it takes what has waited.
    round_.mark_rejected(0, 7)
    assert judge(round_, "b", 4) == "open"


def test_an_update_that_counted_in_an_earlier_buffer_is_a_duplicate():
    earlier = EarlierUpdates()
    earlier.add(["a@4", "b@4", "b@3"])
    round_ = make_buffer(5, earlier)
    assert [judge(round_, "a", base) for base in (3, 4, 5)] == ["open", "duplicate", "open"]
    assert round_.duplicates == 1


def test_no_more_is_remembered_than_may_be_sent_again():
    earlier = EarlierUpdates()
    for number in range(1, 100):
        earlier.add(f"{client}@{number}" for client in "abc")
        earlier.forget_before(number + 1 - 5)
        assert len(earlier) == 3 * min(number, 5)
    assert "a@99" in earlier
    assert "a@94" not in earlier


@settings(max_examples=200, deadline=None)
@given(
    goal=st.integers(1, 5),
    max_staleness=st.integers(0, 4),
    clients=st.integers(1, 6),
    steps=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), max_size=300),
)
def test_any_order_of_events_counts_each_client_and_base_once(
    goal: int, max_staleness: int, clients: int, steps: list[tuple[int, int, int]]
):
    """Updates, repeats, folds, rejections, and closings that take a while, over many buffers."""
    spec = JobSpec("job", "fedavg", goal, mode="async", max_staleness=max_staleness)
    earlier = EarlierUpdates()
    round_ = Round(1, spec, Hierarchy(2), opened=0.0, earlier=earlier)
    counted: list[str] = []
    slot = 0
    for kind, first, second in steps:
        if kind < 60:
            client, base = f"c{first % clients}", max(1, round_.number + 1 - second % (max_staleness + 3))
            contributor = contributor_of(spec, client, base)
            verdict = round_.judge(base, contributor)
            is_known = contributor in counted or contributor in round_.updates
            if base > round_.number:
                assert verdict == "early"
            elif round_.number - base > max_staleness:
                assert verdict == "late"
            elif is_known:
                assert verdict == "duplicate"
            else:
                assert verdict == ("open" if round_.status == "open" else "closing")
            if verdict == "open":
                round_.accept(contributor, slot, slot & 0xFF, 1.0, 0.0)
                slot += 1
                round_.try_close(1.0)
        elif kind < 90 and round_.in_slot:
            update = list(round_.in_slot.values())[first % len(round_.in_slot)]
            if second < 80:
                round_.mark_folded(update.slot, update.generation, 1.0)
            else:
                round_.mark_rejected(update.slot, update.generation)
                round_.try_close(1.0)
        elif round_.status == "closing" and not round_.in_slot:
            round_.complete(2.0)
            assert round_.accepted == goal
            counted += round_.updates
            earlier.add(round_.updates)
            earlier.forget_before(round_.number + 1 - max_staleness)
            assert len(earlier) <= goal * (max_staleness + 1)
            round_ = Round(round_.number + 1, spec, Hierarchy(2), opened=2.0, earlier=earlier)
    assert len(set(counted)) == len(counted)


@pytest.mark.parametrize(
    ("pending", "per_leaf", "cores", "leaves"),
    [(16, 2, 2, 2), (16, 2, 64, 8), (1, 2, 2, 1), (3, 2, 8, 2), (0, 2, 8, 1), (10_000, 2, 48, 48)],
)
def test_the_plan_has_one_leaf_for_so_many_updates_and_none_without_a_core(pending, per_leaf, cores, leaves):
    assert plan_hierarchy(pending, per_leaf, cores, gather=False).leaves == leaves


def test_a_gathering_function_gets_one_aggregator():
    assert plan_hierarchy(100, 2, 8, gather=True).leaves == 1


def test_the_estimate_of_pending_updates_is_smoothed():
    estimate = PendingEstimate()
    assert estimate.observe(10) == 10
    assert estimate.observe(20) == pytest.approx(13)

"""The account of one round over several nodes: what counts, when it closes, and what a lost node takes with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from lifl.cluster.cluster_round import ClusterRound
from lifl.cluster.journal import Journal
from lifl.errors import Busy, Refused
from lifl.messages import JobSpec

NOW = 100.0
FENCE = 7
KEYS = {"a": 1, "b": 2, "c": 3}


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "coordinator.db", "boot")
    yield opened
    opened.close()


def most(updates: Mapping[str, int]) -> str:
    return max(updates, key=lambda member: updates[member])


def make(journal: Journal, goal: int = 4, **options: object) -> ClusterRound:
    spec = JobSpec("job", "fedavg", goal, **options)  # type: ignore[arg-type]
    return ClusterRound(1, 1, 1, 0, spec, NOW, journal)


def count(round_: ClusterRound, **clients: str) -> None:
    """Count updates: the client's name, and the node that has it."""
    for client, member in clients.items():
        assert round_.count(member, KEYS[member], client, 2.0, NOW) == "accepted"


def closing(journal: Journal) -> ClusterRound:
    """A round with `a` as its top, one update on `b` and one on `c`."""
    round_ = make(journal)
    count(round_, w="a", x="a", y="b", z="c")
    assert round_.try_close(NOW, most)
    return round_


def lose(round_: ClusterRound, member: str, now: float = NOW) -> bool:
    return round_.lose(member, now, lambda: FENCE)


def test_an_update_counts_once_and_the_same_node_is_told_so_again(journal: Journal) -> None:
    round_ = make(journal)
    count(round_, x="a")
    assert round_.count("a", 1, "x", 2.0, NOW) == "accepted"
    assert round_.count("b", 2, "x", 2.0, NOW) == "duplicate"
    assert (round_.accepted, round_.weight, round_.duplicates) == (1, 2.0, 1)


def test_it_closes_at_the_goal_and_says_who_does_what(journal: Journal) -> None:
    round_ = closing(journal)
    assert [round_.role_of(member) for member in "abc"] == [
        ("closing", "top"),
        ("closing", "middle"),
        ("closing", "middle"),
    ]
    assert round_.role_of("other") == ("closing", "")
    assert (round_.partials(), round_.epoch) == (("b", "c"), 1)
    assert round_.judge("late") == "late"


def test_the_quorum_suffices_once_the_deadline_has_passed(journal: Journal) -> None:
    round_ = make(journal, goal=4, quorum=2, deadline=10.0)
    count(round_, w="a", x="b")
    assert not round_.try_close(NOW + 9.9, most)
    assert round_.try_close(NOW + 10.0, most)


def test_a_node_lost_before_the_round_closes_takes_its_updates_with_it(journal: Journal) -> None:
    round_ = make(journal)
    count(round_, x="a", y="b")
    assert not lose(round_, "b")
    assert (round_.accepted, round_.lost) == (1, 1)
    count(round_, y="a")


def test_a_delivered_partial_aggregate_survives_its_node(journal: Journal) -> None:
    round_ = closing(journal)
    assert round_.deliver("b")
    assert not round_.deliver("b")
    assert not lose(round_, "b")
    round_.complete(["a", "b", "c"], 4, NOW + 1)
    assert (round_.accepted, round_.lost, round_.weight, round_.act) == (4, 0, 8.0, 1.0)


def test_a_lost_middle_is_fenced_until_the_top_has_said_that_it_has_not_got_it(journal: Journal) -> None:
    round_ = closing(journal)
    lose(round_, "b")
    # Undecided: the top must not finish without it, and nobody can take its place.
    assert (round_.role_of("a"), round_.partials()) == (("open", "top"), ("c",))
    assert round_.accepted == 4
    with pytest.raises(Busy):
        round_.judge("y")
    with pytest.raises(Busy):
        round_.judge("new")
    assert not round_.acknowledge(FENCE - 1, NOW)
    assert round_.acknowledge(FENCE, NOW)
    assert (round_.accepted, round_.lost, round_.is_reopened) == (3, 1, True)
    assert [round_.role_of(member) for member in "ac"] == [("open", "top"), ("closing", "middle")]


def test_a_fenced_partial_aggregate_that_the_top_has_counts(journal: Journal) -> None:
    round_ = closing(journal)
    lose(round_, "b")
    round_.deliver("b")
    assert (round_.role_of("a"), round_.partials()) == (("closing", "top"), ("b", "c"))
    assert not round_.acknowledge(FENCE, NOW)
    assert round_.accepted == 4


def test_opened_again_only_the_top_and_nodes_that_have_sent_nothing_take_updates(journal: Journal) -> None:
    round_ = closing(journal)
    lose(round_, "b")
    round_.acknowledge(FENCE, NOW)
    assert [round_.may_take(member) for member in ("a", "c", "new")] == [True, False, True]
    with pytest.raises(Busy):
        round_.count("c", 3, "v", 1.0, NOW)
    count(round_, y="a")
    assert round_.try_close(NOW, most)
    assert (round_.top, round_.epoch, round_.role_of("a")) == ("a", 1, ("closing", "top"))


def test_with_the_top_goes_what_only_it_had(journal: Journal) -> None:
    round_ = closing(journal)
    round_.deliver("b")
    lose(round_, "b")  # delivered, and then the node went
    assert lose(round_, "a")
    assert (round_.accepted, round_.lost, round_.phase, round_.top) == (1, 3, "open", "")
    assert round_.role_of("c") == ("open", "")
    count(round_, w="c", x="c", y="c")
    assert round_.try_close(NOW, most)
    assert (round_.top, round_.epoch, round_.partials()) == ("c", 2, ())


def test_a_rejected_update_is_not_replaced_while_the_round_is_closing(journal: Journal) -> None:
    round_ = closing(journal)
    assert round_.reject("b", "y")
    assert not round_.reject("b", "y")
    assert (round_.phase, round_.accepted, round_.partials()) == ("closing", 3, ("c",))
    assert round_.role_of("b") == ("closing", "")
    round_.complete(["a", "c"], 3, NOW + 1)


def test_a_delivered_update_cannot_be_rejected_any_more(journal: Journal) -> None:
    round_ = closing(journal)
    round_.deliver("b")
    with pytest.raises(Refused):
        round_.reject("b", "y")


def test_when_nothing_is_left_the_round_opens_again_for_all(journal: Journal) -> None:
    round_ = make(journal, goal=2)
    count(round_, x="a", y="b")
    assert round_.try_close(NOW, most)
    round_.reject("a", "x")
    assert (round_.top, round_.partials()) == ("a", ("b",))  # the top holds nothing, and merges the other
    round_.reject("b", "y")
    assert (round_.phase, round_.top) == ("open", "")
    count(round_, x="b", y="b")
    assert round_.try_close(NOW, most)
    assert (round_.top, round_.epoch) == ("b", 2)


@pytest.mark.parametrize(
    ("contributors", "updates"),
    [(["a", "b"], 3), (["a", "b", "c", "d"], 4), (["a", "b", "c", "c"], 4), (["a", "b", "c"], 3)],
)
def test_a_model_of_other_updates_than_count_is_refused(
    journal: Journal, contributors: list[str], updates: int
) -> None:
    round_ = closing(journal)
    with pytest.raises(Refused) as refused:
        round_.complete(contributors, updates, NOW)
    assert refused.value.status == 409
    assert not round_.is_complete


def test_a_model_says_for_good_whether_a_fenced_share_is_in_it(journal: Journal) -> None:
    with_it = closing(journal)
    lose(with_it, "b")
    with_it.complete(["a", "b", "c"], 4, NOW)
    assert (with_it.accepted, with_it.lost) == (4, 0)
    short = closing(journal)
    lose(short, "b")
    with pytest.raises(Refused):
        short.complete(["a", "c"], 3, NOW)
    overdue = make(journal, quorum=3, deadline=5.0)
    count(overdue, w="a", x="a", y="b", z="c")
    overdue.try_close(NOW, most)
    lose(overdue, "b", NOW + 6)
    overdue.complete(["a", "c"], 3, NOW + 6)
    assert (overdue.accepted, overdue.lost) == (3, 1)

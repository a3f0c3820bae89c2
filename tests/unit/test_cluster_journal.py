"""The coordinator's journal: what is committed is there again, and old rounds are kept in little room."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from lifl.cluster.group_commit import GroupCommit
from lifl.cluster.journal import COUNTED, DROPPED, REJECTED, Journal, RoundRow
from lifl.cluster.messages import RoundReport
from lifl.errors import InvalidInput, Unavailable
from lifl.messages import RoundState

from tests.unit.cluster_walk import registration

JOB = 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "coordinator.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    opened = Journal(path, "boot")
    for name in ("a", "b"):
        opened.save_member(opened.new_key("members"), "member", registration(name, f"{name}.1"))
    opened.flush()
    yield opened
    opened.close()


def row(number: int, status: str = "complete", attempt: int = 0) -> RoundRow:
    key = number + 100 * attempt
    return RoundRow(key, JOB, number, attempt, status, 1, "a.1", 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0)


def add_round(journal: Journal, number: int, updates: int = 3) -> None:
    journal.touch(("round", number), lambda: row(number))
    for sequence in range(1, updates + 1):
        journal.count_update(number, sequence, f"c{sequence}", 1 + sequence % 2, float(sequence))
    journal.save_state(number, RoundState(number, "complete", updates, updates, 0, 0, 0, 6.0, 1.0, 0, 0, 0))
    journal.save_report(number, 1, RoundReport("job", number, 0, 2, 1, 0, 1, 50, 0.1, 0.2, 0.3))
    journal.flush()


def test_what_is_not_committed_is_not_there(journal: Journal, path: Path) -> None:
    journal.count_update(1, 1, "x", 1, 2.0)
    with closing(Journal(path, "boot")) as other:
        assert list(other.updates_of(1)) == []
        journal.flush()
        assert list(other.updates_of(1)) == [(1, "x", 1, 2.0, COUNTED)]


def test_a_batch_keeps_the_order_of_changes(journal: Journal) -> None:
    journal.count_update(1, 1, "x", 1, 2.0)
    journal.end_update(1, 1, REJECTED)
    journal.count_update(1, 2, "x", 2, 3.0)
    journal.end_update(1, 2, DROPPED)
    journal.count_update(1, 3, "x", 1, 3.0)
    journal.flush()
    assert [state for *_, state in journal.updates_of(1)] == [REJECTED, DROPPED, COUNTED]


def test_a_failed_commit_leaves_nothing_behind(journal: Journal) -> None:
    journal.count_update(1, 1, "x", 1, 2.0)
    journal.count_update(1, 1, "again the same row", 1, 2.0)
    with pytest.raises(sqlite3.IntegrityError):
        journal.flush()
    assert list(journal.updates_of(1)) == []


def test_after_a_failed_commit_nobody_gets_an_answer(journal: Journal) -> None:
    commits = GroupCommit(journal)
    journal.count_update(1, 1, "x", 1, 2.0)
    journal.count_update(1, 1, "again the same row", 1, 2.0)
    ticket = commits.add(journal.take())
    for _ in range(2):
        with pytest.raises(Unavailable):
            commits.wait(ticket)


def test_committed_updates_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "killed.db"
    program = f"""
        import os, sys
        from pathlib import Path
        from lifl.cluster.journal import Journal
        journal = Journal(Path({str(path)!r}), "boot")
        for sequence in range(1, 10**9):
            journal.count_update(1, sequence, f"c{{sequence}}", 1, 1.0)
            journal.flush()
            os.write(1, b"%d\\n" % sequence)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        for _ in range(50):
            assert process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        told = [int(line) for line in process.stdout.read().split(b"\n")[:-1]]
    process.wait()
    with closing(Journal(path, "boot")) as journal:
        found = [sequence for sequence, *_ in journal.updates_of(1)]
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= max(told, default=50)


def test_the_clock_goes_on_only_while_it_has_the_same_name(journal: Journal, path: Path) -> None:
    assert not journal.clock_goes_on
    journal.flush()
    for clock, goes_on in (("boot", True), ("another boot", False), ("another boot", True)):
        with closing(Journal(path, clock)) as again:
            assert again.clock_goes_on == goes_on
            again.flush()
    assert again.starts == 4


def test_another_clock_is_noted_only_together_with_the_moments_that_it_tells(journal: Journal, path: Path) -> None:
    journal.flush()
    for _ in range(2):  # the first one ends before it has committed anything
        with closing(Journal(path, "another boot")) as again:
            assert not again.clock_goes_on
            assert again.has_changes


def test_a_file_of_another_version_or_kind_is_refused(journal: Journal, path: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(InvalidInput, match="version 99"):
        Journal(path)
    other = tmp_path / "other.db"
    other.write_bytes(b"no database at all, but long enough to look at" * 100)
    with pytest.raises(InvalidInput, match="no journal"):
        Journal(other)


def test_compacted_a_round_has_the_same_record_and_no_rows(journal: Journal) -> None:
    for number in range(1, 8):
        add_round(journal, number)
    before = journal.record_of(1)
    assert journal.rounds_to_compact() == [1, 2, 3]
    state = journal.find_round(JOB, 1)
    for key in journal.rounds_to_compact():
        journal.compact(key)
    assert journal.rounds_to_compact() == []
    assert list(journal.updates_of(1)) == []
    assert journal.record_of(1) == before
    assert journal.record_of(1, 1, 1) == (before[0][1:2], 3)
    assert journal.find_round(JOB, 1) == state
    assert [(r.client, r.node, r.num_samples, r.status) for r in before[0]] == [
        ("c1", "b", 1.0, "counted"),
        ("c2", "a", 2.0, "counted"),
        ("c3", "b", 3.0, "counted"),
    ]


def test_compaction_that_was_cut_short_is_done_again(journal: Journal) -> None:
    for number in range(1, 6):
        add_round(journal, number)
    before = journal.record_of(1)
    journal.compact(1)
    journal.count_update(1, 3, "left over", 1, 9.0)  # as if not all rows had gone
    journal.flush()
    assert journal.rounds_to_compact() == [1]
    journal.compact(1)
    assert journal.record_of(1) == before
    assert list(journal.updates_of(1)) == []


def test_reports_of_nodes_add_up_and_a_repeated_one_counts_once(journal: Journal) -> None:
    add_round(journal, 1)
    journal.save_report(1, 1, RoundReport("job", 1, 0, 2, 1, 0, 1, 50, 0.1, 0.2, 0.3))
    journal.save_report(1, 2, RoundReport("job", 1, 0, 3, 2, 1, 0, 70, 0.3, 0.6, 0.9))
    journal.flush()
    found = journal.find_round(JOB, 1)
    assert found is not None and found[1] is not None
    state = found[1]
    assert (state.leaves, state.started, state.cold, state.reused, state.internode_bytes) == (5, 3, 1, 1, 120)
    assert (state.latency_median, state.latency_p95, state.latency_max) == (pytest.approx(0.2), 0.6, 0.9)


def test_undone_rounds_are_marked_whatever_was_touched_before(journal: Journal) -> None:
    add_round(journal, 1)
    add_round(journal, 2)
    journal.touch(("round", 3), lambda: row(3, "open"))
    journal.undo_rounds(JOB, 2)
    journal.touch(("round", 102), lambda: row(2, "open", attempt=1))
    journal.flush()
    assert journal.round_of(JOB, 1, 0).status == "complete"
    assert [journal.round_of(JOB, n, 0).status for n in (2, 3)] == ["undone", "undone"]
    assert journal.round_of(JOB, 2, 1).status == "open"

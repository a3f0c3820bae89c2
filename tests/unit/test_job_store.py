"""What a job leaves on the disk survives a torn write."""

from __future__ import annotations

from pathlib import Path

import pytest
from lifl.control.hierarchy import Hierarchy
from lifl.control.job import Job
from lifl.control.job_store import JobStore
from lifl.control.round import Round
from lifl.errors import LiflError
from lifl.messages import JobSpec


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    store = JobStore.of(tmp_path, "job")
    store.create(JobSpec("job", "fedavg", 3, timing="lazy"))
    return store


def test_the_specification_is_read_back(store: JobStore):
    assert store.spec() == JobSpec("job", "fedavg", 3, timing="lazy")


def test_a_torn_last_line_of_the_journal_is_left_out(store: JobStore):
    store.append({"event": "round", "round": 1})
    with open(store.directory / "journal.jsonl", "ab") as journal:
        journal.write(b'{"event": "rou')
    assert [entry["event"] for entry in store.entries()] == ["created", "round"]


def test_a_line_after_a_torn_one_is_whole(store: JobStore):
    with open(store.directory / "journal.jsonl", "ab") as journal:
        journal.write(b'{"event":"round","round":1,"clients":{"a":1.0},"ac')
    store.append({"event": "round", "round": 2, "clients": {"b": 1.0}, "act": 1.0})
    store.append({"event": "round", "round": 3, "clients": {"c": 1.0}, "act": 1.0})
    assert [entry.get("round") for entry in store.entries()] == [None, 2, 3]
    assert store.contributors(1, 9) == {2: ["b"], 3: ["c"]}


def test_the_last_line_about_a_round_says_whose_updates_are_in_its_model(store: JobStore):
    """A round that was complete, but whose model was never on the disk, is run again after a restart."""
    for number, client in [(1, "a"), (2, "b"), (3, '{"event":"round","round":1,'), (2, "d"), (3, "e")]:
        done = Round(number, JobSpec("job", "fedavg", 1), Hierarchy(1), opened=0.0)
        done.accept(client, 0, 0, num_samples=1.5, started=1.0)
        store.append_round(done)
    assert store.contributors(0, 3) == {1: ["a"], 2: ["d"]}
    assert store.contributors(3, 4) == {3: ["e"]}


def test_a_complete_round_is_found_in_the_journal(store: JobStore):
    done = Round(12, JobSpec("job", "fedavg", 2), Hierarchy(1), opened=0.0)
    done.accept("a", 0, 0, num_samples=1.5, started=1.0)
    done.accept('b"round":1,', 1, 0, num_samples=2.0, started=2.0)
    done.complete(now=4.0)
    store.append_round(done)
    found = store.find_round(12)
    assert found is not None
    assert (found.status, found.accepted, found.weight, found.act) == ("complete", 2, 3.5, 3.0)
    assert store.find_round(1) is None


def test_a_journal_without_a_job_is_said_to_be_so(store: JobStore):
    (store.directory / "journal.jsonl").write_bytes(b"{}\n")
    with pytest.raises(LiflError, match="no job in it"):
        store.spec()


def test_a_checkpoint_that_was_not_finished_does_not_count(store: JobStore):
    store.write(store.checkpoint_path(1), [b"abc", memoryview(b"def")])
    store.checkpoint_path(2).with_suffix(".partial").write_bytes(b"abc")
    assert store.checkpoint_path(1).read_bytes() == b"abcdef"
    assert store.rounds() == [1]
    store.remove_leftovers()
    assert [path.name for path in store.checkpoint_path(1).parent.iterdir()] == ["round-00000001.safetensors"]


def test_deleted_checkpoints_take_their_optimiser_state_with_them(store: JobStore):
    for number in range(1, 6):
        store.write(store.checkpoint_path(number), [b"x"])
        store.write(store.state_path(number), [b"y"])
    store.delete_checkpoints([1, 2, 3, 9])
    assert store.rounds() == [4, 5]
    assert not store.state_path(3).exists()


@pytest.mark.parametrize(("keep", "left"), [(1, []), (2, [5]), (3, [4, 5]), (0, [1, 2, 3, 4, 5])])
def test_a_job_keeps_so_many_checkpoints_with_the_one_to_come(store: JobStore, keep: int, left: list[int]):
    job = Job(JobSpec("job", "fedavg", 3, keep_checkpoints=keep), store, store, checkpoints=[1, 2, 3, 4, 5])
    retired = job.retire_checkpoints()
    assert job.checkpoints == left
    assert sorted(retired + left) == [1, 2, 3, 4, 5]


def test_a_checkpoint_that_somebody_reads_is_kept_for_now(store: JobStore):
    job = Job(
        JobSpec("job", "fedavg", 3, keep_checkpoints=1), store, store, checkpoints=[1, 2], file_leases={7: 1}
    )
    assert job.retire_checkpoints() == [2]
    assert job.checkpoints == [1]


def test_a_deleted_job_keeps_its_checkpoints_under_another_name(store: JobStore, tmp_path: Path):
    store.write(store.checkpoint_path(1), [b"x"])
    store.retire()
    assert list(JobStore.all_under(tmp_path)) == []
    assert (tmp_path / "jobs" / "job~1" / "checkpoints" / "round-00000001.safetensors").exists()
    again = JobStore.of(tmp_path, "job")
    again.create(JobSpec("job", "fedavg", 3))
    again.retire()
    assert (tmp_path / "jobs" / "job~2").exists()

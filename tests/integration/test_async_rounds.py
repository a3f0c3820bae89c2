"""Buffers of asynchronous jobs through agent, coordinator, zygote and workers; the test process is the gateway."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lifl.control_channel import ControlChannel
from lifl.messages import (
    Acknowledged,
    Admit,
    BusySlots,
    Commit,
    CreateJob,
    DeleteJob,
    InstallModel,
    JobSpec,
    JobState,
    Problem,
    SelectClient,
    Selection,
    Slots,
    Verdict,
)
from lifl.slot import split_slot_reference
from numpy.typing import NDArray

from tests.integration.platform_harness import Platform, encode_model, until

Doubles = NDArray[np.float64]

SIZE = 5151
CHANCE = np.random.default_rng(1)
MODEL = {
    "layer.weight": CHANCE.standard_normal((50, 101), np.float32),
    "layer.bias": CHANCE.standard_normal(101, np.float32),
}


def difference(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SIZE, np.float32)


@pytest.fixture
def platform(tmp_path: Path, data_plane: str) -> Iterator[Platform]:
    with Platform(tmp_path, data_plane, cores=1) as platform:
        yield platform


@dataclass
class Buffers:
    """Sends differences, and says in float64 what the next model must be."""

    platform: Platform
    exponent: float = 0.5
    number: int = 1
    total: Doubles = field(default_factory=lambda: np.zeros(SIZE))
    magnitude: Doubles = field(default_factory=lambda: np.zeros(SIZE))
    weight: float = 0.0
    seed: int = 0

    def create(self, goal: int, **options: Any) -> Buffers:
        self.platform.create_job(MODEL, goal=goal, mode="async", staleness_exponent=self.exponent, **options)
        self.model = self.platform.model().astype(np.float64)
        return self

    def next_difference(self) -> NDArray[np.float32]:
        self.seed += 1
        return difference(self.seed)

    def count(self, update: NDArray[np.float32], base: int, weight: float = 1.0) -> None:
        """The update is part of the open buffer."""
        factor = weight * (1 + self.number - base) ** -self.exponent
        self.total += factor * update.astype(np.float64)
        self.magnitude += factor * np.abs(update.astype(np.float64))
        self.weight += weight

    def submit(self, client: str, base: int, weight: float = 1.0) -> Verdict:
        update = self.next_difference()
        verdict = self.platform.submit(client, update.tobytes(), base, weight, is_delta=True)
        assert isinstance(verdict, Verdict), verdict
        if verdict.status == "accepted":
            assert verdict.round == self.number
            self.count(update, base, weight)
        return verdict

    def close(self) -> JobState:
        """The buffer is full: wait for its model, and compare."""
        state = self.platform.wait_for_round(self.number + 1)
        assert state.status in ("running", "complete"), state.detail
        expected = self.model + self.total / self.weight
        scale = np.abs(self.model) + self.magnitude / self.weight
        until(lambda: self.platform.describe().checkpointed_round > self.number, what="checkpoint")
        found = self.platform.model(self.number + 1)
        assert np.max(np.abs(found - expected) / scale) < 1e-6
        self.model = found.astype(np.float64)
        self.number += 1
        self.total, self.magnitude, self.weight = np.zeros(SIZE), np.zeros(SIZE), 0.0
        return state


# --- arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "timing", "slots", "exponent"),
    [(1, "eager", 3, 0.5), (2, "eager", 40, 0.5), (2, "eager", 40, 0.0), (2, "lazy", 40, 1.3)],
)
def test_a_buffer_adds_up_differences_that_count_less_the_older_their_model_is(
    tmp_path: Path, data_plane: str, cores: int, timing: str, slots: int, exponent: float
):
    chance = np.random.default_rng(7)
    with Platform(tmp_path, data_plane, cores=cores) as platform:
        buffers = Buffers(platform, exponent).create(9, timing=timing, slots=slots, max_staleness=4)
        sent = set()
        for number in range(1, 8):
            while len(sent) < 9 * number:
                client, base = f"c{chance.integers(20)}", int(chance.integers(max(1, number - 4), number + 1))
                known = (client, base) in sent
                verdict = buffers.submit(client, base, float(chance.choice([0.5, 1, 17, 60_000])))
                assert verdict.status == ("duplicate" if known else "accepted")
                sent.add((client, base))
                if timing == "eager" and len(sent) % 9 == 5:
                    # What is sealed by now was scaled by an eager fold; the rest goes into the pass at the end.
                    until(lambda: platform.describe().current.folded == 5, what="eager fold")
            state = buffers.close()
            assert (state.last.accepted, state.last.folded) == (9, 9)
        platform.wait_for_all_slots()


def test_the_weight_of_an_old_difference_stays_in_the_denominator(platform: Platform):
    """A buffer of equally old differences moves the model less than one of fresh ones, not just as much."""
    buffers = Buffers(platform).create(1)
    for number in range(1, 4):
        buffers.submit("fast", number)
        buffers.close()
    before = platform.model()
    update = difference(100)
    platform.submit("slow", update.tobytes(), 1, 5.0, is_delta=True)
    platform.wait_for_round(5)
    assert np.allclose(platform.model() - before, update / 2, atol=1e-6)


def test_a_server_optimiser_takes_its_step_with_what_a_buffer_gives(tmp_path: Path, data_plane: str):
    with Platform(tmp_path, data_plane, function="fedadam", cores=1) as platform:
        platform.create_job(MODEL, goal=2, mode="async")
        before = platform.model()
        steps = [np.abs(difference(client)) for client in range(2)]
        for client, step in enumerate(steps):
            platform.submit(str(client), step.tobytes(), 1, is_delta=True)
        state = platform.wait_for_round(2)
        assert state.status == "running", state.detail
        assert np.all(platform.model() > before)


# --- which updates count ---------------------------------------------------------------------------------------


def test_differences_to_models_that_are_too_old_are_late_and_to_later_ones_early(platform: Platform):
    buffers = Buffers(platform).create(1, max_staleness=2)
    for number in range(1, 5):
        buffers.submit("fast", number)
        buffers.close()
    verdicts = [platform.ask(Admit("job", base, "slow", "id", platform.gateway)) for base in range(1, 7)]
    assert [(verdict.status, verdict.round) for verdict in verdicts] == [
        *[("late", 5)] * 2,
        *[("open", 5)] * 3,
        ("early", 5),
    ]
    assert buffers.submit("slow", 2).status == "late"
    assert buffers.submit("slow", 3).status == "accepted"
    buffers.close()
    assert platform.describe().last.late == 3


def test_an_update_that_is_sent_again_counts_once_whatever_buffer_is_open_by_then(platform: Platform):
    buffers = Buffers(platform).create(2, max_staleness=3)
    buffers.submit("a", 1)
    assert buffers.submit("a", 1).status == "duplicate"
    buffers.submit("b", 1)
    buffers.close()
    for number in range(2, 5):
        assert platform.ask(Admit("job", 1, "a", "id", platform.gateway)).status == "duplicate"
        assert buffers.submit("b", 1).status == "duplicate"
        for base in (number, number - 1):
            buffers.submit(f"only in {number}", base)
        assert buffers.close().last.duplicates == 2
    assert buffers.submit("a", 1).status == "late"


def test_after_a_restart_the_open_buffer_begins_again_and_what_counted_before_is_known(platform: Platform):
    buffers = Buffers(platform).create(2)
    for number, client, base in [(1, "b", 1), (2, "c", 1), (3, "b", 2)]:
        buffers.submit("a", number)
        buffers.submit(client, base)
        buffers.close()
    buffers.submit("c", 2)
    platform.restart_everything()
    state = until(lambda: state if (state := platform.describe()).status == "running" else None)
    assert (state.round, state.current.accepted) == (4, 0)
    platform.updates_pool = state.updates_pool
    until(lambda: platform.take_pools() or state.updates_pool in platform.pools, what="pool")
    admitted = {
        (client, base): platform.ask(Admit("job", base, client, "id", platform.gateway)).status
        for client in "abc"
        for base in (1, 2, 3)
    }
    counted = {("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("c", 1)}
    assert {key for key, status in admitted.items() if status == "duplicate"} == counted
    assert {status for key, status in admitted.items() if key not in counted} == {"open"}
    again = Buffers(platform, number=4, seed=50)
    again.model = platform.model().astype(np.float64)
    again.submit("c", 2)
    again.submit("a", 4)
    again.close()


def test_a_deadline_closes_a_buffer_that_is_not_full(platform: Platform):
    buffers = Buffers(platform).create(100, quorum=2, deadline=0.5)
    buffers.submit("a", 1)
    buffers.submit("b", 1)
    assert buffers.close().last.accepted == 2


def test_in_an_asynchronous_job_everyone_may_take_part(platform: Platform):
    buffers = Buffers(platform).create(1, max_staleness=1)
    for number in (1, 2):
        buffers.submit("a", number)
        buffers.close()
    answers = [platform.ask(SelectClient("job", number, "b")) for number in (1, 2, 3, 4)]
    assert all(isinstance(answer, Selection) for answer in answers)
    assert [answer.status for answer in answers] == ["late", "everyone", "everyone", "early"]


def test_a_gathering_function_has_no_asynchronous_jobs(tmp_path: Path, data_plane: str):
    with Platform(tmp_path, data_plane, function="median") as platform:
        state = platform.ask(CreateJob(JobSpec("job", "median", 4, mode="async")))
        if isinstance(state, JobState):  # the function is not known yet
            header, payload = encode_model(MODEL)
            path = platform.state / "incoming" / "model"
            path.write_bytes(len(header).to_bytes(8, "little") + header + payload)
            state = platform.ask(InstallModel("job", str(path)))
        assert isinstance(state, Problem)
        assert (state.status, state.title) == (422, "not for a gathering function")


@pytest.mark.parametrize(
    "wrong",
    [
        {"over_selection": 0.5},
        {"max_staleness": 10_001},
        {"max_staleness": 5_000, "goal": 2_000},
        {"staleness_exponent": -0.5},
    ],
)
def test_an_asynchronous_job_that_cannot_be_is_refused(platform: Platform, wrong: dict[str, Any]):
    answer = platform.ask(
        CreateJob(JobSpec(**{"name": "job", "function": "fedavg", "goal": 4, **wrong}, mode="async"))
    )
    assert isinstance(answer, Problem)
    assert answer.status == 422
    assert next(iter(wrong)) in answer.detail


# --- what comes while a buffer is being closed -------------------------------------------------------------------


@contextlib.contextmanager
def closing(buffers: Buffers, bad: bool = False) -> Iterator[None]:
    """A buffer of goal 2 that is full and cannot be finished until the end of the block. `bad`: it has a NaN."""
    platform = buffers.platform
    buffers.submit("first", buffers.number)
    until(lambda: platform.describe().current.folded == 1, what="fold")
    (worker,) = platform.workers()
    os.kill(worker, signal.SIGSTOP)
    try:
        if bad:
            update = np.full(SIZE, np.nan, np.float32)
            platform.submit("second", update.tobytes(), buffers.number, is_delta=True)
        else:
            buffers.submit("second", buffers.number)
        assert platform.describe().current.status == "closing"
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)


def ask_on(platform: Platform, question: Any) -> ControlChannel[Any]:
    channel = platform.connect()
    channel.send(question)
    return channel


def is_answered(channel: ControlChannel[Any], seconds: float = 0.0) -> bool:
    return bool(select.select([channel.socket], [], [], seconds)[0])


def answer_on(channel: ControlChannel[Any]) -> Any:
    message, _ = channel.receive()
    channel.close()
    return message


def until_it_waits(platform: Platform, commit: Commit) -> None:
    """Wait until the coordinator has read a commit for which there is no buffer yet.

    Without this a buffer could be open again by then: the commit would be counted at once, and its descriptor
    would be for the gateway to send.
    """
    until(lambda: (commit.slot, commit.generation) in platform.ask(BusySlots(0)).keys, what="a commit that waits")


def hold(platform: Platform, commit: Commit) -> None:
    """Take note that a slot is not free, though nobody has said so."""
    platform.busy[split_slot_reference(commit.slot)[1]] = commit.generation


def test_updates_that_come_while_a_buffer_is_closed_are_in_the_next(platform: Platform):
    buffers = Buffers(platform).create(2, slots=8)
    update = difference(70)
    with closing(buffers):
        commit = platform.fill_slot("third", update.tobytes(), 1, 3.0, is_delta=True)
        hold(platform, commit)
        channels = [
            ask_on(platform, commit),
            ask_on(platform, Admit("job", 1, "fourth", "id", platform.gateway)),
        ]
        assert platform.ask(Admit("job", 1, "second", "id", platform.gateway)).status == "duplicate"
        assert platform.ask(Admit("job", 2, "fifth", "id", platform.gateway)).status == "early"
        assert not any(is_answered(channel, 0.2) for channel in channels)
        # A gateway that asks now must not take its slot for a free one.
        until_it_waits(platform, commit)
    # The descriptor of an update that has waited is the coordinator's to send.
    assert answer_on(channels[0]) == Verdict("accepted", 2)
    assert answer_on(channels[1]) == Verdict("open", 2)
    buffers.close()
    buffers.count(update, 1, 3.0)
    until(lambda: platform.describe().current.folded == 1, what="fold of what has waited")
    buffers.submit("fourth", 1)
    buffers.close()
    platform.wait_for_all_slots()


def test_a_buffer_that_lost_an_update_while_it_was_closed_takes_one_that_has_waited(platform: Platform):
    buffers = Buffers(platform).create(2, slots=8)
    update = difference(70)
    with closing(buffers, bad=True):
        commit = platform.fill_slot("third", update.tobytes(), 1, is_delta=True)
        hold(platform, commit)
        channel = ask_on(platform, commit)
        until_it_waits(platform, commit)
        assert not is_answered(channel, 0.1)
    assert answer_on(channel) == Verdict("accepted", 1)
    buffers.count(update, 1)
    assert buffers.close().last.rejected_clients == ("second@1",)
    platform.wait_for_all_slots()


def test_updates_that_wait_are_in_several_buffers_if_they_are_many(platform: Platform):
    buffers = Buffers(platform).create(2, slots=16)
    updates = [difference(70 + client) for client in range(5)]
    with closing(buffers):
        channels = []
        for client, update in enumerate(updates):
            commit = platform.fill_slot(f"waits {client}", update.tobytes(), 1, is_delta=True)
            hold(platform, commit)
            channels.append(ask_on(platform, commit))
            until_it_waits(platform, commit)
    verdicts = [answer_on(channel) for channel in channels]
    assert [(verdict.status, verdict.round) for verdict in verdicts] == [
        ("accepted", number) for number in (2, 2, 3, 3, 4)
    ]
    for client, update in enumerate(updates):
        if client % 2 == 0:
            buffers.close()
        buffers.count(update, 1)
    buffers.submit("last", 4)
    buffers.close()
    platform.wait_for_all_slots()


def test_what_waits_for_a_buffer_is_told_when_there_is_none_any_more(platform: Platform):
    buffers = Buffers(platform).create(2, rounds=1, slots=8)
    with closing(buffers):
        channel = ask_on(platform, platform.fill_slot("third", difference(70).tobytes(), 1, is_delta=True))
    answer = answer_on(channel)
    assert isinstance(answer, Problem)
    assert (answer.status, answer.title) == (409, "job is complete")


def test_what_waits_for_a_buffer_is_told_when_its_job_is_deleted(platform: Platform):
    buffers = Buffers(platform).create(2, slots=8)
    with closing(buffers):
        channels = [
            ask_on(platform, Admit("job", 1, "third", "id", platform.gateway)),
            ask_on(platform, platform.fill_slot("fourth", difference(70).tobytes(), 1, is_delta=True)),
        ]
        assert not any(is_answered(channel, 0.1) for channel in channels)
        assert isinstance(platform.ask(DeleteJob("job")), Acknowledged)
        answers = [answer_on(channel) for channel in channels]
    assert [answer.status for answer in answers] == [404, 404]


def test_an_update_whose_gateway_waits_no_more_does_not_count_and_leaves_its_slot(platform: Platform):
    buffers = Buffers(platform).create(2, slots=8, idle_seconds=0.3)
    with closing(buffers):
        commit = platform.fill_slot("third", difference(70).tobytes(), 1, is_delta=True)
        hold(platform, commit)
        channels = [ask_on(platform, commit), ask_on(platform, Admit("job", 1, "fourth", "id", platform.gateway))]
        assert not any(is_answered(channel, 0.1) for channel in channels)
        for channel in channels:
            channel.close()
        index = split_slot_reference(commit.slot)[1]
        until(lambda: platform.releases() or index not in platform.busy, what="release of the slot")
        assert (commit.slot, commit.generation) not in platform.ask(BusySlots(0)).keys
    buffers.close()
    # No upload goes on any more, for whoever counts those: the job falls asleep.
    until(lambda: platform.pool_pages(platform.pools[platform.updates_pool]) == 0, what="return of the memory")
    for client in ("third", "fourth"):
        until(lambda c=client: platform.ask(Admit("job", 1, c, "id", platform.gateway)).status == "open")
        buffers.submit(client, 1)
    buffers.close()


def test_an_update_that_waits_while_the_agent_dies_counts_once(platform: Platform):
    buffers = Buffers(platform).create(2, slots=8)
    with closing(buffers):
        update = difference(70)
        commit = platform.fill_slot("third", update.tobytes(), 1, is_delta=True)
        channel = ask_on(platform, commit)
        assert not is_answered(channel, 0.1)
        agent = platform.processes["agent"]
        agent.kill()
        agent.wait()
        assert agent.stdout is not None
        agent.stdout.close()
        platform.start_agent()
        platform.rejoin()
        assert split_slot_reference(commit.slot)[1] in platform.busy
    assert answer_on(channel) == Verdict("accepted", 2)
    buffers.close()
    buffers.count(update, 1)
    assert buffers.submit("third", 1).status == "duplicate"
    buffers.submit("fourth", 2)
    buffers.close()
    platform.wait_for_all_slots()


def test_a_worker_that_is_killed_while_a_buffer_is_closed_loses_nothing(platform: Platform):
    buffers = Buffers(platform).create(2, slots=8)
    update = difference(70)
    with closing(buffers):
        commit = platform.fill_slot("third", update.tobytes(), 1, is_delta=True)
        hold(platform, commit)
        channel = ask_on(platform, commit)
        os.kill(platform.workers()[0], signal.SIGKILL)
        assert answer_on(channel) == Verdict("accepted", 2)
    buffers.close()
    buffers.count(update, 1)
    buffers.submit("fourth", 1)
    buffers.close()
    platform.wait_for_all_slots()


# --- over-selection --------------------------------------------------------------------------------------------


def test_so_many_clients_are_selected_and_an_update_of_another_does_not_count(platform: Platform):
    platform.create_job(MODEL, goal=2, over_selection=0.5)
    ask = [platform.ask(SelectClient("job", 1, client)) for client in ("a", "b", "a", "c", "d", "a")]
    assert [answer.status for answer in ask] == ["selected", "selected", "again", "selected", "enough", "again"]
    assert (ask[4].selected, ask[4].places) == (3, 3)
    assert platform.ask(Admit("job", 1, "d", "id", platform.gateway)) == Verdict("unselected", 1)
    assert platform.submit("d", difference(1).tobytes()) == Verdict("unselected", 1)
    assert platform.describe().current.selected == 3
    updates = [difference(2), difference(3)]
    for client, update in zip("ca", updates, strict=True):
        verdict = platform.submit(client, update.tobytes())
        assert isinstance(verdict, Verdict)
        assert verdict.status == "accepted"
    platform.wait_for_round(2)
    assert np.allclose(platform.model(), np.mean(updates, axis=0), atol=1e-6)
    assert [platform.ask(SelectClient("job", number, "b")).status for number in (1, 2, 3)] == [
        *("late", "selected", "early"),
    ]
    late = platform.submit("b", difference(4).tobytes())
    assert late == Verdict("late", 2)
    platform.wait_for_all_slots()


def test_the_round_that_is_being_closed_selects_nobody(platform: Platform):
    platform.create_job(MODEL, goal=1, over_selection=1.0)
    platform.ask(Admit("job", 1, "a", "id", platform.gateway))
    worker = until(lambda: platform.workers() and platform.describe().workers and platform.workers())[0]
    os.kill(worker, signal.SIGSTOP)
    try:
        platform.submit("a", difference(1).tobytes())
        assert platform.ask(SelectClient("job", 1, "b")) == Selection("late", 2)
    finally:
        os.kill(worker, signal.SIGCONT)
    platform.wait_for_round(2)


def test_a_straggler_deadline_closes_a_round_though_selected_clients_have_not_come(platform: Platform):
    begin = time.monotonic()
    platform.create_job(MODEL, goal=4, quorum=2, deadline=0.7, over_selection=0.5)
    for client in "abcdef":
        assert platform.ask(SelectClient("job", 1, client)).status == "selected"
    updates = [difference(client) for client in range(2)]
    for client, update in zip("ae", updates, strict=True):
        platform.submit(client, update.tobytes())
    state = platform.wait_for_round(2)
    assert time.monotonic() - begin >= 0.7
    assert (state.last.accepted, state.last.selected) == (2, 6)
    assert np.allclose(platform.model(), np.mean(updates, axis=0), atol=1e-6)
    assert platform.submit("b", difference(9).tobytes()) == Verdict("late", 2)
    assert platform.ask(BusySlots(0)) == Slots(())

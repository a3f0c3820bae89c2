"""Sharded jobs as the nodes of a cluster see them: what counts, what is lost, and what a restart finds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lifl.cluster.cluster_job import ClusterJob
from lifl.cluster.coordinator import ClusterCoordinator
from lifl.cluster.journal import Journal
from lifl.cluster.messages import (
    Counted,
    CountUpdate,
    EndUpload,
    FunctionFacts,
    JobBroken,
    JobOrder,
    Leave,
    MemberMessages,
    ModelHeld,
    ModelMade,
    OrdersRequest,
    Placed,
    PlaceUpdate,
    RejectUpdate,
)
from lifl.cluster.sharded_job import ShardedJob
from lifl.errors import Refused
from lifl.messages import Acknowledged, JobSpec, Problem

from tests.unit.cluster_walk import CLOCK, FUNCTION, registration

JOB = "big"
SHARDS = 3


class Shards:
    """A coordinator with one job of several shards; nodes are names, and what they hold is what was counted."""

    def __init__(self, directory: Path, nodes: int = 2, slots: int = 10, **spec: Any) -> None:
        self.path = directory / "coordinator.db"
        self.now = 1000.0
        self.slots = slots
        self.coordinator = self._open()
        options = {"goal": 3, "shards": SHARDS, **spec}
        self.spec = JobSpec(JOB, FUNCTION, **options)
        self.names = [f"n{number}" for number in range(nodes)]
        self.lives = dict.fromkeys(self.names, 1)
        for name in self.names:
            self.join(name)
        self.coordinator.create_job(self.spec)
        self.tell("n0", FunctionFacts(FUNCTION, False, 0))
        self.coordinator.model_installed(JOB, self.job.nonce, self.now)
        self.commit()
        self.tell_slots()

    def _open(self) -> ClusterCoordinator:
        return ClusterCoordinator(Journal(self.path, CLOCK), self.now, own_address="coordinator:9000")

    def join(self, name: str) -> None:
        self.coordinator.register(registration(name, self.incarnation(name)), self.now)
        self.commit()

    def commit(self) -> None:
        self.coordinator.journal.flush()

    def restart(self) -> None:
        self.coordinator.journal.close()
        self.coordinator = self._open()

    def incarnation(self, name: str) -> str:
        return f"{name}.{self.lives[name]}"

    @property
    def job(self) -> ShardedJob:
        return self.coordinator.jobs.sharded.by_name[JOB]

    def shard(self, index: int) -> ClusterJob:
        return self.job.shards[index]

    def home(self, index: int) -> str:
        return self.shard(index).home_node.partition(".")[0]

    def tell(self, name: str, message: Any) -> Any:
        request = MemberMessages(self.incarnation(name), (message,))
        (answer,) = self.coordinator.answer(name, request, self.now, self.now)
        self.commit()
        return answer

    def tell_slots(self) -> None:
        for index, job in enumerate(self.job.shards):
            self.tell(self.home(index), ModelHeld(job.name, job.attempt, job.model_round, self.slots))

    def order(self, index: int, name: str = "") -> JobOrder:
        name = name or self.home(index)
        member = self.coordinator.note_request(name, OrdersRequest(self.incarnation(name)), self.now, self.now)
        orders = self.coordinator.orders(member)
        assert orders is not None
        (order,) = [order for order in orders.jobs if order.job == f"{JOB}.{index}"]
        return order

    def place(self, client: str, index: int) -> Any:
        """Any node may be asked; here it is the home."""
        return self.tell(self.home(index), PlaceUpdate(f"{JOB}.{index}", self.number(index), client))

    def number(self, index: int) -> int:
        round_ = self.shard(index).round
        return round_.number if round_ is not None else 0

    def ask(self, client: str, index: int, weight: float = 1.0, name: str = "", update: str = "") -> Any:
        """Have a part counted that is in the memory of its home, or of another node."""
        job = self.shard(index)
        message = CountUpdate(job.name, job.nonce, self.number(index), job.attempt, client, weight, update)
        return self.tell(name or self.home(index), message)

    def send(self, client: str, index: int, weight: float = 1.0, update: str = "") -> Any:
        placed = self.place(client, index)
        if not isinstance(placed, Placed) or placed.status != "open":
            return placed
        assert placed.node == self.home(index)
        return self.ask(client, index, weight, update=update)

    def send_all(self, client: str, weight: float = 1.0) -> str:
        answers = [self.send(client, index, weight) for index in range(SHARDS)]
        assert all(answer.status == "ask-again" for answer in answers[:-1]), answers
        return str(answers[-1].status)

    def clients(self, index: int) -> list[str]:
        round_ = self.shard(index).round
        return sorted(round_.updates) if round_ is not None else []

    def make(self, index: int) -> Any:
        """The home of a shard has made the model of its round."""
        order = self.order(index)
        made = ModelMade(
            order.job, order.round, order.attempt, order.epoch, (self.incarnation(self.home(index)),),
            order.updates, float(order.updates),
        )  # fmt: skip
        return self.tell(self.home(index), made)

    def store(self, *indices: int) -> None:
        for task in self.coordinator.checkpoint_tasks():
            if int(task.job.rpartition(".")[2]) in (indices or range(SHARDS)):
                self.coordinator.checkpoint_stored(task, self.now)
        self.commit()

    def finish(self, *indices: int) -> None:
        """Shards have their models made and stored."""
        for index in indices or range(SHARDS):
            assert self.make(index) == Acknowledged()
            self.store(index)

    def kill(self, name: str) -> None:
        self.coordinator.leave(name, Leave(self.incarnation(name)), self.now)
        self.commit()

    def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1
            for member in list(self.coordinator.members.living):
                self.coordinator.members.renew(member, self.now)
            self.coordinator.tick(self.now)
        self.commit()

    def rounds(self) -> list[tuple[int, int]]:
        return [(self.number(index), job.attempt) for index, job in enumerate(self.job.shards)]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Shards]:
    shards = Shards(tmp_path)
    yield shards
    shards.coordinator.journal.close()


# --- counting ------------------------------------------------------------------------------------------------


def test_an_update_counts_in_all_shards_at_the_moment_its_last_part_is_there(made: Shards):
    assert [made.send("a", index).status for index in (2, 0)] == ["ask-again"] * 2
    assert [made.clients(index) for index in range(SHARDS)] == [[], [], []]
    assert made.send("a", 1).status == "accepted"
    assert [made.clients(index) for index in range(SHARDS)] == [["a"]] * 3
    assert [made.ask("a", index).status for index in (2, 0, 1)] == ["accepted"] * 3
    assert made.coordinator.jobs.totals.counted == 1


def test_whoever_holds_a_part_has_an_order_when_it_counts(made: Shards):
    first = made.send("a", 0)
    assert first.version > made.order(0).version
    made.send("a", 1)
    assert first.version > made.order(0).version
    made.send("a", 2)
    assert first.version <= made.order(0).version
    assert made.ask("a", 0) == Counted("accepted", 1)


def test_a_part_that_comes_twice_is_one_part(made: Shards):
    assert made.send("a", 0).status == "ask-again"
    assert made.send("a", 0).status == "ask-again"
    made.send("a", 1)
    assert made.send("a", 2).status == "accepted"
    assert made.place("a", 0) == Placed("duplicate", 1)
    assert made.ask("a", 0).status == "accepted"


def test_a_part_counts_on_the_home_of_its_shard_only(made: Shards):
    other = next(name for name in made.names if name != made.home(0))
    answer = made.ask("a", 0, name=other)
    assert isinstance(answer, Problem) and (answer.status, answer.title) == (503, "elsewhere")


def test_parts_of_different_weight_are_no_update(made: Shards):
    made.send("a", 0, 2.0)
    made.send("a", 1, 2.0)
    answer = made.send("a", 2, 3.0)
    assert isinstance(answer, Problem) and answer.status == 422
    assert made.send("a", 2, 2.0).status == "accepted"


def test_parts_of_different_updates_of_a_client_are_not_joined(made: Shards):
    first = made.ask("a", 0, update="one")
    assert made.ask("a", 1, update="two").status == "ask-again"
    assert first.version <= made.order(0).version, "the node is told"
    answer = made.ask("a", 0, update="one")
    assert isinstance(answer, Problem) and answer.status == 503
    assert made.ask("a", 2, update="two").status == "ask-again"
    assert [made.clients(index) for index in range(SHARDS)] == [[], [], []]
    assert made.ask("a", 0, update="two").status == "accepted"
    assert made.ask("a", 1, update="one").status == "duplicate", "its node has the part of the other in its round"
    assert [made.ask("a", index, update="two").status for index in range(SHARDS)] == ["accepted"] * 3


def test_all_rounds_close_together_and_the_next_opens_when_all_models_are_stored(made: Shards):
    for client in ("a", "b"):
        assert made.send_all(client) == "accepted"
    made.send("d", 0)
    assert made.send_all("c") == "accepted"
    assert [made.order(index).phase for index in range(SHARDS)] == ["closing"] * 3
    assert made.ask("d", 0).status == "late"
    made.finish(0, 2)
    assert made.rounds() == [(2, 0), (1, 0), (2, 0)]
    state = made.coordinator.requests.describe(JOB)
    assert (state.round, state.model_round, state.checkpointed_round) == (1, 1, 1)
    assert made.send("a", 0).status == "ask-again"  # it waits for a shard that is behind
    made.finish(1)
    assert made.rounds() == [(2, 0)] * 3
    assert made.send("a", 1).status == "ask-again"
    assert made.send("a", 2).status == "accepted"
    assert made.coordinator.requests.describe(JOB).model_round == 2


def test_a_deadline_is_the_same_for_all_shards(tmp_path: Path):
    made = Shards(tmp_path, deadline=10.0, quorum=1)
    for client in ("a", "b", "c"):
        made.send_all(client)
    made.finish(0)
    made.pass_time(8)
    made.finish(1, 2)
    assert made.send_all("a") == "accepted"
    made.pass_time(9)
    assert {made.order(index).phase for index in range(SHARDS)} == {"open"}
    made.pass_time(2)
    assert {made.order(index).phase for index in range(SHARDS)} == {"closing"}
    made.coordinator.journal.close()


# --- tickets -------------------------------------------------------------------------------------------------


def test_only_as_many_clients_send_parts_as_every_home_has_slots_for(tmp_path: Path):
    made = Shards(tmp_path, slots=2)
    assert made.send("a", 0).status == "ask-again"
    assert made.send("b", 1).status == "ask-again"
    answer = made.place("c", 2)
    assert isinstance(answer, Problem) and answer.status == 503 and 0 < answer.retry_after < 1
    assert made.place("a", 1).status == "open", "who has a ticket goes on"
    made.ask("a", 1)
    made.send("a", 2)
    assert made.place("c", 2).status == "open"
    made.tell("n0", EndUpload(f"{JOB}.2", 1, "c"))
    assert made.place("d", 2).status == "open", "who gives up leaves its ticket"
    made.coordinator.journal.close()


def test_one_client_at_a_time_until_all_homes_have_told_their_slots(tmp_path: Path):
    made = Shards(tmp_path, slots=0)
    assert made.place("a", 0).status == "open"
    assert made.place("b", 0).status == 503
    made.coordinator.journal.close()


def test_parts_that_never_come_are_not_waited_for_for_ever(made: Shards):
    first = made.send("a", 0)
    made.pass_time(29)
    assert made.ask("a", 0).status == "ask-again"
    made.pass_time(2)
    assert first.version <= made.order(0).version
    answer = made.ask("a", 0)
    assert isinstance(answer, Problem) and answer.status == 503
    assert made.send_all("a") == "accepted", "it may be sent again"


def test_a_part_waits_longer_while_another_is_uploaded(made: Shards):
    made.send("a", 0)
    made.place("a", 1)
    made.pass_time(100)
    assert made.ask("a", 1).status == "ask-again"
    assert made.send("a", 2).status == "accepted"


# --- what is lost --------------------------------------------------------------------------------------------


def test_a_node_lost_with_updates_begins_the_round_anew_in_all_shards(made: Shards):
    for client in ("a", "b"):
        made.send_all(client)
    nonces = {job.nonce for job in made.job.shards}
    etag = made.job.nonce
    lost = made.home(0)
    made.kill(lost)
    assert made.rounds() == [(1, 1)] * 3
    assert not nonces & {job.nonce for job in made.job.shards} and made.job.nonce != etag
    assert {made.home(index) for index in range(SHARDS)} == {"n0", "n1"} - {lost}
    made.tell_slots()
    state = made.coordinator.requests.describe_round(JOB, 1)
    assert (state.accepted, state.lost) == (0, 2)
    for client in ("a", "b", "c"):
        assert made.send_all(client) == "accepted"
    made.finish()
    assert made.rounds() == [(2, 1)] * 3


def test_shards_that_are_ahead_go_back_with_the_others(made: Shards):
    for client in ("a", "b", "c"):
        made.send_all(client)
    behind = next(index for index in range(SHARDS) if made.home(index) != made.home(0))
    ahead = [index for index in range(SHARDS) if index != behind]
    made.finish(*ahead)
    made.make(behind)  # made, but not stored
    made.kill(made.home(behind))
    assert made.rounds() == [(1, 1)] * 3
    assert [job.checkpoints for job in made.job.shards] == [[1]] * 3
    assert sorted(made.coordinator.jobs.sharded.void) == [(f"{JOB}.{index}", 2) for index in ahead]
    made.restart()
    assert made.rounds() == [(1, 1)] * 3
    assert [job.checkpoints for job in made.job.shards] == [[1]] * 3
    made.tell_slots()
    for client in ("a", "b", "d"):
        assert made.send_all(client) == "accepted"
    made.finish()
    assert made.coordinator.requests.describe(JOB).model_round == 2
    assert {record.client for record in made.coordinator.journal.record_of(made.shard(0).recent[-1].key)[0]} == {
        "a",
        "b",
        "d",
    }


def test_shards_that_are_complete_go_back_with_one_that_is_not(tmp_path: Path):
    made = Shards(tmp_path, rounds=1)
    for client in ("a", "b", "c"):
        made.send_all(client)
    behind = next(index for index in range(SHARDS) if made.home(index) != made.home(0))
    made.finish(*(index for index in range(SHARDS) if index != behind))
    assert [job.status for job in made.job.shards].count("complete") == 2
    assert made.coordinator.requests.describe(JOB).status == "running"
    made.kill(made.home(behind))
    assert made.rounds() == [(1, 1)] * 3
    made.tell_slots()
    for client in ("a", "b", "c"):
        assert made.send_all(client) == "accepted"
    made.finish()
    state = made.coordinator.requests.describe(JOB)
    assert (state.status, state.round, state.model_round) == ("complete", 0, 2)
    made.restart()
    assert made.coordinator.requests.describe(JOB).status == "complete"
    made.coordinator.journal.close()


def test_a_node_lost_without_updates_costs_nothing(made: Shards):
    made.send("a", 0)
    lost = made.home(0)
    made.kill(lost)
    assert made.rounds() == [(1, 0)] * 3
    assert all(made.home(index) not in ("", lost) for index in range(SHARDS))
    made.tell_slots()
    assert made.send_all("a") == "accepted"


def test_a_shard_that_is_broken_on_a_node_moves_to_another(made: Shards):
    made.send_all("a")
    broken = made.home(1)
    made.tell(broken, JobBroken(f"{JOB}.1", 0, "no memory"))
    assert made.home(1) not in ("", broken)
    assert made.rounds() == [(1, 1)] * 3


def test_a_draining_node_keeps_its_shards_to_the_end_of_the_round(made: Shards):
    drained = made.home(0)
    made.send_all("a")
    made.coordinator.drain(drained, True)
    assert made.home(0) == drained
    for client in ("b", "c"):
        assert made.send_all(client) == "accepted"
    made.finish()
    assert made.rounds() == [(2, 0)] * 3
    assert drained not in {made.home(index) for index in range(SHARDS)}


def test_a_node_drained_before_it_has_updates_gives_its_shards_away(made: Shards):
    made.send("a", 0)
    before = made.home(0)
    version = made.order(0).version
    made.coordinator.drain(before, True)
    assert made.home(0) != before
    assert made.order(0, before).version > version
    assert made.ask("a", 0, name=before).status == 503
    made.tell_slots()
    assert made.send_all("a") == "accepted"


def test_homes_are_spread_over_the_nodes_by_their_memory(tmp_path: Path):
    made = Shards(tmp_path, nodes=3, shards=3)
    assert sorted(made.home(index) for index in range(3)) == ["n0", "n1", "n2"]
    made.coordinator.journal.close()


def test_shards_move_to_a_node_that_joins_but_not_in_a_round_with_updates(tmp_path: Path):
    made = Shards(tmp_path, nodes=1)
    made.send_all("a")
    made.lives["n1"] = made.lives["n2"] = 1
    made.join("n1")
    assert {made.home(index) for index in range(SHARDS)} == {"n0"}
    made.send_all("b")
    made.send_all("c")
    made.finish()
    assert made.rounds() == [(2, 0)] * 3
    assert sorted(made.home(index) for index in range(SHARDS)) == ["n0", "n0", "n1"]
    made.join("n2")
    assert sorted(made.home(index) for index in range(SHARDS)) == ["n0", "n1", "n2"]
    made.coordinator.journal.close()


# --- rejection -----------------------------------------------------------------------------------------------


def reject(made: Shards, client: str, index: int) -> None:
    order = made.order(index)
    made.tell(made.home(index), RejectUpdate(order.job, order.round, order.attempt, client))


def test_an_update_that_is_not_finite_in_one_shard_is_taken_out_of_all(made: Shards):
    for client in ("a", "bad"):
        made.send_all(client)
    reject(made, "bad", 1)
    assert made.rounds() == [(1, 1)] * 3
    made.tell_slots()
    for index in range(SHARDS):
        answer = made.place("bad", index)
        assert isinstance(answer, Problem) and (answer.status, answer.title) == (422, "not finite")
    made.restart()
    assert made.place("bad", 0).status == 422
    made.tell_slots()
    state = made.coordinator.requests.describe_round(JOB, 1)
    assert (state.rejected, state.rejected_clients, state.accepted) == (1, ("bad",), 0)
    for client in ("a", "b", "c"):
        assert made.send_all(client) == "accepted"
    made.finish()
    assert made.send_all("bad") == "accepted", "in the next round it may do better"


def test_an_update_rejected_while_the_round_closes_is_not_replaced(made: Shards):
    for client in ("a", "b", "bad"):
        made.send_all(client)
    made.finish(0)
    reject(made, "bad", 2)
    assert made.rounds() == [(1, 1)] * 3
    made.tell_slots()
    assert made.send_all("a") == "accepted"
    made.kill(made.home(0))
    assert made.rounds() == [(1, 2)] * 3
    made.tell_slots()
    for client in ("a", "b"):
        assert made.send_all(client) == "accepted"
    assert {made.order(index).phase for index in range(SHARDS)} == {"closing"}


# --- restarts ------------------------------------------------------------------------------------------------


def test_a_restart_finds_the_job_its_counted_updates_and_its_homes(made: Shards):
    made.send_all("a")
    made.send("b", 0)
    homes = [made.home(index) for index in range(SHARDS)]
    before = made.coordinator.requests.describe(JOB)
    made.restart()
    assert [made.home(index) for index in range(SHARDS)] == homes
    assert made.coordinator.requests.describe(JOB) == before
    assert made.job.spec == made.spec
    assert made.ask("a", 0).status == "accepted"
    assert made.ask("b", 0).status == "ask-again"
    made.tell_slots()
    assert [made.send("b", index).status for index in (1, 2)] == ["ask-again", "accepted"]
    assert [made.clients(index) for index in range(SHARDS)] == [["a", "b"]] * 3


# --- names and what cannot be --------------------------------------------------------------------------------


def test_a_sharded_job_is_one_job_to_whoever_looks(made: Shards):
    jobs = made.coordinator.requests.list_jobs().jobs
    assert [(state.job, state.spec) for state in jobs] == [(JOB, made.spec)]
    shard = made.coordinator.requests.describe(f"{JOB}.1")
    assert (shard.spec.shard_of, shard.spec.durability, shard.spec.shards) == (JOB, "sync", 1)
    assert made.coordinator.create_job(made.spec) == made.coordinator.requests.describe(JOB)
    with pytest.raises(Refused, match="is a shard"):
        made.coordinator.delete_job(f"{JOB}.0")
    made.coordinator.delete_job(JOB)
    assert made.coordinator.requests.list_jobs().jobs == ()
    assert {made.order(index, "n0").status for index in range(SHARDS)} == {"deleted"}


def test_names_of_shards_are_taken(made: Shards):
    with pytest.raises(Refused, match="name taken"):
        made.coordinator.create_job(JobSpec(f"{JOB}.1", FUNCTION, 1))
    made.coordinator.create_job(JobSpec("small.1", FUNCTION, 1))
    with pytest.raises(Refused, match="name taken"):
        made.coordinator.create_job(JobSpec("small", FUNCTION, 1, shards=2))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"shards": 0}, "from 1"),
        ({"shards": 257}, "to 256"),
        ({"shards": 2, "mode": "async"}, "mode sync"),
        ({"shards": 2, "over_selection": 0.5}, "over_selection"),
        ({"shard_of": "big"}, "not for users"),
        ({"whole": JobSpec("big", FUNCTION, 1)}, "not for users"),
        ({"name": "n" * 62, "shards": 2}, "too long"),
    ],
)
def test_what_cannot_be_sharded_is_refused(made: Shards, spec: dict[str, Any], text: str):
    with pytest.raises(Refused, match=text) as refusal:
        made.coordinator.create_job(JobSpec(**{"name": "other", "function": FUNCTION, "goal": 1, **spec}))
    assert refusal.value.status == 422


def test_functions_that_compare_whole_updates_are_refused_or_fail_the_job(tmp_path: Path):
    made = Shards(tmp_path)
    made.tell("n0", FunctionFacts(FUNCTION, True, 0))
    state = made.coordinator.requests.describe(JOB)
    assert state.status == "failed" and "whole updates" in state.detail
    with pytest.raises(Refused, match="not in shards"):
        made.coordinator.create_job(JobSpec("other", FUNCTION, 1, shards=2))
    made.coordinator.journal.close()


# --- everything at once --------------------------------------------------------------------------------------


class Walk:
    """Nodes and clients that do whatever the protocol lets them; every model's shards have the same updates."""

    def __init__(self, made: Shards, seed: int) -> None:
        self.made = made
        self.random = random.Random(seed)
        self.models: dict[tuple[int, int], dict[int, frozenset[str]]] = {}
        """What is in the model of each shard, by the round it starts and the attempt."""

    def step(self) -> None:
        made, rng = self.made, self.random
        actions = [
            (60, self.send), (12, self.make), (12, self.store), (2, self.lose), (2, self.reject),
            (3, made.restart), (2, self.drain), (3, lambda: made.pass_time(rng.choice([1, 20, 130]))),
            (3, self.give_up),
        ]  # fmt: skip
        (action,) = rng.choices([action for _, action in actions], [weight for weight, _ in actions])
        action()
        self.check()

    def send(self, clients: range = range(6)) -> None:
        index = self.random.randrange(SHARDS)
        if self.made.home(index) and self.made.number(index):
            self.made.send(f"c{self.random.choice(clients)}", index, update=self.random.choice(["", "", "2"]))

    def give_up(self) -> None:
        index = self.random.randrange(SHARDS)
        client = f"c{self.random.randrange(6)}"
        self.made.tell(self.made.names[0], EndUpload(f"{JOB}.{index}", self.made.number(index), client))

    def make(self) -> None:
        index = self.random.randrange(SHARDS)
        round_ = self.made.shard(index).round
        if round_ is None or round_.is_complete or round_.phase != "closing":
            return
        clients = frozenset(round_.updates)
        assert self.made.make(index) == Acknowledged()
        key = (round_.number + 1, round_.attempt)
        self.models.setdefault(key, {})[index] = clients

    def store(self) -> None:
        self.made.store(self.random.randrange(SHARDS))
        if self.random.random() < 0.3:
            self.made.tell_slots()

    def lose(self) -> None:
        name = self.random.choice(self.made.names)
        self.made.kill(name)
        self.made.lives[name] += 1
        self.made.join(name)

    def reject(self) -> None:
        index = self.random.randrange(SHARDS)
        round_ = self.made.shard(index).round
        if round_ is not None and round_.updates and not round_.is_complete:
            reject(self.made, self.random.choice(sorted(round_.updates)), index)

    def drain(self) -> None:
        self.made.coordinator.drain(self.made.names[-1], self.random.random() < 0.5)
        self.made.commit()

    def check(self) -> None:
        job = self.made.job
        rounds = [shard.round for shard in job.shards if shard.round is not None]
        assert len({shard.attempt for shard in job.shards}) == 1
        assert max(r.number for r in rounds) - min(r.number for r in rounds) <= 1
        open_rounds = [r for r in rounds if not r.is_complete]
        if len({r.number for r in rounds}) == 1 and len(open_rounds) == SHARDS:
            assert len({frozenset(r.updates) for r in rounds}) == 1
            assert len({r.phase for r in rounds}) == 1
        for round_ in rounds:
            assert len(round_.shares) <= 1
        for models in self.models.values():
            assert len(set(models.values())) == 1, "a model of shards with different updates"


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_the_shards_of_a_model_have_the_same_updates(tmp_path: Path, seed: int):
    made = Shards(tmp_path, nodes=3, keep_checkpoints=1)
    walk = Walk(made, seed)
    for _ in range(400):
        walk.step()
    made.coordinator.drain(made.names[-1], False)
    before = made.job.model_round
    for _ in range(1500):
        if made.job.model_round >= before + 2:
            break
        made.tell_slots()
        walk.send(range(6, 12))
        walk.make()
        made.store()
        walk.check()
        made.pass_time(1)
    assert made.job.model_round >= before + 2, "nothing goes on"
    made.coordinator.journal.close()

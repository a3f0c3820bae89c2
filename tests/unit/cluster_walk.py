"""A cluster on paper for tests of the coordinator: nodes that do what the protocol asks of them, and may die.

A node's memory is a dictionary of the updates it holds; a partial aggregate is a copy of that, and a model is all
of them together. So whatever the coordinator believes to be in a model can be compared with what is.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from lifl.cluster.coordinator import ClusterCoordinator
from lifl.cluster.journal import Journal
from lifl.cluster.members import Expired
from lifl.cluster.messages import (
    AttachedFunctions,
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
    PartialDelivered,
    Placed,
    PlaceUpdate,
    Register,
    RejectUpdate,
)
from lifl.messages import Acknowledged, JobSpec, Problem
from lifl.staleness import contributor_of

JOB = "walk"
FUNCTION = "fedavg"
CLOCK = "boot-1"

Memory = dict[str, float]


def registration(name: str, incarnation: str, capacity: float = 4.0, attaches: bool = False) -> Register:
    return Register(
        *(name, incarnation, f"http://{name}:8080", f"{name}:9000", 4, 1 << 30, "unix"),
        functions=() if attaches else (FUNCTION,),
        capacity=capacity,
        attaches=attaches,
    )


@dataclass
class PaperNode:
    """One node: its memory, its latest order, and the messages that it has not had an answer to."""

    name: str
    life: int = 1
    is_alive: bool = True
    is_cut_off: bool = False
    """It cannot reach the coordinator, but other nodes can reach it."""
    boot: str = ""
    has_function: bool = True
    """A pod of the function is there: what the node has can be folded."""
    order: JobOrder | None = None
    seen: int = 0
    held: Memory = field(default_factory=dict)
    uploads: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """By contributor, round, attempt and nonce of each update that was placed here and not sent to be counted."""
    postponed: dict[str, tuple[float, int, int]] = field(default_factory=dict)
    """By contributor, weight, version of the order that is waited for, and nonce."""
    queue: deque[Any] = field(default_factory=deque)
    partials: dict[str, Memory] = field(default_factory=dict)
    has_sent: bool = False
    has_finished: bool = False
    made: Memory = field(default_factory=dict)
    """What is in the model that it made last."""
    models: dict[tuple[int, int], Any] = field(default_factory=dict)
    """By attempt and the round that the model starts."""

    @property
    def incarnation(self) -> str:
        return f"{self.name}.{self.life}"

    def begin_life(self) -> None:
        self.life += 1
        self.is_alive = True
        self.order, self.seen = None, 0
        self.held, self.uploads, self.partials, self.models, self.postponed = {}, {}, {}, {}, {}
        self.queue.clear()
        self.has_sent = self.has_finished = False

    def take_order(self, order: JobOrder) -> None:
        before = self.order
        if before is None or (before.round, before.attempt) != (order.round, order.attempt):
            self.held, self.partials, self.has_sent, self.has_finished = {}, {}, False, False
            if before is None or before.attempt != order.attempt:
                self.postponed.clear()
            if order.spec.mode == "sync" or not self.postponed:
                self.uploads.clear()
        elif before.epoch != order.epoch or order.role != before.role or not order.role:
            self.has_sent = self.has_finished = False
            if order.epoch != before.epoch or order.role != "top":
                self.partials = {}
        if order.role == "top" and order.phase == "open":
            self.has_finished = False
        self.order = order
        self._ask_again(order)

    def is_asking_for(self, contributor: str) -> bool:
        """Whether another upload of the same update waits for an answer here."""
        asked = any(isinstance(message, CountUpdate) and message.client == contributor for message in self.queue)
        return asked or contributor in self.postponed

    def _ask_again(self, order: JobOrder) -> None:
        """Have counted what came while a buffer was being closed."""
        for contributor, (weight, version, nonce) in list(self.postponed.items()):
            if order.version >= version and order.phase == "open" and order.status == "running":
                del self.postponed[contributor]
                self.held[contributor] = weight
                self.queue.append(CountUpdate(JOB, nonce, order.round, order.attempt, contributor, weight))


class PaperCluster:
    """A coordinator with its journal in a file, nodes, and a clock that moves when told."""

    def __init__(
        self,
        directory: Path,
        spec: JobSpec,
        nodes: int,
        seed: int,
        lease: float = 10.0,
        attaches: bool = False,
    ) -> None:
        """With `attaches` the function comes to the nodes by `scale`."""
        self.random = random.Random(seed)
        self.path = directory / "coordinator.db"
        self.lease = lease
        self.now = 1000.0
        self.clock = CLOCK
        self.coordinator = self._new_coordinator()
        self.attaches = attaches
        self.nodes = {f"n{number}": PaperNode(f"n{number}", has_function=not attaches) for number in range(nodes)}
        self.models: dict[tuple[int, int], Memory] = {}
        """What is in each model that the coordinator has accepted, by attempt and round."""
        self.lineage: dict[int, set[str]] = {}
        """Contributors of the rounds that led to the newest model."""
        self.coordinator.create_job(spec)
        for node in self.nodes.values():
            self._register(node)
        job = self.coordinator.jobs.find(JOB)
        self.send(self.nodes["n0"], FunctionFacts(FUNCTION, False, 0))
        self.coordinator.model_installed(JOB, job.nonce, self.now)
        self.commit()

    def _new_coordinator(self) -> ClusterCoordinator:
        journal = Journal(self.path, self.clock)
        return ClusterCoordinator(journal, self.now, own_address="coordinator:9000", lease_seconds=self.lease)

    def commit(self) -> None:
        self.coordinator.journal.flush()

    def close(self) -> None:
        self.coordinator.journal.close()

    def restart(self) -> None:
        """Kill the coordinator after a commit and start it again."""
        self.close()
        self.coordinator = self._new_coordinator()

    @property
    def job(self) -> Any:
        return self.coordinator.jobs.find(JOB)

    # --- one request ---------------------------------------------------------------------------------------

    def send(self, node: PaperNode, message: Any) -> Any:
        request = MemberMessages(node.incarnation, (message,))
        (answer,) = self.coordinator.answer(node.name, request, self.now, self.now)
        self.commit()
        return answer

    def reaches(self, node: PaperNode) -> bool:
        return node.is_alive and not node.is_cut_off

    def poll(self, node: PaperNode) -> None:
        """Ask for orders, and carry them out."""
        if not self.reaches(node):
            return
        # The coordinator must know what was taken in before an order when it hears that the order was seen.
        may_tell = not any(isinstance(message, PartialDelivered) for message in node.queue)
        if may_tell and node.order is not None:
            node.seen = node.order.version
        request = OrdersRequest(node.incarnation, {JOB: node.seen} if node.seen else {})
        try:
            member = self.coordinator.note_request(node.name, request, self.now, self.now)
        except Expired:
            self._register_anew(node)
            return
        orders = self.coordinator.orders(member) or self.coordinator.no_orders(member)
        self.commit()
        if orders.boot != node.boot:
            node.boot = orders.boot
            if self.attaches:
                self._tell_functions(node)
        for order in orders.jobs:
            node.take_order(order)

    def _register_anew(self, node: PaperNode) -> None:
        node.begin_life()
        self._register(node)
        self.commit()

    def _register(self, node: PaperNode) -> None:
        self.coordinator.register(registration(node.name, node.incarnation, attaches=self.attaches), self.now)
        if self.attaches and node.has_function:
            self._tell_functions(node)

    @staticmethod
    def _tell_functions(node: PaperNode) -> None:
        node.queue.append(AttachedFunctions((FUNCTION,) if node.has_function else ()))

    # --- pods ------------------------------------------------------------------------------------------------

    def attach(self, node: PaperNode, has_function: bool) -> None:
        """A pod of the function comes to a node, or ends there."""
        if node.is_alive and node.has_function != has_function:
            node.has_function = has_function
            self._tell_functions(node)

    def scale(self) -> None:
        """Do as an autoscaler does; the scheduler chooses nodes at random, but ends no pod that is busy."""
        (need,) = self.coordinator.jobs.needs.describe()
        alive = [node for node in self.nodes.values() if node.is_alive]
        having = [node for node in alive if node.has_function]
        lacking = [node for node in alive if not node.has_function]
        if len(having) < need.wanted and lacking:  # nodes that are dead may count as living still
            self.attach(self.random.choice(lacking), True)
        idle = [node for node in having if node.name not in need.busy]
        if len(having) > need.wanted and idle:
            self.attach(self.random.choice(idle), False)

    def flush_one(self, node: PaperNode, lose_answer: bool = False) -> None:
        """Send the oldest message that has no answer; perhaps the answer is lost."""
        if not self.reaches(node) or not node.queue:
            return
        message = node.queue[0]
        before = self.job.made_round, self.job.attempt
        try:
            answer = self.send(node, message)
        except Expired:
            self._register_anew(node)
            return
        if isinstance(message, ModelMade) and isinstance(answer, Acknowledged):
            self._check_model(node, message, before)
        if lose_answer:
            return
        node.queue.popleft()
        self._take_answer(node, message, answer)

    def _check_model(self, node: PaperNode, message: ModelMade, before: tuple[int, int]) -> None:
        """The record of a round says what is in its model."""
        key = (message.attempt, message.round + 1)
        if (self.job.made_round, self.job.attempt) == before:
            assert key in self.models  # a repeat
            return
        content = node.made
        complete = self.job.last
        records, _ = self.coordinator.journal.record_of(complete.key)
        counted = {record.client: record.num_samples for record in records if record.status == "counted"}
        assert counted == content, (counted, content, records, node)
        assert complete.state.accepted == len(content) == message.updates
        self.models[key] = content
        node.models[key] = content
        self._check_lineage(message.round, content)

    def _check_lineage(self, number: int, content: Memory) -> None:
        """An update of an asynchronous job is in one model only."""
        self.lineage = {other: names for other, names in self.lineage.items() if other < number}
        if self.job.spec.mode == "async":
            assert not any(names & content.keys() for names in self.lineage.values())
        self.lineage[number] = set(content)

    def _take_answer(self, node: PaperNode, message: Any, answer: Any) -> None:
        order = node.order
        if isinstance(answer, Counted) and answer.status == "ask-again" and order is not None:
            node.held.pop(message.client, None)
            if message.attempt == order.attempt:
                node.postponed[message.client] = (message.num_samples, answer.version, message.nonce)
                node.take_order(order)  # it may be known already that it can be counted now
        elif isinstance(message, CountUpdate) and order is not None:
            is_present = (message.round, message.attempt) == (order.round, order.attempt)
            if is_present and not (isinstance(answer, Counted) and answer.status == "accepted"):
                node.held.pop(message.client, None)
        if isinstance(message, ModelMade) and isinstance(answer, Problem):
            node.has_finished = False

    # --- what nodes and clients do ---------------------------------------------------------------------------

    def upload(self, client: str, asking: PaperNode, here: bool = False) -> None:
        """A client begins to send its update through some node."""
        if not self.reaches(asking):
            return
        number = self.job.round.number if self.job.round is not None else 1
        is_buffered = self.job.spec.mode == "async"
        base = max(1, number - self.random.randrange(5)) if is_buffered else number
        try:
            answer = self.send(asking, PlaceUpdate(JOB, base, client, here))
        except Expired:
            self._register_anew(asking)
            return
        if isinstance(answer, Placed) and answer.status == "open":
            target = self.nodes[answer.node]
            if target.is_alive and target.order is not None and (is_buffered or target.order.round == number):
                contributor = contributor_of(self.job.spec, client, base)
                target.uploads[contributor] = (base, target.order.attempt, target.order.nonce)

    def finish_upload(self, node: PaperNode) -> None:
        """An update is complete in a node's memory, or its client gave up."""
        if not node.is_alive or not node.uploads:
            return
        contributor = self.random.choice(sorted(node.uploads))
        number, attempt, nonce = node.uploads.pop(contributor)
        if self.random.random() < 0.1:
            node.queue.append(EndUpload(JOB, number, contributor.partition("@")[0]))
        elif contributor not in node.held and not node.is_asking_for(contributor):
            weight = float(self.random.randint(1, 9))
            if self.job.spec.mode == "async" and node.order is not None:
                number = node.order.round
            node.held[contributor] = weight
            node.queue.append(CountUpdate(JOB, nonce, number, attempt, contributor, weight))

    def _is_counted(self, node: PaperNode) -> bool:
        """Every update that the node holds was answered, and they are as many as its order says."""
        waiting = any(isinstance(message, CountUpdate | RejectUpdate) for message in node.queue)
        return not waiting and node.order is not None and len(node.held) == node.order.updates

    def reject(self, node: PaperNode) -> None:
        """A node finds that an update is not finite, before it is part of what it sent."""
        order = node.order
        if not node.is_alive or order is None or node.has_sent or node.has_finished or not node.held:
            return
        if any(isinstance(message, CountUpdate) for message in node.queue):
            return
        client = self.random.choice(sorted(node.held))
        del node.held[client]
        node.order = replace_order(order, updates=order.updates - 1)
        node.queue.append(RejectUpdate(JOB, order.round, order.attempt, client))

    def send_partial(self, node: PaperNode) -> None:
        """A middle sends its partial aggregate to the top."""
        order = node.order
        if not node.is_alive or order is None or (order.role, order.phase) != ("middle", "closing"):
            return
        if node.has_sent or not self._is_counted(node) or not node.held or not node.has_function:
            return
        top = next((n for n in self.nodes.values() if f"{n.name}:9000" == order.top), None)
        if top is None or not top.is_alive or top.order is None or top.order.role != "top":
            return
        of = (order.round, order.attempt, order.epoch)
        if of != (top.order.round, top.order.attempt, top.order.epoch) or top.has_finished:
            return
        if node.incarnation not in top.order.partials or node.incarnation in top.partials:
            return
        node.has_sent = True
        top.partials[node.incarnation] = dict(node.held)
        top.queue.append(PartialDelivered(JOB, *of, node.incarnation, len(node.held), 100))

    def finish(self, node: PaperNode) -> None:
        """The top makes the model when it has everything."""
        order = node.order
        if not node.is_alive or order is None or (order.role, order.phase) != ("top", "closing"):
            return
        if node.has_finished or not self._is_counted(node) or not set(order.partials) <= node.partials.keys():
            return
        if not node.has_function:
            return
        node.has_finished = True
        contributors = (*node.partials, *([node.incarnation] if node.held else []))
        node.made = dict(node.held)
        for partial in node.partials.values():
            assert not node.made.keys() & partial.keys(), "one client's update twice"
            node.made |= partial
        of = (order.round, order.attempt, order.epoch)
        node.queue.append(ModelMade(JOB, *of, contributors, len(node.made), sum(node.made.values())))

    def fetch_model(self, node: PaperNode) -> None:
        """A node gets the newest model from another one."""
        order = node.order
        if not node.is_alive or order is None or not order.model_round:
            return
        key = (order.attempt, order.model_round)
        if key in node.models:
            return
        if any(n.is_alive and key in n.models for n in self.nodes.values()):
            node.models[key] = self.models.get(key)
            node.queue.append(ModelHeld(JOB, *key))

    def store_checkpoint(self) -> None:
        for task in self.coordinator.checkpoint_tasks():
            key = (self.job.attempt, task.round)
            addresses = {f"{n.name}:9000" for n in self.nodes.values() if n.is_alive and key in n.models}
            if addresses & set(task.sources):
                self.coordinator.checkpoint_stored(task, self.now)
        self.commit()

    # --- what goes wrong -------------------------------------------------------------------------------------

    def kill(self, node: PaperNode) -> None:
        node.is_alive = False
        node.has_function = not self.attaches
        node.held, node.partials, node.models = {}, {}, {}
        node.queue.clear()

    def revive(self, node: PaperNode) -> None:
        if not node.is_alive:
            self._register_anew(node)

    def leave(self, node: PaperNode) -> None:
        if self.reaches(node):
            self.coordinator.leave(node.name, Leave(node.incarnation), self.now)
            self.commit()
            self.kill(node)

    def break_job(self, node: PaperNode) -> None:
        if self.reaches(node) and node.order is not None:
            node.queue.append(JobBroken(JOB, node.order.attempt, "no memory"))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.coordinator.tick(self.now)
        self.commit()

    def pass_lease(self) -> None:
        """So much time that a node which cannot reach the coordinator is lost, and no other."""
        for _ in range(4):
            for node in self.nodes.values():
                self.poll(node)
            self.pass_time(self.lease / 3)


def replace_order(order: JobOrder, **changes: Any) -> JobOrder:
    return msgspec.structs.replace(order, **changes)


def snapshot(coordinator: ClusterCoordinator) -> dict[str, Any]:
    """What has to survive a restart."""
    members = coordinator.members
    return {
        "members": {m.incarnation: (m.key, m.state, m.registration) for m in members.all},
        "draining": sorted(m.name for m in members.nodes if members.is_draining(m)),
        "kinds": dict(coordinator.jobs.kinds),
        "jobs": {name: job_snapshot(job) for name, job in coordinator.jobs.by_name.items()},
    }


def job_snapshot(job: Any) -> dict[str, Any]:
    round_ = job.round
    found = {
        "row": job.row(),
        "holders": set(job.holders),
        "broken": dict(job.broken),
        "checkpoints": list(job.checkpoints),
        "index": sorted(incarnation for incarnation in job.broken if incarnation in job.index),
        # Only a few rounds are kept in memory. After going back more than these, a restart knows more than before.
        "last": job.last.described() if job.last is not None and not job.attempt else None,
        "before": dict(job.counted_before),
        "earlier": job.earlier.by_base(),
    }
    if round_ is not None:
        found |= {
            "round": replace_counters(round_.row()),
            "updates": {u.client: (u.member, u.num_samples, u.sequence) for u in round_.updates.values()},
            "shares": {
                s.member: (s.key, s.updates, s.is_called, s.is_delivered, s.is_gone, s.fence > 0)
                for s in round_.shares.values()
            },
            "fenced": round_.fenced,
            "next": round_.next_sequence,
            "short": round_.is_short,
        }
    return found


def replace_counters(row: Any) -> Any:
    """Questions that were answered `late` or `duplicate` are counted in the journal along with something else."""
    return row._replace(late=0, duplicates=0)


def check_account(coordinator: ClusterCoordinator) -> None:
    """No update is counted twice, and the sums are right."""
    for job in coordinator.jobs.by_name.values():
        round_ = job.round
        if round_ is None:
            continue
        per_member: dict[str, int] = {}
        for client, update in round_.updates.items():
            assert client == update.client
            per_member[update.member] = per_member.get(update.member, 0) + 1
        assert per_member == {member: share.updates for member, share in round_.shares.items()}
        assert round_.accepted <= job.spec.goal
        fenced = sum(share.updates for share in round_.shares.values() if share.fence)
        assert round_.fenced == fenced
        rows = [row for row in coordinator.journal.updates_of(round_.key) if row[4] == 1]
        assert len(rows) == len({client for _, client, *_ in rows}) == round_.accepted
        for member in coordinator.members.living:
            assert member.placed == sum(
                placed.member == member.incarnation
                for other in coordinator.jobs.by_name.values()
                if other.round is not None
                for placed in other.round.placements.values()
            )

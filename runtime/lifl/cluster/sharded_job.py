"""A job whose model is cut into shards: several jobs, of one parameter range each, that go on together.

Each shard is an ordinary `ClusterJob` called NAME.0, NAME.1, ..., with one node, its *home*, that takes all of
its updates. A client sends one part of its update to each. The parts become *pending* one by one and are counted
all at once, in one commit: an update is in all shards of a round or in none, and all rounds close together.

Models become public when they are stored, each shard's by itself. Some shards may be a round ahead of others, but
never with updates. When updates of any shard are lost, or turn out not to be finite, the round begins anew in all
shards, with the model that all have stored.

Parts that wait for one another must not take the slots that the others need. Therefore only so many clients at a
time as the smallest home has slots for have a *ticket*, which they keep until their update counts or is too late.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from lifl.cluster.cluster_job import NONCE_BITS, ClusterJob, Status
from lifl.cluster.members import Member
from lifl.errors import Busy, Refused
from lifl.messages import JobSpec, JobState, RoundState
from lifl.shards import shard_name

PART_SECONDS: Final = 120.0
"""Time after which a part does not wait for the others any longer."""
_ALONE_SECONDS: Final = 30.0
"""The same when nothing of the client's update is being uploaded."""
_MARGIN: Final = 1.25
"""Moving a shard has to make its share of a node's memory smaller by more than this factor."""
_FEWEST_CHECKPOINTS: Final = 2
"""A shard that is a round ahead of others needs the model before its newest."""


def specs_of_shards(spec: JobSpec) -> list[JobSpec]:
    """What the jobs of the shards are to be."""
    keep = max(_FEWEST_CHECKPOINTS, spec.keep_checkpoints) if spec.keep_checkpoints else 0
    return [
        msgspec.structs.replace(
            spec,
            name=shard_name(spec.name, index),
            shards=1,
            shard_of=spec.name,
            whole=spec,
            durability="sync",
            redirect=True,
            keep_checkpoints=keep,
        )
        for index in range(spec.shards)
    ]


@dataclass(slots=True, eq=False)
class Part:
    """A shard's part of an update, complete in the memory of a node."""

    member: str
    """Incarnation of the node."""
    key: int
    """The member's row of the journal."""
    num_samples: float
    started: float
    """Monotonic seconds at which it was placed."""
    update: str = ""
    """What all parts of an update have in common."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One client's update on its way: what of it is being uploaded, and what is pending."""

    round: int
    touched: float
    """Monotonic seconds at which something was last heard of it."""
    uploading: set[int] = field(default_factory=set)
    """Indices of shards."""
    parts: dict[int, Part] = field(default_factory=dict)
    """By index of the shard."""

    @property
    def expiry(self) -> float:
        """When nobody waits for the missing parts any longer."""
        return self.touched + (PART_SECONDS if self.uploading else _ALONE_SECONDS)


class ShardedJob:
    """The shards of one job, and what is between them. Lives in memory: the journal has the shards."""

    def __init__(self, spec: JobSpec, shards: Sequence[ClusterJob]) -> None:
        """`spec` is the job's as it was asked for; `shards` are in order."""
        self.spec = spec
        self.shards = tuple(shards)
        self.barred: set[str] = set()
        """Clients whose updates of the present round were not finite."""
        self._barred_round = 0
        self._indices = {job.name: index for index, job in enumerate(self.shards)}
        self._tickets: dict[str, Ticket] = {}
        self._over: dict[tuple[str, int], tuple[str, str]] = {}
        """Member and update of each part, by client and shard, that waits in vain: asking again it is told so."""
        self._counted: dict[str, str] = {}
        """By client, what the parts have in common of the update that counts in the round in progress."""
        self._counted_round = 0
        self._slots: dict[tuple[int, str], int] = {}
        """Update slots that each gateway of a node has for a shard, by shard and incarnation."""

    @property
    def name(self) -> str:
        """The job's name."""
        return self.spec.name

    def index_of(self, job: ClusterJob) -> int:
        """Which of the shards a job is."""
        return self._indices[job.name]

    # --- the shards together ---------------------------------------------------------------------------------

    @property
    def nonce(self) -> int:
        """Another number whenever any shard has another nonce."""
        text = ",".join(str(job.nonce) for job in self.shards).encode()
        return int.from_bytes(hashlib.blake2s(text, digest_size=8).digest(), "big") >> (64 - NONCE_BITS)

    @property
    def status(self) -> Status:
        """The worst of the shards' status: the job is as far as the shard that is behind."""
        found = {job.status for job in self.shards}
        order: tuple[Status, ...] = ("failed", "deleted", "waiting-for-model", "running", "complete")
        return next(status for status in order if status in found)

    @property
    def detail(self) -> str:
        """Why it failed."""
        return next((job.detail for job in self.shards if job.detail), "")

    @property
    def model_round(self) -> int:
        """The round that the newest model starts of which all shards are public."""
        return min(job.model_round for job in self.shards)

    @property
    def stored_round(self) -> int:
        """The newest round whose starting model is stored in all shards."""
        return min(job.checkpointed_round for job in self.shards)

    def has_stored(self, number: int) -> bool:
        """Whether the model that starts a round is stored in all shards, and public."""
        return 0 < number <= self.model_round and all(number in job.checkpoints for job in self.shards)

    def is_open(self, number: int) -> bool:
        """Whether this round takes updates in all shards."""
        rounds = [job.round for job in self.shards]
        return all(
            round_ is not None and round_.number == number and round_.phase == "open" and not round_.is_complete
            for round_ in rounds
        )

    @property
    def behind(self) -> ClusterJob:
        """The shard whose round is the smallest: what is said of the job's open round is said of this one."""
        running = [job for job in self.shards if job.round is not None]
        return min(running, key=_round_number) if running else self.shards[0]

    # --- homes -----------------------------------------------------------------------------------------------

    def homes(self) -> Counter[str]:
        """How many shards each node is the home of, by incarnation."""
        return Counter(job.home_node for job in self.shards if job.home_node)

    def assign_homes(self, shards_on: Counter[str]) -> None:
        """Give each shard a home that can take updates, the one it has if possible.

        A node keeps a shard while it has updates of the open round. `shards_on` counts the shards of all jobs on
        each node; it is kept up to date.
        """
        for job in self.shards:
            if job.status != "running" or _keeps_home(job):
                continue
            shards_on[job.home_node] -= 1
            self._move(job, _roomiest(job, shards_on), shards_on)

    def balance(self, shards_on: Counter[str]) -> None:
        """Move shards to nodes that have joined since, where it makes a difference.

        Only while nothing of the round is there or on its way. `shards_on` is as for `assign_homes`.
        """
        number = self.behind.round.number if self.behind.round is not None else 0
        if self._tickets or not self.is_open(number) or any(job.round and job.round.shares for job in self.shards):
            return
        for job in self.shards:
            home = job.members.find(job.home_node)
            other = _roomiest(job, shards_on)
            if home is None or other is None or other is home:
                continue
            present = shards_on[home.incarnation] / _memory(home)
            if (shards_on[other.incarnation] + 1) / _memory(other) * _MARGIN < present:
                shards_on[home.incarnation] -= 1
                self._move(job, other, shards_on)

    def _move(self, job: ClusterJob, member: Member | None, shards_on: Counter[str]) -> None:
        """Give a shard another home. What is pending on the former one has to be sent there."""
        former = job.home_node
        job.home_node = member.incarnation if member is not None else ""
        shards_on[job.home_node] += 1
        self.forget_parts([job], former)
        if former and job.members.is_member(former):
            job.tell(former)
        if job.round is not None:
            job.plan()

    def note_slots(self, job: ClusterJob, incarnation: str, slots: int) -> None:
        """A node has told how many updates each of its gateways can hold of a shard."""
        self._slots[self.index_of(job), incarnation] = slots

    @property
    def most_clients(self) -> int:
        """Clients that may send parts at the same time: all of them shall find slots at every home."""
        slots = [self._slots.get((index, job.home_node), 0) for index, job in enumerate(self.shards)]
        return max(1, min(slots))

    # --- tickets and pending parts -----------------------------------------------------------------------------

    def require_welcome(self, client: str, number: int) -> None:
        """Raise Refused 422 for a client whose update of this round was not finite."""
        if number == self._barred_round and client in self.barred:
            raise Refused(422, "not finite", f"the update of {client!r} in round {number} is not finite")

    def admit(self, job: ClusterJob, client: str, number: int, now: float) -> None:
        """A part of a client's update is about to be uploaded. Raises Busy while as many others are."""
        self.require_welcome(client, number)
        ticket = self._tickets.get(client)
        if ticket is None or ticket.round != number:
            others = sum(other.round == number for other in self._tickets.values())
            if others >= self.most_clients:
                raise Busy("others first", "as many clients send updates as there is room for", retry_after=0.3)
            ticket = self._tickets[client] = Ticket(number, now)
        ticket.touched = now
        ticket.uploading.add(self.index_of(job))

    def end_upload(self, job: ClusterJob, client: str) -> None:
        """A part that was admitted will not come, at least not from this upload."""
        ticket = self._tickets.get(client)
        if ticket is None:
            return
        ticket.uploading.discard(self.index_of(job))
        if not ticket.uploading and not ticket.parts:
            del self._tickets[client]

    def hold(self, job: ClusterJob, client: str, number: int, part: Part, now: float) -> dict[int, Part] | None:
        """Keep a part that is complete; returns all of the client's when none is missing.

        Raises Busy for one that waited too long, Refused 422 when the parts do not belong together.
        """
        index = self.index_of(job)
        if self._over.get((client, index)) == (part.member, part.update):
            del self._over[client, index]
            raise Busy("parts missing", "the other parts of this update did not come; send the update again")
        ticket = self._tickets.get(client)
        if ticket is None or ticket.round != number:
            ticket = self._tickets[client] = Ticket(number, now)
        ticket.uploading.discard(index)
        self._displace(client, ticket, index, part.update)
        if any(other.num_samples != part.num_samples for i, other in ticket.parts.items() if i != index):
            raise Refused(422, "another weight", "all parts of an update have the same num_samples")
        if index not in ticket.parts:  # a node that only asks again does not make the others wait for longer
            ticket.touched = now
        ticket.parts[index] = part
        return dict(ticket.parts) if len(ticket.parts) == len(self.shards) else None

    def _displace(self, client: str, ticket: Ticket, index: int, update: str) -> None:
        """Give up parts of another update that the client has begun to send before."""
        for other, part in list(ticket.parts.items()):
            if other != index and part.update != update:
                del ticket.parts[other]
                self._give_up(client, other, part)

    def _give_up(self, client: str, index: int, part: Part) -> None:
        self._over[client, index] = part.member, part.update
        self.shards[index].tell(part.member)

    def settled(self, client: str, number: int, update: str) -> None:
        """The client's update counts: others may have the ticket."""
        self._tickets.pop(client, None)
        if self._counted_round != number:
            self._counted_round = number
            self._counted.clear()
        self._counted[client] = update

    def is_of_another(self, client: str, number: int, update: str) -> bool:
        """Whether a part belongs to another update than that which counts, as far as is known."""
        return self._counted_round == number and self._counted.get(client, update) != update

    def forget_parts(self, shards: Iterable[ClusterJob], incarnation: str) -> None:
        """What is pending on a node is void. The other parts go on waiting, for the client sends it again."""
        for job in shards:
            index = self.index_of(job)
            for ticket in self._tickets.values():
                part = ticket.parts.get(index)
                if part is not None and part.member == incarnation:
                    del ticket.parts[index]

    def end_tickets(self) -> None:
        """The round closes or begins anew: nothing that was on its way counts in it any more."""
        self._tickets.clear()
        self._over.clear()

    def next_expiry(self) -> float | None:
        """When a client will have been waited for in vain."""
        return min((ticket.expiry for ticket in self._tickets.values()), default=None)

    def expire(self, now: float) -> None:
        """Give up waiting for the missing parts of updates."""
        for client, ticket in list(self._tickets.items()):
            if ticket.expiry > now:
                continue
            del self._tickets[client]
            for index, part in ticket.parts.items():
                self._give_up(client, index, part)

    # --- beginning anew --------------------------------------------------------------------------------------

    def is_hurt(self, shards: Iterable[ClusterJob], incarnation: str) -> bool:
        """Whether something that counts is lost when a node has nothing more of these shards."""
        for job in shards:
            round_ = job.round
            if round_ is not None and not round_.is_complete and incarnation in round_.shares:
                return True
            if job.is_lost() and job.status in ("running", "complete"):
                return True
        return False

    @property
    def forgiven(self) -> int:
        """Updates that the round in progress has rejected and nobody waits to have replaced."""
        rounds = [job.round for job in self.shards if job.round is not None]
        return max((round_.forgiven for round_ in rounds if round_.number == self.stored_round), default=0)

    def begin_anew(self, now: float, forgiven: int) -> Iterator[tuple[ClusterJob, list[int]]]:
        """Open the round once more that all shards have the starting model of, without any of its updates.

        Yields each shard with the rounds whose checkpoints it had beyond that.
        """
        number = self.stored_round
        had = [job.round for job in self.shards if job.round is not None and job.round.number == number]
        lost = max((round_.lost + round_.accepted for round_ in had), default=0)
        self.end_tickets()
        self._counted.clear()
        for job in self.shards:
            beyond = job.roll_back(now, number)
            assert job.round is not None
            job.round.lost, job.round.forgiven = lost, forgiven
            yield job, beyond
        self._show_barred(number)

    def bar(self, client: str) -> None:
        """A client's update of the round in progress is not finite: it takes no more part in the round."""
        self._keep_barred(self.stored_round)
        self.barred.add(client)

    def restore_barred(self, clients: Iterable[str]) -> None:
        """After a restart: whose updates of the round in progress were not finite."""
        number = self.stored_round
        self._keep_barred(number)
        self.barred.update(clients)
        self._show_barred(number)

    def _keep_barred(self, number: int) -> None:
        if self._barred_round != number:
            self._barred_round = number
            self.barred.clear()

    def _show_barred(self, number: int) -> None:
        if self._barred_round != number:
            return
        for job in self.shards:
            if job.round is not None and job.round.number == number:
                job.round.rejected = len(self.barred)
                job.round.rejected_clients = sorted(self.barred)

    # --- what others see -------------------------------------------------------------------------------------

    def state(self, data_plane: str, workers: int) -> JobState:
        """The job as the API shows it: as far as the shard that is behind."""
        status = self.status
        states = [job.state(data_plane, workers) for job in self.shards]
        behind = states[self.index_of(self.behind)]
        lasts = [state.last for state in states if state.last is not None]
        return JobState(
            job=self.name,
            status=status,
            round=behind.round if status == "running" else 0,
            model_round=self.model_round,
            spec=self.spec,
            data_plane=data_plane,
            nonce=self.nonce,
            current=self._together(behind.current) if status == "running" else None,
            last=self._together(min(lasts, key=lambda last: last.round)) if len(lasts) == len(states) else None,
            checkpointed_round=self.stored_round,
            workers=workers,
            detail=self.detail,
        )

    def _together(self, state: RoundState | None) -> RoundState | None:
        """One shard's state of a round with what of it is the sum or the most over all shards."""
        if state is None:
            return None
        found = [_round_of(job, state.round) for job in self.shards]
        return combine_rounds([part for part in found if part is not None])


def combine_rounds(states: Sequence[RoundState]) -> RoundState:
    """The same round of several shards as one: its updates are those of each, its work is that of all."""
    phases = [state.status for state in states]
    most = max(states, key=lambda state: state.act)
    tops = dict.fromkeys(state.top for state in states if state.top)
    return msgspec.structs.replace(
        most,
        status="complete" if set(phases) == {"complete"} else "open" if set(phases) == {"open"} else "closing",
        act=most.act if set(phases) == {"complete"} else 0.0,
        folded=min(state.folded for state in states),
        leaves=sum(state.leaves for state in states),
        started=sum(state.started for state in states),
        cold=sum(state.cold for state in states),
        reused=sum(state.reused for state in states),
        internode_bytes=sum(state.internode_bytes for state in states),
        nodes=len(tops) or most.nodes,
        top=",".join(tops),
        latency_median=max(state.latency_median for state in states),
        latency_p95=max(state.latency_p95 for state in states),
        latency_max=max(state.latency_max for state in states),
    )


def _round_of(job: ClusterJob, number: int) -> RoundState | None:
    if job.round is not None and job.round.number == number:
        return job.round.state(job.name_of)
    return next((complete.described() for complete in job.recent if complete.number == number), None)


def _round_number(job: ClusterJob) -> int:
    return job.round.number if job.round is not None else job.model_round


def _keeps_home(job: ClusterJob) -> bool:
    member = job.members.find(job.home_node)
    if member is None or not job.takes_part(member):
        return False
    return job.may_place(member) or (job.round is not None and member.incarnation in job.round.shares)


def _roomiest(job: ClusterJob, shards_on: Mapping[str, int]) -> Member | None:
    """The node with the most memory for one shard more, then with the fewest, then the first that joined."""

    def share(member: Member) -> tuple[float, int, int]:
        shards = shards_on[member.incarnation]
        return (shards + 1) / _memory(member), shards, member.key

    return min((member for member in job.members.living if job.may_place(member)), key=share, default=None)


def _memory(member: Member) -> int:
    return max(1, member.registration.memory)

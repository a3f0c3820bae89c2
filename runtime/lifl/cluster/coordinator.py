"""The coordinator of a cluster, without any input or output: messages and the time go in, answers come out.

    members            who is a node of the cluster, and until when
    cluster_jobs       what becomes of jobs (of `cluster_job`, `cluster_round`, `placements`)
    sharded_jobs       what becomes of those whose model is cut into shards (of `sharded_job`)
    member_requests    answers to the nodes' messages
    function_needs     on how many nodes each function is needed, for who scales its pods
    order_news         versions of orders, and whom to wake
    journal            what a restart needs

Nothing here waits, locks or knows HTTP; `lifl.cluster.service` does that. After each call the journal's buffer has
what changed, and an answer may leave when that is committed.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from lifl.cluster.cluster_job import ClusterJob
from lifl.cluster.cluster_jobs import ClusterJobs
from lifl.cluster.journal import Journal
from lifl.cluster.member_requests import MemberRequests
from lifl.cluster.members import Ending, Member, Members
from lifl.cluster.messages import (
    JobOrder,
    Leave,
    MemberAnswer,
    MemberMessages,
    Orders,
    OrdersRequest,
    Placed,
    Register,
    Registered,
)
from lifl.cluster.order_news import OrderNews
from lifl.cluster.sharded_job import ShardedJob
from lifl.errors import Refused
from lifl.messages import JobSpec, JobState

LEASE_SECONDS: Final = 10.0
_HEARTBEATS_IN_LEASE: Final = 3


class CheckpointTask(NamedTuple):
    """A model that is to be fetched and stored."""

    job: str
    nonce: int
    round: int
    """The round that it starts."""
    has_state: bool
    """The server optimiser's arrays are wanted too."""
    sources: tuple[str, ...]
    """Peer addresses that have it."""


class ClusterCoordinator:
    """Everything that the coordinator knows, and what it makes of messages."""

    def __init__(
        self, journal: Journal, now: float, *, own_address: str = "", lease_seconds: float = LEASE_SECONDS
    ) -> None:
        """Reads the journal. `own_address` is the peer address at which stored models can be had.

        Every member gets a full lease from `now` on.
        """
        self.boot = secrets.token_hex(8)
        self.journal = journal
        self.own_address = own_address
        self.members = Members(journal, lease_seconds)
        self.news = OrderNews(journal.starts)
        self.jobs = ClusterJobs(journal, self.members, self.news)
        self.requests = MemberRequests(self.jobs)
        self.members.restore(now)
        self.jobs.restore(now)

    @property
    def heartbeat_seconds(self) -> float:
        """Longest time between two requests of a node, and longest wait for an order."""
        return self.members.lease_seconds / _HEARTBEATS_IN_LEASE

    # --- joining and leaving ---------------------------------------------------------------------------------

    def register(self, request: Register, now: float) -> Registered:
        """Make a node a member; raises Expired for an incarnation that was one, Refused 422 for nonsense."""
        if not request.name or not request.incarnation or "/" in request.name:
            raise Refused(422, "invalid node", "a node has a name without '/', and an incarnation")
        former = self._current(request.name)
        if former is not None and former.incarnation != request.incarnation and self._is_new(request):
            self._end(former, "replaced", now)
        member = self.members.join(request, now)
        if member is not None:
            self.jobs.joined(member)
        return Registered(self.boot, self.members.lease_seconds, self.heartbeat_seconds)

    def _current(self, name: str) -> Member | None:
        try:
            member = self.members.node(name)
        except Refused:
            return None
        return member if member.is_member else None

    def _is_new(self, request: Register) -> bool:
        return self.members.find(request.incarnation) is None

    def leave(self, name: str, request: Leave, now: float) -> None:
        """A node ends; leaving once more is no error."""
        member = self.members.find(request.incarnation)
        if member is not None and member.name == name and member.is_member:
            self._end(member, "left", now)

    def _end(self, member: Member, how: Ending, now: float) -> None:
        self.members.end(member, how)
        self.jobs.lost(member, now)
        self.news.wake(member.incarnation)  # its own request may be waiting: it shall hear that it is over

    # --- messages and orders ---------------------------------------------------------------------------------

    def answer(self, name: str, request: MemberMessages, arrived: float, now: float) -> list[MemberAnswer]:
        """Act on a member's messages in order. `arrived` is when the request came, for the lease.

        Raises Expired for one that is no member (any more), Refused 409 for a request that was overtaken.
        """
        member = self.members.require(name, request.incarnation, arrived)
        if request.sequence and request.sequence == member.sequence:
            return member.answers
        if request.sequence and request.sequence < member.sequence:
            raise Refused(
                409, "too late", f"request {member.sequence} of {name} was answered before this one came"
            )
        answers = [self.requests.answer(member, message, now) for message in request.messages]
        if request.sequence:
            member.sequence, member.answers = request.sequence, answers
        return answers

    def note_request(self, name: str, request: OrdersRequest, arrived: float, now: float) -> Member:
        """Take in what a member says when it asks for orders; raises Expired for one that is no member."""
        member = self.members.require(name, request.incarnation, arrived)
        self.members.set_capacity(member, request.capacity)
        if request.load != member.load or request.capacity:
            member.load = request.load
            self.jobs.placements.note_residual(member)
        for job_name, version in request.seen.items():
            if version != member.seen.get(job_name):
                self._note_seen(member, job_name, version, now)
        member.seen = dict(request.seen)
        return member

    def _note_seen(self, member: Member, job_name: str, version: int, now: float) -> None:
        job = self.jobs.by_name.get(job_name)
        if job is not None:
            self.jobs.note_seen(member, job, version, now)
        deleted = self.jobs.deleted.get(job_name)
        if deleted is not None and version >= deleted.version:
            member.farewells[job_name] = version
            self.jobs.note_aware(deleted, member.incarnation)

    def orders(self, member: Member) -> Orders | None:
        """What is newer than what the member has carried out; None when there is nothing."""
        jobs = [*self._newer(member), *self._farewells(member)]
        told = self._wishes(member)
        return self._orders(member, jobs) if jobs or told != member.told else None

    def no_orders(self, member: Member) -> Orders:
        """The answer when there was nothing new in the time that the member wanted to wait."""
        return self._orders(member, ())

    def _orders(self, member: Member, jobs: Sequence[JobOrder]) -> Orders:
        is_draining, calibrate = member.told = self._wishes(member)
        return Orders(self.boot, tuple(jobs), is_draining, calibrate)

    def _wishes(self, member: Member) -> tuple[bool, int]:
        wishes = self.members.wishes(member.name)
        return wishes.is_draining, wishes.calibrate

    def _newer(self, member: Member) -> Iterable[JobOrder]:
        for job in (*self.jobs.by_name.values(), *self.jobs.deleted.values()):
            is_addressed = job.status != "deleted" or member.incarnation in job.unaware
            if is_addressed and job.version_for(member.incarnation) > member.seen.get(job.name, 0):
                yield job.order_for(member, self.own_address)

    def _farewells(self, member: Member) -> Iterable[JobOrder]:
        """Orders to end jobs that only the member knows: deleted while it was none."""
        for name, seen in member.seen.items():
            if name in self.jobs.by_name or name in self.jobs.deleted:
                continue
            version = member.farewells.setdefault(name, max(seen, self.news.newest) + 1)
            if seen < version:
                spec = JobSpec(name, "unknown", 1)
                yield JobOrder(job=name, version=version, spec=spec, nonce=0, status="deleted")

    # --- time ------------------------------------------------------------------------------------------------

    def next_timer(self, now: float) -> float | None:
        """When something happens by itself: a lease ends, a deadline passes, or a job becomes idle."""
        times = [when for job in self.jobs.by_name.values() if (when := _deadline(job, now)) is not None]
        expiries = (
            self.members.next_expiry(),
            self.jobs.sharded.next_expiry(),
            self.jobs.next_desertion(),
            self.jobs.next_sleep(now),
        )
        return min([*times, *(expiry for expiry in expiries if expiry is not None)], default=None)

    def tick(self, now: float) -> None:
        """Do what is due."""
        for member in [*self.members.expired(now), *self.jobs.deserted(now)]:
            if member.is_member:
                self._end(member, "lost", now)
        self.jobs.sharded.expire(now)
        self.jobs.put_to_sleep(now)
        for job in list(self.jobs.by_name.values()):
            self.jobs.settle(job, now)

    # --- jobs, as the operator asks -----------------------------------------------------------------------------

    def create_job(self, spec: JobSpec) -> JobState:
        """Make a job; raises Refused 409 or 422."""
        self.jobs.create(spec)
        return self.requests.describe(spec.name)

    def delete_job(self, name: str) -> None:
        """Stop a job; raises Refused 404, or 409 for a shard."""
        self.jobs.remove(name)

    def require_no_model(self, name: str) -> ClusterJob | ShardedJob:
        """A job that waits for its initial model; raises Refused 404 or 409."""
        job = self.jobs.find_any(name)
        if isinstance(job, ClusterJob) and job.is_shard:
            raise Refused(409, "shard of a job", f"{name!r} is a shard: PUT the model of {job.spec.shard_of!r}")
        if job.status != "waiting-for-model":
            raise Refused(
                409, "the job has a model", "a job's initial model is set once; start another job instead"
            )
        return job

    def model_installed(self, name: str, nonce: int, now: float) -> JobState:
        """The initial model, or that of each shard, is on the disk: round 1 opens. Raises Refused 404 or 409."""
        job = self.require_no_model(name)
        if job.nonce != nonce:
            raise Refused(409, "another job", f"job {name!r} is another one now")
        if isinstance(job, ShardedJob):
            self.jobs.sharded.begin(job, now)
        else:
            self.jobs.begin(job, now)
        return self.requests.describe(name)

    def place_update(self, job: str, number: int, client: str, now: float) -> Placed:
        """Choose the node for an update that came to the coordinator itself; raises Refused or Busy."""
        return self.requests.place(None, job, number, client, False, now)

    # --- nodes, as the operator asks ----------------------------------------------------------------------------

    def drain(self, name: str, is_draining: bool) -> None:
        """Give a node no more updates, or give it updates again; raises Refused 404."""
        member = self.members.node(name)
        self.members.wishes(name).is_draining = is_draining
        self.members.save_wishes(name)
        self.jobs.reindex(member)
        self.news.wake(member.incarnation)

    def calibrate(self, name: str) -> None:
        """Have a node measure its capacity; raises Refused 404."""
        member = self.members.node(name)
        self.members.wishes(name).calibrate += 1
        self.members.save_wishes(name)
        self.news.wake(member.incarnation)

    # --- checkpoints -------------------------------------------------------------------------------------------

    def checkpoint_tasks(self) -> list[CheckpointTask]:
        """The models that are to be stored and can be had, the newest one of each job."""
        return [
            CheckpointTask(
                job.name,
                job.nonce,
                job.made_round,
                job.has_state,
                tuple(member.registration.peer_address for member in job.sources()),
            )
            for job in self.jobs.by_name.values()
            if job.needs_checkpoint and job.holders
        ]

    def checkpoint_stored(self, task: CheckpointTask, now: float) -> list[int] | None:
        """A model is on the disk. Returns rounds whose files are not to be kept; None when the model is void."""
        job = self.jobs.by_name.get(task.job)
        if job is None or job.nonce != task.nonce:
            return None
        return self.jobs.stored(job, task.round, now)


def _deadline(job: ClusterJob, now: float) -> float | None:
    """When a round will be closed with fewer updates than its goal; None if that cannot be told yet."""
    round_ = job.round
    if round_ is None or round_.is_complete or round_.phase != "open" or not round_.updates:
        return None
    deadline = round_.deadline()
    if deadline is None:
        return None
    # One that has passed, perhaps while nobody watched, is due as long as the round only waits to be closed. A
    # round that lacks updates even for the quorum is closed by the update that makes it enough.
    return deadline if now < deadline or round_.has_enough(now) else None

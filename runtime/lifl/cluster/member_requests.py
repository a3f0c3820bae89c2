"""Answers to the messages of member nodes: whether an update counts, what became of it, how jobs stand."""

from __future__ import annotations

import logging
import math
from typing import Final

from lifl.cluster.cluster_job import ClusterJob, FunctionKind
from lifl.cluster.cluster_jobs import ClusterJobs
from lifl.cluster.cluster_round import ClusterRound
from lifl.cluster.members import Member
from lifl.cluster.messages import (
    AttachedFunctions,
    Counted,
    CountUpdate,
    EndUpload,
    FunctionFacts,
    JobBroken,
    MemberAnswer,
    MemberMessage,
    ModelHeld,
    ModelMade,
    PartialDelivered,
    Placed,
    PlaceUpdate,
    RejectUpdate,
    RoundReport,
)
from lifl.cluster.sharded_job import Part, ShardedJob, combine_rounds
from lifl.control.selection import places_of
from lifl.errors import Busy, Refused
from lifl.messages import (
    Acknowledged,
    CreateJob,
    DeleteJob,
    DescribeJob,
    DescribeNodes,
    DescribeRound,
    Jobs,
    JobState,
    ListJobs,
    Nodes,
    NodeState,
    Problem,
    RoundState,
    SelectClient,
    Selection,
)
from lifl.staleness import base_of, contributor_of, oldest_base, time_of

log = logging.getLogger("lifl.coordinator")

_PAGE_JOBS: Final = 1000
_WEIGHT_TOLERANCE: Final = 1e-6
_FIRST_PAUSE_SECONDS: Final = 1.0
_LONGEST_PAUSE_SECONDS: Final = 10.0
"""Between questions of a client whose function is on its way: `lifl.Client` goes on for half a minute then."""


class MemberRequests:
    """Answers messages, one at a time."""

    def __init__(self, jobs: ClusterJobs) -> None:
        self._jobs = jobs
        self._members = jobs.members

    def answer(self, member: Member, message: MemberMessage, now: float) -> MemberAnswer:
        """Act on one message of a member and answer it; what cannot be is answered by a `Problem`."""
        try:
            return self._answer(member, message, now)
        except Busy as busy:
            return Problem(busy.status, busy.title, busy.detail, busy.retry_after)
        except Refused as refusal:
            return Problem(refusal.status, refusal.title, refusal.detail)

    def _answer(self, member: Member, message: MemberMessage, now: float) -> MemberAnswer:
        match message:
            case PlaceUpdate():
                return self._place(member, message, now)
            case CountUpdate():
                return self._count(member, message, now)
            case EndUpload():
                return self._end_upload(message)
            case RejectUpdate():
                return self._reject(member, message, now)
            case PartialDelivered():
                return self._delivered(member, message, now)
            case ModelMade():
                return self._made(member, message, now)
            case ModelHeld():
                return self._held(member, message)
            case RoundReport():
                return self._report(member, message)
            case FunctionFacts():
                return self._learn(member, message, now)
            case AttachedFunctions():
                self._jobs.attached(member, frozenset(message.functions), now)
                return Acknowledged()
            case JobBroken():
                return self._broken(member, message, now)
            case CreateJob():
                self._jobs.create(message.spec)
                return self.describe(message.spec.name)
            case DeleteJob():
                self._jobs.remove(message.job)
                return Acknowledged()
            case DescribeJob():
                return self.describe(message.job)
            case DescribeRound():
                return self.describe_round(message.job, message.round)
            case ListJobs():
                return self.list_jobs(message.after)
            case DescribeNodes():
                return self.nodes(now)
            case SelectClient():
                return self.select(message.job, message.round, message.client, now)

    # --- updates -----------------------------------------------------------------------------------------------

    def _open_round(self, name: str) -> tuple[ClusterJob, ClusterRound]:
        job = self._jobs.find(name)
        if job.status == "waiting-for-model":
            raise Refused(
                409, "no model yet", f"job {name!r} has no initial model; PUT /v1/jobs/{name}/model first"
            )
        if job.status != "running" or job.round is None:
            raise Refused(409, f"job is {job.status}", job.detail or f"job {name!r} takes no more updates")
        return job, job.round

    def place(
        self, asking: Member | None, job_name: str, number: int, client: str, here: bool, now: float
    ) -> Placed:
        """Choose the node for an update; `asking` is None when it is no node that asks.

        Raises Refused or Busy when the update cannot be placed at all.
        """
        job, round_ = self._open_round(job_name)
        time = time_of(job.spec, number, round_.number)
        if time != "open":
            round_.late += time == "late"
            return Placed(time, round_.number)
        contributor = contributor_of(job.spec, client, number)
        verdict = round_.judge(contributor)
        if verdict == "duplicate" or verdict == "unselected":
            return Placed(verdict, round_.number)
        if verdict == "late":
            return Placed("late", round_.number + 1)
        self._jobs.wake(job, now)
        if job.kind is None:
            pause = _pause(job, now) if self._members.do_attach else 0.5
            raise Busy(
                "function not loaded yet", f"no node has imported {job.spec.function!r} so far", retry_after=pause
            )
        sharded = self._jobs.sharded.of(job)
        if sharded is not None:
            if not job.home():
                raise Busy("no node", "no node can take updates of this shard now", retry_after=0.5)
            sharded.admit(job, client, number, now)
        if not len(job.index) and any(map(job.may_need, self._members.living)):
            raise _not_there(job, now)
        # One for the next buffer (`closing`) may come already: its node keeps it until that is open.
        chosen = self._jobs.placements.place(job, round_, contributor, asking, here, now)
        if not chosen.has_function(job.spec.function):
            self._jobs.placements.release(round_, contributor)
            raise _not_there(job, now)
        self._jobs.use(job, chosen)
        return Placed("open", round_.number, chosen.name, chosen.registration.address)

    def _place(self, member: Member, message: PlaceUpdate, now: float) -> Placed:
        return self.place(member, message.job, message.round, message.client, message.here, now)

    def _end_upload(self, message: EndUpload) -> Acknowledged:
        job = self._jobs.by_name.get(message.job)
        round_ = job.round if job is not None else None
        if job is not None and round_ is not None and (round_.is_buffer or round_.number == message.round):
            contributor = contributor_of(job.spec, message.client, message.round)
            self._jobs.placements.release(round_, contributor)
            sharded = self._jobs.sharded.of(job)
            if sharded is not None:
                sharded.end_upload(job, message.client)
        return Acknowledged()

    def select(self, job_name: str, number: int, client: str, now: float) -> Selection:
        """Give a client a place in a round; raises Refused."""
        sharded = self._jobs.sharded.by_name.get(job_name)
        if sharded is not None:
            job_name = sharded.behind.name  # no job that is sharded selects its clients
        job, round_ = self._open_round(job_name)
        time = time_of(job.spec, number, round_.number)
        if time == "open" and not round_.is_buffer and round_.phase != "open":
            return Selection("late", round_.number + 1)
        if time != "open":
            return Selection(time, round_.number)
        self._jobs.wake(job, now)
        if not job.spec.over_selection:
            return Selection("everyone", round_.number)
        status = round_.select(client)
        return Selection(status, round_.number, len(round_.selected), places_of(job.spec))

    def _count(self, member: Member, message: CountUpdate, now: float) -> Counted:
        job = self._jobs.find(message.job)
        if not 0 < message.num_samples < math.inf:
            raise Refused(422, "invalid weight", "num_samples is a number above 0")
        if message.nonce != job.nonce and message.attempt == job.attempt:
            raise Refused(409, "another job", f"job {message.job!r} is another one now")
        if self._is_counted_before(job, member, message):
            return Counted("accepted", message.round)
        job, round_ = self._open_round(message.job)
        if message.attempt != job.attempt or message.nonce != job.nonce:
            return Counted("late", round_.number)
        if round_.is_buffer and message.round != round_.number:
            return self._ask_again(job, round_, member)
        if message.round > round_.number:
            return Counted("early", round_.number)
        if message.round < round_.number:
            round_.late += 1
            return Counted("late", round_.number)
        sharded = self._jobs.sharded.of(job)
        if sharded is not None and message.client not in round_.updates:
            return self._count_part(sharded, job, round_, member, message, now)
        if sharded is not None and sharded.is_of_another(message.client, round_.number, message.update):
            return Counted("duplicate", round_.number)
        return self._count_in(job, round_, member, message, now)

    def _count_part(
        self,
        sharded: ShardedJob,
        job: ClusterJob,
        round_: ClusterRound,
        member: Member,
        message: CountUpdate,
        now: float,
    ) -> Counted:
        """Count a part of an update together with the others, or have the node ask again when they are there."""
        placed = self._jobs.placements.release(round_, message.client)
        sharded.require_welcome(message.client, round_.number)
        self._require_able(job, round_, member)
        _require_function(job, member, now)
        if round_.judge(message.client) != "open":
            return Counted("late", round_.number + 1)
        started = placed.since if placed is not None else now
        part = Part(member.incarnation, member.key, message.num_samples, started, message.update)
        parts = sharded.hold(job, message.client, round_.number, part, now)
        if parts is None:
            return Counted("ask-again", round_.number, self._jobs.news.newest + 1)
        if not sharded.is_open(round_.number):
            raise Busy("shards apart", "not all shards have opened this round", retry_after=0.1)
        self._jobs.sharded.count(sharded, message.client, parts, now)
        return Counted("accepted", round_.number)

    @staticmethod
    def _is_counted_before(job: ClusterJob, member: Member, message: CountUpdate) -> bool:
        """Whether this repeats a question about the last complete round that was answered `accepted`."""
        last = job.last
        return (
            last is not None
            and message.nonce == job.nonce
            and (message.round, message.attempt) == (last.number, last.attempt)
            and job.counted_before.get(message.client) == member.incarnation
        )

    def _count_in(
        self, job: ClusterJob, round_: ClusterRound, member: Member, message: CountUpdate, now: float
    ) -> Counted:
        if round_.is_buffer and base_of(message.client) < oldest_base(job.spec, round_.number):
            round_.late += 1
            return Counted("late", round_.number)
        placements = self._jobs.placements
        placed = placements.find(round_, message.client)
        if not round_.is_buffer:
            placements.release(round_, message.client)
        self._require_able(job, round_, member)
        if message.client not in round_.updates:
            _require_function(job, member, now)
        started = placed.since if placed is not None else now
        before = round_.accepted
        verdict = round_.count(member.incarnation, member.key, message.client, message.num_samples, started)
        if verdict == "closing":
            return self._ask_again(job, round_, member)
        placements.release(round_, message.client)
        if verdict == "late":
            return Counted("late", round_.number + 1)
        if verdict == "duplicate" or verdict == "unselected":
            return Counted(verdict, round_.number)
        if round_.accepted > before:
            self._jobs.totals.counted += 1
            self._jobs.wake(job, now)
            self._jobs.use(job, member)
            job.note_residual(member)
            self._jobs.settle(job, now)
            if job.raise_leaves(member):
                job.tell(member.incarnation)
        return Counted("accepted", round_.number)

    @staticmethod
    def _ask_again(job: ClusterJob, round_: ClusterRound, member: Member) -> Counted:
        """The update is for a round that is not open yet, or not known to be so on its node."""
        return Counted("ask-again", round_.number, job.version_for(member.incarnation))

    @staticmethod
    def _require_able(job: ClusterJob, round_: ClusterRound, member: Member) -> None:
        if member.incarnation in job.broken:
            raise Refused(409, "job is broken here", job.broken[member.incarnation])
        home = job.home() if job.gathers or job.is_shard else ""
        if home and home != member.incarnation:
            raise Busy("elsewhere", "the updates of this round are gathered on another node", retry_after=0.1)

    def _reject(self, member: Member, message: RejectUpdate, now: float) -> Acknowledged:
        job = self._jobs.find(message.job)
        round_ = job.round
        if round_ is None or (round_.number, job.attempt) != (message.round, message.attempt):
            return Acknowledged()
        if job.is_shard:
            self._jobs.sharded.reject(job, round_, member, message.client, now)
            return Acknowledged()
        top = round_.top
        if round_.reject(member.incarnation, message.client):
            log.warning("job %s round %d: update of %s is not finite", job.name, round_.number, message.client)
            self._jobs.totals.rejected += 1
            if top and not round_.top:
                job.tell_all()
            elif top:
                job.tell(member.incarnation)
                job.tell(top)
        return Acknowledged()

    # --- closing -----------------------------------------------------------------------------------------------

    def _require_top(
        self, member: Member, job_name: str, number: int, attempt: int, epoch: int
    ) -> tuple[ClusterJob, ClusterRound]:
        job, round_ = self._open_round(job_name)
        if (round_.number, job.attempt, round_.epoch) != (number, attempt, epoch) or round_.is_complete:
            raise Refused(
                409, "another epoch", f"job {job_name!r} is at round {round_.number}, epoch {round_.epoch}"
            )
        if round_.top != member.incarnation:
            raise Refused(409, "not the top", f"{member.name} does not finish round {number} of job {job_name!r}")
        return job, round_

    def _delivered(self, member: Member, message: PartialDelivered, now: float) -> Acknowledged:
        job, round_ = self._require_top(member, message.job, message.round, message.attempt, message.epoch)
        share = round_.shares.get(message.source)
        if share is not None and share.is_called and share.updates != message.updates:
            log.error("job %s round %d: partial aggregate of %d updates, not %d", job.name, round_.number,
                      message.updates, share.updates)  # fmt: skip
            raise Refused(409, "other updates", f"{message.source!r} has {share.updates} updates in the round")
        was_fenced = share is not None and share.fence > 0
        if round_.deliver(message.source) and was_fenced:
            job.tell(member.incarnation)
            self._jobs.settle(job, now)  # with these updates the round may have enough
        return Acknowledged()

    def _made(self, member: Member, message: ModelMade, now: float) -> Acknowledged:
        job = self._jobs.find(message.job)
        is_repeat = job.made_round == message.round + 1 and job.attempt == message.attempt
        if is_repeat and job.maker == member.incarnation:
            return Acknowledged()
        job, round_ = self._require_top(member, message.job, message.round, message.attempt, message.epoch)
        lost = round_.lost
        round_.complete(message.contributors, message.updates, now)
        self._jobs.totals.lost += round_.lost - lost
        is_whole = message.updates == round_.accepted
        if is_whole and not math.isclose(message.weight, round_.weight, rel_tol=_WEIGHT_TOLERANCE):
            log.error("job %s round %d: the model has weight %r, its updates %r", job.name, round_.number,
                      message.weight, round_.weight)  # fmt: skip
        self._jobs.complete(job, round_, now)
        return Acknowledged()

    def _held(self, member: Member, message: ModelHeld) -> Acknowledged:
        job = self._jobs.find(message.job)
        sharded = self._jobs.sharded.of(job)
        if sharded is not None:
            sharded.note_slots(job, member.incarnation, message.slots)
        is_newest = (message.attempt, message.round) == (job.attempt, job.made_round)
        if is_newest and job.add_holder(member.incarnation):
            job.tell_all()
        return Acknowledged()

    def _report(self, member: Member, message: RoundReport) -> Acknowledged:
        job = self._jobs.by_name.get(message.job)
        for complete in job.recent if job is not None else ():
            if (complete.number, complete.attempt) == (message.round, message.attempt):
                complete.add(member.incarnation, message)
                self._jobs.journal.save_report(complete.key, member.key, message)
        return Acknowledged()

    # --- what goes wrong -----------------------------------------------------------------------------------------

    def _learn(self, member: Member, message: FunctionFacts, now: float) -> Acknowledged:
        if not message.failure:
            self._jobs.learn(message.function, FunctionKind(message.gather, message.state_arrays))
            self._jobs.recovered(member, message.function)
            return Acknowledged()
        self._members.set_failure(member, message.function, message.failure)
        for job in list(self._jobs.by_name.values()):
            if job.spec.function == message.function:
                self._jobs.break_on(job, member, message.failure, now)
        return Acknowledged()

    def _broken(self, member: Member, message: JobBroken, now: float) -> Acknowledged:
        job = self._jobs.find(message.job)
        if message.attempt == job.attempt:
            self._jobs.break_on(job, member, message.detail, now)
        return Acknowledged()

    # --- what there is -------------------------------------------------------------------------------------------

    def describe(self, name: str) -> JobState:
        """A job; raises Refused 404."""
        return self._jobs.find_any(name).state(*self._cluster())

    def _cluster(self) -> tuple[str, int]:
        planes = {member.registration.data_plane for member in self._members.living}
        return "+".join(sorted(planes)), sum(member.load.workers for member in self._members.living)

    def list_jobs(self, after: str = "", most: int | None = _PAGE_JOBS) -> Jobs:
        """The jobs whose names come after `after`, in order, at most so many; shards are not among them."""
        shown: dict[str, ClusterJob | ShardedJob] = {
            name: job for name, job in self._jobs.by_name.items() if not job.is_shard
        }
        shown |= self._jobs.sharded.by_name
        names = sorted(name for name in shown if name > after)[:most]
        cluster = self._cluster()
        return Jobs(tuple(shown[name].state(*cluster) for name in names))

    def describe_round(self, name: str, number: int) -> RoundState:
        """A round: the open one, or a complete one from memory or journal. Raises Refused 404."""
        sharded = self._jobs.sharded.by_name.get(name)
        if sharded is not None:
            return combine_rounds([self.describe_round(job.name, number) for job in sharded.shards])
        job = self._jobs.find(name)
        if job.round is not None and job.round.number == number:
            return job.round.state(job.name_of)
        for complete in job.recent:
            if complete.number == number:
                return complete.described()
        found = self._jobs.journal.find_round(job.key, number)
        if found is None or found[1] is None or found[0].status != "complete":
            raise Refused(404, "no such round", f"round {number} of job {name!r} is not known here")
        return found[1]

    def nodes(self, now: float) -> Nodes:
        """All nodes, also those that are lost."""
        updates: dict[str, int] = {}
        for job in self._jobs.by_name.values():
            for share in job.round.shares.values() if job.round is not None and not job.round.is_complete else ():
                updates[share.member] = updates.get(share.member, 0) + share.updates
        known = sorted(self._members.nodes, key=lambda member: member.name)
        return Nodes(tuple(self._node(member, updates.get(member.incarnation, 0), now) for member in known))

    def _node(self, member: Member, updates: int, now: float) -> NodeState:
        registration = member.registration
        status = "ready" if member.is_member else "lost"
        if member.is_member and self._members.is_draining(member):
            status = "draining" if updates or member.placed or self._is_needed(member) else "drained"
        return NodeState(
            name=member.name,
            cores=registration.cores,
            data_plane=registration.data_plane,
            gateways=0,
            workers=member.load.workers,
            pool_bytes=member.load.pool_bytes,
            zygotes=tuple(sorted(member.functions)),
            status=status,  # type: ignore[arg-type]
            address=registration.address,
            capacity=registration.capacity,
            is_calibrated=registration.is_calibrated,
            arrival_rate=member.load.arrival_rate,
            execution_seconds=member.load.execution_seconds,
            residual=member.residual,
            updates=updates,
            last_heard=max(0.0, now - member.last_heard),
        )

    def _is_needed(self, member: Member) -> bool:
        """Whether a model or a round would be lost with the node, though it has no updates of its own."""
        jobs = self._jobs.by_name.values()
        return any(job.needs_checkpoint and list(job.holders) == [member.incarnation] for job in jobs) or any(
            job.round is not None and not job.round.is_complete and job.round.top == member.incarnation
            for job in jobs
        )


def _require_function(job: ClusterJob, member: Member, now: float) -> None:
    """Raise Busy if the function has gone from the node that an update was sent to."""
    if not member.has_function(job.spec.function):
        raise _not_there(job, now)


def _not_there(job: ClusterJob, now: float) -> Busy:
    detail = f"{job.spec.function!r} is on no node that can take this update now; its pods are asked for"
    return Busy("function not here yet", detail, retry_after=_pause(job, now))


def _pause(job: ClusterJob, now: float) -> float:
    """When a client shall ask again: soon at first, and as often as clients usually try while a pod may start."""
    waited = now - job.woken if job.woken is not None else 0.0
    return min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS + waited)

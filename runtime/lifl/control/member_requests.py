"""Answers to what the gateways of a cluster's member ask: the coordinator decides, this node keeps the memory."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from lifl.cluster.messages import (
    Counted,
    CountUpdate,
    EndUpload,
    MemberAnswer,
    MemberMessage,
    PartialDelivered,
    Placed,
    PlaceUpdate,
)
from lifl.control.background import Continuation
from lifl.control.gateway_connections import GatewayConnection, answer_request
from lifl.control.gateway_requests import GatewayRequests
from lifl.control.job import Job
from lifl.control.member import Member
from lifl.control.membership import Membership
from lifl.control.round import Round
from lifl.errors import Busy, LiflError, Refused
from lifl.messages import (
    Abandon,
    Acknowledged,
    AcquireModel,
    Admit,
    Commit,
    CommitPartial,
    CreateJob,
    DeleteJob,
    DescribeJob,
    DescribeNodes,
    DescribeRound,
    DescribeUpdates,
    DescribeUplink,
    InstallModel,
    JobSpec,
    JobState,
    ListJobs,
    Message,
    OfferPartial,
    PartialSent,
    PartialVerdict,
    Problem,
    RoundUpdates,
    SelectClient,
    Slots,
    ToCoordinator,
    Uplink,
    Verdict,
)
from lifl.model_layout import AccumulatorLayout
from lifl.slot import split_slot_reference
from lifl.staleness import contributor_of

_LEFT = Problem(503, "this node has lost its coordinator", "send it again", 0.5)


class MemberRequests(GatewayRequests):
    """Answers requests about the cluster's jobs. Most answers come later, after the coordinator's own."""

    def __init__(self, name: str, member: Member, *parts: Any) -> None:
        """`name` is the node's own; `parts` are those of `GatewayRequests`."""
        super().__init__(*parts)
        self._name = name
        self._member = member

    def answer(self, connection: GatewayConnection, request: ToCoordinator) -> Message | None:
        """As `GatewayRequests.answer`."""
        match request:
            case DescribeUplink():
                return self._describe_uplink(request)
            case PartialSent():
                return Acknowledged()
            case OfferPartial():
                return self._offer_partial(connection, request)
            case CommitPartial():
                return self._commit_partial(request)
            case SelectClient():
                self._ask(connection, request)
                return None
            case _:
                return super().answer(connection, request)

    def _find(self, name: str) -> Job:
        """Gateways ask the coordinator whether there is such a job; this node may hear of it a moment later."""
        if name not in self._context.jobs:
            raise Busy("job not known here yet", f"this node has not heard of job {name!r}", retry_after=0.1)
        return self._context.jobs[name]

    def _describe_updates(self, request: DescribeUpdates) -> RoundUpdates:
        if request.job not in self._context.jobs:
            raise Refused(404, "no such job", f"there is no job {request.job!r} here")
        return super()._describe_updates(request)

    def _membership(self, job: Job) -> Membership:
        assert job.member is not None
        return job.member

    def _ask(self, connection: GatewayConnection, question: MemberMessage) -> None:
        """Have the coordinator answer."""
        self._member.link.send(question, partial(_pass_on, connection))

    # --- updates ---------------------------------------------------------------------------------------------

    def _require_running(self, name: str) -> Job:
        job = self._find(name)
        order = self._membership(job).order
        if job.status == "waiting-for-model" and order.model_round:
            raise Busy("rejoining", "this node joins its cluster anew; try again in a moment", retry_after=0.2)
        if job.status == "waiting-for-model":
            raise Refused(
                409, "no model yet", f"job {name!r} has no initial model; PUT /v1/jobs/{name}/model first"
            )
        if job.status != "running":
            raise Refused(409, f"job is {job.status}", job.detail or f"job {name!r} takes no more updates")
        return job

    def _admit(self, connection: GatewayConnection, request: Admit) -> Message | None:
        job = self._require_running(request.job)
        question = PlaceUpdate(request.job, request.round, request.client, not job.spec.redirect)
        self._member.link.send(question, partial(self._placed, connection, request, job))
        return None

    def _placed(self, connection: GatewayConnection, request: Admit, job: Job, answer: MemberAnswer) -> None:
        if not isinstance(answer, Placed):
            connection.answer(_problem(answer))
        elif answer.status != "open":
            self._count_refused(job, answer)
            connection.answer(Verdict(answer.status, answer.round))
        elif answer.node != self._name:
            connection.answer(Verdict("elsewhere", answer.round, address=answer.address))
        else:
            self._member.prepare(job, partial(self._prepared, connection, request, job))

    @staticmethod
    def _count_refused(job: Job, answer: Placed) -> None:
        if job.round is not None:
            job.round.late += answer.status == "late"
            job.round.duplicates += answer.status == "duplicate"

    def _prepared(self, connection: GatewayConnection, request: Admit, job: Job, problem: Problem | None) -> None:
        if problem is None and job.status != "running":
            problem = Problem(503, "round changed", "ask again", 0.1)
        if problem is not None or connection.has_ended:
            self._member.link.send(EndUpload(request.job, request.round, request.client))
            if problem is not None:
                connection.answer(problem)
            return
        self._idleness.wake(job)
        job.uploads[request.gateway] = job.uploads.get(request.gateway, 0) + 1
        pool = job.pools.updates.pool if job.pools is not None else -1
        connection.answer(Verdict("open", request.round, updates_pool=pool))

    def _end_upload(self, request: Commit | Abandon) -> None:
        super()._end_upload(request)
        if isinstance(request, Abandon):
            self._member.link.send(EndUpload(request.job, request.round, request.client))

    def _commit(self, connection: GatewayConnection, request: Commit) -> Message | None:
        return self._count(connection, request, was_postponed=False)

    def _answer_again(self, connection: GatewayConnection, request: ToCoordinator) -> Message | None:
        assert isinstance(request, Commit)
        return self._count(connection, request, was_postponed=True)

    def _count(self, connection: GatewayConnection, request: Commit, was_postponed: bool) -> Message | None:
        """Have the coordinator count an update, now or when a round is open that it may count in."""
        self._end_upload(request)
        is_part = self._is_shard(request.job)
        if not (is_part and was_postponed):  # a gateway's successor knows of the slots in which parts wait
            self._require_current(request.gateway, request.slot)
        job = self._require_running(request.job)
        member, round_ = self._membership(job), job.round
        is_buffer = job.spec.mode == "async"
        if was_postponed and not self._has_slot(job, request):
            return _LEFT  # the job's memory was given up meanwhile, and the update with it
        if is_buffer and (round_ is None or self._is_closing(request.job)):
            self._require_slot(job, request)
            self._keep(connection, request)
            return None
        if not is_buffer and (round_ is None or request.round > round_.number):
            return Verdict("early", member.order.round)
        assert round_ is not None
        if not is_buffer and request.round < round_.number:
            return Verdict("late", round_.number)
        self._require_slot(job, request)
        member.counting[request.slot] = request.generation
        question = CountUpdate(
            job=job.spec.name,
            nonce=job.nonce,
            round=round_.number,
            attempt=member.order.attempt,
            client=contributor_of(job.spec, request.client, request.round),
            num_samples=request.num_samples,
            update=request.update,
        )
        self._member.link.send(question, partial(self._counted, connection, request, job, round_, was_postponed))
        return None

    def _is_shard(self, name: str) -> bool:
        job = self._context.jobs.get(name)
        return job is not None and job.spec.shard_of != ""

    def _supersede(self, newer: Commit) -> None:
        """A client has sent its part of a shard once more: the coordinator waits for the others of this one."""
        kept: list[tuple[GatewayConnection, Admit | Commit]] = []
        for connection, request in self._postponed.get(newer.job, ()):
            if not isinstance(request, Commit) or (request.client, request.round) != (newer.client, newer.round):
                kept.append((connection, request))
                continue
            self._end_upload(request)
            if connection.has_ended:
                self._context.release(request.slot, request.generation, request.round)
            connection.answer(Problem(503, "sent once more", "this client has sent its update again", 0.2))
        if newer.job in self._postponed:
            self._postponed[newer.job] = kept

    def _require_slot(self, job: Job, request: Commit) -> None:
        """Raise `Refused` 500 unless the request's slot is one of this job's that nothing else is in."""
        is_taken = request.slot in self._membership(job).counting
        is_taken |= job.round is not None and request.slot in job.round.in_slot
        if is_taken or not self._has_slot(job, request):
            raise Refused(500, "not a slot of this job", f"slot {request.slot:#x}")

    @staticmethod
    def _has_slot(job: Job, request: Commit) -> bool:
        pool, _ = split_slot_reference(request.slot)
        return job.pools is not None and pool == job.pools.updates.pool

    def _is_closing(self, name: str) -> bool:
        """Whether updates of an asynchronous job wait here for another order."""
        job = self._context.jobs.get(name)
        if job is None or job.status != "running" or job.pools is None or job.spec.shard_of:
            return False  # they are answered with what stands against them
        member, round_ = self._membership(job), job.round
        return round_ is None or round_.number != member.order.round or not member.may_count

    def _counted(
        self,
        connection: GatewayConnection,
        request: Commit,
        job: Job,
        round_: Round,
        was_postponed: bool,
        answer: MemberAnswer,
    ) -> None:
        member = self._membership(job)
        member.counting.pop(request.slot, None)
        if isinstance(answer, Counted) and answer.status == "ask-again":
            if job.spec.shard_of:
                member.ask_part_after[request.slot] = answer.version
            else:
                member.ask_after = max(member.ask_after, answer.version)
            self._count_later(connection, request, job)
            return
        verdict = self._verdict(request, job, round_, was_postponed, answer)
        if connection.has_ended and not (isinstance(verdict, Verdict) and verdict.status == "accepted"):
            self._context.release(request.slot, request.generation, request.round)
        connection.answer(verdict)
        if job.round is round_:
            self._rounds.close_if_possible(job)

    def _count_later(self, connection: GatewayConnection, request: Commit, job: Job) -> None:
        """Keep an update that cannot be counted before another order comes."""
        if connection.has_ended and not job.spec.shard_of:
            self._context.release(request.slot, request.generation, request.round)
        elif job.pools is None:
            connection.answer(_LEFT)
        else:
            answer_request(self._keep, connection, request)
        if job.round is not None:
            self._rounds.close_if_possible(job)

    def _keep(self, connection: GatewayConnection, request: ToCoordinator) -> None:
        assert isinstance(request, Commit)
        if self._is_shard(request.job):
            self._supersede(request)
        self._postpone(connection, request)
        job = self._find(request.job)
        self._membership(job).has_postponed = True
        self._member.advance(job)

    def _forget_postponed(self, connection: GatewayConnection) -> None:
        """As `GatewayRequests._forget_postponed`, but for parts of updates: they may count by now with the others,
        and are in their slots whoever has put them there."""
        parts = {name: self._postponed.pop(name) for name in list(self._postponed) if self._is_shard(name)}
        super()._forget_postponed(connection)
        self._postponed |= parts

    def answer_postponed(self) -> None:
        """As `GatewayRequests.answer_postponed`."""
        waiting = {name: self._split_off_parts(name) for name in self._postponed}
        for name in self._postponed:
            job = self._context.jobs.get(name)
            if job is not None and job.member is not None and not self._is_closing(name) and not waiting[name]:
                job.member.has_postponed = False
        super().answer_postponed()
        for name, parts in waiting.items():
            if parts:
                self._postponed[name] = [*parts, *self._postponed.get(name, ())]

    def _split_off_parts(self, name: str) -> list[tuple[GatewayConnection, Admit | Commit]]:
        """Take out the parts of updates for a shard that wait for other parts: each for an order of its own."""
        job = self._context.jobs.get(name)
        if job is None or not job.spec.shard_of or job.status != "running" or job.pools is None:
            return []
        member = self._membership(job)
        parts: list[tuple[GatewayConnection, Admit | Commit]] = []
        others: list[tuple[GatewayConnection, Admit | Commit]] = []
        for connection, request in self._postponed[name]:
            waits = isinstance(request, Commit) and member.waits_for_parts(request.slot)
            (parts if waits else others).append((connection, request))
        self._postponed[name] = others
        return parts

    def _verdict(
        self, request: Commit, job: Job, round_: Round, was_postponed: bool, answer: MemberAnswer
    ) -> Message:
        if not isinstance(answer, Counted):
            return _problem(answer)
        if answer.status != "accepted":
            assert answer.status != "ask-again"
            return Verdict(answer.status, answer.round)
        contributor = contributor_of(job.spec, request.client, request.round)
        if job.round is not round_ or contributor in round_.updates:
            return _LEFT
        update = round_.accept(
            contributor,
            request.slot,
            request.generation,
            request.num_samples,
            request.started,
            time.monotonic(),
        )
        job.last_activity = time.monotonic()
        record = job.workers.get(update.aggregator)
        if record is None:
            self._workforce.start_missing(job)
        destination = record.endpoint if record is not None and record.assigned else 0
        # The gateway may have been replaced while the coordinator counted, or have waited long enough: then nobody
        # else sends it.
        is_replaced = self._context.gateways.get(self._context.seat_of(request.slot)) != request.gateway
        if (is_replaced or was_postponed) and destination:
            self._context.send(destination, update.slot, round_.number, update.kind, update.generation)
            destination = 0
        return Verdict("accepted", round_.number, destination)

    def _busy_slots(self, seat: int) -> Slots:
        slots = super()._busy_slots(seat)
        counting = [
            (slot, generation)
            for job in self._context.jobs.values()
            if job.member is not None
            for slot, generation in job.member.counting.items()
            if self._context.seat_of(slot) == seat
        ]
        return Slots((*slots.keys, *counting))

    # --- partial aggregates ----------------------------------------------------------------------------------

    def _describe_uplink(self, request: DescribeUplink) -> Uplink:
        pool, _ = split_slot_reference(request.slot)
        for job in self._context.jobs.values():
            if job.pools is not None and job.pools.aggregates.pool == pool:
                return self._uplink_of(job, request.round)
        return Uplink()

    def _uplink_of(self, job: Job, round_number: int) -> Uplink:
        member, round_ = self._membership(job), job.round
        order = member.order
        is_wanted = member.is_closing and order.role == "middle" and round_ is not None
        if not is_wanted or round_ is None or round_.number & 0xFFFF != round_number or not round_.uplink:
            return Uplink()
        assert job.layout is not None
        return Uplink(
            peer_address=order.top,
            job=job.spec.name,
            nonce=job.nonce,
            round=round_.number,
            attempt=order.attempt,
            epoch=order.epoch,
            source=self._member.link.incarnation,
            nbytes=AccumulatorLayout(job.layout, job.spec.precision).nbytes,
        )

    def _judge_partial(self, request: OfferPartial | CommitPartial) -> tuple[Job, PartialVerdict | None]:
        """The job, and the verdict on a partial aggregate that is not to be taken; None when it is.

        Raises `Busy` when the order that asks for it may still be on the way.
        """
        job = self._find(request.job)
        order = self._membership(job).order
        if job.nonce != request.nonce or (request.attempt, request.round) < (order.attempt, order.round):
            return job, PartialVerdict("refused")
        if (request.attempt, request.round, request.epoch) > (order.attempt, order.round, order.epoch):
            raise Busy("not there yet", "the order for this round has not come", retry_after=0.02)
        if job.round is not None and request.source in job.round.remote:
            return job, PartialVerdict("duplicate")
        if order.role != "top" or request.epoch != order.epoch or request.source not in order.partials:
            return job, PartialVerdict("refused")
        return job, None

    def _offer_partial(self, connection: GatewayConnection, request: OfferPartial) -> Message | None:
        job, verdict = self._judge_partial(request)
        if verdict is not None:
            return verdict
        self._member.prepare(job, partial(self._ready_for_partial, connection, request))
        return None

    def _ready_for_partial(
        self, connection: GatewayConnection, request: OfferPartial, problem: Problem | None
    ) -> None:
        try:
            job, verdict = self._judge_partial(request)
        except Refused as refusal:
            problem = Problem(refusal.status, refusal.title, refusal.detail, getattr(refusal, "retry_after", 0.0))
        if problem is not None:
            connection.answer(problem)
            return
        connection.answer(verdict or self._open_for(job))

    @staticmethod
    def _open_for(job: Job) -> Message:
        if job.pools is None or job.round is None:
            return _LEFT
        return PartialVerdict(
            "open", updates_pool=job.pools.updates.pool, aggregates_nonce=job.pools.aggregates.nonce
        )

    def _commit_partial(self, request: CommitPartial) -> Message:
        self._require_current(request.gateway, request.slot)
        job, verdict = self._judge_partial(request)
        if verdict is not None:
            return verdict
        member, round_ = self._membership(job), job.round
        pool, _ = split_slot_reference(request.slot)
        if job.pools is None or round_ is None or pool != job.pools.updates.pool or request.slot in round_.in_slot:
            raise Refused(500, "not a slot of this job", f"slot {request.slot:#x}")
        taken = round_.accept_partial(request.source, request.slot, request.generation)
        member.received_bytes += request.nbytes
        job.last_activity = time.monotonic()
        delivered = PartialDelivered(
            job=job.spec.name,
            round=round_.number,
            attempt=member.order.attempt,
            epoch=member.order.epoch,
            source=request.source,
            updates=request.updates,
            nbytes=request.nbytes,
        )
        member.undelivered += 1
        self._member.link.send(delivered, partial(self._delivered, job))
        self._workforce.start_missing(job)
        record = job.workers.get(taken.aggregator)
        destination = record.endpoint if record is not None and record.assigned else 0
        return PartialVerdict("accepted", destination)

    def _delivered(self, job: Job, answer: MemberAnswer) -> None:
        self._membership(job).undelivered -= 1
        self._member.note_seen(job.spec.name)

    # --- models ----------------------------------------------------------------------------------------------

    def _acquire_model(self, connection: GatewayConnection, request: AcquireModel) -> Message | None:
        job = self._find(request.job)
        member = self._membership(job)
        wanted = request.round or job.model_round
        if not job.model_round or (job.pools is not None and member.held_round == wanted and not job.installing):
            return super()._acquire_model(connection, request)
        if member.is_offering and job.round is not None and wanted == job.round.number + 1:
            raise Busy("not there yet", "the model was just made here", retry_after=0.02)
        if wanted != member.order.model_round:
            raise Refused(
                404, "no such model", f"this node has no model of round {wanted}; the coordinator may have it"
            )
        self._member.prepare(job, partial(self._lend, connection, request))
        return None

    def _lend(self, connection: GatewayConnection, request: AcquireModel, problem: Problem | None) -> None:
        if connection.has_ended:
            return
        if problem is None:
            try:
                connection.answer(super()._acquire_model(connection, request) or _LEFT)
                return
            except Refused as refusal:
                problem = Problem(refusal.status, refusal.title, refusal.detail)
        connection.answer(problem)

    def _install_model(self, connection: GatewayConnection, request: InstallModel) -> None:
        path = self._upload_of(request)
        self._context.background.put(partial(self._upload, connection, request.job, path))

    def _upload(self, connection: GatewayConnection, job: str, path: Path) -> Continuation:
        """In the background thread: the coordinator keeps the models."""
        problem = None
        try:
            self._member.link.upload_model(job, path)
        except Refused as refusal:
            problem = Problem(refusal.status, refusal.title, refusal.detail)
        except (LiflError, OSError) as error:
            problem = Problem(503, "the coordinator does not take the model", str(error), 1.0)
        finally:
            path.unlink(missing_ok=True)
        if problem is not None:
            return partial(connection.answer, problem)
        return partial(self._ask, connection, DescribeJob(job))

    # --- jobs ------------------------------------------------------------------------------------------------

    def _create_job(self, connection: GatewayConnection, spec: JobSpec) -> Message | None:
        self._check(spec)
        self._ask(connection, CreateJob(spec))
        return None

    def _delete(self, connection: GatewayConnection, name: str) -> Message | None:
        self._ask(connection, DeleteJob(name))
        return None

    def _list_jobs(self, connection: GatewayConnection, after: str) -> Message | None:
        self._ask(connection, ListJobs(after))
        return None

    def _describe_job(self, connection: GatewayConnection, name: str) -> Message | None:
        self._member.link.send(DescribeJob(name), partial(self._complete_state, connection))
        return None

    def _complete_state(self, connection: GatewayConnection, answer: MemberAnswer) -> None:
        """The cluster's state of a job with this node's part of it, which its gateways need."""
        if isinstance(answer, JobState) and answer.spec.shards > 1:
            answer = msgspec.structs.replace(answer, elsewhere=self._member.link.coordinator)
        job = self._context.jobs.get(answer.job) if isinstance(answer, JobState) else None
        if isinstance(answer, JobState) and job is not None:
            own = job.state(self._context.data_plane)
            answer = msgspec.structs.replace(
                answer,
                data_plane=own.data_plane,
                model_header_bytes=own.model_header_bytes,
                model_payload_bytes=own.model_payload_bytes,
                updates_pool=own.updates_pool,
                aggregates_pool=own.aggregates_pool,
                model_layout=own.model_layout,
            )
        _pass_on(connection, answer)

    def _describe_round(self, connection: GatewayConnection, request: DescribeRound) -> Message | None:
        self._ask(connection, request)
        return None

    def _describe_nodes(self, connection: GatewayConnection) -> Message | None:
        self._ask(connection, DescribeNodes())
        return None


def _pass_on(connection: GatewayConnection, answer: MemberAnswer) -> None:
    connection.answer(answer)


def _problem(answer: MemberAnswer) -> Problem:
    return answer if isinstance(answer, Problem) else Problem(500, "internal error", type(answer).__name__)

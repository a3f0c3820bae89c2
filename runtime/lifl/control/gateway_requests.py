"""Answers to what gateways ask: whether an update counts, where a model is, how jobs stand."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from lifl.control.background import Continuation
from lifl.control.context import Context
from lifl.control.gateway_connections import GatewayConnection, answer_request
from lifl.control.idleness import Idleness
from lifl.control.job import MAX_UPDATE_SLOTS, Job, require_streaming
from lifl.control.job_store import JOB_NAME, JobStore
from lifl.control.latencies import BOUNDS, describe_updates
from lifl.control.model_keeper import ModelKeeper
from lifl.control.round import Admission, Round
from lifl.control.rounds import Rounds
from lifl.control.selection import places_of
from lifl.control.workforce import Workforce
from lifl.control_channel import close_fds
from lifl.descriptor import Kind
from lifl.errors import Busy, LiflError, Refused
from lifl.messages import (
    Abandon,
    Acknowledged,
    AcquireModel,
    Admit,
    BusySlots,
    Commit,
    CommitPartial,
    CreateJob,
    DeleteJob,
    DescribeJob,
    DescribeLatencies,
    DescribeNodes,
    DescribeRound,
    DescribeUpdates,
    DescribeUplink,
    Done,
    InstallModel,
    Jobs,
    JobSpec,
    JobState,
    Latencies,
    ListJobs,
    Message,
    Nodes,
    NodeState,
    OfferPartial,
    PartialSent,
    Problem,
    ReturnModel,
    RoundUpdates,
    SelectClient,
    Selection,
    Slots,
    Subscribe,
    ToCoordinator,
    Verdict,
)
from lifl.shards import MOST_SHARDS, shard_name
from lifl.slot import split_slot_reference
from lifl.staleness import contributor_of, time_of

log = logging.getLogger("lifl.coordinator")

_PAGE_BYTES: Final = 128 * 1024
"""Of an answer that comes in parts: a message has to fit a socket's send buffer."""

_MOST_POSTPONED: Final = 1000
"""Requests that wait for the next buffer of one job; each is a client that a gateway keeps waiting."""

_MAX_STALENESS: Final = 10_000
_MOST_REMEMBERED: Final = 5_000_000
"""Updates of one job whose contributors are kept in memory, so that none of them counts twice."""


class GatewayRequests:
    """Answers requests; `hear_news` handles everything that agent and workers have reported so far."""

    def __init__(
        self,
        context: Context,
        workforce: Workforce,
        models: ModelKeeper,
        rounds: Rounds,
        idleness: Idleness,
        hear_news: Callable[[], None],
    ) -> None:
        self._context = context
        self._workforce = workforce
        self._models = models
        self._rounds = rounds
        self._idleness = idleness
        self._hear_news = hear_news
        self._retiring: set[str] = set()
        """Names of deleted jobs whose directories are not put away yet."""
        self._postponed: dict[str, list[tuple[GatewayConnection, Admit | Commit]]] = {}
        """By job, what came while its buffer was being closed, in the order in which it came."""

    def answer(self, connection: GatewayConnection, request: ToCoordinator) -> Message | None:
        """Answer a request; None when the answer comes later. Raises `Refused`."""
        match request:
            case Admit():
                return self._admit(connection, request)
            case Abandon():
                self._end_upload(request)
                return Acknowledged()
            case Commit():
                return self._commit(connection, request)
            case SelectClient():
                return self._select(request)
            case AcquireModel():
                return self._acquire_model(connection, request)
            case ReturnModel():
                return self._return_model(connection, request)
            case BusySlots():
                return self._busy_slots(request.seat)
            case CreateJob():
                return self._create_job(connection, request.spec)
            case InstallModel():
                self._install_model(connection, request)
                return None
            case DescribeJob():
                return self._describe_job(connection, request.job)
            case DescribeRound():
                return self._describe_round(connection, request)
            case DescribeUpdates():
                return self._describe_updates(request)
            case DescribeLatencies():
                return self._describe_latencies()
            case ListJobs():
                return self._list_jobs(connection, request.after)
            case DeleteJob():
                return self._delete(connection, request.job)
            case DescribeNodes():
                return self._describe_nodes(connection)
            case DescribeUplink() | PartialSent() | OfferPartial() | CommitPartial():
                raise Refused(409, "not in a cluster", "this node takes no part in the rounds of other nodes")
            case Subscribe():
                self._subscribe(connection)
                return None

    def connection_ended(self, connection: GatewayConnection) -> None:
        """Take back what was lent over a connection."""
        self._context.subscribers.discard(connection)
        self._forget_postponed(connection)
        for lease, job in connection.leases.items():
            self._models.give_back(job, lease)

    def _find(self, name: str) -> Job:
        job = self._context.jobs.get(name)
        if job is None:
            raise Refused(404, "no such job", f"there is no job {name!r} here; POST /v1/jobs makes one")
        return job

    # --- updates -------------------------------------------------------------------------------------------

    def _find_open_round(self, name: str) -> tuple[Job, Round]:
        job = self._find(name)
        if job.status == "waiting-for-model" and job.model_round:
            raise Refused(503, "job is starting", f"job {name!r} is being restored; try again in a moment")
        if job.status == "waiting-for-model":
            raise Refused(
                409, "no model yet", f"job {name!r} has no initial model; PUT /v1/jobs/{name}/model first"
            )
        if job.status != "running" or job.round is None:
            raise Refused(409, f"job is {job.status}", job.detail or f"job {name!r} takes no more updates")
        return job, job.round

    def _judge(self, job: Job, round_: Round, request: Admit | Commit) -> Admission:
        return round_.judge(request.round, contributor_of(job.spec, request.client, request.round))

    def _turn_away(
        self, connection: GatewayConnection, request: Admit | Commit, round_: Round, admission: Admission
    ) -> Message | None:
        """The answer to an update that is not to be taken now; None when it comes with the next buffer."""
        if admission == "closing":
            self._postpone(connection, request)
            return None
        return Verdict(admission, _next_open(round_) if admission == "late" else round_.number)

    def _admit(self, connection: GatewayConnection, request: Admit) -> Message | None:
        job, round_ = self._find_open_round(request.job)
        admission = self._judge(job, round_, request)
        if admission != "open":
            return self._turn_away(connection, request, round_, admission)
        self._idleness.wake(job)
        job.uploads[request.gateway] = job.uploads.get(request.gateway, 0) + 1
        return Verdict("open", round_.number)

    def _end_upload(self, request: Commit | Abandon) -> None:
        job = self._context.jobs.get(request.job)
        if job is not None and job.uploads.get(request.gateway, 0):
            job.uploads[request.gateway] -= 1

    def _require_current(self, gateway: int, slot: int) -> None:
        """Raise `Busy` unless `gateway` is the endpoint that has the seat of the slot now."""
        seat = self._context.seat_of(slot)
        if self._context.gateways.get(seat) != gateway:
            self._hear_news()
        if self._context.gateways.get(seat) != gateway:
            raise Busy("gateway replaced", "send the update again", retry_after=0.2)

    def _commit(self, connection: GatewayConnection, request: Commit) -> Message | None:
        self._end_upload(request)
        self._require_current(request.gateway, request.slot)
        job, round_ = self._find_open_round(request.job)
        admission = self._judge(job, round_, request)
        if admission != "open":
            return self._turn_away(connection, request, round_, admission)
        pool, _ = split_slot_reference(request.slot)
        if job.pools is None or pool != job.pools.updates.pool or request.slot in round_.in_slot:
            raise Refused(500, "not a slot of this job", f"slot {request.slot:#x}")
        if request.started < job.given_back_at:
            # Its slot may have been emptied under it: only a gateway that lost count of its uploads gets here.
            raise Busy("the job slept meanwhile", "send the update again", retry_after=0.1)
        update = round_.accept(
            contributor_of(job.spec, request.client, request.round),
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
        self._rounds.close_if_possible(job)
        # A worker that is not assigned yet gets the descriptor from us with its assignment.
        destination = record.endpoint if record is not None and record.assigned else 0
        return Verdict("accepted", round_.number, destination)

    def _select(self, request: SelectClient) -> Selection:
        job, round_ = self._find_open_round(request.job)
        time_ = time_of(job.spec, request.round, round_.number)
        if time_ == "open" and not round_.is_buffer and round_.status != "open":
            time_ = "late"
        if time_ != "open":
            return Selection(time_, _next_open(round_) if time_ == "late" else round_.number)
        if not job.spec.over_selection:
            return Selection("everyone", round_.number)
        status = round_.select(request.client)
        return Selection(status, round_.number, len(round_.selected), places_of(job.spec))

    # --- updates that come while a buffer is being closed ----------------------------------------------------

    def _postpone(self, connection: GatewayConnection, request: Admit | Commit) -> None:
        """Answer the request when the next buffer is open. Raises `Busy` when too many wait already."""
        waiting = self._postponed.setdefault(request.job, [])
        if len(waiting) >= _MOST_POSTPONED:
            raise Busy("closing", "the buffer is being closed, and many wait for the next one", retry_after=0.1)
        waiting.append((connection, request))
        if isinstance(request, Commit):  # its upload is not at its end: the slot must stay as it is
            job = self._context.jobs[request.job]
            job.uploads[request.gateway] = job.uploads.get(request.gateway, 0) + 1

    def answer_postponed(self) -> None:
        """Answer what was postponed, where no buffer is being closed any more."""
        for name in [name for name in self._postponed if not self._is_closing(name)]:
            for connection, request in self._postponed.pop(name):
                answer_request(self._answer_again, connection, request)

    def _is_closing(self, name: str) -> bool:
        job = self._context.jobs.get(name)
        return job is not None and job.status == "running" and job.round is not None and job.round.status != "open"

    def _answer_again(self, connection: GatewayConnection, request: ToCoordinator) -> Message | None:
        answer = self.answer(connection, request)
        if not isinstance(request, Commit) or not isinstance(answer, Verdict) or not answer.destination:
            return answer
        # The gateway may have stopped waiting just now, and then nobody else would send the descriptor.
        self._context.send(answer.destination, request.slot, answer.round, Kind.UPDATE, request.generation)
        return msgspec.structs.replace(answer, destination=0)

    def _forget_postponed(self, connection: GatewayConnection) -> None:
        """Nobody waits for these answers any more."""
        for name, waiting in list(self._postponed.items()):
            gone = [request for waiter, request in waiting if waiter is connection]
            self._postponed[name] = [item for item in waiting if item[0] is not connection]
            for request in gone:
                if isinstance(request, Commit):
                    self._end_upload(request)
                    self._context.release(request.slot, request.generation, request.round)

    def _busy_slots(self, seat: int) -> Slots:
        # A RELEASE that found no gateway is made up for by this answer only if all news were heard before.
        self._hear_news()
        # What the gateway was to send and perhaps did not, before it died or lost the answer to its Commit.
        self._workforce.send_again(seat)
        keys = [
            (slot, update.generation)
            for job in self._context.jobs.values()
            if job.round is not None
            for slot, update in job.round.in_slot.items()
            if self._context.seat_of(slot) == seat
        ]
        keys += [
            (request.slot, request.generation)
            for waiting in self._postponed.values()
            for _, request in waiting
            if isinstance(request, Commit) and self._context.seat_of(request.slot) == seat
        ]
        return Slots(tuple(keys))

    # --- models --------------------------------------------------------------------------------------------

    def _install_model(self, connection: GatewayConnection, request: InstallModel) -> None:
        job = self._find(request.job)
        path = self._upload_of(request)
        if job.status != "waiting-for-model" or job.installing:
            path.unlink(missing_ok=True)
            raise Refused(
                409, "the job has a model", "a job's initial model is set once; start another job instead"
            )
        job.store.adopt_model(path, 1)
        self._rounds.start(job, 1, partial(self._installed, connection, job))

    def _upload_of(self, request: InstallModel) -> Path:
        """The file that a gateway has put there. Raises `Refused` 400 for a path that is elsewhere."""
        incoming = (self._context.state_directory / "incoming").resolve()
        path = Path(request.path).resolve()
        if path.parent != incoming:
            raise Refused(400, "not an upload", f"{path.name} is not in the directory of uploads")
        return path

    def _installed(self, connection: GatewayConnection, job: Job, problem: Problem | None) -> None:
        if problem is None:
            job.store.append({"event": "model", "round": 1})
            connection.answer(job.state(self._context.data_plane))
            return
        job.store.checkpoint_path(1).unlink(missing_ok=True)
        job.layout = None
        connection.answer(problem)

    def _acquire_model(self, connection: GatewayConnection, request: AcquireModel) -> Message | None:
        source = self._models.source(self._find(request.job), request.round)
        if source.lease:
            connection.leases[source.lease] = self._find(request.job)
        return source

    def _return_model(self, connection: GatewayConnection, request: ReturnModel) -> Message | None:
        job = connection.leases.pop(request.lease, None)
        if job is not None:
            self._models.give_back(job, request.lease)
        return Acknowledged()

    # --- jobs ----------------------------------------------------------------------------------------------

    def _create_job(self, connection: GatewayConnection, spec: JobSpec) -> Message | None:
        existing = self._context.jobs.get(spec.name)
        if existing is not None:
            if existing.spec == spec:
                return existing.state(self._context.data_plane)
            raise Refused(
                409, "name taken", f"another job is called {spec.name!r}; DELETE it or choose another name"
            )
        if spec.name in self._retiring:
            raise Busy("name taken", f"the former job {spec.name!r} is still being put away", retry_after=0.2)
        self._check(spec)
        store = JobStore.of(self._context.state_directory, spec.name)
        job = Job(spec, store, store)
        job.store.create(spec)
        self._context.jobs[spec.name] = job
        self._workforce.need_function(spec.function)
        self._context.publish(job)
        return job.state(self._context.data_plane)

    def _check(self, spec: JobSpec) -> None:
        """Raise `Refused` 422 for a job that cannot be run here."""
        check_spec(spec)
        if self._context.member is None and spec.shards > 1:
            raise Refused(
                422, "not on a single node", "shards: a model is cut into shards by a cluster's coordinator only"
            )
        functions = self._context.functions
        if functions is not None and spec.function not in functions:
            known = ", ".join(sorted(functions)) or "none"
            raise Refused(
                422, "no such function", f"the project has no function {spec.function!r}; it has: {known}"
            )
        zygote = self._workforce.zygote(spec.function)
        if zygote is not None and zygote.failure:
            raise Refused(422, "the function cannot be used", zygote.failure)
        if zygote is not None and zygote.gather:
            require_streaming(spec)
            if spec.shards > 1:
                raise Refused(422, "not in shards", f"{spec.function!r} compares whole updates with one another")

    def _delete(self, connection: GatewayConnection, name: str) -> Message | None:
        job = self._find(name)
        job.status = "deleted"
        del self._context.jobs[name]
        self._workforce.stop(job)
        if not job.installing:
            self._models.finish_if_complete(job)
        # Whatever of its checkpoints is still to be written goes to the directory under the old name first.
        self._retiring.add(name)
        self._context.background.put(partial(self._retire, job))
        self._context.publish(job)
        return Acknowledged()

    def _retire(self, job: Job) -> Continuation:
        """In the background thread."""
        try:
            job.store.retire()
        except OSError as error:
            log.error("job %s: its directory stays: %s", job.spec.name, error)
        return partial(self._retiring.discard, job.spec.name)

    # --- what there is -------------------------------------------------------------------------------------

    def _describe_job(self, connection: GatewayConnection, name: str) -> Message | None:
        return self._find(name).state(self._context.data_plane)

    def _describe_round(self, connection: GatewayConnection, request: DescribeRound) -> Message | None:
        """From memory; from the journal in the background when it is of an earlier life of the coordinator."""
        job = self._find(request.job)
        if job.round is not None and job.round.number == request.round:
            return job.round.state()
        state = job.history.get(request.round)
        if state is None and 0 < request.round < job.model_round:
            self._context.background.put(partial(_look_up_round, connection, job, request.round))
            return None
        return state or _unknown_round(job, request.round)

    def _describe_updates(self, request: DescribeUpdates) -> RoundUpdates:
        job = self._find(request.job)
        known = job.rounds_with_updates()
        if request.round in known:
            return describe_updates(known[request.round], request.offset)
        newest = job.round.number if job.round is not None else job.model_round - 1
        if not 0 < request.round <= newest:
            raise Refused(404, "no such round", f"round {request.round} of job {request.job!r} is not known here")
        kept = ", ".join(map(str, known)) or "none"
        raise Refused(
            404,
            "updates not kept",
            f"the updates of round {request.round} of job {request.job!r} are not kept one by one any more; "
            f"rounds that have them: {kept}",
        )

    def _list_jobs(self, connection: GatewayConnection, after: str) -> Message | None:
        states: list[JobState] = []
        room = _PAGE_BYTES
        for name in sorted(name for name in self._context.jobs if name > after):
            state = self._context.jobs[name].state(self._context.data_plane)
            room -= len(msgspec.msgpack.encode(state))
            if room < 0 and states:
                break
            states.append(state)
        return Jobs(tuple(states))

    def _describe_latencies(self) -> Latencies:
        running = [job for job in self._context.jobs.values() if job.pools is not None]
        return Latencies(BOUNDS, tuple(job.latencies.state(job.spec.name) for job in running))

    def _subscribe(self, connection: GatewayConnection) -> None:
        self._context.subscribers.add(connection)
        for job in self._context.jobs.values():
            connection.answer(job.state(self._context.data_plane))
        connection.answer(Acknowledged())

    def _describe_nodes(self, connection: GatewayConnection) -> Message | None:
        self._context.agent.get_traffic(partial(self._answer_nodes, connection))
        return None

    def _answer_nodes(self, connection: GatewayConnection, done: Done, fds: list[int]) -> None:
        close_fds(fds)
        context = self._context
        pools = [job.pools for job in context.jobs.values() if job.pools is not None]
        node = NodeState(
            name=socket.gethostname(),
            cores=context.cores,
            data_plane=context.data_plane,
            gateways=len(context.gateways),
            workers=self._workforce.size,
            pool_bytes=sum(pair.updates.geometry.size + pair.aggregates.geometry.size for pair in pools),
            zygotes=self._workforce.functions,
            traffic=done.traffic,
        )
        connection.answer(Nodes((node,)))


def _next_open(round_: Round) -> int:
    """The round that takes updates, or will when this one is closed."""
    return round_.number + (round_.status != "open")


# --- in the background thread ----------------------------------------------------------------------------------


def _look_up_round(connection: GatewayConnection, job: Job, number: int) -> Continuation:
    try:
        state = job.store.find_round(number)
    except (OSError, LiflError):  # deleted meanwhile
        state = None
    return partial(connection.answer, state or _unknown_round(job, number))


def _unknown_round(job: Job, number: int) -> Problem:
    return Problem(404, "no such round", f"round {number} of job {job.spec.name!r} is not known here")


# --- what a job may be -----------------------------------------------------------------------------------------


def check_spec(spec: JobSpec) -> None:
    """Raise `Refused` 422, naming everything that is wrong, for a job that cannot be."""
    problems = []
    if not JOB_NAME.fullmatch(spec.name):
        problems.append(
            "name: lower-case letters, digits, '-' and '.', at most 63, beginning and ending with no mark"
        )
    if not 1 <= spec.goal <= 1_000_000:
        problems.append("goal: from 1 to 1,000,000 updates")
    if not 0 <= spec.quorum <= spec.goal:
        problems.append("quorum: from 0 (the goal) to the goal")
    if spec.quorum and not spec.deadline:
        problems.append("quorum: needs a deadline, after which it suffices")
    if not 0 <= spec.deadline <= 30 * 86_400:
        problems.append("deadline: seconds, from 0 (none) to 30 days")
    if not 0 <= spec.rounds <= 0xFFFF_FFFF:
        problems.append("rounds: 0 (no end) or more")
    if spec.updates_per_leaf < 1:
        problems.append("updates_per_leaf: at least 1")
    if not 0 <= spec.slots <= MAX_UPDATE_SLOTS:
        problems.append(f"slots: from 0 (chosen by the platform) to {MAX_UPDATE_SLOTS:,}")
    if not 0.1 <= spec.idle_seconds <= 86_400:
        problems.append("idle_seconds: from 0.1 to 86,400")
    if spec.keep_checkpoints < 0:
        problems.append("keep_checkpoints: 0 (all) or more")
    if not JOB_NAME.fullmatch(spec.function.replace("_", "-")):
        problems.append("function: the name of a function of the project")
    problems += _wrong_with_participation(spec)
    problems += _wrong_with_shards(spec)
    if problems:
        raise Refused(422, "invalid job", "; ".join(problems))


def _wrong_with_participation(spec: JobSpec) -> list[str]:
    """What is wrong with the fields that say which updates a round takes."""
    problems = []
    if not 0 <= spec.max_staleness <= _MAX_STALENESS:
        problems.append(f"max_staleness: from 0 to {_MAX_STALENESS:,} rounds")
    if not 0 <= spec.staleness_exponent <= 10:
        problems.append("staleness_exponent: from 0 (all count alike) to 10")
    if not 0 <= spec.over_selection <= 10:
        problems.append("over_selection: from 0 (everyone may take part) to 10")
    if spec.mode == "async" and spec.over_selection:
        problems.append("over_selection: for mode sync; in an asynchronous job everyone may take part")
    if spec.mode == "async" and spec.goal * spec.max_staleness > _MOST_REMEMBERED:
        problems.append(
            f"max_staleness: times the goal at most {_MOST_REMEMBERED:,}, for so many updates are remembered"
        )
    return problems


def _wrong_with_shards(spec: JobSpec) -> list[str]:
    """What is wrong with the fields that say how the model is cut."""
    problems = []
    if not 1 <= spec.shards <= MOST_SHARDS:
        problems.append(f"shards: from 1 (not cut) to {MOST_SHARDS}")
    elif spec.shards > 1 and not JOB_NAME.fullmatch(shard_name(spec.name, spec.shards - 1)):
        problems.append("name: too long for the names of its shards, which end with a dot and a number")
    if spec.shards > 1 and (spec.mode == "async" or spec.over_selection):
        problems.append("shards: for mode sync and without over_selection")
    if spec.shard_of or spec.whole is not None:
        problems.append("shard_of, whole: are not for users; create a job with shards")
    return problems

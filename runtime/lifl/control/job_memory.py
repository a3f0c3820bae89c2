"""The memory of a job on its node: making the two pools, loading a model into them, dropping them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from lifl.control.background import Continuation
from lifl.control.context import Context
from lifl.control.job import MODEL_SLOTS, Job, Pools
from lifl.control.workforce import Workforce
from lifl.control_channel import close_fds
from lifl.errors import Busy, InvalidModel, Refused
from lifl.messages import Done, PoolInfo, PoolKind, Problem
from lifl.model_layout import parse_header
from lifl.pool import MappedPool
from lifl.slot import MAX_POOLS

Outcome = Callable[[Problem | None], None]
"""Called at the end of an installation with what went wrong, None when it is done."""


@dataclass
class _Installation:
    """A job that is being given its memory, with the model that starts round `round_number`."""

    job: Job
    round_number: int
    then: Outcome
    pool: int
    """The first of its two pool ids."""
    received: dict[PoolKind, int] = field(default_factory=dict)
    """File descriptors of the pools that are made already."""


class JobMemory:
    """Gives jobs their pools and takes them away."""

    def __init__(self, context: Context, workforce: Workforce) -> None:
        self._context = context
        self._workforce = workforce
        self._next_pool = 0
        self._pools_in_use: set[int] = set()
        """The first of the two pool ids of each job that has memory."""
        self._being_made: dict[str, _Installation] = {}
        """Installations whose pools the agent was asked for, by job."""

    def install(self, job: Job, round_number: int, then: Outcome) -> None:
        """Give the job its pools with the model that starts `round_number`, which is on disk.

        Waits for the job's zygote, which knows what the function needs.
        """
        if job.status == "deleted":
            self._end(job, then, Problem(409, "job is deleted", "it was deleted before its model was in place"))
            return
        job.installing = True
        zygote = self._workforce.zygote(job.spec.function)
        if zygote is None:
            self._workforce.when_ready(job.spec.function, partial(self.install, job, round_number, then))
            return
        if zygote.failure:
            self._end(job, then, Problem(422, "the function cannot be used", zygote.failure))
            return
        job.gather, job.state_arrays = zygote.gather, zygote.state_arrays
        self._context.background_of(job).put(partial(self._read_layout, job, round_number, then))

    def _read_layout(self, job: Job, round_number: int, then: Outcome) -> Continuation:
        """In a background thread: the model may be on another node."""
        problem = None
        try:
            read_layout(job, round_number)
        except Refused as error:
            problem = Problem(error.status, error.title, error.detail)
        except OSError as error:
            problem = Problem(500, "the model cannot be read", str(error))
        return partial(self._layout_read, job, round_number, then, problem)

    def _layout_read(self, job: Job, round_number: int, then: Outcome, problem: Problem | None) -> None:
        if problem is None and job.status == "deleted":
            problem = Problem(409, "job is deleted", "it was deleted before its model was in place")
        if problem is not None:
            self._end(job, then, problem)
            return
        try:
            pool = self._new_pool_ids()
            try:
                updates, aggregates = job.pool_infos(pool, self._context.cores, self._context.gateway_seats)
            except Refused:
                self._pools_in_use.discard(pool)
                raise
        except Refused as error:
            self._end(job, then, Problem(error.status, error.title, error.detail))
            return
        installation = _Installation(job, round_number, then, pool)
        self._being_made[job.spec.name] = installation
        for info in (aggregates, updates):
            made = partial(self._pool_made, installation, updates, aggregates, info)
            self._context.agent.create_pool(info, None, made)

    def _new_pool_ids(self) -> int:
        """The first of two ids that no pool has now; those used last come last, for the sake of stragglers.

        Raises `Refused` 507 when all are in use.
        """
        for step in range(0, MAX_POOLS, 2):
            number = (self._next_pool + step) % MAX_POOLS
            if number not in self._pools_in_use:
                self._next_pool = number + 2
                self._pools_in_use.add(number)
                return number
        raise Refused(507, "too many jobs", f"{MAX_POOLS // 2} jobs have memory on this node; delete some")

    def _pool_made(
        self,
        installation: _Installation,
        updates: PoolInfo,
        aggregates: PoolInfo,
        made: PoolInfo,
        done: Done,
        fds: list[int],
    ) -> None:
        job, received = installation.job, installation.received
        if self._being_made.get(job.spec.name) is not installation:  # the other pool could not be made
            close_fds(fds)
            self._context.agent.drop_pool(made.pool)
            return
        if done.error or not fds:
            close_fds([*fds, *received.values()])
            for info in (updates, aggregates):
                if info.kind in received:
                    self._context.agent.drop_pool(info.pool)
            del self._being_made[job.spec.name]
            self._pools_in_use.discard(installation.pool)
            detail = f"{done.error}; a cluster can cut a large model over its nodes: create the job with shards"
            self._end(job, installation.then, Problem(507, "no memory for the job's pool", detail))
            return
        received[made.kind] = fds[0]
        if len(received) == 2:
            del self._being_made[job.spec.name]
            memory = MappedPool(aggregates, received["aggregates"], writable=True, keep_fd=True)
            job.pools = Pools(updates, aggregates, received["updates"], memory)
            self._context.background_of(job).put(partial(self._fill, installation))

    def _fill(self, installation: _Installation) -> Continuation:
        """In the background thread: load the model, which may be large."""
        problem = None
        try:
            load_model(installation.job, installation.round_number)
        except OSError as error:
            problem = Problem(500, "the model cannot be read", str(error))
        return partial(self._filled, installation, problem)

    def _filled(self, installation: _Installation, problem: Problem | None) -> None:
        job = installation.job
        if job.status == "deleted":
            problem = Problem(409, "job is deleted", "it was deleted before its model was in place")
        if problem is None:
            job.model_round = job.checkpointed_round = installation.round_number
            job.checkpoints = job.store.rounds()
        else:
            self.drop(job)
        self._end(job, installation.then, problem)

    @staticmethod
    def _end(job: Job, then: Outcome, problem: Problem | None) -> None:
        job.installing = False
        then(problem)

    def hand_all_to_agent(self) -> None:
        """A new agent adopts the memory that jobs have, and makes what the old one was about to make."""
        for job in self._context.jobs.values():
            job.memory_is_going = False
            self._hand_to_agent(job)
        interrupted, self._being_made = self._being_made, {}
        for installation in interrupted.values():
            close_fds(list(installation.received.values()))
            self._pools_in_use.discard(installation.pool)
            self.install(installation.job, installation.round_number, installation.then)

    def _hand_to_agent(self, job: Job) -> None:
        if job.pools is not None:
            create = self._context.agent.create_pool
            create(job.pools.updates, job.pools.updates_fd, _close_answer)
            create(job.pools.aggregates, job.pools.memory.fd, _close_answer)

    def give_back(self, job: Job) -> None:
        """Give the pages to the kernel and keep the pools; `bring_back` is needed before the next update."""
        if job.pools is not None:
            job.memory_is_going = True
            reclaim = self._context.agent.reclaim_pool
            reclaim(job.pools.updates.pool, _close_answer)
            reclaim(job.pools.aggregates.pool, partial(self._given_back, job))

    def _given_back(self, job: Job, done: Done, fds: list[int]) -> None:
        close_fds(fds)
        job.memory_is_going = False
        job.memory_given_back = job.pools is not None

    def bring_back(self, job: Job) -> None:
        """Load the newest model again if the pages were given back.

        Raises `Busy` while they are just being given back, `Refused` 500 when the checkpoint cannot be read.
        """
        if job.memory_is_going:
            raise Busy("waking up", "the job was about to go to sleep", retry_after=0.1)
        if job.memory_given_back:
            try:
                load_model(job, job.model_round)
            except OSError as error:
                raise Refused(500, "the model cannot be read", str(error)) from error
            job.memory_given_back = False

    def drop(self, job: Job) -> None:
        """Take the pools away, if the job has them."""
        if job.pools is None:
            return
        self._context.agent.drop_pool(job.pools.updates.pool)
        self._context.agent.drop_pool(job.pools.aggregates.pool)
        self._pools_in_use.discard(job.pools.updates.pool)
        job.pools.close()
        job.pools = None


def _close_answer(done: Done, fds: list[int]) -> None:
    close_fds(fds)  # the memory that the agent adopted is ours already


def read_layout(job: Job, round_number: int) -> None:
    """Learn the job's tensors from a round's model. Raises `Refused` 422 when it is no model, OSError."""
    header, payload = job.models.read_header(round_number)
    try:
        job.layout = parse_header(header, payload)
    except InvalidModel as error:
        raise Refused(422, "not a model", str(error)) from error


def _write_headers(job: Job) -> None:
    """Put the safetensors header into the header room of every model slot."""
    assert job.pools is not None
    assert job.layout is not None
    header = job.layout.header
    for slot in range(MODEL_SLOTS):
        job.pools.memory.layout(slot)[: len(header)] = header


def load_model(job: Job, round_number: int) -> None:
    """Put header, model and optimiser state of a round from the disk into the pool."""
    assert job.pools is not None
    assert job.layout is not None
    _write_headers(job)
    memory = job.pools.memory
    model = memory.payload(job.model_slot(round_number), job.layout.payload_bytes)
    job.models.read_model(round_number, len(job.layout.header), model)
    arrays = [memory.payload(job.state_slot(array, round_number)) for array in range(job.state_arrays)]
    job.models.read_state(round_number, arrays)

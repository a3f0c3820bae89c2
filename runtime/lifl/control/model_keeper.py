"""The global models of jobs: who still reads one from memory (leases), and writing each to the disk.

A model slot is used again after `MODEL_SLOTS` rounds. Whoever reads it holds a lease, and a round whose result
goes to a slot that is lent waits for the lease to end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lifl.control.background import Continuation
from lifl.control.context import Context
from lifl.control.job import Job
from lifl.control.job_memory import JobMemory
from lifl.control.round import Round
from lifl.control.workforce import Workforce
from lifl.errors import Busy, Refused
from lifl.messages import ModelSource
from lifl.model_layout import AccumulatorLayout

log = logging.getLogger("lifl.coordinator")


@dataclass(frozen=True)
class _Checkpoint:
    """A model in memory that is to be written: the result of `round_`, which starts round `following`."""

    job: Job
    round_: Round
    following: int
    lease: int
    """Keeps the model where it is until it is written."""
    state: list[memoryview]
    """The optimiser's arrays."""
    retired: list[int]
    """Rounds whose checkpoints are deleted once this one is there."""
    offer: Callable[[], None]
    """Called once the model is written if the job's durability is `sync`."""


class ModelKeeper:
    """Lends and keeps the models of all jobs."""

    def __init__(self, context: Context, workforce: Workforce, memory: JobMemory) -> None:
        self._context = context
        self._workforce = workforce
        self._memory = memory
        self._lease_numbers = 0

    # --- leases --------------------------------------------------------------------------------------------

    def lend(self, job: Job, round_number: int) -> int:
        """Keep the slot of this round's model as it is until the lease that this returns is given back."""
        self._lease_numbers += 1
        job.leases[self._lease_numbers] = round_number
        return self._lease_numbers

    def give_back(self, job: Job, lease: int) -> None:
        """End a lease; what waited for it goes on."""
        job.leases.pop(lease, None)
        job.file_leases.pop(lease, None)
        if job.round is not None and job.round.status == "closing":
            self._workforce.send_close(job, job.round.top)
        self.finish_if_complete(job)
        if self._context.member is not None and job.member is not None:
            self._context.member.advance(job)

    def finish_if_complete(self, job: Job) -> None:
        """A job that is over keeps no memory once its last model is on disk and read by nobody."""
        is_safe = job.status == "deleted" or job.checkpointed_round == job.model_round
        if job.status in ("complete", "deleted") and is_safe and not job.leases and job.pools is not None:
            self._memory.drop(job)
            self._context.publish(job)

    def source(self, job: Job, round_number: int) -> ModelSource:
        """Where a reader finds the model that starts this round (0: the newest): on disk, or lent in memory.

        Raises `Refused` 404 when it is not kept or not there yet, `Busy` while it is being written.
        """
        if not job.model_round:
            raise Refused(404, "no model yet", f"job {job.spec.name!r} has no initial model")
        number = round_number or job.model_round
        assert job.layout is not None
        header, payload = len(job.layout.header), job.layout.payload_bytes
        if number in job.checkpoints:
            self._lease_numbers += 1
            job.file_leases[self._lease_numbers] = number
            path = str(job.store.checkpoint_path(number))
            return ModelSource(number, path, self._lease_numbers, 0, header, payload)
        if number <= job.checkpointed_round:
            oldest = min(job.checkpoints, default=job.model_round)
            raise Refused(404, "no such model", f"round {number} is not kept; kept from round {oldest}")
        if number < job.model_round:
            raise Busy("not on disk yet", f"the model of round {number} is being written", retry_after=0.2)
        if number != job.model_round:
            raise Refused(404, "no such model", f"round {number} has not begun; the newest is {job.model_round}")
        lease = self.lend(job, number)
        state_slots = tuple(job.state_slot_reference(array, number) for array in range(job.state_arrays))
        sums = AccumulatorLayout(job.layout, job.spec.precision).nbytes
        return ModelSource(
            round=number,
            path="",
            lease=lease,
            slot=job.model_slot_reference(number),
            header_bytes=header,
            payload_bytes=payload,
            state_slots=state_slots,
            state_bytes=sums,
        )

    # --- checkpoints ---------------------------------------------------------------------------------------

    def keep(self, job: Job, round_: Round, offer: Callable[[], None]) -> None:
        """Write the result of a round to the disk, behind what is being written already.

        `offer` makes the model public: before that (durability `async`), or after it (`sync`).
        """
        assert job.pools is not None
        following = round_.number + 1
        lease = self.lend(job, following)
        job.checkpointing.add(following)
        memory = job.pools.memory
        if job.spec.durability == "async":
            offer()
        state = [memory.payload(job.state_slot(array, following)) for array in range(job.state_arrays)]
        checkpoint = _Checkpoint(job, round_, following, lease, state, job.retire_checkpoints(), offer)
        self._context.background.put(partial(self._write, checkpoint))

    def _write(self, checkpoint: _Checkpoint) -> Continuation:
        """In the background thread: the journal, then the files.

        After a restart the journal has to tell whose updates are in the newest model that is found. A line whose
        model never came is followed by another one about the same round, which counts instead.
        """
        job, following = checkpoint.job, checkpoint.following
        assert job.pools is not None
        assert job.layout is not None
        header = job.layout.header
        model = job.pools.memory.payload(job.model_slot(following), job.layout.payload_bytes)
        error = ""
        store = job.store
        try:
            store.append_round(checkpoint.round_)
            if checkpoint.state:
                store.write(store.state_path(following), checkpoint.state)
            parts: list[bytes | memoryview] = [len(header).to_bytes(8, "little"), header, model]
            store.write(store.checkpoint_path(following), parts)
            store.delete_checkpoints(checkpoint.retired)
        except OSError as failure:
            error = f"checkpoint of round {following} not written: {failure}"
        finally:
            model.release()
            for view in checkpoint.state:
                view.release()
        return partial(self._written, checkpoint, error)

    def _written(self, checkpoint: _Checkpoint, error: str) -> None:
        job = checkpoint.job
        job.checkpointing.discard(checkpoint.following)
        if error:
            job.detail = error
            log.error("job %s: %s", job.spec.name, error)
        else:
            job.checkpointed_round = checkpoint.following
            job.checkpoints.append(checkpoint.following)
        if job.spec.durability == "sync" and job.status == "running":
            if error:  # a model that might be forgotten again is not to be seen
                self._workforce.fail(job, error)
            else:
                checkpoint.offer()
        self.give_back(job, checkpoint.lease)

"""The rounds of jobs: opened, closed when they have what they need, complete when the model is there."""

from __future__ import annotations

import logging
import time
from functools import partial

from lifl.control.context import Context
from lifl.control.hierarchy import Hierarchy, plan_hierarchy
from lifl.control.job import Job, WorkerRecord
from lifl.control.job_memory import JobMemory, Outcome
from lifl.control.model_keeper import ModelKeeper
from lifl.control.round import AcceptedUpdate, Round
from lifl.control.workforce import Workforce
from lifl.descriptor import Descriptor, Kind, model_proof
from lifl.messages import Problem
from lifl.slot import split_slot_reference

log = logging.getLogger("lifl.coordinator")


class Rounds:
    """Takes the jobs from one round to the next."""

    def __init__(self, context: Context, workforce: Workforce, memory: JobMemory, models: ModelKeeper) -> None:
        self._context = context
        self._workforce = workforce
        self._memory = memory
        self._models = models

    # --- opening -------------------------------------------------------------------------------------------

    def start(self, job: Job, round_number: int, then: Outcome) -> None:
        """Give a job its memory and open its first round, or the one that a restart finds."""
        self._memory.install(job, round_number, partial(self._installed, job, round_number, then))

    def _installed(self, job: Job, round_number: int, then: Outcome, problem: Problem | None) -> None:
        if problem is None:
            job.status = "running"
            self._open(job, round_number)
            job.last_activity = time.monotonic()
            self._context.publish(job)
        then(problem)

    def _open(self, job: Job, number: int) -> None:
        pending = job.pending_estimate.observe(job.last.accepted if job.last else job.spec.goal)
        plan = plan_hierarchy(pending, job.spec.updates_per_leaf, job.places, gather=job.gather)
        self.open_planned(job, number, plan)

    def open_planned(self, job: Job, number: int, plan: Hierarchy) -> None:
        """Open a round with this tree."""
        job.round = Round(number, job.spec, plan, time.monotonic(), earlier=job.earlier)
        self._workforce.begin_round(job)

    # --- closing -------------------------------------------------------------------------------------------

    def close_if_possible(self, job: Job) -> None:
        """Close the open round if it has its goal, or its quorum after the deadline.

        In a cluster the coordinator decides that.
        """
        assert job.round is not None
        if self._context.member is not None and job.member is not None:
            self._context.member.finish_if_ordered(job)
        elif job.round.try_close(time.monotonic()):
            self._workforce.close_round(job)

    def process_descriptors(self) -> None:
        """Take account of everything that workers have reported."""
        for message in self._context.endpoint.receive():
            job, record = self._workforce.find(message.source) or (None, None)
            if job is None or record is None or job.round is None or job.pools is None:
                continue
            if job.status != "running":
                continue  # deleted or given up: nobody waits for it any more
            if message.round != job.round.number & 0xFFFF:
                continue
            if message.kind == Kind.FOLDED:
                self._on_folded(job, job.round, message)
            elif message.kind == Kind.REJECTED:
                self._on_rejected(job, job.round, message)
            elif message.kind == Kind.MODEL:
                self._on_model(job, job.round, record, message)

    def _on_folded(self, job: Job, round_: Round, message: Descriptor) -> None:
        """An input is part of a sealed accumulator: a partial aggregate, or an update, whose slot is free now."""
        pool, index = split_slot_reference(message.slot)
        if job.pools is not None and pool == job.pools.aggregates.pool:
            place = job.place_of_accumulator(index)
            if 0 <= place < len(round_.aggregators):
                round_.aggregators[place].delivered = True
        else:
            self.account_folded(job, round_, message.slot, message.generation)

    def account_folded(self, job: Job, round_: Round, slot: int, generation: int) -> None:
        """Note that an input is part of the sums for good, and have its slot released."""
        taken = round_.mark_folded(slot, generation, time.monotonic())
        if taken is None:
            return
        if isinstance(taken, AcceptedUpdate):
            job.latencies.observe(taken.latency)
            if taken.counted:
                self._context.execution.observe(taken.folded - taken.counted)
        self._context.release(slot, generation, round_.number)

    def _on_rejected(self, job: Job, round_: Round, message: Descriptor) -> None:
        update = round_.mark_rejected(message.slot, message.generation)
        if update is None:
            return
        log.warning("job %s round %d: update of %s is not finite", job.spec.name, round_.number, update.client)
        self._context.release(message.slot, message.generation, round_.number)
        if self._context.member is not None and job.member is not None:
            self._context.member.update_rejected(job, round_, update.client)
        # After the deadline the quorum may be reached without this update.
        self.close_if_possible(job)
        self._context.publish(job)

    def _on_model(self, job: Job, round_: Round, record: WorkerRecord, message: Descriptor) -> None:
        expected = job.model_slot_reference(round_.number + 1)
        if round_.status != "closing" or record.place != round_.top.index or message.slot != expected:
            return
        contains_all = bool(message.generation & 1)
        if message.generation != model_proof(round_.expected_inputs(round_.top), contains_all=contains_all):
            return  # made of what the round had before it was opened once more
        rest = list(round_.in_slot.values())
        if contains_all:
            if any(item.aggregator != record.place for item in rest):
                return
        elif round_.folded != round_.accepted:
            return
        if self._context.member is not None and job.member is not None:
            self._context.member.model_made(job, round_)
            return
        # Updates that no seal names stay in their slots until there is a model: nothing is lost before.
        for item in rest:
            self.account_folded(job, round_, item.slot, item.generation)
        round_.complete(time.monotonic())
        self._models.keep(job, round_, partial(self._offer, job, round_))

    def _offer(self, job: Job, round_: Round) -> None:
        """Make the model of a complete round public and open the next round, if there is one."""
        following = round_.number + 1
        job.model_round = following
        if job.spec.reuse:
            roles = round_.hierarchy.leaves + 1
            round_.reused = max(0, roles - round_.started)
        job.remember(round_)
        is_last = bool(job.spec.rounds) and round_.number >= job.spec.rounds
        if is_last or not job.spec.reuse:
            # They hold nothing that is still needed: all is folded, and the model is in its slot.
            self._workforce.stop(job)
        if is_last:
            job.status = "complete"
        else:
            self._open(job, following)
        self._context.publish(job)

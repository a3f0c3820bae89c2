"""Scaling to zero: what a job without traffic gives up, and how it gets it back."""

from __future__ import annotations

import time

from lifl.control.context import Context
from lifl.control.job import Job
from lifl.control.job_memory import JobMemory
from lifl.control.workforce import Workforce


class Idleness:
    """Puts jobs to sleep and wakes them up."""

    def __init__(self, context: Context, workforce: Workforce, memory: JobMemory) -> None:
        self._context = context
        self._workforce = workforce
        self._memory = memory

    @staticmethod
    def begins(job: Job) -> float | None:
        """Monotonic time at which the job counts as idle; None while it cannot."""
        return job.last_activity + job.spec.idle_seconds if job.last_activity else None

    def go_idle(self, job: Job) -> None:
        """Keep no worker, and no memory when nothing in it is still needed."""
        round_ = job.round
        assert round_ is not None
        if round_.status != "open":
            return
        if round_.folded != round_.accepted or any(job.uploads.values()) or job.leases:
            job.last_activity = time.monotonic()  # something is going on after all
            return
        job.last_activity = 0.0
        self._workforce.stop(job)
        if self._context.member is not None and job.member is not None:
            if not round_.accepted and not round_.remote:
                self._context.member.sleep(job)
        elif not round_.accepted and job.checkpointed_round == job.model_round:
            job.given_back_at = time.monotonic()
            self._memory.give_back(job)

    def wake(self, job: Job) -> None:
        """Note traffic; bring back what idleness gave away. Raises as `JobMemory.bring_back`."""
        job.last_activity = time.monotonic()
        self._memory.bring_back(job)
        self._workforce.start_missing(job)

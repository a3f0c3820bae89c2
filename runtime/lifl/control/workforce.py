"""The aggregators' workers: started from zygotes, told their round, replaced when they die, stopped."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from lifl.control.context import Context
from lifl.control.job import MODEL_SLOTS, Job, WorkerRecord
from lifl.control.round import Aggregator, Round
from lifl.control.supervisor import tell_supervisor
from lifl.control_channel import close_fds
from lifl.descriptor import Kind
from lifl.messages import Done, Joined, Left, WorkerSpec

MAX_DEATHS: Final = 5
"""Workers that may die in one place of the tree without progress before the job is given up."""

log = logging.getLogger("lifl.coordinator")


@dataclass
class Zygote:
    """A function that is ready to be forked, or that could not be imported."""

    endpoint: int
    failure: str
    """Why the function could not be imported; empty when it could."""
    gather: bool
    state_arrays: int


class Workforce:
    """All zygotes and workers of the node."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._zygotes: dict[str, Zygote] = {}
        """By function, the one that joined last: the agent has that one fork."""
        self._earlier: dict[str, list[Zygote]] = {}
        """Others that are still there: a pod may come before the one whose place it takes has ended."""
        self._asked_for: set[str] = set()
        self._awaiting: dict[str, list[Callable[[], None]]] = {}
        """What waits for the zygote of a function."""
        self._tickets: dict[str, tuple[Job, WorkerRecord]] = {}
        """Workers that were asked for and have not joined yet."""
        self._working: dict[int, tuple[Job, WorkerRecord]] = {}
        """Workers that have joined, by endpoint."""

    @property
    def functions(self) -> tuple[str, ...]:
        """Functions that have a zygote, in order."""
        return tuple(sorted(self._zygotes))

    @property
    def size(self) -> int:
        """Workers that are there now."""
        return len(self._working)

    def find(self, endpoint: int) -> tuple[Job, WorkerRecord] | None:
        """The worker with this endpoint and its job."""
        return self._working.get(endpoint)

    def forget_all(self) -> None:
        """The agent is gone: workers end by themselves, zygotes join the new one."""
        self._zygotes.clear()
        self._earlier.clear()
        self._working.clear()
        self._tickets.clear()
        for job in self._context.jobs.values():
            job.workers.clear()
        if self._context.member is not None:
            self._context.member.functions_changed()

    # --- zygotes -------------------------------------------------------------------------------------------

    def zygote(self, function: str) -> Zygote | None:
        """The zygote of a function, if it is there."""
        return self._zygotes.get(function)

    def zygotes(self) -> list[tuple[str, Zygote]]:
        """All that are there, by function."""
        return list(self._zygotes.items())

    def need_function(self, function: str) -> None:
        """Have the supervisor start the function's zygote, unless it was told before."""
        if function not in self._asked_for:
            self._asked_for.add(function)
            tell_supervisor({"zygote": function})

    def when_ready(self, function: str, then: Callable[[], None]) -> None:
        """Call `then` once, when the function's zygote joins next."""
        self._awaiting.setdefault(function, []).append(then)

    def zygote_joined(self, event: Joined) -> None:
        """Go on with what waited for the function."""
        before = self._zygotes.get(event.function)
        if before is not None:
            self._earlier.setdefault(event.function, []).append(before)
        zygote = Zygote(event.endpoint, event.failure, event.gather, event.state_arrays)
        self._use_zygote(event.function, zygote)

    def _use_zygote(self, function: str, zygote: Zygote) -> None:
        self._zygotes[function] = zygote
        if self._context.member is not None:
            self._context.member.function_ready(function, zygote)
            self._context.member.functions_changed()
        for continuation in self._awaiting.pop(function, []):
            continuation()
        for job in self._context.jobs.values():
            if job.spec.function == function and job.round is not None and job.round.accepted:
                self.start_missing(job)

    def zygote_left(self, event: Left) -> None:
        """Note that nothing can be forked until the supervisor has started the zygote again."""
        zygote = self._zygotes.get(event.function)
        earlier = self._earlier.get(event.function, [])
        earlier[:] = [other for other in earlier if other.endpoint != event.endpoint]
        if zygote is None or zygote.endpoint != event.endpoint:
            return
        del self._zygotes[event.function]
        # Requests that it had not got round to died with it; the next zygote gets new ones.
        waiting = [ticket for ticket, (job, _) in self._tickets.items() if job.spec.function == event.function]
        for ticket in waiting:
            self._cancel(ticket)
        if earlier:
            self._use_zygote(event.function, earlier.pop())
        elif self._context.member is not None:
            self._context.member.functions_changed()

    # --- starting ------------------------------------------------------------------------------------------

    def start_missing(self, job: Job) -> None:
        """Start one worker for each place of the round that has none (paper: exactly as many as planned)."""
        assert job.round is not None
        zygote = self._zygotes.get(job.spec.function)
        if zygote is None or zygote.failure or job.pools is None or job.status != "running":
            return
        specs = tuple(
            self._issue_ticket(job, place.index)
            for place in job.round.aggregators
            if place.index not in job.workers
        )
        if specs:
            job.round.started += len(specs)
            self._context.agent.start_workers(specs, partial(self._start_requested, job, specs))

    def _issue_ticket(self, job: Job, place: int) -> WorkerSpec:
        assert job.round is not None
        record = WorkerRecord(secrets.token_hex(16), place, round_started=job.round.number)
        job.workers[place] = record
        self._tickets[record.ticket] = (job, record)
        return WorkerSpec(
            ticket=record.ticket,
            job=job.spec.name,
            function=job.spec.function,
            accumulator=job.accumulator(place),
            model_slots=MODEL_SLOTS,
            state_slots=job.state_slots,
            timing=job.spec.timing,
            precision=job.spec.precision,
            staleness_exponent=job.spec.staleness_exponent if job.spec.mode == "async" else 0.0,
        )

    def _start_requested(self, job: Job, specs: tuple[WorkerSpec, ...], done: Done, fds: list[int]) -> None:
        close_fds(fds)
        if not done.error:
            return
        # The zygote is gone; the supervisor starts it again and then the places are filled.
        log.warning("workers of job %s not started: %s", job.spec.name, done.error)
        for spec in specs:
            self._cancel(spec.ticket)

    def _cancel(self, ticket: str) -> None:
        """Give up waiting for a worker that will not come."""
        job, record = self._tickets.pop(ticket, (None, None))
        if job is not None and record is not None and job.workers.get(record.place) is record:
            del job.workers[record.place]

    def worker_joined(self, event: Joined) -> None:
        """Give the worker its work; one that nobody waits for any more is sent home."""
        job, record = self._tickets.pop(event.ticket, (None, None))
        if job is None or record is None or job.workers.get(record.place) is not record:
            self._context.agent.stop_workers((event.endpoint,))
            return
        record.endpoint = event.endpoint
        self._working[event.endpoint] = (job, record)
        if job.round is not None and job.round.status != "complete":
            self._assign(job, record)

    # --- the work of a round -------------------------------------------------------------------------------

    def begin_round(self, job: Job) -> None:
        """Assign the workers that are there to the round that has just been opened."""
        assert job.round is not None
        for record in job.workers.values():
            record.assigned = False
        top = job.workers.get(job.round.top.index)
        if top is not None and top.endpoint:
            self._assign(job, top)

    def extend_round(self, job: Job) -> None:
        """Give work to the places that the open round has got beside those that it began with."""
        assert job.round is not None
        if job.round.accepted:
            self.start_missing(job)
        for record in job.workers.values():
            if record.endpoint and not record.assigned:
                self._assign(job, record)

    def _assign(self, job: Job, record: WorkerRecord) -> None:
        """Tell a worker its round and parent, and give it what waits for it.

        A leaf waits for the top, which is its parent: when the top is assigned, so are the leaves.
        """
        round_ = job.round
        assert round_ is not None
        if record.place >= len(round_.aggregators):
            return
        if record.place != round_.top.index:
            top = job.workers.get(round_.top.index)
            if top is None or not top.endpoint:
                return
            route = ((record.endpoint, top.endpoint),)
            self._context.agent.allow(route, partial(self._leaf_routed, job, record, round_, top.endpoint))
            return
        if round_.uplink:
            route = ((record.endpoint, round_.uplink),)
            self._context.agent.allow(route, partial(self._top_routed, job, record, round_, round_.uplink))
        else:
            self._hand_over(job, record, self._context.endpoint.identifier)
        for leaf in job.workers.values():
            if leaf.endpoint and leaf is not record:
                self._assign(job, leaf)

    def _top_routed(
        self, job: Job, record: WorkerRecord, round_: Round, uplink: int, done: Done, fds: list[int]
    ) -> None:
        close_fds(fds)
        is_current = job.workers.get(record.place) is record and round_.uplink == uplink
        if is_current and job.round is round_ and round_.status != "complete":
            self._hand_over(job, record, uplink)

    def _leaf_routed(
        self, job: Job, record: WorkerRecord, round_: Round, parent: int, done: Done, fds: list[int]
    ) -> None:
        close_fds(fds)
        top = job.workers.get(round_.top.index)
        is_current = job.workers.get(record.place) is record and top is not None and top.endpoint == parent
        if is_current and job.round is round_ and round_.status != "complete":
            self._hand_over(job, record, parent)

    def _hand_over(self, job: Job, record: WorkerRecord, parent: int) -> None:
        """Send ASSIGN, every update of the place that is not folded yet, and CLOSE if it is time for it."""
        round_ = job.round
        assert round_ is not None
        record.assigned = True
        unfolded = round_.unfolded_of(record.place)
        if unfolded and record.round_started == round_.number:
            round_.cold += 1
        record.round_started = 0
        send = self._context.send
        send(record.endpoint, parent, round_.number, Kind.ASSIGN, round_.number >> 16)
        for item in unfolded:
            send(record.endpoint, item.slot, round_.number, item.kind, item.generation)
        if round_.status == "closing":
            self.send_close(job, round_.aggregators[record.place])

    def send_again(self, seat: int) -> None:
        """Send every update in a slot of this seat that is not folded yet; workers ignore what they have."""
        for job in self._context.jobs.values():
            round_ = job.round
            if round_ is None or job.status != "running":
                continue
            for item in list(round_.in_slot.values()):
                record = job.workers.get(item.aggregator)
                if record is not None and record.assigned and self._context.seat_of(item.slot) == seat:
                    self._context.send(record.endpoint, item.slot, round_.number, item.kind, item.generation)

    def close_round(self, job: Job) -> None:
        """Have every place finish with the inputs that it has."""
        assert job.round is not None
        self.start_missing(job)
        for place in job.round.aggregators:
            self.send_close(job, place)

    def assign_top(self, job: Job) -> None:
        """Tell the top of the node's tree its parent anew: the coordinator, or the gateway that its sums go to."""
        assert job.round is not None
        record = job.workers.get(job.round.top.index)
        if record is not None and record.endpoint:
            self._assign(job, record)

    def send_close(self, job: Job, place: Aggregator) -> None:
        """Tell the worker of a place how many inputs there are, if it can make use of that now.

        A place without a worker gets it from `_hand_over`.
        """
        round_ = job.round
        assert round_ is not None
        record = job.workers.get(place.index)
        if record is None or not record.assigned or place.delivered:
            return
        if place is round_.top and not round_.uplink and job.is_lent(round_.number + 1):
            return  # somebody still reads what the new model would overwrite; sent when it is given back
        if place is round_.top or place.updates:
            expected = round_.expected_inputs(place)
            partials = min(round_.expected_partials(place), 255)
            self._context.send(record.endpoint, expected, round_.number, Kind.CLOSE, partials)

    # --- ending --------------------------------------------------------------------------------------------

    def worker_left(self, event: Left) -> None:
        """Replace a worker that died before its place had delivered; forget one that was stopped."""
        job, record = self._working.pop(event.endpoint, (None, None))
        if job is None or record is None:
            job, record = self._tickets.pop(event.ticket, (None, None))
        if job is None or record is None or job.workers.get(record.place) is not record:
            return
        del job.workers[record.place]
        round_ = job.round
        if record.stopping or round_ is None or round_.status == "complete" or job.status != "running":
            return
        if record.place < len(round_.aggregators):
            self._replace(job, round_, round_.aggregators[record.place])

    def _replace(self, job: Job, round_: Round, place: Aggregator) -> None:
        place.deaths += 1
        if place.deaths >= MAX_DEATHS:
            self.fail(
                job,
                f"the aggregator died {place.deaths} times in round {round_.number} without progress; "
                "see the log of its zygote",
            )
        elif round_.accepted and not place.delivered:
            log.warning("job %s round %d: aggregator %d died", job.spec.name, round_.number, place.index)
            self.start_missing(job)

    def fail(self, job: Job, detail: str) -> None:
        """Give the job up; `detail` says why."""
        job.status = "failed"
        job.detail = detail
        log.error("job %s failed: %s", job.spec.name, detail)
        self.stop(job)
        self._context.publish(job)

    def stop(self, job: Job) -> None:
        """End all workers of a job, also those that are only on their way."""
        endpoints = []
        for record in job.workers.values():
            record.stopping = True
            if record.endpoint:
                endpoints.append(record.endpoint)
            else:
                self._tickets.pop(record.ticket, None)
        job.workers.clear()
        if endpoints:
            self._context.agent.stop_workers(tuple(endpoints))

"""A node as the member of a cluster: carries out the coordinator's orders for each job.

An order says how things shall be (`lifl.cluster.messages`). What is missing for that is done here, step by step,
whenever something has changed; nothing depends on having seen every order in between:

    memory and model    fetched from another node when the job is first used here, and for each round after that
    the round           opened when its model is here; its updates are counted by the coordinator alone
    the end of a round  sums go to the top's node by the gateway, or, on the top, become the model
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from lifl.cluster.member_link import MemberLink
from lifl.cluster.messages import (
    AttachedFunctions,
    FunctionFacts,
    JobBroken,
    JobOrder,
    MemberAnswer,
    ModelHeld,
    ModelMade,
    Orders,
    RejectUpdate,
    RoundReport,
)
from lifl.control.background import Background, Continuation
from lifl.control.context import Context
from lifl.control.hierarchy import Hierarchy
from lifl.control.job import Job
from lifl.control.job_memory import JobMemory
from lifl.control.job_store import JobStore
from lifl.control.membership import Membership, Prepared
from lifl.control.peer_models import PeerModels
from lifl.control.round import Round
from lifl.control.rounds import Rounds
from lifl.control.workforce import Workforce, Zygote
from lifl.errors import LiflError
from lifl.messages import Acknowledged, Problem
from lifl.model_layout import AccumulatorLayout

_RETRY_SECONDS: Final = 0.1
"""After which a model that nobody gave is asked for again."""

log = logging.getLogger("lifl.coordinator")


class Member:
    """Brings the jobs of this node to where the coordinator wants them. All methods run in the loop's thread."""

    def __init__(
        self,
        context: Context,
        workforce: Workforce,
        memory: JobMemory,
        rounds: Rounds,
        link: MemberLink,
        models: Callable[[Job], PeerModels],
        call_later: Callable[[float, Callable[[], None]], None],
        start_calibration: Callable[[MemberLink], None],
    ) -> None:
        self._context = context
        self._workforce = workforce
        self._memory = memory
        self._rounds = rounds
        self._call_later = call_later
        self._models = models
        self.link = link
        self.pulls = Background()
        """Fetches models; apart from what writes to the disk, for another node may keep it waiting."""
        self.is_draining = False
        self._start_calibration = start_calibration
        self._calibrations: int | None = None
        """How often the operator had asked for that by the last orders."""
        self._boot = ""
        """Life of the coordinator that the last orders came from: another one does not know what room is here."""

    # --- orders ----------------------------------------------------------------------------------------------

    def on_orders(self, orders: Orders) -> None:
        """Note new orders, and do what can be done now. From here on they count as seen.

        An order may leave a node's sums out of the round. That it was seen must not overtake the news that they
        are here already.
        """
        self.is_draining = orders.drain
        is_new_boot, self._boot = orders.boot != self._boot, orders.boot
        self._calibrate_if_asked(orders.calibrate)
        for order in orders.jobs:
            try:
                self._note(order)
            except Exception:  # one job that goes wrong must not cost the node its heartbeat
                log.exception("job %s: an order could not be carried out", order.job)
            if order.status == "deleted":
                self.link.seen[order.job] = order.version
            self.note_seen(order.job)
        if is_new_boot:
            self.functions_changed()
            for job in self._context.jobs.values():
                if job.member is not None:
                    self._tell_held(job)

    def note_seen(self, name: str) -> None:
        """Say with the next heartbeat that a job's order was seen, if it may be said."""
        job = self._context.jobs.get(name)
        if job is not None and job.member is not None and not job.member.undelivered:
            self.link.seen[name] = job.member.order.version

    def _calibrate_if_asked(self, count: int) -> None:
        """Measure this node's capacity once more when the operator has asked for it since the node joined."""
        before, self._calibrations = self._calibrations, count
        if before is not None and count > before:
            self._start_calibration(self.link)

    def _note(self, order: JobOrder) -> None:
        job = self._context.jobs.get(order.job)
        if order.status == "deleted":
            if job is not None:
                self._forget(job)
            return
        if job is not None and job.nonce != order.nonce:
            # Another life of the job: rolled back to an older model, or deleted and made anew under the same name.
            self._drop(job)
            job = None
        if job is None:
            job = self._adopt(order)
        member = job.member
        assert member is not None
        before, member.order = member.order, order
        job.status, job.detail = order.status, order.detail
        job.model_round = max(order.model_round, member.held_round if order.attempt == before.attempt else 0)
        if order.attempt != before.attempt:
            self._begin_again(job)
        self.advance(job)
        job.last = order.last
        self._context.publish(job)

    def _adopt(self, order: JobOrder) -> Job:
        """Make a job of the cluster known here; memory it gets when it is used."""
        store = JobStore.of(self._context.state_directory, order.job)
        job = Job(order.spec, store, store, nonce=order.nonce, member=Membership(order))
        job.models = self._models(job)
        self._context.jobs[order.job] = job
        self._workforce.need_function(order.spec.function)
        return job

    def _forget(self, job: Job) -> None:
        job.status = "deleted"
        del self._context.jobs[job.spec.name]
        self._drop(job)
        self._context.publish(job)

    def _drop(self, job: Job) -> None:
        """Let go of all that the job has here."""
        member = job.member
        assert member is not None
        self._workforce.stop(job)
        job.round = None
        self._memory.drop(job)
        job.leases.clear()
        member.held_round = member.held_state_round = 0
        member.is_offering = False
        member.applied = ()
        member.received_bytes = 0
        waiting, member.waiting = member.waiting, []
        for prepared in waiting:
            prepared(Problem(503, "the round starts again", "send the update again", 0.2))

    def _begin_again(self, job: Job) -> None:
        """The round's model was lost, and what was done on it with it."""
        log.warning("job %s: round %d starts again", job.spec.name, job.member.order.round if job.member else 0)
        self._drop(job)

    def on_lost(self) -> None:
        """The lease is over: whatever this node has of open rounds is void, until new orders come."""
        for job in self._context.jobs.values():
            if job.member is not None:
                self._drop(job)
                job.status = "waiting-for-model"  # with a model: gateways ask clients to come again
                self._context.publish(job)
        for name, zygote in self._workforce.zygotes():
            self.function_ready(name, zygote)
        self.functions_changed()

    # --- functions -------------------------------------------------------------------------------------------

    def function_ready(self, name: str, zygote: Zygote) -> None:
        """Tell the coordinator what a function asks for."""
        self.link.send(FunctionFacts(name, zygote.gather, zygote.state_arrays, zygote.failure))

    def functions_changed(self) -> None:
        """Tell the coordinator which functions are here, if this node has to wait for them to come."""
        if self._context.functions is None:
            self.link.send(AttachedFunctions(self._workforce.functions))

    # --- one step after the other ----------------------------------------------------------------------------

    def advance(self, job: Job) -> None:
        """Do what is next for a job, if it has begun here."""
        member = job.member
        assert member is not None
        order = member.order
        if order.status != "running":
            self._end(job)
            return
        if job.round is not None and job.round.number != order.round:
            if member.is_offering and order.model_round == job.round.number + 1:
                return  # the model is our own; the answer that says so comes next
            self._end_round(job, job.round)
        if job.pools is None or job.installing:
            return
        if member.held_round < order.model_round:
            if member.wants_model:
                self._fetch(job)
            return
        if member.held_round > order.model_round:
            return  # the model is our own, and the order that says so comes next
        if job.round is None:
            self._open(job)
        elif job.round.raise_leaves(self._leaves_of(job)):
            self._workforce.extend_round(job)
        self._tell_prepared(job, None)
        self.finish_if_ordered(job)

    def prepare(self, job: Job, then: Prepared) -> None:
        """Call `then` when the open round can be worked on here: memory, model and round are there."""
        member = job.member
        assert member is not None
        if self._is_ready(job):
            then(None)
            return
        member.waiting.append(then)
        self._prepare(job)

    def _is_ready(self, job: Job) -> bool:
        member = job.member
        assert member is not None
        order = member.order
        is_held = job.pools is not None and not job.installing and member.held_round == order.model_round
        return is_held and (job.round is not None or order.status != "running")

    def _prepare(self, job: Job) -> None:
        member = job.member
        assert member is not None
        order = member.order
        if member.is_fetching or not member.waiting:
            return
        if not order.model_round:
            self._tell_prepared(job, Problem(503, "no model yet", "the job waits for its initial model", 0.2))
        elif job.pools is None:
            member.is_fetching = True
            self._memory.install(job, order.model_round, partial(self._installed, job, order))
        else:
            self.advance(job)

    def _installed(self, job: Job, order: JobOrder, problem: Problem | None) -> None:
        member = job.member
        assert member is not None
        member.is_fetching = False
        if self._context.jobs.get(job.spec.name) is not job or member.order.attempt != order.attempt:
            self._drop(job)
            self._prepare(job)
            return
        if problem is not None:
            self._not_fetched(job, order, problem)
            return
        # Not on this node's disk: `JobMemory` takes what it has loaded for a checkpoint.
        job.checkpointed_round = 0
        job.model_round = member.order.model_round
        self._held(job, order)

    def _held(self, job: Job, order: JobOrder) -> None:
        member = job.member
        assert member is not None
        assert job.layout is not None
        member.held_round = max(member.held_round, order.model_round)
        member.told_problem = ""
        member.received_bytes += job.layout.payload_bytes
        if not order.state_sources:
            member.held_state_round = order.model_round  # it begins with zeros, as the memory does
        self._tell_held(job)
        if not job.last_activity:
            job.last_activity = time.monotonic()
        self.advance(job)
        self._prepare(job)
        self._context.publish(job)

    def _tell_held(self, job: Job) -> None:
        """Say that the newest model is here, and how much room there is for updates."""
        member = job.member
        assert member is not None
        if job.pools is not None and member.held_round == member.order.model_round:
            slots = job.pools.updates.slots // self._context.gateway_seats
            self.link.send(ModelHeld(job.spec.name, member.order.attempt, member.held_round, slots))

    def _not_fetched(self, job: Job, order: JobOrder, problem: Problem) -> None:
        """Try again: the sources may have changed, or come to it later. What is wrong for good is told."""
        member = job.member
        assert member is not None
        if problem.status < 500 or problem.status == 507:
            self._tell_prepared(job, problem)
            self.link.send(JobBroken(job.spec.name, order.attempt, problem.detail or problem.title))
            return
        if member.told_problem != problem.detail:
            member.told_problem = problem.detail
            log.warning("job %s: %s: %s", job.spec.name, problem.title, problem.detail)
        self._retry(job)

    def _retry(self, job: Job) -> None:
        """Go on in a moment; however many ask for that, once."""
        member = job.member
        assert member is not None
        if not member.is_retrying:
            member.is_retrying = True
            self._call_later(_RETRY_SECONDS, partial(self._try_again, job))

    def _try_again(self, job: Job) -> None:
        assert job.member is not None
        job.member.is_retrying = False
        if self._context.jobs.get(job.spec.name) is job:
            self._prepare(job) if job.pools is None else self.advance(job)

    def _tell_prepared(self, job: Job, problem: Problem | None) -> None:
        member = job.member
        assert member is not None
        waiting, member.waiting = member.waiting, []
        for prepared in waiting:
            prepared(problem)

    # --- the model of the next round -------------------------------------------------------------------------

    def _fetch(self, job: Job) -> None:
        """Have the newest model in its slot. Waits for whoever still reads what was there."""
        member = job.member
        assert member is not None
        order = member.order
        if member.is_fetching or job.is_lent(order.model_round):
            return
        member.is_fetching = True
        self.pulls.put(partial(self._pull, job, order))

    def _pull(self, job: Job, order: JobOrder) -> Continuation:
        """In the background thread."""
        assert job.pools is not None
        assert job.layout is not None
        problem = None
        try:
            slot = job.pools.memory.payload(job.model_slot(order.model_round), job.layout.payload_bytes)
            job.models.read_model(order.model_round, len(job.layout.header), slot)
        except (OSError, LiflError, ValueError) as error:
            problem = Problem(500, "the model cannot be had", str(error))
        return partial(self._pulled, job, order, problem)

    def _pulled(self, job: Job, order: JobOrder, problem: Problem | None) -> None:
        member = job.member
        assert member is not None
        member.is_fetching = False
        if job.pools is None or member.order.attempt != order.attempt:
            self._prepare(job)
        elif problem is not None:
            self._not_fetched(job, order, problem)
        else:
            self._held(job, order)

    # --- rounds ----------------------------------------------------------------------------------------------

    def _open(self, job: Job) -> None:
        member = job.member
        assert member is not None
        member.applied = ()
        self._rounds.open_planned(job, member.order.round, Hierarchy(self._leaves_of(job)))

    @staticmethod
    def _leaves_of(job: Job) -> int:
        """Aggregators that this node has for the round by its order."""
        assert job.member is not None
        return 1 if job.gather else max(1, min(job.member.order.leaves, job.places))

    def _end_round(self, job: Job, round_: Round) -> None:
        """The coordinator has the round's model: nothing of what is here for it is needed any more."""
        member = job.member
        assert member is not None
        for item in list(round_.in_slot.values()):
            self._context.release(item.slot, item.generation, round_.number)
        round_.in_slot.clear()
        round_.complete(time.monotonic())
        job.remember(round_)
        job.round = None
        member.is_offering = False
        member.is_used = bool(round_.log or round_.remote)
        if member.is_used:
            self._report(job, round_)
        member.received_bytes = 0
        if not job.spec.reuse:
            self._workforce.stop(job)

    def _report(self, job: Job, round_: Round) -> None:
        member = job.member
        assert member is not None
        state = round_.state()
        # A leaf that goes on as its node's middle, and that one as the top, are reused.
        roles = round_.hierarchy.leaves + 1 + bool(round_.remote)
        self.link.send(
            RoundReport(
                job=job.spec.name,
                round=round_.number,
                attempt=member.order.attempt,
                leaves=round_.hierarchy.leaves,
                started=round_.started,
                cold=round_.cold,
                reused=max(0, roles - round_.started) if job.spec.reuse else 0,
                received_bytes=member.received_bytes,
                latency_median=state.latency_median,
                latency_p95=state.latency_p95,
                latency_max=state.latency_max,
            )
        )

    def finish_if_ordered(self, job: Job) -> None:
        """Have the aggregators finish this node's part, once everything that counts is here."""
        member, round_ = job.member, job.round
        assert member is not None
        order = member.order
        if round_ is None or job.status != "running" or round_.number != order.round:
            return
        if round_.status == "complete":
            return  # its model is being offered
        if not member.is_closing:
            self._reopen(job, round_)
            return
        if member.counting or round_.accepted != order.updates:
            return
        if member.is_top and job.state_arrays and member.held_state_round != order.round:
            self._fetch_state(job)
            return
        uplink = 0 if member.is_top else self._context.gateways.get(0, 0)
        if not (member.is_top or uplink):
            return  # goes on when the gateway is back
        wanted = (order.epoch, order.role, order.partials, order.updates, uplink)
        if member.applied == wanted and round_.status == "closing":
            return
        round_.awaited = frozenset(order.partials) if member.is_top else frozenset()
        is_new_parent = round_.uplink != uplink
        round_.uplink = uplink
        round_.status = "closing"
        round_.closed_once = True
        member.applied = wanted
        if is_new_parent:
            # The end of the round is told with the new parent: sums must not become a model here before that.
            self._workforce.start_missing(job)
            self._workforce.assign_top(job)
        else:
            self._workforce.close_round(job)

    def _reopen(self, job: Job, round_: Round) -> None:
        """The round takes updates again, or has not begun to close."""
        member = job.member
        assert member is not None
        round_.awaited = frozenset(member.order.partials) if member.is_top else frozenset()
        if round_.status == "closing":
            round_.status = "open"
            member.applied = ()
            round_.uplink = 0
            self._workforce.assign_top(job)  # which forgets how many inputs it was told to expect

    def _fetch_state(self, job: Job) -> None:
        """A new top needs the server optimiser's arrays, which the last one had."""
        member = job.member
        assert member is not None
        if not member.is_fetching:
            member.is_fetching = True
            self.pulls.put(partial(self._pull_state, job, member.order))

    def _pull_state(self, job: Job, order: JobOrder) -> Continuation:
        """In the background thread."""
        assert job.pools is not None
        problem = None
        try:
            assert job.layout is not None
            size = AccumulatorLayout(job.layout, job.spec.precision).nbytes
            slots = [job.state_slot(array, order.round) for array in range(job.state_arrays)]
            arrays = [job.pools.memory.payload(slot, size) for slot in slots]
            assert isinstance(job.models, PeerModels)
            job.models.pull_state(order.round, arrays)
        except (OSError, LiflError, ValueError) as error:
            problem = Problem(500, "the optimiser's state cannot be had", str(error))
        return partial(self._state_pulled, job, order, problem)

    def _state_pulled(self, job: Job, order: JobOrder, problem: Problem | None) -> None:
        member = job.member
        assert member is not None
        member.is_fetching = False
        if problem is not None:
            self._not_fetched(job, order, problem)
        elif member.order.attempt == order.attempt:
            member.held_state_round = order.round
            self.advance(job)

    def update_rejected(self, job: Job, round_: Round, client: str) -> None:
        """An update is not finite. The coordinator hears of it before it can see sums without it."""
        assert job.member is not None
        self.link.send(RejectUpdate(job.spec.name, round_.number, job.member.order.attempt, client))

    # --- the top ---------------------------------------------------------------------------------------------

    def model_made(self, job: Job, round_: Round) -> None:
        """The round's model is in its slot here: offer it. What went into it is kept until it is taken."""
        member = job.member
        assert member is not None
        if member.is_offering or not member.is_top:
            return
        member.is_offering = True
        # Nothing may make the aggregator go over its inputs again: once this is taken their slots hold others.
        round_.status = "complete"
        contributors = set(round_.remote)
        if round_.accepted:
            contributors.add(self.link.incarnation)
        order = member.order
        made = ModelMade(
            job=job.spec.name,
            round=round_.number,
            attempt=order.attempt,
            epoch=order.epoch,
            contributors=tuple(sorted(contributors)),
            updates=round_.accepted,
            weight=round_.weight,
        )
        self.link.send(made, partial(self._model_taken, job, round_, order))

    def _model_taken(self, job: Job, round_: Round, order: JobOrder, answer: MemberAnswer) -> None:
        member = job.member
        assert member is not None
        member.is_offering = False
        if not isinstance(answer, Acknowledged):
            log.warning("job %s: the model of round %d was not taken: %s", job.spec.name, round_.number, answer)
            round_.status = "closing"
            member.applied = ()
            self._retry(job)
            return
        if job.pools is None or member.order.attempt != order.attempt:
            return
        following = round_.number + 1
        member.held_round = member.held_state_round = following
        if job.round is round_:
            for item in list(round_.in_slot.values()):
                self._rounds.account_folded(job, round_, item.slot, item.generation)
            round_.complete(time.monotonic())
        # Others fetch it now, perhaps before the order that tells us so has come.
        job.model_round = max(job.model_round, following)
        self.advance(job)
        self._context.publish(job)

    # --- endings ---------------------------------------------------------------------------------------------

    def _end(self, job: Job) -> None:
        """A job that is over keeps nothing here once the coordinator has its last model."""
        member = job.member
        assert member is not None
        order = member.order
        if order.status not in ("complete", "failed"):
            return
        if job.round is not None:
            self._end_round(job, job.round)
        self._workforce.stop(job)
        is_needed = order.status == "complete" and order.checkpointed_round != order.model_round
        if not job.leases and not member.waiting and not member.is_fetching and not is_needed:
            self._memory.drop(job)
            member.held_round = 0
        elif job.pools is not None and member.held_round != order.model_round and member.waiting:
            self._fetch(job)
        elif self._is_ready(job):
            self._tell_prepared(job, None)

    def sleep(self, job: Job) -> None:
        """Give the memory of an idle job back; it is fetched again when it is used."""
        member = job.member
        assert member is not None
        is_elsewhere = member.order.checkpointed_round == member.order.model_round
        is_used = member.is_fetching or member.counting or member.waiting or member.has_postponed
        if is_elsewhere and not is_used:
            self._drop(job)

    def gateway_joined(self) -> None:
        """Sums that were on their way when the gateway ended go out again by the new one."""
        for job in self._context.jobs.values():
            if job.member is not None:
                self.finish_if_ordered(job)

"""The coordinator: runs the jobs of the cluster. One thread, one poll loop, no timer unless a round has one.

    python -m lifl.control.coordinator --runtime-directory DIR --state-directory DIR

It answers the gateways on `coordinator.sock`, exchanges descriptors with gateways and workers, and keeps the
journal. It prints JSON lines for its supervisor: {"ready": true} and {"zygote": "function"} when a function is
needed for the first time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from lifl import descriptor
from lifl.agent_client import AgentConnection, join
from lifl.control.agent_link import AgentLink
from lifl.control.hierarchy import plan_hierarchy
from lifl.control.job import MODEL_SLOTS, Job, Pools, WorkerRecord
from lifl.control.job_store import JOB_NAME, JobStore
from lifl.control.round import Aggregator, Round
from lifl.control_channel import ControlChannel, close_fds, listen
from lifl.descriptor import Descriptor, Kind
from lifl.errors import InvalidModel, LiflError, ProtocolError, Refused, Unavailable
from lifl.messages import (
    Acknowledged,
    AcquireModel,
    Admit,
    BusySlots,
    Commit,
    CreateJob,
    DeleteJob,
    DescribeJob,
    DescribeNodes,
    DescribeRound,
    Done,
    Hello,
    InstallModel,
    Jobs,
    JobSpec,
    JobState,
    Joined,
    Left,
    ListJobs,
    Message,
    ModelSource,
    Nodes,
    NodeState,
    PoolInfo,
    Problem,
    ReturnModel,
    Slots,
    Subscribe,
    ToCoordinator,
    Verdict,
    WorkerSpec,
)
from lifl.model_layout import parse_header
from lifl.pool import MappedPool
from lifl.process import end_with_supervisor
from lifl.slot import split_slot_reference

MAX_DEATHS: Final = 5
"""Workers that may die in one place of the tree without progress before the job is given up."""

_HEADER_LIMIT: Final = 100_000_000
_RECONNECT_SECONDS: Final = 30.0

log = logging.getLogger("lifl.coordinator")


class GatewayConnection:
    """One connection of a gateway: either questions and answers, or a subscription."""

    def __init__(self, sock: socket.socket) -> None:
        self.channel: ControlChannel[ToCoordinator] = ControlChannel(sock, ToCoordinator)
        self.leases: dict[int, str] = {}
        self.subscribed = False
        sock.setblocking(False)

    def answer(self, message: Message) -> None:
        """Send, unless the gateway is gone: then its end of file will tell."""
        try:
            self.channel.send(message)
        except Unavailable as error:
            log.debug("answer not delivered: %s", error)


@dataclass
class Zygote:
    """A function that is ready to be forked, or that could not be imported."""

    endpoint: int
    failure: str
    gather: bool
    state_arrays: int


@dataclass
class Background:
    """A thread for what would block the loop (disks, large copies), in order, with results in the loop."""

    tasks: queue.SimpleQueue[Callable[[], Callable[[], None]] | None] = field(default_factory=queue.SimpleQueue)
    results: queue.SimpleQueue[Callable[[], None]] = field(default_factory=queue.SimpleQueue)
    event: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def start(self) -> None:
        """Start the thread."""
        self.thread = threading.Thread(target=self._run, name="background", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (task := self.tasks.get()) is not None:
            self.results.put(task())
            os.eventfd_write(self.event, 1)

    def finish(self) -> None:
        """Do what is queued, then end the thread."""
        self.tasks.put(None)
        self.thread.join()

    def process(self) -> None:
        """Run the results' continuations; called by the loop when `event` is readable."""
        os.eventfd_read(self.event)
        while True:
            try:
                self.results.get_nowait()()
            except queue.Empty:
                return


class Coordinator:
    """See the module. All methods run in the loop's thread."""

    def __init__(self, runtime_directory: Path, state_directory: Path, gateways: int, cores: int) -> None:
        self._runtime_directory = runtime_directory
        self._state_directory = state_directory
        self._gateway_seats = gateways
        self._cores = cores
        self._selector = selectors.DefaultSelector()
        self._background = Background()
        self._jobs: dict[str, Job] = {}
        self._connections: set[GatewayConnection] = set()
        self._gateways: dict[int, int] = {}
        """Endpoint of the gateway on each seat."""
        self._zygotes: dict[str, Zygote] = {}
        self._functions_asked_for: set[str] = set()
        self._worker_jobs: dict[int, tuple[Job, WorkerRecord]] = {}
        """By endpoint."""
        self._tickets: dict[str, tuple[Job, WorkerRecord]] = {}
        self._pool_owners: dict[int, Job] = {}
        self._installing: dict[str, list[Callable[[], None]]] = {}
        self._lease_numbers = 0
        self._next_pool = 0
        self._stopping = False

    # --- loop ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until SIGTERM."""
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.signal(signal.SIGINT, self._on_terminate)
        wake_receiver, wake_sender = socket.socketpair()
        wake_receiver.setblocking(False)
        wake_sender.setblocking(False)
        signal.set_wakeup_fd(wake_sender.fileno(), warn_on_full_buffer=False)
        self._selector.register(wake_receiver, selectors.EVENT_READ, lambda: wake_receiver.recv(64))
        self._background.start()
        self._selector.register(self._background.event, selectors.EVENT_READ, self._background.process)
        self._join_agent()
        self._restore_jobs()
        path = str(self._runtime_directory / "coordinator.sock")
        listener = listen(path)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept_gateway, listener))
        self._tell_supervisor({"ready": True})
        while not self._stopping:
            for key, _ in self._selector.select(self._seconds_to_next_timer()):
                key.data()
            self._run_timers()
        os.unlink(path)
        self._background.finish()

    def _on_terminate(self, signal_number: int, frame: object) -> None:
        self._stopping = True

    @staticmethod
    def _tell_supervisor(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)

    def _seconds_to_next_timer(self) -> float | None:
        times = [when for job in self._jobs.values() for when in self._timers_of(job)]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _timers_of(self, job: Job) -> list[float]:
        times: list[float] = []
        if job.status != "running" or job.round is None:
            return times
        deadline = job.round.deadline()
        if deadline is not None and job.round.status == "open" and job.round.accepted and not self._overdue(job):
            times.append(deadline)
        if not job.memory_given_back and job.last_activity and job.round.status == "open":
            times.append(job.last_activity + job.spec.idle_seconds)
        return times

    @staticmethod
    def _overdue(job: Job) -> bool:
        deadline = job.round.deadline() if job.round else None
        return deadline is not None and time.monotonic() >= deadline

    def _run_timers(self) -> None:
        now = time.monotonic()
        for job in list(self._jobs.values()):
            if job.status != "running" or job.round is None:
                continue
            self._close_if_possible(job)
            if job.last_activity and now >= job.last_activity + job.spec.idle_seconds:
                self._go_idle(job)

    # --- agent ---------------------------------------------------------------------------------------------

    def _join_agent(self) -> None:
        path = str(self._runtime_directory / "agent.sock")
        end = time.monotonic() + _RECONNECT_SECONDS
        while True:
            try:
                connection = join(path, Hello("coordinator"))
                break
            except Unavailable:
                if time.monotonic() > end or self._stopping:
                    raise
                time.sleep(0.02)
        self._agent = AgentLink(connection, self._on_agent_event)
        assert connection.endpoint is not None
        self._endpoint = connection.endpoint
        self._data_plane = connection.welcome.data_plane
        register = self._selector.register
        register(connection.channel.fileno(), selectors.EVENT_READ, self._process_agent)
        register(connection.endpoint.near.fileno(), selectors.EVENT_READ, self._process_descriptors)
        register(connection.endpoint.far.fileno(), selectors.EVENT_READ, self._endpoint.bounced)

    def _leave_agent(self, connection: AgentConnection) -> None:
        for fileno in (
            connection.channel.fileno(),
            self._endpoint.near.fileno(),
            self._endpoint.far.fileno(),
        ):
            self._selector.unregister(fileno)
        connection.close()

    def _process_agent(self) -> None:
        try:
            self._agent.process()
        except (Unavailable, ProtocolError) as error:
            if not self._stopping:
                log.warning("agent lost (%s); joining the new one", error)
                self._return_to_agent()

    def _return_to_agent(self) -> None:
        """The agent died: its workers end by themselves; pools and rounds go on with the new agent."""
        self._process_descriptors()
        self._leave_agent(self._agent.connection)
        self._gateways.clear()
        self._zygotes.clear()
        self._worker_jobs.clear()
        self._tickets.clear()
        self._join_agent()
        for job in self._jobs.values():
            job.workers.clear()
            if job.pools is not None:
                pools = job.pools
                self._agent.create_pool(pools.updates, pools.updates_fd, self._close_fds)
                self._agent.create_pool(pools.aggregates, pools.memory.fd, self._close_fds)
                if job.round is not None and job.round.accepted:
                    self._start_missing_workers(job)

    @staticmethod
    def _close_fds(done: Done, fds: list[int]) -> None:
        close_fds(fds)

    def _on_agent_event(self, event: Joined | Left) -> None:
        if isinstance(event, Left):
            # All that the process has sent is already in our queue, and counts.
            self._process_descriptors()
        match event:
            case Joined(role="gateway"):
                self._gateway_joined(event)
            case Left(role="gateway"):
                self._gateway_left(event)
            case Joined(role="zygote"):
                self._zygote_joined(event)
            case Left(role="zygote"):
                self._zygote_left(event)
            case Joined(role="worker"):
                self._worker_joined(event)
            case Left(role="worker"):
                self._worker_left(event)

    def _gateway_joined(self, event: Joined) -> None:
        self._gateways[event.seat] = event.endpoint

    def _gateway_left(self, event: Left) -> None:
        if self._gateways.get(event.seat) == event.endpoint:
            del self._gateways[event.seat]

    def _zygote_joined(self, event: Joined) -> None:
        zygote = Zygote(event.endpoint, event.failure, event.gather, event.state_arrays)
        self._zygotes[event.function] = zygote
        for continuation in self._installing.pop(event.function, []):
            continuation()
        for job in self._jobs.values():
            if job.spec.function == event.function and job.round is not None and job.round.accepted:
                self._start_missing_workers(job)

    def _zygote_left(self, event: Left) -> None:
        zygote = self._zygotes.get(event.function)
        if zygote is not None and zygote.endpoint == event.endpoint:
            del self._zygotes[event.function]

    def _need_function(self, function: str) -> None:
        if function not in self._functions_asked_for:
            self._functions_asked_for.add(function)
            self._tell_supervisor({"zygote": function})

    # --- workers -------------------------------------------------------------------------------------------

    def _start_missing_workers(self, job: Job) -> None:
        """Start one worker for each place of the round that has none (paper: exactly as many as planned)."""
        assert job.round is not None
        zygote = self._zygotes.get(job.spec.function)
        if zygote is None or zygote.failure or job.pools is None or job.status != "running":
            return
        missing = [place for place in job.round.aggregators if place.index not in job.workers]
        specs = []
        for place in missing:
            record = WorkerRecord(secrets.token_hex(16), place.index)
            job.workers[place.index] = record
            self._tickets[record.ticket] = (job, record)
            specs.append(
                WorkerSpec(
                    ticket=record.ticket,
                    job=job.spec.name,
                    function=job.spec.function,
                    accumulator=job.accumulator(place.index),
                    model_slots=MODEL_SLOTS,
                    state_slots=job.state_slots,
                    timing=job.spec.timing,
                    precision=job.spec.precision,
                )
            )
        if specs:
            job.round.started += len(specs)
            self._agent.start_workers(tuple(specs), partial(self._workers_requested, job, specs))

    def _workers_requested(self, job: Job, specs: list[WorkerSpec], done: Done, fds: list[int]) -> None:
        close_fds(fds)
        if not done.error:
            return
        # The zygote is gone; the supervisor starts it again and then the places are filled.
        log.warning("workers of job %s not started: %s", job.spec.name, done.error)
        for spec in specs:
            _, record = self._tickets.pop(spec.ticket)
            job.workers.pop(record.place, None)

    def _worker_joined(self, event: Joined) -> None:
        job, record = self._tickets.pop(event.ticket, (None, None))
        if job is None or record is None or job.workers.get(record.place) is not record:
            self._agent.stop_workers((event.endpoint,))
            return
        record.endpoint = event.endpoint
        self._worker_jobs[event.endpoint] = (job, record)
        if job.round is not None and job.round.status != "complete":
            self._assign(job, record)

    def _assign(self, job: Job, record: WorkerRecord) -> None:
        """Tell a worker its round and parent, and give it what waits for it."""
        round_ = job.round
        assert round_ is not None
        if record.place >= len(round_.aggregators):
            return
        if record.place != round_.top.index:
            top = job.workers.get(round_.top.index)
            if top is None or not top.endpoint:
                return
            route = ((record.endpoint, top.endpoint),)
            self._agent.allow(route, partial(self._leaf_routed, job, record, round_, top.endpoint))
            return
        self._hand_over(job, record, self._endpoint.identifier)
        for leaf in job.workers.values():
            if leaf.endpoint and leaf is not record:
                self._assign(job, leaf)

    def _leaf_routed(
        self, job: Job, record: WorkerRecord, round_: Round, parent: int, done: Done, fds: list[int]
    ) -> None:
        close_fds(fds)
        top = job.workers.get(round_.top.index)
        is_current = job.workers.get(record.place) is record and top is not None and top.endpoint == parent
        if is_current and job.round is round_ and round_.status != "complete":
            self._hand_over(job, record, parent)

    def _hand_over(self, job: Job, record: WorkerRecord, parent: int) -> None:
        round_ = job.round
        assert round_ is not None
        record.assigned = True
        self._endpoint.send(record.endpoint, parent, round_.number, Kind.ASSIGN, round_.number >> 16)
        updates = [
            descriptor.encode(record.endpoint, update.slot, round_.number, Kind.UPDATE, update.generation)
            for update in round_.unfolded_of(record.place)
        ]
        for start in range(0, len(updates), descriptor.MAX_BATCH):
            self._endpoint.send_many(record.endpoint, updates[start : start + descriptor.MAX_BATCH])
        if round_.status == "closing":
            self._send_close(job, round_.aggregators[record.place])

    def _worker_left(self, event: Left) -> None:
        job, record = self._worker_jobs.pop(event.endpoint, (None, None))
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
            detail = (
                f"the aggregator died {place.deaths} times in round {round_.number} without progress; "
                "see the log of its zygote"
            )
            self._fail(job, detail)
        elif round_.accepted and not place.delivered:
            log.warning("job %s round %d: aggregator %d died", job.spec.name, round_.number, place.index)
            self._start_missing_workers(job)

    def _fail(self, job: Job, detail: str) -> None:
        job.status = "failed"
        job.detail = detail
        log.error("job %s failed: %s", job.spec.name, detail)
        self._stop_workers(job)
        self._publish(job)

    def _stop_workers(self, job: Job) -> None:
        endpoints = []
        for record in job.workers.values():
            record.stopping = True
            if record.endpoint:
                endpoints.append(record.endpoint)
            else:
                self._tickets.pop(record.ticket, None)
        job.workers.clear()
        if endpoints:
            self._agent.stop_workers(tuple(endpoints))

    # --- descriptors ---------------------------------------------------------------------------------------

    def _process_descriptors(self) -> None:
        for message in self._endpoint.receive():
            job, record = self._worker_jobs.get(message.source, (None, None))
            if job is None or record is None or job.round is None:
                continue
            if message.round != job.round.number & 0xFFFF:
                continue
            if message.kind == Kind.FOLDED:
                self._on_folded(job, job.round, message)
            elif message.kind == Kind.REJECTED:
                self._on_rejected(job, job.round, message)
            elif message.kind == Kind.MODEL:
                self._on_model(job, job.round, record, message)

    def _on_folded(self, job: Job, round_: Round, message: Descriptor) -> None:
        assert job.pools is not None
        pool, index = split_slot_reference(message.slot)
        if pool == job.pools.aggregates.pool:
            place = job.place_of_accumulator(index)
            if 0 <= place < len(round_.aggregators):
                round_.aggregators[place].delivered = True
        elif round_.mark_folded(message.slot, message.generation) is not None:
            self._release(message.slot, message.generation, round_.number)

    def _on_rejected(self, job: Job, round_: Round, message: Descriptor) -> None:
        update = round_.mark_rejected(message.slot, message.generation)
        if update is None:
            return
        log.warning("job %s round %d: update of %s is not finite", job.spec.name, round_.number, update.client)
        self._release(message.slot, message.generation, round_.number)
        self._close_if_possible(job)
        self._publish(job)

    def _release(self, slot: int, generation: int, round_number: int) -> None:
        _, index = split_slot_reference(slot)
        gateway = self._gateways.get(index % self._gateway_seats)
        if gateway is not None:
            self._endpoint.send(gateway, slot, round_number, Kind.RELEASE, generation)

    def _on_model(self, job: Job, round_: Round, record: WorkerRecord, message: Descriptor) -> None:
        following = round_.number + 1
        expected = job.model_slot_reference(following)
        if round_.status != "closing" or record.place != round_.top.index or message.slot != expected:
            return
        if job.gather:
            # Gathered updates stay in their slots until there is a model, so that nothing is lost before.
            for update in list(round_.in_slot.values()):
                round_.mark_folded(update.slot, update.generation)
                self._release(update.slot, update.generation, round_.number)
        elif round_.folded != round_.accepted:
            return
        round_.complete(time.monotonic())
        # Until it is on disk the model is lent to the thread that writes it there.
        lease = self._lend(job, following)
        publish = partial(self._offer_model, job, round_, following)
        if job.spec.durability == "async":
            publish()
        self._background.tasks.put(
            partial(
                self._write_checkpoint, job, round_, following, lease, publish, self._state_views(job, following)
            )
        )

    def _offer_model(self, job: Job, round_: Round, following: int) -> None:
        job.model_round = following
        roles = round_.hierarchy.leaves + 1
        round_.reused = max(0, roles - round_.started)
        job.last = round_.state()
        job.history[round_.number] = job.last
        if job.spec.rounds and round_.number >= job.spec.rounds:
            job.status = "complete"
            self._stop_workers(job)
        else:
            self._open_round(job, following)
        self._publish(job)

    # --- checkpoints (the first method runs in the background thread) ----------------------------------------

    def _state_views(self, job: Job, round_number: int) -> list[memoryview]:
        assert job.pools is not None
        memory = job.pools.memory
        return [memory.payload(job.state_slot(array, round_number)) for array in range(job.state_arrays)]

    def _write_checkpoint(
        self,
        job: Job,
        round_: Round,
        following: int,
        lease: int,
        publish: Callable[[], None],
        state: list[memoryview],
    ) -> Callable[[], None]:
        assert job.pools is not None
        assert job.layout is not None
        header = job.layout.header
        model = job.pools.memory.payload(job.model_slot(following), job.layout.payload_bytes)
        entry = {
            "event": "round",
            "round": round_.number,
            "clients": {update.client: update.num_samples for update in round_.updates.values()},
            "act": round_.act,
        }
        error = ""
        try:
            if state:
                job.store.write(job.store.state_path(following), state)
            job.store.write(
                job.store.checkpoint_path(following), [len(header).to_bytes(8, "little"), header, model]
            )
            job.store.append(entry)
            job.store.prune(job.spec.keep_checkpoints)
        except OSError as failure:
            error = f"checkpoint of round {following} not written: {failure}"
        finally:
            model.release()
            for view in state:
                view.release()
        return partial(self._checkpoint_written, job, following, lease, publish, error)

    def _checkpoint_written(
        self, job: Job, following: int, lease: int, publish: Callable[[], None], error: str
    ) -> None:
        self._return_lease(job, lease)
        if error:
            job.detail = error
            log.error("job %s: %s", job.spec.name, error)
        else:
            job.checkpointed_round = following
        if job.spec.durability == "sync" and job.status == "running":
            publish()
        self._finish_if_complete(job)

    # --- rounds --------------------------------------------------------------------------------------------

    def _open_round(self, job: Job, number: int) -> None:
        pending = job.pending_estimate.observe(job.spec.goal)
        plan = plan_hierarchy(pending, job.spec.updates_per_leaf, self._cores, gather=job.gather)
        job.round = Round(number, job.spec, plan, time.monotonic())
        for record in job.workers.values():
            record.assigned = False
        top = job.workers.get(job.round.top.index)
        if top is not None and top.endpoint:
            self._assign(job, top)

    def _close_if_possible(self, job: Job) -> None:
        assert job.round is not None
        if job.round.try_close(time.monotonic()):
            self._start_missing_workers(job)
            for place in job.round.aggregators:
                self._send_close(job, place)

    def _send_close(self, job: Job, place: Aggregator) -> None:
        round_ = job.round
        assert round_ is not None
        record = job.workers.get(place.index)
        if record is None or not record.assigned or place.delivered:
            return
        if place is round_.top and job.is_lent(round_.number + 1):
            return  # somebody still reads the slot of the new model; sent when it is given back
        if place is round_.top or place.updates:
            expected = round_.expected_inputs(place)
            self._endpoint.send(record.endpoint, expected, round_.number, Kind.CLOSE)

    def _publish(self, job: Job) -> None:
        state = job.state(self._data_plane)
        for connection in [connection for connection in self._connections if connection.subscribed]:
            connection.answer(state)

    def _go_idle(self, job: Job) -> None:
        """Scale to zero: no worker, and no memory when nothing in it is still needed."""
        round_ = job.round
        assert round_ is not None
        job.last_activity = 0.0
        if round_.status != "open" or round_.folded != round_.accepted:
            return
        self._stop_workers(job)
        if round_.accepted or job.leases or job.checkpointed_round != job.model_round or job.pools is None:
            return
        job.memory_given_back = True
        self._agent.reclaim_pool(job.pools.updates.pool)
        self._agent.reclaim_pool(job.pools.aggregates.pool)

    def _touch(self, job: Job) -> None:
        """Note traffic; bring back what idleness gave away."""
        job.last_activity = time.monotonic()
        if job.memory_given_back:
            job.memory_given_back = False
            self._load_model(job, job.model_round)
        self._start_missing_workers(job)

    # --- installing a model: pools, memory, round 1 (or the round that a restart finds) -----------------------

    def _restore_jobs(self) -> None:
        for store in JobStore.all_under(self._state_directory):
            try:
                spec = store.spec()
            except LiflError as error:
                log.error("%s", error)
                continue
            store.remove_leftovers()
            job = Job(spec, store)
            self._jobs[spec.name] = job
            rounds = store.rounds()
            if not rounds:
                self._need_function(spec.function)
                continue
            if spec.rounds and rounds[-1] > spec.rounds:
                job.status = "complete"
                job.model_round = job.checkpointed_round = rounds[-1]
                self._read_layout(job, rounds[-1])
                continue
            self._need_function(spec.function)
            self._install(job, rounds[-1], partial(self._restored, job))

    def _restored(self, job: Job, problem: Problem | None) -> None:
        if problem is not None:
            self._fail(job, problem.detail or problem.title)

    def _install(self, job: Job, round_number: int, then: Callable[[Problem | None], None]) -> None:
        """Give the job its pools with the model that starts `round_number`, which is on disk, and open it."""
        job.installing = True
        function = job.spec.function
        zygote = self._zygotes.get(function)
        if zygote is None:
            self._installing.setdefault(function, []).append(partial(self._install, job, round_number, then))
            return
        if zygote.failure:
            job.installing = False
            then(Problem(422, "the function cannot be used", zygote.failure))
            return
        job.gather, job.state_arrays = zygote.gather, zygote.state_arrays
        try:
            self._read_layout(job, round_number)
            updates, aggregates = job.pool_infos(self._new_pool_ids(), self._cores, self._gateway_seats)
        except Refused as error:
            job.installing = False
            then(Problem(error.status, error.title, error.detail))
            return
        received: dict[str, int] = {}

        def pool_made(info: PoolInfo, done: Done, fds: list[int]) -> None:
            if done.error or not fds:
                close_fds([*fds, *received.values()])
                received.clear()
                if job.installing:
                    job.installing = False
                    then(Problem(507, "no memory for the job's pool", done.error))
                return
            if not job.installing:
                close_fds(fds)
                self._agent.drop_pool(info.pool)
                return
            received[info.kind] = fds[0]
            if len(received) == 2:
                memory = MappedPool(aggregates, received["aggregates"], writable=True, keep_fd=True)
                job.pools = Pools(updates, aggregates, received["updates"], memory)
                self._background.tasks.put(partial(self._fill, job, round_number, then))

        self._agent.create_pool(aggregates, None, partial(pool_made, aggregates))
        self._agent.create_pool(updates, None, partial(pool_made, updates))

    def _new_pool_ids(self) -> int:
        number = self._next_pool
        self._next_pool += 2
        return number

    @staticmethod
    def _read_layout(job: Job, round_number: int) -> None:
        path = job.store.checkpoint_path(round_number)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _HEADER_LIMIT:
                raise Refused(422, "not a model", f"{path.name}: header of {length} bytes")
            header = file.read(length)
            payload = os.fstat(file.fileno()).st_size - 8 - length
        try:
            job.layout = parse_header(header, payload)
        except InvalidModel as error:
            raise Refused(422, "not a model", str(error)) from error

    def _fill(self, job: Job, round_number: int, then: Callable[[Problem | None], None]) -> Callable[[], None]:
        self._load_model(job, round_number)
        return partial(self._filled, job, round_number, then)

    @staticmethod
    def _load_model(job: Job, round_number: int) -> None:
        """Put header, model and optimiser state of a round from the disk into the pool."""
        assert job.pools is not None
        assert job.layout is not None
        memory = job.pools.memory
        header = job.layout.header
        for slot in range(MODEL_SLOTS):
            memory.layout(slot)[: len(header)] = header
        model = memory.payload(job.model_slot(round_number), job.layout.payload_bytes)
        with open(job.store.checkpoint_path(round_number), "rb", buffering=0) as file:
            file.seek(8 + len(header))
            _read_whole(file, model)
        path = job.store.state_path(round_number)
        if job.state_arrays and path.exists():
            with open(path, "rb", buffering=0) as file:
                for array in range(job.state_arrays):
                    _read_whole(file, memory.payload(job.state_slot(array, round_number)))

    def _filled(self, job: Job, round_number: int, then: Callable[[Problem | None], None]) -> None:
        job.installing = False
        if job.status == "deleted":
            self._drop_pools(job)
            return
        job.status = "running"
        job.model_round = job.checkpointed_round = round_number
        self._open_round(job, round_number)
        job.last_activity = time.monotonic()
        self._publish(job)
        then(None)

    def _drop_pools(self, job: Job) -> None:
        if job.pools is None:
            return
        self._agent.drop_pool(job.pools.updates.pool)
        self._agent.drop_pool(job.pools.aggregates.pool)
        job.pools.close()
        job.pools = None

    def _finish_if_complete(self, job: Job) -> None:
        """A job that is over keeps no memory once its last model is on disk and read by nobody."""
        if job.status in ("complete", "deleted") and not job.leases:
            self._drop_pools(job)
            self._publish(job)

    # --- leases of models ----------------------------------------------------------------------------------

    def _lend(self, job: Job, round_number: int) -> int:
        self._lease_numbers += 1
        job.leases[self._lease_numbers] = job.model_slot(round_number)
        return self._lease_numbers

    def _return_lease(self, job: Job, lease: int) -> None:
        job.leases.pop(lease, None)
        if job.round is not None and job.round.status == "closing":
            self._send_close(job, job.round.top)
        self._finish_if_complete(job)

    # --- gateways ------------------------------------------------------------------------------------------

    def _accept_gateway(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        connection = GatewayConnection(sock)
        self._connections.add(connection)
        self._selector.register(sock, selectors.EVENT_READ, partial(self._serve, connection))

    def _serve(self, connection: GatewayConnection) -> None:
        try:
            request, fds = connection.channel.receive()
        except BlockingIOError:
            return
        except (Unavailable, ProtocolError) as error:
            log.debug("gateway connection ended: %s", error)
            self._drop_connection(connection)
            return
        close_fds(fds)
        try:
            answer = self._answer(connection, request)
        except Refused as refusal:
            answer = Problem(refusal.status, refusal.title, refusal.detail)
        except Exception as error:
            log.exception("request %s failed", type(request).__name__)
            answer = Problem(500, "internal error", f"{type(error).__name__}; see the coordinator's log")
        if answer is not None:
            connection.answer(answer)

    def _drop_connection(self, connection: GatewayConnection) -> None:
        self._selector.unregister(connection.channel.socket)
        self._connections.discard(connection)
        connection.channel.close()
        for lease, name in connection.leases.items():
            if name in self._jobs:
                self._return_lease(self._jobs[name], lease)

    def _answer(self, connection: GatewayConnection, request: ToCoordinator) -> Message | None:
        """Answer a request; None when the answer comes later."""
        match request:
            case Admit():
                return self._admit(request)
            case Commit():
                return self._commit(request)
            case AcquireModel():
                return self._acquire_model(connection, request)
            case ReturnModel():
                name = connection.leases.pop(request.lease, "")
                if name in self._jobs:
                    self._return_lease(self._jobs[name], request.lease)
                return Acknowledged()
            case BusySlots():
                return self._busy_slots(request.seat)
            case CreateJob():
                return self._create_job(request.spec)
            case InstallModel():
                self._install_model(connection, request)
                return None
            case DescribeJob():
                return self._find(request.job).state(self._data_plane)
            case DescribeRound():
                return self._describe_round(request)
            case ListJobs():
                return Jobs(tuple(job.state(self._data_plane) for job in self._jobs.values()))
            case DeleteJob():
                return self._delete(request.job)
            case DescribeNodes():
                self._agent.get_traffic(partial(self._answer_nodes, connection))
                return None
            case Subscribe():
                connection.subscribed = True
                for job in self._jobs.values():
                    connection.answer(job.state(self._data_plane))
                return None

    def _find(self, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None:
            raise Refused(404, "no such job", f"there is no job {name!r} here; POST /v1/jobs makes one")
        return job

    def _running(self, name: str) -> tuple[Job, Round]:
        job = self._find(name)
        if job.status == "waiting-for-model":
            raise Refused(
                409, "no model yet", f"job {name!r} has no initial model; PUT /v1/jobs/{name}/model first"
            )
        if job.status != "running" or job.round is None:
            raise Refused(409, f"job is {job.status}", job.detail or f"job {name!r} takes no more updates")
        return job, job.round

    def _judge(self, job: Job, round_: Round, number: int, client: str) -> Verdict | None:
        """The verdict on an update that is not to be taken; None when it is."""
        if number > round_.number:
            return Verdict("early", round_.number)
        if number < round_.number:
            round_.late += 1
            return Verdict("late", round_.number)
        admission = round_.admit(client)
        if admission == "open":
            return None
        return Verdict(admission, round_.number + (admission == "late"))

    def _admit(self, request: Admit) -> Verdict:
        job, round_ = self._running(request.job)
        verdict = self._judge(job, round_, request.round, request.client)
        if verdict is None:
            self._touch(job)
            return Verdict("open", round_.number)
        return verdict

    def _commit(self, request: Commit) -> Verdict:
        job, round_ = self._running(request.job)
        verdict = self._judge(job, round_, request.round, request.client)
        if verdict is not None:
            return verdict
        pool, _ = split_slot_reference(request.slot)
        if job.pools is None or pool != job.pools.updates.pool or request.slot in round_.in_slot:
            raise Refused(500, "not a slot of this job", f"slot {request.slot:#x}")
        update = round_.accept(
            request.client, request.slot, request.generation, request.num_samples, request.started
        )
        job.last_activity = time.monotonic()
        record = job.workers.get(update.aggregator)
        if record is None:
            self._start_missing_workers(job)
        self._close_if_possible(job)
        destination = record.endpoint if record is not None and record.assigned else 0
        return Verdict("accepted", round_.number, destination)

    def _busy_slots(self, seat: int) -> Slots:
        # A RELEASE that found no gateway is made up for by this answer only if all news were heard before.
        self._process_agent()
        self._process_descriptors()
        keys = [
            (slot, update.generation)
            for job in self._jobs.values()
            if job.round is not None
            for slot, update in job.round.in_slot.items()
            if split_slot_reference(slot)[1] % self._gateway_seats == seat
        ]
        return Slots(tuple(keys))

    def _create_job(self, spec: JobSpec) -> JobState:
        existing = self._jobs.get(spec.name)
        if existing is not None:
            if existing.spec == spec:
                return existing.state(self._data_plane)
            raise Refused(
                409, "name taken", f"another job is called {spec.name!r}; DELETE it or choose another name"
            )
        _check_spec(spec)
        zygote = self._zygotes.get(spec.function)
        if zygote is not None and zygote.failure:
            raise Refused(422, "the function cannot be used", zygote.failure)
        job = Job(spec, JobStore.of(self._state_directory, spec.name))
        job.store.create(spec)
        self._jobs[spec.name] = job
        self._need_function(spec.function)
        self._publish(job)
        return job.state(self._data_plane)

    def _install_model(self, connection: GatewayConnection, request: InstallModel) -> None:
        job = self._find(request.job)
        incoming = (self._state_directory / "incoming").resolve()
        path = Path(request.path).resolve()
        if path.parent != incoming:
            raise Refused(400, "not an upload", f"{path.name} is not in the directory of uploads")
        if job.status != "waiting-for-model" or job.installing:
            path.unlink(missing_ok=True)
            raise Refused(
                409, "the job has a model", "a job's initial model is set once; start another job instead"
            )
        job.store.adopt_model(path, 1)
        self._install(job, 1, partial(self._installed, connection, job))

    def _installed(self, connection: GatewayConnection, job: Job, problem: Problem | None) -> None:
        if problem is None:
            job.store.append({"event": "model", "round": 1})
            connection.answer(job.state(self._data_plane))
            return
        job.store.checkpoint_path(1).unlink(missing_ok=True)
        job.layout = None
        connection.answer(problem)

    def _acquire_model(self, connection: GatewayConnection, request: AcquireModel) -> ModelSource:
        job = self._find(request.job)
        if not job.model_round:
            raise Refused(404, "no model yet", f"job {job.spec.name!r} has no initial model")
        number = request.round or job.model_round
        assert job.layout is not None
        header, payload = len(job.layout.header), job.layout.payload_bytes
        path = job.store.checkpoint_path(number)
        if number <= job.checkpointed_round:
            if not path.exists():
                oldest = min(job.store.rounds(), default=job.model_round)
                raise Refused(404, "no such model", f"round {number} is not kept; kept from round {oldest}")
            return ModelSource(number, str(path), 0, 0, header, payload)
        if number != job.model_round:
            raise Refused(404, "no such model", f"round {number} has not begun; the newest is {job.model_round}")
        lease = self._lend(job, number)
        connection.leases[lease] = job.spec.name
        return ModelSource(number, "", lease, job.model_slot_reference(number), header, payload)

    def _describe_round(self, request: DescribeRound) -> Message:
        job = self._find(request.job)
        if job.round is not None and job.round.number == request.round:
            return job.round.state()
        state = job.history.get(request.round)
        if state is None:
            raise Refused(404, "no such round", f"round {request.round} of job {request.job!r} is not known here")
        return state

    def _delete(self, name: str) -> Acknowledged:
        job = self._find(name)
        job.status = "deleted"
        del self._jobs[name]
        self._stop_workers(job)
        if not job.installing:
            self._finish_if_complete(job)
        # Whatever of its checkpoints is still to be written goes to the directory under the old name first.
        self._background.tasks.put(partial(self._retire, job))
        self._publish(job)
        return Acknowledged()

    @staticmethod
    def _retire(job: Job) -> Callable[[], None]:
        job.store.retire()
        return lambda: None

    def _answer_nodes(self, connection: GatewayConnection, done: Done, fds: list[int]) -> None:
        close_fds(fds)
        infos = [job.pools for job in self._jobs.values() if job.pools is not None]
        node = NodeState(
            name=socket.gethostname(),
            cores=self._cores,
            data_plane=self._data_plane,
            gateways=len(self._gateways),
            workers=len(self._worker_jobs),
            pool_bytes=sum(pools.updates.geometry.size + pools.aggregates.geometry.size for pools in infos),
            zygotes=tuple(sorted(self._zygotes)),
            traffic=done.traffic,
        )
        connection.answer(Nodes((node,)))


def _read_whole(file: Any, view: memoryview) -> None:
    while len(view):
        count = file.readinto(view)
        if not count:
            raise OSError(f"{file.name}: shorter than it should be")
        view = view[count:]


def _check_spec(spec: JobSpec) -> None:
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
    if not 0 <= spec.slots <= 1 << 20:
        problems.append("slots: from 0 (chosen by the platform) to 1,048,576")
    if not 0.1 <= spec.idle_seconds <= 86_400:
        problems.append("idle_seconds: from 0.1 to 86,400")
    if spec.keep_checkpoints < 0:
        problems.append("keep_checkpoints: 0 (all) or more")
    if not JOB_NAME.fullmatch(spec.function.replace("_", "-")):
        problems.append("function: the name of a function of the project")
    if problems:
        raise Refused(422, "invalid job", "; ".join(problems))


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="python -m lifl.control.coordinator", description=__doc__)
    parser.add_argument("--runtime-directory", type=Path, required=True)
    parser.add_argument("--state-directory", type=Path, required=True)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    end_with_supervisor()
    logging.basicConfig(
        format="%(asctime)s coordinator %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr
    )
    Coordinator(options.runtime_directory, options.state_directory, options.gateways, options.cores).run()


if __name__ == "__main__":
    main()

"""The coordinator: runs the jobs of the cluster. One thread, one poll loop, no timer unless a round has one.

    python -m lifl.control.coordinator --runtime-directory DIR --state-directory DIR

It answers the gateways on `coordinator.sock`, exchanges descriptors with gateways and workers, and keeps the
journal. It prints JSON lines for its supervisor: {"ready": true, "data_plane": "ebpf"} and {"zygote": "function"}
when a function is needed for the first time.

Here are the loop, its timers, the connection to the agent and the restart from the journal. The rest:

    gateway_connections, gateway_requests   what gateways ask, and the answers
    rounds (of `round`)                     from one round to the next
    workforce                               zygotes and workers
    job_memory                              the pools
    model_keeper                            leases and checkpoints of models
    idleness                                scaling to zero
"""

from __future__ import annotations

import argparse
import heapq
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from lifl.agent_client import AgentConnection, join
from lifl.capabilities import drop_capabilities
from lifl.cluster.member_link import MemberLink
from lifl.cluster.messages import Orders
from lifl.control.agent_link import AgentLink
from lifl.control.calibrating import start_calibration
from lifl.control.context import Context
from lifl.control.gateway_connections import GatewayConnections
from lifl.control.gateway_requests import GatewayRequests
from lifl.control.idleness import Idleness
from lifl.control.job import Job
from lifl.control.job_memory import JobMemory, read_layout
from lifl.control.job_store import JobStore
from lifl.control.member import Member
from lifl.control.member_options import Membership, add_member_options, describe_node, load_of, membership_of
from lifl.control.member_requests import MemberRequests
from lifl.control.model_keeper import ModelKeeper
from lifl.control.peer_models import PeerModels
from lifl.control.rounds import Rounds
from lifl.control.supervisor import tell_supervisor
from lifl.control.workforce import Workforce
from lifl.control_channel import close_fds, listen
from lifl.errors import LiflError, ProtocolError, Refused, Unavailable
from lifl.event_loop import ready_keys
from lifl.logs import configure_logging
from lifl.messages import Done, Hello, Joined, Left, Problem
from lifl.process import end_with_supervisor

_RECONNECT_SECONDS: Final = 30.0

log = logging.getLogger("lifl.coordinator")


class Coordinator:
    """See the module. All methods run in the loop's thread."""

    def __init__(self, context: Context, membership: Membership | None = None) -> None:
        self._context = context
        self._member: Member | None = None
        self._workforce = Workforce(context)
        self._memory = JobMemory(context, self._workforce)
        self._models = ModelKeeper(context, self._workforce, self._memory)
        self._rounds = Rounds(context, self._workforce, self._memory, self._models)
        self._idleness = Idleness(context, self._workforce, self._memory)
        self._requests: GatewayRequests = GatewayRequests(
            context, self._workforce, self._models, self._rounds, self._idleness, self._hear_news
        )
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._appointments: list[tuple[float, int, Callable[[], None]]] = []
        """What is to be called at which monotonic time; the number keeps equal times in order."""
        if membership is not None:
            self._join_cluster(membership)

    def _join_cluster(self, options: Membership) -> None:
        """Have the cluster's coordinator decide about jobs from now on."""
        context = self._context
        link = MemberLink(
            options.link,
            context.runtime_directory,
            partial(describe_node, context, options),
            lambda orders, then: self._on_orders(orders, then),
            lambda: self._on_lease_lost(),
        )
        link.capacity = options.capacity
        member = Member(
            context,
            self._workforce,
            self._memory,
            self._rounds,
            link,
            partial(PeerModels, options),
            self._call_later,
            partial(start_calibration, context.state_directory),
        )
        context.member = self._member = member
        self._requests = MemberRequests(
            options.link.name,
            member,
            *(context, self._workforce, self._models, self._rounds, self._idleness, self._hear_news),
        )

    def _on_orders(self, orders: Orders, then: Callable[[], None]) -> None:
        assert self._member is not None
        self._member.on_orders(orders)
        self._context.agent.get_traffic(partial(self._note_load, then))

    def _on_lease_lost(self) -> None:
        assert self._member is not None
        self._member.on_lost()

    def _note_load(self, then: Callable[[], None], done: Done, fds: list[int]) -> None:
        """Keep the node's load for the next heartbeat."""
        close_fds(fds)
        assert self._member is not None
        self._member.link.load = load_of(self._context, self._workforce.size, done.traffic)
        then()

    # --- loop ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until SIGTERM."""
        self._wake_on_signals()
        background = self._context.background
        background.start()
        self._selector.register(background, selectors.EVENT_READ, background.process)
        self._join_agent()
        if self._member is None:
            self._restore_jobs()
        else:
            self._member.pulls.start()
            self._selector.register(self._member.pulls, selectors.EVENT_READ, self._member.pulls.process)
            self._selector.register(self._member.link, selectors.EVENT_READ, self._member.link.process)
            self._member.link.start()
        path = str(self._context.runtime_directory / "coordinator.sock")
        gateways = GatewayConnections(self._selector, self._requests.answer, self._requests.connection_ended)
        gateways.serve(listen(path))
        tell_supervisor({"ready": True, "data_plane": self._context.data_plane})
        while not self._stopping:
            for key in ready_keys(self._selector, self._seconds_to_next_timer()):
                key.data()
            self._requests.answer_postponed()
            self._run_timers()
        os.unlink(path)
        background.finish()

    def _wake_on_signals(self) -> None:
        """Have SIGTERM and SIGINT end the loop, also while it waits."""
        signal.signal(signal.SIGTERM, self._on_terminate)
        signal.signal(signal.SIGINT, self._on_terminate)
        receiver, self._wake_sender = socket.socketpair()  # kept: the signal handler writes to it
        receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        signal.set_wakeup_fd(self._wake_sender.fileno(), warn_on_full_buffer=False)
        self._selector.register(receiver, selectors.EVENT_READ, partial(receiver.recv, 64))

    def _on_terminate(self, signal_number: int, frame: object) -> None:
        self._stopping = True

    # --- timers --------------------------------------------------------------------------------------------

    def _call_later(self, seconds: float, action: Callable[[], None]) -> None:
        """Have the loop call `action` after some time."""
        heapq.heappush(self._appointments, (time.monotonic() + seconds, id(action), action))

    def _seconds_to_next_timer(self) -> float | None:
        times = [when for when, _, _ in self._appointments[:1]]
        times += [when for job in self._context.jobs.values() for when in self._timers_of(job)]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _timers_of(self, job: Job) -> list[float]:
        """When the deadline of the job's round has to be seen to, and its idleness."""
        round_ = job.round
        if _is_unused(job):
            return [job.last_activity + job.spec.idle_seconds]
        if job.status != "running" or round_ is None or round_.status != "open":
            return []
        times = []
        deadline = round_.deadline() if job.member is None else None
        # A deadline that has passed closes the round with the next update; it needs no more waking.
        if deadline is not None and round_.accepted and time.monotonic() < deadline:
            times.append(deadline)
        idle = self._idleness.begins(job)
        if idle is not None and not job.memory_given_back:
            times.append(idle)
        return times

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._appointments and self._appointments[0][0] <= now:
            heapq.heappop(self._appointments)[2]()
        for job in list(self._context.jobs.values()):
            if self._member is not None and _is_unused(job) and now >= job.last_activity + job.spec.idle_seconds:
                self._member.sleep(job)
                job.last_activity = now if job.pools is not None else 0.0
            if job.status != "running" or job.round is None:
                continue
            self._rounds.close_if_possible(job)
            idle = self._idleness.begins(job)
            if idle is not None and now >= idle:
                self._idleness.go_idle(job)

    # --- agent ---------------------------------------------------------------------------------------------

    def _join_agent(self) -> None:
        connection = self._connect_to_agent()
        endpoint = connection.endpoint
        assert endpoint is not None
        self._context.agent = AgentLink(connection, self._on_agent_event)
        self._context.endpoint = endpoint
        self._context.data_plane = connection.welcome.data_plane
        register = self._selector.register
        register(connection.channel.fileno(), selectors.EVENT_READ, self._process_agent)
        register(endpoint.near.fileno(), selectors.EVENT_READ, self._rounds.process_descriptors)
        # What comes back was for a process that is gone; its successor is given everything again.
        register(endpoint.far.fileno(), selectors.EVENT_READ, endpoint.bounced)

    def _connect_to_agent(self) -> AgentConnection:
        path = str(self._context.runtime_directory / "agent.sock")
        end = time.monotonic() + _RECONNECT_SECONDS
        while True:
            try:
                return join(path, Hello("coordinator"))
            except Unavailable:
                if time.monotonic() > end or self._stopping:
                    raise
                time.sleep(0.02)

    def _leave_agent(self) -> None:
        connection, endpoint = self._context.agent.connection, self._context.endpoint
        for fileno in (connection.channel.fileno(), endpoint.near.fileno(), endpoint.far.fileno()):
            self._selector.unregister(fileno)
        connection.close()

    def _hear_news(self) -> None:
        self._process_agent()
        self._rounds.process_descriptors()

    def _process_agent(self) -> None:
        try:
            self._context.agent.process()
        except (Unavailable, ProtocolError) as error:
            if not self._stopping:
                log.warning("agent lost (%s); joining the new one", error)
                self._return_to_agent()

    def _return_to_agent(self) -> None:
        """The agent died: its workers end by themselves; pools and rounds go on with the new agent."""
        self._rounds.process_descriptors()
        self._leave_agent()
        self._context.gateways.clear()
        self._workforce.forget_all()
        self._join_agent()
        self._memory.hand_all_to_agent()
        for job in self._context.jobs.values():
            if job.round is not None and job.round.accepted:
                self._workforce.start_missing(job)

    def _on_agent_event(self, event: Joined | Left) -> None:
        if isinstance(event, Left):
            # All that the process has sent is already in our queue, and counts.
            self._rounds.process_descriptors()
        match event:
            case Joined(role="gateway"):
                self._context.gateways[event.seat] = event.endpoint
                if self._member is not None:
                    self._member.gateway_joined()
            case Left(role="gateway"):
                self._gateway_left(event)
            case Joined(role="zygote"):
                self._workforce.zygote_joined(event)
            case Left(role="zygote"):
                self._workforce.zygote_left(event)
            case Joined(role="worker"):
                self._workforce.worker_joined(event)
            case Left(role="worker"):
                self._workforce.worker_left(event)

    def _gateway_left(self, event: Left) -> None:
        if self._context.gateways.get(event.seat) == event.endpoint:
            del self._context.gateways[event.seat]
        for job in self._context.jobs.values():
            job.uploads.pop(event.endpoint, None)  # they ended with their gateway
        self._workforce.send_again(event.seat)

    # --- restart -------------------------------------------------------------------------------------------

    def _restore_jobs(self) -> None:
        """Take up every job of the journal with its newest model."""
        for store in JobStore.all_under(self._context.state_directory):
            try:
                job = Job(store.spec(), store, store)
                store.remove_leftovers()
            except (LiflError, ValueError, OSError) as error:
                log.error("%s: %s", store.directory, error)
                continue
            self._context.jobs[job.spec.name] = job
            try:
                self._restore(job)
            except (Refused, OSError) as error:
                self._workforce.fail(job, str(error))

    def _restore(self, job: Job) -> None:
        rounds = job.store.rounds()
        if rounds:
            # Its newest model can be had at once, from the disk; updates are taken when the job runs.
            job.model_round = job.checkpointed_round = rounds[-1]
            job.checkpoints = rounds
            read_layout(job, rounds[-1])
        if rounds and job.spec.rounds and rounds[-1] > job.spec.rounds:
            job.status = "complete"
            return
        self._workforce.need_function(job.spec.function)
        if rounds and job.spec.mode == "async":
            for contributors in job.store.contributors(rounds[-1] - job.spec.max_staleness, rounds[-1]).values():
                job.remember_counted(rounds[-1], contributors)
        if rounds:
            self._rounds.start(job, rounds[-1], partial(self._restored, job))

    def _restored(self, job: Job, problem: Problem | None) -> None:
        if problem is not None:
            self._workforce.fail(job, problem.detail or problem.title)


def _is_unused(job: Job) -> bool:
    """A job of a cluster that has memory here, but has no part in the open round."""
    return job.member is not None and job.round is None and job.pools is not None and bool(job.last_activity)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="python -m lifl.control.coordinator", description=__doc__)
    parser.add_argument("--runtime-directory", type=Path, required=True)
    parser.add_argument("--state-directory", type=Path, required=True)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--functions", help="names of the project's functions, separated by commas")
    add_member_options(parser)
    options = parser.parse_args()
    end_with_supervisor()
    drop_capabilities()
    configure_logging("coordinator", "%(asctime)s coordinator %(levelname)s %(message)s")
    functions = None if options.functions is None else frozenset(options.functions.split(","))
    context = Context(
        options.runtime_directory, options.state_directory, options.gateways, options.cores, functions
    )
    Coordinator(context, membership_of(options, context.cores)).run()


if __name__ == "__main__":
    main()

"""A node around a gateway under test: an agent and a coordinator that live in this process, on real sockets.

The coordinator here counts updates and nothing more: no worker folds, the test says what happens.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
from lifl import descriptor
from lifl.agent_client import AgentConnection
from lifl.control_channel import ControlChannel, listen
from lifl.descriptor import Descriptor, Kind
from lifl.endpoint import Endpoint
from lifl.errors import LiflError, Unavailable
from lifl.messages import (
    Abandon,
    Acknowledged,
    AcquireModel,
    Admit,
    BusySlots,
    Commit,
    CreateJob,
    DeleteJob,
    DescribeJob,
    DescribeLatencies,
    DescribeNodes,
    DescribeRound,
    DescribeUpdates,
    FromAgent,
    InstallModel,
    JobLatencies,
    Jobs,
    JobSpec,
    JobState,
    Latencies,
    ListJobs,
    ModelSource,
    Nodes,
    NodeState,
    PoolAdded,
    PoolDropped,
    PoolInfo,
    Problem,
    ReturnModel,
    RoundState,
    RoundUpdates,
    SelectClient,
    Selection,
    Slots,
    Subscribe,
    ToCoordinator,
    UpdateState,
    Verdict,
    Welcome,
    endpoint_id,
)
from lifl.model_layout import encode_header, parse_header
from lifl.pool import MappedPool
from lifl.slot import PAGE, PoolGeometry, slot_reference
from lifl_gateway.gateway import Gateway, Options
from lifl_gateway.server import Limits

JOB = "training"
UPDATES_POOL, AGGREGATES_POOL = 0, 1
AGGREGATOR = endpoint_id("worker", 7)


def make_model(values: int = 1000) -> tuple[bytes, bytes]:
    """A safetensors header and payload of one float32 vector and a scalar."""
    header = encode_header({"weight": ("F32", [values]), "bias": ("F32", [1])})
    return header, bytes(range(256)) * ((values + 1) * 4 // 256) + bytes((values + 1) * 4 % 256)


def as_body(header: bytes, payload: bytes) -> bytes:
    """A whole safetensors file."""
    return len(header).to_bytes(8, "little") + header + payload


class FakeAgent:
    """Owns the memory; joins the gateway under test as often as it asks."""

    def __init__(self) -> None:
        self.is_up = True
        self.joins = 0
        self.received: deque[Descriptor] = deque()
        self._memory: dict[int, tuple[PoolInfo, int]] = {}
        self._ends: list[socket.socket] = []
        self._channel: ControlChannel[Any] | None = None
        self._near: socket.socket | None = None
        self._threads: list[threading.Thread] = []

    def create_pool(self, info: PoolInfo) -> MappedPool:
        """Make a pool, tell the gateway if there is one, and return this side's mapping."""
        fd = os.memfd_create(f"pool-{info.pool}")
        os.ftruncate(fd, info.geometry.size)
        self._memory[info.pool] = (info, fd)
        if self._channel is not None:
            self._channel.send(PoolAdded(info), [fd])
        return MappedPool(info, os.dup(fd))

    def drop_pool(self, pool: int) -> None:
        """Forget a pool."""
        _, fd = self._memory.pop(pool)
        os.close(fd)
        if self._channel is not None:
            self._channel.send(PoolDropped(pool))

    def join(self) -> AgentConnection:
        """What the gateway calls."""
        if not self.is_up:
            raise Unavailable("the agent is down")
        self.joins += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near, near_peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        far, far_peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        identifier = endpoint_id("gateway", self.joins)
        infos = tuple(info for info, _ in self._memory.values())
        pools = {info.pool: MappedPool(info, os.dup(fd)) for info, fd in self._memory.values()}
        self._channel = ControlChannel(ours, FromAgent)
        self._near = near_peer
        self._ends += [ours, near_peer, far_peer]
        thread = threading.Thread(target=self._read, args=(near_peer,), daemon=True)
        thread.start()
        self._threads.append(thread)
        return AgentConnection(
            ControlChannel(theirs, FromAgent),
            Welcome(identifier, "unix", False, infos),
            Endpoint(identifier, near, far),
            pools,
        )

    def _read(self, near: socket.socket) -> None:
        while True:
            try:
                data = near.recv(4096)
            except OSError:
                return
            if not data:
                return
            self.received.extend(descriptor.decode(data))

    def release(self, slot: int, round_number: int, generation: int) -> None:
        """Send the gateway a RELEASE."""
        assert self._near is not None
        self._near.send(
            descriptor.encode(endpoint_id("gateway", self.joins), slot, round_number, Kind.RELEASE, generation)
        )

    def die(self) -> None:
        """End all connections; nobody joins until `is_up` is set again."""
        self.is_up = False
        self._channel = self._near = None
        for end in self._ends:
            end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()
        self._ends.clear()
        self._threads.clear()

    def close(self) -> None:
        """Free everything."""
        self.die()
        for _, fd in self._memory.values():
            os.close(fd)


class FakeCoordinator:
    """Counts the updates of one job, or of those that are created over HTTP."""

    def __init__(self, directory: Path, agent: FakeAgent, *, slots: int = 8, seats: int = 1) -> None:
        self.agent = agent
        self.slots = slots
        self.seats = seats
        self.path = str(directory / "coordinator.sock")
        self.lock = threading.RLock()
        self.states: dict[str, JobState] = {}
        self.accepted: dict[tuple[str, int, str], Commit] = {}
        self.busy: dict[int, int] = {}
        self.answers: dict[type, Any] = {}
        """What a test wants answered instead, by type of question."""
        self.questions: list[Any] = []
        self.leases: set[int] = set()
        self.release_at_once = False
        self.destination = AGGREGATOR
        self.model_in_file: Path | None = None
        self.memory: dict[str, tuple[MappedPool, MappedPool]] = {}
        self._next_pool = 0
        self.board: Any = None
        """Of the gateway, once it is there."""
        self._subscribers: list[ControlChannel[Any]] = []
        self.start()

    # --- the job ---------------------------------------------------------------------------------------------

    def add_job(self, name: str, header: bytes, payload: bytes) -> JobState:
        """Make a running job with this model."""
        spec = JobSpec(name=name, function="fedavg", goal=1000)
        self.states[name] = JobState(name, "waiting-for-model", 0, 0, spec, "unix")
        return self.install(name, header, payload)

    def install(self, name: str, header: bytes, payload: bytes) -> JobState:
        """Give a job its model."""
        updates, aggregates = self._next_pool, self._next_pool + 1
        self._next_pool += 2
        geometry = PoolGeometry.of(self.slots, len(header) + PAGE, len(payload))
        memory = self.agent.create_pool(
            PoolInfo(updates, "updates", name, 1000 + updates, self.slots, *geometry[1:])
        )
        models = self.agent.create_pool(
            PoolInfo(aggregates, "aggregates", name, 1000 + aggregates, 4, *geometry[1:])
        )
        models.slot(1)[PAGE : PAGE + len(header)] = header
        models.payload(1, len(payload))[:] = payload
        self.memory[name] = (memory, models)
        state = msgspec.structs.replace(
            self.states[name],
            status="running",
            round=1,
            model_round=1,
            model_header_bytes=len(header),
            model_payload_bytes=len(payload),
            updates_pool=updates,
            aggregates_pool=aggregates,
            model_layout=hashlib.sha256(header).hexdigest(),
            nonce=0xABC + updates,
        )
        self.publish(state)
        return state

    def publish(self, state: JobState) -> None:
        """Make this the job's state and tell the gateways."""
        with self.lock:
            if state.status == "deleted":
                self.states.pop(state.job, None)
            else:
                self.states[state.job] = state
            for channel in self._subscribers:
                channel.send(state)
        self._await_board(state)

    def _await_board(self, state: JobState) -> None:
        """The stream takes a moment; tests want to see what follows from the news."""
        expected = None if state.status == "deleted" else state
        end = time.monotonic() + 2
        while self.board is not None and self.board.is_current and time.monotonic() < end:
            if self.board.get(state.job) == expected:
                return
            time.sleep(0.001)

    def change(self, name: str, **changes: Any) -> None:
        """Change a job's state and tell the gateways."""
        self.publish(msgspec.structs.replace(self.states[name], **changes))

    def release(self, commit: Commit) -> None:
        """Release the slot of an accepted update."""
        self.busy.pop(commit.slot, None)
        self.agent.release(commit.slot, commit.round, commit.generation)

    def release_all(self) -> None:
        """Release whatever is in use."""
        for commit in self.accepted.values():
            if self.busy.get(commit.slot) == commit.generation:
                self.release(commit)

    # --- serving ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen."""
        self._listener = listen(self.path)
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def stop(self) -> None:
        """Die, as far as the gateways can see."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        with self.lock:
            self._subscribers.clear()
        for sock in self._sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join()
        self._listener.close()
        os.unlink(self.path)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(sock)
            thread = threading.Thread(target=self._serve, args=(ControlChannel(sock, ToCoordinator),), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, channel: ControlChannel[Any]) -> None:
        leases: set[int] = set()
        try:
            while True:
                question, _ = channel.receive()
                with self.lock:
                    answer = self._answer(channel, question, leases)
                if answer is not None:
                    channel.send(answer)
        except LiflError:
            pass
        finally:
            with self.lock:
                self.leases -= leases
                if channel in self._subscribers:
                    self._subscribers.remove(channel)
            channel.close()

    def _answer(self, channel: ControlChannel[Any], question: Any, leases: set[int]) -> Any:
        self.questions.append(question)
        prepared = self.answers.get(type(question))
        if prepared is not None:
            return prepared(question) if callable(prepared) else prepared
        job = getattr(question, "job", None)
        if job is not None and job not in self.states:
            return Problem(404, "no such job", f"there is no job {job!r}")
        match question:
            case Subscribe():
                self._subscribers.append(channel)
                for state in self.states.values():
                    channel.send(state)
                return Acknowledged()
            case Admit():
                return self._judge(question) or Verdict("open", self.states[job].round)
            case Abandon():
                return Acknowledged()
            case Commit():
                return self._judge(question) or self._accept_update(question)
            case SelectClient():
                return self._select(question)
            case BusySlots():
                return Slots(tuple(self.busy.items()))
            case CreateJob():
                return self._create(question.spec)
            case InstallModel():
                return self._install_file(question)
            case DescribeJob():
                return self.states[job]
            case ListJobs():
                return Jobs(tuple(self.states[name] for name in sorted(self.states) if name > question.after)[:2])
            case DescribeRound():
                if question.round != 1:
                    return Problem(404, "no such round")
                return RoundState(1, "open", len(self.accepted), 0, 0, 0, 0, 0.0, 0.0, 1, 0, 0)
            case DescribeUpdates():
                return self._updates(question)
            case DescribeLatencies():
                return Latencies((0.1, 1.0), tuple(JobLatencies(name, (3, 2, 1), 6.5) for name in self.states))
            case DeleteJob():
                state = self.states[job]
                self.publish(msgspec.structs.replace(state, status="deleted"))
                return Acknowledged()
            case DescribeNodes():
                return Nodes((NodeState("here", 2, "unix", 1, 0, 0),))
            case AcquireModel():
                return self._lend(question, leases)
            case ReturnModel():
                self.leases.discard(question.lease)
                leases.discard(question.lease)
                return Acknowledged()
        return Problem(500, "unexpected question")

    def _updates(self, question: DescribeUpdates) -> Any:
        if question.round != 1:
            return Problem(404, "no such round")
        commits = list(self.accepted.values())
        states = [
            UpdateState(commit.client, commit.num_samples, 0, "accepted", commit.started, 0.0, 0.0)
            for commit in commits[question.offset :]
        ]
        return RoundUpdates(1, "open", time.monotonic(), time.time(), len(commits), 0, tuple(states))

    def _judge(self, question: Admit | Commit) -> Verdict | Problem | None:
        state = self.states[question.job]
        if state.status != "running":
            return Problem(409, f"job is {state.status}")
        if question.round > state.round:
            return Verdict("early", state.round)
        if question.round < state.round:
            return Verdict("late", state.round)
        if (question.job, question.round, question.client) in self.accepted:
            return Verdict("duplicate", state.round)
        return None

    def _select(self, question: SelectClient) -> Selection:
        number = self.states[question.job].round
        if question.round != number:
            return Selection("early" if question.round > number else "late", number)
        return Selection("everyone", number)

    def _accept_update(self, commit: Commit) -> Verdict:
        assert commit.slot not in self.busy, "a slot that is in use was given to another update"
        self.accepted[commit.job, commit.round, commit.client] = commit
        self.busy[commit.slot] = commit.generation
        if self.release_at_once:
            self.release(commit)
        return Verdict("accepted", commit.round, self.destination)

    def _create(self, spec: JobSpec) -> Any:
        if spec.quorum > spec.goal or (spec.quorum and not spec.deadline):
            return Problem(422, "invalid job", "quorum")
        known = self.states.get(spec.name)
        if known is not None and known.spec != spec:
            return Problem(409, "name taken")
        self.publish(known or JobState(spec.name, "waiting-for-model", 0, 0, spec, "unix"))
        return self.states[spec.name]

    def _install_file(self, question: InstallModel) -> Any:
        if self.states[question.job].status != "waiting-for-model":
            return Problem(409, "the job has a model")
        data = Path(question.path).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, payload = data[8 : 8 + length], data[8 + length :]
        parse_header(header, len(payload))
        return self.install(question.job, header, payload)

    def _lend(self, question: AcquireModel, leases: set[int]) -> Any:
        state = self.states[question.job]
        number = question.round or state.model_round
        if not number or number > state.model_round:
            return Problem(404, "no such model")
        sizes = (state.model_header_bytes, state.model_payload_bytes)
        if self.model_in_file:
            return ModelSource(number, str(self.model_in_file), 0, 0, *sizes)
        lease = len(self.questions)
        self.leases.add(lease)
        leases.add(lease)
        return ModelSource(number, "", lease, slot_reference(state.aggregates_pool, 1), *sizes)


class Node:
    """A gateway that takes updates, and what it needs to."""

    def __init__(
        self, directory: Path, *, limits: Limits | None = None, slots: int = 8, values: int = 1000, **options: Any
    ) -> None:
        self.directory = directory
        self.options = Options(directory, directory, port=0, limits=limits or Limits(), **options)
        self.agent = FakeAgent()
        self.coordinator = FakeCoordinator(directory, self.agent, slots=slots)
        self.header, self.payload = make_model(values)
        self.body = as_body(self.header, self.payload)
        self.coordinator.add_job(JOB, self.header, self.payload)
        self.start_gateway()

    def start_gateway(self) -> None:
        """Start a gateway on the seat."""
        self.gateway = Gateway(self.options, self.agent.join)
        self.gateway.start()
        self._thread = threading.Thread(target=self.gateway.serve, daemon=True)
        self._thread.start()
        assert self.gateway.wait_until_ready(5)
        self.coordinator.board = self.gateway._board

    def stop_gateway(self) -> None:
        """Stop it as SIGTERM does."""
        self.gateway.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def close(self) -> None:
        """Stop everything."""
        self.stop_gateway()
        self.coordinator.stop()
        self.agent.close()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self.gateway.server.server_address

    @property
    def free_slots(self) -> int:
        """Free update slots of the test's job."""
        return next(pool.slots.free for pool in self.gateway.link.pools() if pool.memory.info.job == JOB)

    def connect(self) -> socket.socket:
        """A raw connection."""
        sock = socket.create_connection(self.address, timeout=10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def post(
        self, body: bytes | memoryview | None = None, client: str = "alice", job: str = JOB, **changes: str | None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send one update; `changes` replace headers (underscores stand for dashes), None leaves one out."""
        return self.request("POST", f"/v1/jobs/{job}/updates", body or self.body, event_headers(client, **changes))


def event_headers(client: str = "alice", **changes: str | None) -> dict[str, str]:
    """The headers of an update."""
    headers: dict[str, str | None] = {
        "ce-specversion": "1.0",
        "ce-type": "dev.lifl.update.v1",
        "ce-id": f"{client}-1",
        "ce-source": client,
        "ce-round": "1",
        "ce-numsamples": "32",
        "content-type": "application/vnd.safetensors",
    }
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    return {name: value for name, value in headers.items() if value is not None}


def raw_post(length: int | str | None, *extra: str, client: str = "alice", job: str = JOB) -> bytes:
    """The head of an update as bytes, for tests that do what no HTTP client would."""
    lines = [f"POST /v1/jobs/{job}/updates HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in event_headers(client).items()]
    lines += [f"Content-Length: {length}"] if length is not None else []
    return ("\r\n".join([*lines, *extra]) + "\r\n\r\n").encode()


def read_response(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read one response from a raw connection, and not a byte of what follows it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        assert byte, f"the connection ended after {head!r}"
        head += byte
    status_line, *lines = head.decode("latin-1").split("\r\n")[:-2]
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = b""
    while len(body) < int(headers.get("content-length", 0)):
        body += sock.recv(int(headers["content-length"]) - len(body))
    return int(status_line.split()[1]), headers, body


def eventually(condition: Any, seconds: float = 5.0) -> bool:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True

"""The agent: the one privileged process of a node. It owns pool memory and routes, and admits processes.

    python -m lifl_gateway.agent --runtime-directory DIR [--data-plane auto|ebpf|unix] [--credit N]

It listens on `DIR/agent.sock` only, keeps CAP_BPF and CAP_NET_ADMIN (or nothing), and speaks the protocol of
`lifl.messages`. It knows no jobs' rounds: what it is told about pools and workers it does. When it is ready it
prints one line of JSON on standard output: `{"data_plane": ..., "reason": ..., "huge_pages": ...}`; `reason` says
why the data plane is not eBPF and is empty otherwise.

Where the other processes of the node run in containers of their own, `--node-user UID` admits coordinator and
gateways and `--function-user UID` functions, which may be zygotes and workers and nothing else. No supervisor ends
the agent there when the coordinator has gone, so it then begins anew by itself: everyone is disconnected and joins
again.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from lifl.capabilities import CAP_BPF, CAP_NET_ADMIN, drop_capabilities
from lifl.control_channel import MAX_FDS, ControlChannel, close_fds, listen, peer_credentials
from lifl.errors import LiflError, ProtocolError, Unavailable
from lifl.logs import say
from lifl.messages import (
    Allow,
    CreatePool,
    Done,
    DropPool,
    Fork,
    GetTraffic,
    Hello,
    Joined,
    Left,
    PoolAdded,
    PoolDropped,
    ReclaimPool,
    RefusedJoin,
    Role,
    StartWorkers,
    StopWorkers,
    ToAgent,
    Welcome,
    WorkerSpec,
    endpoint_id,
)
from lifl.process import end_with_supervisor
from lifl_ebpf.interface import DEFAULT_CREDIT, MINIMUM_CREDIT, EndpointSockets, Router
from lifl_ebpf.preflight import ebpf_reason

from lifl_gateway.poller import READ, WRITE, Poller, SpareFile, StopSignals, raise_file_limit
from lifl_gateway.pool_memory import PoolFactory, PoolMemory
from lifl_gateway.unix_router import UnixRouter

_SEND_BUFFER: Final = 1 << 20
_MAX_OUTBOX: Final = 4096
"""Control messages that may wait for one slow process before it is given up."""
_MAX_STRANGERS: Final = 64
"""Connections that have not said Hello; the oldest makes room for the next."""
_MAX_TICKETS: Final = 4096
_MESSAGES_A_TURN: Final = 64
_BACKLOG: Final = 1024
"""Processes that may knock at once; with a time limit connect(2) does not wait but fails when it is full."""
_POOLS_IN_WELCOME: Final = MAX_FDS - 3
"""A gateway hears of further pools one by one: a message carries only so many file descriptors."""

Request = CreatePool | DropPool | ReclaimPool | Allow | StartWorkers | StopWorkers | GetTraffic


class _Waiting:
    """A control message that waits: for room in the socket, or for descriptors that must arrive before it."""

    __slots__ = ("fds", "message", "ready")

    def __init__(self, message: msgspec.Struct, fds: list[int], ready: bool) -> None:
        self.message = message
        self.fds = fds
        self.ready = ready


class Peer:
    """One connected process. `endpoint` is 0 until it has been admitted."""

    def __init__(self, sock: socket.socket, pid: int, roles: frozenset[Role]) -> None:
        self.channel: ControlChannel[ToAgent] = ControlChannel(sock, ToAgent)
        self.pid = pid
        """As the agent sees it; 0 if it does not, because the process has another PID namespace."""
        self.roles = roles
        """What the process may be."""
        self.endpoint = 0
        self.role: Role = "worker"
        self.hello = Hello("worker")
        self.spec: WorkerSpec | None = None
        self.stopping = False
        self.outbox: deque[_Waiting] = deque()

    def joined(self) -> Joined:
        """What the coordinator is told about this process when it has joined."""
        hello = self.hello
        return Joined(
            endpoint=self.endpoint,
            role=self.role,
            pid=self.pid,
            ticket=hello.ticket,
            seat=hello.seat,
            function=hello.function,
            failure=hello.failure,
            gather=hello.gather,
            state_arrays=hello.state_arrays,
        )

    def left(self) -> Left:
        """What the coordinator is told about this process when it is gone."""
        hello = self.hello
        return Left(self.endpoint, self.role, self.pid, hello.ticket, hello.seat, hello.function)


class Users(NamedTuple):
    """Who is admitted besides root and the agent's own user; None: nobody else."""

    node: int | None = None
    """User id of coordinator and gateways that run in another container."""
    functions: int | None = None
    """User id of functions: zygotes and workers."""

    @property
    def are_others(self) -> bool:
        """Whether other users than the agent's own have to reach the socket."""
        return self.node is not None or self.functions is not None

    def roles_of(self, user: int) -> frozenset[Role]:
        """What processes of this user may be."""
        if user in (0, os.geteuid(), self.node):
            return frozenset(("coordinator", "gateway", "zygote", "worker"))
        return frozenset(("zygote", "worker")) if user == self.functions else frozenset()


_ONLY_OWN: Final = Users()


class _Ticket(NamedTuple):
    spec: WorkerSpec
    zygote: int
    """Endpoint of the zygote that was told to fork the worker."""


class Agent:
    """Serves the processes of one node; owns `router`, `factory` and `listener`, and works inside `poller`."""

    def __init__(
        self,
        listener: socket.socket,
        router: Router,
        factory: PoolFactory,
        poller: Poller,
        users: Users = _ONLY_OWN,
    ) -> None:
        self._users = users
        self.was_left = False
        """The coordinator has gone, and with it all that this agent was told; only where there are other users."""
        self._listener = listener
        self._router = router
        self._factory = factory
        self._poller = poller
        self._spare = SpareFile()
        self._strangers: dict[Peer, None] = {}
        self._peers: dict[int, Peer] = {}
        """Everyone admitted, by endpoint, in the order of joining."""
        self._coordinator: Peer | None = None
        self._tickets: dict[str, _Ticket] = {}
        """Workers asked for that have not come yet."""
        self._pools: dict[int, PoolMemory] = {}
        self._numbers: dict[Role, int] = {}
        listener.setblocking(False)
        poller.register(listener.fileno(), self._accept)

    def close(self) -> None:
        """Disconnect everyone and let pools and endpoints go."""
        for peer in [*self._strangers, *self._peers.values()]:
            self._poller.unregister(peer.channel.fileno())
            peer.channel.close()
            for waiting in peer.outbox:
                close_fds(waiting.fds)
        self._poller.unregister(self._listener.fileno())
        self._listener.close()
        for pool in self._pools.values():
            pool.close()
        self._router.close()
        self._factory.close()
        self._spare.close()

    # --- connections ---

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._spare.refuse(self._listener)
            return
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        pid, uid, _ = peer_credentials(sock)
        peer = Peer(sock, pid, self._users.roles_of(uid))
        if not peer.roles:
            self._refuse(peer, f"user {uid} is not the user of this node")
            return
        if len(self._strangers) >= _MAX_STRANGERS:
            self._disconnect(next(iter(self._strangers)))
        self._strangers[peer] = None
        self._poller.register(sock.fileno(), lambda events: self._ready(peer, events))

    def _ready(self, peer: Peer, events: int) -> None:
        try:
            if events & WRITE:
                self._flush(peer)
            if events & ~WRITE:
                for _ in range(_MESSAGES_A_TURN):
                    message, fds = peer.channel.receive()
                    self._handle(peer, message, fds)
        except BlockingIOError:
            return
        except (ProtocolError, Unavailable, RecursionError, OSError):
            self._disconnect(peer)  # one process's fault or bad luck (nesting, file descriptors), not the node's

    def _handle(self, peer: Peer, message: ToAgent, fds: list[int]) -> None:
        """Serve one message; `fds` are closed here unless a pool takes one."""
        try:
            if isinstance(message, Hello):
                if peer.endpoint:
                    raise ProtocolError("a second Hello")
                self._hello(peer, message)
            elif peer is self._coordinator:
                self._request(peer, message, fds)
            else:
                raise ProtocolError(f"{type(message).__name__} from who is not the coordinator")
        finally:
            close_fds(fds)

    def _disconnect(self, peer: Peer) -> None:
        """Forget a process: its end, or its fault."""
        if peer.channel.fileno() < 0:
            return
        self._poller.unregister(peer.channel.fileno())
        peer.channel.close()
        for waiting in peer.outbox:
            close_fds(waiting.fds)
        peer.outbox.clear()
        self._strangers.pop(peer, None)
        if self._peers.pop(peer.endpoint, None) is None:
            return
        if peer.role != "zygote":
            self._router.remove_endpoint(peer.endpoint)
        if peer is self._coordinator:
            self._coordinator = None
            if self._users.are_others:
                self.was_left = True
                self._poller.stop()
        else:
            self._tell_left(peer.left())
        if peer.role == "zygote":
            self._cancel_tickets(peer.endpoint)

    def _cancel_tickets(self, zygote: int) -> None:
        """Report the workers that a dead zygote still owed; those that have joined are not among them."""
        for ticket in [ticket for ticket, held in self._tickets.items() if held.zygote == zygote]:
            del self._tickets[ticket]
            self._tell_left(Left(0, "worker", 0, ticket))

    # --- sending ---

    def _send(self, peer: Peer, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Send now if possible, else keep it with copies of `fds`; give the process up when too much waits."""
        if not peer.outbox:
            try:
                peer.channel.send(message, fds)
                return
            except Unavailable as error:
                if not isinstance(error.__cause__, BlockingIOError):
                    return  # it is gone; the end of its connection says so too
                self._poller.modify(peer.channel.fileno(), READ | WRITE)
        if len(peer.outbox) >= _MAX_OUTBOX:
            self._give_up(peer)
        else:
            peer.outbox.append(_Waiting(message, [os.dup(fd) for fd in fds], ready=True))

    def _give_up(self, peer: Peer) -> None:
        """Have the end of this connection come up in the loop; the caller may be in the midst of something."""
        with contextlib.suppress(OSError):
            peer.channel.socket.shutdown(socket.SHUT_RDWR)

    def _flush(self, peer: Peer) -> None:
        while peer.outbox and peer.outbox[0].ready:
            waiting = peer.outbox[0]
            try:
                peer.channel.send(waiting.message, waiting.fds)
            except Unavailable as error:
                if isinstance(error.__cause__, BlockingIOError):
                    self._poller.modify(peer.channel.fileno(), READ | WRITE)
                    return
            peer.outbox.popleft()
            close_fds(waiting.fds)
        self._poller.modify(peer.channel.fileno(), READ)

    def _tell_coordinator(self, message: msgspec.Struct) -> None:
        if self._coordinator is not None:
            self._send(self._coordinator, message)

    def _tell_left(self, message: Left) -> None:
        """Report a death once the coordinator's socket holds all descriptors that were sent before it."""
        coordinator = self._coordinator
        if coordinator is None:
            return
        waiting = _Waiting(message, [], ready=False)
        coordinator.outbox.append(waiting)

        def delivered() -> None:
            waiting.ready = True
            if coordinator.channel.fileno() >= 0:
                self._flush(coordinator)

        self._router.when_delivered(coordinator.endpoint, delivered)

    # --- joining ---

    def _refuse(self, peer: Peer, reason: str) -> None:
        with contextlib.suppress(LiflError):
            peer.channel.send(RefusedJoin(reason))
        self._disconnect_stranger(peer)

    def _disconnect_stranger(self, peer: Peer) -> None:
        self._poller.unregister(peer.channel.fileno())
        self._strangers.pop(peer, None)
        peer.channel.close()

    def _hello(self, peer: Peer, hello: Hello) -> None:
        reason = self._why_not(peer, hello)
        if reason:
            self._refuse(peer, reason)
            raise Unavailable(reason)
        peer.role = hello.role
        peer.hello = hello
        peer.spec = self._tickets.pop(hello.ticket).spec if hello.role == "worker" else None
        number = self._numbers.get(hello.role, 0)
        endpoint = endpoint_id(hello.role, number)
        try:
            sockets = None if hello.role == "zygote" else self._router.add_endpoint(endpoint)
        except OSError as error:
            self._refuse(peer, f"the data plane has no room: {error}")
            if hello.role == "worker":
                self._tell_left(Left(0, "worker", peer.pid, hello.ticket))
            raise Unavailable(str(error)) from error
        self._numbers[hello.role] = number + 1
        peer.endpoint = endpoint
        self._strangers.pop(peer, None)
        self._peers[endpoint] = peer
        self._allow_defaults(peer)  # before the welcome: who is welcome may send at once
        self._welcome(peer, sockets)
        self._announce(peer)

    def _why_not(self, peer: Peer, hello: Hello) -> str:
        if hello.role not in peer.roles:
            return f"a process of this user cannot be a {hello.role}"
        if hello.role == "worker" and hello.ticket not in self._tickets:
            return "this ticket was not handed out, or it was used before"
        if hello.role == "zygote" and not hello.function:
            return "a zygote names its function"
        if hello.role == "coordinator" and self._coordinator is not None:
            if not _hung_up(self._coordinator.channel.socket):
                return f"process {self._coordinator.pid} is the coordinator"
            self._disconnect(self._coordinator)
        return ""

    def _welcome(self, peer: Peer, sockets: EndpointSockets | None) -> None:
        """Send the welcome with everything that belongs to it, and close our copies of the sockets."""
        pools = [] if sockets is None else self._pools_of(peer)
        pools, later = pools[:_POOLS_IN_WELCOME], pools[_POOLS_IN_WELCOME:]
        welcome = Welcome(
            endpoint=peer.endpoint,
            data_plane=self._router.data_plane,
            has_credit_page=sockets is not None,
            pools=tuple(pool.info for pool in pools),
            worker=peer.spec,
        )
        try:
            fds = (
                [] if sockets is None else [*sockets.filenos(), *(_handle_for(peer.role, pool) for pool in pools)]
            )
            self._send(peer, welcome, fds)
            for pool in later:
                self._send(peer, PoolAdded(pool.info), [_handle_for(peer.role, pool)])
        except (LiflError, OSError):
            self._give_up(peer)
        finally:
            if sockets is not None:
                sockets.close()

    def _pools_of(self, peer: Peer) -> list[PoolMemory]:
        if peer.role == "gateway":
            return list(self._pools.values())
        if peer.spec is not None:
            return [pool for pool in self._pools.values() if pool.info.job == peer.spec.job]
        return []

    def _allow_defaults(self, peer: Peer) -> None:
        """Coordinator with every worker and gateway, both ways; each gateway to each worker."""
        for other in self._peers.values():
            for source, destination in ((peer, other), (other, peer)):
                if (source.role, destination.role) in _DEFAULT_POLICY:
                    self._router.allow(source.endpoint, destination.endpoint)

    def _announce(self, peer: Peer) -> None:
        if peer.role != "coordinator":
            self._tell_coordinator(peer.joined())
            return
        self._coordinator = peer
        self._tickets.clear()
        for pool in list(self._pools):  # of a coordinator that is gone; the new one brings its own
            self._drop(pool)
        for other in self._peers.values():
            if other is not peer:
                self._tell_coordinator(other.joined())

    # --- requests of the coordinator ---

    def _request(self, peer: Peer, message: Request, fds: list[int]) -> None:
        done = Done(message.id)
        answer_fds: list[int] = []
        try:
            if isinstance(message, CreatePool):
                answer_fds = [self._create_pool(message, fds).fd]
            elif isinstance(message, DropPool):
                self._pool(message.pool)
                self._drop(message.pool)
            elif isinstance(message, ReclaimPool):
                self._pool(message.pool).reclaim()
            elif isinstance(message, Allow):
                for source, destination in message.pairs:
                    self._router.allow(source, destination)
            elif isinstance(message, StartWorkers):
                self._start_workers(message.workers)
            elif isinstance(message, StopWorkers):
                self._stop_workers(message.endpoints)
            else:
                done.traffic = self._router.traffic()
        except (LiflError, OSError) as error:
            done.error = str(error)
        self._send(peer, done, answer_fds)

    def _pool(self, pool: int) -> PoolMemory:
        if pool not in self._pools:
            raise LiflError(f"there is no pool {pool}")
        return self._pools[pool]

    def _create_pool(self, message: CreatePool, fds: list[int]) -> PoolMemory:
        info = message.info
        if info.pool in self._pools:
            if self._pools[info.pool].info != info:
                raise LiflError(f"pool {info.pool} exists and is another one")
            return self._pools[info.pool]
        if fds:
            memory = self._factory.adopt(info, fds.pop(0))
        else:
            memory = self._factory.create(info, sum(pool.unpopulated for pool in self._pools.values()))
        self._pools[info.pool] = memory
        for peer in self._gateways():
            self._send(peer, PoolAdded(info), [_handle_for("gateway", memory)])
        return memory

    def _drop(self, pool: int) -> None:
        self._pools.pop(pool).close()
        for peer in self._gateways():
            self._send(peer, PoolDropped(pool))

    def _gateways(self) -> list[Peer]:
        return [peer for peer in self._peers.values() if peer.role == "gateway"]

    def _start_workers(self, workers: tuple[WorkerSpec, ...]) -> None:
        """Hand each spec to the zygote of its function: all of them, or none and an error."""
        zygotes = {peer.hello.function: peer for peer in self._peers.values() if peer.role == "zygote"}
        groups: dict[str, list[WorkerSpec]] = {}
        for spec in workers:
            zygote = zygotes.get(spec.function)
            if zygote is None:
                raise LiflError(f"no zygote runs the function {spec.function}")
            if zygote.hello.failure:
                raise LiflError(f"the function {spec.function} cannot be loaded: {zygote.hello.failure}")
            if not spec.ticket or spec.ticket in self._tickets:
                raise LiflError("each worker needs a ticket of its own")
            groups.setdefault(spec.function, []).append(spec)
        if len({spec.ticket for spec in workers}) != len(workers):
            raise LiflError("each worker needs a ticket of its own")
        if len(self._tickets) + len(workers) > _MAX_TICKETS:
            raise LiflError(f"{len(self._tickets)} workers were asked for and have not come yet")
        for function, specs in groups.items():
            zygote = zygotes[function]
            self._tickets.update((spec.ticket, _Ticket(spec, zygote.endpoint)) for spec in specs)
            self._send(zygote, Fork(tuple(specs)))

    def _stop_workers(self, endpoints: tuple[int, ...]) -> None:
        """End the connections of these workers, which makes them exit; who is asked a second time is killed.

        Only our direction is shut down: `Left` follows when the process is gone, so that nobody takes over
        slots that it may still be writing.
        """
        for endpoint in endpoints:
            peer = self._peers.get(endpoint)
            if peer is None or peer.role != "worker":
                continue  # it has just died: `Left` is on its way
            # A worker whose connection its zygote has made is known by the pid of that one, which must live.
            others = [other.pid for other in self._peers.values() if other is not peer]
            if peer.stopping and peer.pid > 0 and peer.pid not in others:
                with contextlib.suppress(OSError):
                    os.kill(peer.pid, signal.SIGKILL)
            peer.stopping = True
            with contextlib.suppress(OSError):
                peer.channel.socket.shutdown(socket.SHUT_WR)


_DEFAULT_POLICY: Final = frozenset(
    {
        ("coordinator", "worker"),
        ("worker", "coordinator"),
        ("coordinator", "gateway"),
        ("gateway", "coordinator"),
        ("gateway", "worker"),
    }
)


def _handle_for(role: Role, pool: PoolMemory) -> int:
    """The file descriptor with the rights this role has: gateways write updates, workers aggregates."""
    writes = "updates" if role == "gateway" else "aggregates"
    return pool.fd if pool.info.kind == writes else pool.read_only_fd


def _hung_up(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLRDHUP)
    return bool(poller.poll(0))


# --- start ---------------------------------------------------------------------------------------------------


class _Plane(NamedTuple):
    router: Router
    reason: str


def _open_router(choice: str, credit: int, poller: Poller) -> _Plane:
    """Choose the data plane, and drop every capability that it does not need."""
    reason = "" if choice == "ebpf" else "asked for with --data-plane unix"
    if choice != "unix":
        drop_capabilities({CAP_BPF, CAP_NET_ADMIN})
        reason = ebpf_reason() or ""
        if not reason:
            from lifl_ebpf.router import EbpfRouter, EbpfUnavailable

            try:
                return _Plane(EbpfRouter(credit), "")
            except EbpfUnavailable as error:
                reason = str(error)
        if choice == "ebpf":
            raise LiflError(f"the eBPF data plane cannot be used: {reason}")
        say("agent", f"using the unix data plane, because {reason}")
    drop_capabilities()
    return _Plane(UnixRouter(poller, credit), reason)


def serve(
    runtime_directory: Path,
    data_plane: str,
    credit: int,
    announce: Callable[[str], None],
    users: Users = _ONLY_OWN,
) -> bool:
    """Run an agent until SIGTERM or SIGINT; returns whether it was left by its coordinator and has to begin anew.

    `announce` gets the line of JSON when the agent listens. Raises `LiflError` when the data plane that was
    asked for cannot be used.
    """
    path = runtime_directory / "agent.sock"
    os.umask(0o077)
    raise_file_limit()
    with contextlib.ExitStack() as undo:
        poller = Poller()
        undo.callback(poller.close)
        signals = StopSignals(poller, (signal.SIGTERM, signal.SIGINT))
        undo.callback(signals.close)
        factory = PoolFactory()
        plane = _open_router(data_plane, credit, poller)
        listener = listen(str(path), _BACKLOG, mode=0o666 if users.are_others else 0o600)
        mark = path.stat().st_ino
        agent = Agent(listener, plane.router, factory, poller, users)
        undo.callback(agent.close)
        undo.callback(_unlink, path, mark)
        announce(
            json.dumps(
                {
                    "data_plane": plane.router.data_plane,
                    "reason": plane.reason,
                    "huge_pages": factory.huge_pages,
                }
            )
        )
        poller.run()
        return agent.was_left and not signals.received


def _unlink(path: Path, mark: int) -> None:
    """Remove our socket, but not that of an agent which has replaced us."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ino == mark:
            path.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the agent; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m lifl_gateway.agent", description="the agent of a LIFL node")
    parser.add_argument("--runtime-directory", type=Path, required=True, help="where agent.sock is made")
    parser.add_argument("--data-plane", choices=("auto", "ebpf", "unix"), default="auto")
    parser.add_argument(
        "--credit", type=int, default=DEFAULT_CREDIT, help="descriptors that may wait unread at one process"
    )
    parser.add_argument("--node-user", type=int, metavar="UID", help="whose coordinator and gateways are admitted")
    parser.add_argument("--function-user", type=int, metavar="UID", help="whose functions are admitted")
    options = parser.parse_args(arguments)
    if options.credit < MINIMUM_CREDIT:
        parser.error(f"--credit must be at least {MINIMUM_CREDIT}, one full send")
    end_with_supervisor()
    users = Users(options.node_user, options.function_user)
    try:
        while serve(
            options.runtime_directory,
            options.data_plane,
            options.credit,
            lambda line: print(line, flush=True),
            users,
        ):
            say("agent", "the coordinator has gone; beginning anew")
    except (LiflError, OSError) as error:
        say("agent", str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Joining the agent: how every process of a node becomes part of the data plane."""

from __future__ import annotations

import contextlib
import mmap
import socket
from typing import NamedTuple

from lifl.control_channel import ControlChannel, close_fds
from lifl.endpoint import Endpoint
from lifl.errors import ProtocolError, Refused, Unavailable
from lifl.messages import FromAgent, Hello, RefusedJoin, Role, Welcome
from lifl.pool import MappedPool
from lifl.slot import PAGE


class AgentConnection(NamedTuple):
    """What a process has after joining; keep `channel` open, for its end is the process's end to the agent.

    A zygote must close `channel` in every process it forks, or its own death goes unnoticed.
    """

    channel: ControlChannel[FromAgent]
    welcome: Welcome
    endpoint: Endpoint | None
    """None for a zygote."""
    pools: dict[int, MappedPool]
    """By pool id. To a worker `updates` are read-only, to a gateway `aggregates` are."""

    def close(self) -> None:
        """Leave the node."""
        self.channel.close()
        if self.endpoint is not None:
            self.endpoint.close()
        for pool in self.pools.values():
            pool.close()


def join(
    agent_socket_path: str, hello: Hello, *, timeout: float = 30.0, keep_fds: bool = False
) -> AgentConnection:
    """Join the agent at `agent_socket_path` as `hello` says.

    `timeout` in seconds covers the answer; the channel returned has none. `keep_fds` keeps the file descriptor
    of each pool (`MappedPool.fd`). Raises `Unavailable` when no agent answers, `Refused` (status 403) when it
    does not admit this process, `ProtocolError` when it does not keep to the protocol.
    """
    return complete_join(begin_join(agent_socket_path, hello, timeout=timeout), hello.role, keep_fds=keep_fds)


def begin_join(agent_socket_path: str, hello: Hello, *, timeout: float = 30.0) -> ControlChannel[FromAgent]:
    """The first half of `join`: connect and introduce oneself; the answer is `complete_join`'s to read.

    From here on the end of the channel is the end of the process that has it, even before it has read an answer.
    """
    channel: ControlChannel[FromAgent] = ControlChannel.connect(agent_socket_path, FromAgent, timeout)
    try:
        channel.send(hello)
    except BaseException:
        channel.close()
        raise
    return channel


def complete_join(channel: ControlChannel[FromAgent], role: Role, *, keep_fds: bool = False) -> AgentConnection:
    """The second half of `join`: read the agent's answer. Raises as `join` and closes the channel then."""
    try:
        try:
            answer, fds = channel.receive()
        except TimeoutError as error:
            raise Unavailable(f"the agent did not answer within {channel.socket.gettimeout():g} s") from error
        if isinstance(answer, RefusedJoin):
            close_fds(fds)
            raise Refused(403, "the agent refused this process", answer.reason)
        if not isinstance(answer, Welcome):
            close_fds(fds)
            raise ProtocolError(f"the agent answered a Hello with {type(answer).__name__}")
        endpoint, pools = _unpack(role, answer, fds, keep_fds)
        channel.settimeout(None)
    except BaseException:
        channel.close()
        raise
    return AgentConnection(channel, answer, endpoint, pools)


def _unpack(
    role: Role, welcome: Welcome, fds: list[int], keep_fds: bool
) -> tuple[Endpoint | None, dict[int, MappedPool]]:
    sockets = 0 if role == "zygote" else 2
    if len(fds) != sockets + welcome.has_credit_page + len(welcome.pools):
        close_fds(fds)
        raise ProtocolError(f"the agent's welcome came with {len(fds)} file descriptors")
    with contextlib.ExitStack() as undo:
        left = list(fds)
        undo.callback(lambda: close_fds(left))
        near = undo.enter_context(socket.socket(fileno=left.pop(0))) if sockets else None
        far = undo.enter_context(socket.socket(fileno=left.pop(0))) if sockets else None
        page = _map_page(left.pop(0)) if welcome.has_credit_page else None
        pools: dict[int, MappedPool] = {}
        for info in welcome.pools:
            pools[info.pool] = undo.enter_context(MappedPool(info, left.pop(0), keep_fd=keep_fds))
        endpoint = Endpoint(welcome.endpoint, near, far, page) if near is not None and far is not None else None
        undo.pop_all()
    return endpoint, pools


def _map_page(fd: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        close_fds([fd])

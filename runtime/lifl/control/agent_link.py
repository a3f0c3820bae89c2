"""The coordinator's connection to its node's agent: requests with continuations, and events."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from lifl.agent_client import AgentConnection
from lifl.control_channel import close_fds
from lifl.messages import (
    Allow,
    CreatePool,
    Done,
    DropPool,
    GetTraffic,
    Joined,
    Left,
    PoolInfo,
    ReclaimPool,
    StartWorkers,
    StopWorkers,
    WorkerSpec,
)

Continuation = Callable[[Done, list[int]], None]


def _ignore(done: Done, fds: list[int]) -> None:
    close_fds(fds)


class AgentLink:
    """Sends requests over one connection and calls back with each answer; events go to `on_event`.

    Every method raises `Unavailable` when the agent is gone.
    """

    def __init__(self, connection: AgentConnection, on_event: Callable[[Joined | Left], None]) -> None:
        self._connection = connection
        self._on_event = on_event
        self._ids = itertools.count(1)
        self._waiting: dict[int, Continuation] = {}
        connection.channel.socket.setblocking(False)

    @property
    def connection(self) -> AgentConnection:
        """The connection itself."""
        return self._connection

    def process(self) -> None:
        """Handle everything that has arrived."""
        while True:
            try:
                message, fds = self._connection.channel.receive()
            except BlockingIOError:
                return
            if isinstance(message, Done):
                self._waiting.pop(message.id, _ignore)(message, fds)
            else:
                close_fds(fds)
                if isinstance(message, Joined | Left):
                    self._on_event(message)

    def _expect(self, then: Continuation | None) -> int:
        number = next(self._ids)
        self._waiting[number] = then or _ignore
        return number

    def create_pool(self, info: PoolInfo, memory: int | None, then: Continuation) -> None:
        """Make a pool, or have its memory adopted."""
        fds = () if memory is None else (memory,)
        self._connection.channel.send(CreatePool(self._expect(then), info), fds)

    def drop_pool(self, pool: int) -> None:
        """Forget a pool."""
        self._connection.channel.send(DropPool(self._expect(None), pool))

    def reclaim_pool(self, pool: int) -> None:
        """Give a pool's pages back."""
        self._connection.channel.send(ReclaimPool(self._expect(None), pool))

    def allow(self, pairs: tuple[tuple[int, int], ...], then: Continuation) -> None:
        """Open routes between endpoints."""
        self._connection.channel.send(Allow(self._expect(then), pairs))

    def start_workers(self, workers: tuple[WorkerSpec, ...], then: Continuation) -> None:
        """Fork workers."""
        self._connection.channel.send(StartWorkers(self._expect(then), workers))

    def stop_workers(self, endpoints: tuple[int, ...]) -> None:
        """End workers."""
        self._connection.channel.send(StopWorkers(self._expect(None), endpoints))

    def get_traffic(self, then: Continuation) -> None:
        """Read the router's counters."""
        self._connection.channel.send(GetTraffic(self._expect(then)))

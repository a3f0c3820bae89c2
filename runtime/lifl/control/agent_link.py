"""The coordinator's connection to its node's agent: requests with continuations, and events."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence

from lifl.agent_client import AgentConnection
from lifl.control_channel import close_fds
from lifl.errors import Unavailable
from lifl.messages import (
    Allow,
    CreatePool,
    Done,
    DropPool,
    GetTraffic,
    Joined,
    Left,
    Message,
    PoolInfo,
    ReclaimPool,
    StartWorkers,
    StopWorkers,
    WorkerSpec,
)

log = logging.getLogger("lifl.coordinator")

Continuation = Callable[[Done, list[int]], None]


def _ignore(done: Done, fds: list[int]) -> None:
    close_fds(fds)


class AgentLink:
    """Sends requests over one connection and calls back with each answer; events go to `on_event`.

    A request to an agent that has just died is lost without an error: the end of the connection, which `process`
    raises as `Unavailable`, has the coordinator do everything again with the next agent.
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

    def _send(self, message: Message, fds: Sequence[int] = ()) -> None:
        try:
            self._connection.channel.send(message, fds)
        except Unavailable as error:
            log.debug("not sent to the agent: %s", error)

    def _expect(self, then: Continuation | None) -> int:
        number = next(self._ids)
        self._waiting[number] = then or _ignore
        return number

    def create_pool(self, info: PoolInfo, memory: int | None, then: Continuation) -> None:
        """Make a pool, or have its memory adopted."""
        fds = () if memory is None else (memory,)
        self._send(CreatePool(self._expect(then), info), fds)

    def drop_pool(self, pool: int) -> None:
        """Forget a pool."""
        self._send(DropPool(self._expect(None), pool))

    def reclaim_pool(self, pool: int, then: Continuation) -> None:
        """Give a pool's pages back."""
        self._send(ReclaimPool(self._expect(then), pool))

    def allow(self, pairs: tuple[tuple[int, int], ...], then: Continuation) -> None:
        """Open routes between endpoints."""
        self._send(Allow(self._expect(then), pairs))

    def start_workers(self, workers: tuple[WorkerSpec, ...], then: Continuation) -> None:
        """Fork workers."""
        self._send(StartWorkers(self._expect(then), workers))

    def stop_workers(self, endpoints: tuple[int, ...]) -> None:
        """End workers."""
        self._send(StopWorkers(self._expect(None), endpoints))

    def get_traffic(self, then: Continuation) -> None:
        """Read the router's counters."""
        self._send(GetTraffic(self._expect(then)))

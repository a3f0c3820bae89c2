"""The clock of a simulation: things that happen at a time, in order."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any

Action = Callable[[Any], None]

_Queue = list[tuple[float, int, Action, Any]]


class EventLoop:
    """Carries out actions in the order of their times; those of one time as they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        """Simulated seconds."""
        self.events = 0
        """Actions carried out so far."""
        self._queue: _Queue = []
        self._chores: _Queue = []
        self._numbers = count()
        self._is_stopped = False

    def at(self, time: float, action: Action, argument: Any = None) -> None:
        """Have `action(argument)` carried out at a time, which is not before now."""
        heappush(self._queue, (time, next(self._numbers), action, argument))

    def chore_at(self, time: float, action: Action, argument: Any = None) -> None:
        """The same for what is done again and again and brings nothing forward by itself."""
        heappush(self._chores, (time, next(self._numbers), action, argument))

    def stop(self) -> None:
        """Have `run` return after the present action."""
        self._is_stopped = True

    def run(self) -> None:
        """Carry out what is planned until `stop` is called. Raises RuntimeError if only chores are left before."""
        queue, chores, events = self._queue, self._chores, 0
        self._is_stopped = False
        while not self._is_stopped:
            if not queue:
                raise RuntimeError("the simulation has come to a standstill")
            self.now, _, action, argument = heappop(chores if chores and chores[0] < queue[0] else queue)
            events += 1
            action(argument)
        self.events += events

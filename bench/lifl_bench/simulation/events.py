"""The clock of a simulation: things that happen at a time, in order."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any

Action = Callable[[Any], None]


class EventLoop:
    """Carries out actions in the order of their times; those of one time in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        """Simulated seconds."""
        self.events = 0
        """Actions carried out so far."""
        self._queue: list[tuple[float, int, Action, Any]] = []
        self._numbers = count()
        self._is_stopped = False

    def at(self, time: float, action: Action, argument: Any = None) -> None:
        """Have `action(argument)` carried out at a time, which is not before now."""
        heappush(self._queue, (time, next(self._numbers), action, argument))

    def stop(self) -> None:
        """Have `run` return after the present action."""
        self._is_stopped = True

    def run(self) -> None:
        """Carry out what is planned until `stop` is called. Raises RuntimeError if nothing is left before that."""
        queue, events = self._queue, 0
        self._is_stopped = False
        while not self._is_stopped:
            if not queue:
                raise RuntimeError("the simulation has come to a standstill")
            self.now, _, action, argument = heappop(queue)
            events += 1
            action(argument)
        self.events += events

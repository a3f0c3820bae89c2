"""A machine as its cores and links allow: many transfers and computations that share them.

Everything in progress is in a lane, among others of its kind, which all advance at one rate. Links are shared
equally among the transfers on them, cores equally among all that want them, where nothing gets more of a core than
it can use (max-min fairness). Within a lane what was begun with less work ends first, so an event costs O(log n).
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush
from itertools import count
from typing import Any

from lifl_bench.simulation.events import Action, EventLoop

_DONE = 1e-9
"""Work that counts as none: rounding leaves so much."""


class Link:
    """One direction of a network interface."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        """Units of work a second."""
        self.flows = 0


class Lane:
    """Work of one kind; its unit is whatever the kind is measured in (a transfer, a second of computing)."""

    __slots__ = ("count", "cpu_s", "is_busy", "link", "most", "queue", "rate", "served")

    def __init__(self, cpu_s: float, most: float, link: Link | None = None) -> None:
        self.cpu_s = cpu_s
        """CPU seconds of one unit."""
        self.most = most
        """Units a second that one of them makes at most."""
        self.link = link
        self.count = 0
        self.is_busy = False
        """Its host advances it."""
        self.rate = 0.0
        """Units a second that each makes now."""
        self.served = 0.0
        """Units that one which was always there would have got."""
        self.queue: list[tuple[float, int, Action, Any]] = []

    def limit(self) -> float:
        """Units a second that each would make with cores enough."""
        if self.link is None:
            return self.most
        return min(self.most, self.link.rate / self.link.flows)


class Host:
    """Cores that all its lanes share."""

    def __init__(self, loop: EventLoop, cores: float) -> None:
        self._loop = loop
        self._cores = cores
        self._busy: list[Lane] = []
        self._last = 0.0
        self._due = math.inf
        self._numbers = count()
        self._is_firing = False

    def start(self, lane: Lane, work: float, action: Action, argument: Any = None) -> None:
        """Begin something; `action(argument)` is called when its `work` units are done."""
        self._advance()
        if not lane.is_busy:
            lane.is_busy = True
            self._busy.append(lane)
        lane.count += 1
        if lane.link is not None:
            lane.link.flows += 1
        heappush(lane.queue, (lane.served + work, next(self._numbers), action, argument))
        if not self._is_firing:
            self._settle()

    def _advance(self) -> None:
        now = self._loop.now
        passed = now - self._last
        if passed > 0:
            for lane in self._busy:
                lane.served += lane.rate * passed
        self._last = now

    def _settle(self) -> None:
        """Find the rates anew, and have the next thing that ends noticed in time.

        If it ends later than was planned, the old event finds nothing done and plans again: cheaper than one event
        for every change.
        """
        self._share_cores()
        wait = math.inf
        for lane in self._busy:
            left = lane.queue[0][0] - lane.served
            wait = min(wait, left / lane.rate if left > 0 else 0.0)
        due = self._loop.now + wait
        if due < self._due:
            self._due = due
            self._loop.at(due, self._fire, due)

    def _share_cores(self) -> None:
        wanted = 0.0
        for lane in self._busy:
            lane.rate = lane.limit()
            wanted += lane.count * lane.rate * lane.cpu_s
        if wanted <= self._cores:
            return
        left, sharing = self._cores, sum(lane.count for lane in self._busy if lane.cpu_s)
        for lane in sorted(self._busy, key=lambda lane: lane.rate * lane.cpu_s):
            if not lane.cpu_s:
                continue
            share = min(lane.rate * lane.cpu_s, left / sharing)
            lane.rate = share / lane.cpu_s
            left -= share * lane.count
            sharing -= lane.count

    def _fire(self, due: float) -> None:
        if due != self._due:
            return
        self._is_firing = True
        self._advance()
        for lane in [*self._busy]:
            while lane.queue and self._is_done(lane):
                _, _, action, argument = heappop(lane.queue)
                lane.count -= 1
                if lane.link is not None:
                    lane.link.flows -= 1
                action(argument)
        for lane in self._busy:
            lane.is_busy = lane.count > 0
        self._busy = [lane for lane in self._busy if lane.count]
        self._is_firing = False
        self._due = math.inf
        self._settle()

    def _is_done(self, lane: Lane) -> bool:
        """Whether the lane's first has ended, or ends before the clock can tell the time from now."""
        left = lane.queue[0][0] - lane.served
        return left <= _DONE or self._last + left / lane.rate <= self._last


class Turns:
    """Pieces of work shorter than a time slice, or of one process: so many at a time, and the others wait.

    If they all shared the cores, things that begin together would end together, and be told in one request.
    """

    def __init__(self, host: Host, lane: Lane, most: int) -> None:
        """`lane` is one whose unit is a CPU second."""
        self._host = host
        self._lane = lane
        self._free = most
        self._waiting: deque[tuple[float, Action, Any]] = deque()

    def start(self, seconds: float, action: Action, argument: Any = None) -> None:
        """Do something when its turn comes; `action(argument)` is called when it is done."""
        if self._free:
            self._free -= 1
            self._host.start(self._lane, seconds, self._ended, (action, argument))
        else:
            self._waiting.append((seconds, action, argument))

    def _ended(self, done: tuple[Action, Any]) -> None:
        if self._waiting:
            seconds, action, argument = self._waiting.popleft()
            self._host.start(self._lane, seconds, self._ended, (action, argument))
        else:
            self._free += 1
        action, argument = done
        action(argument)

"""How long updates took from their first byte to folded: each one of a round, and a histogram for each job."""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import Final

import msgspec

from lifl.control.round import Round
from lifl.messages import JobLatencies, RoundUpdates, UpdateState

BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the histogram's buckets, in seconds."""

_PART_BYTES: Final = 128 * 1024
"""Of one answer: a message has to fit a socket's send buffer."""
_UPDATE_BYTES: Final = 240
"""At most, for an update in JSON without the client's id."""


class LatencyHistogram:
    """Counts the updates of a job by how long they took."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count one update."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds

    def state(self, job: str) -> JobLatencies:
        """What was counted so far."""
        return JobLatencies(job, tuple(self._counts), self._seconds)


def describe_updates(round_: Round, offset: int) -> RoundUpdates:
    """The updates of a round from `offset` on, as many as one message takes but at least one if there is one."""
    updates: list[UpdateState] = []
    room = _PART_BYTES
    for update in round_.log[offset : offset + _PART_BYTES // _UPDATE_BYTES]:
        room -= _UPDATE_BYTES + len(msgspec.json.encode(update.client))
        if room < 0 and updates:
            break
        updates.append(update.state())
    end = offset + len(updates)
    return RoundUpdates(
        round=round_.number,
        status=round_.status,
        monotonic=time.monotonic(),
        time=time.time(),
        total=len(round_.log),
        next=end if end < len(round_.log) else 0,
        updates=tuple(updates),
    )

"""Which update slots of one pool this gateway may write, and which of those are free.

A gateway has the slots whose index is its seat modulo the number of seats. A slot is free, held by a request that
fills it, or sent: then it belongs to the aggregators until the coordinator's RELEASE. Every use of a slot has its
own generation, so that a RELEASE that comes twice, or late, frees nothing that it does not mean.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class HeldSlot:
    """A slot that one request may write."""

    index: int
    generation: int
    """Counts the uses of the slot, modulo 2**32."""


class _State(Enum):
    FREE = 0
    HELD = 1
    RELEASED = 2
    """The RELEASE came while the request still held the slot."""
    SENT = 3


class SeatSlots:
    """The slots of one seat in one pool; every method may be called from any thread."""

    def __init__(self, generations: Mapping[int, int], busy: Iterable[int] = ()) -> None:
        """`generations`: the last generation of each slot of the seat; `busy`: those still in use."""
        self._lock = threading.Lock()
        self._generations = dict(generations)
        self._states = dict.fromkeys(self._generations, _State.FREE)
        for index in busy:
            if index in self._states:
                self._states[index] = _State.SENT
        # The slot freed last is taken first: its pages are the likeliest to be in a cache.
        self._free = [index for index, state in self._states.items() if state is _State.FREE][::-1]

    @property
    def total(self) -> int:
        """Slots of the seat."""
        return len(self._states)

    @property
    def free(self) -> int:
        """Slots that may be taken now."""
        return len(self._free)

    def take(self, keep: int = 0) -> HeldSlot | None:
        """Hold a free slot in a new generation; None when no more than `keep` are left."""
        with self._lock:
            if len(self._free) <= keep:
                return None
            index = self._free.pop()
            generation = (self._generations[index] + 1) & 0xFFFFFFFF
            self._generations[index] = generation
            self._states[index] = _State.HELD
            return HeldSlot(index, generation)

    def give_back(self, slot: HeldSlot) -> None:
        """Free a held slot: its update was not accepted."""
        with self._lock:
            if self._states[slot.index] in (_State.HELD, _State.RELEASED):
                self._set_free(slot.index)

    def mark_sent(self, slot: HeldSlot) -> bool:
        """Leave an accepted slot to the aggregators. False when it was released already: do not send it."""
        with self._lock:
            if self._states[slot.index] is _State.RELEASED:
                self._set_free(slot.index)
                return False
            self._states[slot.index] = _State.SENT
            return True

    def release(self, index: int, generation: int) -> bool:
        """Act on a RELEASE with the low 8 bits of a generation; False when it means nothing here."""
        with self._lock:
            state = self._states.get(index)
            if state is None or self._generations[index] & 0xFF != generation:
                return False
            if state is _State.SENT:
                self._set_free(index)
            elif state is _State.HELD:
                self._states[index] = _State.RELEASED
            return state is not _State.FREE

    def settle(self, busy: Mapping[int, int], believed_sent: Mapping[int, int]) -> None:
        """Free the slots of `believed_sent` that are still as they were then but that the coordinator, asked
        after that, does not name as `busy` (index to generation modulo 256): their RELEASE was lost."""
        with self._lock:
            for index, generation in believed_sent.items():
                same_use = self._states[index] is _State.SENT and self._generations[index] == generation
                if same_use and busy.get(index) != generation & 0xFF:
                    self._set_free(index)

    def sent(self) -> dict[int, int]:
        """The slots left to the aggregators, each with its generation."""
        with self._lock:
            return {i: self._generations[i] for i, state in self._states.items() if state is _State.SENT}

    def _set_free(self, index: int) -> None:
        self._states[index] = _State.FREE
        self._free.append(index)


def indices_of_seat(seat: int, seats: int, slots: int) -> range:
    """The slots that belong to a seat."""
    return range(seat, slots, seats)

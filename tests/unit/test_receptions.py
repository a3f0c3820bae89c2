"""Partial aggregates that wait for their senders, and the memory that they hold meanwhile."""

from __future__ import annotations

from typing import cast

import pytest
from lifl.peer.connection import Connection
from lifl.peer.protocol import PartialOffer, PartialStatus
from lifl.peer.receptions import Full, Reception, Receptions

CONNECTION = cast(Connection, object())


class Slots:
    """Memory for so many."""

    def __init__(self, count: int) -> None:
        self.free = count

    def take(self) -> Slot:
        if not self.free:
            raise Full("Full", "all slots are in use")
        self.free -= 1
        return Slot(self)


class Slot:
    view = memoryview(bytearray(8))

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def commit(self) -> PartialStatus:
        return "accepted"

    def abandon(self) -> None:
        self._slots.free += 1


def offer(source: str) -> PartialOffer:
    return PartialOffer(
        job="job",
        nonce=1,
        round=1,
        attempt=0,
        epoch=1,
        source=source,
        sequence=1,
        nbytes=8,
        inputs=1,
        updates=1,
        weight=1.0,
        delta_weight=0.0,
    )


def begin(receptions: Receptions, slots: Slots, source: str) -> Reception:
    reception = receptions.begin(offer(source), CONNECTION, slots.take)
    assert reception is not None
    return reception


def test_what_waits_for_its_sender_gives_way_when_there_is_no_memory_for_another() -> None:
    receptions, slots = Receptions(), Slots(2)
    first, second = begin(receptions, slots, "a"), begin(receptions, slots, "b")
    receptions.pause(first)
    receptions.pause(second)
    begin(receptions, slots, "c")
    assert begin(receptions, slots, "b") is second, "the one that has waited for the longest goes first"
    with pytest.raises(Full):
        begin(receptions, slots, "a")
    receptions.end(second)
    second.sink.abandon()
    assert begin(receptions, slots, "a") is not first
    receptions.close()


def test_what_is_being_received_never_gives_way() -> None:
    receptions, slots = Receptions(), Slots(1)
    begin(receptions, slots, "a")
    with pytest.raises(Full):
        begin(receptions, slots, "b")
    receptions.close()

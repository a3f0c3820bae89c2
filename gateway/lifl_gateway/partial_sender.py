"""Sending partial aggregates to the nodes that want them: one thread, as often as it takes.

Where one goes is asked before each attempt, because it may change at any time: another node becomes the top of the
round, or the round starts again. Nothing is lost here: what is not sent stays in the aggregator's slot, and the
coordinator knows of it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Final

from lifl.errors import Busy, LiflError, ProtocolError
from lifl.logs import say
from lifl.messages import Acknowledged, DescribeUplink, PartialSent, Uplink
from lifl.peer.checksum import FileRange
from lifl.peer.client import Outgoing, push
from lifl.peer.interruption import Interruption
from lifl.peer.protocol import PartialOffer
from lifl.peer.security import Credentials
from lifl.peer.transfer import Pace
from lifl.pool import MappedPool
from lifl.slot import Seal, split_slot_reference

from lifl_gateway.coordinator_client import CoordinatorClient
from lifl_gateway.metrics import Metrics
from lifl_gateway.node_link import NodeLink

_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 2.0
# Before that it is nothing unusual: the other node may hear of the round a moment later.
_REPORTED_ATTEMPTS: Final = 6


@dataclass(frozen=True)
class _Sealed:
    """A finished accumulator in its slot."""

    memory: MappedPool
    index: int
    seal: Seal

    @classmethod
    def in_slot(cls, memory: MappedPool, index: int) -> _Sealed:
        """Read the slot's seal; raises ProtocolError when there is none: then it is being written, or gone."""
        seal = Seal.unpack_from(memory.header(index)) if index < memory.info.slots else None
        if seal is None or seal.pool_nonce != memory.info.nonce:
            raise ProtocolError(f"slot {index} of pool {memory.info.pool} has no seal")
        return cls(memory, index, seal)

    def is_current(self) -> bool:
        """Whether the slot still has this seal, so that nobody has written the sums either."""
        return Seal.unpack_from(self.memory.header(self.index)) == self.seal


class _Waiting:
    """A partial aggregate that is to be sent."""

    def __init__(self, slot: int, round_number: int) -> None:
        self.slot = slot
        self.round = round_number
        self.due = 0.0
        self.pause = _FIRST_PAUSE_SECONDS
        self.attempts = 0
        self.sealed: _Sealed | None = None
        self.outgoing: Outgoing | None = None

    def load(self, sealed: _Sealed, nbytes: int) -> Outgoing:
        """The bytes, with the checksum of the last attempt if they are the same."""
        if self.outgoing is None or sealed != self.sealed or self.outgoing.segments[0].nbytes != nbytes:
            memory, index = sealed.memory, sealed.index
            view = memory.payload(index, nbytes)
            self.sealed = sealed
            self.outgoing = Outgoing(FileRange(memory.fd, memory.payload_offset(index), nbytes, view))
        return self.outgoing

    def postpone(self, wish: float) -> None:
        """Try again after the time that the other node wishes; if it has no wish, later each time."""
        self.due = time.monotonic() + (wish or self.pause)
        if not wish:
            self.pause = min(self.pause * 2, _LONGEST_PAUSE_SECONDS)


class PartialSender:
    """Sends what `take` is told of; every method may be called from any thread."""

    def __init__(
        self,
        coordinator: CoordinatorClient,
        link: NodeLink,
        credentials: Credentials,
        pace: Pace,
        metrics: Metrics,
    ) -> None:
        self._coordinator = coordinator
        self._metrics = metrics
        self._link = link
        self._credentials = credentials
        self._pace = pace
        self._interruption = Interruption()
        self._changed = threading.Condition()
        self._waiting: dict[int, _Waiting] = {}
        self._thread = threading.Thread(target=self._run, name="partial-sender", daemon=True)

    def start(self) -> None:
        """Start the thread; it sleeps while there is nothing to send."""
        self._thread.start()

    def take(self, slot: int, round_number: int) -> None:
        """Have the partial aggregate in this slot of an aggregates pool sent; never waits.

        Another one that waits in the same slot is forgotten: it has been overwritten.
        """
        with self._changed:
            self._waiting[slot] = _Waiting(slot, round_number)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the thread, whatever it is sending."""
        self._interruption.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(_STOP_SECONDS)

    # --- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (waiting := self._next()) is not None:
            is_done = self._try(waiting)
            with self._changed:
                if is_done and self._waiting.get(waiting.slot) is waiting:
                    del self._waiting[waiting.slot]

    def _next(self) -> _Waiting | None:
        """Wait until one is due; None when stopped."""
        with self._changed:
            while not self._interruption.is_set:
                first = min(self._waiting.values(), key=lambda each: each.due, default=None)
                left = None if first is None else first.due - time.monotonic()
                if first is not None and left is not None and left <= 0:
                    return first
                self._changed.wait(left)
        return None

    def _try(self, waiting: _Waiting) -> bool:
        """One attempt; True when there is nothing more to do."""
        wish = 0.0
        try:
            problem = self._attempt(waiting)
        except Busy as error:
            problem, wish = str(error), min(error.retry_after, _LONGEST_PAUSE_SECONDS)
        except LiflError as error:  # Refused too: perhaps the other node has not yet heard that it shall take it
            problem = str(error)
        if problem is None or self._interruption.is_set:
            return True
        waiting.attempts += 1
        self._metrics.partial_attempts.labels("failed").inc()
        if waiting.attempts == _REPORTED_ATTEMPTS:
            say("gateway", f"a partial aggregate is still not sent: {problem}")
        waiting.postpone(wish)
        return False

    def _attempt(self, waiting: _Waiting) -> str | None:
        """Send it to where it belongs now. Returns why it has to be tried again; None when not."""
        uplink = self._coordinator.ask(DescribeUplink(waiting.slot, waiting.round), Uplink)
        if not uplink.peer_address:
            return None
        pool, index = split_slot_reference(waiting.slot)
        sealed = _Sealed.in_slot(self._link.memory(pool), index)
        if sealed.seal.round != uplink.round:
            return f"the slot has round {sealed.seal.round}, wanted is {uplink.round}"
        if uplink.nbytes > sealed.memory.geometry.payload_capacity:
            return f"{uplink.nbytes} bytes are more than a slot has"
        outgoing = waiting.load(sealed, uplink.nbytes)
        status = push(
            uplink.peer_address,
            _offer(uplink, sealed.seal),
            outgoing,
            credentials=self._credentials,
            pace=self._pace,
            interruption=self._interruption,
            is_current=sealed.is_current,
        )
        if status == "corrupt":
            waiting.outgoing = None  # which of both was wrong, bytes or checksum, nobody knows
        if status not in ("accepted", "duplicate"):
            return f"{uplink.peer_address} says that it is {status}"
        self._metrics.partial_attempts.labels("sent").inc()
        if status == "accepted":  # of a duplicate no byte was sent
            self._metrics.partial_bytes.labels("out").inc(uplink.nbytes)
        sent = PartialSent(uplink.job, uplink.round, uplink.attempt, uplink.epoch)
        self._coordinator.ask(sent, Acknowledged)
        return None


def _offer(uplink: Uplink, seal: Seal) -> PartialOffer:
    return PartialOffer(
        job=uplink.job,
        nonce=uplink.nonce,
        round=uplink.round,
        attempt=uplink.attempt,
        epoch=uplink.epoch,
        source=uplink.source,
        sequence=seal.sequence,
        nbytes=uplink.nbytes,
        inputs=seal.inputs,
        updates=seal.updates,
        weight=seal.weight,
        delta_weight=seal.delta_weight,
    )

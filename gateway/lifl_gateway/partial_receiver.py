"""Taking in partial aggregates of other nodes: from the socket straight into an update slot, counted once.

The slot's header page keeps an update header, for the generation, and gets the seal behind it once all is there.
"""

from __future__ import annotations

from lifl.errors import Refused, Unavailable
from lifl.messages import CommitPartial, OfferPartial, PartialVerdict
from lifl.peer.protocol import PartialOffer, PartialStatus
from lifl.peer.receptions import Full
from lifl.slot import PARTIAL_SEAL_OFFSET, Seal, UpdateHeader, erase_header

from lifl_gateway.coordinator_client import CoordinatorClient
from lifl_gateway.metrics import Metrics
from lifl_gateway.node_link import NodeLink, UpdatePool
from lifl_gateway.slots import HeldSlot

_COMMIT_SECONDS = 60.0


class PartialReceiver:
    """Finds room for partial aggregates; usable from any thread."""

    def __init__(self, coordinator: CoordinatorClient, link: NodeLink, metrics: Metrics) -> None:
        self.coordinator = coordinator
        self.link = link
        self.metrics = metrics
        self.is_in_doubt = False
        """The answer to some CommitPartial never came, so a slot may be free that we believe in use."""

    def open(self, offer: PartialOffer) -> PartialSlot | None:
        """Ask the coordinator and take a slot; None when the partial aggregate is part of the round already.

        Raises Refused 409 when it is not wanted and 413 when it does not fit a slot, Busy when no slot is free,
        Unavailable while a part of the node is away.
        """
        gateway = self.link.endpoint_id
        question = OfferPartial(
            job=offer.job,
            nonce=offer.nonce,
            round=offer.round,
            attempt=offer.attempt,
            epoch=offer.epoch,
            source=offer.source,
            nbytes=offer.nbytes,
        )
        verdict = self.coordinator.ask(question, PartialVerdict)
        if verdict.status == "refused":
            raise Refused(409, "Not wanted", f"this node does not take it for round {offer.round}")
        if verdict.status != "open":
            return None
        pool = self.link.update_pool_of(offer.job, verdict.updates_pool)
        capacity = pool.memory.geometry.payload_capacity
        if offer.nbytes > capacity:
            raise Refused(413, "Content Too Large", f"{offer.nbytes} bytes do not fit a slot of {capacity}")
        return PartialSlot(self, offer, pool, self._take_slot(pool, offer), verdict.aggregates_nonce, gateway)

    def _take_slot(self, pool: UpdatePool, offer: PartialOffer) -> HeldSlot:
        if self.is_in_doubt:
            self.link.settle_slots()
            self.is_in_doubt = False
        slot = pool.slots.take()
        if slot is None:
            raise Full("Full", "all slots are in use", retry_after=0.1)
        page = pool.memory.header(slot.index)
        erase_header(page, PARTIAL_SEAL_OFFSET)
        # As for updates, the generation is in memory before the use.
        UpdateHeader(slot.generation, offer.round, False, 0.0, 0, offer.nbytes, "").pack_into(page)
        return slot


class PartialSlot:
    """An update slot that one partial aggregate is received into, as `lifl.peer.server.Sink`."""

    def __init__(
        self,
        receiver: PartialReceiver,
        offer: PartialOffer,
        pool: UpdatePool,
        slot: HeldSlot,
        aggregates_nonce: int,
        gateway: int,
    ) -> None:
        self._receiver = receiver
        self._offer = offer
        self._pool = pool
        self._slot = slot
        self._aggregates_nonce = aggregates_nonce
        self._gateway = gateway
        self.view = pool.memory.payload(slot.index, offer.nbytes)

    def commit(self) -> PartialStatus:
        """Seal it, have it counted, and tell the aggregator. Raises Refused, Busy, or Unavailable."""
        try:
            self._write_seal()
            verdict = self._receiver.coordinator.ask(self._question(), PartialVerdict, _COMMIT_SECONDS)
        except Unavailable:  # perhaps it counts: then its RELEASE will come
            self._receiver.is_in_doubt = True
            self._pool.slots.mark_sent(self._slot)
            raise
        except BaseException:
            self.abandon()
            raise
        if verdict.status != "accepted":
            self.abandon()
            return "duplicate" if verdict.status == "duplicate" else "refused"
        self._send(verdict.destination)
        self._receiver.metrics.partial_bytes.labels("in").inc(self._offer.nbytes)
        return "accepted"

    def abandon(self) -> None:
        """Free the slot."""
        self._pool.slots.give_back(self._slot)

    def _write_seal(self) -> None:
        offer = self._offer
        seal = Seal(
            pool_nonce=self._aggregates_nonce,
            round=offer.round,
            sequence=offer.sequence,
            inputs=offer.inputs,
            updates=offer.updates,
            weight=offer.weight,
            delta_weight=offer.delta_weight,
            recent=(),
        )
        seal.pack_into(self._pool.memory.header(self._slot.index), PARTIAL_SEAL_OFFSET)

    def _question(self) -> CommitPartial:
        offer = self._offer
        return CommitPartial(
            job=offer.job,
            nonce=offer.nonce,
            round=offer.round,
            attempt=offer.attempt,
            epoch=offer.epoch,
            source=offer.source,
            slot=self._pool.reference(self._slot.index),
            generation=self._slot.generation & 0xFF,
            gateway=self._gateway,
            updates=offer.updates,
            nbytes=offer.nbytes,
        )

    def _send(self, destination: int) -> None:
        if self._pool.slots.mark_sent(self._slot) and destination:
            reference = self._pool.reference(self._slot.index)
            self._receiver.link.send_partial(destination, reference, self._offer.round, self._slot.generation)

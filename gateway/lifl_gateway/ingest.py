"""Taking in a model update: from the socket straight into a slot, and nothing twice.

What can be checked from the headers is checked before the body is read. Then the safetensors header is compared
with the model's, the payload is received on its place in the slot, the coordinator counts the update, and its
descriptor goes to the aggregator.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import msgspec
from lifl.errors import Busy, InvalidModel, LiflError, Refused, Unavailable
from lifl.messages import Abandon, Acknowledged, Admit, Commit, JobSpec, JobState, Verdict
from lifl.slot import UpdateHeader

from lifl_gateway.coordinator_client import ANSWER_SECONDS, CoordinatorClient
from lifl_gateway.event import (
    PAYLOAD_TYPES,
    STRUCTURED_TYPE,
    UpdateEvent,
    event_from_headers,
    event_from_json,
)
from lifl_gateway.layouts import JobLayout, JobLayouts
from lifl_gateway.metrics import Metrics
from lifl_gateway.node_link import NodeLink, UpdatePool, header_room
from lifl_gateway.participation import not_selected
from lifl_gateway.problems import Elsewhere, Late, untimely
from lifl_gateway.slots import HeldSlot
from lifl_gateway.tokens import Identity
from lifl_gateway.transfer import PeerGone, TooSlow

LENGTH_BYTES: Final = 8
"""The little-endian length before a safetensors header."""

_SMALLEST_BODY: Final = LENGTH_BYTES + 2
_COMMIT_SECONDS: Final = 60.0
# Of a shard: its update waits for the parts in the others.
_PART_SECONDS: Final = 600.0
# Of an asynchronous job: the answer may have to wait until a buffer is closed.
_ADMIT_SECONDS: Final = 60.0
_EVENT_ROOM: Final = 64 * 1024
# Structured events are held in memory, decoded and not, so only few at a time.
_STRUCTURED_AT_ONCE: Final = 2


class Body(Protocol):
    """Where an update's bytes come from."""

    remaining: int

    def fill(self, view: memoryview) -> None:
        """Fill `view` completely with the next bytes."""


class _Memory:
    """The data of a structured event as a Body."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.remaining = len(data)

    def fill(self, view: memoryview) -> None:
        view[:] = self._data[: len(view)]
        self._data = self._data[len(view) :]
        self.remaining -= len(view)


@dataclass(frozen=True)
class Outcome:
    """What became of an update that was not refused."""

    status: Literal["accepted", "duplicate"]
    round: int
    """The round that it counts in; of a duplicate the one that it names."""


@dataclass
class _Upload:
    """An upload that the coordinator has admitted: it has to hear of the end."""

    gateway: int
    """The endpoint under which it was admitted."""
    is_committed: bool = False


@dataclass(frozen=True)
class _Place:
    """Where an update may go: its job's layout and pool."""

    state: JobState
    layout: JobLayout
    pool: UpdatePool
    kept_slots: int
    """Slots to leave free."""

    @property
    def most_bytes(self) -> int:
        """Longest body that can be an update of this job."""
        return LENGTH_BYTES + self.pool.memory.geometry.header_capacity + self.layout.payload_bytes


class Ingest:
    """Takes in updates; usable from any thread."""

    def __init__(
        self, coordinator: CoordinatorClient, link: NodeLink, layouts: JobLayouts, metrics: Metrics
    ) -> None:
        self._coordinator = coordinator
        self._link = link
        self._layouts = layouts
        self._metrics = metrics
        self._structured = threading.BoundedSemaphore(_STRUCTURED_AT_ONCE)
        self._in_doubt = False
        """The answer to some Commit never came, so a slot may be free that we believe in use."""

    def take_in(self, state: JobState, environ: Mapping[str, Any], identity: Identity) -> Outcome:
        """Take in the update of one request for a running job.

        Raises Refused (Late, Busy) or InvalidModel for what the client can change, Unavailable while a part of
        the node is away, TooSlow or PeerGone when the body does not come.
        """
        started = environ["lifl.started"]
        try:
            outcome = self._take_in(state, environ, identity, started)
        except LiflError as error:
            self._metrics.updates.labels(_outcome_of(error)).inc()
            raise
        self._metrics.updates.labels(outcome.status).inc()
        if outcome.status == "accepted":
            self._metrics.ingest_seconds.observe(time.monotonic() - started)
        return outcome

    def _take_in(self, state: JobState, environ: Mapping[str, Any], identity: Identity, started: float) -> Outcome:
        media_type = environ.get("CONTENT_TYPE", "").split(";")[0].strip().lower()
        if media_type == STRUCTURED_TYPE:
            return self._take_in_structured(state, environ["wsgi.input"], identity, started)
        if media_type not in PAYLOAD_TYPES:
            known = ", ".join((*PAYLOAD_TYPES, STRUCTURED_TYPE))
            raise Refused(415, "Unsupported Media Type", f"send the update as one of {known}")
        event = event_from_headers(environ)
        identity.require_client(event.client)
        return self._admit_and_store(event, state, environ["wsgi.input"], started)

    def _take_in_structured(self, state: JobState, body: Body, identity: Identity, started: float) -> Outcome:
        """A structured event has its attributes in the body, so all of it is read before anything is asked."""
        place = self._place(state)
        most = -(-place.most_bytes // 3) * 4 + _EVENT_ROOM
        if body.remaining > most:
            raise Refused(413, "Content Too Large", f"an event of at most {most} bytes is expected")
        if not self._structured.acquire(blocking=False):
            raise Busy("Busy", "too many structured events at once; binary mode has no such limit")
        try:
            received = bytearray(body.remaining)
            body.fill(memoryview(received))
            event, data = event_from_json(received)
            del received
            identity.require_client(event.client)
            return self._admit_and_store(event, state, _Memory(data), started)
        finally:
            self._structured.release()

    def _place(self, state: JobState, updates_pool: int = -1) -> _Place:
        """Where the update may go. `updates_pool` is the job's pool if that may be newer than `state`, as on the
        nodes of a cluster.

        There the updates for the next buffer of an asynchronous job wait in their slots for the end of the present
        one. That needs the sums of other nodes, so they must always find a slot.
        """
        is_shared = updates_pool >= 0
        if is_shared:
            state = msgspec.structs.replace(state, updates_pool=updates_pool)
        kept = 1 if is_shared and state.spec.mode == "async" else 0
        return _Place(state, self._layouts.of(state), self._link.update_pool(state), kept)

    def _admit_and_store(self, event: UpdateEvent, state: JobState, body: Body, started: float) -> Outcome:
        """Asks first whether the update is wanted here: only then must the job's memory be on this node."""
        _check_kind(event, state.spec)
        gateway = self._link.endpoint_id
        seconds = _ADMIT_SECONDS if state.spec.mode == "async" else ANSWER_SECONDS
        verdict = self._admit(event, state.job, gateway, seconds)
        if verdict.status != "open":
            return _not_taken(verdict, event, state.spec)
        upload = _Upload(gateway)
        try:
            place = self._place(state, verdict.updates_pool)
            _check_size(body.remaining, place.most_bytes)
            return self._store(event, place, body, started, upload)
        finally:
            if not upload.is_committed:
                self._abandon(event, state.job, gateway)

    def _abandon(self, event: UpdateEvent, job: str, gateway: int) -> None:
        with contextlib.suppress(LiflError):  # a coordinator that is away has forgotten the upload anyway
            self._coordinator.ask(Abandon(job, event.round, event.client, gateway), Acknowledged)

    def _admit(self, event: UpdateEvent, job: str, gateway: int, seconds: float) -> Verdict:
        """Ask whether the update would be taken."""
        question = Admit(job, event.round, event.client, event.event_id, gateway)
        return self._coordinator.ask(question, Verdict, seconds)

    def _store(self, event: UpdateEvent, place: _Place, body: Body, started: float, upload: _Upload) -> Outcome:
        slot = self._take_slot(place)
        is_in_doubt = False
        try:
            filled = _receive(slot, place, body)
            _write_header(slot, place, event, filled)
            try:
                upload.is_committed = True
                verdict = self._commit(slot, place, event, started, upload.gateway)
            except Unavailable:
                is_in_doubt = self._in_doubt = True
                raise
        except BaseException:
            if is_in_doubt:  # perhaps it counts: then its RELEASE will come
                place.pool.slots.mark_sent(slot)
            else:
                place.pool.slots.give_back(slot)
            raise
        if verdict.status != "accepted":
            place.pool.slots.give_back(slot)
            return _not_taken(verdict, event, place.state.spec)
        self._send(slot, place.pool, verdict)
        self._metrics.received_bytes.inc(filled.received_bytes)
        return Outcome("accepted", verdict.round)

    def _take_slot(self, place: _Place) -> HeldSlot:
        pool = place.pool
        if self._in_doubt:
            self._link.settle_slots()
            self._in_doubt = False
        slot = pool.slots.take(place.kept_slots)
        if slot is None:
            raise Busy("Full", "all slots for updates are in use; send it again in a moment")
        # The generation is in memory before the use: a gateway started anew on this seat goes on from it.
        UpdateHeader(slot.generation, 0, False, 0.0, 0, 0, "").pack_into(pool.memory.header(slot.index))
        return slot

    def _commit(self, slot: HeldSlot, place: _Place, event: UpdateEvent, started: float, gateway: int) -> Verdict:
        question = Commit(
            job=place.state.job,
            round=event.round,
            client=event.client,
            event_id=event.event_id,
            slot=place.pool.reference(slot.index),
            generation=slot.generation & 0xFF,
            num_samples=event.num_samples,
            started=started,
            gateway=gateway,
            update=event.update,
        )
        seconds = _PART_SECONDS if place.state.spec.shard_of else _COMMIT_SECONDS
        return self._coordinator.ask(question, Verdict, seconds)

    def _send(self, slot: HeldSlot, pool: UpdatePool, verdict: Verdict) -> None:
        if pool.slots.mark_sent(slot) and verdict.destination:
            reference = pool.reference(slot.index)
            self._link.send_update(verdict.destination, reference, verdict.round, slot.generation)


def _check_kind(event: UpdateEvent, spec: JobSpec) -> None:
    """Raise Refused 422 for new weights in a job where nobody could tell what of them was learnt."""
    if spec.mode == "async" and not event.is_delta:
        raise Refused(
            422,
            "Not a difference",
            f"{spec.name!r} is an asynchronous job, whose model may have moved on since round {event.round}: send "
            f"your new weights minus the model of round {event.round}, with ce-kind: delta",
        )


def _check_size(nbytes: int, most: int) -> None:
    if nbytes < _SMALLEST_BODY:
        raise InvalidModel(f"{nbytes} bytes are no safetensors file")
    if nbytes > most:
        raise Refused(413, "Content Too Large", f"an update of this job has at most {most} bytes, not {nbytes}")


@dataclass(frozen=True)
class _Filled:
    """What a slot was filled with. Bytes."""

    layout_bytes: int
    """Safetensors header in the header room; 0 when it is the model's own."""
    payload_bytes: int
    received_bytes: int


def _receive(slot: HeldSlot, place: _Place, body: Body) -> _Filled:
    """Receive a whole body into a slot: header to the header room, payload to its place."""
    room = header_room(place.pool.memory, slot.index)
    received_bytes = body.remaining
    length = bytearray(LENGTH_BYTES)
    body.fill(memoryview(length))
    claimed = int.from_bytes(length, "little")
    most = min(len(room), body.remaining)
    if claimed > most:
        raise InvalidModel(f"the safetensors header claims {claimed} bytes; at most {most} are possible here")
    body.fill(room[:claimed])
    header = bytes(room[:claimed])
    payload_bytes = place.layout.payload_of(header)
    if body.remaining != payload_bytes:
        raise InvalidModel(f"the tensors take {payload_bytes} bytes, but {body.remaining} follow the header")
    body.fill(place.pool.memory.payload(slot.index, payload_bytes))
    return _Filled(0 if header == place.layout.header else claimed, payload_bytes, received_bytes)


def _write_header(slot: HeldSlot, place: _Place, event: UpdateEvent, filled: _Filled) -> None:
    header = UpdateHeader(
        generation=slot.generation,
        round=event.round,
        is_delta=event.is_delta,
        num_samples=event.num_samples,
        layout_bytes=filled.layout_bytes,
        payload_bytes=filled.payload_bytes,
        client=event.client,
    )
    header.pack_into(place.pool.memory.header(slot.index))


def _not_taken(verdict: Verdict, event: UpdateEvent, spec: JobSpec) -> Outcome:
    """A duplicate is a success; raises Late, Elsewhere or another Refused for the others."""
    if verdict.status == "duplicate":
        return Outcome("duplicate", event.round)
    if verdict.status == "elsewhere":
        raise Elsewhere(verdict.address)
    if verdict.status == "unselected":
        raise not_selected(verdict.round)
    if verdict.status == "early":
        raise untimely("early", event.round, verdict.round)
    if spec.mode == "async":
        raise Late("Late", _too_old(event.round, verdict.round, spec.max_staleness), verdict.round)
    raise untimely("late", event.round, verdict.round)


def _too_old(base: int, open_round: int, most: int) -> str:
    return f"round {open_round} takes differences to models up to {most} rounds old, not to that of round {base}"


def _outcome_of(error: LiflError) -> str:
    if isinstance(error, Late):
        return error.title.lower()
    if isinstance(error, Busy):
        return "full"
    if isinstance(error, PeerGone | TooSlow):
        return "incomplete"
    return "refused"

"""Serves an aggregator over plain HTTP CloudEvents, in Knative's Python function contract.

The same function file that folds from shared memory on a LIFL node answers here behind a broker or any other
CloudEvents client, with the same fold. Every input is one request; the request that completes the aggregation
goal is answered with the result, all others with an empty 202.

| event type | data (safetensors) | extension attributes |
|---|---|---|
| `dev.lifl.update.v1` | a client's model update | round, numsamples, kind (`delta` or nothing) |
| `dev.lifl.partial.v1` | weighted sums, float32 or float64 | round, weight, deltaweight, updates |
| `dev.lifl.model.v1` | the model that a round starts from | round |

A `leaf` answers with a partial, the `top` with the model of the next round. A model that is posted fixes the
layout; without one the first input does, and then neither deltas nor server optimisers can be used.

Settings, from the environment: LIFL_GOAL (inputs of a round, default 2), LIFL_ROLE (`leaf` or `top`, the default),
LIFL_PRECISION (`float32` or `float64` sums), LIFL_MAX_BODY_BYTES (default 1 GiB).

Deploy it with `invoke: http` in func.yaml, so that this module receives the body itself. It does so into one
buffer, where func-python's CloudEvents wrapper appends chunks to bytes, at a cost that grows with the square of
the size (64 MiB in 16 seconds); events that come from that wrapper are answered all the same.

`python -m lifl.http_function FILE` serves a function with hypercorn (`pip install lifl[http]`). It reads
64 KiB at a time and is not the fastest server, but it is the one that func-python runs: what is measured here is
then what is deployed. Only requests are parsed on the event loop; folds run in a thread, so that health probes
are answered meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray

from lifl.aggregate import Aggregate, GatheredUpdates, ModelUpdate
from lifl.errors import Busy, InvalidFunction, InvalidInput, InvalidModel, Refused
from lifl.fold import Fold, Input
from lifl.function import AggregatorFunction, load_function
from lifl.global_model import apply_server_optimizer
from lifl.model_layout import (
    RUN_ALIGNMENT,
    AccumulatorLayout,
    FoldPlan,
    ModelLayout,
    Precision,
    Segment,
    encode_header,
    parse_header,
    plan_update,
)
from lifl.tensors import LENGTH, Buffer, split

if TYPE_CHECKING:
    from cloudevents.core.base import BaseCloudEvent

    from lifl.function import Receive, Scope, Send

log = logging.getLogger(__name__)

UPDATE: Final = "dev.lifl.update.v1"
PARTIAL: Final = "dev.lifl.partial.v1"
MODEL: Final = "dev.lifl.model.v1"
MEDIA_TYPE: Final = "application/vnd.safetensors"

MAX_OPEN_ROUNDS: Final = 4
"""Rounds that may be open at the same time, each with two accumulators; for a fifth the oldest is given up."""
_REMEMBERED_ROUNDS: Final = 64  # closed rounds whose inputs are still known, to recognise duplicates
_CACHED_LAYOUTS: Final = 64
_MODEL_KEY: Final = "lifl.model"  # in the metadata of a partial: the header of the model, for its dtypes
_MAX_ROUND: Final = 2**31 - 1

Role = Literal["leaf", "top"]


# --- settings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What an instance is told by its environment."""

    goal: int = 2
    """Inputs of a round: updates for a leaf, updates or partials for the top."""
    role: Role = "top"
    precision: Precision = "float32"
    max_body_bytes: int = 1 << 30

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings:
        """Read the LIFL_ variables. Raises InvalidInput for a value that cannot be used."""

        def number(name: str, default: int) -> int:
            text = environment.get(name, str(default))
            if not (text.isascii() and text.isdigit() and 0 < int(text[:19]) < 2**62):
                raise InvalidInput(f"{name} must be a whole number above 0, not {text!r}")
            return int(text)

        def choice(name: str, *choices: str) -> str:
            text = environment.get(name, choices[0])
            if text not in choices:
                raise InvalidInput(f"{name} must be {' or '.join(choices)}, not {text!r}")
            return text

        return cls(
            number("LIFL_GOAL", cls.goal),
            cast(Role, choice("LIFL_ROLE", "top", "leaf")),
            cast(Precision, choice("LIFL_PRECISION", "float32", "float64")),
            number("LIFL_MAX_BODY_BYTES", cls.max_body_bytes),
        )


# --- events --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A CloudEvent with its attributes checked; which of them count depends on the type."""

    type: str
    source: str
    id: str
    round: int
    data: Buffer = field(repr=False)
    weight: float = 0.0
    """Samples of an update, or sum of the weights in a partial."""
    delta_weight: float = 0.0
    updates: int = 1


@lru_cache(maxsize=1)
def _raw_format() -> Any:
    """A CloudEvents format that leaves data alone.

    The JSON format of cloudevents 2.x makes text of all bytes that happen to be UTF-8, such as a tensor of
    zeros, and of a memoryview its printed form.
    """
    from cloudevents.core.formats.json import JSONFormat

    class RawFormat(JSONFormat):
        def read_data(self, body: bytes, datacontenttype: str | None) -> bytes:
            return body

        def write_data(self, data: Any, datacontenttype: str | None) -> bytes:
            return cast(bytes, data)

    return RawFormat()


def parse_event(headers: Mapping[str, str], body: Buffer) -> Event:
    """Decode a binary-mode or structured-mode CloudEvent; the data of the former is `body` itself.

    `headers` have lower-case names. Raises Refused 400 or 415 that says what is wrong.
    """
    from cloudevents.core.bindings.http import HTTPMessage, from_http_event
    from cloudevents.core.exceptions import CloudEventValidationError

    structured = headers.get("content-type", "").lower().startswith("application/cloudevents")
    if structured:
        if not headers["content-type"].lower().startswith("application/cloudevents+json"):
            raise Refused(415, "Unsupported Media Type", "structured events must be application/cloudevents+json")
        # A ce- header beside a structured event would make the library take it for a binary one.
        message = HTTPMessage({"content-type": headers["content-type"]}, bytes(body))
    elif "ce-type" in headers:
        message = HTTPMessage(dict(headers), cast(bytes, body))
    else:
        raise Refused(400, "Bad event", "the request is not a CloudEvent: it has no ce-type header")
    try:
        event = from_http_event(message, _raw_format())
    except (CloudEventValidationError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        # The library checks little before it uses what it got, so that JSON of another shape ends in any of these.
        raise Refused(400, "Bad event", f"the request is not a CloudEvent: {error}") from None
    return check_event(event)


def check_event(event: BaseCloudEvent) -> Event:
    """Check the attributes that LIFL needs of a decoded CloudEvent. Raises Refused 400."""
    attributes = event.get_attributes()
    data: Any = event.get_data()
    if isinstance(data, str):
        data = data.encode()  # undoes what the JSON format did to bytes that happened to be UTF-8
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise Refused(400, "Bad event", "the event carries no safetensors data")
    kind = str(attributes["type"])
    if kind not in (UPDATE, PARTIAL, MODEL):
        raise Refused(400, "Bad event", f"type must be {UPDATE}, {PARTIAL} or {MODEL}, not {kind[:100]!r}")
    common: dict[str, Any] = {
        "type": kind,
        "source": str(attributes["source"]),
        "id": str(attributes["id"]),
        "round": _whole(attributes, "round"),
        "data": data,
    }
    if kind == UPDATE:
        weight = _number(attributes, "numsamples")
        if weight <= 0:
            raise Refused(400, "Bad event", "numsamples must be more than 0")
        variant = attributes.get("kind", "") or "weights"
        if variant not in ("weights", "delta"):
            raise Refused(400, "Bad event", "kind must be weights or delta")
        return Event(**common, weight=weight, delta_weight=weight if variant == "delta" else 0.0)
    if kind == PARTIAL:
        weight, delta_weight = _number(attributes, "weight"), _number(attributes, "deltaweight")
        if delta_weight > weight:
            raise Refused(400, "Bad event", "deltaweight must not be more than weight")
        return Event(**common, weight=weight, delta_weight=delta_weight, updates=_whole(attributes, "updates"))
    return Event(**common)


def _whole(attributes: Mapping[str, Any], name: str) -> int:
    text = str(attributes.get(name, ""))
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and 1 <= int(text) <= _MAX_ROUND):
        raise Refused(400, "Bad event", f"{name} must be a whole number from 1 to {_MAX_ROUND}")
    return int(text)


def _number(attributes: Mapping[str, Any], name: str) -> float:
    try:
        value = float(str(attributes.get(name, ""))[:64])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise Refused(400, "Bad event", f"{name} must be a number of at least 0")
    return value


@dataclass(frozen=True)
class Reply:
    """The answer to one event: a status, and either nothing, a problem document, or a CloudEvent."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Buffer = b""


def _problem(error: Refused, **members: Any) -> Reply:
    document = {"type": "about:blank", "title": error.title, "status": error.status, "detail": error.detail}
    headers = {"content-type": "application/problem+json"}
    if isinstance(error, Busy):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    return Reply(error.status, headers, json.dumps({**document, **members}).encode())


# --- aggregation, without any I/O ----------------------------------------------------------------------------


@dataclass
class _Round:
    """One open round."""

    number: int
    inputs: int = 0
    updates: int = 0
    weight: float = 0.0
    delta_weight: float = 0.0
    sums: NDArray[np.uint8] | None = None
    """The accumulator, once something has been folded."""
    spare: NDArray[np.uint8] | None = None
    gathered: list[ModelUpdate] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    """Sources and event ids of the inputs, each with a letter before it."""


@dataclass
class _Closed:
    """A closed round: who took part, and what was answered to the input that completed it."""

    keys: set[str]
    last_keys: set[str]
    reply: Reply


@dataclass
class _Ready:
    """An input that has been checked and is about to be folded."""

    position: int
    event: Event
    item: Input | None
    """None if the function left the update out or it is gathered."""
    weight: float
    delta_weight: float


class _Rejected(Refused):
    """An input that is well formed but can never be folded."""

    def __init__(self, detail: str) -> None:
        super().__init__(422, "Update rejected", detail)


class _Late(Refused):
    """The round of the input is closed."""

    def __init__(self, round_number: int) -> None:
        super().__init__(409, "Late", f"round {round_number} is closed")
        self.round = round_number + 1


class Aggregation:
    """The rounds of one instance: events in, replies out. Not for use by several threads at once."""

    def __init__(self, function: AggregatorFunction, settings: Settings) -> None:
        """Raises InvalidInput where the function and the role do not go together."""
        if function.gather and settings.role == "leaf":
            raise InvalidInput(f"{function.name} needs all updates at once; it can only be the top")
        self._function = function
        self._settings = settings
        self._instance = uuid.uuid4().hex
        self._model: ModelLayout | None = None
        self._models: dict[int, NDArray[np.uint8]] = {}
        self._accumulators: AccumulatorLayout | None = None
        self._fold: Fold | None = None
        self._state: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        self._layouts: dict[bytes, tuple[ModelLayout, FoldPlan]] = {}
        self._open: dict[int, _Round] = {}
        self._closed: dict[int, _Closed] = {}
        self._forgotten = 0  # the last round that is neither open nor remembered, and can only be late

    def process(self, events: Sequence[Event]) -> list[Reply]:
        """Take the events in order and return a reply for each; those of one round are folded in one pass."""
        replies: list[Reply | None] = [None] * len(events)
        ready: list[_Ready] = []
        for position, event in enumerate(events):
            if ready and (event.type == MODEL or event.round != ready[0].event.round):
                self._flush(ready, replies)
            try:
                if event.type == MODEL:
                    replies[position] = self._set_model(event)
                    continue
                known = self._known(event)
                if known is not None:
                    replies[position] = known
                    continue
                ready.append(self._prepare(position, event))
            except Exception as error:
                replies[position] = _answer(error)
                continue
            state = self._open.get(event.round)
            if state is None:  # given up as soon as it was opened: older than all others
                replies[position] = _answer(_Late(event.round))
                ready.pop()
            elif state.inputs + len(ready) >= self._settings.goal:
                self._flush(ready, replies)
        self._flush(ready, replies)
        assert all(reply is not None for reply in replies)
        return cast(list[Reply], replies)

    # --- one input -------------------------------------------------------------------------------------------

    def _known(self, event: Event) -> Reply | None:
        """The reply to an input that was taken before; None for a new one. Raises Refused for a late one."""
        keys = _keys(event)
        closed = self._closed.get(event.round)
        if closed is not None:
            if keys & closed.keys:
                # The answer to the input that completed the round may have been lost on its way: say it again.
                return closed.reply if keys & closed.last_keys else Reply(200)
            raise _Late(event.round)
        state = self._open.get(event.round)
        if state is None and event.round <= self._forgotten:
            raise _Late(event.round)
        return Reply(200) if state is not None and keys & state.keys else None

    def _prepare(self, position: int, event: Event) -> _Ready:
        layout, payload, plan = self._read(event)
        state = self._open.get(event.round) or _Round(event.round)
        assert self._fold is not None
        if self._settings.role == "top" and event.round not in self._models:
            # Found out now rather than at the end of the round, when its inputs are all used up.
            if event.delta_weight:
                raise Refused(409, "Model needed", f"deltas of round {event.round} need its model; post it first")
            if self._function.server_optimizer is not None:
                text = (
                    f"{self._function.name} has a server optimiser, which needs the model of round {event.round}"
                )
                raise Refused(409, "Model needed", f"{text}; post it first")
        if event.type == PARTIAL:
            ready = _Ready(position, event, None, event.weight, event.delta_weight)
            if event.weight:
                ready.item = self._fold.update(payload, plan, 1.0)
        else:
            ready = self._ask(position, event, layout, payload, plan, state)
        state.keys |= _keys(event)
        if event.round not in self._open:
            self._open[event.round] = state
            self._abandon_rounds()
        return ready

    def _abandon_rounds(self) -> None:
        """Give up the oldest open rounds beyond the limit: their clients are gone, and newer ones wait."""
        for number in sorted(self._open)[:-MAX_OPEN_ROUNDS]:
            state = self._open.pop(number)
            log.warning("round %d is given up with %d of %d inputs", number, state.inputs, self._settings.goal)
            self._forgotten = max(self._forgotten, number)

    def _ask(
        self,
        position: int,
        event: Event,
        layout: ModelLayout,
        payload: Buffer,
        plan: FoldPlan,
        state: _Round,
    ) -> _Ready:
        """Ask the function what one update counts."""
        assert self._fold is not None
        update = ModelUpdate(
            payload,
            layout,
            plan,
            client=event.source,
            round=event.round,
            num_samples=event.weight,
            is_delta=event.delta_weight > 0,
        )
        if self._function.gather:
            if self._fold.non_finite(payload, plan, 1.0):
                raise _Rejected(f"the update of {event.source!r} has values that are not finite")
            state.gathered.append(update)
            return _Ready(position, event, None, 0.0, 0.0)
        total = Aggregate(event.round, state.weight)
        total.offer(self._function, update)
        contributions = total.take()
        if not contributions:
            return _Ready(position, event, None, 0.0, 0.0)
        weight = contributions[0].weight
        item = self._fold.update(payload, plan, weight * contributions[0].scale)
        return _Ready(position, event, item, weight, weight if update.is_delta else 0.0)

    def _read(self, event: Event) -> tuple[ModelLayout, Buffer, FoldPlan]:
        """Check the data of an input; the first one fixes the model's layout."""
        header = _header_of(event.data)
        key = event.type.encode() + header
        cached = self._layouts.get(key)
        if cached is None or len(event.data) != LENGTH.size + len(header) + cached[0].payload_bytes:
            layout, payload = split(event.data)
            if event.type == PARTIAL:
                if self._settings.role == "leaf" or self._function.gather:
                    raise Refused(409, "Not a middle", "this instance takes updates, not partial aggregates")
                model = self._model or _model_of_partial(header)
                accumulators = AccumulatorLayout(model, self._settings.precision)
                plan = _plan_partial(accumulators, layout)
            else:
                model = self._model or layout
                plan = plan_update(model, layout)
            if self._model is None:
                self._fix_layout(model)
            if len(self._layouts) >= _CACHED_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = layout, plan
            return layout, payload, plan
        return cached[0], memoryview(cast(bytes, event.data))[LENGTH.size + len(header) :], cached[1]

    def _fix_layout(self, model: ModelLayout) -> None:
        self._model = model
        self._layouts.clear()
        self._accumulators = AccumulatorLayout(model, self._settings.precision)
        self._fold = Fold(self._accumulators)
        self._state = []

    def _set_model(self, event: Event) -> Reply:
        """Keep the model that a round starts from."""
        layout, payload = split(event.data)
        if self._model != layout:
            if self._open:
                raise Refused(409, "Another layout", "the model's layout cannot change while a round is open")
            self._fix_layout(layout)
            self._models.clear()
        self._keep_model(event.round, np.frombuffer(payload, np.uint8))
        return Reply(202)

    def _keep_model(self, round_number: int, payload: NDArray[np.uint8]) -> None:
        self._models[round_number] = payload
        for old in sorted(self._models)[:-2]:
            del self._models[old]

    # --- folding ---------------------------------------------------------------------------------------------

    def _flush(self, ready: list[_Ready], replies: list[Reply | None]) -> None:
        """Fold what is ready, all of one round, and reply to it; close the round if its goal is reached."""
        batch = list(ready)
        ready.clear()
        if not batch:
            return
        state = self._open[batch[0].event.round]
        rejected = self._add(state, [one for one in batch if one.item is not None])
        for one in batch:
            if one.position in rejected:
                state.keys -= _keys(one.event)
                replies[one.position] = _problem(rejected[one.position])
                continue
            state.inputs += 1
            state.updates += one.event.updates
            state.weight += one.weight
            state.delta_weight += one.delta_weight
            replies[one.position] = Reply(202)
        if state.inputs < self._settings.goal:
            return
        last = [one for one in batch if one.position not in rejected][-1]
        try:
            reply = self._close(state)
        except Exception as error:
            reply = _answer(error)
        replies[last.position] = reply
        del self._open[state.number]
        for closed in self._closed.values():
            closed.reply = Reply(200)  # results are large: only the newest one is kept
        self._closed[state.number] = _Closed(state.keys, _keys(last.event), reply)
        for old in sorted(self._closed)[:-_REMEMBERED_ROUNDS]:
            del self._closed[old]
            self._forgotten = max(self._forgotten, old)

    def _add(self, state: _Round, batch: Sequence[_Ready]) -> dict[int, Refused]:
        """Fold a batch into the round; return what was rejected, by position."""
        assert self._fold is not None and self._accumulators is not None
        rejected: dict[int, Refused] = {}
        items = [cast(Input, one.item) for one in batch]
        if not items:
            return rejected
        out = state.spare if state.spare is not None else np.empty(self._accumulators.nbytes, np.uint8)
        if not self._fold.fold(out, items, state.sums):
            innocent = []
            for one, item in zip(batch, items, strict=True):
                if self._fold.non_finite(item.view, item.plan, item.weight):
                    text = f"the input of {one.event.source!r} has values that are not finite"
                    rejected[one.position] = _Rejected(text)
                else:
                    innocent.append(item)
            if not rejected or (innocent and not self._fold.fold(out, innocent, state.sums)):
                text = "the sums overflow; use LIFL_PRECISION=float64 or smaller weights"
                rejected = {one.position: _Rejected(text) for one in batch}
            if len(rejected) == len(batch):
                state.spare = out
                return rejected
        state.sums, state.spare = out, state.sums
        return rejected

    # --- results ---------------------------------------------------------------------------------------------

    def _close(self, state: _Round) -> Reply:
        """The event that answers the input that completed the round. Raises Refused where there is no result."""
        assert self._model is not None and self._accumulators is not None and self._fold is not None
        if self._settings.role == "leaf":
            attributes = {"weight": state.weight, "deltaweight": state.delta_weight, "updates": state.updates}
            return self._event(PARTIAL, state.number, attributes, self._encode_partial(state))
        data, payload = _new_safetensors(self._model.header, self._model.payload_bytes)
        self._write_model(state, payload)
        self._keep_model(state.number + 1, payload)
        return self._event(MODEL, state.number + 1, {"updates": state.updates}, data.data)

    def _write_model(self, state: _Round, out: NDArray[np.uint8]) -> None:
        assert self._accumulators is not None and self._fold is not None
        previous = self._models.get(state.number)
        optimizer = self._function.server_optimizer
        if self._function.gather:
            sums = np.empty(self._accumulators.nbytes, np.uint8)
            gathered = GatheredUpdates(state.gathered, self._accumulators, sums, previous)
            self._function(gathered)
            if not gathered.complete:
                raise RuntimeError(f"{self._function.name} did not go over all tiles")
            finite = self._fold.finish(out, [sums], 1.0)
        elif state.sums is None or not state.weight:
            raise _Rejected(f"{self._function.name} left out every update of round {state.number}")
        else:
            finite = self._fold.finish(
                out, [state.sums], state.weight, previous if state.delta_weight else None, state.delta_weight
            )
        if not finite:
            raise _Rejected(f"the model of round {state.number} is not finite")
        if optimizer is not None and previous is not None:
            if not self._state:
                nbytes = self._accumulators.nbytes
                zeros = [np.zeros(nbytes, np.uint8) for _ in range(2 * len(optimizer.state_names))]
                self._state = list(zip(zeros[::2], zeros[1::2], strict=True))
            apply_server_optimizer(optimizer, self._accumulators, previous, out, self._state, state.number)
            self._state = [(new, old) for old, new in self._state]

    def _encode_partial(self, state: _Round) -> memoryview:
        """The sums as safetensors, with the header of the model in the metadata."""
        assert self._model is not None and self._accumulators is not None
        entries = {}
        places = {}
        for name, dtype, offset, nbytes, shape in _sums_of_tensors(self._accumulators):
            entries[name] = (dtype, shape)
            places[name] = (offset, nbytes)
        header = encode_header(entries, {_MODEL_KEY: _without_metadata(self._model.header)})
        layout = parse_header(header)
        data, payload = _new_safetensors(header, layout.payload_bytes)
        for spec in layout.tensors:
            target = payload[spec.offset : spec.offset + spec.nbytes]
            offset, nbytes = places[spec.name]
            if state.sums is None:
                target.fill(0)
            else:
                target[:] = state.sums[offset : offset + nbytes]
        return data.data

    def _event(self, kind: str, round_number: int, extensions: Mapping[str, Any], data: Buffer) -> Reply:
        from cloudevents.core.bindings.http import to_binary_event
        from cloudevents.core.v1.event import CloudEvent

        attributes = {
            "type": kind,
            # Two replicas are two sources: their partials for one round must not pass for one another.
            "source": f"/lifl/{self._function.name}/{self._settings.role}/{self._instance}",
            "id": f"{self._instance}-{round_number}",
            "datacontenttype": MEDIA_TYPE,
            "round": round_number,
            **extensions,
        }
        message = to_binary_event(CloudEvent(attributes, cast(bytes, data)), _raw_format())
        return Reply(200, message.headers, message.body)


def _keys(event: Event) -> set[str]:
    return {f"s{event.source}", f"i{event.id}"}


def _answer(error: Exception) -> Reply:
    """The problem document for an error of an event or of the function."""
    if isinstance(error, _Late):
        return _problem(error, round=error.round)
    if isinstance(error, Refused):
        return _problem(error)
    if isinstance(error, InvalidModel):
        return _problem(Refused(422, "Invalid model", str(error)))
    if isinstance(error, ValueError):
        return _problem(_Rejected(str(error)))
    log.error("the function failed", exc_info=error)
    return _problem(Refused(500, "Function failed", f"{type(error).__name__}: {error}"))


def _header_of(data: Buffer) -> bytes:
    view = memoryview(cast(bytes, data))
    if len(view) < LENGTH.size:
        return b""
    (length,) = LENGTH.unpack_from(view)
    return bytes(view[LENGTH.size : LENGTH.size + min(length, len(view))])


def _new_safetensors(header: bytes, payload_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A buffer with this header, and the view of its data section, still to be filled."""
    # Headers of clients have any length; with this one the data section is aligned, as the fold needs its result.
    header += b" " * (-(LENGTH.size + len(header)) % RUN_ALIGNMENT)
    start = LENGTH.size + len(header)
    data = np.empty(start + payload_bytes, np.uint8)
    LENGTH.pack_into(data.data, 0, len(header))
    data[LENGTH.size : start] = np.frombuffer(header, np.uint8)
    return data, data[start:]


def _without_metadata(header: bytes) -> str:
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False)


def _model_of_partial(header: bytes) -> ModelLayout:
    """The layout of the model that a partial aggregate belongs to. Raises InvalidModel."""
    model = json.loads(header).get("__metadata__", {}).get(_MODEL_KEY)
    if model is None:
        raise InvalidModel(f"a partial aggregate has the model's header as {_MODEL_KEY} in its metadata")
    return parse_header(str(model).encode("utf-8", "replace"))


def _sums_of_tensors(
    accumulators: AccumulatorLayout,
) -> Iterable[tuple[str, Literal["F32", "F64"], int, int, tuple[int, ...]]]:
    """(name, dtype, offset, bytes, shape) of the sums of each tensor in an accumulator."""
    run, start = 0, 0
    for tensor in accumulators.model.tensors:
        if tensor.nbytes == 0:
            yield tensor.name, "F32", 0, 0, tensor.shape
            continue
        if start == accumulators.sums[run].count:
            run, start = run + 1, 0
        sums = accumulators.sums[run]
        width = 4 if sums.dtype == "F32" else 8
        yield tensor.name, sums.dtype, sums.offset + start * width, tensor.count * width, tensor.shape
        start += tensor.count


def _plan_partial(accumulators: AccumulatorLayout, layout: ModelLayout) -> FoldPlan:
    """How the sums of a partial aggregate fold into an accumulator. Raises InvalidModel if they do not fit."""
    sources = {tensor.name: tensor for tensor in layout.tensors}
    by_run: list[list[Segment]] = [[] for _ in accumulators.sums]
    run, start = 0, 0
    for name, dtype, _, nbytes, shape in _sums_of_tensors(accumulators):
        source = sources.pop(name, None)
        if source is None or source.shape != shape or (nbytes and source.dtype != dtype):
            raise InvalidModel(
                f"the partial aggregate does not fit: {name!r} must be {dtype}{list(shape)}; "
                "all instances need the same model and LIFL_PRECISION"
            )
        if not nbytes:
            continue
        if start == accumulators.sums[run].count:
            run, start = run + 1, 0
        by_run[run].append(Segment(source.offset, run, start, source.count, dtype))
        start += source.count
    if sources:
        raise InvalidModel(f"the partial aggregate has a tensor {next(iter(sources))!r} that the model has not")
    segments = tuple(segment for segments in by_run for segment in segments)
    return FoldPlan(segments, tuple(map(tuple, by_run)), layout.payload_bytes, False)


# --- the instance --------------------------------------------------------------------------------------------


class HttpFunction:
    """An instance of an aggregator in Knative's Python function contract, and an ASGI application."""

    def __init__(self, function: AggregatorFunction) -> None:
        self._function = function
        self._settings = Settings()
        self._aggregation: Aggregation | None = None
        self._queue: list[tuple[Event, asyncio.Future[Reply]]] = []
        self._folding: asyncio.Task[None] | None = None

    def start(self, cfg: Mapping[str, str]) -> None:
        """Take the settings from the environment. Raises InvalidInput, which ends the process."""
        self._settings = Settings.of(cfg)
        self._aggregation = Aggregation(self._function, self._settings)

    def stop(self) -> None:
        """Forget all rounds; an unfinished one is lost, as its inputs were not acknowledged with a result."""
        self._aggregation = None

    def alive(self) -> tuple[bool, str]:
        """Always true: an instance that cannot answer does not answer this either."""
        return True, f"{self._function.name} is alive"

    def ready(self) -> tuple[bool, str]:
        """True between `start` and `stop`."""
        started = self._aggregation is not None
        return started, f"{self._function.name} is {'ready' if started else 'not started'}"

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request, or the lifespan of the server."""
        if scope.get("type") == "lifespan":
            await self._lifespan(receive, send)
            return
        # func-python's CloudEvents wrapper hands in the decoded event, and a `send` that takes events.
        raw_send: Send = getattr(send, "http", send)
        try:
            reply = await self._reply(scope, receive)
        except _Disconnected:
            return
        except Exception as error:
            # A ValueError that left here would be lost: func-python takes it for a request that is no event.
            reply = _answer(error)
        headers = {"content-length": str(len(reply.body)), **reply.headers}
        encoded = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await raw_send({"type": "http.response.start", "status": reply.status, "headers": encoded})
        await raw_send({"type": "http.response.body", "body": reply.body})

    async def _reply(self, scope: Scope, receive: Receive) -> Reply:
        if "event" in scope:
            return await self._submit(check_event(scope["event"]))
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD"):
            probe = {"/health/liveness": self.alive, "/health/readiness": self.ready}.get(path)
            if probe is None:
                raise Refused(404, "Not Found", "post CloudEvents to /; probes are at /health")
            good, text = probe()
            return Reply(200 if good else 503, {"content-type": "text/plain"}, text.encode())
        if method != "POST":
            raise Refused(405, "Method Not Allowed", "post CloudEvents to /")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        body = await _receive_body(headers.get("content-length"), receive, self._settings.max_body_bytes)
        if headers.get("content-type", "").lower().startswith("application/cloudevents"):
            event = await asyncio.to_thread(parse_event, headers, body)  # decodes base64
        else:
            event = parse_event(headers, body)
        return await self._submit(event)

    async def _submit(self, event: Event) -> Reply:
        """Queue an event; what is queued while a fold runs is folded together in the next one."""
        if self._aggregation is None:
            raise Busy("Not started", "the instance is starting or stopping")
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._queue.append((event, answer))
        if self._folding is None or self._folding.done():
            self._folding = asyncio.create_task(self._fold_queue(self._aggregation))
        return await answer

    async def _fold_queue(self, aggregation: Aggregation) -> None:
        while self._queue:
            batch, self._queue = self._queue, []
            try:
                replies = await asyncio.to_thread(aggregation.process, [event for event, _ in batch])
            except Exception as error:
                replies = [_answer(error)] * len(batch)
            for (_, answer), reply in zip(batch, replies, strict=True):
                if not answer.done():  # its client may have gone away
                    answer.set_result(reply)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    self.start(dict(os.environ))
                except InvalidInput as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                self.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return


class _Disconnected(Exception):
    """The client went away in the middle of its request."""


async def _receive_body(content_length: str | None, receive: Receive, most: int) -> Buffer:
    """Receive a whole body: with Content-Length into one buffer, otherwise in pieces that are joined once."""
    too_large = Refused(413, "Content Too Large", f"at most {most} bytes; see LIFL_MAX_BODY_BYTES")
    if content_length is None:
        pieces: list[bytes] = []
        size = 0
        more = True
        while more:
            piece, more = await _receive_piece(receive)
            size += len(piece)
            if size > most:
                raise too_large
            pieces.append(piece)
        return b"".join(pieces)
    if not (content_length.isascii() and content_length.isdigit()):
        raise Refused(400, "Bad request", "Content-Length must be a number")
    if int(content_length[:19]) > most:
        raise too_large
    body = np.empty(int(content_length), np.uint8)
    view = body.data
    end = 0
    more = True
    while more:
        piece, more = await _receive_piece(receive)
        if end + len(piece) > len(view):
            raise Refused(400, "Bad request", "the body is longer than its Content-Length")
        view[end : end + len(piece)] = piece
        end += len(piece)
    if end < len(view):
        raise Refused(400, "Bad request", "the body is shorter than its Content-Length")
    return view


async def _receive_piece(receive: Receive) -> tuple[bytes, bool]:
    """One piece of the body and whether more follow."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise _Disconnected
    return message.get("body", b""), message.get("more_body", False)


# --- serving -------------------------------------------------------------------------------------------------


def serve(function: AggregatorFunction, binds: Sequence[str]) -> None:
    """Serve an aggregator on these addresses (`host:port`) until SIGINT or SIGTERM. Needs `lifl[http]`."""
    asyncio.run(serve_instance(HttpFunction(function), binds))


async def serve_instance(
    instance: HttpFunction, binds: Sequence[str], server_log: logging.Logger | None = None
) -> None:
    """Serve an instance in the running event loop, as `serve` does. The server's own lines go to `server_log`."""
    from hypercorn.asyncio import serve as hypercorn_serve
    from hypercorn.config import Config

    config = Config()
    config.bind = list(binds)
    config.graceful_timeout = 10.0
    if server_log is not None:
        config.errorlog = server_log
    await hypercorn_serve(cast(Any, instance.handle), config, mode="asgi")


def listen_addresses(
    environment: Mapping[str, str], host: str | None = None, port: int | None = None
) -> list[str]:
    """Where to listen: arguments, else LISTEN_ADDRESS as func-python reads it, else ADDRESS and PORT."""
    listen = environment.get("LISTEN_ADDRESS", "")
    if host is None and port is None and listen:
        return [address.strip() for address in listen.split(",") if address.strip()]
    host = host or environment.get("ADDRESS") or "127.0.0.1"
    return [f"{f'[{host}]' if ':' in host else host}:{port or environment.get('PORT') or '8080'}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a function file; the command line of `python -m lifl.http_function`."""
    parser = argparse.ArgumentParser("python -m lifl.http_function", description="Serve an aggregator over HTTP.")
    parser.add_argument("function", help="a file such as functions/fedavg.py, or a module")
    parser.add_argument("--name", help="which aggregator of the file, if it has several")
    parser.add_argument("--host", help="address to listen on (default: ADDRESS, or 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: PORT, or 8080)")
    options = parser.parse_args(arguments)
    try:
        function = load_function(options.function, options.name)
        Aggregation(function, Settings.of(os.environ))
        serve(function, listen_addresses(os.environ, options.host, options.port))
    except (InvalidFunction, InvalidInput) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}; serving needs hypercorn: pip install 'lifl[http]'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

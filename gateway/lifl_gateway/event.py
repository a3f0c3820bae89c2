"""The CloudEvent that carries a model update: its attributes, from HTTP headers or from a structured event.

Attributes come from clients; each is checked here, before anything is done because of it. The payload is none of
this module's business. Sans-IO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec
from lifl.errors import Refused
from lifl.slot import MAX_CLIENT_ID_BYTES

EVENT_TYPE: Final = "dev.lifl.update.v1"
SPEC_VERSION: Final = "1.0"
PAYLOAD_TYPES: Final = ("application/vnd.safetensors", "application/octet-stream")
STRUCTURED_TYPE: Final = "application/cloudevents+json"
MAX_SAMPLES: Final = float(2**40)
MAX_ROUND: Final = 2**31 - 1
_MAX_ID_BYTES: Final = 256


class UpdateEvent(NamedTuple):
    """The checked attributes of one model update."""

    client: str
    """`source`: who trained it."""
    event_id: str
    round: int
    num_samples: float
    """The update's weight: finite, positive."""
    is_delta: bool
    """`kind`: the payload is the difference to the round's model."""
    update: str = ""
    """`update`: for a part of an update of a sharded job, what all parts of this update have in common."""


class StructuredEvent(msgspec.Struct):
    """A structured-mode event; attributes that LIFL does not know are ignored, as the specification asks."""

    specversion: str
    type: str
    source: str
    id: str
    round: int | str
    numsamples: int | float | str
    data_base64: bytes
    """The safetensors bytes, decoded."""
    kind: str = "weights"
    update: str = ""
    datacontenttype: str = "application/octet-stream"


_structured_decoder: Final = msgspec.json.Decoder(StructuredEvent)


def event_from_headers(environ: Mapping[str, object]) -> UpdateEvent:
    """Read the `ce-` headers of a WSGI environment; raises Refused 400 naming the first bad attribute."""
    return _checked({name: _header(environ, name) for name in _ATTRIBUTES})


def event_from_json(body: bytes | bytearray | memoryview) -> tuple[UpdateEvent, bytes]:
    """Decode a structured-mode event; returns it and its data. Raises Refused 400 or 415."""
    try:
        event = _structured_decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(f"the body is not a structured-mode event: {error}") from None
    if event.datacontenttype.split(";")[0].strip().lower() not in PAYLOAD_TYPES:
        raise Refused(415, "Unsupported Media Type", f"datacontenttype must be one of {', '.join(PAYLOAD_TYPES)}")
    attributes = {name: getattr(event, name) for name in _ATTRIBUTES}
    return _checked({name: str(value) for name, value in attributes.items()}), event.data_base64


_ATTRIBUTES: Final = ("specversion", "type", "id", "source", "round", "numsamples", "kind", "update")


def _header(environ: Mapping[str, object], name: str) -> str:
    """One attribute out of its header: UTF-8, percent-encoded, perhaps quoted (CloudEvents HTTP 3.1.3.2)."""
    raw = environ.get(f"HTTP_CE_{name.upper()}", "")
    assert isinstance(raw, str)
    raw = raw.strip(" \t")
    if len(raw) >= 2 and raw[0] == raw[-1] == '"':
        raw = raw[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    try:
        return unquote_to_bytes(raw.encode("latin-1")).decode("utf-8")
    except UnicodeDecodeError:
        raise _bad(f"ce-{name} is not UTF-8 after percent-decoding") from None


def _checked(attributes: Mapping[str, str]) -> UpdateEvent:
    if attributes["specversion"] != SPEC_VERSION:
        raise _bad(f"specversion must be {SPEC_VERSION}; send this as a CloudEvent")
    if attributes["type"] != EVENT_TYPE:
        raise _bad(f"type must be {EVENT_TYPE}")
    if attributes["kind"] not in ("", "weights", "delta"):
        raise _bad("kind must be weights or delta")
    return UpdateEvent(
        client=_text("source", attributes["source"], MAX_CLIENT_ID_BYTES),
        event_id=_text("id", attributes["id"], _MAX_ID_BYTES),
        round=_round(attributes["round"]),
        num_samples=_samples(attributes["numsamples"]),
        is_delta=attributes["kind"] == "delta",
        update=_text("update", attributes["update"], _MAX_ID_BYTES) if attributes["update"] else "",
    )


def _text(name: str, value: str, most: int) -> str:
    if not value:
        raise _bad(f"{name} is missing")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise _bad(f"{name} is not valid Unicode") from None
    if size > most:
        raise _bad(f"{name} has {size} bytes; at most {most}")
    if not value.isprintable():
        raise _bad(f"{name} has characters that cannot be printed")
    return value


def _round(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 10 and 1 <= int(value) <= MAX_ROUND):
        raise _bad(f"round must be an integer from 1 to {MAX_ROUND}")
    return int(value)


def _samples(value: str) -> float:
    try:
        samples = float(value) if len(value) <= 64 and "_" not in value else math.nan
    except ValueError:
        samples = math.nan
    if not 0 < samples <= MAX_SAMPLES:
        raise _bad("numsamples must be a number above 0 and at most 2**40")
    return samples


def _bad(detail: str) -> Refused:
    return Refused(400, "Bad event", detail)

"""CloudEvents as they pass the broker: binary mode over HTTP, structured JSON over NATS.

Attributes are kept as text. A payload that travels within its event is base64 in `data_base64`, as the JSON
format of CloudEvents has it for everything that is not JSON itself.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, unquote

import msgspec

Attributes = dict[str, str]
Buffer = bytes | bytearray | memoryview

DATA_REFERENCE: Final = "dataref"
DATA_LENGTH: Final = "datalength"
LEAF: Final = "leaf"
"""Which function an update or partial aggregate is for: the attribute that Triggers filter on."""

CLIENT_SOURCE: Final = "/clients/"
"""What the source of a client's updates starts with; its number follows."""

_PREFIX: Final = "ce-"
_CONTENT_TYPE: Final = "content-type"
_DATA_CONTENT_TYPE: Final = "datacontenttype"
_DATA: Final = "data_base64"
_PLAIN: Final = "".join(map(chr, range(0x21, 0x7F))).replace('"', "").replace("%", "")


def attributes_of(headers: Mapping[str, str]) -> Attributes:
    """The attributes of a binary-mode event; header names are in lower case. Empty if it is not an event."""
    attributes = {
        name.removeprefix(_PREFIX): unquote(text) for name, text in headers.items() if name.startswith(_PREFIX)
    }
    if attributes and _CONTENT_TYPE in headers:
        attributes[_DATA_CONTENT_TYPE] = headers[_CONTENT_TYPE]
    return attributes


def headers_of(attributes: Mapping[str, str]) -> dict[str, str]:
    """The headers of a binary-mode event."""
    headers = {
        _PREFIX + name: quote(text, safe=_PLAIN) for name, text in attributes.items() if name != _DATA_CONTENT_TYPE
    }
    if _DATA_CONTENT_TYPE in attributes:
        headers[_CONTENT_TYPE] = attributes[_DATA_CONTENT_TYPE]
    return headers


def encode(attributes: Mapping[str, str], data: Buffer | None) -> bytes:
    """A structured-mode event, with the data in base64 if there is any."""
    if data is None:
        return msgspec.json.encode(attributes)
    return msgspec.json.encode({**attributes, _DATA: data})


def decode(event: Buffer) -> tuple[Attributes, bytes | None]:
    """Attributes and data of what `encode` made."""
    members = msgspec.json.decode(event, type=dict[str, msgspec.Raw])
    raw = members.pop(_DATA, None)
    # Base64 needs no JSON escapes: between the quotes is the text itself, and it is not copied to get there.
    data = None if raw is None else base64.b64decode(memoryview(raw)[1:-1])
    return {name: msgspec.json.decode(text, type=str) for name, text in members.items()}, data


def encoded_size(attributes: Mapping[str, str], data_bytes: int) -> int:
    """Bytes of `encode` with that much data."""
    return len(encode(attributes, b"")) + 4 * -(-data_bytes // 3)

"""What nodes say to each other when bytes move between them; sans-IO.

Every message is a little-endian u32 length and so many bytes of JSON, one struct tagged with its class name. One
connection serves one request:

    PULL  ->  PeerHello, PullRequest
          <-  PullAnswer, the bytes from `offset` on, Trailer          or Problem
          ->  end of the connection, once all of it has come

    PUSH  ->  PeerHello, PartialOffer
          <-  OfferAnswer                                              or Problem
          ->  the bytes from `OfferAnswer.offset` on, Trailer          only if `open`
          <-  PartialAnswer                                            or Problem

A checksum covers all bytes of the part or of the partial aggregate, also those that came in an earlier connection.
The side that asks does not wait for an answer to its hello.
"""

from __future__ import annotations

import struct
from functools import reduce
from operator import or_
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from lifl.errors import Busy, ProtocolError, Refused
from lifl.messages import Message, Problem

VERSION: Final = 1
ALGORITHM: Final = "xxh3-64"
MAX_MESSAGE_BYTES: Final = 16 * 1024
"""Largest message; a longer one ends the connection before it is read."""

LENGTH: Final = struct.Struct("<I")

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
Weight = Annotated[float, msgspec.Meta(ge=0)]
Name = Annotated[str, msgspec.Meta(max_length=256)]


class PeerHello(Message):
    """First message of every connection."""

    token: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    version: int = VERSION
    checksum: Name = ALGORITHM


class PullRequest(Message):
    """Ask for a part of the model that starts `round`. `Problem` 404 when it is not here.

    `header`: the 8-byte length and the safetensors header. `model`: the whole safetensors file, so it starts with
    the same bytes. `state`: the server optimiser's arrays, one after another.
    """

    job: Name
    nonce: Size
    """Of the job's life; a model of another one is not meant."""
    round: Count
    """0 for the newest."""
    part: Literal["header", "model", "state"] = "model"
    offset: Size = 0
    """Bytes that the receiver has already."""


class PullAnswer(Message):
    """The bytes follow."""

    round: Count
    total: Size
    """Bytes of the whole part."""
    header_bytes: Size = 0
    """So many of them are the length and the safetensors header; the tensors begin there."""


class PartialOffer(Message):
    """Offer a partial aggregate; see `lifl.messages.OfferPartial` for whose it is and `lifl.slot.Seal`."""

    job: Name
    nonce: Size
    round: Count
    attempt: Count
    epoch: Count
    source: Name
    sequence: Count
    """Of the sender's seal: the same bytes have the same number."""
    nbytes: Size
    inputs: Count
    updates: Count
    weight: Weight
    delta_weight: Weight


class OfferAnswer(Message):
    """`open`: send the bytes from `offset` on. `duplicate`: it is part of the round already."""

    status: Literal["open", "duplicate"]
    offset: Size = 0


class Trailer(Message):
    """Follows the bytes."""

    checksum: Annotated[int, msgspec.Meta(ge=0)]


PartialStatus = Literal["accepted", "duplicate", "refused", "corrupt"]


class PartialAnswer(Message):
    """`accepted`, `duplicate`: the receiver has it. `refused`: it is not wanted. `corrupt`: the bytes that came
    are not those that were sent; offer it again."""

    status: PartialStatus
    detail: str = ""


Received = TypeVar("Received", bound=Message)

_ENCODER: Final = msgspec.json.Encoder()


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises ProtocolError when it is too large."""
    data = _ENCODER.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES}")
    return LENGTH.pack(len(data)) + data


def body_bytes(head: bytes | bytearray | memoryview) -> int:
    """How many bytes follow the first four of a message. Raises ProtocolError when that cannot be one."""
    (nbytes,) = LENGTH.unpack(head)
    if not 0 < nbytes <= MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message claims {nbytes} bytes; 1 to {MAX_MESSAGE_BYTES} are possible")
    return int(nbytes)


class Decoder:
    """Decodes the body of any of some kinds of message."""

    def __init__(self, *kinds: type[Message]) -> None:
        self._decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(reduce(or_, kinds))

    def decode(self, body: bytes | bytearray | memoryview) -> Message:
        """Return the message. Raises ProtocolError for anything that is none of these kinds."""
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"not a message between nodes: {error}") from error


def refusal(problem: Problem) -> Refused:
    """The error that a `Problem` stands for: Busy for 503, else Refused."""
    if problem.status == 503:
        return Busy(problem.title, problem.detail, retry_after=problem.retry_after)
    return Refused(problem.status, problem.title, problem.detail)

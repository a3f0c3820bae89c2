"""The 16-byte descriptor: the only thing that travels between processes on the data plane.

A descriptor names a slot; the bytes of the model update stay where the gateway received them. The layout is
little-endian and fixed (LIFL paper, section on direct routing, uses a 16-byte key as well):

    offset  size  field
    0       4     destination   endpoint that shall receive it; read by the router
    4       4     source        endpoint that sent it; stamped by the router, never trusted from the sender
    8       4     slot          slot reference (pool and index), or the argument of the kind
    12      2     round         round number modulo 65,536
    14      1     kind          `Kind`
    15      1     generation    generation of the slot modulo 256

This module is sans-IO: it encodes and decodes, and holds no socket.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

SIZE: Final = 16
"""Bytes of one descriptor."""

MAX_BATCH: Final = 64
"""Descriptors of one destination that may share one send (one routing verdict covers the whole send)."""

_CODEC: Final = struct.Struct("<IIIHBB")


class Kind(IntEnum):
    """What a descriptor asks of its receiver; `slot` carries the argument named here."""

    UPDATE = 1
    """Gateway to aggregator: fold the model update in this slot."""
    PARTIAL = 2
    """Aggregator to its parent: fold the partial aggregate in this slot."""
    RELEASE = 3
    """Coordinator to gateway: the slot was consumed and may be used again."""
    FOLDED = 4
    """Aggregator to coordinator: the input of this slot is part of a sealed accumulator."""
    REJECTED = 5
    """Aggregator to coordinator: the input of this slot holds NaN or infinity and was left out."""
    ASSIGN = 6
    """Coordinator to aggregator: serve this round; `slot` is the endpoint of the parent."""
    CLOSE = 7
    """Coordinator to aggregator: the round has exactly `slot` inputs for you; send the result up after them.
    `generation` of them are partial aggregates (255: so many or more)."""
    MODEL = 8
    """Top aggregator to coordinator: the round's global model is complete in this slot; `generation` is a
    `model_proof`."""


class Descriptor(NamedTuple):
    """One descriptor, decoded. All fields are unsigned integers of the widths of the wire layout."""

    destination: int
    source: int
    slot: int
    round: int
    kind: int
    generation: int


def encode(destination: int, slot: int, round_number: int, kind: Kind, generation: int = 0) -> bytes:
    """Return the 16 bytes of one descriptor with source 0 (the router stamps it).

    `round_number` and `generation` are reduced modulo their width. Raises `struct.error` when another field
    does not fit its width.
    """
    return _CODEC.pack(destination, 0, slot, round_number & 0xFFFF, kind, generation & 0xFF)


def decode(data: bytes | bytearray | memoryview) -> list[Descriptor]:
    """Decode all whole descriptors in `data`, in order; its length must be a multiple of 16 bytes.

    Any 16 bytes decode; whether the kind is known is the receiver's business.
    """
    return [Descriptor._make(fields) for fields in _CODEC.iter_unpack(data)]


def model_proof(inputs: int, *, contains_all: bool) -> int:
    """The generation byte of MODEL.

    It tells from how many inputs (modulo 128) the model was made, so that one from before the round opened once
    more is known, and whether it contains updates that were not reported as folded, whose slots it frees.
    """
    return (inputs & 0x7F) << 1 | contains_all


class DescriptorStream:
    """Cuts a byte stream into descriptors and keeps an incomplete tail for the next read."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> list[Descriptor]:
        """Return the descriptors that `data` completes."""
        if len(data) == SIZE and not self._tail:  # as it nearly always is
            return [Descriptor._make(_CODEC.unpack(data))]
        if self._tail:
            data = self._tail + data
        whole = len(data) - len(data) % SIZE
        self._tail = data[whole:]
        return decode(data[:whole] if self._tail else data)

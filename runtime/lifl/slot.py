"""Slots of a shared-memory pool: references, geometry, and the headers that lie before the payload.

A pool is one memfd of equal slots at a fixed stride, so that slot k starts at k * stride and the payloads of K
slots are a (K, n) matrix to a fold. Each slot is one page of header, a room for the safetensors header, and the
payload; every part starts on a page. A slot has one owner, which alone writes and frees it.
"""

from __future__ import annotations

import struct
import zlib
from itertools import chain
from typing import Final, NamedTuple

PAGE: Final = 4096
"""Bytes of the unit to which every part of a slot is aligned."""

_INDEX_BITS: Final = 22
MAX_SLOTS: Final = 1 << _INDEX_BITS
MAX_POOLS: Final = 1 << (32 - _INDEX_BITS)


def slot_reference(pool: int, index: int) -> int:
    """Pack a pool id (10 bits) and a slot index (22 bits) into the u32 that a descriptor carries."""
    if not (0 <= pool < MAX_POOLS and 0 <= index < MAX_SLOTS):
        raise ValueError(f"pool {pool} or slot {index} is out of range")
    return pool << _INDEX_BITS | index


def split_slot_reference(reference: int) -> tuple[int, int]:
    """Return (pool id, slot index) of a slot reference."""
    return reference >> _INDEX_BITS, reference & (MAX_SLOTS - 1)


def pages(size: int) -> int:
    """Round a size in bytes up to whole pages."""
    return -(-size // PAGE) * PAGE


class PoolGeometry(NamedTuple):
    """Where things lie in a pool. All figures are bytes but `slots`."""

    slots: int
    header_capacity: int
    """Room for a safetensors header, a multiple of the page."""
    payload_capacity: int
    """Room for the payload, a multiple of the page."""

    @classmethod
    def of(cls, slots: int, header_bytes: int, payload_bytes: int) -> PoolGeometry:
        """Geometry for `slots` slots that hold at least these many bytes of header and payload."""
        return cls(slots, pages(header_bytes), max(PAGE, pages(payload_bytes)))

    @property
    def payload_offset(self) -> int:
        """Offset of the payload in its slot."""
        return PAGE + self.header_capacity

    @property
    def stride(self) -> int:
        """Distance between two slots."""
        return self.payload_offset + self.payload_capacity

    @property
    def size(self) -> int:
        """Bytes of the whole pool."""
        return self.slots * self.stride


_UPDATE: Final = struct.Struct("<4sIIBBHdIIQ")
_UPDATE_MAGIC: Final = b"LFU1"
MAX_CLIENT_ID_BYTES: Final = 256


class UpdateHeader(NamedTuple):
    """What the gateway writes before an update's payload, once the payload is complete."""

    generation: int
    """Counts the uses of this slot; the low 8 bits travel in the descriptor."""
    round: int
    is_delta: bool
    """The payload is a difference to the round's model, not new weights."""
    num_samples: float
    """The client's weight, finite and positive."""
    layout_bytes: int
    """Bytes of the safetensors header in the header room; 0 when the layout is the model's own."""
    payload_bytes: int
    client: str

    def pack_into(self, buffer: memoryview | bytearray, offset: int = 0) -> None:
        """Write the header at `offset`. Raises `ValueError` for a client id over 256 bytes."""
        client = self.client.encode()
        if len(client) > MAX_CLIENT_ID_BYTES:
            raise ValueError(f"client id of {len(client)} bytes; at most {MAX_CLIENT_ID_BYTES}")
        end = offset + _UPDATE.size
        buffer[end : end + len(client)] = client
        _UPDATE.pack_into(
            buffer,
            offset,
            _UPDATE_MAGIC,
            self.generation,
            self.round,
            self.is_delta,
            0,
            len(client),
            self.num_samples,
            self.layout_bytes,
            0,
            self.payload_bytes,
        )

    @classmethod
    def unpack_from(cls, buffer: memoryview | bytes | bytearray, offset: int = 0) -> UpdateHeader | None:
        """Read the header at `offset`; None when no valid one is there."""
        magic, generation, round_, is_delta, _, client_bytes, samples, layout, _, payload = _UPDATE.unpack_from(
            buffer, offset
        )
        if magic != _UPDATE_MAGIC or client_bytes > MAX_CLIENT_ID_BYTES:
            return None
        end = offset + _UPDATE.size
        client = bytes(buffer[end : end + client_bytes]).decode(errors="replace")
        return cls(generation, round_, bool(is_delta), samples, layout, payload, client)


class InputKey(NamedTuple):
    """Names one input of an aggregator: slot reference and the generation (8 bits) it was sent with."""

    slot: int
    generation: int


_SEAL: Final = struct.Struct("<4sIQIIIIdd")
_SEAL_KEY: Final = struct.Struct("<II")
_CHECKSUM: Final = struct.Struct("<I")
_SEAL_MAGIC: Final = b"LFS1"
MAX_SEAL_INPUTS: Final = 480
"""Inputs that one seal can name: they fill its page."""


class Seal(NamedTuple):
    """States what a finished accumulator contains; written after the sums, so that a reader may trust them.

    An aggregator has two accumulator slots and writes them in turn: the older sum and its seal stay whole
    while the newer one is being written, so a killed aggregator loses nothing that it had sealed.
    """

    pool_nonce: int
    """The life of the pool; seals of an earlier pool in the same memory do not count."""
    round: int
    sequence: int
    """Grows by one with each seal of the round; the highest valid one is the aggregator's state."""
    inputs: int
    """Updates and partial aggregates folded so far."""
    updates: int
    """Client updates contained, over the whole tree below."""
    weight: float
    """Sum of the weights contained."""
    delta_weight: float
    """The part of `weight` that came as differences to the round's model."""
    recent: tuple[InputKey, ...]
    """The newest inputs, oldest first, so many as a seal can name. Those before them have long been reported as
    FOLDED; of these the report may have been lost with the agent or with the worker itself."""

    def pack_into(self, buffer: memoryview | bytearray, offset: int = 0) -> None:
        """Write the seal and its checksum at `offset`. Raises `ValueError` when it names too many inputs."""
        if len(self.recent) > MAX_SEAL_INPUTS:
            raise ValueError(f"a seal names at most {MAX_SEAL_INPUTS} inputs, not {len(self.recent)}")
        body = bytearray(
            _SEAL.pack(
                _SEAL_MAGIC,
                self.round,
                self.pool_nonce,
                self.sequence,
                self.inputs,
                self.updates,
                len(self.recent),
                self.weight,
                self.delta_weight,
            )
        )
        body += struct.pack(f"<{2 * len(self.recent)}I", *chain.from_iterable(self.recent))
        buffer[offset : offset + len(body)] = body
        _CHECKSUM.pack_into(buffer, offset + len(body), zlib.crc32(body))

    @classmethod
    def unpack_from(cls, buffer: memoryview | bytes | bytearray, offset: int = 0) -> Seal | None:
        """Read the seal at `offset`; None when there is none or its checksum is wrong."""
        magic, round_, nonce, sequence, inputs, updates, named, weight, delta = _SEAL.unpack_from(buffer, offset)
        if magic != _SEAL_MAGIC or named > MAX_SEAL_INPUTS:
            return None
        end = offset + _SEAL.size + named * _SEAL_KEY.size
        body = bytes(buffer[offset:end])
        if zlib.crc32(body) != _CHECKSUM.unpack_from(buffer, end)[0]:
            return None
        keys = tuple(InputKey._make(key) for key in _SEAL_KEY.iter_unpack(body[_SEAL.size :]))
        return cls(nonce, round_, sequence, inputs, updates, weight, delta, keys)


PARTIAL_SEAL_OFFSET: Final = 2048
"""Where the seal of another node's partial aggregate lies in the header page of an update slot: behind the header
that every update slot has."""


def erase_header(buffer: memoryview | bytearray, offset: int = 0) -> None:
    """Make the header or seal at `offset` invalid."""
    buffer[offset : offset + 4] = b"\0\0\0\0"

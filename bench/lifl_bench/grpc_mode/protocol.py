"""What both ends of the gRPC mode agree on: methods, attributes, options, and how payloads are cut.

Messages are raw bytes; nothing is encoded with protobuf, which would copy a payload twice more. What describes a
payload travels beside it, as metadata of the call.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

SERVICE: Final = "lifl.bench.Aggregator"
SEND_UPDATE: Final = f"/{SERVICE}/SendUpdate"
SEND_PARTIAL: Final = f"/{SERVICE}/SendPartial"
WAIT_MODEL: Final = f"/{SERVICE}/WaitModel"
FETCH_MODEL: Final = f"/{SERVICE}/FetchModel"

CHUNK_BYTES: Final = 1 << 20
"""Bytes of one message of a stream."""

Options = tuple[tuple[str, int], ...]

_COMMON: Final[Options] = (
    # One DATA frame for a whole chunk; the default of 16 KiB makes 64 of it.
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    # The window of a stream, and so what a client that waits for a buffer may cost the server. Fixed, for what the
    # probes of bandwidth choose has no bound. A window of two or four chunks costs CPU: its updates are messages.
    ("grpc.http2.lookahead_bytes", 8 * CHUNK_BYTES),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_receive_message_length", 4 * CHUNK_BYTES),
)
SERVER_OPTIONS: Final[Options] = (*_COMMON, ("grpc.so_reuseport", 0))
CHANNEL_OPTIONS: Final[Options] = (
    *_COMMON,
    # Let a whole chunk be handed to the transport at once.
    ("grpc.http2.write_buffer_size", 2 * CHUNK_BYTES),
    # A connection of one's own, as clients on different machines have it.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
)

ALLOCATOR_TUNABLES: Final = ":".join(
    (
        "glibc.malloc.mmap_threshold=1073741824",
        "glibc.malloc.trim_threshold=4294967296",
        "glibc.malloc.top_pad=16777216",
        "glibc.malloc.arena_max=1",
        "glibc.malloc.hugetlb=1",
    )
)
"""GLIBC_TUNABLES with which the allocator keeps chunks that are freed. By default each chunk is mapped, faulted in
page by page and unmapped again, a third of a server's CPU time."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def keep_freed_memory() -> None:
    """The same for a process that is forked and so cannot be given tunables (without the huge pages).

    Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 8 * CHUNK_BYTES)


def chunks(data: memoryview) -> Iterator[bytes]:
    """Cut data into messages. grpcio takes nothing but bytes, which costs this copy."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield bytes(data[start : start + CHUNK_BYTES])


class Invalid(ValueError):
    """The attributes of a call cannot be used."""


Metadata = Sequence[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Attributes:
    """What describes a payload on its way: an update of a client, or the partial aggregate of a leaf."""

    sender: int
    """Number of the client, or of the leaf."""
    round: int
    nbytes: int
    """Of the whole payload."""
    weight: float
    """Samples of an update, or the sum of the weights in a partial aggregate."""
    delta_weight: float = 0.0
    """The part of `weight` that came as differences to the round's model."""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """As metadata of a call."""
        return (
            ("sender", str(self.sender)),
            ("round", str(self.round)),
            ("nbytes", str(self.nbytes)),
            ("weight", repr(float(self.weight))),
            ("delta-weight", repr(float(self.delta_weight))),
        )

    @classmethod
    def of(cls, metadata: Metadata | None) -> Attributes:
        """Read and check the metadata of a call. Raises Invalid."""
        values = {name: value for name, value in metadata or () if isinstance(value, str)}
        attributes = cls(
            _whole(values, "sender"),
            _whole(values, "round"),
            _whole(values, "nbytes"),
            _number(values, "weight"),
            _number(values, "delta-weight"),
        )
        if attributes.delta_weight > attributes.weight:
            raise Invalid("delta-weight must not be more than weight")
        return attributes


def round_metadata(round_number: int) -> tuple[tuple[str, str], ...]:
    """Metadata of a call that asks for the model of a round."""
    return (("round", str(round_number)),)


def round_of(metadata: Metadata | None) -> int:
    """The round that a call asks about. Raises Invalid."""
    return _whole({name: value for name, value in metadata or () if isinstance(value, str)}, "round")


def _whole(values: Mapping[str, str], name: str) -> int:
    text = values.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise Invalid(f"{name} must be a whole number, not {text[:40]!r}")
    return int(text)


def _number(values: Mapping[str, str], name: str) -> float:
    text = values.get(name, "")[:64]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise Invalid(f"{name} must be a number of at least 0, not {text!r}")
    return value

"""Checksums of what goes from node to node: XXH3 with 64 bits, which reads faster than a core can copy.

TCP's own 16 bits miss one in 65,536 damaged segments, and a network interface that checks them for the kernel may
damage bytes after that. XXH3 is no protection against somebody who forges: that is TLS's work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, NamedTuple

import xxhash

from lifl.errors import ProtocolError

PIECE_BYTES: Final = 1 << 20
"""So many bytes are checked at a time; a receiver does it while they are still in its cache."""


class Corrupt(ProtocolError):
    """The bytes that came are not those that were sent."""


class Checksum:
    """A checksum of bytes that come one piece after another."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def update(self, piece: bytes | memoryview) -> None:
        """Take in the next bytes."""
        self._state.update(piece)

    @property
    def value(self) -> int:
        """Of all bytes so far."""
        return self._state.intdigest()


class FileRange(NamedTuple):
    """`nbytes` bytes of an open file from `offset` on, to be sent without copying them."""

    file: int
    offset: int
    nbytes: int
    view: memoryview | None = None
    """The same bytes where they are mapped; None for a file that is not."""


Segment = bytes | FileRange


def segment_bytes(segment: Segment) -> int:
    """How long it is."""
    return len(segment) if isinstance(segment, bytes) else segment.nbytes


class SegmentsChecksum:
    """The checksum of some segments, made piece by piece whenever there is time for it.

    sendfile does not read the bytes, this has to: before sendfile it would cost a quarter of the speed. The sender
    does it while it waits for the receiver instead (`transfer.send_file`).
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._left = list(reversed(segments))
        self._done = 0
        """Bytes of the last of `_left`."""
        self._checksum = Checksum()
        self._room: memoryview | None = None

    def step(self) -> bool:
        """Take in one more piece; False when there is none. Raises OSError when a file cannot be read or ends."""
        if not self._left:
            return False
        segment = self._left[-1]
        nbytes = min(PIECE_BYTES, segment_bytes(segment) - self._done)
        piece = self._piece(segment, nbytes)
        self._checksum.update(piece)
        self._done += len(piece)
        if self._done == segment_bytes(segment):
            self._left.pop()
            self._done = 0
        return True

    def value(self) -> int:
        """Take in what is left and return the checksum of all; raises as `step`."""
        while self.step():
            pass
        return self._checksum.value

    def _piece(self, segment: Segment, nbytes: int) -> bytes | memoryview:
        start = self._done
        if isinstance(segment, bytes):
            return segment[start : start + nbytes]
        if segment.view is not None:
            return segment.view[start : start + nbytes]
        if self._room is None:
            self._room = memoryview(bytearray(PIECE_BYTES))
        got = os.preadv(segment.file, [self._room[:nbytes]], segment.offset + start)
        if not got and nbytes:
            raise OSError(f"the file ended after {start} of {segment.nbytes} bytes")
        return self._room[:got]

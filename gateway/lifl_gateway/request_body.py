"""The body of one HTTP request as a WSGI input stream that receives straight into the caller's memory.

The first bytes of a body arrive with the head and are copied; all others go from the kernel to where they shall
lie. A body that nobody reads is never asked for: `100 Continue` is sent at the first read.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

from lifl_gateway.transfer import Pace, limit_receive, receive_into


class RequestBody:
    """Reads exactly `length` bytes: first from `buffered` (taken out of it), then from the socket.

    `before_first_read` is called once before the socket is read. Every read raises TooSlow or PeerGone when the
    client does not deliver.
    """

    def __init__(
        self,
        sock: socket.socket,
        buffered: bytearray,
        length: int,
        pace: Pace,
        before_first_read: Callable[[], None],
    ) -> None:
        self._socket = sock
        self._buffered = buffered
        self._pace = pace
        self._before_first_read: Callable[[], None] | None = before_first_read
        self.remaining = length
        """Bytes not read yet."""

    def fill(self, view: memoryview) -> None:
        """Fill `view` completely; it may not be longer than what remains."""
        if len(view) > self.remaining:
            raise ValueError(f"asked for {len(view)} bytes of the {self.remaining} that remain")
        start = self._take_buffered(view)
        if start < len(view):
            if self._before_first_read:
                self._before_first_read()
                self._before_first_read = None
                limit_receive(self._socket, self._pace.seconds)
            receive_into(self._socket, view[start:], self._pace)
        self.remaining -= len(view)

    def _take_buffered(self, view: memoryview) -> int:
        count = min(len(view), len(self._buffered))
        if count:
            view[:count] = self._buffered[:count]
            del self._buffered[:count]
        return count

    def drop_buffered(self) -> None:
        """Drop what came with the head, if that is all of the body: the connection may then be kept."""
        if 0 < self.remaining <= len(self._buffered):
            del self._buffered[: self.remaining]
            self.remaining = 0

    # --- the rest of the WSGI input protocol, for whatever reads a small body --------------------------------

    def readinto(self, view: memoryview) -> int:
        """Fill as much of `view` as there is; returns the number of bytes, 0 at the end."""
        count = min(len(view), self.remaining)
        self.fill(view[:count])
        return count

    def read(self, size: int | None = -1) -> bytes:
        """Read `size` bytes, or all, into new memory."""
        wanted = self.remaining if size is None or size < 0 else min(size, self.remaining)
        data = bytearray(wanted)
        self.fill(memoryview(data))
        return bytes(data)

    def readline(self, size: int | None = -1) -> bytes:
        """Read up to a line end."""
        limit = self.remaining if size is None or size < 0 else min(size, self.remaining)
        line = bytearray()
        while len(line) < limit:
            line += self.read(1)
            if line.endswith(b"\n"):
                break
        return bytes(line)

    def readlines(self, hint: int | None = None) -> list[bytes]:
        """Read all lines."""
        return list(self)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

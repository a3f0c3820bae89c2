"""A process's connection to the data plane: sends descriptors, receives them, and gets back what was refused.

Two sockets make an endpoint. `near` carries descriptors out and in. What the router does not deliver (no such
destination, not allowed, receiver's credit used up) comes back on `far`. Both look the same whether the kernel
(eBPF, a TCP pair) or the agent (UNIX SEQPACKET) routes; only the speed differs.

An endpoint may be used for sending by several threads; receiving belongs to one.
"""

from __future__ import annotations

import contextlib
import mmap
import select
import socket
import struct
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from lifl.descriptor import MAX_BATCH, SIZE, Descriptor, DescriptorStream, Kind, decode
from lifl.errors import ProtocolError, Unavailable

_READ_BYTES: Final = 256 * SIZE
"""One read takes up to 256 descriptors: a larger buffer costs more than it saves. It is a multiple of the size, or
two kinds of data would misframe."""
_CODEC: Final = struct.Struct("<IIIHBB")
_NO_WAIT: Final = socket.MSG_DONTWAIT
_SEND_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Endpoint:
    """One data-plane endpoint.

    `identifier` is its u32 id, `near` and `far` its sockets, `credit_page` the mapped page in which it tells
    the router how many descriptors it has read (None when the data plane needs none). It owns all three.
    """

    __slots__ = (
        "_bounced",
        "_consumed",
        "_credit",
        "_far_stream",
        "_packets",
        "_page",
        "_poller",
        "_stream",
        "closed",
        "far",
        "identifier",
        "near",
    )

    def __init__(
        self, identifier: int, near: socket.socket, far: socket.socket, credit_page: mmap.mmap | None = None
    ) -> None:
        self.identifier = identifier
        self.near = near
        self.far = far
        self.closed = False
        """True once the router hung up (the agent of the unix data plane is gone): nothing will arrive."""
        self._page = credit_page
        self._credit = memoryview(credit_page)[:8].cast("Q") if credit_page is not None else None
        self._consumed = self._credit[0] if self._credit is not None else 0
        self._stream = DescriptorStream()
        self._far_stream = DescriptorStream()
        self._bounced: list[Descriptor] = []
        self._poller: select.poll | None = None
        self._packets = near.type == socket.SOCK_SEQPACKET

    def fileno(self) -> int:
        """File descriptor to poll for descriptors that arrive (`near`)."""
        return self.near.fileno()

    def far_fileno(self) -> int:
        """File descriptor to poll for descriptors that come back (`far`)."""
        return self.far.fileno()

    # --- sending ---

    def send(self, destination: int, slot: int, round_number: int, kind: Kind, generation: int = 0) -> None:
        """Send one descriptor; see `lifl.descriptor` for the fields.

        Returns when the router has taken it. If it cannot be delivered it shows up in `bounced`. Raises
        `Unavailable` when this endpoint can send no more and its process has to join again.
        """
        self._send(_CODEC.pack(destination, 0, slot, round_number & 0xFFFF, kind, generation & 0xFF))

    def send_many(self, destination: int, descriptors: Iterable[bytes]) -> None:
        """Send descriptors (as `lifl.descriptor.encode` makes them), all for `destination`, in as few sends as
        possible. Raises `ProtocolError` for one that names another destination, else like `send`.
        """
        head = destination.to_bytes(4, "little")
        source = iter(descriptors)
        while batch := list(islice(source, MAX_BATCH)):
            if any(len(item) != SIZE or item[:4] != head for item in batch):
                raise ProtocolError("the descriptors of one send must have one destination")
            self._send(b"".join(batch))

    def _send(self, data: bytes) -> None:
        try:
            sent = self.near.send(data, _SEND_FLAGS)
        except BlockingIOError:
            sent = 0
        except (BrokenPipeError, ConnectionResetError):
            # The destination vanished under the send (kernel), or the agent did (unix): not delivered either way.
            self._bounced += decode(data)
            return
        except PermissionError as error:
            raise Unavailable(
                "the data plane refuses every send of this endpoint; join the agent again"
            ) from error
        if sent != len(data):
            self._send_patiently(data[sent:])

    def _send_patiently(self, data: bytes) -> None:
        """Wait for room. Bounces that nobody reads may be what blocks, so they are read meanwhile."""
        poller = select.poll()
        poller.register(self.near, select.POLLOUT)
        poller.register(self.far, select.POLLIN)
        while data:
            ready = dict(poller.poll())
            if self.far.fileno() in ready and not self._read_far():
                poller.unregister(self.far)
            if self.near.fileno() not in ready:
                continue
            with contextlib.suppress(BlockingIOError):
                try:
                    data = data[self.near.send(data, _SEND_FLAGS) :]
                except (BrokenPipeError, ConnectionResetError):
                    self._bounced += decode(data)
                    return

    # --- receiving ---

    def receive(self) -> list[Descriptor]:
        """Return every descriptor that has arrived, in order of arrival for each sender; never blocks.

        Descriptors of one sender stay in order. An empty list means that nothing is there now; with `closed`
        set, nothing will be.
        """
        received: list[Descriptor] = []
        while True:
            try:
                data = self.near.recv(_READ_BYTES, _NO_WAIT)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            if not data:
                self.closed = True
                break
            received = received + self._stream.feed(data) if received else self._stream.feed(data)
            # A stream hands out all it has in one read; packets come one at a time.
            if not self._packets and len(data) < _READ_BYTES:
                break
        if self._credit is not None and received:
            self._consumed += len(received)
            self._credit[0] = self._consumed
        return received

    def bounced(self) -> list[Descriptor]:
        """Return the descriptors that came back since the last call; never blocks.

        The router has stamped `source` in them, except where the destination vanished during the send.
        """
        self._read_far()
        bounced, self._bounced = self._bounced, []
        return bounced

    def _read_far(self) -> bool:
        """Move what came back into the list; False when the far socket has ended."""
        while True:
            try:
                data = self.far.recv(_READ_BYTES, _NO_WAIT)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                return False
            if not data:
                return False
            self._bounced += self._far_stream.feed(data)

    def wait(self, timeout: float | None = None, others: Sequence[int] = ()) -> bool:
        """Wait until something arrived, came back, or one of the file descriptors `others` is readable.

        `timeout` in seconds, None for ever. Returns False after the timeout. Raises `Unavailable` when the
        router hung up, so that nobody waits in vain.
        """
        if self._bounced:
            return True
        if self.closed:
            raise Unavailable("the data plane hung up")
        poller = self._poller
        if poller is None or others:
            poller = select.poll()
            for fd in (self.near.fileno(), self.far.fileno(), *others):
                poller.register(fd, select.POLLIN)
            if not others:
                self._poller = poller
        return bool(poller.poll(None if timeout is None else timeout * 1000))

    def close(self) -> None:
        """Close both sockets and unmap the credit page."""
        self.near.close()
        self.far.close()
        if self._credit is not None and self._page is not None:
            self._credit.release()
            self._credit = None
            with contextlib.suppress(BufferError):
                self._page.close()

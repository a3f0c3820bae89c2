"""One TCP connection between two nodes: messages and bytes on it, with or without TLS, and limits on waiting."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final

from lifl.congestion import avoid_bbr
from lifl.errors import InvalidInput, Unavailable
from lifl.messages import Message
from lifl.peer.checksum import FileRange, Segment, SegmentsChecksum, segment_bytes
from lifl.peer.protocol import LENGTH, Decoder, body_bytes, encode
from lifl.peer.transfer import (
    Pace,
    PeerGone,
    TooSlow,
    limit_receive,
    limit_send,
    receive_into,
    receive_some,
    send_all,
    send_file,
)

if TYPE_CHECKING:
    import ssl

CONNECT_SECONDS: Final = 5.0
_KEEPALIVE_SECONDS: Final = 5
_KEEPALIVE_PROBES: Final = 3
_TLS_BYTES: Final = 64 * 1024
_NO_LINGER: Final = struct.pack("ii", 1, 0)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, an IPv6 host in brackets. Raises InvalidInput."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidInput(f"{address!r} is not HOST:PORT")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Connection:
    """A connection; owns the socket. Receiving and sending belong to one thread, `interrupt` to any.

    Everything that waits raises TooSlow when the peer does not keep to the pace, or to the time given, and
    PeerGone when the connection ends early. Both mean that the connection can be used no more.
    """

    def __init__(self, sock: socket.socket, pace: Pace) -> None:
        self._socket = sock
        self._pace = pace
        self._is_tls = False
        self._is_interrupted = False
        self._window_start = time.monotonic()
        self._window_bytes = 0
        tune(sock, pace)
        sock.settimeout(None)
        limit_send(sock, pace.seconds)

    def secure(self, context: ssl.SSLContext, *, is_server: bool, seconds: float) -> None:
        """Make TLS of it, the peer's certificate included."""
        self._socket.settimeout(seconds)
        try:
            self._socket = context.wrap_socket(self._socket, server_side=is_server)
        except OSError as error:
            raise PeerGone(f"no TLS with the other node: {error}") from error
        self._is_tls = True
        if self._is_interrupted:
            raise PeerGone("the connection was interrupted")

    # --- messages --------------------------------------------------------------------------------------------

    def send(self, *messages: Message) -> None:
        """Send messages in one go. Raises ProtocolError when one is too large."""
        self._send_data(memoryview(b"".join(map(encode, messages))))

    def receive(self, decoder: Decoder, seconds: float) -> Message:
        """Wait up to `seconds` for a whole message. Raises ProtocolError when it is none of the decoder's."""
        deadline = time.monotonic() + seconds
        length = bytearray(LENGTH.size)
        self._fill(memoryview(length), deadline)
        body = bytearray(body_bytes(length))
        self._fill(memoryview(body), deadline)
        return decoder.decode(body)

    def wait_for_end(self, seconds: float) -> bool:
        """Wait until the peer ends the connection; False when it said something instead, or nothing in time."""
        try:
            self._fill(memoryview(bytearray(1)), time.monotonic() + seconds)
        except PeerGone:
            return True
        except TooSlow:
            return False
        return False

    # --- bytes -----------------------------------------------------------------------------------------------

    def start_bytes(self) -> None:
        """Begin to receive bytes at the pace."""
        self._window_start, self._window_bytes = time.monotonic(), 0
        if self._is_tls:
            self._socket.settimeout(self._pace.seconds)
        else:
            limit_receive(self._socket, self._pace.seconds)

    def receive_some(self, view: memoryview) -> int:
        """Receive the next bytes, after `start_bytes`; without TLS all of `view` unless the connection ends."""
        if not self._is_tls:
            return receive_some(self._socket, view, self._pace)
        got = self._receive_tls(view)
        self._check_window(got)
        return got

    def send_segments(self, segments: Sequence[Segment], skip: int, checksum: SegmentsChecksum) -> None:
        """Send all bytes but the first `skip`; files' without copying them, unless there is TLS.

        `checksum` gets on while the peer takes no more. Raises OSError when it cannot read a file.
        """
        for segment in segments:
            nbytes = segment_bytes(segment)
            if skip < nbytes:
                self._send_segment(segment, skip, checksum)
            skip = max(0, skip - nbytes)

    def _send_segment(self, segment: Segment, skip: int, checksum: SegmentsChecksum) -> None:
        if isinstance(segment, bytes):
            self._send_data(memoryview(segment)[skip:])
        elif not self._is_tls:
            left, start = segment.nbytes - skip, segment.offset + skip
            send_file(self._socket, segment.file, left, self._pace, offset=start, meanwhile=checksum.step)
        elif segment.view is not None:
            self._send_data(segment.view[skip : segment.nbytes])
        else:
            self._send_copies(segment, skip)

    def _send_copies(self, part: FileRange, skip: int) -> None:
        room = memoryview(bytearray(_TLS_BYTES))
        while skip < part.nbytes:
            got = os.preadv(part.file, [room[: part.nbytes - skip]], part.offset + skip)
            if not got:
                raise PeerGone(f"the file ended after {skip} of {part.nbytes} bytes")
            self._send_data(room[:got])
            skip += got

    def _send_data(self, view: memoryview) -> None:
        if not self._is_tls:
            send_all(self._socket, view, self._pace)
            return
        self._socket.settimeout(self._pace.seconds)
        try:
            for start in range(0, len(view), _TLS_BYTES):
                self._socket.sendall(view[start : start + _TLS_BYTES])
        except TimeoutError as error:
            raise TooSlow(f"the peer did not take {_TLS_BYTES} bytes in {self._pace.seconds:g} s") from error
        except OSError as error:
            raise PeerGone(f"the connection broke: {error}") from error

    def _fill(self, view: memoryview, deadline: float) -> None:
        if not self._is_tls:
            left = deadline - time.monotonic()
            limit_receive(self._socket, left)
            receive_into(self._socket, view, Pace(left, len(view)))
            return
        done = 0
        while done < len(view):
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            done += self._receive_tls(view[done:])

    def _receive_tls(self, view: memoryview) -> int:
        try:
            got = self._socket.recv_into(view)
        except TimeoutError as error:
            raise TooSlow("no byte came in time") from error
        except OSError as error:
            raise PeerGone(f"the connection broke: {error}") from error
        if not got:
            raise PeerGone("the connection ended")
        return got

    def _check_window(self, got: int) -> None:
        """The pace of TLS: it hands out few bytes in a call, so calls are counted together."""
        self._window_bytes += got
        now = time.monotonic()
        if now - self._window_start < self._pace.seconds:
            return
        if self._window_bytes < self._pace.nbytes:
            raise TooSlow(f"{self._window_bytes} bytes in {self._pace.seconds:g} s")
        self._window_start, self._window_bytes = now, 0

    # --- the end ---------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Make calls in progress raise PeerGone; may be called from any thread."""
        self._is_interrupted = True
        with contextlib.suppress(OSError):
            # Not SSLSocket's own method: that one goes on without TLS.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def abort(self) -> None:
        """Close, and drop what was not sent yet: the memory it lies in is wanted for something else."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.close()

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


def tune(sock: socket.socket, pace: Pace) -> None:
    """Set what connections between nodes have in common.

    Buffers are left to the kernel: it lets them grow further than a process may set them.
    """
    avoid_bbr(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that is cut off says nothing: what it does not acknowledge, or a probe without answer, ends this.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(pace.seconds * 1000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, _KEEPALIVE_SECONDS // _KEEPALIVE_PROBES))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


def open_socket(address: str) -> tuple[socket.socket, tuple[str, int]]:
    """A socket for an address and what to connect it to. Raises InvalidInput, Unavailable for an unknown name."""
    host, port = split_address(address)
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise Unavailable(f"{address}: {error}") from error
    return socket.socket(family, kind), (str(place[0]), int(place[1]))

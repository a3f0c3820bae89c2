"""Control messages over a UNIX SEQPACKET socket, with file descriptors attached (SCM_RIGHTS).

One packet is one message. The end of the socket is the death of the peer: it is how an agent notices that a
worker is gone. Nothing here is on the path of an update's bytes.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final, Generic, TypeVar

import msgspec

from lifl.errors import ProtocolError, Unavailable

MAX_MESSAGE_BYTES: Final = 1 << 18
"""Largest control message; SEQPACKET delivers it whole or not at all."""
MAX_FDS: Final = 64

_CREDENTIALS: Final = struct.Struct("3i")

Received = TypeVar("Received")


class ControlChannel(Generic[Received]):
    """One end of a control connection; sends any msgspec struct and receives those of one tagged union."""

    def __init__(self, sock: socket.socket, receives: object) -> None:
        self._socket = sock
        self._encoder = msgspec.json.Encoder()
        self._decoder: msgspec.json.Decoder[Received] = msgspec.json.Decoder(receives)

    @classmethod
    def connect(cls, path: str, receives: object, timeout: float | None = None) -> ControlChannel[Received]:
        """Connect to the listener at `path`; raises `Unavailable` when nobody listens there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(timeout)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise Unavailable(f"nobody answers at {path}: {error.strerror or error}") from error
        return cls(sock, receives)

    @property
    def socket(self) -> socket.socket:
        """The socket itself, for a poll loop."""
        return self._socket

    def fileno(self) -> int:
        """The socket's file descriptor number."""
        return self._socket.fileno()

    def settimeout(self, seconds: float | None) -> None:
        """Limit every later send and receive; None waits for ever."""
        self._socket.settimeout(seconds)

    def send(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Send one message with copies of `fds`; raises `Unavailable` when the peer is gone."""
        data = self._encoder.encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"control message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES}")
        try:
            if fds:
                socket.send_fds(self._socket, [data], list(fds))
            else:
                self._socket.send(data)
        except OSError as error:
            raise Unavailable(f"the peer is gone: {error}") from error

    def receive(self) -> tuple[Received, list[int]]:
        """Return the next message and the file descriptors that came with it (the caller closes them).

        Raises `Unavailable` at the end of the connection, `ProtocolError` for anything that is no known
        message, and `BlockingIOError`/`TimeoutError` as the socket does.
        """
        try:
            data, fds, flags, _ = receive_with_fds(self._socket)
        except (BlockingIOError, TimeoutError):
            raise
        except OSError as error:
            raise Unavailable(f"the peer is gone: {error}") from error
        if not data:
            close_fds(fds)
            raise Unavailable("the peer closed the connection")
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolError("control message too large, or with too many file descriptors")
            return self._decoder.decode(data), fds
        except (msgspec.MsgspecError, ProtocolError) as error:
            close_fds(fds)
            raise ProtocolError(f"not a control message: {error}") from error

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


def receive_with_fds(sock: socket.socket) -> tuple[bytes, list[int], int, object]:
    """Like `socket.recv_fds` for one control message, with close-on-exec set on what arrives."""
    data, ancillary, flags, address = sock.recvmsg(
        MAX_MESSAGE_BYTES + 1, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds), flags, address


def close_fds(fds: Sequence[int]) -> None:
    """Close file descriptors that nobody wants, ignoring those already closed."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Return (pid, uid, gid) of the process at the other end of a UNIX socket, as the kernel knows them."""
    pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid, gid


def listen(path: str, backlog: int = 128, *, mode: int = 0o600) -> socket.socket:
    """Bind and listen on a SEQPACKET socket at `path`, replacing a stale one."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind(path)
    os.chmod(path, mode)
    sock.listen(backlog)
    return sock

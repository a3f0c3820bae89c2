"""Moving many bytes over a blocking socket: what `lifl.peer.transfer` has, and what only HTTP needs."""

from __future__ import annotations

import mmap
import socket
import time
from typing import Final

from lifl.peer.transfer import (
    Pace,
    PeerGone,
    TooSlow,
    limit_receive,
    limit_send,
    receive_into,
    send_all,
    send_file,
)

__all__ = [
    "Pace",
    "PeerGone",
    "TooSlow",
    "discard_input",
    "limit_receive",
    "limit_send",
    "receive_into",
    "send_all",
    "send_file",
]

# Never touched: with MSG_TRUNC the kernel drops the bytes instead of writing them here.
_DISCARD_ROOM: Final = mmap.mmap(-1, 1 << 20)
_DISCARD_VIEW: Final = memoryview(_DISCARD_ROOM)


def discard_input(sock: socket.socket, most: int, quiet: float, whole: float) -> None:
    """Drop up to `most` bytes that the peer still sends, without copying them out of the kernel.

    Ends at the peer's end of file, after `quiet` seconds without a byte, or after `whole` seconds.
    """
    deadline = time.monotonic() + whole
    while most > 0 and (left := deadline - time.monotonic()) > 0:
        try:
            limit_receive(sock, min(quiet, left))
            got = sock.recv_into(_DISCARD_VIEW, min(most, len(_DISCARD_VIEW)), socket.MSG_TRUNC)
        except OSError:  # nothing more came in time, or the peer is gone
            return
        if not got:
            return
        most -= got

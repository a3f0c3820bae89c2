"""Moving many bytes over a blocking socket, with a deadline on progress instead of on the whole transfer.

A body of a gigabyte over a slow line is welcome; a peer that holds a slot and sends nothing is not. The kernel
keeps the time: `SO_RCVTIMEO` and `SO_SNDTIMEO` bound how long one call may wait in all, and `MSG_WAITALL` lets
one call take a whole body, so that a body costs a handful of system calls and none of them holds the GIL.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time
from typing import Final, NamedTuple

from lifl.errors import LiflError

_TIMEVAL: Final = struct.Struct("@ll")
_SHORTEST_TIMEOUT: Final = 0.001  # zero would mean for ever
_SENDFILE_BYTES: Final = 1 << 30
# A call that waited out its time may return a little early by the monotonic clock.
_CLOCK_SLACK: Final = 0.9


class Pace(NamedTuple):
    """The least progress that a peer has to make: `nbytes` bytes, or all that is left, every `seconds`."""

    seconds: float = 10.0
    nbytes: int = 64 * 1024


class TooSlow(LiflError):
    """The peer moved fewer bytes than its `Pace` asks for."""


class PeerGone(LiflError):
    """The peer ended the connection before the transfer was complete."""


def limit_receive(sock: socket.socket, seconds: float) -> None:
    """Let every later receive on a blocking socket wait at most `seconds` in all."""
    _set_timeout(sock, socket.SO_RCVTIMEO, seconds)


def limit_send(sock: socket.socket, seconds: float) -> None:
    """Let every later send on a blocking socket wait at most `seconds` in all."""
    _set_timeout(sock, socket.SO_SNDTIMEO, seconds)


def _set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    whole, part = divmod(max(seconds, _SHORTEST_TIMEOUT), 1.0)
    sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(whole), int(part * 1e6)))


def receive_into(sock: socket.socket, view: memoryview, pace: Pace) -> None:
    """Fill `view` from a socket whose receives are limited to `pace.seconds`.

    Raises TooSlow when the peer falls behind the pace, PeerGone when it ends early.
    """
    done, total = 0, len(view)
    while done < total:
        started = time.monotonic()
        try:
            got = sock.recv_into(view[done:], 0, socket.MSG_WAITALL)
        except BlockingIOError as error:
            raise TooSlow(f"no byte came for {pace.seconds:g} s") from error
        except OSError as error:
            raise PeerGone(f"the connection broke after {done} of {total} bytes") from error
        if not got:
            raise PeerGone(f"the connection ended after {done} of {total} bytes")
        done += got
        if done < total:
            _check_pace(got, started, pace)


def send_all(sock: socket.socket, data: memoryview | bytes, pace: Pace) -> None:
    """Send all of `data` on a socket whose sends are limited to `pace.seconds`; raises as `receive_into`."""
    view = memoryview(data).cast("B")
    done, total = 0, len(view)
    while done < total:
        started = time.monotonic()
        try:
            sent = sock.send(view[done:])
        except BlockingIOError as error:
            raise TooSlow(f"the peer took nothing for {pace.seconds:g} s") from error
        except OSError as error:
            raise PeerGone(f"the connection broke: {error}") from error
        done += sent
        if done < total:
            _check_pace(sent, started, pace)


def send_file(sock: socket.socket, file: int, nbytes: int, pace: Pace) -> None:
    """Send the first `nbytes` bytes of a file descriptor without copying them through this process.

    The socket's sends are limited to `pace.seconds`. Raises as `receive_into`, and PeerGone too when the file is
    shorter than `nbytes`: the answer cannot be completed then.
    """
    done = 0
    while done < nbytes:
        started = time.monotonic()
        try:
            sent = os.sendfile(sock.fileno(), file, done, min(nbytes - done, _SENDFILE_BYTES))
        except BlockingIOError as error:
            raise TooSlow(f"the peer took nothing for {pace.seconds:g} s") from error
        except OSError as error:
            raise PeerGone(f"the connection broke: {error}") from error
        if not sent:
            raise PeerGone(f"the file ended after {done} of {nbytes} bytes")
        done += sent
        if done < nbytes:
            _check_pace(sent, started, pace)


def _check_pace(moved: int, started: float, pace: Pace) -> None:
    """Raise TooSlow when a call used up its time and moved too little.

    A short count alone proves nothing: the kernel may return early for other reasons.
    """
    if moved < pace.nbytes and time.monotonic() - started >= pace.seconds * _CLOCK_SLACK:
        raise TooSlow(f"{moved} bytes in {pace.seconds:g} s; at least {pace.nbytes} are asked for")


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

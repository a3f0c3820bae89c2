"""Moving many bytes over a blocking socket, with a deadline on progress instead of on the whole transfer.

A body of a gigabyte over a slow line is welcome; a peer that holds a slot and sends nothing is not. The kernel
keeps the time: `SO_RCVTIMEO` and `SO_SNDTIMEO` bound how long one call may wait in all, and `MSG_WAITALL` lets
one call take a whole body, so that a body costs a handful of system calls and none of them holds the GIL.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
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


DEFAULT_PACE: Final = Pace()


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
        try:
            done += receive_some(sock, view[done:], pace)
        except PeerGone as error:
            raise PeerGone(f"{error} after {done} of {total} bytes") from error


def receive_some(sock: socket.socket, view: memoryview, pace: Pace) -> int:
    """Fill as much of `view` as one call can, which is all of it unless the connection ends or is slow.

    Returns how many bytes came, at least one. Raises as `receive_into`.
    """
    started = time.monotonic()
    try:
        got = sock.recv_into(view, 0, socket.MSG_WAITALL)
    except BlockingIOError as error:
        raise TooSlow(f"no byte came for {pace.seconds:g} s") from error
    except OSError as error:
        raise PeerGone("the connection broke") from error
    if not got:
        raise PeerGone("the connection ended")
    if got < len(view):
        _check_pace(got, started, pace)
    return got


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


def send_file(
    sock: socket.socket,
    file: int,
    nbytes: int,
    pace: Pace,
    *,
    offset: int = 0,
    meanwhile: Callable[[], bool] | None = None,
) -> None:
    """Send `nbytes` bytes of a file descriptor from `offset` on without copying them through this process.

    The socket's sends are limited to `pace.seconds`. `meanwhile` does a little work, for a small part of a
    millisecond, and says whether there was any; it is called when the socket takes no more just now.

    Raises as `receive_into`, PeerGone too when the file is too short (the answer cannot be completed then), and
    what `meanwhile` raises.
    """
    done = 0 if meanwhile is None else _send_file_and_work(sock, file, nbytes, offset, meanwhile)
    while done < nbytes:
        started = time.monotonic()
        try:
            sent = os.sendfile(sock.fileno(), file, offset + done, min(nbytes - done, _SENDFILE_BYTES))
        except BlockingIOError as error:
            raise TooSlow(f"the peer took nothing for {pace.seconds:g} s") from error
        except OSError as error:
            raise PeerGone(f"the connection broke: {error}") from error
        if not sent:
            raise PeerGone(f"the file ended after {done} of {nbytes} bytes")
        done += sent
        if done < nbytes:
            _check_pace(sent, started, pace)


def _send_file_and_work(sock: socket.socket, file: int, nbytes: int, offset: int, work: Callable[[], bool]) -> int:
    """Send and work in turns until one of both is done; returns the bytes sent."""
    done = 0
    sock.setblocking(False)
    try:
        while done < nbytes:
            try:
                sent = os.sendfile(sock.fileno(), file, offset + done, min(nbytes - done, _SENDFILE_BYTES))
            except BlockingIOError:
                if not work():
                    break
                continue
            except OSError as error:
                raise PeerGone(f"the connection broke: {error}") from error
            if not sent:
                raise PeerGone(f"the file ended after {done} of {nbytes} bytes")
            done += sent
    finally:
        sock.setblocking(True)
    return done


def _check_pace(moved: int, started: float, pace: Pace) -> None:
    """Raise TooSlow when a call used up its time and moved too little.

    A short count alone proves nothing: the kernel may return early for other reasons.
    """
    if moved < pace.nbytes and time.monotonic() - started >= pace.seconds * _CLOCK_SLACK:
        raise TooSlow(f"{moved} bytes in {pace.seconds:g} s; at least {pace.nbytes} are asked for")

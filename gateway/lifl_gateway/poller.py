"""The agent's event loop: epoll, level-triggered, no timers; it sleeps when nothing happens."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Final

READ: Final = select.EPOLLIN | select.EPOLLRDHUP
WRITE: Final = select.EPOLLOUT

Callback = Callable[[int], None]
"""Called with the epoll events of its file descriptor."""


class Poller:
    """Calls back when a file descriptor is ready. One thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, tuple[Callback, int]] = {}
        self._batch = 0
        self._running = False

    def register(self, fd: int, callback: Callback, events: int = READ) -> None:
        """Call `callback` while one of `events` is true of `fd` (hang-up and error always are)."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = (callback, self._batch)

    def modify(self, fd: int, events: int) -> None:
        """Change the events of a registered file descriptor."""
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Stop calling back for `fd`; does nothing when it is not registered. Call before closing it."""
        if self._callbacks.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def run(self) -> None:
        """Serve until `stop`."""
        self._running = True
        while self._running:
            ready = self._epoll.poll()
            self._batch += 1
            for fd, events in ready:
                callback, since = self._callbacks.get(fd, (None, 0))
                # The number may belong to another file by now, opened by an earlier callback of this batch.
                if callback is not None and since < self._batch:
                    callback(events)

    def stop(self) -> None:
        """Have `run` return after the current batch."""
        self._running = False

    def close(self) -> None:
        """Close the epoll file descriptor."""
        self._callbacks.clear()
        self._epoll.close()


class StopSignals:
    """Turns signals into a readable file descriptor and stops a poller on the first."""

    def __init__(self, poller: Poller, signals: Iterable[signal.Signals]) -> None:
        self._poller = poller
        self.received = False
        """Whether one of them has come."""
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._ignore) for number in signals}
        poller.register(self._read.fileno(), self._stop)

    def _stop(self, _events: int) -> None:
        self.received = True
        self._poller.stop()

    @staticmethod
    def _ignore(_number: int, _frame: FrameType | None) -> None:
        """The wake-up file descriptor does the work."""

    def close(self) -> None:
        """Put the old handlers back."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._poller.unregister(self._read.fileno())
        self._read.close()
        self._write.close()


def raise_file_limit() -> None:
    """Raise this process's own soft limit of open files to its hard limit."""
    import resource

    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class SpareFile:
    """An open file descriptor to give up when there are no more, so that one connection can be taken and
    refused instead of waking the loop for ever."""

    def __init__(self) -> None:
        self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def refuse(self, listener: socket.socket) -> None:
        """Accept one connection of `listener` and close it."""
        os.close(self._fd)
        with contextlib.suppress(OSError):
            listener.accept()[0].close()
        self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

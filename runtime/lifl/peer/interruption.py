"""Ending a transfer from another thread, at once: whatever it waits for, its connection is shut down."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from lifl.errors import LiflError


class Interrupted(LiflError):
    """The transfer was given up from another thread of this process."""


class Interruptible(Protocol):
    """What an interruption ends."""

    def interrupt(self) -> None:
        """Make calls in progress return; called from another thread."""


class Interruption:
    """One switch for any number of transfers. Once set it stays set."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._watched: list[Interruptible] = []

    @property
    def is_set(self) -> bool:
        """Whether transfers shall end."""
        return self._event.is_set()

    def set(self) -> None:
        """End the transfers in progress, and all that would begin."""
        with self._lock:
            self._event.set()
            for each in self._watched:
                each.interrupt()

    def wait(self, seconds: float) -> bool:
        """Sleep so long unless interrupted; whether it was."""
        return self._event.wait(seconds)

    def check(self) -> None:
        """Raise Interrupted when set."""
        if self._event.is_set():
            raise Interrupted("the transfer was interrupted")

    @contextmanager
    def watching(self, transfer: Interruptible) -> Iterator[None]:
        """End `transfer` when this is set meanwhile. Raises Interrupted when it is set already."""
        with self._lock:
            self.check()
            self._watched.append(transfer)
        try:
            yield
        finally:
            with self._lock:
                self._watched.remove(transfer)

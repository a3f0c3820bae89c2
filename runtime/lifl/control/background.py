"""A thread for what would block the coordinator's loop (disks, large copies), with the results in the loop."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable

log = logging.getLogger("lifl.coordinator")

Continuation = Callable[[], None]
Task = Callable[[], Continuation]


class Background:
    """Runs tasks one after another in one thread; what each returns is then called by the loop.

    The order is kept, so a task may rely on all earlier ones being done. What a task raises is only logged.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Continuation] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)

    def fileno(self) -> int:
        """File descriptor that is readable when `process` has something to do."""
        return self._event

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def put(self, task: Task) -> None:
        """Have the thread run `task` after all earlier ones, and the loop what it returns."""
        self._tasks.put(task)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._results.put(task())
            except Exception:
                log.exception("a background task failed")
                continue
            os.eventfd_write(self._event, 1)

    def process(self) -> None:
        """Call what finished tasks have returned; the loop does so when `fileno` is readable."""
        os.eventfd_read(self._event)
        while True:
            try:
                self._results.get_nowait()()
            except queue.Empty:
                return

    def finish(self) -> None:
        """Do what is queued, then end the thread."""
        self._tasks.put(None)
        self._thread.join()

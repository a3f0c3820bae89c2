"""Group commit: batches of several threads go into the journal as one transaction.

A thread that has to wait for its batch writes all that are pending if nobody else is writing, and else sleeps
until its own is written: there is no thread for it, and with one connection nothing waits for another.
"""

from __future__ import annotations

import sqlite3
import threading

from lifl.cluster.journal import Batch, Journal
from lifl.errors import Unavailable


class GroupCommit:
    """Writes batches in the order in which they were added."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._changed = threading.Condition()
        self._pending: Batch = []
        self._added = 0
        self._written = 0
        self._is_writing = False
        self.failure: sqlite3.Error | None = None
        """Why nothing can be written any more: what is in memory is ahead of the journal then."""

    def add(self, batch: Batch) -> int:
        """Add a batch, in the order of the changes; returns the ticket to wait for. An empty one waits for all
        that were added before."""
        with self._changed:
            if batch:
                self._pending += batch
                self._added += 1
            return self._added

    def wait(self, ticket: int) -> None:
        """Return when everything up to `ticket` is on the disk. Raises Unavailable when it cannot be written."""
        with self._changed:
            while self._written < ticket and self.failure is None:
                if self._is_writing:
                    self._changed.wait()
                else:
                    self._write()
            if self._written < ticket:
                raise Unavailable(f"the journal cannot be written: {self.failure}")

    def _write(self) -> None:
        """Write what is pending; the condition's lock is held before and after."""
        batch, self._pending = self._pending, []
        upto, self._is_writing = self._added, True
        failure: sqlite3.Error | None = None
        self._changed.release()
        try:
            self._journal.commit(batch)
        except sqlite3.Error as error:
            failure = error
        finally:
            self._changed.acquire()
            self._is_writing = False
            self._changed.notify_all()
        self.failure = failure
        if failure is None:
            self._written = upto

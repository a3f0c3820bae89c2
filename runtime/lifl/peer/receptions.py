"""Partial aggregates that are being received, and those whose connection ended before they were complete.

The latter are kept for a while, so that a sender whose link was cut goes on where it stopped. They hold memory
that others may want, so they are few, and a newer one of the same sender takes the place of an older one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from lifl.errors import Busy
from lifl.peer.checksum import Checksum
from lifl.peer.connection import Connection
from lifl.peer.protocol import PartialOffer, PartialStatus

KEEP_SECONDS: Final = 30.0
MOST_RECEPTIONS: Final = 64
_GRACE_SECONDS: Final = 0.1
"""For the end of a connection, and what came before it, to arrive by itself once its sender has a new one."""
_TAKE_OVER_SECONDS: Final = 5.0


class Full(Busy):
    """There is no memory for a partial aggregate just now."""


class Sink(Protocol):
    """Where the bytes of one partial aggregate go. Either `commit` or `abandon` is called, once, as the last."""

    @property
    def view(self) -> memoryview:
        """The memory, as long as the offer says; written until the last call."""

    def commit(self) -> PartialStatus:
        """The bytes are complete and right: count them. Never `corrupt`.

        Raises Refused or Busy for the sender, Unavailable when nobody can tell whether they count.
        """

    def abandon(self) -> None:
        """They will not be complete; the memory can be used for something else."""


class Key(NamedTuple):
    """What makes two offers one and the same transfer."""

    job: str
    nonce: int
    round: int
    attempt: int
    epoch: int
    source: str
    sequence: int
    nbytes: int

    @classmethod
    def of(cls, offer: PartialOffer) -> Key:
        """The key of an offer."""
        return cls(*(getattr(offer, name) for name in cls._fields))


class Reception:
    """One partial aggregate on its way in."""

    def __init__(self, key: Key, sink: Sink) -> None:
        self.key = key
        self.sink = sink
        self.connection: Connection | None = None
        """On which it comes now."""
        self.received = 0
        self.checksum = Checksum()
        self.expires = 0.0

    def restart(self) -> None:
        """Receive it again from the first byte."""
        self.received = 0
        self.checksum = Checksum()


class Receptions:
    """All receptions of a server; every method may be called from any thread."""

    def __init__(self, keep_seconds: float = KEEP_SECONDS, most: int = MOST_RECEPTIONS) -> None:
        self._keep_seconds = keep_seconds
        self._most = most
        self._changed = threading.Condition()
        self._by_key: dict[Key, Reception] = {}
        self._is_closed = False
        self._expiry: threading.Thread | None = None

    def begin(
        self, offer: PartialOffer, connection: Connection, make: Callable[[], Sink | None]
    ) -> Reception | None:
        """Go on with the reception of this offer, or begin one in what `make` returns.

        None when `make` returns none: the partial aggregate is here already. Raises Busy when there are too many,
        and what `make` raises. When that is `Full`, what has waited for its sender for the longest gives way.
        """
        key = Key.of(offer)
        self._drop_others(key)
        with self._changed:
            found = self._take_over(key)
            if found is not None:
                found.connection = connection
                return found
            if self._is_closed or len(self._by_key) >= self._most:
                raise Busy("Busy", "too many partial aggregates at once")
        try:
            sink = make()
        except Full:
            if not self._drop_oldest():
                raise
            sink = make()
        if sink is None:
            return None
        return self._add(Reception(key, sink), connection)

    def pause(self, reception: Reception) -> None:
        """Its connection is over; keep it for the next one."""
        with self._changed:
            reception.connection = None
            reception.expires = time.monotonic() + self._keep_seconds
            is_kept = not self._is_closed
            if is_kept:
                self._start_expiry()
            else:
                self._by_key.pop(reception.key, None)
            self._changed.notify_all()
        if not is_kept:
            reception.sink.abandon()

    def end(self, reception: Reception) -> None:
        """Forget it: its sink is used up."""
        with self._changed:
            self._by_key.pop(reception.key, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Abandon what waits, and whatever is paused from now on."""
        with self._changed:
            self._is_closed = True
            waiting = [each for each in self._by_key.values() if each.connection is None]
            for each in waiting:
                del self._by_key[each.key]
            self._changed.notify_all()
            expiry = self._expiry
        for each in waiting:
            each.sink.abandon()
        if expiry is not None:
            expiry.join()

    def _add(self, reception: Reception, connection: Connection) -> Reception:
        with self._changed:
            is_taken = reception.key in self._by_key  # the same offer came on two connections at once
            if not is_taken:
                reception.connection = connection
                self._by_key[reception.key] = reception
        if is_taken:
            reception.sink.abandon()
            raise Busy("Busy", "another connection brings the same", retry_after=0.0)
        return reception

    def _take_over(self, key: Key) -> Reception | None:
        """The waiting reception of a key. One that still has a connection, which must be dead, is made to wait."""
        if not self._changed.wait_for(lambda: self._is_idle(key), _GRACE_SECONDS):
            connection = self._by_key[key].connection
            if connection is not None:
                connection.interrupt()
            if not self._changed.wait_for(lambda: self._is_idle(key), _TAKE_OVER_SECONDS):
                raise Busy("Busy", "another connection brings the same")
        return self._by_key.get(key)

    def _is_idle(self, key: Key) -> bool:
        found = self._by_key.get(key)
        return found is None or found.connection is None

    def _drop_others(self, key: Key) -> None:
        """The sender has something newer for the job: what waits of it is not going to be sent."""
        with self._changed:
            stale = [
                each
                for each in self._by_key.values()
                if each.connection is None
                and each.key[:2] == key[:2]
                and each.key.source == key.source != ""
                and each.key != key
            ]
            for each in stale:
                del self._by_key[each.key]
        for each in stale:
            each.sink.abandon()

    def _drop_oldest(self) -> bool:
        """Abandon what has waited for a connection for the longest; False when nothing waits."""
        with self._changed:
            waiting = [each for each in self._by_key.values() if each.connection is None]
            if not waiting:
                return False
            oldest = min(waiting, key=lambda each: each.expires)
            del self._by_key[oldest.key]
        oldest.sink.abandon()
        return True

    # --- expiry ----------------------------------------------------------------------------------------------

    def _start_expiry(self) -> None:
        """Have a thread that sleeps until the next reception expires, as long as there is one that can."""
        if self._expiry is None:
            self._expiry = threading.Thread(target=self._expire, name="peer-expiry", daemon=True)
            self._expiry.start()

    def _expire(self) -> None:
        while True:
            with self._changed:
                waiting = [each for each in self._by_key.values() if each.connection is None]
                if self._is_closed or not waiting:
                    self._expiry = None
                    return
                now = time.monotonic()
                expired = [each for each in waiting if each.expires <= now]
                for each in expired:
                    del self._by_key[each.key]
                if not expired:
                    self._changed.wait(min(each.expires for each in waiting) - now)
            for each in expired:
                each.sink.abandon()

"""The asking side: pull a model from whichever node gives it, push a partial aggregate to the one that wants it.

place = lambda answer: [memoryview(header), pool.payload(slot, answer.total - answer.header_bytes)]
pull(order.model_sources, PullRequest(job, nonce, round), place, credentials=credentials)
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol, TypeVar

import msgspec

from lifl.errors import Busy, InvalidInput, LiflError, ProtocolError, Refused, Unavailable
from lifl.messages import Message, Problem
from lifl.peer.checksum import PIECE_BYTES, Checksum, Corrupt, FileRange, SegmentsChecksum
from lifl.peer.connection import CONNECT_SECONDS, Connection, open_socket
from lifl.peer.interruption import Interruption
from lifl.peer.protocol import (
    Decoder,
    OfferAnswer,
    PartialAnswer,
    PartialOffer,
    PartialStatus,
    PeerHello,
    PullAnswer,
    PullRequest,
    Trailer,
    refusal,
)
from lifl.peer.security import OPEN, Credentials
from lifl.peer.transfer import DEFAULT_PACE, Pace, PeerGone, TooSlow

ANSWER_SECONDS: Final = 20.0
"""Longest time for an answer: the other node asks its coordinator first."""
COMMIT_SECONDS: Final = 70.0
"""The same when the answer says that something counts."""

_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 1.0
_MOST_CORRUPT: Final = 3

_PULL_ANSWER: Final = Decoder(PullAnswer, Problem)
_OFFER_ANSWER: Final = Decoder(OfferAnswer, Problem)
_PARTIAL_ANSWER: Final = Decoder(PartialAnswer, Problem)
_TRAILER: Final = Decoder(Trailer)

Place = Callable[[PullAnswer], Sequence[memoryview]]
"""Called when the size is known: returns where the bytes go, one view after another, `total` bytes in all. It is
called again only when another source has something else; an error that it raises ends the pull."""

Expected = TypeVar("Expected", bound=Message)


# --- pull ----------------------------------------------------------------------------------------------------


def pull(
    sources: Sequence[str],
    request: PullRequest,
    place: Place,
    *,
    credentials: Credentials = OPEN,
    patience: float = 30.0,
    pace: Pace = DEFAULT_PACE,
    interruption: Interruption | None = None,
) -> PullAnswer:
    """Receive a part of a model from the first of `sources` (HOST:PORT) that gives it, straight into memory.

    A transfer that was cut goes on at the byte where it stopped, from the same source or the next; the checksum of
    the whole is verified. Sources are asked again and again until no byte has come for `patience` seconds.

    Raises Refused when every source refuses (404: none has it), Unavailable or Busy when patience is over, Corrupt
    when the bytes were wrong three times, Interrupted, and what `place` raises. Then what lies in the views is of
    no use.
    """
    return _Pull(sources, request, _Views(place), credentials, pace, interruption or Interruption()).run(patience)


def pull_bytes(
    sources: Sequence[str],
    request: PullRequest,
    most: int,
    *,
    credentials: Credentials = OPEN,
    patience: float = 30.0,
    pace: Pace = DEFAULT_PACE,
    interruption: Interruption | None = None,
) -> tuple[PullAnswer, bytearray]:
    """Receive a small part (the `header`) into new memory.

    Raises as `pull`, and InvalidInput above `most` bytes.
    """
    received = bytearray()

    def place(answer: PullAnswer) -> list[memoryview]:
        nonlocal received
        if answer.total > most:
            raise InvalidInput(f"{answer.total} bytes; at most {most} are taken")
        received = bytearray(answer.total)
        return [memoryview(received)]

    answer = pull(
        sources,
        request,
        place,
        credentials=credentials,
        patience=patience,
        pace=pace,
        interruption=interruption,
    )
    return answer, received


def pull_file(
    sources: Sequence[str],
    request: PullRequest,
    path: Path,
    *,
    most: int = 1 << 40,
    credentials: Credentials = OPEN,
    patience: float = 30.0,
    pace: Pace = DEFAULT_PACE,
    interruption: Interruption | None = None,
) -> PullAnswer:
    """Receive a part of a model into a file, which is made anew and removed again when that fails.

    It is not synced. Raises as `pull`, InvalidInput above `most` bytes, and OSError when it cannot be written.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        into = _File(fd, most)
        return _Pull(sources, request, into, credentials, pace, interruption or Interruption()).run(patience)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        raise
    finally:
        os.close(fd)


class _Destination(Protocol):
    """Where pulled bytes go."""

    def begin(self, answer: PullAnswer) -> None:
        """So many bytes will come, from the first on."""

    def room(self, position: int) -> memoryview:
        """Where the next bytes go, one at least."""

    def take(self, position: int, nbytes: int) -> None:
        """So many have come there."""


class _Views:
    """Memory of the caller's."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._views: list[tuple[int, memoryview]] = []

    def begin(self, answer: PullAnswer) -> None:
        start, self._views = 0, []
        for view in self._place(answer):
            part = memoryview(view).cast("B")
            if len(part):
                self._views.append((start, part))
                start += len(part)
        if start != answer.total:
            raise InvalidInput(f"room for {start} bytes was given, but {answer.total} come")

    def room(self, position: int) -> memoryview:
        start, view = next((s, v) for s, v in reversed(self._views) if s <= position)
        return view[position - start : position - start + PIECE_BYTES]

    def take(self, position: int, nbytes: int) -> None:
        """They lie where they shall."""


class _File:
    """A file that is open for writing."""

    def __init__(self, fd: int, most: int) -> None:
        self._fd = fd
        self._most = most
        self._total = 0
        self._room = memoryview(bytearray(PIECE_BYTES))

    def begin(self, answer: PullAnswer) -> None:
        if answer.total > self._most:
            raise InvalidInput(f"{answer.total} bytes; at most {self._most} are taken")
        self._total = answer.total
        os.ftruncate(self._fd, 0)

    def room(self, position: int) -> memoryview:
        return self._room[: self._total - position]

    def take(self, position: int, nbytes: int) -> None:
        done = 0
        while done < nbytes:
            done += os.pwrite(self._fd, self._room[done:nbytes], position + done)


class _Pull:
    """One part on its way, over as many connections as it takes."""

    def __init__(
        self,
        sources: Sequence[str],
        request: PullRequest,
        destination: _Destination,
        credentials: Credentials,
        pace: Pace,
        interruption: Interruption,
    ) -> None:
        if not sources:
            raise InvalidInput("nobody was named who could give the model")
        self._sources = list(dict.fromkeys(sources))
        self._request = request
        self._destination = destination
        self._credentials = credentials
        self._pace = pace
        self._answer_seconds = ANSWER_SECONDS
        self._interruption = interruption
        self._answer: PullAnswer | None = None
        self._restart()

    def _restart(self) -> None:
        self._position = 0
        self._checksum = Checksum()

    def run(self, patience: float) -> PullAnswer:
        """Ask one source after another until all has come."""
        waiting = _Patience(patience, self._interruption)
        self._pace = self._pace._replace(seconds=min(self._pace.seconds, patience))
        self._answer_seconds = min(ANSWER_SECONDS, patience)
        corrupt = 0
        while True:
            for address in list(self._sources):
                try:
                    while not self._attempt(address):  # a link that was cut may be whole again
                        waiting.renew()
                    assert self._answer is not None, "an attempt that succeeds has an answer"
                    return self._answer
                except Corrupt as error:
                    self._restart()
                    corrupt += 1
                    if corrupt == _MOST_CORRUPT:
                        raise
                    waiting.note(error)
                except Busy as error:
                    waiting.note(error, error.retry_after)
                except Refused:
                    self._sources.remove(address)
                    if not self._sources:
                        raise
                except (Unavailable, TooSlow, ProtocolError) as error:
                    waiting.note(error)
            waiting.pause()

    def _attempt(self, address: str) -> bool:
        """Receive what is left from one source. False when some came and then the connection ended."""
        before = self._position
        try:
            with _connected(address, self._credentials, self._pace, self._interruption) as connection:
                self._receive(connection)
            return True
        except (PeerGone, TooSlow) as error:
            self._interruption.check()
            if self._position == before:
                raise Unavailable(f"{address}: {error}") from error
            return False

    def _receive(self, connection: Connection) -> None:
        request = msgspec.structs.replace(self._request, offset=self._position)
        connection.send(PeerHello(self._credentials.token), request)
        answer = _expect(connection, _PULL_ANSWER, PullAnswer, self._answer_seconds)
        if answer != self._answer:
            self._begin(answer)
        connection.start_bytes()
        while self._position < answer.total:
            view = self._destination.room(self._position)
            got = connection.receive_some(view)
            self._destination.take(self._position, got)
            self._checksum.update(view[:got])
            self._position += got
        trailer = _expect(connection, _TRAILER, Trailer, self._answer_seconds)
        if trailer.checksum != self._checksum.value:
            raise Corrupt(f"{answer.total} bytes came, but not those that were sent")

    def _begin(self, answer: PullAnswer) -> None:
        """The first answer, or one that does not fit what came before."""
        skipped = self._position
        self._restart()
        self._destination.begin(answer)
        self._answer = answer
        # The newest may be another one by the time of the next connection.
        self._request = msgspec.structs.replace(self._request, round=answer.round)
        if skipped:
            raise ProtocolError("another source has something else; starting again")


class _Patience:
    """How long to go on without progress, and when to ask again."""

    def __init__(self, seconds: float, interruption: Interruption) -> None:
        self._seconds = seconds
        self._interruption = interruption
        self._error: LiflError = Unavailable("nobody was asked")
        self._wish = 0.0
        self.renew()

    def renew(self) -> None:
        """There was progress."""
        self._deadline = time.monotonic() + self._seconds
        self._pause = _FIRST_PAUSE_SECONDS

    def note(self, error: LiflError, wish: float = 0.0) -> None:
        """It failed; the other side asks for a pause of `wish` seconds."""
        self._error = error
        self._wish = max(self._wish, wish)

    def pause(self) -> None:
        """Wait, longer each time. Raises the last error when patience is over, Interrupted when interrupted."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._error
        self._interruption.wait(min(left, max(self._pause, min(self._wish, _LONGEST_PAUSE_SECONDS))))
        self._interruption.check()
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
        self._wish = 0.0


# --- push ----------------------------------------------------------------------------------------------------


class Outgoing:
    """The bytes of a partial aggregate, to be pushed as often as it takes, and what is made of their checksum."""

    def __init__(self, part: FileRange) -> None:
        self.segments = [part]
        self.checksum = SegmentsChecksum(self.segments)


def push(
    address: str,
    offer: PartialOffer,
    outgoing: Outgoing,
    *,
    credentials: Credentials = OPEN,
    pace: Pace = DEFAULT_PACE,
    interruption: Interruption | None = None,
    is_current: Callable[[], bool] = lambda: True,
) -> PartialStatus:
    """Offer a partial aggregate to a node once, and send what that one has not got yet.

    Any status but `corrupt` is final. `is_current` is asked when all is sent: False says that the memory was
    written meanwhile, and nobody shall believe what came. The memory may be used for something else once this
    returns.

    Raises Unavailable when the node is not reached or the connection is cut: the next push goes on there. Raises
    Busy when it has no room now, Refused when it wants no such thing, ProtocolError, Interrupted.
    """
    interruption = interruption or Interruption()
    try:
        with _connected(address, credentials, pace, interruption) as connection:
            return _push(connection, offer, outgoing, credentials, is_current)
    except (PeerGone, TooSlow) as error:
        interruption.check()
        raise Unavailable(f"{address}: {error}") from error


def _push(
    connection: Connection,
    offer: PartialOffer,
    outgoing: Outgoing,
    credentials: Credentials,
    is_current: Callable[[], bool],
) -> PartialStatus:
    connection.send(PeerHello(credentials.token), offer)
    answer = _expect(connection, _OFFER_ANSWER, OfferAnswer, ANSWER_SECONDS)
    if answer.status == "duplicate":
        return "duplicate"
    if answer.offset > offer.nbytes:
        raise ProtocolError(f"the other node has {answer.offset} of {offer.nbytes} bytes")
    connection.send_segments(outgoing.segments, answer.offset, outgoing.checksum)
    checksum = outgoing.checksum.value()
    if not is_current():
        raise Unavailable("the partial aggregate was replaced while it was sent")
    connection.send(Trailer(checksum))
    return _expect(connection, _PARTIAL_ANSWER, PartialAnswer, COMMIT_SECONDS).status


# --- both ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _connected(
    address: str, credentials: Credentials, pace: Pace, interruption: Interruption
) -> Iterator[Connection]:
    """A connection for one request, which an interruption ends."""
    sock, place = open_socket(address)
    connection = Connection(sock, pace)
    with connection, interruption.watching(connection):
        sock.settimeout(min(CONNECT_SECONDS, pace.seconds))
        try:
            sock.connect(place)
        except OSError as error:
            interruption.check()
            raise Unavailable(f"{address}: {error}") from error
        interruption.check()
        sock.settimeout(None)
        if credentials.client_tls is not None:
            connection.secure(credentials.client_tls, is_server=False, seconds=CONNECT_SECONDS)
        yield connection


def _expect(connection: Connection, decoder: Decoder, kind: type[Expected], seconds: float) -> Expected:
    message = connection.receive(decoder, seconds)
    if isinstance(message, Problem):
        raise refusal(message)
    assert isinstance(message, kind), "the decoder knows no other kind"
    return message

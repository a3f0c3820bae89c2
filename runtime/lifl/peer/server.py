"""The giving side of a node: a listener, and one thread for each connection, within bounds."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from lifl.congestion import avoid_bbr
from lifl.errors import Busy, LiflError, ProtocolError, Refused, Unavailable
from lifl.logs import report
from lifl.messages import Message, Problem
from lifl.peer.checksum import PIECE_BYTES, Segment, SegmentsChecksum, segment_bytes
from lifl.peer.connection import Connection, join_address
from lifl.peer.protocol import (
    ALGORITHM,
    VERSION,
    Decoder,
    OfferAnswer,
    PartialAnswer,
    PartialOffer,
    PeerHello,
    PullAnswer,
    PullRequest,
    Trailer,
)
from lifl.peer.receptions import KEEP_SECONDS, MOST_RECEPTIONS, Reception, Receptions, Sink
from lifl.peer.security import OPEN, Credentials
from lifl.peer.transfer import DEFAULT_PACE, Pace, PeerGone, TooSlow

_BACKLOG: Final = 256
_ACCEPT_PAUSE_SECONDS: Final = 0.05
_STOP_SECONDS: Final = 5.0
_HELLO: Final = Decoder(PeerHello)
_REQUEST: Final = Decoder(PullRequest, PartialOffer)
_TRAILER: Final = Decoder(Trailer)


class PeerLimits(NamedTuple):
    """What all other nodes together may take. Times in seconds."""

    connections: int = 128
    head_seconds: float = 10.0
    """For TLS, hello and request."""
    confirm_seconds: float = 60.0
    """For a peer to end the connection once a model is sent, the last of it perhaps still in the kernel's buffers.
    One that is cut off is noticed earlier."""
    pace: Pace = DEFAULT_PACE
    keep_seconds: float = KEEP_SECONDS
    """How long an incomplete partial aggregate is kept after its connection has ended."""
    receptions: int = MOST_RECEPTIONS
    """Partial aggregates, complete or not, that may be here at once."""


DEFAULT_LIMITS: Final = PeerLimits()


class Source(Protocol):
    """A part of a model, lent until `close`; it stays as it is meanwhile."""

    @property
    def round(self) -> int:
        """The round that the model starts."""

    @property
    def header_bytes(self) -> int:
        """Bytes at the start of the part that are not tensors."""

    @property
    def segments(self) -> Sequence[Segment]:
        """The bytes, in order."""

    def close(self) -> None:
        """Give it back."""


class Handler(Protocol):
    """What a node does for others; called in the threads of connections.

    Raises Refused, Busy or Unavailable (the other node will ask again) to say no.
    """

    def open_model(self, request: PullRequest) -> Source:
        """Lend the part of the model that the request names; its offset does not matter here."""

    def open_partial(self, offer: PartialOffer) -> Sink | None:
        """Give memory for a partial aggregate; None when it is part of the round already."""


class PeerServer:
    """Gives models to other nodes and takes partial aggregates from them. Constructing it binds the port.

    Raises OSError when the address cannot be used, InvalidInput when strangers could reach it (`Credentials`).
    """

    def __init__(
        self,
        host: str,
        port: int,
        handler: Handler,
        *,
        credentials: Credentials = OPEN,
        limits: PeerLimits = DEFAULT_LIMITS,
        allow_anonymous: bool = False,
    ) -> None:
        credentials.check_listening(host, allow_anonymous=allow_anonymous)
        self._handler = handler
        self._credentials = credentials
        self._limits = limits
        self._receptions = Receptions(limits.keep_seconds, limits.receptions)
        self._changed = threading.Condition()
        self._connections: set[Connection] = set()
        self._is_stopping = False
        self._listener = _listen(host, port)
        name = self._listener.getsockname()
        self.address = join_address(name[0], name[1])
        """HOST:PORT."""
        self._thread = threading.Thread(target=self._accept, name="peer-server", daemon=True)

    def start(self) -> None:
        """Accept connections, in threads of its own, until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """End all connections and give back all memory. Waits for the threads, a few seconds at most."""
        self._is_stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join()
        self._listener.close()
        with self._changed:
            for connection in self._connections:
                connection.interrupt()
            self._changed.wait_for(lambda: not self._connections, _STOP_SECONDS)
        self._receptions.close()

    # --- connections -----------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._is_stopping:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if not self._is_stopping:  # out of file descriptors, say: go on when some are free
                    time.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            try:
                connection = Connection(sock, self._limits.pace)
            except OSError:  # it has ended already
                sock.close()
                continue
            self._take(connection)

    def _take(self, connection: Connection) -> None:
        with self._changed:
            has_room = len(self._connections) < self._limits.connections and not self._is_stopping
            if has_room:
                self._connections.add(connection)
        if not has_room:
            connection.abort()
            return
        thread = threading.Thread(target=self._handle, args=(connection,), name="peer", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left for us
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        connection.close()
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()

    def _handle(self, connection: Connection) -> None:
        try:
            with connection:
                self._serve(connection)
        except (PeerGone, TooSlow, ProtocolError):
            return
        except Exception as error:
            report("peers", error)
        finally:
            self._forget(connection)

    def _serve(self, connection: Connection) -> None:
        seconds = self._limits.head_seconds
        if self._credentials.server_tls is not None:
            connection.secure(self._credentials.server_tls, is_server=True, seconds=seconds)
        hello = connection.receive(_HELLO, seconds)
        request = connection.receive(_REQUEST, seconds)  # before an answer, or closing would reset the connection
        try:
            self._check_hello(hello)
            if isinstance(request, PullRequest):
                self._give(connection, request)
            elif isinstance(request, PartialOffer):
                self._receive(connection, request)
        except (Refused, Unavailable) as error:
            connection.send(_problem_of(error))
            connection.wait_for_end(seconds)

    def _check_hello(self, hello: Message) -> None:
        assert isinstance(hello, PeerHello), "the decoder knows no other kind"
        if not self._credentials.accepts(hello.token):
            raise Refused(401, "Unauthorized", "this node does not know the token")
        if hello.version != VERSION or hello.checksum != ALGORITHM:
            raise Refused(400, "Unknown protocol", f"this node speaks version {VERSION} with {ALGORITHM}")

    # --- giving ----------------------------------------------------------------------------------------------

    def _give(self, connection: Connection, request: PullRequest) -> None:
        source = self._handler.open_model(request)
        try:
            self._send(connection, source, request.offset)
        except BaseException:
            connection.abort()  # before the memory is given back: nothing more of it may leave
            raise
        finally:
            source.close()

    def _send(self, connection: Connection, source: Source, offset: int) -> None:
        segments = source.segments
        total = sum(map(segment_bytes, segments))
        connection.send(PullAnswer(source.round, total, source.header_bytes))
        if offset > total:
            return  # the other node sees from the answer that it has begun with something else
        checksum = SegmentsChecksum(segments)
        connection.send_segments(segments, offset, checksum)
        connection.send(Trailer(checksum.value()))
        # Pages that sendfile refers to are on their way until the other node says, by closing, that it has them.
        if not connection.wait_for_end(self._limits.confirm_seconds):
            raise TooSlow("the other node has not confirmed that it has the model")

    # --- receiving -------------------------------------------------------------------------------------------

    def _receive(self, connection: Connection, offer: PartialOffer) -> None:
        reception = self._receptions.begin(offer, connection, lambda: self._handler.open_partial(offer))
        if reception is None:
            connection.send(OfferAnswer("duplicate"))
            connection.wait_for_end(self._limits.head_seconds)
            return
        try:
            is_right = self._fill(connection, reception, offer.nbytes)
        except BaseException:
            self._receptions.pause(reception)
            raise
        if not is_right:
            reception.restart()
            self._receptions.pause(reception)
            connection.send(PartialAnswer("corrupt"))
            return
        try:
            status = reception.sink.commit()
        finally:
            self._receptions.end(reception)
        connection.send(PartialAnswer(status))

    def _fill(self, connection: Connection, reception: Reception, nbytes: int) -> bool:
        """Receive what is left; whether the checksum says that it is what was sent."""
        connection.send(OfferAnswer("open", reception.received))
        view = reception.sink.view
        connection.start_bytes()
        while reception.received < nbytes:
            start = reception.received
            piece = view[start : min(start + PIECE_BYTES, nbytes)]
            got = connection.receive_some(piece)
            reception.checksum.update(piece[:got])
            reception.received = start + got
        trailer = connection.receive(_TRAILER, self._limits.pace.seconds + self._limits.head_seconds)
        assert isinstance(trailer, Trailer), "the decoder knows no other kind"
        return trailer.checksum == reception.checksum.value


def _problem_of(error: LiflError) -> Problem:
    if isinstance(error, Busy):
        return Problem(503, error.title, error.detail, error.retry_after)
    if isinstance(error, Refused):
        return Problem(error.status, error.title, error.detail)
    return Problem(503, "Unavailable", str(error))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        avoid_bbr(sock)  # accepted sockets inherit it
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock

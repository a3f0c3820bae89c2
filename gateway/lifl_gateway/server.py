"""The gateway's HTTP server: one thread for each connection, within bounds, and nothing that polls.

The accept loop blocks in `accept`; stopping shuts the listener down, which ends that call.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from lifl.congestion import avoid_bbr
from lifl.logs import report, say

from lifl_gateway.problems import PROBLEM_JSON, encode_problem
from lifl_gateway.request_handler import RequestHandler
from lifl_gateway.transfer import Pace

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

_BACKLOG: Final = 1024
_STACK_BYTES: Final = 1 << 20
_ACCEPT_PAUSE_SECONDS: Final = 0.05


class Limits(NamedTuple):
    """What one client, and all together, may take. Times in seconds."""

    connections: int = 512
    head_seconds: float = 10.0
    """For a whole head, and for the first byte of a new connection."""
    idle_seconds: float = 60.0
    """Between two requests of one connection."""
    pace: Pace = Pace()
    """Least progress of a body, either way."""
    access_log: bool = False
    """Write a line for each request to standard error."""


DEFAULT_LIMITS: Final = Limits()


class GatewayServer:
    """Listens at once when constructed; `serve` then accepts until `stop` is called from another thread.

    Raises OSError when the address cannot be used.
    """

    # What werkzeug's request handler looks for on its server.
    ssl_context = None
    multithread = True
    multiprocess = True
    _server_version = "lifl"

    def __init__(
        self,
        host: str,
        port: int,
        app: WSGIApplication,
        *,
        limits: Limits = DEFAULT_LIMITS,
        share_port: bool = False,
    ) -> None:
        self.app = app
        self.limits = limits
        self.is_stopping = False
        self._changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._idle: set[socket.socket] = set()
        self._busy_answer = _busy_answer()
        self._listener = _listen(host, port, share_port)
        self.server_address: tuple[str, int] = self._listener.getsockname()[:2]

    @property
    def url(self) -> str:
        """The address that clients use."""
        host, port = self.server_address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    # --- accepting -------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Accept connections until `stop`."""
        threading.stack_size(_STACK_BYTES)
        while not self.is_stopping:
            try:
                sock, address = self._listener.accept()
            except OSError:
                if not self.is_stopping:  # out of file descriptors, say: go on when some are free
                    time.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            self._take(sock, address)
        self._listener.close()

    def _take(self, sock: socket.socket, address: tuple[str, int]) -> None:
        with self._changed:
            has_room = len(self._connections) < self.limits.connections
            if has_room:
                self._connections.add(sock)
        if not has_room:
            self._turn_away(sock)
            return
        thread = threading.Thread(target=self._handle, args=(sock, address), name="http", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left for us
            self._forget(sock)

    def _turn_away(self, sock: socket.socket) -> None:
        """Answer without reading, and without waiting for a client that is in no hurry."""
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            sock.send(self._busy_answer)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1 << 16)  # unread input would turn the close into a reset that overtakes the answer
        sock.close()

    def _handle(self, sock: socket.socket, address: tuple[str, int]) -> None:
        try:
            RequestHandler(sock, address, self)  # type: ignore[arg-type]
        except Exception as error:
            self.report(error)
        finally:
            self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        with self._changed:
            self._connections.discard(sock)
            self._idle.discard(sock)
            self._changed.notify_all()
        sock.close()

    # --- what the handlers report ------------------------------------------------------------------------------

    def note_idle(self, sock: socket.socket) -> bool:
        """The connection waits for a request; False when it shall not, because the server stops."""
        with self._changed:
            if not self.is_stopping:
                self._idle.add(sock)
            return not self.is_stopping

    def note_busy(self, sock: socket.socket) -> None:
        """The connection has a request, or is over."""
        with self._changed:
            self._idle.discard(sock)

    def report(self, error: BaseException) -> None:
        """Write an unexpected error to standard error, never to a client."""
        report("gateway", error)

    def log(self, level: str, message: str, *args: object) -> None:
        """werkzeug's logging hook."""
        say("gateway", f"{level}: {message % args if args else message}")

    # --- stopping --------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Accept nothing more and end idle connections; safe in a signal handler's thread."""
        self.is_stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def drain(self, seconds: float) -> bool:
        """After `stop`: wait until all requests are answered, then cut off the rest. True if none was cut."""
        deadline = time.monotonic() + seconds
        with self._changed:
            for sock in self._idle:
                _shut(sock, socket.SHUT_RD)
            finished = self._changed.wait_for(lambda: not self._connections, deadline - time.monotonic())
            for sock in self._connections:
                _shut(sock, socket.SHUT_RDWR)
        return finished


def _listen(host: str, port: int, share_port: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Accepted sockets inherit both of these.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        avoid_bbr(sock)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _shut(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(how)


def _busy_answer() -> bytes:
    problem = encode_problem(503, "Too many connections", "try again in a moment")
    head = (
        f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: {PROBLEM_JSON}\r\n"
        f"Content-Length: {len(problem)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + problem

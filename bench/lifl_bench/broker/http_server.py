"""An HTTP/1.1 server for ingress, filter and function: a thread for each connection, bodies received into memory
that the handler names.

The standard library's server does what is needed once it is told to: `rfile.readinto` goes down to `recv_into`,
and a whole answer is one write. What it costs beside that, some 0.2 ms to parse a head, does not grow with the
body.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from lifl.congestion import avoid_bbr

log = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview
_DRAIN_BYTES: Final = 1 << 20


@dataclass
class Request:
    """One request whose body has not been received yet."""

    method: str
    target: str
    headers: dict[str, str]
    """Names in lower case."""
    length: int
    read_into: Callable[[memoryview], int] = field(repr=False)
    """Receive the next part of the body, at most as much as fits; 0 at the end of the connection."""
    received: int = 0

    def fill(self, target: memoryview) -> None:
        """Receive exactly as much of the body as fits. Raises ConnectionError if it ends before that."""
        done = 0
        while done < len(target):
            count = self.read_into(target[done:])
            if not count:
                raise ConnectionError("the body ended early")
            done += count
        self.received += done


@dataclass
class Response:
    """An answer; the body in one piece, or in pieces of `length` bytes together."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Buffer | Iterable[Buffer] = b""
    length: int | None = None


Handler = Callable[[Request], Response]


def text(status: int, message: str) -> Response:
    """An answer for people."""
    return Response(status, {"content-type": "text/plain; charset=utf-8"}, message.encode())


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing about requests."""

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = headers.get("content-length", "0")
        if not length.isdigit() or "transfer-encoding" in headers:
            self.close_connection = True
            self._send(text(411, "send a Content-Length"))
            return
        reader: Any = self.rfile
        request = Request(self.command, self.path, headers, int(length), reader.readinto)
        try:
            response = self.server.handler(request)
        except ConnectionError:
            self.close_connection = True
            return
        except Exception as error:
            log.exception("%s %s failed", self.command, self.path)
            response = text(500, f"{type(error).__name__}: {error}")
        self._drain(request)
        self._send(response)

    def _drain(self, request: Request) -> None:
        """Receive what the handler left of the body, so that the client reads the answer."""
        left = request.length - request.received
        scratch = memoryview(bytearray(min(left, _DRAIN_BYTES)))
        while left > 0:
            request.fill(scratch[:left])
            left = request.length - request.received

    def _send(self, response: Response) -> None:
        whole = isinstance(response.body, (bytes, bytearray, memoryview))
        length = (
            len(response.body) if isinstance(response.body, (bytes, bytearray, memoryview)) else response.length
        )
        lines = [f"HTTP/1.1 {response.status} {self.responses.get(response.status, ('',))[0]}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items() if name != "content-length"]
        lines += [f"content-length: {length}", *(["connection: close"] if self.close_connection else [])]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        pieces: Any = [response.body] if whole else response.body
        for piece in pieces:
            if head and len(piece) < _DRAIN_BYTES:
                self.connection.sendall(head + piece)
            else:
                self.connection.sendall(head)
                self.connection.sendall(piece)
            head = b""
        if head:
            self.connection.sendall(head)


class Server(ThreadingHTTPServer):
    """Listens on a free loopback port when constructed; `serve_forever` answers."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        super().__init__(("127.0.0.1", 0), _Connection)
        avoid_bbr(self.socket)

    @property
    def port(self) -> int:
        """The port that was free."""
        return int(self.server_address[1])

    def start(self) -> None:
        """Answer in a thread."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no error of ours."""
        log.debug("a connection failed", exc_info=True)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept one connection."""
        connection, address = super().get_request()
        return connection, address

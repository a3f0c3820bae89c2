"""One HTTP/1.1 connection: reads heads within limits, runs the WSGI application, keeps or closes the connection.

Built on werkzeug's handler, from which it takes the parsing and the WSGI environment. It replaces what makes that
one a development server: every connection closed, `100 Continue` before the application has a say, up to 10 GB
read to be polite, no limit in time or size on a head.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from lifl.errors import Refused
from lifl.logs import say
from werkzeug.serving import WSGIRequestHandler

from lifl_gateway.http_head import MAX_HEAD_BYTES, HeadFacts, check_head
from lifl_gateway.problems import PROBLEM_JSON, encode_problem
from lifl_gateway.request_body import RequestBody
from lifl_gateway.transfer import PeerGone, TooSlow, discard_input, limit_receive, limit_send, send_all

if TYPE_CHECKING:
    import socket

    from _typeshed.wsgi import WSGIEnvironment

    from lifl_gateway.server import GatewayServer

_READ_BYTES: Final = 16 * 1024
_LINGER_BYTES: Final = 4 << 30
_LINGER_QUIET_SECONDS: Final = 1.0
_LINGER_SECONDS: Final = 5.0
# Answers that have no body, whatever their headers say (RFC 9110).
_BODILESS: Final = frozenset({"204", "304"})


class _Response:
    """The state of one answer between `start_response` and its last byte."""

    def __init__(self) -> None:
        self.status = ""
        self.headers: list[tuple[str, str]] = []
        self.is_sent = False

    def start(self, status: str, headers: list[tuple[str, str]], error: Any = None) -> Any:
        """WSGI's `start_response`; an error may replace the answer only before its headers are out."""
        if error and self.is_sent:
            raise error[1].with_traceback(error[2])
        self.status, self.headers = status, headers
        return self._refuse_write

    @staticmethod
    def _refuse_write(data: bytes) -> None:
        raise NotImplementedError("the write callable of WSGI is not offered; return an iterable")


class RequestHandler(WSGIRequestHandler):
    """Serves one connection until either side closes it."""

    server: GatewayServer  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    # --- the connection --------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Prepare the connection; called by the constructor."""
        self.connection = self.request
        self._buffered = bytearray()
        self._body: RequestBody | None = None
        self._facts = HeadFacts(0, False, False, False)
        self.requestline = ""
        self.close_connection = False
        self.rfile = io.BytesIO()
        limit_send(self.connection, self.server.limits.pace.seconds)

    def finish(self) -> None:
        """Nothing to flush: nothing is buffered on the way out."""

    def handle(self) -> None:
        """Serve requests one after the other."""
        idle = self.server.limits.head_seconds
        while not self.close_connection and self._wait_for_request(idle):
            try:
                self.handle_one_request()
            except (PeerGone, TooSlow):
                return  # nobody is left to answer
            idle = self.server.limits.idle_seconds

    def _wait_for_request(self, seconds: float) -> bool:
        """Wait for the first byte of a request; False when the client closes or stays silent."""
        if self._buffered:
            return not self.server.is_stopping
        if not self.server.note_idle(self.connection):
            return False
        try:
            limit_receive(self.connection, seconds)
            self._buffered += self.connection.recv(_READ_BYTES)
        except OSError:
            return False
        finally:
            self.server.note_busy(self.connection)
        return bool(self._buffered)

    def handle_one_request(self) -> None:
        """Read one head, answer it, and leave the connection at the next one or closed."""
        self._body = None
        self._started = time.perf_counter()
        try:
            head = self._read_head()
            self._facts = check_head(head)
            if self._facts.is_chunked:
                raise Refused(411, "Length Required", "send Content-Length; chunked bodies are not accepted")
            self._parse(head)
        except Refused as refusal:
            self._refuse(refusal)
            return
        self.run_wsgi()

    def _read_head(self) -> bytes:
        """Take one head out of the buffer, reading on until it is whole. Raises Refused 408 or 431."""
        deadline = time.monotonic() + self.server.limits.head_seconds
        searched = 0
        while True:
            if self._buffered[:2] == b"\r\n":  # RFC 9112 section 2.2: ignore an empty line before a request
                del self._buffered[:2]
            end = self._buffered.find(b"\r\n\r\n", max(0, searched - 3))
            if 0 <= end <= MAX_HEAD_BYTES:
                break
            if len(self._buffered) > MAX_HEAD_BYTES:
                raise Refused(431, "Request Header Fields Too Large", f"at most {MAX_HEAD_BYTES} bytes of head")
            searched = len(self._buffered)
            self._read_more(deadline)
        head = bytes(self._buffered[: end + 4])
        del self._buffered[: end + 4]
        return head

    def _read_more(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise BlockingIOError
            limit_receive(self.connection, left)
            data = self.connection.recv(_READ_BYTES)
        except BlockingIOError:
            raise Refused(408, "Request Timeout", "the request's head did not come in time") from None
        except OSError as error:
            raise PeerGone("the connection broke in a request's head") from error
        if not data:
            raise PeerGone("the connection ended in a request's head")
        self._buffered += data

    def _parse(self, head: bytes) -> None:
        """Have the standard library parse a head that `check_head` has let pass."""
        self.rfile = io.BytesIO(head)
        self.raw_requestline = self.rfile.readline()
        if not self.parse_request():
            raise Refused(400, "Bad Request", "the request could not be parsed")

    def handle_expect_100(self) -> bool:
        """Say nothing yet: the body decides at its first read."""
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by the standard library's parser; `_parse` answers instead."""
        raise Refused(code, HTTPStatus(code).phrase, message or "")

    def _send_continue(self) -> None:
        if self._facts.expects_continue:
            send_all(self.connection, b"HTTP/1.1 100 Continue\r\n\r\n", self.server.limits.pace)

    # --- the application -------------------------------------------------------------------------------------

    def make_environ(self) -> WSGIEnvironment:
        """The WSGI environment; `wsgi.input` is the RequestBody."""
        try:
            environ = super().make_environ()
        except ValueError as error:  # from urlsplit
            raise Refused(400, "Bad Request", f"the request target cannot be parsed: {error}") from None
        self._body = RequestBody(
            self.connection, self._buffered, self._facts.length, self.server.limits.pace, self._send_continue
        )
        environ["wsgi.input"] = self._body
        environ["wsgi.input_terminated"] = True
        environ["lifl.started"] = time.monotonic()
        return environ

    def run_wsgi(self) -> None:
        """Run the application and send what it answers."""
        try:
            environ = self.make_environ()
        except Refused as refusal:
            self._refuse(refusal)
            return
        response = _Response()
        try:
            self._run(environ, response)
        except (PeerGone, TooSlow):
            raise
        except Exception as error:
            self.server.report(error)
            if response.is_sent:
                raise PeerGone("the answer could not be completed") from error
            self._refuse(Refused(500, "Internal Server Error"))
            return
        self._log_access(response.status)
        if self._body is not None and self._body.remaining:
            self._linger()

    def _run(self, environ: WSGIEnvironment, response: _Response) -> None:
        body: Iterable[bytes] = self.server.app(environ, response.start)
        try:
            # A body may send itself, from a file or from shared memory, instead of being iterated.
            send_to: Callable[[socket.socket], None] | None = getattr(body, "send_to", None)
            if send_to:
                self._send(response, b"")
                send_to(self.connection)
            else:
                for chunk in body:
                    self._send(response, chunk)
                if not response.is_sent:
                    self._send(response, b"")
        finally:
            close = getattr(body, "close", None)
            if close:
                close()

    def _send(self, response: _Response, data: bytes) -> None:
        """Send `data`, with the headers before it if they are not out; both in one packet if they fit."""
        if not response.is_sent:
            response.is_sent = True
            data = self._encode_head(response) + data
        if data:
            send_all(self.connection, data, self.server.limits.pace)

    def _encode_head(self, response: _Response) -> bytes:
        if self._body is not None:
            self._body.drop_buffered()
            if self._body.remaining:
                self.close_connection = True
        names = {name.lower() for name, _ in response.headers}
        # Without a length only the end of the connection ends the body.
        if "content-length" not in names and response.status[:3] not in _BODILESS and self.command != "HEAD":
            self.close_connection = True
        # Another gateway on this port may have a free slot: a new connection may reach it.
        if self.server.is_stopping or response.status.startswith("503"):
            self.close_connection = True
        lines = [f"HTTP/1.1 {response.status}"]
        lines += [f"{name}: {value}" for name, value in response.headers if name.lower() != "connection"]
        if "date" not in names:
            lines.append(f"Date: {self.date_time_string()}")
        lines.append(f"Connection: {'close' if self.close_connection else 'keep-alive'}\r\n\r\n")
        return "\r\n".join(lines).encode("latin-1")

    # --- answers of the server itself ------------------------------------------------------------------------

    def _refuse(self, refusal: Refused) -> None:
        """Answer with a problem and close; what still comes in is not understood."""
        self.close_connection = True
        problem = encode_problem(refusal.status, refusal.title, refusal.detail)
        head = (
            f"HTTP/1.1 {refusal.status} {refusal.title}\r\nContent-Type: {PROBLEM_JSON}\r\n"
            f"Content-Length: {len(problem)}\r\nDate: {self.date_time_string()}\r\nConnection: close\r\n\r\n"
        )
        with_body = getattr(self, "command", None) != "HEAD"
        send_all(self.connection, head.encode() + (problem if with_body else b""), self.server.limits.pace)
        self._log_access(str(refusal.status))
        self._linger()

    def _linger(self) -> None:
        """Let a client that is still sending read the answer: a close now would reset the connection."""
        try:
            self.connection.shutdown(1)
        except OSError:
            return
        left = self._body.remaining if self._body is not None and self._body.remaining else _LINGER_BYTES
        discard_input(self.connection, min(left, _LINGER_BYTES), _LINGER_QUIET_SECONDS, _LINGER_SECONDS)

    # --- logging ---------------------------------------------------------------------------------------------

    def _log_access(self, status: str) -> None:
        if self.server.limits.access_log:
            line = ascii(self.requestline)[1:-1]
            milliseconds = (time.perf_counter() - self._started) * 1e3
            say("gateway", f'{self.address_string()} "{line}" {status[:3]} {milliseconds:.1f}ms')

    def log_message(self, format: str, *args: Any) -> None:
        """Drop the standard library's own messages."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Drop the standard library's own messages."""

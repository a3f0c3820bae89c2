"""A blocking connection to a nats-server, for bulk data: payloads go straight from and into the caller's memory.

nats-py gathers what it reads, 32 KiB at a time, in a growing bytearray and cuts each message out of it with two
more copies; it has no place where a receiver could name the memory a payload is wanted in. The client protocol is
a page of text, so what moves payloads here speaks it directly: `sendmsg` of head, payload and end when publishing,
`recvmsg_into` of payload and the next head when receiving. One thread may read and any may write at the same time.
"""

from __future__ import annotations

import itertools
import json
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from lifl.congestion import avoid_bbr

Buffer = bytes | bytearray | memoryview

_HEAD_BYTES: Final = 4096  # no more than a head is read ahead, so that payloads are not copied out of here
_CRLF: Final = b"\r\n"
_TIMEOUT_S: Final = 60.0
_MOST_IDLE_S: Final = 60.0


class WireError(RuntimeError):
    """The server refused something, or the connection is unusable."""


@dataclass(frozen=True)
class Message:
    """One message that was received."""

    subject: str
    reply: str
    payload: memoryview
    status: int = 0
    """Of a message that is only a status, such as 404 or 408; 0 for all others."""


class Wire:
    """One connection. Use `subscribe` or an inbox of `request`, then `receive`."""

    def __init__(self, url: str, *, timeout: float = _TIMEOUT_S) -> None:
        """Connect. Raises OSError, and WireError if the server does not let us in."""
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        self._socket = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 4222), timeout)
        avoid_bbr(self._socket)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()
        self._sids = itertools.count(1)
        self._store = memoryview(bytearray(_HEAD_BYTES))
        self._start = self._end = 0
        self.inbox = f"_INBOX.{uuid.uuid4().hex}"
        try:
            line = self._line()
            if not line.startswith(b"INFO "):
                raise WireError(f"{url} is no nats-server: it said {line[:80]!r}")
            self.max_payload = int(json.loads(line[5:])["max_payload"])
            options: dict[str, Any] = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True}
            options |= {"lang": "python-wire", "version": "1", "protocol": 1, "name": "lifl-bench"}
            if parts.username is not None:
                secret = {"user": parts.username, "pass": parts.password}
                options |= secret if parts.password is not None else {"auth_token": parts.username}
            self._send(b"CONNECT " + json.dumps(options).encode() + b"\r\nPING\r\n")
            while (line := self._line()) != b"PONG":
                self._refuse(line)
            self.subscribe(f"{self.inbox}.*")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection, from any thread; whoever reads gets an OSError or WireError."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()

    # --- sending ---------------------------------------------------------------------------------------------

    def subscribe(self, subject: str) -> None:
        """Receive what is published to this subject from now on."""
        self._send(f"SUB {subject} {next(self._sids)}\r\n".encode())

    def publish(
        self, subject: str, payload: Buffer = b"", *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send one message; returns when the kernel has it."""
        if headers is None:
            head = f"PUB {subject} {reply} {len(payload)}\r\n".encode()
        else:
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            text = f"NATS/1.0\r\n{lines}\r\n".encode()
            head = f"HPUB {subject} {reply} {len(text)} {len(text) + len(payload)}\r\n".encode() + text
        self._send(head, payload, _CRLF)

    def _send(self, *parts: Buffer) -> None:
        waiting: list[Buffer] = [part for part in parts if len(part)]
        with self._sending:
            while waiting:
                sent = self._socket.sendmsg(waiting)
                while waiting and sent >= len(waiting[0]):
                    sent -= len(waiting.pop(0))
                if sent:
                    waiting[0] = memoryview(waiting[0])[sent:]

    # --- receiving -------------------------------------------------------------------------------------------

    def poll(self, seconds: float) -> Message | None:
        """The next message, or None if none begins to arrive within that time."""
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            if self._start == self._end and not select.select([self._socket], [], [], left)[0]:
                return None
            message = self._next(None)
            if message is not None:
                return message

    def receive(self, target: memoryview | None = None) -> Message:
        """Wait for the next message; a payload of the very size of `target` is received into it.

        Raises TimeoutError, OSError, and WireError if the server complains.

        After a TimeoutError in the middle of a message the connection can no longer be used.
        """
        while True:
            message = self._next(target)
            if message is not None:
                return message

    def _next(self, target: memoryview | None) -> Message | None:
        """Receive what comes next, which may be no message."""
        line = self._line()
        if line.startswith((b"MSG ", b"HMSG ")):
            return self._message(line.decode().split(" "), target)
        if line == b"PING":
            self._send(b"PONG\r\n")
        else:
            self._refuse(line)
        return None

    def _message(self, words: Sequence[str], target: memoryview | None) -> Message:
        has_headers = words[0] == "HMSG"
        total = int(words[-1])
        header_bytes = int(words[-2]) if has_headers else 0
        subject = words[1]
        reply = words[3] if len(words) == (6 if has_headers else 5) else ""
        status = 0
        if has_headers:
            header = bytes(self._exactly(memoryview(bytearray(header_bytes))))
            first = header.split(_CRLF, 1)[0].split(b" ")
            status = int(first[1]) if len(first) > 1 else 0
        size = total - header_bytes
        fits = target is not None and not status and len(target) == size
        payload = self._exactly(target if target is not None and fits else memoryview(bytearray(size)))
        self._exactly(memoryview(bytearray(2)))
        return Message(subject, reply, payload, status)

    def _refuse(self, line: bytes) -> None:
        if line.startswith(b"-ERR"):
            raise WireError(f"nats-server: {line[5:].decode(errors='replace')}")

    def _line(self) -> bytes:
        """The next line without its end."""
        line = b""
        while True:
            line += self._store[self._start : self._end]
            end = line.find(_CRLF)
            if end >= 0:
                self._start = self._end - (len(line) - end - len(_CRLF))
                return line[:end]
            self._fill()

    def _fill(self) -> None:
        self._start = self._end = 0
        count = self._socket.recv_into(self._store)
        if not count:
            raise WireError("nats-server closed the connection")
        self._end = count

    def _exactly(self, target: memoryview) -> memoryview:
        """Fill `target`; what follows it at once lands in the small buffer, by the same system call."""
        ready = min(len(target), self._end - self._start)
        target[:ready] = self._store[self._start : self._start + ready]
        self._start += ready
        done = ready
        while done < len(target):
            count = self._socket.recvmsg_into([target[done:], self._store])[0]
            if not count:
                raise WireError("nats-server closed the connection")
            done += count
        if done > len(target):
            self._start, self._end = 0, done - len(target)
        return target

    # --- requests --------------------------------------------------------------------------------------------

    def request(self, subject: str, payload: Buffer = b"", headers: Mapping[str, str] | None = None) -> Message:
        """Publish to a service and wait for its answer; not while other messages are expected."""
        token = f"{self.inbox}.{uuid.uuid4().hex}"
        self.publish(subject, payload, reply=token, headers=headers)
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            message = self.receive()
            if message.subject == token:
                if message.status:
                    raise WireError(f"{subject}: status {message.status}")
                return message
        raise TimeoutError(f"no answer on {subject}")

    def call(self, subject: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask JetStream's API, JSON in and out. Raises WireError with its description of what is wrong."""
        payload = b"" if body is None else json.dumps(body).encode()
        return answer_of(self.request(f"$JS.API.{subject}", payload))


class Connection(Protocol):
    """What a pool has: a `Wire`, or another client that can be used in its place."""

    inbox: str

    def publish(
        self, subject: str, payload: Buffer = b"", *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None: ...

    def receive(self, target: memoryview | None = None) -> Message: ...

    def call(self, subject: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]: ...

    def close(self) -> None: ...


class WirePool:
    """Connections for threads that need one now and then."""

    def __init__(self, url: str, connect: Callable[[str], Connection] | None = None) -> None:
        """`connect` makes a connection, a `Wire` if it is not given."""
        self._url = url
        self._connect: Callable[[str], Connection] = connect or Wire
        self._lock = threading.Lock()
        self._idle: list[tuple[float, Connection]] = []

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """One that nobody else uses; it is kept for the next use unless this one fails."""
        wire = self._take() or self._connect(self._url)
        try:
            yield wire
        except BaseException:
            wire.close()
            raise
        with self._lock:
            self._idle.append((time.monotonic(), wire))

    def _take(self) -> Connection | None:
        """The connection that was used last; one that was idle for long may have been closed by the server."""
        with self._lock:
            since, wire = self._idle.pop() if self._idle else (0.0, None)
        if wire is not None and time.monotonic() - since > _MOST_IDLE_S:
            wire.close()
            return None
        return wire

    def close(self) -> None:
        """Close the connections that are not in use."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, wire in idle:
            wire.close()


def answer_of(message: Message) -> dict[str, Any]:
    """The JSON of an answer or acknowledgement of JetStream. Raises WireError where it reports an error."""
    if message.status:
        raise WireError(f"JetStream is not there: status {message.status}")
    answer: dict[str, Any] = json.loads(bytes(message.payload))
    if "error" in answer:
        raise WireError(f"JetStream: {answer['error'].get('description', answer['error'])}")
    return answer

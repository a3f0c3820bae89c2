"""A node's connection to its cluster's coordinator: requests from two threads, answers in the node's own loop.

One thread asks for orders, which is the heartbeat too; the other sends messages in order, as many as wait in one
request. A message is repeated until it is answered: each may safely be. When the lease has run out (410) all that
belongs to the old incarnation is answered with a `Problem`, and the node registers with a new one.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import queue
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from lifl.cluster.messages import (
    Answers,
    MemberAnswer,
    MemberMessage,
    MemberMessages,
    NodeLoad,
    Orders,
    OrdersRequest,
    Register,
    Registered,
)
from lifl.errors import InvalidInput, Refused, Unavailable
from lifl.messages import Problem

BATCH: Final = 64
"""Messages of one request at most."""

_REQUEST_SECONDS: Final = 10.0
_CONNECT_SECONDS: Final = 2.0
_SLACK_SECONDS: Final = 3.0
"""Beyond the time that an order may take: then the connection counts as dead."""
_FIRST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 1.0
_GONE: Final = 410
_NOTE_SECONDS: Final = 1.0
"""Longest wait for the loop; the heartbeat must not depend on it."""
_MEMBER_FILE: Final = "member.json"

log = logging.getLogger("lifl.coordinator")

_Answer = TypeVar("_Answer")
Then = Callable[[MemberAnswer], None]


@dataclass(frozen=True)
class MemberOptions:
    """How a node is a member."""

    coordinator: str
    """Base URL, http:// or https://."""
    name: str
    advertise: str = ""
    """Base URL that others reach the gateways by; empty: where they listen."""
    token: str = ""
    authority: Path | None = None
    """Certificates that the coordinator's own has to be signed by, for https."""
    certificate: Path | None = None
    key: Path | None = None


class _LeaseOver(Exception):
    """The coordinator does not know this incarnation (any more)."""


class _Http:
    """One kept-alive connection; every request is a POST of JSON. For one thread."""

    def __init__(self, options: MemberOptions) -> None:
        url = urlsplit(options.coordinator)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InvalidInput(f"{options.coordinator!r} is no URL of a coordinator, such as http://10.0.0.1:7070")
        self._host, self._port = url.hostname, url.port or (443 if url.scheme == "https" else 7070)
        self._prefix = url.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if options.token:
            self._headers["Authorization"] = f"Bearer {options.token}"
        self._tls = _context(options) if url.scheme == "https" else None
        self._connection: http.client.HTTPConnection | None = None

    def _connect(self) -> http.client.HTTPConnection:
        if self._tls is not None:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self._host, self._port, timeout=_CONNECT_SECONDS, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(
                self._host, self._port, timeout=_CONNECT_SECONDS, blocksize=1 << 20
            )
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def post(self, path: str, body: msgspec.Struct, answer: type[_Answer], seconds: float) -> _Answer:
        """Raises Unavailable, Refused, or _LeaseOver."""
        data = self._exchange("POST", path, msgspec.json.encode(body), self._headers, seconds)
        try:
            return msgspec.json.decode(data, type=answer)
        except msgspec.MsgspecError as error:
            self.close()
            raise Unavailable(f"the coordinator's answer makes no sense: {error}") from error

    def put_file(self, path: str, file: Path, seconds: float) -> None:
        """Send a file of a safetensors model; raises as `post`."""
        headers = {
            **self._headers,
            "Content-Type": "application/vnd.safetensors",
            "Content-Length": str(file.stat().st_size),
        }
        with open(file, "rb") as body:
            self._exchange("PUT", path, body, headers, seconds)

    def _exchange(self, method: str, path: str, body: Any, headers: dict[str, str], seconds: float) -> bytes:
        try:
            if self._connection is None:
                self._connection = self._connect()
            self._connection.sock.settimeout(seconds)
            self._connection.request(method, self._prefix + path, body, headers)
            response = self._connection.getresponse()
            data = response.read()
            if response.will_close:
                self.close()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Unavailable(f"no answer from the coordinator: {error or type(error).__name__}") from error
        if response.status >= 400:
            raise _error(response.status, data)
        return data

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
            self._connection = None


def _context(options: MemberOptions) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(options.authority) if options.authority else None)
    if options.certificate is not None:
        context.load_cert_chain(options.certificate, options.key)
    return context


def _error(status: int, data: bytes) -> Exception:
    if status == _GONE:
        return _LeaseOver()
    try:
        problem = json.loads(data)
        title, detail = str(problem.get("title", status)), str(problem.get("detail", ""))
    except (ValueError, AttributeError):
        title, detail = str(status), data[:200].decode(errors="replace")
    if status in (401, 403, 404, 409, 413, 415, 422):
        return Refused(status, title, detail)
    return Unavailable(f"the coordinator answered {status} {title}: {detail}")


@dataclass
class _Waiting:
    message: MemberMessage
    incarnation: str
    then: Then | None


class MemberLink:
    """The two threads. `on_orders` and `on_lost` are called in the loop, by `process`; so is every `then`."""

    def __init__(
        self,
        options: MemberOptions,
        runtime_directory: Path,
        describe: Callable[[str, str, str], Register],
        on_orders: Callable[[Orders, Callable[[], None]], None],
        on_lost: Callable[[], None],
    ) -> None:
        """`describe(incarnation, address, peer_address)` makes the registration; it is called in a thread.

        `on_orders` calls its second argument when `seen` and `load` are up to date for the next request.
        """
        self._options = options
        self._runtime_directory = runtime_directory
        self._describe = describe
        self._on_orders = on_orders
        self._on_lost = on_lost
        self._asking = _Http(options)
        self._telling = _Http(options)
        self._base = f"/v1/members/{quote(options.name, safe='')}"
        self._outbox: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_member = threading.Event()
        self._heartbeat_seconds = 1.0
        self.incarnation = secrets.token_hex(8)
        """Of the node's memory; another one after the lease was lost."""
        self.peer_address = ""
        """Where the other nodes reach this one; known once the gateways are there."""
        self._sequence = 0
        """Of the newest request with messages."""
        self._told: dict[str, int] = {}
        """Versions of the orders that came last."""
        self.seen: dict[str, int] = {}
        """Version of the order of each job that was carried out; the loop writes, the thread sends a copy."""
        self.load = NodeLoad()
        self.capacity = 0.0

    @property
    def coordinator(self) -> str:
        """Base URL of the coordinator."""
        return self._options.coordinator

    # --- for the loop ----------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """File descriptor that is readable when `process` has something to do."""
        return self._event

    def start(self) -> None:
        """Start the threads; they end with the process."""
        threading.Thread(target=self._ask_for_orders, name="orders", daemon=True).start()
        threading.Thread(target=self._tell, name="messages", daemon=True).start()

    def send(self, message: MemberMessage, then: Then | None = None) -> None:
        """Send a message after all earlier ones; `then` gets the answer, in the loop."""
        self._outbox.put(_Waiting(message, self.incarnation, then))

    def process(self) -> None:
        """Handle everything that has arrived."""
        os.eventfd_read(self._event)
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def call_in_loop(self, action: Callable[[], None]) -> None:
        """Have the loop call `action`; from any thread."""
        self._post_to_loop(action)

    def upload_model(self, job: str, file: Path) -> None:
        """Give the coordinator the initial model of a job. Blocks; raises Refused or Unavailable."""
        connection = _Http(self._options)
        try:
            connection.put_file(f"/v1/jobs/{quote(job, safe='')}/model", file, 600.0)
        except _LeaseOver:
            raise Unavailable("the coordinator does not know this node") from None
        finally:
            connection.close()

    # --- in the threads --------------------------------------------------------------------------------------

    def _post_to_loop(self, action: Callable[[], None]) -> None:
        self._inbox.put(action)
        os.eventfd_write(self._event, 1)

    def _do_in_loop(self, action: Callable[[], None]) -> None:
        """Have the loop call `action` and wait until it has."""
        done = threading.Event()

        def act() -> None:
            try:
                action()
            finally:
                done.set()

        self._post_to_loop(act)
        done.wait()

    def _ask_for_orders(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        is_first = True
        while True:
            try:
                if not self._is_member.is_set():
                    self._register()
                orders = self._next_orders(0.0 if is_first else self._heartbeat_seconds)
            except _LeaseOver:
                self._is_member.clear()
                log.warning("the coordinator has given this node up; joining it anew")
                self._do_in_loop(self._begin_anew)
                is_first = True
                continue
            except (Unavailable, Refused) as error:
                if pause == _FIRST_PAUSE_SECONDS:
                    log.warning("%s", error)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            pause = _FIRST_PAUSE_SECONDS
            is_first = False
            self._hand_over(orders)

    def _hand_over(self, orders: Orders) -> None:
        """Have the loop note orders, and wait until the next request can say so."""
        done = threading.Event()
        self._post_to_loop(lambda: self._on_orders(orders, done.set))
        done.wait(_NOTE_SECONDS)
        told = {order.job: order.version for order in orders.jobs}
        if told and told.items() <= self._told.items():
            time.sleep(_FIRST_PAUSE_SECONDS)  # they do not count as seen yet: do not ask in a tight loop
        self._told = told

    def _begin_anew(self) -> None:
        self.incarnation = secrets.token_hex(8)
        self.seen = {}
        self._on_lost()

    def _register(self) -> None:
        address, peer_address = self._addresses()
        self.peer_address = peer_address
        registration = self._describe(self.incarnation, address, peer_address)
        answer = self._asking.post("/v1/members", registration, Registered, _REQUEST_SECONDS)
        self._heartbeat_seconds = answer.heartbeat_seconds
        self._is_member.set()

    def _addresses(self) -> tuple[str, str]:
        """Where the gateways listen, which they say once they do."""
        path = self._runtime_directory / _MEMBER_FILE
        while True:
            try:
                found = json.loads(path.read_text())
                return self._options.advertise or str(found["address"]), str(found["peer_address"])
            except FileNotFoundError:
                time.sleep(_FIRST_PAUSE_SECONDS)  # at the start only, while the gateways come up

    def _next_orders(self, wait: float) -> Orders:
        request = OrdersRequest(self.incarnation, dict(self.seen), self.load, self.capacity, wait)
        return self._asking.post(f"{self._base}/orders", request, Orders, wait + _SLACK_SECONDS)

    def _tell(self) -> None:
        while True:
            batch = [self._outbox.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < BATCH:
                    batch.append(self._outbox.get_nowait())
            for incarnation in dict.fromkeys(waiting.incarnation for waiting in batch):
                self._deliver(incarnation, [waiting for waiting in batch if waiting.incarnation == incarnation])

    def _deliver(self, incarnation: str, batch: list[_Waiting]) -> None:
        """Send messages of one incarnation until they are answered, or void."""
        self._sequence += 1
        messages = MemberMessages(incarnation, tuple(waiting.message for waiting in batch), self._sequence)
        pause = _FIRST_PAUSE_SECONDS
        while incarnation == self.incarnation:
            self._is_member.wait()
            try:
                answers = self._telling.post(f"{self._base}/messages", messages, Answers, _REQUEST_SECONDS).answers
            except _LeaseOver:
                break
            except Refused as refusal:
                problem = Problem(refusal.status, refusal.title, refusal.detail)
                self._answer(batch, (problem,) * len(batch))
                return
            except Unavailable:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            self._answer(batch, answers)
            return
        void = Problem(503, "node rejoins the cluster", "send it again", 0.5)
        self._answer(batch, (void,) * len(batch))

    def _answer(self, batch: list[_Waiting], answers: tuple[MemberAnswer, ...]) -> None:
        def answer_all() -> None:
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.then is not None:
                    waiting.then(answer)

        self._post_to_loop(answer_all)

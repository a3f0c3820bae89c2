"""The broker's filter: takes each Trigger's events from JetStream and delivers them to its function's sidecar.

    python -m lifl_bench.broker.filter SETUP INGRESS_PORT [SIDECAR_PORT ...]

An event is acknowledged when the function has answered 2xx, and when what it answered, if that is an event, has
gone to the ingress. 5xx, 408 and 429 and broken connections are tried again after a while; other answers, and too
many attempts, give the event up and leave a line in the deployment's failures file.

Without sidecar ports the functions are not running: the first event of a round has its function and sidecar
started from here, and `POST /stop` ends them.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import sys
import threading
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from lifl_bench.broker import events
from lifl_bench.broker.events import DATA_LENGTH, DATA_REFERENCE, LEAF, Attributes, Buffer
from lifl_bench.broker.http_client import Peer, fill
from lifl_bench.broker.http_server import Request, Response, Server, text
from lifl_bench.broker.replica import Replica
from lifl_bench.broker.service import say_ready, wait_for_end
from lifl_bench.broker.setup import Setup
from lifl_bench.broker.store import PayloadStore
from lifl_bench.broker.stores import open_store
from lifl_bench.broker.wire import Message, Wire, WireError

log = logging.getLogger(__name__)

_POLL_S: Final = 30
_DELIVERY_TIMEOUT_S: Final = 3600.0
_RETRIED: Final = frozenset((408, 429))
_PLAIN_ACK_WORDS: Final = 9
_PIECE_BYTES: Final = 1 << 20


class Functions:
    """Where each function is reached; starts those that are not kept running."""

    def __init__(self, setup: Setup, ports: list[int]) -> None:
        self._setup = setup
        self._ports = ports
        self._locks = [threading.Lock() for _ in range(setup.tree.leaves)]
        self._replicas: dict[int, Replica] = {}

    def port(self, leaf: int) -> int:
        """The port of the function's sidecar. Raises RuntimeError if it cannot be started."""
        if self._ports:
            return self._ports[leaf]
        with self._locks[leaf]:
            replica = self._replicas.get(leaf)
            if replica is None:
                replica = Replica(self._setup, leaf, os.environ)
                try:
                    replica.wait_ready()
                except BaseException:
                    replica.stop()
                    raise
                self._replicas[leaf] = replica
            return replica.port

    def pids(self) -> dict[str, list[int]]:
        """What was started from here and is running, by component."""
        replicas = list(self._replicas.values())
        return {
            "sidecar": [pid for replica in replicas for pid in replica.sidecar_pids()],
            "function": [pid for replica in replicas for pid in replica.function_pids()],
        }

    def stop(self) -> None:
        """End what was started from here."""
        for leaf, lock in enumerate(self._locks):
            with lock:
                replica = self._replicas.pop(leaf, None)
                if replica is not None:
                    replica.stop()


class _Retry(Exception):
    """The delivery may succeed later."""


class _GiveUp(Exception):
    """The delivery will never succeed."""


class Dispatcher:
    """Delivers the events of one Trigger, one after another; several of them share a Trigger's events."""

    def __init__(
        self, setup: Setup, leaf: int, functions: Functions, store: PayloadStore | None, ingress: int
    ) -> None:
        self._setup = setup
        self._leaf = leaf
        self._functions = functions
        self._store = store
        self._wire = Wire(setup.nats_url, timeout=2 * _POLL_S)
        self._ingress = Peer(ingress, timeout=_DELIVERY_TIMEOUT_S)
        self._sidecar: tuple[int, Peer] | None = None

    def run(self) -> None:
        """Fetch and deliver for ever; if the server is lost, the whole process ends."""
        try:
            while True:
                self._deliver_batch()
        except (OSError, WireError):
            log.exception("nats-server is lost")
            os._exit(1)

    def _deliver_batch(self) -> None:
        batch = self._setup.tuning.batch
        request = json.dumps({"batch": batch, "expires": _POLL_S * 10**9}).encode()
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._setup.event_stream}.{self._setup.trigger(self._leaf)}"
        self._wire.publish(subject, request, reply=f"{self._wire.inbox}.next")
        for _ in range(batch):
            message = self._wire.receive()
            if message.status:  # 408: none has come for a while
                return
            self._wire.publish(message.reply, self._answer(message))

    def _answer(self, message: Message) -> bytes:
        """Deliver one event and tell the server how that went."""
        tuning = self._setup.tuning
        try:
            attributes, data = events.decode(message.payload)
            if attributes.get(LEAF) == str(self._leaf):
                self._deliver(attributes, data)
            return b"+ACK"
        except _GiveUp as error:
            reason = str(error)
        except Exception as error:
            attempt = _attempt(message.reply)
            log.warning("attempt %d for function %d failed: %s", attempt, self._leaf, error)
            if attempt < tuning.max_deliver:
                return f'-NAK {{"delay": {int(tuning.retry_delay_s * 1e9)}}}'.encode()
            reason = f"given up after {attempt} attempts: {error}"
        self._note_failure(reason)
        return b"+TERM"

    def _note_failure(self, reason: str) -> None:
        log.error("function %d: %s", self._leaf, reason)
        line = f"function {self._leaf}: {' '.join(reason.split())}\n"
        with self._setup.failures.open("a") as file:
            file.write(line)

    def _deliver(self, attributes: Attributes, data: bytes | None) -> None:
        body: Iterable[Buffer] = () if data is None else (data,)
        length = 0 if data is None else len(data)
        if self._store is not None and DATA_REFERENCE in attributes:
            length = int(attributes.pop(DATA_LENGTH))
            body = self._store.read(attributes.pop(DATA_REFERENCE), length)
        peer = self._peer()
        try:
            response = peer.post("/", events.headers_of(attributes), body, length)
            if not 200 <= response.status < 300:
                problem = f"status {response.status}: {response.read(2000).decode(errors='replace')}"
                peer.close()
                raise (_Retry if response.status >= 500 or response.status in _RETRIED else _GiveUp)(problem)
            self._forward(response)
        except (OSError, http.client.HTTPException) as error:
            peer.close()
            raise _Retry(f"{type(error).__name__}: {error}") from error

    def _peer(self) -> Peer:
        port = self._functions.port(self._leaf)
        if self._sidecar is None or self._sidecar[0] != port:
            self._sidecar = port, Peer(port, timeout=_DELIVERY_TIMEOUT_S)
        return self._sidecar[1]

    def _forward(self, response: http.client.HTTPResponse) -> None:
        """Send the answer to the ingress if it is an event; anything else is dropped."""
        attributes = events.attributes_of({name.lower(): value for name, value in response.getheaders()})
        length = response.length or 0
        if not attributes.get("type"):
            response.read()
            return
        answer = self._ingress.post("/", events.headers_of(attributes), _pieces(response, length), length)
        response.read()
        detail = answer.read()
        if answer.status != 202:
            raise _Retry(f"the ingress answered {answer.status}: {detail[:500].decode(errors='replace')}")


def _pieces(response: http.client.HTTPResponse, length: int) -> Iterable[memoryview]:
    """A body, received piece by piece into one buffer."""
    buffer = memoryview(bytearray(min(length, _PIECE_BYTES)))
    while length > 0:
        piece = buffer[: min(length, len(buffer))]
        fill(response, piece)
        length -= len(piece)
        yield piece


def _attempt(reply: str) -> int:
    """Which attempt to deliver an event this is: a number in the subject that it is to be acknowledged on."""
    words = reply.split(".")
    return int(words[4 if len(words) == _PLAIN_ACK_WORDS else 6])  # newer servers add domain and account


def deliveries_to(setup: Setup, leaf: int) -> int:
    """Events that a function is given at a time: with lazy timing it holds all of a round before it answers."""
    most = setup.tuning.deliveries
    return max(most, setup.tree.goal_of(leaf)) if setup.timing == "lazy" else most


def main() -> None:
    """Deliver until told to end."""
    logging.basicConfig(level=logging.WARNING)
    setup = Setup.read(sys.argv[1])
    functions = Functions(setup, [int(port) for port in sys.argv[3:]])
    store = open_store(setup) if setup.tuning.resolve == "filter" else None
    for leaf in range(setup.tree.leaves):
        for _ in range(deliveries_to(setup, leaf)):
            dispatcher = Dispatcher(setup, leaf, functions, store, int(sys.argv[2]))
            threading.Thread(target=dispatcher.run, daemon=True).start()

    def handle(request: Request) -> Response:
        path = urlsplit(request.target).path
        if (request.method, path) == ("GET", "/pids"):
            return text(200, json.dumps(functions.pids()))
        if (request.method, path) == ("POST", "/stop"):
            functions.stop()
            return text(200, "done")
        return text(404, "not found")

    control = Server(handle)
    control.start()
    say_ready(str(control.port))
    wait_for_end()
    functions.stop()


if __name__ == "__main__":
    main()

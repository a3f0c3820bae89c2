"""The broker's ingress: takes binary-mode events over HTTP and publishes them as structured ones to JetStream.

    python -m lifl_bench.broker.ingress SETUP

A body that would not fit into a message goes into the payload store while it is received, and the event carries a
reference to it. Each event is published under its id as Nats-Msg-Id, so that the stream keeps one of several with
the same id; the client has its 202 once the stream has the event.

`GET /model?round=N` gives clients the model that round N starts from: it has passed by as an event.
"""

from __future__ import annotations

import sys
import threading
from typing import Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

from lifl.http_function import MEDIA_TYPE, MODEL

from lifl_bench.broker import events
from lifl_bench.broker.chunk_store import ChunkStore
from lifl_bench.broker.events import DATA_LENGTH, DATA_REFERENCE, LEAF, Attributes
from lifl_bench.broker.http_server import Request, Response, Server, text
from lifl_bench.broker.service import say_ready, wait_for_end
from lifl_bench.broker.setup import Setup
from lifl_bench.broker.store import MODELS, UPDATES, StoreError, group_of
from lifl_bench.broker.stores import open_store
from lifl_bench.broker.wire import WirePool, answer_of

MODEL_WAIT_S: Final = 60.0
_REQUIRED: Final = ("specversion", "type", "source", "id")


class _Model(NamedTuple):
    """Where a global model is: in this process, or in the store."""

    data: bytes | None
    reference: str
    size: int


class Ingress:
    """Answers the requests; used by many threads."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._store = open_store(setup, writes=True)
        if isinstance(self._store, ChunkStore):
            payloads = setup.tree.updates + setup.tree.leaves  # updates, partial aggregates, and the model
            self._store.warm_up(min(setup.tuning.warm_up_bytes, payloads * setup.update_bytes))
        self._wires = WirePool(setup.nats_url)
        self._uploads = threading.BoundedSemaphore(setup.tuning.uploads)
        self._models: dict[int, _Model] = {}
        self._new_model = threading.Condition()

    def handle(self, request: Request) -> Response:
        """Answer one request."""
        target = urlsplit(request.target)
        round_text = parse_qs(target.query).get("round", [""])[0]
        if request.method == "POST" and target.path == "/":
            return self._take(request)
        if round_text.isdigit() and (request.method, target.path) == ("GET", "/model"):
            return self._serve_model(int(round_text))
        if round_text.isdigit() and (request.method, target.path) == ("POST", "/discard"):
            self._discard(int(round_text))
            return text(200, "done")
        return text(404, "post events to /")

    def _take(self, request: Request) -> Response:
        attributes = events.attributes_of(request.headers)
        missing = [name for name in _REQUIRED if not attributes.get(name)]
        if missing:
            return text(400, f"this is no binary-mode event: it has no {', '.join(missing)}")
        data = None
        if request.length:
            if events.encoded_size(attributes, request.length) > self._setup.max_event_bytes:
                try:
                    self._store_body(request, attributes)
                except StoreError as error:
                    return text(400, str(error))
            else:
                data = bytearray(request.length)
                request.fill(memoryview(data))
        self._publish(attributes, data)
        if attributes["type"] == MODEL:
            self._remember(attributes, data)
        return Response(202)

    def _store_body(self, request: Request, attributes: Attributes) -> None:
        """Move the body into the store and name it in the attributes."""
        group = group_of(attributes["type"], attributes.get("round", ""))
        with self._uploads:
            reference = self._store.put(group, request.length, request.fill)
        attributes |= {DATA_REFERENCE: reference, DATA_LENGTH: str(request.length)}

    def _publish(self, attributes: Attributes, data: bytearray | None) -> None:
        event = events.encode(attributes, data)
        subject = self._setup.subject(attributes.get(LEAF))
        with self._wires.connection() as wire:
            headers = {"Nats-Msg-Id": attributes["id"]}
            wire.publish(subject, event, reply=f"{wire.inbox}.ack", headers=headers)
            answer_of(wire.receive())

    def _remember(self, attributes: Attributes, data: bytearray | None) -> None:
        size = len(data) if data is not None else int(attributes.get(DATA_LENGTH, "0"))
        model = _Model(None if data is None else bytes(data), attributes.get(DATA_REFERENCE, ""), size)
        with self._new_model:
            self._models[int(attributes["round"])] = model
            self._new_model.notify_all()

    def _serve_model(self, number: int) -> Response:
        with self._new_model:
            if not self._new_model.wait_for(lambda: number in self._models, MODEL_WAIT_S):
                return text(404, f"the model of round {number} is not there")
            model = self._models[number]
        pieces = self._store.read(model.reference, model.size) if model.data is None else [model.data]
        return Response(200, {"content-type": MEDIA_TYPE}, pieces, model.size)

    def _discard(self, number: int) -> None:
        """Round `number` is over: forget its inputs, and the model of the round before it."""
        self._store.discard(f"{UPDATES}{number}")
        with self._new_model:
            old = [key for key in self._models if key < number]
            for key in old:
                del self._models[key]
        for key in old:
            self._store.discard(f"{MODELS}{key}")


def main() -> None:
    """Serve until told to end."""
    server = Server(Ingress(Setup.read(sys.argv[1])).handle)
    server.start()
    say_ready(str(server.port))
    wait_for_end()


if __name__ == "__main__":
    main()

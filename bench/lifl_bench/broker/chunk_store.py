"""Payloads as chunks in a JetStream stream, moved with a bounded number of them on their way.

The layout is that of a NATS object store: all chunks of a payload have its subject, and a consumer of its own
reads them in order. What is different is how they are moved. Writing does not wait for each acknowledgement;
reading pulls the next chunks while the last ones arrive, straight into place, where nats-py's object store has a
push consumer whose flow control it answers once in 250 ms; chunks are large; and there is no digest, since between
memory and memory of one machine there are TCP and the server's own checks.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from lifl_bench.broker.setup import Setup
from lifl_bench.broker.store import Fill, StoreError
from lifl_bench.broker.wire import Connection, Wire, WirePool, answer_of

_SCHEME: Final = "nats"
_WARM_UP: Final = "warm-up"
_WARM_UP_ROUNDS: Final = 2  # Go's heap grows to twice of what is in use
_PATIENCE_NS: Final = 60 * 10**9


def create(wire: Wire, setup: Setup) -> None:
    """Make the stream that the chunks are in."""
    options: dict[str, Any] = {"name": setup.payload_stream, "subjects": [f"{setup.payload_stream}.>"]}
    options |= {"storage": setup.tuning.storage, "num_replicas": 1, "retention": "limits", "discard": "new"}
    wire.call(f"STREAM.CREATE.{setup.payload_stream}", options)


class ChunkStore:
    """A `PayloadStore` on nats-server."""

    in_place = False

    def __init__(self, setup: Setup, connect: Callable[[str], Connection] = Wire) -> None:
        """`connect` makes the connections that chunks are moved by."""
        self._stream = setup.payload_stream
        self._chunk = setup.tuning.chunk_bytes
        self._window = setup.tuning.window
        self._pool = WirePool(setup.nats_url, connect)
        self._buffers: list[memoryview] = []

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._pool.close()

    @contextmanager
    def _buffer(self) -> Iterator[memoryview]:
        """A buffer for one chunk, which is kept."""
        try:
            buffer = self._buffers.pop()  # atomic, as is append
        except IndexError:
            buffer = memoryview(bytearray(self._chunk))
        try:
            yield buffer
        finally:
            self._buffers.append(buffer)

    def put(self, group: str, size: int, fill: Fill) -> str:
        """Send chunk after chunk; all have been acknowledged when this returns."""
        path = f"{group}.{uuid.uuid4().hex}"
        with self._pool.connection() as wire, self._buffer() as buffer:
            waiting = 0
            for start in range(0, size, self._chunk):
                chunk = buffer[: min(self._chunk, size - start)]
                fill(chunk)
                wire.publish(f"{self._stream}.{path}", chunk, reply=f"{wire.inbox}.ack")
                waiting += 1
                while waiting >= self._window:
                    answer_of(wire.receive())
                    waiting -= 1
            for _ in range(waiting):
                answer_of(wire.receive())
        return f"{_SCHEME}:{path}.{self._chunk}"

    def get(self, reference: str, size: int, target: memoryview | None) -> memoryview:
        """Receive every chunk straight on its place in `target`."""
        path, chunk = _parse(reference)
        whole = (memoryview(bytearray(size)) if target is None else target)[:size]
        for _ in self._chunks(path, size, chunk, lambda number: whole[number * chunk :][:chunk]):
            pass
        return whole

    def read(self, reference: str, size: int) -> Iterator[memoryview]:
        """Chunk after chunk in one buffer, while the next ones are on their way."""
        path, chunk = _parse(reference)
        buffer = memoryview(bytearray(min(chunk, size)))
        yield from self._chunks(path, size, chunk, lambda number: buffer[: size - number * chunk])

    def _chunks(
        self, path: str, size: int, chunk: int, place: Callable[[int], memoryview]
    ) -> Iterator[memoryview]:
        """Receive a payload in order, each chunk where `place` says. Raises StoreError if it is not all there."""
        count = -(-size // chunk)
        batch = max(1, self._window // 2)
        with self._pool.connection() as wire:
            consumer = self._open_consumer(wire, path, count)
            asked = 0
            for number in range(count):
                while asked < count and asked - number <= batch:
                    pulled = min(batch, count - asked)
                    self._pull(wire, consumer, pulled)
                    asked += pulled
                target = place(number)
                message = wire.receive(target)
                if message.status or len(message.payload) != len(target):
                    raise StoreError(f"a chunk of {path} is not as it should be (status {message.status})")
                yield target
            wire.publish(f"$JS.API.CONSUMER.DELETE.{self._stream}.{consumer}")

    def _open_consumer(self, wire: Connection, path: str, count: int) -> str:
        options = {"ack_policy": "none", "deliver_policy": "all", "filter_subject": f"{self._stream}.{path}"}
        config = {**options, "mem_storage": True, "inactive_threshold": _PATIENCE_NS}
        answer = wire.call(f"CONSUMER.CREATE.{self._stream}", {"stream_name": self._stream, "config": config})
        if answer["num_pending"] != count:
            raise StoreError(f"{path} has {answer['num_pending']} of {count} chunks")
        return str(answer["name"])

    def _pull(self, wire: Connection, consumer: str, count: int) -> None:
        request = json.dumps({"batch": count, "expires": _PATIENCE_NS}).encode()
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{consumer}"
        wire.publish(subject, request, reply=f"{wire.inbox}.next")

    def discard(self, group: str) -> None:
        """Purge the chunks of a group."""
        with self._pool.connection() as wire:
            wire.call(f"STREAM.PURGE.{self._stream}", {"filter": f"{self._stream}.{group}.>"})

    def warm_up(self, size: int) -> None:
        """Store, read and discard that many bytes, as rounds do, until the server's heap has about its size."""
        for _ in range(_WARM_UP_ROUNDS if size else 0):
            for _ in self.read(self.put(_WARM_UP, size, lambda target: None), size):
                pass
            self.discard(_WARM_UP)


def _parse(reference: str) -> tuple[str, int]:
    """The path of a payload in the store, and the size of its chunks."""
    scheme, _, rest = reference.partition(":")
    path, _, chunk = rest.rpartition(".")
    if scheme != _SCHEME or not chunk.isdigit() or not int(chunk):
        raise StoreError(f"{reference} is not a reference into this store")
    return path, int(chunk)

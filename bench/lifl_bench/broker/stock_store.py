"""Payloads in a NATS object store as nats-py offers it, with all defaults.

`put` has the whole payload in memory and waits for the acknowledgement of every 128 KiB; `get` appends chunk after
chunk to bytes, copying all it has each time. Both run on one connection and one event loop for the process.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Coroutine, Iterator
from typing import Any, Final

import nats
from nats.js.api import ObjectStoreConfig
from nats.js.errors import NotFoundError

from lifl_bench.broker.setup import Setup
from lifl_bench.broker.store import Fill

_SCHEME: Final = "object"
_TIMEOUT_S: Final = 30.0


class StockStore:
    """A `PayloadStore` on nats-py's object store."""

    in_place = True

    def __init__(self, setup: Setup) -> None:
        """Connect, and make the bucket if it is not there."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._connect(setup), _TIMEOUT_S)

    async def _connect(self, setup: Setup) -> None:
        self._client = await nats.connect(setup.nats_url)
        jetstream = self._client.jetstream()
        config = ObjectStoreConfig(bucket=setup.payload_stream)
        self._bucket = await jetstream.create_object_store(setup.payload_stream, config=config)

    def _call(self, work: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def close(self) -> None:
        """Close the connection and end the event loop."""
        self._call(self._client.close(), _TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_TIMEOUT_S)
        self._loop.close()

    def put(self, group: str, size: int, fill: Fill) -> str:
        """Gather the payload, then store it."""
        payload = bytearray(size)
        fill(memoryview(payload))
        name = f"{group}.{uuid.uuid4().hex}"
        self._call(self._bucket.put(name, bytes(payload)))
        return f"{_SCHEME}:{name}"

    def get(self, reference: str, size: int, target: memoryview | None) -> memoryview:
        """The payload in bytes of its own."""
        result = self._call(self._bucket.get(reference.partition(":")[2]))
        return memoryview(result.data)

    def read(self, reference: str, size: int) -> Iterator[memoryview]:
        """The payload in one piece."""
        yield self.get(reference, size, None)

    def discard(self, group: str) -> None:
        """Delete the objects of a group, whoever stored them."""
        self._call(self._discard(group))

    async def _discard(self, group: str) -> None:
        try:
            objects = await self._bucket.list()
        except NotFoundError:  # this is how an empty bucket is reported
            return
        for info in objects:
            if info.name.startswith(f"{group}."):
                await self._bucket.delete(info.name)

"""Payloads as chunks in a JetStream stream like `ChunkStore`'s, moved by nats-py.

nats-py decides how bytes get from the socket to a message; what is chosen here is all that surrounds it. Chunks
are published without waiting for each acknowledgement, and pulled ahead, as many as the window allows, by requests
whose answers come to one subscription; each is copied once to where it is wanted. There is no object store, and so
no digest, no flow control that is answered once in 250 ms, and no `data +=`.

Every thread that moves a payload drives a connection with an event loop of its own: with one loop for all, in a
thread beside them, each chunk waits for two changes of threads.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Coroutine, Mapping
from typing import Any, Final

import nats
import nats.aio.client
import nats.errors
from nats.aio.msg import Msg

from lifl_bench.broker.chunk_store import ChunkStore
from lifl_bench.broker.setup import Setup
from lifl_bench.broker.tuning import KIB
from lifl_bench.broker.wire import Buffer, Message, WireError, answer_of

_READ_BYTES: Final = 256 * KIB
"""Read from the stream at a time, instead of nats-py's 32 KiB: as much as asyncio receives at a time."""
_FLUSH_ALWAYS: Final = 1
"""A message of more bytes than this is with the kernel, nearly all of it, when `publish` returns. Otherwise its
rest would wait in the event loop while the thread is busy with the next chunk, and messages would be joined, which
copies them again."""
_NO_LIMIT: Final = 0
_TIMEOUT_S: Final = 60.0
_NO_PINGS_S: Final = 3600
"""Nobody runs the event loop of an idle connection, which could not answer."""


class NatsPyConnection:
    """A `Connection` that is nats-py's, and an event loop that runs while one of its methods does."""

    def __init__(self, url: str) -> None:
        """Connect. Raises OSError, and WireError if the server does not let us in."""
        nats.aio.client.DEFAULT_BUFFER_SIZE = _READ_BYTES  # there is no option for it
        self.inbox = f"_INBOX.{uuid.uuid4().hex}"
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        try:
            self._client = self._run(
                nats.connect(
                    url,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,  # also of the first connect, which would go on for two minutes
                    reconnect_time_wait=0,
                    pending_size=_FLUSH_ALWAYS,
                    ping_interval=_NO_PINGS_S,
                    skip_subject_validation=True,
                )
            )
            limits = {"pending_msgs_limit": _NO_LIMIT, "pending_bytes_limit": _NO_LIMIT}
            self._messages = self._run(self._client.subscribe(f"{self.inbox}.*", **limits))
        except BaseException:
            self._runner.close()
            raise

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        try:
            return self._runner.run(work)
        except nats.errors.Error as error:
            raise WireError(f"nats-py: {error or type(error).__name__}") from error

    def close(self) -> None:
        """Close the connection and the event loop."""
        try:
            self._run(self._client.close())
        finally:
            self._runner.close()

    def publish(
        self, subject: str, payload: Buffer = b"", *, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send one message; returns when the kernel has nearly all of it and `payload` may be used again."""
        self._run(self._client.publish(subject, payload, reply, None if headers is None else dict(headers)))

    def receive(self, target: memoryview | None = None) -> Message:
        """Wait for the next message; a payload of the very size of `target` is copied into it."""
        message = _message_of(self._run(self._messages.next_msg(_TIMEOUT_S)))
        if target is None or message.status or len(target) != len(message.payload):
            return message
        target[:] = message.payload
        return Message(message.subject, message.reply, target)

    def call(self, subject: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask JetStream's API, JSON in and out. Raises WireError with its description of what is wrong."""
        payload = b"" if body is None else json.dumps(body).encode()
        return answer_of(_message_of(self._run(self._client.request(f"$JS.API.{subject}", payload, _TIMEOUT_S))))


def _message_of(message: Msg) -> Message:
    status = int((message.headers or {}).get("Status", 0))
    return Message(message.subject, message.reply, memoryview(message.data), status)


class NatsPyStore(ChunkStore):
    """A `PayloadStore` on nats-server, reached through nats-py."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, NatsPyConnection)

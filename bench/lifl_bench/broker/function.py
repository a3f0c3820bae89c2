"""An instance of the aggregator function behind the broker.

    python -m lifl_bench.broker.function SETUP LEAF

It aggregates with what `lifl.http_function` serves elsewhere. What is added here is the claim check: a payload
that an event refers to is received straight into a recycled buffer, and a large result is stored and referred to.
"""

from __future__ import annotations

import asyncio
import mmap
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from lifl import fold_kernel
from lifl.errors import Refused
from lifl.function import load_function
from lifl.http_function import MODEL, PARTIAL, UPDATE, Aggregation, Event, Reply, Settings, parse_event

from lifl_bench.broker import events
from lifl_bench.broker.events import CLIENT_SOURCE, DATA_LENGTH, DATA_REFERENCE, LEAF
from lifl_bench.broker.http_server import Request, Response, Server
from lifl_bench.broker.service import say_ready, wait_for_end
from lifl_bench.broker.setup import Setup
from lifl_bench.broker.store import Fill, StoreError, fill_from, group_of
from lifl_bench.broker.stores import open_store
from lifl_bench.deployment import Stamps, Timing

if TYPE_CHECKING:
    from lifl.function import Receive, Scope, Send

_POPULATE_WRITE: Final = 23
_HELD_MODELS: Final = 4  # two generations of sums, the result, and the model of the round


class Buffers:
    """Memory for payloads, used again when an input has been folded."""

    def __init__(self, size: int, *, keep: bool, ready: int) -> None:
        """`ready` buffers of `size` bytes are made, and touched, at once."""
        self._size = size
        self._keep = keep
        self._free: list[memoryview] = []
        for _ in range(ready if keep else 0):
            memory = self._new()
            memory.madvise(_POPULATE_WRITE)
            self._free.append(memoryview(memory))

    def _new(self) -> mmap.mmap:
        memory = mmap.mmap(-1, max(self._size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def take(self, size: int) -> memoryview:
        """A buffer of at least that many bytes. Raises StoreError for more than any payload has."""
        if size > self._size:
            raise StoreError(f"a payload of {size} bytes is larger than any of this model can be")
        try:
            return self._free.pop()  # atomic, as is append
        except IndexError:
            return memoryview(self._new())

    def give_back(self, buffer: memoryview) -> None:
        """Nobody looks at the buffer any more."""
        if self._keep:
            self._free.append(buffer)


class StampingAggregation(Aggregation):
    """An aggregation that notes when each client's update has become part of a sum."""

    def __init__(self, *arguments: Any, stamps: Stamps) -> None:
        super().__init__(*arguments)
        self._stamps = stamps

    def _add(self, state: Any, batch: Sequence[Any]) -> dict[int, Refused]:
        rejected = super()._add(state, batch)
        for one in batch:
            event = one.event
            if event.type == UPDATE and one.position not in rejected and event.source.startswith(CLIENT_SOURCE):
                self._stamps.note(int(event.source.removeprefix(CLIENT_SOURCE)))
        return rejected


class FoldQueue:
    """Inputs that wait for the one thread that folds; all that are there when it is free go in one pass."""

    def __init__(self, aggregation: Aggregation, timing: Timing, goal: int) -> None:
        self._aggregation = aggregation
        self._lazy = timing == "lazy"
        self._goal = goal
        self._begun: set[int] = set()
        self._waiting: list[tuple[Event, Future[Reply]]] = []
        self.submitted = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._fold, daemon=True).start()

    def submit(self, event: Event) -> Reply:
        """Wait for an input's turn and return the reply to it."""
        answer: Future[Reply] = Future()
        with self._changed:
            self._waiting.append((event, answer))
            self.submitted += 1
            self._changed.notify()
        return answer.result()

    def _fold(self) -> None:
        while True:
            with self._changed:
                while not (batch := self._take()):
                    self._changed.wait()
            try:
                replies = self._aggregation.process([event for event, _ in batch])
            except BaseException as error:
                for _, answer in batch:
                    answer.set_exception(error)
                continue
            for (_, answer), reply in zip(batch, replies, strict=True):
                answer.set_result(reply)

    def _take(self) -> list[tuple[Event, Future[Reply]]]:
        """What is to be folded now; with lazy timing nothing of a round before its goal is reached."""
        if self._lazy:
            sources: dict[int, set[str]] = {}
            for event, _ in self._waiting:
                if event.type != MODEL:
                    sources.setdefault(event.round, set()).add(event.source)
            self._begun |= {number for number, names in sources.items() if len(names) >= self._goal}
        due: list[tuple[Event, Future[Reply]]] = []
        later: list[tuple[Event, Future[Reply]]] = []
        for pair in self._waiting:
            now = not self._lazy or pair[0].type == MODEL or pair[0].round in self._begun
            (due if now else later).append(pair)
        self._waiting = later
        return due


class Instance:
    """Answers events; used by many threads."""

    def __init__(self, setup: Setup, leaf: int) -> None:
        self._setup = setup
        goal = setup.tree.goal_of(leaf)
        function = load_function(setup.function)
        settings = Settings(goal, "top" if leaf == 0 else "leaf", setup.precision)
        stamps = Stamps(setup.stamps, setup.tree.updates)
        self._aggregation = StampingAggregation(function, settings, stamps=stamps)
        self._queue = FoldQueue(self._aggregation, setup.timing, goal)
        self._store = open_store(setup)
        # A function that gathers looks at all updates at the end of the round: their memory is not used again.
        keep = setup.tuning.recycle_memory and not function.gather
        ready = goal if setup.timing == "lazy" else min(goal, setup.tuning.deliveries)
        ready = 0 if self._store.in_place or setup.cold else ready
        self._buffers = Buffers(setup.payload_limit, keep=keep, ready=ready)
        if not setup.cold:
            fold_kernel.warm_up([("F32", "F32" if setup.precision == "float32" else "F64")])
        if setup.tuning.recycle_memory and not setup.cold:
            blocks = [np.ones(setup.payload_limit, np.uint8) for _ in range(_HELD_MODELS)]
            del blocks
        if leaf == 0 and not setup.cold:
            model = np.fromfile(setup.initial_model, np.uint8).data
            self._queue.submit(Event(MODEL, "/server", "initial-model", 1, model))

    def answer(self, headers: Mapping[str, str], length: int, fill: Fill) -> Reply:
        """Answer one binary-mode event whose body is still to be received."""
        buffer: memoryview | None = None
        try:
            reference = headers.get(f"ce-{DATA_REFERENCE}")
            size = int(headers[f"ce-{DATA_LENGTH}"]) if reference else length
            if not (reference and self._store.in_place):
                buffer = self._buffers.take(size)
            if reference:
                data = self._store.get(reference, size, buffer)
            else:
                assert buffer is not None
                data = buffer[:size]
                fill(data)
            return self._aggregate(parse_event(headers, data))
        except Refused as error:
            return Reply(error.status, {}, f"{error.title}: {error.detail}".encode())
        finally:
            if buffer is not None:
                self._buffers.give_back(buffer)

    def _aggregate(self, event: Event) -> Reply:
        if event.type != MODEL:
            return self._result(self._queue.submit(event))
        # The model of a round is looked at until the next one is there, longer than buffers are lent.
        kept = np.frombuffer(event.data, np.uint8).copy().data
        return self._queue.submit(Event(event.type, event.source, event.id, event.round, kept))

    def _result(self, reply: Reply) -> Reply:
        """Address a partial aggregate to the top, and store a result that is too large for a message."""
        kind = reply.headers.get("ce-type")
        if kind is None:
            return reply
        headers = dict(reply.headers)
        if kind == PARTIAL:
            headers[f"ce-{LEAF}"] = "0"
        size = len(reply.body)
        large = events.encoded_size(events.attributes_of(headers), size) > self._setup.max_event_bytes
        if self._setup.tuning.resolve == "filter" or not large:
            return Reply(reply.status, headers, reply.body)
        body = memoryview(np.frombuffer(reply.body, np.uint8).data)
        reference = self._store.put(group_of(kind, headers["ce-round"]), size, fill_from(body))
        headers |= {f"ce-{DATA_REFERENCE}": reference, f"ce-{DATA_LENGTH}": str(size)}
        return Reply(reply.status, headers)


# --- servers -------------------------------------------------------------------------------------------------


def handler_of(instance: Instance) -> Callable[[Request], Response]:
    """The instance for the threaded server."""

    def handle(request: Request) -> Response:
        if request.method != "POST":
            return Response(405)
        reply = instance.answer(request.headers, request.length, request.fill)
        return Response(reply.status, reply.headers, memoryview(np.frombuffer(reply.body, np.uint8).data))

    return handle


def application_of(instance: Instance) -> Callable[[Scope, Receive, Send], Any]:
    """The instance as an ASGI application, for hypercorn as func-python runs it."""
    handle = handler_of(instance)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"]
                await send({"type": f"{kind}.complete"})
                if kind == "lifespan.shutdown":
                    return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        fill = fill_from(memoryview(body))

        def read_into(target: memoryview) -> int:
            fill(target)
            return len(target)

        request = Request(scope["method"], scope["path"], headers, len(body), read_into)
        response = await asyncio.to_thread(handle, request)
        assert isinstance(response.body, (bytes, memoryview))
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in response.headers.items()]
        encoded = [*encoded, (b"content-length", str(len(response.body)).encode())]
        await send({"type": "http.response.start", "status": response.status, "headers": encoded})
        await send({"type": "http.response.body", "body": bytes(response.body)})

    return application


def serve_with_hypercorn(instance: Instance) -> None:
    """Serve until told to end."""
    import socket

    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    say_ready(str(listener.getsockname()[1]))
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    asyncio.run(serve(application_of(instance), config, mode="asgi"))  # type: ignore[arg-type]


def main() -> None:
    """Serve until told to end."""
    setup = Setup.read(sys.argv[1])
    instance = Instance(setup, int(sys.argv[2]))
    if setup.tuning.server == "hypercorn":
        serve_with_hypercorn(instance)
        return
    server = Server(handler_of(instance))
    server.start()
    say_ready(str(server.port))
    wait_for_end()


if __name__ == "__main__":
    main()

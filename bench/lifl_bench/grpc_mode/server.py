"""The process of one aggregator: a leaf, and for leaf 0 the top as well.

    python -m lifl_bench.grpc_mode.server --leaf 0 --leaves 2 --updates 20 --function fedavg.py --model FILE ...

Says its port in a line of JSON, reads another with the address of the top, and serves until SIGTERM. All calls
and the register of the round are on one event loop, folds in one thread beside it, as the kernels let go of the
interpreter. grpcio's threaded server hands each chunk from one Python thread to another, which was measured to
cost about a tenth more CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import mmap
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
from lifl.function import load_function
from lifl.model_layout import ModelLayout, Precision
from lifl.tensors import LENGTH, split

from lifl_bench.deployment import Stamps, Tree
from lifl_bench.grpc_mode.protocol import (
    CHANNEL_OPTIONS,
    FETCH_MODEL,
    SEND_PARTIAL,
    SEND_UPDATE,
    SERVER_OPTIONS,
    WAIT_MODEL,
    Attributes,
    Invalid,
    chunks,
    round_of,
)
from lifl_bench.grpc_mode.rounds import Partial, Received, Refused, Roll, Sums, UpdateBuffer, allocate

BUFFERS: Final = 8
"""Updates that a leaf has room for: some are received while others are folded. Who finds no room waits, held back
by the flow control of HTTP/2."""

RECEIVING: Final = 4
"""Updates that a leaf receives at a time."""

FOLD_BATCH: Final = 4
FOLD_LINGER: Final = 0.005
"""When to fold, as LIFL's workers do: when so many updates are ready, or the oldest has waited so many seconds."""

MODELS: Final = 3
"""The model of the open round, the next one, and one that slow readers may still have."""

log = logging.getLogger("lifl_bench.grpc_mode.server")

Context = Any
"""grpc.aio.ServicerContext, which has no types."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    leaf: int
    tree: Tree
    function: Path
    model: Path
    stamps: Path
    precision: Precision

    @classmethod
    def parse(cls) -> Options:
        """Read sys.argv."""
        parser = argparse.ArgumentParser(prog="python -m lifl_bench.grpc_mode.server", description=__doc__)
        for name in ("--leaf", "--leaves", "--updates"):
            parser.add_argument(name, type=int, required=True)
        for name in ("--function", "--model", "--stamps"):
            parser.add_argument(name, type=Path, required=True)
        parser.add_argument("--precision", choices=("float32", "float64"), default="float32")
        read = parser.parse_args()
        tree = Tree(read.updates, read.leaves)
        return cls(read.leaf, tree, read.function, read.model, read.stamps, read.precision)


# --- models --------------------------------------------------------------------------------------------------


class Models:
    """The newest global models, at the top. A round starts from the model of its number."""

    def __init__(self, layout: ModelLayout, initial: memoryview) -> None:
        self._buffers = [UpdateBuffer(len(layout.header), layout.payload_bytes) for _ in range(MODELS)]
        for buffer in self._buffers:
            LENGTH.pack_into(buffer.whole, 0, len(layout.header))
            buffer.whole[LENGTH.size : LENGTH.size + len(layout.header)] = layout.header
        self._buffers[1].payload[:] = initial
        self.newest = 1
        self._news = asyncio.Event()

    def of(self, number: int) -> UpdateBuffer:
        """The buffer of a model, to read it or, for the next one, to write it."""
        return self._buffers[number % MODELS]

    def offer(self) -> None:
        """The next model is complete."""
        self.newest += 1
        self._news.set()
        self._news = asyncio.Event()

    async def wait(self, number: int) -> None:
        """Return when the model with this number is there."""
        while self.newest < number:
            await self._news.wait()

    def is_kept(self, number: int) -> bool:
        """Whether its buffer has not been, and is not being, used again."""
        return self.newest - (MODELS - 2) <= number <= self.newest


# --- the server ----------------------------------------------------------------------------------------------


class Aggregator(grpc.GenericRpcHandler):  # type: ignore[misc]
    """One server's calls and rounds."""

    def __init__(self, options: Options) -> None:
        self._options = options
        with options.model.open("rb") as file:
            layout, initial = split(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        self._head = LENGTH.pack(len(layout.header)) + layout.header
        self._sums = Sums(load_function(options.function), layout, options.precision)
        update_bytes = len(self._head) + layout.payload_bytes
        self._roll = Roll(options.tree, options.leaf, update_bytes, self._sums.nbytes)
        self._stamps = Stamps(options.stamps, options.tree.updates)
        # The last one used is used again first: its pages are the likeliest to be in a cache.
        self._free: asyncio.LifoQueue[UpdateBuffer] = asyncio.LifoQueue()
        for _ in range(min(BUFFERS, self._roll.updates)):
            self._free.put_nowait(UpdateBuffer(len(layout.header), layout.payload_bytes))
        self._receiving = asyncio.Semaphore(RECEIVING)
        self._ready: list[Received] = []
        self._ready_since = 0.0
        self._news = asyncio.Event()
        """Something became ready, or a partial aggregate came."""
        self._opened = asyncio.Event()
        self._partial_buffers = [allocate(self._sums.nbytes) for _ in range(self._roll.partials)]
        self._partials: list[Partial] = []
        self._models = Models(layout, initial) if options.leaf == 0 else None
        self._fold_thread = ThreadPoolExecutor(1, "fold")
        self._methods = self._handlers()

    def _handlers(self) -> dict[str, Any]:
        handlers = {
            SEND_UPDATE: grpc.stream_unary_rpc_method_handler(self._send_update),
            SEND_PARTIAL: grpc.stream_unary_rpc_method_handler(self._send_partial),
        }
        if self._models is not None:
            handlers[WAIT_MODEL] = grpc.unary_unary_rpc_method_handler(self._wait_model)
            handlers[FETCH_MODEL] = grpc.unary_stream_rpc_method_handler(self._fetch_model)
        return handlers

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a method; none for an unknown one. Part of grpc's interface."""
        return self._methods.get(handler_call_details.method)

    # --- calls ------------------------------------------------------------------------------------------------

    async def _wait_for_round(self, context: Context) -> None:
        """A client may have the next model before this leaf hears that its partial aggregate has arrived."""
        try:
            number = Attributes.of(context.invocation_metadata()).round
        except Invalid:
            return  # it is told so when it is to be admitted
        while number == self._roll.round + 1 and self._roll.is_full:
            await self._opened.wait()

    def _open_next_round(self) -> None:
        self._roll.next_round()
        self._opened.set()
        self._opened = asyncio.Event()

    async def _send_update(self, request_iterator: object, context: Context) -> bytes:
        await self._wait_for_round(context)
        attributes = await _granted(context, self._roll.admit_update)
        buffer: UpdateBuffer | None = None
        try:
            async with self._receiving:
                buffer = await self._free.get()
                await _receive(context, buffer.whole)
            if buffer.whole[: len(self._head)] != self._head:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the update's header is not the model's")
        except BaseException:
            self._roll.strike_update(attributes.sender)
            if buffer is not None:
                self._free.put_nowait(buffer)
            raise
        if not self._ready:
            self._ready_since = time.monotonic()
        self._ready.append(Received(attributes, buffer))
        self._news.set()
        return b""

    async def _send_partial(self, request_iterator: object, context: Context) -> bytes:
        attributes = await _granted(context, self._roll.admit_partial)
        # One for each leaf: what has come has to stay until the model is made.
        buffer = self._partial_buffers[attributes.sender - 1]
        try:
            await _receive(context, buffer)
        except BaseException:
            self._roll.strike_partial(attributes.sender)
            raise
        self._partials.append(Partial(buffer, attributes.weight, attributes.delta_weight))
        self._news.set()
        return b""

    async def _wait_model(self, request: bytes, context: Context) -> bytes:
        assert self._models is not None
        await self._models.wait(await _round(context))
        return b""

    async def _fetch_model(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        assert self._models is not None
        number = await _round(context)
        await self._models.wait(number)
        for chunk in chunks(self._models.of(number).whole):
            # Looked at before each chunk is sent: a reader may be slower than the rounds.
            if not self._models.is_kept(number):
                await context.abort(grpc.StatusCode.OUT_OF_RANGE, f"the model of round {number} is kept no more")
            yield chunk

    # --- rounds -----------------------------------------------------------------------------------------------

    async def run_rounds(self, top: str) -> NoReturn:
        """Fold, round by round, and send the result up, or offer it. `top` is the address of leaf 0."""
        channel = grpc.aio.insecure_channel(top, options=CHANNEL_OPTIONS)
        send_partial = channel.stream_unary(SEND_PARTIAL)
        if self._models is None:
            await channel.channel_ready()
        while True:
            self._sums.begin(self._roll.round)
            await self._fold_updates()
            if self._models is None:
                await self._send_up(send_partial)
                self._open_next_round()
            else:
                await self._make_model(self._models)

    async def _fold_updates(self) -> None:
        """Fold every update of the round."""
        left = self._roll.updates
        while left:
            batch = await self._next_batch(min(left, FOLD_BATCH))
            refused = await self._in_thread(self._fold, batch)
            for one in refused:
                self._roll.strike_update(one.attributes.sender)
            for one in batch:
                self._free.put_nowait(one.buffer)
            left -= len(batch) - len(refused)

    async def _next_batch(self, wanted: int) -> list[Received]:
        """What is ready, once it is enough or has waited for long enough."""
        while len(self._ready) < wanted:
            self._news.clear()
            patience = self._ready_since + FOLD_LINGER - time.monotonic() if self._ready else None
            try:
                async with asyncio.timeout(patience):
                    await self._news.wait()
            except TimeoutError:
                break
        batch, self._ready = self._ready, []
        return batch

    def _fold(self, batch: list[Received]) -> list[Received]:
        refused = self._sums.add(batch)
        for one in batch:
            if one not in refused:
                self._stamps.note(one.attributes.sender)
        return refused

    async def _send_up(self, send_partial: Callable[..., Any]) -> None:
        partial = self._sums.partial()
        attributes = Attributes(
            self._options.leaf, self._roll.round, len(partial.sums), partial.weight, partial.delta_weight
        )
        call = send_partial(metadata=attributes.metadata())
        for chunk in chunks(partial.sums):
            await call.write(chunk)
        await call.done_writing()
        await call

    async def _make_model(self, models: Models) -> None:
        while len(self._partials) < self._roll.partials:
            self._news.clear()
            await self._news.wait()
        previous, out = models.of(models.newest).payload, models.of(models.newest + 1).payload
        await self._in_thread(self._sums.finish, out, self._partials, previous)
        self._partials = []
        self._open_next_round()
        models.offer()

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._fold_thread, work, *arguments)


async def _granted(context: Context, admit: Callable[[Attributes], None]) -> Attributes:
    """The attributes of a call, or its end with the status of what is wrong with them."""
    try:
        attributes = Attributes.of(context.invocation_metadata())
        admit(attributes)
        return attributes
    except Invalid as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except Refused as error:
        await context.abort(grpc.StatusCode[error.code], str(error))
    raise AssertionError("an aborted call goes on")


async def _round(context: Context) -> int:
    try:
        return round_of(context.invocation_metadata())
    except Invalid as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    raise AssertionError("an aborted call goes on")


async def _receive(context: Context, target: memoryview) -> None:
    """Fill the target from the call's stream; aborts the call if it is longer or shorter."""
    end = 0
    while (chunk := await context.read()) is not grpc.aio.EOF:
        start, end = end, end + len(chunk)
        if end > len(target):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"more than the {len(target)} bytes announced")
        target[start:end] = chunk
    if end < len(target):
        text = f"only {end} of the {len(target)} bytes announced"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)


# --- the process ---------------------------------------------------------------------------------------------


async def serve(options: Options) -> NoReturn:
    """Serve until a round fails, which raises, or SIGTERM, which ends the process there and then: there is nothing
    to be saved, and calls that are open end with their connections."""
    aggregator = Aggregator(options)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((aggregator,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"port": port}), flush=True)
    loop = asyncio.get_running_loop()
    top = json.loads(await loop.run_in_executor(None, sys.stdin.readline))["top"]
    gc.collect()
    gc.freeze()
    print(json.dumps({"top": top}), flush=True)
    await aggregator.run_rounds(top)


def main() -> None:
    """Entry point of the process."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the benchmark's to handle
    try:
        asyncio.run(serve(Options.parse()))
    except Exception:
        log.exception("the server ends")
        sys.stderr.flush()
        # gRPC's threads and the clients' open calls would hold up an orderly end.
        os._exit(1)


if __name__ == "__main__":
    main()

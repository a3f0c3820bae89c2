"""The tree of gRPC servers as a deployment of the comparison, and its clients.

grpc is imported here, so before clients are forked, and its library wakes only with the first channel: that is
made in `connect`, in the client's own process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import grpc

from lifl_bench.deployment import Cell, Stamps
from lifl_bench.grpc_mode.protocol import (
    ALLOCATOR_TUNABLES,
    CHANNEL_OPTIONS,
    FETCH_MODEL,
    SEND_UPDATE,
    WAIT_MODEL,
    Attributes,
    chunks,
    keep_freed_memory,
    round_metadata,
)
from lifl_bench.processes import THREAD_VARIABLES
from lifl_bench.service import Service

COPIES: Final = 7.0
COPIES_DETAIL: Final = (
    "client's buffer to bytes; to a slice of gRPC; to the socket; socket to slices; slices to bytes, twice; "
    "to the buffer where it is folded"
)

_START_SECONDS: Final = 60.0
_CONNECT_SECONDS: Final = 30.0
_CALL_SECONDS: Final = 600.0
_FETCH_SECONDS: Final = 60.0


# --- clients -------------------------------------------------------------------------------------------------


class _Peer:
    """One side of a connection to a server."""

    def __init__(self, name: str, address: str) -> None:
        self._name = name
        self._address = address
        self._channel: Any = None

    def _open(self, address: str) -> Any:
        """A connected channel. Raises RuntimeError if there is no server."""
        channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            channel.close()
            raise RuntimeError(f"{self._name}: no gRPC server answers at {address}") from None
        return channel

    def connect(self) -> None:
        """Open the connection."""
        self._channel = self._open(self._address)

    def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _failure(self, error: Any) -> RuntimeError:
        return RuntimeError(f"{self._name}: {error.code().name}: {error.details()}")


class GrpcSender(_Peer):
    """A client that streams its update to its leaf."""

    def __init__(self, client: int, leaf: str, top: str) -> None:
        super().__init__(f"client {client}", leaf)
        self._client = client
        self._top = top
        self._top_channel: Any = None
        self._send: Callable[..., bytes] | None = None

    def connect(self) -> None:
        """Connect to the leaf."""
        keep_freed_memory()
        super().connect()
        self._send = self._channel.stream_unary(SEND_UPDATE)

    def send(self, update: memoryview, *, num_samples: float, round: int) -> None:
        """Send in chunks; RuntimeError with the status unless the update was accepted."""
        assert self._send is not None
        attributes = Attributes(self._client, round, len(update), num_samples)
        try:
            self._send(chunks(update), metadata=attributes.metadata(), timeout=_CALL_SECONDS)
        except grpc.RpcError as error:
            raise self._failure(error) from None

    def fetch_model(self, round: int) -> memoryview:
        """Wait for the model that the round starts from, and fetch it from the top."""
        if self._top_channel is None:
            # Not in `connect`: a client that is only timed has no use for a second connection.
            self._top_channel = self._open(self._top)
        try:
            return _fetch(self._top_channel, round)
        except grpc.RpcError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Close the connections."""
        super().close()
        if self._top_channel is not None:
            self._top_channel.close()
            self._top_channel = None


class GrpcObserver(_Peer):
    """Waits in a call to the top that was made before the round."""

    def __init__(self, top: str) -> None:
        super().__init__("observer", top)
        self._wait: Callable[..., bytes] | None = None

    def connect(self) -> None:
        """Connect to the top."""
        super().connect()
        self._wait = self._channel.unary_unary(WAIT_MODEL)

    def wait(self, round: int, timeout: float) -> float:
        """The time at which the top answered that the model is there."""
        assert self._wait is not None
        try:
            self._wait(b"", metadata=round_metadata(round + 1), timeout=timeout)
        except grpc.RpcError as error:
            failure: Any = error
            if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError(f"round {round} made no model within {timeout:.0f} s") from None
            raise self._failure(error) from None
        return time.monotonic()

    def fetch(self, round: int) -> memoryview:
        """The model that the round made."""
        try:
            return _fetch(self._channel, round + 1)
        except grpc.RpcError as error:
            raise self._failure(error) from None


def _fetch(channel: Any, number: int) -> memoryview:
    stream: Iterable[bytes] = channel.unary_stream(FETCH_MODEL)(
        b"", metadata=round_metadata(number), timeout=_FETCH_SECONDS
    )
    return memoryview(b"".join(stream))


# --- servers -------------------------------------------------------------------------------------------------


class GrpcDeployment:
    """Always-on gRPC servers, one for each leaf of the tree."""

    mode = "grpc"

    def __init__(self, cell: Cell) -> None:
        if not 0 < cell.tree.leaves <= cell.tree.updates:
            raise ValueError(f"{cell.tree.leaves} leaves cannot share {cell.tree.updates} updates")
        self._cell = cell
        self._model = cell.directory / "grpc-model.safetensors"
        self._stamps_file = cell.directory / "grpc-stamps"
        self._stamps: Stamps | None = None
        self._servers: list[Service] = []
        self._addresses: list[str] = []

    def start(self) -> None:
        """Start all servers at the same time and tell them where the top is."""
        self._model.write_bytes(self._cell.initial_model)
        self._stamps = Stamps(self._stamps_file, self._cell.updates)
        deadline = time.monotonic() + _START_SECONDS
        try:
            for leaf in range(self._cell.tree.leaves):
                log = self._cell.directory / f"grpc-leaf-{leaf}.log"
                command = [sys.executable, "-m", "lifl_bench.grpc_mode.server", *self._arguments(leaf)]
                self._servers.append(Service("a gRPC server", command, self._environment(), log))
            ports = [json.loads(server.hear(deadline))["port"] for server in self._servers]
            self._addresses = [f"127.0.0.1:{port}" for port in ports]
            for server in self._servers:
                server.tell(json.dumps({"top": self._addresses[0]}))
            for server in self._servers:
                server.hear(deadline)
        except BaseException:
            self.stop()
            raise
        self._model.unlink()

    def _arguments(self, leaf: int) -> list[str]:
        cell = self._cell
        arguments = [f"--leaf={leaf}", f"--leaves={cell.tree.leaves}", f"--updates={cell.updates}"]
        arguments += [f"--function={cell.function}", f"--model={self._model}", f"--stamps={self._stamps_file}"]
        return [*arguments, f"--precision={cell.precision}"]

    def _environment(self) -> dict[str, str]:
        environment = {**self._cell.environment, **dict.fromkeys(THREAD_VARIABLES, "1")}
        environment["GLIBC_TUNABLES"] = ALLOCATOR_TUNABLES
        return environment

    def stop(self) -> None:
        """End all servers."""
        for server in self._servers:
            server.terminate()
        for server in self._servers:
            server.stop()
        self._servers = []
        self._addresses = []
        self._stamps = None
        for path in (self._model, self._stamps_file):
            path.unlink(missing_ok=True)

    def sender(self, client: int) -> GrpcSender:
        """A client."""
        return GrpcSender(client, self._addresses[self._cell.tree.leaf_of(client)], self._addresses[0])

    def observer(self) -> GrpcObserver:
        """An observer."""
        return GrpcObserver(self._addresses[0])

    def components(self) -> Mapping[str, Sequence[int]]:
        """The servers: leaf 0, which is also the top, and the other leaves."""
        pids = [server.pid for server in self._servers if server.is_running]
        return {"server": pids} if pids else {}

    def folded(self, round: int) -> Sequence[float]:
        """When each update of the last round was folded."""
        assert self._stamps is not None
        return self._stamps.read()

    def before_round(self, round: int) -> None:
        """Forget the times of the last round."""
        assert self._stamps is not None
        self._stamps.clear()

    def after_round(self, round: int) -> None:
        """Nothing is left to do."""

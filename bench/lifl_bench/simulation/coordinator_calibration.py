"""Measures what questions to the coordinator cost: a real one, over loopback, with a node's own connection to it.

Everything is CPU of processes, so what else runs on the machine matters little. Before each request all caches are
filled with something else, as they are in a round, where updates pass through them: the coordinator needs half as
much for a request that follows at once.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import multiprocessing
import os
import select
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from lifl.client import EXPECT_BYTES, Client
from lifl.cluster.member_link import MemberLink, MemberOptions
from lifl.cluster.messages import (
    CountUpdate,
    FunctionFacts,
    JobOrder,
    MemberMessage,
    Orders,
    PlaceUpdate,
    Register,
)
from lifl.model_layout import encode_header

from lifl_bench.measure import precise_cpu
from lifl_bench.service import Service

_JOB: Final = "measured"
_GOAL: Final = 1_000_000
_SINGLE: Final = 120
"""Requests with one message."""
_BATCHES: Final = 20
_BATCH: Final = 32
_CLIENTS: Final = 40
_REPEATS: Final = 5
_SWEPT_BYTES: Final = 8 << 20
"""Read and written on each core between two requests: more than a core's own caches hold."""
_WAIT_SECONDS: Final = 20.0
_LEASE_SECONDS: Final = 10_000.0
"""So long that no heartbeat comes in between."""


@dataclass(frozen=True)
class QuestionCosts:
    """CPU seconds."""

    request_s: float
    message_s: float
    node_request_s: float
    redirect_s: float
    client_s: float


def measure_questions(send_s_per_gb: float) -> QuestionCosts:
    """Costs of requests to the coordinator and to gateways; `send_s_per_gb` is what a client's bytes cost.

    Raises RuntimeError or TimeoutError when the coordinator does not start or answer.
    """
    # In a process of its own, for a node's threads end with their process only.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (send_s_per_gb,))


def _measure(send_s_per_gb: float) -> QuestionCosts:
    logging.getLogger("lifl.coordinator").disabled = True  # at the end the coordinator goes before the node
    with tempfile.TemporaryDirectory(prefix="lifl-simulate-") as directory, _Node(Path(directory)) as node:
        found = [_measure_once(node, send_s_per_gb) for _ in range(_REPEATS + 1)][1:]
    return QuestionCosts(*(statistics.median(column) for column in zip(*map(astuple, found), strict=True)))


def _measure_once(node: _Node, send_s_per_gb: float) -> QuestionCosts:
    single, batched = node.tell_all(1, _SINGLE), node.tell_all(_BATCH, _BATCHES)
    # Two equations: with one message in a request, and with many.
    message_s = max(0.0, (batched.coordinator_s - single.coordinator_s) / (_BATCH - 1))
    request_s = max(0.0, single.coordinator_s - message_s)
    client_s, redirect_s = node.redirect(_CLIENTS, send_s_per_gb * EXPECT_BYTES / 1e9)
    return QuestionCosts(request_s, message_s, single.node_s, max(0.0, redirect_s - message_s), client_s)


@dataclass(frozen=True)
class _Spent:
    """CPU seconds for each request."""

    coordinator_s: float
    node_s: float


class _Node:
    """A coordinator, its only node, and a job; use it in a `with` statement."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = contextlib.ExitStack()
        self._clients = 0
        self._order: JobOrder | None = None

    def __enter__(self) -> _Node:
        with contextlib.ExitStack() as stack:
            self._caches = stack.enter_context(_Caches())
            self._gateway = stack.enter_context(_Gateway())
            words = ["--state-directory", str(self._directory / "state"), "--lease", str(_LEASE_SECONDS)]
            words += ["--address", "127.0.0.1:0", "--peer-address", "127.0.0.1:0"]
            command = [sys.executable, "-m", "lifl_gateway.coordinator", *words]
            self._service = Service("the coordinator", command, os.environ, self._directory / "log")
            stack.callback(self._service.stop)
            self._url = json.loads(self._service.hear())["address"]
            self._join()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # --- what a node does ----------------------------------------------------------------------------------

    def _join(self) -> None:
        """Be a member, and have a job whose first round never ends."""
        (self._directory / "member.json").write_text(
            json.dumps({"address": self._gateway.url, "peer_address": "127.0.0.1:1"})
        )
        self._link = MemberLink(
            MemberOptions(self._url, "a"), self._directory, _describe, self._on_orders, lambda: None
        )
        self._poll = select.poll()
        self._poll.register(self._link.fileno(), select.POLLIN)
        self._link.start()
        with Client(self._url, _JOB, "operator") as operator:
            operator.create_job(function="fedavg", goal=_GOAL)
            header = encode_header({"weight": ("F32", [64])})
            operator.upload_model(len(header).to_bytes(8, "little") + header + bytes(256))
        self._tell([FunctionFacts("fedavg", gather=False, state_arrays=0)])
        self._process_until(lambda: self._order is not None and self._order.round == 1)

    def _on_orders(self, orders: Orders, done: Callable[[], None]) -> None:
        for order in orders.jobs:
            self._order = order
            self._link.seen[order.job] = order.version
        done()

    def _process_until(self, is_done: Callable[[], bool]) -> None:
        end = time.monotonic() + _WAIT_SECONDS
        while not is_done():
            if not self._poll.poll(1e3 * max(0.0, end - time.monotonic())):
                raise TimeoutError("the coordinator does not answer")
            self._link.process()

    def _tell(self, messages: Sequence[MemberMessage]) -> None:
        """Say all these together, and wait for the answers."""
        left = len(messages)

        def answered(_: object) -> None:
            nonlocal left
            left -= 1

        for message in messages:
            self._link.send(message, answered)
        self._process_until(lambda: not left)

    def tell_all(self, size: int, requests: int) -> _Spent:
        """Ask for places and count updates, as a round does, with so many messages in a request."""
        messages = list(self._messages(size * requests))
        said, own, before = self._requests(), 0.0, precise_cpu(self._service.pid)
        for first in range(0, len(messages), size):
            self._caches.sweep()
            begin = time.process_time()
            self._tell(messages[first : first + size])
            own += time.process_time() - begin
        spent = precise_cpu(self._service.pid) - before
        # The first of a batch may have gone alone: what counts is how many requests there were.
        said = self._requests() - said
        return _Spent(spent / said, own / said)

    def _messages(self, count: int) -> Iterator[MemberMessage]:
        assert self._order is not None
        order = self._order
        for number in range(count // 2):
            client = f"client-{self._clients + number}"
            yield PlaceUpdate(_JOB, 1, client)
            yield CountUpdate(_JOB, order.nonce, 1, order.attempt, client, 1.0)
        self._clients += count // 2

    def _requests(self) -> int:
        """How many the coordinator has answered so far, but for those that this asks itself."""
        url = urlsplit(self._url)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=_WAIT_SECONDS)
        try:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        finally:
            connection.close()
        counts = [line.split()[-1] for line in lines if "_requests_total{" in line and '"POST"' in line]
        return round(sum(map(float, counts)))

    # --- what clients do -----------------------------------------------------------------------------------

    def redirect(self, clients: int, bytes_s: float) -> tuple[float, float]:
        """CPU seconds of a client for a request with a connection of its own, and of whoever sends it on.

        The coordinator does so with the same server as a gateway.
        """
        update = bytes(EXPECT_BYTES + 1)
        before, spent = precise_cpu(self._service.pid), 0.0
        for number in range(clients):
            with Client(self._url, _JOB, f"late-{number}") as client:
                self._caches.sweep()
                begin = time.thread_time()
                client.submit(update, num_samples=1.0, round=1)
                spent += time.thread_time() - begin
        here = precise_cpu(self._service.pid) - before
        # It asks twice: where it is sent on, and where it sends its bytes.
        return max(0.0, spent / clients - bytes_s) / 2, here / clients


class _Caches:
    """Those of all cores; use it in a `with` statement."""

    def __enter__(self) -> _Caches:
        cores = len(os.sched_getaffinity(0))
        self._memory = [np.zeros((2, _SWEPT_BYTES // 2), np.uint8) for _ in range(cores)]
        self._threads = ThreadPoolExecutor(cores)
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def sweep(self) -> None:
        """Fill them with what nobody needs."""
        for _ in self._threads.map(_copy, self._memory):
            pass


def _copy(memory: npt.NDArray[np.uint8]) -> None:
    memory[1] = memory[0]


class _Gateway:
    """Takes in updates and does nothing with them; use it in a `with` statement."""

    def __enter__(self) -> _Gateway:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, name="gateway", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        room = bytearray(EXPECT_BYTES)
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                while b"\r\n\r\n" not in connection.recv(1 << 16):
                    pass
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                left = EXPECT_BYTES + 1
                while left and (got := connection.recv_into(room, min(left, len(room)))):
                    left -= got
                answer = b'{"status":"accepted","round":1}'
                connection.sendall(
                    b"HTTP/1.1 202 Accepted\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer)
                )


def _describe(incarnation: str, address: str, peer_address: str) -> Register:
    return Register("a", incarnation, address, peer_address, 8, 0, "ebpf", (), 20.0)

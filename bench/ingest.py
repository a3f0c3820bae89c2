"""How close the gateway's ingest comes to a bare socket.

Two servers take the same bodies (ResNet-18 as float32, 44.7 MB) from the same sender, in turn, so that both see
the same machine:

* `raw`: a loop of `recv_into` on a pre-faulted slot, and one byte back; nothing is checked.
* `http`: the gateway. A model update as a CloudEvent by HTTP, checked, received into a slot, counted by a
  coordinator and announced to an aggregator by a descriptor. Coordinator and agent are the tests' stand-ins, which
  run in the gateway's process, so that their CPU time is counted too; no one folds.

Both are processes of their own, on connections that are kept. CPU seconds are the server's alone.

    python bench/ingest.py [--repeats 7] [--clients 1 --clients 8] [--uploads 6] [-o json]
"""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the tests' stand-in of a coordinator

from lifl.congestion import avoid_bbr  # noqa: E402
from lifl.messages import PoolInfo  # noqa: E402
from lifl.model_layout import encode_header  # noqa: E402
from lifl.pool import MappedPool  # noqa: E402
from lifl.slot import PAGE, PoolGeometry  # noqa: E402
from lifl_bench.models import resnet_shapes  # noqa: E402

SLOTS = 16
GOAL = 0.85


@dataclass
class Row:
    """One number of clients: GB/s and the server's CPU seconds per GB, raw and by HTTP, and the ratios of GB/s."""

    clients: int
    raw_best: float
    raw_median: float
    http_best: float
    http_median: float
    raw_cpu: float
    http_cpu: float
    ratio_best: float
    ratio_median: float


def body_of_model() -> tuple[bytes, int]:
    """The safetensors header of the model, with its length before it, and the bytes of the payload."""
    shapes = resnet_shapes("resnet18")
    header = encode_header({name: ("F32", shape) for name, shape in shapes.items()})
    items = sum(math.prod(shape) for shape in shapes.values())
    return len(header).to_bytes(8, "little") + header, items * 4


# --- servers: `python bench/ingest.py serve-raw`, `serve-http` -------------------------------------------------


def serve_raw() -> None:
    """Receive bodies of one known size into slots, one thread for each connection."""
    head, payload_bytes = body_of_model()
    nbytes = len(head) + payload_bytes
    geometry = PoolGeometry.of(SLOTS, PAGE, nbytes)
    fd = os.memfd_create("raw")
    os.ftruncate(fd, geometry.size)
    pool = MappedPool(PoolInfo(0, "updates", "raw", 1, *geometry), fd)
    for index in range(SLOTS):
        pool.slot(index)[:] = bytes(geometry.stride)
    listener = socket.socket()
    avoid_bbr(listener)
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    print(json.dumps(listener.getsockname()), flush=True)

    def serve(sock: socket.socket, view: memoryview) -> None:
        while True:
            done = 0
            while done < nbytes:
                got = sock.recv_into(view[done:nbytes])
                if not got:
                    return
                done += got
            sock.sendall(b"1")

    for number in count():
        sock, _ = listener.accept()
        view = pool.payload(number % SLOTS)
        threading.Thread(target=serve, args=(sock, view), daemon=True).start()


def serve_http() -> None:
    """Run a gateway with the tests' coordinator, which releases each slot at once."""
    from tests.integration import gateway_harness as harness

    head, payload_bytes = body_of_model()
    harness.make_model = lambda values=0: (head[8:], bytes(payload_bytes))
    with tempfile.TemporaryDirectory() as directory:
        node = harness.Node(Path(directory), slots=SLOTS)
        memory, _ = node.coordinator.memory[harness.JOB]
        for index in range(SLOTS):
            memory.slot(index)[:] = bytes(memory.geometry.stride)
        node.coordinator.release_at_once = True
        print(json.dumps(node.address), flush=True)
        sys.stdin.read()


class Server:
    """A server process and how to upload to it."""

    def __init__(self, name: str, encode: Callable[[str], list[memoryview]], is_answered: Callable[[bytes], bool]):
        self.name = name
        self.encode = encode
        self.is_answered = is_answered
        command = [sys.executable, str(Path(__file__)), f"serve-{name}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=ROOT)
        assert self.process.stdout is not None
        self.address = tuple(json.loads(self.process.stdout.readline()))
        self.sockets: list[socket.socket] = []

    def cpu_seconds(self) -> float:
        """CPU time of the process by the kernel's own clock, to the nanosecond."""
        return time.clock_gettime((~self.process.pid << 3) | 2)

    def connect(self, clients: int) -> None:
        """Open one connection for each client."""
        while len(self.sockets) < clients:
            sock = socket.socket()
            avoid_bbr(sock)
            sock.connect(self.address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sockets.append(sock)

    def upload(self, clients: int, uploads: int) -> tuple[float, float]:
        """Let each client upload so many bodies; returns wall and server CPU seconds."""
        self.connect(clients)
        threads = [threading.Thread(target=self._client, args=(s, uploads)) for s in self.sockets[:clients]]
        cpu, wall = self.cpu_seconds(), time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - wall, self.cpu_seconds() - cpu

    def _client(self, sock: socket.socket, uploads: int) -> None:
        for _ in range(uploads):
            for part in self.encode(f"client-{next(_NUMBERS)}"):
                sock.sendall(part)
            answer = sock.recv(4096)
            assert self.is_answered(answer), answer

    def stop(self) -> None:
        """End the process."""
        for sock in self.sockets:
            sock.close()
        self.process.kill()
        self.process.wait()


_NUMBERS = count()


def measure(clients: int, uploads: int, repeats: int, servers: list[Server], nbytes: int) -> Row:
    """Alternate between the servers; the first round warms both up and is not counted."""
    speeds: dict[str, list[float]] = {server.name: [] for server in servers}
    costs: dict[str, list[float]] = {server.name: [] for server in servers}
    gigabytes = clients * uploads * nbytes / 1e9
    for repeat in range(repeats + 1):
        for server in servers if repeat % 2 else servers[::-1]:
            wall, cpu = server.upload(clients, uploads)
            if repeat:
                speeds[server.name].append(gigabytes / wall)
                costs[server.name].append(cpu / gigabytes)
    raw, http = speeds["raw"], speeds["http"]
    return Row(
        clients,
        max(raw),
        statistics.median(raw),
        max(http),
        statistics.median(http),
        statistics.median(costs["raw"]),
        statistics.median(costs["http"]),
        max(http) / max(raw),
        statistics.median(h / r for h, r in zip(http, raw, strict=True)),
    )


def show(rows: list[Row]) -> None:
    """Print a table."""
    table = Table(title="ingest of 44.7 MB bodies, loopback", box=box.SIMPLE, caption=f"goal: ratio >= {GOAL}")
    for name in (
        "clients",
        "raw GB/s best/median",
        "http GB/s best/median",
        "CPU s/GB raw/http",
        "ratio best/median",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.clients),
            f"{row.raw_best:.2f} / {row.raw_median:.2f}",
            f"{row.http_best:.2f} / {row.http_median:.2f}",
            f"{row.raw_cpu:.3f} / {row.http_cpu:.3f}",
            f"{row.ratio_best:.2f} / {row.ratio_median:.2f}",
        )
    Console().print(table)


@click.group(invoke_without_command=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--clients", "clients", multiple=True, type=int, default=(1, 8), show_default=True)
@click.option("--uploads", default=6, show_default=True, help="Bodies of each client in one repeat.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_context
def main(context: click.Context, repeats: int, clients: tuple[int, ...], uploads: int, output: str) -> None:
    """Compare the gateway's ingest with a bare socket."""
    if context.invoked_subcommand:
        return
    head, payload_bytes = body_of_model()
    body = memoryview(head + bytes(payload_bytes))

    def encode_http(client: str) -> list[memoryview]:
        lines = [
            "POST /v1/jobs/training/updates HTTP/1.1",
            "Host: localhost",
            "ce-specversion: 1.0",
            "ce-type: dev.lifl.update.v1",
            f"ce-id: {client}",
            f"ce-source: {client}",
            "ce-round: 1",
            "ce-numsamples: 32",
            "Content-Type: application/vnd.safetensors",
            f"Content-Length: {len(body)}",
        ]
        return [memoryview("\r\n".join([*lines, "\r\n"]).encode()), body]

    servers = [
        Server("raw", lambda client: [body], lambda answer: answer == b"1"),
        Server("http", encode_http, lambda answer: answer.startswith(b"HTTP/1.1 202")),
    ]
    try:
        rows = [measure(number, uploads, repeats, servers, len(body)) for number in clients]
    finally:
        for server in servers:
            server.stop()
    if output == "json":
        print(json.dumps([asdict(row) for row in rows]))
    else:
        show(rows)


main.command("serve-raw")(serve_raw)
main.command("serve-http")(serve_http)

if __name__ == "__main__":
    main()

"""What many nodes cost the coordinator: memory, CPU while nothing happens, and how long until all have an order.

    python bench/members.py [--members 1000 --members 4000] [--lease 60] [-o json]

A real coordinator, and members that do nothing but register and ask for orders as nodes do: each keeps a
connection on which a long poll waits, answered after a third of the lease at the latest. An order for all is a job
that is made and deleted again.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import click
import msgspec
from lifl.cluster.messages import Orders, OrdersRequest, Register
from lifl.messages import JobSpec
from lifl_bench.results import median
from rich import box
from rich.console import Console
from rich.table import Table

QUIET_SECONDS: Final = 20.0
ORDERS: Final = 5
_READY_SECONDS: Final = 120.0
_JOINING: Final = 200
"""Members that join at a time."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass
class Row:
    """What so many members cost."""

    members: int
    lease_s: float
    memory_mb: float
    """Resident memory of the coordinator."""
    idle_cores: float
    """Cores that it uses while nothing happens."""
    joining_s: float
    """From the first registration to the last."""
    first_ms: float
    """From the request for a new job to the first member that has the order, the median of several."""
    last_ms: float
    """The same of the last member."""


@contextmanager
def coordinator(members: int, lease: float) -> Iterator[tuple[int, str, int]]:
    """Process id, host and port of a coordinator for so many members."""
    with tempfile.TemporaryDirectory(prefix="lifl-members-") as directory:
        command = [sys.executable, "-m", "lifl_gateway.coordinator", "--state-directory", directory]
        command += ["--address", "127.0.0.1:0", "--peer-address", "127.0.0.1:0", "--lease", str(lease)]
        command += ["--max-connections", str(2 * members + 64)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                host, _, port = json.loads(process.stdout.readline())["address"].partition("//")[2].rpartition(":")
                yield process.pid, host, int(port)
            finally:
                process.terminate()


class Peer:
    """One HTTP connection that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def request(self, path: str, body: bytes, method: str = "POST") -> bytes:
        """Send a request with a JSON body; returns that of the answer. Raises RuntimeError unless it is 2xx."""
        head = f"{method} {path} HTTP/1.1\r\nHost: c\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        length = next(
            (line.split(":")[1] for line in answer.lower().split("\r\n") if "content-length" in line), "0"
        )
        received = await self._reader.readexactly(int(length))
        if answer.split(" ")[1][0] != "2":
            raise RuntimeError(f"{method} {path}: {answer.splitlines()[0]} {received!r}")
        return received

    def close(self) -> None:
        self._writer.close()


class Members:
    """All of them, in one event loop."""

    def __init__(self, host: str, port: int, count: int) -> None:
        self._host, self._port = host, port
        self._count = count
        self._tasks: list[asyncio.Task[None]] = []
        self._ready = 0
        self._are_ready = asyncio.Event()
        self.heard: dict[str, list[float]] = {}
        """By job, when each member has heard of it."""

    async def connect(self) -> Peer:
        return Peer(*await asyncio.open_connection(self._host, self._port))

    async def join(self) -> None:
        """Returns when all wait for orders."""
        for number in range(self._count):
            self._tasks.append(asyncio.create_task(self._run(f"node{number:05}")))
            while number - self._ready > _JOINING:
                await asyncio.sleep(0.005)
        await asyncio.wait_for(self._are_ready.wait(), _READY_SECONDS)

    async def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, name: str) -> None:
        peer = await self.connect()
        try:
            registration = Register(
                name, name, f"http://{name}", f"{name}:1", 8, 1 << 30, "ebpf", ("fedavg",), 20.0
            )
            await peer.request("/v1/members", msgspec.json.encode(registration))
            self._ready += 1
            if self._ready == self._count:
                self._are_ready.set()
            seen: dict[str, int] = {}
            while True:
                question = OrdersRequest(name, seen, wait=60.0)
                answer = await peer.request(f"/v1/members/{name}/orders", msgspec.json.encode(question))
                for order in msgspec.json.decode(answer, type=Orders).jobs:
                    seen[order.job] = order.version
                    if order.status != "deleted":
                        self.heard.setdefault(order.job, []).append(time.perf_counter())
        finally:
            peer.close()


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memory_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def measure(pid: int, host: str, port: int, count: int, lease: float) -> Row:
    members = Members(host, port, count)
    begin = time.perf_counter()
    await members.join()
    joining = time.perf_counter() - begin
    await asyncio.sleep(2)
    before = cpu_seconds(pid)
    await asyncio.sleep(QUIET_SECONDS)
    idle = (cpu_seconds(pid) - before) / QUIET_SECONDS
    operator = await members.connect()
    delays = [await order_all(operator, members, f"job{number}", count) for number in range(ORDERS)]
    row = Row(
        count,
        lease,
        memory_mb(pid),
        idle,
        joining,
        1e3 * median([first for first, _ in delays]),
        1e3 * median([last for _, last in delays]),
    )
    operator.close()
    await members.leave()
    return row


async def order_all(operator: Peer, members: Members, job: str, count: int) -> tuple[float, float]:
    """Seconds until the first and the last member has heard of a new job."""
    begin = time.perf_counter()
    spec: dict[str, Any] = {"name": job, "function": "fedavg", "goal": JobSpec(job, "fedavg", 10).goal}
    await operator.request("/v1/jobs", json.dumps(spec).encode())
    while len(members.heard.get(job, ())) < count:
        if time.perf_counter() - begin > _READY_SECONDS:
            raise RuntimeError(f"{len(members.heard.get(job, ()))} of {count} members have heard of {job}")
        await asyncio.sleep(0.002)
    await operator.request(f"/v1/jobs/{job}", b"", "DELETE")
    heard = members.heard[job]
    await asyncio.sleep(1)
    return heard[0] - begin, heard[-1] - begin


@click.command(help=__doc__)
@click.option("--members", "counts", multiple=True, type=click.IntRange(1, 20_000), default=(1000, 4000))
@click.option("--lease", default=60.0, type=click.FloatRange(1), show_default=True, help="Seconds.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def main(counts: tuple[int, ...], lease: float, output: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rows = []
    for count in counts:
        with coordinator(count, lease) as (pid, host, port):
            rows.append(asyncio.run(measure(pid, host, port, count, lease)))
    if output == "json":
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = Table(box=box.SIMPLE, title=f"Members of a coordinator, lease {lease:g} s")
    for heading in ("members", "memory, MB", "idle, cores", "joining, s", "order: first, ms", "last, ms"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.members:,}",
            f"{row.memory_mb:.0f}",
            f"{row.idle_cores:.2f}",
            f"{row.joining_s:.1f}",
            f"{row.first_ms:.0f}",
            f"{row.last_ms:.0f}",
        )
    Console(width=80).print(table)


if __name__ == "__main__":
    main()

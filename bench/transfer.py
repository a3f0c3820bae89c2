"""How close a transfer from node to node comes to a bare sendfile -> recv_into over the same link.

    python bench/transfer.py [--repeats 15] [--megabytes 45 --megabytes 234] [-o json]

Two processes, each in a network namespace of its own, joined by a veth pair. The bytes go from a slot of one pool
into a slot of another, as the agent makes them (huge pages where there are any). Three ways take turns:

* `raw`: connect, a loop of sendfile on one side and of recv_into on the other (1 MiB with MSG_WAITALL, the fastest
  of what was tried), one byte back. Nothing is checked.
* `push`: `lifl.peer.client.push` to a `PeerServer`: hello, offer, answer, sendfile, checksum, answer.
* `pull`: `lifl.peer.client.pull` from a `PeerServer`: hello, request, sendfile, checksum.

Every transfer has a new connection. `raw, kept` is `raw` over one connection that stays, for comparison: its
congestion window and buffers have grown already. Each side has a processor of its own, or the scheduler decides
what is measured. Wall time is that of the side that asks, from before it connects. CPU seconds are those of the
two processes; the kernel may count interrupts apart.

Needs root for the namespaces, which are gone with the processes. The exit status is 1 if a ratio is below the
goal; with `-o json` the caller judges.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
from lifl.congestion import avoid_bbr
from lifl.messages import PoolInfo
from lifl.peer.checksum import PIECE_BYTES, FileRange
from lifl.peer.client import Outgoing, pull, push
from lifl.peer.protocol import PartialOffer, PartialStatus, PullAnswer, PullRequest
from lifl.peer.server import PeerServer
from lifl.pool import MappedPool
from lifl.slot import PAGE, PoolGeometry
from lifl_gateway.pool_memory import PoolFactory
from rich import box
from rich.console import Console
from rich.table import Table

GOAL: Final = 0.85
MODES: Final = ("raw", "push", "pull", "raw, kept")
LEFT, RIGHT = "10.99.0.1", "10.99.0.2"
_CLONE_NEWNET: Final = 0x40000000
_COMMAND_SECONDS: Final = 60


# --- the two sides: `python bench/transfer.py side ADDRESS OTHER NBYTES` -----------------------------------------


class Lent:
    """The whole payload of the slot as a model without a header."""

    round = 1
    header_bytes = 0

    def __init__(self, part: FileRange) -> None:
        self.segments = [part]

    def close(self) -> None:
        """Nothing to give back."""


class Taken:
    """The payload of the slot, to receive into."""

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def commit(self) -> PartialStatus:
        """Nobody counts."""
        return "accepted"

    def abandon(self) -> None:
        """Nothing to give back."""


class Side:
    """One of the two hosts: a pool with one slot, a PeerServer, and a raw listener."""

    def __init__(self, address: str, other: str, nbytes: int) -> None:
        self._other = other
        self._size = nbytes
        geometry = PoolGeometry.of(1, PAGE, nbytes)
        info = PoolInfo(0, "aggregates", "bench", 1, *geometry)
        self._memory = PoolFactory().create(info)
        self._pool = MappedPool(info, os.dup(self._memory.fd), keep_fd=True)
        self._view = self._pool.payload(0, nbytes)
        self._part = FileRange(self._pool.fd, self._pool.payload_offset(0), nbytes, self._view)
        self._view[:] = bytes(nbytes)
        self._server = PeerServer(address, 7001, self, allow_anonymous=True)
        self._server.start()
        self._kept: socket.socket | None = None
        self._listener = socket.socket()
        avoid_bbr(self._listener)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._listener.bind((address, 7000))
        self._listener.listen(8)
        threading.Thread(target=self._accept, daemon=True).start()

    def fill(self, seed: str) -> None:
        """Put bytes into the slot that both sides can make: none with an empty seed."""
        block = seed.encode() * (1 << 20) if seed else bytes(1 << 20)
        for start in range(0, self._size, len(block)):
            end = min(start + len(block), self._size)
            self._view[start:end] = block[: end - start]

    def is_filled(self, seed: str) -> bool:
        """Whether the slot has these bytes."""
        block = memoryview(seed.encode() * (1 << 20))
        starts = range(0, self._size, len(block))
        return all(self._view[s : s + len(block)] == block[: self._size - s] for s in starts)

    # --- LIFL ---

    def open_model(self, request: PullRequest) -> Lent:
        """For the PeerServer."""
        return Lent(self._part)

    def open_partial(self, offer: PartialOffer) -> Taken:
        """For the PeerServer."""
        return Taken(self._view)

    def push(self) -> None:
        """Push the slot to the other side."""
        offer = PartialOffer("bench", 1, 1, 1, 1, "left", 1, self._size, 2, 2, 1.0, 0.0)
        assert push(f"{self._other}:7001", offer, Outgoing(self._part)) == "accepted"

    def pull(self) -> None:
        """Pull the other side's slot into this one."""

        def place(answer: PullAnswer) -> list[memoryview]:
            return [self._view]

        pull([f"{self._other}:7001"], PullRequest("bench", 1, 1), place)

    # --- raw ---

    def raw(self) -> None:
        """Send the slot over a new connection."""
        with self._connect() as sock:
            self._send(sock)

    def raw_kept(self) -> None:
        """Send the slot over the connection of the last time."""
        self._kept = self._kept or self._connect()
        self._send(self._kept)

    def _connect(self) -> socket.socket:
        sock = socket.socket()
        avoid_bbr(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((self._other, 7000))
        return sock

    def _send(self, sock: socket.socket) -> None:
        done, out, file, start, size = 0, sock.fileno(), self._part.file, self._part.offset, self._size
        while done < size:
            done += os.sendfile(out, file, start + done, size - done)
        assert sock.recv(1) == b"1"

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._receive, args=(sock,), daemon=True).start()

    def _receive(self, sock: socket.socket) -> None:
        view, size = self._view, self._size
        with sock:
            while True:
                done = 0
                while done < size:
                    got = sock.recv_into(view[done : min(done + PIECE_BYTES, size)], 0, socket.MSG_WAITALL)
                    if not got:
                        return
                    done += got
                sock.sendall(b"1")


def run_side(address: str, other: str, nbytes: int) -> None:
    """Be one side: in a new namespace, do what standard input says, and answer with the seconds that it took."""
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[0] if address == LEFT else processors[-1]})
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise SystemExit(2)
    print(json.dumps("here"), flush=True)
    sys.stdin.readline()  # the link is up
    side = Side(address, other, nbytes)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        started = time.perf_counter()
        result = getattr(side, name.replace(", ", "_"))(*arguments)
        print(json.dumps([time.perf_counter() - started, result]), flush=True)
    os._exit(0)


# --- the measurement -----------------------------------------------------------------------------------------


class Process:
    """One side as its maker sees it."""

    def __init__(self, address: str, other: str, nbytes: int) -> None:
        command = [sys.executable, str(Path(__file__)), "side", address, other, str(nbytes)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.hear()

    def tell(self, *words: str) -> None:
        """Have it do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """Wait for its answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"a side of the link ended with status {self._process.wait()}")
        return json.loads(line)

    def do(self, *words: str) -> Any:
        """Have it do something; returns what it found."""
        self.tell(*words)
        return self.hear()

    def cpu_seconds(self) -> float:
        """CPU time of the process by the kernel's own clock, to the nanosecond."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def stop(self) -> None:
        """End it, and its namespace."""
        self._process.kill()
        self._process.communicate(timeout=_COMMAND_SECONDS)


@contextlib.contextmanager
def linked(nbytes: int) -> Iterator[tuple[Process, Process]]:
    """Both sides, joined by a veth pair; all of it is gone afterwards."""
    with contextlib.ExitStack() as stack:
        sides = []
        for address, other in ((LEFT, RIGHT), (RIGHT, LEFT)):
            sides.append(Process(address, other, nbytes))
            stack.callback(sides[-1].stop)
        join(*(side.pid for side in sides))
        for side in sides:
            side.tell()
            side.hear()
        yield sides[0], sides[1]


def join(left: int, right: int) -> None:
    """Make the veth pair, inside of the two processes' namespaces."""
    name = f"lt{secrets.token_hex(4)}"
    run("link", "add", f"{name}l", "netns", str(left), "type", "veth", "peer", f"{name}r", "netns", str(right))
    for pid, address, end in ((left, LEFT, "l"), (right, RIGHT, "r")):
        inside = ["nsenter", f"--net=/proc/{pid}/ns/net"]
        run("addr", "add", f"{address}/24", "dev", name + end, inside=inside)
        run("link", "set", name + end, "up", inside=inside)


def run(*arguments: str, inside: list[str] | None = None) -> None:
    """Call ip."""
    done = subprocess.run([*(inside or []), "ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass
class Row:
    """One size and mode. Speeds in GB/s, CPU seconds for each GB, ratios of speed to `raw` of the same repeat."""

    megabytes: int
    mode: str
    best: float
    median: float
    sender_cpu: float
    receiver_cpu: float
    ratio: float
    ratio_low: float
    ratio_high: float


def measure(megabytes: int, repeats: int) -> list[Row]:
    """Take turns; the first turn of each warms up, checks that the bytes are right, and is not counted."""
    gigabytes = megabytes / 1e3
    speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
    costs: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    with linked(megabytes * 1_000_000) as (left, right):
        for mode in MODES:
            check(left, right, mode)
        for repeat in range(repeats):
            for mode in MODES if repeat % 2 else MODES[::-1]:
                before = left.cpu_seconds(), right.cpu_seconds()
                seconds, _ = asker(left, right, mode).do(mode)
                speeds[mode].append(gigabytes / seconds)
                time.sleep(0.01)  # until threads of the other side have come to their end
                costs[mode].append((left.cpu_seconds() - before[0], right.cpu_seconds() - before[1]))
    return [row_of(megabytes, mode, speeds, costs[mode]) for mode in MODES]


def asker(left: Process, right: Process, mode: str) -> Process:
    """The side that asks; the bytes always go from left to right."""
    return right if mode == "pull" else left


def check(left: Process, right: Process, mode: str) -> None:
    """One transfer of bytes that were not there before."""
    seed = secrets.token_hex(8)
    left.do("fill", seed)
    right.do("fill", "")
    asker(left, right, mode).do(mode)
    if not right.do("is_filled", seed)[1]:
        raise click.ClickException(f"{mode} has brought other bytes")


def row_of(megabytes: int, mode: str, speeds: dict[str, list[float]], costs: list[tuple[float, float]]) -> Row:
    """Sum up one mode."""
    ratios = sorted(mine / raw for mine, raw in zip(speeds[mode], speeds["raw"], strict=True))
    gigabytes = megabytes / 1e3
    return Row(
        megabytes,
        mode,
        max(speeds[mode]),
        statistics.median(speeds[mode]),
        statistics.median(left for left, _ in costs) / gigabytes,
        statistics.median(right for _, right in costs) / gigabytes,
        statistics.median(ratios),
        ratios[len(ratios) // 4],
        ratios[-1 - len(ratios) // 4],
    )


def show(rows: list[Row], repeats: int) -> None:
    """Print a table."""
    table = Table(
        title="node to node over veth, slot to slot",
        box=box.SIMPLE,
        caption=f"{repeats} repeats; median and quartiles; goal: push and pull >= {GOAL} of raw",
        width=80,
    )
    for name in ("MB", "way", "GB/s best/med", "CPU s/GB send/recv", "of raw"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.megabytes),
            row.mode,
            f"{row.best:.2f} / {row.median:.2f}",
            f"{row.sender_cpu:.3f} / {row.receiver_cpu:.3f}",
            f"{row.ratio:.2f} [{row.ratio_low:.2f}..{row.ratio_high:.2f}]",
        )
    Console().print(table)


@click.group(invoke_without_command=True, help=__doc__)
@click.option("--repeats", default=15, show_default=True)
@click.option("--megabytes", "sizes", multiple=True, type=int, default=(45, 234), show_default=True)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_context
def main(context: click.Context, repeats: int, sizes: tuple[int, ...], output: str) -> None:
    if context.invoked_subcommand:
        return
    if os.geteuid() != 0:
        raise click.ClickException("two network namespaces and a link between them need root")
    rows = [row for size in sizes for row in measure(size, repeats)]
    if output == "json":
        print(json.dumps({"goal": GOAL, "repeats": repeats, "rows": [asdict(row) for row in rows]}))
        return
    show(rows, repeats)
    if any(row.ratio < GOAL for row in rows if row.mode in ("push", "pull")):
        sys.exit(1)


@main.command("side", hidden=True)
@click.argument("address")
@click.argument("other")
@click.argument("nbytes", type=int)
def _side(address: str, other: str, nbytes: int) -> None:
    run_side(address, other, nbytes)


if __name__ == "__main__":
    main()

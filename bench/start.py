"""Cold start of an aggregator: from no worker to its first Python line, and to K updates folded.

    python bench/start.py                  # 4 ResNet-18 updates, 15 starts
    python bench/start.py --repeat 30 -o json

Real agent, zygote and workers; this process plays coordinator and gateway. The clock starts when the request to
start a worker is sent to the agent and stops when the forked child runs its first line (it stamps a shared page)
and when the last FOLDED has arrived. Each worker is new and has never touched the pool before. The zygote's own
start, import of the function and compilation of its kernels included, is stated apart.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lifl_bench.processes import limit_threads

limit_threads()

import click  # noqa: E402
import numpy as np  # noqa: E402
from lifl.agent_client import join  # noqa: E402
from lifl.control.agent_link import AgentLink  # noqa: E402
from lifl.descriptor import Kind  # noqa: E402
from lifl.messages import Hello, Joined, PoolInfo, WorkerSpec  # noqa: E402
from lifl.model_layout import AccumulatorLayout, encode_header, parse_header  # noqa: E402
from lifl.pool import MappedPool  # noqa: E402
from lifl.slot import PAGE, PoolGeometry, UpdateHeader, slot_reference  # noqa: E402
from lifl_bench.models import resnet_shapes  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STAMP = struct.Struct("<d")


def run_traced_zygote(stamps: str, arguments: list[str]) -> None:
    """Be the real zygote, but have each forked child write the time into the stamp file before all else."""
    page = mmap.mmap(os.open(stamps, os.O_RDWR | os.O_CLOEXEC), PAGE)
    fork = os.fork

    def stamped_fork() -> int:
        pid = fork()
        if pid == 0:
            STAMP.pack_into(page, 0, time.monotonic())
        return pid

    os.fork = stamped_fork
    from lifl import zygote

    sys.argv = ["zygote", *arguments]
    zygote.main()


class Bench:
    """Agent, zygote, pools and the two endpoints of this process."""

    def __init__(self, directory: Path, data_plane: str, updates: int) -> None:
        self.updates = updates
        self.stamps = directory / "stamps"
        self.stamps.write_bytes(bytes(PAGE))
        self.page = mmap.mmap(os.open(self.stamps, os.O_RDWR | os.O_CLOEXEC), PAGE)
        self.agent = subprocess.Popen(
            [
                *(sys.executable, "-m", "lifl_gateway.agent", "--runtime-directory", str(directory)),
                *("--data-plane", data_plane),
            ],
            stdout=subprocess.PIPE,
        )
        assert self.agent.stdout is not None
        self.data_plane = json.loads(self.agent.stdout.readline())["data_plane"]
        self.events: list[Any] = []
        socket = str(directory / "agent.sock")
        self.coordinator = join(socket, Hello("coordinator"))
        self.link = AgentLink(self.coordinator, self.events.append)
        before = time.perf_counter()
        self.zygote = subprocess.Popen(
            [
                *(sys.executable, str(Path(__file__).resolve()), "--zygote", str(self.stamps), "--"),
                *("--runtime-directory", str(directory), "--name", "fedavg"),
                *("--file", str(ROOT / "functions" / "fedavg.py")),
            ]
        )
        self.wait_for("zygote")
        self.zygote_seconds = time.perf_counter() - before
        self.make_pools()
        self.gateway = join(socket, Hello("gateway"))

    def wait_for(self, role: str) -> Joined:
        """The next process of this role that joins."""
        while True:
            for event in self.events:
                if isinstance(event, Joined) and event.role == role:
                    self.events.remove(event)
                    return event
            select.select([self.coordinator.channel.socket], [], [])
            self.link.process()

    def make_pools(self) -> None:
        shapes = {name: ("F32", tuple(shape)) for name, shape in resnet_shapes("resnet18").items()}
        header = encode_header(shapes)
        self.layout = parse_header(header)
        size = self.layout.payload_bytes
        sums = AccumulatorLayout(self.layout).nbytes
        update = PoolGeometry.of(self.updates, len(header) + PAGE, size)
        aggregate = PoolGeometry.of(6, len(header), max(size, sums))
        infos = (
            PoolInfo(0, "updates", "job", 1, self.updates, update.header_capacity, update.payload_capacity),
            PoolInfo(1, "aggregates", "job", 2, 6, aggregate.header_capacity, aggregate.payload_capacity),
        )
        self.pools: dict[int, MappedPool] = {}
        for info in infos:
            self.link.create_pool(info, None, lambda done, fds, info=info: self.keep(info, done, fds))
        while len(self.pools) < 2:
            select.select([self.coordinator.channel.socket], [], [])
            self.link.process()
        for slot in range(4):
            self.pools[1].layout(slot)[: len(header)] = header
        values = np.random.default_rng(1).standard_normal(size // 4, np.float32)
        for index in range(self.updates):
            self.pools[0].payload(index, size)[:] = memoryview(values).cast("B")

    def keep(self, info: PoolInfo, done: Any, fds: list[int]) -> None:
        if done.error:
            raise click.ClickException(done.error)
        self.pools[info.pool] = MappedPool(info, fds[0])

    def start(self, number: int) -> tuple[float, float, float]:
        """Start one worker; returns seconds to its first line, to its joining, and to all updates folded."""
        spec = WorkerSpec(f"ticket-{number}", "job", "fedavg", 4, 4, 0)
        for index in range(self.updates):
            UpdateHeader(number, number, False, 1.0, 0, self.layout.payload_bytes, f"c{index}").pack_into(
                self.pools[0].header(index)
            )
        endpoint = self.coordinator.endpoint
        assert endpoint is not None
        begin = time.monotonic()
        self.link.start_workers((spec,), lambda done, fds: None)
        worker = self.wait_for("worker")
        joined = time.monotonic()
        endpoint.send(worker.endpoint, endpoint.identifier, number, Kind.ASSIGN)
        for index in range(self.updates):
            endpoint.send(worker.endpoint, slot_reference(0, index), number, Kind.UPDATE, number)
        folded = 0
        while folded < self.updates:
            endpoint.wait(10)
            folded += sum(message.kind == Kind.FOLDED for message in endpoint.receive())
        end = time.monotonic()
        self.link.stop_workers((worker.endpoint,))
        time.sleep(0.05)
        self.link.process()
        self.events.clear()
        return STAMP.unpack_from(self.page, 0)[0] - begin, joined - begin, end - begin

    def stop(self) -> None:
        """End the processes."""
        self.gateway.close()
        self.coordinator.close()
        self.zygote.terminate()
        self.agent.terminate()
        self.zygote.wait(10)
        self.agent.wait(10)


@click.command(help=__doc__)
@click.option("--updates", default=4, show_default=True)
@click.option("--repeat", default=15, show_default=True)
@click.option("--data-plane", type=click.Choice(["auto", "ebpf", "unix"]), default="auto")
@click.option("-o", "--output", type=click.Choice(["human", "json"]), default="human")
def main(updates: int, repeat: int, data_plane: str, output: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), data_plane, updates)
        try:
            rows = [bench.start(number) for number in range(1, repeat + 1)]
        finally:
            bench.stop()
    names = ("first line", "joined", f"{updates} folded")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    if output == "json":
        milliseconds = {name: [1e3 * value for value in values] for name, values in columns.items()}
        print(json.dumps({"zygote_s": bench.zygote_seconds, "data_plane": bench.data_plane, "ms": milliseconds}))
        return
    print(f"{repeat} starts, data plane {bench.data_plane}; the zygote itself {bench.zygote_seconds:.2f} s")
    print(f"{'ms':14}{'median':>9}{'lowest':>9}{'highest':>9}")
    for name, values in columns.items():
        print(f"{name:14}{1e3 * statistics.median(values):9.1f}{1e3 * min(values):9.1f}{1e3 * max(values):9.1f}")


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "--zygote":
        run_traced_zygote(sys.argv[2], sys.argv[4:])
    else:
        main()

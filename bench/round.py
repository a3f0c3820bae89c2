"""A whole round against its lower bound: N clients post updates at once, two-level tree, all on this machine.

    python bench/round.py                      # 16 ResNet-18 updates, 7 rounds, data plane auto
    python bench/round.py --updates 16 --repeat 9 --data-plane unix -o json

The bound, measured in the same run and alternating with the rounds: as many processes send the same bytes with
one sendall each to threads that recv_into pre-faulted memory (wall clock and CPU of both sides), and every byte
is read once at the read limit of one core, spread over two cores (half of that time, all of its CPU).
ACT is what the platform reports: first byte of the first update in, to global model offered. CPU is that of all
processes, clients and checkpoint writer included, from the start signal until all is quiet again.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lifl_bench.node_process import NodeProcess
from lifl_bench.processes import limit_threads

ENVIRONMENT = limit_threads()

import click  # noqa: E402
import numpy as np  # noqa: E402
from lifl.client import Client  # noqa: E402
from lifl.fold_kernel import read_limit  # noqa: E402
from lifl.model_layout import encode_header, parse_header  # noqa: E402
from lifl_bench.measure import memory_of_tree, peak_memory, tree_cpu  # noqa: E402
from lifl_bench.models import resnet_shapes  # noqa: E402

SETTLE_SECONDS = 0.4
"""After a round: until the checkpoint is written and everything sleeps."""


@dataclass
class Sample:
    """One repetition: seconds of wall clock and CPU."""

    wall: float
    cpu: float


def peak_of_a_round(node: NodeProcess, clients: Fleet, operator: Client, number: int) -> int:
    """Largest memory of the node's processes seen in one more round, which is not timed: looking costs CPU."""

    def act() -> None:
        clients.act(number)
        while operator.describe()["model_round"] <= number:
            time.sleep(0.01)
        time.sleep(SETTLE_SECONDS)

    return peak_memory(lambda: memory_of_tree(node.pid), act, every_s=0.005)


class Fleet:
    """Client processes that wait at a barrier and then act together."""

    def __init__(self, count: int, action: Callable[[int, Any], None]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipes = []
        self.processes = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=self._serve, args=(number, theirs, action), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    @staticmethod
    def _serve(number: int, pipe: Any, action: Callable[[int, Any], None]) -> None:
        while True:
            try:
                argument = pipe.recv()
            except EOFError:
                return
            before = time.process_time()
            action(number, argument)
            pipe.send(time.process_time() - before)

    def act(self, argument: Any) -> float:
        """Have every client act; returns the CPU seconds they used."""
        for pipe in self.pipes:
            pipe.send(argument)
        return sum(pipe.recv() for pipe in self.pipes)

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(10)


def faulted(nbytes: int) -> mmap.mmap:
    """Shared memory with all pages in place."""
    fd = os.memfd_create("bound", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    memory = mmap.mmap(fd, nbytes)
    os.close(fd)
    memory.madvise(23)  # MADV_POPULATE_WRITE
    return memory


class Bound:
    """The receiving half of the bound."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.count, self.nbytes = count, nbytes
        self.stride = -(-nbytes // 4096) * 4096
        self.memory = faulted(self.stride * count)
        self.view = memoryview(self.memory)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=count)
        self.address = self.listener.getsockname()

    def receive(self, number: int) -> None:
        connection, _ = self.listener.accept()
        view = self.view[number * self.stride :][: self.nbytes]
        with connection:
            while len(view):
                count = connection.recv_into(view)
                if not count:
                    raise RuntimeError("a sender stopped early")
                view = view[count:]

    def run(self, fleet: Fleet) -> Sample:
        """One repetition."""
        before = time.process_time()
        threads = [threading.Thread(target=self.receive, args=(number,)) for number in range(self.count)]
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        clients = fleet.act(self.address)
        for thread in threads:
            thread.join()
        transfer = time.perf_counter() - start
        cpu = time.process_time() - before + clients
        address = np.frombuffer(self.memory, np.uint8).ctypes.data
        start = time.perf_counter()
        for number in range(self.count):
            read_limit(address + number * self.stride, self.nbytes)
        reading = time.perf_counter() - start
        return Sample(transfer + reading / 2, cpu + reading)


def raw_sender(data: memoryview) -> Callable[[int, Any], None]:
    def send(number: int, address: tuple[str, int]) -> None:
        with socket.create_connection(address) as connection:
            for name in (b"cubic", b"reno"):
                try:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
                    break
                except OSError:
                    continue
            connection.sendall(data)

    return send


def http_sender(data: memoryview, url: str, job: str) -> Callable[[int, Any], None]:
    clients: dict[int, Client] = {}

    def send(number: int, round_number: int) -> None:
        client = clients.get(number)
        if client is None:
            client = clients[number] = Client(url, job, f"client-{number}")
        answer = client.submit(data, num_samples=1.0 + number, round=round_number)
        if answer.status != "accepted":
            raise RuntimeError(f"client {number}: {answer}")

    return send


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(lowest, median, highest)."""
    return min(values), statistics.median(values), max(values)


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(["resnet18", "resnet34", "resnet152"]), default="resnet18")
@click.option("--updates", default=16, show_default=True)
@click.option("--repeat", default=7, show_default=True)
@click.option("--data-plane", type=click.Choice(["auto", "ebpf", "unix"]), default="auto")
@click.option("--gateways", default=1, show_default=True)
@click.option("-o", "--output", type=click.Choice(["human", "json"]), default="human")
def main(model: str, updates: int, repeat: int, data_plane: str, gateways: int, output: str) -> None:
    shapes = {name: ("F32", tuple(shape)) for name, shape in resnet_shapes(model).items()}
    header = encode_header(shapes)
    layout = parse_header(header)
    body = bytearray(8 + len(header) + layout.payload_bytes)
    body[:8] = len(header).to_bytes(8, "little")
    body[8 : 8 + len(header)] = header
    values = np.frombuffer(body, np.float32, offset=8 + len(header))
    values[:] = np.random.default_rng(1).standard_normal(values.size, np.float32)
    data = memoryview(body)
    bound = Bound(updates, len(body))
    raw = Fleet(updates, raw_sender(data))
    with tempfile.TemporaryDirectory() as directory:
        with NodeProcess(Path(directory), ENVIRONMENT, data_plane=data_plane, gateways=gateways) as node:
            operator = Client(node.address, "round", "operator")
            operator.create_job(function="fedavg", goal=updates, keep_checkpoints=2)
            operator.upload_model(data)
            clients = Fleet(updates, http_sender(data, node.address, "round"))
            samples: dict[str, list[Sample]] = {"bound": [], "lifl": []}
            states = []
            time.sleep(2.0)  # the pool is pre-faulted in the background
            for number in range(1, repeat + 2):
                low = bound.run(raw)
                before = tree_cpu(node.pid)
                cpu = clients.act(number)
                client_state = operator.describe()
                while client_state["model_round"] <= number:
                    time.sleep(0.01)
                    client_state = operator.describe()
                time.sleep(SETTLE_SECONDS)
                cpu += tree_cpu(node.pid) - before
                if number == 1:
                    continue  # the first round starts workers and compiles nothing twice; see bench/start.py
                samples["bound"].append(low)
                samples["lifl"].append(Sample(client_state["last"]["act"], cpu))
                states.append(client_state["last"])
            memory = peak_of_a_round(node, clients, operator, repeat + 2)
            plane = node.data_plane
            clients.stop()
    raw.stop()
    report(model, updates, len(body), plane, samples, states, memory, output)


def report(
    model: str,
    updates: int,
    nbytes: int,
    plane: str,
    samples: dict[str, list[Sample]],
    states: list[dict[str, Any]],
    memory: int,
    output: str,
) -> None:
    """Print the figures."""
    ratios = {
        "wall": [a.wall / b.wall for a, b in zip(samples["lifl"], samples["bound"], strict=True)],
        "cpu": [a.cpu / b.cpu for a, b in zip(samples["lifl"], samples["bound"], strict=True)],
    }
    if output == "json":
        print(
            json.dumps(
                {
                    "model": model,
                    "updates": updates,
                    "bytes": nbytes,
                    "data_plane": plane,
                    "samples": {name: [asdict(sample) for sample in rows] for name, rows in samples.items()},
                    "ratios": ratios,
                    "peak_pss_bytes": memory,
                    "last": states[-1],
                }
            )
        )
        return
    total = updates * nbytes / 1e9
    print(f"{updates} x {model} ({nbytes / 1e6:.1f} MB), data plane {plane}, {len(ratios['wall'])} rounds")
    print(f"{'':16}{'median':>9}{'lowest':>9}{'highest':>9}")
    for name, rows in samples.items():
        for figure, scale, unit in (("wall", 1e3, "ms"), ("cpu", 1e3, "ms")):
            low, middle, high = quartiles([getattr(row, figure) * scale for row in rows])
            print(f"{name + ' ' + figure:16}{middle:9.1f}{low:9.1f}{high:9.1f} {unit}")
    for name, values in ratios.items():
        low, middle, high = quartiles(values)
        print(f"{'ratio ' + name:16}{middle:9.2f}{low:9.2f}{high:9.2f}")
    act = statistics.median(sample.wall for sample in samples["lifl"])
    print(f"{total / act:.2f} GB/s of updates; peak memory of the node {memory / 1e6:.0f} MB (Pss)")


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""`make demo`: federated training through LIFL on this machine, then one aggregation of ResNet-18's size.

Starts a node of its own on a free port. Twenty client processes train a small CNN on handwritten digits that
are unevenly spread over them, and talk to the node over HTTP as any client would. Then sixteen processes send
44.7 MB each at once, and the result is compared with numpy's in double precision. Takes about a minute, leaves
nothing behind. The exit code is 0 if the model reached the target accuracy and every check passed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from lifl_bench.node_process import NodeProcess
from lifl_bench.processes import Team, limit_threads

USER_ENVIRONMENT = limit_threads()  # before numpy and torch are imported below: clients are forked from here

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import safetensors.numpy  # noqa: E402
import torch  # noqa: E402
from lifl.cli.common import get_json  # noqa: E402
from lifl.client import Client  # noqa: E402
from lifl_bench import models, training  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

Flat: TypeAlias = npt.NDArray[np.float32]

DISTINCT_UPDATES = 4
"""Buffers the large updates are made of; clients share them, for the memory's sake."""
TOLERANCE = 1e-5
"""Largest error of the large aggregate relative to the mean magnitude of its summands: some float32 roundings."""
ROUND_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class RoundResult:
    """One measured round."""

    round: int
    act_s: float
    """Aggregation completion time: first byte of the first update in, to global model out."""
    cpu_s: float
    """CPU seconds of all the node's processes, since the end of the previous round."""
    started: int
    reused: int
    accuracy: float = 0.0
    """On the test set, 0..1; only where something is trained."""
    wall_s: float = 0.0
    """From the signal to send until the new model has been fetched, as a client sees it."""
    gigabytes_per_s: float = 0.0
    """Updates' bytes over ACT."""
    max_error: float = 0.0
    """Largest error against numpy in double precision; see TOLERANCE."""


@dataclass
class Report:
    """Everything the demo found out."""

    data_plane: str
    clients: int
    target: float
    training: list[RoundResult] = field(default_factory=list)
    large_updates: int = 0
    large_megabytes: float = 0.0
    large: list[RoundResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Of the last round's model."""
        return self.training[-1].accuracy if self.training else 0.0

    @property
    def passed(self) -> bool:
        """Whether the model is good enough and the large aggregate right."""
        return self.accuracy >= self.target and all(result.max_error <= TOLERANCE for result in self.large)


# --- federated training --------------------------------------------------------------------------------------


def run_training_client(
    address: str, job: str, number: int, shard: training.Shard, rounds: int, seed: int, link: Connection
) -> None:
    """One client: train on the newest global model, submit, wait for the next, for `rounds` rounds."""
    with Client(address, job, f"client-{number:02}") as client:
        network = training.make_model(seed)
        model = client.fetch_model()
        while model.round <= rounds:
            training.set_tensors(network, model.tensors)
            training.train_client(network, shard, seed=seed + 1000 * model.round + number)
            client.submit(training.get_tensors(network), num_samples=len(shard), round=model.round)
            link.send(model.round)
            model = client.wait_for_round(after=model.round)


def run_training(node: NodeProcess, options: argparse.Namespace, console: Console) -> list[RoundResult]:
    """Train for `options.rounds` rounds; the accuracy is that of each round's global model."""
    job = "digits"
    federation = training.make_clients(options.clients, seed=options.seed)
    network = training.make_model(options.seed)
    observer = Client(node.address, job, "observer")
    observer.create_job(function="fedavg", goal=options.clients)
    observer.upload_model(training.get_tensors(network))
    observer.close()  # clients are forked now, and shall not share the connection
    # The first step of torch's optimiser takes a second. Taken here, the forks need not each take it.
    training.train_client(training.make_model(), federation.test, seed=0, training=training.Training(epochs=1))

    def work(number: int, link: Connection) -> None:
        shard = federation.clients[number]
        run_training_client(node.address, job, number, shard, options.rounds, options.seed, link)

    results: list[RoundResult] = []
    with observer, Team(options.clients, work) as team, progress_bar(console) as progress:
        task = progress.add_task("round 1", total=options.rounds * options.clients, note="")
        cpu_before = node.cpu_seconds()
        for current in range(1, options.rounds + 1):
            for _ in team.receive(options.clients, ROUND_TIMEOUT_S):
                progress.advance(task)
            model = observer.wait_for_round(after=current, timeout=ROUND_TIMEOUT_S)
            result = measure_round(node, job, current, cpu_before)
            cpu_before += result.cpu_s
            training.set_tensors(network, model.tensors)
            accuracy = training.evaluate(network, federation.test)
            results.append(replace(result, accuracy=accuracy))
            text = f"accuracy {accuracy:.1%}, ACT {result.act_s * 1e3:.0f} ms"
            progress.update(task, description=f"round {current}", note=text)
    return results


def measure_round(node: NodeProcess, job: str, number: int, cpu_before: float) -> RoundResult:
    """What the node says of a complete round, and what it cost."""
    cpu_s = node.cpu_seconds() - cpu_before
    state = get_json(node.address, f"/v1/jobs/{job}/rounds/{number}")
    if state["rejected"] or state["late"]:
        raise RuntimeError(f"round {number} of {job} did not take every update: {state}")
    return RoundResult(
        round=number,
        act_s=state["act"],
        cpu_s=cpu_s,
        started=state["started"],
        reused=state["reused"],
    )


def progress_bar(console: Console) -> Progress:
    """A bar in 80 columns that counts updates, with a note beside it."""
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


# --- a model of a usual size -----------------------------------------------------------------------------------


def run_large(node: NodeProcess, options: argparse.Namespace, console: Console) -> list[RoundResult]:
    """Aggregate `options.updates` updates of the model's size, sent at once; the first round starts cold."""
    job = options.model
    shapes = models.resnet_shapes(options.model)
    size = models.parameter_count(shapes)
    random = np.random.default_rng(options.seed)
    flats = [random.standard_normal(size, dtype=np.float32) for _ in range(DISTINCT_UPDATES)]
    # Other weights in each round, so that no round's result can pass for another's.
    samples = random.integers(10, 200, (options.large_rounds, options.updates)).tolist()
    updates = [safetensors.numpy.save(models.split_flat(flat, shapes)) for flat in flats]

    observer = Client(node.address, job, "observer")
    observer.create_job(function="fedavg", goal=options.updates)
    observer.upload_model(models.split_flat(np.zeros(size, dtype=np.float32), shapes))
    observer.close()

    def work(number: int, link: Connection) -> None:
        update = updates[number % DISTINCT_UPDATES]
        with Client(node.address, job, f"client-{number:02}") as client:
            client.describe()  # connected before the start
            link.send("ready")
            while current := link.recv():
                client.submit(update, num_samples=samples[current - 1][number], round=current)
                link.send("sent")

    results: list[RoundResult] = []
    with observer, Team(options.updates, work) as team, progress_bar(console) as progress:
        task = progress.add_task(job, total=options.large_rounds * options.updates, note="")
        list(team.receive(options.updates, ROUND_TIMEOUT_S))
        for current in range(1, options.large_rounds + 1):
            cpu_before, begin = node.cpu_seconds(), time.monotonic()
            team.send_all(current)
            for _ in team.receive(options.updates, ROUND_TIMEOUT_S):
                progress.advance(task)
            model = observer.wait_for_round(after=current, timeout=ROUND_TIMEOUT_S)
            wall_s = time.monotonic() - begin
            result = measure_round(node, job, current, cpu_before)
            rate = options.updates * 4 * size / result.act_s / 1e9
            error = largest_error(models.join_flat(model.tensors, shapes), flats, samples[current - 1])
            results.append(replace(result, wall_s=wall_s, gigabytes_per_s=rate, max_error=error))
            progress.update(task, note=f"ACT {result.act_s * 1e3:.0f} ms, {rate:.2f} GB/s")
    return results


def largest_error(result: Flat, flats: list[Flat], samples: list[int]) -> float:
    """Compare with FedAvg in double precision; relative to the mean magnitude of what was added up."""
    weights = np.zeros(len(flats))
    for number, count in enumerate(samples):
        weights[number % len(flats)] += count
    weights /= weights.sum()
    mean, magnitude = np.zeros(result.size), np.zeros(result.size)
    for weight, flat in zip(weights, flats, strict=True):
        term = weight * flat.astype(np.float64)
        mean += term
        magnitude += np.abs(term)
    return float(np.max(np.abs(result - mean) / magnitude))


# --- output --------------------------------------------------------------------------------------------------


def training_table(report: Report) -> Table:
    """One row for each round, 80 columns at most."""
    title = f"Federated training, {report.clients} clients (ACT waits for the slowest)"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("ROUND", "ACCURACY", "ACT ms", "CPU s", "STARTED/REUSED"):
        table.add_column(column, justify="right")
    table.add_column("DATA PLANE")
    for result in report.training:
        table.add_row(
            str(result.round),
            f"{result.accuracy:.1%}",
            f"{result.act_s * 1e3:.1f}",
            f"{result.cpu_s:.2f}",
            f"{result.started}/{result.reused}",
            report.data_plane,
        )
    return table


def large_table(report: Report) -> Table:
    """One row for each aggregation of large updates."""
    title = f"{report.large_updates} updates of {report.large_megabytes:.1f} MB at once"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("ROUND", "ACT ms", "GB/s", "WALL ms", "CPU s", "STARTED/REUSED", "MAX ERROR"):
        table.add_column(column, justify="right")
    table.add_column("")
    for result in report.large:
        table.add_row(
            "cold" if result.round == 1 else "warm",
            f"{result.act_s * 1e3:.0f}",
            f"{result.gigabytes_per_s:.2f}",
            f"{result.wall_s * 1e3:.0f}",
            f"{result.cpu_s:.2f}",
            f"{result.started}/{result.reused}",
            f"{result.max_error:.1e}",
            "ok" if result.max_error <= TOLERANCE else "WRONG",
        )
    return table


def print_report(report: Report) -> None:
    """The tables and the verdict, on stdout."""
    console = Console()
    console.width = min(console.width, 80) if console.is_terminal else 80
    console.print(training_table(report), "")
    if report.large:
        console.print(large_table(report), "")
    reached = "reached" if report.accuracy >= report.target else "MISSED"
    console.print(
        f"{report.accuracy:.1%} accuracy: target {report.target:.0%} {reached}. Took {report.seconds:.0f} s.",
        highlight=False,
    )


def as_json(report: Report) -> str:
    """The report as one JSON document."""
    return json.dumps({**asdict(report), "accuracy": report.accuracy, "passed": report.passed})


def parse_arguments() -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--target", type=float, default=0.90, help="accuracy to reach, 0..1")
    parser.add_argument("--updates", type=int, default=16, help="large updates; 0 leaves that part out")
    parser.add_argument("--large-rounds", type=int, default=2, help="the first is cold, the others warm")
    parser.add_argument("--model", choices=["resnet18", "resnet34", "resnet152"], default="resnet18")
    parser.add_argument("--data-plane", choices=["auto", "ebpf", "unix"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", choices=["human", "json"], default="human")
    options = parser.parse_args()
    for name, least in (("rounds", 1), ("clients", 1), ("updates", 0), ("large_rounds", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} has to be at least {least}")
    return options


def main() -> int:
    """Run the demo; 0 if it passed, 1 if not or on an error, 130 on Ctrl-C."""
    options = parse_arguments()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    begin = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="lifl-demo-") as directory:
            console.print("Starting a node", highlight=False)
            with NodeProcess(Path(directory), USER_ENVIRONMENT, data_plane=options.data_plane) as node:
                console.print(f"Node on {node.address}, data plane {node.data_plane}", highlight=False)
                report = Report(node.data_plane, options.clients, options.target)
                try:
                    report.training = run_training(node, options, console)
                    if options.updates:
                        size = models.parameter_count(models.resnet_shapes(options.model))
                        report.large_updates, report.large_megabytes = options.updates, 4 * size / 1e6
                        report.large = run_large(node, options, console)
                except Exception:
                    console.print(f"The node's last words:\n{node.log()}", markup=False, highlight=False)
                    raise
        report.seconds = time.monotonic() - begin
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        console.print(f"Error: {error}", markup=False, highlight=False)
        return 1
    if options.output == "json":
        print(as_json(report))
    else:
        print_report(report)
    return 0 if report.passed else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

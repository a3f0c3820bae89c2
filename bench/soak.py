"""Hundreds of rounds on one node: memory, file descriptors and slots must not grow.

    python bench/soak.py                       # 300 rounds of 8 clients, 4 MB model
    python bench/soak.py --rounds 2000 --megabytes 1

Samples the memory (Pss) and file descriptors of every process each tenth of the rounds; fails (exit status 1) when
the second half of the run uses noticeably more than the first.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from pathlib import Path

from lifl_bench.measure import tree_of
from lifl_bench.node_process import NodeProcess
from lifl_bench.processes import limit_threads

ENVIRONMENT = limit_threads()

import click  # noqa: E402
import numpy as np  # noqa: E402
from lifl.client import Client  # noqa: E402

_TOLERATED_GROWTH = 4 << 20
"""Bytes of all processes together: allocators and caches settle, a leak of a slot or a model is more."""


def memory_and_files(pid: int) -> tuple[int, int]:
    """Bytes of anonymous memory and open file descriptors of all processes of the node."""
    memory = files = 0
    for member in tree_of(pid):
        for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                memory += int(line.split()[1]) * 1024
        files += len(os.listdir(f"/proc/{member}/fd"))
    return memory, files


@click.command(help=__doc__)
@click.option("--rounds", default=300, show_default=True)
@click.option("--clients", default=8, show_default=True)
@click.option("--megabytes", default=4.0, show_default=True)
@click.option("--data-plane", type=click.Choice(["auto", "ebpf", "unix"]), default="auto")
@click.option("-o", "--output", type=click.Choice(["human", "json"]), default="human")
def main(rounds: int, clients: int, megabytes: float, data_plane: str, output: str) -> None:
    size = int(megabytes * 1e6) // 4
    updates = [{"w": np.random.default_rng(n).standard_normal(size, np.float32)} for n in range(clients)]
    mean = np.mean([update["w"].astype(np.float64) for update in updates], axis=0)
    samples: list[tuple[int, int, int]] = []
    with tempfile.TemporaryDirectory() as directory:
        with NodeProcess(Path(directory), ENVIRONMENT, data_plane=data_plane) as node:
            with Client(node.address, "soak", "operator") as operator:
                operator.create_job(function="fedavg", goal=clients, keep_checkpoints=2)
                operator.upload_model(updates[0])
            barrier = threading.Barrier(clients)
            begun = time.monotonic()

            def work(number: int) -> None:
                with Client(node.address, "soak", f"client-{number}") as client:
                    for round_number in range(1, rounds + 1):
                        client.submit(updates[number], num_samples=1.0, round=round_number)
                        model = client.wait_for_round(after=round_number, timeout=60)
                        if number == 0 and (round_number % max(1, rounds // 10) == 0 or round_number == 1):
                            error = np.max(np.abs(model.tensors["w"] - mean))
                            if not error < 1e-5:
                                raise click.ClickException(f"round {round_number}: wrong by {error}")
                            samples.append((round_number, *memory_and_files(node.pid)))
                        barrier.wait(60)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.monotonic() - begun
    if output == "json":
        print(json.dumps({"rounds": rounds, "seconds": seconds, "samples": samples}))
    else:
        print(f"{rounds} rounds of {clients} clients in {seconds:.1f} s ({rounds / seconds:.1f} rounds/s)")
        print(f"{'round':>8}{'anonymous MB':>16}{'file descriptors':>20}")
        for number, memory, files in samples:
            print(f"{number:8}{memory / 1e6:16.1f}{files:20}")
    if len(samples) < 3:
        raise SystemExit("too few samples: a client failed")
    middle, last = samples[len(samples) // 2], samples[-1]
    if last[1] > middle[1] + _TOLERATED_GROWTH or last[2] > middle[2] + 2:
        raise SystemExit("memory or file descriptors grow")


if __name__ == "__main__":
    main()

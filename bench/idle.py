"""What a deployed function costs while nobody uses it: CPU and shared memory of all processes of a node.

    python bench/idle.py                   # 60 s after one ResNet-18 round
    python bench/idle.py --seconds 20 -o json

One round is run, the job goes idle (its workers end, its pools are given back), and then the CPU clocks of all
processes are read twice, so many seconds apart.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from lifl_bench.node_process import NodeProcess
from lifl_bench.processes import limit_threads

ENVIRONMENT = limit_threads()

import click  # noqa: E402
import numpy as np  # noqa: E402
from lifl.client import Client  # noqa: E402
from lifl_bench.measure import tree_cpu, tree_of  # noqa: E402
from lifl_bench.models import resnet_shapes  # noqa: E402

_IDLE_SECONDS = 1.0


def shared_memory(pid: int) -> int:
    """Bytes of shared memory that the processes of a tree have in place (their share of each page)."""
    total = 0
    for member in tree_of(pid):
        for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Shmem:"):
                total += int(line.split()[1]) * 1024
    return total


@click.command(help=__doc__)
@click.option("--seconds", default=60.0, show_default=True)
@click.option("--data-plane", type=click.Choice(["auto", "ebpf", "unix"]), default="auto")
@click.option("-o", "--output", type=click.Choice(["human", "json"]), default="human")
def main(seconds: float, data_plane: str, output: str) -> None:
    model = {name: np.zeros(shape, np.float32) for name, shape in resnet_shapes("resnet18").items()}
    with tempfile.TemporaryDirectory() as directory:
        with NodeProcess(Path(directory), ENVIRONMENT, data_plane=data_plane) as node:
            with Client(node.address, "idle", "client") as client:
                client.create_job(function="fedavg", goal=1, idle_seconds=_IDLE_SECONDS)
                client.upload_model(model)
                client.submit(model, num_samples=1.0, round=1)
                client.wait_for_round(after=1, timeout=30)
                busy = shared_memory(node.pid)
            end = time.monotonic() + 30
            while shared_memory(node.pid) > 1 << 20 and time.monotonic() < end:
                time.sleep(0.2)
            time.sleep(_IDLE_SECONDS)
            processes = len(tree_of(node.pid))
            before = tree_cpu(node.pid)
            time.sleep(seconds)
            used = tree_cpu(node.pid) - before
            idle = shared_memory(node.pid)
            plane = node.data_plane
    figures = {
        "seconds": seconds,
        "cpu_seconds": used,
        "shared_bytes_busy": busy,
        "shared_bytes_idle": idle,
        "processes": processes,
        "data_plane": plane,
    }
    if output == "json":
        print(json.dumps(figures))
        return
    print(f"{processes} processes, data plane {plane}, idle for {seconds:g} s:")
    print(f"  CPU            {used:8.4f} s")
    print(f"  shared memory  {idle / 1e6:8.2f} MB (in the round {busy / 1e6:.0f} MB)")


if __name__ == "__main__":
    main()

"""How close the fold kernels come to the memory's read limit, on one core.

Each row alternates between one fold of K updates and one plain read of the same K updates, so that both see the
same machine; GB/s count the bytes of the updates read. The updates lie in a memfd at a fixed stride of whole
pages, pre-faulted, the way LIFL's pools hold them. Ratios over 1 are possible: several streams prefetch better
than one.

    python bench/fold.py [--repeats 7] [--cpu N] [--model resnet18 ...] [-o json]
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy starts its threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import click
import numpy as np
from lifl.fold import Fold
from lifl.fold_kernel import read_limit, weighted_sum
from lifl.model_layout import AccumulatorLayout, encode_header, parse_header, plan_update
from rich import box
from rich.console import Console
from rich.table import Table

MODELS = {"resnet18": 11_173_962, "resnet34": 21_282_122, "resnet152": 58_164_298}
ITEM_BYTES = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2}
MOST_UPDATES = 16
TILE_ITEMS = 65_536  # 256 KiB of float32 for np.matmul, the best of what perf.md measured


@dataclass
class Row:
    """One measurement: medians with their quartiles, in GB/s of update bytes, and the ratio of the medians."""

    model: str
    what: str
    dtype: str
    updates: int
    fold: float
    fold_low: float
    fold_high: float
    read: float
    read_low: float
    read_high: float
    ratio: float


class Slots:
    """`count` slots of `nbytes` bytes at one stride of whole pages in a pre-faulted memfd."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.nbytes = (nbytes + 63) // 64 * 64  # accumulators are whole cache lines
        self.stride = (
            (self.nbytes + 2 * mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        )  # header page + payload
        descriptor = os.memfd_create("bench-fold")
        os.ftruncate(descriptor, count * self.stride)
        self.buffer = np.frombuffer(mmap.mmap(descriptor, count * self.stride), np.uint8)
        os.close(descriptor)  # the mapping goes when the last array on it does
        self.buffer[:] = 0
        self._base = int(self.buffer.ctypes.data)

    def offset(self, slot: int) -> int:
        return slot * self.stride

    def address(self, slot: int) -> int:
        return self._base + self.offset(slot)

    def bytes(self, slot: int) -> Any:
        return self.buffer[self.offset(slot) : self.offset(slot) + self.nbytes]

    def matrix(self, rows: int, count: int) -> Any:
        """The first slots as a (rows, count) float32 matrix, without a copy."""
        return np.lib.stride_tricks.as_strided(self.buffer.view(np.float32), (rows, count), (self.stride, 4))


def fill(slots: Slots, count: int, dtype: str) -> None:
    """Write plausible parameters, different in each slot."""
    block = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
    for slot in range(MOST_UPDATES):
        values = np.resize(block + np.float32(slot), count)
        if dtype == "BF16":
            stored = (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            stored = values.astype({"F32": np.float32, "F64": np.float64, "F16": np.float16}[dtype])
        slots.bytes(slot)[: stored.nbytes] = stored.view(np.uint8)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(
    model: str,
    what: str,
    dtype: str,
    updates: int,
    count: int,
    slots: Slots,
    work: Callable[[], Any],
    repeats: int,
) -> Row:
    """Alternate between `work` and reading its inputs once, after one of each that does not count."""
    nbytes = count * ITEM_BYTES[dtype]

    def read() -> None:
        for slot in range(updates):
            read_limit(slots.address(slot), nbytes)

    work()
    read()
    times = [(seconds(work), seconds(read)) for _ in range(repeats)]
    gigabytes = updates * nbytes / 1e9
    fold_rates, read_rates = ([gigabytes / pair[side] for pair in times] for side in (0, 1))
    low, fold, high = statistics.quantiles(fold_rates, n=4)
    read_low, limit, read_high = statistics.quantiles(read_rates, n=4)
    return Row(model, what, dtype, updates, fold, low, high, limit, read_low, read_high, fold / limit)


def kernel(slots: Slots, count: int, dtype: Any, updates: int, with_old: bool = False) -> Callable[[], Any]:
    """One call of the fused kernel; the result goes to the slot after the updates."""
    out = slots.address(MOST_UPDATES)
    addresses = [slots.address(slot) for slot in range(updates)]
    weights = [1.0 / updates] * updates
    accumulate: Any = "F64" if dtype == "F64" else "F32"

    def work() -> None:
        finite = weighted_sum(
            out,
            addresses,
            weights,
            count,
            dtype=dtype,
            accumulate_dtype=accumulate,
            old_address=out if with_old else 0,
        )
        assert finite

    return work


def whole_fold(slots: Slots, count: int, updates: int) -> Callable[[], Any]:
    """The same through `Fold.fold`, Python overhead included."""
    layout = parse_header(encode_header({"x": ("F32", (count,))}))
    fold = Fold(AccumulatorLayout(layout))
    plan = plan_update(layout, layout)
    inputs = [fold.update(slots.bytes(slot), plan, 1.0) for slot in range(updates)]
    out = slots.bytes(MOST_UPDATES)
    return lambda: fold.fold(out, inputs)


def torch_mv(slots: Slots, count: int, updates: int) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(1)
    matrix = torch.from_numpy(slots.matrix(updates, count)).t()
    weights = torch.full((updates,), 1.0 / updates)
    out = torch.from_numpy(slots.bytes(MOST_UPDATES)[: 4 * count].view(np.float32))
    return lambda: torch.mv(matrix, weights, out=out)


def numpy_matmul(slots: Slots, count: int, updates: int) -> Callable[[], Any]:
    matrix = slots.matrix(updates, count)
    weights = np.full(updates, 1.0 / updates, np.float32)
    out = slots.bytes(MOST_UPDATES)[: 4 * count].view(np.float32)

    def work() -> None:
        for start in range(0, count, TILE_ITEMS):
            tile = slice(start, start + TILE_ITEMS)
            np.matmul(weights, matrix[:, tile], out=out[tile])

    return work


def measure(models: tuple[str, ...], repeats: int) -> Iterator[Row]:
    for model in models:
        count = MODELS[model]
        slots = Slots(MOST_UPDATES + 1, count * 4)
        fill(slots, count, "F32")
        for updates in (2, 4, 8, 16):
            work = kernel(slots, count, "F32", updates)
            yield compare(model, "kernel", "F32", updates, count, slots, work, repeats)
        for updates in (1, 4, 8):
            work = kernel(slots, count, "F32", updates, with_old=True)
            yield compare(model, "in place", "F32", updates, count, slots, work, repeats)
        for what, make in (("Fold.fold", whole_fold), ("torch.mv", torch_mv), ("np.matmul", numpy_matmul)):
            for updates in (2, 8):
                work = make(slots, count, updates)
                yield compare(model, what, "F32", updates, count, slots, work, repeats)
        del slots, work
    for dtype in ("F64", "F16", "BF16") if "resnet18" in models else ():
        count = MODELS["resnet18"]
        slots = Slots(MOST_UPDATES + 1, count * 8)
        fill(slots, count, dtype)
        yield compare("resnet18", "kernel", dtype, 8, count, slots, kernel(slots, count, dtype, 8), repeats)
        del slots


def show(rows: list[Row], cpu: int) -> None:
    title = f"Weighted sums of K updates on CPU {cpu}, GB/s of updates"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("model", "what", "dtype"):
        table.add_column(heading)
    for heading in ("K", "fold", "quartiles", "read", "quartiles", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.model,
            row.what,
            row.dtype,
            str(row.updates),
            f"{row.fold:.1f}",
            f"{row.fold_low:.1f}-{row.fold_high:.1f}",
            f"{row.read:.1f}",
            f"{row.read_low:.1f}-{row.read_high:.1f}",
            f"{row.ratio:.2f}",
        )
    Console(width=80).print(table)


@click.command()
@click.option("--repeats", default=7, type=click.IntRange(min=5), help="Measurements of each kind.")
@click.option("--cpu", default=None, type=int, help="Core to run on; the last one allowed by default.")
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="All by default.")
@click.option("-o", "--output", default="table", type=click.Choice(["table", "json"]))
def main(repeats: int, cpu: int | None, models: tuple[str, ...], output: str) -> None:
    """Measure the fold kernels against the read limit of the memory."""
    chosen = max(os.sched_getaffinity(0)) if cpu is None else cpu
    os.sched_setaffinity(0, {chosen})
    rows = list(measure(models or tuple(MODELS), repeats))
    if output == "json":
        click.echo(json.dumps({"cpu": chosen, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        show(rows, chosen)


if __name__ == "__main__":
    main()

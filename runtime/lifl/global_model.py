"""The step at the top of the hierarchy: from the mean of a round to the next global model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lifl.errors import LiflError
from lifl.fold import Buffer, float32_to_bfloat16
from lifl.model_layout import FLOAT_DTYPES, ITEM_BYTES, AccumulatorLayout, Run, SumRun
from lifl.server_optimizer import ServerOptimizer
from lifl.tensors import bfloat16_to_float32

_TILE_ITEMS: Final = 1 << 15
"""Items of one step: model, mean and state of a tile stay near the core."""


def apply_server_optimizer(
    optimizer: ServerOptimizer,
    accumulators: AccumulatorLayout,
    previous: Buffer,
    model: Buffer,
    state: Sequence[tuple[Buffer, Buffer]],
    round_number: int,
) -> None:
    """Turn the mean in `model` into the next model, in place, tile by tile.

    `previous` and `model` are data sections in the model's dtypes; `state` has for each of the optimiser's
    arrays the buffer of the round's start and the one to write, both of the accumulator layout. Integer tensors
    keep the mean. Raises `LiflError` when the result is not finite.
    """
    names = optimizer.state_names
    if len(names) != len(state):
        raise LiflError(f"the optimiser keeps {len(names)} arrays, the job has room for {len(state)}")
    before, after = np.frombuffer(previous, np.uint8), np.frombuffer(model, np.uint8)
    arrays = [(np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)) for old, new in state]
    for run, sums in zip(accumulators.model.runs, accumulators.sums, strict=True):
        if run.dtype not in FLOAT_DTYPES:
            continue
        for start in range(0, run.count, _TILE_ITEMS):
            count = min(_TILE_ITEMS, run.count - start)
            tiles = {}
            for name, (old, new) in zip(names, arrays, strict=True):
                tiles[name] = _sums_tile(new, sums, start, count)
                tiles[name][:] = _sums_tile(old, sums, start, count)
            mean = _read(after, run, sums, start, count)
            optimizer.step(_read(before, run, sums, start, count), mean, tiles, round_number)
            if not np.isfinite(mean).all():
                raise LiflError(f"{optimizer.describe()} gave a model that is not finite in round {round_number}")
            _write(after, run, start, mean)


def _sums_tile(view: NDArray[np.uint8], sums: SumRun, start: int, count: int) -> NDArray[Any]:
    width = ITEM_BYTES[sums.dtype]
    offset = sums.offset + start * width
    return view[offset : offset + count * width].view(np.float32 if width == 4 else np.float64)


def _raw(view: NDArray[np.uint8], run: Run, start: int, count: int) -> NDArray[np.uint8]:
    width = ITEM_BYTES[run.dtype]
    return view[run.offset + start * width : run.offset + (start + count) * width]


def _read(view: NDArray[np.uint8], run: Run, sums: SumRun, start: int, count: int) -> NDArray[Any]:
    """A copy of one tile in the dtype of the sums."""
    raw = _raw(view, run, start, count)
    dtype = np.float32 if sums.dtype == "F32" else np.float64
    if run.dtype == "BF16":
        return bfloat16_to_float32(raw.view(np.uint16)).astype(dtype)
    return raw.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[run.dtype]).astype(dtype)


def _write(view: NDArray[np.uint8], run: Run, start: int, values: NDArray[Any]) -> None:
    raw = _raw(view, run, start, values.size)
    if run.dtype == "BF16":
        raw.view(np.uint16)[:] = float32_to_bfloat16(values.astype(np.float32))
    else:
        raw.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[run.dtype])[:] = values

"""Folding whole payloads: weighted sums of model updates and partial aggregates, run by run.

A `Fold` belongs to one model. `fold` adds updates and partial aggregates to an accumulator, as many as are ready
in one pass over memory; `finish` divides by the total weight at the top of the hierarchy and writes the model
in its own dtypes. Sums are kept, never running means, so any tree and any order of folds give the same model
to rounding: with float32 sums of k terms each parameter is within about (k + 2) * 2**-24 of the exact weighted
mean, relative to sum(|w * x|) / sum(w).

Payloads are buffers (mmap, memoryview, bytes, uint8 arrays). Updates may be read-only. Methods keep no state
between calls, allocate nothing that grows with the model, and may run in several threads on different results.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from lifl import fold_kernel
from lifl.fold_kernel import AccumulateDtype, Dtype, weighted_sum
from lifl.model_layout import (
    COMPRESSED_DTYPES,
    FLOAT_DTYPES,
    ITEM_BYTES,
    AccumulatorLayout,
    FoldPlan,
    Run,
    Segment,
    SumRun,
)

Buffer = bytes | bytearray | memoryview | mmap.mmap | NDArray[Any]
"""Contiguous memory that holds a payload; it may be longer than the payload."""

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

_TILE_ITEMS: Final = 1 << 16  # items converted at a time: with all temporaries they stay in the L2 cache
_BOOL: Final = "BOOL"
# Bool is read as bytes because a client may send any byte; every byte but 0 is true. BF16 has no numpy dtype.
_NUMPY_DTYPES: Final[dict[str, type[Any]]] = {
    "BOOL": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": np.uint16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}


@dataclass(frozen=True, slots=True)
class Input:
    """One payload to be folded: made by `Fold.update` or `Fold.partial`, it keeps the buffer alive."""

    view: Bytes
    address: int
    weight: float
    plan: FoldPlan


@dataclass(slots=True)
class _Group:
    """Inputs whose segments of a run are equal, so that one kernel call takes them all."""

    segments: tuple[Segment, ...]
    addresses: list[int]
    weights: list[float]


class Fold:
    """Weighted sums of payloads for one model and one precision."""

    def __init__(self, accumulators: AccumulatorLayout) -> None:
        self.accumulators = accumulators
        self.model = accumulators.model
        self._partial_plan = accumulators.plan()
        self._runs = tuple(zip(self.model.runs, accumulators.sums, strict=True))

    def warm_up(self, *, compressed: bool = False) -> None:
        """Compile the kernels for this model; a zygote does so once before it forks workers.

        `compressed` adds those for F16 and BF16 updates of F32 and F64 tensors. Updates whose tensors come in
        another order than the model's may still need kernels for short spans, compiled when they do.
        """
        kernels: set[tuple[Dtype, AccumulateDtype, bool]] = set()
        for run, sums in self._runs:
            if run.dtype in FLOAT_DTYPES:
                streaming = run.count * ITEM_BYTES[sums.dtype] >= fold_kernel.STREAM_BYTES
                dtypes = {run.dtype, sums.dtype} | (COMPRESSED_DTYPES if compressed else set())
                kernels.update((cast(Dtype, dtype), sums.dtype, streaming) for dtype in dtypes)
                if run.dtype != sums.dtype:  # `finish` goes through small tiles
                    kernels.add((sums.dtype, sums.dtype, False))
        for dtype, accumulate_dtype, streaming in sorted(kernels):
            fold_kernel.warm_up([(dtype, accumulate_dtype)], streaming=[streaming])

    def update(self, payload: Buffer, plan: FoldPlan, weight: float) -> Input:
        """A model update as an input: the data section `payload`, of `plan.source_bytes` bytes, times `weight`.

        Raises ValueError if the buffer is too short, the weight is not finite, or the plan is another model's.
        """
        if len(plan.by_run) != len(self._runs):
            raise ValueError("the plan belongs to another model")
        return _input(payload, plan, weight)

    def partial(self, accumulator: Buffer, weight: float = 1.0) -> Input:
        """A partial aggregate as an input: a buffer of this accumulator layout, times `weight`."""
        return _input(accumulator, self._partial_plan, weight)

    def fold(self, out: Buffer, inputs: Sequence[Input], old: Buffer | None = None) -> bool:
        """Write `old + sum of weight * input` to `out` and tell whether every sum is finite.

        `out` and `old` are buffers of the accumulator layout; without `old` the sums begin at nothing. `out`
        may be `old` itself, and otherwise overlaps neither `old` nor an input. `out` must be aligned to 8
        bytes, and should be to 64. If the result is False `out` is still written: find the culprit with
        `non_finite`, and fold again from `old`.
        Raises ValueError for no inputs, short or overlapping buffers, or a read-only `out`.
        """
        if not inputs:
            raise ValueError("fold needs at least one input")
        nbytes = self.accumulators.nbytes
        out_view = _view(out, nbytes, writable=True)
        old_view = None if old is None else _view(old, nbytes)
        _check_overlap(out_view, old_view, inputs)
        finite = True
        for index, (run, sums) in enumerate(self._runs):
            if run.dtype in FLOAT_DTYPES:
                finite &= _fold_floats(index, sums, out_view, old_view, inputs)
            else:
                finite &= _fold_integers(index, sums, out_view, old_view, inputs)
        return finite

    def finish(
        self,
        out_model: Buffer,
        accumulators: Sequence[Buffer],
        total_weight: float,
        previous_model: Buffer | None = None,
        delta_weight: float = 0.0,
        inputs: Sequence[Input] = (),
    ) -> bool:
        """Write the new model and tell whether every parameter of it is finite.

        out_model = (sum of accumulators + sum of weight * input + delta_weight * previous_model) / total_weight,
        in the model's dtypes. `previous_model` with the total weight of the updates that were differences turns
        those into models; it may be `out_model` itself. `inputs` that were not folded before save a pass over
        the accumulator; each of them must be one that it `can_finish_with`. Floats are multiplied by
        1 / total_weight rounded to the precision of the sums, which costs at most one rounding more than a
        division, and rounded once, to nearest even, to F16 or BF16 (from float64 sums to BF16 by way of
        float32); integers and bools follow the rule in `lifl.model_layout`. A value beyond the range of F16 or
        BF16 counts as not finite.
        Raises ValueError for no accumulators nor inputs, inputs that need a fold first, a weight that cannot
        divide, or short or read-only buffers.
        """
        if not accumulators and not inputs:
            raise ValueError("finish needs at least one accumulator or input")
        if not all(self.can_finish_with(item.plan) for item in inputs):
            raise ValueError("an input has to be folded before it can become part of the model")
        if not (math.isfinite(total_weight) and total_weight > 0):
            raise ValueError(f"the total weight must be finite and more than 0, not {total_weight}")
        payload_bytes = self.model.payload_bytes
        out_view = _view(out_model, payload_bytes, writable=True)
        _check_overlap(out_view, None, inputs)
        finishing = _Finishing(
            out_view,
            [_view(buffer, self.accumulators.nbytes) for buffer in accumulators],
            float(total_weight),
            _view(previous_model, payload_bytes) if previous_model is not None and delta_weight else None,
            float(delta_weight),
            inputs,
        )
        finite = True
        for index, (run, sums) in enumerate(self._runs):
            finite &= finishing.write(index, run, sums)
        return finite

    def can_finish_with(self, plan: FoldPlan) -> bool:
        """Whether `finish` takes inputs of this plan: all is float, in the precision of the sums, and lies as in
        the model."""
        return all(
            run.dtype in FLOAT_DTYPES
            and run.dtype == sums.dtype
            and len(segments) == 1
            and segments[0].dtype == run.dtype
            and segments[0].count == run.count
            for (run, sums), segments in zip(self._runs, plan.by_run, strict=True)
        )

    def non_finite(self, payload: Buffer, plan: FoldPlan, weight: float) -> bool:
        """Tell whether one update has a NaN, an infinity, or a value that overflows when it is weighted.

        A sum may overflow although no update does; then this is False for all of them.
        """
        source = self.update(payload, plan, weight)
        for (run, sums), segments in zip(self._runs, plan.by_run, strict=True):
            if run.dtype not in FLOAT_DTYPES:
                continue
            scratch = np.empty(_TILE_ITEMS, _NUMPY_DTYPES[sums.dtype])
            for segment in segments:
                item_bytes = ITEM_BYTES[segment.dtype]
                for start, count in _tiles(segment.count):
                    address = source.address + segment.source_offset + start * item_bytes
                    if not weighted_sum(
                        _address(scratch),
                        [address],
                        [weight],
                        count,
                        dtype=cast(Dtype, segment.dtype),
                        accumulate_dtype=sums.dtype,
                    ):
                        return True
        return False


# --- buffers -------------------------------------------------------------------------------------------------


def _input(payload: Buffer, plan: FoldPlan, weight: float) -> Input:
    if not math.isfinite(weight):
        raise ValueError(f"the weight of an input must be finite, not {weight}")
    view = _view(payload, plan.source_bytes)
    return Input(view, _address(view), float(weight), plan)


def _view(buffer: Buffer, nbytes: int, *, writable: bool = False) -> Bytes:
    """The first `nbytes` bytes of a buffer, without a copy."""
    if nbytes == 0:
        return np.empty(0, np.uint8)
    view = np.frombuffer(buffer, np.uint8)
    if view.nbytes < nbytes:
        raise ValueError(f"the buffer has {view.nbytes} bytes, {nbytes} are needed")
    if writable and not view.flags.writeable:
        raise ValueError("the buffer for the result is read-only")
    return view[:nbytes]


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _check_overlap(out: Bytes, old: Bytes | None, inputs: Sequence[Input]) -> None:
    begin = _address(out)
    end = begin + out.nbytes
    if old is not None and 0 < abs(begin - _address(old)) < out.nbytes:
        raise ValueError("the result overlaps the old value without being the same buffer")
    for item in inputs:
        if item.address < end and begin < item.address + item.view.nbytes:
            raise ValueError("the result overlaps an input")


def _items(view: Bytes, offset: int, count: int, dtype: str) -> NDArray[Any]:
    """`count` items at byte `offset` of a view as a numpy array, which need not be aligned."""
    return view[offset : offset + count * ITEM_BYTES[dtype]].view(_NUMPY_DTYPES[dtype])


def _tiles(count: int) -> Iterator[tuple[int, int]]:
    """(start, count) of consecutive tiles of `count` items."""
    for start in range(0, count, _TILE_ITEMS):
        yield start, min(_TILE_ITEMS, count - start)


# --- sums ----------------------------------------------------------------------------------------------------


def _fold_floats(index: int, sums: SumRun, out: Bytes, old: Bytes | None, inputs: Sequence[Input]) -> bool:
    """Fold one float run: a pass for each group of inputs alike, the first from `old`, the others in place.

    Each group covers every item of the run exactly once, whatever the order of its tensors.
    """
    item_bytes = ITEM_BYTES[sums.dtype]
    out_address = _address(out) + sums.offset
    old_address = 0 if old is None else _address(old) + sums.offset
    finite = True
    for group in _groups(index, inputs):
        for segment in group.segments:
            skip = segment.target_start * item_bytes
            finite &= weighted_sum(
                out_address + skip,
                [address + segment.source_offset for address in group.addresses],
                group.weights,
                segment.count,
                dtype=cast(Dtype, segment.dtype),
                accumulate_dtype=sums.dtype,
                old_address=old_address + skip if old_address else 0,
            )
        old_address = out_address
    return finite


def _groups(index: int, inputs: Sequence[Input]) -> list[_Group]:
    """Group inputs by their segments of run `index`; there are as many groups as layouts, rarely more than one."""
    groups: list[_Group] = []
    for item in inputs:
        segments = item.plan.by_run[index]
        for group in groups:
            if group.segments is segments or group.segments == segments:
                group.addresses.append(item.address)
                group.weights.append(item.weight)
                break
        else:
            groups.append(_Group(segments, [item.address], [item.weight]))
    return groups


def _fold_integers(index: int, sums: SumRun, out: Bytes, old: Bytes | None, inputs: Sequence[Input]) -> bool:
    """Fold one run of integers or bools, or of float64 sums of them, in float64."""
    target = _items(out, sums.offset, sums.count, "F64")
    before = None if old is None else _items(old, sums.offset, sums.count, "F64")
    finite = True
    for item in inputs:
        for segment in item.plan.by_run[index]:
            source = _items(item.view, segment.source_offset, segment.count, segment.dtype)
            for start, count in _tiles(segment.count):
                place = slice(segment.target_start + start, segment.target_start + start + count)
                with np.errstate(invalid="ignore", over="ignore"):  # told by the result instead
                    term = _as_float64(source[start : start + count], segment.dtype) * item.weight
                    target[place] = term if before is None else before[place] + term
                finite &= bool(np.isfinite(target[place]).all())
        before = target
    return finite


def _as_float64(items: NDArray[Any], dtype: str) -> Floats:
    """A float64 copy of integers; bools become 0 and 1."""
    return (items != 0).astype(np.float64) if dtype == _BOOL else items.astype(np.float64)


# --- the model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Finishing:
    """The buffers and weights of one call of `Fold.finish`."""

    out: Bytes
    accumulators: list[Bytes]
    total_weight: float
    previous: Bytes | None
    delta_weight: float
    inputs: Sequence[Input]

    def write(self, index: int, run: Run, sums: SumRun) -> bool:
        """Write one run of the model, the one with this index, and tell whether all of it is finite."""
        if run.dtype not in FLOAT_DTYPES:
            return self._write_integers(run, sums)
        if run.dtype == sums.dtype:
            addresses = [item.address + item.plan.by_run[index][0].source_offset for item in self.inputs]
            return self._sum(run, sums, 0, run.count, _address(self.out) + run.offset, addresses)
        scratch = np.empty(_TILE_ITEMS, _NUMPY_DTYPES[sums.dtype])
        finite = True
        for start, count in _tiles(run.count):
            self._sum(run, sums, start, count, _address(scratch))
            place = _items(self.out, run.offset + start * ITEM_BYTES[run.dtype], count, run.dtype)
            finite &= _round_floats(place, scratch[:count], run.dtype)
        return finite

    def _sum(
        self,
        run: Run,
        sums: SumRun,
        start: int,
        count: int,
        out_address: int,
        input_addresses: Sequence[int] = (),
    ) -> bool:
        """Write the mean of some items of a float run, in the dtype of the sums, to `out_address`."""
        offset = sums.offset + start * ITEM_BYTES[sums.dtype]
        addresses = [*(_address(view) + offset for view in self.accumulators), *input_addresses]
        weights = [1.0 / self.total_weight] * len(self.accumulators)
        weights += [item.weight / self.total_weight for item in self.inputs]
        if self.previous is None:
            return weighted_sum(
                out_address, addresses, weights, count, dtype=sums.dtype, accumulate_dtype=sums.dtype
            )
        # The previous model comes first: it may be the very buffer that the result goes to.
        previous = _address(self.previous) + run.offset + start * ITEM_BYTES[run.dtype]
        share = self.delta_weight / self.total_weight
        if run.dtype == sums.dtype:
            return weighted_sum(
                out_address,
                [previous, *addresses],
                [share, *weights],
                count,
                dtype=sums.dtype,
                accumulate_dtype=sums.dtype,
            )
        dtype = cast(Dtype, run.dtype)
        weighted_sum(out_address, [previous], [share], count, dtype=dtype, accumulate_dtype=sums.dtype)
        return weighted_sum(
            out_address,
            addresses,
            weights,
            count,
            dtype=sums.dtype,
            accumulate_dtype=sums.dtype,
            old_address=out_address,
        )

    def _write_integers(self, run: Run, sums: SumRun) -> bool:
        finite = True
        for start, count in _tiles(run.count):
            mean = self._integer_mean(run, sums, start, count)
            place = _items(self.out, run.offset + start * ITEM_BYTES[run.dtype], count, run.dtype)
            place[:] = _round_integers(mean, run.dtype)
            finite &= bool(np.isfinite(mean).all())
        return finite

    def _integer_mean(self, run: Run, sums: SumRun, start: int, count: int) -> Floats:
        """The mean of some items of a run of integers or bools, before it is rounded."""
        mean = np.zeros(count, np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # told by the result instead
            for view in self.accumulators:
                mean += _items(view, sums.offset + start * ITEM_BYTES["F64"], count, "F64")
            if self.previous is not None:
                place = run.offset + start * ITEM_BYTES[run.dtype]
                mean += self.delta_weight * _as_float64(_items(self.previous, place, count, run.dtype), run.dtype)
            mean /= self.total_weight
        return mean


def _round_integers(mean: Floats, dtype: str) -> NDArray[Any]:
    """Round half to even and clip to the range of the dtype; bools are true from 0.5 on. NaN becomes 0."""
    if dtype == _BOOL:
        return (mean >= 0.5).astype(np.uint8)
    numpy_dtype = _NUMPY_DTYPES[dtype]
    limits = np.iinfo(numpy_dtype)
    rounded = np.nan_to_num(np.rint(mean), nan=0.0, posinf=np.inf, neginf=-np.inf)
    # The largest 64-bit integers have no float64; casting the float64 above them would be undefined.
    above = rounded >= float(limits.max)
    result: NDArray[Any] = np.clip(np.where(above, 0.0, rounded), float(limits.min), None).astype(numpy_dtype)
    result[above] = limits.max
    return result


def _round_floats(out: NDArray[Any], values: NDArray[Any], dtype: str) -> bool:
    """Round float32 or float64 values to `dtype` in `out`, and tell whether all of them are finite."""
    with np.errstate(over="ignore", invalid="ignore"):  # told by the result instead
        if dtype != "BF16":
            out[:] = values
            return bool(np.isfinite(out).all())
        singles = values.astype(np.float32, copy=False)
    out[:] = float32_to_bfloat16(singles)
    return not bool(((out & 0x7F80) == 0x7F80).any())


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the bits of bfloat16, to nearest even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    quiet = (bits >> 16) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)

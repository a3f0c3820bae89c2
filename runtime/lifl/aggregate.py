"""What aggregation functions see: model updates where they lie, and what they add them to.

A streaming function gets an `Aggregate` and one `ModelUpdate` at a time. It only says what each update counts;
the sums are made afterwards, of all ready updates in one pass over memory. A gathering function gets all updates
of a round as `GatheredUpdates` and computes the result tile by tile.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from lifl.model_layout import (
    FLOAT_DTYPES,
    ITEM_BYTES,
    AccumulatorLayout,
    FoldPlan,
    ModelLayout,
    Segment,
    TensorSpec,
)
from lifl.tensors import NUMPY_DTYPES, Buffer, as_array, as_torch, bfloat16_to_float32, byte_view

if TYPE_CHECKING:
    import torch

FloatArray = NDArray[np.floating[Any]]

_NORM_TILE: Final = 1 << 15  # items; a tile and its float64 copy stay in the L2 cache
_ROW_BYTES: Final = 256 * 1024
_BLOCK_BYTES: Final = 4 * 1024 * 1024  # all rows of a block together should stay near the core
_LEAST_ITEMS: Final = 16384  # shorter rows cost more in calls than they save in cache misses


class ModelUpdate:
    """One client's model update, read-only, where it was received.

    Views of its tensors are valid only while the function is called: the memory is used again afterwards.
    """

    __slots__ = ("_bytes", "_specs", "client", "is_delta", "layout", "num_samples", "payload", "plan", "round")

    def __init__(
        self,
        payload: Buffer,
        layout: ModelLayout,
        plan: FoldPlan,
        *,
        client: str,
        round: int,
        num_samples: float,
        is_delta: bool = False,
    ) -> None:
        """`payload` is the data section, of `plan.source_bytes` bytes; `plan` folds `layout` into the model."""
        if len(payload) < plan.source_bytes:
            raise ValueError(f"the payload has {len(payload)} bytes, {plan.source_bytes} are needed")
        self.payload = payload
        self.layout = layout
        self.plan = plan
        self.client = client
        """The id that the client gave itself."""
        self.round = round
        """The round whose model it was trained from: in an asynchronous job perhaps an earlier one than
        `Aggregate.round`. What it loses by that is no business of the function's."""
        self.num_samples = num_samples
        """Finite and more than 0: how many samples the client trained on, as it says."""
        self.is_delta = is_delta
        """The tensors are differences to that round's model, not new weights."""
        self._bytes: NDArray[np.uint8] | None = None
        self._specs: dict[str, TensorSpec] | None = None

    def __repr__(self) -> str:
        kind = " delta" if self.is_delta else ""
        return f"<ModelUpdate{kind} of {self.client!r}, round {self.round}, {self.num_samples:g} samples>"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order in which they lie in memory."""
        return tuple(spec.name for spec in self.layout.tensors)

    def array(self, name: str) -> NDArray[Any]:
        """One tensor as a read-only numpy array of its shape. Raises KeyError for a name the model has not.

        It is a view, except that BF16, which numpy does not have, comes as an exact float32 copy, and BOOL as a
        copy that holds nothing but 0 and 1.
        """
        return as_array(self._view(), self._spec(name))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as a torch tensor in its own dtype, without a copy (BOOL is copied). Needs torch.

        Do not write to it: the memory is mapped read-only and the process would be killed.
        """
        return as_torch(self._view(), self._spec(name))

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, as `tensor` gives them; a state dict. Needs torch."""
        return {name: self.tensor(name) for name in self.names}

    def norm(self) -> float:
        """The L2 norm over all float tensors together, of what was sent: weights, or the difference if a delta.

        It is NaN or infinite if any value is.
        """
        total = 0.0
        scratch = np.empty(_NORM_TILE, np.float64)
        for run in self.layout.runs:
            if run.dtype not in FLOAT_DTYPES:
                continue
            items = _typed(self._view(), run.offset, run.count, run.dtype)
            with np.errstate(over="ignore", invalid="ignore"):  # not finite is an answer here
                for start in range(0, run.count, _NORM_TILE):
                    total += _square_sum(items[start : start + _NORM_TILE], run.dtype, scratch)
        return math.sqrt(total)

    def _view(self) -> NDArray[np.uint8]:
        if self._bytes is None:
            self._bytes = byte_view(self.payload)
        return self._bytes

    def _spec(self, name: str) -> TensorSpec:
        if self._specs is None:
            self._specs = {spec.name: spec for spec in self.layout.tensors}
        return self._specs[name]


def _square_sum(tile: NDArray[Any], dtype: str, scratch: NDArray[np.float64]) -> float:
    """Sum of squares of one tile, in float64 unless float32 will do."""
    if dtype == "F32":
        total = float(np.dot(tile, tile))
        # Sums outside this range may have lost squares that overflow or vanish in float32.
        if 1e-20 < total < 1e38:
            return total
    wide = scratch[: tile.size]
    if dtype == "BF16":
        bfloat16_to_float32(tile, wide)
    else:
        wide[:] = tile
    return float(np.dot(wide, wide))


class Contribution(NamedTuple):
    """What one update adds: `weight * scale * x` to the sum and `weight` to the sum of weights."""

    update: ModelUpdate
    weight: float
    scale: float


class Aggregate:
    """The weighted sum of a round so far, as a streaming function sees it: something to add updates to.

    Adding only notes the contribution; the platform folds all that were noted in one pass. An update that
    the function does not add is left out of the round's result.
    """

    __slots__ = ("_added", "_contributions", "_current", "_folded_weight", "_round")

    def __init__(self, round: int, weight: float = 0.0) -> None:
        """`weight` is the sum of the weights of what has been folded already."""
        self._round = round
        self._folded_weight = weight
        self._contributions: list[Contribution] = []
        self._added: set[int] = set()
        self._current: ModelUpdate | None = None

    @property
    def round(self) -> int:
        """The round, counted from 1."""
        return self._round

    @property
    def weight(self) -> float:
        """Sum of all weights so far, what has been folded already included.

        It depends on where in the hierarchy and when the function runs: for logs, not for decisions.
        """
        return math.fsum((self._folded_weight, *(item.weight for item in self._contributions)))

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        """What has been added since the last `take`."""
        return tuple(self._contributions)

    def add(self, update: ModelUpdate, weight: float | None = None, scale: float = 1.0) -> None:
        """Add `weight * scale * update` to the sum and `weight` to the sum of weights.

        `weight` is `update.num_samples` unless given. `scale` is for norm clipping of deltas: it shrinks an
        update without taking weight from it. Raises ValueError for a weight that is not finite and more than
        0, a scale that is not finite, an update that was added already or that this call is not about.
        """
        weight = float(update.num_samples if weight is None else weight)
        scale = float(scale)
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"the weight of {update.client!r} must be finite and more than 0, not {weight}")
        if not math.isfinite(weight * scale):
            raise ValueError(f"the scale of {update.client!r} must be finite, also times its weight, not {scale}")
        if self._current is not None and update is not self._current:
            raise ValueError(f"{update!r} is not the update of this call; updates cannot be kept for later ones")
        if id(update) in self._added:
            raise ValueError(f"the update of {update.client!r} has been added already")
        self._added.add(id(update))
        self._contributions.append(Contribution(update, weight, scale))

    def offer(self, function: Callable[[Aggregate, ModelUpdate], None], update: ModelUpdate) -> bool:
        """For the platform: call the function with one update and tell whether it added it.

        What the function raises comes out here, and then the update is not added.
        """
        before = len(self._contributions)
        self._current = update
        try:
            function(self, update)
        except BaseException:
            for item in self._contributions[before:]:
                self._added.discard(id(item.update))
            del self._contributions[before:]
            raise
        finally:
            self._current = None
        return len(self._contributions) > before

    def take(self) -> list[Contribution]:
        """For the platform: hand over what was added since the last time, and count it as folded."""
        taken = self._contributions
        self._folded_weight = self.weight
        self._contributions = []
        self._added = set()
        return taken


class GatheredUpdates(Sequence[ModelUpdate]):
    """All updates of a round, for functions that need every one at once; their tensors stay where they are.

    The function fills the result through `tiles`. It must not depend on the order of the updates.
    """

    def __init__(
        self,
        updates: Sequence[ModelUpdate],
        accumulators: AccumulatorLayout,
        out: Buffer,
        previous_model: Buffer | None = None,
    ) -> None:
        """`out` is a writable buffer of the accumulator layout, which becomes a partial aggregate of weight 1.

        `previous_model`, the data section of the round's model, is needed if any update is a delta.
        Raises ValueError for no updates, a short buffer, or a delta without the previous model.
        """
        if not updates:
            raise ValueError("there are no updates to gather")
        if previous_model is None and any(update.is_delta for update in updates):
            raise ValueError("an update that is a delta needs the previous model")
        self._updates = tuple(updates)
        self._accumulators = accumulators
        self._out = np.frombuffer(out, np.uint8)
        if self._out.nbytes < accumulators.nbytes:
            raise ValueError(f"the buffer has {self._out.nbytes} bytes, {accumulators.nbytes} are needed")
        if not self._out.flags.writeable:
            raise ValueError("the buffer for the result is read-only")
        self._previous = None if previous_model is None else byte_view(previous_model)
        self._block = np.empty(0, np.uint8)
        self._passes = 0
        self.complete = False
        """Whether some pass over `tiles` came to its end; otherwise there is no result."""

    @overload
    def __getitem__(self, index: int) -> ModelUpdate: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ModelUpdate]: ...

    def __getitem__(self, index: int | slice) -> ModelUpdate | Sequence[ModelUpdate]:
        return self._updates[index]

    def __len__(self) -> int:
        return len(self._updates)

    @property
    def round(self) -> int:
        """The round, counted from 1."""
        return self._updates[0].round

    @property
    def weights(self) -> NDArray[np.float64]:
        """The clients' numbers of samples, shape (K,)."""
        return np.array([update.num_samples for update in self._updates], np.float64)

    def tiles(self, size: int | None = None) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Go over the whole model in tiles; yields (inputs, output) for each.

        `inputs` is a C-contiguous (K, n) array, row k the weights of client k (a delta is added to the round's
        model first), in a buffer that the next tile uses again: it may be overwritten. `output`, shape (n,), is
        to be filled with the new weights. Both are float32, or float64 for F64 and integer tensors, which
        are rounded as in any average; n is at most `size`, by default what suits the caches.
        All values of one tensor are not in one tile, and a tile may hold several tensors.
        """
        if size is not None and size < 1:
            raise ValueError(f"the size of a tile must be at least 1, not {size}")
        self._passes += 1
        first = self._passes == 1
        for index, sums in enumerate(self._accumulators.sums):
            dtype: type[Any] = np.float32 if sums.dtype == "F32" else np.float64
            end = sums.offset + sums.count * ITEM_BYTES[sums.dtype]
            target = self._out[sums.offset : end].view(dtype)
            for start, inputs in self._blocks(index, sums.count, np.dtype(dtype), size):
                output = target[start : start + inputs.shape[1]]
                if first:
                    output.fill(np.nan)  # what the function forgets shows up as not finite
                yield inputs, output
        self.complete = True

    def sorted_tiles(self, size: int | None = None) -> Iterator[tuple[FloatArray, FloatArray]]:
        """As `tiles`, with the K values of each parameter in ascending order along the rows.

        Sorting whole rows against each other is 5 to 15 times as fast as sorting the columns of an array.
        A parameter for which any client has a NaN is NaN in every row.
        """
        network = _sorting_network(len(self._updates))
        scratch = np.empty(0, np.float64)
        with np.errstate(invalid="ignore"):  # a NaN is told by the result
            for inputs, output in self.tiles(size):
                if scratch.size != output.size or scratch.dtype != output.dtype:
                    scratch = np.empty_like(output)
                for low, high in network:
                    np.minimum(inputs[low], inputs[high], out=scratch)
                    np.maximum(inputs[low], inputs[high], out=inputs[high])
                    inputs[low] = scratch
                yield inputs, output

    def squared_distances(self) -> NDArray[np.float64]:
        """The squared L2 distances between the updates over all float tensors, shape (K, K)."""
        count = len(self._updates)
        gram = np.zeros((count, count))
        for index, (run, sums) in enumerate(
            zip(self._accumulators.model.runs, self._accumulators.sums, strict=True)
        ):
            if run.dtype not in FLOAT_DTYPES:
                continue
            for _, inputs in self._blocks(index, sums.count, np.dtype(f"f{ITEM_BYTES[sums.dtype]}"), None):
                # Clients are much closer to each other than to zero; without this the products would cancel.
                inputs -= inputs.mean(axis=0)
                gram += inputs @ inputs.T
        square = np.diagonal(gram)
        distances: NDArray[np.float64] = np.maximum(square[:, None] + square[None, :] - 2 * gram, 0.0)
        np.fill_diagonal(distances, 0.0)
        return distances

    def _blocks(
        self, index: int, count: int, dtype: np.dtype[Any], size: int | None
    ) -> Iterator[tuple[int, FloatArray]]:
        """(start, inputs of shape (K, n)) over the items of one run, in a buffer that is used again."""
        rows = len(self._updates)
        if size is None:
            size = max(_LEAST_ITEMS, min(_ROW_BYTES, _BLOCK_BYTES // rows) // dtype.itemsize)
        size = min(size, count)
        needed = rows * size * dtype.itemsize
        if self._block.nbytes < needed:
            self._block = np.empty(needed, np.uint8)
        readers = [_RunReader(update, index) for update in self._updates]
        previous = None if self._previous is None else self._previous_run(index)
        for start in range(0, count, size):
            items = min(size, count - start)
            inputs = self._block[: rows * items * dtype.itemsize].view(dtype).reshape(rows, items)
            for row, reader, update in zip(inputs, readers, self._updates, strict=True):
                reader.read(start, row)
                if update.is_delta:
                    assert previous is not None
                    row += _converted(previous[1][start : start + items], previous[0])
            yield start, inputs

    def _previous_run(self, index: int) -> tuple[str, NDArray[Any]]:
        assert self._previous is not None
        run = self._accumulators.model.runs[index]
        return run.dtype, _typed(self._previous, run.offset, run.count, run.dtype)


@lru_cache(maxsize=16)
def _sorting_network(count: int) -> tuple[tuple[int, int], ...]:
    """The pairs to compare and exchange, in order, that sort any `count` values.

    Batcher's odd-even merge sort for any count: Knuth, The Art of Computer Programming 3, algorithm 5.2.2M.
    """
    pairs = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top if count > 1 else 0
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return tuple(pairs)


class _RunReader:
    """Reads spans of one run of the model from an update, whatever the order and dtypes of its tensors."""

    def __init__(self, update: ModelUpdate, index: int) -> None:
        segments = update.plan.by_run[index]
        self._starts = [segment.target_start for segment in segments]
        self._sources = [(segment, _segment_items(update, segment)) for segment in segments]

    def read(self, start: int, out: FloatArray) -> None:
        """Fill `out` with the items of the run from `start` on."""
        done = 0
        place = bisect_right(self._starts, start) - 1
        while done < out.size:
            segment, items = self._sources[place]
            begin = start + done - segment.target_start
            part = items[begin : begin + out.size - done]
            target = out[done : done + part.size]
            if segment.dtype == "BF16":
                bfloat16_to_float32(part, target)
            elif segment.dtype == "BOOL":
                np.not_equal(part, 0, out=target)
            else:
                target[:] = part
            done += part.size
            place += 1


def _segment_items(update: ModelUpdate, segment: Segment) -> NDArray[Any]:
    return _typed(byte_view(update.payload), segment.source_offset, segment.count, segment.dtype)


def _typed(view: NDArray[np.uint8], offset: int, count: int, dtype: str) -> NDArray[Any]:
    """Items of a payload; BF16 as its bits and BOOL as its bytes."""
    numpy_dtype = {"BF16": np.uint16, "BOOL": np.uint8}.get(dtype) or NUMPY_DTYPES[dtype]
    return view[offset : offset + count * ITEM_BYTES[dtype]].view(numpy_dtype)


def _converted(items: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Items as `_typed` gives them, as numbers to calculate with."""
    if dtype == "BF16":
        return bfloat16_to_float32(items)
    return items != 0 if dtype == "BOOL" else items

"""A model cut into shards: contiguous ranges of its data section, each a safetensors model of its own.

The cuts are as even as they can be, in bytes, and lie at multiples of 8 bytes of the data section. The tensors of
a safetensors model are aligned to their items, whose sizes divide 8: so a cut never goes through an item, and what
follows it is as aligned in the shard as it was in the model. Concatenating the data sections of the shards gives
that of the model.

A shard names a tensor as the model does. Of a tensor that was cut it has one flat piece; the others keep their
shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Literal

from lifl.errors import InvalidModel, Unavailable
from lifl.model_layout import ITEM_BYTES, ModelLayout, TensorSpec

MOST_SHARDS: Final = 256

_CUT_BYTES: Final = max(ITEM_BYTES.values())
_HEADER_ALIGNMENT: Final = 64
_LENGTH_BYTES: Final = 8
_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Piece:
    """What a shard has of one tensor: `count` items from item `first` on."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    first: int
    count: int

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape that it has in the shard: the tensor's own if it is all of it, else flat."""
        return self.shape if self.count == prod(self.shape) else (self.count,)


@dataclass(frozen=True, slots=True)
class Shard:
    """One range of a model's data section; `offset` and `nbytes` are bytes of it."""

    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]
    header: bytes
    """The safetensors header of the shard as a model, without the 8 length bytes."""


def shard_name(job: str, index: int) -> str:
    """What the job of a shard is called."""
    return f"{job}.{index}"


# --- cutting a model -----------------------------------------------------------------------------------------


def plan_shards(layout: ModelLayout, count: int) -> tuple[Shard, ...]:
    """Cut a model into so many shards; raises InvalidModel when there is not enough of it for each."""
    units = -(-layout.payload_bytes // _CUT_BYTES)
    if count > units:
        raise InvalidModel(
            f"a model of {layout.payload_bytes:,} bytes has at most {units:,} shards of {_CUT_BYTES} bytes, "
            f"not {count}; create the job with fewer shards"
        )
    ends = [min(units * (index + 1) // count * _CUT_BYTES, layout.payload_bytes) for index in range(count)]
    return tuple(_shard(layout, begin, end) for begin, end in zip([0, *ends], ends, strict=False))


def _shard(layout: ModelLayout, begin: int, end: int) -> Shard:
    inside = [tensor for tensor in layout.tensors if _is_in(tensor, begin, end, layout)]
    parts = [(tensor, _piece(tensor, begin, end)) for tensor in inside]
    entries = [(piece.name, tensor.dtype, piece.own_shape) for tensor, piece in parts]
    return Shard(begin, end - begin, tuple(piece for _, piece in parts), _header(entries))


def _is_in(tensor: TensorSpec, begin: int, end: int, layout: ModelLayout) -> bool:
    if tensor.nbytes:
        return tensor.offset < end and tensor.offset + tensor.nbytes > begin
    is_last = end == layout.payload_bytes
    return begin <= tensor.offset < end or (is_last and tensor.offset == end)


def _piece(tensor: TensorSpec, begin: int, end: int) -> Piece:
    item = ITEM_BYTES[tensor.dtype]
    first = max(begin - tensor.offset, 0) // item
    last = min(end - tensor.offset, tensor.nbytes) // item
    return Piece(tensor.name, tensor.shape, first, last - first)


def _header(entries: Sequence[tuple[str, str, Sequence[int]]]) -> bytes:
    """A safetensors header for tensors (name, dtype, shape) that follow one another in this order."""
    described: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape in entries:
        nbytes = prod(shape) * ITEM_BYTES[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return header + b" " * (-(_LENGTH_BYTES + len(header)) % _HEADER_ALIGNMENT)


# --- telling clients -----------------------------------------------------------------------------------------


def describe_shards(job: str, shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """The shards as the API tells them: job and tensors of each."""
    return [
        {
            "job": shard_name(job, index),
            "tensors": {
                piece.name: {"first": piece.first, "count": piece.count, "shape": list(piece.shape)}
                for piece in shard.pieces
            },
        }
        for index, shard in enumerate(shards)
    ]


@dataclass(frozen=True, slots=True)
class ShardJob:
    """A shard as a client sees it."""

    job: str
    pieces: tuple[Piece, ...]


def read_shards(described: Any) -> tuple[ShardJob, ...]:
    """What `describe_shards` has told; raises Unavailable when it makes no sense."""
    try:
        found = tuple(ShardJob(str(shard["job"]), _read_pieces(shard["tensors"])) for shard in described)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unavailable(f"the shards of the job cannot be understood: {error!r}") from None
    if not found:
        raise Unavailable("the job has no shards")
    return found


def _read_pieces(tensors: Mapping[str, Any]) -> tuple[Piece, ...]:
    return tuple(
        Piece(name, tuple(map(int, piece["shape"])), int(piece["first"]), int(piece["count"]))
        for name, piece in tensors.items()
    )


# --- cutting an update ---------------------------------------------------------------------------------------


def split_update(
    layout: ModelLayout, payload: memoryview, shards: Sequence[ShardJob]
) -> list[tuple[bytes | memoryview, ...]]:
    """The update of each shard, as the pieces of a safetensors file. The payload is not copied.

    Raises InvalidModel when the update has not the tensors of the job's model. Their dtypes each shard checks.
    """
    tensors = {tensor.name: tensor for tensor in layout.tensors}
    _check_shapes(tensors, shards)
    return [_update_of(tensors, payload, shard.pieces) for shard in shards]


def _check_shapes(tensors: Mapping[str, TensorSpec], shards: Sequence[ShardJob]) -> None:
    wanted = {piece.name: piece.shape for shard in shards for piece in shard.pieces}
    wrong = [f"{name!r} is missing" for name in wanted.keys() - tensors.keys()]
    wrong += [f"{name!r} is not in the model" for name in tensors.keys() - wanted.keys()]
    wrong += [
        f"{name!r} has shape {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if wrong:
        shown = sorted(wrong)[:_SHOWN]
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise InvalidModel(f"the update does not fit the job's model: {'; '.join(shown + more)}")


def _update_of(
    tensors: Mapping[str, TensorSpec], payload: memoryview, pieces: Sequence[Piece]
) -> tuple[bytes | memoryview, ...]:
    if not _is_aligned(tensors, pieces):
        # Of mixed dtypes, where some were compressed. Wide items first are always aligned.
        pieces = sorted(pieces, key=lambda piece: -ITEM_BYTES[tensors[piece.name].dtype])
    header = _header([(piece.name, tensors[piece.name].dtype, piece.own_shape) for piece in pieces])
    ranges: list[tuple[int, int]] = []
    for piece in pieces:
        tensor = tensors[piece.name]
        item = ITEM_BYTES[tensor.dtype]
        begin = tensor.offset + piece.first * item
        if ranges and ranges[-1][1] == begin:
            begin = ranges.pop()[0]
        ranges.append((begin, tensor.offset + (piece.first + piece.count) * item))
    length = len(header).to_bytes(_LENGTH_BYTES, "little")
    return (length + header, *(payload[begin:end] for begin, end in ranges if begin < end))


def _is_aligned(tensors: Mapping[str, TensorSpec], pieces: Sequence[Piece]) -> bool:
    offset = 0
    for piece in pieces:
        item = ITEM_BYTES[tensors[piece.name].dtype]
        if offset % item:
            return False
        offset += piece.count * item
    return True


# --- what became of the parts --------------------------------------------------------------------------------

Outcome = Literal["accepted", "duplicate", "late", "unselected"]


def combine_outcomes(outcomes: Sequence[Outcome]) -> Outcome:
    """What became of an update whose parts have fared so; a part counts only together with all others."""
    for outcome in ("unselected", "late", "duplicate"):
        if outcome in outcomes:
            return outcome
    return "accepted"

"""The layout of a model: the safetensors header, checked by hand, and how one layout folds into another.

A safetensors file is `u64 little-endian header length | JSON header | data section`. The header names each
tensor's dtype, shape and place in the data section. LIFL reads it once for a job's model and once for each
different layout that clients upload, and from then on treats the data section as a few flat runs of one dtype.
Headers come from clients, so nothing in one is believed before it is checked; every defect raises
`InvalidModel` with what is wrong, where, and what to do.

Integer and bool tensors (step counters such as BatchNorm's `num_batches_tracked`) are averaged too: the result
is the weighted mean in float64, rounded half to even (bool: true if the mean is at least 0.5) and clipped to
the range of the dtype. Values beyond 2**53 lose their low digits in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NoReturn

from lifl.errors import InvalidModel

MAX_HEADER_BYTES: Final = 100_000_000
"""Longest header that the safetensors library accepts; callers that take headers from clients pass less."""

ITEM_BYTES: Final[Mapping[str, int]] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
"""Bytes of one item of each supported dtype, in the order in which the safetensors library ranks dtypes."""

FLOAT_DTYPES: Final = frozenset({"F16", "BF16", "F32", "F64"})
COMPRESSED_DTYPES: Final = frozenset({"F16", "BF16"})
"""What a client may upload in place of a float32 or float64 tensor."""

RUN_ALIGNMENT: Final = 64
"""Each run of an accumulator begins at a multiple of this many bytes: one cache line, one AVX-512 vector."""

Precision = Literal["float32", "float64"]

_LARGEST_INT: Final = 2**63 - 1
_LARGEST_RANK: Final = 64
_DTYPE_RANK: Final = {dtype: rank for rank, dtype in enumerate(ITEM_BYTES)}
_ENTRY_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})
_RESAVE: Final = "re-save the file with the safetensors library"
_SHOWN: Final = 3  # tensors listed in an error text


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model: `offset` and `nbytes` are bytes in the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def count(self) -> int:
        """Number of items."""
        return self.nbytes // ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Run:
    """A maximal span of the data section in one dtype: `offset` in bytes, `count` in items, never empty."""

    dtype: str
    offset: int
    count: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """Where each tensor of a model lies.

    `tensors` are in offset order and cover the data section of `payload_bytes` bytes without holes; `runs` are
    its maximal spans of one dtype; `header` is the JSON header as received, without the 8 length bytes.
    Two layouts are equal if their tensors are: names, dtypes, shapes and places, not the header's bytes.
    """

    tensors: tuple[TensorSpec, ...]
    payload_bytes: int = field(compare=False)
    runs: tuple[Run, ...] = field(compare=False, repr=False)
    header: bytes = field(compare=False, repr=False)

    @property
    def num_parameters(self) -> int:
        """Number of items in all tensors."""
        return sum(run.count for run in self.runs)


# --- reading a header ----------------------------------------------------------------------------------------


def parse_header(header: bytes | bytearray | memoryview, payload_bytes: int | None = None) -> ModelLayout:
    """Check a safetensors JSON header and return the layout that it describes.

    `header` is the JSON without the 8 length bytes, `payload_bytes` the length of the data section that it must
    cover exactly (None: whatever the tensors add up to). Raises InvalidModel for every defect.
    """
    raw = bytes(header)
    entries = _decode(raw)
    _check_metadata(entries.pop("__metadata__", {}))
    if not entries:
        raise InvalidModel("the safetensors header names no tensors; a model needs at least one tensor")
    tensors = tuple(sorted((_tensor(name, entry) for name, entry in entries.items()), key=_by_place))
    covered = _check_cover(tensors)
    if payload_bytes is not None and covered != payload_bytes:
        raise InvalidModel(
            f"the tensors cover {covered} bytes, but the data section has {payload_bytes}; "
            f"the file is {'cut short' if payload_bytes < covered else 'too long'}: {_RESAVE}"
        )
    return ModelLayout(tensors, covered, _runs(tensors), raw)


def _decode(raw: bytes) -> dict[str, Any]:
    """Decode the JSON object, refusing what Python's decoder would let pass."""
    if len(raw) > MAX_HEADER_BYTES:
        raise InvalidModel(f"the safetensors header has {len(raw)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if not raw.startswith(b"{"):
        raise InvalidModel(f"the safetensors header must begin with '{{', not {raw[:8]!r}; {_RESAVE}")
    try:
        # The text is decoded here because json.loads guesses UTF-16 and UTF-32 when it is given bytes.
        decoded = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except InvalidModel:
        raise
    except RecursionError:
        raise InvalidModel(f"the safetensors header is nested too deeply; {_RESAVE}") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, integers of thousands of digits
        raise InvalidModel(f"the safetensors header is not valid UTF-8 JSON ({error}); {_RESAVE}") from None
    assert isinstance(decoded, dict)
    return decoded


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise InvalidModel(f"the safetensors header has the key {_quoted(key)} twice; {_RESAVE}")
        result[key] = value
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise InvalidModel(f"the safetensors header contains {text}, which is not JSON; {_RESAVE}")


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidModel("__metadata__ in the safetensors header must map strings to strings")


def _tensor(name: str, entry: Any) -> TensorSpec:
    """Check the header entry of one tensor by itself."""
    where = f"tensor {_quoted(name)}"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidModel(f"the name of {where} is not valid Unicode; rename the tensor") from None
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise InvalidModel(f"{where} must have exactly the keys dtype, shape and data_offsets; {_RESAVE}")
    dtype = _checked_dtype(where, entry["dtype"])
    shape = tuple(_integers(where, "shape", entry["shape"], _LARGEST_RANK))
    offsets = _integers(where, "data_offsets", entry["data_offsets"], 2)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidModel(f"{where}: data_offsets must be [begin, end] with begin <= end; {_RESAVE}")
    begin, end = offsets
    nbytes = _product(where, shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise InvalidModel(
            f"{where}: {dtype} of shape {list(shape)} takes {nbytes} bytes, "
            f"but data_offsets give it {end - begin}; {_RESAVE}"
        )
    if begin % ITEM_BYTES[dtype]:
        raise InvalidModel(f"{where}: offset {begin} is not aligned to the item size of {dtype}; {_RESAVE}")
    return TensorSpec(name, dtype, shape, begin, nbytes)


def _checked_dtype(where: str, dtype: Any) -> str:
    if isinstance(dtype, str) and dtype in ITEM_BYTES:
        return dtype
    supported = ", ".join(ITEM_BYTES)
    if isinstance(dtype, str) and dtype.startswith(("F8", "F6", "F4", "C64")):
        raise InvalidModel(
            f"{where}: {_quoted(dtype)} cannot be averaged; convert it to BF16 or one of {supported}"
        )
    raise InvalidModel(f"{where}: dtype {_quoted(dtype)} is not known; use one of {supported}")


def _integers(where: str, key: str, values: Any, most: int) -> list[int]:
    """Check a JSON array of sizes: true integers (bool is an int to Python), not negative, in 63 bits."""
    if not isinstance(values, list) or len(values) > most:
        raise InvalidModel(f"{where}: {key} must be an array of at most {most} integers; {_RESAVE}")
    for value in values:
        if type(value) is not int or not 0 <= value <= _LARGEST_INT:
            raise InvalidModel(f"{where}: {key} must hold integers from 0 to 2**63-1; {_RESAVE}")
    return values


def _product(where: str, shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
        if count > _LARGEST_INT:
            raise InvalidModel(f"{where}: a shape of more than 2**63-1 items is impossible; {_RESAVE}")
    return count


def _by_place(tensor: TensorSpec) -> tuple[int, int, str]:
    return tensor.offset, tensor.nbytes, tensor.name


def _check_cover(tensors: Iterable[TensorSpec]) -> int:
    """Check that tensors in offset order touch without gaps from offset 0, and return where they end."""
    end = 0
    previous = "the start"
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlap" if tensor.offset < end else f"leave a hole of {tensor.offset - end} bytes"
            raise InvalidModel(
                f"{previous} and tensor {_quoted(tensor.name)} {what} at byte {min(tensor.offset, end)} "
                f"of the data section; {_RESAVE}"
            )
        end += tensor.nbytes
        previous = f"tensor {_quoted(tensor.name)}"
    return end


def _runs(tensors: Iterable[TensorSpec]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for tensor in tensors:
        if tensor.nbytes == 0:
            continue
        if runs and runs[-1].dtype == tensor.dtype:
            runs[-1] = replace(runs[-1], count=runs[-1].count + tensor.count)
        else:
            runs.append(Run(tensor.dtype, tensor.offset, tensor.count))
    return tuple(runs)


def _quoted(value: Any) -> str:
    """A client's text for an error: quoted, plain ASCII, short."""
    text = ascii(value)
    return text if len(text) <= 100 else text[:97] + "..."


# --- writing a header ----------------------------------------------------------------------------------------


def encode_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    align: int = 64,
) -> bytes:
    """Build the JSON header for `tensors`, a mapping of name to (dtype, shape), as safetensors lays them out.

    The data section holds the tensors by dtype, wide ones first, then by name: the order of the safetensors
    library, which makes one run of each dtype. The header is padded with spaces so that the data section
    begins, 8 length bytes included, at a multiple of `align` bytes. Returns the header without the 8 bytes.
    Raises InvalidModel for what `parse_header` would refuse.
    """
    entries: dict[str, Any] = {}
    if metadata is not None:
        entries["__metadata__"] = dict(metadata)
    offset = 0
    for name in sorted(tensors, key=lambda name: (-_DTYPE_RANK.get(tensors[name][0], 0), name)):
        dtype, shape = tensors[name]
        where = f"tensor {_quoted(name)}"
        if name == "__metadata__":
            raise InvalidModel("a tensor cannot be named __metadata__; rename it")
        sizes = _integers(where, "shape", list(shape), _LARGEST_RANK)
        nbytes = _product(where, sizes) * ITEM_BYTES[_checked_dtype(where, dtype)]
        entries[name] = {"dtype": dtype, "shape": sizes, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    try:
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidModel("a tensor name or the metadata is not valid Unicode; rename it") from None
    header += b" " * (-(8 + len(header)) % align)
    parse_header(header, offset)
    return header


# --- folding one layout into another -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of one payload that is added to a span of one run of the model.

    `source_offset` is in bytes of the payload, `target_start` in items of run `target_run` of the model,
    `count` in items; `dtype` is what the payload holds.
    """

    source_offset: int
    target_run: int
    target_start: int
    count: int
    dtype: str


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """How payloads of one layout fold into a model: for each run of the model, its segments in target order.

    The segments of a run cover each of its items exactly once. `source_bytes` is the length of a payload.
    """

    segments: tuple[Segment, ...]
    by_run: tuple[tuple[Segment, ...], ...]
    source_bytes: int
    is_identity: bool
    """True if payloads have the model's dtypes and order, so that each run is one segment in place."""


def plan_update(model: ModelLayout, update: ModelLayout) -> FoldPlan:
    """Check that an update fits the model and plan how it folds; the order of its tensors is free.

    Float tensors must have the model's dtype, or F16 or BF16 where the model has F32 or F64; integers and bools
    must have the model's dtype. Raises InvalidModel that lists the first tensors that do not fit.
    """
    sources = {tensor.name: tensor for tensor in update.tensors}
    _check_names(model, sources)
    _check_tensors(model, sources)
    segments: list[Segment] = []
    run, start = 0, 0
    for tensor in model.tensors:
        if tensor.nbytes == 0:
            continue
        if start == model.runs[run].count:
            run, start = run + 1, 0
        source = sources[tensor.name]
        _append_segment(segments, Segment(source.offset, run, start, tensor.count, source.dtype))
        start += tensor.count
    return _plan(model, segments, update.payload_bytes)


def _append_segment(segments: list[Segment], segment: Segment) -> None:
    """Append, or lengthen the last segment if this one continues it in the payload and in the run."""
    if segments:
        last = segments[-1]
        source_end = last.source_offset + last.count * ITEM_BYTES[last.dtype]
        if (last.target_run, last.dtype, source_end) == (segment.target_run, segment.dtype, segment.source_offset):
            segments[-1] = replace(last, count=last.count + segment.count)
            return
    segments.append(segment)


def _plan(model: ModelLayout, segments: Sequence[Segment], source_bytes: int) -> FoldPlan:
    by_run: list[list[Segment]] = [[] for _ in model.runs]
    for segment in segments:
        by_run[segment.target_run].append(segment)
    in_place = tuple(Segment(run.offset, i, 0, run.count, run.dtype) for i, run in enumerate(model.runs))
    return FoldPlan(tuple(segments), tuple(map(tuple, by_run)), source_bytes, tuple(segments) == in_place)


def _check_names(model: ModelLayout, sources: Mapping[str, TensorSpec]) -> None:
    expected = {tensor.name for tensor in model.tensors}
    missing = [tensor.name for tensor in model.tensors if tensor.name not in sources]
    unexpected = [name for name in sources if name not in expected]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"missing: {_listed(map(_quoted, missing), len(missing))}")
        if unexpected:
            parts.append(f"unexpected: {_listed(map(_quoted, unexpected), len(unexpected))}")
        raise InvalidModel(
            f"the update does not have the tensors of the job's model ({'; '.join(parts)}); "
            "send a state dict of the model that the job was created with"
        )


def _check_tensors(model: ModelLayout, sources: Mapping[str, TensorSpec]) -> None:
    wrong = []
    for tensor in model.tensors:
        source = sources[tensor.name]
        if source.shape != tensor.shape or not _dtype_fits(tensor.dtype, source.dtype):
            wrong.append(
                f"{_quoted(tensor.name)} is {source.dtype}{list(source.shape)}, "
                f"the model has {tensor.dtype}{list(tensor.shape)}"
            )
    if wrong:
        raise InvalidModel(
            f"the update does not fit the job's model: {_listed(wrong, len(wrong), '; ')}; float tensors need the "
            "model's dtype, or F16 or BF16 where the model has F32 or F64, and all others exactly the model's"
        )


def _dtype_fits(model_dtype: str, update_dtype: str) -> bool:
    return update_dtype == model_dtype or (model_dtype in ("F32", "F64") and update_dtype in COMPRESSED_DTYPES)


def _listed(items: Iterable[str], count: int, separator: str = ", ") -> str:
    shown = [item for item, _ in zip(items, range(_SHOWN), strict=False)]
    more = [f"and {count - _SHOWN} more"] if count > _SHOWN else []
    return separator.join(shown + more)


@dataclass(frozen=True, slots=True)
class SumRun:
    """Where the sums of one run of the model lie in an accumulator: `dtype` F32 or F64, `offset` in bytes."""

    dtype: Literal["F32", "F64"]
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class AccumulatorLayout:
    """Where the weighted sums of each run of `model` lie in an accumulator buffer of `nbytes` bytes.

    `sums[i]` belongs to `model.runs[i]`: F16, BF16 and F32 are summed in float32 (float64 if `precision` is
    'float64'), F64, integers and bools in float64. Each run begins at a multiple of `RUN_ALIGNMENT` bytes, and
    `nbytes` is one too; the padding between runs is never read.
    """

    model: ModelLayout
    precision: Precision = "float32"
    sums: tuple[SumRun, ...] = field(init=False, compare=False, repr=False)
    nbytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "float64"):
            raise ValueError(f"precision is 'float32' or 'float64', not {self.precision!r}")
        sums = []
        offset = 0
        for run in self.model.runs:
            single = run.dtype in ("F16", "BF16", "F32") and self.precision == "float32"
            dtype: Literal["F32", "F64"] = "F32" if single else "F64"
            sums.append(SumRun(dtype, offset, run.count))
            offset += -(-run.count * ITEM_BYTES[dtype] // RUN_ALIGNMENT) * RUN_ALIGNMENT
        object.__setattr__(self, "sums", tuple(sums))
        object.__setattr__(self, "nbytes", offset)

    def plan(self) -> FoldPlan:
        """The plan that folds a partial aggregate, a buffer of this layout, into another one."""
        segments = [Segment(run.offset, i, 0, run.count, run.dtype) for i, run in enumerate(self.sums)]
        return _plan(self.model, segments, self.nbytes)

"""Weighted sums of K vectors in one pass over memory, compiled for this machine's CPU by LLVM.

    out[i] = old[i] + weights[0] * inputs[0][i] + ... + weights[K-1] * inputs[K-1][i]

A fold is bound by memory, so the kernels exist to touch memory once: every input is read once, the sums stay
in registers, and the result is written with non-temporal stores, which spare the read that a plain store to
a line outside the cache costs. Up to `REGISTER_ROWS` inputs are read side by side; more than that defeat
the hardware prefetcher, so then a tile of the sums stays in the L1 cache and the inputs pass over it in groups
of `GROUP_ROWS`. Whether every result is finite is found in the same pass (an integer maximum over the bits
without the sign: infinities and NaNs are the largest).

The IR is generated as text and compiled at first use (about 20 ms a kernel) or, many at once, in `warm_up`.
Nothing here knows of models: addresses, weights and a count go in. Callers keep the buffers alive and check
their bounds.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import llvmlite.binding as llvm

Dtype = Literal["F32", "F16", "BF16", "F64"]
AccumulateDtype = Literal["F32", "F64"]

REGISTER_ROWS: Final = 8
"""Most inputs that one pass reads side by side, all sums in registers."""
GROUP_ROWS: Final = 4
"""Inputs read side by side when the sums are kept in a tile."""
TILE_BYTES: Final = 32 * 1024
"""Size of the tile of sums on the stack: fits the L1 data cache of every CPU in use, with room for inputs."""
STREAM_BYTES: Final = 1 << 20
"""From this size on results are written past the caches; smaller results are likely to be read again soon."""

_CACHE_LINE: Final = 64
_UNROLL: Final = 4
_ITEM_BYTES: Final = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
# bfloat16 is loaded as an integer and shifted: exact, and fast on CPUs without bfloat16 instructions too.
_STORAGE: Final = {"F16": "half", "BF16": "i16", "F32": "float", "F64": "double"}
_ARITHMETIC: Final = {"F32": "float", "F64": "double"}
_BITS: Final = {"F32": "i32", "F64": "i64"}
_SUFFIX: Final = {"float": "f32", "double": "f64", "i32": "i32", "i64": "i64"}
_MAGNITUDE_MASK: Final = {"F32": 0x7FFFFFFF, "F64": 0x7FFFFFFFFFFFFFFF}
_INFINITY_BITS: Final = {"F32": 0x7F800000, "F64": 0x7FF0000000000000}

_ENTRY_TYPE: Final = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    ctypes.c_void_p,  # out
    ctypes.c_void_p,  # old
    ctypes.c_void_p,  # array of K input addresses
    ctypes.c_void_p,  # array of K float64 weights
    ctypes.c_int64,  # K
    ctypes.c_int64,  # elements
)
_READ_TYPE: Final = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
# A ctypes function is Any to type checkers; the kernels' own signatures are fixed by the two types above.
_Entry = Callable[..., int]


class _Key(NamedTuple):
    """What a compiled kernel is specialised for; `rows` is the size of the first group if `tiled`."""

    dtype: str
    accumulate_dtype: str
    rows: int
    with_old: bool
    streaming: bool
    tiled: bool


# --- calling -------------------------------------------------------------------------------------------------


def weighted_sum(
    out_address: int,
    input_addresses: Sequence[int],
    weights: Sequence[float],
    count: int,
    *,
    dtype: Dtype,
    accumulate_dtype: AccumulateDtype,
    old_address: int = 0,
) -> bool:
    """Write `old + sum of weights[k] * inputs[k]` to `out` and tell whether every result is finite.

    `out` and `old` hold `count` elements of `accumulate_dtype`, each input `count` elements of `dtype`.
    `old_address` 0 means there is no old value. `out` may be the very same buffer as `old` (or as an input of
    the same dtype), otherwise it must not overlap anything. The arithmetic is fused multiply-add (where the
    CPU has it) in `accumulate_dtype`, in the order of the inputs, the same for every element; weights are
    rounded to `accumulate_dtype`. `out` must be aligned to its item size; inputs and `old` need no alignment.

    The call releases the GIL and may run in several threads at once on different results.
    Raises ValueError for a dtype pair that has no kernel (on x86 F16 needs F16C), no inputs,
    or a misaligned `out`.
    """
    rows = len(input_addresses)
    if rows == 0 or rows != len(weights):
        raise ValueError(f"weighted_sum needs as many weights as inputs, at least one: {rows}, {len(weights)}")
    if count <= 0:
        if count < 0:
            raise ValueError(f"weighted_sum needs a count of at least 0, not {count}")
        return True
    item_bytes = _ITEM_BYTES[accumulate_dtype]
    if out_address % item_bytes:
        raise ValueError(f"the result at {out_address:#x} is not aligned to its {item_bytes}-byte items")
    tiled = rows > REGISTER_ROWS
    key = _Key(
        dtype,
        accumulate_dtype,
        (rows - 1) % GROUP_ROWS + 1 if tiled else rows,
        old_address != 0,
        count * item_bytes >= STREAM_BYTES,
        tiled,
    )
    entry = _entries.get(key)
    if entry is None:
        _compile([key])
        entry = _entries[key]
    addresses = _address_array(rows)(*input_addresses)
    factors = _weight_array(rows)(*weights)
    return entry(out_address, old_address, addresses, factors, rows, count) != 0


def read_limit(address: int, nbytes: int) -> int:
    """Read `nbytes` bytes at `address` once, as fast as one core can, and return the OR of all of it.

    The yardstick for the kernels: vector loads only, several independent accumulators, no stores.
    Bytes beyond the last whole block of 8 vectors are left out.
    """
    global _read_entry
    if _read_entry is None:
        with _lock:
            _read_entry = _READ_TYPE(_load(_read_module()).get_function_address("read"))
    return int(_read_entry(address, nbytes))


def warm_up(
    dtypes: Iterable[tuple[Dtype, AccumulateDtype]] = (("F32", "F32"),),
    *,
    streaming: Iterable[bool] = (True, False),
) -> None:
    """Compile every kernel of these (dtype, accumulate dtype) pairs, so that children forked later have them.

    Covers any number of inputs, with and without an old value. `streaming` chooses between results of at least
    `STREAM_BYTES` (True) and smaller ones (False). Raises ValueError for a pair that has no kernel.
    """
    sizes = tuple(streaming)
    for dtype, accumulate_dtype in dtypes:
        _compile(
            [
                _Key(dtype, accumulate_dtype, rows, with_old, streams, tiled)
                for streams in sizes
                for with_old in (False, True)
                for tiled, most in ((False, REGISTER_ROWS), (True, GROUP_ROWS))
                for rows in range(1, most + 1)
            ]
        )


@lru_cache(maxsize=256)
def _address_array(rows: int) -> type[ctypes.Array[ctypes.c_uint64]]:
    return ctypes.c_uint64 * rows


@lru_cache(maxsize=256)
def _weight_array(rows: int) -> type[ctypes.Array[ctypes.c_double]]:
    return ctypes.c_double * rows


# --- compiling -----------------------------------------------------------------------------------------------

_lock = threading.Lock()
_entries: dict[_Key, _Entry] = {}
_read_entry: _Entry | None = None
_engines: list[Any] = []  # own the machine code of the kernels


def _replace_lock_after_fork() -> None:
    """Give a child a free lock: another thread of the parent may have been compiling at the fork."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_replace_lock_after_fork)


def _compile(keys: Sequence[_Key]) -> None:
    """Compile those kernels of one dtype pair, in one module, that no thread has compiled yet."""
    with _lock:
        missing = [key for key in keys if key not in _entries]
        if missing:
            engine = _load(_module(missing))
            for key in missing:
                _entries[key] = _ENTRY_TYPE(engine.get_function_address(_entry_name(key)))


def _load(text: str) -> Any:
    """Compile a module of IR text and return its engine, which is kept for ever; the lock is held."""
    module = llvm.parse_assembly(text)
    module.verify()
    engine = llvm.create_mcjit_compiler(module, _machine().target_machine())
    engine.finalize_object()
    _engines.append(engine)
    return engine


@dataclass(frozen=True)
class _Machine:
    """The CPU that the kernels are compiled for."""

    triple: str
    cpu: str
    features: str
    vector_bytes: int

    @property
    def is_x86(self) -> bool:
        return self.triple.startswith(("x86_64", "i686", "amd64"))

    def target_machine(self) -> Any:
        target = llvm.Target.from_triple(self.triple)
        return target.create_target_machine(cpu=self.cpu, features=self.features, opt=3, jit=True)

    def store_fence(self) -> str:
        """Order non-temporal stores before what the caller publishes next; x86 does not do so by itself."""
        return "call void @llvm.x86.sse.sfence()" if self.is_x86 else "fence release"


@lru_cache(maxsize=1)
def _machine() -> _Machine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    vector_bytes = 64 if features.get("avx512f") else 32 if features.get("avx2") else 16
    return _Machine(llvm.get_process_triple(), llvm.get_host_cpu_name(), features.flatten(), vector_bytes)


# --- generating IR -------------------------------------------------------------------------------------------


def _vector(lanes: int, element: str) -> str:
    return element if lanes == 1 else f"<{lanes} x {element}>"


def _constant(lanes: int, element: str, value: int) -> str:
    if lanes == 1:
        return str(value)
    return "<" + ", ".join([f"{element} {value}"] * lanes) + ">"


def _overload(lanes: int, element: str) -> str:
    """Suffix of an LLVM intrinsic for this type, such as v16f32."""
    return _SUFFIX[element] if lanes == 1 else f"v{lanes}{_SUFFIX[element]}"


def _entry_name(key: _Key) -> str:
    return f"{'tiled' if key.tiled else 'plain'}_{_sum_name(key.rows, key.with_old, key.streaming)}"


def _sum_name(rows: int, with_old: bool, streaming: bool) -> str:
    return f"sum_{rows}{'_old' if with_old else ''}{'_streaming' if streaming else ''}"


def _module(keys: Sequence[_Key]) -> str:
    """IR of the entries for `keys`, all of one dtype pair, and of the functions that they share."""
    dtype, accumulate_dtype = keys[0].dtype, keys[0].accumulate_dtype
    if dtype not in _STORAGE or accumulate_dtype not in _ARITHMETIC:
        raise ValueError(f"there is no fold kernel from {dtype} to {accumulate_dtype}")
    if dtype == "F64" and accumulate_dtype == "F32":
        raise ValueError("float64 inputs are accumulated in float64, never in float32")
    machine = _machine()
    if dtype == "F16" and machine.is_x86 and "+f16c" not in machine.features:
        # LLVM would call a library function for each item, which the JIT may not even find.
        raise ValueError("this CPU cannot convert float16 (no F16C); send BF16 or F32")
    writer = _Writer(dtype, accumulate_dtype, machine)
    sums: dict[tuple[int, bool, bool], None] = {}  # an ordered set
    entries = []
    for key in keys:
        if key.tiled:
            sums |= {(key.rows, key.with_old, False): None}
            sums |= {(GROUP_ROWS, True, False): None, (GROUP_ROWS, True, key.streaming): None}
            entries.append(writer.tiled_entry(key))
        else:
            sums |= {(key.rows, key.with_old, key.streaming): None}
            entries.append(writer.plain_entry(key))
    functions = [writer.row_sum(*arguments) for arguments in sums]
    return "\n".join([*functions, *entries, writer.declarations()])


class _Writer:
    """Writes the IR of the kernels for one pair of dtypes and one CPU."""

    def __init__(self, dtype: str, accumulate_dtype: str, machine: _Machine) -> None:
        self.dtype = dtype
        self.machine = machine
        self.storage = _STORAGE[dtype]
        self.number = _ARITHMETIC[accumulate_dtype]
        self.bits = _BITS[accumulate_dtype]
        self.item_bytes = _ITEM_BYTES[accumulate_dtype]
        self.lanes = machine.vector_bytes // self.item_bytes
        self.mask = _MAGNITUDE_MASK[accumulate_dtype]
        self.infinity = _INFINITY_BITS[accumulate_dtype]
        self.tile_items = TILE_BYTES // self.item_bytes

    def declarations(self) -> str:
        lines = [
            "declare i64 @llvm.umin.i64(i64, i64)",
            f"declare {self.bits} @llvm.vector.reduce.umax.{_overload(self.lanes, self.bits)}"
            f"({_vector(self.lanes, self.bits)})",
        ]
        for lanes in (1, self.lanes):
            number, bits = _vector(lanes, self.number), _vector(lanes, self.bits)
            lines += [
                f"declare {number} @llvm.fmuladd.{_overload(lanes, self.number)}({number}, {number}, {number})",
                f"declare {bits} @llvm.umax.{_overload(lanes, self.bits)}({bits}, {bits})",
            ]
        if self.machine.is_x86:
            lines.append("declare void @llvm.x86.sse.sfence()")
        width = self.machine.vector_bytes * 8
        # Without these LLVM halves 512-bit vectors on CPUs that it deems better off with 256 bits.
        lines.append(
            f'attributes #0 = {{ nounwind "min-legal-vector-width"="{width}" "prefer-vector-width"="{width}" }}'
        )
        lines.append("!0 = !{i32 1}")
        return "\n".join(lines)

    def row_sum(self, rows: int, with_old: bool, streaming: bool) -> str:
        """IR of `sum_N(out, old, rows, weights, start, count)` for a fixed number of rows.

        out[j] = old[j] + sum of weights[k] * rows[k][start + j], j < count; returns 1 if all are finite.
        Four loops share j: items up to the first cache line of `out`, blocks of vectors, vectors, items.
        """
        lines = [
            f"define internal i32 @{_sum_name(rows, with_old, streaming)}",
            "(ptr %out, ptr %old, ptr %rows, ptr %weights, i64 %start, i64 %count) #0",
            "{",
            "entry:",
        ]
        for row in range(rows):
            lines += self._row_setup(row)
        lines += [
            "%address = ptrtoint ptr %out to i64",
            "%negative = sub i64 0, %address",
            f"%ahead = and i64 %negative, {_CACHE_LINE - 1}",
            f"%items = lshr i64 %ahead, {self.item_bytes.bit_length() - 1}",
            "%head = call i64 @llvm.umin.i64(i64 %items, i64 %count)",
            "br label %head.enter",
        ]
        one = self.lanes
        lines += self._loop("head", "0", "%head", 1, 1, rows, with_old, False, "block")
        lines += self._loop("block", "%head.i", "%count", one, _UNROLL, rows, with_old, streaming, "single")
        lines += self._loop("single", "%block.i", "%count", one, 1, rows, with_old, streaming, "tail")
        lines += self._loop("tail", "%single.i", "%count", 1, 1, rows, with_old, False, "finish")
        vector_bits = _vector(self.lanes, self.bits)
        vector_max = f"@llvm.umax.{_overload(self.lanes, self.bits)}"
        scalar_max = f"@llvm.umax.{_SUFFIX[self.bits]}"
        reduce = f"@llvm.vector.reduce.umax.{_overload(self.lanes, self.bits)}"
        bits = self.bits
        lines += [
            "finish.enter:",
            f"%vectors = call {vector_bits} {vector_max}({vector_bits} %block.bits, {vector_bits} %single.bits)",
            f"%body = call {bits} {reduce}({vector_bits} %vectors)",
            f"%ends = call {bits} {scalar_max}({bits} %head.bits, {bits} %tail.bits)",
            f"%largest = call {bits} {scalar_max}({bits} %body, {bits} %ends)",
            f"%finite = icmp ult {bits} %largest, {self.infinity}",
            "%result = zext i1 %finite to i32",
            "ret i32 %result",
            "}",
        ]
        return "\n".join(lines)

    def _row_setup(self, row: int) -> list[str]:
        """Load the address and the weight of one row: %row.N, %weight.N.1 and the vector %weight.N.LANES."""
        vector = _vector(self.lanes, self.number)
        lines = [
            f"%row.{row}.slot = getelementptr ptr, ptr %rows, i64 {row}",
            f"%row.{row}.begin = load ptr, ptr %row.{row}.slot, align 8",
            f"%row.{row} = getelementptr {self.storage}, ptr %row.{row}.begin, i64 %start",
            f"%weight.{row}.slot = getelementptr double, ptr %weights, i64 {row}",
            f"%weight.{row}.double = load double, ptr %weight.{row}.slot, align 8",
        ]
        if self.number == "float":
            lines.append(f"%weight.{row}.1 = fptrunc double %weight.{row}.double to float")
        else:  # IR has no plain copy; adding -0.0 changes nothing
            lines.append(f"%weight.{row}.1 = fadd double %weight.{row}.double, -0.0")
        return [
            *lines,
            f"%weight.{row}.lane = insertelement {vector} poison, {self.number} %weight.{row}.1, i32 0",
            f"%weight.{row}.{self.lanes} = shufflevector {vector} %weight.{row}.lane, {vector} poison, "
            f"<{self.lanes} x i32> zeroinitializer",
        ]

    def _loop(
        self,
        name: str,
        begin: str,
        end: str,
        lanes: int,
        unroll: int,
        rows: int,
        with_old: bool,
        streaming: bool,
        then: str,
    ) -> list[str]:
        """A loop over `lanes * unroll` items at a time while they fit before `end`; leaves %name.i, .bits."""
        bits = _vector(lanes, self.bits)
        zero = "0" if lanes == 1 else "zeroinitializer"
        last_bits = f"%{name}.bits.{unroll - 1}"
        return [
            f"{name}.enter:",
            f"br label %{name}.check",
            f"{name}.check:",
            f"%{name}.i = phi i64 [ {begin}, %{name}.enter ], [ %{name}.next, %{name}.body ]",
            f"%{name}.bits = phi {bits} [ {zero}, %{name}.enter ], [ {last_bits}, %{name}.body ]",
            f"%{name}.next = add i64 %{name}.i, {lanes * unroll}",
            f"%{name}.fits = icmp sle i64 %{name}.next, {end}",
            f"br i1 %{name}.fits, label %{name}.body, label %{then}.enter",
            f"{name}.body:",
            *self._sums(name, lanes, unroll, rows, with_old),
            *self._stores(name, lanes, unroll, rows, streaming),
            f"br label %{name}.check",
        ]

    def _sums(self, name: str, lanes: int, unroll: int, rows: int, with_old: bool) -> list[str]:
        """Load and add up; the sum of step u ends in %name.sum.u.ROWS."""
        number = _vector(lanes, self.number)
        fused = f"@llvm.fmuladd.{_overload(lanes, self.number)}"
        lines = []
        for u in range(unroll):
            lines.append(f"%{name}.at.{u} = add i64 %{name}.i, {u * lanes}")
            if with_old:
                lines += [
                    f"%{name}.old.{u} = getelementptr {self.number}, ptr %old, i64 %{name}.at.{u}",
                    f"%{name}.sum.{u}.0 = load {number}, ptr %{name}.old.{u}, align 1",
                ]
        # One row after the other: each contributes whole cache lines, in the order in which they lie.
        for row in range(rows):
            for u in range(unroll):
                lines += self._load(f"{name}.x.{u}.{row}", f"%row.{row}", f"%{name}.at.{u}", lanes)
                operands = f"{number} %weight.{row}.{lanes}, {number} %{name}.x.{u}.{row}"
                result = f"%{name}.sum.{u}.{row + 1}"
                if row == 0 and not with_old:
                    lines.append(f"{result} = fmul {operands.replace(f', {number}', ',')}")
                else:
                    lines.append(f"{result} = call {number} {fused}({operands}, {number} %{name}.sum.{u}.{row})")
        return lines

    def _load(self, result: str, base: str, index: str, lanes: int) -> list[str]:
        """Load `lanes` stored items and widen them to the arithmetic type as %result."""
        number, stored = _vector(lanes, self.number), _vector(lanes, self.storage)
        lines = [
            f"%{result}.at = getelementptr {self.storage}, ptr {base}, i64 {index}",
        ]
        load = f"load {stored}, ptr %{result}.at, align 1"
        if self.dtype == "BF16":
            wide, single = _vector(lanes, "i32"), _vector(lanes, "float")
            lines += [
                f"%{result}.raw = {load}",
                f"%{result}.wide = zext {stored} %{result}.raw to {wide}",
                f"%{result}.high = shl {wide} %{result}.wide, {_constant(lanes, 'i32', 16)}",
            ]
            if self.number == "float":
                return [*lines, f"%{result} = bitcast {wide} %{result}.high to {number}"]
            return [
                *lines,
                f"%{result}.single = bitcast {wide} %{result}.high to {single}",
                f"%{result} = fpext {single} %{result}.single to {number}",
            ]
        if self.storage == self.number:
            return [*lines, f"%{result} = {load}"]
        return [*lines, f"%{result}.raw = {load}", f"%{result} = fpext {stored} %{result}.raw to {number}"]

    def _stores(self, name: str, lanes: int, unroll: int, rows: int, streaming: bool) -> list[str]:
        """Store the sums and fold their magnitudes, as integers, into the largest seen."""
        number, bits = _vector(lanes, self.number), _vector(lanes, self.bits)
        largest = f"@llvm.umax.{_overload(lanes, self.bits)}"
        mask = _constant(lanes, self.bits, self.mask)
        align = self.item_bytes if lanes == 1 else self.machine.vector_bytes
        lines = []
        previous = f"%{name}.bits"
        for u in range(unroll):
            total = f"%{name}.sum.{u}.{rows}"
            hint = ", !nontemporal !0" if streaming else ""
            lines += [
                f"%{name}.out.{u} = getelementptr {self.number}, ptr %out, i64 %{name}.at.{u}",
                f"store {number} {total}, ptr %{name}.out.{u}, align {align}{hint}",
                f"%{name}.raw.{u} = bitcast {number} {total} to {bits}",
                f"%{name}.size.{u} = and {bits} %{name}.raw.{u}, {mask}",
                f"%{name}.bits.{u} = call {bits} {largest}({bits} {previous}, {bits} %{name}.size.{u})",
            ]
            previous = f"%{name}.bits.{u}"
        return lines

    def plain_entry(self, key: _Key) -> str:
        """IR of the entry that takes all rows in one pass."""
        fence = self.machine.store_fence() if key.streaming else ""
        rows = _sum_name(key.rows, key.with_old, key.streaming)
        return f"""
define i32 @{_entry_name(key)}(ptr %out, ptr %old, ptr %rows, ptr %weights, i64 %row_count, i64 %count) #0 {{
  %finite = call i32 @{rows}(ptr %out, ptr %old, ptr %rows, ptr %weights, i64 0, i64 %count)
  {fence}
  ret i32 %finite
}}"""

    def tiled_entry(self, key: _Key) -> str:
        """IR of the entry for many rows: `first` makes a tile, `middle` adds to it, `last` writes it to out.

        The first tile is shorter where `out` does not begin a cache line, so that all others do.
        """
        first = _sum_name(key.rows, key.with_old, streaming=False)
        middle = _sum_name(GROUP_ROWS, with_old=True, streaming=False)
        last = _sum_name(GROUP_ROWS, with_old=True, streaming=key.streaming)
        fence = self.machine.store_fence() if key.streaming else ""
        shift = self.item_bytes.bit_length() - 1
        old_offset = "%start" if key.with_old else "0"
        return f"""
define i32 @{_entry_name(key)}(ptr %out, ptr %old, ptr %rows, ptr %weights, i64 %row_count, i64 %count) #0 {{
entry:
  %tile = alloca [{self.tile_items} x {self.number}], align {_CACHE_LINE}
  %last_row = sub i64 %row_count, {GROUP_ROWS}
  %last_rows = getelementptr ptr, ptr %rows, i64 %last_row
  %last_weights = getelementptr double, ptr %weights, i64 %last_row
  br label %tile.check
tile.check:
  %start = phi i64 [ 0, %entry ], [ %next, %tile.end ]
  %finite = phi i32 [ 1, %entry ], [ %still, %tile.end ]
  %left = sub i64 %count, %start
  %more = icmp sgt i64 %left, 0
  br i1 %more, label %tile.first, label %done
tile.first:
  %out.here = getelementptr {self.number}, ptr %out, i64 %start
  %old.here = getelementptr {self.number}, ptr %old, i64 {old_offset}
  %address = ptrtoint ptr %out.here to i64
  %behind = and i64 %address, {_CACHE_LINE - 1}
  %short = lshr i64 %behind, {shift}
  %whole = sub i64 {self.tile_items}, %short
  %size = call i64 @llvm.umin.i64(i64 %whole, i64 %left)
  %next = add i64 %start, %size
  %0 = call i32 @{first}(ptr %tile, ptr %old.here, ptr %rows, ptr %weights, i64 %start, i64 %size)
  br label %group.check
group.check:
  %row = phi i64 [ {key.rows}, %tile.first ], [ %row.next, %group.body ]
  %again = icmp slt i64 %row, %last_row
  br i1 %again, label %group.body, label %tile.end
group.body:
  %row.next = add i64 %row, {GROUP_ROWS}
  %rows.here = getelementptr ptr, ptr %rows, i64 %row
  %weights.here = getelementptr double, ptr %weights, i64 %row
  %1 = call i32 @{middle}(ptr %tile, ptr %tile, ptr %rows.here, ptr %weights.here, i64 %start, i64 %size)
  br label %group.check
tile.end:
  %good = call i32 @{last}(ptr %out.here, ptr %tile, ptr %last_rows, ptr %last_weights, i64 %start, i64 %size)
  %still = and i32 %finite, %good
  br label %tile.check
done:
  {fence}
  ret i32 %finite
}}"""


def _read_module() -> str:
    """IR of `read(address, nbytes)`: an OR over whole blocks of 8 vectors of one stream."""
    machine = _machine()
    lanes = machine.vector_bytes // 8
    vector = f"<{lanes} x i64>"
    lanes_or = f"@llvm.vector.reduce.or.v{lanes}i64"
    count = 8
    block = count * machine.vector_bytes
    writer = _Writer("F32", "F32", machine)
    lines = [
        "define i64 @read(ptr %begin, i64 %nbytes) #0 {",
        "entry:",
        "br label %check",
        "check:",
        "%i = phi i64 [ 0, %entry ], [ %next, %body ]",
        *(f"%any.{u} = phi {vector} [ zeroinitializer, %entry ], [ %or.{u}, %body ]" for u in range(count)),
        f"%next = add i64 %i, {block}",
        "%fits = icmp sle i64 %next, %nbytes",
        "br i1 %fits, label %body, label %done",
        "body:",
    ]
    for u in range(count):
        lines += [
            f"%offset.{u} = add i64 %i, {u * machine.vector_bytes}",
            f"%at.{u} = getelementptr i8, ptr %begin, i64 %offset.{u}",
            f"%x.{u} = load {vector}, ptr %at.{u}, align 1",
            f"%or.{u} = or {vector} %any.{u}, %x.{u}",
        ]
    lines += ["br label %check", "done:", f"%all.0 = or {vector} %any.0, zeroinitializer"]
    lines += [f"%all.{u} = or {vector} %all.{u - 1}, %any.{u}" for u in range(1, count)]
    lines += [
        f"%result = call i64 {lanes_or}({vector} %all.{count - 1})",
        "ret i64 %result",
        "}",
        f"declare i64 {lanes_or}({vector})",
        writer.declarations(),
    ]
    return "\n".join(lines)

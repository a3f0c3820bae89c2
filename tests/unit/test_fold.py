"""The fold kernels and whole-payload folds against float64 arithmetic."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifl import fold_kernel
from lifl.fold import Fold
from lifl.fold_kernel import read_limit, weighted_sum
from lifl.model_layout import (
    ITEM_BYTES,
    AccumulatorLayout,
    ModelLayout,
    Precision,
    encode_header,
    parse_header,
    plan_update,
)
from numpy.typing import NDArray

Array = NDArray[Any]
SIZES = [1, 15, 16, 17, 63, 64, 65, 255, 8191, 8192, 8193, 100_003]
PAIRS: list[Any] = [
    ("F32", "F32"),
    ("F16", "F32"),
    ("BF16", "F32"),
    ("F32", "F64"),
    ("F16", "F64"),
    ("BF16", "F64"),
    ("F64", "F64"),
]
ACCUMULATE: dict[str, Any] = {"F32": np.float32, "F64": np.float64}
EPSILON = {"F32": 2.0**-24, "F64": 2.0**-53}
random = np.random.default_rng(7)


def address(array: Array) -> int:
    return int(array.ctypes.data)


def aligned(count: int, dtype: Any, offset: int = 0) -> Array:
    """A zeroed array whose address is `offset` bytes past a multiple of 64."""
    size = np.dtype(dtype).itemsize * count
    buffer = np.zeros(size + 192, np.uint8)
    start = -address(buffer) % 64 + offset
    return buffer[start : start + size].view(dtype)


def stored(values: Array, dtype: str) -> Array:
    """Values as a client stores them: bfloat16 as its 16 bits."""
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])


def exact(items: Array, dtype: str) -> Array:
    """Stored items in float64."""
    if dtype == "BF16":
        items = (items.astype(np.uint32) << 16).view(np.float32)
    return items.astype(np.float64)


def run_kernel(
    out: Array, inputs: list[Array], weights: list[float], pair: tuple[Any, Any], old: Array | None = None
) -> bool:
    return weighted_sum(
        address(out),
        [address(item) for item in inputs],
        weights,
        out.size,
        dtype=pair[0],
        accumulate_dtype=pair[1],
        old_address=0 if old is None else address(old),
    )


def check_kernel(count: int, rows: int, pair: tuple[Any, Any], with_old: bool, offset: int = 0) -> None:
    dtype, accumulate = pair
    inputs = [stored(random.standard_normal(count), dtype) for _ in range(rows)]
    weights = random.uniform(1, 100, rows).astype(ACCUMULATE[accumulate]).tolist()
    old = random.standard_normal(count).astype(ACCUMULATE[accumulate]) if with_old else None
    terms = [weight * exact(item, dtype) for weight, item in zip(weights, inputs, strict=True)]
    if old is not None:
        terms.append(old.astype(np.float64))
    guard = aligned(count + 2, ACCUMULATE[accumulate], offset)
    guard[[0, -1]] = 42
    out = guard[1:-1]
    assert run_kernel(out, inputs, weights, pair, old)
    bound = np.abs(terms).sum(axis=0) * EPSILON[accumulate] * (rows + 2)
    assert (np.abs(out - np.sum(terms, axis=0)) <= bound).all()
    assert (guard[[0, -1]] == 42).all(), "written beyond the result"


# --- kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", SIZES)
def test_a_kernel_gives_the_weighted_sum_at_every_size(count: int) -> None:
    for rows in (1, 2, 8, 9, 12, 64):
        for with_old in (False, True):
            check_kernel(count, rows, ("F32", "F32"), with_old)


@pytest.mark.parametrize("rows", [*range(1, 18), 63, 64, 65, 130])
def test_a_kernel_gives_the_weighted_sum_of_any_number_of_inputs(rows: int) -> None:
    check_kernel(8500, rows, ("F32", "F32"), with_old=rows % 2 == 0)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_kernel_takes_every_pair_of_dtypes(pair: Any) -> None:
    for rows in (1, 4, 11):
        for with_old in (False, True):
            check_kernel(8193 * 2, rows, pair, with_old)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_large_results_that_bypass_the_caches_are_right_too(pair: Any) -> None:
    for rows, with_old in ((2, False), (10, True)):
        check_kernel(fold_kernel.STREAM_BYTES // 4 + 77, rows, pair, with_old)


@pytest.mark.parametrize("offset", range(0, 64, 4))
def test_a_result_at_any_place_in_a_cache_line_is_right(offset: int) -> None:
    for count in (5, 300, 9000, 300_000):
        check_kernel(count, 3, ("F32", "F32"), with_old=True, offset=offset)
    check_kernel(9000, 9, ("F32", "F32"), with_old=True, offset=offset)


def test_inputs_at_odd_addresses_are_read_rightly() -> None:
    values = random.standard_normal(1000).astype(np.float32)
    raw = np.zeros(4001, np.uint8)
    raw[1:] = values.view(np.uint8)
    out = aligned(1000, np.float32)
    assert weighted_sum(address(out), [address(raw) + 1], [1.0], 1000, dtype="F32", accumulate_dtype="F32")
    np.testing.assert_array_equal(out, values)


@pytest.mark.parametrize("rows", [1, 8, 13])
@pytest.mark.parametrize("count", [100, 300_001])
def test_in_place_equals_out_of_place(rows: int, count: int) -> None:
    inputs = [random.standard_normal(count).astype(np.float32) for _ in range(rows)]
    old = random.standard_normal(count).astype(np.float32)
    out = aligned(count, np.float32)
    assert run_kernel(out, inputs, [0.3] * rows, ("F32", "F32"), old)
    assert run_kernel(old, inputs, [0.3] * rows, ("F32", "F32"), old)
    np.testing.assert_array_equal(out, old)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_item_is_found_wherever_it_is(pair: Any, bad: float) -> None:
    count = 8192 + 16 * 3 + 5
    out = aligned(count, ACCUMULATE[pair[1]], 8)
    for rows in (1, 3, 8, 11):
        inputs = [stored(random.standard_normal(count), pair[0]) for _ in range(rows)]
        for row in range(rows):
            # Head before the first cache line, blocks, the second tile, single vectors, tail.
            for place in (0, 15, 16, 77, 8000, 8190, count - 30, count - 1):
                good = inputs[row][place]
                inputs[row][place] = stored(np.array([bad]), pair[0])[0]
                assert not run_kernel(out, inputs, [1.0] * rows, pair)
                inputs[row][place] = good
        assert run_kernel(out, inputs, [1.0] * rows, pair)


def test_a_non_finite_old_value_or_weight_and_an_overflow_are_found() -> None:
    ones = np.ones(100, np.float32)
    out = aligned(100, np.float32)
    old = np.zeros(100, np.float32)
    old[50] = np.inf
    assert not run_kernel(out, [ones], [1.0], ("F32", "F32"), old)
    assert not run_kernel(out, [ones], [float("nan")], ("F32", "F32"))
    assert not run_kernel(out, [ones], [1e39], ("F32", "F32"))
    assert not run_kernel(out, [ones * 2e38, ones * 2e38], [1.0, 1.0], ("F32", "F32"))
    assert run_kernel(out, [np.full(100, 3.4e38, np.float32)], [1.0], ("F32", "F32"))


def test_what_a_kernel_cannot_do_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    out = aligned(4, np.float32)
    with pytest.raises(ValueError, match="no fold kernel"):
        run_kernel(out, [out], [1.0], ("I32", "F32"))
    with pytest.raises(ValueError, match="never in float32"):
        run_kernel(out, [out], [1.0], ("F64", "F32"))
    host = fold_kernel._machine()
    old_cpu = fold_kernel._Machine(host.triple, "x86-64", "", 16)
    monkeypatch.setattr(fold_kernel, "_machine", lambda: old_cpu)
    if host.is_x86:
        with pytest.raises(ValueError, match="F16C"):
            fold_kernel._module([fold_kernel._Key("F16", "F32", 1, False, False, False)])
    with pytest.raises(ValueError, match="as many weights"):
        run_kernel(out, [], [], ("F32", "F32"))
    with pytest.raises(ValueError, match="as many weights"):
        run_kernel(out, [out], [1.0, 2.0], ("F32", "F32"))
    with pytest.raises(ValueError, match="not aligned"):
        weighted_sum(address(out) + 1, [address(out)], [1.0], 1, dtype="F32", accumulate_dtype="F32")
    with pytest.raises(ValueError, match="at least 0"):
        weighted_sum(address(out), [address(out)], [1.0], -1, dtype="F32", accumulate_dtype="F32")
    assert weighted_sum(address(out), [address(out)], [1.0], 0, dtype="F32", accumulate_dtype="F32")


def test_kernels_run_in_several_threads_at_once() -> None:
    inputs = [random.standard_normal(200_000).astype(np.float32) for _ in range(6)]
    expected = aligned(200_000, np.float32)
    run_kernel(expected, inputs, [0.5] * 6, ("F32", "F32"))
    failures: list[int] = []

    def work(number: int) -> None:
        out = aligned(200_000, np.float32)
        for _ in range(10):
            out[:] = 0
            if not run_kernel(out, inputs, [0.5] * 6, ("F32", "F32")) or (out != expected).any():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_read_limit_reads_every_byte_of_whole_blocks() -> None:
    data = aligned(64 * 1024, np.uint8)
    assert read_limit(address(data), data.size) == 0
    for place in (0, 511, 512, 40_000, data.size - 1):
        data[place] = 1
        assert read_limit(address(data), data.size) != 0
        data[place] = 0


def test_a_forked_child_uses_the_kernels_that_its_parent_compiled() -> None:
    program = """
import os, array
from lifl import fold_kernel
fold_kernel.warm_up(streaming=[False])
compiled = len(fold_kernel._engines)
if os.fork() == 0:
    x, out = array.array("f", [1.5] * 100), array.array("f", [0.0] * 100)
    addresses = [x.buffer_info()[0]] * 9
    good = fold_kernel.weighted_sum(
        out.buffer_info()[0], addresses, [1.0] * 9, 100, dtype="F32", accumulate_dtype="F32"
    )
    os._exit(0 if good and set(out) == {13.5} and len(fold_kernel._engines) == compiled else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_generated_kernels_for_narrower_cpus_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    host = fold_kernel._machine()
    for vector_bytes in (16, 32):
        narrow = fold_kernel._Machine(host.triple, host.cpu, host.features, vector_bytes)
        monkeypatch.setattr(fold_kernel, "_machine", lambda narrow=narrow: narrow)
        monkeypatch.setattr(fold_kernel, "_entries", {})
        for pair in PAIRS:
            check_kernel(8500, 3, pair, True)
            check_kernel(8500, 9, pair, False)


# --- whole payloads --------------------------------------------------------------------------------------


def make_model(**tensors: tuple[str, tuple[int, ...]]) -> ModelLayout:
    return parse_header(encode_header(tensors))


def make_fold(model: ModelLayout, precision: Precision = "float32") -> Fold:
    return Fold(AccumulatorLayout(model, precision))


def payload(layout: ModelLayout, values: dict[str, Array]) -> Array:
    """A data section with these values, stored in the dtypes of the layout."""
    buffer = aligned(layout.payload_bytes, np.uint8)
    for tensor in layout.tensors:
        place = buffer[tensor.offset : tensor.offset + tensor.nbytes]
        place[:] = raw_items(values[tensor.name].reshape(-1), tensor.dtype).view(np.uint8)
    return buffer


def raw_items(values: Array, dtype: str) -> Array:
    if dtype in ("F16", "BF16", "F32", "F64"):
        return stored(values, dtype)
    return values.astype(
        {"I64": np.int64, "U8": np.uint8, "I8": np.int8, "BOOL": np.uint8, "U64": np.uint64}[dtype]
    )


def read_back(layout: ModelLayout, buffer: Array) -> dict[str, Array]:
    result = {}
    for tensor in layout.tensors:
        raw = buffer[tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.dtype in ("F16", "BF16", "F32", "F64"):
            numpy_dtype = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "F64": np.float64}
            result[tensor.name] = exact(raw.view(numpy_dtype[tensor.dtype]), tensor.dtype)
        else:
            result[tensor.name] = raw.view(
                {"I64": np.int64, "U8": np.uint8, "I8": np.int8, "BOOL": np.uint8, "U64": np.uint64}[tensor.dtype]
            )
    return result


def accumulator(fold: Fold) -> Array:
    return aligned(fold.accumulators.nbytes, np.uint8)


def permuted(model: ModelLayout, seed: int, compressed: bool = False) -> ModelLayout:
    """The same tensors in another order that keeps items aligned, perhaps with float16 for float32."""
    names = [tensor.name for tensor in model.tensors]
    np.random.default_rng(seed).shuffle(names)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    dtypes = {
        name: "F16" if compressed and tensor.dtype == "F32" else tensor.dtype for name, tensor in tensors.items()
    }
    names.sort(key=lambda name: -ITEM_BYTES[dtypes[name]])
    parts, offset = [], 0
    for name in names:
        nbytes = tensors[name].count * ITEM_BYTES[dtypes[name]]
        shape = list(tensors[name].shape)
        parts.append(
            f'"{name}":{{"dtype":"{dtypes[name]}","shape":{shape},"data_offsets":[{offset},{offset + nbytes}]}}'
        )
        offset += nbytes
    return parse_header(("{" + ",".join(parts) + "}").encode(), offset)


MIXED = make_model(
    weight=("F32", (37, 11)),
    bias=("F32", (5,)),
    scale=("F32", ()),
    gap=("F32", (0, 4)),
    wide=("F64", (9,)),
    half=("F16", (33,)),
    brain=("BF16", (21,)),
    steps=("I64", ()),
    mask=("BOOL", (6,)),
    level=("U8", (7,)),
)


def mixed_values(generator: np.random.Generator) -> dict[str, Array]:
    values: dict[str, Array] = {}
    for tensor in MIXED.tensors:
        if tensor.dtype in ("F16", "BF16", "F32", "F64"):
            # Three significant bits: exact in every float dtype, so that compressed uploads lose nothing.
            values[tensor.name] = generator.integers(-7, 8, tensor.count) * 0.125
        else:
            values[tensor.name] = generator.integers(0, 2 if tensor.dtype == "BOOL" else 200, tensor.count)
    return values


@given(
    count=st.integers(1, 64),
    seed=st.integers(0, 2**32 - 1),
    precision=st.sampled_from(["float32", "float64"]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_tree_order_and_layout_of_folds_gives_the_weighted_mean(
    count: int, seed: int, precision: Any, data: Any
) -> None:
    generator = np.random.default_rng(seed)
    fold = make_fold(MIXED, precision)
    weights = np.exp(generator.uniform(0, np.log(1e6), count)).round().tolist()
    updates = [mixed_values(generator) for _ in range(count)]
    layouts = [MIXED, permuted(MIXED, 1), permuted(MIXED, 2, compressed=True)]
    ready: list[Any] = []
    for values, weight in zip(updates, weights, strict=True):
        layout = layouts[int(generator.integers(0, 3))]
        ready.append(fold.update(payload(layout, values), plan_update(MIXED, layout), weight))
    while True:
        # Take some of what is ready, in any order, fold it in one or more steps, and put the partial back.
        generator.shuffle(ready)
        taken = [ready.pop() for _ in range(data.draw(st.integers(min(2, len(ready)), len(ready)), label="taken"))]
        out, old = accumulator(fold), None
        while taken:
            step = data.draw(st.integers(1, len(taken)), label="step")
            assert fold.fold(out, taken[:step], old)
            taken, old = taken[step:], out
        if not ready:
            break
        ready.append(fold.partial(out))
    total = float(sum(weights))
    model = aligned(MIXED.payload_bytes, np.uint8)
    assert fold.finish(model, [out], total)
    result = read_back(MIXED, model)
    rounding = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24, "F64": 2.0**-53}
    for tensor in MIXED.tensors:
        items = np.array([values[tensor.name] for values in updates], np.float64)
        mean = np.tensordot(weights, items, 1) / total
        size = np.tensordot(weights, np.abs(items), 1) / total
        if tensor.dtype in rounding:
            smallest = 2.0**-25 if tensor.dtype == "F16" else 0.0  # half a subnormal float16
            bound = 1e-6 * size + rounding[tensor.dtype] * np.abs(mean) * 1.001 + smallest
            assert (np.abs(result[tensor.name] - mean) <= bound).all(), tensor.name
        elif tensor.dtype == "BOOL":
            clear = np.abs(mean - 0.5) > 1e-9
            assert (result[tensor.name] == (mean >= 0.5))[clear].all()
        else:
            assert (np.abs(result[tensor.name] - mean) <= 0.5 + 1e-9).all()


def test_identical_updates_give_the_same_model_back() -> None:
    fold = make_fold(MIXED)
    update = payload(MIXED, mixed_values(random))
    plan = plan_update(MIXED, MIXED)
    out = accumulator(fold)
    assert fold.fold(out, [fold.update(update, plan, 4.0)] * 16)
    model = aligned(MIXED.payload_bytes, np.uint8)
    assert fold.finish(model, [out], 64.0)
    np.testing.assert_array_equal(model, update)


def test_several_accumulators_and_differences_to_the_previous_model_are_finished_together() -> None:
    for precision in ("float32", "float64"):
        fold = make_fold(MIXED, precision)
        plan = plan_update(MIXED, MIXED)
        first, second, before = (mixed_values(random) for _ in range(3))
        partials = []
        for values, weight in ((first, 3.0), (second, 1.0)):
            partials.append(accumulator(fold))
            assert fold.fold(partials[-1], [fold.update(payload(MIXED, values), plan, weight)])
        previous = payload(MIXED, before)
        for model in (aligned(MIXED.payload_bytes, np.uint8), previous):  # out of place, then in place
            assert fold.finish(model, partials, 4.0, previous, 4.0)
            result = read_back(MIXED, model)
            for name in ("weight", "wide", "half", "brain"):
                expected = before[name] + (3 * first[name] + second[name]) / 4
                np.testing.assert_allclose(result[name], expected, rtol=0.005, atol=1e-6)
            whole = np.rint(before["level"] + (3 * first["level"] + second["level"]) / 4)
            np.testing.assert_array_equal(result["level"], np.minimum(whole, 255))


SINGLES = make_model(weight=("F32", (129, 33)), bias=("F32", (7,)))


@pytest.mark.parametrize("sealed", [0, 1, 2])
@pytest.mark.parametrize("unfolded", [1, 2, 9])
@pytest.mark.parametrize("delta_share", [0.0, 0.5])
def test_updates_that_were_not_folded_can_become_part_of_the_model_at_once(
    sealed: int, unfolded: int, delta_share: float
) -> None:
    fold, plan = make_fold(SINGLES), plan_update(SINGLES, SINGLES)
    count = SINGLES.payload_bytes // 4
    updates = [random.standard_normal(count).astype(np.float32) for _ in range(sealed + unfolded)]
    weights = [1.0 + number for number in range(len(updates))]
    inputs = [fold.update(update, plan, weight) for update, weight in zip(updates, weights, strict=True)]
    partials = []
    for item in inputs[:sealed]:
        partials.append(accumulator(fold))
        assert fold.fold(partials[-1], [item])
    previous = random.standard_normal(count).astype(np.float32)
    total = sum(weights)
    model = aligned(count, np.float32)

    assert fold.finish(model, partials, total, previous, delta_share * total, inputs[sealed:])

    mean = sum(w * u.astype(np.float64) for w, u in zip(weights, updates, strict=True)) / total
    np.testing.assert_allclose(model, mean + delta_share * previous, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_model_of_unfolded_updates_tells_that_it_is_not_finite(bad: float) -> None:
    fold, plan = make_fold(SINGLES), plan_update(SINGLES, SINGLES)
    update = aligned(SINGLES.payload_bytes // 4, np.float32)
    update[-1] = bad

    assert not fold.finish(
        np.empty(SINGLES.payload_bytes, np.uint8), [], 1.0, inputs=[fold.update(update, plan, 1)]
    )


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_inputs_that_need_a_fold_first_are_told_from_others(precision: Precision) -> None:
    fold = make_fold(SINGLES, precision)
    straight, other = plan_update(SINGLES, SINGLES), plan_update(SINGLES, permuted(SINGLES, 3, compressed=True))
    assert fold.can_finish_with(straight) == (precision == "float32")
    assert not fold.can_finish_with(other)
    assert not make_fold(MIXED).can_finish_with(plan_update(MIXED, MIXED))
    update = fold.update(aligned(SINGLES.payload_bytes, np.uint8), other, 1.0)
    with pytest.raises(ValueError, match="has to be folded before"):
        fold.finish(aligned(SINGLES.payload_bytes, np.uint8), [], 1.0, inputs=[update])


def test_integers_round_half_to_even_and_clip_and_bools_need_half() -> None:
    model = make_model(i=("I8", (4,)), b=("BOOL", (4,)), u=("U64", (2,)), s=("I64", (2,)))
    fold = make_fold(model)
    plan = plan_update(model, model)
    top = {"u": np.array([2**64 - 1, 5], np.uint64), "s": np.array([2**63 - 1, -(2**63)], np.int64)}
    left = {"i": np.array([0, 1, -1, 127]), "b": np.array([0, 1, 1, 0])} | top
    right = {"i": np.array([1, 2, -2, 127]), "b": np.array([0, 0, 1, 1])} | top
    one, two = payload(model, left), payload(model, right)
    two[model.tensors[-1].offset + 2] = 200  # any byte but 0 is true
    out, result = accumulator(fold), aligned(model.payload_bytes, np.uint8)
    assert fold.fold(out, [fold.update(one, plan, 1.0), fold.update(two, plan, 1.0)])
    assert fold.finish(result, [out], 2.0)
    values = read_back(model, result)
    np.testing.assert_array_equal(values["i"], [0, 2, -2, 127])
    np.testing.assert_array_equal(values["b"], [0, 1, 1, 1])
    np.testing.assert_array_equal(values["u"], top["u"])
    np.testing.assert_array_equal(values["s"], top["s"])
    assert fold.finish(result, [out], 1.0)
    np.testing.assert_array_equal(read_back(model, result)["i"], [1, 3, -3, 127])
    np.testing.assert_array_equal(read_back(model, result)["s"], top["s"])


def test_bfloat16_is_rounded_like_torch() -> None:
    torch = pytest.importorskip("torch")
    count = 70_000
    model = make_model(x=("BF16", (count,)))
    fold = make_fold(model)
    out, result = accumulator(fold), aligned(model.payload_bytes, np.uint8)
    bits = random.integers(0, 2**32, count, dtype=np.uint32)
    bits[:4] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7FC00001]  # ties, overflow, NaN
    singles = bits.view(np.float32)
    out[: 4 * count].view(np.float32)[:] = singles
    assert not fold.finish(result, [out], 1.0)
    expected = torch.from_numpy(singles.copy()).to(torch.bfloat16)
    got = torch.from_numpy(result.view(np.int16).copy()).view(torch.bfloat16)
    number = ~expected.isnan()
    assert torch.equal(number, ~got.isnan())
    assert torch.equal(got[number], expected[number])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_value_beyond_the_range_of_the_model_is_not_finite(dtype: str) -> None:
    model = make_model(x=(dtype, (100_000,)))
    fold = make_fold(model)
    out, result = accumulator(fold), aligned(model.payload_bytes, np.uint8)
    assert fold.finish(result, [out], 1.0)
    out[: 4 * 100_000].view(np.float32)[99_999] = 3.4e38
    assert not fold.finish(result, [out], 1.0)


@pytest.mark.parametrize("name", ["weight", "scale", "wide", "half", "brain"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_culprit_of_a_non_finite_fold_is_found(name: str, bad: float) -> None:
    fold = make_fold(MIXED)
    layout = permuted(MIXED, 3)
    plan = plan_update(MIXED, layout)
    values = [mixed_values(random) for _ in range(3)]
    values[1][name][-1] = bad
    payloads = [payload(layout, item) for item in values]
    assert not fold.fold(accumulator(fold), [fold.update(item, plan, 2.0) for item in payloads])
    assert [fold.non_finite(item, plan, 2.0) for item in payloads] == [False, True, False]


def test_an_update_that_overflows_when_it_is_weighted_is_a_culprit() -> None:
    model = make_model(x=("F32", (100_000,)))
    fold = make_fold(model)
    update = payload(model, {"x": np.full(100_000, 1e38)})
    plan = plan_update(model, model)
    assert fold.non_finite(update, plan, 10.0)
    assert not fold.non_finite(update, plan, 1.0)


def test_read_only_updates_are_folded_and_read_only_results_refused() -> None:
    fold = make_fold(MIXED)
    update = payload(MIXED, mixed_values(random)).tobytes()
    item = fold.update(update, plan_update(MIXED, MIXED), 1.0)
    out = accumulator(fold)
    assert fold.fold(out.data, [item])
    with pytest.raises(ValueError, match="read-only"):
        fold.fold(bytes(out), [item])
    with pytest.raises(ValueError, match="read-only"):
        fold.finish(update, [out], 1.0)


def test_buffers_and_weights_that_cannot_be_right_are_errors() -> None:
    fold = make_fold(MIXED)
    plan = plan_update(MIXED, MIXED)
    update = payload(MIXED, mixed_values(random))
    space = aligned(3 * fold.accumulators.nbytes, np.uint8)
    out = space[: fold.accumulators.nbytes]
    item = fold.update(update, plan, 1.0)
    with pytest.raises(ValueError, match="are needed"):
        fold.update(update[:-1], plan, 1.0)
    with pytest.raises(ValueError, match="are needed"):
        fold.fold(out[:-1], [item])
    with pytest.raises(ValueError, match="must be finite"):
        fold.update(update, plan, float("inf"))
    other = make_model(x=("F32", (1,)))
    with pytest.raises(ValueError, match="another model"):
        fold.update(update, plan_update(other, other), 1.0)
    with pytest.raises(ValueError, match="at least one"):
        fold.fold(out, [])
    with pytest.raises(ValueError, match="at least one"):
        fold.finish(update, [], 1.0)
    with pytest.raises(ValueError, match="total weight"):
        fold.finish(update, [out], 0.0)
    with pytest.raises(ValueError, match="overlaps the old"):
        fold.fold(out, [item], space[64:])
    with pytest.raises(ValueError, match="overlaps an input"):
        fold.fold(out, [fold.partial(space[64:])])


def test_a_model_of_empty_tensors_folds_to_nothing() -> None:
    model = make_model(x=("F32", (0,)))
    fold = make_fold(model)
    item = fold.update(b"", plan_update(model, model), 1.0)
    assert fold.fold(b"", [item])
    assert fold.finish(b"", [b""], 1.0)


def test_warm_up_compiles_what_a_fold_needs() -> None:
    model = make_model(x=("F32", (300_000,)))
    fold = make_fold(model)
    fold.warm_up()
    compiled = set(fold_kernel._entries)
    update = payload(model, {"x": np.ones(300_000)})
    item = fold.update(update, plan_update(model, model), 1.0)
    out, result = accumulator(fold), aligned(model.payload_bytes, np.uint8)
    for rows in range(1, 20):
        assert fold.fold(out, [item] * rows)
        assert fold.fold(out, [item] * rows, out)
    assert fold.finish(result, [out], 38.0)
    assert set(fold_kernel._entries) == compiled

"""The safetensors header codec and the plans that fold one layout into another."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifl.errors import InvalidModel
from lifl.model_layout import (
    ITEM_BYTES,
    AccumulatorLayout,
    ModelLayout,
    Run,
    Segment,
    encode_header,
    parse_header,
    plan_update,
)
from safetensors.numpy import load, save

NUMPY = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
specs = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(st.sampled_from(sorted(NUMPY)), shapes),
    min_size=1,
    max_size=12,
)


def split(file: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack_from("<Q", file)
    return file[8 : 8 + length], file[8 + length :]


def layout(**tensors: tuple[str, tuple[int, ...]]) -> ModelLayout:
    return parse_header(encode_header(tensors))


def raw(entries: Any) -> bytes:
    return json.dumps(entries).encode()


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# --- against the safetensors library ---------------------------------------------------------------------


@given(specs)
@settings(max_examples=60, deadline=None)
def test_a_file_of_the_safetensors_library_is_read_as_it_was_written(spec: dict[str, Any]) -> None:
    arrays = {name: np.zeros(shape, NUMPY[dtype]) for name, (dtype, shape) in spec.items()}
    header, data = split(save(arrays, metadata={"round": "3"}))
    model = parse_header(header, len(data))
    assert {t.name: (t.dtype, t.shape) for t in model.tensors} == spec
    assert model.num_parameters == sum(array.size for array in arrays.values())
    assert model.payload_bytes == len(data)
    assert model.header == header


@given(specs)
@settings(max_examples=60, deadline=None)
def test_an_encoded_header_is_read_by_the_safetensors_library_and_has_its_layout(spec: dict[str, Any]) -> None:
    arrays = {
        name: np.random.default_rng(1).integers(0, 2, shape).astype(NUMPY[dtype])
        for name, (dtype, shape) in spec.items()
    }
    header = encode_header(spec, {"a": "b"})
    assert (8 + len(header)) % 64 == 0
    model = parse_header(header)
    library_header, data = split(save(arrays))
    assert model == parse_header(library_header, len(data))
    loaded = load(struct.pack("<Q", len(header)) + header + data)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


@given(specs)
@settings(max_examples=60, deadline=None)
def test_an_encoded_header_makes_one_run_of_each_dtype(spec: dict[str, Any]) -> None:
    model = parse_header(encode_header(spec))
    dtypes = [run.dtype for run in model.runs]
    assert len(dtypes) == len(set(dtypes))
    assert sum(run.nbytes for run in model.runs) == model.payload_bytes
    assert all(run.count > 0 for run in model.runs)


def test_bfloat16_0d_and_empty_tensors_are_accepted() -> None:
    model = layout(scalar=("F32", ()), nothing=("F32", (0, 3)), half=("BF16", (3,)))
    assert [(t.name, t.offset, t.nbytes) for t in model.tensors] == [
        ("nothing", 0, 0),
        ("scalar", 0, 4),
        ("half", 4, 6),
    ]
    assert model.runs == (Run("F32", 0, 1), Run("BF16", 4, 3))
    assert model.num_parameters == 4


def test_a_model_of_only_empty_tensors_has_no_runs() -> None:
    model = layout(nothing=("F32", (0,)))
    assert (model.runs, model.payload_bytes, model.num_parameters) == ((), 0, 0)
    assert AccumulatorLayout(model).nbytes == 0


def test_sizes_over_2_gib_are_exact() -> None:
    model = layout(big=("F32", (3, 2**31)), more=("I64", (2**31,)))
    assert model.payload_bytes == 12 * 2**31 + 8 * 2**31
    assert AccumulatorLayout(model, "float64").nbytes == 24 * 2**31 + 8 * 2**31


def test_memoryviews_and_padding_spaces_are_accepted() -> None:
    header = raw({"x": entry()}) + b" " * 17
    assert parse_header(memoryview(header), 8).payload_bytes == 8


# --- malformed headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"", "must begin with"),
        (b"[]", "must begin with"),
        (b' {"x":1}', "must begin with"),
        (b"\xef\xbb\xbf{}", "must begin with"),
        (b'{"x"', "not valid UTF-8 JSON"),
        (b'{"\xff": 1}', "not valid UTF-8 JSON"),
        (b'{"x": 1} trailing', "not valid UTF-8 JSON"),
        (b'{"x": ' + b"9" * 10_000 + b"}", "not valid UTF-8 JSON"),
        (b'{"x": NaN}', "not JSON"),
        (b'{"x": -Infinity}', "not JSON"),
        (b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b'{"x":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"{}", "at least one tensor"),
        (raw({"__metadata__": {"a": "b"}}), "at least one tensor"),
        (b'{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "not valid Unicode"),
    ],
)
def test_a_header_that_is_not_a_json_object_of_tensors_is_rejected(header: bytes, words: str) -> None:
    with pytest.raises(InvalidModel, match=words):
        parse_header(header)


def test_a_header_with_duplicate_keys_is_rejected() -> None:
    tensor = raw(entry())
    with pytest.raises(InvalidModel, match="'x' twice"):
        parse_header(b'{"x":' + tensor + b',"x":' + tensor + b"}")
    with pytest.raises(InvalidModel, match="'dtype' twice"):
        parse_header(b'{"x":{"dtype":"F64","dtype":"F32","shape":[2],"data_offsets":[0,8]}}')


@pytest.mark.parametrize("metadata", [1, [], None, {"a": 1}, {"a": {"b": "c"}}])
def test_metadata_that_does_not_map_strings_to_strings_is_rejected(metadata: Any) -> None:
    with pytest.raises(InvalidModel, match="__metadata__"):
        parse_header(raw({"__metadata__": metadata, "x": entry()}))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (1, "exactly the keys"),
        ({"dtype": "F32", "shape": [2]}, "exactly the keys"),
        (entry() | {"extra": 1}, "exactly the keys"),
        (entry(dtype="F31"), "not known"),
        (entry(dtype=None), "not known"),
        (entry(dtype=["F32"]), "not known"),
        (entry(dtype="F8_E4M3"), "cannot be averaged"),
        (entry(dtype="F8_E5M2"), "cannot be averaged"),
        (entry(shape=2), "shape must be an array"),
        (entry(shape=[1] * 65), "shape must be an array"),
        (entry(shape=[-2]), "shape must hold integers"),
        (entry(shape=[2.0]), "shape must hold integers"),
        (entry(shape=[True, 2]), "shape must hold integers"),
        (entry(shape=["2"]), "shape must hold integers"),
        (entry(shape=[2**63]), "shape must hold integers"),
        (entry(shape=[2**32, 2**32]), "impossible"),
        (entry(shape=[2**62, 4, 0], offsets=[0, 0]), "impossible"),
        (entry(shape=[3]), "takes 12 bytes"),
        (entry(offsets=[0]), "data_offsets must be"),
        (entry(offsets=[0, 8, 16]), "data_offsets must be"),
        (entry(offsets=[8, 0]), "data_offsets must be"),
        (entry(offsets=[-8, 0]), "data_offsets must hold"),
        (entry(offsets=[False, 8]), "data_offsets must hold"),
        (entry(offsets=[0, 8.0]), "data_offsets must hold"),
        (entry(offsets=[8, 16]), "hole"),
    ],
)
def test_a_malformed_tensor_entry_is_rejected(tensor: Any, words: str) -> None:
    with pytest.raises(InvalidModel, match=words):
        parse_header(raw({"x": tensor}))


@pytest.mark.parametrize(
    ("second", "words"),
    [((4, 12), "overlap"), ((0, 8), "overlap"), ((12, 20), "hole of 4 bytes"), ((16, 24), "hole of 8 bytes")],
)
def test_tensors_that_overlap_or_leave_holes_are_rejected(second: tuple[int, int], words: str) -> None:
    with pytest.raises(InvalidModel, match=words):
        parse_header(raw({"x": entry(), "y": entry(offsets=second)}))


def test_a_tensor_that_is_not_aligned_to_its_items_is_rejected() -> None:
    with pytest.raises(InvalidModel, match=r"offset 1 is not aligned.*re-save"):
        parse_header(raw({"x": entry("U8", [1], [0, 1]), "y": entry("F32", [1], [1, 5])}))


@pytest.mark.parametrize(("payload_bytes", "words"), [(7, "cut short"), (0, "cut short"), (9, "too long")])
def test_a_data_section_of_another_length_is_rejected(payload_bytes: int, words: str) -> None:
    with pytest.raises(InvalidModel, match=words):
        parse_header(raw({"x": entry()}), payload_bytes)


def test_a_long_name_does_not_flood_the_error_text() -> None:
    with pytest.raises(InvalidModel) as caught:
        parse_header(raw({"\n" * 50_000: 1}))
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda tail: b"{" + tail))
@settings(max_examples=200, deadline=None)
def test_random_bytes_raise_nothing_but_invalid_model(header: bytes) -> None:
    with pytest.raises(InvalidModel):
        parse_header(header)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(sorted(ITEM_BYTES)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
entries = st.fixed_dictionaries({"dtype": json_values, "shape": json_values, "data_offsets": json_values})


@given(st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3))
@settings(max_examples=200, deadline=None)
def test_random_json_raises_nothing_but_invalid_model(value: Any) -> None:
    try:
        parse_header(raw(value))
    except InvalidModel:
        pass


@given(specs, st.data())
@settings(max_examples=100, deadline=None)
def test_a_valid_header_with_a_flipped_byte_raises_nothing_but_invalid_model(spec: Any, data: Any) -> None:
    header = bytearray(encode_header(spec))
    header[data.draw(st.integers(0, len(header) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        model = parse_header(header)
    except InvalidModel:
        return
    assert sum(tensor.nbytes for tensor in model.tensors) == model.payload_bytes


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"__metadata__": ("F32", (1,))},
        {"x": ("F8_E4M3", (1,))},
        {"x": ("F32", (-1,))},
        {"\ud800": ("F32", (1,))},
    ],
)
def test_a_model_that_could_not_be_read_back_is_not_encoded(tensors: Any) -> None:
    with pytest.raises(InvalidModel):
        encode_header(tensors)


# --- plans -----------------------------------------------------------------------------------------------


def reordered(model: ModelLayout, order: list[str], dtypes: dict[str, str] | None = None) -> ModelLayout:
    """The same tensors one after the other in another order, perhaps in other dtypes."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    written: dict[str, Any] = {}
    offset = 0
    for name in order:
        dtype = (dtypes or {}).get(name, tensors[name].dtype)
        nbytes = tensors[name].count * ITEM_BYTES[dtype]
        written[name] = entry(dtype, tensors[name].shape, [offset, offset + nbytes])
        offset += nbytes
    return parse_header(raw(written), offset)


MODEL = layout(a=("F32", (2,)), b=("F32", (3, 2)), c=("F32", ()), n=("I64", ()), e=("F32", (0,)), h=("F16", (4,)))


def test_the_identical_layout_is_one_segment_for_each_run() -> None:
    plan = plan_update(MODEL, MODEL)
    assert plan.is_identity
    assert [len(segments) for segments in plan.by_run] == [1, 1, 1]
    assert plan.segments == (
        Segment(0, 0, 0, 1, "I64"),
        Segment(8, 1, 0, 9, "F32"),
        Segment(44, 2, 0, 4, "F16"),
    )


def test_other_metadata_and_padding_do_not_change_the_plan() -> None:
    other = parse_header(b'{"__metadata__":{"a":"b"},' + MODEL.header[1:].rstrip() + b"     ")
    assert other == MODEL
    assert plan_update(MODEL, other).is_identity


def test_neighbours_that_stay_neighbours_share_a_segment() -> None:
    plan = plan_update(MODEL, reordered(MODEL, ["n", "b", "c", "a", "e", "h"]))
    assert not plan.is_identity
    assert plan.by_run[1] == (Segment(36, 1, 0, 2, "F32"), Segment(8, 1, 2, 7, "F32"))


@given(st.permutations([tensor.name for tensor in MODEL.tensors if tensor.dtype == "F32"]))
@settings(deadline=None)
def test_the_segments_of_any_order_cover_each_run_exactly_once(order: list[str]) -> None:
    plan = plan_update(MODEL, reordered(MODEL, ["n", *order, "h"]))
    for run, segments in zip(MODEL.runs, plan.by_run, strict=True):
        position = 0
        for segment in segments:
            assert segment.target_start == position
            position += segment.count
        assert position == run.count


def test_float_tensors_may_arrive_compressed() -> None:
    model = layout(a=("F32", (4,)), d=("F64", (2,)))
    plan = plan_update(model, layout(a=("F16", (4,)), d=("BF16", (2,))))
    assert not plan.is_identity
    assert {segment.dtype for segment in plan.segments} == {"F16", "BF16"}


@pytest.mark.parametrize(
    ("model_dtype", "update_dtype"),
    [
        ("F32", "F64"),
        ("F64", "F32"),
        ("F16", "BF16"),
        ("F16", "F32"),
        ("I64", "I32"),
        ("I64", "F16"),
        ("BOOL", "U8"),
    ],
)
def test_any_other_dtype_is_rejected(model_dtype: str, update_dtype: str) -> None:
    with pytest.raises(InvalidModel, match=rf"'x' is {update_dtype}\[2\], the model has {model_dtype}\[2\]"):
        plan_update(layout(x=(model_dtype, (2,))), layout(x=(update_dtype, (2,))))


def test_another_shape_of_the_same_size_is_rejected() -> None:
    with pytest.raises(InvalidModel, match=r"F32\[3, 2\], the model has F32\[2, 3\]"):
        plan_update(layout(x=("F32", (2, 3))), layout(x=("F32", (3, 2))))


def test_missing_and_unexpected_tensors_are_listed_but_not_all_of_them() -> None:
    model = layout(**{f"m{i}": ("F32", (1,)) for i in range(9)}, both=("F32", (1,)))
    update = layout(other=("F32", (1,)), both=("F32", (1,)))
    with pytest.raises(InvalidModel, match=r"missing: 'm0', 'm1', 'm2', and 6 more; unexpected: 'other'"):
        plan_update(model, update)


@pytest.mark.parametrize(("precision", "float_dtype"), [("float32", "F32"), ("float64", "F64")])
def test_accumulator_runs_are_aligned_and_do_not_overlap(precision: Any, float_dtype: str) -> None:
    model = layout(
        i=("I8", (3,)), b=("BOOL", (1,)), f=("F32", (17,)), h=("BF16", (5,)), g=("F16", (1,)), d=("F64", (9,))
    )
    accumulators = AccumulatorLayout(model, precision)
    end = 0
    for run, sums in zip(model.runs, accumulators.sums, strict=True):
        assert sums.dtype == (float_dtype if run.dtype in ("F32", "BF16", "F16") else "F64")
        assert sums.offset % 64 == 0 and sums.offset >= end and sums.count == run.count
        end = sums.offset + sums.count * ITEM_BYTES[sums.dtype]
    assert accumulators.nbytes >= end and accumulators.nbytes % 64 == 0


def test_an_unknown_precision_is_an_error() -> None:
    with pytest.raises(ValueError, match="precision"):
        AccumulatorLayout(MODEL, "float16")  # type: ignore[arg-type]

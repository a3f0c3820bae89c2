"""Cutting models and updates into shards."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifl.errors import InvalidModel, Unavailable
from lifl.model_layout import COMPRESSED_DTYPES, ITEM_BYTES, ModelLayout, encode_header, parse_header, plan_update
from lifl.shards import (
    combine_outcomes,
    describe_shards,
    plan_shards,
    read_shards,
    shard_name,
    split_update,
)
from lifl.tensors import Encoder, split

Tensors = dict[str, tuple[str, tuple[int, ...]]]

tensors_of_models = st.dictionaries(
    st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(
        st.sampled_from(sorted(ITEM_BYTES)),
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=8,
)


def layout_of(tensors: Tensors) -> ModelLayout:
    return parse_header(encode_header(tensors))


def payload_of(layout: ModelLayout) -> bytes:
    return np.random.default_rng(1).integers(0, 255, layout.payload_bytes, np.uint8).tobytes()


def units(layout: ModelLayout) -> int:
    return -(-layout.payload_bytes // 8)


@settings(max_examples=200, deadline=None)
@given(tensors_of_models, st.data())
def test_shards_are_models_whose_data_is_that_of_the_whole_in_order(tensors: Tensors, data: st.DataObject):
    layout = layout_of(tensors)
    if not units(layout):
        with pytest.raises(InvalidModel, match="at most 0 shards"):
            plan_shards(layout, 2)
        return
    count = data.draw(st.integers(1, min(20, units(layout))))
    shards = plan_shards(layout, count)
    assert [shard.offset for shard in shards] == [sum(s.nbytes for s in shards[:i]) for i in range(count)]
    assert sum(shard.nbytes for shard in shards) == layout.payload_bytes
    assert max(s.nbytes for s in shards) - min(s.nbytes for s in shards) <= 15
    found: dict[str, int] = {}
    for shard in shards:
        own = parse_header(shard.header, shard.nbytes)  # aligned, without holes, of the right size
        assert [tensor.name for tensor in own.tensors if tensor.nbytes] == [
            p.name for p in shard.pieces if p.count
        ]
        for tensor in own.tensors:
            (piece,) = [piece for piece in shard.pieces if piece.name == tensor.name]
            whole = layout.tensors[[t.name for t in layout.tensors].index(tensor.name)]
            assert piece.first == found.get(piece.name, 0), "pieces of a tensor follow one another"
            found[piece.name] = piece.first + piece.count
            assert (tensor.dtype, tensor.count, piece.shape) == (whole.dtype, piece.count, whole.shape)
            assert tensor.shape == (whole.shape if piece.count == whole.count else (piece.count,))
            item = ITEM_BYTES[tensor.dtype]
            assert shard.offset + tensor.offset == whole.offset + piece.first * item
    assert found == {name: prod(shape) for name, (_, shape) in tensors.items()}


@settings(max_examples=200, deadline=None)
@given(tensors_of_models, st.data())
def test_the_parts_of_an_update_fit_the_shards_and_have_its_items(tensors: Tensors, data: st.DataObject):
    """An update may have its tensors in another order, and float tensors in a narrower dtype."""
    layout = layout_of(tensors)
    if not units(layout):
        return
    shards = plan_shards(layout, data.draw(st.integers(1, min(20, units(layout)))))
    told = read_shards(describe_shards("job", shards))
    assert [shard.job for shard in told] == [shard_name("job", index) for index in range(len(shards))]
    sent = layout_of(
        {
            name: (
                data.draw(st.sampled_from([dtype, *sorted(COMPRESSED_DTYPES)]))
                if dtype in ("F32", "F64")
                else dtype,
                shape,
            )
            for name, (dtype, shape) in tensors.items()
        }
    )
    payload = payload_of(sent)
    joined: dict[str, bytes] = dict.fromkeys(tensors, b"")
    for shard, part in zip(shards, split_update(sent, memoryview(payload), told), strict=True):
        own, data_section = split(b"".join(part))
        plan_update(parse_header(shard.header), own)  # the gateway's check
        for tensor in own.tensors:
            joined[tensor.name] += data_section[tensor.offset : tensor.offset + tensor.nbytes]
        if sent == layout:
            assert part[0][8:] == shard.header, "what the gateway knows is not read again"
    for tensor in sent.tensors:
        assert joined[tensor.name] == payload[tensor.offset : tensor.offset + tensor.nbytes]


def test_a_tensor_may_be_in_many_shards_and_is_not_copied():
    data = Encoder().encode({"w": np.arange(100, dtype=np.float32), "b": np.arange(3, dtype=np.int64)})
    layout, payload = split(data)
    shards = plan_shards(layout, 4)
    assert [len(shard.pieces) for shard in shards] == [2, 1, 1, 1]
    parts = split_update(layout, payload, read_shards(describe_shards("job", shards)))
    whole = np.frombuffer(data, np.uint8)
    for part in parts:
        for piece in part[1:]:
            assert np.shares_memory(whole, np.frombuffer(piece, np.uint8))


def test_a_model_is_not_cut_into_more_shards_than_it_has_words():
    layout = layout_of({"w": ("F32", (5,))})
    assert [shard.nbytes for shard in plan_shards(layout, 3)] == [8, 8, 4]
    with pytest.raises(InvalidModel, match="20 bytes has at most 3 shards of 8 bytes, not 4"):
        plan_shards(layout, 4)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"w": ("F32", (4, 2))}, "'b' is missing"),
        ({"w": ("F32", (4, 2)), "b": ("F32", (2,)), "c": ("F32", (2,))}, "'c' is not in the model"),
        ({"w": ("F32", (2, 4)), "b": ("F32", (2,))}, r"'w' has shape \[2, 4\] instead of \[4, 2\]"),
    ],
)
def test_an_update_of_another_model_is_told_from_one_that_fits(tensors: Tensors, text: str):
    shards = plan_shards(layout_of({"w": ("F32", (4, 2)), "b": ("F32", (2,))}), 3)
    sent = layout_of(tensors)
    with pytest.raises(InvalidModel, match=text):
        split_update(sent, memoryview(payload_of(sent)), read_shards(describe_shards("job", shards)))


@pytest.mark.parametrize(
    "described", [None, 3, [], [{}], [{"job": "a"}], [{"job": "a", "tensors": {"w": {}}}], [7]]
)
def test_shards_that_make_no_sense_are_nobodys_job(described: object):
    with pytest.raises(Unavailable):
        read_shards(described)


def test_an_update_is_accepted_only_with_all_its_parts():
    assert combine_outcomes(["accepted", "accepted"]) == "accepted"
    assert combine_outcomes(["accepted", "duplicate"]) == "duplicate"
    assert combine_outcomes(["duplicate", "late", "accepted"]) == "late"

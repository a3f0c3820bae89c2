"""The descriptor's 16 bytes: what goes in comes out, however the stream is cut."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lifl.descriptor import SIZE, Descriptor, DescriptorStream, Kind, decode, encode

u32 = st.integers(0, 2**32 - 1)
descriptors = st.builds(
    Descriptor, u32, st.just(0), u32, st.integers(0, 0xFFFF), st.sampled_from(Kind), st.integers(0, 255)
)


def encoded(item: Descriptor) -> bytes:
    return encode(item.destination, item.slot, item.round, Kind(item.kind), item.generation)


def test_the_wire_layout_is_the_documented_one() -> None:
    data = encode(0x01020304, 0x05060708, 0x090A, Kind.CLOSE, 0x0B)
    assert data.hex() == "0403020100000000080706050a09070b"


@given(descriptors)
def test_a_descriptor_survives_the_round_trip(item: Descriptor) -> None:
    data = encoded(item)
    assert len(data) == SIZE
    assert decode(data) == [item]


@given(st.integers(0, 2**40), st.integers(0, 2**20))
def test_round_and_generation_are_reduced_to_their_width(round_number: int, generation: int) -> None:
    (item,) = decode(encode(1, 2, round_number, Kind.UPDATE, generation))
    assert item.round == round_number % 65536
    assert item.generation == generation % 256


@pytest.mark.parametrize("destination", [-1, 2**32])
def test_a_destination_that_does_not_fit_is_an_error(destination: int) -> None:
    with pytest.raises(struct.error):
        encode(destination, 0, 0, Kind.UPDATE)


@given(st.lists(descriptors, max_size=40), st.lists(st.integers(0, 700), max_size=20))
def test_a_stream_cut_anywhere_gives_the_same_descriptors(items: list[Descriptor], cuts: list[int]) -> None:
    data = b"".join(map(encoded, items))
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    stream = DescriptorStream()
    found = [item for start, end in pairwise(edges) for item in stream.feed(data[start:end])]
    assert found == items


@given(st.lists(st.binary(max_size=100), max_size=20))
def test_random_bytes_never_break_the_stream(chunks: list[bytes]) -> None:
    stream = DescriptorStream()
    found = sum(len(stream.feed(chunk)) for chunk in chunks)
    assert found == sum(map(len, chunks)) // SIZE

"""Slot references, geometry, and the headers that decide what a reader believes."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lifl.slot import (
    MAX_CLIENT_ID_BYTES,
    MAX_POOLS,
    MAX_SEAL_INPUTS,
    MAX_SLOTS,
    PAGE,
    InputKey,
    PoolGeometry,
    Seal,
    UpdateHeader,
    erase_header,
    slot_reference,
    split_slot_reference,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
weights = st.floats(allow_nan=False)
seals = st.builds(
    Seal, u64, u32, u32, u32, u32, weights, weights,
    st.lists(st.builds(InputKey, u32, u32), max_size=MAX_SEAL_INPUTS).map(tuple),
)  # fmt: skip
headers = st.builds(
    UpdateHeader,
    generation=u32, round=u32, is_delta=st.booleans(), num_samples=weights, layout_bytes=u32, payload_bytes=u64,
    client=st.text(max_size=60).filter(lambda text: text.isprintable()),
)  # fmt: skip


@given(st.integers(0, MAX_POOLS - 1), st.integers(0, MAX_SLOTS - 1))
def test_a_slot_reference_fits_a_descriptor_and_splits_again(pool: int, index: int) -> None:
    reference = slot_reference(pool, index)
    assert 0 <= reference < 2**32
    assert split_slot_reference(reference) == (pool, index)


@pytest.mark.parametrize(("pool", "index"), [(-1, 0), (0, -1), (MAX_POOLS, 0), (0, MAX_SLOTS)])
def test_a_slot_reference_out_of_range_is_an_error(pool: int, index: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        slot_reference(pool, index)


@given(st.integers(1, 1000), st.integers(0, 10**6), st.integers(0, 10**9))
def test_every_part_of_a_slot_starts_on_a_page(slots: int, header: int, payload: int) -> None:
    geometry = PoolGeometry.of(slots, header, payload)
    assert geometry.payload_offset % PAGE == geometry.stride % PAGE == 0
    assert geometry.header_capacity >= header
    assert geometry.payload_capacity >= max(payload, 1)
    assert geometry.size == slots * geometry.stride


@given(headers, st.integers(0, 64))
def test_an_update_header_survives_the_round_trip(header: UpdateHeader, offset: int) -> None:
    page = bytearray(PAGE)
    header.pack_into(page, offset)
    assert UpdateHeader.unpack_from(page, offset) == header
    erase_header(page, offset)
    assert UpdateHeader.unpack_from(page, offset) is None


def test_a_client_id_that_is_too_long_is_an_error() -> None:
    header = UpdateHeader(1, 1, False, 1.0, 0, 0, "é" * (MAX_CLIENT_ID_BYTES // 2 + 1))
    with pytest.raises(ValueError, match="client id"):
        header.pack_into(bytearray(PAGE))


@given(seals, st.integers(0, 64))
def test_a_seal_survives_the_round_trip(seal: Seal, offset: int) -> None:
    page = bytearray(PAGE)
    seal.pack_into(page, offset)
    assert Seal.unpack_from(page, offset) == seal
    erase_header(page, offset)
    assert Seal.unpack_from(page, offset) is None


def test_a_seal_with_too_many_inputs_is_an_error() -> None:
    seal = Seal(1, 1, 1, 1, 1, 1.0, 0.0, tuple(InputKey(k, 0) for k in range(MAX_SEAL_INPUTS + 1)))
    with pytest.raises(ValueError, match="at most"):
        seal.pack_into(bytearray(PAGE))


def test_a_full_seal_fits_the_header_page() -> None:
    seal = Seal(1, 1, 1, 1, 1, 1.0, 0.0, tuple(InputKey(k, 0) for k in range(MAX_SEAL_INPUTS)))
    page = bytearray(PAGE)
    seal.pack_into(page)
    assert len(page) == PAGE
    assert Seal.unpack_from(page) == seal


@given(seals, st.lists(st.tuples(st.integers(0, 300), st.integers(1, 255)), min_size=1, max_size=4))
def test_a_corrupted_seal_is_never_taken_for_another_one(seal: Seal, flips: list[tuple[int, int]]) -> None:
    page = bytearray(PAGE)
    seal.pack_into(page)
    before = bytes(page)
    for at, bits in flips:
        page[at] ^= bits
    assume(bytes(page) != before)
    assert Seal.unpack_from(page) in (None, seal)


@given(seals, seals, st.integers(0, 300))
def test_a_seal_torn_by_a_killed_writer_is_never_a_wrong_one(old: Seal, new: Seal, cut: int) -> None:
    page, fresh = bytearray(PAGE), bytearray(PAGE)
    old.pack_into(page)
    new.pack_into(fresh)
    page[:cut] = fresh[:cut]
    assert Seal.unpack_from(page) in (None, old, new)


@given(st.binary(min_size=PAGE, max_size=PAGE))
def test_random_bytes_are_no_seal_and_no_update(page: bytes) -> None:
    assert Seal.unpack_from(page) is None
    assert UpdateHeader.unpack_from(page) is None


@given(headers, st.lists(st.tuples(st.integers(0, 100), st.integers(0, 255)), max_size=8))
def test_a_corrupted_update_header_never_raises(header: UpdateHeader, writes: list[tuple[int, int]]) -> None:
    page = bytearray(PAGE)
    header.pack_into(page)
    for at, value in writes:
        page[at] = value
    found = UpdateHeader.unpack_from(page)
    assert found is None or len(found.client) <= MAX_CLIENT_ID_BYTES

"""What nodes say to each other, byte by byte: round trips, and what a hostile node might send."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from lifl.errors import Busy, InvalidInput, ProtocolError, Refused
from lifl.messages import Message, Problem
from lifl.peer.checksum import PIECE_BYTES, Checksum, FileRange, Segment, SegmentsChecksum
from lifl.peer.connection import join_address, split_address
from lifl.peer.protocol import (
    LENGTH,
    MAX_MESSAGE_BYTES,
    Decoder,
    OfferAnswer,
    PartialAnswer,
    PartialOffer,
    PeerHello,
    PullAnswer,
    PullRequest,
    Trailer,
    body_bytes,
    encode,
    refusal,
)
from lifl.peer.receptions import Key
from lifl.peer.security import OPEN, Credentials

KINDS = (PeerHello, PullRequest, PullAnswer, PartialOffer, OfferAnswer, Trailer, PartialAnswer, Problem)
ANY = Decoder(*KINDS)

u32, size = st.integers(0, 2**32 - 1), st.integers(0, 2**62)
name = st.text(max_size=256)
weight = st.floats(0, allow_nan=False, allow_infinity=False)
pulls = st.builds(PullRequest, name, size, u32, st.sampled_from(["header", "model", "state"]), size)
offers = st.builds(PartialOffer, name, size, u32, u32, u32, name, u32, size, u32, u32, weight, weight)
messages = st.one_of(
    st.builds(PeerHello, st.text(max_size=1000)),
    pulls,
    st.builds(PullAnswer, u32, size, size),
    offers,
    st.builds(OfferAnswer, st.sampled_from(["open", "duplicate"]), size),
    st.builds(Trailer, st.integers(0, 2**64 - 1)),
    st.builds(
        PartialAnswer, st.sampled_from(["accepted", "duplicate", "refused", "corrupt"]), st.text(max_size=99)
    ),
)

AN_OFFER = PartialOffer("job", 7, 3, 1, 2, "node", 5, 4096, 2, 4, 64.0, 0.0)


def framed(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


def read(data: bytes) -> Message:
    """What a receiver makes of some bytes."""
    nbytes = body_bytes(data[: LENGTH.size])
    return ANY.decode(data[LENGTH.size : LENGTH.size + nbytes])


# --- messages ------------------------------------------------------------------------------------------------


@given(messages)
def test_a_message_survives_the_round_trip(message: Message) -> None:
    assert read(encode(message)) == message


def test_the_length_before_a_message_is_little_endian() -> None:
    data = encode(Trailer(1))
    assert int.from_bytes(data[:4], "little") == len(data) - 4


@given(st.binary(min_size=4, max_size=4))
def test_a_length_is_believed_only_within_the_limit(head: bytes) -> None:
    claimed = int.from_bytes(head, "little")
    if 0 < claimed <= MAX_MESSAGE_BYTES:
        assert body_bytes(head) == claimed
    else:
        with pytest.raises(ProtocolError):
            body_bytes(head)


def test_a_message_above_the_limit_is_not_even_sent() -> None:
    with pytest.raises(ProtocolError):
        encode(PeerHello("x" * MAX_MESSAGE_BYTES))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        ANY.decode(body)


@given(messages, st.data())
def test_a_message_that_was_cut_short_is_refused(message: Message, data: st.DataObject) -> None:
    body = encode(message)[4:]
    with pytest.raises(ProtocolError):
        ANY.decode(body[: data.draw(st.integers(0, len(body) - 1))])


@pytest.mark.parametrize(
    "opening", ["[", '{"type":', '{"type":"PartialOffer","job":', '{"type":"PullRequest","x":']
)
def test_nesting_as_deep_as_a_message_can_be_is_refused(opening: str) -> None:
    body = opening.encode() * (MAX_MESSAGE_BYTES // len(opening))
    with pytest.raises(ProtocolError):
        read(framed(body))


@pytest.mark.parametrize(
    "change",
    [
        {"nbytes": -1},
        {"nbytes": 2**63},
        {"nbytes": 1.5},
        {"nbytes": "1"},
        {"sequence": 2**32},
        {"inputs": -1},
        {"updates": 2**32},
        {"round": 2**32},
        {"nonce": -1},
        {"weight": None},
        {"weight": -0.5},
        {"weight": "NaN"},
        {"job": "x" * 257},
        {"job": None},
        {"source": ["x"]},
        {"more": 1},
        {"type": "Welcome"},
        {"type": None},
    ],
)
def test_an_offer_with_a_field_out_of_range_is_refused(change: dict[str, object]) -> None:
    document = json.loads(msgspec.json.encode(AN_OFFER)) | change
    with pytest.raises(ProtocolError):
        ANY.decode(json.dumps(document).encode())


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1e999"])
def test_a_weight_that_is_not_finite_is_refused(number: str) -> None:
    body = msgspec.json.encode(AN_OFFER).replace(b"64.0", number.encode())
    with pytest.raises(ProtocolError):
        ANY.decode(body)


def test_a_decoder_knows_only_its_own_kinds() -> None:
    with pytest.raises(ProtocolError):
        Decoder(PeerHello).decode(encode(Trailer(1))[4:])


def test_a_problem_becomes_the_error_that_it_stands_for() -> None:
    busy = refusal(Problem(503, "Full", "no slot", 0.25))
    assert isinstance(busy, Busy)
    assert busy.retry_after == 0.25
    refused = refusal(Problem(404, "No such model", "round 3"))
    assert type(refused) is Refused
    assert (refused.status, refused.title, refused.detail) == (404, "No such model", "round 3")


@given(offers)
def test_offers_of_the_same_bytes_have_the_same_key(offer: PartialOffer) -> None:
    again = msgspec.structs.replace(offer, weight=0.5, inputs=1)
    assert Key.of(offer) == Key.of(again)
    assert Key.of(offer) != Key.of(msgspec.structs.replace(offer, sequence=(offer.sequence + 1) % 2**32))


# --- addresses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1:80", "[::1]:8090", "node-3.example:0"])
def test_an_address_survives_the_round_trip(address: str) -> None:
    assert join_address(*split_address(address)) == address


@pytest.mark.parametrize("address", ["", "host", ":80", "host:", "host:x", "host:-1", "host:65536", "host:\u0663"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidInput):
        split_address(address)


# --- checksums -----------------------------------------------------------------------------------------------


@given(st.binary(max_size=5000), st.lists(st.integers(0, 5000), max_size=5))
def test_a_checksum_does_not_depend_on_how_the_bytes_are_cut(data: bytes, cuts: list[int]) -> None:
    ends = [*sorted(cuts), len(data)]
    segments: list[Segment] = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    checksum = Checksum()
    for segment in segments:
        assert isinstance(segment, bytes)
        checksum.update(segment)
    assert checksum.value == SegmentsChecksum(segments).value() == xxhash.xxh3_64_intdigest(data)


@pytest.mark.parametrize("is_mapped", [True, False])
def test_the_checksum_of_a_file_is_made_in_small_steps(tmp_path: Path, is_mapped: bool) -> None:
    data = os.urandom(2 * PIECE_BYTES + 77)
    path = tmp_path / "file"
    path.write_bytes(b"before" + data + b"behind")
    with path.open("rb") as file:
        part = FileRange(file.fileno(), 6, len(data), memoryview(data) if is_mapped else None)
        checksum = SegmentsChecksum([b"head", part])
        steps = 0
        while checksum.step():
            steps += 1
        assert steps == 4
        assert checksum.value() == xxhash.xxh3_64_intdigest(b"head" + data)


def test_a_file_that_is_too_short_has_no_checksum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"short")
    with path.open("rb") as file, pytest.raises(OSError, match="ended after 5 of 6"):
        SegmentsChecksum([FileRange(file.fileno(), 0, 6)]).value()


# --- who may come in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "node.example"])
def test_strangers_may_come_in_only_where_somebody_said_so(host: str) -> None:
    with pytest.raises(InvalidInput, match="other machines"):
        OPEN.check_listening(host, allow_anonymous=False)
    OPEN.check_listening(host, allow_anonymous=True)
    Credentials("token").check_listening(host, allow_anonymous=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    OPEN.check_listening(host, allow_anonymous=False)


def test_only_the_very_token_is_accepted() -> None:
    credentials = Credentials("sesame")
    assert credentials.accepts("sesame")
    assert not any(map(credentials.accepts, ["", "Sesame", "sesame ", "sesam", "s\u00e9same"]))
    assert OPEN.accepts("whatever")


@pytest.mark.parametrize("content", ["", " \n", "two words", "two\nlines", "x" * 5000])
def test_a_token_file_with_anything_but_one_token_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(InvalidInput, match=str(path)):
        Credentials.from_files(path)


def test_the_token_is_read_without_the_line_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("sesame\n")
    assert Credentials.from_files(path).token == "sesame"


def test_tls_needs_all_three_files(tmp_path: Path) -> None:
    file = tmp_path / "file.pem"
    file.write_text("no certificate")
    with pytest.raises(InvalidInput, match="all three"):
        Credentials.from_files(certificate=file, key=file)
    with pytest.raises(InvalidInput, match="cannot use"):
        Credentials.from_files(certificate=file, key=file, authority=file)

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from lifl.function import AggregatorFunction, load_function
from lifl.model_layout import ModelLayout, encode_header, parse_header
from lifl_bench.deployment import Tree
from lifl_bench.grpc_mode.protocol import CHUNK_BYTES, Attributes, Invalid, chunks
from lifl_bench.grpc_mode.rounds import Received, Refused, Roll, Sums, UpdateBuffer

from tests.conftest import ROOT

UPDATE_BYTES, PARTIAL_BYTES = 1000, 900


def fedavg() -> AggregatorFunction:
    return load_function(ROOT / "functions" / "fedavg.py")


def update_of(client: int, round_number: int = 1, weight: float = 2.0, nbytes: int = UPDATE_BYTES) -> Attributes:
    return Attributes(client, round_number, nbytes, weight)


def partial_of(leaf: int, round_number: int = 1) -> Attributes:
    return Attributes(leaf, round_number, PARTIAL_BYTES, 3.0)


def roll(leaf: int = 0, updates: int = 5, leaves: int = 2) -> Roll:
    return Roll(Tree(updates, leaves), leaf, UPDATE_BYTES, PARTIAL_BYTES)


# --- attributes ----------------------------------------------------------------------------------------------


def test_attributes_come_back_from_metadata_as_they_were() -> None:
    attributes = Attributes(7, 3, 1 << 40, 0.1, 0.05)
    assert Attributes.of(attributes.metadata()) == attributes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sender", "-1"),
        ("sender", "9" * 30),
        ("round", "one"),
        ("nbytes", ""),
        ("weight", "nan"),
        ("weight", "-1"),
        ("delta-weight", "inf"),
        ("delta-weight", "2.5"),
    ],
)
def test_attributes_that_cannot_be_used_are_invalid(name: str, value: str) -> None:
    metadata: Mapping[str, str] = {**dict(update_of(1).metadata()), name: value}
    with pytest.raises(Invalid, match=name):
        Attributes.of(tuple(metadata.items()))


def test_missing_attributes_are_invalid() -> None:
    with pytest.raises(Invalid, match="sender must be a whole number"):
        Attributes.of(None)


def test_chunks_join_to_the_data_and_only_the_last_is_short() -> None:
    data = bytes(range(256)) * (CHUNK_BYTES // 256) + b"end"
    pieces = list(chunks(memoryview(data)))
    assert [len(piece) for piece in pieces] == [CHUNK_BYTES, 3]
    assert b"".join(pieces) == data


# --- the register --------------------------------------------------------------------------------------------


def test_a_leaf_needs_its_clients_and_the_top_the_other_leaves_too() -> None:
    assert (roll(0).updates, roll(0).partials) == (3, 1)
    assert (roll(1).updates, roll(1).partials) == (2, 0)


@pytest.mark.parametrize(
    ("attributes", "code", "text"),
    [
        (update_of(5), "INVALID_ARGUMENT", "no client 5"),
        (update_of(1), "INVALID_ARGUMENT", "belongs to leaf 1"),
        (update_of(0, weight=0.0), "INVALID_ARGUMENT", "weight above 0"),
        (update_of(0, nbytes=999), "INVALID_ARGUMENT", "1000 bytes here, not 999"),
        (update_of(0, round_number=2), "FAILED_PRECONDITION", "round 2 is not open yet"),
    ],
)
def test_an_update_that_does_not_belong_here_is_refused(attributes: Attributes, code: str, text: str) -> None:
    with pytest.raises(Refused, match=text) as refusal:
        roll().admit_update(attributes)
    assert refusal.value.code == code


def test_a_client_counts_once_in_each_round() -> None:
    register = roll()
    register.admit_update(update_of(0))
    with pytest.raises(Refused, match="client 0 for round 1 has been sent already") as refusal:
        register.admit_update(update_of(0))
    assert refusal.value.code == "ALREADY_EXISTS"
    register.next_round()
    register.admit_update(update_of(0, round_number=2))


def test_a_client_whose_update_was_struck_may_send_again() -> None:
    register = roll()
    register.admit_update(update_of(0))
    register.strike_update(0)
    register.admit_update(update_of(0))


def test_an_update_of_a_closed_round_is_late() -> None:
    register = roll()
    register.next_round()
    with pytest.raises(Refused, match="round 1 is closed; round 2 is open") as refusal:
        register.admit_update(update_of(0))
    assert refusal.value.code == "FAILED_PRECONDITION"


def test_a_partial_aggregate_counts_once_and_only_at_the_top() -> None:
    register = roll()
    register.admit_partial(partial_of(1))
    with pytest.raises(Refused, match="leaf 1 for round 1 has been sent already"):
        register.admit_partial(partial_of(1))
    register.strike_partial(1)
    register.admit_partial(partial_of(1))
    for leaf, sender in ((0, 0), (0, 2), (1, 1)):
        with pytest.raises(Refused, match="takes no partial aggregate"):
            roll(leaf).admit_partial(partial_of(sender))


# --- the sums ------------------------------------------------------------------------------------------------


def model() -> ModelLayout:
    return parse_header(encode_header({"weight": ("F32", (300,)), "steps": ("I64", (2,))}))


def received(layout: ModelLayout, client: int, weight: float, values: float, steps: int = 0) -> Received:
    buffer = UpdateBuffer(len(layout.header), layout.payload_bytes)
    for tensor in layout.tensors:
        dtype, value = (np.float32, values) if tensor.dtype == "F32" else (np.int64, steps)
        np.frombuffer(buffer.payload, dtype, tensor.count, tensor.offset)[:] = value
    return Received(Attributes(client, 1, len(buffer.whole), weight), buffer)


def made_model(sums: Sums, layout: ModelLayout, *others: Sums) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    out, previous = memoryview(bytearray(layout.payload_bytes)), memoryview(bytearray(layout.payload_bytes))
    sums.finish(out, [other.partial() for other in others], previous)
    (tensor,) = (tensor for tensor in layout.tensors if tensor.dtype == "F32")
    return np.frombuffer(out, np.float32, tensor.count, tensor.offset)


def test_sums_over_several_batches_and_leaves_make_the_weighted_mean() -> None:
    layout = model()
    leaf, top = (Sums(fedavg(), layout, "float32") for _ in range(2))
    assert leaf.add([received(layout, 0, 1.0, 1.0), received(layout, 1, 2.0, 2.0)]) == []
    assert leaf.add([received(layout, 2, 3.0, 3.0)]) == []
    assert top.add([received(layout, 3, 4.0, 4.0)]) == []
    assert np.allclose(made_model(top, layout, leaf), (1 + 4 + 9 + 16) / 10, rtol=1e-6)


def test_the_next_round_starts_from_nothing() -> None:
    layout = model()
    sums = Sums(fedavg(), layout, "float64")
    sums.add([received(layout, 0, 5.0, 100.0)])
    sums.begin(2)
    sums.add([received(layout, 0, 5.0, 7.0)])
    assert np.allclose(made_model(sums, layout), 7.0)


def test_an_update_that_is_not_finite_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    layout = model()
    sums = Sums(fedavg(), layout, "float32")
    bad = received(layout, 1, 1.0, float("nan"))
    assert sums.add([received(layout, 0, 1.0, 3.0), bad]) == [bad]
    assert "client 1 is not finite" in caplog.text
    assert np.allclose(made_model(sums, layout), 3.0)


def test_an_update_on_which_the_function_fails_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "picky.py"
    file.write_text(
        "from lifl import Aggregate, ModelUpdate, aggregator\n\n\n@aggregator\n"
        "def picky(total: Aggregate, update: ModelUpdate) -> None:\n"
        "    if update.client == 'client-1':\n        raise KeyError('no')\n    total.add(update)\n"
    )
    layout = model()
    sums = Sums(load_function(file), layout, "float32")
    bad = received(layout, 1, 1.0, 9.0)
    assert sums.add([received(layout, 0, 1.0, 3.0), bad]) == [bad]
    assert "picky failed" in caplog.text
    assert np.allclose(made_model(sums, layout), 3.0)


def test_a_leaf_whose_updates_are_all_left_out_adds_nothing(tmp_path: Path) -> None:
    file = tmp_path / "nobody.py"
    file.write_text("from lifl import aggregator\n\n\n@aggregator\ndef nobody(total, update):\n    pass\n")
    layout = model()
    leaf, top = Sums(load_function(file), layout, "float32"), Sums(fedavg(), layout, "float32")
    assert leaf.add([received(layout, 0, 1.0, 3.0)]) == []
    top.add([received(layout, 1, 1.0, 5.0)])
    assert np.allclose(made_model(top, layout, leaf), 5.0)
    assert np.allclose(made_model(leaf, layout), 0.0)


def test_a_function_that_needs_all_updates_at_once_is_not_run() -> None:
    with pytest.raises(ValueError, match="plain streaming functions only"):
        Sums(load_function(ROOT / "functions" / "median.py"), model(), "float32")


def test_a_roll_is_full_when_every_client_of_the_leaf_has_been_entered() -> None:
    roll = Roll(Tree(4, 2), 1, 100, 50)

    seen = [roll.is_full]
    for client in (1, 3):
        roll.admit_update(Attributes(client, 1, 100, 1.0))
        seen.append(roll.is_full)
    roll.next_round()

    assert [*seen, roll.is_full] == [False, False, True, False]

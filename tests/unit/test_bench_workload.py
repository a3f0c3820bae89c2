"""What `func bench` sends: models by name, file and size, arrivals, and the answer that has to come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from lifl.cli.common import CommandError
from lifl.model_layout import parse_header
from lifl_bench.workload import Workload, parse_arrival, parse_model

# --- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "megabytes"), [("resnet18", 44.7), ("resnet34", 85.1), ("resnet152", 232.6)])
def test_a_model_known_by_name_has_its_size(name: str, megabytes: float) -> None:
    assert parse_model(name).payload_bytes / 1e6 == pytest.approx(megabytes, abs=0.05)


@pytest.mark.parametrize(("text", "nbytes"), [("4", 4), ("1000", 1000), ("64MiB", 64 << 20), ("1.5 kB", 1500)])
def test_a_model_can_be_a_size(text: str, nbytes: int) -> None:
    assert parse_model(text).payload_bytes == nbytes


def test_a_model_from_a_file_has_the_files_tensors(tmp_path: Path) -> None:
    tensors = {"b": np.zeros((3, 5), np.float32), "a": np.zeros(7, np.float32)}
    path = tmp_path / "mine.safetensors"
    safetensors.numpy.save_file(tensors, path)

    model = parse_model(str(path))

    assert model.name == "mine"
    assert {spec.name: spec.shape for spec in parse_header(model.header).tensors} == {"a": (7,), "b": (3, 5)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet19", "unknown model 'resnet19'"),
        ("3", "multiple of 4"),
        ("9GiB", "to 8 GiB"),
        ("-4", "unknown model|multiple of 4"),
        ("nowhere.safetensors", "cannot be read: no such file"),
    ],
)
def test_a_model_that_cannot_be_had_is_named(text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        parse_model(text)


def test_a_broken_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"\xff" * 100)

    with pytest.raises(CommandError, match="is not valid"):
        parse_model(str(path))


def test_half_precision_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(4, np.float16)}, path)

    with pytest.raises(CommandError, match="has F16 tensors"):
        parse_model(str(path))


def test_updates_are_safetensors_that_any_reader_takes() -> None:
    workload = Workload(parse_model("4000"), 3)

    tensors = safetensors.numpy.load(bytes(workload.update_of(1)))

    assert tensors["values"].shape == (1000,)


# --- the right answer ----------------------------------------------------------------------------------------


def mean_of(workload: Workload, round_: int, *, without: int | None = None) -> np.ndarray:
    samples = list(workload.samples(round_))
    if without is not None:
        samples[without] = 0
    values = [workload.model.decode(workload.update_of(client)) for client in range(workload.updates)]
    weighted = sum(count * one.astype(np.float64) for count, one in zip(samples, values, strict=True))
    return (weighted / sum(samples)).astype(np.float32)


def test_the_weighted_mean_is_right() -> None:
    workload = Workload(parse_model("40000"), 9)

    assert workload.error(workload.model.encode(mean_of(workload, 3)), 3) < 1e-6


@pytest.mark.parametrize("lost", [0, 4, 8])
def test_a_mean_without_one_of_the_updates_is_wrong(lost: int) -> None:
    workload = Workload(parse_model("40000"), 9)

    assert workload.error(workload.model.encode(mean_of(workload, 3, without=lost)), 3) > 1e-3


def test_the_model_of_another_round_is_wrong() -> None:
    workload = Workload(parse_model("40000"), 9)

    assert workload.error(workload.model.encode(mean_of(workload, 2)), 3) > 1e-3


@pytest.mark.parametrize("place", [0, 1 << 20, -1])
def test_a_mean_with_a_value_that_is_no_number_is_wrong(place: int) -> None:
    workload = Workload(parse_model("4200000"), 2)
    mean = mean_of(workload, 1)
    mean[place] = np.nan

    assert not workload.error(workload.model.encode(mean), 1) <= 1e-5


def test_zeros_have_to_stay_zeros() -> None:
    workload = Workload(parse_model("4000"), 1)
    workload._values[0][7] = 0.0
    mean = workload._values[0].copy()

    assert workload.error(workload.model.encode(mean), 1) < 1e-6
    mean[7] = 1e-30
    assert workload.error(workload.model.encode(mean), 1) > 1


def test_a_model_with_other_tensors_is_an_error() -> None:
    workload = Workload(parse_model("4000"), 2)
    other = Workload(parse_model("4004"), 2)

    with pytest.raises(RuntimeError, match="other tensors"):
        workload.error(other.update_of(0), 1)


# --- arrival -------------------------------------------------------------------------------------------------


def test_a_burst_arrives_at_once() -> None:
    assert parse_arrival("burst", 50, 4).times(4, 1) == [0, 0, 0, 0]


def test_poisson_arrivals_have_their_rate_and_can_be_repeated() -> None:
    arrival = parse_arrival("poisson", 50, 1000)

    times = arrival.times(1000, 7)

    assert times == sorted(times) and times[0] == 0
    assert times[-1] == pytest.approx(20, rel=0.2)
    assert times == arrival.times(1000, 7) != arrival.times(1000, 8)


def test_a_trace_is_taken_from_its_first_column(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("seconds,client\n3.5,a\n1.5,b\n\n2,c\n9,d\n")

    assert parse_arrival(str(trace), 1, 3).times(3, 1) == [0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\n2\n", "has 2 arrivals, but a round has 3"),
        ("1\nsoon\n3\n", "row 2: 'soon' is no number"),
        ("1\n-2\n3\n", "row 2: -2 is not within an hour"),
        ("1\nnan\n3\n", "row 2: nan is not within an hour"),
    ],
)
def test_a_trace_that_cannot_be_used_says_where(tmp_path: Path, content: str, message: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(content)

    with pytest.raises(CommandError, match=message):
        parse_arrival(str(trace), 1, 3)


def test_an_unknown_arrival_is_an_error() -> None:
    with pytest.raises(CommandError, match="unknown arrival 'slowly'"):
        parse_arrival("slowly", 1, 3)

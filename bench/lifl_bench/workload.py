"""What is sent: the model, the clients' updates and weights, and when each of them arrives."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import numpy as np
import numpy.typing as npt
from lifl.cli.common import CommandError
from lifl.errors import InvalidModel
from lifl.model_layout import encode_header, parse_header
from lifl.tensors import split

from lifl_bench import models

DISTINCT_UPDATES = 4
"""Buffers the updates are made of; clients share them, for the memory's sake. Their weights tell them apart."""
LARGEST_BYTES = 8 << 30
_TILE = 1 << 20
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True)
class Model:
    """The model whose updates are aggregated."""

    name: str
    header: bytes
    """JSON of the safetensors header, without the eight bytes of its length."""
    payload_bytes: int

    @property
    def elements(self) -> int:
        """Number of float32 parameters."""
        return self.payload_bytes // 4

    @property
    def nbytes(self) -> int:
        """Bytes of an update as it is sent."""
        return 8 + len(self.header) + self.payload_bytes

    def encode(self, values: npt.NDArray[np.float32]) -> memoryview:
        """An update with these values, in safetensors."""
        data = bytearray(self.nbytes)
        data[:8] = len(self.header).to_bytes(8, "little")
        data[8 : 8 + len(self.header)] = self.header
        np.frombuffer(data, np.float32, offset=8 + len(self.header))[:] = values
        return memoryview(data)

    def decode(self, data: memoryview) -> npt.NDArray[np.float32]:
        """The values of a model in safetensors, in the order of this one's header.

        Raises RuntimeError if it is not this model.
        """
        try:
            layout, payload = split(data)
        except InvalidModel as error:
            raise RuntimeError(f"the new model is no safetensors: {error}") from None
        if layout != parse_header(self.header):
            raise RuntimeError("the new model has other tensors than the updates")
        return np.frombuffer(payload, np.float32)


def parse_model(text: str) -> Model:
    """A model from its name, from a safetensors file, or from a number of bytes (`1000000`, `64MiB`).

    Raises CommandError for anything else.
    """
    if text in get_args(models.ModelName):
        return _of_shapes(text, models.resnet_shapes(cast(models.ModelName, text)))
    if text.endswith(".safetensors"):
        return _of_file(Path(text))
    nbytes = _parse_bytes(text)
    if nbytes is None:
        names = ", ".join(get_args(models.ModelName))
        hint = ("func bench --models resnet18,64MiB,model.safetensors", "names, sizes and files can be mixed")
        raise CommandError(f"unknown model '{text}': it is one of {names}, a .safetensors file, or a size", [hint])
    if not 4 <= nbytes <= LARGEST_BYTES or nbytes % 4:
        raise CommandError(f"a model of {text}: the size has to be a multiple of 4, from 4 bytes to 8 GiB")
    return _of_shapes(text, {"values": (nbytes // 4,)})


def _of_shapes(name: str, shapes: models.Shapes) -> Model:
    header = encode_header({tensor: ("F32", tuple(shape)) for tensor, shape in shapes.items()})
    return Model(name, header, 4 * models.parameter_count(shapes))


def _of_file(path: Path) -> Model:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 100 << 20))
        layout = parse_header(header)
    except OSError as error:
        raise CommandError(
            f"the model '{path}' cannot be read: {(error.strerror or str(error)).lower()}"
        ) from None
    except InvalidModel as error:
        raise CommandError(f"the model '{path}' is not valid: {error}") from None
    others = sorted({tensor.dtype for tensor in layout.tensors} - {"F32"})
    if others:
        raise CommandError(f"the model '{path}' has {', '.join(others)} tensors; only F32 can be compared so far")
    shapes = {tensor.name: tuple(tensor.shape) for tensor in layout.tensors}
    return _of_shapes(path.stem, shapes)


def _parse_bytes(text: str) -> int | None:
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = _UNITS.get(text[len(digits) :].strip().lower())
    try:
        return None if unit is None else round(float(digits) * unit)
    except (ValueError, OverflowError):
        return None


# --- arrival -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """When each client of a round sends."""

    name: str
    offsets: tuple[float, ...] = ()
    """Seconds after the start of the round, of a trace."""
    rate: float = 0.0
    """Updates a second on average, of a Poisson process."""

    def times(self, updates: int, seed: int) -> list[float]:
        """Seconds after the round's start at which each client sends, the first at 0."""
        if self.offsets:
            first = min(self.offsets[:updates])
            return [offset - first for offset in self.offsets[:updates]]
        if self.rate:
            gaps = np.random.default_rng(seed).exponential(1 / self.rate, updates)
            gaps[0] = 0
            return [float(time) for time in np.cumsum(gaps)]
        return [0.0] * updates

    def describe(self) -> str:
        """In words."""
        if self.rate:
            return f"poisson, {self.rate:g} updates a second"
        return self.name


def parse_arrival(text: str, rate: float, most_updates: int) -> Arrival:
    """`burst`, `poisson` (at `rate` updates a second), or a CSV file whose first column is seconds.

    Raises CommandError for anything else, and for a trace with fewer rows than `most_updates`.
    """
    if text == "burst":
        return Arrival("burst")
    if text == "poisson":
        return Arrival("poisson", rate=rate)
    if not text.endswith(".csv"):
        hint = ("func bench --arrival trace.csv", "a file with the seconds of each arrival in its first column")
        raise CommandError(f"unknown arrival '{text}': it is burst, poisson, or a .csv file", [hint])
    offsets = _read_trace(Path(text))
    if len(offsets) < most_updates:
        raise CommandError(
            f"the trace '{text}' has {len(offsets)} arrivals, but a round has {most_updates} updates"
        )
    return Arrival(Path(text).name, tuple(sorted(offsets)))


def _read_trace(path: Path) -> list[float]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row and row[0].strip()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CommandError(f"the trace '{path}' cannot be read: {error}") from None
    offsets = []
    for number, row in enumerate(rows, start=1):
        try:
            offset = float(row[0])
        except ValueError:
            if number == 1:
                continue  # the names of the columns
            raise CommandError(f"the trace '{path}', row {number}: '{row[0]}' is no number of seconds") from None
        if not 0 <= offset <= 3600:
            raise CommandError(f"the trace '{path}', row {number}: {offset:g} is not within an hour")
        offsets.append(offset)
    return offsets


# --- updates and what they should become ---------------------------------------------------------------------


class Workload:
    """The updates of one model, each client's weight in each round, and the right answer."""

    def __init__(self, model: Model, updates: int, *, seed: int = 1) -> None:
        self.model = model
        self.updates = updates
        self._seed = seed
        random = np.random.default_rng(seed)
        self._values = [
            random.standard_normal(model.elements, dtype=np.float32) for _ in range(min(updates, DISTINCT_UPDATES))
        ]
        self._encoded = [model.encode(values) for values in self._values]

    def update_of(self, client: int) -> memoryview:
        """The safetensors bytes that this client sends."""
        return self._encoded[client % len(self._encoded)]

    def initial_model(self) -> memoryview:
        """The model that round 1 starts from: zeros."""
        return self.model.encode(np.zeros(self.model.elements, dtype=np.float32))

    def samples(self, round_: int) -> Sequence[int]:
        """Each client's number of samples in this round; they differ, so that no round can pass for another and
        no update for a second one with the same values."""
        random = np.random.default_rng((self._seed, round_))
        numbers: list[int] = random.integers(10, 200, self.updates).tolist()
        return numbers

    def error(self, model: memoryview, round_: int) -> float:
        """Largest error of a round's model against the weighted mean in float64, relative to the mean magnitude of
        the summands. Raises RuntimeError if the bytes are no such model."""
        values = self.model.decode(model)
        weights = np.zeros(len(self._values))
        for client, samples in enumerate(self.samples(round_)):
            weights[client % len(weights)] += samples
        weights /= weights.sum()
        worst = 0.0
        for start in range(0, values.size, _TILE):
            tile = slice(start, start + _TILE)
            terms = np.stack([weight * one[tile] for weight, one in zip(weights, self._values, strict=True)])
            difference = np.abs(values[tile] - terms.sum(0))
            magnitude = np.maximum(np.abs(terms).sum(0), np.finfo(np.float64).tiny)  # zeros have to stay zeros
            worst = float(np.maximum(worst, np.max(difference / magnitude)))  # unlike max(), hands on a NaN
        return worst

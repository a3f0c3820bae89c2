"""When the clients of a round send: seconds after the new model was there for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from lifl.cli.common import CommandError

from lifl_bench.workload import parse_arrival

Times = npt.NDArray[np.float64]

TRACES: Final = ("burst", "poisson", "mobile", "always-on")

_SPREAD: Final = {"mobile": 0.3, "always-on": 0.05}
"""Standard deviation of the logarithm of the training time: phones differ more than servers."""


@dataclass(frozen=True)
class Trace:
    """When clients send.

    `burst`: all at once. `poisson`: at random, `rate` a second. `always-on`: when they have trained. `mobile`:
    after hibernating for a random time (LIFL paper: 0 to 60 s) and training. Training times are lognormal.
    """

    name: str = "burst"
    rate: float = 50.0
    train_s: float = 10.0
    """Median time that a client trains."""
    hibernation_s: float = 60.0
    """Longest time that a mobile client sleeps first."""
    offsets: Sequence[float] = ()
    """Of a file; then `name` is the file's."""

    def times(self, count: int, random: np.random.Generator) -> Times:
        """Seconds at which `count` clients send, ascending."""
        if self.offsets:
            return np.asarray(self.offsets[:count], np.float64)
        if self.name == "poisson":
            return np.cumsum(random.exponential(1 / self.rate, count))
        if self.name in _SPREAD:
            times = self.train_s * random.lognormal(0.0, _SPREAD[self.name], count)
            if self.name == "mobile":
                times += random.uniform(0.0, self.hibernation_s, count)
            return np.sort(times)
        return np.zeros(count)

    def describe(self) -> str:
        """In words."""
        if self.offsets:
            return self.name
        if self.name == "poisson":
            return f"poisson, {self.rate:g} updates a second"
        if self.name == "mobile":
            return f"mobile, hibernating up to {self.hibernation_s:g} s, training {self.train_s:g} s"
        return f"always on, training {self.train_s:g} s" if self.name == "always-on" else "burst"


def parse_trace(text: str, rate: float, train_s: float, hibernation_s: float, most_updates: int) -> Trace:
    """A trace by its name, or a CSV file whose first column is seconds.

    Raises CommandError for anything else, and for a file with fewer rows than `most_updates`.
    """
    if text in TRACES:
        return Trace(text, rate, train_s, hibernation_s)
    if not text.endswith(".csv"):
        names = ", ".join(TRACES)
        hints = [
            ("func simulate --trace mobile", "clients that sleep up to a minute"),
            ("func simulate --trace trace.csv", "a file with the seconds of each arrival in its first column"),
        ]
        raise CommandError(f"unknown trace '{text}': it is one of {names}, or a .csv file", hints)
    arrival = parse_arrival(text, rate, most_updates)
    return Trace(arrival.name, offsets=arrival.times(len(arrival.offsets), 0))

"""Server optimisers: how the top aggregator turns the mean of a round into the next global model.

Without one the mean of the updates is the next model. With one, the difference between the mean and the previous
model is taken for a gradient and a first-order method steps along it, as in Reddi et al., "Adaptive Federated
Optimization", ICLR 2021 (arXiv:2003.00295, algorithm 2), whose symbols are used here:

    delta = mean - previous            the pseudo-gradient of the round
    m     = beta1 * m + (1 - beta1) * delta
    v     = ...                        differs by method
    next  = previous + lr * m / (sqrt(v) + tau)

As in the paper there is no bias correction. All of it is elementwise: the caller may cut a model into any tiles,
in any order, and the result is the same to the last bit.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray = NDArray[np.floating[Any]]


@runtime_checkable
class ServerOptimizer(Protocol):
    """What a server optimiser offers; any object of this shape will do.

    Equal optimisers have the same class and settings: a job cannot be continued with an unequal one.
    """

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the arrays kept between rounds, each of the model's shape, zero before the first step."""
        ...

    def step(
        self, previous: FloatArray, mean: FloatArray, state: Mapping[str, FloatArray], round_number: int
    ) -> None:
        """Turn the mean of one tile into its new weights, in place.

        `previous` (weights the round started from, read-only), `mean` and the arrays of `state` are 1-D, of one
        length and one dtype, float32 or float64; `mean` and `state` are overwritten. `round_number` counts from 1.
        Must be elementwise: the caller chooses the tiles. Integer tensors do not come here.
        """
        ...

    def describe(self) -> str:
        """One line that names the method and all its settings, as it would be written in Python."""
        ...


def _check(
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
) -> None:
    """Raise ValueError unless `value` is finite and in [low, high), or in (low, high) if `open_low`."""
    if not (math.isfinite(value) and low <= value < high) or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must be a number in {bracket}{low:g}, {high:g}), not {value!r}")


@dataclass(frozen=True)
class _Settings:
    """Base of the optimisers here: frozen settings that compare and print by value."""

    def describe(self) -> str:
        """One line that names the method and all its settings, as it would be written in Python."""
        return repr(self)

    def __repr__(self) -> str:
        settings = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self))
        return f"{type(self).__name__}({settings})"


@dataclass(frozen=True, repr=False, kw_only=True)
class FedAvgM(_Settings):
    """Averaging with server momentum: m = momentum * m + delta; next = previous + lr * m.

    Source: Hsu, Qi and Brown 2019, arXiv:1909.06335. With lr=1 and momentum=0 it is plain averaging.
    Raises ValueError for lr <= 0 or a momentum outside [0, 1).
    """

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _check("lr", self.lr, 0.0, open_low=True)
        _check("momentum", self.momentum, 0.0, 1.0)

    @property
    def state_names(self) -> tuple[str, ...]:
        """`m`, the momentum."""
        return ("m",)

    def step(
        self, previous: FloatArray, mean: FloatArray, state: Mapping[str, FloatArray], round_number: int
    ) -> None:
        """Step one tile; see `ServerOptimizer.step`."""
        m = state["m"]
        mean -= previous
        m *= self.momentum
        m += mean
        mean[:] = m
        mean *= self.lr
        mean += previous


@dataclass(frozen=True, repr=False, kw_only=True)
class _Adaptive(_Settings, ABC):
    """The common part of the three adaptive methods of Reddi et al.; they differ in how v is updated.

    State `v` starts at tau squared, the smallest start that the paper allows. An exact zero in `v` means "not
    started yet", so callers need only hand in zeroed arrays. Without momentum (beta1 = 0) m equals delta and is
    not kept.
    """

    lr: float
    beta1: float
    tau: float

    def __post_init__(self) -> None:
        _check("lr", self.lr, 0.0, open_low=True)
        _check("beta1", self.beta1, 0.0, 1.0)
        # tau squared must be a normal float32, for v is kept in float32.
        _check("tau", self.tau, 1e-18)

    @property
    def state_names(self) -> tuple[str, ...]:
        """`m`, the first moment (if beta1 > 0), and `v`, the second moment."""
        return ("m", "v") if self.beta1 else ("v",)

    def step(
        self, previous: FloatArray, mean: FloatArray, state: Mapping[str, FloatArray], round_number: int
    ) -> None:
        """Step one tile; see `ServerOptimizer.step`. Uses one scratch array of the tile's size."""
        import numpy as np

        v = state["v"]
        np.copyto(v, self.tau * self.tau, where=v == 0)
        mean -= previous
        square = np.multiply(mean, mean)
        self._update_second_moment(v, square)
        if self.beta1:
            m = state["m"]
            m *= self.beta1
            mean *= 1.0 - self.beta1
            m += mean
            mean[:] = m
        divisor = np.sqrt(v, out=square)
        divisor += self.tau
        mean /= divisor
        mean *= self.lr
        mean += previous

    @abstractmethod
    def _update_second_moment(self, v: FloatArray, square: FloatArray) -> None:
        """Bring `v` up to date in place; `square` is delta squared and may be overwritten."""


@dataclass(frozen=True, repr=False, kw_only=True)
class FedAdagrad(_Adaptive):
    """Adagrad on the server: v = v + delta^2. The paper's experiments use no momentum with it.

    Raises ValueError for lr <= 0, beta1 outside [0, 1) or tau below 1e-18.
    """

    lr: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3

    def _update_second_moment(self, v: FloatArray, square: FloatArray) -> None:
        v += square


@dataclass(frozen=True, repr=False, kw_only=True)
class _Decaying(_Adaptive):
    """Methods whose second moment forgets, at the rate beta2."""

    beta1: float = 0.9
    tau: float = 1e-3
    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("beta2", self.beta2, 0.0, 1.0)


@dataclass(frozen=True, repr=False, kw_only=True)
class FedAdam(_Decaying):
    """Adam on the server: v = beta2 * v + (1 - beta2) * delta^2.

    Raises ValueError for lr <= 0, beta1 or beta2 outside [0, 1) or tau below 1e-18.
    """

    lr: float = 0.1

    def _update_second_moment(self, v: FloatArray, square: FloatArray) -> None:
        v *= self.beta2
        square *= 1.0 - self.beta2
        v += square


@dataclass(frozen=True, repr=False, kw_only=True)
class FedYogi(_Decaying):
    """Yogi on the server: v = v - (1 - beta2) * delta^2 * sign(v - delta^2), which forgets more slowly than Adam.

    Raises ValueError for lr <= 0, beta1 or beta2 outside [0, 1) or tau below 1e-18.
    """

    lr: float = 0.01

    def _update_second_moment(self, v: FloatArray, square: FloatArray) -> None:
        import numpy as np

        sign = np.subtract(v, square)
        np.sign(sign, out=sign)
        square *= 1.0 - self.beta2
        square *= sign
        v -= square

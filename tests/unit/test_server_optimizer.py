from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lifl.server_optimizer import FedAdagrad, FedAdam, FedAvgM, FedYogi, ServerOptimizer
from numpy.typing import NDArray

OPTIMIZERS: list[ServerOptimizer] = [
    FedAvgM(),
    FedAvgM(lr=0.5, momentum=0.0),
    FedAdagrad(),
    FedAdagrad(beta1=0.5),
    FedAdam(),
    FedAdam(beta1=0.0),
    FedYogi(),
]
ROUNDS = 4

Floats = NDArray[Any]


def reference_steps(optimizer: ServerOptimizer, start: float, means: list[float]) -> list[float]:
    """Algorithm 2 of arXiv:2003.00295 (and FedAvgM of arXiv:1909.06335) for one parameter, in Python floats."""
    settings: Any = optimizer
    x, m, v = start, 0.0, getattr(settings, "tau", 0.0) ** 2
    result = []
    for mean in means:
        delta = mean - x
        if isinstance(optimizer, FedAvgM):
            m = settings.momentum * m + delta
            x = x + settings.lr * m
        else:
            m = settings.beta1 * m + (1 - settings.beta1) * delta
            if isinstance(optimizer, FedAdagrad):
                v = v + delta**2
            elif isinstance(optimizer, FedAdam):
                v = settings.beta2 * v + (1 - settings.beta2) * delta**2
            else:
                sign = (v > delta**2) - (v < delta**2)
                v = v - (1 - settings.beta2) * delta**2 * sign
            x = x + settings.lr * m / (v**0.5 + settings.tau)
        result.append(x)
    return result


def run(
    optimizer: ServerOptimizer, start: Floats, means: Floats, cuts: list[int]
) -> tuple[Floats, dict[str, Floats]]:
    """All rounds over a model cut into tiles at `cuts`; the final weights and state."""
    weights = start.copy()
    state = {name: np.zeros_like(start) for name in optimizer.state_names}
    edges = [0, *cuts, start.size]
    for number, mean in enumerate(means, 1):
        result = mean.copy()
        for begin, end in pairwise(edges):
            previous = weights[begin:end].copy()
            previous.flags.writeable = False
            tile = {name: array[begin:end] for name, array in state.items()}
            optimizer.step(previous, result[begin:end], tile, number)
        weights = result
    return weights, state


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [("f4", 1e-4), ("f8", 1e-12)])
def test_steps_follow_the_formulas_of_the_papers(optimizer: ServerOptimizer, dtype: str, tolerance: float) -> None:
    random = np.random.default_rng(1)
    start = random.normal(size=37).astype(dtype)
    means = random.normal(size=(ROUNDS, 37)).astype(dtype)
    expected = [
        reference_steps(optimizer, float(x), [float(y) for y in means[:, i]])[-1] for i, x in enumerate(start)
    ]
    actual, _ = run(optimizer, start, means, [])
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@given(cuts=st.lists(st.integers(0, 300), max_size=6).map(sorted), seed=st.integers(0, 1000))
def test_any_tiling_gives_the_same_bits(optimizer: ServerOptimizer, cuts: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    start = random.normal(size=300).astype(np.float32)
    means = random.normal(size=(ROUNDS, 300)).astype(np.float32)
    whole, whole_state = run(optimizer, start, means, [])
    tiled, tiled_state = run(optimizer, start, means, cuts)
    np.testing.assert_array_equal(whole, tiled)
    for name in optimizer.state_names:
        np.testing.assert_array_equal(whole_state[name], tiled_state[name])


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_a_round_that_changes_nothing_leaves_a_fresh_model_as_it_is(optimizer: ServerOptimizer) -> None:
    start = np.linspace(-1, 1, 11, dtype=np.float32)
    after, _ = run(optimizer, start, start[None, :], [])
    np.testing.assert_allclose(after, start, atol=1e-7)


def test_momentum_of_zero_is_plain_averaging() -> None:
    start, mean = np.float32([1, 2]), np.float32([[5, -4]])
    after, _ = run(FedAvgM(lr=1.0, momentum=0.0), start, mean, [])
    np.testing.assert_array_equal(after, mean[0])


def test_the_second_moment_starts_at_tau_squared() -> None:
    _, state = run(FedAdagrad(tau=0.5), np.zeros(3), np.ones((1, 3)), [])
    np.testing.assert_array_equal(state["v"], 1.25)


def test_without_momentum_the_first_moment_is_not_kept() -> None:
    assert FedAdagrad().state_names == ("v",)
    assert FedAdam().state_names == ("m", "v")


def test_optimizers_are_equal_if_class_and_settings_are() -> None:
    assert FedAdam(lr=0.2) == FedAdam(lr=0.2)
    assert FedAdam(lr=0.2) != FedAdam(lr=0.1)
    assert FedAdam(lr=0.01) != FedYogi(lr=0.01)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_describe_is_the_python_that_makes_an_equal_one(optimizer: ServerOptimizer) -> None:
    names = {"FedAvgM": FedAvgM, "FedAdagrad": FedAdagrad, "FedAdam": FedAdam, "FedYogi": FedYogi}
    assert eval(optimizer.describe(), names) == optimizer


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (FedAvgM, {"lr": 0.0}),
        (FedAvgM, {"momentum": 1.0}),
        (FedAdam, {"lr": float("nan")}),
        (FedAdam, {"beta2": -0.1}),
        (FedYogi, {"beta1": 1.5}),
        (FedAdagrad, {"tau": 0.0}),
        (FedAdagrad, {"tau": float("inf")}),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        kind(**settings)

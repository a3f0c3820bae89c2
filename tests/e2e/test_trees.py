"""Whatever the tree, its order and its batches: the result is the weighted mean, to 1e-6 of sum |w x| / sum w."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifl.fold import Fold
from lifl.messages import Verdict
from lifl.model_layout import AccumulatorLayout, encode_header, parse_header, plan_update
from numpy.typing import NDArray

from tests.integration.platform_harness import Platform

TOLERANCE = 1e-6
SIZE = 700

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def sequential_mean(updates: list[Floats], weights: list[float]) -> tuple[Doubles, Doubles]:
    """The weighted mean, added up one after the other in float64, and sum |w x| / sum w."""
    total, magnitude = np.zeros(updates[0].size), np.zeros(updates[0].size)
    for update, weight in zip(updates, weights, strict=True):
        total += weight * update.astype(np.float64)
        magnitude += np.abs(weight * update.astype(np.float64))
    return total / sum(weights), magnitude / sum(weights)


def largest_error(result: Floats, updates: list[Floats], weights: list[float]) -> float:
    mean, magnitude = sequential_mean(updates, weights)
    return float(np.max(np.abs(result - mean) / np.where(magnitude > 0, magnitude, 1.0)))


# --- arithmetic ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A round: weights and scales of the updates, the leaf of each, and the size of each batch in turn."""

    weights: list[float]
    scales: list[float]
    leaves: list[int]
    order: list[int]
    batches: list[int]
    seed: int


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    count = draw(st.integers(1, 40))
    several = {"min_size": count, "max_size": count}
    weight = st.floats(1e-3, 1e6) | st.integers(1, 100_000).map(float)
    return Plan(
        weights=draw(st.lists(weight, **several)),
        scales=draw(st.lists(st.sampled_from([1e-6, 1e-3, 1.0, 50.0, 1e4]), **several)),
        leaves=draw(st.lists(st.integers(0, draw(st.integers(0, 3))), **several)),
        order=draw(st.permutations(range(count))),
        batches=draw(st.lists(st.integers(1, 64), min_size=1, max_size=10)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@given(plan=plans(), precision=st.sampled_from(["float32", "float64"]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_tree_of_folds_gives_the_weighted_mean(plan: Plan, precision: str) -> None:
    random = np.random.default_rng(plan.seed)
    updates = [(scale * random.standard_normal(SIZE)).astype(np.float32) for scale in plan.scales]
    layout = parse_header(encode_header({"a": ("F32", [SIZE - 33]), "b": ("F32", [33])}))
    accumulators = AccumulatorLayout(layout, precision)  # type: ignore[arg-type]
    fold = Fold(accumulators)
    identity = plan_update(layout, layout)
    sums: dict[int, list[bytearray]] = {}
    turn = 0
    for leaf in sorted(set(plan.leaves)):
        waiting = [number for number in plan.order if plan.leaves[number] == leaf]
        # As a worker does: from one of two accumulators to the other.
        pair = [bytearray(accumulators.nbytes), bytearray(accumulators.nbytes)]
        old: bytearray | None = None
        while waiting:
            size = plan.batches[turn % len(plan.batches)]
            batch, waiting = waiting[:size], waiting[size:]
            inputs = [fold.update(updates[number].tobytes(), identity, plan.weights[number]) for number in batch]
            assert fold.fold(pair[0], inputs, old)
            old = pair[0]
            pair.reverse()
            turn += 1
        assert old is not None
        sums[leaf] = [old, pair[0]]
    # The top merges some partial aggregates on the way and the others at the end.
    first, *others = sums.values()
    top, spare = first
    early, late = others[::2], others[1::2]
    if early:
        assert fold.fold(spare, [fold.partial(partial) for partial, _ in early], top)
        top = spare
    result = np.empty(SIZE, np.float32)
    assert fold.finish(result.view(np.uint8), [top, *(partial for partial, _ in late)], sum(plan.weights))
    assert largest_error(result, updates, plan.weights) < TOLERANCE


# --- nodes ---------------------------------------------------------------------------------------------------

MODEL = {"a": np.zeros(SIZE - 33, np.float32), "b": np.zeros(33, np.float32)}

# cores, timing, slots, updates for each leaf, updates of a round
TREES = [
    (1, "eager", 1, 2, 1),
    (2, "eager", 3, 2, 23),
    (3, "eager", 40, 4, 40),
    (4, "eager", 5, 1, 29),
    (2, "lazy", 40, 2, 40),
    (4, "lazy", 19, 5, 19),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("cores", "timing", "slots", "per_leaf", "count"), TREES)
def test_any_tree_of_workers_gives_the_weighted_mean(
    tmp_path: Path, data_plane: str, cores: int, timing: str, slots: int, per_leaf: int, count: int
) -> None:
    random = np.random.default_rng(cores * 1000 + slots)
    with Platform(tmp_path, data_plane, cores=cores) as platform:
        state = platform.create_job(MODEL, goal=count, timing=timing, slots=slots, updates_per_leaf=per_leaf)
        assert state.current is not None
        assert state.current.leaves == min(cores, -(-count // per_leaf))
        for number in (1, 2):
            updates = [
                (random.choice([1e-3, 1.0, 1e3]) * random.standard_normal(SIZE)).astype(np.float32)
                for _ in range(count)
            ]
            weights = random.choice([0.5, 1.0, 17.0, 60_000.0], count).tolist()
            for client in random.permutation(count):
                verdict = platform.submit(f"c{client}", updates[client].tobytes(), number, weights[client])
                assert isinstance(verdict, Verdict)
                assert verdict.status == "accepted"
            state = platform.wait_for_round(number + 1)
            assert state.status == "running", state.detail
            assert largest_error(platform.model(), updates, weights) < TOLERANCE
        platform.wait_for_all_slots()

"""Whole rounds through agent, coordinator, zygote and workers, with the test process as the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lifl.messages import Verdict
from tests.integration.platform_harness import Platform, encode_model

MODEL = {"layer.weight": np.zeros((50, 101), np.float32), "layer.bias": np.zeros(101, np.float32)}
SIZE = sum(array.size for array in MODEL.values())


def random_update(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


def weighted_mean(updates: list[np.ndarray], weights: list[float]) -> np.ndarray:
    return np.average(np.stack(updates).astype(np.float64), axis=0, weights=weights)


def assert_close(result: np.ndarray, updates: list[np.ndarray], weights: list[float]) -> None:
    scale = np.average(np.abs(np.stack(updates)).astype(np.float64), axis=0, weights=weights)
    assert np.max(np.abs(result - weighted_mean(updates, weights)) / scale) < 1e-6


@pytest.fixture
def platform(tmp_path: Path, data_plane: str) -> Iterator[Platform]:
    with Platform(tmp_path, data_plane) as platform:
        yield platform


@pytest.mark.parametrize("timing", ["eager", "lazy"])
def test_three_rounds_give_the_weighted_mean_of_each(platform: Platform, timing: str):
    platform.create_job(MODEL, goal=6, timing=timing)
    for round_number in range(1, 4):
        updates = [random_update(10 * round_number + client) for client in range(6)]
        weights = [1.0 + 3 * client for client in range(6)]
        for client, (update, weight) in enumerate(zip(updates, weights, strict=True)):
            verdict = platform.submit(f"client-{client}", update.tobytes(), round_number, weight)
            assert isinstance(verdict, Verdict)
            assert verdict.status == "accepted"
        state = platform.wait_for_round(round_number + 1)
        assert state.status == "running", state.detail
        assert_close(platform.model(), updates, weights)
    platform.wait_for_all_slots()


def test_a_pool_of_few_slots_serves_a_round_of_many_updates(platform: Platform):
    platform.create_job(MODEL, goal=50, slots=3)
    updates = [random_update(client) for client in range(50)]
    for client, update in enumerate(updates):
        platform.submit(str(client), update.tobytes())
    platform.wait_for_round(2)
    assert_close(platform.model(), updates, [1.0] * 50)
    platform.wait_for_all_slots()

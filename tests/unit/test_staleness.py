"""How much a difference counts that is to an old model."""

from __future__ import annotations

import pytest
from lifl.staleness import staleness_weight


@pytest.mark.parametrize(
    ("staleness", "exponent", "weight"),
    [(0, 0.5, 1.0), (3, 0.5, 0.5), (8, 0.5, 1 / 3), (1, 1.0, 0.5), (9_999, 0.0, 1.0), (-1, 0.5, 1.0)],
)
def test_an_old_difference_counts_less(staleness: int, exponent: float, weight: float):
    assert staleness_weight(staleness, exponent) == pytest.approx(weight)


def test_even_the_oldest_difference_that_a_job_may_take_has_a_finite_weight():
    assert 0 < staleness_weight(10_000, 10.0) < 1e-30

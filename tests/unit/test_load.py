"""What a node's load is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lifl.cluster.load import ExecutionEstimate, arrival_rate, limit_rate, residual_capacity
from lifl.cluster.messages import NodeLoad
from lifl.messages import EndpointTraffic, Role, endpoint_id

SECOND = 1_000_000_000


def traffic(interarrival: int, last: int, role: Role = "worker", number: int = 1) -> EndpointTraffic:
    return EndpointTraffic(endpoint_id(role, number), 9, 144, last, interarrival, 0, 0, 0)


def test_the_rate_is_the_inverse_of_the_time_between_arrivals():
    assert arrival_rate([traffic(SECOND // 50, SECOND)], SECOND) == pytest.approx(50)


def test_the_rates_of_all_workers_add_up_and_those_of_others_do_not_count():
    rows = [
        traffic(SECOND // 50, SECOND, number=1),
        traffic(SECOND // 25, SECOND, number=2),
        traffic(1, SECOND, "gateway"),
        traffic(1, SECOND, "coordinator"),
        EndpointTraffic(7, 9, 144, SECOND, 1, 0, 0, 0),
    ]
    assert arrival_rate(rows, SECOND) == pytest.approx(75)


def test_a_worker_that_got_nothing_or_one_descriptor_has_no_rate():
    assert arrival_rate([traffic(0, 0), traffic(0, SECOND)], SECOND) == 0.0
    assert arrival_rate([], SECOND) == 0.0


def test_the_rate_fades_when_nothing_arrives_any_more():
    row = traffic(SECOND // 1000, SECOND)
    rates = [arrival_rate([row], SECOND + passed) for passed in (0, SECOND // 1000, SECOND // 10, 100 * SECOND)]
    assert rates == pytest.approx([1000, 1000, 10, 0.01])


def test_counters_that_are_newer_than_the_clock_reading_do_no_harm():
    assert arrival_rate([traffic(SECOND // 50, 2 * SECOND)], SECOND) == pytest.approx(50)


@given(
    interarrival=st.integers(1, 1 << 62),
    last=st.integers(0, 1 << 62),
    passed=st.lists(st.integers(0, 1 << 62), min_size=2, max_size=2).map(sorted),
)
def test_a_rate_is_never_negative_never_above_that_of_the_arrivals_and_never_grows_in_silence(
    interarrival: int, last: int, passed: list[int]
):
    row = traffic(interarrival, last)
    sooner, later = (arrival_rate([row], last + each) for each in passed)
    assert 0 < later <= sooner <= SECOND / interarrival


def test_after_a_burst_a_node_that_has_nothing_left_is_not_busy():
    assert limit_rate(1000.0, 0.05, 0) == 0.0
    assert limit_rate(1000.0, 0.05, 3) == pytest.approx(60)
    assert limit_rate(40.0, 0.05, 3) == 40.0
    assert limit_rate(40.0, 0.0, 0) == 40.0  # nothing is known of E yet, so nothing counts anyway


def test_the_execution_time_is_smoothed_and_starts_with_the_first_one():
    estimate = ExecutionEstimate()
    assert estimate.seconds == 0.0
    assert estimate.observe(0.8) == 0.8
    assert estimate.observe(1.6) == pytest.approx(0.9)
    assert estimate.seconds == pytest.approx(0.9)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1), st.floats(0.01, 1))
def test_the_smoothed_execution_time_stays_within_what_was_observed(times: list[float], weight: float):
    estimate = ExecutionEstimate(weight)
    for seconds in times:
        estimate.observe(seconds)
    assert min(times) * (1 - 1e-9) <= estimate.seconds <= max(times) * (1 + 1e-9)


def test_the_residual_capacity_is_what_littles_law_leaves_less_what_is_under_way():
    load = NodeLoad(arrival_rate=50, execution_seconds=0.1)
    assert residual_capacity(20, load) == pytest.approx(15)
    assert residual_capacity(20, load, in_flight=4) == pytest.approx(11)
    assert residual_capacity(20, load, in_flight=40) == pytest.approx(-25)
    assert residual_capacity(20, NodeLoad()) == 20

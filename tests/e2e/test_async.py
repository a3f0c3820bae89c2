"""Asynchronous jobs and over-selection as clients meet them: over HTTP, each at its own pace."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from lifl.client import Submission
from lifl.errors import Refused
from numpy.typing import NDArray

from tests.e2e.node_harness import (
    SMALL,
    LiveNode,
    create_job,
    encode,
    flat,
    headers_of_update,
    model_after,
    post_update,
    random_like,
    until,
)

pytestmark = pytest.mark.timeout(120)

Doubles = NDArray[np.float64]


def submit_difference(
    node: LiveNode, job: str, client: str, base: int, seed: int, weight: float = 1.0
) -> Submission:
    with node.client(job, client) as connection:
        difference = random_like(SMALL, seed)
        return connection.submit(difference, num_samples=weight, round=base, delta=True)


# --- arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.5])
def test_old_differences_count_as_the_jobs_exponent_says(shared_node: LiveNode, exponent: float) -> None:
    job = f"exponent-{int(10 * exponent)}"
    create_job(shared_node, job, random_like(SMALL, 1), goal=3, mode="async", staleness_exponent=exponent)
    model = flat(random_like(SMALL, 1))
    for number in range(1, 6):
        total, weights = np.zeros(model.size), 0.0
        for place, age in enumerate((0, number // 2, number - 1)):
            seed, weight, base = 10 * number + place, 1.0 + 3 * place, number - age
            outcome = submit_difference(shared_node, job, f"{number}-{place}", base, seed, weight)
            assert outcome == Submission("accepted", number)
            total += weight * (1 + age) ** -exponent * flat(random_like(SMALL, seed))
            weights += weight
        expected = model + total / weights
        model = flat(model_after(shared_node, job, number))
        assert np.max(np.abs(model - expected)) < 1e-5


# --- convergence ---------------------------------------------------------------------------------------------

PARAMETERS, ROWS, CLIENTS, SLOW, ROUNDS = 12, 6, 8, 3, 120


class LeastSquares:
    """A convex problem that no client can solve alone: each has fewer equations than there are unknowns."""

    def __init__(self, seed: int) -> None:
        chance = np.random.default_rng(seed)
        self.solution = chance.standard_normal(PARAMETERS)
        self.matrices = chance.standard_normal((CLIENTS, ROWS, PARAMETERS)) / np.sqrt(ROWS)

    def step(self, client: int, model: Doubles) -> Doubles:
        """What one step of gradient descent on the client's data changes."""
        matrix = self.matrices[client]
        step: Doubles = -0.25 * matrix.T @ (matrix @ (model - self.solution))
        return step

    def error(self, model: Doubles) -> float:
        return float(np.linalg.norm(model - self.solution))


def run_client(node: LiveNode, problem: LeastSquares, job: str, index: int) -> int:
    """Train until the job ends. A slow client sends when others have made two models meanwhile. The most stale."""
    most = 0
    with node.client(job, f"client-{index}") as client:
        model = client.fetch_model()
        while model.round <= ROUNDS:
            step = problem.step(index, model.tensors["x"].astype(np.float64)).astype(np.float32)
            if index < SLOW:
                client.wait_for_round(after=min(model.round + 1, ROUNDS), timeout=30)
            try:
                outcome = client.submit({"x": step}, num_samples=1, round=model.round, delta=True)
            except Refused:
                assert client.describe()["status"] == "complete"
                break
            if outcome.status == "accepted":
                most = max(most, outcome.round - model.round)
            model = client.wait_for_round(after=model.round, timeout=30)
    return most


def test_clients_of_any_pace_reach_the_optimum_together(shared_node: LiveNode) -> None:
    problem = LeastSquares(3)
    create_job(shared_node, "convex", {"x": np.zeros(PARAMETERS, np.float32)}, goal=4, mode="async", rounds=ROUNDS)
    with ThreadPoolExecutor(CLIENTS) as pool:
        staleness = list(pool.map(partial(run_client, shared_node, problem, "convex"), range(CLIENTS)))
    assert min(staleness[:SLOW]) >= 2, "no update was stale"
    result = model_after(shared_node, "convex", ROUNDS)["x"].astype(np.float64)
    start = problem.error(np.zeros(PARAMETERS))
    assert problem.error(result) < 0.01 * start


# --- identities ----------------------------------------------------------------------------------------------


def test_an_update_counts_once_though_its_client_and_its_node_try_it_again(node: LiveNode) -> None:
    create_job(node, "job", SMALL, goal=2, mode="async", durability="sync")
    first = [submit_difference(node, "job", client, 1, seed).status for seed, client in enumerate("ab")]
    assert first == ["accepted", "accepted"]
    model = model_after(node, "job", 1)
    assert submit_difference(node, "job", "a", 1, 0) == Submission("duplicate", 1)
    assert submit_difference(node, "job", "c", 1, 2) == Submission("accepted", 2)
    node.kill("coordinator")
    until(lambda: node.describe("job")["status"] == "running", "job after the restart")
    # The open buffer was in memory only; what is in a model is known for good.
    assert submit_difference(node, "job", "a", 1, 0) == Submission("duplicate", 1)
    assert submit_difference(node, "job", "c", 1, 2) == Submission("accepted", 2)
    assert submit_difference(node, "job", "c", 1, 2) == Submission("duplicate", 1)
    assert submit_difference(node, "job", "c", 2, 3) == Submission("accepted", 2)
    expected = flat(model) + (flat(random_like(SMALL, 2)) / np.sqrt(2) + flat(random_like(SMALL, 3))) / 2
    assert np.max(np.abs(flat(model_after(node, "job", 2)) - expected)) < 1e-5
    node.assert_all_slots_free("job")


def test_hundreds_of_updates_that_overlap_with_closings_are_all_in_some_buffer(shared_node: LiveNode) -> None:
    """None is refused, though most of them meet a buffer that is full or just being closed."""
    create_job(
        shared_node, "crowd", {"x": np.zeros(3, np.float32)}, goal=3, mode="async", max_staleness=1000, slots=4
    )
    steps = np.random.default_rng(5).integers(-8, 8, (300, 3)).astype(np.float32)

    def send(number: int) -> Submission:
        with shared_node.client("crowd", f"client-{number}") as client:
            return client.submit({"x": steps[number]}, num_samples=1, round=1, delta=True)

    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(send, range(300)))
    assert {outcome.status for outcome in outcomes} == {"accepted"}
    buffers = [outcome.round for outcome in outcomes]
    assert sorted(buffers) == sorted([*range(1, 101)] * 3)
    expected = np.zeros(3)
    for number, buffer in enumerate(buffers):
        expected += steps[number] / np.sqrt(buffer) / 3
    assert np.max(np.abs(model_after(shared_node, "crowd", 100)["x"] - expected)) < 1e-3


def test_new_weights_are_refused_with_a_word_on_what_to_do(shared_node: LiveNode) -> None:
    create_job(shared_node, "weights", SMALL, goal=1, mode="async")
    answer = post_update(shared_node, "weights", encode(SMALL), headers_of_update("a"))
    assert (answer.status, answer.problem["title"]) == (422, "Not a difference")
    assert "ce-kind: delta" in answer.problem["detail"]


# --- over-selection ------------------------------------------------------------------------------------------


def take_part(node: LiveNode, job: str, number: int, client: int) -> bool:
    with node.client(job, f"client-{client}") as connection:
        return connection.take_part(number)


def send(node: LiveNode, job: str, client: int, number: int) -> Submission:
    with node.client(job, f"client-{client}") as connection:
        return connection.submit(random_like(SMALL, 100 * number + client), num_samples=1, round=number)


def mean_of(clients: list[int], number: int) -> Doubles:
    mean: Doubles = np.mean([flat(random_like(SMALL, 100 * number + client)) for client in clients], axis=0)
    return mean


def test_more_clients_are_selected_than_a_round_needs_and_the_slow_ones_are_late(shared_node: LiveNode) -> None:
    create_job(shared_node, "chosen", SMALL, goal=4, over_selection=0.5)
    for number in (1, 2):
        with ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(partial(take_part, shared_node, "chosen", number), range(10)))
        chosen = [client for client, is_chosen in enumerate(answers) if is_chosen]
        others = [client for client, is_chosen in enumerate(answers) if not is_chosen]
        assert len(chosen) == 6
        assert [take_part(shared_node, "chosen", number, client) for client in range(10)] == answers
        assert send(shared_node, "chosen", others[0], number) == Submission("unselected", number)
        for client in chosen[:4]:
            assert send(shared_node, "chosen", client, number) == Submission("accepted", number)
        result = flat(model_after(shared_node, "chosen", number))
        assert np.max(np.abs(result - mean_of(chosen[:4], number))) < 1e-6
        assert send(shared_node, "chosen", chosen[4], number) == Submission("late", number + 1)
        assert take_part(shared_node, "chosen", number, chosen[5]) is False
    last: dict[str, Any] = shared_node.describe("chosen")["last"]
    # The straggler of round 1 came when round 2 was open.
    assert (last["accepted"], last["selected"], last["late"]) == (4, 6, 1)
    shared_node.assert_all_slots_free("chosen")


def test_a_straggler_deadline_ends_a_round_whose_selected_clients_do_not_come(shared_node: LiveNode) -> None:
    begin = time.monotonic()
    create_job(shared_node, "deadline", SMALL, goal=5, over_selection=0.2, quorum=3, deadline=1.5)
    assert [take_part(shared_node, "deadline", 1, client) for client in range(7)] == [True] * 6 + [False]
    for client in (1, 3, 5):
        assert send(shared_node, "deadline", client, 1).status == "accepted"
    result = flat(model_after(shared_node, "deadline", 1))
    assert time.monotonic() - begin >= 1.5
    assert np.max(np.abs(result - mean_of([1, 3, 5], 1))) < 1e-6
    assert send(shared_node, "deadline", 0, 1) == Submission("late", 2)

"""Asynchronous jobs and over-selection over several hosts, which are network namespaces."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from lifl.client import Client, Submission
from lifl.staleness import base_of, staleness_weight
from lifl_bench.cluster import Cluster
from numpy.typing import NDArray

from tests.e2e import cluster_clients as clients
from tests.e2e.cluster_state import job_state, round_of, until

pytestmark = pytest.mark.timeout(120)

SIZE = 3000
EXPONENT = 1.0

Doubles = NDArray[np.float64]


def difference(client: int, base: int) -> clients.Vector:
    """What a client has learnt since the model of round `base`."""
    return clients.parameters(client, base, SIZE) - np.float32(8)


def send(cluster: Cluster, node: int, client: int, base: int) -> Submission:
    def submit() -> Submission:
        with Client(cluster.url(node), clients.JOB, f"c{client}", retries=8) as sender:
            update = {"w": difference(client, base)}
            return sender.submit(update, num_samples=clients.samples(client), round=base, delta=True)

    return cluster.call(submit)


def contributors(cluster: Cluster, number: int) -> list[str]:
    """What counts in a complete round, by the coordinator's journal."""
    part = cluster.get(f"/v1/jobs/{clients.JOB}/rounds/{number}/updates")
    assert not part["next"]
    return [update["client"] for update in part["updates"] if update["status"] == "counted"]


def buffer_mean(names: Iterable[str], number: int) -> Doubles:
    """What a buffer changes in the model: sum(w s d) / sum(w)."""
    total, weight = np.zeros(SIZE), 0.0
    for name in names:
        client, base = int(name[1:].partition("@")[0]), base_of(name)
        scale = staleness_weight(number - base, EXPONENT)
        total += clients.samples(client) * scale * difference(client, base).astype(np.float64)
        weight += clients.samples(client)
    return total / weight


def check_history(cluster: Cluster, model: clients.Vector, rounds: int) -> list[str]:
    """Assert that a model comes of exactly the updates that the journal names; returns them, none twice."""
    expected = np.zeros(SIZE, np.float32)
    found: list[str] = []
    for number in range(1, rounds + 1):
        names = contributors(cluster, number)
        found += names
        expected = (expected.astype(np.float64) + buffer_mean(names, number)).astype(np.float32)
    assert len(found) == len(set(found)), "an update counts twice"
    assert np.max(np.abs(expected - model)) < 1e-3, "the model has other updates than the journal"
    return found


def model_round(cluster: Cluster) -> int:
    return int(job_state(cluster)["model_round"])


def test_updates_that_meet_a_buffer_being_closed_on_any_node_are_all_in_a_later_one(
    make_cluster: Callable[..., Cluster],
) -> None:
    """None is refused, and sums of other nodes always find a slot beside updates that wait for the next buffer."""
    cluster = make_cluster(3, lease=5.0)
    options = {"mode": "async", "max_staleness": 1000, "staleness_exponent": EXPONENT, "slots": 4}
    clients.create_job(cluster, SIZE, goal=4, placement="worst-fit", **options)
    count = 120
    with ThreadPoolExecutor(12) as pool:
        sent = list(pool.map(lambda n: send(cluster, cluster.numbers[n % 3], n, 1), range(count)))
    assert [submission.status for submission in sent] == ["accepted"] * count
    model = clients.wait_for_model(cluster, 2, count // 4)
    names = check_history(cluster, model, count // 4)
    assert sorted(names) == sorted(f"c{client}@1" for client in range(count))
    assert max(round_of(cluster, number)["nodes"] for number in range(1, count // 4)) > 1
    again = [send(cluster, node, client, 1).status for node, client in ((1, 0), (2, 0), (3, 17))]
    assert again == ["duplicate"] * 3


class Walkers(clients.Trainers):
    """Clients that train at their own pace, whatever becomes of the nodes."""

    def __init__(self, cluster: Cluster, count: int) -> None:
        super().__init__(cluster, range(count), SIZE)
        self.accepted: set[str] = set()

    def train(self, client: Client, number: int) -> None:
        chance = random.Random(number)
        while not self.is_stopping:
            model = client.fetch_model()
            time.sleep(chance.uniform(0, 0.02) * (1 + 9 * (number % 4 == 0)))  # some are slow
            update = {"w": difference(number, model.round)}
            sent = client.submit(update, num_samples=clients.samples(number), round=model.round, delta=True)
            if sent.status == "accepted":
                self.accepted.add(f"c{number}@{model.round}")
            client.wait_for_round(after=model.round, timeout=10)


def test_nodes_and_coordinator_that_are_killed_cost_no_model_of_an_asynchronous_job(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(3, lease=1.5)
    options = {"mode": "async", "max_staleness": 50, "staleness_exponent": EXPONENT, "durability": "sync"}
    clients.create_job(cluster, SIZE, goal=4, placement="worst-fit", **options)
    with Walkers(cluster, 9) as walkers:
        for node in (2, 3):
            time.sleep(1.0)
            cluster.kill(node)
            time.sleep(2.0)
            cluster.start_node(node)
        cluster.kill_coordinator()
        cluster.start_coordinator()
        before = model_round(cluster)
        until(lambda: model_round(cluster) > before + 5, what="models after all that")
    # The newest that the node has: updates that had waited may still make another, and nodes keep few.
    with cluster.call(lambda: Client(cluster.url(1), clients.JOB, "observer", retries=8)) as observer:
        newest = cluster.call(observer.fetch_model)
    complete, model = newest.round - 1, np.array(newest.tensors["w"])
    names = check_history(cluster, model, complete)
    assert walkers.accepted & set(names), "no client has heard that its update counts"
    assert (
        max(number - base_of(name) for number in range(1, complete) for name in contributors(cluster, number)) > 1
    )


def test_a_round_over_nodes_selects_a_few_more_clients_than_it_needs(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(2)
    clients.create_job(cluster, SIZE, goal=4, over_selection=0.5, redirect=False)

    def take_part(node: int, client: int) -> bool:
        def ask() -> bool:
            with Client(cluster.url(node), clients.JOB, f"c{client}", retries=8) as sender:
                return sender.take_part(1)

        return cluster.call(ask)

    assert [take_part(1 + client % 2, client) for client in range(8)] == [True] * 6 + [False] * 2
    assert take_part(1, 5), "asking again, elsewhere, does no harm"
    assert clients.submit(cluster, 1, 7, 1, SIZE) == "unselected"
    assert clients.submit_all(cluster, [(1, 0), (2, 1), (1, 5), (2, 3)], 1, SIZE) == ["accepted"] * 4
    model = clients.wait_for_model(cluster, 1, 1)
    assert sorted(clients.check_round(cluster, model, 1)) == [0, 1, 3, 5]
    assert clients.submit(cluster, 2, 4, 1, SIZE) == "late"
    state: dict[str, Any] = round_of(cluster, 1)
    assert (state["accepted"], state["selected"]) == (4, 6)

"""Many nodes: rounds over several hosts, and what happens when hosts, links and the coordinator fail.

Every host is a network namespace with an address of its own, and runs what users run.
"""

from __future__ import annotations

import random
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from lifl_bench.cluster import Cluster

from tests.e2e import cluster_clients as clients
from tests.e2e.cluster_state import accepted, restart_coordinator, round_of, spread, until

pytestmark = pytest.mark.timeout(180)

SIZE = 5000
LARGE = 2_500_000  # sums of 20 MB, which take seconds over a slow link


# --- in good weather -------------------------------------------------------------------------------------------


def test_a_round_over_three_nodes_makes_the_exact_mean_and_every_gateway_has_it(
    make_cluster: Callable[..., Cluster],
):
    cluster = make_cluster(3)
    clients.create_job(cluster, SIZE, goal=9, redirect=False)
    for number in (1, 2, 3):
        answers = clients.submit_all(cluster, spread(cluster, 9), number, SIZE)
        assert answers == ["accepted"] * 9
        models = [clients.wait_for_model(cluster, node, number) for node in cluster.numbers]
        assert sorted(clients.check_round(cluster, models[0], number)) == list(range(9))
        assert all(np.array_equal(model, models[0]) for model in models)
        state = round_of(cluster, number)
        assert (state["nodes"], state["accepted"]) == (3, 9)
    sums = 3 * 2 * 8 * SIZE  # two nodes send theirs in each round
    assert {way: sum(partial_bytes(cluster, n, way) for n in cluster.numbers) for way in ("in", "out")} == {
        "in": sums,
        "out": sums,
    }


def partial_bytes(cluster: Cluster, node: int, direction: str) -> float:
    """Bytes of partial aggregates that a node's gateway tells Prometheus; 0 when it tells nothing of them."""
    series = f'lifl_gateway_partial_bytes_total{{direction="{direction}"}}'

    def read() -> str:
        with urllib.request.urlopen(cluster.url(node) + "/metrics", timeout=10) as answer:
            return str(answer.read(), "utf-8")

    lines = cluster.call(read).splitlines()
    return sum(float(line.removeprefix(series)) for line in lines if line.startswith(series))


def test_a_cluster_that_waits_for_updates_uses_hardly_any_cpu(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(2, lease=5.0)
    clients.create_job(cluster, SIZE, goal=4, redirect=False)
    assert clients.submit_all(cluster, spread(cluster, 4), 1, SIZE) == ["accepted"] * 4
    clients.wait_for_model(cluster, 1, 1)
    time.sleep(1)
    before = cluster.cpu_seconds()
    time.sleep(3)
    assert cluster.cpu_seconds() - before < 0.6, "something polls"


def test_best_fit_folds_all_on_one_node_and_sends_clients_there(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(3, capacity=20)
    clients.create_job(cluster, SIZE, goal=9)
    assert clients.submit_all(cluster, spread(cluster, 9), 1, SIZE) == ["accepted"] * 9
    clients.check_round(cluster, clients.wait_for_model(cluster, 2, 1), 1)
    assert round_of(cluster, 1)["nodes"] == 1


def test_worst_fit_uses_all_nodes(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(3, capacity=20)
    clients.create_job(cluster, SIZE, goal=9, placement="worst-fit")
    assert clients.submit_all(cluster, spread(cluster, 9), 1, SIZE) == ["accepted"] * 9
    clients.check_round(cluster, clients.wait_for_model(cluster, 1, 1), 1)
    assert round_of(cluster, 1)["nodes"] == 3


def test_a_node_that_gets_more_updates_than_planned_gets_more_aggregators_in_the_same_round(
    make_cluster: Callable[..., Cluster],
):
    cluster = make_cluster(2)
    clients.create_job(cluster, SIZE, goal=4, updates_per_leaf=2, placement="worst-fit", redirect=False)
    assert clients.submit_all(cluster, [(2, client) for client in range(4)], 1, SIZE) == ["accepted"] * 4
    clients.check_round(cluster, clients.wait_for_model(cluster, 1, 1), 1)
    until(lambda: round_of(cluster, 1)["leaves"] == 2, what="a second leaf")
    assert round_of(cluster, 1)["nodes"] == 1


def test_a_client_that_sends_twice_counts_once_whichever_gateways_it_uses(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(2)
    clients.create_job(cluster, SIZE, goal=3, redirect=False)
    assert clients.submit(cluster, 1, 7, 1, SIZE) == "accepted"
    assert clients.submit(cluster, 1, 7, 1, SIZE) == "duplicate"
    assert clients.submit(cluster, 2, 7, 1, SIZE) == "duplicate"
    assert clients.submit_all(cluster, [(1, 1), (2, 2)], 1, SIZE) == ["accepted"] * 2
    assert sorted(clients.check_round(cluster, clients.wait_for_model(cluster, 2, 1), 1)) == [1, 2, 7]


def test_an_update_that_is_not_finite_is_left_out_and_the_others_count(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(2)
    clients.create_job(cluster, SIZE, goal=4, redirect=False)

    def send_nan() -> str:
        from lifl.client import Client

        with Client(cluster.url(2), clients.JOB, "c99") as client:
            bad = {"w": np.full(SIZE, np.nan, np.float32)}
            return client.submit(bad, num_samples=1, round=1).status

    assert cluster.call(send_nan) == "accepted"
    until(lambda: accepted(cluster) == 0, what="the rejection")
    assert clients.submit_all(cluster, spread(cluster, 4), 1, SIZE) == ["accepted"] * 4
    assert sorted(clients.check_round(cluster, clients.wait_for_model(cluster, 1, 1), 1)) == [0, 1, 2, 3]
    assert round_of(cluster, 1)["rejected"] == 1


def test_a_server_optimiser_goes_on_when_another_node_becomes_the_top(make_cluster: Callable[..., Cluster]):
    """The node that keeps the momentum dies; the next top has it from the coordinator's checkpoint."""
    cluster = make_cluster(2)

    def create() -> None:
        from lifl.client import Client

        with Client(cluster.url(1), clients.JOB, "operator", retries=8) as client:
            client.create_job(function="fedavgm", goal=2, redirect=False)
            client.upload_model({"w": np.zeros(SIZE, np.float32)})

    def momentum(model: np.ndarray, velocity: np.ndarray, average: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        velocity = 0.9 * velocity + (average - model)
        return model + velocity, velocity

    cluster.call(create)
    model, velocity = np.zeros(SIZE), np.zeros(SIZE)
    for number in (1, 2):
        assert clients.submit_all(cluster, [(1, 0), (1, 4)], number, SIZE) == ["accepted"] * 2
        found = clients.wait_for_model(cluster, 1, number)
        model, velocity = momentum(model, velocity, clients.mean([0, 4], number, SIZE).astype(float))
        np.testing.assert_allclose(found, model, rtol=1e-5, atol=1e-5)
    until(lambda: cluster.get(f"/v1/jobs/{clients.JOB}")["checkpointed_round"] == 3, what="the checkpoint")
    cluster.kill(1)
    cluster.wait_for_nodes(1, "lost")
    assert clients.submit_all(cluster, [(2, 0), (2, 4)], 3, SIZE) == ["accepted"] * 2
    model, velocity = momentum(model, velocity, clients.mean([0, 4], 3, SIZE).astype(float))
    np.testing.assert_allclose(clients.wait_for_model(cluster, 2, 3), model, rtol=1e-5, atol=1e-5)


# --- nodes that die --------------------------------------------------------------------------------------------


def test_a_node_killed_before_it_sent_its_sums_costs_only_that_its_clients_send_again(
    make_cluster: Callable[..., Cluster],
):
    cluster = make_cluster(3)
    clients.create_job(cluster, SIZE, goal=6, redirect=False)
    assert clients.submit_all(cluster, [(1, 0), (2, 1), (2, 2), (3, 3)], 1, SIZE) == ["accepted"] * 4
    cluster.kill(2)
    until(lambda: accepted(cluster) == 2, what="the loss of two updates")
    assert clients.submit_all(cluster, [(1, 1), (3, 2), (1, 4), (3, 5)], 1, SIZE) == ["accepted"] * 4
    model = clients.wait_for_model(cluster, 3, 1)
    assert sorted(clients.check_round(cluster, model, 1)) == list(range(6))
    assert round_of(cluster, 1)["lost"] == 2


def start_slow_round(cluster: Cluster, slow_node: int, where: list[tuple[int, int]]) -> None:
    """Bring a round to where `slow_node` sends its sums, which takes a few seconds."""
    clients.create_job(cluster, LARGE, goal=len(where), redirect=False)
    *most, last = where
    assert clients.submit_all(cluster, most, 1, LARGE) == ["accepted"] * len(most)
    cluster.hosts.slow(cluster.host(slow_node).name, bytes_per_second=5_000_000)
    assert clients.submit(cluster, *last, 1, LARGE) == "accepted"


def test_a_node_killed_while_it_sends_its_sums_costs_only_that_its_clients_send_again(
    make_cluster: Callable[..., Cluster],
):
    cluster = make_cluster(2)
    # Most are on node 1, so that it is the top.
    start_slow_round(cluster, 2, [(2, 1), (1, 0), (1, 2)])
    until(lambda: cluster.hosts[cluster.host(2).name].traffic().sent > 5_000_000, what="half of the sums")
    cluster.kill(2)
    until(lambda: accepted(cluster) == 2, what="the loss of the update")
    assert clients.submit(cluster, 1, 1, 1, LARGE) == "accepted"
    assert sorted(clients.check_round(cluster, clients.wait_for_model(cluster, 1, 1), 1)) == [0, 1, 2]


def test_a_node_killed_after_it_sent_its_sums_costs_nothing(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(3)
    # The top waits for node 3, whose link is slow; node 2 has delivered long before.
    start_slow_round(cluster, 3, [(2, 1), (3, 3), (1, 0), (1, 2)])
    until(lambda: cluster.hosts[cluster.host(2).name].traffic().sent > 20_000_000, what="the sums of node 2")
    time.sleep(0.5)
    cluster.kill(2)
    model = clients.wait_for_model(cluster, 1, 1)
    assert sorted(clients.check_round(cluster, model, 1)) == [0, 1, 2, 3]
    assert round_of(cluster, 1)["lost"] == 0


def test_a_top_killed_while_it_waits_for_sums_is_replaced_and_the_others_keep_their_updates(
    make_cluster: Callable[..., Cluster],
):
    cluster = make_cluster(3)
    start_slow_round(cluster, 3, [(2, 1), (3, 3), (1, 0), (1, 2)])
    time.sleep(0.5)
    cluster.kill(1)
    until(lambda: accepted(cluster) == 2, what="the loss of the top's updates")
    cluster.hosts.slow(cluster.host(3).name)
    assert clients.submit_all(cluster, [(2, 0), (3, 2)], 1, LARGE) == ["accepted"] * 2
    model = clients.wait_for_model(cluster, 2, 1)
    assert sorted(clients.check_round(cluster, model, 1)) == [0, 1, 2, 3]
    assert round_of(cluster, 1)["lost"] == 2


# --- links -----------------------------------------------------------------------------------------------------


def test_a_link_cut_in_mid_transfer_and_healed_costs_nothing(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(2, lease=20.0)
    start_slow_round(cluster, 2, [(2, 1), (1, 0), (1, 2)])
    before = until(lambda: cluster.hosts[cluster.host(2).name].traffic().sent > 5_000_000, what="half")
    assert before
    cluster.hosts.cut(cluster.host(2).name)
    time.sleep(3)
    cluster.hosts.heal(cluster.host(2).name)
    model = clients.wait_for_model(cluster, 1, 1, seconds=60)
    assert sorted(clients.check_round(cluster, model, 1)) == [0, 1, 2]
    assert round_of(cluster, 1)["lost"] == 0
    sent = cluster.hosts[cluster.host(2).name].traffic().sent
    assert sent < 32_000_000, f"{sent} bytes were sent for sums of 20 MB: the transfer began anew"


def test_nodes_that_see_each_other_but_not_the_coordinator_count_nothing_twice(
    make_cluster: Callable[..., Cluster],
):
    """Node 2 is lost to the coordinator while its sums are on the way to the top, which they reach."""
    cluster = make_cluster(2)
    start_slow_round(cluster, 2, [(2, 1), (1, 0), (1, 2)])
    time.sleep(0.3)
    cluster.hosts.partition(cluster.host(2).name, "coordinator")
    cluster.wait_for_nodes(1, "lost")
    # Either the sums came to the top in time, or its client sends again; never both.
    deadline = time.monotonic() + 30
    while cluster.get(f"/v1/jobs/{clients.JOB}")["model_round"] == 1:
        assert time.monotonic() < deadline, "the round hangs"
        clients.submit(cluster, 1, 1, 1, LARGE)
        time.sleep(0.2)
    model = clients.wait_for_model(cluster, 1, 1)
    assert sorted(clients.check_round(cluster, model, 1)) == [0, 1, 2]
    cluster.hosts.slow(cluster.host(2).name)
    cluster.hosts.heal(cluster.host(2).name, "coordinator")
    cluster.wait_for_nodes(2)
    assert clients.submit_all(cluster, [(2, 5), (1, 6), (2, 7)], 2, LARGE) == ["accepted"] * 3
    assert sorted(clients.check_round(cluster, clients.wait_for_model(cluster, 2, 2), 2)) == [5, 6, 7]


def test_two_nodes_that_both_lose_the_coordinator_go_on_when_it_is_back(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(2, lease=6.0)
    clients.create_job(cluster, SIZE, goal=4, redirect=False)
    assert clients.submit_all(cluster, [(1, 0), (2, 1)], 1, SIZE) == ["accepted"] * 2
    cluster.hosts.cut("coordinator")
    time.sleep(2)
    cluster.hosts.heal("coordinator")
    assert clients.submit_all(cluster, [(1, 2), (2, 3)], 1, SIZE) == ["accepted"] * 2
    model = clients.wait_for_model(cluster, 2, 1)
    assert sorted(clients.check_round(cluster, model, 1)) == [0, 1, 2, 3]


# --- the coordinator -------------------------------------------------------------------------------------------


def test_a_coordinator_killed_in_an_open_round_loses_no_update(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(2)
    clients.create_job(cluster, SIZE, goal=4, redirect=False)
    assert clients.submit_all(cluster, [(1, 0), (2, 1)], 1, SIZE) == ["accepted"] * 2
    restart_coordinator(cluster)
    assert accepted(cluster) == 2
    assert clients.submit(cluster, 2, 0, 1, SIZE) == "duplicate"
    assert clients.submit_all(cluster, [(1, 2), (2, 3)], 1, SIZE) == ["accepted"] * 2
    model = clients.wait_for_model(cluster, 1, 1)
    assert sorted(clients.check_round(cluster, model, 1)) == [0, 1, 2, 3]
    assert round_of(cluster, 1)["lost"] == 0


def test_a_coordinator_killed_while_sums_travel_loses_no_update(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(2, lease=6.0)
    start_slow_round(cluster, 2, [(2, 1), (1, 0), (1, 2)])
    time.sleep(0.5)
    restart_coordinator(cluster)
    model = clients.wait_for_model(cluster, 1, 1)
    assert sorted(clients.check_round(cluster, model, 1)) == [0, 1, 2]
    assert round_of(cluster, 1)["lost"] == 0


def test_a_coordinator_that_is_away_when_the_model_is_made_hears_of_it_later(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(2, lease=6.0)
    start_slow_round(cluster, 2, [(2, 1), (1, 0), (1, 2)])
    time.sleep(0.5)
    cluster.kill_coordinator()
    cluster.hosts.slow(cluster.host(2).name)
    time.sleep(2)  # the sums arrive, the model is made, and nobody can be told
    cluster.start_coordinator()
    model = clients.wait_for_model(cluster, 2, 1)
    assert sorted(clients.check_round(cluster, model, 1)) == [0, 1, 2]


def test_a_coordinator_killed_again_and_again_while_clients_train_makes_only_right_models(
    make_cluster: Callable[..., Cluster],
):
    cluster = make_cluster(2, lease=5.0)
    clients.create_job(cluster, SIZE, goal=6, placement="worst-fit")
    chance = random.Random(5)
    with clients.Trainers(cluster, range(8), SIZE) as trainers:
        for _ in range(8):
            time.sleep(chance.uniform(0.2, 1.2))
            restart_coordinator(cluster)
        before = cluster.get(f"/v1/jobs/{clients.JOB}")["model_round"]
        until(lambda: cluster.get(f"/v1/jobs/{clients.JOB}")["model_round"] > before + 2, what="two more rounds")
    check_history(cluster, trainers, fewest=6)


def check_history(cluster: Cluster, trainers: clients.Trainers, fewest: int) -> None:
    """Every model that a client has seen is the mean of the updates that the journal names.

    A model that was public before it was stored may be lost with all nodes that had it. Then its round is done
    anew and gives another model, with another ETag. The journal tells of that one; the one before was right too.
    """
    assert len(trainers.models) >= 3, trainers.errors[-5:]
    lost = lost_models(cluster)
    for number, lives in sorted(trainers.models.items()):
        assert all(len(seen) == 1 for seen in lives.values()), f"round {number} has different models of one life"
        models = [np.frombuffer(data, np.float32) for seen in lives.values() for data in seen]
        expected = clients.mean(clients.accepted_clients(cluster, number - 1), number - 1, SIZE)
        undone = [model for model in models if not np.array_equal(model, expected)]
        if len(undone) > lost[number]:
            clients.check_round(cluster, undone[0], number - 1)
        for model in undone:
            assert clients.is_mean_of_some(model, trainers.numbers, fewest, number - 1)


def lost_models(cluster: Cluster) -> Counter[int]:
    """How often the model that starts a round was lost with all nodes that had it."""
    log = cluster.log("coordinator").read_text()
    losses = re.findall(r"the model of round (\d+) is lost with its holders; going back to round (\d+)", log)
    return Counter(number for newest, kept in losses for number in range(int(kept) + 1, int(newest) + 1))


# --- slow nodes, skewed clocks, drain, churn -------------------------------------------------------------------


def test_a_node_that_is_ten_times_slower_does_not_spoil_a_round(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(2, lease=5.0)
    clients.create_job(cluster, SIZE, goal=6, redirect=False)
    cluster.slow_down(2, 10)
    for number in (1, 2):
        assert clients.submit_all(cluster, spread(cluster, 6), number, SIZE) == ["accepted"] * 6
        model = clients.wait_for_model(cluster, 2, number)
        assert sorted(clients.check_round(cluster, model, number)) == list(range(6))


def test_a_node_drained_in_a_round_finishes_it_and_gets_no_more(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(2)
    clients.create_job(cluster, SIZE, goal=4, placement="worst-fit")
    assert clients.submit_all(cluster, [(1, 0), (2, 1)], 1, SIZE) == ["accepted"] * 2
    cluster.call(_post, f"{cluster.coordinator_url}/v1/nodes/h2/drain")
    assert clients.submit_all(cluster, [(2, 2), (2, 3)], 1, SIZE) == ["accepted"] * 2
    model = clients.wait_for_model(cluster, 2, 1)
    assert sorted(clients.check_round(cluster, model, 1)) == [0, 1, 2, 3]
    assert round_of(cluster, 1)["nodes"] == 2
    until(lambda: cluster.nodes()["h2"]["status"] == "drained", what="the end of the drain")
    assert clients.submit_all(cluster, spread(cluster, 4), 2, SIZE) == ["accepted"] * 4
    clients.check_round(cluster, clients.wait_for_model(cluster, 1, 2), 2)
    assert round_of(cluster, 2)["nodes"] == 1


def _post(url: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=10).close()


@pytest.mark.timeout(300)
def test_four_nodes_that_come_and_go_for_two_minutes_make_only_right_models(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(4, lease=1.5)
    clients.create_job(cluster, SIZE, goal=8, placement="worst-fit", deadline=3.0, quorum=4)
    chance = random.Random(11)
    down: set[int] = set()
    end = time.monotonic() + 120
    with clients.Trainers(cluster, range(12), SIZE) as trainers:
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.5, 3.0))
            if down and (len(down) == 3 or chance.random() < 0.5):
                number = chance.choice(sorted(down))
                cluster.start_node(number)
                down.discard(number)
            else:
                number = chance.choice([n for n in cluster.numbers if n not in down])
                (cluster.kill if chance.random() < 0.7 else cluster.stop)(number)
                down.add(number)
        for number in sorted(down):
            cluster.start_node(number)
        before = cluster.get(f"/v1/jobs/{clients.JOB}")["model_round"]
        until(lambda: cluster.get(f"/v1/jobs/{clients.JOB}")["model_round"] > before, 30, "one more round")
    check_history(cluster, trainers, fewest=4)
    assert threading.active_count() < 40

"""Models that are cut over several nodes: the same result as in one piece, whatever fails meanwhile.

The clients are those of `cluster_clients`, with small whole numbers for parameters and weights: a model can be
compared bit for bit with the mean of the updates that the journal names.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lifl.client import Client
from lifl.errors import Busy, Refused, Unavailable
from lifl.shards import read_shards, split_update
from lifl.tensors import Encoder, split
from lifl_bench.cluster import Cluster

from tests.e2e import cluster_clients as clients
from tests.e2e.cluster_state import accepted, restart_coordinator, round_of, until
from tests.e2e.node_harness import LiveNode

pytestmark = pytest.mark.timeout(120)

SIZE = 100_001  # floats: an odd number


class Answers:
    """Updates on their way, each from a client in a thread of its own, which does as users do."""

    def __init__(self, cluster: Cluster, where: list[tuple[int, int]], number: int, size: int) -> None:
        self.answers: dict[int, str] = {}
        self.models: dict[int, clients.Vector] = {}
        self._cluster, self._number, self._size = cluster, number, size
        self._threads = [threading.Thread(target=self._run, args=pair, daemon=True) for pair in where]
        for thread in self._threads:
            thread.start()

    def _run(self, node: int, client: int) -> None:
        def take_part() -> clients.Vector:
            urls = [self._cluster.url(other) for other in self._cluster.numbers]
            with Client([self._cluster.url(node), *urls], clients.JOB, f"c{client}", retries=12) as sender:
                sums = {"w": clients.parameters(client, self._number, self._size)}
                submission = sender.submit(sums, num_samples=clients.samples(client), round=self._number)
                self.answers[client] = submission.status
                return np.array(sender.wait_for_round(after=self._number, timeout=60).tensors["w"])

        self.models[client] = self._cluster.call(take_part)

    def finish(self) -> list[clients.Vector]:
        """The models that the clients have in the end."""
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), f"a client hangs; answered were {self.answers}"
        assert len(self.models) == len(self._threads), self.answers
        return list(self.models.values())


def nodes_of_shards(cluster: Cluster, number: int, shards: int) -> list[str]:
    """The node that has the updates of each shard."""
    found = [cluster.get(f"/v1/jobs/{clients.JOB}.{shard}/rounds/{number}/updates") for shard in range(shards)]
    return [part["updates"][0]["node"] for part in found]


def test_a_model_in_shards_is_that_of_the_same_job_in_one_piece(
    make_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
):
    cluster = make_cluster(2, lease=5.0)
    where = [(1 + client % 2, client) for client in range(5)]
    models: dict[int, list[clients.Vector]] = {}
    memory: dict[int, dict[str, int]] = {}
    for count in (1, 2, 3):
        monkeypatch.setattr(clients, "JOB", f"job{count}")
        clients.create_job(cluster, SIZE, goal=5, shards=count, slots=4, redirect=True)
        for number in (1, 2):
            assert clients.submit_all(cluster, where, number, SIZE) == ["accepted"] * 5
            found = [clients.wait_for_model(cluster, node, number) for node in cluster.numbers]
            assert sorted(clients.check_round(cluster, found[0], number)) == list(range(5))
            assert np.array_equal(*found)
            models.setdefault(count, []).append(found[0])
        memory[count] = {name: node["pool_bytes"] for name, node in cluster.nodes().items()}
        cluster.call(_delete, cluster.url(1), clients.JOB)
        until(lambda: not any(n["pool_bytes"] for n in cluster.nodes().values()), what="the memory's return")
    assert np.array_equal(models[1], models[2])
    assert np.array_equal(models[1], models[3])
    whole = max(memory[1].values())
    for count, shares in ((2, (1 / 2, 1 / 2)), (3, (1 / 3, 2 / 3))):
        parts = sorted(part / whole for part in memory[count].values())
        assert parts == pytest.approx(shares, abs=0.1), f"{count} shards: {memory[count]} bytes of {whole}"


def _delete(url: str, job: str) -> None:
    with Client(url, job, "operator") as client:
        client.delete()


def test_shards_of_different_tensors_and_dtypes_make_one_model(make_cluster: Callable[..., Cluster]):
    """Tensors of several dtypes, cut and not, one of them sent as bfloat16's cousin float16."""
    cluster = make_cluster(2, lease=5.0)
    shapes = {"a": (301, 7), "b": (5,), "scalar": (), "empty": (0, 3)}

    def tensors(client: int) -> dict[str, Any]:
        values = {name: np.full(shape, client, np.float32) for name, shape in shapes.items()}
        counts = np.arange(1001, dtype=np.int64) * client
        return {**values, "counts": counts, "a": values["a"].astype(np.float16) if client else values["a"]}

    def run() -> dict[str, Any]:
        with Client(cluster.url(1), clients.JOB, "operator", retries=8) as client:
            client.create_job(function="fedavg", goal=1, precision="float64", shards=3)
            client.upload_model(tensors(0))
            assert client.submit(tensors(3), num_samples=1, round=1).status == "accepted"
            model = client.wait_for_round(after=1, timeout=30)
            return {name: np.array(part) for name, part in model.tensors.items()}

    found = cluster.call(run)
    assert {name: part.shape for name, part in found.items()} == {**shapes, "counts": (1001,)}
    for name, expected in tensors(3).items():
        assert np.array_equal(found[name], expected.astype(found[name].dtype)), name


def test_a_node_on_its_own_says_that_shards_need_a_cluster(shared_node: LiveNode):
    with Client(shared_node.address, "sharded", "operator") as client, pytest.raises(Refused) as refusal:
        client.create_job(function="fedavg", goal=1, shards=2)
    assert refusal.value.status == 422
    assert "cluster's coordinator" in refusal.value.detail


def test_a_node_killed_in_the_round_has_it_done_anew_and_right(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(3)
    clients.create_job(cluster, SIZE, goal=4, shards=2)
    first = Answers(cluster, [(1, 0), (2, 1), (3, 2)], 1, SIZE)
    until(lambda: accepted(cluster) == 3, what="three updates")
    cluster.kill(int(nodes_of_shards(cluster, 1, 2)[0][1:]))
    until(lambda: round_of(cluster, 1)["lost"] == 3, what="the loss")
    survivor = next(number for number in cluster.numbers if cluster.is_running(number))
    last = Answers(cluster, [(survivor, 3)], 1, SIZE)
    models = [*first.finish(), *last.finish()]
    assert sorted(clients.check_round(cluster, models[0], 1)) == [0, 1, 2, 3]
    assert all(np.array_equal(model, models[0]) for model in models)


def test_a_server_optimiser_goes_on_in_shards_as_in_one_piece_after_a_home_has_died(
    make_cluster: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
):
    cluster = make_cluster(3)
    models: dict[str, list[clients.Vector]] = {"whole": [], "cut": []}
    for job, shards in (("whole", 1), ("cut", 2)):
        monkeypatch.setattr(clients, "JOB", job)
        clients.create_job(cluster, SIZE, goal=3, shards=shards, function="fedadam", durability="sync")
        for number in (1, 2, 3):
            up = [node for node in cluster.numbers if cluster.is_running(node)]
            where = [(up[client % len(up)], client) for client in range(3)]
            assert clients.submit_all(cluster, where, number, SIZE) == ["accepted"] * 3
            models[job].append(clients.wait_for_model(cluster, up[0], number))
            if (job, number) == ("cut", 2):  # the optimiser's arrays of this shard are at the coordinator
                cluster.kill(int(nodes_of_shards(cluster, 2, 2)[0][1:]))
                until(lambda: nodes_by_status(cluster).count("ready") == 2, what="the loss of the home")
    assert not np.array_equal(models["whole"][0], models["whole"][2])
    for whole, cut in zip(models["whole"], models["cut"], strict=True):
        assert np.array_equal(whole, cut)


def nodes_by_status(cluster: Cluster) -> list[str]:
    return [node["status"] for node in cluster.nodes().values()]


def test_a_part_that_waits_for_others_outlives_its_gateway(make_cluster: Callable[..., Cluster]):
    """Its client does not send it again: it is in its slot, and counts when the other part comes."""
    cluster = make_cluster(2, lease=5.0)
    clients.create_job(cluster, SIZE, goal=1, shards=2)
    shards = read_shards(cluster.get(f"/v1/jobs/{clients.JOB}/shards")["shards"])
    whole = Encoder().encode({"w": clients.parameters(7, 1, SIZE)})
    parts = [b"".join(part) for part in split_update(*split(whole), shards)]

    def send(index: int) -> str:
        """No retries: they would hide the loss. But nobody has taken it while no node has loaded the function."""
        while True:
            with Client(cluster.url(1), shards[index].job, "c7", retries=0) as sender:
                try:
                    return sender.submit(parts[index], num_samples=clients.samples(7), round=1).status
                except Busy as error:
                    time.sleep(error.retry_after or 0.1)

    def send_and_lose() -> None:
        with pytest.raises(Unavailable):
            cluster.call(send, 0)

    first = threading.Thread(target=send_and_lose)
    first.start()
    home = until(
        lambda: next((n for n in cluster.numbers if cluster.nodes()[f"h{n}"]["pool_bytes"]), 0), what="memory"
    )
    time.sleep(1)  # nothing tells that it waits
    os.kill(gateway_of(cluster, home), signal.SIGKILL)
    first.join(10)
    until(lambda: is_ready(cluster, home), what="the next gateway")
    assert cluster.call(send, 1) == "accepted"
    assert clients.check_round(cluster, clients.wait_for_model(cluster, home, 1), 1) == [7]


def gateway_of(cluster: Cluster, number: int) -> int:
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in cluster.pids(number)}
    return next(pid for pid, command in commands.items() if b"lifl_gateway" in command)


def is_ready(cluster: Cluster, number: int) -> bool:
    try:
        return bool(cluster.get("/readyz", cluster.url(number)))
    except OSError:
        return False


def test_a_coordinator_killed_in_the_round_loses_no_update(make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(2, lease=6.0)
    clients.create_job(cluster, SIZE, goal=4, shards=3)
    first = Answers(cluster, [(1, 0), (2, 1)], 1, SIZE)
    until(lambda: accepted(cluster) == 2, what="two updates")
    restart_coordinator(cluster)
    assert accepted(cluster) == 2
    last = Answers(cluster, [(1, 2), (2, 3)], 1, SIZE)
    models = [*first.finish(), *last.finish()]
    assert sorted(clients.check_round(cluster, models[0], 1)) == [0, 1, 2, 3]
    assert all(np.array_equal(model, models[0]) for model in models)
    assert round_of(cluster, 1)["lost"] == 0


def test_an_update_that_is_not_finite_in_one_shard_is_rejected_and_the_others_count(
    make_cluster: Callable[..., Cluster],
):
    cluster = make_cluster(2, lease=5.0)
    clients.create_job(cluster, SIZE, goal=4, shards=2)
    good = Answers(cluster, [(1, 0), (2, 1)], 1, SIZE)
    until(lambda: accepted(cluster) == 2, what="two updates")

    def send_nan() -> tuple[str, int]:
        bad = np.zeros(SIZE, np.float32)
        bad[-1] = np.nan
        with Client(cluster.url(2), clients.JOB, "c99", retries=12) as client:
            status = client.submit({"w": bad}, num_samples=1, round=1).status
            until(lambda: round_of(cluster, 1)["rejected"] == 1, what="the rejection")
            with pytest.raises(Refused) as refusal:
                client.submit({"w": bad}, num_samples=1, round=1)
            return status, refusal.value.status

    assert cluster.call(send_nan) == ("accepted", 422)
    more = Answers(cluster, [(1, 2), (2, 3)], 1, SIZE)
    models = [*good.finish(), *more.finish()]
    assert sorted(clients.check_round(cluster, models[0], 1)) == [0, 1, 2, 3]
    assert round_of(cluster, 1)["rejected_clients"] == ["c99"]

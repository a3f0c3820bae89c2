"""Clients of a cluster whose models can be explained bit for bit, and the check that does so.

Parameters and weights are small whole numbers and sums are in float64, so that every sum is exact whatever its
order, and the one rounding that is left to float32 does not depend on how the quotient was reached.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from lifl.client import Client
from lifl.errors import LiflError, Refused
from lifl_bench.cluster import Cluster
from numpy.typing import NDArray

JOB = "job"

Vector = NDArray[np.float32]


def parameters(client: int, round_number: int, size: int) -> Vector:
    """What a client has after its training in a round."""
    first = client * 31 + round_number * 17
    return ((np.arange(size, dtype=np.int64) * (1 + client % 3) + first) % 16).astype(np.float32)


def samples(client: int) -> int:
    """A client's weight."""
    return 1 + client % 4


def mean(clients: Iterable[int], round_number: int, size: int) -> Vector:
    """The weighted mean, rounded once."""
    total = np.zeros(size, np.float64)
    weight = 0
    for client in clients:
        total += samples(client) * parameters(client, round_number, size)
        weight += samples(client)
    return (total / weight).astype(np.float32)


def create_job(cluster: Cluster, size: int, *, goal: int, node: int = 1, **spec: Any) -> None:
    """Make the job by one of the gateways, with a model of `size` zeros."""

    def create() -> None:
        with Client(cluster.url(node), JOB, "operator", retries=8) as client:
            client.create_job(**{"function": "fedavg", "goal": goal, "precision": "float64", **spec})
            client.upload_model({"w": np.zeros(size, np.float32)})

    cluster.call(create)


def submit(cluster: Cluster, node: int, client: int, round_number: int, size: int) -> str:
    """Send one client's update to a node's gateway; returns what became of it."""

    def send() -> str:
        with Client(cluster.url(node), JOB, f"c{client}", retries=8) as sender:
            sums = {"w": parameters(client, round_number, size)}
            return sender.submit(sums, num_samples=samples(client), round=round_number).status

    return cluster.call(send)


def submit_all(cluster: Cluster, where: Sequence[tuple[int, int]], round_number: int, size: int) -> list[str]:
    """Send the updates of many (node, client) pairs at the same time."""
    answers: list[str] = [""] * len(where)

    def send(index: int) -> None:
        node, client = where[index]
        answers[index] = submit(cluster, node, client, round_number, size)

    threads = [threading.Thread(target=send, args=(index,)) for index in range(len(where))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def wait_for_model(cluster: Cluster, node: int, after: int, seconds: float = 30.0) -> Vector:
    """The model that follows a round, from a node's gateway."""

    def fetch() -> Vector:
        with Client(cluster.url(node), JOB, "observer", retries=8) as client:
            return np.array(client.wait_for_round(after=after, timeout=seconds).tensors["w"])

    return cluster.call(fetch)


def accepted_clients(cluster: Cluster, round_number: int) -> list[int]:
    """The clients that the coordinator's journal names as part of a complete round."""
    clients: list[int] = []
    offset = 0
    while True:
        part = cluster.get(f"/v1/jobs/{JOB}/rounds/{round_number}/updates?offset={offset}")
        clients += [int(update["client"][1:]) for update in part["updates"] if update["status"] == "counted"]
        if not part["next"]:
            return clients
        offset = part["next"]


def check_round(cluster: Cluster, model: Vector, round_number: int) -> list[int]:
    """Assert that a model is the mean of exactly the updates that were accepted; returns their clients."""
    clients = accepted_clients(cluster, round_number)
    doubled = [client for client, count in Counter(clients).items() if count > 1]
    assert not doubled, f"round {round_number} has clients {doubled} more than once"
    expected = mean(clients, round_number, len(model))
    wrong = np.flatnonzero(model != expected)
    assert not len(wrong), (
        f"round {round_number}: {len(wrong)} of {len(model)} parameters are wrong, the first {wrong[0]}: "
        f"{model[wrong[0]]} instead of {expected[wrong[0]]}; clients {sorted(clients)}"
    )
    return clients


def is_mean_of_some(model: Vector, candidates: Sequence[int], fewest: int, round_number: int) -> bool:
    """Whether a model is the mean of any set of at least so many of these clients' updates."""
    subsets = (chosen for k in range(fewest, len(candidates) + 1) for chosen in combinations(candidates, k))
    return any(np.array_equal(model, mean(chosen, round_number, len(model))) for chosen in subsets)


class Trainers:
    """Clients that train until they are stopped, each in a thread, whatever happens to the nodes."""

    def __init__(self, cluster: Cluster, clients: Iterable[int], size: int) -> None:
        self._cluster = cluster
        self._size = size
        self.numbers = list(clients)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.models: dict[int, dict[str, set[bytes]]] = {}
        """Each different model that any client has seen, by the round it starts and its ETag."""
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(client,), daemon=True) for client in self.numbers
        ]

    def __enter__(self) -> Trainers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_stopping(self) -> bool:
        """The clients shall end."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End all of them."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"

    def _run(self, number: int) -> None:
        # A thread stays in the network namespace that it enters.
        self._cluster.hosts["clients"].enter()
        while not self._stopping.is_set():
            try:
                self._train(number)
            except (LiflError, TimeoutError) as error:
                with self._lock:
                    self.errors.append(f"c{number}: {error}")
                time.sleep(0.05)

    def _train(self, number: int) -> None:
        urls = [self._cluster.url(node) for node in self._cluster.numbers]
        start = number % len(urls)
        with Client(urls[start:] + urls[:start], JOB, f"c{number}", timeout=10.0, retries=3) as client:
            self.train(client, number)

    def train(self, client: Client, number: int) -> None:
        """What one client does; it is done again when it fails."""
        model = client.fetch_model()
        while not self.is_stopping:
            sums = {"w": parameters(number, model.round, self._size)}
            try:
                client.submit(sums, num_samples=samples(number), round=model.round)
            except Refused as refusal:
                if refusal.status != 409:
                    raise
                model = client.fetch_model()
                continue
            model = client.wait_for_round(after=model.round, timeout=10.0)
            with self._lock:
                seen = self.models.setdefault(model.round, {}).setdefault(model.etag, set())
                seen.add(bytes(model.tensors["w"].tobytes()))

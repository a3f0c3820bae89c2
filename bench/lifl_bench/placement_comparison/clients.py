"""The clients of a comparison: processes on the clients' host that begin at one moment."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

from lifl.client import Client
from lifl.errors import LiflError

from lifl_bench.cluster_process import enter
from lifl_bench.processes import Team
from lifl_bench.workload import Workload

ROUND_SECONDS: Final = 60.0
"""A round that takes longer has failed."""
_LEAD_SECONDS: Final = 0.1
"""Between the order to begin and the moment to do so: time for it to reach everybody."""
_RETRIES: Final = 12


@dataclass(frozen=True)
class _Order:
    job: str
    round: int
    at: float
    """CLOCK_MONOTONIC at which to begin."""


@dataclass(frozen=True)
class _Check:
    """Compare the model that was fetched last with the mean."""

    round: int


@dataclass(frozen=True)
class Trained:
    """What a client says of its round."""

    began: float
    """CLOCK_MONOTONIC at which it began to send."""
    has_model: float
    """CLOCK_MONOTONIC at which it had the whole new model."""
    checksum: int
    """Of the model, so that all are known to have the same one."""


@dataclass(frozen=True)
class _Failed:
    text: str


class Clients:
    """A process for each client, which takes part in every job, until `stop`.

    Forked from the caller, which may have no other thread. `urls` are those of the gateways; client i begins with
    the one at i modulo their number.
    """

    def __init__(self, namespace: str, urls: Sequence[str], workload: Workload) -> None:
        self._namespace = namespace
        self._urls = urls
        self._workload = workload
        self._team = Team(workload.updates, self._play)

    def stop(self) -> None:
        """End all of them."""
        self._team.stop()

    def run_round(self, job: str, round_: int) -> list[Trained]:
        """Have all submit their updates and fetch the new model. Raises RuntimeError or TimeoutError."""
        order = _Order(job, round_, time.monotonic() + _LEAD_SECONDS)
        for client in range(self._workload.updates):
            self._team.send_to(client, order)
        answers = dict(self._answers(self._workload.updates))
        return [answers[client] for client in range(self._workload.updates)]

    def check(self, round_: int) -> float:
        """The error of the model that the first client has fetched; see `Workload.error`."""
        self._team.send_to(0, _Check(round_))
        for _, answer in self._team.receive(1, ROUND_SECONDS):
            if isinstance(answer, float):
                return answer
            raise RuntimeError(answer.text)
        raise RuntimeError("nobody has compared the model")

    def _answers(self, count: int) -> Iterator[tuple[int, Trained]]:
        for client, answer in self._team.receive(count, ROUND_SECONDS + 30):
            if isinstance(answer, _Failed):
                raise RuntimeError(f"client {client}: {answer.text}")
            yield client, answer

    # --- in the clients' processes -----------------------------------------------------------------------------

    def _play(self, number: int, link: Connection) -> None:
        enter(self._namespace)
        jobs: dict[str, Client] = {}
        model: bytearray = bytearray()
        while order := link.recv():
            try:
                if isinstance(order, _Check):
                    link.send(self._workload.error(memoryview(model), order.round))
                else:
                    answer, model = self._train(self._client(jobs, order.job, number), number, order)
                    link.send(answer)
            except (LiflError, OSError, RuntimeError) as error:
                link.send(_Failed(f"{type(error).__name__}: {error}"))

    def _client(self, jobs: dict[str, Client], job: str, number: int) -> Client:
        if job not in jobs:
            home = number % len(self._urls)
            urls = [*self._urls[home:], *self._urls[:home]]
            jobs[job] = Client(urls, job, f"client-{number:03}", retries=_RETRIES)
        return jobs[job]

    def _train(self, client: Client, number: int, order: _Order) -> tuple[Trained, bytearray]:
        update, samples = self._workload.update_of(number), self._workload.samples(order.round)[number]
        if (left := order.at - time.monotonic()) > 0:
            time.sleep(left)
        began = time.monotonic()
        outcome = client.submit(update, num_samples=float(samples), round=order.round)
        # A gateway that was busy may have counted the first of two attempts.
        if outcome.status not in ("accepted", "duplicate"):
            raise RuntimeError(f"the update of round {order.round} is {outcome.status}")
        model = client.wait_for_round(after=order.round, timeout=ROUND_SECONDS)
        has_model = time.monotonic()
        if model.round != order.round + 1:
            raise RuntimeError(f"after round {order.round} came the model of round {model.round}")
        return Trained(began, has_model, zlib.crc32(model.data)), model.data

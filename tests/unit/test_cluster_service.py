"""The coordinator as a service: what its threads do behind the requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from lifl.cluster.checkpoints import CheckpointStore, Part
from lifl.cluster.coordinator import ClusterCoordinator
from lifl.cluster.journal import Journal
from lifl.cluster.messages import CountUpdate, FunctionFacts, Leave, MemberMessages, ModelMade, OrdersRequest
from lifl.cluster.service import ClusterService
from lifl.errors import Unavailable
from lifl.messages import Acknowledged, JobSpec

from tests.unit.cluster_walk import FUNCTION, registration

pytestmark = pytest.mark.timeout(30)

JOB = "job"


class Fetch:
    """Stands in for the nodes that give models: each call fails until it shall work."""

    def __init__(self) -> None:
        self.works = False
        self.failed = threading.Event()

    def __call__(self, job: str, nonce: int, number: int, part: Part, sources: Sequence[str], path: Path) -> None:
        if not self.works:
            self.failed.set()
            raise Unavailable("the node is gone")
        path.write_bytes(b"model")


@pytest.fixture
def fetch() -> Fetch:
    return Fetch()


@pytest.fixture
def service(tmp_path: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterService]:
    monkeypatch.setattr("lifl.cluster.service._RETRY_SECONDS", 0.05)
    coordinator = ClusterCoordinator(Journal(tmp_path / "coordinator.db"), time.monotonic())
    store = CheckpointStore(tmp_path)
    running = ClusterService(coordinator, store, fetch)
    running.start()
    running.create_job(JobSpec(JOB, FUNCTION, 1))
    initial = store.incoming / "initial"
    initial.write_bytes(b"initial")
    running.install_model(JOB, initial)
    yield running
    running.stop()


def make_model(service: ClusterService, node: str) -> None:
    """A node joins and makes the open round's model out of one update of its own."""
    joining = registration(node, f"{node}.1")
    service.register(joining)
    send(service, node, FunctionFacts(FUNCTION, False, 0))
    job = service.coordinator.jobs.find(JOB)
    assert job.round is not None
    number = job.round.number
    send(service, node, CountUpdate(JOB, job.nonce, number, job.attempt, "client", 1.0))
    request = OrdersRequest(joining.incarnation)
    (order,) = service.orders(node, request, time.monotonic()).jobs
    made = ModelMade(JOB, number, order.attempt, order.epoch, (joining.incarnation,), 1, 1.0)
    assert send(service, node, made) == Acknowledged()


def send(service: ClusterService, node: str, message: object) -> object:
    request = MemberMessages(f"{node}.1", (message,))  # type: ignore[arg-type]
    return service.answer(node, request, time.monotonic()).answers[0]


def test_models_are_stored_again_after_one_was_lost_that_could_not_be_fetched(
    service: ClusterService, fetch: Fetch
) -> None:
    make_model(service, "n1")
    assert fetch.failed.wait(5)
    service.leave("n1", Leave("n1.1"))  # with it goes the model, and the job back to its initial one
    assert service.coordinator.jobs.find(JOB).made_round == 1
    time.sleep(0.2)  # the time to try again passes while there is nothing to store
    fetch.works = True
    make_model(service, "n2")
    until = time.monotonic() + 10
    while service.coordinator.jobs.find(JOB).checkpointed_round < 2:
        assert time.monotonic() < until, "nobody stores the new model"
        time.sleep(0.02)

"""The coordinator as a service: what its threads do behind the requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from lifl.cluster.checkpoints import CheckpointStore, Part
from lifl.cluster.coordinator import ClusterCoordinator
from lifl.cluster.journal import Journal
from lifl.cluster.messages import CountUpdate, FunctionFacts, Leave, MemberMessages, ModelMade, OrdersRequest
from lifl.cluster.service import ClusterService, StoredModel
from lifl.errors import InvalidModel, Refused, Unavailable
from lifl.messages import Acknowledged, JobSpec
from lifl.tensors import Encoder, split

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


# --- waiting for models --------------------------------------------------------------------------------------


def wait_in_thread(
    service: ClusterService, name: str, known: int, seconds: float
) -> tuple[threading.Thread, list[float]]:
    times: list[float] = []

    def wait() -> None:
        started = time.monotonic()
        service.wait_for_model(name, lambda nonce: known, seconds)
        times.append(time.monotonic() - started)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, times


def test_whoever_waits_for_a_model_is_answered_when_it_is_public(service: ClusterService, fetch: Fetch) -> None:
    fetch.works = True
    thread, times = wait_in_thread(service, JOB, 1, 20.0)
    time.sleep(0.2)
    assert thread.is_alive()
    make_model(service, "n1")
    thread.join(5)
    assert times and times[0] < 5


def test_nobody_waits_for_longer_than_asked_or_for_a_job_that_is_over(service: ClusterService) -> None:
    thread, times = wait_in_thread(service, JOB, 1, 0.2)
    thread.join(5)
    assert 0.2 <= times[0] < 2
    nonce = service.coordinator.jobs.find(JOB).nonce
    assert service.wait_for_model(JOB, lambda nonce: 0, 20.0) == nonce, "there is a newer one already"
    thread, times = wait_in_thread(service, JOB, 1, 20.0)
    service.release()
    thread.join(5)
    assert times[0] < 5


# --- jobs in shards ------------------------------------------------------------------------------------------

BIG = {"w": np.arange(100, dtype=np.float32), "n": np.arange(9, dtype=np.int16), "half": np.ones(5, np.float16)}


def install_shards(service: ClusterService, name: str = "big", shards: int = 3) -> bytes:
    data = bytes(Encoder().encode(BIG))
    service.create_job(JobSpec(name, FUNCTION, 1, shards=shards))
    initial = service.store.incoming / "big"
    initial.write_bytes(data)
    service.install_model(name, initial)
    return data


def whole(model: StoredModel) -> bytes:
    """What the coordinator sends for a model in shards."""
    parts = [bytes(split(path.read_bytes())[1]) for path in model.paths]
    return b"".join([len(model.header).to_bytes(8, "little"), model.header, *parts])


def test_the_files_of_the_shards_together_are_the_model_that_was_given(service: ClusterService) -> None:
    data = install_shards(service)
    model = service.stored_model("big", None)
    assert len(model.paths) == 3
    assert whole(model) == data
    assert [path.name for path in service.store.incoming.iterdir()] == ["big"]
    told = service.shards_of("big")
    assert [shard["job"] for shard in told] == ["big.0", "big.1", "big.2"]
    assert sum(shard["tensors"].get("w", {"count": 0})["count"] for shard in told) == 100
    with pytest.raises(Refused, match="not sharded"):
        service.shards_of(JOB)


def test_a_model_that_is_too_small_leaves_nothing_behind(service: ClusterService) -> None:
    with pytest.raises(InvalidModel, match="fewer shards"):
        install_shards(service, shards=200)
    assert [path.name for path in service.store.incoming.iterdir()] == ["big"]
    assert service.coordinator.requests.describe("big").status == "waiting-for-model"


def test_a_sharded_job_that_is_deleted_makes_room_for_another(service: ClusterService) -> None:
    install_shards(service)
    service.delete_job("big")
    with pytest.raises(Refused):
        service.stored_model("big", None)
    service.create_job(JobSpec("big", FUNCTION, 1, shards=2))
    with pytest.raises(Refused, match="no model yet"):
        service.shards_of("big")
    install_shards(service, "big", 2)
    assert len(service.shards_of("big")) == len(service.stored_model("big", 1).paths) == 2


def test_models_beyond_the_round_that_begins_anew_are_deleted(service: ClusterService, fetch: Fetch) -> None:
    fetch.works = True
    install_shards(service, shards=2)
    service.register(registration("n1", "n1.1"))
    service.register(registration("n2", "n2.1"))
    send(service, "n1", FunctionFacts(FUNCTION, False, 0))
    shards = service.coordinator.jobs.sharded.by_name["big"].shards
    homes = [job.home_node.partition(".")[0] for job in shards]
    assert sorted(homes) == ["n1", "n2"]
    for job, home in zip(shards, homes, strict=True):
        send(service, home, CountUpdate(job.name, job.nonce, 1, 0, "c", 1.0))
    assert send(service, homes[0], ModelMade("big.0", 1, 0, 1, (f"{homes[0]}.1",), 1, 1.0)) == Acknowledged()
    ahead = service.store.model_path("big.0", 2)
    until = time.monotonic() + 10
    while service.coordinator.jobs.find("big.0").checkpointed_round < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert ahead.exists()
    service.leave(homes[1], Leave(f"{homes[1]}.1"))
    while ahead.exists():
        assert time.monotonic() < until, "the file stays"
        time.sleep(0.02)
    assert service.store.model_path("big.0", 1).exists()

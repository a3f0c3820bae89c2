"""The gRPC mode with real servers, sockets and forked clients."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from lifl.model_layout import encode_header
from lifl.tensors import LENGTH
from lifl_bench.deployment import Cell, Deployment, Running, Tree
from lifl_bench.grpc_mode import COPIES, COPIES_DETAIL, GrpcDeployment
from lifl_bench.grpc_mode.server import BUFFERS
from lifl_bench.measure import read_stat
from lifl_bench.processes import Team

from tests.conftest import ROOT

# The usual watchdog is a thread, and clients can only be forked where there is none.
pytestmark = pytest.mark.timeout(60, method="signal")

ITEMS = 400_000  # 1.6 MB: two chunks
HEADER = encode_header({"weight": ("F32", (ITEMS,))})
HEAD = LENGTH.pack(len(HEADER)) + HEADER


def values_of(client: int, round_number: int) -> npt.NDArray[np.float32]:
    random = np.random.default_rng([client, round_number])
    return random.standard_normal(ITEMS, np.float32)


def samples_of(client: int) -> float:
    return 10.0 + 3 * client


def update_of(client: int, round_number: int) -> memoryview:
    return memoryview(HEAD + values_of(client, round_number).tobytes())


def mean_of(updates: int, round_number: int) -> npt.NDArray[np.float64]:
    total = sum(
        samples_of(client) * values_of(client, round_number).astype(np.float64) for client in range(updates)
    )
    return np.asarray(total / sum(map(samples_of, range(updates))))


def values_in(model: memoryview) -> npt.NDArray[np.float32]:
    assert model[: len(HEAD)] == HEAD
    return np.frombuffer(model[len(HEAD) :], np.float32)


def cell_of(directory: Path, updates: int, leaves: int, function: Path = ROOT / "functions" / "fedavg.py") -> Cell:
    return Cell(
        updates,
        Tree(updates, leaves),
        HEADER,
        4 * ITEMS,
        update_of(1000, 0),
        function,
        directory,
        dict(os.environ),
    )


def error_of_rounds(deployment: Deployment, updates: int, rounds: int) -> float:
    """The largest error of all rounds, run by forked clients and an observer."""

    def work(number: int, link: Connection) -> None:
        if number == updates:
            observe(deployment, updates, link)
        else:
            send(deployment, number, link)

    worst = 0.0
    with Team(updates + 1, work) as team:
        list(team.receive(updates + 1, 30))
        for round_number in range(1, rounds + 1):
            deployment.before_round(round_number)
            start = time.monotonic()
            team.send_all(round_number)
            answers = dict(team.receive(updates + 1, 30))
            at, error = answers.pop(updates)
            folded = deployment.folded(round_number)
            deployment.after_round(round_number)
            assert len(folded) == updates
            assert all(start < one <= at for one in folded)
            worst = max(worst, error)
    return worst


def send(deployment: Deployment, client: int, link: Connection) -> None:
    sender = deployment.sender(client)
    sender.connect()
    link.send(None)
    while True:
        round_number = link.recv()
        sender.send(update_of(client, round_number), num_samples=samples_of(client), round=round_number)
        link.send(None)


def observe(deployment: Deployment, updates: int, link: Connection) -> None:
    observer = deployment.observer()
    observer.connect()
    link.send(None)
    while True:
        round_number = link.recv()
        at = observer.wait(round_number, 30)
        model = values_in(observer.fetch(round_number))
        link.send((at, float(np.max(np.abs(model - mean_of(updates, round_number))))))


@contextmanager
def one_client(deployment: Deployment, client: int = 0) -> Iterator[Told]:
    """A forked client that does what it is told and says how it ended, as grpc does not belong in this process."""

    def work(number: int, link: Connection) -> None:
        sender = deployment.sender(client)
        sender.connect()
        link.send(None)
        while True:
            update, samples, round_number = link.recv()
            try:
                if update is None:
                    link.send(bytes(sender.fetch_model(round_number)))
                else:
                    sender.send(memoryview(update), num_samples=samples, round=round_number)
                    link.send("accepted")
            except RuntimeError as error:
                link.send(str(error))

    with Team(1, work) as team:
        list(team.receive(1, 30))
        yield Told(team)


class Told:
    """Commands to the one client of a team."""

    def __init__(self, team: Team) -> None:
        self._team = team

    def send(self, update: memoryview, *, samples: float = 1.0, round: int = 1) -> str:
        return str(self._ask((bytes(update), samples, round)))

    def fetch(self, round: int) -> memoryview:
        answer = self._ask((None, 0.0, round))
        assert isinstance(answer, bytes), answer
        return memoryview(answer)

    def _ask(self, command: object) -> object:
        self._team.send_all(command)
        ((_, answer),) = self._team.receive(1, 30)
        return answer


# --- rounds --------------------------------------------------------------------------------------------------


def test_two_leaves_make_the_weighted_mean_in_every_round(tmp_path: Path) -> None:
    with Running(GrpcDeployment(cell_of(tmp_path, 5, 2))) as deployment:
        assert error_of_rounds(deployment, 5, 4) < 1e-6


def test_one_leaf_with_more_clients_than_buffers_makes_the_weighted_mean(tmp_path: Path) -> None:
    with Running(GrpcDeployment(cell_of(tmp_path, 2 * BUFFERS + 1, 1))) as deployment:
        assert error_of_rounds(deployment, 2 * BUFFERS + 1, 2) < 1e-6


def test_three_leaves_with_float64_sums_make_the_weighted_mean(tmp_path: Path) -> None:
    cell = cell_of(tmp_path, 4, 3)
    exact = Cell(**{**vars(cell), "precision": "float64"})
    with Running(GrpcDeployment(exact)) as deployment:
        assert error_of_rounds(deployment, 4, 2) < 1e-6


def test_a_round_of_one_update_makes_that_update_the_model(tmp_path: Path) -> None:
    with Running(GrpcDeployment(cell_of(tmp_path, 1, 1))) as deployment, one_client(deployment) as client:
        assert client.fetch(1) == update_of(1000, 0)
        assert client.send(update_of(0, 1), samples=7.0) == "accepted"
        assert np.allclose(values_in(client.fetch(2)), values_of(0, 1), rtol=1e-6)
        assert client.fetch(1) == update_of(1000, 0)


# --- what is refused -----------------------------------------------------------------------------------------


def test_updates_that_cannot_be_taken_are_refused_with_the_reason_and_the_round_goes_on(tmp_path: Path) -> None:
    with Running(GrpcDeployment(cell_of(tmp_path, 1, 1))) as deployment, one_client(deployment) as client:
        good = update_of(0, 1)
        assert "INVALID_ARGUMENT: an update has" in client.send(good[:-4])
        other = memoryview(HEAD.replace(b"weight", b"height") + good[len(HEAD) :].tobytes())
        assert "INVALID_ARGUMENT: the update's header is not the model's" in client.send(other)
        assert "INVALID_ARGUMENT: weight must be a number" in client.send(good, samples=float("nan"))
        assert "FAILED_PRECONDITION: round 2 is not open yet" in client.send(good, round=2)
        assert client.send(good) == "accepted"
        assert np.allclose(values_in(client.fetch(2)), values_of(0, 1), rtol=1e-6)
        assert "FAILED_PRECONDITION: round 1 is closed; round 2 is open" in client.send(good)


def test_a_second_update_of_a_client_is_refused(tmp_path: Path) -> None:
    with Running(GrpcDeployment(cell_of(tmp_path, 2, 1))) as deployment, one_client(deployment) as client:
        assert client.send(update_of(0, 1)) == "accepted"
        answer = client.send(update_of(0, 1))
        assert answer == "client 0: ALREADY_EXISTS: the update of client 0 for round 1 has been sent already"


def test_an_update_with_nan_does_not_count_and_may_be_sent_again(tmp_path: Path) -> None:
    with Running(GrpcDeployment(cell_of(tmp_path, 1, 1))) as deployment, one_client(deployment) as client:
        broken = values_of(0, 1)
        broken[-1] = np.nan
        assert client.send(memoryview(HEAD + broken.tobytes())) == "accepted"
        deadline = time.monotonic() + 10
        while "ALREADY_EXISTS" in (answer := client.send(update_of(0, 1))):
            assert time.monotonic() < deadline
        assert answer == "accepted"
        assert np.allclose(values_in(client.fetch(2)), values_of(0, 1), rtol=1e-6)


def test_a_stream_longer_or_shorter_than_announced_is_refused(tmp_path: Path) -> None:
    def work(number: int, link: Connection) -> None:
        import grpc
        from lifl_bench.grpc_mode.protocol import SEND_UPDATE, Attributes, chunks

        sender = deployment.sender(0)
        sender.connect()
        metadata = Attributes(0, 1, len(update), 1.0).metadata()
        call = sender._channel.stream_unary(SEND_UPDATE)
        for stream in (update[:-1], memoryview(bytes(update) + b"x")):
            try:
                call(chunks(stream), metadata=metadata)
            except grpc.RpcError as error:
                link.send(str(error))
        sender.send(update, num_samples=1.0, round=1)
        link.send("accepted")

    update = update_of(0, 1)
    deployment = GrpcDeployment(cell_of(tmp_path, 1, 1))
    with Running(deployment), Team(1, work) as team:
        short, long, good = (answer for _, answer in team.receive(3, 30))
    assert f"only {len(update) - 1} of the {len(update)} bytes announced" in short
    assert f"more than the {len(update)} bytes announced" in long
    assert good == "accepted"


def test_a_client_that_dies_in_the_middle_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    def die(number: int, link: Connection) -> None:
        from lifl_bench.grpc_mode.protocol import SEND_UPDATE, Attributes

        sender = deployment.sender(0)
        sender.connect()

        def stream() -> Iterator[bytes]:
            yield bytes(update[:1000])
            link.send(None)
            time.sleep(60)

        sender._channel.stream_unary(SEND_UPDATE)(stream(), metadata=Attributes(0, 1, len(update), 1.0).metadata())

    update = update_of(0, 1)
    deployment = GrpcDeployment(cell_of(tmp_path, 1, 1))
    with Running(deployment):
        with Team(1, die) as team:
            list(team.receive(1, 30))
        with one_client(deployment) as client:
            deadline = time.monotonic() + 10
            while "ALREADY_EXISTS" in (answer := client.send(update)):
                assert time.monotonic() < deadline
            assert answer == "accepted"


def test_an_observer_says_that_no_model_came(tmp_path: Path) -> None:
    def work(number: int, link: Connection) -> None:
        observer = deployment.observer()
        observer.connect()
        try:
            observer.wait(1, 0.2)
        except TimeoutError as error:
            link.send(str(error))

    deployment = GrpcDeployment(cell_of(tmp_path, 1, 1))
    with Running(deployment), Team(1, work) as team:
        assert [answer for _, answer in team.receive(1, 30)] == ["round 1 made no model within 0 s"]


# --- processes -----------------------------------------------------------------------------------------------


def test_a_server_that_dies_at_the_start_is_reported_with_its_log_and_nothing_is_left(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('this file is broken')\n")
    deployment = GrpcDeployment(cell_of(tmp_path, 4, 2, broken))
    with pytest.raises(RuntimeError, match=r"(?s)did not start.*this file is broken"):
        deployment.start()
    assert deployment.components() == {}


def test_stopping_leaves_no_process_and_no_file_but_the_logs(tmp_path: Path) -> None:
    deployment = GrpcDeployment(cell_of(tmp_path, 4, 2))
    deployment.start()
    pids = deployment.components()["server"]
    assert len(pids) == 2
    before = time.monotonic()
    deployment.stop()
    deployment.stop()
    assert time.monotonic() - before < 3
    assert [read_stat(pid) for pid in pids] == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grpc-leaf-0.log", "grpc-leaf-1.log"]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["", ""]


def test_more_leaves_than_updates_make_no_tree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 leaves cannot share 1 updates"):
        GrpcDeployment(cell_of(tmp_path, 1, 2))


def test_copies_are_counted_and_listed() -> None:
    assert len(COPIES_DETAIL.split(";")) == 6
    assert COPIES == 7

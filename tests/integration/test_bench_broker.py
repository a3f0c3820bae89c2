"""The broker modes of the benchmark, with a real nats-server, real sidecars and processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lifl.http_function import UPDATE
from lifl.model_layout import Precision, encode_header
from lifl.tensors import LENGTH
from lifl_bench.broker import events, parts
from lifl_bench.broker.chunk_store import ChunkStore, create
from lifl_bench.broker.deployment import BrokerDeployment
from lifl_bench.broker.http_client import Peer
from lifl_bench.broker.nats_py_store import NatsPyConnection
from lifl_bench.broker.nats_server import NatsServer
from lifl_bench.broker.parts import missing_parts
from lifl_bench.broker.setup import Setup
from lifl_bench.broker.store import StoreError, fill_from
from lifl_bench.broker.stores import open_store
from lifl_bench.broker.tuning import KIB, STOCK, TUNED, WIRE, Tuning
from lifl_bench.broker.wire import Wire, WireError
from lifl_bench.deployment import Cell, Observer, Tree
from lifl_bench.service import Service
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
SHAPES: dict[str, tuple[int, ...]] = {"conv.weight": (64, 3, 7), "fc.weight": (200, 150), "fc.bias": (3,)}
ITEMS = 64 * 3 * 7 + 200 * 150 + 3
CLIENTS = 5
LIMIT = 48 * KIB
"""Smaller than an update of these shapes."""


def make_header() -> bytes:
    return encode_header({name: ("F32", shape) for name, shape in SHAPES.items()})


def make_update(values: NDArray[np.float32]) -> memoryview:
    header = make_header()
    return memoryview(LENGTH.pack(len(header)) + header + values.tobytes())


def values_of(model: memoryview) -> NDArray[np.float64]:
    (length,) = LENGTH.unpack_from(model)
    return np.frombuffer(model[LENGTH.size + length :], np.float32).astype(np.float64)


def make_cell(directory: Path, *, leaves: int = 2, precision: Precision = "float32") -> Cell:
    return Cell(
        updates=CLIENTS,
        tree=Tree(CLIENTS, leaves),
        safetensors_header=make_header(),
        payload_bytes=4 * ITEMS,
        initial_model=make_update(np.full(ITEMS, 7, np.float32)),
        function=ROOT / "functions" / "fedavg.py",
        directory=directory,
        environment=dict(os.environ),
        precision=precision,
    )


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Callable[..., BrokerDeployment]]:
    """Start deployments that are stopped at the end of the test."""
    started: list[BrokerDeployment] = []

    def start(tuning: Tuning, cell: Cell | None = None, **options: Any) -> BrokerDeployment:
        deployment = BrokerDeployment(cell or make_cell(tmp_path), tuning, **options)
        started.append(deployment)
        deployment.start()
        return deployment

    yield start
    for deployment in started:
        deployment.stop()


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    (tmp_path / "nats").mkdir()
    server = NatsServer(tmp_path / "nats", TUNED, os.environ)
    yield server
    server.service.stop()


def post_updates(deployment: BrokerDeployment, updates: Sequence[memoryview], number: int) -> None:
    """All clients at the same time, client i with i + 1 samples."""
    errors: list[BaseException] = []

    def run(client: int) -> None:
        sender = deployment.sender(client)
        try:
            sender.connect()
            sender.send(updates[client], num_samples=client + 1, round=number)
        except BaseException as error:
            errors.append(error)
        finally:
            sender.close()

    clients = [threading.Thread(target=run, args=(client,)) for client in range(len(updates))]
    for client in clients:
        client.start()
    for client in clients:
        client.join(30)
    if errors:
        raise errors[0]


def run_round(deployment: BrokerDeployment, observer: Observer, number: int) -> None:
    """One round with random updates, whose model must be their weighted mean."""
    values = np.random.default_rng(number).standard_normal((CLIENTS, ITEMS), dtype=np.float32)
    deployment.before_round(number)
    made: list[float] = []
    waiting = threading.Thread(target=lambda: made.append(observer.wait(number, 30)))
    waiting.start()
    post_updates(deployment, [make_update(row) for row in values], number)
    waiting.join(40)
    assert made, "no model came"
    expected = np.average(values.astype(np.float64), axis=0, weights=np.arange(1, CLIENTS + 1))
    assert np.abs(values_of(observer.fetch(number)) - expected).max() < 1e-6
    assert all(0 < time <= made[0] for time in deployment.folded(number))


def is_alive(pid: int) -> bool:
    """Whether the process runs; nobody may have waited for a dead one whose parent is gone."""
    return read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()[:1] not in ([], [b"Z"])


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("tuning", "options"),
    [
        pytest.param(TUNED, {}, id="inline"),
        pytest.param(TUNED, {"message_limit": LIMIT}, id="resolved-by-function"),
        pytest.param(replace(TUNED, resolve="filter"), {"message_limit": LIMIT}, id="resolved-by-filter"),
        pytest.param(TUNED, {"message_limit": LIMIT, "store": "shared-memory"}, id="shared-memory"),
        pytest.param(TUNED, {"message_limit": LIMIT, "timing": "lazy", "cold": True}, id="lazy-cold"),
        pytest.param(
            TUNED,
            {"message_limit": LIMIT, "timing": "lazy", "cold": True, "store": "shared-memory"},
            id="lazy-cold-shared-memory",
        ),
        pytest.param(WIRE, {"message_limit": LIMIT}, id="wire-resolved-by-function"),
        pytest.param(replace(WIRE, resolve="filter"), {"message_limit": LIMIT}, id="wire-resolved-by-filter"),
        pytest.param(STOCK, {"message_limit": LIMIT}, id="stock"),
        pytest.param(STOCK, {}, id="stock-inline"),
    ],
)
def test_every_round_makes_the_weighted_mean_of_its_updates(
    deploy: Callable[..., BrokerDeployment], tuning: Tuning, options: dict[str, Any]
) -> None:
    deployment = deploy(tuning, **options)
    observer = deployment.observer()
    observer.connect()
    for number in (1, 2):
        run_round(deployment, observer, number)
        deployment.after_round(number)
    observer.close()
    assert deployment.failure() is None


def test_sums_in_float64_pass_the_broker(deploy: Callable[..., BrokerDeployment], tmp_path: Path) -> None:
    deployment = deploy(TUNED, make_cell(tmp_path, precision="float64"), message_limit=LIMIT)
    observer = deployment.observer()
    observer.connect()
    run_round(deployment, observer, 1)
    observer.close()


def test_a_client_gets_the_model_that_its_round_starts_from(
    deploy: Callable[..., BrokerDeployment], tmp_path: Path
) -> None:
    deployment = deploy(TUNED, make_cell(tmp_path, leaves=1), message_limit=LIMIT)
    observer = deployment.observer()
    observer.connect()
    sender = deployment.sender(0)
    sender.connect()
    assert set(values_of(sender.fetch_model(1))) == {7.0}
    run_round(deployment, observer, 1)
    deployment.after_round(1)
    assert bytes(sender.fetch_model(2)) == bytes(observer.fetch(1))
    sender.close()
    observer.close()


def test_an_update_that_comes_twice_counts_once(deploy: Callable[..., BrokerDeployment], tmp_path: Path) -> None:
    deployment = deploy(TUNED, make_cell(tmp_path, leaves=1), message_limit=LIMIT)
    observer = deployment.observer()
    observer.connect()
    values = [np.full(ITEMS, client, np.float32) for client in range(CLIENTS)]
    sender = deployment.sender(2)
    sender.send(make_update(values[2]), num_samples=3, round=1)
    sender.send(make_update(values[2]), num_samples=3, round=1)  # the same event id: the stream keeps one
    post_again(deployment, make_update(values[2]))  # another id, as if it had been sent anew
    sender.close()
    made: list[float] = []
    waiting = threading.Thread(target=lambda: made.append(observer.wait(1, 30)))
    waiting.start()
    post_updates(deployment, [make_update(row) for row in values], 1)
    waiting.join(40)
    assert made
    expected = np.average(range(CLIENTS), weights=range(1, CLIENTS + 1))
    assert np.allclose(values_of(observer.fetch(1)), expected, atol=1e-6)
    assert deployment.failure() is None
    observer.close()


def post_again(deployment: BrokerDeployment, update: memoryview) -> None:
    attributes = {"specversion": "1.0", "type": UPDATE, "source": "/clients/2", "id": "another", "round": "1"}
    attributes |= {"numsamples": "3", events.LEAF: "0"}
    peer = Peer(deployment._ingress_port, timeout=10)
    assert peer.post("/", events.headers_of(attributes), [update], len(update)).status == 202
    peer.close()


def test_an_update_that_the_function_refuses_fails_the_round(
    deploy: Callable[..., BrokerDeployment], tmp_path: Path
) -> None:
    deployment = deploy(TUNED, make_cell(tmp_path, leaves=1), message_limit=LIMIT)
    observer = deployment.observer()
    observer.connect()
    sender = deployment.sender(0)
    sender.send(make_update(np.full(ITEMS, np.nan, np.float32)), num_samples=1, round=1)
    sender.close()
    with pytest.raises(RuntimeError, match=r"status 422: .*not finite"):
        observer.wait(1, 30)
    observer.close()


def test_a_function_that_is_gone_is_noticed_after_the_last_attempt(
    deploy: Callable[..., BrokerDeployment],
    tmp_path: Path,
) -> None:
    deployment = deploy(
        replace(TUNED, max_deliver=2, retry_delay_s=0.05), make_cell(tmp_path, leaves=1), message_limit=LIMIT
    )
    observer = deployment.observer()
    observer.connect()
    for pid in deployment.components()["function"]:
        os.kill(pid, 9)
    sender = deployment.sender(0)
    sender.send(make_update(np.zeros(ITEMS, np.float32)), num_samples=1, round=1)
    sender.close()
    with pytest.raises(RuntimeError, match="given up after 2 attempts: status 502"):
        observer.wait(1, 30)
    observer.close()


def test_a_request_that_is_no_event_is_refused(deploy: Callable[..., BrokerDeployment], tmp_path: Path) -> None:
    deployment = deploy(TUNED, make_cell(tmp_path, leaves=1))
    peer = Peer(deployment._ingress_port, timeout=10)
    response = peer.post("/", {}, [b"x" * (1 << 20)], 1 << 20)
    assert (response.status, b"no binary-mode event" in response.read()) == (400, True)
    peer.close()


def test_components_are_all_processes_and_stop_ends_them(deploy: Callable[..., BrokerDeployment]) -> None:
    deployment = deploy(TUNED)
    components = deployment.components()
    assert {name: len(pids) for name, pids in components.items()} == {
        "ingress": 1,
        "nats-server": 1,
        "filter": 1,
        "function": 2,
        "sidecar": 4,  # a master and a worker each
    }
    pids = [pid for pids in components.values() for pid in pids]
    assert len(set(pids)) == len(pids) and all(map(is_alive, pids))
    deployment.stop()
    assert not any(map(is_alive, pids))
    deployment.stop()


def test_cold_functions_run_from_the_first_event_to_the_end_of_the_round(
    deploy: Callable[..., BrokerDeployment],
) -> None:
    deployment = deploy(TUNED, cold=True, timing="lazy")
    observer = deployment.observer()
    observer.connect()
    assert deployment.components()["function"] == []
    run_round(deployment, observer, 1)
    components = deployment.components()
    assert (len(components["function"]), len(components["sidecar"]), len(components["filter"])) == (2, 4, 1)
    deployment.after_round(1)
    assert deployment.components()["function"] == deployment.components()["sidecar"] == []
    assert not any(is_alive(pid) for pid in (*components["function"], *components["sidecar"]))
    observer.close()


def test_a_server_that_is_given_has_only_the_model_after_a_round_and_nothing_after_the_stop(
    deploy: Callable[..., BrokerDeployment], nats: NatsServer
) -> None:
    deployment = deploy(TUNED, nats_url=nats.url, message_limit=LIMIT)
    assert "nats-server" not in deployment.components()
    observer = deployment.observer()
    observer.connect()
    wire = Wire(nats.url)
    for number in (1, 2):
        run_round(deployment, observer, number)
        deployment.after_round(number)
    observer.close()
    streams = {info["config"]["name"]: info["state"] for info in wire.call("STREAM.LIST")["streams"]}
    sizes = {name.rpartition("-")[2]: state["bytes"] for name, state in streams.items()}
    assert sizes["events"] == 0
    # The model that the next round starts from, and the one before it.
    assert 8 * ITEMS < sizes["payloads"] < 9 * ITEMS
    deployment.stop()
    assert not wire.call("STREAM.LIST").get("streams")
    wire.close()


def test_a_failed_start_shows_the_log_and_leaves_nothing_running(tmp_path: Path) -> None:
    cell = replace(make_cell(tmp_path), function=tmp_path / "missing.py")
    deployment = BrokerDeployment(cell, TUNED)
    with pytest.raises(RuntimeError, match=r"(?s)function-\d did not start:.*missing.py"):
        deployment.start()
    assert deployment.components() == {"sidecar": [], "function": []}
    running = [Path(f"/proc/{pid}/cmdline") for pid in os.listdir("/proc") if pid.isdecimal()]
    assert not [path for path in running if str(tmp_path).encode() in read(path)]


def test_a_server_that_does_not_answer_fails_the_start(tmp_path: Path) -> None:
    deployment = BrokerDeployment(make_cell(tmp_path), TUNED, nats_url="nats://127.0.0.1:1")
    with pytest.raises(RuntimeError, match="did not start"):
        deployment.start()


def test_missing_parts_come_with_the_command_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert missing_parts() == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_parts() == []  # Debian has servers where users have no PATH to
    monkeypatch.setattr(parts, "_FURTHER_DIRECTORIES", ())
    assert [name for name, _ in missing_parts()] == ["nats-server", "nginx"]
    assert [name for name, _ in missing_parts(own_server=False)] == ["nginx"]
    with pytest.raises(RuntimeError, match="nats-server is missing: apt-get install nats-server"):
        BrokerDeployment(make_cell(tmp_path), TUNED).start()


# --- payload stores ------------------------------------------------------------------------------------------

CHUNK = 10 * KIB


@pytest.fixture(params=[TUNED, WIRE], ids=lambda tuning: tuning.mode)
def store(request: pytest.FixtureRequest, nats: NatsServer, tmp_path: Path) -> Iterator[ChunkStore]:
    setup = Setup(
        name="test",
        nats_url=nats.url,
        tuning=replace(request.param, chunk_bytes=CHUNK, window=3),
        tree=Tree(2, 1),
        directory=str(tmp_path),
        function="fedavg.py",
        precision="float32",
        timing="eager",
        cold=False,
        update_bytes=1,
        payload_limit=1,
        max_event_bytes=1,
    )
    wire = Wire(nats.url)
    create(wire, setup)
    wire.close()
    opened = open_store(setup)
    assert isinstance(opened, ChunkStore)
    yield opened
    opened.close()


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 20 * CHUNK + 7])
def test_a_payload_of_any_size_comes_back_in_place_and_in_pieces(store: ChunkStore, size: int) -> None:
    payload = os.urandom(size)
    reference = store.put("u1", size, fill_from(memoryview(payload)))
    target = memoryview(bytearray(size + 5))
    got = store.get(reference, size, target)
    assert (got.obj is target.obj, bytes(got) == payload, bytes(target[size:])) == (True, True, bytes(5))
    assert bytes(store.get(reference, size, None)) == payload
    assert b"".join(map(bytes, store.read(reference, size))) == payload


def test_several_threads_use_a_store_at_once(store: ChunkStore) -> None:
    payloads = [os.urandom(7 * CHUNK + number) for number in range(6)]
    got: dict[int, bytes] = {}

    def move(number: int) -> None:
        payload = memoryview(payloads[number])
        got[number] = bytes(store.get(store.put("u1", len(payload), fill_from(payload)), len(payload), None))

    threads = [threading.Thread(target=move, args=(number,)) for number in range(len(payloads))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == dict(enumerate(payloads))


def test_a_payload_that_is_not_all_there_is_an_error(store: ChunkStore, nats: NatsServer) -> None:
    size = 4 * CHUNK
    reference = store.put("u1", size, fill_from(memoryview(bytes(size))))
    wire = Wire(nats.url)
    assert wire.call("STREAM.MSG.DELETE.test-payloads", {"seq": 2})["success"]
    wire.close()
    with pytest.raises(StoreError, match="has 3 of 4 chunks"):
        store.get(reference, size, None)
    other = store.put("u2", size, fill_from(memoryview(bytes(size))))
    with pytest.raises(StoreError, match="not as it should be"):
        store.get(other, size - 1, None)
    store.discard("u1")
    with pytest.raises(StoreError, match="has 0 of 4 chunks"):
        store.get(reference, size, None)
    assert bytes(store.get(other, size, None)) == bytes(size)


def test_what_a_server_does_not_take_is_an_error(store: ChunkStore, nats: NatsServer) -> None:
    wire = Wire(nats.url)
    wire.call("STREAM.DELETE.test-payloads")
    wire.close()
    with pytest.raises(WireError):
        store.put("u1", CHUNK, fill_from(memoryview(bytes(CHUNK))))


def test_a_server_that_is_lost_is_an_error_and_not_a_wait(nats: NatsServer) -> None:
    connection = NatsPyConnection(nats.url)
    ending = threading.Timer(0.2, nats.service.stop)
    ending.start()
    with pytest.raises(WireError):
        connection.receive()
    ending.join()
    connection.close()
    with pytest.raises((WireError, OSError)):
        NatsPyConnection(nats.url)


def test_the_wire_moves_large_messages_with_and_without_headers(nats: NatsServer) -> None:
    wire = Wire(nats.url)
    wire.subscribe("test.*")
    payload = os.urandom(3 << 20)
    wire.publish("test.a", payload)
    wire.publish("test.b", payload[:1000], headers={"Some": "header"}, reply="nobody")
    wire.publish("test.c")
    target = memoryview(bytearray(len(payload)))
    first = wire.receive(target)
    assert (first.subject, bytes(target) == payload, first.payload.obj is target.obj) == ("test.a", True, True)
    second = wire.receive()
    assert (second.subject, second.reply, bytes(second.payload)) == ("test.b", "nobody", payload[:1000])
    assert len(wire.receive().payload) == 0
    assert wire.poll(0.01) is None
    wire.publish("test.d", b"later")
    polled = wire.poll(10)
    assert polled is not None and bytes(polled.payload) == b"later"
    wire.close()


def test_the_wire_reports_what_jetstream_refuses(nats: NatsServer) -> None:
    wire = Wire(nats.url)
    with pytest.raises(RuntimeError, match="stream not found"):
        wire.call("STREAM.INFO.absent")
    with pytest.raises(RuntimeError, match="status 503"):
        wire.request("nobody.listens")
    wire.close()


def test_a_service_that_ignores_its_end_is_killed_with_what_is_below_it(tmp_path: Path) -> None:
    command = "trap '' TERM; sleep 1000 & echo $!; while true; do sleep 0.05; done"
    service = Service("stubborn", ["bash", "-c", command], os.environ, tmp_path / "log")
    child = int(service.hear())
    assert {service.pid, child} <= set(service.pids())
    service.stop(timeout=0.3)
    assert not is_alive(service.pid) and not is_alive(child)

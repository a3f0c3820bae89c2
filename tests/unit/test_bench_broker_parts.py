"""Parts of the benchmark's broker that need no server: events, configurations, queues, buffers, slots."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lifl.http_function import MODEL, UPDATE, Event, Reply
from lifl_bench.broker import events, nats_server, sidecar
from lifl_bench.broker.deployment import BrokerDeployment
from lifl_bench.broker.filter import deliveries_to
from lifl_bench.broker.function import Buffers, FoldQueue
from lifl_bench.broker.http_client import Peer, read_all
from lifl_bench.broker.http_server import Request, Response, Server
from lifl_bench.broker.setup import Setup
from lifl_bench.broker.shared_memory_store import SharedMemoryStore, create_pool, slots_for
from lifl_bench.broker.store import StoreError, fill_from, group_of
from lifl_bench.broker.tuning import MIB, STOCK, TUNED
from lifl_bench.deployment import Cell, Timing, Tree

ATTRIBUTES = {"specversion": "1.0", "type": UPDATE, "source": "/clients/1", "id": "a", "round": "3"}


def make_setup(directory: Path, **changes: Any) -> Setup:
    setup = Setup(
        name="test",
        nats_url="nats://127.0.0.1:1",
        tuning=replace(TUNED, store="shared-memory"),
        tree=Tree(5, 2),
        directory=str(directory),
        function="fedavg.py",
        precision="float32",
        timing="eager",
        cold=False,
        update_bytes=5000,
        payload_limit=5000,
        max_event_bytes=1 << 20,
        pool_slots=3,
    )
    return replace(setup, **changes)


# --- events --------------------------------------------------------------------------------------------------


def test_an_event_keeps_attributes_and_data_through_headers_and_json() -> None:
    attributes = {**ATTRIBUTES, "source": 'a "b" \u00e9 50%', "datacontenttype": "application/vnd.safetensors"}
    headers = events.headers_of(attributes)
    assert all(value.isascii() for value in headers.values())
    assert events.attributes_of(headers) == attributes
    data = bytes(range(256)) * 3
    message = events.encode(attributes, memoryview(data))
    assert events.decode(message) == (attributes, data)
    assert set(json.loads(message)) == {*attributes, "data_base64"}


def test_an_event_without_data_has_none_afterwards() -> None:
    assert events.decode(events.encode(ATTRIBUTES, None)) == (ATTRIBUTES, None)
    assert events.decode(events.encode(ATTRIBUTES, b"")) == (ATTRIBUTES, b"")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000])
def test_the_size_of_an_event_is_known_before_its_data(size: int) -> None:
    assert events.encoded_size(ATTRIBUTES, size) == len(events.encode(ATTRIBUTES, bytes(size)))


def test_headers_without_attributes_are_no_event() -> None:
    assert events.attributes_of({"content-type": "text/plain"}) == {}


# --- configurations ------------------------------------------------------------------------------------------


def test_stock_leaves_the_limits_of_nats_server_alone(tmp_path: Path) -> None:
    assert "max_" not in nats_server.configuration(tmp_path, STOCK)
    assert f"max_payload: {8 * MIB}" in nats_server.configuration(tmp_path, TUNED)


def test_the_sidecar_streams_both_ways_and_changes_user_only_as_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    text = sidecar.configuration(tmp_path, STOCK, 1234, 5678)
    assert "proxy_request_buffering off;" in text and "proxy_buffering off;" in text
    assert "user" not in text and "client_body_buffer_size" not in text
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    text = sidecar.configuration(tmp_path, TUNED, 1234, 5678)
    assert "user root;" in text and "client_body_buffer_size 1048576;" in text


def test_a_setup_is_read_as_it_was_written_and_by_nobody_else(tmp_path: Path) -> None:
    setup = make_setup(tmp_path)
    setup.write()
    assert Setup.read(str(setup.path)) == setup
    assert setup.path.stat().st_mode & 0o777 == 0o600


def test_a_lazy_function_is_given_all_of_its_round_at_a_time(tmp_path: Path) -> None:
    setup = make_setup(tmp_path, tuning=STOCK)
    assert [deliveries_to(setup, leaf) for leaf in (0, 1)] == [1, 1]
    assert [deliveries_to(replace(setup, timing="lazy"), leaf) for leaf in (0, 1)] == [4, 2]


def test_a_filter_that_streams_payloads_cannot_have_shared_memory(tmp_path: Path) -> None:
    cell = Cell(1, Tree(1, 1), b"{}", 0, b"", tmp_path / "function.py", tmp_path, {})
    with pytest.raises(ValueError, match="no shared memory"):
        BrokerDeployment(cell, replace(TUNED, resolve="filter"), store="shared-memory")


# --- folding -------------------------------------------------------------------------------------------------


class RecordedAggregation:
    """Says which events came together."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.entered = threading.Semaphore(0)
        self.may_go_on = threading.Semaphore(0)

    def process(self, batch: Sequence[Event]) -> list[Reply]:
        self.batches.append([event.id for event in batch])
        self.entered.release()
        self.may_go_on.acquire(timeout=10)
        return [Reply(202)] * len(batch)


def submit(queue: FoldQueue, *ids: str, kind: str = UPDATE) -> list[threading.Thread]:
    """Submit events from threads of their own; returns when all are with the queue."""
    threads = []
    for name in ids:
        event = Event(kind, f"/clients/{name}", name, 1, b"")
        before = queue.submitted
        thread = threading.Thread(target=queue.submit, args=(event,))
        thread.start()
        while queue.submitted == before:
            pass
        threads.append(thread)
    return threads


@pytest.mark.parametrize(
    ("timing", "expected"),
    [("eager", [["a"], ["b", "c", "d"]]), ("lazy", [["a", "b", "c"], ["d"]])],
)
def test_eager_timing_folds_what_is_there_and_lazy_timing_the_whole_round(
    timing: Timing, expected: list[list[str]]
) -> None:
    aggregation: Any = RecordedAggregation()
    queue = FoldQueue(aggregation, timing, 3)
    threads = submit(queue, "a")
    if timing == "eager":
        assert aggregation.entered.acquire(timeout=10)
    threads += submit(queue, "b", "c")
    if timing == "lazy":
        assert aggregation.entered.acquire(timeout=10)
    threads += submit(queue, "d")
    aggregation.may_go_on.release(5)
    for thread in threads:
        thread.join(10)
    assert aggregation.batches == expected


def test_lazy_timing_counts_a_client_once_and_lets_models_through() -> None:
    aggregation: Any = RecordedAggregation()
    aggregation.may_go_on.release(5)
    queue = FoldQueue(aggregation, "lazy", 2)
    threads = submit(queue, "a", "a")
    threads += submit(queue, "model", kind=MODEL)
    threads[-1].join(10)
    threads += submit(queue, "b")
    for thread in threads:
        thread.join(10)
    assert aggregation.batches == [["model"], ["a", "a", "b"]]


def test_an_error_of_the_fold_reaches_who_submitted() -> None:
    class Failing:
        def process(self, batch: Sequence[Event]) -> list[Reply]:
            raise ArithmeticError("no")

    aggregation: Any = Failing()
    queue = FoldQueue(aggregation, "eager", 2)
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            queue.submit(Event(UPDATE, "/clients/1", "a", 1, b""))


def test_buffers_are_used_again_and_bounded() -> None:
    buffers = Buffers(5000, keep=True, ready=1)
    first = buffers.take(5000)
    second = buffers.take(1)
    assert first.obj is not second.obj
    buffers.give_back(first)
    assert buffers.take(10).obj is first.obj
    with pytest.raises(StoreError, match="larger than any"):
        buffers.take(5001)


# --- shared memory -------------------------------------------------------------------------------------------


@pytest.fixture
def pool_setup(tmp_path: Path) -> Iterator[Setup]:
    setup = make_setup(tmp_path)
    descriptor = create_pool(setup)
    yield replace(setup, pool=f"/proc/{os.getpid()}/fd/{descriptor}")
    os.close(descriptor)


def test_a_slot_holds_a_payload_for_all_processes_until_its_group_is_discarded(pool_setup: Setup) -> None:
    writer = SharedMemoryStore(pool_setup, writes=True)
    reader = SharedMemoryStore(pool_setup, writes=False)
    payloads = [bytes([number]) * 5000 for number in range(3)]
    references = [
        writer.put(group, 5000, fill_from(memoryview(payload)))
        for group, payload in zip(("u1", "u1", "m2"), payloads, strict=True)
    ]
    assert [bytes(reader.get(reference, 5000, None)) for reference in references] == payloads
    assert b"".join(reader.read(references[2], 5000)) == payloads[2]
    with pytest.raises(StoreError, match="in use"):
        reader.put("u1", 1, fill_from(memoryview(b"x")))
    writer.discard("u1")
    assert reader.put("u2", 1, fill_from(memoryview(b"x"))) == references[0]
    assert bytes(reader.get(references[2], 5000, None)) == payloads[2]
    writer.close()
    reader.close()


@pytest.mark.parametrize("reference", ["nats:a.1", "shm:", "shm:x", "shm:3"])
def test_a_reference_that_is_not_into_the_pool_is_refused(pool_setup: Setup, reference: str) -> None:
    store = SharedMemoryStore(pool_setup, writes=False)
    with pytest.raises(StoreError):
        store.get(reference, 1, None)
    with pytest.raises(StoreError, match="fit"):
        store.put("u1", 1 << 20, fill_from(memoryview(b"")))
    store.close()


def test_a_pool_holds_a_round_with_what_is_delivered_again() -> None:
    assert slots_for(20, 2) >= 20 + 2 + 2


def test_models_and_inputs_are_in_groups_of_their_own() -> None:
    assert (group_of(UPDATE, "3"), group_of(MODEL, "3")) == ("u3", "m3")
    with pytest.raises(StoreError):
        group_of(UPDATE, "x.>")


# --- HTTP ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    def handle(request: Request) -> Response:
        if request.target == "/pieces":
            return Response(200, {"x-kind": "pieces"}, iter([b"a" * 5, b"b" * (3 << 20)]), 5 + (3 << 20))
        if request.target == "/unread":
            return Response(400, {}, b"no")
        if request.target == "/fail":
            raise ValueError("broken")
        body = memoryview(bytearray(request.length))
        request.fill(body)
        return Response(200, {}, body)

    server = Server(handle)
    server.start()
    yield server
    server.shutdown()
    server.server_close()


def test_bodies_of_any_size_go_both_ways_on_one_connection(server: Server) -> None:
    peer = Peer(server.port, timeout=10)
    for size in (0, 10, 70_000, 5 << 20):
        data = os.urandom(size)
        response = peer.post("/", {"x": "y"}, [memoryview(data)[:7], memoryview(data)[7:]], size)
        assert (response.status, bytes(read_all(response)) == data) == (200, True)
    response = peer.get("/pieces")
    assert bytes(read_all(response)) == b"a" * 5 + b"b" * (3 << 20)
    assert response.headers["x-kind"] == "pieces"
    peer.close()


def test_a_body_that_the_handler_leaves_does_not_spoil_the_connection(server: Server) -> None:
    peer = Peer(server.port, timeout=10)
    for target, status in (("/unread", 400), ("/fail", 500), ("/", 200)):
        response = peer.post(target, {}, [b"x" * (2 << 20)], 2 << 20)
        assert response.status == status
        read_all(response)
    peer.close()

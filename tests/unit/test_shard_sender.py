"""The client of a sharded job against a small server that answers a part only when all are there, as LIFL does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from lifl import Client, InvalidModel, Refused
from lifl.model_layout import parse_header
from lifl.shards import Shard, describe_shards, plan_shards
from lifl.tensors import Encoder, split

pytestmark = pytest.mark.timeout(30)

JOB = "big"
MODEL = {"w": np.arange(1000, dtype=np.float32), "b": np.arange(7, dtype=np.float64)}


class Gateway(ThreadingHTTPServer):
    """Knows the shards, and gathers the parts of one update."""

    daemon_threads = True

    def __init__(self, shards: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        layout, _ = split(Encoder().encode(MODEL))
        self.shards: tuple[Shard, ...] = plan_shards(layout, shards)
        self.lock = threading.Condition()
        self.requests: list[str] = []
        self.parts: dict[int, bytes] = {}
        self.ids: set[str] = set()
        self.updates: set[str] = set()
        self.refused: dict[int, tuple[int, dict[str, Any]]] = {}
        """What a shard answers at once in place of waiting for the others."""
        self.status = 202

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up a part closes its connection."""

    def take(self, index: int, body: bytes) -> tuple[int, dict[str, Any]]:
        with self.lock:
            if index in self.refused:
                return self.refused[index]
            self.parts[index] = body
            self.lock.notify_all()
            if not self.lock.wait_for(lambda: len(self.parts) == len(self.shards), 20):
                return 503, {"title": "parts missing"}
            return self.status, {"status": "accepted", "round": 1}

    def joined(self) -> bytes:
        return b"".join(bytes(split(self.parts[index])[1]) for index in range(len(self.shards)))


class _Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        gateway = self.server
        job = self.path.split("/")[3]
        with gateway.lock:
            gateway.requests.append(job)
        if job == JOB:
            shards = describe_shards(JOB, gateway.shards)
            self._answer(409, {"title": "Sharded job", "status": 409, "shards": shards})
            return
        with gateway.lock:
            gateway.ids.add(self.headers["ce-id"])
            gateway.updates.add(self.headers["ce-update"])
        self._answer(*gateway.take(int(job.rpartition(".")[2]), body))

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway = Gateway(3)
    thread = threading.Thread(target=gateway.serve_forever, args=(0.01,))
    thread.start()
    yield gateway
    gateway.shutdown()
    gateway.server_close()
    thread.join()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    with Client(gateway.url, JOB, "c1", timeout=10, retries=0) as client:
        yield client


def test_all_parts_are_sent_at_the_same_time_and_are_the_update(gateway: Gateway, client: Client):
    assert client.submit(MODEL, num_samples=1, round=1).status == "accepted"
    assert sorted(gateway.requests) == [JOB, f"{JOB}.0", f"{JOB}.1", f"{JOB}.2"]
    assert gateway.joined() == bytes(split(Encoder().encode(MODEL))[1])
    for index, shard in enumerate(gateway.shards):
        assert split(gateway.parts[index])[0] == parse_header(shard.header)
    assert len(gateway.ids) == 3, "each part is an event of its own"
    assert len(gateway.updates) == 1, "and all are of one update"


def test_what_was_learned_of_the_shards_is_kept(gateway: Gateway, client: Client):
    for _ in range(2):
        gateway.parts.clear()
        client.submit(MODEL, num_samples=1, round=1)
    assert gateway.requests.count(JOB) == 1
    assert len(gateway.updates) == 2


def test_safetensors_bytes_are_cut_as_they_are(gateway: Gateway, client: Client):
    data = bytes(Encoder().encode(MODEL))
    assert client.submit(data, num_samples=1, round=1).status == "accepted"
    assert gateway.joined() == bytes(split(data)[1])


def test_a_part_that_is_refused_ends_the_others(gateway: Gateway, client: Client):
    gateway.refused[1] = (422, {"title": "not finite"})
    started = time.monotonic()
    with pytest.raises(Refused, match="not finite"):
        client.submit(MODEL, num_samples=1, round=1)
    assert time.monotonic() - started < 5
    del gateway.refused[1]
    gateway.parts.clear()
    assert client.submit(MODEL, num_samples=1, round=1).status == "accepted", "its connections are used again"


def test_an_update_is_a_duplicate_or_late_with_its_parts(gateway: Gateway, client: Client):
    gateway.refused[0] = (200, {"status": "duplicate", "round": 1})
    gateway.parts[0] = b""
    assert client.submit(MODEL, num_samples=1, round=1).status == "duplicate"
    late = (409, {"title": "Late", "round": 2})
    gateway.refused.update(dict.fromkeys(range(3), late))
    submission = client.submit(MODEL, num_samples=1, round=1)
    assert (submission.status, submission.round) == ("late", 2)


def test_a_job_that_was_made_anew_with_other_shards_is_asked_again(gateway: Gateway, client: Client):
    client.submit(MODEL, num_samples=1, round=1)
    gateway.refused[2] = (404, {"title": "no such job"})
    gateway.shards = gateway.shards[:2]
    gateway.parts.clear()
    with pytest.raises(InvalidModel, match="does not fit"):  # the two have only a part of the model's tensors
        client.submit(MODEL | {"other": np.zeros(3)}, num_samples=1, round=1)
    assert gateway.requests.count(JOB) == 2


def test_an_update_of_another_model_is_not_sent(gateway: Gateway, client: Client):
    with pytest.raises(InvalidModel, match="'b' is missing"):
        client.submit({"w": MODEL["w"]}, num_samples=1, round=1)
    assert gateway.requests == [JOB]

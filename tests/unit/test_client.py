"""The client against a small real HTTP server, whose answers each test writes out byte by byte."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lifl import Busy, Client, InvalidInput, InvalidModel, Refused, Submission, Unavailable
from lifl.client import EXPECT_BYTES
from lifl.tensors import Encoder, split

Handler = Callable[["Exchange"], bool]
"""Answers one request; whether the connection stays open."""


@dataclass
class Exchange:
    """One request as the server got it."""

    sock: socket.socket
    line: str
    headers: dict[str, str]
    rest: bytes
    """What was received beyond the head."""
    body: bytes = b""

    @property
    def expects(self) -> bool:
        return self.headers.get("expect") == "100-continue"

    def read_body(self) -> bytes:
        pieces, size = [self.rest], len(self.rest)
        length = int(self.headers.get("content-length", "0"))
        while size < length:
            piece = self.sock.recv(1 << 20)
            if not piece:
                raise ConnectionError("the client closed in the middle of its body")
            pieces.append(piece)
            size += len(piece)
        self.body = b"".join(pieces)
        return self.body

    def answer(self, status: str, body: bytes = b"", **headers: str) -> None:
        lines = {"Content-Length": str(len(body))} | {k.replace("_", "-"): v for k, v in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.sock.sendall(f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body)


@dataclass
class Server:
    """Answers each request with the next of `handlers`; the last one stays."""

    handlers: list[Handler] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    connections: int = 0
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            sock.close()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(sock)
            self.connections += 1
            try:
                while self._serve(sock):
                    pass
            except OSError:
                pass
            except BaseException as error:
                self.failures.append(error)
            finally:
                sock.close()

    def _serve(self, sock: socket.socket) -> bool:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = sock.recv(1 << 16)
            if not piece:
                return False
            data += piece
        head, _, rest = data.partition(b"\r\n\r\n")
        line, *lines = head.decode("ascii").split("\r\n")
        headers = dict(text.split(": ", 1) for text in lines)
        exchange = Exchange(sock, line, {name.lower(): value for name, value in headers.items()}, rest)
        self.exchanges.append(exchange)
        handler = self.handlers.pop(0) if len(self.handlers) > 1 else self.handlers[0]
        return handler(exchange)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()
    assert not server.failures


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, "job one", "client/ü 1", timeout=10, retries=3) as client:
        client._sleep = lambda seconds: None
        yield client


def reply(status: str, body: bytes | dict[str, Any] = b"", **headers: str) -> Handler:
    encoded = json.dumps(body).encode() if isinstance(body, dict) else body

    def handle(exchange: Exchange) -> bool:
        if exchange.expects:
            exchange.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        exchange.read_body()
        exchange.answer(status, encoded, **headers)
        return True

    return handle


def drop(exchange: Exchange) -> bool:
    """Take the whole request and close without an answer."""
    exchange.read_body()
    return False


DEFAULT_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text()
ACCEPTED = reply("202 Accepted", {"status": "accepted"})
TENSORS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(7)}
BIG = bytes(Encoder().encode({"x": np.zeros(8 << 20, np.uint8)}))


# --- submitting ----------------------------------------------------------------------------------------------


def test_an_update_is_a_binary_mode_event(server: Server, client: Client) -> None:
    server.handlers = [ACCEPTED]
    assert client.submit(TENSORS, num_samples=12, round=3) == Submission("accepted", 3)
    exchange = server.exchanges[0]
    assert exchange.line == "POST /v1/jobs/job%20one/updates HTTP/1.1"
    assert exchange.headers["content-type"] == "application/vnd.safetensors"
    assert exchange.headers["ce-specversion"] == "1.0"
    assert exchange.headers["ce-type"] == "dev.lifl.update.v1"
    assert exchange.headers["ce-source"] == "client/%C3%BC%201"
    assert exchange.headers["ce-round"] == "3"
    assert float(exchange.headers["ce-numsamples"]) == 12
    assert "ce-kind" not in exchange.headers
    layout, payload = split(exchange.body)
    assert [tensor.name for tensor in layout.tensors] == ["steps", "weight"]
    np.testing.assert_array_equal(payload[8:].cast("f"), TENSORS["weight"].ravel())


def test_a_delta_says_so(server: Server, client: Client) -> None:
    server.handlers = [ACCEPTED]
    client.submit(TENSORS, num_samples=1, round=1, delta=True)
    assert server.exchanges[0].headers["ce-kind"] == "delta"


def test_safetensors_bytes_are_sent_as_they_are(server: Server, client: Client) -> None:
    server.handlers = [ACCEPTED]
    data = bytes(Encoder().encode(TENSORS))
    for body in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        client.submit(body, num_samples=1, round=1)
    assert [exchange.body for exchange in server.exchanges] == [data] * 4
    assert server.connections == 1


def test_the_event_id_is_the_same_for_a_round_and_differs_otherwise(server: Server) -> None:
    server.handlers = [ACCEPTED]
    for job, name, number in [("j", "a", 1), ("j", "a", 1), ("j", "a", 2), ("j", "b", 1), ("k", "a", 1)]:
        with Client(server.url, job, name) as client:
            client.submit(TENSORS, num_samples=1, round=number)
    first, again, *others = [exchange.headers["ce-id"] for exchange in server.exchanges]
    assert first == again
    assert len({first, *others}) == 4


def test_a_token_is_sent_as_bearer(server: Server) -> None:
    server.handlers = [ACCEPTED]
    with Client(server.url, "j", "a", token="secret") as client:
        client.submit(TENSORS, num_samples=1, round=1)
    assert server.exchanges[0].headers["authorization"] == "Bearer secret"


def test_a_duplicate_and_a_late_update_are_told(server: Server, client: Client) -> None:
    server.handlers = [
        reply("200 OK", {"status": "duplicate"}),
        reply("409 Conflict", {"title": "Late", "status": 409, "round": 9}),
    ]
    assert client.submit(TENSORS, num_samples=1, round=4) == Submission("duplicate", 4)
    assert client.submit(TENSORS, num_samples=1, round=4) == Submission("late", 9)


def test_an_update_for_a_round_not_open_yet_is_refused(server: Server, client: Client) -> None:
    server.handlers = [reply("409 Conflict", {"title": "Early", "status": 409, "round": 2})]
    with pytest.raises(Refused, match="Early"):
        client.submit(TENSORS, num_samples=1, round=4)


def test_a_refusal_carries_the_problem(server: Server, client: Client) -> None:
    server.handlers = [reply("422 Unprocessable", {"title": "Invalid model", "detail": "no tensor 'w'"})]
    with pytest.raises(Refused, match="Invalid model: no tensor 'w'") as caught:
        client.submit(TENSORS, num_samples=1, round=1)
    assert caught.value.status == 422
    assert len(server.exchanges) == 1


@pytest.mark.parametrize("samples", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_cannot_count_is_not_sent(server: Server, client: Client, samples: float) -> None:
    with pytest.raises(InvalidInput, match="num_samples"):
        client.submit(TENSORS, num_samples=samples, round=1)
    assert not server.connections


def test_a_tensor_that_cannot_be_averaged_is_not_sent(server: Server, client: Client) -> None:
    with pytest.raises(InvalidModel, match="'x'"):
        client.submit({"x": np.array(["text"])}, num_samples=1, round=1)
    assert not server.connections


# --- failures ------------------------------------------------------------------------------------------------


def test_a_dropped_answer_is_repeated_with_the_same_id(server: Server, client: Client) -> None:
    server.handlers = [drop, reply("200 OK", {"status": "duplicate"})]
    assert client.submit(TENSORS, num_samples=1, round=1).status == "duplicate"
    first, second = server.exchanges
    assert first.headers["ce-id"] == second.headers["ce-id"]
    assert first.body == second.body
    assert server.connections == 2


def test_a_busy_gateway_is_asked_again_after_the_time_it_names(server: Server, client: Client) -> None:
    pauses: list[float] = []
    client._sleep = pauses.append
    server.handlers = [reply("503 Service Unavailable", {"title": "Full"}, Retry_After="4"), ACCEPTED]
    assert client.submit(TENSORS, num_samples=1, round=1).status == "accepted"
    assert len(pauses) == 1
    assert 4 <= pauses[0] <= 6


def test_a_gateway_that_stays_busy_is_given_up(server: Server, client: Client) -> None:
    server.handlers = [reply("503 Service Unavailable", {"title": "Full"}, Retry_After="2")]
    with pytest.raises(Busy, match="Full") as caught:
        client.submit(TENSORS, num_samples=1, round=1)
    assert caught.value.retry_after == 2
    assert len(server.exchanges) == 4


def test_nobody_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    client = Client(url, "j", "a", retries=1)
    client._sleep = lambda seconds: None
    with pytest.raises(Unavailable, match="does not answer"):
        client.describe()


def test_a_connection_closed_while_idle_is_opened_anew_without_a_retry(server: Server, client: Client) -> None:
    def answer_and_close(exchange: Exchange) -> bool:
        ACCEPTED(exchange)
        return False

    client._retries = 0
    server.handlers = [answer_and_close]
    for number in (1, 2, 3):
        client.submit(TENSORS, num_samples=1, round=number)
        assert client._connection._socket is not None
        client._connection._socket.settimeout(10)
        assert client._connection._socket.recv(1, socket.MSG_PEEK) == b""  # the close has arrived
    assert server.connections == 3


def test_a_slow_gateway_times_out(server: Server) -> None:
    release = threading.Event()

    def wait(exchange: Exchange) -> bool:
        release.wait(10)
        return False

    server.handlers = [wait]
    with (
        Client(server.url, "j", "a", timeout=0.1, retries=0) as client,
        pytest.raises(Unavailable, match="timed out"),
    ):
        client.describe()
    release.set()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
    ],
)
def test_a_broken_answer_is_unavailable(server: Server, answer: bytes) -> None:
    def handle(exchange: Exchange) -> bool:
        exchange.sock.sendall(answer)
        return False

    server.handlers = [handle]
    with Client(server.url, "j", "a", retries=0) as client, pytest.raises(Unavailable):
        client.describe()


def test_an_answer_that_is_not_json_is_unavailable(server: Server) -> None:
    server.handlers = [reply("200 OK", b"<html>")]
    with Client(server.url, "j", "a", retries=0) as client, pytest.raises(Unavailable, match="JSON"):
        client.describe()


# --- answers before the body -----------------------------------------------------------------------------------


def test_a_large_body_waits_for_the_gateway_to_ask_for_it(server: Server, client: Client) -> None:
    rest: list[bytes] = []

    def handle(exchange: Exchange) -> bool:
        rest.append(exchange.rest)
        return ACCEPTED(exchange)

    server.handlers = [handle]
    assert client.submit(BIG, num_samples=1, round=1).status == "accepted"
    assert rest == [b""]
    assert server.exchanges[0].expects
    assert server.exchanges[0].body == BIG
    server.handlers = [ACCEPTED]
    client.submit(TENSORS, num_samples=1, round=2)
    assert not server.exchanges[1].expects
    assert server.connections == 1


@pytest.mark.parametrize("keep", [True, False])
def test_a_refused_expectation_saves_the_body(server: Server, client: Client, keep: bool) -> None:
    def duplicate(exchange: Exchange) -> bool:
        exchange.answer("200 OK", b'{"status": "duplicate"}')
        if keep:
            assert exchange.sock.recv(1) == b""  # the client closes, for nobody knows whether it would send
        return False

    server.handlers = [duplicate, ACCEPTED]
    assert client.submit(BIG, num_samples=1, round=1).status == "duplicate"
    assert server.exchanges[0].rest == b""
    assert client.submit(TENSORS, num_samples=1, round=2).status == "accepted"


def test_a_gateway_that_knows_no_expectations_gets_the_body_after_a_second(server: Server, client: Client) -> None:
    def ignore(exchange: Exchange) -> bool:
        exchange.read_body()
        exchange.answer("202 Accepted", b'{"status": "accepted"}')
        return True

    server.handlers = [ignore]
    assert client.submit(BIG, num_samples=1, round=1).status == "accepted"


def test_an_early_answer_is_read_although_sending_breaks(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway answers and closes while the body is being sent, which resets the connection."""
    monkeypatch.setattr("lifl.client.EXPECT_BYTES", len(BIG))

    def duplicate(exchange: Exchange) -> bool:
        exchange.sock.recv(1000)
        exchange.answer("200 OK", b'{"status": "duplicate"}', Connection="close")
        return False

    server.handlers = [duplicate]
    assert client.submit(BIG, num_samples=1, round=1).status == "duplicate"
    assert len(server.exchanges) == 1


def test_other_interim_answers_are_passed_over(server: Server, client: Client) -> None:
    def handle(exchange: Exchange) -> bool:
        exchange.read_body()
        exchange.sock.sendall(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
        exchange.answer("202 Accepted", b"{}")
        return True

    server.handlers = [handle]
    assert client.submit(TENSORS, num_samples=1, round=1).status == "accepted"


def test_an_answer_in_single_bytes_is_understood(server: Server, client: Client) -> None:
    def handle(exchange: Exchange) -> bool:
        exchange.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        interim = b"HTTP/1.1 100 Continue\r\n\r\n" if exchange.expects else b""
        for byte in interim:
            exchange.sock.sendall(bytes([byte]))
        exchange.read_body()
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}":
            exchange.sock.sendall(bytes([byte]))
        return True

    server.handlers = [handle]
    assert client.submit(BIG, num_samples=1, round=1).status == "duplicate"
    assert client.describe() == {}
    assert server.connections == 1


# --- models --------------------------------------------------------------------------------------------------


def model_reply(number: int, data: bytes | None = None) -> Handler:
    body = bytes(Encoder().encode(TENSORS)) if data is None else data
    return reply("200 OK", body, LIFL_Round=str(number), ETag=f'"{number}-abc"')


def test_a_model_comes_as_views_of_one_buffer(server: Server, client: Client) -> None:
    server.handlers = [model_reply(5)]
    model = client.fetch_model()
    assert (model.round, model.etag) == (5, '"5-abc"')
    assert server.exchanges[0].line == "GET /v1/jobs/job%20one/model HTTP/1.1"
    assert model.tensors.keys() == TENSORS.keys()
    for name, array in model.tensors.items():
        np.testing.assert_array_equal(array, TENSORS[name])
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_a_model_comes_as_a_state_dict(server: Server, client: Client) -> None:
    torch = pytest.importorskip("torch")
    server.handlers = [model_reply(5)]
    state = client.fetch_model(round=5).torch()
    assert server.exchanges[0].line.split()[1].endswith("/model?round=5")
    assert torch.equal(state["weight"], torch.from_numpy(TENSORS["weight"]))
    assert state["steps"].shape == ()


def test_a_large_model_arrives_whole(server: Server, client: Client) -> None:
    server.handlers = [model_reply(1, BIG)]
    assert client.fetch_model().data == BIG


def test_a_model_without_a_round_is_not_from_lifl(server: Server, client: Client) -> None:
    server.handlers = [reply("200 OK", b"x")]
    with pytest.raises(Unavailable, match="LIFL-Round"):
        client.fetch_model()


def test_waiting_polls_with_the_tag_until_there_is_a_new_model(server: Server, client: Client) -> None:
    server.handlers = [model_reply(5), reply("304 Not Modified"), reply("304 Not Modified"), model_reply(6)]
    current = client.fetch_model()
    assert client.wait_for_round(after=current.round).round == 6
    polls = server.exchanges[1:]
    assert [poll.headers["if-none-match"] for poll in polls] == ['"5-abc"'] * 3
    assert all(poll.line.split()[1].endswith("/model?wait=30") for poll in polls)
    assert server.connections == 1


def test_waiting_without_a_known_model_learns_the_tag_first(server: Server, client: Client) -> None:
    server.handlers = [model_reply(5), reply("304 Not Modified"), model_reply(6)]
    assert client.wait_for_round(after=5).round == 6
    assert ["if-none-match" in exchange.headers for exchange in server.exchanges] == [False, True, True]


def test_waiting_ends_at_once_if_the_round_is_open_already(server: Server, client: Client) -> None:
    server.handlers = [model_reply(9)]
    assert client.wait_for_round(after=5).round == 9


def test_waiting_gives_up_after_its_timeout(server: Server, client: Client) -> None:
    server.handlers = [model_reply(5), reply("304 Not Modified")]
    client.fetch_model()
    with pytest.raises(TimeoutError, match="round 5"):
        client.wait_for_round(after=5, timeout=0.0)


def test_an_answer_without_a_length_is_read_to_its_end(server: Server, client: Client) -> None:
    def handle(exchange: Exchange) -> bool:
        exchange.sock.sendall(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"round": 4}')
        return False

    def chunked(exchange: Exchange) -> bool:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        exchange.sock.sendall(head + b'6\r\n{"roun\r\n6\r\nd": 4}\r\n0\r\n\r\n')
        return True

    server.handlers = [handle, chunked]
    assert client.round() == 4
    assert client.round() == 4
    assert client.round() == 4
    assert server.connections == 2


# --- operating -----------------------------------------------------------------------------------------------


def test_operator_calls(server: Server, client: Client) -> None:
    state = {"job": "job one", "round": 1}
    server.handlers = [reply("201 Created", state), reply("201 Created", state), reply("204 No Content")]
    assert client.create_job(function="fedavg", goal=3) == state
    assert client.upload_model(TENSORS) == state
    client.delete()
    create, upload, delete = server.exchanges
    assert create.line == "POST /v1/jobs HTTP/1.1"
    assert json.loads(create.body) == {"name": "job one", "function": "fedavg", "goal": 3}
    assert upload.line == "PUT /v1/jobs/job%20one/model HTTP/1.1"
    assert split(upload.body)[0].num_parameters == 7
    assert delete.line == "DELETE /v1/jobs/job%20one HTTP/1.1"
    assert server.connections == 1


def test_a_prefix_in_the_url_is_kept(server: Server) -> None:
    server.handlers = [reply("200 OK", {"round": 2})]
    with Client(f"{server.url}/lifl/", "j", "a") as client:
        assert client.round() == 2
    assert server.exchanges[0].line == "GET /lifl/v1/jobs/j HTTP/1.1"


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://host", "http://", "http://host/?query", "http://h:x"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"gateway|port"):
        Client(url, "j", "a")


def test_a_header_cannot_be_smuggled_in(server: Server) -> None:
    with Client(server.url, "j", "a", token="x\r\nce-kind: delta") as client, pytest.raises(InvalidInput):
        client.describe()
    assert not server.exchanges


def test_the_client_id_cannot_be_empty() -> None:
    with pytest.raises(InvalidInput, match="id"):
        Client("http://host", "j", "")


@pytest.mark.skipif(
    not Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().startswith("bbr"),
    reason="the default is not bbr",
)
def test_loopback_connections_do_not_use_bbr(server: Server, client: Client) -> None:
    server.handlers = [reply("200 OK", {"round": 2})]
    client.round()
    sock = client._connection._socket
    assert sock is not None
    assert not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).startswith(b"bbr")


def test_expectations_are_for_bodies_over_a_mebibyte() -> None:
    assert EXPECT_BYTES == 1 << 20

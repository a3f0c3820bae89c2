"""Transfers that ask for progress, on socket pairs."""

import os
import socket
import threading
import time

import pytest
from lifl_gateway.request_body import RequestBody
from lifl_gateway.transfer import (
    Pace,
    PeerGone,
    TooSlow,
    discard_input,
    limit_receive,
    limit_send,
    receive_into,
    send_all,
    send_file,
)

FAST = Pace(0.2, 100)


@pytest.fixture
def pair():
    listener = socket.create_server(("127.0.0.1", 0))
    left = socket.create_connection(listener.getsockname())
    right, _ = listener.accept()
    listener.close()
    with left, right:
        yield left, right


def later(action):
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def test_a_body_is_received_whole(pair):
    left, right = pair
    data = os.urandom(3_000_000)
    thread = later(lambda: left.sendall(data))
    received = bytearray(len(data))
    limit_receive(right, FAST.seconds)
    receive_into(right, memoryview(received), FAST)
    thread.join()
    assert received == data


def test_silence_is_too_slow(pair):
    _, right = pair
    limit_receive(right, FAST.seconds)
    with pytest.raises(TooSlow):
        receive_into(right, memoryview(bytearray(10)), FAST)


def test_a_trickle_is_too_slow(pair):
    left, right = pair
    ended = threading.Event()

    def trickle():
        while not ended.wait(0.02):
            try:
                left.send(b"x")
            except OSError:
                return

    thread = later(trickle)
    limit_receive(right, FAST.seconds)
    started = time.monotonic()
    with pytest.raises(TooSlow):
        receive_into(right, memoryview(bytearray(10_000)), FAST)
    assert time.monotonic() - started < 2
    ended.set()
    thread.join()


def test_a_slow_but_steady_body_is_received(pair):
    left, right = pair

    def steady():
        for _ in range(12):
            left.send(b"x" * 90)
            time.sleep(0.05)

    thread = later(steady)
    limit_receive(right, FAST.seconds)
    receive_into(right, memoryview(bytearray(12 * 90)), FAST)
    thread.join()


def test_an_early_end_is_told_from_slowness(pair):
    left, right = pair
    left.sendall(b"half")
    left.close()
    limit_receive(right, FAST.seconds)
    with pytest.raises(PeerGone):
        receive_into(right, memoryview(bytearray(8)), FAST)


def test_a_reader_that_takes_nothing_is_too_slow(pair):
    left, _ = pair
    limit_send(left, FAST.seconds)
    with pytest.raises(TooSlow):
        send_all(left, bytes(50_000_000), FAST)


def test_a_file_is_sent_whole(pair, tmp_path):
    left, right = pair
    data = os.urandom(2_000_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    received = bytearray(len(data))
    limit_receive(right, 5)
    thread = later(lambda: receive_into(right, memoryview(received), Pace()))
    with path.open("rb") as file:
        limit_send(left, 5)
        send_file(left, file.fileno(), len(data), Pace())
        thread.join()
        with pytest.raises(PeerGone):
            send_file(left, file.fileno(), len(data) + 1, Pace())
    assert received == data


def test_input_is_discarded_up_to_its_end(pair):
    left, right = pair
    thread = later(lambda: (left.sendall(bytes(5_000_000)), left.shutdown(socket.SHUT_WR)))
    discard_input(right, 1 << 40, 1.0, 5.0)
    thread.join()
    assert right.recv(1) == b""


def test_discarding_stops_at_silence_and_at_its_bound(pair):
    left, right = pair
    left.sendall(b"abc")
    discard_input(right, 2, 1.0, 5.0)
    assert right.recv(1) == b"c"
    started = time.monotonic()
    discard_input(right, 10, 0.05, 5.0)
    assert time.monotonic() - started < 1


def test_a_request_body_takes_what_came_with_the_head_first(pair):
    left, right = pair
    calls = []
    buffered = bytearray(b"ab\ncdNEXT")
    body = RequestBody(right, buffered, 5, FAST, lambda: calls.append(1))
    assert body.readline() == b"ab\n"
    assert body.read() == b"cd"
    assert body.read() == b""
    assert body.remaining == 0
    assert buffered == b"NEXT"
    assert not calls

    buffered[:] = b"ab"
    body = RequestBody(right, buffered, 4, FAST, lambda: (calls.append(1), left.sendall(b"\ny")))
    assert list(body) == [b"ab\n", b"y"]
    assert calls == [1]


def test_a_request_body_is_never_read_past_its_end(pair):
    _, right = pair
    body = RequestBody(right, bytearray(b"abcdef"), 3, FAST, lambda: None)
    view = memoryview(bytearray(10))
    with pytest.raises(ValueError):
        body.fill(view)
    assert body.readinto(view) == 3
    assert body.readinto(view) == 0


def test_a_body_that_came_with_the_head_can_be_dropped(pair):
    _, right = pair
    buffered = bytearray(b"abcNEXT")
    body = RequestBody(right, buffered, 3, FAST, lambda: None)
    body.drop_buffered()
    assert body.remaining == 0
    assert buffered == b"NEXT"
    body = RequestBody(right, buffered, 30, FAST, lambda: None)
    body.drop_buffered()
    assert body.remaining == 30

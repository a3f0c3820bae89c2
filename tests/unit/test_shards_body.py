"""Sending a model out of the files of its shards."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from lifl.cluster.checkpoints import CheckpointStore
from lifl.tensors import Encoder
from lifl_gateway.model_responses import ShardsBody
from lifl_gateway.transfer import Pace


@pytest.fixture
def model() -> bytes:
    return bytes(Encoder().encode({"w": np.arange(700_001, dtype=np.float32), "b": np.arange(3, dtype=np.int8)}))


def body_of(model: bytes, directory: Path, counted: list[int]) -> ShardsBody:
    store = CheckpointStore(directory)
    initial = store.incoming / "initial"
    initial.write_bytes(model)
    header, paths = store.split(initial, 5)
    files = [os.open(path, os.O_RDONLY) for path in paths]
    return ShardsBody(header, files, Pace(10, 1), counted.append)


def test_the_files_are_sent_as_one_model(model: bytes, tmp_path: Path):
    counted: list[int] = []
    body = body_of(model, tmp_path, counted)
    ours, theirs = socket.socketpair()
    received = bytearray()

    def receive() -> None:
        while piece := theirs.recv(1 << 20):
            received.extend(piece)

    reader = threading.Thread(target=receive)
    reader.start()
    body.send_to(ours)
    ours.close()
    reader.join(10)
    theirs.close()
    body.close()
    body.close()
    assert received == model
    assert counted == [body.nbytes] == [len(model)]


def test_a_server_that_knows_no_send_to_gets_the_same(model: bytes, tmp_path: Path):
    body = body_of(model, tmp_path, [])
    assert b"".join(body) == model
    body.close()

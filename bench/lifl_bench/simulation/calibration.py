"""Measures what is cheap to measure of the costs, on this machine, through the code that the platform runs."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Final

import numpy as np
from lifl.congestion import avoid_bbr
from lifl.fold_kernel import weighted_sum
from lifl.peer.checksum import PIECE_BYTES, Checksum

from lifl_bench.simulation.coordinator_calibration import measure_questions
from lifl_bench.simulation.costs import Costs

_BYTES: Final = 64 << 20
"""Of a transfer, and of a vector to fold: larger than the caches."""
_REPEATS: Final = 7
_FOLDED: Final = 4
_SOURCE: Final = "measured on this machine"

Note = Callable[[str], None]


def calibrate(costs: Costs, note: Note = lambda _: None) -> Costs:
    """The costs with what was measured just now; takes a few seconds. `note` hears what is being done.

    Folds run on all cores at a time, as in a round; transfers are of one sender and one receiver over loopback.
    """
    note("folding on all cores")
    costs = costs.measured(f"{_SOURCE}: fold kernel, all cores busy", fold_s_per_gb=measure_fold())
    note("sendall to recv_into")
    send, receive, flow = measure_transfer(with_sendfile=False)
    source = f"{_SOURCE}: sendall, recv_into, loopback"
    costs = costs.measured(source, send_s_per_gb=send, receive_s_per_gb=receive, flow_gb_per_s=flow)
    note("sendfile to recv_into with a checksum")
    send, receive, _ = measure_transfer(with_sendfile=True)
    source = f"{_SOURCE}: sendfile, recv_into, checksum, loopback"
    costs = costs.measured(source, peer_send_s_per_gb=send, peer_receive_s_per_gb=receive)
    note("questions to the coordinator")
    source = f"{_SOURCE}: lifl_gateway.coordinator over loopback, caches cold"
    return costs.measured(source, **asdict(measure_questions(costs.send_s_per_gb)))


# --- folding -------------------------------------------------------------------------------------------------


def measure_fold() -> float:
    """CPU seconds for each GB that a pass over four updates and old sums reads, while all cores do the same."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return statistics.median(pool.map(_fold, range(cores), chunksize=1))


def _fold(_: int) -> float:
    vectors = np.ones((_FOLDED + 2, _BYTES // 4), np.float32)
    addresses = [int(vector.ctypes.data) for vector in vectors]
    inputs, old, out = addresses[:_FOLDED], addresses[_FOLDED], addresses[_FOLDED + 1]

    def once() -> None:
        weighted_sum(
            out, inputs, [1.0] * _FOLDED, _BYTES // 4, dtype="F32", accumulate_dtype="F32", old_address=old
        )

    once()
    times = []
    for _ in range(_REPEATS):
        before = time.process_time()
        once()
        times.append(time.process_time() - before)
    return statistics.median(times) / ((_FOLDED + 1) * _BYTES / 1e9)


# --- transfers -----------------------------------------------------------------------------------------------


def measure_transfer(*, with_sendfile: bool) -> tuple[float, float, float]:
    """CPU seconds for each GB of the sender and of the receiver, and GB/s, from memory to memory that is in use.

    With sendfile it goes as between nodes: the receiver checks the sum, too.
    """
    with _connected() as (ours, theirs), _memory() as (file, source), _memory() as (_, target):
        found = [_transfer(ours, theirs, file, source, target, with_sendfile) for _ in range(_REPEATS + 1)]
    gigabytes = _BYTES / 1e9
    send, receive, wall = (statistics.median(column) for column in zip(*found[1:], strict=True))
    return send / gigabytes, receive / gigabytes, gigabytes / wall


def _transfer(
    ours: socket.socket,
    theirs: socket.socket,
    file: int,
    source: memoryview,
    target: memoryview,
    with_sendfile: bool,
) -> tuple[float, float, float]:
    """CPU seconds of the sender and of the receiver, and seconds."""
    spent = [0.0]

    def send() -> None:
        before = time.thread_time()
        if with_sendfile:
            sent = 0
            while sent < _BYTES:
                sent += os.sendfile(ours.fileno(), file, sent, _BYTES - sent)
        else:
            ours.sendall(source)
        spent[0] = time.thread_time() - before

    thread = threading.Thread(target=send)
    begin, before = time.perf_counter(), time.thread_time()
    thread.start()
    checksum = Checksum() if with_sendfile else None
    done = 0
    while done < _BYTES:
        got = theirs.recv_into(target[done : done + PIECE_BYTES])
        if checksum is not None:
            checksum.update(target[done : done + got])
        done += got
    received, wall = time.thread_time() - before, time.perf_counter() - begin
    thread.join()
    return spent[0], received, wall


@contextlib.contextmanager
def _connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.socket() as listener:
        avoid_bbr(listener)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with socket.socket() as ours:
            avoid_bbr(ours)
            ours.connect(listener.getsockname())
            theirs, _ = listener.accept()
            with theirs:
                yield ours, theirs


@contextlib.contextmanager
def _memory() -> Iterator[tuple[int, memoryview]]:
    file = os.memfd_create("calibration")
    try:
        os.ftruncate(file, _BYTES)
        with mmap.mmap(file, _BYTES) as pages:
            pages[:] = bytes(_BYTES)
            with memoryview(pages) as view:
                yield file, view
    finally:
        os.close(file)

"""Payloads in slots of one shared memory that every process of the deployment maps: only references travel.

The pool belongs to the deployment, which touches all of it before the first round. Its first page says of each
slot which group's payload it holds; taking slots and freeing them is serialised by a lock on the file. A slot is
free again when its group is discarded, so the pool has to hold a whole round: an update of each client, a partial
aggregate of each leaf, each a second time for what is delivered again, and the models of two rounds.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np

from lifl_bench.broker.setup import Setup
from lifl_bench.broker.store import MODELS, UPDATES, Fill, StoreError

_SCHEME: Final = "shm"
_POPULATE_READ: Final = 22
_POPULATE_WRITE: Final = 23
_ITEM_BYTES: Final = 8


def slots_for(updates: int, leaves: int) -> int:
    """Slots of a pool for so many clients and leaves."""
    return updates + 2 * leaves + 6


def _table_bytes(slots: int) -> int:
    return -(-slots * _ITEM_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE


def _slot_bytes(setup: Setup) -> int:
    return -(-setup.payload_limit // mmap.PAGESIZE) * mmap.PAGESIZE


def create_pool(setup: Setup) -> int:
    """Make the memory, touched and with all slots free; returns its descriptor, with which it goes away."""
    descriptor = os.memfd_create("lifl-bench-broker")
    try:
        size = _table_bytes(setup.pool_slots) + setup.pool_slots * _slot_bytes(setup)
        os.ftruncate(descriptor, size)
        with mmap.mmap(descriptor, size) as memory:
            memory.madvise(_POPULATE_WRITE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class SharedMemoryStore:
    """A `PayloadStore` in the deployment's pool."""

    in_place = True

    def __init__(self, setup: Setup, *, writes: bool) -> None:
        """Map the pool and have its pages mapped too; `writes` says whether this process fills many slots."""
        self._slots = setup.pool_slots
        self._slot_bytes = _slot_bytes(setup)
        self._descriptor = os.open(setup.pool, os.O_RDWR | os.O_CLOEXEC)
        self._memory = mmap.mmap(self._descriptor, 0)
        self._memory.madvise(_POPULATE_WRITE if writes else _POPULATE_READ)
        self._view = memoryview(self._memory)
        self._groups = np.frombuffer(self._memory, np.int64, self._slots)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file; the memory stays mapped while views of it are in use."""
        os.close(self._descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def put(self, group: str, size: int, fill: Fill) -> str:
        """Take a slot and have it filled."""
        if size > self._slot_bytes:
            raise StoreError(f"{size} bytes do not fit into a slot of {self._slot_bytes}")
        with self._locked():
            free = np.flatnonzero(self._groups == 0)
            if not len(free):
                raise StoreError("all slots of the shared memory are in use")
            slot = int(free[0])
            self._groups[slot] = _code(group)
        fill(self._slot(slot, size))
        return f"{_SCHEME}:{slot}"

    def get(self, reference: str, size: int, target: memoryview | None) -> memoryview:
        """The slot itself, not to be written to."""
        scheme, _, number = reference.partition(":")
        if scheme != _SCHEME or not number.isdigit() or int(number) >= self._slots:
            raise StoreError(f"{reference} is not a reference into this store")
        return self._slot(int(number), size).toreadonly()

    def read(self, reference: str, size: int) -> Iterator[memoryview]:
        """The slot in one piece."""
        yield self.get(reference, size, None)

    def discard(self, group: str) -> None:
        """Free the slots of a group."""
        with self._locked():
            self._groups[self._groups == _code(group)] = 0

    def _slot(self, number: int, size: int) -> memoryview:
        start = _table_bytes(self._slots) + number * self._slot_bytes
        return self._view[start : start + size]


def _code(group: str) -> int:
    """A group as a number above 0."""
    return 2 * int(group[1:]) + {UPDATES: 0, MODELS: 1}[UPDATES if group[0] == UPDATES else MODELS] + 1

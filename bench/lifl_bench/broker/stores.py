"""Which payload store a deployment uses."""

from __future__ import annotations

from lifl_bench.broker.chunk_store import ChunkStore
from lifl_bench.broker.setup import Setup
from lifl_bench.broker.shared_memory_store import SharedMemoryStore
from lifl_bench.broker.store import PayloadStore


def open_store(setup: Setup, *, writes: bool = False) -> PayloadStore:
    """Open the deployment's store; `writes` for a process that stores every update."""
    if setup.tuning.store == "shared-memory":
        return SharedMemoryStore(setup, writes=writes)
    if setup.tuning.client == "wire":
        return ChunkStore(setup)
    if setup.tuning.client == "nats-py":
        from lifl_bench.broker.nats_py_store import NatsPyStore

        return NatsPyStore(setup)
    from lifl_bench.broker.stock_store import StockStore

    return StockStore(setup)

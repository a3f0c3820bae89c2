"""A worker on memory of its own, with descriptors handed to it one by one."""

from __future__ import annotations

import os
from typing import Any, cast

import numpy as np
import pytest
from lifl.agent_client import AgentConnection
from lifl.aggregate import Aggregate, GatheredUpdates, ModelUpdate
from lifl.descriptor import Descriptor, Kind
from lifl.function import AggregatorFunction
from lifl.messages import PoolInfo, PoolKind, Welcome, WorkerSpec, endpoint_id
from lifl.model_layout import encode_header
from lifl.pool import MappedPool
from lifl.slot import PAGE, PARTIAL_SEAL_OFFSET, InputKey, Seal, UpdateHeader, slot_reference
from lifl.worker import Worker
from numpy.typing import NDArray

HEADER = encode_header({"x": ("F32", [3])})
COORDINATOR, GATEWAY, ME = endpoint_id("coordinator", 1), endpoint_id("gateway", 1), endpoint_id("worker", 1)
UPDATES, AGGREGATES = 0, 1
NONCE = 7
MODEL_SLOTS = 3

Values = list[float]


class Outbox:
    """Keeps what the worker sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[Kind, int]] = []

    def send(self, destination: int, slot: int, round_number: int, kind: Kind, generation: int = 0) -> None:
        self.sent.append((kind, slot))


def make_pool(number: int, kind: PoolKind, slots: int) -> MappedPool:
    info = PoolInfo(number, kind, "job", NONCE, slots, PAGE, PAGE)
    fd = os.memfd_create(kind)
    os.ftruncate(fd, info.geometry.size)
    return MappedPool(info, fd)


class Bench:
    """One worker that is the top of its round, and the hands that serve it."""

    def __init__(self, function: AggregatorFunction, **spec: Any) -> None:
        self.outbox = Outbox()
        self.updates, self.aggregates = make_pool(UPDATES, "updates", 4), make_pool(AGGREGATES, "aggregates", 7)
        for slot in range(MODEL_SLOTS):
            self.aggregates.layout(slot)[: len(HEADER)] = HEADER
        infos = (self.updates.info, self.aggregates.info)
        worker = WorkerSpec("ticket", "job", "function", MODEL_SLOTS, MODEL_SLOTS, 0, **spec)
        welcome = Welcome(ME, "unix", False, infos, worker)
        pools = {UPDATES: self.updates, AGGREGATES: self.aggregates}
        self.worker = Worker(AgentConnection(cast(Any, None), welcome, cast(Any, self.outbox), pools), function)
        self.generation = 0

    def hear(
        self, kind: Kind, slot: int, generation: int = 0, round_number: int = 1, source: int = COORDINATOR
    ) -> None:
        self.worker._take(Descriptor(ME, source, slot, round_number, kind, generation))

    def fill(self, slot: int, values: Values, base: int = 1) -> None:
        """What a gateway does with a slot that is free."""
        self.generation += 1
        self.updates.payload(slot, 12)[:] = np.array(values, np.float32).tobytes()
        header = UpdateHeader(self.generation, base, False, 1.0, 0, 12, f"client {self.generation}")
        header.pack_into(self.updates.header(slot))

    def update(self, slot: int, values: Values) -> None:
        self.fill(slot, values)
        self.hear(Kind.UPDATE, slot_reference(UPDATES, slot), self.generation & 0xFF, source=GATEWAY)

    def model(self, round_number: int) -> NDArray[np.float32]:
        return np.frombuffer(self.aggregates.payload(round_number % MODEL_SLOTS, 12), np.float32).copy()

    def models_sent(self) -> int:
        return sum(kind == Kind.MODEL for kind, _ in self.outbox.sent)


def average(total: Aggregate, update: ModelUpdate) -> None:
    total.add(update)


def middle(updates: GatheredUpdates) -> None:
    for inputs, output in updates.tiles():
        output[:] = np.median(inputs, axis=0)


STREAMING = AggregatorFunction(average)
GATHERING = AggregatorFunction(middle, gather=True)


@pytest.mark.parametrize("function", [STREAMING, GATHERING])
def test_a_model_that_was_made_is_not_made_again_from_slots_that_others_have_now(function: AggregatorFunction):
    """CLOSE may be said twice; by then the coordinator may have the model and have had the slots filled anew."""
    bench = Bench(function)
    bench.hear(Kind.ASSIGN, COORDINATOR)
    bench.update(0, [1, 2, 3])
    bench.update(1, [3, 4, 5])
    bench.hear(Kind.CLOSE, 2)
    bench.worker._work()
    assert bench.models_sent() == 1
    assert bench.model(2).tolist() == [2, 3, 4]
    bench.fill(0, [1000, 1000, 1000])
    for repeat in (2, 3):
        bench.hear(Kind.CLOSE, 2)
        bench.worker._work()
        assert bench.models_sent() == repeat
    bench.hear(Kind.ASSIGN, COORDINATOR)
    bench.hear(Kind.CLOSE, 2)
    bench.worker._work()
    assert bench.models_sent() == 4
    assert bench.model(2).tolist() == [2, 3, 4]


def test_a_round_that_takes_one_more_update_after_its_model_was_made_gets_another_model():
    bench = Bench(STREAMING)
    bench.hear(Kind.ASSIGN, COORDINATOR)
    bench.update(0, [1, 2, 3])
    bench.hear(Kind.CLOSE, 1)
    bench.worker._work()
    assert bench.model(2).tolist() == [1, 2, 3]
    bench.update(1, [3, 4, 5])
    bench.hear(Kind.CLOSE, 2)
    bench.worker._work()
    assert bench.models_sent() == 2
    assert bench.model(2).tolist() == [2, 3, 4]


def test_the_partial_aggregate_of_another_node_is_not_read_again_either():
    bench = Bench(STREAMING)
    bench.hear(Kind.ASSIGN, COORDINATOR)
    bench.update(0, [1, 2, 3])
    bench.fill(1, [0, 0, 0])
    bench.updates.payload(1, 12)[:] = np.array([5, 6, 7], np.float32).tobytes()
    Seal(NONCE, 1, 1, 1, 1, 1.0, 0.0, (InputKey(0, 1),)).pack_into(bench.updates.header(1), PARTIAL_SEAL_OFFSET)
    bench.hear(Kind.PARTIAL, slot_reference(UPDATES, 1), bench.generation & 0xFF)
    bench.hear(Kind.CLOSE, 2, 1)
    bench.worker._work()
    assert bench.model(2).tolist() == [3, 4, 5]
    bench.fill(1, [1000, 1000, 1000])
    bench.hear(Kind.CLOSE, 2, 1)
    bench.worker._work()
    assert bench.models_sent() == 2
    assert bench.model(2).tolist() == [3, 4, 5]

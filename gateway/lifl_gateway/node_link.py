"""The gateway's place on its node: the memory of the pools, the slots of its seat, the data plane.

One thread keeps the connection to the agent. It sleeps until a descriptor or a message arrives. When the agent
goes away it joins the next one; pools whose nonce it knows are the same memory and keep their slots as they are.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lifl.agent_client import AgentConnection
from lifl.control_channel import close_fds
from lifl.descriptor import Descriptor, Kind
from lifl.endpoint import Endpoint
from lifl.errors import LiflError, Unavailable
from lifl.logs import say
from lifl.messages import BusySlots, JobState, PoolAdded, PoolDropped, PoolInfo, Slots, endpoint_role
from lifl.pool import MappedPool
from lifl.slot import PAGE, UpdateHeader, slot_reference, split_slot_reference

from lifl_gateway.coordinator_client import CoordinatorClient
from lifl_gateway.slots import SeatSlots, indices_of_seat

REJOIN_SECONDS: Final = 30.0
"""How long a gateway looks for a new agent before it gives up and lets its supervisor start it again."""

_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 1.0
_POOL_WAIT_SECONDS: Final = 2.0


@dataclass(frozen=True)
class UpdatePool:
    """The update slots of a job on this node."""

    memory: MappedPool
    slots: SeatSlots
    """Those of this gateway's seat."""

    def reference(self, index: int) -> int:
        """The slot reference that descriptors carry."""
        return slot_reference(self.memory.info.pool, index)


def header_room(memory: MappedPool, index: int) -> memoryview:
    """The room for the safetensors header of a slot."""
    return memory.slot(index)[PAGE : memory.geometry.payload_offset]


class NodeLink:
    """Keeps the gateway joined. `run` is the body of its thread; everything else may be called from any."""

    def __init__(
        self, join: Callable[[], AgentConnection], coordinator: CoordinatorClient, seat: int, seats: int
    ) -> None:
        """`join` joins the agent once, or raises a LiflError."""
        self._join = join
        self._coordinator = coordinator
        self._seat = seat
        self._seats = seats
        self._changed = threading.Condition()
        self._send_lock = threading.Lock()
        self._endpoint: Endpoint | None = None
        self._memories: dict[int, MappedPool] = {}
        self._updates: dict[int, UpdatePool] = {}
        self._busy: dict[int, int] = {}
        """What BusySlots said of slots whose pool was not there yet: generation by slot reference."""
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.on_partial: Callable[[int, int], None] = _ignore_partial
        """Called in this link's thread for each partial aggregate that an aggregator wants sent to another node,
        with its slot reference and the round modulo 65,536. It must not wait."""
        self._is_stopping = False
        self.is_ready = False
        """The agent is joined and the slots in use are known."""

    # --- for the requests ------------------------------------------------------------------------------------

    def update_pool(self, state: JobState) -> UpdatePool:
        """The job's update slots; raises Unavailable when they are not mapped."""
        return self.update_pool_of(state.job, state.updates_pool)

    def update_pool_of(self, job: str, pool: int) -> UpdatePool:
        """The update slots of a job in the pool of this number; raises Unavailable when they are not mapped.

        A job may be known to be running a moment before the agent has handed over its memory, so this waits a
        little for it.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.is_ready and self._is_of(self._updates.get(pool), job),
                0 if not self.is_ready else _POOL_WAIT_SECONDS,
            )
            found = self._updates.get(pool)
        if not self.is_ready or found is None or not self._is_of(found, job):
            raise Unavailable("the job's memory is not mapped")
        return found

    @staticmethod
    def _is_of(pool: UpdatePool | None, job: str) -> bool:
        return pool is not None and pool.memory.info.job == job

    def memory(self, pool: int) -> MappedPool:
        """The memory of a pool; raises Unavailable when it is not mapped. Waits as `update_pool` does."""
        with self._changed:
            self._changed.wait_for(lambda: pool in self._memories, 0 if not self.is_ready else _POOL_WAIT_SECONDS)
            found = self._memories.get(pool)
        if found is None:
            raise Unavailable(f"pool {pool} is not mapped")
        return found

    def pools(self) -> list[UpdatePool]:
        """All update pools of this node."""
        with self._changed:
            return list(self._updates.values())

    def send_update(self, destination: int, slot: int, round_number: int, generation: int) -> None:
        """Send an UPDATE descriptor.

        What cannot be sent is not lost: the coordinator knows the slot and gives it to the next aggregator.
        """
        self._send(destination, slot, round_number, Kind.UPDATE, generation)

    def send_partial(self, destination: int, slot: int, round_number: int, generation: int) -> None:
        """Send a PARTIAL descriptor for a partial aggregate that lies in an update slot; see `send_update`."""
        self._send(destination, slot, round_number, Kind.PARTIAL, generation)

    def _send(self, destination: int, slot: int, round_number: int, kind: Kind, generation: int) -> None:
        with self._send_lock, contextlib.suppress(Unavailable):
            if self._endpoint is not None:
                self._endpoint.send(destination, slot, round_number, kind, generation)

    @property
    def endpoint_id(self) -> int:
        """This gateway's endpoint on the data plane. Raises Unavailable while there is no agent."""
        endpoint = self._endpoint
        if endpoint is None:
            raise Unavailable("the agent is away")
        return endpoint.identifier

    def settle_slots(self) -> None:
        """Ask the coordinator which slots are in use and free those that it does not name.

        Raises Unavailable or Refused.
        """
        believed = {pool.memory.info.pool: (pool.slots, pool.slots.sent()) for pool in self.pools()}
        answer = self._coordinator.ask(BusySlots(self._seat), Slots)
        busy = dict(answer.keys)
        for number, (slots, sent) in believed.items():
            slots.settle({i: g for (p, i), g in _by_place(busy).items() if p == number}, sent)
        with self._changed:
            self._busy = {r: g for r, g in busy.items() if split_slot_reference(r)[0] not in believed}

    # --- the thread ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Join, serve, join again, until `stop`; returns too when no agent was found for REJOIN_SECONDS."""
        while not self._is_stopping:
            connection = self._join_patiently()
            if connection is None:
                return
            try:
                self._serve(connection)
            except (LiflError, OSError) as error:
                if not self._is_stopping:
                    say("gateway", f"lost the agent ({error}); joining again")
            finally:
                self._leave(connection)

    def stop(self) -> None:
        """End `run`."""
        self._is_stopping = True
        os.eventfd_write(self._stop, 1)

    def close(self) -> None:
        """Free what is left after `run` has ended."""
        self._memories.clear()
        self._updates.clear()
        os.close(self._stop)

    def _join_patiently(self) -> AgentConnection | None:
        deadline = time.monotonic() + REJOIN_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        while not self._is_stopping:
            try:
                return self._join()
            except LiflError as error:
                if time.monotonic() > deadline:
                    say("gateway", f"cannot join the agent: {error}")
                    return None
            pause = self._pause(pause)
        return None

    def _pause(self, seconds: float) -> float:
        """Sleep unless stopped; returns how long the next pause shall be."""
        stop = select.poll()
        stop.register(self._stop, select.POLLIN)
        stop.poll(seconds * 1000)
        return min(seconds * 2, _LONGEST_PAUSE_SECONDS)

    def _leave(self, connection: AgentConnection) -> None:
        self.is_ready = False
        with self._send_lock:
            self._endpoint = None
            if connection.endpoint is not None:
                connection.endpoint.close()
        connection.channel.close()

    def _serve(self, connection: AgentConnection) -> None:
        """Be a member of the node until the agent goes away (LiflError) or `stop`."""
        endpoint = connection.endpoint
        assert endpoint is not None, "a gateway always gets an endpoint"
        poller = select.poll()
        for fd in (connection.channel.fileno(), endpoint.fileno(), endpoint.far_fileno(), self._stop):
            poller.register(fd, select.POLLIN)
        self._settle_patiently(connection)
        for memory in connection.pools.values():
            self._add(memory)
        connection.pools.clear()
        with self._send_lock:
            self._endpoint = endpoint
        with self._changed:
            self.is_ready = True
            self._changed.notify_all()
        while not self._is_stopping:
            for fd, events in poller.poll():
                if fd == connection.channel.fileno():
                    self._read_agent(connection)
                elif fd == endpoint.fileno():
                    self._read_descriptors(endpoint)
                elif fd == endpoint.far_fileno():
                    endpoint.bounced()  # the coordinator sends them again
                    if events & (select.POLLHUP | select.POLLERR):
                        poller.unregister(fd)

    def _settle_patiently(self, connection: AgentConnection) -> None:
        """Learn which slots are in use; only the coordinator knows, so wait for it."""
        agent = select.poll()
        agent.register(connection.channel.fileno(), select.POLLHUP)
        pause = _FIRST_PAUSE_SECONDS
        while not self._is_stopping:
            try:
                self.settle_slots()
                return
            except LiflError:
                pause = self._pause(pause)
            if agent.poll(0):
                raise Unavailable("the agent ended before the coordinator was there")

    def _read_agent(self, connection: AgentConnection) -> None:
        message, fds = connection.channel.receive()
        if isinstance(message, PoolAdded) and len(fds) == 1:
            self._add(MappedPool(message.info, fds[0], keep_fd=True))
            return
        close_fds(fds)
        if isinstance(message, PoolDropped):
            self._drop(message.pool)

    def _read_descriptors(self, endpoint: Endpoint) -> None:
        for message in endpoint.receive():
            if message.kind == Kind.RELEASE:
                self._release(message)
            elif message.kind == Kind.PARTIAL and endpoint_role(message.source) == "worker":
                self._announce_partial(message)
        if endpoint.closed:
            raise Unavailable("the data plane hung up")

    def _release(self, message: Descriptor) -> None:
        pool, index = split_slot_reference(message.slot)
        found = self._updates.get(pool)
        if found is not None:
            found.slots.release(index, message.generation)
        else:
            self._busy.pop(message.slot, None)

    def _announce_partial(self, message: Descriptor) -> None:
        """Believe only what can be a partial aggregate; whose it is, the coordinator knows."""
        pool, index = split_slot_reference(message.slot)
        memory = self._memories.get(pool)
        if memory is not None and memory.info.kind == "aggregates" and index < memory.info.slots:
            self.on_partial(message.slot, message.round)

    # --- pools -----------------------------------------------------------------------------------------------

    def _add(self, memory: MappedPool) -> None:
        info = memory.info
        with self._changed:
            known = self._memories.get(info.pool)
            if known is not None and known.info.nonce == info.nonce:
                memory.close()  # the same memory: what is known of its slots still holds
                return
            self._memories[info.pool] = memory
            if memory.fd >= 0:
                # Whoever sends from it holds `memory`, so the number cannot come to mean another file meanwhile.
                weakref.finalize(memory, os.close, memory.fd)
            if info.kind == "updates":
                self._updates[info.pool] = UpdatePool(memory, self._seat_slots(info, memory))
            self._changed.notify_all()

    def _seat_slots(self, info: PoolInfo, memory: MappedPool) -> SeatSlots:
        """The slots of the seat, in the generations that an earlier process on this seat left them in."""
        busy = {index: g for (pool, index), g in _by_place(self._busy).items() if pool == info.pool}
        generations = {}
        for index in indices_of_seat(self._seat, self._seats, info.slots):
            header = UpdateHeader.unpack_from(memory.header(index))
            generations[index] = busy.get(index, 0) if header is None else header.generation
        return SeatSlots(generations, busy)

    def _drop(self, pool: int) -> None:
        """Forget a pool; its memory is unmapped when the last request that uses it ends."""
        with self._changed:
            self._memories.pop(pool, None)
            self._updates.pop(pool, None)


def _ignore_partial(_slot: int, _round_number: int) -> None:
    """Nobody sends partial aggregates to other nodes."""


def _by_place(references: dict[int, int]) -> dict[tuple[int, int], int]:
    """Generations by (pool, index)."""
    return {split_slot_reference(reference): generation for reference, generation in references.items()}

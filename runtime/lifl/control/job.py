"""One job as the coordinator sees it: its model, its pools, its workers and the open round."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from lifl.control.earlier_updates import EarlierUpdates
from lifl.control.hierarchy import PendingEstimate
from lifl.control.job_store import JobStore
from lifl.control.latencies import LatencyHistogram
from lifl.control.membership import Membership
from lifl.control.round import Round
from lifl.errors import Refused
from lifl.messages import JobSpec, JobState, PoolInfo, RoundState
from lifl.model_layout import AccumulatorLayout, ModelLayout
from lifl.pool import MappedPool
from lifl.slot import PAGE, PoolGeometry, slot_reference

MODEL_SLOTS: Final = 3
"""Global models kept in shared memory, in turn: a round reads one and writes the next, and one may be lent to
slow readers meanwhile without holding up the round."""

MAX_UPDATE_SLOTS: Final = 4000
"""Fewer than the descriptors that may wait unread at one process: none is ever refused for lack of credit."""

_HISTORY_ROUNDS: Final = 1000
"""Complete rounds of a job that are kept in memory."""

_RECENT_ROUNDS: Final = 4
"""Complete rounds of a job whose updates can still be asked for one by one."""

_RECENT_UPDATES: Final = 50_000
"""Updates of these rounds in all; with more, fewer rounds are kept."""

_MEMORY_SHARE: Final = 0.25
"""Share of the available memory that the update slots of one job may take by default."""

_AGGREGATES_SHARE: Final = 0.5
"""The same for models and accumulators: huge models get fewer places in the tree."""


class ModelReader(Protocol):
    """Where a job's models are when they are not in its memory: on the disk, or on other nodes.

    The methods block, and are called in a background thread. They raise OSError when the model cannot be had.
    """

    def read_header(self, round_number: int) -> tuple[bytes, int | None]:
        """The safetensors header of the model that starts a round, and the bytes that follow it if that is known.

        Raises `Refused` 422 when it is no model.
        """

    def read_model(self, round_number: int, header_bytes: int, payload: memoryview) -> None:
        """Fill `payload` with the model's tensors."""

    def read_state(self, round_number: int, arrays: Sequence[memoryview]) -> None:
        """Fill the server optimiser's arrays as they are at the start of the round, unless there are none yet."""


@dataclass
class WorkerRecord:
    """A worker process that serves one place of the job's tree."""

    ticket: str
    place: int
    endpoint: int = 0
    """0 until it has joined."""
    assigned: bool = False
    """It was told its round and parent, so descriptors may be sent to it."""
    stopping: bool = False
    round_started: int = 0
    """The round it was started for, until it has got its first work."""


@dataclass(frozen=True)
class Pools:
    """The two pools of a job on this node and the memory behind them."""

    updates: PoolInfo
    aggregates: PoolInfo
    updates_fd: int
    memory: MappedPool
    """The aggregates pool, with its file descriptor."""

    def close(self) -> None:
        """Unmap and close."""
        self.memory.close()
        os.close(self.updates_fd)


@dataclass
class Job:
    """State of one job; the coordinator changes it."""

    spec: JobSpec
    store: JobStore
    models: ModelReader
    nonce: int = field(default_factory=lambda: secrets.randbits(63))
    status: Literal["waiting-for-model", "running", "complete", "deleted", "failed"] = "waiting-for-model"
    detail: str = ""
    layout: ModelLayout | None = None
    gather: bool = False
    state_arrays: int = 0
    pools: Pools | None = None
    round: Round | None = None
    last: RoundState | None = None
    history: dict[int, RoundState] = field(default_factory=dict)
    """The newest complete rounds of this life of the coordinator, oldest first; the journal has all."""
    recent: deque[Round] = field(default_factory=deque)
    """Of these the last few, with each of their updates."""
    earlier: EarlierUpdates = field(default_factory=EarlierUpdates)
    """What was counted in earlier buffers, if it is asynchronous."""
    latencies: LatencyHistogram = field(default_factory=LatencyHistogram)
    """Of all updates that were folded in this life of the coordinator."""
    model_round: int = 0
    checkpointed_round: int = 0
    workers: dict[int, WorkerRecord] = field(default_factory=dict)
    """By place."""
    leases: dict[int, int] = field(default_factory=dict)
    """Round of the model of each lease."""
    file_leases: dict[int, int] = field(default_factory=dict)
    """Round of the checkpoint file of each lease."""
    checkpoints: list[int] = field(default_factory=list)
    """Rounds whose starting model can be had from the disk, ascending."""
    last_activity: float = 0.0
    places: int = 1
    """Places in the tree that there is memory for."""
    uploads: dict[int, int] = field(default_factory=dict)
    """Uploads that were admitted and not yet committed or abandoned, by the gateway's endpoint."""
    checkpointing: set[int] = field(default_factory=set)
    """Rounds whose starting model and optimiser state are being written to the disk."""
    memory_given_back: bool = False
    memory_is_going: bool = False
    """The agent was asked to give the pages back and has not answered yet."""
    given_back_at: float = 0.0
    installing: bool = False
    pending_estimate: PendingEstimate = field(default_factory=PendingEstimate)
    member: Membership | None = None
    """For a job of a cluster: what the coordinator wants of this node. None for a job of this node alone."""

    # --- where things lie in the aggregates pool -------------------------------------------------------

    @property
    def state_slots(self) -> int:
        """Slots of optimiser state: two generations of each array."""
        return 2 * self.state_arrays

    def accumulator(self, place: int) -> int:
        """Index of the first of the two accumulator slots of a place."""
        return MODEL_SLOTS + self.state_slots + 2 * place

    def place_of_accumulator(self, index: int) -> int:
        """The place whose accumulator this slot index is; negative for another slot."""
        return (index - MODEL_SLOTS - self.state_slots) // 2

    @staticmethod
    def model_slot(round_number: int) -> int:
        """Index of the slot that holds the model which starts this round."""
        return round_number % MODEL_SLOTS

    def model_slot_reference(self, round_number: int) -> int:
        """Slot reference of the same."""
        assert self.pools is not None
        return slot_reference(self.pools.aggregates.pool, self.model_slot(round_number))

    def state_slot(self, array: int, round_number: int) -> int:
        """Index of the slot that holds an optimiser array as it is at the start of this round."""
        return MODEL_SLOTS + 2 * array + round_number % 2

    def state_slot_reference(self, array: int, round_number: int) -> int:
        """Slot reference of the same."""
        assert self.pools is not None
        return slot_reference(self.pools.aggregates.pool, self.state_slot(array, round_number))

    def is_lent(self, round_number: int) -> bool:
        """Whether somebody still reads what is in the slots of this round's model and optimiser state."""
        lent = self.leases.values()
        if any(self.model_slot(other) == self.model_slot(round_number) for other in lent):
            return True
        # In a cluster whoever borrows a model may read the optimiser's arrays too.
        if self.member is not None and self.state_arrays and any((n - round_number) % 2 == 0 for n in lent):
            return True
        return bool(self.state_arrays) and any((other - round_number) % 2 == 0 for other in self.checkpointing)

    def retire_checkpoints(self) -> list[int]:
        """Take the rounds from the list whose checkpoints are not to be kept once there is one more.

        One that somebody reads stays for this time.
        """
        keep = self.spec.keep_checkpoints
        surplus = self.checkpoints[: max(0, len(self.checkpoints) + 1 - keep)] if keep else []
        read = set(self.file_leases.values())
        retired = [number for number in surplus if number not in read]
        self.checkpoints = [number for number in self.checkpoints if number not in retired]
        return retired

    def pool_infos(self, pool: int, cores: int, gateways: int) -> tuple[PoolInfo, PoolInfo]:
        """Dimension the two pools (ids `pool` and `pool + 1`). Raises `Refused` 422/507 when they cannot fit."""
        assert self.layout is not None
        if self.gather:
            require_streaming(self.spec)
        header = len(self.layout.header)
        sums = AccumulatorLayout(self.layout, self.spec.precision).nbytes
        # In a cluster the sums of other nodes come into update slots.
        largest = self.layout.payload_bytes if self.member is None else max(self.layout.payload_bytes, sums)
        updates = PoolGeometry.of(1, header + PAGE, largest)
        slots = self._update_slots(updates.stride, gateways)
        aggregate = PoolGeometry.of(1, header, max(self.layout.payload_bytes, sums))
        fixed = MODEL_SLOTS + self.state_slots
        fitting = int(available_memory() * _AGGREGATES_SHARE) // aggregate.stride - fixed
        self.places = max(1, min(cores, fitting // 2))
        aggregates = aggregate._replace(slots=fixed + 2 * self.places)
        return (
            PoolInfo(
                pool,
                "updates",
                self.spec.name,
                secrets.randbits(63),
                slots,
                updates.header_capacity,
                updates.payload_capacity,
            ),
            PoolInfo(
                pool + 1,
                "aggregates",
                self.spec.name,
                secrets.randbits(63),
                aggregates.slots,
                aggregates.header_capacity,
                aggregates.payload_capacity,
            ),
        )

    def _update_slots(self, stride: int, gateways: int) -> int:
        at_once = self.gather or self.spec.timing == "lazy"
        fitting = int(available_memory() * _MEMORY_SHARE) // stride
        fewest = gateways if self.member is None else 2 * gateways
        slots = self.spec.slots or max(fewest, min(self.spec.goal, fitting, MAX_UPDATE_SLOTS))
        if at_once and slots < self.spec.goal:
            kind = "a gathering function" if self.gather else "lazy timing"
            raise Refused(
                422,
                "too few slots",
                f"{kind} needs all {self.spec.goal} updates of a round in memory at once, but the pool has "
                f"{slots} slots of {stride:,} bytes; lower the goal, or stream with eager timing",
            )
        needed = fewest if self.spec.mode == "async" else gateways
        if slots < needed:
            each = "two, one of them for sums" if needed > gateways else "one"
            raise Refused(422, "too few slots", f"{slots} slots for {gateways} gateways; each needs {each}")
        return slots

    # --- what was ----------------------------------------------------------------------------------------

    def remember(self, complete: Round) -> None:
        """Take a complete round into the history, which keeps the newest ones."""
        self.last = self.history[complete.number] = complete.state()
        if len(self.history) > _HISTORY_ROUNDS:
            del self.history[next(iter(self.history))]
        self.recent.append(complete)
        while len(self.recent) > _RECENT_ROUNDS or sum(len(old.log) for old in self.recent) > _RECENT_UPDATES:
            self.recent.popleft()
        if self.spec.mode == "async":
            self.remember_counted(complete.number + 1, complete.updates)

    def remember_counted(self, following: int, contributors: Iterable[str]) -> None:
        """Note what counts in the model of round `following`, as far as it may be sent again."""
        self.earlier.add(contributors)
        self.earlier.forget_before(following - self.spec.max_staleness)

    def rounds_with_updates(self) -> dict[int, Round]:
        """By number, the rounds whose updates are known one by one: the last complete ones and the open one."""
        return {known.number: known for known in (*self.recent, self.round) if known is not None}

    # --- what others see ---------------------------------------------------------------------------------

    def _open_round(self) -> int:
        if self.status != "running":
            return 0
        if self.member is not None:
            return self.member.order.round
        return self.round.number if self.round else 0

    @property
    def public_round(self) -> int:
        """The round that the newest model starts which clients may have.

        In a cluster that has to be stored first for `durability: sync`, and the coordinator says when it is. Until
        then it is here for the coordinator to fetch.
        """
        if self.member is not None and self.spec.durability == "sync":
            return min(self.model_round, self.member.order.model_round)
        return self.model_round

    def state(self, data_plane: str) -> JobState:
        """The job as the API shows it."""
        pools, layout = self.pools, self.layout
        return JobState(
            job=self.spec.name,
            status=self.status,
            round=self._open_round(),
            model_round=self.public_round,
            spec=self.spec,
            data_plane=data_plane,
            model_header_bytes=len(layout.header) if layout else 0,
            model_payload_bytes=layout.payload_bytes if layout else 0,
            updates_pool=pools.updates.pool if pools else -1,
            aggregates_pool=pools.aggregates.pool if pools else -1,
            model_layout=hashlib.sha256(layout.header).hexdigest() if layout else "",
            nonce=self.nonce,
            current=self.round.state() if self.round else None,
            last=self.last,
            checkpointed_round=self.checkpointed_round,
            workers=sum(worker.endpoint != 0 for worker in self.workers.values()),
            detail=self.detail,
        )


def require_streaming(spec: JobSpec) -> None:
    """Raise `Refused` 422 if a job cannot have a function that wants all updates of a round at once."""
    if spec.mode == "async":
        raise Refused(
            422,
            "not for a gathering function",
            f"{spec.function!r} compares all updates of a round with each other, but those of an asynchronous job "
            "are differences to different models; use mode sync, or a function that streams",
        )


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping (`MemAvailable`)."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 30

"""The worker: one aggregator process. Recv - Agg - Send (paper: step-based aggregator), for every role alike.

It learns its round and parent from ASSIGN, folds what UPDATE and PARTIAL name, and after CLOSE sends the result
up: a partial aggregate to the parent, or, at the top, the global model to the coordinator. Its state is in its two
accumulator slots, so any other worker with the same slots can go on where it was killed.
"""

from __future__ import annotations

import logging
import select
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from lifl.agent_client import AgentConnection
from lifl.aggregate import Aggregate, GatheredUpdates, ModelUpdate
from lifl.descriptor import Descriptor, Kind, model_proof
from lifl.errors import LiflError
from lifl.fold import Fold, Input
from lifl.function import AggregatorFunction
from lifl.global_model import apply_server_optimizer
from lifl.messages import PoolInfo, WorkerSpec, endpoint_role
from lifl.model_layout import AccumulatorLayout, FoldPlan, ModelLayout, parse_header, plan_update
from lifl.pool import MappedPool
from lifl.slot import (
    MAX_SEAL_INPUTS,
    PARTIAL_SEAL_OFFSET,
    InputKey,
    Seal,
    UpdateHeader,
    erase_header,
    slot_reference,
    split_slot_reference,
)
from lifl.staleness import staleness_weight

EAGER_BATCH: Final = 4
"""Ready inputs that an eager fold waits for: from four on, a pass runs at the memory's read limit."""

EAGER_LINGER: Final = 0.005
"""Seconds that an eager fold waits for a fuller batch, so that a straggler's slot is not held up."""

FOLD_BATCH: Final = 64
"""Inputs of one pass at most."""

_LAYOUT_CACHE: Final = 32

log = logging.getLogger("lifl.worker")


@dataclass
class ReadyInput:
    """An input that has arrived and is not folded yet."""

    key: InputKey
    """With the full generation, or for a partial aggregate its seal's sequence."""
    update: ModelUpdate | None = None
    partial: Seal | None = None
    sums: memoryview | None = None
    """The accumulator of a partial aggregate."""


@dataclass
class Assignment:
    """The round a worker serves and how far it is."""

    round: int
    parent: int
    seal: Seal | None
    """What the current accumulator contains; None while it is empty."""
    accumulator: int
    """0 or 1: which of the two slots the seal is in."""
    expected: int | None = None
    """Inputs of the round, once CLOSE has told."""
    expected_partials: int = 0
    """How many of them are partial aggregates."""
    sent: bool = False
    made: tuple[int, int] | None = None
    """Of how many inputs the model was made, and what MODEL said of it; None once another input has come.

    As long as it stands the model is not made again: the coordinator may have it, and then the inputs are gone
    from their slots and others are in them.
    """
    ready: list[ReadyInput] = field(default_factory=list)
    ready_since: float = 0.0
    generations: dict[int, int] = field(default_factory=dict)
    """Full generation of the last input of each slot that was taken in this round."""
    folded: set[int] = field(default_factory=set)
    """Slots whose input of that generation is sealed."""

    @property
    def inputs(self) -> int:
        """Inputs that are sealed."""
        return self.seal.inputs if self.seal else 0


class Worker:
    """Runs one function on one node for one job; see the module."""

    def __init__(self, connection: AgentConnection, function: AggregatorFunction) -> None:
        spec = connection.welcome.worker
        if spec is None or connection.endpoint is None:
            raise LiflError("the agent sent no work")
        self._connection = connection
        self._endpoint = connection.endpoint
        self._spec: WorkerSpec = spec
        self._function = function
        self._infos: dict[str, PoolInfo] = {info.kind: info for info in connection.welcome.pools}
        self._updates: MappedPool = connection.pools[self._infos["updates"].pool]
        self._aggregates: MappedPool = connection.pools[self._infos["aggregates"].pool]
        self._nonce = self._infos["aggregates"].nonce
        self._model = parse_header(bytes(self._aggregates.layout(0)).rstrip(b"\0"))
        self._accumulators = AccumulatorLayout(self._model, spec.precision)
        self._fold = Fold(self._accumulators)
        self._model_plan = plan_update(self._model, self._model)
        self._layouts: OrderedDict[bytes, tuple[ModelLayout, FoldPlan]] = OrderedDict()
        self._assignment: Assignment | None = None
        self._early: list[Descriptor] = []
        self._coordinator = 0

    # --- loop ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the agent ends the connection."""
        poll = select.epoll()
        control = self._connection.channel.fileno()
        near, far = self._endpoint.near.fileno(), self._endpoint.far.fileno()
        for fd in (control, near, far):
            poll.register(fd, select.EPOLLIN)
        while True:
            for fd, _ in poll.poll(self._patience()):
                if fd == control:
                    return
                if fd == far:
                    # A parent that is gone: the coordinator asks again when there is another.
                    self._endpoint.bounced()
                else:
                    for message in self._endpoint.receive():
                        self._take(message)
            self._work()

    def _patience(self) -> float | None:
        """Seconds to wait for news before folding what is ready."""
        current = self._assignment
        if current is None or current.sent or not current.ready or self._waits_for_all():
            return None
        return max(0.0, current.ready_since + EAGER_LINGER - time.monotonic())

    def _waits_for_all(self) -> bool:
        return self._function.gather or self._spec.timing == "lazy"

    # --- receive -------------------------------------------------------------------------------------------

    def _take(self, message: Descriptor) -> None:
        role = endpoint_role(message.source)
        current = self._assignment
        if message.kind == Kind.ASSIGN and role == "coordinator":
            self._coordinator = message.source
            self._assign(message.round | message.generation << 16, message.slot)
        elif current is None or message.round != current.round & 0xFFFF:
            if message.kind in (Kind.UPDATE, Kind.PARTIAL):
                self._early.append(message)
        elif message.kind == Kind.CLOSE and role == "coordinator":
            current.expected = message.slot
            current.expected_partials = message.generation
            current.sent = False
        elif message.kind == Kind.UPDATE and role in ("gateway", "coordinator"):
            self._take_update(current, message)
        elif message.kind == Kind.PARTIAL and role == "worker":
            self._take_partial(current, message)
        elif message.kind == Kind.PARTIAL and role in ("gateway", "coordinator"):
            self._take_remote_partial(current, message)
        else:
            log.warning("ignored a descriptor of kind %d from %#x", message.kind, message.source)

    def _assign(self, round_number: int, parent: int) -> None:
        current = self._assignment
        if current is not None and current.round == round_number:
            current.parent = parent
            # What was said of the round's end may be out of date: it is said again after this.
            current.expected = None
            current.expected_partials = 0
            current.sent = False
            return
        first = [self._seal_in(slot, round_number) for slot in (0, 1)]
        newest = max((seal for seal in first if seal), key=lambda seal: seal.sequence, default=None)
        self._assignment = Assignment(round_number, parent, newest, first.index(newest) if newest else 0)
        if newest is not None:
            for key in newest.recent:
                self._assignment.generations[key.slot] = key.generation
                self._assignment.folded.add(key.slot)
        early, self._early = self._early, []
        for message in early:
            if (message.round - round_number) & 0xFFFF < 0x8000:
                self._take(message)

    def _seal_in(self, slot: int, round_number: int) -> Seal | None:
        seal = Seal.unpack_from(self._aggregates.header(self._spec.accumulator + slot))
        if seal is None or seal.round != round_number or seal.pool_nonce != self._nonce:
            return None
        return seal

    def _take_update(self, current: Assignment, message: Descriptor) -> None:
        pool, index = split_slot_reference(message.slot)
        info = self._infos["updates"]
        if pool != info.pool or index >= info.slots:
            log.warning("ignored an update in a slot that is not of this job: %#x", message.slot)
            return
        header = UpdateHeader.unpack_from(self._updates.header(index))
        if header is None or header.generation & 0xFF != message.generation:
            log.warning("ignored a descriptor of slot %d that is out of date", index)
            return
        if self._is_known(current, message, header.generation):
            return
        try:
            update = self._model_update(index, header)
        except (LiflError, ValueError) as error:
            log.warning("rejected the update of %s: %s", header.client, error)
            self._report(Kind.REJECTED, message.slot, header.generation)
            return
        self._add_ready(current, ReadyInput(InputKey(message.slot, header.generation), update))

    def _model_update(self, index: int, header: UpdateHeader) -> ModelUpdate:
        layout, plan = self._model, self._model_plan
        if header.layout_bytes:
            layout, plan = self._other_layout(bytes(self._updates.layout(index)[: header.layout_bytes]))
        return ModelUpdate(
            self._updates.payload(index, header.payload_bytes),
            layout,
            plan,
            client=header.client,
            round=header.round,
            num_samples=header.num_samples,
            is_delta=header.is_delta,
        )

    def _other_layout(self, header: bytes) -> tuple[ModelLayout, FoldPlan]:
        known = self._layouts.get(header)
        if known is None:
            layout = parse_header(header)
            known = self._layouts[header] = layout, plan_update(self._model, layout)
            if len(self._layouts) > _LAYOUT_CACHE:
                self._layouts.popitem(last=False)
        return known

    def _take_partial(self, current: Assignment, message: Descriptor) -> None:
        pool, index = split_slot_reference(message.slot)
        info = self._infos["aggregates"]
        if pool != info.pool or index >= info.slots:
            log.warning("ignored a partial aggregate in a slot that is not of this job: %#x", message.slot)
            return
        seal = Seal.unpack_from(self._aggregates.header(index))
        if seal is None or seal.round != current.round or seal.pool_nonce != self._nonce:
            log.warning("ignored a partial aggregate without a valid seal in slot %d", index)
            return
        if self._is_known(current, message, seal.sequence):
            return
        sums = self._aggregates.payload(index, self._accumulators.nbytes)
        self._add_ready(current, ReadyInput(InputKey(message.slot, seal.sequence), None, seal, sums))

    def _take_remote_partial(self, current: Assignment, message: Descriptor) -> None:
        """A partial aggregate of another node lies in an update slot, with its seal behind the update's header."""
        pool, index = split_slot_reference(message.slot)
        info = self._infos["updates"]
        if pool != info.pool or index >= info.slots:
            log.warning("ignored a partial aggregate in a slot that is not of this job: %#x", message.slot)
            return
        page = self._updates.header(index)
        header = UpdateHeader.unpack_from(page)
        seal = Seal.unpack_from(page, PARTIAL_SEAL_OFFSET)
        if header is None or header.generation & 0xFF != message.generation:
            log.warning("ignored a descriptor of slot %d that is out of date", index)
            return
        if seal is None or seal.round != current.round or seal.pool_nonce != self._nonce:
            log.warning("ignored a partial aggregate without a valid seal in slot %d", index)
            return
        if self._is_known(current, message, header.generation):
            return
        sums = self._updates.payload(index, self._accumulators.nbytes)
        self._add_ready(current, ReadyInput(InputKey(message.slot, header.generation), None, seal, sums))

    def _is_known(self, current: Assignment, message: Descriptor, generation: int) -> bool:
        """Whether the input was taken before (a replay); a folded one is reported again."""
        if current.generations.get(message.slot) == generation:
            if message.slot in current.folded:
                self._report(Kind.FOLDED, message.slot, generation)
            return True
        current.generations[message.slot] = generation
        current.folded.discard(message.slot)
        return False

    def _add_ready(self, current: Assignment, item: ReadyInput) -> None:
        if not current.ready:
            current.ready_since = time.monotonic()
        current.ready.append(item)
        current.made = None

    # --- aggregate -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        current = self._assignment
        if current is None or current.sent:
            return
        complete = current.expected is not None and current.inputs + len(current.ready) >= current.expected
        if complete and current.parent == self._coordinator and self._send_model_again(current):
            return
        if self._function.gather:
            if complete:
                self._finish_gathered(current)
            return
        if complete and current.parent == self._coordinator:
            self._finish(current)
        elif complete:
            self._fold_ready(current)
            self._send_partial(current)
        elif self._batch_is_due(current):
            self._fold_ready(current)

    def _batch_is_due(self, current: Assignment) -> bool:
        if not current.ready:
            return False
        if self._spec.timing == "lazy":
            return self._has_all_updates(current)
        waited = time.monotonic() - current.ready_since
        return len(current.ready) >= EAGER_BATCH or waited >= EAGER_LINGER

    @staticmethod
    def _has_all_updates(current: Assignment) -> bool:
        """Whether the round is closed and only partial aggregates are missing: the top need not wait for those."""
        if current.expected is None or all(item.update is None for item in current.ready):
            return False
        return current.inputs + len(current.ready) >= current.expected - current.expected_partials

    def _fold_ready(self, current: Assignment) -> None:
        while current.ready:
            batch, current.ready = current.ready[:FOLD_BATCH], current.ready[FOLD_BATCH:]
            self._fold_batch(current, batch)

    def _fold_batch(self, current: Assignment, batch: list[ReadyInput]) -> None:
        """One pass: new = old + sum(w x), from one accumulator slot to the other; then the seal, then the news."""
        total = Aggregate(current.round, current.seal.weight if current.seal else 0.0)
        inputs, taken, weight, delta_weight = self._inputs_of(total, batch)
        target = 1 - current.accumulator if current.seal else current.accumulator
        out = self._aggregates.payload(self._spec.accumulator + target, self._accumulators.nbytes)
        header = self._aggregates.header(self._spec.accumulator + target)
        erase_header(header)
        old = self._current_accumulator(current) if current.seal else None
        if inputs and not self._fold.fold(out, inputs, old):
            innocent = self._reject_culprits(batch)
            if len(innocent) == len(batch):
                innocent = self._reject_largest(batch)
            if innocent:
                self._fold_batch(current, innocent)
            return
        if not inputs and taken:
            # The function left all of them out; the sums stay as they are, but the inputs count as dealt with.
            if old is None:
                out[:] = bytes(len(out))
            else:
                out[:] = old
        if not taken:
            return
        before = current.seal
        seal = Seal(
            pool_nonce=self._nonce,
            round=current.round,
            sequence=(before.sequence if before else 0) + 1,
            inputs=current.inputs + len(taken),
            updates=(before.updates if before else 0)
            + sum(item.partial.updates if item.partial else 1 for item in taken),
            weight=(before.weight if before else 0.0) + weight,
            delta_weight=(before.delta_weight if before else 0.0) + delta_weight,
            recent=_newest(before.recent if before else (), [item.key for item in taken]),
        )
        seal.pack_into(header)
        current.seal = seal
        current.accumulator = target
        for item in taken:
            current.folded.add(item.key.slot)
            self._report(Kind.FOLDED, item.key.slot, item.key.generation)

    def _inputs_of(
        self, total: Aggregate, batch: Sequence[ReadyInput]
    ) -> tuple[list[Input], list[ReadyInput], float, float]:
        """Ask the function about each update; return fold inputs, the items dealt with, and their weights."""
        inputs: list[Input] = []
        taken: list[ReadyInput] = []
        weight = delta_weight = 0.0
        for item in batch:
            if item.partial is not None and item.sums is not None:
                inputs.append(self._fold.partial(item.sums))
                weight += item.partial.weight
                delta_weight += item.partial.delta_weight
            elif not self._offer(total, item):
                continue
            taken.append(item)
        for contribution in total.take():
            update = contribution.update
            factor = contribution.weight * contribution.scale * self._staleness_weight(total, update)
            inputs.append(self._fold.update(update.payload, update.plan, factor))
            weight += contribution.weight
            if update.is_delta:
                delta_weight += contribution.weight
        return inputs, taken, weight, delta_weight

    def _staleness_weight(self, total: Aggregate, update: ModelUpdate) -> float:
        """What an update's difference is multiplied with besides its weight, and which no denominator contains."""
        return staleness_weight(total.round - update.round, self._spec.staleness_exponent)

    def _offer(self, total: Aggregate, item: ReadyInput) -> bool:
        assert item.update is not None
        try:
            total.offer(self._function, item.update)
        except Exception:
            log.exception("%s failed on %r; the update is rejected", self._function.name, item.update)
            self._report(Kind.REJECTED, item.key.slot, item.key.generation)
            return False
        return True

    def _reject_culprits(self, batch: Sequence[ReadyInput]) -> list[ReadyInput]:
        """Report the updates of the batch that are not finite, and return the others."""
        innocent = []
        for item in batch:
            update = item.update
            if update is not None and self._fold.non_finite(update.payload, update.plan, update.num_samples):
                self._report(Kind.REJECTED, item.key.slot, item.key.generation)
            else:
                innocent.append(item)
        return innocent

    def _reject_largest(self, batch: Sequence[ReadyInput]) -> list[ReadyInput]:
        """All are finite but their sum is not: the update that weighs most goes."""
        updates = [item for item in batch if item.update is not None]
        if not updates:
            raise LiflError("the sum of partial aggregates overflows float32; use precision float64")
        largest = max(
            updates, key=lambda item: item.update.num_samples * item.update.norm() if item.update else 0.0
        )
        self._report(Kind.REJECTED, largest.key.slot, largest.key.generation)
        return [item for item in batch if item is not largest]

    def _current_accumulator(self, current: Assignment) -> memoryview:
        return self._aggregates.payload(self._spec.accumulator + current.accumulator, self._accumulators.nbytes)

    # --- send ----------------------------------------------------------------------------------------------

    def _report(self, kind: Kind, slot: int, generation: int) -> None:
        assert self._assignment is not None
        self._endpoint.send(self._coordinator, slot, self._assignment.round, kind, generation)

    def _send_partial(self, current: Assignment) -> None:
        if current.inputs != current.expected:
            return  # something was rejected; the coordinator says what is missing
        assert current.seal is not None
        slot = slot_reference(self._infos["aggregates"].pool, self._spec.accumulator + current.accumulator)
        current.sent = True
        self._endpoint.send(current.parent, slot, current.round, Kind.PARTIAL, current.seal.sequence)

    def _finish(self, current: Assignment) -> None:
        """Fold the updates that are left, then merge the partial aggregates on the way into the new model."""
        partials = [item for item in current.ready if item.partial is not None]
        updates = [item for item in current.ready if item.partial is None]
        if self._finish_at_once(current, updates, partials):
            return
        current.ready = updates
        self._fold_ready(current)
        if current.inputs + len(partials) != current.expected:
            current.ready = partials
            return
        current.ready = partials  # should the round be opened once more, they are still to be had
        sums, weight, delta_weight = self._sums_of(current, partials)
        if not self._write_model(current, sums, weight, delta_weight):
            raise LiflError(f"the global model of round {current.round} would not be finite")
        self._send_model(current, contains_all=False)

    def _finish_at_once(
        self, current: Assignment, updates: Sequence[ReadyInput], partials: Sequence[ReadyInput]
    ) -> bool:
        """Make the model of the sums and the updates that are left in one pass, if nothing stands against it.

        The updates stay in their slots until the coordinator has the model: no seal names them.
        """
        plans = [item.update.plan for item in updates if item.update is not None]
        if not 0 < len(updates) <= FOLD_BATCH or not all(map(self._fold.can_finish_with, plans)):
            return False
        if current.inputs + len(current.ready) != current.expected:
            return False
        total = Aggregate(current.round, current.seal.weight if current.seal else 0.0)
        inputs, taken, weight, delta_weight = self._inputs_of(total, updates)
        if len(taken) < len(updates):
            current.ready = [*taken, *partials]
            return True  # the coordinator has been told, and says how many there are without the rejected ones
        sums, sealed_weight, sealed_delta_weight = self._sums_of(current, partials)
        weight, delta_weight = weight + sealed_weight, delta_weight + sealed_delta_weight
        if not weight > 0 or not self._write_model(current, sums, weight, delta_weight, inputs):
            return False  # folding them one batch after the other finds out whose fault it is
        self._send_model(current, contains_all=True)
        return True

    def _sums_of(
        self, current: Assignment, partials: Sequence[ReadyInput]
    ) -> tuple[list[memoryview], float, float]:
        """Partial aggregates and what is sealed here, with their weight and the weight of differences in them."""
        sums = [item.sums for item in partials if item.sums is not None]
        weight = sum(item.partial.weight for item in partials if item.partial)
        delta_weight = sum(item.partial.delta_weight for item in partials if item.partial)
        if current.seal is not None:
            sums.insert(0, self._current_accumulator(current))
            weight += current.seal.weight
            delta_weight += current.seal.delta_weight
        return sums, weight, delta_weight

    def _finish_gathered(self, current: Assignment) -> None:
        innocent = self._reject_culprits(current.ready)
        if len(innocent) < len(current.ready):
            current.ready = innocent
            return
        updates = [item.update for item in current.ready if item.update is not None]
        out = self._current_accumulator(current)
        gathered = GatheredUpdates(updates, self._accumulators, out, self._model_payload(current.round))
        self._function(gathered)
        if not gathered.complete:
            raise LiflError(f"{self._function.name} did not go over all tiles of the model")
        if not self._write_model(current, [out], 1.0, 0.0):
            raise LiflError(f"the global model of round {current.round} would not be finite")
        self._send_model(current, contains_all=True)

    def _model_payload(self, round_number: int) -> memoryview:
        return self._aggregates.payload(round_number % self._spec.model_slots, self._model.payload_bytes)

    def _write_model(
        self,
        current: Assignment,
        sums: Sequence[memoryview],
        weight: float,
        delta_weight: float,
        inputs: Sequence[Input] = (),
    ) -> bool:
        """Write the model of the next round into its slot and tell whether it is finite."""
        previous = self._model_payload(current.round)
        out = self._model_payload(current.round + 1)
        if weight > 0:
            if not self._fold.finish(out, sums, weight, previous, delta_weight, inputs):
                return False
        else:
            out[:] = previous
        optimizer = self._function.server_optimizer
        if optimizer is not None:
            apply_server_optimizer(
                optimizer, self._accumulators, previous, out, self._state(current.round), current.round
            )
        return True

    def _send_model(self, current: Assignment, *, contains_all: bool) -> None:
        expected = current.expected or 0
        current.made = expected, model_proof(expected, contains_all=contains_all)
        self._send_model_again(current)

    def _send_model_again(self, current: Assignment) -> bool:
        """Say once more that the model is there if it is, and is made of what CLOSE asks for."""
        if current.made is None or current.made[0] != current.expected:
            return False
        slot = slot_reference(self._infos["aggregates"].pool, (current.round + 1) % self._spec.model_slots)
        current.sent = True
        self._endpoint.send(self._coordinator, slot, current.round, Kind.MODEL, current.made[1])
        return True

    def _state(self, round_number: int) -> list[tuple[memoryview, memoryview]]:
        """(array at the start of the round, array to be written) of each optimiser array."""
        first = self._spec.model_slots
        size = self._accumulators.nbytes
        return [
            (
                self._aggregates.payload(first + 2 * array + round_number % 2, size),
                self._aggregates.payload(first + 2 * array + (round_number + 1) % 2, size),
            )
            for array in range(self._spec.state_slots // 2)
        ]


def _newest(recent: Sequence[InputKey], added: Sequence[InputKey]) -> tuple[InputKey, ...]:
    """The newest inputs, one for each slot, so many as a seal can name."""
    by_slot = {key.slot: key for key in recent}
    for key in added:
        by_slot.pop(key.slot, None)
        by_slot[key.slot] = key
    return tuple(by_slot.values())[-MAX_SEAL_INPUTS:]

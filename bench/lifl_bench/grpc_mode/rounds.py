"""The rounds of one aggregator without any I/O: who may send what, and the sums.

`Roll` is the register of a round: it is asked before a payload is received, so that a refusal costs nothing.
`Sums` folds payloads that have been received whole, with the kernels that LIFL's workers use, in the same way:
several at a time, from one accumulator to the other.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lifl.aggregate import Aggregate, ModelUpdate
from lifl.fold import Fold, Input
from lifl.function import AggregatorFunction
from lifl.model_layout import RUN_ALIGNMENT, AccumulatorLayout, ModelLayout, Precision, plan_update
from lifl.tensors import LENGTH

from lifl_bench.deployment import Tree
from lifl_bench.grpc_mode.protocol import Attributes

Code = Literal["ALREADY_EXISTS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "OUT_OF_RANGE"]

log = logging.getLogger(__name__)

_MADV_POPULATE_WRITE: Final = 23


class Refused(Exception):
    """A call that cannot be granted, with the name of its gRPC status."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


# --- memory --------------------------------------------------------------------------------------------------


def allocate(nbytes: int) -> memoryview:
    """Memory for one payload, all of it present: to meet a page for the first time costs more than a copy."""
    memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    with contextlib.suppress(OSError):  # before Linux 5.14
        memory.madvise(_MADV_POPULATE_WRITE)
    return memoryview(memory)[:nbytes]


class UpdateBuffer:
    """Room for one update, header and all, placed so that its data section is aligned."""

    def __init__(self, header_bytes: int, payload_bytes: int) -> None:
        start = LENGTH.size + header_bytes
        shift = -start % RUN_ALIGNMENT
        self.whole: Final = allocate(shift + start + payload_bytes)[shift:]
        self.payload: Final = self.whole[start:]


# --- the register --------------------------------------------------------------------------------------------


class Roll:
    """Whose payloads of the open round have come."""

    def __init__(self, tree: Tree, leaf: int, update_bytes: int, partial_bytes: int) -> None:
        self._tree = tree
        self._leaf = leaf
        self._update_bytes = update_bytes
        self._partial_bytes = partial_bytes
        self.round = 1
        """The round that is open."""
        self._clients: set[int] = set()
        self._leaves: set[int] = set()

    @property
    def updates(self) -> int:
        """Updates of clients that complete this aggregator's part of a round."""
        return len(self._tree.clients_of(self._leaf))

    @property
    def partials(self) -> int:
        """Partial aggregates that the top needs besides its own updates."""
        return self._tree.leaves - 1 if self._leaf == 0 else 0

    @property
    def is_full(self) -> bool:
        """Whether the updates of all clients of the round have been entered."""
        return len(self._clients) == self.updates

    def admit_update(self, attributes: Attributes) -> None:
        """Enter a client. Raises Refused."""
        client = attributes.sender
        if client >= self._tree.updates:
            raise Refused("INVALID_ARGUMENT", f"there is no client {client}, only {self._tree.updates}")
        if self._tree.leaf_of(client) != self._leaf:
            text = f"client {client} belongs to leaf {self._tree.leaf_of(client)}, this is leaf {self._leaf}"
            raise Refused("INVALID_ARGUMENT", text)
        if attributes.weight <= 0:
            raise Refused("INVALID_ARGUMENT", "an update needs a weight above 0")
        self._check(attributes, self._update_bytes, "an update")
        if client in self._clients:
            text = f"the update of client {client} for round {self.round} has been sent already"
            raise Refused("ALREADY_EXISTS", text)
        self._clients.add(client)

    def admit_partial(self, attributes: Attributes) -> None:
        """Enter another leaf. Raises Refused."""
        leaf = attributes.sender
        if self._leaf != 0 or not 0 < leaf < self._tree.leaves:
            text = f"leaf {self._leaf} takes no partial aggregate of leaf {leaf}"
            raise Refused("INVALID_ARGUMENT", text)
        self._check(attributes, self._partial_bytes, "a partial aggregate")
        if leaf in self._leaves:
            text = f"the partial aggregate of leaf {leaf} for round {self.round} has been sent already"
            raise Refused("ALREADY_EXISTS", text)
        self._leaves.add(leaf)

    def _check(self, attributes: Attributes, nbytes: int, what: str) -> None:
        if attributes.round != self.round:
            state = "closed" if attributes.round < self.round else "not open yet"
            text = f"round {attributes.round} is {state}; round {self.round} is open"
            raise Refused("FAILED_PRECONDITION", text)
        if attributes.nbytes != nbytes:
            raise Refused("INVALID_ARGUMENT", f"{what} has {nbytes} bytes here, not {attributes.nbytes}")

    def strike_update(self, client: int) -> None:
        """An update did not come whole, or cannot be folded: the client may send again."""
        self._clients.discard(client)

    def strike_partial(self, leaf: int) -> None:
        """A partial aggregate did not come whole."""
        self._leaves.discard(leaf)

    def next_round(self) -> None:
        """Close the round and open the next."""
        self.round += 1
        self._clients.clear()
        self._leaves.clear()


# --- the sums ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Received:
    """An update that has come whole."""

    attributes: Attributes
    buffer: UpdateBuffer


@dataclass(frozen=True)
class Partial:
    """Sums of another leaf."""

    sums: memoryview
    weight: float
    delta_weight: float


class Sums:
    """The weighted sums of the open round, in two accumulators used in turn."""

    def __init__(self, function: AggregatorFunction, model: ModelLayout, precision: Precision) -> None:
        """Compiles the kernels and gets the memory. Raises ValueError for a function that cannot be run here."""
        if function.gather or function.server_optimizer is not None:
            raise ValueError(f"{function.name}: gRPC servers here run plain streaming functions only")
        self._function = function
        self._model = model
        self._plan = plan_update(model, model)
        self._fold = Fold(AccumulatorLayout(model, precision))
        self._fold.warm_up()
        self._accumulators = [allocate(self.nbytes), allocate(self.nbytes)]
        self._current = 0
        self._total = Aggregate(1)
        self._is_empty = True
        self._delta_weight = 0.0

    @property
    def nbytes(self) -> int:
        """Size of a partial aggregate."""
        return self._fold.accumulators.nbytes

    def begin(self, round_number: int) -> None:
        """Start from nothing."""
        self._total = Aggregate(round_number)
        self._is_empty = True
        self._delta_weight = 0.0

    def add(self, batch: Sequence[Received]) -> list[Received]:
        """Fold a batch in one pass and return those that cannot be folded, which count for nothing."""
        weight = self._total.weight
        inputs, refused = self._ask(batch)
        if inputs and not self._fold_into_other(inputs):
            culprits = [one for one in batch if one in refused or self._is_not_finite(one)]
            if len(culprits) == len(refused):
                culprits = list(batch)  # each is finite and their sum is not
            for one in culprits:
                log.error("the update of client %d is not finite", one.attributes.sender)
            self._total = Aggregate(self._total.round, weight)
            innocent = [one for one in batch if one not in culprits]
            return culprits + (self.add(innocent) if innocent else [])
        if inputs:
            self._current = 1 - self._current
            self._is_empty = False
        self._delta_weight += sum(one.attributes.delta_weight for one in batch if one not in refused)
        return refused

    def _ask(self, batch: Sequence[Received]) -> tuple[list[Input], list[Received]]:
        """Ask the function what each update counts; return what to fold, and the updates it failed on."""
        refused = []
        for one in batch:
            attributes = one.attributes
            update = ModelUpdate(
                one.buffer.payload,
                self._model,
                self._plan,
                client=f"client-{attributes.sender}",
                round=attributes.round,
                num_samples=attributes.weight,
                is_delta=attributes.delta_weight > 0,
            )
            try:
                self._total.offer(self._function, update)
            except Exception:
                log.exception("%s failed on %r", self._function.name, update)
                refused.append(one)
        inputs = [
            self._fold.update(taken.update.payload, self._plan, taken.weight * taken.scale)
            for taken in self._total.take()
        ]
        return inputs, refused

    def _fold_into_other(self, inputs: Sequence[Input]) -> bool:
        old = None if self._is_empty else self._accumulators[self._current]
        return self._fold.fold(self._accumulators[1 - self._current], inputs, old)

    def _is_not_finite(self, one: Received) -> bool:
        return self._fold.non_finite(one.buffer.payload, self._plan, one.attributes.weight)

    def partial(self) -> Partial:
        """The sums so far, where they are: valid until the next `add`."""
        sums = self._accumulators[self._current]
        if self._is_empty:
            sums[:] = bytes(len(sums))
        return Partial(sums, self._total.weight, self._delta_weight)

    def finish(self, out: memoryview, partials: Sequence[Partial], previous: memoryview) -> None:
        """Merge and divide: write the new model's data section to `out`. Raises ValueError if it is not finite."""
        own = self.partial()
        weight = own.weight + sum(one.weight for one in partials)
        if weight <= 0:
            out[:] = previous
            return
        delta_weight = own.delta_weight + sum(one.delta_weight for one in partials)
        sums = [one.sums for one in (own, *partials) if one.weight > 0]
        if not self._fold.finish(out, sums, weight, previous, delta_weight):
            raise ValueError(f"the model made by round {self._total.round} would not be finite")

"""A simulated node: its workers and the part that it has of a round.

Which aggregator an update goes to and how many inputs each waits for is told by `lifl.control.round.Round`; when
an aggregator folds is what `lifl.worker` does with eager timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lifl.cluster.load import ExecutionEstimate, arrival_rate, limit_rate
from lifl.cluster.messages import JobOrder, NodeLoad
from lifl.control.hierarchy import Hierarchy
from lifl.control.round import AcceptedUpdate, Round
from lifl.messages import EndpointTraffic, endpoint_id
from lifl.worker import EAGER_BATCH, EAGER_LINGER, FOLD_BATCH

from lifl_bench.simulation.control import Outbox
from lifl_bench.simulation.costs import Costs
from lifl_bench.simulation.events import Action, EventLoop
from lifl_bench.simulation.machine import Machine, Work

_FIRST_PARTIAL_SLOT = 1 << 40
"""Slots of partial aggregates are numbered from here on; those of updates are numbered as their clients."""
_CLOCK_SLACK = 1e-9


@dataclass(slots=True, eq=False)
class _Place:
    """How far an aggregator is."""

    index: int
    ready: list[int] = field(default_factory=list)
    """Slots of the inputs that are not being folded yet."""
    ready_since: float = 0.0
    inputs: int = 0
    """Inputs that are sealed."""
    expected: int = -1
    """Inputs of the round; -1 while it is open."""
    is_busy: bool = False
    is_patient: bool = False
    """Something will look whether it has waited long enough."""
    is_done: bool = False


@dataclass(slots=True, eq=False)
class _Sidecar:
    """The kernel's counters of one worker; see `router.bpf.c`."""

    last: int = 0
    mean_of_eight: int = 0

    def count(self, now: int) -> None:
        """A descriptor has passed."""
        if self.last and now > self.last:
            gap = now - self.last
            mean = self.mean_of_eight
            self.mean_of_eight = mean + gap - (mean >> 3) if mean else gap << 3
        self.last = now


@dataclass
class Tally:
    """The workers of all nodes together."""

    worker_s: float = 0.0
    """Their CPU seconds."""
    workers: int = 0
    history: list[tuple[float, int]] = field(default_factory=list)
    """Simulated seconds, and how many workers there are from then on."""

    def change(self, number: int, now: float) -> None:
        """So many more workers, or fewer."""
        self.workers += number
        if self.history and self.history[-1][0] == now:
            self.history.pop()
        self.history.append((now, self.workers))


class Node:
    """One node; what it has to say it tells by calling `on_partial` and `on_model` with itself."""

    def __init__(
        self,
        name: str,
        machine: Machine,
        outbox: Outbox,
        loop: EventLoop,
        costs: Costs,
        work: Work,
        tally: Tally,
    ) -> None:
        self.name = name
        self.machine = machine
        self.outbox = outbox
        self.on_partial: Callable[[Node], None]
        self.on_model: Callable[[Node], None]
        self.order: JobOrder | None = None
        """The newest that it has read."""
        self.seen: dict[str, int] = {}
        self.load_before = NodeLoad()
        """When orders came the last time."""
        self.round: Round | None = None
        self.held_round = 0
        """The round that the model it has starts; 0 without one."""
        self.fetching = 0
        """The same of the model that is on its way; 0 if none is."""
        self.uploads = 0
        """On their way."""
        self.waiting: list[int] = []
        """Clients whose uploads wait for the model."""
        self.last_activity = 0.0
        self.has_news = False
        """There are orders on their way."""
        self.is_watched = False
        """Somebody will look whether it is idle."""
        self._loop = loop
        self._costs = costs
        self._work_of = work
        self._tally = tally
        self._is_top = False
        self._places: list[_Place] = []
        self._staff: dict[int, bool] = {}
        """Places that have a worker, and whether it has joined."""
        self._sidecars: dict[int, _Sidecar] = {}
        self._execution = ExecutionEstimate()
        self._partials = _FIRST_PARTIAL_SLOT
        self._started = self._cold = 0

    @property
    def is_in_use(self) -> bool:
        """Whether it has the job's memory."""
        return bool(self.held_round or self.fetching)

    def is_finishing(self, order: JobOrder) -> bool:
        """Whether it knows that it is the top of the round that another node's order is about."""
        own = self.order
        if own is None or own.role != "top" or own.phase != "closing":
            return False
        return (own.attempt, own.round, own.epoch) == (order.attempt, order.round, order.epoch)

    @property
    def workers(self) -> int:
        """How many it has, those included that are being started."""
        return len(self._staff)

    def load(self) -> NodeLoad:
        """What it tells with a heartbeat."""
        if not self._sidecars:
            return NodeLoad()
        now = self._nanoseconds()
        rows = [
            EndpointTraffic(endpoint_id("worker", index), 0, 0, sidecar.last, sidecar.mean_of_eight >> 3, 0, 0, 0)
            for index, sidecar in self._sidecars.items()
        ]
        present = len(self.round.in_slot) if self.round is not None else 0
        rate = limit_rate(arrival_rate(rows, now), self._execution.seconds, present)
        return NodeLoad(rate, self._execution.seconds, self.workers, 0)

    def _nanoseconds(self) -> int:
        return 1 + int(1e9 * self._loop.now)

    # --- workers -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Open the round that the order tells of, with as many aggregators as it says."""
        order = self.order
        assert order is not None
        self.round = Round(order.round, order.spec, Hierarchy(max(1, order.leaves)), self._loop.now)
        self._is_top = False
        self._started = self._cold = 0
        self._places = [_Place(index) for index in range(self.round.hierarchy.leaves)]

    def end(self) -> tuple[int, int, int]:
        """The round is over: workers started for it, those that an update waited for, roles that were reused."""
        round_ = self.round
        assert round_ is not None
        # A leaf that goes on as its node's middle, and that one as the top, are reused.
        roles = round_.hierarchy.leaves + 1 + bool(round_.remote)
        self.round = None
        return self._started, self._cold, max(0, roles - self._started)

    def wake(self) -> None:
        """Start the workers that are missing, because an update is on its way."""
        missing = [place.index for place in self._places if place.index not in self._staff]
        if not missing:
            return
        self._started += len(missing)
        self._tally.change(len(missing), self._loop.now)
        for index in missing:
            self._staff[index] = False
            self._sidecars[index] = _Sidecar()
            self._compute(self._costs.start_s, self._joined, index)

    def _joined(self, index: int) -> None:
        if index not in self._staff:
            return
        self._staff[index] = True
        if index < len(self._places):
            self._cold += bool(self._places[index].ready)
            self._work(self._places[index])

    def go_idle(self) -> bool:
        """Stop the workers, and give the memory back if nothing of the round is in it; False if it is not idle."""
        round_ = self.round
        if self.uploads or self.fetching:
            return False
        if round_ is not None and (round_.status != "open" or round_.folded != round_.accepted):
            return False
        self._tally.change(-len(self._staff), self._loop.now)
        self._staff.clear()
        self._sidecars.clear()
        if round_ is None or not round_.accepted:
            self.held_round, self.round = 0, None
        return True

    def _compute(self, seconds: float, action: Action, argument: object) -> None:
        self._tally.worker_s += seconds
        self.machine.host.start(self.machine.compute, seconds, action, argument)

    # --- inputs --------------------------------------------------------------------------------------------

    def take(self, client: int, since: float) -> None:
        """An update that counts is in memory: its aggregator is told. `since` is when its upload began."""
        assert self.round is not None
        self.last_activity = now = self._loop.now
        update = self.round.accept(str(client), client, 0, 1.0, since, now)
        self._tell(self._places[update.aggregator], client)

    def take_partial(self, source: str) -> None:
        """The partial aggregate of another node is in memory: the top is told."""
        assert self.round is not None
        self._partials += 1
        partial = self.round.accept_partial(source, self._partials, 0)
        self._tell(self._places[partial.aggregator], self._partials)

    def _tell(self, place: _Place, slot: int) -> None:
        sidecar = self._sidecars.get(place.index)
        if sidecar is not None:
            sidecar.count(self._nanoseconds())
        if not place.ready:
            place.ready_since = self._loop.now
        place.ready.append(slot)
        self._work(place)

    def close_if_ordered(self) -> None:
        """Have every aggregator finish with the inputs that it has, once everything that counts is here."""
        round_, order = self.round, self.order
        if round_ is None or order is None or round_.status != "open" or order.round != round_.number:
            return
        if order.phase != "closing" or not order.role or round_.accepted != order.updates:
            return
        self._is_top = order.role == "top"
        round_.awaited = frozenset(order.partials) if self._is_top else frozenset()
        round_.status = "closing"
        round_.closed_once = True
        self.wake()
        for place in self._places:
            aggregator = round_.aggregators[place.index]
            if aggregator is round_.top or aggregator.updates:
                place.expected = round_.expected_inputs(aggregator)
        for place in self._places:
            self._work(place)

    # --- folding -------------------------------------------------------------------------------------------

    def _work(self, place: _Place) -> None:
        if place.is_busy or place.is_done or not self._staff.get(place.index):
            return
        waiting = len(place.ready)
        if 0 <= place.expected <= place.inputs + waiting:
            if self._is_top and place.index == 0:
                self._fold(place, place.ready)
            elif waiting:
                self._fold(place, place.ready[:FOLD_BATCH])
            else:
                self._send(place)
        elif waiting and self._is_due(place):
            self._fold(place, place.ready[:FOLD_BATCH])
        elif waiting and not place.is_patient:
            place.is_patient = True
            self._loop.at(place.ready_since + EAGER_LINGER, self._patience_over, place)

    def _is_due(self, place: _Place) -> bool:
        waited = self._loop.now - place.ready_since
        return len(place.ready) >= EAGER_BATCH or waited >= EAGER_LINGER - _CLOCK_SLACK

    def _patience_over(self, place: _Place) -> None:
        place.is_patient = False
        self._work(place)

    def _fold(self, place: _Place, batch: list[int]) -> None:
        """One pass over these inputs and the sums so far."""
        place.is_busy = True
        place.ready = place.ready[len(batch) :]
        place.ready_since = self._loop.now
        reads = len(batch) + (place.inputs > 0)
        self._compute(reads * self._work_of.read, self._folded, (place, batch))

    def _folded(self, done: tuple[_Place, list[int]]) -> None:
        place, batch = done
        round_, now = self.round, self._loop.now
        assert round_ is not None  # the model of a round is made of all its inputs, so none is folded after it
        for slot in batch:
            taken = round_.mark_folded(slot, 0, now)
            if isinstance(taken, AcceptedUpdate):
                self._execution.observe(now - taken.counted)
        place.is_busy = False
        place.inputs += len(batch)
        self.last_activity = now
        if self._is_top and place.index == 0 and place.inputs == place.expected:
            place.is_done = True
            self.on_model(self)
        else:
            self._work(place)

    def _send(self, place: _Place) -> None:
        """The partial aggregate goes up: by a descriptor, or from the node's middle to the top's node."""
        place.is_done = True
        if place.index == 0:
            self.on_partial(self)
        else:
            self._loop.at(self._loop.now + self._costs.hop_s, self._take_local_partial)

    def _take_local_partial(self, _: object) -> None:
        self._partials += 1
        self._tell(self._places[0], self._partials)

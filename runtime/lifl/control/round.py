"""One round of a job: which updates count, who folds them, and when it may close. Sans-IO and clock-free.

    open --(goal reached, or quorum after the deadline)--> closing --(global model complete)--> complete

A rejected update (not finite) leaves the count again, so a closing round may wait for one more; such a replacement
always goes to the top, because a leaf that has sent its partial aggregate takes no more.

In an asynchronous job a round is one buffer: it also takes differences to earlier rounds' models. What comes while
it is being closed waits for the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lifl.control.earlier_updates import EarlierUpdates
from lifl.control.hierarchy import Hierarchy
from lifl.control.selection import Selected, select_client
from lifl.descriptor import Kind
from lifl.messages import JobSpec, RoundState, UpdateState
from lifl.staleness import time_of

Admission = Literal["open", "duplicate", "late", "early", "unselected", "closing"]


@dataclass(slots=True, eq=False)
class AcceptedUpdate:
    """One client's update, counted once."""

    client: str
    """Its contributor: see `lifl.staleness.contributor_of`."""
    slot: int
    generation: int
    num_samples: float
    aggregator: int
    started: float
    """Monotonic seconds of its first byte."""
    folded: float = 0.0
    """Monotonic seconds; 0 while it is not folded."""
    rejected: bool = False
    counted: float = 0.0
    """Monotonic seconds at which it was counted."""
    kind = Kind.UPDATE

    @property
    def latency(self) -> float:
        """Seconds from its first byte to folded; 0 while it is not."""
        return self.folded - self.started if self.folded else 0.0

    def state(self) -> UpdateState:
        """The update as the API shows it."""
        return UpdateState(
            client=self.client,
            num_samples=self.num_samples,
            aggregator=self.aggregator,
            status="rejected" if self.rejected else "folded" if self.folded else "accepted",
            first_byte=self.started,
            folded=self.folded,
            latency=self.latency,
        )


@dataclass(slots=True, eq=False)
class RemotePartial:
    """The partial aggregate of another node, which the top folds like an update."""

    source: str
    """Incarnation of that node."""
    slot: int
    generation: int
    aggregator: int
    kind = Kind.PARTIAL


@dataclass
class Aggregator:
    """One place in the tree. Workers may die and be replaced; the place keeps its accumulator slots."""

    index: int
    updates: int = 0
    """Updates assigned and not rejected."""
    folded: int = 0
    delivered: bool = False
    """Its partial aggregate is part of the parent's accumulator."""
    deaths: int = 0
    """Workers that died in this place since it last made progress."""

    @property
    def pending(self) -> int:
        """Updates assigned and not yet folded."""
        return self.updates - self.folded


@dataclass
class Round:
    """The account of one round."""

    number: int
    spec: JobSpec
    hierarchy: Hierarchy
    opened: float
    """Monotonic seconds."""
    status: Literal["open", "closing", "complete"] = "open"
    updates: dict[str, AcceptedUpdate] = field(default_factory=dict)
    in_slot: dict[int, AcceptedUpdate | RemotePartial] = field(default_factory=dict)
    """What is not folded yet, by slot reference: accepted updates, and partial aggregates of other nodes."""
    remote: set[str] = field(default_factory=set)
    """Incarnations whose partial aggregates are here, folded or not."""
    awaited: frozenset[str] = frozenset()
    """Incarnations whose partial aggregates belong to the round, if this node is its top."""
    uplink: int = 0
    """Endpoint of the gateway that takes this node's partial aggregate to the top; 0 on the top itself."""
    log: list[AcceptedUpdate] = field(default_factory=list)
    """Every update that was accepted, in this order, also those that were rejected later."""
    latencies: list[float] = field(default_factory=list)
    """Seconds that the folded updates took, each from its first byte."""
    aggregators: list[Aggregator] = field(default_factory=list)
    rejected_clients: list[str] = field(default_factory=list)
    late: int = 0
    duplicates: int = 0
    first_started: float = 0.0
    """Monotonic seconds of the first byte of the first accepted update; 0 before there is one."""
    act: float = 0.0
    started: int = 0
    reused: int = 0
    cold: int = 0
    """Workers for which an update already waited when they joined."""
    closed_once: bool = False
    """Leaves may have sent their partial aggregates already."""
    earlier: EarlierUpdates = field(default_factory=EarlierUpdates)
    """What was counted in earlier buffers of an asynchronous job."""
    selected: set[str] = field(default_factory=set)
    """Clients that have a place in the round, if the job selects clients."""

    def __post_init__(self) -> None:
        self.aggregators = [Aggregator(index) for index in range(self.hierarchy.leaves)]

    @property
    def accepted(self) -> int:
        """Updates that count."""
        return len(self.updates)

    @property
    def folded(self) -> int:
        """Updates that are part of a sealed accumulator."""
        return sum(aggregator.folded for aggregator in self.aggregators)

    @property
    def weight(self) -> float:
        """Sum of the clients' weights that count."""
        return sum(update.num_samples for update in self.updates.values())

    @property
    def top(self) -> Aggregator:
        """The aggregator that finishes the round."""
        return self.aggregators[self.hierarchy.top]

    @property
    def is_buffer(self) -> bool:
        """It is one of an asynchronous job."""
        return self.spec.mode == "async"

    def judge(self, base: int, contributor: str) -> Admission:
        """Say whether an update trained from the model of round `base` would be taken; counts what is not.

        `closing`: it would be, but the buffer is just being closed, so ask again when the next one is open. In a
        job that selects clients, one that was not selected gets a place if there is one.
        """
        time = time_of(self.spec, base, self.number)
        if time == "open":
            return self.admit(contributor)
        self.late += time == "late"
        return time

    def admit(self, contributor: str) -> Admission:
        """The same for an update whose base is right."""
        if contributor in self.updates or contributor in self.earlier:
            self.duplicates += 1
            return "duplicate"
        if self.status != "open" and self.is_buffer:
            return "closing"
        if self.status != "open":
            self.late += 1
            return "late"
        if self.spec.over_selection and self.select(contributor) == "enough":
            return "unselected"
        return "open"

    def select(self, client: str) -> Selected:
        """Give a client a place in the round, if there is one; for jobs that select clients."""
        return select_client(self.selected, client, self.spec)

    def accept(
        self, client: str, slot: int, generation: int, num_samples: float, started: float, now: float = 0.0
    ) -> AcceptedUpdate:
        """Count an update that `judge` found open, and choose its aggregator: the one with the least to do."""
        candidates = [self.top] if self.closed_once else self.aggregators
        chosen = min(candidates, key=lambda place: (place.pending, place.updates, -place.index))
        update = AcceptedUpdate(client, slot, generation, num_samples, chosen.index, started, counted=now)
        self.updates[client] = update
        self.log.append(update)
        self.in_slot[slot] = update
        chosen.updates += 1
        if not self.first_started or started < self.first_started:
            self.first_started = started
        return update

    def raise_leaves(self, leaves: int) -> bool:
        """Plan more aggregators for what is still to come; True when there are more than before."""
        if self.closed_once or self.status != "open" or leaves <= len(self.aggregators):
            return False
        self.hierarchy = Hierarchy(leaves)
        self.aggregators += [Aggregator(index) for index in range(len(self.aggregators), leaves)]
        return True

    def accept_partial(self, source: str, slot: int, generation: int) -> RemotePartial:
        """Take in the partial aggregate of another node, which the top folds."""
        partial = RemotePartial(source, slot, generation, self.top.index)
        self.in_slot[slot] = partial
        self.remote.add(source)
        return partial

    def mark_folded(self, slot: int, generation: int, now: float) -> AcceptedUpdate | RemotePartial | None:
        """Note that an input is part of a sealed accumulator; None when it is no open one (a repeat)."""
        taken = self._take(slot, generation)
        if taken is None:
            return None
        place = self.aggregators[taken.aggregator]
        place.deaths = 0
        if isinstance(taken, AcceptedUpdate):
            taken.folded = now
            self.latencies.append(taken.latency)
            place.folded += 1
        return taken

    def mark_rejected(self, slot: int, generation: int) -> AcceptedUpdate | None:
        """Take an update out of the count because it is not finite; None when it is no open one."""
        update = self.in_slot.get(slot)
        if not isinstance(update, AcceptedUpdate) or self._take(slot, generation) is None:
            return None
        self.aggregators[update.aggregator].updates -= 1
        del self.updates[update.client]
        update.rejected = True
        self.rejected_clients.append(update.client)
        self.selected.discard(update.client)  # if it cannot do better, another may
        self.status = "open"
        return update

    def _take(self, slot: int, generation: int) -> AcceptedUpdate | RemotePartial | None:
        found = self.in_slot.get(slot)
        if found is None or found.generation != generation:
            return None
        return self.in_slot.pop(slot)

    def unfolded_of(self, aggregator: int) -> list[AcceptedUpdate | RemotePartial]:
        """The inputs that a new worker in this place must be given."""
        return [found for found in self.in_slot.values() if found.aggregator == aggregator]

    def deadline(self) -> float | None:
        """Monotonic time at which the quorum starts to suffice; None when there is no deadline."""
        return self.opened + self.spec.deadline if self.spec.deadline else None

    def try_close(self, now: float) -> bool:
        """Close the round when it has what it needs; True when it closed just now."""
        if self.status != "open" or self.accepted == 0:
            return False
        deadline = self.deadline()
        overdue = deadline is not None and now >= deadline
        needed = (self.spec.quorum or self.spec.goal) if overdue else self.spec.goal
        if self.accepted < needed:
            return False
        self.status = "closing"
        self.closed_once = True
        return True

    def sends_partial(self, place: Aggregator) -> bool:
        """Whether this place sends a partial aggregate: all but the top that have something."""
        return place is not self.top and place.updates > 0

    def expected_inputs(self, place: Aggregator) -> int:
        """Inputs the place has when the round is closed: its updates, for the top also the partials."""
        return place.updates + self.expected_partials(place)

    def expected_partials(self, place: Aggregator) -> int:
        """How many of these are partial aggregates, of this node's leaves and of other nodes."""
        if place is not self.top:
            return 0
        return sum(map(self.sends_partial, self.aggregators)) + len(self.awaited | self.remote)

    def complete(self, now: float) -> None:
        """The global model is there."""
        self.status = "complete"
        self.act = now - self.first_started

    def state(self) -> RoundState:
        """The round as the API shows it."""
        self.latencies.sort()  # cheap the next time: all but the newest are in order
        return RoundState(
            round=self.number,
            status=self.status,
            accepted=self.accepted,
            folded=self.folded,
            rejected=len(self.rejected_clients),
            late=self.late,
            duplicates=self.duplicates,
            weight=self.weight,
            act=self.act,
            leaves=self.hierarchy.leaves,
            started=self.started,
            reused=self.reused,
            rejected_clients=tuple(self.rejected_clients[:100]),
            latency_median=_quantile(self.latencies, 0.5),
            latency_p95=_quantile(self.latencies, 0.95),
            latency_max=_quantile(self.latencies, 1.0),
            cold=self.cold,
            selected=len(self.selected),
        )


def _quantile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed (nearest rank); 0 of nothing."""
    return ascending[max(1, math.ceil(share * len(ascending))) - 1] if ascending else 0.0

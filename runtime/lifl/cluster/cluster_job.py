"""One job of a cluster: its rounds, who has its newest model, and what each node is told about it.

A model passes through three stages. It is *made* when the top has it; *public* when the nodes are told of it and
the next round opens; *stored* when the coordinator has it on disk. Only with `durability: sync` does public wait
for stored. While a model is not stored, the nodes that have it are its holders, and with the last of them it is
lost: the job then goes back to its newest stored model, as another attempt.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Literal

import msgspec

from lifl.cluster.cluster_round import ClusterRound
from lifl.cluster.hierarchy import Candidate, NodePlan, choose_top, plan_cluster
from lifl.cluster.journal import KEPT_ROUNDS, JobRow, Journal, with_reports
from lifl.cluster.members import Member, Members
from lifl.cluster.messages import JobOrder, RoundReport
from lifl.cluster.order_news import OrderNews
from lifl.cluster.placement import PlacementIndex
from lifl.control.earlier_updates import EarlierUpdates
from lifl.control.hierarchy import PendingEstimate, plan_hierarchy
from lifl.messages import JobSpec, JobState, RoundState
from lifl.staleness import oldest_base

Status = Literal["waiting-for-model", "running", "complete", "deleted", "failed"]

NONCE_BITS: Final = 62
"""Of a job's nonce: what the protocol between nodes has room for."""

_TIE_BREAK: Final = 2.0**-20
"""The least difference of residuals that counts."""

_MOST_SOURCES: Final = 4
"""Nodes named to one node as sources of the newest model."""
_TOLD_HOLDERS: Final = frozenset({1, 2, 4, 8, 16, 32})
"""Numbers of holders at which all nodes are told: each copy is there to be read by as many others again."""


class FunctionKind(msgspec.Struct, frozen=True):
    """What a function asks of the platform."""

    is_gathering: bool
    state_arrays: int


@dataclass(eq=False)
class CompleteRound:
    """A round that is over."""

    key: int
    number: int
    attempt: int
    state: RoundState
    reports: dict[str, RoundReport] = field(default_factory=dict)
    """By incarnation."""
    _described: RoundState | None = None

    def add(self, incarnation: str, report: RoundReport) -> None:
        """Take in what the round took on a node; a repeat changes nothing."""
        self.reports[incarnation] = report
        self._described = None

    def described(self) -> RoundState:
        """With what the nodes have reported so far."""
        if self._described is None:
            self._described = with_reports(self.state, self.reports.values())
        return self._described


@dataclass(eq=False)
class ClusterJob:
    """State of one job. Whoever changes it bumps the version of the orders that change with it."""

    key: int
    """Its row of the journal."""
    spec: JobSpec
    journal: Journal
    members: Members
    news: OrderNews
    kinds: Mapping[str, FunctionKind]
    """What is known of functions."""
    nonce: int = field(default_factory=lambda: secrets.randbits(NONCE_BITS))
    status: Status = "waiting-for-model"
    detail: str = ""
    attempt: int = 0
    round: ClusterRound | None = None
    """The open round, or the one whose model waits for being public."""
    model_round: int = 0
    """The round that the newest public model starts."""
    made_round: int = 0
    """The round that the newest model of all starts."""
    checkpointed_round: int = 0
    checkpoints: list[int] = field(default_factory=list)
    """Rounds whose starting model is stored, ascending."""
    maker: str = ""
    """Incarnation that made the newest model: it has the server optimiser's arrays too."""
    holders: dict[str, None] = field(default_factory=dict)
    """Members that have the newest model, in the order in which they said so."""
    broken: dict[str, str] = field(default_factory=dict)
    """Why, for each incarnation that can do no more for the job."""
    recent: list[CompleteRound] = field(default_factory=list)
    """The last complete rounds, oldest first."""
    counted_before: dict[str, str] = field(default_factory=dict)
    """Incarnation of each client's update in the last complete round: a repeated question is answered alike."""
    counted_in: dict[int, list[str]] = field(default_factory=dict)
    """In an asynchronous job, contributors by the complete round they count in, as far as it matters: also for a
    job that goes back to its newest stored model."""
    earlier: EarlierUpdates = field(default_factory=EarlierUpdates)
    """What these contributors are for the open round."""
    version: int = 0
    """Of what all nodes are told alike."""
    versions: dict[str, int] = field(default_factory=dict)
    """Later versions of single nodes' orders, by incarnation."""
    unaware: set[str] = field(default_factory=set)
    """Incarnations that have not seen yet that the job was deleted."""
    is_retired: bool = False
    """It was deleted, and everybody knows."""
    index: PlacementIndex = field(default_factory=PlacementIndex)
    """The nodes that take its updates."""
    planned_leaves: dict[str, int] = field(default_factory=dict)
    """By incarnation."""
    is_awake: bool = True
    """Clients use it; after a restart, that is not known, and so they do."""
    last_activity: float | None = None
    """Monotonic seconds at which a client was last heard of; None until somebody looks at the clock."""
    woken: float | None = None
    """Monotonic seconds at which a client was first heard of since it was idle or made."""
    needed: dict[str, None] = field(default_factory=dict)
    """Incarnations of the nodes that its function should be on while it is awake."""
    _planned: dict[str, None] = field(default_factory=dict)
    """Nodes that the plan would have if the function were on all of them."""
    _most_planned: int = 0
    """The largest number of these since it woke up."""
    home_node: str = ""
    """Of a shard: incarnation of the node that takes all of its updates; empty while there is none."""
    pending: PendingEstimate = field(init=False)

    def __post_init__(self) -> None:
        self.pending = PendingEstimate(self.spec.smoothing)

    @property
    def name(self) -> str:
        """The job's name."""
        return self.spec.name

    @property
    def kind(self) -> FunctionKind | None:
        """What its function asks of the platform; None until a node has imported it."""
        return self.kinds.get(self.spec.function)

    @property
    def gathers(self) -> bool:
        """Its function needs all updates of a round on one node."""
        return self.kind is not None and self.kind.is_gathering

    @property
    def has_state(self) -> bool:
        """Its server optimiser keeps arrays from round to round: the top stays where they are."""
        return self.kind is not None and self.kind.state_arrays > 0

    @property
    def last(self) -> CompleteRound | None:
        """The last complete round."""
        return self.recent[-1] if self.recent else None

    # --- versions of orders ----------------------------------------------------------------------------------

    def tell_all(self) -> int:
        """Every node's order changes; the new version."""
        self.version = self.news.for_all()
        self.versions.clear()
        return self.version

    def tell(self, member: str) -> int:
        """One node's order changes; the new version."""
        version = self.versions[member] = self.news.for_one(member)
        return version

    def version_for(self, member: str) -> int:
        """Version of a node's order."""
        return self.versions.get(member, self.version)

    # --- where updates go ------------------------------------------------------------------------------------

    def takes_part(self, member: Member) -> bool:
        """Whether a node can do anything for the job."""
        is_able = member.is_member and member.incarnation not in self.broken
        return is_able and member.may_have_function(self.spec.function)

    def may_need(self, member: Member) -> bool:
        """Whether a node may get updates once the function is there."""
        return self.takes_part(member) and not self.members.is_draining(member)

    def may_place(self, member: Member) -> bool:
        """Whether a node may get updates."""
        return self.may_need(member) and member.has_function(self.spec.function)

    def residual_of(self, member: Member) -> float:
        """What a node can still take, for the choice of one.

        Of nodes that are equally empty `worst-fit` shall take the one with the fewest updates of the round. The
        other policies choose one of those that fit, and what fits is not to depend on this.
        """
        if self.spec.placement != "worst-fit" or self.round is None:
            return member.residual
        return member.residual - self.round.updates_of(member.incarnation) * _TIE_BREAK

    def note_residual(self, member: Member) -> None:
        """Take account of another residual capacity of a node."""
        if member.incarnation in self.index:
            self.index.set_residual(member.incarnation, self.residual_of(member))

    def reindex(self, member: Member) -> None:
        """Take account of a change of what a node can do."""
        if self.may_place(member):
            self.index.add(member.incarnation, self.residual_of(member))
        else:
            self.index.remove(member.incarnation)

    def reindex_all(self) -> None:
        """Find all nodes anew, in the order in which they joined; one item is what is placed at once."""
        size = self.spec.goal if self.gathers else 1
        able = sorted((member for member in self.members.living if self.may_place(member)), key=_key)
        self.index = PlacementIndex({member.incarnation: self.residual_of(member) for member in able}, size=size)

    @property
    def is_shard(self) -> bool:
        """It is one of the shards of another job."""
        return self.spec.shard_of != ""

    def home(self) -> str:
        """The one node that takes the round's updates, once there is one: the top of a round that was opened once
        more, where a gathering function has the first of them, or a shard's."""
        if self.is_shard:
            return self.home_node
        assert self.round is not None
        if self.round.is_reopened:
            return self.round.top
        if self.gathers:
            first = next(iter(self.round.placements.values()), None)
            return next(iter(self.round.shares), first.member if first is not None else "")
        return ""

    def choose_top(self, updates: Mapping[str, int]) -> str:
        """The node that finishes a round with this many updates on each: where most are, or where the state is.

        All updates of a shard are on one node, and partial aggregates of it never travel.
        """
        if self.is_shard:
            return choose_top(updates)
        maker = self.members.find(self.maker) if self.maker else None
        if self.has_state and maker is not None and self.may_place(maker):
            return maker.incarnation
        staying = {m: n for m, n in updates.items() if self._may_place(m)} or updates
        # Of equal ones the first is taken: the node that made the newest model, then the one that joined first.
        order = sorted(staying, key=lambda incarnation: (incarnation != self.maker, self._key_of(incarnation)))
        return choose_top({incarnation: staying[incarnation] for incarnation in order})

    def _may_place(self, incarnation: str) -> bool:
        member = self.members.find(incarnation)
        return member is not None and self.may_place(member)

    def _key_of(self, incarnation: str) -> int:
        member = self.members.find(incarnation)
        return member.key if member is not None else 0

    # --- leaves ----------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Plan the aggregators of a round that opens, for as many updates as rounds have had lately."""
        self._plan(self.pending.observe(self.last.state.accepted if self.last else self.spec.goal))

    def replan(self) -> None:
        """Plan anew because the function has come to a node, or gone. What a round has already stays as it is."""
        pending = self.pending.value
        if self.round is not None and pending is not None and not self.used:
            self._plan(pending)
        else:
            self.plan_needs(self.spec.goal if pending is None else pending)

    def _plan(self, pending: float) -> None:
        able = [member for member in self.members.living if self.may_place(member)]
        if self.is_shard:
            able = [member for member in able if member.incarnation == self.home_node]
        self.planned_leaves = {plan.node: plan.leaves for plan in self._tree(pending, able)}
        self.plan_needs(pending)

    def _tree(self, pending: float, able: list[Member]) -> Iterable[NodePlan]:
        able.sort(key=_key)
        candidates = [Candidate(m.incarnation, max(1, m.registration.cores), m.residual) for m in able]
        if not candidates:
            return ()
        policy, per_leaf = self.spec.placement, self.spec.updates_per_leaf
        return plan_cluster(pending, candidates, policy, per_leaf, gather=self.gathers).nodes

    # --- where the function should be ----------------------------------------------------------------------------

    @property
    def used(self) -> Mapping[str, None]:
        """Nodes that have updates of the open round, or are about to get some, or finish it."""
        round_ = self.round
        if round_ is None or round_.is_complete:
            return {}
        used = dict.fromkeys(share.member for share in round_.shares.values() if not share.is_gone)
        used |= dict.fromkeys(member for member, clients in round_.placed_on.items() if clients)
        return used | dict.fromkeys([round_.top] if round_.top else [])

    def plan_needs(self, pending: float) -> None:
        """Find how many nodes would have updates if the function were on all that may need it."""
        if self.members.do_attach:
            able = [member for member in self.members.living if self.may_need(member)]
            self._planned = dict.fromkeys(plan.node for plan in self._tree(pending, able))
        else:
            self._planned = dict.fromkeys(self.planned_leaves)
        self._most_planned = max(self._most_planned, len(self._planned))
        self.renew_needs()

    def renew_needs(self) -> None:
        """Find which nodes these are: those that are used, those that have the function, those of the plan."""
        used = self.used
        count = max(len(used), self._most_planned)
        if not self.members.do_attach:
            self.needed = {**used, **self._planned}
            return
        able = sorted((member for member in self.members.living if self.may_need(member)), key=_key)
        having = [member.incarnation for member in able if member.has_function(self.spec.function)]
        kept = [name for name in having if name in self.needed or name in self._planned]
        order = dict.fromkeys([*used, *kept, *having, *self._planned, *(member.incarnation for member in able)])
        self.needed = dict.fromkeys(islice(order, count))

    def need(self, member: Member) -> None:
        """A node is used that was not expected to be: it takes the place of one that is not used yet."""
        if self.members.do_attach:
            self.renew_needs()
        else:
            self.needed[member.incarnation] = None

    def sleep(self) -> None:
        """No client uses it any more."""
        self.is_awake = False
        self._most_planned = len(self._planned)

    def raise_leaves(self, member: Member) -> bool:
        """Plan more aggregators on a node that has got more updates than were expected; True when it gets some."""
        assert self.round is not None
        cores = max(1, member.registration.cores)
        updates = self.round.updates_of(member.incarnation)
        leaves = plan_hierarchy(updates, self.spec.updates_per_leaf, cores, gather=self.gathers).leaves
        if leaves <= self.planned_leaves.get(member.incarnation, 1):
            return False
        self.planned_leaves[member.incarnation] = leaves
        return True

    # --- the newest model ------------------------------------------------------------------------------------

    def made(self, round_number: int, maker: str) -> None:
        """A node has made the model that starts this round."""
        self.made_round = round_number
        self.maker = maker
        self.holders.clear()
        self.journal.clear_holders(self.key)
        self.add_holder(maker)

    def add_holder(self, incarnation: str) -> bool:
        """A node has the newest model; True when all nodes are to hear of one source more."""
        member = self.members.find(incarnation)
        if member is None or incarnation in self.holders:
            return False
        self.holders[incarnation] = None
        self.journal.add_holder(self.key, member.key)
        return len(self.holders) in _TOLD_HOLDERS

    def remove_holder(self, member: Member) -> bool:
        """A holder is lost; True when it was one, perhaps named to others as a source."""
        if member.incarnation not in self.holders:
            return False
        del self.holders[member.incarnation]
        self.journal.remove_holder(self.key, member.key)
        return True

    def sources(self) -> list[Member]:
        """Members that have the newest model, not more than need be named."""
        found = map(self.members.find, islice(self.holders, max(_TOLD_HOLDERS)))
        return [member for member in found if member is not None]

    @property
    def needs_checkpoint(self) -> bool:
        """The newest model is not stored."""
        return self.made_round > self.checkpointed_round and self.status != "deleted"

    def is_lost(self) -> bool:
        """Nobody has the newest model any more."""
        return self.needs_checkpoint and not self.holders

    def stored(self, round_number: int) -> list[int]:
        """A model is on the disk; the rounds whose checkpoints are not to be kept any longer."""
        if round_number not in self.checkpoints:
            self.checkpoints = sorted([*self.checkpoints, round_number])
        self.journal.add_checkpoint(self.key, round_number)
        self.checkpointed_round = max(self.checkpointed_round, round_number)
        keep = self.spec.keep_checkpoints
        surplus = self.checkpoints[:-keep] if keep else []
        for number in surplus:
            self.journal.remove_checkpoint(self.key, number)
        self.checkpoints = self.checkpoints[len(surplus) :]
        self.touch()
        return surplus

    # --- rounds ----------------------------------------------------------------------------------------------

    def open_round(self, number: int, now: float) -> None:
        """Open a round."""
        key = self.journal.new_key("rounds")
        before = self.round
        self.round = ClusterRound(
            key, self.key, number, self.attempt, self.spec, now, self.journal, earlier=self.earlier
        )
        self.round.touch()
        for incarnation in before.shares if before is not None else ():
            member = self.members.find(incarnation)
            if member is not None:
                self.note_residual(member)
        self.plan()
        self.touch()

    def remember(self, round_: ClusterRound, state: RoundState) -> None:
        """Take a round that is complete into the history."""
        self.recent.append(CompleteRound(round_.key, round_.number, round_.attempt, state))
        del self.recent[:-KEPT_ROUNDS]
        self.counted_before = {client: update.member for client, update in round_.updates.items()}
        self.remember_counted(round_.number, round_.updates)
        self.journal.save_state(round_.key, state)

    def remember_counted(self, round_number: int, contributors: Iterable[str]) -> None:
        """Note what counts in a complete round of an asynchronous job, as long as it may be sent again."""
        if self.spec.mode != "async":
            return
        names = self.counted_in[round_number] = list(contributors)
        self.earlier.add(names)
        self.earlier.forget_before(oldest_base(self.spec, round_number + 1))
        for number in [number for number in self.counted_in if number < self.oldest_counted]:
            del self.counted_in[number]

    @property
    def oldest_counted(self) -> int:
        """The first round whose contributors matter, if the job went back to its newest stored model now."""
        return oldest_base(self.spec, max(1, self.checkpointed_round))

    def roll_back(self, now: float, first: int = 0) -> list[int]:
        """Go back to the newest stored model: what was made of it since is lost.

        With `first` to the stored model that starts this round, as if those after it had never been stored.
        Returns the rounds of which that is so.
        """
        first = first or self.checkpointed_round
        beyond = [number for number in self.checkpoints if number > first]
        for number in beyond:
            self.journal.remove_checkpoint(self.key, number)
        self.checkpoints = self.checkpoints[: len(self.checkpoints) - len(beyond)]
        self.checkpointed_round = first
        self.journal.undo_rounds(self.key, first)
        self.attempt += 1
        # Models of undone rounds may be in clients' caches: their ETags must not match the new ones.
        self.nonce = secrets.randbits(NONCE_BITS)
        self.holders.clear()
        self.journal.clear_holders(self.key)
        self.maker = ""
        self.recent = [complete for complete in self.recent if complete.number < first]
        self.counted_before.clear()
        kept = [(number, names) for number, names in self.counted_in.items() if number < first]
        self.counted_in.clear()
        self.earlier = EarlierUpdates()
        for number, names in kept:
            self.remember_counted(number, names)
        self.model_round = self.made_round = first
        self.status = "running"
        self.open_round(first, now)
        return beyond

    # --- what others see -------------------------------------------------------------------------------------

    def order_for(self, member: Member, own_address: str) -> JobOrder:
        """How the job stands, and what a node is to do. `own_address` is where the coordinator has models."""
        round_ = self.round if self.status == "running" else None
        incarnation = member.incarnation
        phase, role = round_.role_of(incarnation) if round_ is not None else ("open", "")
        top = self.members.find(round_.top) if round_ is not None and round_.top else None
        last = self.last
        return JobOrder(
            job=self.name,
            version=self.version_for(incarnation),
            spec=self.spec,
            nonce=self.nonce,
            status=self.status,
            detail=self.detail,
            round=round_.number if round_ is not None else 0,
            model_round=self.model_round,
            attempt=self.attempt,
            epoch=round_.epoch if round_ is not None else 0,
            model_sources=self._model_sources(member, own_address),
            state_sources=self._state_sources(own_address),
            phase=phase,
            role=role,
            top=top.registration.peer_address if top is not None else "",
            updates=round_.updates_of(incarnation) if round_ is not None else 0,
            partials=round_.partials() if round_ is not None and role == "top" else (),
            leaves=self.planned_leaves.get(incarnation, 1),
            accepted=round_.accepted if round_ is not None else 0,
            last=last.described() if last is not None else None,
            checkpointed_round=self.checkpointed_round,
        )

    def _model_sources(self, member: Member, own_address: str) -> tuple[str, ...]:
        # While the newest model is not public yet, who has the one before is not kept.
        holders = self.sources() if self.made_round == self.model_round else []
        others = [holder for holder in holders if holder is not member]
        # Different nodes begin with different sources, so that no one has to feed all.
        start = member.key % len(others) if others else 0
        addresses = [holder.registration.peer_address for holder in others[start:] + others[:start]]
        own = [own_address] if self.checkpointed_round == self.model_round and self.model_round else []
        return (*addresses[:_MOST_SOURCES], *own)

    def _state_sources(self, own_address: str) -> tuple[str, ...]:
        if not self.has_state or self.model_round <= 1:  # the initial model comes without: it begins with zeros
            return ()
        maker = self.members.find(self.maker) if self.made_round == self.model_round else None
        addresses = [maker.registration.peer_address] if maker is not None and maker.is_member else []
        own = [own_address] if self.checkpointed_round == self.model_round and self.model_round else []
        return (*addresses, *own)

    def state(self, data_plane: str, workers: int) -> JobState:
        """The job as the API shows it; data planes and workers are those of the whole cluster."""
        is_running = self.status == "running" and self.round is not None
        last = self.last
        return JobState(
            job=self.name,
            status=self.status,
            round=self.round.number if is_running and self.round is not None else 0,
            model_round=self.model_round,
            spec=self.spec,
            data_plane=data_plane,
            nonce=self.nonce,
            current=self.round.state(self.name_of) if is_running and self.round is not None else None,
            last=last.described() if last is not None else None,
            checkpointed_round=self.checkpointed_round,
            workers=workers,
            detail=self.detail,
        )

    def name_of(self, incarnation: str) -> str:
        """The name of the node that has, or had, an incarnation."""
        member = self.members.find(incarnation)
        return member.name if member is not None else incarnation

    # --- the journal -----------------------------------------------------------------------------------------

    def touch(self) -> None:
        """Have the job's row written with the next commit."""
        self.journal.touch(("job", self.key), self.row)

    def row(self) -> JobRow:
        """The row as it is now."""
        return JobRow(
            key=self.key,
            name=self.name,
            spec=msgspec.json.encode(self.spec),
            nonce=self.nonce,
            status=self.status,
            detail=self.detail,
            attempt=self.attempt,
            round=self.round.number if self.round is not None else 0,
            model_round=self.model_round,
            made_round=self.made_round,
            checkpointed_round=self.checkpointed_round,
            maker=self.maker,
            is_retired=self.is_retired,
        )


def _key(member: Member) -> int:
    return member.key

"""The nodes of a cluster as its coordinator knows them: who is a member, until when, and how much it can take.

A lease runs from the arrival of a node's last request, on the coordinator's monotonic clock alone. An incarnation
that has ended, because its lease ran out, it left, or another took its name, is never a member again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from lifl.cluster.journal import Journal
from lifl.cluster.load import residual_capacity
from lifl.cluster.messages import MemberAnswer, NodeLoad, Register
from lifl.errors import Refused

Ending = Literal["lost", "left", "replaced"]

MEMBER: Final = "member"


class Expired(Refused):
    """The incarnation is a member no more: all that it holds of open rounds is void."""

    def __init__(self, detail: str) -> None:
        super().__init__(410, "Lease is over", detail)


@dataclass(slots=True, eq=False)
class Member:
    """One incarnation of a node."""

    key: int
    """Its row of the journal."""
    registration: Register
    last_heard: float
    """Monotonic seconds."""
    state: str = MEMBER
    load: NodeLoad = field(default_factory=NodeLoad)
    placed: int = 0
    """Updates that were placed on it and are not counted yet."""
    seen: dict[str, int] = field(default_factory=dict)
    """Version of each job's order that it has carried out."""
    farewells: dict[str, int] = field(default_factory=dict)
    """Version of the order by which it was told that there is no such job."""
    told: tuple[bool, int] = (False, 0)
    """Whether it drains, and how often it was asked to calibrate, as it was last told."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why, for each function that cannot be imported on it."""
    attached: frozenset[str] | None = None
    """Functions that are there, if they come from outside; None before this life of the coordinator was told."""
    sequence: int = 0
    """Number of its newest request with messages; in memory only, as is the next."""
    answers: list[MemberAnswer] = field(default_factory=list)
    """What that request was answered."""

    @property
    def name(self) -> str:
        """The node's name."""
        return self.registration.name

    @property
    def incarnation(self) -> str:
        """Tells this life of the node from every other."""
        return self.registration.incarnation

    @property
    def is_member(self) -> bool:
        """Whether it still is one."""
        return self.state == MEMBER

    @property
    def residual(self) -> float:
        """Updates that it can still take (RC)."""
        return residual_capacity(self.registration.capacity, self.load, self.placed)

    @property
    def functions(self) -> Iterable[str]:
        """Functions that it is known to have."""
        return self.registration.functions if not self.registration.attaches else self.attached or ()

    def may_have_function(self, function: str) -> bool:
        """Whether it can run a function, perhaps only once its pod is there. One that names none does not limit
        which."""
        known = self.registration.functions
        return (not known or function in known) and function not in self.failures

    def has_function(self, function: str) -> bool:
        """Whether it can run a function now. What a node had before the coordinator's start it has until it
        tells otherwise."""
        is_here = not self.registration.attaches or self.attached is None or function in self.attached
        return is_here and self.may_have_function(function)


@dataclass(slots=True)
class NodeWishes:
    """What the operator asked of a node, whichever its incarnation."""

    is_draining: bool = False
    calibrate: int = 0


class Members:
    """All incarnations there were, and which of them are members now."""

    def __init__(self, journal: Journal, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._journal = journal
        self._all: dict[str, Member] = {}
        self._by_key: dict[int, Member] = {}
        self._living: OrderedDict[str, Member] = OrderedDict()
        """By incarnation, the one that was silent for the longest time first."""
        self._attaching = 0
        self._current: dict[str, Member] = {}
        """The newest incarnation of each name, living or not."""
        self._wishes: dict[str, NodeWishes] = {}

    def restore(self, now: float) -> None:
        """Read the members from the journal and give each a full lease."""
        for row in self._journal.members():
            self._add(Member(row.key, row.registration(), now, row.state))
        for name, is_draining, calibrate in self._journal.nodes():
            self._wishes[name] = NodeWishes(is_draining, calibrate)
        for key, function, detail in self._journal.failures():
            self._by_key[key].failures[function] = detail

    def _add(self, member: Member) -> None:
        self._all[member.incarnation] = member
        self._by_key[member.key] = member
        self._current[member.name] = member
        if member.is_member:
            self._living[member.incarnation] = member
            self._attaching += member.registration.attaches

    # --- who is there ----------------------------------------------------------------------------------------

    @property
    def all(self) -> Iterable[Member]:
        """Every incarnation there was."""
        return self._all.values()

    @property
    def living(self) -> Iterable[Member]:
        """The members."""
        return self._living.values()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._living)

    @property
    def nodes(self) -> Iterable[Member]:
        """The newest incarnation of every node that ever joined."""
        return self._current.values()

    def find(self, incarnation: str) -> Member | None:
        """An incarnation that is or was a member."""
        return self._all.get(incarnation)

    def by_key(self, key: int) -> Member:
        """The incarnation of a row of the journal."""
        return self._by_key[key]

    def node(self, name: str) -> Member:
        """The newest incarnation of a node; raises Refused 404 for a name that never joined."""
        member = self._current.get(name)
        if member is None:
            raise Refused(404, "no such node", f"no node {name!r} has joined the cluster")
        return member

    def is_member(self, incarnation: str) -> bool:
        """Whether an incarnation is a member now."""
        return incarnation in self._living

    def wishes(self, name: str) -> NodeWishes:
        """What the operator asked of a node."""
        return self._wishes.setdefault(name, NodeWishes())

    @property
    def do_attach(self) -> bool:
        """Whether functions come to any of them from outside."""
        return self._attaching > 0

    def is_draining(self, member: Member) -> bool:
        """Whether the node is to get no more updates."""
        wishes = self._wishes.get(member.name)
        return wishes is not None and wishes.is_draining

    def save_wishes(self, name: str) -> None:
        """Write what the operator asked to the journal."""
        wishes = self.wishes(name)
        self._journal.save_node(name, wishes.is_draining, wishes.calibrate)

    # --- joining, staying and leaving ------------------------------------------------------------------------

    def join(self, registration: Register, now: float) -> Member | None:
        """Make a node a member; None when this incarnation is one already.

        Raises Expired for an incarnation that was one. The caller has ended the node's former one.
        """
        known = self._all.get(registration.incarnation)
        if known is not None:
            if not known.is_member or known.name != registration.name:
                raise Expired("this incarnation was a member before; register with another one")
            self.renew(known, now)
            return None
        member = Member(self._journal.new_key("members"), registration, now)
        member.attached = frozenset()
        self._add(member)
        self.save(member)
        return member

    def require(self, name: str, incarnation: str, now: float) -> Member:
        """The member that sends a request; renews its lease. Raises Expired if it is none."""
        member = self._living.get(incarnation)
        if member is None or member.name != name:
            raise Expired("this incarnation is not a member; register with another one")
        self.renew(member, now)
        return member

    def renew(self, member: Member, now: float) -> None:
        """Start the lease anew."""
        member.last_heard = max(member.last_heard, now)
        self._living.move_to_end(member.incarnation)

    def renew_all(self, now: float) -> None:
        """Start every lease anew: the coordinator itself could not hear anything for a while."""
        for member in self._living.values():
            member.last_heard = now

    def end(self, member: Member, how: Ending) -> None:
        """Let a member be one no more."""
        member.state = how
        member.seen.clear()
        del self._living[member.incarnation]
        self._attaching -= member.registration.attaches
        self.save(member)

    def expired(self, now: float) -> list[Member]:
        """The members whose lease is over."""
        over = []
        for member in self._living.values():
            if now < member.last_heard + self.lease_seconds:
                break
            over.append(member)
        return over

    def next_expiry(self) -> float | None:
        """When the next lease ends if nothing is heard; None without members."""
        first = next(iter(self._living.values()), None)
        return first.last_heard + self.lease_seconds if first is not None else None

    # --- what changes ----------------------------------------------------------------------------------------

    def set_capacity(self, member: Member, capacity: float) -> None:
        """Note another capacity than the one it registered with, which only a calibration can find."""
        if capacity > 0 and capacity != member.registration.capacity:
            registration = msgspec.structs.replace(member.registration, capacity=capacity, is_calibrated=True)
            member.registration = registration
            self.save(member)

    def set_failure(self, member: Member, function: str, detail: str) -> None:
        """Note that a function cannot be imported on the node."""
        member.failures[function] = detail
        self._journal.save_failure(member.key, function, detail)

    def clear_failure(self, member: Member, function: str) -> None:
        """A function can be imported after all: another version of it has come."""
        if member.failures.pop(function, None) is not None:
            self._journal.clear_failure(member.key, function)

    def save(self, member: Member) -> None:
        """Write a member to the journal."""
        self._journal.save_member(member.key, member.state, member.registration)

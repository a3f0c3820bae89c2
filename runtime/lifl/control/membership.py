"""What a member of a cluster knows of one job beyond its own part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lifl.cluster.messages import JobOrder
from lifl.messages import Problem

Prepared = Callable[[Problem | None], None]
"""Called when the open round can be worked on here, or with what stands against it."""


@dataclass
class Membership:
    """One job of a cluster on one of its nodes; `lifl.control.member` changes it."""

    order: JobOrder
    """How things shall be, as the coordinator last said."""
    held_round: int = 0
    """The round whose starting model is in this node's memory; 0 for none."""
    held_state_round: int = 0
    """The same for the server optimiser's arrays."""
    is_fetching: bool = False
    """A model is on its way into memory, or the memory is being made."""
    is_retrying: bool = False
    """What could not be fetched will be asked for again in a moment."""
    told_problem: str = ""
    """Why it could not be fetched, as was written to the log."""
    is_offering: bool = False
    """The coordinator was told that the round's model is made, and has not answered."""
    applied: tuple[object, ...] = ()
    """What the aggregators were last told of the round's end."""
    waiting: list[Prepared] = field(default_factory=list)
    """Who waits for the open round to be ready here."""
    counting: dict[int, int] = field(default_factory=dict)
    """Updates that the coordinator was asked to count: generation by slot reference."""
    has_postponed: bool = False
    """Updates wait here for the next buffer of an asynchronous job: its model is fetched for them."""
    ask_after: int = 0
    """Version of the order before which updates wait that came while a buffer was being closed."""
    ask_part_after: dict[int, int] = field(default_factory=dict)
    """Of a shard: version of the order before which a part of an update waits, by slot reference."""
    undelivered: int = 0
    """Partial aggregates that are here and of which the coordinator has not said that it knows."""
    is_used: bool = True
    """The last round had updates here: then the next model is fetched before anybody asks for it."""
    received_bytes: int = 0
    """From other nodes, for the open round."""

    @property
    def may_count(self) -> bool:
        """Whether the coordinator may be asked to count updates, as far as this node has heard."""
        return self.order.version >= self.ask_after and self.order.phase == "open"

    def waits_for_parts(self, slot: int) -> bool:
        """Whether it is too early to ask again about the part of an update in this slot."""
        return self.order.version < self.ask_part_after.get(slot, 0)

    @property
    def wants_model(self) -> bool:
        """Whether somebody here will use the newest model."""
        return self.is_used or self.has_postponed or bool(self.waiting)

    @property
    def is_closing(self) -> bool:
        """Whether this node is to finish its part of the open round."""
        return self.order.phase == "closing" and bool(self.order.role)

    @property
    def is_top(self) -> bool:
        """Whether this node finishes the round for all."""
        return self.order.role == "top"

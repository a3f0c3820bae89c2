"""One round of a job over the nodes of a cluster: which updates count, where they are, when the round may close.

    open --(goal, or quorum after the deadline)--> closing --(ModelMade of the top)--> complete
      ^                                              |
      `----- open again, because updates were lost --'

Each node's part is its *share*. When the round closes one node becomes the top, the others send it their partial
aggregates. A share whose node is lost is in one of three states. It was never asked for: it is dropped. It was
delivered: it counts. Or nobody here knows whether the top has it: it is *fenced*. The top is told that it
belongs to the round no more, and is dropped only when the top has acknowledged that without having it.

In an asynchronous job a round is one buffer. What comes while it is being closed waits for the next one, and what
counted in an earlier one is a duplicate. Updates go by their contributors' names then (`lifl.staleness`).

The round knows no clock but the `now` it is given, and writes what it does to the journal's buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from lifl.cluster.journal import COUNTED, DROPPED, REJECTED, Journal, RoundRow
from lifl.cluster.messages import NodeRole, Phase
from lifl.control.earlier_updates import EarlierUpdates
from lifl.control.selection import Selected, select_client
from lifl.errors import Busy, Refused
from lifl.messages import JobSpec, RoundState

Verdict = Literal["open", "accepted", "duplicate", "late", "unselected", "closing"]
"""`closing`: in an asynchronous job, one for the next round."""

ChooseTop = Callable[[Mapping[str, int]], str]
"""Chooses the top from the number of updates that each incarnation has."""

_SHOWN_CLIENTS: Final = 100


@dataclass(slots=True, eq=False)
class CountedUpdate:
    """One client's update that counts."""

    client: str
    member: str
    """Incarnation of the node that has it."""
    num_samples: float
    sequence: int
    """Its row of the journal."""


@dataclass(slots=True, eq=False)
class Share:
    """What one node has of the round: at least one update."""

    member: str
    key: int
    """The member's row of the journal."""
    updates: int = 0
    clients: list[str] = field(default_factory=list)
    """Whose updates were counted here; some may be elsewhere by now."""
    is_called: bool = False
    """The node was told to send its partial aggregate to the present top."""
    is_delivered: bool = False
    """The present top has the partial aggregate."""
    is_gone: bool = False
    """The node is lost, or can do nothing more for the job."""
    fence: int = 0
    """Version of the order that tells the top not to wait for it; 0 when it is not fenced."""


@dataclass(slots=True, eq=False)
class Placement:
    """An update on its way."""

    member: str
    since: float
    """Monotonic seconds."""


@dataclass(eq=False)
class ClusterRound:
    """The account of one round."""

    key: int
    """Its row of the journal."""
    job_key: int
    number: int
    attempt: int
    spec: JobSpec
    opened: float
    """Monotonic seconds."""
    journal: Journal
    is_complete: bool = False
    phase: Phase = "open"
    epoch: int = 0
    top: str = ""
    """Incarnation of the node that finishes the round; empty before it was closed."""
    updates: dict[str, CountedUpdate] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)
    placements: dict[str, Placement] = field(default_factory=dict)
    """By client, oldest first; in memory only. `lifl.cluster.placements` keeps this and the next."""
    placed_on: dict[str, set[str]] = field(default_factory=dict)
    """Clients whose updates are on their way to a node, by its incarnation."""
    next_sequence: int = 1
    forgiven: int = 0
    """Updates rejected while closing, which nobody waits to have replaced."""
    late: int = 0
    duplicates: int = 0
    lost: int = 0
    rejected: int = 0
    rejected_clients: list[str] = field(default_factory=list)
    first: float = 0.0
    """Monotonic seconds at which the first accepted update was placed or counted."""
    weight: float = 0.0
    """Sum of the weights that count; exact once the round is complete."""
    act: float = 0.0
    fenced: int = 0
    """Updates in fenced shares."""
    is_short: bool = False
    """The round is closing but lacks updates if the fenced shares are not in it."""
    earlier: EarlierUpdates = field(default_factory=EarlierUpdates)
    """What counted in earlier buffers of an asynchronous job."""
    selected: set[str] = field(default_factory=set)
    """Clients that have a place in the round, if the job selects clients; in memory only, but for those whose
    updates count."""

    # --- what counts -----------------------------------------------------------------------------------------

    @property
    def accepted(self) -> int:
        """Updates that count."""
        return len(self.updates)

    @property
    def is_buffer(self) -> bool:
        """It is one of an asynchronous job."""
        return self.spec.mode == "async"

    @property
    def is_reopened(self) -> bool:
        """It was closed, lost updates, and waits for others while the top keeps what it has."""
        return self.phase == "open" and self.top != ""

    def deadline(self) -> float | None:
        """Monotonic time at which the quorum starts to suffice; None when there is no deadline."""
        return self.opened + self.spec.deadline if self.spec.deadline else None

    def needed(self, now: float) -> int:
        """Updates that the round needs; one at least."""
        deadline = self.deadline()
        is_overdue = deadline is not None and now >= deadline
        return max(1, ((self.spec.quorum or self.spec.goal) if is_overdue else self.spec.goal) - self.forgiven)

    def has_enough(self, now: float) -> bool:
        """Whether it has what it needs, without what is fenced."""
        return self.accepted - self.fenced >= self.needed(now)

    def judge(self, client: str) -> Verdict:
        """Whether an update of this client would be taken; counts what is not.

        Raises `Busy` while it cannot be told, because a node with updates was lost just now.
        """
        known = self.updates.get(client)
        if known is not None:
            if self.shares[known.member].fence:
                raise Busy("a node was lost", "whether this update still counts is not known yet", retry_after=0.2)
            self.duplicates += 1
            return "duplicate"
        if client in self.earlier:
            self.duplicates += 1
            return "duplicate"
        # Fenced updates may count after all: with them a round never gets more than its goal.
        is_doubtful = self.is_short or (self.phase == "open" and self.accepted >= self.spec.goal)
        if self.phase == "open" and not is_doubtful:
            has_place = not self.spec.over_selection or self.select(client) != "enough"
            return "open" if has_place else "unselected"
        if is_doubtful:
            raise Busy("a node was lost", "whether the round needs more updates is not known yet", retry_after=0.2)
        if self.is_buffer:
            return "closing"
        self.late += 1
        return "late"

    def select(self, client: str) -> Selected:
        """Give a client a place in the round, if there is one; for jobs that select clients."""
        return select_client(self.selected, client, self.spec)

    def may_take(self, member: str) -> bool:
        """Whether this node can still fold an update: the partial aggregate of a middle may be sent already."""
        if not self.is_reopened or member == self.top:
            return True
        share = self.shares.get(member)
        return share is None or not (share.is_called or share.is_gone)

    def count(self, member: str, key: int, client: str, num_samples: float, started: float) -> Verdict:
        """Count an update that is complete in a node's memory. It was placed, or counted, at `started`.

        Raises `Busy` when the update shall be sent again, to another node.
        """
        known = self.updates.get(client)
        if known is not None and known.member == member:
            return "accepted"
        verdict = self.judge(client)
        if verdict != "open":
            return verdict
        if not self.may_take(member):
            if self.is_buffer:
                return "closing"
            raise Busy("sent already", "this node's part of the round is on its way; send again", retry_after=0.1)
        if not self.first or started < self.first:
            self.first = started
            self.touch()
        share = self.shares.get(member)
        if share is None:
            share = self.shares[member] = Share(member, key)
        update = CountedUpdate(client, member, num_samples, self.next_sequence)
        self.next_sequence += 1
        self.updates[client] = update
        self.weight += num_samples
        share.updates += 1
        share.clients.append(client)
        self.journal.count_update(self.key, update.sequence, client, key, num_samples)
        return "accepted"

    # --- closing and opening again ---------------------------------------------------------------------------

    def try_close(self, now: float, choose: ChooseTop) -> bool:
        """Close the round if it has what it needs; True when it closed just now."""
        if self.phase != "open" or self.is_complete or not self.has_enough(now):
            return False
        self.phase = "closing"
        if not self.top:
            self.epoch += 1
            self.top = choose({share.member: share.updates for share in self.shares.values()})
        for share in self.shares.values():
            if not share.is_called and share.member != self.top:
                share.is_called = True
                self._save_share(share)
        self.touch()
        return True

    def _open_for_all(self) -> None:
        """Nobody is the top any more; whatever was sent is void, but the nodes that live have their updates."""
        self.phase, self.top, self.forgiven, self.is_short = "open", "", 0, False
        for share in self.shares.values():
            share.is_called = share.is_delivered = False
            share.fence = 0
        self.fenced = 0
        self.journal.clear_shares(self.key)
        self.touch()

    def reject(self, member: str, client: str) -> bool:
        """An update is not finite and counts no more. False when it did not count on this node (a repeat).

        Raises `Refused` 409 when its partial aggregate was delivered already.
        """
        update = self.updates.get(client)
        if update is None or update.member != member or self.is_complete:
            return False
        share = self.shares[member]
        if share.is_delivered:
            raise Refused(409, "delivered already", f"the update of {client!r} is in a partial aggregate")
        self._end(update, REJECTED)
        self.rejected += 1
        self.rejected_clients.append(client)
        self.selected.discard(client)  # if it cannot do better, another may
        share.updates -= 1
        if share.fence:
            self.fenced -= 1
        if not share.updates:
            self._forget(share)
        if self.phase == "closing":
            self.forgiven += 1
        self.touch()
        if self.top and not self.updates:
            self._open_for_all()
        return True

    def deliver(self, source: str) -> bool:
        """The top has this node's partial aggregate. False for a repeat; raises `Refused` 409 if not wanted."""
        share = self.shares.get(source)
        if share is None or not share.is_called:
            raise Refused(409, "not wanted", f"{source!r} has no part in this round")
        if share.is_delivered:
            return False
        share.is_delivered = True
        self._save_share(share)
        if share.fence:
            self._unfence(share)
        return True

    # --- losing nodes ----------------------------------------------------------------------------------------

    def lose(self, member: str, now: float, new_version: Callable[[], int]) -> bool:
        """A node is lost. True when that changes the orders of all. `new_version` makes one for the top."""
        share = self.shares.get(member)
        if share is not None:
            share.is_gone = True
        if self.is_complete:
            return False
        if member == self.top:
            self._lose_top()
            return True
        if share is None or share.is_delivered:
            return False
        if not share.is_called:
            self._drop(share)
            return False
        self._fence(share, now, new_version())
        return False

    def _lose_top(self) -> None:
        """With the top goes what only the top had: its own updates, and those of lost nodes."""
        for share in list(self.shares.values()):
            if share.is_gone or share.member == self.top:
                self._drop(share)
        self._open_for_all()

    def _fence(self, share: Share, now: float, version: int) -> None:
        share.fence = version
        self.fenced += share.updates
        if self.phase == "closing":
            self.is_short = not self.has_enough(now)

    def _unfence(self, share: Share) -> None:
        share.fence = 0
        self.fenced -= share.updates
        self.is_short = self.is_short and self.fenced > 0

    def restore_fences(self, now: float, version: int) -> None:
        """After a restart: fence anew what was fenced, for only the journal's content is known."""
        for share in self.shares.values():
            if share.is_gone and share.is_called and not share.is_delivered:
                self._fence(share, now, version)

    def acknowledge(self, version: int, now: float) -> bool:
        """The top has carried out this version of its order. True when updates were dropped because of that."""
        settled = [share for share in self.shares.values() if share.fence and share.fence <= version]
        for share in settled:
            self._drop(share)
        if settled:
            self._settle(now)
        return bool(settled)

    def _settle(self, now: float) -> None:
        """After a loss: go on closing with what is left, or open again."""
        if not self.updates:
            self._open_for_all()
        elif self.phase == "closing" and not self.fenced:
            self.is_short = False
            if not self.has_enough(now):
                self.phase = "open"
                self.forgiven = 0
        elif self.phase == "closing":
            self.is_short = not self.has_enough(now)
        self.touch()

    def _drop(self, share: Share) -> None:
        """The updates of a share count no more; their clients may send them again."""
        if share.fence:
            self._unfence(share)
        ended = [
            update
            for client in share.clients
            if (update := self.updates.get(client)) is not None and update.member == share.member
        ]
        for update in ended:
            self._end(update, DROPPED)
        self.lost += len(ended)
        self._forget(share)
        self.touch()

    def _forget(self, share: Share) -> None:
        del self.shares[share.member]
        self.journal.forget_share(self.key, share.key)

    def _end(self, update: CountedUpdate, state: int) -> None:
        # A client may be named twice in a share: rejected here, then counted here again.
        if self.updates.pop(update.client, None) is not None:
            self.weight -= update.num_samples
            self.journal.end_update(self.key, update.sequence, state)

    # --- completion ------------------------------------------------------------------------------------------

    def complete(self, contributors: Collection[str], updates: int, now: float) -> None:
        """The top has made the model out of the updates of these nodes: from here on they are the round's record.

        Raises `Refused` 409 when these are not the round's updates.
        """
        left_out = self._left_out(contributors)
        counted = sum(share.updates for share in self.shares.values() if share.member not in left_out)
        # What the others have was compared when it was delivered; so the top may also name its own updates alone.
        if updates not in (counted, self.updates_of(self.top)):
            raise Refused(409, "other updates", f"the round has {counted} updates on these nodes, not {updates}")
        missing = sum(self.shares[member].updates for member in left_out)
        if self.phase != "closing" or (left_out and self.accepted - missing < self.needed(now)):
            raise Refused(409, "not closing", "the round waits for more updates")
        for member in left_out:
            self._drop(self.shares[member])
        for share in self.shares.values():
            share.fence = 0
        self.fenced, self.is_short = 0, False
        self.is_complete = True
        self.weight = math.fsum(update.num_samples for update in self.updates.values())
        self.act = now - self.first
        self.touch()

    def _left_out(self, contributors: Collection[str]) -> list[str]:
        """Fenced nodes that are not in the model; raises `Refused` 409 when others are missing or too many."""
        named = set(contributors)
        known = self.shares.keys()
        left_out = [share.member for share in self.shares.values() if share.fence and share.member not in named]
        if len(named) != len(contributors) or named != known - set(left_out):
            raise Refused(409, "other contributors", "these are not the nodes whose updates count in the round")
        return left_out

    # --- what the nodes are told -----------------------------------------------------------------------------

    def role_of(self, member: str) -> tuple[Phase, NodeRole]:
        """What a node is to do."""
        if not self.top:
            return "open", ""
        if member == self.top:
            # Short of updates it must not finish before it is known what the fenced nodes' share is.
            return ("open" if self.is_short else self.phase), "top"
        share = self.shares.get(member)
        if share is not None and share.is_called and not share.is_gone:
            return "closing", "middle"
        return self.phase, ""

    def partials(self) -> tuple[str, ...]:
        """Whose partial aggregates belong to the round."""
        return tuple(share.member for share in self.shares.values() if share.is_called and not share.fence)

    def updates_of(self, member: str) -> int:
        """Updates that count on a node."""
        share = self.shares.get(member)
        return share.updates if share is not None and not share.is_gone else 0

    def state(self, names: Callable[[str], str]) -> RoundState:
        """The round as the API shows it; `names` tells the name of a node from its incarnation."""
        return RoundState(
            round=self.number,
            status="complete" if self.is_complete else self.phase,
            accepted=self.accepted,
            folded=self.accepted if self.is_complete else 0,
            rejected=self.rejected,
            late=self.late,
            duplicates=self.duplicates,
            weight=self.weight,
            act=self.act,
            leaves=0,
            started=0,
            reused=0,
            rejected_clients=tuple(self.rejected_clients[:_SHOWN_CLIENTS]),
            nodes=len(self.shares),
            top=names(self.top) if self.top else "",
            lost=self.lost,
            selected=len(self.selected),
        )

    # --- the journal -----------------------------------------------------------------------------------------

    def touch(self) -> None:
        """Have the round's row written with the next commit."""
        self.journal.touch(("round", self.key), self.row)

    def _save_share(self, share: Share) -> None:
        self.journal.save_share(self.key, share.key, share.is_called, share.is_delivered)

    def row(self) -> RoundRow:
        """The row as it is now."""
        return RoundRow(
            key=self.key,
            job=self.job_key,
            number=self.number,
            attempt=self.attempt,
            status="complete" if self.is_complete else self.phase,
            epoch=self.epoch,
            top=self.top,
            forgiven=self.forgiven,
            late=self.late,
            duplicates=self.duplicates,
            lost=self.lost,
            rejected=self.rejected,
            opened=self.opened,
            first=self.first,
            weight=self.weight if self.is_complete else 0.0,
            act=self.act,
        )

    @classmethod
    def restore(
        cls,
        row: RoundRow,
        spec: JobSpec,
        journal: Journal,
        members: Mapping[int, tuple[str, bool]],
        now: float,
    ) -> ClusterRound:
        """Read a round from the journal. `members` gives incarnation and life of a member's row.

        `now` stands in for moments of another clock, about which this one says nothing. They are written anew
        then: after the next start they shall be known as this clock's.
        """

        def moment(written: float) -> float:
            # A clock that was set back with the whole machine, as a snapshot does it, has the same name.
            return min(written, now) if journal.clock_goes_on else now

        round_ = cls(row.key, row.job, row.number, row.attempt, spec, moment(row.opened), journal)
        round_.is_complete = row.status == "complete"
        round_.phase = "open" if row.status == "open" else "closing"
        round_.epoch, round_.top, round_.forgiven = row.epoch, row.top, row.forgiven
        round_.late, round_.duplicates, round_.lost, round_.rejected = (
            row.late,
            row.duplicates,
            row.lost,
            row.rejected,
        )
        round_.first = moment(row.first) if row.first else 0.0
        round_.act = row.act
        round_._restore_updates(members)
        if round_.is_complete:
            round_.weight = row.weight
        if not journal.clock_goes_on:
            round_.touch()
        return round_

    def _restore_updates(self, members: Mapping[int, tuple[str, bool]]) -> None:
        for sequence, client, key, num_samples, state in self.journal.updates_of(self.key):
            self.next_sequence = sequence + 1
            if state == REJECTED:
                self.rejected_clients.append(client)
            if state != COUNTED:
                continue
            incarnation, lives = members[key]
            share = self.shares.get(incarnation)
            if share is None:
                share = self.shares[incarnation] = Share(incarnation, key, is_gone=not lives)
            self.updates[client] = CountedUpdate(client, incarnation, num_samples, sequence)
            self.weight += num_samples
            share.updates += 1
            share.clients.append(client)
            if self.spec.over_selection:
                self.selected.add(client)
        self._restore_shares(members, self.journal.shares_of(self.key))

    def _restore_shares(
        self, members: Mapping[int, tuple[str, bool]], rows: Iterable[tuple[int, bool, bool]]
    ) -> None:
        for key, is_called, is_delivered in rows:
            share = self.shares.get(members[key][0])
            if share is not None:
                share.is_called, share.is_delivered = is_called, is_delivered

"""Updates on their way: where each was placed, and what that leaves of a node's capacity. In memory only.

A placement counts against its node until the update is counted, its upload or its round ends, or the node is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lifl.cluster.cluster_job import ClusterJob
from lifl.cluster.cluster_round import ClusterRound, Placement
from lifl.cluster.members import Member, Members
from lifl.errors import Busy

_LONGEST_SECONDS: Final = 600.0
"""A client that was sent to a node and never came is forgotten after this."""


class Placements:
    """Places updates of all jobs."""

    def __init__(self, members: Members, jobs: Mapping[str, ClusterJob]) -> None:
        self._members = members
        self._jobs = jobs

    def place(
        self, job: ClusterJob, round_: ClusterRound, client: str, asking: Member | None, here: bool, now: float
    ) -> Member:
        """Choose the node for an update, the same one for each retry. `here`: the asking one if at all possible.

        Raises Busy when there is none at the moment.
        """
        self._forget_old(round_, now)
        chosen = self._choose(job, round_, client, asking, here or not job.spec.redirect)
        placed = round_.placements.get(client)
        if placed is None or placed.member != chosen.incarnation:
            self.release(round_, client)
            round_.placements[client] = Placement(chosen.incarnation, now)
            round_.placed_on.setdefault(chosen.incarnation, set()).add(client)
            self._take(chosen, 1)
        return chosen

    def _choose(
        self, job: ClusterJob, round_: ClusterRound, client: str, asking: Member | None, here: bool
    ) -> Member:
        home = self._members.find(job.home())
        if home is not None:
            return home if home is asking or not here or asking is None else self._stand_in(job, round_, asking)
        if here and asking is not None and job.may_place(asking):
            return asking
        placed = round_.placements.get(client)
        member = self._members.find(placed.member) if placed is not None else None
        if member is None or not job.may_place(member):
            member = self._members.find(job.index.choose(job.spec.placement))
        assert member is not None
        return member

    def _stand_in(self, job: ClusterJob, round_: ClusterRound, asking: Member) -> Member:
        """The asking node in place of the one that should get the update, if it has sent nothing yet."""
        if not job.gathers and job.may_place(asking) and round_.may_take(asking.incarnation):
            return asking
        raise Busy("elsewhere", "only another node takes updates of this round now", retry_after=0.5)

    def _forget_old(self, round_: ClusterRound, now: float) -> None:
        while round_.placements:
            client = next(iter(round_.placements))
            if now - round_.placements[client].since < _LONGEST_SECONDS:
                return
            self.release(round_, client)

    @staticmethod
    def find(round_: ClusterRound, client: str) -> Placement | None:
        """Where an update was placed that is on its way."""
        return round_.placements.get(client)

    def release(self, round_: ClusterRound, client: str) -> Placement | None:
        """An update is no longer on its way; returns how it was placed, if it was."""
        placed = round_.placements.pop(client, None)
        if placed is not None:
            round_.placed_on[placed.member].discard(client)
            member = self._members.find(placed.member)
            assert member is not None
            self._take(member, -1)
        return placed

    def release_all(self, round_: ClusterRound, of: Member | None = None) -> None:
        """No update of the round is on its way any more, or none to one node."""
        clients = round_.placements if of is None else round_.placed_on.get(of.incarnation, ())
        for client in list(clients):
            self.release(round_, client)

    @staticmethod
    def carry_over(before: ClusterRound, after: ClusterRound) -> None:
        """What was on its way to a round that is over is on its way to the next one."""
        after.placements, before.placements = before.placements, {}
        after.placed_on, before.placed_on = before.placed_on, {}

    def _take(self, member: Member, count: int) -> None:
        member.placed += count
        self.note_residual(member)

    def note_residual(self, member: Member) -> None:
        """Take account of another residual capacity of a node."""
        for job in self._jobs.values():
            job.note_residual(member)

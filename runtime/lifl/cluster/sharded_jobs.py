"""What becomes of jobs whose model is cut into shards: the steps that all shards of a job take together."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from lifl.cluster.cluster_job import ClusterJob
from lifl.cluster.cluster_round import ClusterRound
from lifl.cluster.members import Member
from lifl.cluster.sharded_job import Part, ShardedJob, specs_of_shards
from lifl.errors import Refused
from lifl.messages import JobSpec

if TYPE_CHECKING:
    from lifl.cluster.cluster_jobs import ClusterJobs

log = logging.getLogger("lifl.coordinator")


class ShardedJobs:
    """The sharded jobs; their shards are among all other jobs in `ClusterJobs`."""

    def __init__(self, jobs: ClusterJobs) -> None:
        self._jobs = jobs
        self.by_name: dict[str, ShardedJob] = {}
        self.void: list[tuple[str, int]] = []
        """Shards and rounds whose checkpoints were given up; whoever has the files takes them from here."""

    def __iter__(self) -> Iterator[ShardedJob]:
        return iter(self.by_name.values())

    def of(self, job: ClusterJob) -> ShardedJob | None:
        """The job that another one is a shard of."""
        return self.by_name.get(job.spec.shard_of) if job.spec.shard_of else None

    # --- beginning and end -----------------------------------------------------------------------------------

    def create(self, spec: JobSpec) -> None:
        """Make a job of shards, which was checked. Raises Refused 409 when one of their names is taken, or 422."""
        kind = self._jobs.kinds.get(spec.function)
        if kind is not None and kind.is_gathering:
            raise Refused(422, "not in shards", _why_not_gathered(spec.function))
        specs = specs_of_shards(spec)
        taken = [shard.name for shard in specs if shard.name in self._jobs.by_name]
        if taken:
            raise Refused(409, "name taken", f"{taken[0]!r}, which a shard would be called, is another job")
        self.by_name[spec.name] = ShardedJob(spec, [self._jobs.add(shard) for shard in specs])

    def delete(self, sharded: ShardedJob) -> None:
        """Stop all shards for good."""
        del self.by_name[sharded.name]
        for job in sharded.shards:
            self._jobs.delete(job)

    def begin(self, sharded: ShardedJob, now: float) -> None:
        """The initial models of all shards are stored: open round 1."""
        for job in sharded.shards:
            self._jobs.begin(job, now)
        self.assign_homes()
        self._align(sharded, now)

    def failed(self, job: ClusterJob) -> None:
        """A shard has failed, and so the others are of no use."""
        sharded = self.of(job)
        for other in sharded.shards if sharded is not None else ():
            if other.status not in ("failed", "deleted"):
                self._jobs.fail(other, job.detail)

    def learned(self, function: str) -> None:
        """More is known of a function: one that compares whole updates has no use for parts of them."""
        kind = self._jobs.kinds[function]
        for sharded in list(self):
            if sharded.spec.function == function and kind.is_gathering and sharded.status != "failed":
                self._jobs.fail(sharded.shards[0], _why_not_gathered(function))

    def restore(self) -> None:
        """Put the shards together that were read from the journal."""
        shards: dict[str, list[ClusterJob]] = {}
        for job in self._jobs.by_name.values():
            if job.spec.shard_of:
                shards.setdefault(job.spec.shard_of, []).append(job)
        for name, found in shards.items():
            whole = found[0].spec.whole
            assert whole is not None
            found.sort(key=lambda job: job.key)  # they were made in order
            sharded = self.by_name[name] = ShardedJob(whole, found)
            for job in found:
                job.home_node = next(iter(job.round.shares), job.maker) if job.round is not None else job.maker
                if job.round is not None:
                    job.plan()  # which it could not without a home
            number = sharded.stored_round
            sharded.restore_barred(
                chain.from_iterable(self._jobs.journal.rejected_in(job.key, number) for job in found)
            )
        self.assign_homes()

    # --- from round to round ---------------------------------------------------------------------------------

    def opened(self, job: ClusterJob, now: float) -> None:
        """A shard has opened a round; the deadline of all begins with the last of them."""
        sharded = self.of(job)
        if sharded is not None:
            self.assign_homes()
            self._align(sharded, now)

    @staticmethod
    def _align(sharded: ShardedJob, now: float) -> None:
        number = sharded.behind.round.number if sharded.behind.round is not None else 0
        if sharded.is_open(number):
            for job in sharded.shards:
                assert job.round is not None
                job.round.opened = now
                job.round.touch()

    def closed(self, job: ClusterJob) -> None:
        """A shard's round takes no more updates, and so no other shard's does."""
        sharded = self.of(job)
        if sharded is not None:
            sharded.end_tickets()

    def assign_homes(self) -> None:
        """Give each shard a home that can take updates, and a better one where that costs nothing."""
        shards_on: Counter[str] = Counter()
        for sharded in self:
            shards_on += sharded.homes()
        for sharded in self:
            sharded.assign_homes(shards_on)
        for sharded in self:
            sharded.balance(shards_on)

    def next_expiry(self) -> float | None:
        """When a client will have been waited for in vain."""
        times = [when for sharded in self if (when := sharded.next_expiry()) is not None]
        return min(times, default=None)

    def expire(self, now: float) -> None:
        """Give up waiting for parts that do not come."""
        for sharded in self:
            sharded.expire(now)

    # --- counting --------------------------------------------------------------------------------------------

    def count(self, sharded: ShardedJob, client: str, parts: dict[int, Part], now: float) -> None:
        """Count an update whose parts are all there, in all shards at once."""
        number = 0
        for index, part in parts.items():
            job = sharded.shards[index]
            assert job.round is not None
            number = job.round.number
            verdict = job.round.count(part.member, part.key, client, part.num_samples, part.started)
            assert verdict == "accepted", f"{job.name}: {verdict}"
        self._jobs.totals.counted += 1
        (update,) = {part.update for part in parts.values()}
        sharded.settled(client, number, update)
        for index, part in parts.items():
            job = sharded.shards[index]
            member = self._jobs.members.find(part.member)
            assert member is not None
            job.note_residual(member)
            job.raise_leaves(member)
            job.tell(part.member)
        for job in sharded.shards:
            self._jobs.settle(job, now)

    # --- what is lost ----------------------------------------------------------------------------------------

    def lose(self, member: Member, now: float) -> None:
        """A node is a member no more."""
        for sharded in list(self):
            self._lose(sharded, sharded.shards, member, now)

    def lose_share(self, job: ClusterJob, member: Member, now: float) -> None:
        """A node can do no more for one shard."""
        sharded = self.of(job)
        if sharded is not None:
            self._lose(sharded, (job,), member, now)

    def _lose(self, sharded: ShardedJob, shards: tuple[ClusterJob, ...], member: Member, now: float) -> None:
        for job in shards:
            job.index.remove(member.incarnation)
            if job.round is not None:
                self._jobs.placements.release_all(job.round, member)
        sharded.forget_parts(shards, member.incarnation)
        if sharded.is_hurt(shards, member.incarnation):
            log.warning("job %s: what %s had of a shard is lost", sharded.name, member.name)
            self._begin_anew(sharded, now, sharded.forgiven)
        else:
            self.assign_homes()

    def reject(self, job: ClusterJob, round_: ClusterRound, member: Member, client: str, now: float) -> None:
        """An update of a shard is not finite; the others have its parts in their sums already."""
        sharded = self.of(job)
        forgiven = round_.forgiven
        if sharded is None or not round_.reject(member.incarnation, client):
            return
        log.warning("job %s round %d: update of %s is not finite", sharded.name, round_.number, client)
        self._jobs.totals.rejected += 1
        if round_.phase == "closing":
            forgiven += 1
        sharded.bar(client)
        self._begin_anew(sharded, now, forgiven)

    def _begin_anew(self, sharded: ShardedJob, now: float, forgiven: int) -> None:
        number = sharded.stored_round
        log.warning("job %s: round %d begins anew in all shards", sharded.name, number)
        jobs = self._jobs
        for job in sharded.shards:
            if job.round is not None:
                jobs.placements.release_all(job.round)
        before = sharded.behind.round
        if before is not None and before.number == number and not before.is_complete:
            jobs.totals.lost += before.accepted
        jobs.totals.rollbacks += 1
        jobs.ended_rounds += 1
        for job, beyond in sharded.begin_anew(now, forgiven):
            self.void += [(job.name, surplus) for surplus in beyond]
            job.tell_all()
        self.assign_homes()
        self._align(sharded, now)


def _why_not_gathered(function: str) -> str:
    return f"{function!r} compares whole updates with one another, and a shard has only a part of each"

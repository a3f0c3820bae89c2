"""What becomes of the jobs of a cluster: made, run from round to round, gone back, complete, failed, deleted."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from lifl.cluster.cluster_job import ClusterJob, CompleteRound, FunctionKind
from lifl.cluster.cluster_round import ClusterRound
from lifl.cluster.function_needs import FunctionNeeds
from lifl.cluster.journal import COUNTED, JobRow, Journal
from lifl.cluster.members import Member, Members
from lifl.cluster.order_news import OrderNews
from lifl.cluster.placements import Placements
from lifl.cluster.sharded_job import ShardedJob
from lifl.cluster.sharded_jobs import ShardedJobs
from lifl.control.gateway_requests import check_spec
from lifl.errors import Refused
from lifl.messages import JobSpec

log = logging.getLogger("lifl.coordinator")

_BROKEN_NODES: Final = 3
"""Nodes on which a job cannot go on before nobody tries another."""
AWAY_SECONDS: Final = 30.0
"""Time that a node with updates may be without their function. A pod that was restarted is back by then."""


@dataclass
class Totals:
    """Counted since the process started."""

    counted: int = 0
    lost: int = 0
    rejected: int = 0
    rounds: int = 0
    rollbacks: int = 0


class ClusterJobs:
    """Owns the jobs."""

    def __init__(self, journal: Journal, members: Members, news: OrderNews) -> None:
        self.journal = journal
        self.members = members
        self.news = news
        self.by_name: dict[str, ClusterJob] = {}
        self.deleted: dict[str, ClusterJob] = {}
        """Jobs that some node has not heard the end of."""
        self.kinds: dict[str, FunctionKind] = {}
        """What is known of functions, by name."""
        self.placements = Placements(members, self.by_name)
        self.sharded = ShardedJobs(self)
        self.needs = FunctionNeeds(journal.starts, members, self.by_name, self.sharded)
        self._away: dict[tuple[str, str], float] = {}
        """Since when a function is away from a node that has updates for it, by incarnation and function."""
        self.totals = Totals()
        self.ended_rounds = 0
        """Grows whenever there may be a round to compact."""

    def find(self, name: str) -> ClusterJob:
        """A job; raises Refused 404 when there is none of this name."""
        job = self.by_name.get(name)
        if job is None:
            raise Refused(404, "no such job", f"there is no job {name!r} here; POST /v1/jobs makes one")
        return job

    def has(self, name: str) -> bool:
        """Whether there is a job of this name, sharded or not."""
        return name in self.by_name or name in self.sharded.by_name

    def find_any(self, name: str) -> ClusterJob | ShardedJob:
        """A job, sharded or not; raises Refused 404 when there is none of this name."""
        return self.sharded.by_name.get(name) or self.find(name)

    def round_key(self, name: str, number: int) -> int:
        """The journal's row of a round that is open or complete; raises Refused 404."""
        job = self.find(name)
        if job.round is not None and job.round.number == number:
            return job.round.key
        for complete in job.recent:
            if complete.number == number:
                return complete.key
        found = self.journal.find_round(job.key, number)
        if found is None or found[0].status != "complete":
            raise Refused(404, "no such round", f"round {number} of job {name!r} is not known here")
        return found[0].key

    # --- beginning and end -----------------------------------------------------------------------------------

    def create(self, spec: JobSpec) -> None:
        """Make a job; the same again is not an error. Raises Refused 409 or 422."""
        if self.has(spec.name) and self.find_any(spec.name).spec == spec:
            return
        if self.has(spec.name):
            raise Refused(
                409, "name taken", f"another job is called {spec.name!r}; DELETE it or choose another name"
            )
        check_spec(spec)
        self._require_function(spec.function)
        if spec.shards > 1:
            self.sharded.create(spec)
        else:
            self.add(spec)

    def add(self, spec: JobSpec) -> ClusterJob:
        """Make a job that was checked."""
        former = self.deleted.get(spec.name)
        if former is not None:
            self._retire(former)  # orders of the new one, with another nonce, say the same
        job = ClusterJob(self.journal.new_key("jobs"), spec, self.journal, self.members, self.news, self.kinds)
        self.by_name[spec.name] = job
        job.reindex_all()
        job.plan_needs(spec.goal)
        job.touch()
        job.tell_all()
        self.needs.changed()
        return job

    def _require_function(self, function: str) -> None:
        members = list(self.members.living)
        if members and not any(member.may_have_function(function) for member in members):
            failures = [
                detail for member in members for name, detail in member.failures.items() if name == function
            ]
            if failures:
                raise Refused(422, "the function cannot be used", failures[0])
            raise Refused(422, "no such function", f"no node of the cluster has a function {function!r}")

    def begin(self, job: ClusterJob, now: float) -> None:
        """The initial model is stored: open round 1."""
        job.status = "running"
        job.model_round = job.made_round = 1
        job.stored(1)
        self.wake(job, now)
        job.open_round(1, now)
        job.tell_all()
        self.needs.changed()

    def fail(self, job: ClusterJob, detail: str) -> None:
        """Give a job up; if it is a shard, the others too."""
        log.error("job %s failed: %s", job.name, detail)
        job.status, job.detail = "failed", detail
        self._give_up_round(job)
        job.touch()
        job.tell_all()
        self.needs.changed()
        self.sharded.failed(job)

    def remove(self, name: str) -> None:
        """Stop a job for good, with all its shards. Raises Refused 404, or 409 for one of these."""
        sharded = self.sharded.by_name.get(name)
        if sharded is not None:
            self.sharded.delete(sharded)
            return
        job = self.find(name)
        if job.is_shard:
            raise Refused(409, "shard of a job", f"{name!r} is a shard: DELETE the job {job.spec.shard_of!r}")
        self.delete(job)

    def delete(self, job: ClusterJob) -> None:
        """Stop a job for good; the nodes hear of it until each has said so."""
        job.status = "deleted"
        self._give_up_round(job)
        del self.by_name[job.name]
        job.unaware = {member.incarnation for member in self.members.living}
        self.deleted[job.name] = job
        job.touch()
        job.tell_all()
        self.needs.changed()
        self._retire_if_known(job)

    def note_aware(self, job: ClusterJob, incarnation: str) -> None:
        """A node knows that a job was deleted, or need not know any more."""
        job.unaware.discard(incarnation)
        self._retire_if_known(job)

    def _retire_if_known(self, job: ClusterJob) -> None:
        if not job.unaware:
            self._retire(job)

    def _retire(self, job: ClusterJob) -> None:
        self.deleted.pop(job.name, None)
        job.is_retired = True
        self.ended_rounds += 1
        job.touch()

    def _give_up_round(self, job: ClusterJob) -> None:
        if job.round is not None:
            self.placements.release_all(job.round)
            if not job.round.is_complete:
                self.journal.undo_rounds(job.key, job.round.number)
            job.round = None

    # --- from round to round ---------------------------------------------------------------------------------

    def settle(self, job: ClusterJob, now: float) -> None:
        """Close the round if it has what it needs."""
        if job.round is not None and job.round.try_close(now, job.choose_top):
            job.tell_all()
            self.sharded.closed(job)

    def complete(self, job: ClusterJob, round_: ClusterRound, now: float) -> None:
        """The model of the round was made."""
        if not round_.is_buffer:  # what is on its way to a buffer counts in the next one
            self.placements.release_all(round_)
        job.remember(round_, round_.state(job.name_of))
        job.made(round_.number + 1, round_.top)
        job.touch()
        self.totals.rounds += 1
        self.ended_rounds += 1
        if job.spec.durability == "async":
            self.publish(job, now)

    def publish(self, job: ClusterJob, now: float) -> None:
        """Tell the nodes of the newest model, and open the next round if there is one."""
        job.model_round = job.made_round
        before = job.round
        if job.spec.rounds and job.model_round > job.spec.rounds:
            if before is not None:
                self.placements.release_all(before)
            job.status, job.round = "complete", None
            job.touch()
        else:
            job.open_round(job.model_round, now)
            if before is not None and job.round is not None:
                self.placements.carry_over(before, job.round)
            self.sharded.opened(job, now)
        job.renew_needs()
        job.tell_all()
        self.needs.changed()

    def stored(self, job: ClusterJob, round_number: int, now: float) -> list[int]:
        """A model is on the coordinator's disk; the rounds whose checkpoints are not to be kept any longer."""
        surplus = job.stored(round_number)
        if job.model_round < job.made_round == round_number and job.status == "running":
            self.publish(job, now)
        elif round_number == job.model_round:
            job.tell_all()
        return surplus

    # --- nodes come and go -----------------------------------------------------------------------------------

    def joined(self, member: Member) -> None:
        """A node is a member now."""
        for job in self.by_name.values():
            job.reindex(member)
            self._replan(job)
        self.sharded.assign_homes()
        self.needs.changed()

    def reindex(self, member: Member) -> None:
        """A node may get updates now, or no longer."""
        self.joined(member)

    def lost(self, member: Member, now: float) -> None:
        """A node is a member no more."""
        for job in list(self.by_name.values()):
            job.versions.pop(member.incarnation, None)
            if job.remove_holder(member):
                job.tell_all()
            if not job.is_shard:
                self._lose_share(job, member, now)
            self._replan(job)
        self.sharded.lose(member, now)
        self.needs.changed()
        for job in list(self.deleted.values()):
            self.note_aware(job, member.incarnation)

    def _lose_share(self, job: ClusterJob, member: Member, now: float) -> None:
        job.index.remove(member.incarnation)
        round_ = job.round
        if round_ is not None:
            before = round_.lost
            self.placements.release_all(round_, member)
            if round_.lose(member.incarnation, now, lambda: job.tell(round_.top)):
                job.tell_all()
            self.totals.lost += round_.lost - before
        if job.is_lost() and job.status in ("running", "complete"):
            self._roll_back(job, now)
        else:
            self.settle(job, now)

    def _roll_back(self, job: ClusterJob, now: float) -> None:
        log.warning(
            "job %s: the model of round %d is lost with its holders; going back to round %d",
            job.name,
            job.made_round,
            job.checkpointed_round,
        )
        if job.round is not None:
            self.placements.release_all(job.round)
            self.totals.lost += 0 if job.round.is_complete else job.round.accepted
        self.totals.rollbacks += 1
        job.roll_back(now)
        job.tell_all()
        self.needs.changed()

    # --- functions come and go, and clients -------------------------------------------------------------------

    def attached(self, member: Member, functions: frozenset[str], now: float) -> None:
        """These functions are on a node, and no others."""
        before, member.attached = member.attached, functions
        for job in list(self.by_name.values()):
            name = job.spec.function
            if (name in functions) == (name in before if before is not None else True):
                continue
            job.reindex(member)
            if name in functions:
                self._away.pop((member.incarnation, name), None)
            else:
                self._leave_alone(job, member, now)
            self._replan(job)
        self.sharded.assign_homes()
        self.needs.changed()

    def _leave_alone(self, job: ClusterJob, member: Member, now: float) -> None:
        """The function is away: nothing more for the job comes to the node, and what is there waits for it."""
        if job.round is not None:
            self.placements.release_all(job.round, member)
        if _has_work(job, member.incarnation):
            self._away.setdefault((member.incarnation, job.spec.function), now)

    def _replan(self, job: ClusterJob) -> None:
        if not self.members.do_attach or job.status not in ("waiting-for-model", "running"):
            return
        before = job.planned_leaves
        job.replan()
        for incarnation in before.keys() | job.planned_leaves.keys():
            is_other = before.get(incarnation, 1) != job.planned_leaves.get(incarnation, 1)
            if is_other and self.members.is_member(incarnation):
                job.tell(incarnation)

    def next_desertion(self) -> float | None:
        """When a function will have been away from a node for too long."""
        return min(self._away.values()) + AWAY_SECONDS if self._away else None

    def deserted(self, now: float) -> list[Member]:
        """Nodes that have updates for which the function does not come back: these count as lost."""
        found: dict[str, Member] = {}
        for (incarnation, function), since in list(self._away.items()):
            if now < since + AWAY_SECONDS:
                continue
            del self._away[incarnation, function]
            member = self.members.find(incarnation)
            jobs = [job for job in self.by_name.values() if job.spec.function == function]
            if member is not None and member.is_member and any(_has_work(job, incarnation) for job in jobs):
                log.warning("node %s has updates, but no pod of %s for %g s", member.name, function, now - since)
                found[incarnation] = member
        return list(found.values())

    def wake(self, job: ClusterJob, now: float) -> None:
        """A client uses a job: its function has to be there."""
        job.last_activity = now
        if job.woken is None or not job.is_awake:
            job.woken = now
        if not job.is_awake:
            job.is_awake = True
            self._replan(job)
            job.renew_needs()
            self.needs.changed()

    def use(self, job: ClusterJob, member: Member) -> None:
        """An update is on its way to a node, or there."""
        assert job.round is not None
        share = job.round.shares.get(member.incarnation)
        there = share.updates if share is not None else 0
        is_first = there + len(job.round.placed_on.get(member.incarnation, ())) == 1
        if member.incarnation not in job.needed:
            job.need(member)
        elif not is_first:
            return
        self.needs.changed()

    def next_sleep(self, now: float) -> float | None:
        """When a job will be idle. Nobody asks for that where all functions are always there."""
        if not self.members.do_attach:
            return None
        return min((_idle_at(job, now) for job in self.by_name.values() if _may_sleep(job)), default=None)

    def put_to_sleep(self, now: float) -> None:
        """Let go of the functions of jobs that nobody uses."""
        if not self.members.do_attach:
            return
        for job in self.by_name.values():
            if not _may_sleep(job) or now < _idle_at(job, now):
                continue
            if job.used:
                job.last_activity = now  # something is going on after all
            else:
                job.sleep()
                self.needs.changed()

    def note_seen(self, member: Member, job: ClusterJob, version: int, now: float) -> None:
        """A node has carried out a version of its order."""
        round_ = job.round
        if round_ is None or round_.top != member.incarnation:
            return
        before = round_.lost
        if round_.acknowledge(version, now):
            self.totals.lost += round_.lost - before
            job.tell_all()
            self.settle(job, now)

    # --- what goes wrong -------------------------------------------------------------------------------------

    def learn(self, function: str, kind: FunctionKind) -> None:
        """Note what a function asks of the platform."""
        if self.kinds.get(function) == kind:
            return
        self.kinds[function] = kind
        self.journal.save_function(function, kind.is_gathering, kind.state_arrays)
        for job in self.by_name.values():
            if job.spec.function == function:
                job.reindex_all()
        self.sharded.learned(function)

    def recovered(self, member: Member, function: str) -> None:
        """A function can be imported on a node, where it perhaps could not before."""
        if function not in member.failures:
            return
        self.members.clear_failure(member, function)
        for job in self.by_name.values():
            if job.spec.function == function:
                job.reindex(member)
                self._replan(job)
        self.sharded.assign_homes()
        self.needs.changed()

    def break_on(self, job: ClusterJob, member: Member, detail: str, now: float) -> None:
        """A node can do no more for a job; with too many of them it fails."""
        if member.incarnation in job.broken or job.status not in ("running", "waiting-for-model"):
            return
        log.warning("job %s cannot go on on node %s: %s", job.name, member.name, detail)
        job.broken[member.incarnation] = detail
        self.journal.break_job(job.key, member.key, detail)
        if job.is_shard:
            self.sharded.lose_share(job, member, now)
        else:
            self._lose_share(job, member, now)
        job.tell(member.incarnation)
        self._replan(job)
        self.needs.changed()
        self.fail_if_hopeless(job, detail)

    def fail_if_hopeless(self, job: ClusterJob, detail: str) -> None:
        """Fail a job that no node can do anything for, or that several could not."""
        broken = sum(self.members.is_member(incarnation) for incarnation in job.broken)
        if broken >= _BROKEN_NODES or not any(job.takes_part(member) for member in self.members.living):
            self.fail(job, detail)

    # --- restart ---------------------------------------------------------------------------------------------

    def restore(self, now: float) -> None:
        """Read all jobs from the journal; the members are known already."""
        for name, is_gathering, state_arrays in self.journal.functions():
            self.kinds[name] = FunctionKind(is_gathering, state_arrays)
        for row in list(self.journal.jobs()):
            job = self._restore(row, now)
            if job.status == "deleted":
                job.unaware = {member.incarnation for member in self.members.living}
                self.deleted[job.name] = job
                self._retire_if_known(job)
            else:
                self.by_name[job.name] = job
                job.reindex_all()
        self.sharded.restore()

    def _restore(self, row: JobRow, now: float) -> ClusterJob:
        journal = self.journal
        job = ClusterJob(
            row.key, row.decoded_spec(), journal, self.members, self.news, self.kinds, nonce=row.nonce
        )
        job.status, job.detail = row.status, row.detail  # type: ignore[assignment]
        job.attempt, job.maker = row.attempt, row.maker
        job.model_round, job.made_round = row.model_round, row.made_round
        job.checkpointed_round, job.checkpoints = row.checkpointed_round, journal.checkpoints(row.key)
        job.holders = dict.fromkeys(self._incarnations(journal.holders(row.key)))
        broken = journal.broken(row.key)
        job.broken = dict(zip(self._incarnations(broken), broken.values(), strict=True))
        self._restore_history(job)
        job.tell_all()
        if row.round and job.status == "running":
            self._restore_round(job, row.round, now)
        return job

    def _incarnations(self, keys: Iterable[int]) -> list[str]:
        return [self.members.by_key(key).incarnation for key in keys]

    def _restore_history(self, job: ClusterJob) -> None:
        for row, state, reports in self.journal.complete_rounds(job.key):
            complete = CompleteRound(row.key, row.number, row.attempt, state)
            for key, report in reports.items():
                complete.add(self.members.by_key(key).incarnation, report)
            job.recent.append(complete)
        if job.spec.mode == "async":
            for number, contributors in self.journal.counted_since(job.key, job.oldest_counted):
                job.remember_counted(number, contributors)
        last = job.last
        if last is not None and (last.number, last.attempt) == (job.made_round - 1, job.attempt):
            job.counted_before = {
                client: self.members.by_key(key).incarnation
                for _, client, key, _, state in self.journal.updates_of(last.key)
                if state == COUNTED
            }

    def _restore_round(self, job: ClusterJob, number: int, now: float) -> None:
        row = self.journal.round_of(job.key, number, job.attempt)
        able = {
            member.key: (member.incarnation, member.is_member and member.incarnation not in job.broken)
            for member in self.members.all
        }
        job.round = ClusterRound.restore(row, job.spec, self.journal, able, now)
        job.round.earlier = job.earlier
        job.reindex_all()
        if not job.round.is_complete:
            job.round.restore_fences(now, job.version)
        job.plan()


def _has_work(job: ClusterJob, incarnation: str) -> bool:
    """Whether a node has updates of the open round that are nowhere else, or is to finish it."""
    round_ = job.round
    if round_ is None or round_.is_complete:
        return False
    share = round_.shares.get(incarnation)
    has_updates = share is not None and not share.is_gone and not share.is_delivered
    return has_updates or round_.top == incarnation


def _may_sleep(job: ClusterJob) -> bool:
    return job.is_awake and job.status in ("waiting-for-model", "running")


def _idle_at(job: ClusterJob, now: float) -> float:
    if job.last_activity is None:
        job.last_activity = now
    return job.last_activity + job.spec.idle_seconds

"""Which functions the jobs need now, and on how many nodes: what an autoscaler of their pods asks for.

A node that starts zygotes by itself has its functions always. One whose functions come as pods
(`Register.attaches`) has those that it has told of, and a function may be nowhere while nobody needs it. Whoever
scales the pods decides how many there are; on which nodes they come up is for the cluster's scheduler to say. So
what counts is a number of nodes, and updates are placed where the function is by then.

A job needs nodes while it is in use, which is until `idle_seconds` have passed without a client, and while updates
of its open round count or are on their way. For the time that it is in use the number never shrinks: a pod takes
longer to come than a round may last. An idle job needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import msgspec

from lifl.cluster.cluster_job import ClusterJob
from lifl.cluster.members import Member, Members
from lifl.cluster.sharded_job import ShardedJob

_LIFE_BITS: Final = 32
_IN_USE: Final = ("waiting-for-model", "running")


class FunctionNeed(msgspec.Struct, frozen=True):
    """What there is to know of one function."""

    function: str
    wanted: int
    """Pods that there should be, at most one for each node."""
    needed_on: tuple[str, ...]
    """Nodes that the plan has for it: those with updates first of all. Another one does as well for the rest."""
    nodes: tuple[str, ...]
    """Nodes that have it."""
    busy: tuple[str, ...]
    """Nodes with updates of open rounds, which would be lost with its pod there."""
    jobs: tuple[str, ...]
    """Jobs in use that it is for."""
    failures: dict[str, str]
    """Why it cannot be imported, by node."""


class FunctionNeeds:
    """Describes all functions, with a version that changes when a description does."""

    def __init__(
        self,
        life: int,
        members: Members,
        jobs: Mapping[str, ClusterJob],
        sharded: Iterable[ShardedJob],
    ) -> None:
        """`life` counts the coordinator's starts: versions of another life are all different."""
        self.version = life << _LIFE_BITS
        self._members = members
        self._jobs = jobs
        self._sharded = sharded
        self._described: tuple[FunctionNeed, ...] = ()
        self._is_stale = True

    def changed(self) -> None:
        """Something may be needed elsewhere, or be somewhere else."""
        self._is_stale = True

    def describe(self) -> tuple[FunctionNeed, ...]:
        """Every function that a job names or a node has, by name; brings `version` up to date."""
        if self._is_stale:
            self._is_stale = False
            described = tuple(self._describe())
            if described != self._described:
                self._described = described
                self.version += 1
        return self._described

    def _describe(self) -> Iterator[FunctionNeed]:
        members = sorted(self._members.living, key=lambda member: member.key)
        jobs: dict[str, list[ClusterJob]] = {}
        for job in self._jobs.values():
            if job.status in _IN_USE:
                jobs.setdefault(job.spec.function, []).append(job)
        known = {name for member in members for name in (*member.functions, *member.failures)}
        for function in sorted(known | jobs.keys()):
            yield self._describe_one(function, members, jobs.get(function, []))

    def _describe_one(self, function: str, members: list[Member], jobs: list[ClusterJob]) -> FunctionNeed:
        awake = [job for job in jobs if job.is_awake]
        is_member = self._members.is_member
        needed = dict.fromkeys(name for job in awake if not job.is_shard for name in job.needed if is_member(name))
        for sharded in self._sharded:
            if sharded.spec.function == function and any(job.is_awake for job in sharded.shards):
                needed |= dict.fromkeys(_needed_by_shards(sharded, members))
        busy = {name for job in jobs for name in job.used}
        return FunctionNeed(
            function=function,
            wanted=len(needed),
            needed_on=self._names(needed),
            nodes=tuple(m.name for m in members if function in m.functions and m.has_function(function)),
            busy=self._names(sorted(busy)),
            jobs=tuple(sorted({job.spec.shard_of or job.name for job in awake})),
            failures={m.name: m.failures[function] for m in members if function in m.failures},
        )

    def _names(self, incarnations: Iterable[str]) -> tuple[str, ...]:
        found = map(self._members.find, incarnations)
        return tuple(member.name for member in found if member is not None)


def _needed_by_shards(sharded: ShardedJob, members: list[Member]) -> list[str]:
    """As many nodes as there are shards, if there are so many: homes, then those that have the function."""
    able = [member for member in members if sharded.shards[0].may_need(member)]
    homes = sharded.homes()
    able.sort(key=lambda m: (not homes[m.incarnation], not m.has_function(sharded.spec.function), m.key))
    return [member.incarnation for member in able[: len(sharded.shards)]]

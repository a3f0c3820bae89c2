"""What is compared, and whether this machine can do it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lifl.cli.common import CommandError
from lifl.cluster.placement import Policy
from lifl_gateway.pool_memory import available_memory

from lifl_bench.workload import Model

MOST_NODES: Final = 16
MOST_UPDATES: Final = 250
"""A client is a process."""
_SLOTS_BESIDE: Final = 3
"""Models of a job in a node's memory."""
_SLOTS_PER_LEAF: Final = 2
_CLIENT_BYTES: Final = 12 << 20
_NODE_BYTES: Final = 200 << 20
_SHARE: Final = 0.85
"""Of the memory: these are estimates."""


@dataclass(frozen=True)
class Plan:
    """A comparison."""

    nodes: tuple[int, ...]
    updates: tuple[int, ...]
    policies: tuple[Policy, ...]
    model: Model
    rounds: int
    """Measured ones of each policy; one more comes before them."""
    capacity: float
    """MC of each node."""

    def check(self) -> None:
        """Raises CommandError for what cannot be run here."""
        for count in self.nodes:
            if not 1 <= count <= MOST_NODES:
                raise CommandError(f"{count} nodes: there can be 1 to {MOST_NODES}")
        for count in self.updates:
            if not 1 <= count <= MOST_UPDATES:
                raise CommandError(f"{count} updates: a round can have 1 to {MOST_UPDATES}, of a process each")
        need, have = self.memory(), int(_SHARE * available_memory())
        if need > have:
            hint = ("python bench/cluster.py --model 4MB", "a smaller model")
            raise CommandError(
                f"{max(self.updates)} updates of {self.model.nbytes / 1e6:,.1f} MB on {max(self.nodes)} nodes for "
                f"{len(self.policies)} jobs need about {need / 1e9:.1f} GB of memory, and {have / 1e9:.1f} GB can "
                "be used",
                [hint],
            )

    def memory(self) -> int:
        """Bytes that the largest cell takes: the jobs of all policies have pools on all nodes at the same time."""
        updates, cores = max(self.updates), os.cpu_count() or 1
        slots = updates + _SLOTS_BESIDE + _SLOTS_PER_LEAF * cores
        pools = max(self.nodes) * len(self.policies) * slots * self.model.nbytes
        # Of each client the model that it fetches, twice for a moment.
        clients = updates * (_CLIENT_BYTES + 2 * self.model.nbytes)
        return pools + clients + max(self.nodes) * _NODE_BYTES


def turns(policies: Sequence[Policy], rounds: int) -> list[list[Policy]]:
    """In which order the policies have their rounds: none always begins, or always follows the same other one."""
    orders = []
    for turn in range(rounds):
        shift = turn // 2 % len(policies)
        order = [*policies[shift:], *policies[:shift]]
        orders.append(order[::-1] if turn % 2 else order)
    return orders

"""The way from the broker to LIFL in single steps, as in the paper's ablations: each adds one mechanism.

On one node it is the data plane. The first row is the tuned broker as a serverless platform runs it when load
comes and goes: functions and their sidecars are started when a round's first event arrives, and fold once all
inputs are there (lazy).

On several nodes it is orchestration. The first row has LIFL's data plane already, but updates go to one node after
another, each has one aggregator, which is started anew for each round, and folds once all inputs are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from lifl_bench.cluster_mode import ClusterDeployment, ClusterVariant
from lifl_bench.deployment import Cell, Deployment
from lifl_bench.lifl_mode import LiflDeployment, Variant
from lifl_bench.modes import Mode, Needs, Setting

_NODE_BYTES: Final = 150 << 20
_ROOM: Final = 1.5
"""Capacity of a node in the ablation, for each update of a round: all of them fit on one."""


@dataclass(frozen=True)
class Step:
    """One row of the ablation."""

    name: str
    deploy: Callable[[Cell, Setting], Deployment]
    needs_broker: bool = False


def _broker(cell: Cell, setting: Setting) -> Deployment:
    from lifl_bench.broker.deployment import BrokerDeployment
    from lifl_bench.broker.tuning import TUNED

    return BrokerDeployment(cell, TUNED, nats_url=setting.nats_url, timing="lazy", cold=True)


def _shared_memory(cell: Cell, setting: Setting) -> Deployment:
    from lifl_bench.broker.deployment import BrokerDeployment
    from lifl_bench.broker.tuning import TUNED

    return BrokerDeployment(
        cell, TUNED, nats_url=setting.nats_url, timing="lazy", cold=True, store="shared-memory"
    )


def _lifl(variant: Variant) -> Callable[[Cell, Setting], Deployment]:
    def deploy(cell: Cell, setting: Setting) -> Deployment:
        return LiflDeployment(cell, "lifl", variant)

    return deploy


STEPS: Final = (
    Step("broker", _broker, needs_broker=True),
    Step("+ shared memory", _shared_memory, needs_broker=True),
    Step("+ eBPF routing", _lifl(Variant(timing="lazy", reuse=False, start="spawn"))),
    Step("+ eager", _lifl(Variant(timing="eager", reuse=False, start="spawn"))),
    Step("+ reuse, warm zygote", _lifl(Variant())),
)


def cluster_steps(nodes: int) -> tuple[Step, ...]:
    """The steps on a cluster of so many nodes. They need root; see `lifl_bench.hosts.why_not`."""
    none = ClusterVariant("round-robin", is_planned=False, reuse=False, start="spawn", timing="lazy")
    placed = replace(none, placement="best-fit")
    planned = replace(placed, is_planned=True)
    reusing = replace(planned, reuse=True, start="fork")
    variants = {
        f"{nodes} nodes, round-robin": none,
        "+ placement": placed,
        "+ planning": planned,
        "+ reuse, warm zygote": reusing,
        "+ eager": replace(reusing, timing="eager"),
    }
    return tuple(Step(name, _cluster(nodes, variant)) for name, variant in variants.items())


def _cluster(nodes: int, variant: ClusterVariant) -> Callable[[Cell, Setting], Deployment]:
    def deploy(cell: Cell, setting: Setting) -> Deployment:
        return ClusterDeployment(cell, nodes, _ROOM * cell.updates, variant)

    return deploy


def cluster_mode(nodes: int) -> Mode:
    """What one step on a cluster needs, to find out whether several fit at once."""

    def needs(cell: Cell) -> Needs:
        slots = cell.updates + 3 + 2 * cell.tree.leaves
        memory = nodes * (slots * cell.update_bytes + _NODE_BYTES)
        return Needs(memory, 3 * (nodes + 1) * cell.update_bytes)

    def deploy(cell: Cell, setting: Setting) -> Deployment:
        return ClusterDeployment(cell, nodes, _ROOM * cell.updates, ClusterVariant())

    return Mode(f"lifl on {nodes} nodes", "LIFL on several nodes", deploy, needs, lambda _: (2.0, ""))

"""The way from the broker to LIFL in single steps, as in the paper's ablation: each adds one mechanism.

The first row is the tuned broker as a serverless platform runs it when load comes and goes: functions and their
sidecars are started when a round's first event arrives, and fold once all inputs are there (lazy).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lifl_bench.deployment import Cell, Deployment
from lifl_bench.lifl_mode import LiflDeployment, Variant
from lifl_bench.modes import Setting


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

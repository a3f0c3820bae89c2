"""The modes that can be compared: what each needs, and how it is deployed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from lifl_bench.deployment import Cell, Deployment

Missing = tuple[str, str]
"""What is missing, and the command that installs it."""

_INTERPRETER_BYTES: Final = 40 << 20


@dataclass(frozen=True)
class Needs:
    """What a mode takes for one cell, roughly, in bytes; measured peaks were lower."""

    memory: int
    disk: int = 0


@dataclass(frozen=True)
class Setting:
    """What the user chose for all modes."""

    nats_url: str | None = None


@dataclass(frozen=True)
class Mode:
    """One way to aggregate."""

    name: str
    summary: str
    deploy: Callable[[Cell, Setting], Deployment]
    needs: Callable[[Cell], Needs]
    copies: Callable[[Cell], tuple[float, str]]
    """How often an update is copied, and where."""
    missing: Callable[[Setting], list[Missing]] = lambda setting: []


# --- LIFL ----------------------------------------------------------------------------------------------------


def _deploy_lifl(cell: Cell, setting: Setting) -> Deployment:
    from lifl_bench.lifl_mode import LiflDeployment

    return LiflDeployment(cell, "lifl")


def _deploy_lifl_unix(cell: Cell, setting: Setting) -> Deployment:
    from lifl_bench.lifl_mode import LiflDeployment, Variant

    return LiflDeployment(cell, "lifl-unix", Variant(data_plane="unix"))


def _needs_lifl(cell: Cell) -> Needs:
    slots = cell.updates + 3 + 2 * cell.tree.leaves
    # Two checkpoints, and the next one while it is written.
    return Needs(slots * cell.update_bytes + 6 * _INTERPRETER_BYTES, 3 * cell.update_bytes)


def _copies_lifl(cell: Cell) -> tuple[float, str]:
    from lifl_bench.lifl_mode import COPIES, COPIES_DETAIL

    return COPIES, COPIES_DETAIL


# --- gRPC ----------------------------------------------------------------------------------------------------


def _deploy_grpc(cell: Cell, setting: Setting) -> Deployment:
    from lifl_bench.grpc_mode.deployment import GrpcDeployment

    return GrpcDeployment(cell)


def _needs_grpc(cell: Cell) -> Needs:
    buffers = min(cell.updates, 8 * cell.tree.leaves) + 5 * cell.tree.leaves
    return Needs(buffers * cell.update_bytes + 3 * cell.tree.leaves * _INTERPRETER_BYTES)


def _copies_grpc(cell: Cell) -> tuple[float, str]:
    from lifl_bench.grpc_mode.deployment import COPIES, COPIES_DETAIL

    return COPIES, COPIES_DETAIL


def _missing_grpc(setting: Setting) -> list[Missing]:
    return _missing_packages({"grpc": "grpcio"})


def _missing_packages(packages: Mapping[str, str]) -> list[Missing]:
    """Which of these modules (with their distributions' names) cannot be imported."""
    absent = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    return [(f"the Python package {name}", "pip install 'lifl[bench]'") for name in absent]


# --- the broker ----------------------------------------------------------------------------------------------


def _deploy_broker(cell: Cell, setting: Setting) -> Deployment:
    from lifl_bench.broker.deployment import BrokerDeployment
    from lifl_bench.broker.tuning import TUNED

    return BrokerDeployment(cell, TUNED, nats_url=setting.nats_url)


def _deploy_broker_wire(cell: Cell, setting: Setting) -> Deployment:
    from lifl_bench.broker.deployment import BrokerDeployment
    from lifl_bench.broker.tuning import WIRE

    return BrokerDeployment(cell, WIRE, nats_url=setting.nats_url)


def _deploy_broker_stock(cell: Cell, setting: Setting) -> Deployment:
    from lifl_bench.broker.deployment import BrokerDeployment
    from lifl_bench.broker.tuning import STOCK

    return BrokerDeployment(cell, STOCK, nats_url=setting.nats_url)


def _needs_broker(cell: Cell) -> Needs:
    # The store holds each update and partial aggregate; Go's collector lets it grow to twice that.
    store = 2 * (cell.updates + cell.tree.leaves + 1)
    return Needs((store + 8 * cell.tree.leaves) * cell.update_bytes + 8 * _INTERPRETER_BYTES)


def _needs_broker_stock(cell: Cell) -> Needs:
    stored = (cell.updates + cell.tree.leaves + 1) * cell.update_bytes
    return Needs((cell.updates + 8 * cell.tree.leaves) * cell.update_bytes + 8 * _INTERPRETER_BYTES, 2 * stored)


def _missing_broker(setting: Setting) -> list[Missing]:
    from lifl_bench.broker.parts import missing_parts

    return missing_parts(own_server=setting.nats_url is None)


def _copies_broker(cell: Cell) -> tuple[float, str]:
    from lifl_bench.broker.tuning import TUNED

    return TUNED.copies, TUNED.copies_detail


def _copies_broker_wire(cell: Cell) -> tuple[float, str]:
    from lifl_bench.broker.tuning import WIRE

    return WIRE.copies, WIRE.copies_detail


def _copies_broker_stock(cell: Cell) -> tuple[float, str]:
    from lifl_bench.broker.tuning import STOCK

    return STOCK.copies, STOCK.copies_detail


MODES: Final[Mapping[str, Mode]] = {
    mode.name: mode
    for mode in (
        Mode("lifl", "LIFL; descriptors through eBPF where allowed", _deploy_lifl, _needs_lifl, _copies_lifl),
        Mode("lifl-unix", "LIFL, descriptors over UNIX sockets", _deploy_lifl_unix, _needs_lifl, _copies_lifl),
        Mode(
            "broker",
            "NATS JetStream, claim check, sidecars; tuned",
            _deploy_broker,
            _needs_broker,
            _copies_broker,
            _missing_broker,
        ),
        Mode(
            "broker-wire",
            "the same with a NATS client written for it",
            _deploy_broker_wire,
            _needs_broker,
            _copies_broker_wire,
            _missing_broker,
        ),
        Mode(
            "broker-stock",
            "the same with the defaults of its parts",
            _deploy_broker_stock,
            _needs_broker_stock,
            _copies_broker_stock,
            _missing_broker,
        ),
        Mode("grpc", "always-on gRPC servers; tuned", _deploy_grpc, _needs_grpc, _copies_grpc, _missing_grpc),
    )
}
"""All modes by name, in the order in which they are shown."""

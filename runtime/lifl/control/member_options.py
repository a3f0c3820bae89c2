"""How a node's coordinator process is told to be the member of a cluster, and what it says of the node."""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lifl import __version__
from lifl.cluster.load import arrival_rate, limit_rate
from lifl.cluster.member_link import MemberOptions
from lifl.cluster.messages import NodeLoad, Register
from lifl.control.context import Context
from lifl.control.job import available_memory
from lifl.messages import EndpointTraffic
from lifl.peer.security import Credentials

CALIBRATION_FILE: Final = "calibration.json"
_UPDATES_PER_CORE: Final = 4
"""A guess of MC until it was measured: an eager fold takes so many updates in one pass."""


@dataclass(frozen=True)
class Membership:
    """A node's place in a cluster."""

    link: MemberOptions
    peers: Credentials
    capacity: float
    """MC."""
    is_calibrated: bool


def add_member_options(parser: argparse.ArgumentParser) -> None:
    """The options of a member; without `--join` the node is on its own."""
    parser.add_argument("--join", default="", help="base URL of the cluster's coordinator")
    parser.add_argument("--name", default=socket.gethostname())
    parser.add_argument("--advertise", default="", help="base URL that others reach the gateways by")
    parser.add_argument("--capacity", type=float, default=0.0, help="MC; 0: as calibrated")
    parser.add_argument("--member-token-file", type=Path)
    parser.add_argument("--peer-certificate", type=Path)
    parser.add_argument("--peer-key", type=Path)
    parser.add_argument("--peer-authority", type=Path)


def membership_of(options: argparse.Namespace, cores: int) -> Membership | None:
    """The node's place in the cluster that the options name; None without one."""
    if not options.join:
        return None
    calibrated = read_calibration(options.state_directory)
    peers = Credentials.from_files(
        options.member_token_file, options.peer_certificate, options.peer_key, options.peer_authority
    )
    link = MemberOptions(
        coordinator=options.join.rstrip("/"),
        name=options.name,
        advertise=options.advertise.rstrip("/"),
        token=peers.token,
        authority=options.peer_authority,
        certificate=options.peer_certificate,
        key=options.peer_key,
    )
    capacity = options.capacity or calibrated or float(_UPDATES_PER_CORE * cores)
    return Membership(link, peers, capacity, bool(calibrated) and not options.capacity)


def read_calibration(state_directory: Path) -> float:
    """The measured MC of this node; 0 when it was not measured."""
    try:
        return float(json.loads((state_directory / CALIBRATION_FILE).read_text())["capacity"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def describe_node(
    context: Context, membership: Membership, incarnation: str, address: str, peer_address: str
) -> Register:
    """What the node says of itself when it joins."""
    return Register(
        name=membership.link.name,
        incarnation=incarnation,
        address=address.rstrip("/"),
        peer_address=peer_address,
        cores=context.cores,
        memory=available_memory(),
        data_plane=context.data_plane,
        functions=tuple(sorted(context.functions or ())),
        capacity=membership.capacity,
        is_calibrated=membership.is_calibrated,
        version=__version__,
        attaches=context.functions is None,
    )


def load_of(context: Context, workers: int, traffic: Iterable[EndpointTraffic]) -> NodeLoad:
    """How busy the node is now."""
    pools = [job.pools for job in context.jobs.values() if job.pools is not None]
    present = sum(len(job.round.in_slot) for job in context.jobs.values() if job.round is not None)
    rate = arrival_rate(traffic, time.monotonic_ns())
    return NodeLoad(
        arrival_rate=limit_rate(rate, context.execution.seconds, present),
        execution_seconds=context.execution.seconds,
        workers=workers,
        pool_bytes=sum(pair.updates.geometry.size + pair.aggregates.geometry.size for pair in pools),
    )

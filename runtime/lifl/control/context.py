"""What the parts of the coordinator share: its jobs, its connections, and its settings."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lifl.cluster.load import ExecutionEstimate
from lifl.control.agent_link import AgentLink
from lifl.control.background import Background
from lifl.control.gateway_connections import GatewayConnection
from lifl.control.job import Job
from lifl.descriptor import Kind
from lifl.endpoint import Endpoint
from lifl.errors import Unavailable
from lifl.messages import DataPlane
from lifl.slot import split_slot_reference

if TYPE_CHECKING:
    from lifl.control.member import Member

log = logging.getLogger("lifl.coordinator")


@dataclass
class Context:
    """Shared state; only the loop's thread touches it. `agent`, `endpoint` and `data_plane` are set at joining."""

    runtime_directory: Path
    state_directory: Path
    gateway_seats: int
    cores: int
    functions: frozenset[str] | None = None
    """Functions that jobs may use; None when they are not known."""
    background: Background = field(default_factory=Background)
    jobs: dict[str, Job] = field(default_factory=dict)
    gateways: dict[int, int] = field(default_factory=dict)
    """Endpoint of the gateway on each seat."""
    subscribers: set[GatewayConnection] = field(default_factory=set)
    execution: ExecutionEstimate = field(default_factory=ExecutionEstimate)
    """E of this node."""
    member: Member | None = None
    """This node's part in its cluster; None for a node on its own."""
    agent: AgentLink = field(init=False)
    endpoint: Endpoint = field(init=False)
    """The coordinator's own, on the data plane of the agent that runs now."""
    data_plane: DataPlane = field(init=False)

    def background_of(self, job: Job) -> Background:
        """The thread in which the job's models are read."""
        return self.background if job.member is None or self.member is None else self.member.pulls

    def publish(self, job: Job) -> None:
        """Tell the subscribed gateways how the job stands."""
        state = job.state(self.data_plane)
        for connection in self.subscribers:
            connection.answer(state)

    def seat_of(self, slot: int) -> int:
        """Seat of the gateway that owns an update slot."""
        _, index = split_slot_reference(slot)
        return index % self.gateway_seats

    def release(self, slot: int, generation: int, round_number: int) -> None:
        """Give an update slot back to the gateway that owns it.

        A gateway that is away hears of it nevertheless: it asks `BusySlots` when it is back.
        """
        gateway = self.gateways.get(self.seat_of(slot))
        if gateway is not None:
            self.send(gateway, slot, round_number, Kind.RELEASE, generation)

    def send(self, destination: int, slot: int, round_number: int, kind: Kind, generation: int = 0) -> None:
        """Send a descriptor. One that the data plane takes no more is made up for after joining again."""
        try:
            self.endpoint.send(destination, slot, round_number, kind, generation)
        except Unavailable as error:
            log.error("%s", error)

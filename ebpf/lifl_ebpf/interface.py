"""What the agent asks of a data plane; `lifl_ebpf.router` and `lifl_gateway.unix_router` both answer it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from lifl.descriptor import MAX_BATCH
from lifl.messages import DataPlane, EndpointTraffic

DEFAULT_CREDIT: Final = 4096
"""Descriptors that may wait unread at one endpoint; in the kernel each costs about 1 KB."""

MINIMUM_CREDIT: Final = MAX_BATCH
"""Less than one full send could never be delivered."""


class EndpointSockets(NamedTuple):
    """The file descriptors that make a process an endpoint; the agent sends them away and closes its copies."""

    near: socket.socket
    """Descriptors go out and come in here."""
    far: socket.socket
    """What could not be delivered comes back here."""
    credit_fd: int
    """Memory of one page; its first u64 is the number of descriptors the endpoint has read."""

    def filenos(self) -> tuple[int, int, int]:
        """The three numbers in the order of `lifl.messages.Welcome`."""
        return self.near.fileno(), self.far.fileno(), self.credit_fd

    def close(self) -> None:
        """Close these copies; those sent to another process stay open there."""
        self.near.close()
        self.far.close()
        os.close(self.credit_fd)


class Router(Protocol):
    """Moves descriptors between endpoints: stamps the source, checks policy and credit, counts.

    What may not pass, finds nobody or exceeds the destination's credit comes back on the sender's far socket.
    """

    @property
    def data_plane(self) -> DataPlane:
        """Name of the data plane."""

    def add_endpoint(self, endpoint: int) -> EndpointSockets:
        """Make a new endpoint reachable. Raises `OSError` when the system refuses (file descriptors, memory)."""

    def remove_endpoint(self, endpoint: int) -> None:
        """Forget an endpoint, its policies and counters; all it had sent is on its way to the receivers."""

    def allow(self, source: int, destination: int) -> None:
        """Let `source` send to `destination`; unknown endpoints are ignored (they have just died)."""

    def deny(self, source: int, destination: int) -> None:
        """Take `allow` back."""

    def forget_policies(self, endpoint: int) -> None:
        """Take back everything allowed from or to `endpoint`."""

    def when_delivered(self, endpoint: int, action: Callable[[], None]) -> None:
        """Call `action` as soon as every descriptor accepted for `endpoint` until now is in its socket; at once
        if that is so already, never if the endpoint is removed before."""

    def traffic(self) -> tuple[EndpointTraffic, ...]:
        """Counters of every endpoint present; endpoint 0 stands for destinations that nobody has."""

    def close(self) -> None:
        """Let everything go; existing endpoints of the kernel's data plane keep working."""

"""A whole gateway: its parts, its threads, and their order at start and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lifl.agent_client import AgentConnection
from lifl.errors import Unavailable
from lifl.logs import say

from lifl_gateway.app import Parts, create_app
from lifl_gateway.coordinator_client import CoordinatorClient, JobBoard, Subscription
from lifl_gateway.ingest import Ingest
from lifl_gateway.layouts import JobLayouts
from lifl_gateway.metrics import Metrics
from lifl_gateway.model_responses import ModelResponses
from lifl_gateway.model_upload import ModelUpload
from lifl_gateway.node_link import NodeLink
from lifl_gateway.peer_exchange import PeerExchange, PeerOptions
from lifl_gateway.server import GatewayServer, Limits
from lifl_gateway.tokens import Tokens

DRAIN_SECONDS: Final = 5.0
_FIRST_PAUSE_SECONDS: Final = 0.02
_LONGEST_PAUSE_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Options:
    """How a gateway is to run."""

    runtime_directory: Path
    """Where `coordinator.sock` is."""
    state_directory: Path
    """Where initial models are put, under `incoming`."""
    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes a free one."""
    seat: int = 0
    seats: int = 1
    """Gateways on this node; with more than one they share the port."""
    limits: Limits = field(default_factory=Limits)
    most_model_bytes: int = 64 << 30
    tokens: Tokens = field(default_factory=Tokens)
    peers: PeerOptions = field(default_factory=PeerOptions)


class Gateway:
    """Runs a gateway. Constructing it binds the port; raises OSError when that cannot be."""

    def __init__(self, options: Options, join: Callable[[], AgentConnection]) -> None:
        """`join` joins the agent once as this seat's gateway and keeps the pools' file descriptors, or raises a
        LiflError."""
        socket_path = str(options.runtime_directory / "coordinator.sock")
        self._socket_path = socket_path
        self._coordinator = CoordinatorClient(socket_path)
        self._board = JobBoard()
        self.link = NodeLink(join, self._coordinator, options.seat, options.seats)
        metrics = Metrics(self.link, self._coordinator)
        pace = options.limits.pace
        parts = Parts(
            coordinator=self._coordinator,
            board=self._board,
            link=self.link,
            ingest=Ingest(self._coordinator, self.link, JobLayouts(self._coordinator, self.link), metrics),
            models=ModelResponses(self._coordinator, self._board, self.link, metrics, pace),
            uploads=ModelUpload(
                self._coordinator, (options.state_directory / "incoming").resolve(), options.most_model_bytes
            ),
            metrics=metrics,
            tokens=options.tokens,
        )
        self.server = GatewayServer(
            options.host,
            options.port,
            create_app(parts),
            limits=options.limits,
            share_port=options.seats > 1,
        )
        self.peers = PeerExchange(self._coordinator, self._board, self.link, options.peers, metrics)
        self._ended = threading.Event()
        self._subscription: Subscription | None = None
        self._threads = [
            threading.Thread(target=self._run_link, name="node-link", daemon=True),
            threading.Thread(target=self._run_subscription, name="subscription", daemon=True),
        ]
        self.has_failed = False
        """No agent was found; the process should end and be started anew."""

    def start(self) -> None:
        """Start the threads that keep the gateway a member of its node."""
        for thread in self._threads:
            thread.start()
        self.peers.start()

    def wait_until_ready(self, seconds: float) -> bool:
        """Wait until updates can be taken; False when that took too long."""
        deadline = time.monotonic() + seconds
        pause = _FIRST_PAUSE_SECONDS
        while not (self.link.is_ready and self._board.is_current):
            if time.monotonic() > deadline or self.server.is_stopping:
                return False
            time.sleep(pause)
        return True

    def serve(self) -> None:
        """Serve HTTP until `stop`, then finish the requests in progress and let go of everything."""
        self.server.serve()
        self._board.release()
        self.server.drain(DRAIN_SECONDS)
        self.peers.stop()
        self._ended.set()
        self.link.stop()
        if self._subscription is not None:
            self._subscription.interrupt()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(1.0)
        self._coordinator.close()

    def stop(self) -> None:
        """Make `serve` return; may be called in a signal handler."""
        self.server.stop()

    def _run_link(self) -> None:
        self.link.run()
        if not self._ended.is_set():
            self.has_failed = not self.server.is_stopping
            self.server.stop()

    def _run_subscription(self) -> None:
        """Follow the coordinator's stream, and find the coordinator again when it ends."""
        pause = _FIRST_PAUSE_SECONDS
        while not self._ended.is_set():
            try:
                subscription = self._subscription = Subscription(self._socket_path, self._board)
            except Unavailable:
                self._ended.wait(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
                continue
            if self._ended.is_set():
                subscription.interrupt()
            pause = _FIRST_PAUSE_SECONDS
            subscription.follow()
            if not (self._ended.is_set() or self.server.is_stopping):
                say("gateway", "lost the coordinator; connecting again")

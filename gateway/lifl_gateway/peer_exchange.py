"""A gateway's dealings with other nodes: it gives models, takes partial aggregates, and sends its own."""

from __future__ import annotations

from dataclasses import dataclass

from lifl.peer.connection import split_address
from lifl.peer.protocol import PartialOffer, PullRequest
from lifl.peer.receptions import Sink
from lifl.peer.security import OPEN, Credentials
from lifl.peer.server import PeerLimits, PeerServer, Source
from lifl.peer.transfer import DEFAULT_PACE, Pace

from lifl_gateway.coordinator_client import CoordinatorClient, JobBoard
from lifl_gateway.lent_models import ModelLender
from lifl_gateway.metrics import Metrics
from lifl_gateway.node_link import NodeLink
from lifl_gateway.partial_receiver import PartialReceiver
from lifl_gateway.partial_sender import PartialSender


@dataclass(frozen=True)
class PeerOptions:
    """How a gateway is to deal with other nodes."""

    address: str = ""
    """HOST:PORT to listen on, port 0 for a free one; empty for a gateway that only sends."""
    credentials: Credentials = OPEN
    allow_anonymous: bool = False
    pace: Pace = DEFAULT_PACE


class PeerExchange:
    """Constructing it binds the port; raises OSError when that cannot be, InvalidInput if strangers could come."""

    def __init__(
        self,
        coordinator: CoordinatorClient,
        board: JobBoard,
        link: NodeLink,
        options: PeerOptions,
        metrics: Metrics,
    ) -> None:
        self._lender = ModelLender(coordinator, board, link)
        self._receiver = PartialReceiver(coordinator, link, metrics)
        self._sender = PartialSender(coordinator, link, options.credentials, options.pace, metrics)
        self._server: PeerServer | None = None
        if options.address:
            host, port = split_address(options.address)
            self._server = PeerServer(
                host,
                port,
                self,
                credentials=options.credentials,
                limits=PeerLimits(pace=options.pace),
                allow_anonymous=options.allow_anonymous,
            )
        link.on_partial = self._sender.take

    @property
    def address(self) -> str:
        """HOST:PORT where other nodes reach it; empty when it only sends."""
        return "" if self._server is None else self._server.address

    def start(self) -> None:
        """Start its threads."""
        self._sender.start()
        if self._server is not None:
            self._server.start()

    def stop(self) -> None:
        """End all transfers and free the slots of those that are incomplete."""
        self._sender.stop()
        if self._server is not None:
            self._server.stop()

    # --- for the server --------------------------------------------------------------------------------------

    def open_model(self, request: PullRequest) -> Source:
        """Lend a part of a model; see `lifl.peer.server.Handler`."""
        return self._lender.open(request)

    def open_partial(self, offer: PartialOffer) -> Sink | None:
        """Give a slot for a partial aggregate; see `lifl.peer.server.Handler`."""
        return self._receiver.open(offer)

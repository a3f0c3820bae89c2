"""The gateways' connections to `coordinator.sock`: accepting them, reading requests, sending answers."""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
from collections.abc import Callable
from functools import partial

from lifl.control.job import Job
from lifl.control_channel import ControlChannel, close_fds
from lifl.errors import ProtocolError, Refused, Unavailable
from lifl.messages import Message, Problem, ToCoordinator

log = logging.getLogger("lifl.coordinator")


class GatewayConnection:
    """One connection of a gateway: either questions and answers, or a subscription."""

    def __init__(self, sock: socket.socket) -> None:
        self.channel: ControlChannel[ToCoordinator] = ControlChannel(sock, ToCoordinator)
        self.leases: dict[int, Job] = {}
        """Job of each model that is lent over this connection."""
        self.has_ended = False
        """Nobody is there to hear an answer."""
        sock.setblocking(False)

    def answer(self, message: Message) -> None:
        """Send. A gateway that reads too slowly to be told everything is cut off: it connects again and is told
        all anew."""
        if self.has_ended:
            return
        try:
            try:
                self.channel.send(message)
            except ProtocolError as error:  # too large: whoever asked is told, and nobody else is bothered
                log.error("%s", error)
                self.channel.send(Problem(500, "The answer is too large", str(error)))
        except Unavailable as error:
            log.debug("answer not delivered: %s", error)
            with contextlib.suppress(OSError):
                self.channel.socket.shutdown(socket.SHUT_RDWR)


Answer = Callable[[GatewayConnection, ToCoordinator], Message | None]
"""Gives the answer to a request, or None when it comes later or never; may raise `Refused`."""


def answer_request(answer: Answer, connection: GatewayConnection, request: ToCoordinator) -> None:
    """Send what `answer` says to a request, or the problem that it raises."""
    message: Message | None
    try:
        message = answer(connection, request)
    except Refused as refusal:
        message = Problem(refusal.status, refusal.title, refusal.detail, getattr(refusal, "retry_after", 0.0))
    except Exception as error:  # one request that goes wrong must not end all jobs
        log.exception("request %s failed", type(request).__name__)
        message = Problem(500, "internal error", f"{type(error).__name__}; see the coordinator's log")
    if message is not None:
        connection.answer(message)


class GatewayConnections:
    """Serves every connection of a listener: `answer` gives the answers, `ended` hears of each end."""

    def __init__(
        self, selector: selectors.BaseSelector, answer: Answer, ended: Callable[[GatewayConnection], None]
    ) -> None:
        self._selector = selector
        self._answer = answer
        self._ended = ended

    def serve(self, listener: socket.socket) -> None:
        """Accept gateways from now on."""
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        connection = GatewayConnection(sock)
        self._selector.register(sock, selectors.EVENT_READ, partial(self._receive, connection))

    def _receive(self, connection: GatewayConnection) -> None:
        try:
            request, fds = connection.channel.receive()
        except BlockingIOError:
            return
        except (Unavailable, ProtocolError) as error:
            log.debug("gateway connection ended: %s", error)
            self._drop(connection)
            return
        close_fds(fds)
        answer_request(self._answer, connection, request)

    def _drop(self, connection: GatewayConnection) -> None:
        self._selector.unregister(connection.channel.socket)
        connection.channel.close()
        connection.has_ended = True
        self._ended(connection)

"""A gateway that cannot be told something must not go on with what it knew."""

from __future__ import annotations

import socket

from lifl.control.gateway_connections import GatewayConnection
from lifl.messages import Problem


def test_a_subscriber_that_does_not_read_is_cut_off():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        connection = GatewayConnection(ours)
        message = Problem(500, "news", "x" * 10_000)
        for _ in range(1000):
            connection.answer(message)
        received = 0
        while theirs.recv(1 << 16):
            received += 1
        assert 0 < received < 1000

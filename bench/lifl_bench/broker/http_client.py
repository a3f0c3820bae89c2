"""Kept-alive HTTP connections on which nothing is copied that need not be."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterable, Mapping
from typing import Final, cast

from lifl.congestion import avoid_bbr

Buffer = bytes | bytearray | memoryview
_STALE: Final = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)
_JOIN_BYTES: Final = 64 * 1024


class Peer:
    """One connection to a server, for one thread."""

    def __init__(self, port: int, *, timeout: float, host: str = "127.0.0.1") -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=timeout)

    def connect(self) -> None:
        """Connect now rather than with the first request."""
        if self._connection.sock is None:
            self._connection.connect()
            avoid_bbr(cast(socket.socket, self._connection.sock))

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._connection.close()

    def post(
        self, target: str, headers: Mapping[str, str], body: Iterable[Buffer] = (), length: int = 0
    ) -> http.client.HTTPResponse:
        """Send one request; the pieces of the body are sent from where they are. The answer is still to be read.

        Raises OSError or http.client.HTTPException.
        """
        self.connect()
        connection = self._connection
        try:
            connection.putrequest("POST", target, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.putheader("content-length", str(length))
            self._send(body, length)
            return connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def _send(self, body: Iterable[Buffer], length: int) -> None:
        pieces = iter(body)
        if length <= _JOIN_BYTES:
            self._connection.endheaders(b"".join(pieces))  # one write, so that head and body are one segment
            return
        self._connection.endheaders()
        for piece in pieces:
            self._connection.sock.sendall(piece)

    def get(self, target: str) -> http.client.HTTPResponse:
        """Ask for something."""
        self.connect()
        try:
            self._connection.request("GET", target)
            return self._connection.getresponse()
        except BaseException:
            self._connection.close()
            raise


def read_all(response: http.client.HTTPResponse) -> memoryview:
    """The whole body, in one buffer."""
    length = response.length
    if length is None:
        return memoryview(response.read())
    body = memoryview(bytearray(length))
    fill(response, body)
    response.read()
    return body


def fill(response: http.client.HTTPResponse, target: memoryview) -> None:
    """Receive exactly as much of the body as fits. Raises ConnectionError if it ends before that."""
    done = 0
    while done < len(target):
        count = response.readinto(target[done:])
        if not count:
            raise ConnectionError("the body ended early")
        done += count

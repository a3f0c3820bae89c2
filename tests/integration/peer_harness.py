"""What tests of transfers between nodes share: a node that gives and takes, and a link that can be cut."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lifl.errors import Refused
from lifl.peer.checksum import FileRange, Segment
from lifl.peer.protocol import PartialOffer, PartialStatus, PullRequest
from lifl.peer.security import Credentials
from lifl.peer.server import PeerLimits, PeerServer

from tests.hosts import require

HEADER = b"\x08\0\0\0\0\0\0\0" + b'{"a":1} '
NO_LINGER = struct.pack("ii", 1, 0)


class GivenModel:
    """A model in a file, as the handler lends it."""

    def __init__(self, node: GivingNode, segments: Sequence[Segment]) -> None:
        self.round = 3
        self.header_bytes = len(HEADER)
        self.segments = segments
        self._node = node

    def close(self) -> None:
        """Note that it came back."""
        self._node.lent -= 1


class TakenPartial:
    """Memory for one partial aggregate."""

    def __init__(self, node: GivingNode, offer: PartialOffer) -> None:
        self.offer = offer
        self.memory = bytearray(offer.nbytes)
        self.view = memoryview(self.memory)
        self.ends: list[str] = []
        self._node = node

    def commit(self) -> PartialStatus:
        """Count it."""
        self.ends.append("commit")
        if callable(self._node.verdict):
            self._node.verdict()
            return "accepted"
        return self._node.verdict

    def abandon(self) -> None:
        """Note it."""
        self.ends.append("abandon")


class GivingNode:
    """A PeerServer with one model and room for partial aggregates."""

    def __init__(self, payload: bytes, *, is_mapped: bool = True, **options: Any) -> None:
        self.payload = payload
        self.fd = os.memfd_create("model")
        os.pwrite(self.fd, payload, 0)
        self._view = memoryview(payload) if is_mapped else None
        self.lent = 0
        self.requests: list[PullRequest] = []
        self.taken: list[TakenPartial] = []
        self.problems: list[Exception] = []
        """Raised, one after another, instead of answering."""
        self.is_duplicate = False
        self.verdict: PartialStatus | Callable[[], None] = "accepted"
        self.server = PeerServer("127.0.0.1", 0, self, **options)
        self.server.start()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self.server.address

    def open_model(self, request: PullRequest) -> GivenModel:
        """For the server."""
        self.requests.append(request)
        if self.problems:
            raise self.problems.pop(0)
        if request.job != "job":
            raise Refused(404, "No such model", request.job)
        self.lent += 1
        whole: list[Segment] = [HEADER, FileRange(self.fd, 0, len(self.payload), self._view)]
        return GivenModel(self, whole[: 1 if request.part == "header" else 2])

    def open_partial(self, offer: PartialOffer) -> TakenPartial | None:
        """For the server."""
        if self.problems:
            raise self.problems.pop(0)
        if self.is_duplicate:
            return None
        self.taken.append(TakenPartial(self, offer))
        return self.taken[-1]

    def close(self) -> None:
        """Stop; nobody may keep anything of it."""
        self.server.stop()
        os.close(self.fd)
        assert self.lent == 0
        assert all(len(taken.ends) == 1 for taken in self.taken), "each sink has exactly one end"
        assert not self.server._connections
        assert not self.server._thread.is_alive()
        assert self.server._receptions._expiry is None


class Link:
    """A TCP relay to a node, which can be cut, damaged and frozen.

    `cuts` and `flips` say, for one connection after another, after how many bytes of what passes from the node (or
    to it, with `upstream`) the connection is cut, or which byte is damaged; None for one that is left alone.
    """

    def __init__(
        self,
        target: str,
        *,
        cuts: Sequence[int | None] = (),
        flips: Sequence[int | None] = (),
        upstream: bool = False,
    ) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._cuts, self._flips = list(cuts), list(flips)
        self._upstream = upstream
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.connections = 0
        self.passed = 0
        """Bytes in the direction that cuts count."""
        self.at: dict[int, Callable[[], None]] = {}
        """Called once when so many bytes have passed."""
        self.is_frozen = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name="link", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket()
            try:
                far.connect(self._target)
            except OSError:
                near.close()
                far.close()
                continue
            self.connections += 1
            self._sockets += [near, far]
            cut = self._cuts.pop(0) if self._cuts else None
            flip = self._flips.pop(0) if self._flips else None
            up, down = ((cut, flip), (None, None)) if self._upstream else ((None, None), (cut, flip))
            self._start(self._pump, near, far, *up, self._upstream)
            self._start(self._pump, far, near, *down, not self._upstream)

    def _pump(
        self, source: socket.socket, sink: socket.socket, cut: int | None, flip: int | None, is_counted: bool
    ) -> None:
        done = 0
        try:
            while data := source.recv(1 << 16):
                if self.is_frozen:
                    continue
                if cut is not None:
                    data = data[: cut - done]
                if flip is not None and done <= flip < done + len(data):
                    damaged = bytearray(data)
                    damaged[flip - done] ^= 0x10
                    data = bytes(damaged)
                sink.sendall(data)
                done += len(data)
                if is_counted:
                    self._count(len(data))
                if cut is not None and done >= cut:
                    self._cut(source)
                    sink.shutdown(socket.SHUT_WR)  # what has passed the link arrives
                    return
            if not self.is_frozen:
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._cut(source, sink)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.passed += nbytes
            due = [place for place in self.at if place <= self.passed]
            actions = [self.at.pop(place) for place in due]
        for action in actions:
            action()

    @staticmethod
    def _cut(*ends: socket.socket) -> None:
        for end in ends:
            try:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            end.close()

    def close(self) -> None:
        """Cut everything."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(5)
        self._listener.close()
        self._cut(*self._sockets)
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()


class Authority:
    """A certificate authority that signs for nodes."""

    def __init__(self, directory: Path, name: str) -> None:
        require("openssl for certificates", None if shutil.which("openssl") else "there is no openssl")
        self._directory = directory
        self._name = name
        self.certificate = directory / f"{name}.pem"
        self._key = directory / f"{name}.key"
        self._openssl("req", "-x509", *self._new_key(self._key), "-subj", f"/CN={name}", "-out", self.certificate)

    def credentials(self, name: str, **options: Any) -> Credentials:
        """What a node of this authority has; it trusts the same authority, or another one's `authority` file."""
        key, request, certificate = (
            self._directory / f"{self._name}-{name}.{end}" for end in ("key", "csr", "pem")
        )
        self._openssl("req", "-new", *self._new_key(key), "-subj", f"/CN={name}", "-out", request)
        signed = ["-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial", "-out", certificate]
        self._openssl("x509", "-req", "-in", request, *signed)
        return Credentials.from_files(
            certificate=certificate, key=key, authority=options.get("authority", self.certificate)
        )

    @staticmethod
    def _new_key(path: Path) -> list[str | Path]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", path]

    @staticmethod
    def _openssl(*arguments: str | Path) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)


def quick(**changes: Any) -> PeerLimits:
    """Limits for tests that wait for them."""
    return PeerLimits(head_seconds=1.0)._replace(**changes)

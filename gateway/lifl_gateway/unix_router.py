"""The data plane without eBPF: the agent itself moves descriptors between UNIX socket pairs.

It keeps the rules of the kernel's router (`lifl_ebpf/router.bpf.c`) to the letter: the source is stamped and
cannot be forged (it is the socket), a send has one verdict, policy, credit and counters are the same, and what
does not pass comes back on the sender's far socket. The pairs are SEQPACKET, not stream, because a verdict
belongs to one send, and only packets keep sends apart.

The agent never blocks on a slow receiver: what its socket does not take waits in a queue that the receiver's
credit bounds.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

from lifl.descriptor import MAX_BATCH, SIZE
from lifl.messages import DataPlane, EndpointTraffic
from lifl.slot import PAGE
from lifl_ebpf.interface import DEFAULT_CREDIT, MINIMUM_CREDIT, EndpointSockets

from lifl_gateway.poller import READ, WRITE, Poller

_MAX_SEND: Final = MAX_BATCH * SIZE
_MAX_PACKET: Final = 65536
"""What an endpoint reads at once; a longer packet would be cut."""
_PACKETS_A_TURN: Final = 64
"""Packets taken from one endpoint before the others get their turn."""
_PACKETS_LEFT: Final = 1 << 14
"""Upper bound of what the socket of an endpoint that has gone can still hold."""
_MAX_BOUNCES: Final = 256
"""Packets kept for a far socket that nobody reads."""
_MAX_ENDPOINTS: Final = 1024
_CREDIT: Final = struct.Struct("<Q")
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _Traffic:
    """Counters of one endpoint, as the kernel's router keeps them."""

    __slots__ = ("bytes", "denied", "descriptors", "full", "interarrival", "last", "unroutable")

    def __init__(self) -> None:
        self.descriptors = self.bytes = self.last = self.denied = self.unroutable = self.full = 0
        self.interarrival = 0
        """Eight times the mean, in nanoseconds."""

    def count(self, descriptors: int, size: int) -> None:
        now = time.monotonic_ns()
        if self.last:
            gap = (now - self.last) // descriptors
            self.interarrival = (
                self.interarrival + gap - (self.interarrival >> 3) if self.interarrival else gap << 3
            )
        self.last = now
        self.descriptors += descriptors
        self.bytes += size

    def report(self, endpoint: int) -> EndpointTraffic:
        return EndpointTraffic(
            endpoint=endpoint,
            descriptors=self.descriptors,
            bytes=self.bytes,
            last_nanoseconds=self.last,
            interarrival_nanoseconds=self.interarrival >> 3,
            denied=self.denied,
            unroutable=self.unroutable,
            full=self.full,
        )


class _Member:
    """The agent's side of one endpoint."""

    __slots__ = ("bounces", "endpoint", "far", "near", "outbox", "page", "peers", "readable", "stamp", "traffic")

    def __init__(self, endpoint: int, near: socket.socket, far: socket.socket, page: mmap.mmap) -> None:
        self.endpoint = endpoint
        self.stamp = endpoint.to_bytes(4, "little")
        self.near = near
        self.far = far
        self.page = page
        self.traffic = _Traffic()
        self.readable = True
        self.outbox: deque[bytes | Callable[[], None]] = deque()
        """What its socket did not take yet, and what is to be called once all before it has been taken."""
        self.bounces: deque[bytes] = deque(maxlen=_MAX_BOUNCES)
        self.peers: set[int] = set()
        """Everyone it may send to or hear from."""

    def room(self, credit: int) -> int:
        """Descriptors that may still be sent to it."""
        consumed: int = _CREDIT.unpack_from(self.page)[0]
        used = self.traffic.descriptors - consumed
        # A count beyond what it was sent is a lie and earns no credit, as in the kernel.
        return credit - used if used >= 0 else 0


class UnixRouter:
    """Router in user space; see `lifl_ebpf.interface.Router`.

    It works inside `poller`'s loop. `credit` is the number of descriptors that may wait at one endpoint. Raises
    `ValueError` for a credit below one full send.
    """

    def __init__(self, poller: Poller, credit: int = DEFAULT_CREDIT) -> None:
        if credit < MINIMUM_CREDIT:
            raise ValueError(f"a credit of {credit} is below one full send of {MINIMUM_CREDIT}")
        self._poller = poller
        self._credit = credit
        self._members: dict[int, _Member] = {}
        self._allowed: set[tuple[int, int]] = set()
        self._nobody = _Traffic()

    @property
    def data_plane(self) -> DataPlane:
        """Name of the data plane."""
        return "unix"

    # --- endpoints and policy ---

    def add_endpoint(self, endpoint: int) -> EndpointSockets:
        """Make a new endpoint reachable; see `Router`. Raises `OSError` when there are too many."""
        if endpoint in self._members:
            raise ValueError(f"endpoint {endpoint:#x} is there already")
        if len(self._members) >= _MAX_ENDPOINTS:
            raise OSError(f"the data plane has its {_MAX_ENDPOINTS} endpoints")
        with contextlib.ExitStack() as undo:
            near, near_out = _pair(undo)
            far, far_out = _pair(undo)
            credit_fd = _credit_page()
            undo.callback(os.close, credit_fd)
            page = mmap.mmap(credit_fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
            near.setblocking(False)
            far.setblocking(False)
            member = _Member(endpoint, near, far, page)
            self._poller.register(near.fileno(), lambda events: self._near_ready(member, events))
            undo.pop_all()
        self._members[endpoint] = member
        return EndpointSockets(near_out, far_out, credit_fd)

    def remove_endpoint(self, endpoint: int) -> None:
        """Forget an endpoint after passing on what it had sent; see `Router`."""
        member = self._members.get(endpoint)
        if member is None:
            return
        if member.readable:
            self._take(member, _PACKETS_LEFT)
        self.forget_policies(endpoint)
        del self._members[endpoint]
        for sock in (member.near, member.far):
            self._poller.unregister(sock.fileno())
            sock.close()
        member.page.close()

    def allow(self, source: int, destination: int) -> None:
        """Let `source` send to `destination`; see `Router`."""
        if source in self._members and destination in self._members:
            self._allowed.add((source, destination))
            self._members[source].peers.add(destination)
            self._members[destination].peers.add(source)

    def deny(self, source: int, destination: int) -> None:
        """Take `allow` back."""
        self._allowed.discard((source, destination))

    def forget_policies(self, endpoint: int) -> None:
        """Take back everything allowed from or to `endpoint`."""
        member = self._members[endpoint]
        for peer in member.peers:
            self._allowed.discard((endpoint, peer))
            self._allowed.discard((peer, endpoint))
            self._members[peer].peers.discard(endpoint)
        member.peers.clear()

    def when_delivered(self, endpoint: int, action: Callable[[], None]) -> None:
        """Call `action` once all that was accepted for `endpoint` is in its socket; see `Router`."""
        member = self._members[endpoint]
        if member.outbox:
            member.outbox.append(action)
        else:
            action()

    def traffic(self) -> tuple[EndpointTraffic, ...]:
        """Counters of every endpoint; see `Router`."""
        nobody = (self._nobody.report(0),) if self._nobody.unroutable else ()
        return nobody + tuple(member.traffic.report(endpoint) for endpoint, member in self._members.items())

    def close(self) -> None:
        """Let all endpoints go."""
        for endpoint in list(self._members):
            self.remove_endpoint(endpoint)

    # --- moving descriptors ---

    def _near_ready(self, member: _Member, events: int) -> None:
        if events & WRITE and member.outbox:
            self._flush(member)
        if not member.readable:
            return
        if events & ~WRITE and not self._take(member, _PACKETS_A_TURN):
            # Its end is closed. A hang-up would wake the loop for ever; its death comes by the control channel.
            member.readable = False
            self._poller.unregister(member.near.fileno())

    def _take(self, member: _Member, packets: int) -> bool:
        """Route up to so many packets of this endpoint; False when it has closed its end."""
        for _ in range(packets):
            try:
                packet = member.near.recv(_MAX_PACKET)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not packet:
                return False
            self._route(member, packet)
        return True

    def _route(self, sender: _Member, packet: bytes) -> None:
        """Pass one send on, or back to its sender; one verdict for all of it."""
        size = len(packet)
        count = size // SIZE
        if size % SIZE or size > _MAX_SEND:
            sender.traffic.denied += count or 1
            self._bounce(sender, packet)
            return
        head = packet[:4]
        if count == 1:
            packet = head + sender.stamp + packet[8:]
            mixed = False
        else:
            parts = [packet[at : at + SIZE] for at in range(0, size, SIZE)]
            mixed = any(part[:4] != head for part in parts)
            packet = b"".join([part[:4] + sender.stamp + part[8:] for part in parts])
        destination = int.from_bytes(head, "little")
        receiver = self._members.get(destination)
        if mixed:
            sender.traffic.denied += count
        elif receiver is None:
            self._nobody.unroutable += count
        elif (sender.endpoint, destination) not in self._allowed:
            sender.traffic.denied += count
        elif receiver.room(self._credit) < count:
            receiver.traffic.full += count
        elif not self._deliver(receiver, packet):
            receiver.traffic.unroutable += count
        else:
            receiver.traffic.count(count, size)
            return
        self._bounce(sender, packet)

    def _deliver(self, receiver: _Member, packet: bytes) -> bool:
        if not receiver.readable:
            return False
        if not receiver.outbox:
            try:
                receiver.near.send(packet, socket.MSG_NOSIGNAL)
                return True
            except BlockingIOError:
                self._poller.modify(receiver.near.fileno(), READ | WRITE)
            except OSError:
                return False
        elif len(receiver.outbox) >= self._credit:
            return False  # It claims to have read what it has not.
        receiver.outbox.append(packet)
        return True

    def _flush(self, member: _Member) -> None:
        """Hand the waiting descriptors to the socket, in as few packets as it takes them."""
        outbox = member.outbox
        while outbox:
            first = outbox[0]
            if not isinstance(first, bytes):
                outbox.popleft()
                first()
                continue
            waiting = islice(outbox, _MAX_PACKET // _MAX_SEND)
            batch: list[bytes] = []
            for item in waiting:
                if not isinstance(item, bytes):
                    break
                batch.append(item)
            try:
                member.near.send(b"".join(batch), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                outbox.clear()  # It hung up: nobody will read this.
                break
            for _ in batch:
                outbox.popleft()
        if member.readable:
            self._poller.modify(member.near.fileno(), READ)

    # --- bounces ---

    def _bounce(self, sender: _Member, packet: bytes) -> None:
        """Give a send back. Bounces only inform: when nobody reads them the oldest are dropped."""
        if not sender.bounces:
            try:
                sender.far.send(packet, socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                self._poller.register(sender.far.fileno(), lambda events: self._far_ready(sender, events), WRITE)
            except OSError:
                return
        sender.bounces.append(packet)

    def _far_ready(self, sender: _Member, _events: int) -> None:
        try:
            while sender.bounces:
                sender.far.send(sender.bounces[0], socket.MSG_NOSIGNAL)
                sender.bounces.popleft()
        except BlockingIOError:
            return
        except OSError:
            sender.bounces.clear()
        self._poller.unregister(sender.far.fileno())


def _pair(undo: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    undo.callback(ours.close)
    undo.callback(theirs.close)
    return ours, theirs


def _credit_page() -> int:
    """Memory of one page that its receiver can neither shrink nor grow under our feet."""
    fd = os.memfd_create("lifl-credit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, PAGE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


__all__ = ["DEFAULT_CREDIT", "UnixRouter"]

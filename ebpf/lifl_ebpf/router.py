"""The data plane in the kernel: descriptors go from the sender's send(2) into the receiver's queue.

The agent's part is to make endpoints and keep the maps of the router (`router.bpf.c`); no descriptor ever passes
through it. Nothing is pinned: after the last process of a node nothing is left in the kernel, and sockets of
a plane whose agent has died keep working until their processes join the next one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from lifl.clock import monotonic_offset
from lifl.messages import DataPlane, EndpointTraffic

from lifl_ebpf.bpf_syscall import (
    ARRAY,
    MMAPABLE,
    NOEXIST,
    BpfError,
    map_create,
    map_delete,
    map_update,
    map_update_batch,
)
from lifl_ebpf.compiler import EbpfUnavailable, compile_router
from lifl_ebpf.interface import DEFAULT_CREDIT, MINIMUM_CREDIT, EndpointSockets
from lifl_ebpf.preflight import ebpf_reason

_MAX_ENDPOINTS: Final = 1024
_TRAFFIC: Final = struct.Struct("<7Q8x")
_EMPTY: Final = bytes(_TRAFFIC.size)
_U32: Final = struct.Struct("<I")
_PAIR: Final = struct.Struct("<II")
_STOCK: Final = 32
"""Credit pages made at a time: replacing one in the map of maps costs a grace period (16 ms measured), however
many are replaced by the same call."""


class _Member:
    __slots__ = ("index", "peers")

    def __init__(self, index: int) -> None:
        self.index = index
        """Place of its counters and credit page."""
        self.peers: set[int] = set()
        """Everyone it may send to or hear from."""


class EbpfRouter:
    """Router in the kernel; see `lifl_ebpf.interface.Router`.

    `credit` is the number of descriptors that may wait at one endpoint (1 KB of kernel memory each). Needs
    CAP_BPF and CAP_NET_ADMIN. Raises `EbpfUnavailable` when the kernel or BCC will not have it, `ValueError` for a
    credit below one full send.
    """

    def __init__(self, credit: int = DEFAULT_CREDIT) -> None:
        if credit < MINIMUM_CREDIT:
            raise ValueError(f"a credit of {credit} is below one full send of {MINIMUM_CREDIT}")
        reason = ebpf_reason()
        if reason:
            raise EbpfUnavailable(reason)
        fds = compile_router(credit, _MAX_ENDPOINTS)
        self._fds = fds
        self._sockets, self._identities, self._destinations, self._policies, traffic, self._credits = fds
        # bpf_ktime_get_ns knows no time namespaces, but who reads the counters may live in one.
        self._clock_offset = monotonic_offset()
        self._members: dict[int, _Member] = {}
        self._allowed: set[tuple[int, int]] = set()
        self._free = deque(range(1, _MAX_ENDPOINTS))
        """Places whose credit page has to be replaced before use: a process that is gone for the agent may still
        hold the old one."""
        self._stock: deque[tuple[int, int]] = deque()
        """Places with a fresh credit page, and its file descriptor."""
        size = _MAX_ENDPOINTS * _TRAFFIC.size
        self._traffic = mmap.mmap(traffic, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        try:
            self._refill()
            self.add_endpoint(0xFFFFFFFF).close()  # shows now, not at the first worker, that everything works
            self.remove_endpoint(0xFFFFFFFF)
        except OSError as error:
            self.close()
            raise EbpfUnavailable(f"a trial endpoint could not be made: {error}") from error

    @property
    def data_plane(self) -> DataPlane:
        """Name of the data plane."""
        return "ebpf"

    # --- endpoints ---

    def add_endpoint(self, endpoint: int) -> EndpointSockets:
        """Make a new endpoint reachable; see `Router`. Raises `OSError` when the system refuses."""
        if endpoint in self._members:
            raise ValueError(f"endpoint {endpoint:#x} is there already")
        if not self._stock:
            self._refill()
        index, credit_fd = self._stock.popleft()
        key = _U32.pack(endpoint)
        with contextlib.ExitStack() as undo:
            undo.callback(self._free.append, index)
            undo.callback(os.close, credit_fd)
            near, far = tcp_pair()
            undo.callback(near.close)
            undo.callback(far.close)
            self._clear(index)
            handle = _U32.pack(near.fileno())
            map_update(self._identities, handle, _PAIR.pack(endpoint, index))
            # Another socket would silently take a key over; ids are never reused, so that is always a fault.
            map_update(self._sockets, key, handle, NOEXIST)
            undo.callback(map_delete, self._sockets, key)
            map_update(self._destinations, key, _U32.pack(index), NOEXIST)
            undo.pop_all()
        self._members[endpoint] = _Member(index)
        return EndpointSockets(near, far, credit_fd)

    def remove_endpoint(self, endpoint: int) -> None:
        """Forget an endpoint; see `Router`. A process that lives on can neither send nor receive with it."""
        member = self._members.get(endpoint)
        if member is None:
            return
        self.forget_policies(endpoint)
        key = _U32.pack(endpoint)
        map_delete(self._destinations, key)
        map_delete(self._sockets, key)  # the kernel has done so already when the socket is closed
        del self._members[endpoint]
        self._free.append(member.index)

    def _refill(self) -> None:
        """Put fresh credit pages at the next free places, all in one call."""
        count = min(_STOCK, len(self._free))
        if not count:
            raise OSError(f"the data plane has its {_MAX_ENDPOINTS - 1} endpoints")
        places = [self._free.popleft() for _ in range(count)]
        fds: list[int] = []
        try:
            fds.extend(map_create(ARRAY, 4, 8, 1, MMAPABLE) for _ in places)
            map_update_batch(self._credits, _packed(places), _packed(fds), count)
        except OSError:
            for fd in fds:
                os.close(fd)
            self._free.extend(places)
            raise
        self._stock.extend(zip(places, fds, strict=True))

    def _clear(self, index: int) -> None:
        start = index * _TRAFFIC.size
        self._traffic[start : start + _TRAFFIC.size] = _EMPTY

    # --- policy ---

    def allow(self, source: int, destination: int) -> None:
        """Let `source` send to `destination`; see `Router`."""
        if source not in self._members or destination not in self._members:
            return
        map_update(self._policies, _policy(source, destination), b"\1")
        self._allowed.add((source, destination))
        self._members[source].peers.add(destination)
        self._members[destination].peers.add(source)

    def deny(self, source: int, destination: int) -> None:
        """Take `allow` back."""
        if (source, destination) in self._allowed:
            self._allowed.discard((source, destination))
            map_delete(self._policies, _policy(source, destination))

    def forget_policies(self, endpoint: int) -> None:
        """Take back everything allowed from or to `endpoint`."""
        member = self._members[endpoint]
        for peer in member.peers:
            self.deny(endpoint, peer)
            self.deny(peer, endpoint)
            self._members[peer].peers.discard(endpoint)
        member.peers.clear()

    # --- the rest ---

    def when_delivered(self, endpoint: int, action: Callable[[], None]) -> None:
        """Call `action` at once: a send ends when the descriptor is in the receiver's queue."""
        action()

    def traffic(self) -> tuple[EndpointTraffic, ...]:
        """Counters of every endpoint, read from mapped memory without a system call; see `Router`."""
        nobody = self._report(0, 0)
        return ((nobody,) if nobody.unroutable else ()) + tuple(
            self._report(endpoint, member.index) for endpoint, member in self._members.items()
        )

    def _report(self, endpoint: int, index: int) -> EndpointTraffic:
        descriptors, size, last, mean, denied, unroutable, full = _TRAFFIC.unpack_from(
            self._traffic, index * _TRAFFIC.size
        )
        return EndpointTraffic(
            endpoint=endpoint,
            descriptors=descriptors,
            bytes=size,
            last_nanoseconds=last + self._clock_offset if last else 0,
            interarrival_nanoseconds=mean >> 3,
            denied=denied,
            unroutable=unroutable,
            full=full,
        )

    def close(self) -> None:
        """Close the maps; endpoints in other processes keep working with each other until they are closed."""
        self._traffic.close()
        for _, fd in self._stock:
            os.close(fd)
        self._stock.clear()
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _policy(source: int, destination: int) -> bytes:
    return struct.pack("<Q", source << 32 | destination)


def _packed(numbers: list[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets on loopback; the listener between them lives for this call only."""
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        near = socket.socket()
        undo.callback(near.close)
        near.connect(listener.getsockname())
        while True:
            far, peer = listener.accept()
            if peer == near.getsockname():
                break
            far.close()  # somebody else found the port
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        undo.pop_all()
        listener.close()
    return near, far


__all__ = ["BpfError", "EbpfRouter", "EbpfUnavailable"]

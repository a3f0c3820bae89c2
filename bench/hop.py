"""What one hop of the data plane costs: the round trip of one descriptor between two processes.

    python bench/hop.py [-o json] [--repeats N] [--round-trips N]

Compares, alternating within each repeat, on one processor and on two:

* `bare`: an SK_MSG program that does nothing but redirect by the first u32; plain send and recv
* `router`: the router of LIFL (stamp, policy, credit, counters) and the store to the credit page; send and recv
* `endpoint`: the same router, used as the platform does: `Endpoint.send`, `wait`, `receive`
* `unix`: the same through the agent of the unix data plane, which moves the descriptors itself

The goal is that the router costs at most 1.2 times the bare program. Needs CAP_BPF and CAP_NET_ADMIN.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from lifl.descriptor import Kind, encode
from lifl.endpoint import Endpoint
from lifl.slot import PAGE
from lifl_ebpf.bpf_syscall import map_update
from lifl_ebpf.compiler import EbpfUnavailable, compile_router
from lifl_ebpf.interface import EndpointSockets
from lifl_ebpf.router import EbpfRouter, tcp_pair
from lifl_gateway.poller import Poller
from lifl_gateway.unix_router import UnixRouter

GOAL: Final = 1.2
PING, PONG = 1, 2

BARE: Final = """
#include <uapi/linux/bpf.h>
BPF_SOCKHASH(sockets, u32, 16);
int route(struct sk_msg_md *message)
{
    u32 *destination = (void *)(long)message->data;
    if ((void *)(destination + 1) > (void *)(long)message->data_end)
        return SK_PASS;
    u32 key = *destination;
    sockets.msg_redirect_hash(message, &key, BPF_F_INGRESS);
    return SK_PASS;
}
"""

Loop = Callable[[int], None]
"""Makes so many round trips, or answers so many."""


@contextlib.contextmanager
def bare() -> Iterator[tuple[Loop, Loop]]:
    """The two loops over the minimal program."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "bare.c")
        source.write_text(BARE)
        (sockets,) = compile_router(0, 16, source, ("sockets",))
    pairs = [tcp_pair(), tcp_pair()]
    for name, (near, _) in zip((PING, PONG), pairs, strict=True):
        map_update(sockets, struct.pack("<I", name), struct.pack("<I", near.fileno()))
    to_pong, to_ping = (encode(name, 0, 0, Kind.UPDATE) for name in (PONG, PING))
    ping, pong = pairs[0][0], pairs[1][0]

    def ask(count: int) -> None:
        for _ in range(count):
            ping.send(to_pong)
            ping.recv(16)

    def answer(count: int) -> None:
        for _ in range(count):
            pong.recv(16)
            pong.send(to_ping)

    yield ask, answer
    for pair in pairs:
        for sock in pair:
            sock.close()
    os.close(sockets)


def as_endpoint(name: int, sockets: EndpointSockets) -> Endpoint:
    """What a process makes of what the agent sends it."""
    page = mmap.mmap(sockets.credit_fd, PAGE)
    os.close(sockets.credit_fd)
    return Endpoint(name, sockets.near, sockets.far, page)


def endpoints(router: EbpfRouter) -> tuple[Endpoint, Endpoint]:
    """Two endpoints that may talk to each other."""
    pair = as_endpoint(PING, router.add_endpoint(PING)), as_endpoint(PONG, router.add_endpoint(PONG))
    router.allow(PING, PONG)
    router.allow(PONG, PING)
    return pair


def plain_loops(ping: Endpoint, pong: Endpoint) -> tuple[Loop, Loop]:
    """Send and recv on the sockets themselves, and the store to the credit page."""
    to_pong, to_ping = (encode(name, 0, 0, Kind.UPDATE) for name in (PONG, PING))

    def ask(count: int) -> None:
        sock, credit = ping.near, ping._credit
        assert credit is not None
        read = credit[0]
        for _ in range(count):
            sock.send(to_pong)
            sock.recv(16)
            read += 1
            credit[0] = read

    def answer(count: int) -> None:
        sock, credit = pong.near, pong._credit
        assert credit is not None
        read = credit[0]
        for _ in range(count):
            sock.recv(16)
            read += 1
            credit[0] = read
            sock.send(to_ping)

    return ask, answer


def endpoint_loops(ping: Endpoint, pong: Endpoint) -> tuple[Loop, Loop]:
    """What the platform's processes do."""

    def ask(count: int) -> None:
        for number in range(count):
            ping.send(PONG, number, 1, Kind.UPDATE)
            ping.wait()
            ping.receive()

    def answer(count: int) -> None:
        for _ in range(count):
            pong.wait()
            for item in pong.receive():
                pong.send(PING, item.slot, item.round, Kind.FOLDED)

    return ask, answer


@contextlib.contextmanager
def kernel(make: Callable[[Endpoint, Endpoint], tuple[Loop, Loop]]) -> Iterator[tuple[Loop, Loop]]:
    """Loops over the router in the kernel."""
    router = EbpfRouter()
    pair = endpoints(router)
    yield make(*pair)
    for endpoint in pair:
        endpoint.close()
    router.close()


@contextlib.contextmanager
def unix() -> Iterator[tuple[Loop, Loop]]:
    """Loops over the router of the unix data plane, which runs in a process of its own like the agent."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            serve_unix(theirs)
        os._exit(0)
    theirs.close()
    _, fds, _, _ = socket.recv_fds(ours, 1, 6)
    ours.close()
    pair = [
        as_endpoint(name, EndpointSockets(socket.socket(fileno=near), socket.socket(fileno=far), credit))
        for name, (near, far, credit) in zip((PING, PONG), (fds[:3], fds[3:]), strict=True)
    ]
    try:
        yield endpoint_loops(*pair)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for endpoint in pair:
            endpoint.close()


def serve_unix(channel: socket.socket) -> None:
    """Route between two endpoints until killed; their file descriptors go to `channel`."""
    poller = Poller()
    router = UnixRouter(poller)
    sockets = [router.add_endpoint(PING), router.add_endpoint(PONG)]
    router.allow(PING, PONG)
    router.allow(PONG, PING)
    socket.send_fds(channel, [b"!"], [fd for each in sockets for fd in each.filenos()])
    for each in sockets:
        each.close()
    poller.run()


def microseconds(ask: Loop, answer: Loop, count: int, processors: tuple[int, int]) -> float:
    """Mean time of one round trip between this process and a forked one."""
    warm_up = max(100, count // 10)
    everywhere = os.sched_getaffinity(0)
    child = os.fork()
    if child == 0:
        try:
            os.sched_setaffinity(0, {processors[1]})
            answer(warm_up + count)
        finally:
            os._exit(0)
    try:
        os.sched_setaffinity(0, {processors[0]})
        ask(warm_up)
        start = time.perf_counter()
        ask(count)
        return (time.perf_counter() - start) / count * 1e6
    finally:
        os.sched_setaffinity(0, everywhere)
        os.waitpid(child, 0)


def measure(repeats: int, count: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds of every repeat, by placement and variant."""
    processors = sorted(os.sched_getaffinity(0))
    placements = {"one processor": (processors[0], processors[0])}
    if len(processors) > 1:
        placements["two processors"] = (processors[0], processors[1])
    variants = ("bare", "router", "endpoint", "unix")
    found: dict[str, dict[str, list[float]]] = {place: {name: [] for name in variants} for place in placements}
    for repeat in range(repeats):
        order = variants if repeat % 2 == 0 else variants[::-1]
        for place, pair in placements.items():
            for name in order:
                with opened(name) as (ask, answer):
                    found[place][name].append(microseconds(ask, answer, count, pair))
    return found


def opened(name: str) -> contextlib.AbstractContextManager[tuple[Loop, Loop]]:
    """The loops of one variant."""
    if name == "bare":
        return bare()
    if name == "router":
        return kernel(plain_loops)
    if name == "endpoint":
        return kernel(endpoint_loops)
    return unix()


def summary(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, extremes and the median of the ratios to `bare` of the same repeat."""
    return {
        place: {
            name: {
                "median_us": statistics.median(values),
                "min_us": min(values),
                "max_us": max(values),
                "ratio_to_bare": statistics.median(
                    value / base for value, base in zip(values, variants["bare"], strict=True)
                ),
            }
            for name, values in variants.items()
        }
        for place, variants in found.items()
    }


def main() -> int:
    """Command line; the exit status is 1 when eBPF cannot be used here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--round-trips", type=int, default=20_000)
    options = parser.parse_args()
    try:
        result = summary(measure(options.repeats, options.round_trips))
    except EbpfUnavailable as error:
        print(f"hop: {error}", file=sys.stderr)
        return 1
    if options.output == "json":
        print(json.dumps({"goal": GOAL, "repeats": options.repeats, "round_trip": result}, indent=2))
        return 0
    for place, variants in result.items():
        print(f"round trip of one descriptor, {place} (median [min..max] of {options.repeats}, us; ratio to bare)")
        for name, row in variants.items():
            mark = f"  goal {GOAL}" if name == "router" else ""
            spread = f"[{row['min_us']:.2f}..{row['max_us']:.2f}]"
            print(f"  {name:9} {row['median_us']:7.2f} {spread:18} {row['ratio_to_bare']:5.2f}{mark}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

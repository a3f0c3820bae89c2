"""A network namespace of the benchmark's own, so that every mode meets the same, good, loopback.

bbr, the default congestion control of many machines, costs 1.75 times the CPU of cubic over loopback. LIFL chooses
per socket; nginx, nats-server and gRPC cannot. In a namespace of their own all of them get cubic, or reno, which
over loopback is as good; nothing that listens can be reached from outside, and no port can collide.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1
_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")

_libc = ctypes.CDLL(None, use_errno=True)


def enter_private_network() -> str:
    """Move this process, and all it starts from now on, into a new network namespace, with a good loopback.

    Returns an empty string when that worked, else why not; then nothing has changed. Call before any thread runs.
    """
    if _libc.unshare(_CLONE_NEWNET):
        return f"no network namespace of its own ({os.strerror(ctypes.get_errno()).lower()})"
    _raise_loopback()
    for name in ("cubic", "reno"):  # a namespace may only choose what the administrator allows everybody
        with contextlib.suppress(OSError):
            _CONGESTION_CONTROL.write_text(name)
            break
    return ""


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def congestion_control() -> str:
    """The congestion control that sockets of this namespace get by default; empty if it cannot be told."""
    try:
        return _CONGESTION_CONTROL.read_text().strip()
    except OSError:
        return ""

"""The congestion control of the node's own TCP sockets.

bbr, a common default, paces packets as for a long fat line; over loopback it costs 1.75 times the CPU of cubic
(measured, see bench/ingest.py). Accepted sockets inherit the choice from the listener.
"""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Final

_ALGORITHMS: Final = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_BETTER: Final = (b"cubic", b"reno")


def avoid_bbr(sock: socket.socket) -> None:
    """Choose cubic, or reno where cubic is not permitted, if the system's default is bbr."""
    try:
        if not _ALGORITHMS.read_bytes().startswith(b"bbr"):
            return
    except OSError:
        return
    for name in _BETTER:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
            return

"""Which clock a process reads when it reads CLOCK_MONOTONIC.

It counts from the boot of the machine, so its moments mean nothing after the next one. In a time namespace (of a
container, say) it is also ahead of the kernel's own by an offset, which another namespace does not have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_OFFSETS: Final = Path("/proc/self/timens_offsets")
_NANOSECONDS: Final = 1_000_000_000


def monotonic_offset(offsets: Path = _OFFSETS) -> int:
    """Nanoseconds by which CLOCK_MONOTONIC of this process is ahead of the kernel's, which eBPF programs read.

    It is 0 outside of time namespaces, and where the kernel has none.
    """
    try:
        lines = offsets.read_text().splitlines()
    except OSError:
        return 0
    for name, *numbers in map(str.split, lines):
        if name == "monotonic":
            seconds, nanoseconds = map(int, numbers)
            return seconds * _NANOSECONDS + nanoseconds
    return 0


def clock_name(boot_id: Path = _BOOT_ID, offsets: Path = _OFFSETS) -> str:
    """A name that processes have in common if their monotonic moments can be compared; empty if none can be told.

    The inode of a time namespace would not do: it is given to another one as soon as the last process has left.
    """
    try:
        boot = boot_id.read_text().strip()
    except OSError:
        return ""
    offset = monotonic_offset(offsets)
    return f"{boot}{offset:+d}" if boot and offset else boot

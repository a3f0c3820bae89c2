"""What a test looks at to see whether something of its own is left on the machine."""

from __future__ import annotations

import os
from pathlib import Path

_OTHERS = ("libpod", "lifl-test-")
"""Beginnings of names in /dev/shm: podman's locks, which stay, and a unit test's file."""


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(_OTHERS)}


def mounts() -> set[str]:
    """All mounts but those of containers, which come and go beside other tests."""
    lines = Path("/proc/mounts").read_text().splitlines()
    return {line for line in lines if "/containers/" not in line and "/lifl-containers-" not in line}

"""What our own processes of the deployment have in common: how they are started and say that they are ready."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Mapping
from typing import Final

from lifl_bench.processes import THREAD_VARIABLES

_KEEP_LARGE_BLOCKS: Final = {
    # Without these glibc maps every chunk and every array of a model's size anew, and each first touch of a page
    # is a fault.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
}


def python_environment(environment: Mapping[str, str], *, keep_large_blocks: bool) -> dict[str, str]:
    """For our own processes: one thread for each numerical library, and a malloc that keeps large blocks."""
    ours = {**environment, **dict.fromkeys(THREAD_VARIABLES, "1")}
    return ours | _KEEP_LARGE_BLOCKS if keep_large_blocks else ours


def python_command(module: str, *arguments: str) -> list[str]:
    """How a module of this package is run."""
    return [sys.executable, "-m", f"lifl_bench.broker.{module}", *arguments]


# --- in the process ------------------------------------------------------------------------------------------


def say_ready(line: str) -> None:
    """Tell whoever started this process."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def wait_for_end() -> None:
    """Wait until this process is told to end. Call it in the main thread."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()

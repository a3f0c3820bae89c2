"""What every process of a node does first."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

SUPERVISOR_VARIABLE: Final = "LIFL_SUPERVISOR"
"""Environment variable in which the supervisor names its pid to its children."""

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)


def end_with_supervisor() -> None:
    """Have the kernel send SIGTERM when the supervisor dies, so that a killed node leaves no process behind.

    Does nothing in a process that no supervisor started (a container).
    """
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    if supervisor is None:
        return
    end_with_parent(int(supervisor), signal.SIGTERM)


def end_with_parent(parent: int, signal_number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent, which has the pid `parent`, dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
    if os.getppid() != parent:  # it had died before
        os.kill(os.getpid(), signal_number)

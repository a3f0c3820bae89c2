"""Linux capabilities of this process: what it holds, and giving up the rest (capabilities(7), prctl(2))."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

CAP_SETPCAP: Final = 8
CAP_NET_ADMIN: Final = 12
CAP_SYS_ADMIN: Final = 21
CAP_BPF: Final = 39

_VERSION_3: Final = 0x20080522
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def effective_capabilities() -> set[int]:
    """Numbers of the capabilities in this thread's effective set."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            mask = int(line.split()[1], 16)
            return {number for number in range(64) if mask >> number & 1}
    return set()


def has_capabilities(wanted: Collection[int]) -> bool:
    """Whether every one of these capabilities is effective now."""
    return effective_capabilities().issuperset(wanted)


def drop_capabilities(keep: Collection[int] = ()) -> None:
    """Give up, for good, every capability but those in `keep` that this process holds.

    Empties the bounding (as far as CAP_SETPCAP is there to do it), ambient and inheritable sets, sets permitted
    and effective to `keep`, and forbids gaining anything by an exec. Capabilities belong to a thread: call
    it before others are started. Raises `OSError` when the kernel refuses.
    """
    held = effective_capabilities()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if CAP_SETPCAP in held:
        for number in range(64):
            if number in keep:
                continue
            with contextlib.suppress(OSError):  # beyond the last capability this kernel knows
                _prctl(_PR_CAPBSET_DROP, number)
    mask = sum(1 << number for number in set(keep) & held)
    halves = (_Sets * 2)(*(_Sets(mask >> shift & 0xFFFFFFFF, mask >> shift & 0xFFFFFFFF, 0) for shift in (0, 32)))
    _checked(_libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), halves))


def _prctl(option: int, argument: int) -> None:
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument), zero, zero, zero))


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

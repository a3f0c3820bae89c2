"""What processes cost: CPU time, memory, and bytes written to disk, read from outside through the kernel's clocks
and /proc."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class ProcessStat(NamedTuple):
    """A line of /proc/PID/stat, as far as it is used here."""

    parent: int
    own_ticks: int
    """CPU time of the process itself."""
    reaped_ticks: int
    """CPU time of the children it has waited for, and of theirs."""
    started: int
    """Start time: with the pid it identifies a process for good."""


def read_stat(pid: int) -> ProcessStat | None:
    """The process's line, or None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    own, reaped = (sum(int(field) for field in fields[start : start + 2]) for start in (11, 13))
    return ProcessStat(int(fields[1]), own, reaped, int(fields[19]))


def tree_of(pid: int) -> dict[int, ProcessStat]:
    """`pid` and every process below it."""
    stats = {
        int(name): stat
        for name in os.listdir("/proc")
        if name.isdecimal() and (stat := read_stat(int(name))) is not None
    }
    children: dict[int, list[int]] = {}
    for child, stat in stats.items():
        children.setdefault(stat.parent, []).append(child)
    found: dict[int, ProcessStat] = {}
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        if current in stats:
            found[current] = stats[current]
            waiting += children.get(current, ())
    return found


def precise_cpu(pid: int) -> float:
    """CPU seconds of one process with all its threads, ended ones included, to the nanosecond; 0 if it is gone.

    The clock id is that of clock_getcpuclockid(3), which Python does not wrap.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def tree_cpu(pid: int) -> float:
    """CPU seconds of `pid` and its descendants; those of ended ones, to 10 ms, if their parent waited for them."""
    return sum(precise_cpu(member) + stat.reaped_ticks / TICKS_PER_SECOND for member, stat in tree_of(pid).items())


def memory_of(pids: Iterable[int]) -> int:
    """Memory of these processes now, in bytes: the sum of their proportional set sizes (Pss), tmpfs and memfd
    pages that they map included."""
    total = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return total


def memory_of_tree(pid: int) -> int:
    """Memory of `pid` and its descendants now; see `memory_of`."""
    return memory_of(tree_of(pid))


def written_bytes(pids: Iterable[int]) -> int:
    """Bytes that these processes have had written to block devices (`write_bytes` of /proc/PID/io)."""
    total = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/io").read_text().splitlines():
                if line.startswith("write_bytes:"):
                    total += int(line.split()[1])
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return total


class Usage(NamedTuple):
    """What one component has used so far."""

    cpu: float
    written: int


def usage_of(components: Mapping[str, Iterable[int]]) -> dict[str, Usage]:
    """What each component has used; its processes are named by their pids, without those below them."""
    return {
        name: Usage(sum(precise_cpu(pid) + _reaped_seconds(pid) for pid in pids), written_bytes(pids))
        for name, pids in ((name, list(pids)) for name, pids in components.items())
    }


def _reaped_seconds(pid: int) -> float:
    stat = read_stat(pid)
    return stat.reaped_ticks / TICKS_PER_SECOND if stat else 0.0


def peak_memory(look: Callable[[], int], action: Callable[[], object], *, every_s: float = 0.01) -> int:
    """Largest value of `look` while `action` runs. Looking costs CPU: do not time the action."""
    seen = [look()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            seen.append(look())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        action()
    finally:
        done.set()
        watching.join()
    return max(seen)

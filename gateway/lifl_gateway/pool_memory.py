"""The memory of pools: made or adopted by the agent, pre-faulted, given back.

Huge pages are used where the system offers them without being changed: files in a private tmpfs with its own
huge page setting (needs CAP_SYS_ADMIN for one moment at start, and is mounted nowhere), else memfds where the
kernel lets shared memory ask for huge pages, else memfds of ordinary pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat
import threading
from pathlib import Path
from typing import Final

from lifl.capabilities import CAP_SYS_ADMIN, has_capabilities
from lifl.errors import InvalidInput, LiflError
from lifl.messages import PoolInfo

_FSOPEN: Final = 430  # the same numbers on every architecture
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432
_CLOEXEC: Final = 1
_SET_STRING: Final = 1
_CMD_CREATE: Final = 6
_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_KEEP_SIZE_PUNCH_HOLE: Final = 1 | 2
_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_WRITE: Final = 23
_PROT_READ_WRITE: Final = 1 | 2
_MAP_SHARED: Final = 1
_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_CHUNK: Final = 64 << 20
_MAX_POOL_BYTES: Final = 1 << 46
_SHMEM_SETTING: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


class NoMemory(LiflError):
    """The node has not enough free memory for the pool."""


class PoolMemory:
    """One pool's memory. Owns `fd`, which is writable; sizes are in bytes."""

    def __init__(self, info: PoolInfo, fd: int) -> None:
        self.info = info
        self.fd = fd
        """Open for reading and writing."""
        self.unpopulated = 0
        """Bytes promised to the pool that the pre-faulting thread has not yet taken from the system."""
        self._read_only = -1
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def size(self) -> int:
        """Bytes of the pool."""
        return self.info.geometry.size

    @property
    def read_only_fd(self) -> int:
        """The same memory for whoever may not write: a writable mapping of it is refused."""
        if self._read_only < 0:
            self._read_only = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        return self._read_only

    def populate(self) -> None:
        """Take the pages from the system in a thread of its own, so that nobody waits for a fault later."""
        self.unpopulated = self.size
        self._thread = threading.Thread(target=self._populate, name=f"pool-{self.info.pool}", daemon=True)
        self._thread.start()

    def _populate(self) -> None:
        address = _libc.mmap(None, self.size, _PROT_READ_WRITE, _MAP_SHARED, self.fd, 0)
        if address == _MAP_FAILED:
            self.unpopulated = 0
            return
        try:
            _libc.madvise(address, self.size, _MADV_HUGEPAGE)
            for offset in range(0, self.size, _CHUNK):
                if self._stop.is_set():
                    break
                length = min(_CHUNK, self.size - offset)
                # A kernel before 5.14 says EINVAL; then pages come at first use, which is all that is lost.
                if _libc.madvise(address + offset, length, _MADV_POPULATE_WRITE) < 0:
                    break
                self.unpopulated -= length
        finally:
            self.unpopulated = 0
            _libc.munmap(address, self.size)

    def reclaim(self) -> None:
        """Give every page back to the system; what the pool held is lost and reads as zeros."""
        self._stop_populating()
        if _libc.fallocate(self.fd, _KEEP_SIZE_PUNCH_HOLE, 0, self.size) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _stop_populating(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()  # at most one chunk
            self._thread = None

    def close(self) -> None:
        """Forget the memory; it lives on as long as another process maps it."""
        self._stop_populating()
        for fd in (self.fd, self._read_only):
            if fd >= 0:
                os.close(fd)
        self.fd = self._read_only = -1


class PoolFactory:
    """Makes pool memory. Construct it before capabilities are dropped, or huge pages may be out of reach."""

    def __init__(self) -> None:
        self._mount = _private_tmpfs()
        self.huge_pages = self._mount >= 0 or _shmem_setting() in ("always", "within_size", "advise", "force")
        """Whether pools may lie in huge pages."""

    def create(self, info: PoolInfo, promised: int = 0) -> PoolMemory:
        """Make a new pool and start to pre-fault it.

        `promised` is what other pools have yet to take, in bytes. Raises `NoMemory` when the node has not
        enough, `InvalidInput` for an impossible size, `OSError` when the system refuses.
        """
        size = info.geometry.size
        _check_geometry(info)
        free = available_memory()
        if size + promised > free:
            raise NoMemory(
                f"pool {info.pool} of job {info.job} needs {size >> 20} MiB and {promised >> 20} MiB are promised "
                f"to others, but only {free >> 20} MiB are free; use fewer slots"
            )
        fd = self._file(size)
        memory = PoolMemory(info, fd)
        memory.populate()
        return memory

    def adopt(self, info: PoolInfo, fd: int) -> PoolMemory:
        """Take over the memory of a pool that an earlier agent made; owns `fd` from here on.

        Raises `InvalidInput` when it cannot be that pool's memory.
        """
        try:
            _check_geometry(info)
            status = os.fstat(fd)
            writable = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR) == os.O_RDWR
            if not stat.S_ISREG(status.st_mode) or not writable or status.st_size != info.geometry.size:
                raise InvalidInput(f"the file handed over is not the memory of pool {info.pool}")
        except BaseException:
            os.close(fd)
            raise
        return PoolMemory(info, fd)

    def _file(self, size: int) -> int:
        if self._mount >= 0:
            fd = os.open(".", os.O_TMPFILE | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._mount)
        else:
            fd = os.memfd_create("lifl-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            if self._mount < 0:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            os.fchmod(fd, 0o400)  # who holds a read-only handle cannot open it again for writing by mistake
        except BaseException:
            os.close(fd)
            raise
        return fd

    def close(self) -> None:
        """Let the private tmpfs go; pools in it live on while they are open."""
        if self._mount >= 0:
            os.close(self._mount)
            self._mount = -1


def _check_geometry(info: PoolInfo) -> None:
    geometry = info.geometry
    if min(geometry.slots, geometry.payload_capacity) <= 0 or geometry.header_capacity < 0:
        raise InvalidInput(f"pool {info.pool} has no slots")
    if geometry.size > _MAX_POOL_BYTES:
        raise InvalidInput(f"pool {info.pool} of {geometry.size} bytes is larger than any machine")


def available_memory() -> int:
    """Bytes that can be used without swapping: what the kernel says, or less where a cgroup allows less."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = _cgroup_room()
    return free if limit is None else min(free, limit)


def _cgroup_room() -> int | None:
    """Bytes this process's cgroup (version 2) leaves; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                group = Path("/sys/fs/cgroup") / line[3:].lstrip("/")
                limit = int((group / "memory.max").read_text())
                used = int((group / "memory.current").read_text())
                cached = next(
                    int(entry.split()[1])
                    for entry in (group / "memory.stat").read_text().splitlines()
                    if entry.startswith("inactive_file ")
                )
                return max(0, limit - used + cached)
    return None


def _shmem_setting() -> str:
    """The chosen word of the kernel's huge page setting for shared memory; empty when it has none."""
    try:
        words = _SHMEM_SETTING.read_text().split()
    except OSError:
        return ""
    return next((word.strip("[]") for word in words if word.startswith("[")), "")


def _private_tmpfs() -> int:
    """Open a tmpfs with huge pages, mounted nowhere, gone with its file descriptor; -1 if not possible."""
    if _shmem_setting() in ("", "deny") or not has_capabilities({CAP_SYS_ADMIN}):
        return -1
    try:
        context = _syscall(_FSOPEN, b"tmpfs", _CLOEXEC)
    except OSError:
        return -1
    try:
        # within_size: a huge page never reaches past the end of a pool, so small pools cost no more.
        for key, value in ((b"huge", b"within_size"), (b"mode", b"0700"), (b"size", b"100%")):
            _syscall(_FSCONFIG, context, _SET_STRING, key, value, 0)
        _syscall(_FSCONFIG, context, _CMD_CREATE, None, None, 0)
        return _syscall(_FSMOUNT, context, _CLOEXEC, _NOSUID_NODEV_NOEXEC)
    except OSError:
        return -1
    finally:
        os.close(context)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    converted = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result

"""A pool of slots as one process maps it; the memory belongs to the agent.

Mapping costs nothing until a page is touched. The layout is `lifl.slot.PoolGeometry`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from types import TracebackType
from typing import Final

from lifl.errors import ProtocolError
from lifl.messages import PoolInfo
from lifl.slot import PAGE

_ACCESS_MODE: Final = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


class _Buffer(ctypes.Structure):
    """`Py_buffer`: the one way to the address of a read-only mapping that needs no third-party package."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _address(mapping: mmap.mmap) -> int:
    view = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(view), 0)
    try:
        return int(view.buf)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


def is_writable(fd: int) -> bool:
    """Whether the file descriptor was opened for writing."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & _ACCESS_MODE == os.O_RDWR


class MappedPool:
    """One mapped pool. `info` describes it; addresses and sizes are in bytes.

    Takes over `fd`: it is closed here unless `keep_fd`, which keeps it as `fd` for `sendfile`. `writable` asks
    for a writable mapping; None maps as the file descriptor allows. Raises `PermissionError` when writing is
    asked for and not allowed, `ProtocolError` when the memory is smaller than the pool.
    """

    def __init__(self, info: PoolInfo, fd: int, writable: bool | None = None, *, keep_fd: bool = False) -> None:
        self.info = info
        self.geometry = info.geometry
        self.fd = -1
        """The pool's file descriptor if it was kept, else -1."""
        try:
            self.writable = is_writable(fd) if writable is None else writable
            if os.fstat(fd).st_size < self.geometry.size:
                raise ProtocolError(f"pool {info.pool} has less memory than its {self.geometry.size} bytes")
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
            self._map = mmap.mmap(fd, self.geometry.size, mmap.MAP_SHARED, protection)
            if keep_fd:
                self.fd = fd
        finally:
            if self.fd != fd:
                os.close(fd)
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        self.address = _address(self._map)
        """Address of slot 0 in this process; valid until `close`."""

    def slot(self, index: int) -> memoryview:
        """All bytes of slot `index`. Raises `IndexError` when there is no such slot."""
        start = self._start(index)
        return self._view[start : start + self.geometry.stride]

    def header(self, index: int) -> memoryview:
        """The header page of slot `index` (update header or seal)."""
        start = self._start(index)
        return self._view[start : start + PAGE]

    def layout(self, index: int) -> memoryview:
        """The room for the safetensors header of slot `index`."""
        start = self._start(index) + PAGE
        return self._view[start : start + self.geometry.header_capacity]

    def payload(self, index: int, nbytes: int | None = None) -> memoryview:
        """The first `nbytes` of the payload of slot `index`, all of its room by default.

        Raises `ValueError` when the payload has no room for that many.
        """
        capacity = self.geometry.payload_capacity
        size = capacity if nbytes is None else nbytes
        if not 0 <= size <= capacity:
            raise ValueError(f"{size} bytes do not fit a payload of {capacity}")
        start = self.payload_offset(index)
        return self._view[start : start + size]

    def payload_offset(self, index: int) -> int:
        """Offset in the pool's memory, for `sendfile`, of the payload of slot `index`."""
        return self._start(index) + self.geometry.payload_offset

    def payload_address(self, index: int) -> int:
        """Address in this process of the payload of slot `index`; valid until `close`."""
        return self.address + self.payload_offset(index)

    def _start(self, index: int) -> int:
        if not 0 <= index < self.geometry.slots:
            raise IndexError(f"pool {self.info.pool} has no slot {index}")
        return index * self.geometry.stride

    def close(self) -> None:
        """Unmap. While views of a slot are alive the mapping stays, and goes with the last of them."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._view.release()
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> MappedPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""The few commands of bpf(2) that the agent needs once BCC has loaded the router; no library behind it."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import Final

from lifl.errors import LiflError

_SYSCALL: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_MAP_CREATE: Final = 0
_MAP_LOOKUP: Final = 1
_MAP_UPDATE: Final = 2
_MAP_DELETE: Final = 3
_PROG_GET_NEXT_ID: Final = 11
_MAP_GET_NEXT_ID: Final = 12
_PROG_GET_FD_BY_ID: Final = 13
_OBJ_GET_INFO_BY_FD: Final = 15
_MAP_UPDATE_BATCH: Final = 26
_ATTR_BYTES: Final = 120

ARRAY: Final = 2
SOCKHASH: Final = 18
NOEXIST: Final = 1
MMAPABLE: Final = 1 << 10

_libc: Final = ctypes.CDLL(None, use_errno=True)


class BpfError(LiflError, OSError):
    """bpf(2) refused; `errno` says why."""


def _bpf(command: int, attributes: bytes) -> int:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise BpfError(38, f"bpf(2) has no known number on {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, _ATTR_BYTES)
    result = int(_libc.syscall(ctypes.c_long(number), ctypes.c_long(command), buffer, ctypes.c_long(_ATTR_BYTES)))
    if result < 0:
        error = ctypes.get_errno()
        raise BpfError(error, f"bpf: {os.strerror(error)}")
    return result


def map_create(kind: int, key_size: int, value_size: int, entries: int, flags: int = 0) -> int:
    """Create a map and return its file descriptor (the kernel makes it close-on-exec). Sizes in bytes."""
    return _bpf(_MAP_CREATE, struct.pack("<5I", kind, key_size, value_size, entries, flags))


def map_update(fd: int, key: bytes, value: bytes, flags: int = 0) -> None:
    """Set one entry. Raises `BpfError` (EEXIST with `NOEXIST`, E2BIG when full)."""
    _element(_MAP_UPDATE, fd, key, value, flags)


def map_delete(fd: int, key: bytes) -> bool:
    """Delete one entry; False when there was none."""
    try:
        _element(_MAP_DELETE, fd, key, b"", 0)
    except BpfError as error:
        if error.errno == 2:
            return False
        raise
    return True


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """Read one entry of `value_size` bytes; None when there is none."""
    value = ctypes.create_string_buffer(value_size)
    held = ctypes.create_string_buffer(key, len(key))
    try:
        _bpf(_MAP_LOOKUP, struct.pack("<IxxxxQQQ", fd, ctypes.addressof(held), ctypes.addressof(value), 0))
    except BpfError as error:
        if error.errno == 2:
            return None
        raise
    return value.raw


def map_update_batch(fd: int, keys: bytes, values: bytes, count: int) -> None:
    """Set `count` entries at once: one grace period for all of them where the kernel needs one."""
    held_keys = ctypes.create_string_buffer(keys, len(keys))
    held_values = ctypes.create_string_buffer(values, len(values))
    _bpf(
        _MAP_UPDATE_BATCH,
        struct.pack(
            "<QQQQIIQQ", 0, 0, ctypes.addressof(held_keys), ctypes.addressof(held_values), count, fd, 0, 0
        ),
    )


def _element(command: int, fd: int, key: bytes, value: bytes, flags: int) -> None:
    held = ctypes.create_string_buffer(key, len(key))
    content = ctypes.create_string_buffer(value, len(value)) if value else None
    address = ctypes.addressof(content) if content is not None else 0
    _bpf(command, struct.pack("<IxxxxQQQ", fd, ctypes.addressof(held), address, flags))


def _identifiers(command: int) -> list[int]:
    found: list[int] = []
    attributes = ctypes.create_string_buffer(struct.pack("<III", 0, 0, 0), _ATTR_BYTES)
    number = _SYSCALL[platform.machine()]
    while True:
        last = found[-1] if found else 0
        struct.pack_into("<II", attributes, 0, last, 0)
        if (
            _libc.syscall(ctypes.c_long(number), ctypes.c_long(command), attributes, ctypes.c_long(_ATTR_BYTES))
            < 0
        ):
            error = ctypes.get_errno()
            if error == 2:
                return found
            raise BpfError(error, f"bpf: {os.strerror(error)}")
        found.append(struct.unpack_from("<II", attributes, 0)[1])


def program_ids() -> list[int]:
    """Ids of every BPF program in the kernel (needs CAP_SYS_ADMIN)."""
    return _identifiers(_PROG_GET_NEXT_ID)


def map_ids() -> list[int]:
    """Ids of every BPF map in the kernel (needs CAP_SYS_ADMIN)."""
    return _identifiers(_MAP_GET_NEXT_ID)


def program_map_ids(program: int) -> set[int]:
    """Ids of the maps that the program of this id uses (needs CAP_SYS_ADMIN); empty when it is gone."""
    try:
        fd = _bpf(_PROG_GET_FD_BY_ID, struct.pack("<III", program, 0, 0))
    except BpfError as error:
        if error.errno == 2:
            return set()
        raise
    try:
        room = 64
        ids = (ctypes.c_uint32 * room)()
        # struct bpf_prog_info: nr_map_ids lies at 52, the pointer map_ids at 56
        info = ctypes.create_string_buffer(64)
        struct.pack_into("<IQ", info, 52, room, ctypes.addressof(ids))
        _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("<IIQ", fd, len(info), ctypes.addressof(info)))
        return set(ids[: struct.unpack_from("<I", info, 52)[0]])
    finally:
        os.close(fd)

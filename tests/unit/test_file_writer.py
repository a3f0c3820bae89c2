"""Checkpoints are written whole, whatever their size and the file system."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lifl.control import file_writer
from lifl.control.file_writer import write_file

MIB = 1 << 20


@pytest.fixture(params=["disk", "tmpfs"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    target = Path("/dev/shm") / f"lifl-test-{os.getpid()}"
    target.mkdir()
    yield target
    for file in target.iterdir():
        file.unlink()
    target.rmdir()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, 3 * MIB + 777])
def test_a_file_of_any_size_has_exactly_its_bytes(directory: Path, size: int) -> None:
    data = os.urandom(size)

    write_file(directory / "file", [data])

    assert (directory / "file").read_bytes() == data


@given(sizes=st.lists(st.integers(0, 9000), max_size=6))
def test_parts_of_any_size_follow_each_other(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    parts = [os.urandom(size) for size in sizes]
    path = tmp_path_factory.mktemp("parts") / "file"

    write_file(path, [memoryview(part) for part in parts])

    assert path.read_bytes() == b"".join(parts)


def test_a_longer_file_that_was_there_is_replaced(directory: Path) -> None:
    write_file(directory / "file", [os.urandom(5 * MIB)])

    write_file(directory / "file", [b"short"])

    assert (directory / "file").read_bytes() == b"short"


def test_a_file_system_without_direct_writes_gets_ordinary_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def refuse_direct(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really_open(path, flags, mode)

    monkeypatch.setattr(file_writer.os, "open", refuse_direct)
    data = os.urandom(2 * MIB + 5)

    write_file(tmp_path / "file", [data[:100], data[100:]])

    assert (tmp_path / "file").read_bytes() == data


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "missing" / "file", [b"data"])

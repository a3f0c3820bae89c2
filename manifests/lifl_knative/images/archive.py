"""Tar archives that are the same for the same content: sorted, owned by root, all of one time."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path, PurePosixPath
from types import TracebackType

FIXED_TIME = 315532800
"""Seconds since the epoch, 1980-01-01: the time of all files and images, unless SOURCE_DATE_EPOCH says another."""


def source_date() -> int:
    """The time that files and images bear: SOURCE_DATE_EPOCH of the environment, else `FIXED_TIME`."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(text) if text.isascii() and text.isdigit() else FIXED_TIME


class Archive:
    """A root file system that is being put together; `close` writes it to the file in the order of its paths.

    Paths are absolute. Directories above what is added need not be added. Files keep their permission to be
    executed and lose all others: everybody may read them, and only root owns them.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries: dict[str, tuple[tarfile.TarInfo, Path | bytes | None]] = {}

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def __contains__(self, path: str) -> bool:
        return _name(path) in self._entries

    def add_directory(self, path: str, mode: int = 0o755, *, owner: int = 0) -> None:
        """A directory; `owner` is its user and group."""
        info = self._info(path, tarfile.DIRTYPE, mode)
        info.uid = info.gid = owner
        self._entries[info.name] = (info, None)

    def add_link(self, path: str, target: str) -> None:
        """A symbolic link that holds `target`."""
        info = self._info(path, tarfile.SYMTYPE, 0o777)
        info.linkname = target
        self._entries[info.name] = (info, None)

    def add_bytes(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """A file with this content."""
        info = self._info(path, tarfile.REGTYPE, mode)
        info.size = len(content)
        self._entries[info.name] = (info, content)

    def add_file(self, path: str, source: Path) -> None:
        """The file or symbolic link `source` of this machine; it is read when the archive is closed."""
        status = source.lstat()
        if stat.S_ISLNK(status.st_mode):
            self.add_link(path, os.readlink(source))
            return
        info = self._info(path, tarfile.REGTYPE, 0o755 if status.st_mode & 0o111 else 0o644)
        info.size = status.st_size
        self._entries[info.name] = (info, source)

    def add_tree(self, path: str, source: Path) -> None:
        """All files below the directory `source`."""
        for directory, names, files in os.walk(source):
            inside = PurePosixPath(path, Path(directory).relative_to(source).as_posix())
            for name in files:
                self.add_file(str(inside / name), Path(directory) / name)
            for name in names:
                if (Path(directory) / name).is_symlink():
                    self.add_file(str(inside / name), Path(directory) / name)

    def close(self) -> None:
        """Write the file. Raises OSError."""
        for name in list(self._entries):
            for parent in PurePosixPath(name).parents:
                if str(parent) != "." and str(parent) not in self._entries:
                    self.add_directory(str(parent))
        with tarfile.open(self._file, "w", format=tarfile.PAX_FORMAT) as tar:
            for name in sorted(self._entries):
                info, content = self._entries[name]
                if isinstance(content, Path):
                    with content.open("rb") as stream:
                        tar.addfile(info, stream)
                else:
                    tar.addfile(info, None if content is None else io.BytesIO(content))

    def _info(self, path: str, kind: bytes, mode: int) -> tarfile.TarInfo:
        info = tarfile.TarInfo(_name(path))
        info.type = kind
        info.mode = mode
        info.mtime = source_date()
        return info


def _name(path: str) -> str:
    return path.strip("/")

"""The files of a function project that go into its image."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from lifl.errors import InvalidProject

from lifl_knative.images.ignore import FILE_NAME, read_rules


def find_project_files(directory: Path) -> dict[str, Path]:
    """Every file that `.funcignore` does not leave out: path relative to the project, with `/`, to the file.

    Raises InvalidProject for a file that cannot be read, and for a link that leads out of the project.
    """
    directory = directory.resolve()
    rules = read_rules(directory)
    files: dict[str, Path] = {}

    def walk(folder: Path, prefix: str) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            path = prefix + entry.name
            is_directory = entry.is_dir(follow_symlinks=False)
            if rules.ignores(path, is_directory=is_directory):
                continue
            if is_directory:
                walk(Path(entry), f"{path}/")
            elif entry.is_symlink():
                _check_link(directory, Path(entry))
                files[path] = Path(entry)
            elif entry.is_file(follow_symlinks=False):
                files[path] = Path(entry)

    try:
        walk(directory, "")
    except OSError as error:
        raise InvalidProject(f"'{error.filename or directory}' cannot be read: {error.strerror}") from None
    return files


def _check_link(directory: Path, link: Path) -> None:
    target = Path(os.readlink(link))
    if target.is_absolute() or not (link.parent / target).resolve().is_relative_to(directory):
        raise InvalidProject(
            f"'{link}' is a link to '{target}', which would not be in the image; "
            f"copy the file, make the link a relative one within the project, or name it in {FILE_NAME}"
        )


def hash_files(files: Mapping[str, Path]) -> str:
    """SHA-256 (hexadecimal) of all paths, contents and permissions to be executed. Raises InvalidProject."""
    total = hashlib.sha256()
    for path in sorted(files):
        try:
            for part in _describe(path, files[path]):
                total.update(len(part).to_bytes(8, "big"))
                total.update(part)
        except OSError as error:
            raise InvalidProject(f"'{files[path]}' cannot be read: {error.strerror}") from None
    return total.hexdigest()


def _describe(path: str, file: Path) -> Iterator[bytes]:
    yield path.encode("utf-8", "surrogateescape")
    status = file.lstat()
    if stat.S_ISLNK(status.st_mode):
        yield b"link"
        yield os.fsencode(os.readlink(file))
        return
    yield b"executable" if status.st_mode & 0o111 else b"file"
    with file.open("rb") as stream:
        yield hashlib.file_digest(stream, "sha256").digest()

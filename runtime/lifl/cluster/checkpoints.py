"""The models that the coordinator keeps, as files under its state directory.

    jobs/NAME/checkpoints/round-00000012.safetensors         the global model that starts round 12
    jobs/NAME/checkpoints/round-00000012.state.safetensors   the server optimiser's arrays at that point
    jobs/NAME/model-header.json                              of a sharded job: the header of the whole model
    incoming/                                                initial models while they are received

A file is written beside its name, fsynced, and renamed, so one that has the name is whole. Which of them count
says the journal.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol

from lifl.cluster.coordinator import CheckpointTask
from lifl.errors import InvalidModel
from lifl.model_layout import parse_header
from lifl.shards import Shard, plan_shards, shard_name

_LENGTH_BYTES: Final = 8

Part = Literal["model", "state"]


class FetchModel(Protocol):
    """Gets a part of a model from one of the nodes that have it."""

    def __call__(
        self, job: str, nonce: int, round_number: int, part: Part, sources: Sequence[str], path: Path
    ) -> None:
        """Write the part to a new file; `sources` are HOST:PORT. Raises LiflError or OSError if it cannot."""


class CheckpointStore:
    """The files of one state directory."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory if it is missing, and removes what an earlier process left half-written."""
        self._jobs = directory / "jobs"
        self.incoming = directory / "incoming"
        for path in (self._jobs, self.incoming):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (*self.incoming.iterdir(), *self._jobs.glob("*/checkpoints/*.partial")):
            path.unlink(missing_ok=True)

    def _directory(self, job: str) -> Path:
        return self._jobs / job / "checkpoints"

    def model_path(self, job: str, round_number: int) -> Path:
        """Where the model that starts this round is, or would be."""
        return self._directory(job) / f"round-{round_number:08d}.safetensors"

    def state_path(self, job: str, round_number: int) -> Path:
        """Where the optimiser's arrays at the start of this round are, or would be."""
        return self._directory(job) / f"round-{round_number:08d}.state.safetensors"

    def make_room(self, job: str) -> None:
        """Have an empty directory for a new job; what a former one of this name left is moved aside."""
        if (self._jobs / job).exists():
            self.retire(job)
        self._directory(job).mkdir(mode=0o700, parents=True)
        _sync(self._jobs)

    def retire(self, job: str) -> None:
        """Move a job's files aside, so that the name is free; nothing happens if there are none."""
        number = 1
        while (target := self._jobs / f"{job}~{number}").exists():
            number += 1
        try:
            (self._jobs / job).rename(target)
        except FileNotFoundError:
            return
        _sync(self._jobs)

    def split(self, path: Path, count: int) -> tuple[bytes, list[Path]]:
        """Cut the file of an initial model into those of its shards; returns its header and them, all synced.

        The bytes do not come through this process. Raises InvalidModel when it cannot be cut so.
        """
        made: list[Path] = []
        with open(path, "rb") as file:
            header = file.read(int.from_bytes(file.read(_LENGTH_BYTES), "little"))
            start = file.tell()
            try:
                for index, shard in enumerate(plan_shards(parse_header(header), count)):
                    made.append(path.with_suffix(f".{index}"))
                    _copy_shard(file.fileno(), start, shard, made[-1])
            except BaseException:
                for target in made:
                    target.unlink(missing_ok=True)
                raise
        return header, made

    def adopt_shards(self, job: str, header: bytes, paths: Sequence[Path]) -> None:
        """Take over the files of the shards of an initial model, which are synced."""
        for index, path in enumerate(paths):
            self.adopt(path, shard_name(job, index))
        target = self._header_path(job)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = target.with_suffix(".partial")
        temporary.write_bytes(header)
        sync_file(temporary)
        os.rename(temporary, target)
        _sync(target.parent)

    def whole_header(self, job: str) -> bytes:
        """The safetensors header of a sharded job's model. Raises OSError."""
        return self._header_path(job).read_bytes()

    def _header_path(self, job: str) -> Path:
        return self._jobs / job / "model-header.json"

    def adopt(self, path: Path, job: str) -> None:
        """Take over the file of an initial model, which lies on the same file system and is synced."""
        target = self.model_path(job, 1)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.rename(path, target)
        _sync(target.parent)

    def store(self, task: CheckpointTask, fetch: FetchModel) -> None:
        """Fetch a model and what belongs to it; on return it is on the disk. Raises what `fetch` raises."""
        targets: list[tuple[Part, Path]] = [("model", self.model_path(task.job, task.round))]
        if task.has_state:
            targets.insert(0, ("state", self.state_path(task.job, task.round)))
        for part, target in targets:
            temporary = target.with_suffix(f".{task.nonce:x}.partial")
            try:
                fetch(task.job, task.nonce, task.round, part, task.sources, temporary)
                sync_file(temporary)
                os.rename(temporary, target)
                _sync(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self, job: str, rounds: Iterable[int]) -> None:
        """Delete the checkpoints of these rounds, as far as they are there."""
        for number in rounds:
            for path in (self.model_path(job, number), self.state_path(job, number)):
                path.unlink(missing_ok=True)


def _copy_shard(source: int, start: int, shard: Shard, path: Path) -> None:
    """Write the file of one shard. `start` is where the data section begins in the source."""
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(target, len(shard.header).to_bytes(_LENGTH_BYTES, "little") + shard.header)
        position, end = start + shard.offset, start + shard.offset + shard.nbytes
        while position < end:
            copied = _copy_range(source, target, position, end - position)
            if not copied:
                raise InvalidModel("the file ends before its data section does")
            position += copied
        os.fsync(target)
    finally:
        os.close(target)


def _copy_range(source: int, target: int, position: int, count: int) -> int:
    """Copy bytes to the end of a file, within the kernel; returns how many."""
    try:
        return os.copy_file_range(source, target, count, position)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP):
            raise
    return os.sendfile(target, source, position, count)  # some file systems know only this


def sync_file(path: Path) -> None:
    """Have a file's content on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

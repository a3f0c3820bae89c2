"""The models that the coordinator keeps, as files under its state directory.

    jobs/NAME/checkpoints/round-00000012.safetensors         the global model that starts round 12
    jobs/NAME/checkpoints/round-00000012.state.safetensors   the server optimiser's arrays at that point
    incoming/                                                initial models while they are received

A file is written beside its name, fsynced, and renamed, so one that has the name is whole. Which of them count
says the journal.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from lifl.cluster.coordinator import CheckpointTask

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

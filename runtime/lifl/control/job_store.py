"""What of a job survives a restart: its journal and its checkpoints, in one directory per job.

    jobs/NAME/journal.jsonl                          one JSON object per line, appended and fsynced
    jobs/NAME/checkpoints/round-00000012.safetensors         the global model that starts round 12
    jobs/NAME/checkpoints/round-00000012.state.safetensors   the server optimiser's arrays at that point

A checkpoint is written beside its name, fsynced, and renamed, so a file that has the name is whole.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from lifl.control.file_writer import write_file
from lifl.control.round import Round
from lifl.errors import LiflError, Refused
from lifl.messages import JobSpec, RoundState
from lifl.model_layout import MAX_HEADER_BYTES

_CHECKPOINT: Final = re.compile(r"round-(\d{8})\.safetensors")
_ROUND_LINE: Final = re.compile(rb'{"event":"round","round":(\d+),')
JOB_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")
"""What a job may be called: lower-case letters, digits, dashes and dots, at most 63."""


class JobStore:
    """The directory of one job."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._checkpoints = directory / "checkpoints"
        self._journal = directory / "journal.jsonl"

    @classmethod
    def all_under(cls, state_directory: Path) -> Iterable[JobStore]:
        """The stores of every job that was not deleted."""
        for journal in sorted((state_directory / "jobs").glob("*/journal.jsonl")):
            yield cls(journal.parent)

    @classmethod
    def of(cls, state_directory: Path, job: str) -> JobStore:
        """The store of a job, made or not."""
        return cls(state_directory / "jobs" / job)

    def create(self, spec: JobSpec) -> None:
        """Start a journal; what an earlier job of this name left is moved aside."""
        if self.directory.exists():
            self.retire()
        self._checkpoints.mkdir(parents=True)
        self.append({"event": "created", "spec": msgspec.to_builtins(spec)})

    def retire(self) -> None:
        """Move the directory aside, checkpoints and all, so that the name is free again."""
        number = 1
        while (target := self.directory.with_name(f"{self.directory.name}~{number}")).exists():
            number += 1
        self.directory.rename(target)
        with contextlib.suppress(FileNotFoundError):
            (target / "journal.jsonl").rename(target / "journal.retired.jsonl")

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line to the journal and see it to the disk."""
        line = json.dumps(entry, separators=(",", ":")) + "\n"
        fd = os.open(self._journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = "\n" + line  # the last line is torn; this one must not become part of it
            os.write(fd, line.encode())
            os.fsync(fd)
        finally:
            os.close(fd)

    def append_round(self, round_: Round) -> None:
        """Note a complete round: which clients took part, and with what weight."""
        clients = {update.client: update.num_samples for update in round_.updates.values()}
        self.append({"event": "round", "round": round_.number, "clients": clients, "act": round_.act})

    def contributors(self, first: int, end: int) -> dict[int, list[str]]:
        """Whose updates are in the rounds from `first` to before `end`; the last line about a round counts."""
        found: dict[int, list[str]] = {}
        with open(self._journal, "rb") as journal:
            for line in journal:
                match = _ROUND_LINE.match(line)
                if match is not None and first <= int(match[1]) < end:
                    with contextlib.suppress(ValueError):
                        found[int(match[1])] = list(json.loads(line)["clients"])
        return found

    def find_round(self, number: int) -> RoundState | None:
        """A complete round as far as the journal tells: what it does not name (late, leaves...) is 0."""
        found = None
        # Journals get long: only lines that may be the one are parsed.
        mark = f'"round":{number},'.encode()
        with open(self._journal, "rb") as journal:
            for line in journal:
                if mark in line and (state := _complete_round(line)) is not None and state.round == number:
                    found = state
        return found

    def entries(self) -> list[dict[str, Any]]:
        """All whole lines of the journal; a torn last line (the power went) is left out."""
        found = []
        for line in self._journal.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def spec(self) -> JobSpec:
        """The job's specification. Raises `LiflError` when the journal does not begin with one."""
        for entry in self.entries():
            if entry.get("event") == "created":
                return msgspec.convert(entry["spec"], JobSpec)
        raise LiflError(f"{self._journal}: no job in it; move the directory away")

    def checkpoint_path(self, round_number: int) -> Path:
        """Where the model that starts this round is, or would be."""
        return self._checkpoints / f"round-{round_number:08d}.safetensors"

    def state_path(self, round_number: int) -> Path:
        """Where the optimiser's arrays at the start of this round are, or would be."""
        return self._checkpoints / f"round-{round_number:08d}.state.safetensors"

    def rounds(self) -> list[int]:
        """Rounds whose starting model is on disk, ascending."""
        names = os.listdir(self._checkpoints) if self._checkpoints.exists() else []
        return sorted(int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name)))

    def adopt_model(self, path: Path, round_number: int) -> None:
        """Take over a complete model file that lies on the same file system."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(path, self.checkpoint_path(round_number))
        self._sync_directory()

    def read_header(self, round_number: int) -> tuple[bytes, int]:
        """The safetensors header of a round's model and the bytes that follow it; see `ModelReader`."""
        path = self.checkpoint_path(round_number)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise Refused(422, "not a model", f"{path.name}: header of {length} bytes")
            header = file.read(length)
            return header, os.fstat(file.fileno()).st_size - 8 - length

    def read_model(self, round_number: int, header_bytes: int, payload: memoryview) -> None:
        """Fill `payload` with a round's model; see `ModelReader`."""
        with open(self.checkpoint_path(round_number), "rb", buffering=0) as file:
            file.seek(8 + header_bytes)
            _read_whole(file, payload)

    def read_state(self, round_number: int, arrays: Sequence[memoryview]) -> None:
        """Fill the optimiser's arrays if they were kept; see `ModelReader`."""
        path = self.state_path(round_number)
        if arrays and path.exists():
            with open(path, "rb", buffering=0) as file:
                for array in arrays:
                    _read_whole(file, array)

    def write(self, path: Path, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file from parts in order: temporary name, fsync, rename, fsync of the directory."""
        temporary = path.with_suffix(".partial")
        write_file(temporary, parts)
        os.rename(temporary, path)
        self._sync_directory()

    def delete_checkpoints(self, rounds: Iterable[int]) -> None:
        """Delete the checkpoints of these rounds, as far as they are there."""
        for number in rounds:
            for path in (self.checkpoint_path(number), self.state_path(number)):
                path.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Delete half-written files of an earlier process."""
        for path in self._checkpoints.glob("*.partial"):
            path.unlink(missing_ok=True)

    def _sync_directory(self) -> None:
        fd = os.open(self._checkpoints, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _read_whole(file: io.FileIO, view: memoryview) -> None:
    while len(view):
        count = file.readinto(view)
        if not count:
            raise OSError(f"{file.name!r}: shorter than it should be")
        view = view[count:]


def _complete_round(line: bytes) -> RoundState | None:
    """The round that a line of the journal tells of; None for any other line, and for a torn one."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if entry.get("event") != "round":
        return None
    clients = entry["clients"]
    return RoundState(
        round=entry["round"],
        status="complete",
        accepted=len(clients),
        folded=len(clients),
        rejected=0,
        late=0,
        duplicates=0,
        weight=sum(clients.values()),
        act=entry["act"],
        leaves=0,
        started=0,
        reused=0,
    )

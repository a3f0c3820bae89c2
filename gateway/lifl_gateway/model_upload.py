"""Taking in the initial global model of a job: checked while it is written to a file of the state directory."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path
from typing import Final

from lifl.errors import InvalidModel, Refused
from lifl.messages import InstallModel, JobState
from lifl.model_layout import MAX_HEADER_BYTES, parse_header

from lifl_gateway.coordinator_client import CoordinatorClient
from lifl_gateway.ingest import LENGTH_BYTES
from lifl_gateway.request_body import RequestBody

_CHUNK_BYTES: Final = 1 << 20
_INSTALL_SECONDS: Final = 120.0
"""The coordinator answers when the memory of the job is there and round 1 is open."""


class ModelUpload:
    """Receives initial models; usable from any thread."""

    def __init__(self, coordinator: CoordinatorClient, directory: Path, most_bytes: int) -> None:
        """`directory` must be on the file system of the checkpoints; it is made if it is missing."""
        self._coordinator = coordinator
        self._directory = directory
        self._most_bytes = most_bytes
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def install(self, state: JobState, body: RequestBody) -> JobState:
        """Receive a model and have the coordinator open round 1 with it.

        Raises Refused 409/413/507, InvalidModel, or what the body raises when it does not come.
        """
        if state.status != "waiting-for-model":
            raise Refused(409, "Model exists", f"job {state.job!r} has its initial model already")
        if body.remaining > self._most_bytes:
            raise Refused(413, "Content Too Large", f"a model of at most {self._most_bytes} bytes is taken")
        path = self._directory / f"{secrets.token_hex(16)}.safetensors"
        try:
            self._receive(body, path)
            return self._coordinator.ask(InstallModel(state.job, str(path)), JobState, _INSTALL_SECONDS)
        finally:
            with contextlib.suppress(FileNotFoundError):  # the coordinator has moved it
                path.unlink()

    def _receive(self, body: RequestBody, path: Path) -> None:
        header = _receive_header(body)
        parse_header(header, body.remaining)
        try:
            with open(path, "xb", buffering=0, opener=_private) as file:
                file.write(len(header).to_bytes(LENGTH_BYTES, "little"))
                _write_all(file.fileno(), memoryview(header))
                chunk = memoryview(bytearray(min(_CHUNK_BYTES, body.remaining)))
                while body.remaining:
                    part = chunk[: body.remaining]
                    body.fill(part)
                    _write_all(file.fileno(), part)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Refused(507, "Insufficient Storage", "the state directory is full") from error
            raise


def _receive_header(body: RequestBody) -> bytes:
    if body.remaining < LENGTH_BYTES:
        raise InvalidModel(f"{body.remaining} bytes are no safetensors file")
    claimed = int.from_bytes(body.read(LENGTH_BYTES), "little")
    if claimed > min(body.remaining, MAX_HEADER_BYTES):
        raise InvalidModel(f"the safetensors header claims {claimed} bytes; {body.remaining} follow")
    return body.read(claimed)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _write_all(file: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(file, view) :]

"""The coordinator's dealings in bulk: it fetches models to store them, and gives stored ones to nodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from lifl.cluster.checkpoints import FetchModel, Part
from lifl.cluster.coordinator import ClusterCoordinator
from lifl.cluster.service import ClusterService
from lifl.errors import Refused, Unavailable
from lifl.peer.checksum import FileRange, Segment
from lifl.peer.client import pull_file
from lifl.peer.interruption import Interruption
from lifl.peer.protocol import PartialOffer, PullRequest
from lifl.peer.receptions import Sink
from lifl.peer.security import Credentials
from lifl.peer.server import Source

_LENGTH_BYTES: Final = 8
_PATIENCE_SECONDS: Final = 5.0
"""The sources may be lost and others named meanwhile, so it is better to begin again with new ones."""


def fetch_from_nodes(credentials: Credentials, interruption: Interruption, most_bytes: int) -> FetchModel:
    """What gets a model from one of the nodes that have it."""

    def fetch(job: str, nonce: int, round_number: int, part: Part, sources: Sequence[str], path: Path) -> None:
        answer = pull_file(
            sources,
            PullRequest(job, nonce, round_number, part),
            path,
            most=most_bytes,
            credentials=credentials,
            patience=_PATIENCE_SECONDS,
            interruption=interruption,
        )
        if answer.round != round_number:
            raise Unavailable(f"a node gave the model of round {answer.round} for that of round {round_number}")

    return fetch


class StoredPart:
    """A part of a stored model, as `lifl.peer.server.Source`; owns the file."""

    def __init__(self, path: Path, round_number: int, part: str) -> None:
        """Raises Refused 404 when the file is not kept (any more)."""
        self.round = round_number
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Refused(404, "No such model", f"round {round_number} is not kept any more") from None
        size = os.fstat(self._file).st_size
        self.header_bytes = 0
        if part != "state":
            self.header_bytes = _LENGTH_BYTES + int.from_bytes(os.pread(self._file, _LENGTH_BYTES, 0), "little")
        nbytes = self.header_bytes if part == "header" else size
        self.segments: Sequence[Segment] = [FileRange(self._file, 0, nbytes)]

    def close(self) -> None:
        """Close the file."""
        self.segments = ()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class StoredModels:
    """Gives stored models to nodes, as `lifl.peer.server.Handler`. It takes no partial aggregates."""

    def __init__(self, service: Callable[[], ClusterService]) -> None:
        """`service` is asked for at the first use."""
        self._service = service

    def open_model(self, request: PullRequest) -> Source:
        """Lend a part of a stored model; raises Refused 404 when it is not stored."""
        service = self._service()

        def find(coordinator: ClusterCoordinator, now: float) -> int:
            job = coordinator.jobs.by_name.get(request.job)
            number = request.round or (job.model_round if job is not None else 0)
            if job is None or job.nonce != request.nonce or number not in job.checkpoints:
                raise Refused(404, "No such model", f"round {number} of job {request.job!r} is not stored here")
            return number

        number = service.call(find)
        store = service.store
        path = store.state_path if request.part == "state" else store.model_path
        return StoredPart(path(request.job, number), number, request.part)

    def open_partial(self, offer: PartialOffer) -> Sink | None:
        """Refuse: the coordinator aggregates nothing."""
        raise Refused(404, "Not an aggregator", f"the coordinator takes no partial aggregate of {offer.job!r}")

"""Models that lie on other nodes: read over the network, straight to where they shall be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lifl.control.job import Job
from lifl.control.member_options import Membership
from lifl.errors import LiflError, Refused, Unavailable
from lifl.model_layout import MAX_HEADER_BYTES
from lifl.peer.client import Place, pull, pull_bytes
from lifl.peer.protocol import PullAnswer, PullRequest

_LENGTH_BYTES: Final = 8
_PATIENCE_SECONDS: Final = 3.0
"""Without a byte; then the orders are looked at again, which may name other sources."""


class PeerModels:
    """The models of one job of a cluster; see `ModelReader`. What cannot be had is Unavailable, an OSError."""

    def __init__(self, membership: Membership, job: Job) -> None:
        self._credentials = membership.peers
        self._job = job

    def _request(self, round_number: int) -> PullRequest:
        return PullRequest(self._job.spec.name, self._job.nonce, round_number)

    def _sources(self) -> Sequence[str]:
        assert self._job.member is not None
        sources = self._job.member.order.model_sources
        if not sources:
            raise Unavailable("no node is known to have the model")
        return sources

    def read_header(self, round_number: int) -> tuple[bytes, int | None]:
        """The safetensors header of a round's model."""
        request = PullRequest(self._job.spec.name, self._job.nonce, round_number, "header")
        try:
            _, data = pull_bytes(
                self._sources(),
                request,
                _LENGTH_BYTES + MAX_HEADER_BYTES,
                credentials=self._credentials,
                patience=_PATIENCE_SECONDS,
            )
        except LiflError as error:
            raise _unavailable(error) from error
        if len(data) < _LENGTH_BYTES:
            raise Refused(422, "not a model", f"a header of {len(data)} bytes")
        return bytes(data[_LENGTH_BYTES:]), None

    def read_model(self, round_number: int, header_bytes: int, payload: memoryview) -> None:
        """Fill `payload` with a round's model."""

        def place(answer: PullAnswer) -> list[memoryview]:
            if answer.total - answer.header_bytes != len(payload) or answer.header_bytes != 8 + header_bytes:
                raise Unavailable(f"the model of round {round_number} has another size there")
            return [memoryview(bytearray(answer.header_bytes)), payload]

        self._pull(self._sources(), self._request(round_number), place)

    def read_state(self, round_number: int, arrays: Sequence[memoryview]) -> None:
        """Nothing: only the top of a round needs the optimiser's arrays, and has them pulled then."""

    def pull_state(self, round_number: int, arrays: Sequence[memoryview]) -> None:
        """Fill the optimiser's arrays as they are at the start of a round."""
        assert self._job.member is not None
        sources = self._job.member.order.state_sources
        if sources and arrays:
            request = PullRequest(self._job.spec.name, self._job.nonce, round_number, "state")
            self._pull(sources, request, lambda _: list(arrays))

    def _pull(self, sources: Sequence[str], request: PullRequest, place: Place) -> None:
        try:
            pull(sources, request, place, credentials=self._credentials, patience=_PATIENCE_SECONDS)
        except LiflError as error:
            raise _unavailable(error) from error


def _unavailable(error: LiflError) -> OSError:
    """Whatever stands against it now may be over with the next orders."""
    return error if isinstance(error, Unavailable) else Unavailable(str(error))

"""Sending a global model: from its file with sendfile, or, while that is not yet written, from shared memory.

A model in memory is copied to the socket on purpose: pages that sendfile only refers to would still be on their
way when the slot, given back, is written again.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from flask import Response
from lifl.errors import Refused
from lifl.messages import JobState
from lifl.slot import split_slot_reference

from lifl_gateway.coordinator_client import CoordinatorClient, JobBoard, Loan
from lifl_gateway.ingest import LENGTH_BYTES
from lifl_gateway.metrics import Metrics
from lifl_gateway.node_link import NodeLink, header_room
from lifl_gateway.transfer import Pace, send_all, send_file

SAFETENSORS: Final = "application/vnd.safetensors"
LONGEST_WAIT_SECONDS: Final = 60.0
_CHUNK_BYTES: Final = 1 << 20
_ETAG: Final = re.compile(r'(?:W/)?"([0-9a-f]{1,16})-(\d{1,10})"')
_OVER: Final = ("complete", "failed")


def etag(nonce: int, round_number: int) -> str:
    """The ETag of the model that starts a round, in one life of a job."""
    return f'"{nonce:x}-{round_number}"'


def newest_known(if_none_match: str, nonce: int) -> int:
    """The newest round of this life of the job among the ETags of an If-None-Match header; 0 if there is none."""
    rounds = [int(number) for life, number in _ETAG.findall(if_none_match) if int(life, 16) == nonce]
    return max(rounds, default=0)


class FileBody:
    """A model in a file that never changes; takes over the file descriptor."""

    def __init__(self, file: int, pace: Pace, count: Callable[[int], None]) -> None:
        self._file = file
        self._pace = pace
        self._count = count
        self.nbytes = os.fstat(file).st_size

    def send_to(self, sock: socket.socket) -> None:
        """Send the file without copying it."""
        send_file(sock, self._file, self.nbytes, self._pace)
        self._count(self.nbytes)

    def __iter__(self) -> Iterator[bytes]:
        """For a WSGI server that knows nothing of `send_to`."""
        position = 0
        while chunk := os.pread(self._file, _CHUNK_BYTES, position):
            position += len(chunk)
            yield chunk

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class ShardsBody:
    """A model in the files of its shards, one behind the other; takes over the file descriptors."""

    def __init__(self, header: bytes, files: Sequence[int], pace: Pace, count: Callable[[int], None]) -> None:
        """`header` is that of the whole model."""
        self._head = len(header).to_bytes(LENGTH_BYTES, "little") + header
        self._files = list(files)
        self._pace = pace
        self._count = count
        self._parts = [_data_section(file) for file in self._files]
        self.nbytes = len(self._head) + sum(nbytes for _, nbytes in self._parts)

    def send_to(self, sock: socket.socket) -> None:
        """Send the files without copying them."""
        send_all(sock, self._head, self._pace)
        for file, (offset, nbytes) in zip(self._files, self._parts, strict=True):
            send_file(sock, file, nbytes, self._pace, offset=offset)
        self._count(self.nbytes)

    def __iter__(self) -> Iterator[bytes]:
        """For a WSGI server that knows nothing of `send_to`."""
        yield self._head
        for file, (offset, nbytes) in zip(self._files, self._parts, strict=True):
            for position in range(offset, offset + nbytes, _CHUNK_BYTES):
                yield os.pread(file, min(_CHUNK_BYTES, offset + nbytes - position), position)

    def close(self) -> None:
        """Close the files."""
        files, self._files = self._files, []
        for file in files:
            os.close(file)


def _data_section(file: int) -> tuple[int, int]:
    """Where the data section of a safetensors file begins, and how long it is."""
    start = LENGTH_BYTES + int.from_bytes(os.pread(file, LENGTH_BYTES, 0), "little")
    return start, os.fstat(file).st_size - start


class SlotBody:
    """A model in a slot, lent until `close`."""

    def __init__(
        self, loan: Loan, header: memoryview, payload: memoryview, pace: Pace, count: Callable[[int], None]
    ) -> None:
        self._loan = loan
        self._parts = (len(header).to_bytes(8, "little") + bytes(header), payload)
        self._pace = pace
        self._count = count
        self.nbytes = sum(map(len, self._parts))

    def send_to(self, sock: socket.socket) -> None:
        """Send the parts out of shared memory."""
        for part in self._parts:
            send_all(sock, part, self._pace)
        self._count(self.nbytes)

    def __iter__(self) -> Iterator[bytes]:
        """For a WSGI server that knows nothing of `send_to`."""
        for part in self._parts:
            for start in range(0, len(part), _CHUNK_BYTES):
                yield bytes(part[start : start + _CHUNK_BYTES])

    def close(self) -> None:
        """Give the slot back."""
        self._parts = (b"", memoryview(b""))
        self._loan.give_back()


class ModelResponses:
    """Answers GET of a job's model."""

    def __init__(
        self, coordinator: CoordinatorClient, board: JobBoard, link: NodeLink, metrics: Metrics, pace: Pace
    ) -> None:
        self._coordinator = coordinator
        self._board = board
        self._link = link
        self._metrics = metrics
        self._pace = pace

    def of_round(self, state: JobState, round_number: int, if_none_match: str) -> Response:
        """The model that starts a given round, kept as a checkpoint; raises Refused 404 when it is not."""
        if newest_known(if_none_match, state.nonce) == round_number:
            return _not_modified(state, round_number)
        return self._send(state, round_number)

    def newest(self, state: JobState, if_none_match: str, after: int, wait_seconds: float) -> Response:
        """The newest model, if it is newer than `after` and than the client's ETag; else 304.

        Waits up to `wait_seconds` for a newer one, but not for a job that is over. Raises Refused 404 when
        there is no model at all.
        """
        nonce = state.nonce
        known = max(after, newest_known(if_none_match, nonce))

        def is_enough(now: JobState | None) -> bool:
            return now is None or now.nonce != nonce or now.model_round > known or now.status in _OVER

        if wait_seconds > 0 and not is_enough(state):
            self._board.wait_for(state.job, is_enough, wait_seconds)
            latest = self._board.get(state.job)
            if latest is None:
                raise Refused(404, "No such job", f"job {state.job!r} was deleted")
            state = latest
        if state.nonce == nonce and 0 < state.model_round <= known:
            return _not_modified(state, state.model_round)
        return self._send(state, 0)

    def _send(self, state: JobState, round_number: int) -> Response:
        loan = self._coordinator.borrow_model(state.job, round_number)
        try:
            body = self._body(loan)
        except BaseException:
            loan.give_back()
            raise
        response = Response(body, 200, content_type=SAFETENSORS, direct_passthrough=True)
        response.headers["Content-Length"] = str(body.nbytes)
        return _describe(response, state, loan.source.round)

    def _body(self, loan: Loan) -> FileBody | SlotBody:
        source = loan.source
        count = self._metrics.sent_bytes.inc
        if source.path:
            try:
                file = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise Refused(404, "No such model", f"round {source.round} is not kept any more") from None
            loan.give_back()  # an open file stays whole
            return FileBody(file, self._pace, count)
        pool, index = split_slot_reference(source.slot)
        memory = self._link.memory(pool)
        header = header_room(memory, index)[: source.header_bytes]
        return SlotBody(loan, header, memory.payload(index, source.payload_bytes), self._pace, count)


def _not_modified(state: JobState, round_number: int) -> Response:
    return _describe(Response(status=304), state, round_number)


def _describe(response: Response, state: JobState, round_number: int) -> Response:
    response.headers["ETag"] = etag(state.nonce, round_number)
    response.headers["LIFL-Round"] = str(round_number)
    response.headers["LIFL-Status"] = state.status
    response.headers["Cache-Control"] = "no-cache"
    return response

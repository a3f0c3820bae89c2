"""Models that other nodes ask for, lent by the coordinator and sent from where they are: a file, or a slot."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from lifl.errors import Refused, Unavailable
from lifl.messages import ModelSource
from lifl.peer.checksum import FileRange, Segment
from lifl.peer.protocol import PullRequest
from lifl.pool import MappedPool
from lifl.slot import split_slot_reference

from lifl_gateway.coordinator_client import CoordinatorClient, JobBoard, Loan
from lifl_gateway.node_link import NodeLink, header_room

_LENGTH_BYTES: Final = 8


class LentModel:
    """A part of a model, as `lifl.peer.server.Source`; owns the loan and the file, and holds the pools."""

    def __init__(self, loan: Loan) -> None:
        self.source = loan.source
        self.round = loan.source.round
        self.header_bytes = 0
        self.segments: Sequence[Segment] = ()
        self._loan = loan
        self._file = -1
        self._pools: list[MappedPool] = []

    def take_file(self, path: str) -> int:
        """Open the file; returns its size. Raises Refused 404 when it is not kept any more."""
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Refused(404, "No such model", f"round {self.round} is not kept any more") from None
        self._loan.give_back()  # an open file stays whole
        return os.fstat(self._file).st_size

    def file_range(self, nbytes: int) -> FileRange:
        """The first bytes of the file."""
        return FileRange(self._file, 0, nbytes)

    def file_header_bytes(self, size: int) -> int:
        """How long the safetensors header in the file is, with its length."""
        header_bytes = _LENGTH_BYTES + int.from_bytes(os.pread(self._file, _LENGTH_BYTES, 0), "little")
        if header_bytes > size:
            raise Refused(404, "No such model", f"the file of round {self.round} is damaged")
        return header_bytes

    def slot_range(self, memory: MappedPool, index: int, nbytes: int) -> FileRange:
        """The first bytes of a slot's payload."""
        self._pools.append(memory)
        return FileRange(memory.fd, memory.payload_offset(index), nbytes, memory.payload(index, nbytes))

    def close(self) -> None:
        """Give all of it back."""
        self.segments = ()
        self._pools.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._loan.give_back()


class ModelLender:
    """Opens what other nodes ask for; usable from any thread."""

    def __init__(self, coordinator: CoordinatorClient, board: JobBoard, link: NodeLink) -> None:
        self._coordinator = coordinator
        self._board = board
        self._link = link

    def open(self, request: PullRequest) -> LentModel:
        """Lend the part of the model that the request names.

        Raises Refused 404 when this node has it not, Unavailable while the node cannot tell.
        """
        state = self._board.get(request.job)
        if state is None or state.nonce != request.nonce:
            if not self._board.is_current:
                raise Unavailable("this node does not know its jobs yet")
            raise Refused(404, "No such job", f"this life of job {request.job!r} is not known here")
        lent = LentModel(self._coordinator.borrow_model(request.job, request.round))
        try:
            if request.part == "state":
                self._add_state(lent, lent.source)
            else:
                self._add_model(lent, lent.source, only_header=request.part == "header")
        except BaseException:
            lent.close()
            raise
        return lent

    def _add_model(self, lent: LentModel, source: ModelSource, only_header: bool) -> None:
        if source.path:
            size = lent.take_file(source.path)
            lent.header_bytes = lent.file_header_bytes(size)
            lent.segments = [lent.file_range(lent.header_bytes if only_header else size)]
            return
        pool, index = split_slot_reference(source.slot)
        memory = self._link.memory(pool)
        header = bytes(header_room(memory, index)[: source.header_bytes])
        lent.header_bytes = _LENGTH_BYTES + len(header)
        lent.segments = [len(header).to_bytes(_LENGTH_BYTES, "little") + header]
        if not only_header:
            lent.segments = [*lent.segments, lent.slot_range(memory, index, source.payload_bytes)]

    def _add_state(self, lent: LentModel, source: ModelSource) -> None:
        if source.state_slots:
            places = map(split_slot_reference, source.state_slots)
            lent.segments = [
                lent.slot_range(self._link.memory(pool), index, source.state_bytes) for pool, index in places
            ]
        elif source.state_path:
            lent.segments = [lent.file_range(lent.take_file(source.state_path))]
        else:
            raise Refused(404, "No such state", f"round {source.round} of the job keeps none here")

"""Which safetensors headers a job takes: the model's own, byte for byte, or one that folds into it.

The model's header is read once for each life of a job. Other headers are checked once each; a few are remembered,
for clients that all send the same one in every round.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from lifl.errors import Unavailable
from lifl.messages import JobState
from lifl.model_layout import ModelLayout, parse_header, plan_update
from lifl.slot import split_slot_reference

from lifl_gateway.coordinator_client import CoordinatorClient, Loan
from lifl_gateway.node_link import NodeLink, header_room

_REMEMBERED_HEADERS: Final = 32
_REMEMBERED_JOBS: Final = 64


class JobLayout:
    """The headers that one job takes; usable from any thread."""

    def __init__(self, header: bytes) -> None:
        """`header` is the model's, already checked by the coordinator. Raises InvalidModel if it is not."""
        self.header: Final = header
        self._model: ModelLayout = parse_header(header)
        self._lock = threading.Lock()
        self._payload_bytes: OrderedDict[bytes, int] = OrderedDict()

    @property
    def payload_bytes(self) -> int:
        """Payload of the model, and the largest of any update."""
        return self._model.payload_bytes

    def payload_of(self, header: bytes) -> int:
        """Bytes of payload that follow this header; raises InvalidModel when it does not fit the model."""
        if header == self.header:
            return self._model.payload_bytes
        with self._lock:
            known = self._payload_bytes.get(header)
            if known is not None:
                self._payload_bytes.move_to_end(header)
                return known
        payload = plan_update(self._model, parse_header(header)).source_bytes
        with self._lock:
            self._payload_bytes[header] = payload
            while len(self._payload_bytes) > _REMEMBERED_HEADERS:
                self._payload_bytes.popitem(last=False)
        return payload


class JobLayouts:
    """The layout of each job, read from its model at first use."""

    def __init__(self, coordinator: CoordinatorClient, link: NodeLink) -> None:
        self._coordinator = coordinator
        self._link = link
        self._lock = threading.Lock()
        self._known: OrderedDict[int, JobLayout] = OrderedDict()

    def of(self, state: JobState) -> JobLayout:
        """The layout of a running job; raises Unavailable or Refused."""
        known = self._known.get(state.nonce)
        if known is not None:
            return known
        loan = self._coordinator.borrow_model(state.job, 0)
        try:
            layout = JobLayout(self._read_header(loan))
        finally:
            loan.give_back()
        with self._lock:
            self._known[state.nonce] = layout
            while len(self._known) > _REMEMBERED_JOBS:
                self._known.popitem(last=False)
        return layout

    def _read_header(self, loan: Loan) -> bytes:
        source = loan.source
        if not source.path:
            pool, index = split_slot_reference(source.slot)
            return bytes(header_room(self._link.memory(pool), index)[: source.header_bytes])
        try:
            with open(source.path, "rb") as file:
                file.seek(8)
                return file.read(source.header_bytes)
        except OSError as error:
            raise Unavailable(f"the model's file cannot be read: {error.strerror}") from error

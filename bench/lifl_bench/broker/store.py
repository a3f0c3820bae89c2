"""The seam for payloads that do not fit into a message: put them somewhere, pass a reference, get them there.

Every payload belongs to a group, `updates of round 3` or `models of round 4`, and goes away with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal, Protocol

from lifl.http_function import MODEL

Fill = Callable[[memoryview], None]
"""Fills the whole of a buffer with the next bytes of a payload."""
Kind = Literal["u", "m"]

UPDATES: Final[Kind] = "u"
"""Updates and partial aggregates, which nobody needs after their round."""
MODELS: Final[Kind] = "m"


class StoreError(RuntimeError):
    """A payload is not there, or cannot be stored."""


class PayloadStore(Protocol):
    """Where payloads are. Methods may be called from several threads at once."""

    in_place: bool
    """Whether `get` has memory of its own for the payload and needs no target."""

    def put(self, group: str, size: int, fill: Fill) -> str:
        """Store `size` bytes, which `fill` provides one piece after another, and return the reference."""
        ...

    def get(self, reference: str, size: int, target: memoryview | None) -> memoryview:
        """The whole payload: in `target`, if the store cannot show it where it is."""
        ...

    def read(self, reference: str, size: int) -> Iterator[memoryview]:
        """The payload in pieces, each valid until the next is asked for."""
        ...

    def discard(self, group: str) -> None:
        """Forget all payloads of a group."""
        ...

    def close(self) -> None: ...


def group_of(event_type: str, round_number: str) -> str:
    """The group of an event's payload. Raises StoreError for a round that is no number."""
    if not (round_number.isascii() and round_number.isdigit()):
        raise StoreError("an event without a round has no place in the store")
    return f"{MODELS if event_type == MODEL else UPDATES}{int(round_number)}"


def fill_from(data: memoryview) -> Fill:
    """Provide a payload that is in memory."""
    position = 0

    def fill(target: memoryview) -> None:
        nonlocal position
        target[:] = data[position : position + len(target)]
        position += len(target)

    return fill

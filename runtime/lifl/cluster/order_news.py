"""Versions of orders, and who has to be woken because there is a new one for it."""

from __future__ import annotations

from typing import Final

_LIFE_BITS: Final = 32


class OrderNews:
    """Versions grow with every change of any order, and from one life of the coordinator to the next.

    So nothing of them need be in the journal: after a restart every order is newer than all that were sent before.
    """

    def __init__(self, life: int) -> None:
        """`life` counts the coordinator's starts."""
        self.newest = life << _LIFE_BITS
        """The newest version."""
        self._woken: set[str] = set()
        self._are_all_woken = False

    def for_all(self) -> int:
        """A new version of orders of all nodes."""
        self._are_all_woken = True
        self.newest += 1
        return self.newest

    def for_one(self, member: str) -> int:
        """A new version of an order of one node."""
        self.wake(member)
        self.newest += 1
        return self.newest

    def wake(self, member: str) -> None:
        """There is something else to tell a node."""
        self._woken.add(member)

    def take(self) -> set[str] | None:
        """Incarnations that there is news for since the last call; None for all."""
        woken = None if self._are_all_woken else self._woken
        self._woken, self._are_all_woken = set(), False
        return woken

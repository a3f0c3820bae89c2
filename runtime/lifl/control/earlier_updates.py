"""Which updates of an asynchronous job were counted in earlier buffers, so that none of them is counted again."""

from __future__ import annotations

from collections.abc import Iterable

from lifl.staleness import base_of


class EarlierUpdates:
    """Contributors by the round whose model they trained from.

    An update that is sent again when its base is too old is late, whatever was counted before; so what is here
    need not reach farther back than updates may be stale. A synchronous job has nothing in it.
    """

    def __init__(self) -> None:
        self._by_base: dict[int, set[str]] = {}

    def __contains__(self, contributor: str) -> bool:
        return bool(self._by_base) and contributor in self._by_base.get(base_of(contributor), ())

    def __len__(self) -> int:
        return sum(map(len, self._by_base.values()))

    def by_base(self) -> dict[int, frozenset[str]]:
        """The contributors by base."""
        return {base: frozenset(names) for base, names in self._by_base.items() if names}

    def add(self, contributors: Iterable[str]) -> None:
        """Note the updates of a buffer that has become a model."""
        for contributor in contributors:
            self._by_base.setdefault(base_of(contributor), set()).add(contributor)

    def forget_before(self, base: int) -> None:
        """Let go of what was trained from models older than this one."""
        for old in [number for number in self._by_base if number < base]:
            del self._by_base[old]

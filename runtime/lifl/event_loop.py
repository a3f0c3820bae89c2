"""What loops over a selector share: events that still count when their turn comes."""

from __future__ import annotations

from collections.abc import Iterator
from selectors import BaseSelector, SelectorKey


def ready_keys(selector: BaseSelector, seconds: float | None) -> Iterator[SelectorKey]:
    """Wait up to `seconds` (None: for ever) and yield what is ready, but nothing that is no longer registered.

    What is done about one event may close what the next one is about: a lost agent takes its sockets along.
    """
    for key, _ in selector.select(seconds):
        if selector.get_map().get(key.fd) is key:
            yield key

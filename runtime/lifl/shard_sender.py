"""Sending an update to the shards of a job: all parts at the same time, each by a client of its own.

A part is answered when all are there, so they cannot be sent one after another. When one of them is refused, the
others are cut short: they would wait for it in vain.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from lifl.shards import Outcome, ShardJob, combine_outcomes, split_update

if TYPE_CHECKING:
    from lifl.client import Client, Submission
    from lifl.tensors import Buffer

PATIENCE_SECONDS: Final = 300.0
"""How much longer a part's answer may take than another answer: the other parts may come late."""


class Abandoned(Exception):
    """Another part of the update was refused, so this one need not be sent."""


class ShardSender:
    """The clients of the shards of one job; for one thread at a time."""

    def __init__(self, shards: Sequence[ShardJob], connect: Callable[[str], Client]) -> None:
        """`connect` makes the client of a shard from the name of its job."""
        self._shards = tuple(shards)
        self._clients = [connect(shard.job) for shard in self._shards]
        self._is_over = threading.Event()
        for client in self._clients:
            client._make_part(self._is_over, PATIENCE_SECONDS)

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            client.close()

    def send(self, round_number: int, headers: Mapping[str, str], update: Buffer) -> tuple[Outcome, int]:
        """Send the part of each shard; returns what became of the update, and the round as `Submission` has it.

        Raises InvalidModel for an update of another model, or what sending the first part that failed has raised.
        """
        from lifl.tensors import split

        parts = split_update(*split(update), self._shards)
        # What is left of another update, which this client could not send as a whole, must not be joined to it.
        headers = {**headers, "ce-update": headers.get("ce-update") or secrets.token_hex(8)}
        self._is_over.clear()
        results: list[Submission | BaseException] = [Abandoned()] * len(parts)
        threads = [
            threading.Thread(
                target=self._send_part, args=(results, index, round_number, headers, part), daemon=True
            )
            for index, part in enumerate(parts)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            self._abandon()
            raise
        return _combine(results)

    def _send_part(
        self,
        results: list[Submission | BaseException],
        index: int,
        round_number: int,
        headers: Mapping[str, str],
        part: tuple[bytes | memoryview, ...],
    ) -> None:
        try:
            results[index] = self._clients[index]._send_part(round_number, headers, part)
        except Exception as error:  # raised by `send`, in the caller's thread
            results[index] = error
            self._abandon()

    def _abandon(self) -> None:
        self._is_over.set()
        for client in self._clients:
            client._interrupt()


def _combine(results: Sequence[Submission | BaseException]) -> tuple[Outcome, int]:
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, Abandoned)):
        raise error
    submissions = [result for result in results if not isinstance(result, BaseException)]
    outcomes = [submission.status for submission in submissions]
    return combine_outcomes(outcomes), max(submission.round for submission in submissions)

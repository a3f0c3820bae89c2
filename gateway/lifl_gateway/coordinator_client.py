"""Asking the coordinator: one question and one answer at a time on each of a few connections.

Connections are kept in a stack and reused, so that the coordinator sees as many as questions are open at once and
not one for each HTTP connection. What it lends belongs to the connection it was lent on: a `Loan` keeps that one
until it is returned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from lifl.control_channel import ControlChannel, close_fds
from lifl.errors import Busy, LiflError, ProtocolError, Refused, Unavailable
from lifl.messages import (
    Acknowledged,
    AcquireModel,
    FromCoordinator,
    JobState,
    Message,
    ModelSource,
    Problem,
    ReturnModel,
    Subscribe,
)

ANSWER_SECONDS: Final = 10.0
_KEPT_CONNECTIONS: Final = 16

Answer = TypeVar("Answer", bound=Message)
_Channel = ControlChannel[FromCoordinator]


class CoordinatorClient:
    """Questions to the coordinator that listens at `path`; usable from any thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._kept: list[_Channel] = []
        self._closed = False

    def ask(self, question: Message, answer: type[Answer], seconds: float = ANSWER_SECONDS) -> Answer:
        """Send a question and return its answer.

        Raises Refused or Busy for a `Problem`, Unavailable when there is no coordinator or no answer within
        `seconds`; the question may or may not have been acted on then.
        """
        with self._connection() as channel:
            return _exchange(channel, question, answer, seconds)

    def borrow_model(self, job: str, round_number: int) -> Loan:
        """Borrow the model that starts a round (0: the newest); raises as `ask`."""
        channel = self._take()
        try:
            source = _exchange(channel, AcquireModel(job, round_number), ModelSource, ANSWER_SECONDS)
        except Refused:
            self._keep(channel)
            raise
        except BaseException:
            channel.close()
            raise
        return Loan(source, channel, self._keep)

    def close(self) -> None:
        """Close the connections that are not in use."""
        with self._lock:
            self._closed = True
            kept, self._kept = self._kept, []
        for channel in kept:
            channel.close()

    @contextmanager
    def _connection(self) -> Iterator[_Channel]:
        channel = self._take()
        try:
            yield channel
        except Refused:
            self._keep(channel)
            raise
        except BaseException:
            channel.close()  # an answer may still come on it, to nobody
            raise
        self._keep(channel)

    def _take(self) -> _Channel:
        with self._lock:
            channel = self._kept.pop() if self._kept else None
        while channel is not None and _is_dead(channel):
            channel.close()
            with self._lock:
                channel = self._kept.pop() if self._kept else None
        return channel or ControlChannel.connect(self._path, FromCoordinator, timeout=ANSWER_SECONDS)

    def _keep(self, channel: _Channel) -> None:
        with self._lock:
            keep = not self._closed and len(self._kept) < _KEPT_CONNECTIONS
            if keep:
                self._kept.append(channel)
        if not keep:
            channel.close()


class Loan:
    """A model lent by the coordinator; `give_back` ends the loan, and so does the end of the connection."""

    def __init__(self, source: ModelSource, channel: _Channel, keep: Callable[[_Channel], None]) -> None:
        self.source = source
        self._channel: _Channel | None = channel
        self._keep = keep

    def give_back(self) -> None:
        """End the loan; a second call does nothing."""
        channel, self._channel = self._channel, None
        if channel is None:
            return
        try:
            if self.source.lease:
                channel.settimeout(ANSWER_SECONDS)
                channel.send(ReturnModel(self.source.lease))
                _receive(channel)
        except (LiflError, OSError):
            channel.close()
        else:
            self._keep(channel)


def _exchange(channel: _Channel, question: Message, answer: type[Answer], seconds: float) -> Answer:
    try:
        channel.settimeout(seconds)
        channel.send(question)
        message = _receive(channel)
    except OSError as error:  # a time-out among others; Unavailable is an OSError too
        raise Unavailable(f"the coordinator does not answer: {error}") from error
    except ProtocolError as error:
        raise Unavailable(f"the coordinator's answer makes no sense: {error}") from error
    if isinstance(message, Problem):
        if message.status == 503:
            raise Busy(message.title, message.detail, retry_after=message.retry_after or 1.0)
        raise Refused(message.status, message.title, message.detail)
    if not isinstance(message, answer):
        raise Unavailable(f"the coordinator answered {type(message).__name__} instead of {answer.__name__}")
    return message


def _receive(channel: _Channel) -> FromCoordinator:
    message, fds = channel.receive()
    close_fds(fds)
    return message


def _is_dead(channel: _Channel) -> bool:
    """A kept connection on which something can be read has ended, or is out of step."""
    channel.settimeout(0)
    try:
        channel.receive()
    except BlockingIOError:
        return False
    except (LiflError, OSError):
        return True
    return True


class JobBoard:
    """The newest state of every job, kept up to date by the coordinator's stream, for all threads to read."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: dict[str, JobState] = {}
        self._released = False
        self._told: set[str] | None = None
        """Jobs that a new stream has named, until it has named all."""
        self.is_current = False
        """False until a stream has told all jobs, and when it is down: what is here may be out of date then."""

    def get(self, name: str) -> JobState | None:
        """The newest known state of a job."""
        return self._jobs.get(name)

    def all(self) -> list[JobState]:
        """All known jobs."""
        return list(self._jobs.values())

    def wait_for(self, name: str, is_enough: Callable[[JobState | None], bool], seconds: float) -> None:
        """Wait until the job's state, None when there is no such job, is enough; at most `seconds`, or until
        `release`."""
        with self._changed:
            self._changed.wait_for(lambda: self._released or is_enough(self._jobs.get(name)), seconds)

    def release(self) -> None:
        """Let nobody wait any more: the process is about to end."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def put(self, state: JobState) -> None:
        """Take in a state from the stream."""
        with self._changed:
            if state.status == "deleted":
                self._jobs.pop(state.job, None)
            else:
                self._jobs[state.job] = state
                if self._told is not None:
                    self._told.add(state.job)
            self._changed.notify_all()

    def begin(self) -> None:
        """A stream begins: it tells all jobs anew, and until it has, those known before stay."""
        with self._changed:
            self._told = set()

    def complete(self) -> None:
        """The stream has told all jobs; others are gone."""
        with self._changed:
            told, self._told = self._told or set(), None
            self._jobs = {name: state for name, state in self._jobs.items() if name in told}
            self.is_current = True
            self._changed.notify_all()

    def end(self) -> None:
        """The stream has ended."""
        self.is_current = False


class Subscription:
    """One stream of job states into a board; ends with the connection."""

    def __init__(self, path: str, board: JobBoard) -> None:
        """Connect and subscribe; raises Unavailable."""
        self._board = board
        self._channel: _Channel = ControlChannel.connect(path, FromCoordinator, timeout=ANSWER_SECONDS)
        self._channel.settimeout(None)
        self._channel.send(Subscribe())

    def follow(self) -> None:
        """Take in states until the connection ends."""
        self._board.begin()
        try:
            while True:
                message = _receive(self._channel)
                if isinstance(message, JobState):
                    self._board.put(message)
                elif isinstance(message, Acknowledged):
                    self._board.complete()
        except (LiflError, OSError):
            return
        finally:
            self._board.end()
            self._channel.close()

    def interrupt(self) -> None:
        """Make `follow` return, from another thread."""
        try:
            self._channel.socket.shutdown(2)
        except OSError:
            return

"""Processes forked from a benchmark, which play its clients."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def limit_threads() -> dict[str, str]:
    """One thread for each numerical library of this process and its forks; call before importing any.

    Returns the environment as it was, for programs that are started and not forked.
    """
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    return before


_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """In a new process: be told to end when the benchmark is killed and can stop nothing any more."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Failure(NamedTuple):
    error: str
    trace: str


class Team:
    """Processes forked from this one, each running `work(number, link)`; use it in a `with` statement.

    `link` is the worker's end of a two-way pipe. What was imported and built before the fork is shared. The
    calling process may have no other thread. A worker's exception arrives as RuntimeError in `receive`.
    """

    def __init__(self, count: int, work: Callable[[int, connection.Connection], None]) -> None:
        if threading.active_count() > 1:
            raise RuntimeError("clients are forked, which threads do not survive")
        context = multiprocessing.get_context("fork")
        self._links: list[connection.Connection] = []
        self._open: dict[connection.Connection, int] = {}
        self._processes: list[multiprocessing.process.BaseProcess] = []
        # A signal handler's exception would be lost in the hooks that run at a fork.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
        try:
            for number in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=self._run, args=(work, number, theirs, [*self._links, ours]), daemon=True
                )
                process.start()
                theirs.close()
                self._links.append(ours)
                self._open[ours] = number
                self._processes.append(process)
        except BaseException:
            self.stop()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @staticmethod
    def _run(
        work: Callable[[int, connection.Connection], None],
        number: int,
        link: connection.Connection,
        others: list[connection.Connection],
    ) -> None:
        # Ctrl-C reaches the whole terminal; the parent decides. Its end closes the pipe, which ends the worker.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
        die_with_parent()
        for other in others:
            other.close()
        try:
            work(number, link)
        except (EOFError, BrokenPipeError):
            pass
        except Exception as error:
            try:
                link.send(_Failure(f"{type(error).__name__}: {error}", traceback.format_exc()))
            except OSError:
                pass
            os._exit(1)

    def send_to(self, number: int, message: object) -> None:
        """Send to one worker. Raises RuntimeError if it has ended."""
        try:
            self._links[number].send(message)
        except OSError:
            raise RuntimeError(f"client {number} is gone") from None

    def send_all(self, message: object) -> None:
        """Send the same to every worker that has not ended."""
        for link in self._open:
            link.send(message)

    def receive(self, count: int, timeout_s: float) -> Iterator[tuple[int, Any]]:
        """The next `count` messages, each with its worker's number, in the order of arrival.

        Raises RuntimeError if a worker fails or is gone, TimeoutError after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while count > 0:
            ready = connection.wait(list(self._open), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{count} clients said nothing within {timeout_s:.0f} s")
            for link in ready[:count]:
                assert isinstance(link, connection.Connection)
                number = self._open[link]
                try:
                    message = link.recv()
                except (EOFError, ConnectionResetError):
                    self._forget(link)
                    continue
                if isinstance(message, _Failure):
                    raise RuntimeError(f"client {number} failed: {message.error}\n{message.trace}")
                yield number, message
                count -= 1

    def _forget(self, link: connection.Connection) -> None:
        """A worker is at its end, which is no error as long as others can still say something."""
        number = self._open.pop(link)
        process = self._processes[number]
        process.join(_STOP_TIMEOUT_S)
        if process.exitcode != 0 or not self._open:
            raise RuntimeError(f"client {number} is gone (exit code {process.exitcode})")

    def stop(self) -> None:
        """End all workers."""
        for link in self._links:
            link.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(_STOP_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

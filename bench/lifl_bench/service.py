"""A process that a benchmark starts, that says in lines on stdout that it is ready, and that is ended in order."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path

from lifl_bench.measure import tree_of
from lifl_bench.processes import die_with_parent

START_SECONDS = 60.0
STOP_SECONDS = 15.0
_TAIL_LINES = 20


class Service:
    """A child process with a log of its own. Ctrl-C does not reach it: the benchmark stops it in order."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """`name` is what errors call it; stderr goes to `log`."""
        self.name = name
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def pids(self) -> list[int]:
        """The process and all below it, while it runs."""
        return list(tree_of(self.pid)) if self.is_running else []

    def hear(self, deadline: float | None = None) -> str:
        """The next line it says, by default within a minute; otherwise until `deadline`, in monotonic time.

        Raises RuntimeError with the end of its log if none comes.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + START_SECONDS if deadline is None else deadline
        line = b""
        while not line.endswith(b"\n"):
            if not connection.wait([descriptor], max(0.0, deadline - time.monotonic())):
                raise self.failed("did not start in time")
            if not (piece := os.read(descriptor, 65536)):
                raise self.failed("did not start")
            line += piece
        return line.decode().strip()

    def tell(self, line: str) -> None:
        """Say a line to it; one that is gone is found out by `hear`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def failed(self, what: str) -> RuntimeError:
        """An error that says what happened to it, with the end of its log."""
        return RuntimeError(f"{self.name} {what}:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        try:
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        except OSError:
            return ""

    def terminate(self) -> None:
        """Ask it to end, without waiting: several can then end at the same time."""
        if self.is_running:
            self._process.terminate()

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """End it, by force if it takes too long, and whatever it may leave behind."""
        below = set(self.pids())
        self.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            below |= set(tree_of(self.pid))
            self._process.kill()
            self._process.wait()
        for pid in below - {self.pid}:
            _see_end(pid, timeout)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _see_end(pid: int, timeout: float) -> None:
    """A grandchild ends with its parent; see that it does."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not connection.wait([descriptor], timeout):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            connection.wait([descriptor], timeout)
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)

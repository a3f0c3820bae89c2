"""A process of the deployment, from both sides: how it is started and ended, and how it says that it is ready."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import IO, Final

from lifl_bench.measure import tree_of
from lifl_bench.processes import THREAD_VARIABLES, die_with_parent

START_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 5.0
_TAIL_LINES: Final = 20
_KEEP_LARGE_BLOCKS: Final = {
    # Without these glibc maps every chunk and every array of a model's size anew, and each first touch of a page
    # is a fault.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
}


class Service:
    """A child process with a log of its own."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.log_path = directory / f"{name}.log"
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
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

    def ready_line(self) -> str:
        """Wait for the line with which the process says that it is ready. Raises RuntimeError with its log."""
        stdout = self._stdout()
        line = b""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not line.endswith(b"\n"):
            if not connection.wait([stdout.fileno()], max(0.0, deadline - time.monotonic())):
                raise self.failed(f"was not ready within {START_TIMEOUT_S:.0f} s")
            if not (chunk := os.read(stdout.fileno(), 4096)):
                raise self.failed("ended")
            line += chunk
        return line.decode().strip()

    def failed(self, what: str) -> RuntimeError:
        """An error with the end of the log."""
        return RuntimeError(f"{self.name} {what}:\n{self.tail()}")

    def tail(self) -> str:
        """The end of what the process wrote."""
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        except OSError:
            return ""

    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def stop(self, timeout: float = _STOP_TIMEOUT_S) -> None:
        """End the process, by force if it takes too long, and whatever it may leave behind."""
        below = set(tree_of(self.pid)) if self.is_running else set()
        if self.is_running:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                below |= set(tree_of(self.pid))
                self._process.kill()
                self._process.wait()
        for pid in below - {self.pid}:
            _wait_gone(pid, timeout)
        self._stdout().close()


def _wait_gone(pid: int, timeout: float) -> None:
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


def python_environment(environment: Mapping[str, str], *, keep_large_blocks: bool) -> dict[str, str]:
    """For our own processes: one thread for each numerical library, and a malloc that keeps large blocks."""
    ours = {**environment, **dict.fromkeys(THREAD_VARIABLES, "1")}
    return ours | _KEEP_LARGE_BLOCKS if keep_large_blocks else ours


def python_command(module: str, *arguments: str) -> list[str]:
    """How a module of this package is run."""
    return [sys.executable, "-m", f"lifl_bench.broker.{module}", *arguments]


# --- in the process ------------------------------------------------------------------------------------------


def say_ready(line: str) -> None:
    """Tell whoever started this process."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def wait_for_end() -> None:
    """Wait until this process is told to end. Call it in the main thread."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()

"""The zygote: has imported a function and all it needs, and forks workers from that state in milliseconds.

    python -m lifl.zygote --runtime-directory DIR --name fedavg --file functions/fedavg.py

It stays single-threaded, so that a fork copies a whole process, and does nothing between forks.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import logging
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Final

# One thread for each process: two workers with two threads each fight over two cores, and a child hangs when its
# parent has run OpenMP with several. Must be set before numpy or torch are imported.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"

from lifl import fold_kernel  # noqa: E402
from lifl.agent_client import AgentConnection, begin_join, complete_join, join  # noqa: E402
from lifl.capabilities import drop_capabilities  # noqa: E402
from lifl.errors import InvalidFunction, LiflError, Unavailable  # noqa: E402
from lifl.function import AggregatorFunction, load_function  # noqa: E402
from lifl.messages import Fork, Hello, WorkerSpec  # noqa: E402
from lifl.process import end_with_parent, end_with_supervisor  # noqa: E402
from lifl.worker import Worker  # noqa: E402

_RECONNECT_SECONDS: Final = 30.0

log = logging.getLogger("lifl.zygote")


def load(file: Path, name: str | None) -> AggregatorFunction:
    """Import the function, torch if the file speaks of it, and compile the fold kernels.

    Raises `InvalidFunction`.
    """
    function = load_function(file, name)
    text = file.read_text()
    if "torch" in sys.modules or "torch" in text or ".tensor" in text:
        try:
            import torch
        except ImportError as error:
            raise InvalidFunction(f"{file}: needs torch, which is not installed: pip install torch") from error
        torch.set_num_threads(1)
    fold_kernel.warm_up([("F32", "F32")])
    return function


class Zygote:
    """Holds the function and the connection to the agent."""

    def __init__(self, agent_socket: str, hello: Hello, function: AggregatorFunction | None) -> None:
        self._agent_socket = agent_socket
        self._hello = hello
        self._function = function
        self._connection: AgentConnection
        self._workers: list[int] = []
        """Pidfds of forked workers: the kernel reaps them at once, and a pid could be another process's later."""

    def run(self) -> None:
        """Serve forks until SIGTERM, or until no agent comes back."""
        # A handler could run just before a wait begins and leave a zombie for as long as that lasts.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            self._join()
            try:
                while True:
                    message, _ = self._connection.channel.receive()
                    if isinstance(message, Fork):
                        for spec in message.workers:
                            self._fork(spec)
            except LiflError as error:
                log.info("agent lost (%s); joining the new one", error)
                self._connection.close()
                self._end_workers()

    def _forget_ended(self) -> None:
        """Close the pidfds of workers that have ended; a pidfd is readable then."""
        ended = select.select(self._workers, [], [], 0)[0]
        for pidfd in ended:
            self._workers.remove(pidfd)
            os.close(pidfd)

    def _end_workers(self) -> None:
        """Make sure that no worker of the former agent still writes to accumulators that others will take over."""
        for pidfd in self._workers:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [])
            os.close(pidfd)
        self._workers.clear()

    def _join(self) -> None:
        end = time.monotonic() + _RECONNECT_SECONDS
        while True:
            try:
                self._connection = join(self._agent_socket, self._hello)
                return
            except Unavailable:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def _fork(self, spec: WorkerSpec) -> None:
        """Fork a worker. Its connection is made before, so that it cannot die without the agent noticing."""
        if self._function is None:
            return
        channel = begin_join(self._agent_socket, Hello("worker", ticket=spec.ticket))
        zygote = os.getpid()
        pid = os.fork()
        if pid:
            channel.close()
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                self._workers.append(os.pidfd_open(pid))
            self._forget_ended()
            return
        status = 1
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            end_with_parent(zygote, signal.SIGKILL)
            self._connection.close()
            connection = complete_join(channel, "worker")
            _end_with_connection(connection.channel.fileno())
            Worker(connection, self._function).run()
            status = 0
        except Unavailable:
            status = 0  # the agent is gone or wants this worker no more
        except BaseException:
            log.exception("worker of job %s ended", spec.job)
        finally:
            os._exit(status)


def _end_with_connection(fd: int) -> None:
    """Have the kernel end this process when the agent closes its connection, whatever the function is doing.

    The agent sends a worker nothing after the welcome, so the only event on the socket is its end; SIGIO ends a
    process that does not handle it, also one that never comes back from a loop of its own.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([fd], [], [], 0)[0]:  # it has ended before that
        os._exit(0)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="python -m lifl.zygote", description=__doc__)
    parser.add_argument("--runtime-directory", type=Path, required=True)
    parser.add_argument("--name", required=True, help="what jobs call the function")
    parser.add_argument("--file", type=Path, required=True)
    options = parser.parse_args()
    end_with_supervisor()
    drop_capabilities()
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's to handle
    function = None
    failure = ""
    try:
        function = load(options.file, None)
    except InvalidFunction as error:
        failure = str(error)
        log.error("%s", error)
    optimizer = function.server_optimizer if function else None
    hello = Hello(
        "zygote",
        function=options.name,
        failure=failure,
        gather=function.gather if function else False,
        state_arrays=len(optimizer.state_names) if optimizer else 0,
    )
    gc.collect()
    gc.freeze()  # what is here now is shared with every worker; a collection there would only copy it
    Zygote(str(options.runtime_directory / "agent.sock"), hello, function).run()


if __name__ == "__main__":
    main()

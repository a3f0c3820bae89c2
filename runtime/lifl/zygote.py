"""The zygote: has imported a function and all it needs, and forks workers from that state in milliseconds.

    python -m lifl.zygote --runtime-directory DIR --name fedavg --file functions/fedavg.py [--start spawn]

It stays single-threaded, so that a fork copies a whole process, and does nothing between forks. It prints a line
of JSON, {"joined": true} or {"joined": false}, when it has joined an agent and when it has lost it. With
`--start spawn` it starts a fresh interpreter for each worker instead, as a platform without zygotes would: to
compare the two.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import select
import signal
import time
from pathlib import Path
from typing import Final

# One thread for each process: two workers with two threads each fight over two cores, and a child hangs when its
# parent has run OpenMP with several. Must be set before numpy or torch are imported.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"

from lifl import fold_kernel  # noqa: E402
from lifl.agent_client import AgentConnection, begin_join, join  # noqa: E402
from lifl.capabilities import drop_capabilities  # noqa: E402
from lifl.control_channel import ControlChannel  # noqa: E402
from lifl.errors import InvalidFunction, LiflError, Unavailable  # noqa: E402
from lifl.function import AggregatorFunction  # noqa: E402
from lifl.logs import configure_logging  # noqa: E402
from lifl.messages import Fork, FromAgent, Hello, WorkerSpec  # noqa: E402
from lifl.process import end_with_parent, end_with_supervisor  # noqa: E402
from lifl.worker_process import LOG_FORMAT, load, serve, spawn  # noqa: E402

_RECONNECT_SECONDS: Final = 30.0

log = logging.getLogger("lifl.zygote")


class Zygote:
    """Holds the function and the connection to the agent. With `file`, workers are spawned from it, not forked."""

    def __init__(
        self,
        agent_socket: str,
        hello: Hello,
        function: AggregatorFunction | None,
        output: int,
        file: Path | None = None,
    ) -> None:
        """`output` is the file descriptor to tell on whether it has joined."""
        self._agent_socket = agent_socket
        self._hello = hello
        self._function = function
        self._file = file
        self._output = output
        self._connection: AgentConnection
        self._workers: set[int] = set()
        """Pidfds of workers that have not been reaped."""
        self._poll = select.poll()

    def run(self) -> None:
        """Start workers until SIGTERM, or until no agent comes back."""
        while True:
            self._join()
            channel = self._connection.channel.fileno()
            self._poll.register(channel, select.POLLIN)
            try:
                while True:
                    for fd, _ in self._poll.poll():
                        if fd == channel:
                            self._hear_agent()
                        else:
                            self._reap(fd)
            except LiflError as error:
                log.info("agent lost (%s); joining the new one", error)
                self._tell(joined=False)
                self._poll.unregister(channel)
                self._connection.close()
                self._end_workers()

    def _join(self) -> None:
        end = time.monotonic() + _RECONNECT_SECONDS
        while True:
            try:
                self._connection = join(self._agent_socket, self._hello)
                self._tell(joined=True)
                return
            except Unavailable:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def _tell(self, *, joined: bool) -> None:
        """Tell whoever started this process."""
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(self._output, json.dumps({"joined": joined}).encode() + b"\n")

    def _hear_agent(self) -> None:
        message, _ = self._connection.channel.receive()
        if isinstance(message, Fork) and self._function is not None:
            for spec in message.workers:
                self._start(spec, self._function)

    # --- workers -------------------------------------------------------------------------------------------

    def _start(self, spec: WorkerSpec, function: AggregatorFunction) -> None:
        """Start a worker. Its connection is made before, so that it cannot die without the agent noticing."""
        channel = begin_join(self._agent_socket, Hello("worker", ticket=spec.ticket))
        if self._file is not None:
            pid = spawn(channel, self._file, spec.job)
        else:
            pid = self._fork(channel, spec, function)
        channel.close()
        pidfd = os.pidfd_open(pid)  # of the right process even if it has ended: nobody else reaps it
        self._workers.add(pidfd)
        self._poll.register(pidfd, select.POLLIN)

    def _fork(self, channel: ControlChannel[FromAgent], spec: WorkerSpec, function: AggregatorFunction) -> int:
        zygote = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            end_with_parent(zygote, signal.SIGKILL)
            self._connection.close()
            os.close(self._output)
            for pidfd in self._workers:
                os.close(pidfd)
            status = serve(channel, lambda: function, spec.job)
        finally:
            os._exit(status)

    def _reap(self, pidfd: int) -> None:
        """Wait for a worker that has ended or is about to, so that its CPU time is added to the zygote's account.

        Its pidfd stays readable until then. A handler of SIGCHLD could run just before a wait begins, and leave a
        zombie for as long as that lasts.
        """
        self._poll.unregister(pidfd)
        self._workers.remove(pidfd)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)

    def _end_workers(self) -> None:
        """Make sure that no worker of the former agent still writes to accumulators that others will take over."""
        for pidfd in self._workers:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pidfd in list(self._workers):
            self._reap(pidfd)


def take_output() -> int:
    """Standard output for this process alone; what functions print goes to standard error, where logs are."""
    output = os.dup(1)  # closed on exec
    os.dup2(2, 1)
    return output


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="python -m lifl.zygote", description=__doc__)
    parser.add_argument("--runtime-directory", type=Path, required=True)
    parser.add_argument("--name", required=True, help="what jobs call the function")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--start", choices=("fork", "spawn"), default="fork", help="how workers come to be")
    options = parser.parse_args()
    output = take_output()
    end_with_supervisor()
    drop_capabilities()
    configure_logging("zygote", LOG_FORMAT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's to handle
    forks = options.start == "fork"
    function = None
    failure = ""
    try:
        function = load(options.file)
        if forks:
            fold_kernel.warm_up([("F32", "F32")])
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
    agent_socket = str(options.runtime_directory / "agent.sock")
    Zygote(agent_socket, hello, function, output, None if forks else options.file.absolute()).run()


if __name__ == "__main__":
    main()

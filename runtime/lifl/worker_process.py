"""The process of a worker, however it came to be: forked by a zygote, or started by it as a fresh interpreter.

    python -m lifl.worker_process --channel 7 --zygote 4711 --file functions/fedavg.py --job digits

This is what a zygote runs for each worker when the node was told to spawn them (`func run --start spawn`). It
imports everything, loads the function, and compiles each kernel when it first needs it.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lifl.agent_client import complete_join
from lifl.control_channel import ControlChannel
from lifl.errors import InvalidFunction, Unavailable
from lifl.function import AggregatorFunction, load_function
from lifl.logs import configure_logging
from lifl.messages import FromAgent
from lifl.process import end_with_parent
from lifl.worker import Worker

LOG_FORMAT: Final = "%(asctime)s %(name)s %(levelname)s %(message)s"
_JOIN_SECONDS: Final = 30.0

log = logging.getLogger("lifl.worker")


def load(file: Path) -> AggregatorFunction:
    """Import the function, and torch if the file speaks of it. Raises `InvalidFunction`."""
    function = load_function(file)
    text = file.read_text()
    if "torch" in sys.modules or "torch" in text or ".tensor" in text:
        try:
            import torch
        except ImportError as error:
            raise InvalidFunction(f"{file}: needs torch, which is not installed: pip install torch") from error
        torch.set_num_threads(1)
    return function


def serve(channel: ControlChannel[FromAgent], function: Callable[[], AggregatorFunction], job: str) -> int:
    """Be a worker until the agent ends it, and return the status to exit with.

    `channel` is a connection on which joining has begun. When that is complete, `function` is called; from then on
    the kernel ends this process with its connection.
    """
    try:
        connection = complete_join(channel, "worker")
        _end_with_connection(connection.channel.fileno())
        Worker(connection, function()).run()
    except Unavailable:
        return 0  # the agent is gone or wants this worker no more
    except BaseException:
        log.exception("worker of job %s ended", job)
        return 1
    return 0


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


def spawn(channel: ControlChannel[FromAgent], file: Path, job: str) -> int:
    """Start this module as a child process that inherits `channel`, and return its pid."""
    os.set_inheritable(channel.fileno(), True)
    arguments = [
        *(sys.executable, "-m", "lifl.worker_process", "--channel", str(channel.fileno())),
        *("--zygote", str(os.getpid()), "--file", str(file), "--job", job),
    ]
    return os.posix_spawn(sys.executable, arguments, os.environ)


def main() -> None:
    """Entry point of a worker that was spawned."""
    parser = argparse.ArgumentParser(prog="python -m lifl.worker_process", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, help="fd of a connection that has begun to join")
    parser.add_argument("--zygote", type=int, required=True, help="pid of the parent")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--job", required=True)
    options = parser.parse_args()
    end_with_parent(options.zygote, signal.SIGKILL)
    configure_logging("worker", LOG_FORMAT)
    channel: ControlChannel[FromAgent] = ControlChannel(socket.socket(fileno=options.channel), FromAgent)
    os.set_inheritable(options.channel, False)  # what the function starts must not keep the connection open
    channel.settimeout(_JOIN_SECONDS)
    os._exit(serve(channel, lambda: load(options.file), options.job))


if __name__ == "__main__":
    main()

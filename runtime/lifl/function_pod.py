"""The process of a function's pod: it answers HTTP, and where a node's agent is at hand its zygote forks workers.

    LIFL_FUNCTION=/function/function/fedavg.py python -m lifl.function_pod

| variable | meaning |
|---|---|
| LIFL_FUNCTION | the file with the `@aggregator` function |
| LIFL_FUNCTION_NAME | what jobs call it (default: the file's name without `.py`) |
| LIFL_AGENT_DIRECTORY | where the agent's socket is, mounted from the node; without it the pod only answers HTTP |
| PORT, ADDRESS, LISTEN_ADDRESS | where to listen, as Knative says (default 0.0.0.0:8080) |

HTTP is Knative's Python function contract (`lifl.http_function`): health probes for the kubelet, and CloudEvents
where a broker carries updates. The zygote is a child process, started again when it ends. The pod is ready when
the zygote has joined the agent; it is not alive when the zygote ends again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lifl.errors import InvalidFunction, InvalidInput
from lifl.function import AggregatorFunction, load_function
from lifl.http_function import Aggregation, HttpFunction, Settings, listen_addresses, serve_instance
from lifl.logs import configure_logging
from lifl.process import SUPERVISOR_VARIABLE

FUNCTION_VARIABLE: Final = "LIFL_FUNCTION"
NAME_VARIABLE: Final = "LIFL_FUNCTION_NAME"
AGENT_VARIABLE: Final = "LIFL_AGENT_DIRECTORY"

_QUICK_END: Final = 5.0
"""A zygote that lived for less than these seconds without having joined is started again only after a pause."""
_LONGEST_PAUSE: Final = 10.0
_MOST_QUICK_ENDS: Final = 10
"""So many in a row, and the pod says that it is not alive."""
_STOP_SECONDS: Final = 5.0

log = logging.getLogger("lifl.function_pod")


@dataclass(frozen=True)
class PodOptions:
    """What a pod is told by its environment."""

    file: Path
    name: str
    agent_directory: Path | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> PodOptions:
        """Read the variables. Raises InvalidInput for what is missing."""
        if not environment.get(FUNCTION_VARIABLE):
            raise InvalidInput(
                f"{FUNCTION_VARIABLE} has to name the function's file, as images of 'func build' do"
            )
        file = Path(environment[FUNCTION_VARIABLE])
        agent = environment.get(AGENT_VARIABLE)
        return cls(file, environment.get(NAME_VARIABLE) or file.stem, Path(agent) if agent else None)


class ZygoteProcess:
    """Keeps one zygote running beside the server; everything in the event loop's thread."""

    def __init__(self, options: PodOptions) -> None:
        assert options.agent_directory is not None
        self._socket = options.agent_directory / "agent.sock"
        self._arguments = (
            *(sys.executable, "-m", "lifl.zygote", "--runtime-directory", str(options.agent_directory)),
            *("--name", options.name, "--file", str(options.file)),
        )
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._quick_ends = 0
        self.has_joined = False

    @property
    def is_hopeless(self) -> bool:
        """Whether it has ended so often that a new pod may do better."""
        return self._quick_ends >= _MOST_QUICK_ENDS

    @property
    def state(self) -> str:
        """What there is to say about it, for probes."""
        if self.has_joined:
            return "the zygote has joined the agent"
        try:
            self._socket.stat()
        except FileNotFoundError:
            return f"there is no agent at {self._socket}: does LIFL's DaemonSet run on this node?"
        except OSError as error:
            return f"the agent's socket {self._socket} cannot be reached: {error.strerror}"
        return (
            f"the zygote has not joined the agent at {self._socket} (ended {self._quick_ends} times; see the log)"
        )

    def start(self) -> None:
        """Keep it running from now on."""
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def stop(self) -> None:
        """End it and its workers."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            has_joined = await self._run()
            assert self._process is not None
            is_quick = not has_joined and loop.time() - began < _QUICK_END
            self._quick_ends = self._quick_ends + 1 if is_quick else 0
            log.warning("the zygote ended (status %d); starting it again", self._process.returncode)
            _reap_orphans()
            await asyncio.sleep(min(_LONGEST_PAUSE, 0.1 * 2**self._quick_ends))

    async def _run(self) -> bool:
        """Start it and wait for its end; returns whether it had joined the agent."""
        environment = dict(os.environ, **{SUPERVISOR_VARIABLE: str(os.getpid())})
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdout is not None
        has_joined = False
        try:
            async for line in self._process.stdout:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self.has_joined = bool(json.loads(line)["joined"])
                    has_joined = has_joined or self.has_joined
            await self._process.wait()
        finally:
            self.has_joined = False
        return has_joined


def _reap_orphans() -> None:
    """Wait for the workers of a zygote that has died: in a container they become children of process 1.

    Called when there is no zygote, the only child that anybody else waits for.
    """
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


class PodFunction(HttpFunction):
    """The function over HTTP, whose health is also that of the zygote beside it."""

    def __init__(self, function: AggregatorFunction, options: PodOptions) -> None:
        super().__init__(function)
        self._zygote = ZygoteProcess(options) if options.agent_directory is not None else None

    def start(self, cfg: Mapping[str, str]) -> None:
        """Begin, with the zygote."""
        super().start(cfg)
        if self._zygote is not None:
            self._zygote.start()

    async def end(self) -> None:
        """Stop the zygote, and wait for that."""
        if self._zygote is not None:
            await self._zygote.stop()

    def alive(self) -> tuple[bool, str]:
        """Whether the pod works; not when its zygote cannot be kept running."""
        if self._zygote is not None and self._zygote.is_hopeless:
            return False, self._zygote.state
        return super().alive()

    def ready(self) -> tuple[bool, str]:
        """Whether the pod takes requests and the node's agent knows its function."""
        if self._zygote is not None and not self._zygote.has_joined:
            return False, self._zygote.state
        return super().ready()


def main() -> int:
    """Entry point of the process; returns its exit status."""
    configure_logging("function", "%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        options = PodOptions.of(os.environ)
        function = load_function(str(options.file))
        Aggregation(
            function, Settings.of(os.environ)
        )  # says what is wrong with them now, not with the first event
    except (InvalidFunction, InvalidInput) as error:
        log.error("%s", error)
        return 1
    addresses = listen_addresses({"ADDRESS": "0.0.0.0", **os.environ})
    asyncio.run(_serve(PodFunction(function, options), addresses))
    return 0


async def _serve(instance: PodFunction, addresses: list[str]) -> None:
    try:
        await serve_instance(instance, addresses, logging.getLogger("lifl.http"))
    finally:
        await instance.end()


if __name__ == "__main__":
    sys.exit(main())

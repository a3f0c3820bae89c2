"""A node for benchmarks, started as users start it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from lifl.cli.common import normalise_url

from lifl_bench.measure import tree_cpu
from lifl_bench.service import Service

REPOSITORY = Path(__file__).resolve().parents[2]


class NodeProcess:
    """A node of its own on a free port, started with `func run`; use it in a `with` statement.

    Raises RuntimeError, with what the node printed, if it does not come up.
    """

    def __init__(
        self,
        state_directory: Path,
        environment: dict[str, str],
        *,
        data_plane: str = "auto",
        project: Path = REPOSITORY,
        gateways: int = 1,
        arguments: Sequence[str] = (),
    ) -> None:
        state_directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lifl.cli", "run", "--path", str(project), "--address", "127.0.0.1:0"]
        command += ["--state-directory", str(state_directory), "--data-plane", data_plane]
        command += ["--gateways", str(gateways), *arguments, "-o", "json"]
        settings = {name: value for name, value in environment.items() if not name.startswith("FUNC_")}
        self._service = Service("the node", command, settings, state_directory / "node.log")
        try:
            ready = json.loads(self._service.hear())
        except BaseException:
            self.stop()
            raise
        self.address = normalise_url(ready["address"])
        self.data_plane = str(ready["data_plane"])

    @property
    def pid(self) -> int:
        """The supervisor's process id; the node's other processes are below it."""
        return self._service.pid

    @property
    def is_running(self) -> bool:
        """Whether the supervisor is there."""
        return self._service.is_running

    def log(self) -> str:
        """The end of what the node printed."""
        return self._service.tail()

    def cpu_seconds(self) -> float:
        """CPU seconds of all processes of the node so far."""
        return tree_cpu(self.pid)

    def stop(self) -> None:
        """End the node, by force if it takes too long, and whatever it may leave behind."""
        self._service.stop()

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

"""A function's process and the sidecar in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lifl_bench.broker.service import python_command, python_environment
from lifl_bench.broker.setup import Setup
from lifl_bench.broker.sidecar import Sidecar
from lifl_bench.service import Service


class Replica:
    """Starts the function at once when constructed; `wait_ready` starts its sidecar."""

    def __init__(self, setup: Setup, leaf: int, environment: Mapping[str, str]) -> None:
        self._setup = setup
        self._leaf = leaf
        self._environment = environment
        self._sidecar: Sidecar | None = None
        ours = python_environment(environment, keep_large_blocks=setup.tuning.recycle_memory)
        name = f"function-{leaf}"
        command = python_command("function", str(setup.path), str(leaf))
        self._function = Service(name, command, ours, Path(setup.directory) / f"{name}.log")

    def wait_ready(self) -> None:
        """Return when events can be sent to the sidecar. Raises RuntimeError with a log; call `stop` then."""
        upstream = int(self._function.hear())
        setup = self._setup
        self._sidecar = Sidecar(
            f"sidecar-{self._leaf}", Path(setup.directory), setup.tuning, self._environment, upstream
        )

    @property
    def port(self) -> int:
        """Where the sidecar listens."""
        assert self._sidecar is not None
        return self._sidecar.port

    def function_pids(self) -> list[int]:
        """The function's processes."""
        return self._function.pids()

    def sidecar_pids(self) -> list[int]:
        """The sidecar's processes."""
        return self._sidecar.service.pids() if self._sidecar is not None else []

    def stop(self) -> None:
        """End both."""
        if self._sidecar is not None:
            self._sidecar.service.stop()
        self._function.stop()

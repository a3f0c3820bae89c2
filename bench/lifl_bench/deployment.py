"""The seam between the benchmark and what it compares: one way (mode) to get updates to aggregators and back.

A mode provides a `Deployment`, started anew for each cell of the comparison. The runner starts it, forks one
process for each client and one observer, and then runs rounds: every client process sends its update through a
`Sender`, the observer process waits with an `Observer` until the new global model could be fetched. Nothing of a
mode is told what is measured, except where an update was folded: that is stamped into shared memory by whoever
folds (`Stamps`).
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from lifl.control.hierarchy import plan_hierarchy
from lifl.model_layout import Precision

Timing = Literal["eager", "lazy"]


@dataclass(frozen=True)
class Tree:
    """Who folds what: client i sends to leaf `i % leaves`; leaf 0 is also the top and merges the partials
    of the others."""

    updates: int
    leaves: int

    @classmethod
    def plan(cls, updates: int, levels: int, cores: int) -> Tree:
        """The tree LIFL's own planner makes: one aggregator for one level, else as many leaves as it would run."""
        if levels == 1:
            return cls(updates, 1)
        return cls(updates, plan_hierarchy(updates, UPDATES_PER_LEAF, cores, gather=False).leaves)

    def leaf_of(self, client: int) -> int:
        """The leaf that folds this client's update."""
        return client % self.leaves

    def clients_of(self, leaf: int) -> range:
        """The clients whose updates this leaf folds."""
        return range(leaf, self.updates, self.leaves)

    def goal_of(self, leaf: int) -> int:
        """Inputs that complete this leaf's round: updates, and for leaf 0 the partial aggregates of the others."""
        return len(self.clients_of(leaf)) + (self.leaves - 1 if leaf == 0 else 0)


UPDATES_PER_LEAF = 2
"""I of the planner, as jobs have it by default."""


@dataclass(frozen=True)
class Cell:
    """What a deployment is for."""

    updates: int
    tree: Tree
    safetensors_header: bytes
    """JSON header of every update and of the model, without the eight bytes of its length."""
    payload_bytes: int
    """Tensor bytes of an update."""
    initial_model: bytes | memoryview
    """Safetensors bytes of the model that round 1 starts from."""
    function: Path
    """File of the @aggregator function, the same for all modes."""
    directory: Path
    """For files of this deployment; removed afterwards."""
    environment: Mapping[str, str]
    """Environment for processes that are started."""
    precision: Precision = "float32"

    @property
    def update_bytes(self) -> int:
        """Bytes of a whole update as it is sent."""
        return 8 + len(self.safetensors_header) + self.payload_bytes


class Sender(Protocol):
    """One client's connection, used in the client's process alone."""

    def connect(self) -> None:
        """Get everything ready that a client has before its update is: connections, imports."""
        ...

    def send(self, update: memoryview, *, num_samples: float, round: int) -> None:
        """Send one update (safetensors bytes) and return once it has been accepted; raises if it was not."""
        ...

    def fetch_model(self, round: int) -> memoryview:
        """Safetensors bytes of the global model that `round` starts from; waits up to a minute until it is there.

        Used for training and never while something is timed.
        """
        ...

    def close(self) -> None: ...


class Observer(Protocol):
    """Watches for new global models, in a process of its own, through the same interface that clients have."""

    def connect(self) -> None: ...

    def wait(self, round: int, timeout: float) -> float:
        """CLOCK_MONOTONIC at which the model made by `round` could be fetched by a client.

        Has to be called before the round begins. Raises TimeoutError after `timeout` seconds.
        """
        ...

    def fetch(self, round: int) -> memoryview:
        """Safetensors bytes of the model made by `round`; not timed."""
        ...

    def close(self) -> None: ...


class Deployment(Protocol):
    """One mode, running. Leaves no process, file, port or kernel object behind when it is stopped."""

    mode: str

    def start(self) -> None:
        """Start everything and return when a round could begin. Raises RuntimeError saying what failed; after an
        exception nothing of it runs any more."""
        ...

    def stop(self) -> None:
        """End everything; may be called twice, and after a start that failed."""
        ...

    def sender(self, client: int) -> Sender:
        """For the client with this number; called in its process."""
        ...

    def observer(self) -> Observer:
        """Called in the observer's process."""
        ...

    def components(self) -> Mapping[str, Sequence[int]]:
        """Pids of all living processes by component, such as `gateway`, `nats-server`, `function`; each pid in one
        component, children listed too."""
        ...

    def folded(self, round: int) -> Sequence[float]:
        """CLOCK_MONOTONIC at which each client's update of `round` had become part of a sum, by client number; 0
        where that is not known. Asked after the round."""
        ...

    def before_round(self, round: int) -> None:
        """Called when clients are ready to send and before the clock starts."""
        ...

    def after_round(self, round: int) -> None:
        """Called when the round is over and measured."""
        ...


class Stamps:
    """Times shared between processes through a file: one slot for each client, written by who folds its update."""

    def __init__(self, path: Path, count: int) -> None:
        """Map the file, making it with `count` zeros where it does not exist."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, max(8 * count, mmap.PAGESIZE))
            memory = mmap.mmap(descriptor, max(8 * count, mmap.PAGESIZE))
        finally:
            os.close(descriptor)
        self._times: npt.NDArray[np.float64] = np.frombuffer(memory, np.float64, count)

    def note(self, client: int) -> None:
        """The update of this client has just been folded."""
        self._times[client] = time.monotonic()

    def read(self) -> list[float]:
        """All times; 0 for clients without one."""
        times: list[float] = self._times.tolist()
        return times

    def clear(self) -> None:
        """Forget all times, between rounds."""
        self._times[:] = 0


class Running:
    """Use a deployment in a `with` statement."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    def __enter__(self) -> Deployment:
        self._deployment.start()
        return self._deployment

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deployment.stop()

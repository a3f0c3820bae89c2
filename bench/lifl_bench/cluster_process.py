"""A cluster in a process of its own, so that its user may fork clients: clusters need threads, forking wants none.

with ClusterProcess(2, directory, capacity=20) as cluster:
    ...fork processes, each of which calls `enter(cluster.clients_namespace)`...
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

from lifl.errors import LiflError

from lifl_bench.cluster import Cluster
from lifl_bench.measure import tree_of
from lifl_bench.processes import REPOSITORY, Team

_ANSWER_SECONDS: Final = 180.0
_CLONE_NEWNET: Final = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Up(NamedTuple):
    """What the cluster's process says once all nodes have joined."""

    pid: int
    urls: tuple[str, ...]
    clients_namespace: str


class _Raised(NamedTuple):
    """A call has failed."""

    text: str


class ClusterProcess:
    """A `Cluster` that another process keeps; use it in a `with` statement.

    Raises RuntimeError if it does not come up, with what its programs printed, or if a call fails.
    """

    def __init__(
        self,
        nodes: int,
        directory: Path,
        *,
        capacity: float = 0.0,
        data_plane: str = "auto",
        project: Path = REPOSITORY,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """The options are those of `Cluster`. The calling process may have no other thread while it starts."""

        def make() -> Cluster:
            return Cluster(
                nodes,
                directory,
                capacity=capacity,
                data_plane=data_plane,
                project=project,
                arguments=arguments,
                environment=environment,
            )

        self._make = make
        self._team: Team | None = None
        self._up = _Up(0, (), "")

    def start(self) -> None:
        """Start it and wait until all nodes have joined."""
        self._team = Team(1, lambda _, link: _keep(self._make, link))
        try:
            up = self._hear()
        except BaseException:
            self.stop()
            raise
        assert isinstance(up, _Up)
        self._up = up

    def stop(self) -> None:
        """End it, and all that runs in it; may be called twice."""
        if self._team is None:
            return
        team, self._team = self._team, None
        try:
            team.send_to(0, None)
            for _ in team.receive(1, _ANSWER_SECONDS):
                pass
        except (RuntimeError, TimeoutError):
            pass  # it has ended already, or ends now
        team.stop()

    def __enter__(self) -> ClusterProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- where it is -----------------------------------------------------------------------------------------

    @property
    def urls(self) -> tuple[str, ...]:
        """Base URLs of the nodes' gateways, node 1 first."""
        return self._up.urls

    @property
    def clients_namespace(self) -> str:
        """The clients' host, for `enter`."""
        return self._up.clients_namespace

    def pids(self) -> dict[int, int]:
        """All processes of the coordinator and the nodes, each with its parent."""
        found = tree_of(self._up.pid) if self._team is not None else {}
        found.pop(self._up.pid, None)
        return {pid: stat.parent for pid, stat in found.items()}

    # --- talking to it ---------------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        """The JSON that the coordinator has at a path."""
        return self._ask("get", path)

    def residuals(self) -> list[float]:
        """Residual capacities of the nodes, as the coordinator sees them."""
        return [float(node["residual"]) for node in self._ask("nodes").values()]

    def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a function of a module in a thread on the clients' host and return what it returns."""
        result: _T = self._ask("call", function, *args, **kwargs)
        return result

    def cpu_seconds(self) -> float:
        """CPU seconds of the coordinator and all nodes so far."""
        return float(self._ask("cpu_seconds"))

    def internode_bytes(self) -> int:
        """Bytes that nodes have sent to nodes so far, counted at their links."""
        return int(self._ask("internode_bytes"))

    def _ask(self, name: str, *args: object, **kwargs: object) -> Any:
        if self._team is None:
            raise RuntimeError("the cluster does not run")
        self._team.send_to(0, (name, args, kwargs))
        return self._hear()

    def _hear(self) -> Any:
        assert self._team is not None
        ((_, answer),) = self._team.receive(1, _ANSWER_SECONDS)
        if isinstance(answer, _Raised):
            raise RuntimeError(answer.text)
        return answer


def enter(namespace: str) -> None:
    """Move the calling thread into a network namespace, which another process may keep. Raises OSError."""
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)


# --- in the cluster's process ----------------------------------------------------------------------------------


def _keep(make: Callable[[], Cluster], link: Connection) -> None:
    """Run the cluster and do what is asked, until that is to end, or whoever asks is gone."""
    # The default action would leave the cluster's files behind.
    signal.signal(signal.SIGTERM, _end)
    try:
        with make() as cluster:
            urls = tuple(map(cluster.url, cluster.numbers))
            link.send(_Up(os.getpid(), urls, cluster.hosts["clients"].namespace))
            _serve(cluster, link)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except (RuntimeError, TimeoutError) as error:
        link.send(_Raised(str(error)))
        return
    link.send(None)


def _serve(cluster: Cluster, link: Connection) -> None:
    while True:
        try:
            request = link.recv()
        except EOFError:
            return
        if request is None:
            return
        name, args, kwargs = request
        try:
            link.send(getattr(cluster, name)(*args, **kwargs))
        except (OSError, RuntimeError, LiflError) as error:
            link.send(_Raised(f"{type(error).__name__}: {error}"))


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(1)

"""LIFL as a deployment of the comparison: a node as `func run` starts it, clients that use `lifl.client`."""

from __future__ import annotations

import http.client
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lifl.cli.common import get_json
from lifl.client import Client
from lifl.errors import LiflError

from lifl_bench.deployment import Cell, Timing
from lifl_bench.measure import tree_of
from lifl_bench.node_process import NodeProcess

JOB = "bench"
COPIES = 2.0
COPIES_DETAIL = "client's buffer to socket; socket to slot, where it is folded"

_PROGRAMS = (
    ("lifl_gateway.agent", "agent"),
    ("lifl.control", "coordinator"),
    ("lifl_gateway.coordinator", "coordinator"),
    ("lifl_gateway", "gateway"),
    ("lifl.worker_process", "worker"),
    ("lifl.zygote", "zygote"),
    ("lifl.cli", "supervisor"),
)
_FETCH_SECONDS = 60.0


@dataclass(frozen=True)
class Variant:
    """How LIFL is run; the defaults are the whole of it, the others leave a mechanism out for the ablation."""

    data_plane: str = "auto"
    timing: Timing = "eager"
    reuse: bool = True
    start: str = "fork"


class LiflSender:
    """A client that posts its update to the gateway."""

    def __init__(self, url: str, client: int) -> None:
        self._url = url
        self._name = client_name(client)
        self._client: Client | None = None

    def connect(self) -> None:
        """Open the connection."""
        self._client = Client(self._url, JOB, self._name)
        self._client.describe()

    def send(self, update: memoryview, *, num_samples: float, round: int) -> None:
        """Submit; RuntimeError unless the update was accepted."""
        assert self._client is not None
        try:
            answer = self._client.submit(update, num_samples=num_samples, round=round)
        except LiflError as error:
            raise RuntimeError(f"{self._name}: {error}") from None
        if answer.status != "accepted":
            raise RuntimeError(f"{self._name}: the update of round {round} is {answer.status}")

    def fetch_model(self, round: int) -> memoryview:
        """Wait for the round's model and fetch it."""
        assert self._client is not None
        return memoryview(self._client.wait_for_round(after=round - 1, timeout=_FETCH_SECONDS).data)

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()


class LiflObserver:
    """Asks for the head of the next model, which the gateway answers when the model is there."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url).netloc
        self._client = Client(url, JOB, "observer")
        self._connection: http.client.HTTPConnection | None = None

    def connect(self) -> None:
        """Open the connection."""
        self._connection = http.client.HTTPConnection(self._address)
        self._connection.connect()

    def wait(self, round: int, timeout: float) -> float:
        """Long-poll until the model that `round` makes is offered."""
        assert self._connection is not None
        self._connection.close()  # the gateway ends connections that were idle for long; this one is opened anew
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            self._connection.timeout = left + 30
            path = f"/v1/jobs/{JOB}/model?after={round}&wait={min(30.0, left):.3f}"
            self._connection.request("HEAD", path)
            response = self._connection.getresponse()
            now = time.monotonic()
            response.read()
            if response.status == 200:
                return now
            if response.status != 304:
                raise RuntimeError(f"the gateway answered {response.status} {response.reason} to {path}")
        raise TimeoutError(f"round {round} made no model within {timeout:.0f} s")

    def fetch(self, round: int) -> memoryview:
        """The model that `round` made."""
        return memoryview(self._client.fetch_model(round + 1).data)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        if self._connection is not None:
            self._connection.close()


class LiflDeployment:
    """A node with one job."""

    def __init__(self, cell: Cell, mode: str = "lifl", variant: Variant | None = None) -> None:
        self.mode = mode
        self._cell = cell
        self._variant = variant or Variant()
        self._node: NodeProcess | None = None
        self.data_plane = ""
        """The data plane in use, once started: `ebpf` or `unix`."""

    def start(self) -> None:
        """Start the node, create the job, and give it its first model."""
        project = write_project(self._cell)
        arguments = [] if self._variant.start == "fork" else ["--start", self._variant.start]
        self._node = NodeProcess(
            self._cell.directory / "state",
            dict(self._cell.environment),
            data_plane=self._variant.data_plane,
            project=project,
            arguments=arguments,
        )
        self.data_plane = self._node.data_plane
        try:
            self._create_job(self._node.address)
        except BaseException as error:
            log = self._node.log()
            self.stop()
            if isinstance(error, LiflError):
                raise RuntimeError(f"the job was refused: {error}\n{log}") from error
            raise

    def _create_job(self, url: str) -> None:
        cell, variant = self._cell, self._variant
        options: dict[str, object] = {} if variant.reuse else {"reuse": False}
        if cell.tree.leaves == 1:
            options["updates_per_leaf"] = cell.updates
        with Client(url, JOB, "operator") as operator:
            operator.create_job(
                function=cell.function.stem,
                goal=cell.updates,
                timing=variant.timing,
                precision=cell.precision,
                keep_checkpoints=2,
                idle_seconds=3600.0,
                **options,
            )
            operator.upload_model(cell.initial_model)

    def stop(self) -> None:
        """End the node."""
        if self._node is not None:
            self._node.stop()
            self._node = None

    def sender(self, client: int) -> LiflSender:
        """A client."""
        assert self._node is not None
        return LiflSender(self._node.address, client)

    def observer(self) -> LiflObserver:
        """An observer."""
        assert self._node is not None
        return LiflObserver(self._node.address)

    def components(self) -> Mapping[str, Sequence[int]]:
        """The node's processes by what they are."""
        stats = tree_of(self._node.pid) if self._node is not None else {}
        return by_component({pid: stat.parent for pid, stat in stats.items()})

    def folded(self, round: int) -> Sequence[float]:
        """When each client's update became part of a sum, as the coordinator has it."""
        assert self._node is not None
        times = [0.0] * self._cell.updates
        path, offset = f"/v1/jobs/{JOB}/rounds/{round}/updates", -1
        while offset:
            page = get_json(self._node.address, f"{path}?offset={max(0, offset)}")
            for update in page["updates"]:
                times[int(update["client"].removeprefix("client-"))] = update["folded"]
            offset = page["next"]
        return times

    def before_round(self, round: int) -> None:
        """Nothing to prepare: what a round needs, it starts."""

    def after_round(self, round: int) -> None:
        """Nothing to clear."""


def write_project(cell: Cell) -> Path:
    """A project with the one function of the comparison."""
    project = cell.directory / "project"
    functions = project / "functions"
    functions.mkdir(parents=True, exist_ok=True)
    shutil.copy(cell.function, functions)
    annotations = json.dumps({"lifl.dev/function": f"functions/{cell.function.name}"})
    head = "specVersion: 0.36.0\nname: bench\nruntime: python\ncreated: 2026-01-01T00:00:00Z\n"
    document = f"{head}deploy:\n  annotations: {annotations}\n"
    (project / "func.yaml").write_text(document)
    return project


def by_component(parents: Mapping[int, int]) -> Mapping[str, Sequence[int]]:
    """Processes of LIFL by what they are, from the pid of each with its parent's."""
    found: dict[str, list[int]] = {name: [] for _, name in _PROGRAMS}
    kinds = {pid: _kind_of(pid) for pid in parents}
    for pid, parent in parents.items():
        # A forked worker has the command line of its zygote, and the zygote for its parent.
        is_forked = kinds[pid] == "zygote" and kinds.get(parent) == "zygote"
        found["worker" if is_forked else kinds[pid]].append(pid)
    return found


def client_name(client: int) -> str:
    """The id that the client with this number uses."""
    return f"client-{client:04}"


def _kind_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "supervisor"
    for word in words[:6]:
        for program, name in _PROGRAMS:
            if word == program or word.startswith(f"{program}."):
                return name
    return "supervisor"

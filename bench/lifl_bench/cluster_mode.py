"""LIFL on several nodes as a deployment of the comparison, for the ablation: namespaces as hosts, one job.

Clients and the observer are forked by the runner; each moves to the clients' host before it opens its connection.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from lifl.client import Client
from lifl.cluster.placement import Policy
from lifl.errors import LiflError, Refused

from lifl_bench.cluster_process import ClusterProcess, enter
from lifl_bench.deployment import UPDATES_PER_LEAF, Cell, Timing
from lifl_bench.lifl_mode import JOB, LiflSender, by_component, write_project

_NEWS_SECONDS: Final = 5.0
_AGAIN_SECONDS: Final = 0.002
_ASK_SECONDS: Final = 0.01
_REQUEST_SECONDS: Final = 30.0


@dataclass(frozen=True)
class ClusterVariant:
    """How the cluster runs; the defaults are the whole of LIFL, the others leave a mechanism out."""

    placement: Policy = "best-fit"
    is_planned: bool = True
    """As many leaves as the updates ask for; otherwise one aggregator a node, however many there are."""
    reuse: bool = True
    start: str = "fork"
    timing: Timing = "eager"


class ClusterSender(LiflSender):
    """A client on the clients' host; it stays with the node that it is sent to."""

    def __init__(self, namespace: str, url: str, client: int) -> None:
        super().__init__(url, client)
        self._namespace = namespace

    def connect(self) -> None:
        """Move to the host and open the connection."""
        enter(self._namespace)
        super().connect()


class ClusterObserver:
    """Asks the node that made the last model for the head of the next one: there it is first, and asking elsewhere
    would have it brought there."""

    def __init__(self, namespace: str, urls: Sequence[str]) -> None:
        self._namespace = namespace
        self._urls = urls
        self._url = urls[0]

    def connect(self) -> None:
        """Move to the clients' host."""
        enter(self._namespace)

    def wait(self, round: int, timeout: float) -> float:
        """Wait until the model that `round` makes can be fetched."""
        deadline = time.monotonic() + timeout
        last = self._describe()["last"]
        if last is None:
            return self._wait_for_first(round, deadline)
        self._go_to(last["top"])
        connection = http.client.HTTPConnection(urlsplit(self._url).netloc)
        try:
            return _wait_for_head(connection, round, deadline)
        finally:
            connection.close()

    def _wait_for_first(self, round_: int, deadline: float) -> float:
        """The warm-up round: nobody knows yet who will make its model."""
        while time.monotonic() < deadline:
            state = self._describe()
            if state["model_round"] > round_ and state["last"] is not None:
                self._go_to(state["last"]["top"])
                return time.monotonic()
            time.sleep(_ASK_SECONDS)
        raise TimeoutError(f"round {round_} made no model in time")

    def _describe(self) -> dict[str, Any]:
        with Client(self._url, JOB, "observer") as client:
            return client.describe()

    def _go_to(self, node: str) -> None:
        self._url = self._urls[int(node.removeprefix("h")) - 1]

    def fetch(self, round: int) -> memoryview:
        """The model that `round` made, from the node that made it."""
        last = self._describe()["last"]
        if last is not None and last["round"] == round:
            self._go_to(last["top"])
        with Client(self._url, JOB, "observer") as client:
            return memoryview(client.wait_for_round(after=round, timeout=_REQUEST_SECONDS).data)

    def close(self) -> None:
        """Nothing stays open."""


def _wait_for_head(connection: http.client.HTTPConnection, round_: int, deadline: float) -> float:
    while (left := deadline - time.monotonic()) > 0:
        connection.timeout = left + _REQUEST_SECONDS
        path = f"/v1/jobs/{JOB}/model?after={round_}&wait={min(_REQUEST_SECONDS, left):.3f}"
        connection.request("HEAD", path)
        response = connection.getresponse()
        now = time.monotonic()
        response.read()
        if response.status == 200:
            return now
        if response.status == 503:
            time.sleep(_AGAIN_SECONDS)  # the round is over, and its model not quite there
        elif response.status != 304:
            raise RuntimeError(f"the gateway answered {response.status} {response.reason} to {path}")
    raise TimeoutError(f"round {round_} made no model in time")


class ClusterDeployment:
    """A coordinator and its nodes with one job."""

    def __init__(
        self, cell: Cell, nodes: int, capacity: float, variant: ClusterVariant, mode: str = "lifl"
    ) -> None:
        """`capacity` is MC of each node."""
        self.mode = mode
        self._cell = cell
        self._variant = variant
        self._nodes = nodes
        self._capacity = capacity
        self._cluster: ClusterProcess | None = None

    def start(self) -> None:
        """Start the cluster, create the job, and give it its first model."""
        cell, start = self._cell, self._variant.start
        cluster = ClusterProcess(
            self._nodes,
            cell.directory / "state",
            capacity=self._capacity,
            project=write_project(cell),
            arguments=[] if start == "fork" else ["--start", start],
            environment=dict(cell.environment),
        )
        cluster.start()
        self._cluster = cluster
        try:
            model = bytes(self._cell.initial_model)
            cluster.call(create_job, cluster.urls[0], self._spec(), model)
        except BaseException:
            self.stop()
            raise

    def _spec(self) -> dict[str, Any]:
        cell, variant = self._cell, self._variant
        return {
            "function": cell.function.stem,
            "goal": cell.updates,
            "timing": variant.timing,
            "precision": cell.precision,
            "placement": variant.placement,
            "updates_per_leaf": UPDATES_PER_LEAF if variant.is_planned else cell.updates,
            "reuse": variant.reuse,
            "keep_checkpoints": 2,
            "idle_seconds": 3600.0,
        }

    def stop(self) -> None:
        """End the cluster."""
        if self._cluster is not None:
            self._cluster.stop()
            self._cluster = None

    def sender(self, client: int) -> ClusterSender:
        """A client, which begins at another gateway than the one before it."""
        assert self._cluster is not None
        urls = self._cluster.urls
        return ClusterSender(self._cluster.clients_namespace, urls[client % len(urls)], client)

    def observer(self) -> ClusterObserver:
        """An observer."""
        assert self._cluster is not None
        return ClusterObserver(self._cluster.clients_namespace, self._cluster.urls)

    def components(self) -> Mapping[str, Sequence[int]]:
        """The processes of the coordinator and of all nodes by what they are."""
        return by_component(self._cluster.pids() if self._cluster is not None else {})

    def folded(self, round: int) -> Sequence[float]:
        """Not known: the coordinator of a cluster keeps no times of single updates."""
        return [0.0] * self._cell.updates

    def before_round(self, round: int) -> None:
        """Nothing to prepare: what a round needs, it starts."""

    def after_round(self, round: int) -> None:
        """Nothing to clear."""


def create_job(url: str, spec: dict[str, Any], model: bytes, job: str = JOB) -> None:
    """Make a job and give it its first model. Raises RuntimeError if it is refused."""
    try:
        with Client(url, job, "operator") as operator:
            operator.create_job(**spec)
            _upload(operator, model)
    except LiflError as error:
        raise RuntimeError(f"job {job}: {error}") from None


def _upload(operator: Client, model: bytes) -> None:
    """Upload the model, more than once if need be: a gateway may hear of the job a moment after it was made."""
    end = time.monotonic() + _NEWS_SECONDS
    while True:
        try:
            operator.upload_model(model)
            return
        except Refused as refusal:
            if refusal.status != 404 or time.monotonic() > end:
                raise
        time.sleep(_ASK_SECONDS)

"""Runs the rounds of a comparison: one cluster for each number of nodes, on it one job for each policy."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lifl.client import Client
from lifl.cluster.placement import Policy
from lifl.errors import LiflError

from lifl_bench.cluster_mode import create_job
from lifl_bench.cluster_process import ClusterProcess
from lifl_bench.placement_comparison.clients import Clients, Trained
from lifl_bench.placement_comparison.plan import Plan, turns
from lifl_bench.placement_comparison.results import ClusterResults, PlacedRound, PlacementCell, PolicyResult
from lifl_bench.results import TOLERANCE
from lifl_bench.workload import Workload

SETTLE_SECONDS: Final = 0.4
"""After a round: until checkpoints are written, reports are sent and all sleep."""
REST_SECONDS: Final = 4.0
"""Longest wait for the cluster to be at rest."""
_REST_SHARE: Final = 0.02
"""Residual capacities that lack no more than this share are those of a cluster at rest."""
_POLL_SECONDS: Final = 0.1
_IDLE_SECONDS: Final = 3600.0
"""No job goes to sleep while it is another one's turn."""

Note = Callable[[str], None]


def measure(plan: Plan, results: ClusterResults, environment: Mapping[str, str], note: Note) -> None:
    """Run all cells. `results` grows meanwhile; a policy that fails gets no further rounds in its cell."""
    workloads = {updates: Workload(plan.model, updates) for updates in plan.updates}
    for nodes in plan.nodes:
        with tempfile.TemporaryDirectory(prefix="lifl-cluster-") as directory:
            note(f"{nodes} nodes: starting")
            with ClusterProcess(
                nodes, Path(directory) / "state", capacity=plan.capacity, environment=environment
            ) as cluster:
                for updates, workload in workloads.items():
                    cell = PlacementCell(nodes, updates, [PolicyResult(policy) for policy in plan.policies])
                    results.cells.append(cell)
                    _CellRun(plan, cell, workload, cluster, note).run()
                results.data_plane = results.data_plane or _data_plane(cluster)


def _data_plane(cluster: ClusterProcess) -> str:
    return ", ".join(sorted({str(node["data_plane"]) for node in cluster.get("/v1/nodes")["nodes"]}))


@dataclass(frozen=True)
class _Before:
    """What was used before a round."""

    cpu: float
    internode: int


class _CellRun:
    """The rounds of one cell."""

    def __init__(
        self, plan: Plan, cell: PlacementCell, workload: Workload, cluster: ClusterProcess, note: Note
    ) -> None:
        self._plan = plan
        self._cell = cell
        self._workload = workload
        self._cluster = cluster
        self._note = note
        self._rounds: Counter[Policy] = Counter()
        self._clients: Clients | None = None

    def run(self) -> None:
        """Each policy's first round, which is not counted, then measured rounds in turn."""
        with self._jobs():
            try:
                self._turn(self._plan.policies, is_counted=False)
                for order in turns(self._plan.policies, self._plan.rounds):
                    self._turn(order, is_counted=True)
            finally:
                self._end_clients()

    @contextlib.contextmanager
    def _jobs(self) -> Iterator[None]:
        model = bytes(self._workload.initial_model())
        try:
            for policy in self._plan.policies:
                self._cluster.call(create_job, self._cluster.urls[0], self._spec(policy), model, self._job(policy))
            yield
        finally:
            for policy in self._plan.policies:
                with contextlib.suppress(RuntimeError):
                    self._cluster.call(delete_job, self._cluster.urls[0], self._job(policy))

    def _job(self, policy: Policy) -> str:
        return f"{policy}-{self._cell.updates}"

    def _spec(self, policy: Policy) -> dict[str, Any]:
        return {
            "function": "fedavg",
            "goal": self._cell.updates,
            "placement": policy,
            "keep_checkpoints": 2,
            "idle_seconds": _IDLE_SECONDS,
        }

    def _turn(self, policies: Sequence[Policy], *, is_counted: bool) -> None:
        for policy in policies:
            result = next(each for each in self._cell.policies if each.policy == policy)
            if result.failure:
                continue
            what = f"round {self._rounds[policy]}" if is_counted else "first round"
            self._note(f"{self._cell.nodes} nodes, {self._cell.updates} updates: {policy}, {what}")
            try:
                measured = self._run_round(policy)
                if is_counted:
                    result.rounds.append(measured)
            except (RuntimeError, TimeoutError, OSError) as error:
                result.failure = str(error) or type(error).__name__
                self._end_clients()  # some of them may still wait for something

    def _run_round(self, policy: Policy) -> PlacedRound:
        self._rest()
        clients = self._begin_clients()
        self._rounds[policy] += 1
        number, job = self._rounds[policy], self._job(policy)
        before = _Before(self._cluster.cpu_seconds(), self._cluster.internode_bytes())
        trained = clients.run_round(job, number)
        time.sleep(SETTLE_SECONDS)
        cpu = self._cluster.cpu_seconds() - before.cpu
        internode = self._cluster.internode_bytes() - before.internode
        error = self._check(clients, trained, number)
        state = self._cluster.get(f"/v1/jobs/{job}/rounds/{number}")
        return PlacedRound(
            act_s=state["act"],
            round_s=max(one.has_model for one in trained) - min(one.began for one in trained),
            internode_bytes=internode,
            reported_bytes=state["internode_bytes"],
            nodes=state["nodes"],
            aggregators=state["leaves"],
            started=state["started"],
            reused=state["reused"],
            cold=state["cold"],
            cpu_s=cpu,
            updates=self._shares(job, number),
            error=error,
        )

    def _check(self, clients: Clients, trained: Sequence[Trained], number: int) -> float:
        """The error of the round's model. Raises RuntimeError if it is wrong, or not all have the same one."""
        if len({one.checksum for one in trained}) > 1:
            raise RuntimeError(f"WRONG: clients have fetched different models of round {number}")
        error = clients.check(number)
        if not error <= TOLERANCE:
            raise RuntimeError(f"WRONG: the model of round {number} is off by {error:.2e} of its summands")
        return error

    def _shares(self, job: str, number: int) -> list[int]:
        page = self._cluster.get(f"/v1/jobs/{job}/rounds/{number}/updates")
        counts = Counter(update["node"] for update in page["updates"] if update["counted"])
        return sorted(counts.values(), reverse=True)

    def _rest(self) -> None:
        """Wait until the last round's load is forgotten, as it is when clients train between rounds."""
        end = time.monotonic() + REST_SECONDS
        while time.monotonic() < end:
            if min(self._cluster.residuals()) >= self._plan.capacity * (1 - _REST_SHARE):
                return
            time.sleep(_POLL_SECONDS)

    def _begin_clients(self) -> Clients:
        if self._clients is None:
            self._clients = Clients(self._cluster.clients_namespace, self._cluster.urls, self._workload)
        return self._clients

    def _end_clients(self) -> None:
        if self._clients is not None:
            self._clients.stop()
            self._clients = None


def delete_job(url: str, job: str) -> None:
    """End a job and give its memory back; called on the clients' host."""
    try:
        with Client(url, job, "operator") as operator:
            operator.delete()
    except LiflError as error:
        raise RuntimeError(f"job {job}: {error}") from None

"""The autoscaler's process between an API server and a coordinator's process, as Knative's controllers see it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lifl.cluster.messages import Placed, PlaceUpdate
from lifl.messages import Problem
from lifl_knative.autoscaler.__main__ import main
from lifl_knative.autoscaler.conditions import find
from lifl_knative.autoscaler.objects import AUTOSCALER, DELETION_COST, DEPLOYMENT, SERVERLESS_SERVICE

from tests import knative_schema
from tests.integration.platform_harness import until
from tests.integration.scripted_member import FUNCTION, CoordinatorUnderTest, ScriptedMember
from tests.kubernetes_api import KubernetesApi
from tests.unit.test_autoscaler import autoscaler as make_autoscaler

pytestmark = pytest.mark.timeout(60)

JOB = "digits"
NAME = "fedavg-00001"
NAMESPACE = "default"


class KnativeAndKubelets:
    """What Knative and the nodes do about what the autoscaler writes: pods come up on one node after the other."""

    def __init__(self, api: KubernetesApi, nodes: list[ScriptedMember]) -> None:
        self.api = api
        self.nodes = nodes
        self.is_activator_there = True
        api.kinds[SERVERLESS_SERVICE[0]] = {SERVERLESS_SERVICE[1]: ("serverlessservices", True)}
        api.on("Deployment", lambda _, deployment: self.run_pods(deployment))
        api.on("ServerlessService", lambda _, service: self.route(service))

    def deploy(self, name: str = NAME, replicas: int = 1, **options: Any) -> None:
        """A revision as Knative makes it."""
        pa = make_autoscaler(name, **options)
        target = {
            "apiVersion": DEPLOYMENT[0],
            "kind": DEPLOYMENT[1],
            "metadata": {
                "name": f"{name}-deployment",
                "namespace": NAMESPACE,
                "labels": {"serving.knative.dev/revision": name},
            },
            "spec": {"replicas": replicas},
        }
        self.run_pods(self.api.put(target))
        del pa["metadata"]["uid"], pa["metadata"]["generation"]
        self.api.put(pa)

    def run_pods(self, deployment: dict[str, Any]) -> None:
        revision = deployment["metadata"]["labels"]["serving.knative.dev/revision"]
        replicas = deployment["spec"]["replicas"]
        for number, node in enumerate(self.nodes):
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"{revision}-{number}",
                    "namespace": NAMESPACE,
                    "labels": {"serving.knative.dev/revision": revision},
                },
                "spec": {"nodeName": node.name},
            }
            if number < replicas and self.api.get("v1", "Pod", pod["metadata"]["name"]) is None:
                self.api.put(pod)
            if number < replicas:
                node.attach(FUNCTION)
            else:
                node.attach()
        self.api.set_status(deployment, {"readyReplicas": replicas, "replicas": replicas})

    def route(self, service: dict[str, Any]) -> None:
        name, is_proxied = service["metadata"]["name"], service["spec"]["mode"] == "Proxy"
        self.api.set_status(
            service,
            {
                "observedGeneration": service["metadata"]["generation"],
                "serviceName": name,
                "privateServiceName": f"{name}-private",
                "conditions": [
                    {"type": "ActivatorEndpointsPopulated", "status": str(is_proxied and self.is_activator_there)},
                    {"type": "Ready", "status": "True"},
                ],
            },
        )

    # --- as it is --------------------------------------------------------------------------------------------

    def scale(self, name: str = NAME) -> int:
        deployment = self.api.get(*DEPLOYMENT, f"{name}-deployment")
        assert deployment is not None
        return int(deployment["spec"]["replicas"])

    def status(self, name: str = NAME) -> dict[str, Any]:
        found = self.api.get(*AUTOSCALER, name)
        assert found is not None
        if knative_schema.schemas():
            assert knative_schema.problems(found) == []
        status: dict[str, Any] = found.get("status") or {}
        return status

    def truths(self, name: str = NAME) -> dict[str, str]:
        return {c["type"]: c["status"] for c in self.status(name).get("conditions", ())}

    def mode(self, name: str = NAME) -> str:
        service = self.api.get(*SERVERLESS_SERVICE, name)
        return str(service["spec"]["mode"]) if service is not None else ""


class Autoscaler:
    """`python -m lifl_knative.autoscaler`."""

    def __init__(self, kubeconfig: Path, coordinator: str, log_format: str = "text") -> None:
        words = ["--kubeconfig", str(kubeconfig), "--coordinator", coordinator, "--address", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lifl_knative.autoscaler", *words],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "LIFL_LOG_FORMAT": log_format},
        )
        self.address = ""

    def __enter__(self) -> Autoscaler:
        assert self.process.stderr is not None
        assert select.select([self.process.stderr], [], [], 20)[0], "it did not start in time"
        line = self.process.stderr.readline()
        assert "metrics at http://" in line, line + self.process.stderr.read()
        self.address = line.rsplit("http://", 1)[1].partition("/")[0]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        _, self.log = self.process.communicate()

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def await_ready(self) -> None:
        until(lambda: self.get("/readyz")[0] == 200, what="the autoscaler is ready")

    def ticks(self) -> int:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorUnderTest]:
    # The nodes here are silent in between, however long that takes.
    with CoordinatorUnderTest(tmp_path / "state", "--lease", "60") as running:
        yield running


@pytest.fixture
def knative(tmp_path: Path, coordinator: CoordinatorUnderTest) -> Iterator[KnativeAndKubelets]:
    nodes = [ScriptedMember(coordinator, name, attaches=True) for name in ("a", "b")]
    for node in nodes:
        node.register()
    with KubernetesApi() as api:
        api.kubeconfig(tmp_path / "kubeconfig")
        yield KnativeAndKubelets(api, nodes)
    for node in nodes:
        node.__exit__()


@pytest.fixture
def autoscaler(
    tmp_path: Path, coordinator: CoordinatorUnderTest, knative: KnativeAndKubelets
) -> Iterator[Autoscaler]:
    with Autoscaler(tmp_path / "kubeconfig", f"http://{coordinator.address}") as running:
        running.await_ready()
        yield running


def test_a_function_is_proved_once_scaled_to_zero_brought_back_by_a_job_and_let_go_when_that_is_idle(
    coordinator: CoordinatorUnderTest, knative: KnativeAndKubelets, autoscaler: Autoscaler
) -> None:
    knative.deploy()
    # Proved by its initial scale, which nobody needs any longer then.
    until(lambda: knative.scale() == 0, what="the scale is zero")
    until(lambda: knative.truths().get("Active") == "False", what="it is inactive")
    assert knative.mode() == "Proxy"
    assert knative.truths()["ScaleTargetInitialized"] == "True"
    status = knative.status()
    assert (status["serviceName"], status["metricsServiceName"]) == (NAME, f"{NAME}-private")
    a, b = knative.nodes
    coordinator.create_job(JOB, goal=3)
    until(lambda: knative.scale() == 1, what="a pod is there")
    until(lambda: knative.truths().get("Ready") == "True", what="it is ready")
    until(lambda: knative.mode() == "Serve", what="requests go to the pod")
    assert (knative.status()["desiredScale"], knative.status()["actualScale"]) == (1, 1)
    (placed,) = b.tell(PlaceUpdate(JOB, 1, "one"))
    assert placed == Placed("open", 1, "a", "http://a.test:8080")
    a.poll()
    a.tell(a.count(JOB, "one"))
    coordinator.request("DELETE", f"/v1/jobs/{JOB}")
    until(lambda: knative.scale() == 0, what="the deleted job needs nothing")
    coordinator.create_job("other", goal=3, idle_seconds=2.0)
    until(lambda: knative.scale() == 1, what="another job needs it")
    until(lambda: knative.scale() == 0, what="the other job is idle")
    (answer,) = a.tell(PlaceUpdate("other", 1, "one"))
    assert isinstance(answer, Problem) and answer.status == 503
    until(lambda: knative.scale() == 1, what="its first client brings it back")


def test_without_the_coordinator_the_scale_is_held_and_with_it_goes_on(
    coordinator: CoordinatorUnderTest, knative: KnativeAndKubelets, autoscaler: Autoscaler
) -> None:
    knative.deploy()
    coordinator.create_job(JOB, goal=3)
    until(lambda: knative.truths().get("ScaleTargetInitialized") == "True" and knative.scale() == 1)
    coordinator.kill()
    until(lambda: knative.truths().get("PlanKnown") == "False", what="the condition says so")
    time.sleep(0.3)  # to change what it should not
    assert knative.scale() == 1
    assert knative.truths()["Ready"] == "True"
    assert "stays as it is" in find(knative.status(), "PlanKnown")["message"]
    assert "lifl_autoscaler_plan_known 0.0" in autoscaler.get("/metrics")[1]
    assert autoscaler.get("/readyz")[0] == 200
    coordinator.start()
    until(lambda: knative.truths().get("PlanKnown") == "True", what="the coordinator is back")
    assert knative.scale() == 1
    coordinator.request("DELETE", f"/v1/jobs/{JOB}")
    until(lambda: knative.scale() == 0, what="the function is let go")


def test_pods_of_nodes_with_updates_end_last(
    coordinator: CoordinatorUnderTest, knative: KnativeAndKubelets, autoscaler: Autoscaler
) -> None:
    a, b = knative.nodes
    coordinator.create_job(JOB, goal=150)  # more than one node has room for
    knative.deploy()
    until(lambda: knative.scale() == 2, what="both nodes are needed")
    coordinator.create_job("small", goal=2)
    for node in (a, b):
        node.poll()
    b.tell(b.count("small", "one"))
    coordinator.request("DELETE", f"/v1/jobs/{JOB}")
    until(lambda: knative.scale() == 1, what="one pod ends")
    pods = {
        pod["spec"]["nodeName"]: pod["metadata"].get("annotations", {}) for pod in knative.api.all("v1", "Pod")
    }
    assert pods == {"a": {}, "b": {DELETION_COST: "100"}}


def test_what_the_api_server_does_not_take_is_tried_again_and_one_function_does_not_hold_up_another(
    coordinator: CoordinatorUnderTest, knative: KnativeAndKubelets, autoscaler: Autoscaler
) -> None:
    fault = knative.api.fail(
        "PATCH", rf"/{NAME}-deployment/scale", 409, "the object has been modified", "Conflict"
    )
    coordinator.create_job(JOB, goal=3)
    knative.deploy(replicas=0)
    knative.deploy("median-00001", replicas=1, service="median")
    until(lambda: knative.truths("median-00001").get("Active") == "False", what="the other is looked after")
    until(lambda: "lifl_autoscaler_errors_total 0.0" not in autoscaler.get("/metrics")[1], what="the failure")
    assert knative.scale() == 0
    fault.times = 0
    until(lambda: knative.scale() == 1, what="it is tried again")
    assert "median-00001" in autoscaler.get("/metrics")[1]
    knative.api.remove(*AUTOSCALER, "median-00001")
    until(lambda: "median-00001" not in autoscaler.get("/metrics")[1], what="what is deleted is forgotten")


def test_a_watch_that_expires_loses_nothing_and_an_idle_autoscaler_uses_no_processor_time(
    coordinator: CoordinatorUnderTest, knative: KnativeAndKubelets, autoscaler: Autoscaler
) -> None:
    knative.deploy()
    until(lambda: knative.truths().get("Active") == "False" and knative.scale() == 0)
    knative.api.forget()
    knative.api.cut_watches()
    coordinator.create_job(JOB, goal=3, idle_seconds=60.0)
    until(lambda: knative.scale() == 1 and knative.truths().get("Ready") == "True")
    _, text = autoscaler.get("/metrics")
    for line in (
        'lifl_autoscaler_wanted_pods{function="fedavg"} 1.0',
        f'lifl_autoscaler_desired_pods{{function="fedavg",name="{NAME}",namespace="default"}} 1.0',
        'lifl_autoscaler_scalings_total{direction="down"} 1.0',
        "lifl_autoscaler_plan_known 1.0",
    ):
        assert line in text.splitlines(), text
    asked, ticks = len(knative.api.asked), autoscaler.ticks()
    time.sleep(1.0)
    assert len(knative.api.asked) == asked
    assert autoscaler.ticks() - ticks <= 1
    autoscaler.process.send_signal(signal.SIGTERM)
    assert autoscaler.process.wait(5) == 0


def test_it_says_what_it_lacks(
    tmp_path: Path, coordinator: CoordinatorUnderTest, knative: KnativeAndKubelets
) -> None:
    knative.api.forbid("list", "podautoscalers.autoscaling.internal.knative.dev")
    with Autoscaler(tmp_path / "kubeconfig", f"http://{coordinator.address}", log_format="json") as running:
        until(lambda: "may not list" in running.get("/readyz")[1], what="the permission is missed")
        assert running.get("/readyz")[0] == 503
        assert running.get("/healthz")[0] == 200
        assert running.get("/other")[0] == 404
        coordinator.create_job(JOB, goal=3)
    records = [json.loads(line) for line in running.log.splitlines()]
    assert {record["process"] for record in records} == {"autoscaler"}
    said = "may not list podautoscalers.autoscaling.internal.knative.dev"
    assert any(said in record["message"] and record["level"] == "warning" for record in records)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--coordinator", "coordinator:7070"], "is no URL of a coordinator"),
        (["--token-file", "/nonexistent"], "cannot be read"),
        (["--address", "here"], "is no HOST:PORT"),
        ([], "there is no kubeconfig at"),
    ],
)
def test_what_cannot_be_is_said_at_the_start(
    tmp_path: Path, arguments: list[str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--coordinator", "http://127.0.0.1:7070", "--address", "127.0.0.1:0"]
    words += ["--kubeconfig", str(tmp_path / "kubeconfig")]
    ended = CliRunner().invoke(main, [*words, *arguments])
    assert ended.exit_code == 2
    assert said in caplog.text

"""deploy, describe, list, delete and logs against a server that behaves as the API server does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lifl import cli
from lifl_knative import cluster as cluster_module
from lifl_knative import rollout
from ruamel.yaml import YAML

from tests.kubernetes_api import KnativeController, KubernetesApi, kubernetes_api

SERVING, EVENTING = "serving.knative.dev/v1", "eventing.knative.dev/v1"
DIGEST = "sha256:" + "1" * 64
IMAGE = f"registry.example.com/fl/fedavg@{DIGEST}"
FUNC_YAML = f"""\
# a comment that stays
specVersion: 0.36.0
name: fedavg
runtime: python
created: 2026-11-22T12:00:00Z
invoke: cloudevent
image: {IMAGE}
"""
HOST_PATH = "kubernetes.podspec-volumes-hostpath"


@dataclass
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("FUNC_", "KUBE"))]:
        monkeypatch.delenv(name)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(sys, "argv", ["func"])
    monkeypatch.setattr(rollout, "ERROR_WINDOW_S", 0.2)
    monkeypatch.setattr(rollout, "_LOOK_S", 0.1)
    monkeypatch.setattr(cluster_module, "PATIENCE_S", 0.3)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    """A cluster with the platform, whose autoscaler runs, and with the feature that the route lifl needs."""
    with kubernetes_api(tmp_path) as (server, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        server.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "lifl-system"}})
        server.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "learning"}})
        place = {"namespace": "lifl-system"}
        server.put(
            {
                "apiVersion": "apps/v1",
                "kind": "DaemonSet",
                "metadata": {"name": "lifl-node", **place},
                "status": {"desiredNumberScheduled": 3},
            }
        )
        server.put(
            {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {"name": "lifl-autoscaler", **place},
                "status": {"availableReplicas": 1},
            }
        )
        set_flags(server, **{HOST_PATH: "enabled"})
        yield server


def set_flags(server: KubernetesApi, **flags: str) -> None:
    metadata = {"name": "config-features", "namespace": "knative-serving"}
    server.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": flags})


@pytest.fixture
def knative(api: KubernetesApi) -> KnativeController:
    return KnativeController(api)


@pytest.fixture
def func(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    Path("func.yaml").write_text(FUNC_YAML)
    return run


def project(text: str) -> None:
    Path("func.yaml").write_text(FUNC_YAML + text)


def deployed(api: KubernetesApi, name: str = "fedavg", namespace: str = "default") -> dict[str, Any]:
    service = api.get(SERVING, "Service", name, namespace)
    assert service is not None
    return service


def writes(api: KubernetesApi) -> list[str]:
    return [f"{a.method} {a.path}" for a in api.asked if a.method != "GET" and a.query.get("dryRun") != "All"]


# --- deploy --------------------------------------------------------------------------------------------------


def test_deploy_applies_waits_and_says_where(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    result = func("deploy")
    assert result.code == 0, result.err
    assert result.out == ""
    assert result.err == (
        '✅ Function deployed in namespace "default" and exposed at URL: \n   http://fedavg.default.example.com\n'
    )
    template = deployed(api)["spec"]["template"]
    assert template["spec"]["containers"][0]["image"] == IMAGE
    assert template["metadata"]["annotations"]["autoscaling.knative.dev/class"] == "plan.autoscaling.lifl.dev"
    assert template["metadata"]["annotations"]["lifl.dev/function-name"] == "fedavg"
    assert {"name": "LIFL_FUNCTION_NAME", "value": "fedavg"} in template["spec"]["containers"][0]["env"]
    text = Path("func.yaml").read_text()
    assert text.startswith("# a comment that stays\n")
    written = YAML(typ="safe").load(text)["deploy"]
    assert written == {"namespace": "default", "image": IMAGE, "deployer": "knative"}


def test_deploying_the_same_again_makes_no_new_revision(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    assert func("deploy").code == 0
    first = deployed(api)
    result = func("deploy", "-o", "json")
    assert (result.code, result.json["result"]) == (0, "unchanged")
    assert deployed(api)["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert len(api.all(SERVING, "Revision")) == 1
    changed = func("deploy", "--env", "ROUNDS=20", "-o", "json")
    assert (changed.json["result"], changed.json["revision"]) == ("updated", "fedavg-00002")


def test_variables_are_set_changed_and_removed_and_kept(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    project("run:\n  envs:\n    - name: OLD\n      value: a\n    - name: LEVEL\n      value: a\n")
    assert func("deploy", "-e", "OLD-", "-e", "LEVEL=b", "-e", "NEW=c=d").code == 0
    assert YAML(typ="safe").load(Path("func.yaml"))["run"]["envs"] == [
        {"name": "LEVEL", "value": "b"},
        {"name": "NEW", "value": "c=d"},
    ]
    wrong = func("deploy", "--env", "NAME")
    assert wrong.code == 1 and "'--env NAME' sets nothing" in wrong.err


def test_results_come_in_every_format(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    assert func("deploy", "-o", "url").out == "http://fedavg.default.example.com\n"
    found = func("deploy", "-o", "json").json
    assert (found["ready"], found["autoscaler"], found["applied"]) == ("true", "plan", ["Service fedavg"])
    assert YAML(typ="safe").load(func("deploy", "-o", "yaml").out) == found


def test_image_and_namespace_of_the_command_line_are_kept(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    other = f"registry.example.com/other@{DIGEST}"
    assert func("deploy", "--image", other, "-n", "learning").code == 0
    assert deployed(api, namespace="learning")
    written = YAML(typ="safe").load(Path("func.yaml"))
    assert (written["image"], written["namespace"], written["deploy"]["namespace"]) == (
        other,
        "learning",
        "learning",
    )
    moved = func("deploy", "-n", "default")
    assert "Info: the function stays in namespace 'learning' too" in moved.err


def test_tag_without_a_known_digest_is_warned_of(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    result = func("deploy", "--image", "registry.example.com/fedavg:1", "--build=false", "--no-push")
    assert result.code == 0
    assert (
        "Warning: the image is not pinned: the digest of 'registry.example.com/fedavg:1' is not known"
        in result.err
    )


def test_client_dry_run_prints_manifests_without_a_cluster(
    func: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path("func.yaml").read_bytes()
    result = func("deploy", "--dry-run=client", "--route", "broker", "-n", "learning")
    assert result.code == 0, result.err
    objects = list(YAML(typ="safe").load_all(result.out))
    assert [obj["kind"] for obj in objects] == ["Service", "Broker", "Trigger"]
    assert {obj["metadata"]["namespace"] for obj in objects} == {"learning"}
    assert Path("func.yaml").read_bytes() == before
    listed = json.loads(func("deploy", "--dry-run=client", "-o", "json").out)
    assert [obj["kind"] for obj in listed["items"]] == ["Service"]


def test_server_dry_run_checks_everything_and_changes_nothing(
    api: KubernetesApi, func: Callable[..., Result]
) -> None:
    result = func("deploy", "--dry-run=server")
    assert result.code == 0, result.err
    assert "nothing was changed" in result.err and "kind: Service" in result.out
    assert writes(api) == [] and api.get(SERVING, "Service", "fedavg") is None
    api.fail("PATCH", "dryRun=All", 400, "strict decoding error", "BadRequest")
    assert func("deploy", "--dry-run=server").code == 1


def test_nobody_waits_with_no_wait(api: KubernetesApi, func: Callable[..., Result]) -> None:
    result = func("deploy", "--no-wait", "-o", "json")
    assert (result.code, result.json["ready"]) == (0, "unknown")


def test_service_that_becomes_ready_later_is_waited_for(api: KubernetesApi, func: Callable[..., Result]) -> None:
    controller = KnativeController(api)
    api.hooks.clear()
    timers: list[threading.Timer] = []

    def later(server: KubernetesApi, service: dict[str, Any]) -> None:
        waiting = {"type": "Ready", "status": "False", "reason": "RevisionMissing"}
        server.set_status(service, {"observedGeneration": 1, "conditions": [waiting]})
        timers.append(threading.Timer(0.1, controller.reconcile, (server, service)))
        timers[0].start()
        server.forget()  # 410 Gone for whoever watches

    api.on("Service", later)
    result = func("deploy", "--timeout", "20s")
    timers[0].join()
    assert result.code == 0, result.err


def test_status_of_an_older_generation_is_not_taken_for_ready(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    assert func("deploy").code == 0
    api.hooks.clear()
    result = func("deploy", "--env", "A=1", "--timeout", "300ms")
    assert result.code == 1 and "is not ready after 0.3 s" in result.err


# --- subscriptions and the broker ----------------------------------------------------------------------------


def test_triggers_are_applied_changed_and_pruned(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    for name in ("default", "other"):
        api.put({"apiVersion": EVENTING, "kind": "Broker", "metadata": {"name": name, "namespace": "default"}})
    project(
        "deploy:\n  subscriptions:\n    - source: default\n      filters:\n        type: a\n    - source: other\n"
    )
    assert func("deploy").code == 0
    assert sorted(t["spec"]["broker"] for t in api.all(EVENTING, "Trigger")) == ["default", "other"]
    owner = api.all(EVENTING, "Trigger")[0]["metadata"]["ownerReferences"][0]
    assert owner["uid"] == deployed(api)["metadata"]["uid"]
    stranger = {"name": "of-somebody-else", "namespace": "default"}
    api.put({"apiVersion": EVENTING, "kind": "Trigger", "metadata": stranger, "spec": {"broker": "x"}})
    project("deploy:\n  subscriptions:\n    - source: other\n")
    result = func("deploy")
    assert "deleted: func.yaml has no such subscription any more" in result.err
    assert sorted(t["spec"]["broker"] for t in api.all(EVENTING, "Trigger")) == ["other", "x"]


def test_broker_route_makes_a_broker_and_a_trigger_for_updates(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    set_flags(api)
    api.remove("apps/v1", "DaemonSet", "lifl-node", "lifl-system")
    result = func("deploy", "--route", "broker", "-o", "json")
    assert result.code == 0, result.err
    assert result.json["route"] == "broker"
    broker = api.get(EVENTING, "Broker", "default")
    assert broker is not None
    assert broker["metadata"]["annotations"] == {"eventing.knative.dev/broker.class": "NatsJetStreamBroker"}
    (trigger,) = api.all(EVENTING, "Trigger")
    assert trigger["spec"]["filter"] == {"attributes": {"type": "dev.lifl.update.v1"}}
    assert "volumes" not in deployed(api)["spec"]["template"]["spec"]


def test_broker_of_another_class_is_refused(api: KubernetesApi, func: Callable[..., Result]) -> None:
    metadata = {"name": "default", "annotations": {"eventing.knative.dev/broker.class": "MTChannelBasedBroker"}}
    api.put({"apiVersion": EVENTING, "kind": "Broker", "metadata": metadata})
    result = func("deploy", "--route", "broker")
    assert result.code == 1 and "is a 'MTChannelBasedBroker', not a NatsJetStreamBroker" in result.err


def test_broker_that_is_there_stays_as_it_is(api: KubernetesApi, func: Callable[..., Result]) -> None:
    annotations = {"eventing.knative.dev/broker.class": "NatsJetStreamBroker"}
    broker = {
        "apiVersion": EVENTING,
        "kind": "Broker",
        "metadata": {"name": "default", "annotations": annotations},
    }
    broker["metadata"]["namespace"] = "default"  # type: ignore[index]
    api.claim_fields({**broker, "spec": {"delivery": {"timeout": "PT1S", "retry": 1}}}, "kubectl")
    for arguments in (["--dry-run=server"], ["--no-wait"]):
        assert func("deploy", "--route", "broker", *arguments).code == 0
    (found,) = api.all(EVENTING, "Broker")
    assert found["spec"]["delivery"]["retry"] == 1


def test_deployer_of_another_kind_is_refused(api: KubernetesApi, func: Callable[..., Result]) -> None:
    project("deployer: keda\n")
    result = func("deploy")
    assert result.code == 1 and "deployer: 'keda' is not supported; LIFL deploys Knative Services" in result.err


def test_route_may_stand_in_func_yaml(api: KubernetesApi, func: Callable[..., Result]) -> None:
    project("deploy:\n  annotations:\n    lifl.dev/route: broker\n")
    assert func("deploy", "--no-wait", "-o", "json").json["route"] == "broker"
    project("deploy:\n  annotations:\n    lifl.dev/route: pigeon\n")
    assert "'pigeon' is no route: lifl or broker" in func("deploy").err


# --- the platform --------------------------------------------------------------------------------------------


def test_without_our_autoscaler_knatives_keeps_a_pod_for_each_node_and_it_is_said(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    api.remove("apps/v1", "Deployment", "lifl-autoscaler", "lifl-system")
    result = func("deploy")
    assert "Warning: lifl-autoscaler is not available in namespace lifl-system, so Knative's own" in result.err
    annotations = deployed(api)["spec"]["template"]["metadata"]["annotations"]
    assert annotations["autoscaling.knative.dev/min-scale"] == "3"
    assert "autoscaling.knative.dev/class" not in annotations


def test_missing_platform_feature_and_references_are_told_together(
    api: KubernetesApi, func: Callable[..., Result]
) -> None:
    set_flags(api)
    api.remove("apps/v1", "DaemonSet", "lifl-node", "lifl-system")
    secret = {"name": "there", "namespace": "default"}
    api.put({"apiVersion": "v1", "kind": "Secret", "metadata": secret, "data": {"a": "MQ=="}})
    project(
        "run:\n  envs:\n    - name: A\n      value: '{{ secret:gone:a }}'\n"
        "    - name: B\n      value: '{{ secret:there:b }}'\n"
        "    - name: PORT\n      value: '1'\n"
        "  volumes:\n    - configMap: settings\n      path: /settings\n"
        "deploy:\n  imagePullSecret: pull\n  serviceAccountName: robot\n  subscriptions:\n    - source: events\n"
    )
    result = func("deploy")
    assert result.code == 1
    assert result.err.startswith(
        "Error: function 'fedavg' cannot be deployed to namespace 'default' of context 'test':\n"
    )
    for line in (
        "LIFL's platform is not installed: there is no lifl-node in namespace lifl-system",
        "run.envs #0: there is no Secret 'gone' in namespace \"default\"",
        "run.envs #1: Secret 'there' in namespace \"default\" has no key 'b'",
        "run.volumes #0: there is no ConfigMap 'settings'",
        "deploy.imagePullSecret: there is no Secret 'pull'",
        "deploy.serviceAccountName: there is no ServiceAccount 'robot'",
        "deploy.subscriptions #0: there is no Broker 'events'",
        "volume 'lifl-agent' (hostPath) needs the feature 'kubernetes.podspec-volumes-hostpath'",
        "the environment variable 'PORT' is set by Knative",
        "Nothing was changed in the cluster.",
        "func deploy --install-platform",
        "func deploy --route broker",
        f"""patch configmap config-features -n knative-serving --type merge -p '{{"data":{{"{HOST_PATH}":""",
    ):
        assert line in result.err
    assert writes(api) == []


def test_platform_is_installed_when_asked_for(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    for name in ("DaemonSet/lifl-node", "Deployment/lifl-autoscaler"):
        api.remove("apps/v1", *name.split("/"), "lifl-system")
    counts = ("replicas", "readyReplicas", "updatedReplicas", "availableReplicas")
    nodes = ("desiredNumberScheduled", "numberReady", "updatedNumberScheduled")
    status = {"observedGeneration": 1, **dict.fromkeys((*counts, *nodes), 1)}
    for kind in ("DaemonSet", "Deployment"):
        api.on(kind, lambda server, obj: server.set_status(obj, status))
    result = func("deploy", "--install-platform", "-o", "json")
    assert result.code == 0, result.err
    assert result.json["autoscaler"] == "plan"
    assert api.get("apps/v1", "Deployment", "lifl-coordinator", "lifl-system")
    project("run:\n  envs:\n    - value: '{{ secret:gone }}'\n")
    assert "LIFL's platform is installed; nothing else was changed" in func("deploy", "--install-platform").err


def test_platform_without_a_node_is_told(api: KubernetesApi, func: Callable[..., Result]) -> None:
    metadata = {"name": "lifl-node", "namespace": "lifl-system"}
    api.put({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": metadata})
    result = func("deploy")
    assert result.code == 1 and "LIFL's agent runs on no node: lifl-node in namespace lifl-system" in result.err


def test_image_that_is_in_no_registry_is_not_deployed(api: KubernetesApi, func: Callable[..., Result]) -> None:
    result = func("deploy", "--image", "localhost/fedavg:1", "--build=false")
    assert result.code == 1
    assert "the image 'localhost/fedavg:1' is in no registry, so a cluster cannot fetch it" in result.err
    assert writes(api) == []


def test_namespace_that_admits_no_host_path_is_told(api: KubernetesApi, func: Callable[..., Result]) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "baseline"}
    api.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "learning", "labels": labels}})
    result = func("deploy", "-n", "learning")
    assert result.code == 1
    assert "namespace 'learning' enforces the Pod Security level 'baseline'" in result.err
    assert func("deploy", "-n", "learning", "--route", "broker", "--no-wait").code == 0


def test_what_may_not_be_looked_at_is_noted_and_not_in_the_way(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    project("run:\n  envs:\n    - value: '{{ secret:hidden }}'\n")
    api.forbid("get", "secrets")
    api.forbid("get", "configmaps", "knative-serving")
    api.forbid("get", "daemonsets.apps")
    api.forbid("list", "triggers.eventing.knative.dev")
    api.forbid("get", "namespaces")
    result = func("deploy")
    assert result.code == 0, result.err
    for said in (
        "Secret 'hidden' is not checked",
        "feature flags are not checked",
        "the platform in namespace lifl-system is not checked",
    ):
        assert said in result.err


# --- what goes wrong -----------------------------------------------------------------------------------------


def test_no_kubeconfig(func: Callable[..., Result], tmp_path: Path) -> None:
    result = func("deploy")
    assert result.code == 1
    assert f"no cluster is known: there is no kubeconfig at '{tmp_path}/.kube/config'" in result.err
    assert "Try this:\n  export KUBECONFIG=FILE" in result.err


def test_unknown_context(api: KubernetesApi, func: Callable[..., Result]) -> None:
    assert 'there is no context "prod" in the kubeconfig' in func("list", "--context", "prod").err


def test_unreachable_cluster(func: Callable[..., Result], tmp_path: Path) -> None:
    with KubernetesApi() as gone:
        file = gone.kubeconfig(tmp_path / "gone")
    result = func("deploy", "--kubeconfig", str(file))
    assert 'the cluster of context "test" at http://127.0.0.1:' in result.err
    assert "is not accessible: " in result.err and f"kubectl --kubeconfig {file} cluster-info" in result.err


def test_expired_token(api: KubernetesApi, func: Callable[..., Result]) -> None:
    api.tokens.clear()
    api.fail("GET", "^/(api|apis)/", 401, "Unauthorized", "Unauthorized")
    result = func("deploy")
    assert 'not logged in to the cluster of context "test", or the token has expired' in result.err


def test_missing_crds(api: KubernetesApi, func: Callable[..., Result]) -> None:
    api.remove_group("serving.knative.dev")
    result = func("deploy")
    assert "does not know 'services.serving.knative.dev': Knative Serving is not installed there" in result.err
    assert "get crd services.serving.knative.dev" in result.err
    assert "Knative Serving is not installed" in func("list").err


def test_missing_eventing_matters_to_subscriptions_alone(api: KubernetesApi, func: Callable[..., Result]) -> None:
    api.remove_group("eventing.knative.dev")
    assert func("deploy", "--no-wait").code == 0
    result = func("deploy", "--route", "broker")
    assert "does not know 'triggers.eventing.knative.dev': Knative Eventing is not installed there" in result.err


def test_no_permission(api: KubernetesApi, func: Callable[..., Result]) -> None:
    api.forbid("patch", "services.serving.knative.dev", "default")
    result = func("deploy")
    assert 'user "alice" may not patch services.serving.knative.dev in namespace "default"' in result.err
    assert "kubectl auth can-i patch services.serving.knative.dev --namespace default" in result.err


def test_missing_namespace(api: KubernetesApi, func: Callable[..., Result]) -> None:
    result = func("deploy", "-n", "nowhere")
    assert 'there is no namespace "nowhere" in the cluster of context "test"' in result.err
    assert "kubectl create namespace nowhere" in result.err


def test_conflicting_owner_and_force(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    spec = {"template": {"spec": {"containers": [{"image": "registry.example.com/other"}]}}}
    metadata = {"name": "fedavg", "namespace": "default"}
    api.claim_fields({"apiVersion": SERVING, "kind": "Service", "metadata": metadata, "spec": spec}, "kn")
    result = func("deploy")
    assert result.code == 1
    assert 'others than func set fields of Service "fedavg" in namespace "default":' in result.err
    assert '"kn" owns spec.template.spec.containers' in result.err and "func deploy --force" in result.err
    assert func("deploy", "--force").code == 0


@pytest.mark.parametrize(
    ("status", "message", "details", "said"),
    [
        (
            422,
            "invalid",
            {"causes": [{"field": "spec.template.spec.containers[0].image", "message": "must be set"}]},
            '":\n\tspec.template.spec.containers[0].image: must',
        ),
        (
            400,
            'strict decoding error: unknown field "spec.x"',
            {},
            'strict decoding error: unknown field "spec.x"',
        ),
        (
            400,
            'admission webhook "validation.webhook.serving.knative.dev" denied the request: validation failed: '
            "must not set the field(s): spec.template.spec.nodeSelector",
            {},
            "The feature 'kubernetes.podspec-nodeselector' in ConfigMap config-features",
        ),
        (503, "the server is currently unable to handle the request", {}, "is not available (HTTP 503)"),
        (429, "too many requests", {}, "is too busy (HTTP 429)"),
        (500, "etcdserver: request timed out", {}, "failed (HTTP 500): etcdserver"),
        (
            500,
            'Internal error occurred: failed calling webhook "webhook.serving.knative.dev": timeout',
            {},
            'the webhook "webhook.serving.knative.dev" does not answer the API server',
        ),
    ],
)
def test_refusals_of_the_server(
    api: KubernetesApi, func: Callable[..., Result], status: int, message: str, details: dict[str, Any], said: str
) -> None:
    api.fail("PATCH", "services/fedavg", status, message, details=details)
    result = func("deploy")
    assert result.code == 1 and said in result.err


def test_what_is_applied_already_is_said_when_a_later_step_fails(
    api: KubernetesApi, func: Callable[..., Result]
) -> None:
    api.forbid("patch", "triggers.eventing.knative.dev")
    result = func("deploy", "--route", "broker")
    assert result.code == 1
    assert 'user "alice" may not patch triggers.eventing.knative.dev in namespace "default"' in result.err
    assert (
        "The function is deployed in part: Service fedavg, Broker default in namespace 'default' are applied, the "
        "rest is not."
    ) in result.err


def test_what_is_applied_is_said_when_it_cannot_be_watched(
    api: KubernetesApi, func: Callable[..., Result]
) -> None:
    api.forbid("watch", "services.serving.knative.dev")
    result = func("deploy")
    assert result.code == 1
    assert "'fedavg' is applied in namespace 'default', but nobody can tell whether it is ready: " in result.err
    assert "may not watch services.serving.knative.dev" in result.err


def test_image_that_cannot_be_pulled(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    said = f'Back-off pulling image "{IMAGE}"'
    knative.failure = "ContainerMissing", f'Unable to fetch image "{IMAGE}": 404 Not Found'
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": said}}
    knative.pod_status = {
        "phase": "Pending",
        "containerStatuses": [{"name": "user-container", "ready": False, "state": waiting}],
    }
    result = func("deploy")
    assert result.code == 1
    assert "function 'fedavg' is applied in namespace 'default', but has failed:" in result.err
    assert f'revision fedavg-00001: ContainerMissing: Unable to fetch image "{IMAGE}": 404 Not Found' in result.err
    assert f"pod fedavg-00001-deployment-1, container user-container: ImagePullBackOff: {said}" in result.err
    assert "func logs --name fedavg -n default" in result.err


def test_crash_loop_shows_the_last_lines(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    assert func("deploy").code == 0
    knative.failure = "ExitCode1", "Container failed with: ModuleNotFoundError"
    knative.log = [f"line {number}" for number in range(30)] + ["ModuleNotFoundError: No module named 'x'"]
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    knative.pod_status = {
        "phase": "Running",
        "containerStatuses": [
            {
                "name": "user-container",
                "restartCount": 3,
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}},
                "lastState": ended,
            }
        ],
    }
    result = func("deploy", "--env", "A=1")
    assert result.code == 1
    for said in ("Service output:", "ModuleNotFoundError: No module named 'x'", "CrashLoopBackOff", "OOMKilled"):
        assert said in result.err
    assert "line 5\n" not in result.err, "the last 20 lines alone"
    assert "revision fedavg-00001 still serves" in result.err


def test_service_that_never_says_anything(api: KubernetesApi, func: Callable[..., Result]) -> None:
    result = func("deploy", "--timeout", "300ms")
    assert (
        "is applied in namespace 'default', but is not ready after 0.3 s:\n\tit has no revision yet" in result.err
    )
    assert "func deploy --timeout 600" in result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--timeout", "soon"], "'soon' is no duration such as 90s or 2m"),
        (["--image", "a b"], "the image 'a b'"),
        (["--image", "a/b", "--registry", "c/d"], "--image and --registry exclude each other"),
        (["-n", "Not_A_Name"], "'Not_A_Name' has to be at most 63 lower-case letters"),
        (["--service-account", "Robot!"], "'Robot!' has to be"),
        (["--build", "maybe"], "'maybe' is not one of 'auto', 'true', 'false'"),
        (["--path", "elsewhere"], "no function project in 'elsewhere'"),
    ],
)
def test_input_that_cannot_be(
    api: KubernetesApi, func: Callable[..., Result], arguments: list[str], said: str
) -> None:
    result = func("deploy", *arguments)
    assert result.code == 1 and said in result.err
    assert writes(api) == []


# --- describe, list, delete, logs ----------------------------------------------------------------------------


def test_describe_tells_all_of_it(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    assert func("deploy", "--route", "broker").code == 0
    found = func("describe", "-o", "json").json
    assert found["Route"] == "http://fedavg.default.example.com"
    assert found["routes"] == ["http://fedavg.default.example.com", "http://fedavg.default.svc.cluster.local"]
    assert found["subscriptions"] == [{"source": "", "type": "dev.lifl.update.v1", "broker": "default"}]
    assert (found["ready"], found["revision"], found["generation"]) == ("true", "fedavg-00001", 1)
    assert YAML(typ="safe").load(func("info", "fedavg", "-o", "yaml").out) == found
    assert func("desc", "-o", "url").out == "http://fedavg.default.example.com\n"
    human = func("describe").out
    assert f"Function is built in image:\n  {IMAGE}\n" in human and "Ready:\n  true\n" in human
    assert "READY true\n" in func("describe", "-o", "plain").out


def test_function_that_is_not_there(api: KubernetesApi, func: Callable[..., Result]) -> None:
    for verb in (["describe"], ["delete"], ["logs"]):
        result = func(*verb)
        assert result.code == 1
        assert "function not found: there is no 'fedavg' in namespace 'default' of context 'test'" in result.err
        assert "func list --all-namespaces" in result.err
    both = func("describe", "fedavg", "--path", ".")
    assert both.code == 1 and "a name and --path exclude each other" in both.err


def test_list_shows_functions_of_one_or_all_namespaces(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    empty = func("list")
    assert (empty.code, empty.out) == (0, "") and "No functions in namespace 'default'" in empty.err
    assert func("deploy").code == 0
    assert func("deploy", "-n", "learning").code == 0
    metadata = {"name": "foreign", "annotations": {"function.knative.dev/deployer": "keda"}}
    api.put({"apiVersion": SERVING, "kind": "Service", "metadata": metadata, "spec": {"template": {"spec": {}}}})
    header, row = func("ls").out.splitlines()
    assert header.split() == ["NAME", "NAMESPACE", "RUNTIME", "DEPLOYER", "URL", "READY", "REPLICAS"]
    assert row.split() == [
        "fedavg",
        "default",
        "python",
        "knative",
        "http://fedavg.default.example.com",
        "true",
        "0",
    ]
    assert [f["namespace"] for f in func("list", "-A", "-o", "json").json] == ["default", "learning"]


def test_delete_removes_the_function_and_its_triggers_and_forgets_where_it_was(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    assert func("deploy", "--route", "broker").code == 0
    result = func("rm")
    assert result.code == 0, result.err
    assert "Function 'fedavg' deleted from namespace 'default'" in result.err
    assert api.all(SERVING, "Service") == api.all(EVENTING, "Trigger") == api.all("v1", "Pod") == []
    assert "deploy" not in YAML(typ="safe").load(Path("func.yaml"))
    assert "# a comment that stays" in Path("func.yaml").read_text()


def test_delete_waits_and_says_what_holds_it_up(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    assert func("deploy").code == 0
    api.fail("DELETE", "services/fedavg", 200, "")
    result = func("delete", "--timeout", "200ms")
    assert (
        result.code == 1 and "is being deleted from namespace 'default', but still there after 0.2 s" in result.err
    )


def test_logs_of_all_pods(api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]) -> None:
    knative.log = ["one", "two"]
    assert func("deploy").code == 0
    assert func("logs", "--no-follow").out == "one\ntwo\n"
    labels = {"serving.knative.dev/service": "fedavg"}
    api.put({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "second", "labels": labels}})
    api.logs["default", "second", "user-container"] = ["three"]
    assert "second: three\n" in func("logs", "--name", "fedavg", "--no-follow").out
    for pod in api.all("v1", "Pod"):
        api.remove("v1", "Pod", pod["metadata"]["name"])
    assert "has no pods: it is scaled to zero" in func("logs", "--no-follow").err


def test_logs_are_followed_until_interrupted(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    knative.log = ["one"]
    started = {"name": "user-container", "state": {"running": {}}}
    knative.pod_status = {"phase": "Running", "containerStatuses": [started]}
    assert func("deploy").code == 0
    command = [sys.executable, "-m", "lifl.cli", "logs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "one\n"
            with api.changed:
                api.logs["default", "fedavg-00001-deployment-1", "user-container"].append("two")
                api.changed.notify_all()
            assert process.stdout.readline() == "two\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
        finally:
            process.kill()


def test_command_line_of_its_own_process_deploys(
    api: KubernetesApi, knative: KnativeController, func: Callable[..., Result]
) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lifl.cli", "deploy", "-o", "url"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "http://fedavg.default.example.com\n"), done.stderr
    assert time.monotonic() - began < 20

"""`func platform` against an API server: what is applied, what is told, and what stays when something fails."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lifl.cli import main
from lifl_knative import platform, platform_manifests
from lifl_knative.cluster import Cluster

from tests.kubernetes_api import KubernetesApi, kubernetes_api
from tests.platform_cluster import SYSTEM, add_nodes, put_pod, ready_status, run_workloads

DAEMON_SET = ("apps/v1", "DaemonSet", "lifl-node", SYSTEM)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    monkeypatch.setattr(platform, "_LOOK_AGAIN_S", 0.01)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with kubernetes_api(tmp_path) as (server, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        server.remove_group("monitoring.coreos.com")
        yield server


@pytest.fixture
def run(api: KubernetesApi, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = main(["platform", *arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def names(api: KubernetesApi, api_version: str, kind: str) -> list[str]:
    return sorted(obj["metadata"]["name"] for obj in api.all(api_version, kind))


def writes(api: KubernetesApi) -> list[str]:
    """Requests that could change something, since the last call."""
    found = [
        f"{asked.method} {asked.path}"
        for asked in api.asked
        if asked.method != "GET" and asked.query.get("dryRun") != "All"
    ]
    api.asked.clear()
    return found


def secret(api: KubernetesApi, name: str) -> dict[str, str]:
    found = api.get("v1", "Secret", name, SYSTEM)
    assert found is not None
    return {key: base64.b64decode(value).decode() for key, value in found["data"].items()}


# --- install -------------------------------------------------------------------------------------------------


def test_install_applies_everything_in_order_and_waits_until_it_is_ready(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    outcome = run("install", "--image", "registry.test/lifl-node")
    assert outcome.code == 0, outcome.err
    assert outcome.out == "platform ready in namespace lifl-system (overlay single-node)\n"
    daemon_set = api.get(*DAEMON_SET)
    assert daemon_set is not None
    images = {container["image"] for container in platform_manifests.containers_of(daemon_set)}
    assert images == {f"registry.test/lifl-node:{platform_manifests.version_of('lifl-node:0.1.0')}"}
    order = [path.rpartition("/")[2] for path in writes(api)]
    assert order[0] == "lifl-system"
    assert order.index("secrets") < order.index("lifl-node", order.index("secrets"))
    assert names(api, "apps/v1", "Deployment") == ["lifl-autoscaler", "lifl-coordinator"]


def test_the_overlay_follows_the_number_of_nodes(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1", "n2")
    assert json.loads(run("install", "-o", "json").out) == {
        "overlay": "production",
        "components": [],
        "namespace": "lifl-system",
        "image": "lifl-node:0.1.0",
        "ready": True,
    }


def test_tokens_are_random_made_once_and_never_shown(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    first = run("install")
    tokens, member = secret(api, "lifl-tokens"), secret(api, "lifl-member-token")
    assert tokens["tokens"].splitlines()[-1] == f"* {tokens['operator']}"
    assert min(len(tokens["operator"]), len(member["token"])) >= 40
    for value in (tokens["operator"], member["token"]):
        assert value not in first.out + first.err
    assert "get secret lifl-tokens -o jsonpath='{.data.operator}' | base64 -d" in first.err
    second = run("install")
    assert second.code == 0
    assert "made Secret" not in second.err
    assert secret(api, "lifl-tokens") == tokens


def test_the_tokens_file_is_one_that_a_gateway_reads(api: KubernetesApi, run: Run, tmp_path: Path) -> None:
    from lifl_gateway.tokens import Tokens

    run_workloads(api, "n1")
    run("install")
    made = secret(api, "lifl-tokens")
    file = tmp_path / "tokens"
    file.write_text(made["tokens"])
    assert Tokens.from_file(file).identify(f"Bearer {made['operator']}").is_operator


def test_a_second_installation_changes_nothing(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    run("install", "--image", "registry.test/lifl-node")
    before = api.version
    assert run("install").code == 0
    assert api.version == before


def test_an_upgrade_keeps_what_users_changed_elsewhere(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    run("install")
    daemon_set = api.get(*DAEMON_SET)
    assert daemon_set is not None
    daemon_set["spec"]["template"]["spec"]["tolerations"] = [{"operator": "Exists"}]
    api.put(daemon_set)
    assert run("install", "--version", "0.2.0").code == 0
    after = api.get(*DAEMON_SET)
    assert after is not None
    assert after["spec"]["template"]["spec"]["tolerations"] == [{"operator": "Exists"}]
    assert {c["image"] for c in platform_manifests.containers_of(after)} == {"lifl-node:0.2.0"}


def test_fields_that_others_own_are_told_and_taken_over_with_force(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    metadata = {"name": "lifl-coordinator", "namespace": SYSTEM}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata}
    api.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}})
    api.claim_fields({**claim, "spec": {"resources": {"requests": {"storage": "1Ti"}}}}, "storage-team")
    outcome = run("install")
    assert outcome.code == 1
    assert '"storage-team" owns spec.resources.requests.storage' in outcome.err
    assert "func platform install --force" in outcome.err
    assert "func deploy" not in outcome.err
    assert "missing: PersistentVolumeClaim lifl-coordinator" in outcome.err
    assert names(api, "apps/v1", "Deployment") == []
    assert run("install", "--force").code == 0


def test_a_secret_without_its_key_stops_before_anything_is_applied(api: KubernetesApi, run: Run) -> None:
    add_nodes(api, "n1")
    api.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}})
    metadata = {"name": "lifl-tokens", "namespace": SYSTEM}
    api.put({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {"tokens": "KiBh"}})
    outcome = run("install")
    assert outcome.code == 1
    assert "Secret lifl-tokens in namespace lifl-system lacks operator; nothing was changed" in outcome.err
    assert writes(api) == []


def test_a_missing_permission_says_what_is_applied_by_then(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    api.forbid("patch", "daemonsets.apps")
    outcome = run("install")
    assert outcome.code == 1
    assert 'user "alice" may not patch daemonsets.apps' in outcome.err
    assert "objects are applied; missing: DaemonSet lifl-node." in outcome.err
    assert "func platform uninstall" in outcome.err


def failing(**container_status: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "agent", "restartCount": 0, "state": {}} | container_status]}


@pytest.mark.parametrize(
    ("status", "log", "said"),
    [
        (
            failing(state={"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}),
            [],
            "pod lifl-node-0, container agent: ImagePullBackOff: not found",
        ),
        (
            failing(
                restartCount=4,
                state={"waiting": {"reason": "CrashLoopBackOff"}},
                lastState={"terminated": {"reason": "OOMKilled", "exitCode": 137}},
            ),
            ["lifl agent: starts"],
            "CrashLoopBackOff (ended with exit code 137, OOMKilled)\n\t| lifl agent: starts",
        ),
    ],
)
def test_a_pod_that_cannot_start_is_told_with_its_reason_and_last_lines(
    api: KubernetesApi, run: Run, status: dict[str, Any], log: list[str], said: str
) -> None:
    add_nodes(api, "n1")

    def fail(server: KubernetesApi, workload: dict[str, Any]) -> None:
        counts = {"observedGeneration": 1, "desiredNumberScheduled": 1, "numberReady": 0}
        server.set_status(workload, counts)
        put_pod(server, workload, "lifl-node-0", "n1", status)
        server.logs[SYSTEM, "lifl-node-0", "agent:previous"] = log

    api.on("DaemonSet", fail)
    api.on("Deployment", lambda server, obj: server.set_status(obj, ready_status(obj, 1)))
    outcome = run("install")
    assert outcome.code == 1
    assert "DaemonSet lifl-node is not ready: 0 of 1 pods are" in outcome.err
    assert said in outcome.err
    assert "Everything is applied and stays" in outcome.err
    assert "kubectl" in outcome.err


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (None, "no node takes its pods: all nodes are tainted"),
        ("event", "FailedCreate: pods are forbidden: exceeded quota"),
        ("pod", "pod lifl-coordinator-0 finds no node: 0/1 nodes are available"),
    ],
)
def test_pods_that_never_come_are_told_after_the_time_limit(
    api: KubernetesApi, run: Run, put: str | None, said: str
) -> None:
    add_nodes(api, "n1")
    kind = "Deployment" if put else "DaemonSet"

    def hinder(server: KubernetesApi, workload: dict[str, Any]) -> None:
        if workload["kind"] != kind:
            server.set_status(workload, ready_status(workload, 1))
            return
        server.set_status(workload, {"observedGeneration": workload["metadata"]["generation"]})
        if put == "pod":
            message = "0/1 nodes are available: insufficient memory"
            condition = {"type": "PodScheduled", "status": "False", "message": message}
            put_pod(server, workload, f"{workload['metadata']['name']}-0", status={"conditions": [condition]})
        if put == "event":
            metadata = {"name": f"e-{workload['metadata']['name']}", "namespace": SYSTEM}
            event = {"apiVersion": "v1", "kind": "Event", "metadata": metadata, "type": "Warning"}
            about = {"kind": "ReplicaSet", "name": f"{workload['metadata']['name']}-5d4f"}
            message = "pods are forbidden: exceeded quota"
            server.put({**event, "involvedObject": about, "reason": "FailedCreate", "message": message})

    api.on("DaemonSet", hinder)
    api.on("Deployment", hinder)
    outcome = run("install", "--timeout", "1")
    assert outcome.code == 1
    assert "is not ready after 1 s" in outcome.err
    assert said in outcome.err


def test_without_waiting_nothing_need_become_ready(api: KubernetesApi, run: Run) -> None:
    add_nodes(api, "n1")
    outcome = run("install", "--no-wait")
    assert outcome.code == 0
    assert outcome.out.startswith("platform applied")


def test_a_dry_run_prints_the_manifests_and_changes_nothing(api: KubernetesApi, run: Run) -> None:
    from ruamel.yaml import YAML

    add_nodes(api, "n1")
    for arguments in (
        ("--dry-run", "client"),
        ("--dry-run", "server"),
        ("--dry-run", "client", "--overlay", "single-node"),
    ):
        outcome = run("install", *arguments)
        assert outcome.code == 0, outcome.err
        printed = list(YAML(typ="safe", pure=True).load_all(outcome.out))
        assert {obj["kind"] for obj in printed} >= {"Namespace", "DaemonSet", "Deployment", "NetworkPolicy"}
        assert writes(api) == []
    assert "namespace lifl-system is not there yet" in run("install", "--dry-run", "server").err


def test_a_dry_run_needs_no_cluster(api: KubernetesApi, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    outcome = run("install", "--dry-run", "client", "--overlay", "broker-baseline", "-o", "json")
    assert {obj["kind"] for obj in json.loads(outcome.out)} >= {"StatefulSet", "ConfigMap"}
    outcome = run("install", "--dry-run", "client", "-o", "json")
    assert "DaemonSet" in {obj["kind"] for obj in json.loads(outcome.out)}
    assert "No cluster is known: these are the manifests of overlay production" in outcome.err
    outcome = run("install")
    assert outcome.err.startswith("Error: no cluster is known")
    assert "func platform install --kubeconfig FILE" in outcome.err
    assert run("install", "--dry-run", "client", "--kubeconfig", "/nowhere").code == 1


def test_a_dry_run_on_the_server_tells_what_it_would_refuse(api: KubernetesApi, run: Run) -> None:
    add_nodes(api, "n1")
    api.forbid("patch", "clusterroles.rbac.authorization.k8s.io")
    outcome = run("install", "--dry-run", "server")
    assert outcome.code == 1
    assert "may not patch clusterroles" in outcome.err
    assert "Nothing was changed." in outcome.err


def test_monitors_come_where_the_cluster_knows_them_and_go_when_they_are_not_wanted(
    api: KubernetesApi, run: Run
) -> None:
    api.kinds["monitoring.coreos.com/v1"] = {"ServiceMonitor": ("servicemonitors", True)}
    run_workloads(api, "n1")
    run("install")
    assert names(api, "monitoring.coreos.com/v1", "ServiceMonitor") == [
        "lifl-autoscaler",
        "lifl-coordinator",
        "lifl-gateway",
    ]
    outcome = run("install", "--component", "none")
    assert outcome.code == 0, outcome.err
    assert names(api, "monitoring.coreos.com/v1", "ServiceMonitor") == []
    assert "removed ServiceMonitor lifl-gateway, which the overlay no longer has" in outcome.err
    assert json.loads(run("install", "-o", "json").out)["components"] == []


def test_the_broker_baseline_is_beside_the_platform(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    assert run("install").code == 0
    assert run("install", "--overlay", "broker-baseline").code == 0
    assert names(api, "apps/v1", "StatefulSet") == ["nats"]
    assert names(api, "apps/v1", "DaemonSet") == ["lifl-node"]
    assert [found["overlay"] for found in json.loads(run("status", "-o", "json").out)] == [
        "single-node",
        "broker-baseline",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--image", "a:1", "--version", "2"),
            "--version 2 and the tag or digest of --image a:1 exclude each other",
        ),
        (("--overlay", "broker-baseline", "--image", "a"), "runs no image of LIFL's"),
        (("--overlay", "huge"), "'huge' is not one of"),
        (("--namespace", "mine"), "the platform's namespaces are fixed"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    api: KubernetesApi, run: Run, arguments: tuple[str, ...], said: str
) -> None:
    add_nodes(api, "n1")
    outcome = run("install", *arguments)
    assert outcome.code == 1
    assert said in outcome.err
    assert writes(api) == []


def test_a_digest_is_kept_at_the_next_installation(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    image = "registry.test:5000/lifl-node@sha256:" + "ab" * 32
    run("install", "--image", image)
    assert json.loads(run("install", "-o", "json").out)["image"] == image


def test_deploy_installs_with_the_same_function(api: KubernetesApi, tmp_path: Path) -> None:
    run_workloads(api, "n1")
    said: list[str] = []
    with Cluster.connect(tmp_path / "kubeconfig") as cluster:
        installed = platform.install(cluster, timeout=10, note=said.append)
    assert (installed.overlay, installed.namespace) == ("single-node", SYSTEM)
    assert "applying overlay single-node" in said


# --- status --------------------------------------------------------------------------------------------------


def test_status_shows_objects_versions_and_each_nodes_data_plane(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1", "n2")
    run("install")
    for number, plane in enumerate(
        ({"data_plane": "ebpf", "reason": ""}, {"data_plane": "unix", "reason": "EPERM"})
    ):
        api.logs[SYSTEM, f"lifl-node-{number}", "agent"] = ["starting", json.dumps(plane)]
    found = json.loads(run("status", "-o", "json").out)[0]
    assert found["ready"] is True
    assert found["version"] == "0.1.0"
    nodes = [(node["node"], node["data_plane"], node["reason"]) for node in found["nodes"]]
    assert nodes == [("n1", "ebpf", ""), ("n2", "unix", "EPERM")]
    shown = run("status").out
    assert max(map(len, shown.splitlines())) <= 80
    assert "2/2 ready" in shown
    assert "EPERM" in shown


def test_status_shows_what_is_missing_and_why_pods_fail(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    run("install")
    daemon_set = api.get(*DAEMON_SET)
    assert daemon_set is not None
    api.set_status(daemon_set, {"observedGeneration": 1, "desiredNumberScheduled": 1, "numberReady": 0})
    put_pod(api, daemon_set, "lifl-node-0", "n1", failing(state={"waiting": {"reason": "ErrImageNeverPull"}}))
    api.remove("v1", "Service", "lifl-gateway", SYSTEM)
    shown = run("status").out
    assert "ErrImageNeverPull" in shown
    assert "missing" in next(line for line in shown.splitlines() if "lifl-gateway" in line)
    assert json.loads(run("status", "-o", "json").out)[0]["ready"] is False


def test_status_of_a_cluster_without_the_platform_says_how_to_install_it(api: KubernetesApi, run: Run) -> None:
    outcome = run("status")
    assert outcome.code == 1
    assert 'the platform is not in the cluster of context "test"' in outcome.err
    assert "func platform install" in outcome.err


# --- uninstall -----------------------------------------------------------------------------------------------


def test_uninstall_keeps_data_unless_told_otherwise(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    run("install")
    outcome = run("uninstall", "--yes")
    assert outcome.code == 0, outcome.err
    assert names(api, "apps/v1", "DaemonSet") == []
    assert names(api, "rbac.authorization.k8s.io/v1", "ClusterRole") == []
    assert names(api, "v1", "PersistentVolumeClaim") == ["lifl-coordinator"]
    assert names(api, "v1", "Secret") == ["lifl-member-token", "lifl-tokens"]
    assert "PersistentVolumeClaim lifl-coordinator" in outcome.out
    again = run("uninstall", "--yes", "--delete-data", "-o", "json")
    assert json.loads(again.out) == {"removed": ["lifl-system"], "kept": []}
    assert SYSTEM not in names(api, "v1", "Namespace")
    assert names(api, "v1", "PersistentVolumeClaim") == []
    assert run("uninstall", "--yes").code == 1


def test_uninstall_touches_no_function_and_nobody_elses_objects(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    run("install")
    labels = {"app.kubernetes.io/part-of": "lifl", "app.kubernetes.io/managed-by": "lifl-func"}
    broker = {
        "apiVersion": "eventing.knative.dev/v1",
        "kind": "Broker",
        "metadata": {"name": "mine", "labels": labels},
    }
    api.put(broker)
    api.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "theirs", "namespace": SYSTEM}})
    assert run("uninstall", "--yes").code == 0
    assert names(api, "eventing.knative.dev/v1", "Broker") == ["mine"]
    assert names(api, "v1", "ConfigMap") == ["theirs"]


def test_uninstall_asks_first_and_says_so_where_nobody_can_answer(
    api: KubernetesApi, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_workloads(api, "n1")
    run("install")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    outcome = run("uninstall")
    assert outcome.code == 1
    assert "nobody is there to confirm it" in outcome.err
    assert "func platform uninstall --yes" in outcome.err
    assert names(api, "apps/v1", "DaemonSet") == ["lifl-node"]


def test_an_uninstall_that_is_refused_says_what_is_left(api: KubernetesApi, run: Run) -> None:
    run_workloads(api, "n1")
    run("install")
    api.forbid("delete", "networkpolicies.networking.k8s.io")
    outcome = run("uninstall", "--yes")
    assert outcome.code == 1
    assert "left: NetworkPolicy" in outcome.err
    assert "func platform uninstall --yes" in outcome.err

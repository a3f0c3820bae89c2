"""`func doctor --cluster` against an API server: what a cluster lacks is named with the command that helps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lifl.cli import main
from lifl_knative import platform
from lifl_knative.cluster import Cluster

from tests.kubernetes_api import KubernetesApi, kubernetes_api
from tests.platform_cluster import SYSTEM, enable_host_path, run_workloads

Examine = Callable[..., tuple[int, dict[str, dict[str, Any]]]]


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with kubernetes_api(tmp_path) as (server, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        server.remove_group("monitoring.coreos.com")
        yield server


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Examine:
    """Run `func doctor --cluster -o json`: exit code, and the checks by name."""

    def call(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
        capsys.readouterr()
        code = main(["doctor", "--cluster", "-o", "json", *arguments])
        return code, {check["name"]: check for check in json.loads(capsys.readouterr().out)}

    return call


@pytest.fixture
def installed(api: KubernetesApi, tmp_path: Path) -> KubernetesApi:
    """A cluster with everything: Knative, its flag, the platform."""
    run_workloads(api, "n1")
    enable_host_path(api)
    for namespace, name in (("knative-serving", "controller"), ("knative-eventing", "eventing-controller")):
        metadata = {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/version": "1.22.0"}}
        api.put({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata})
    with Cluster.connect(tmp_path / "kubeconfig") as cluster:
        platform.install(cluster, timeout=10, note=lambda text: None)
    api.logs[SYSTEM, "lifl-node-0", "agent"] = ['{"data_plane": "ebpf", "reason": ""}']
    return api


def test_a_cluster_that_has_everything_is_well(installed: KubernetesApi, examine: Examine) -> None:
    code, checks = examine()
    assert {check["status"] for check in checks.values()} == {"ok"}
    assert code == 0
    assert checks["Knative Serving"]["value"] == "version 1.22.0"
    assert checks["node n1"]["value"] == "data plane ebpf"


def test_a_bare_cluster_lacks_knative_flag_and_platform(api: KubernetesApi, examine: Examine) -> None:
    code, checks = examine()
    assert code == 1
    assert checks["platform"]["hint"].endswith("platform install")
    flag = checks["feature flags"]
    assert flag["status"] == "missing"
    assert "kubectl" in flag["hint"]
    assert "kubernetes.podspec-volumes-hostpath" in flag["hint"]
    api.remove_group("serving.knative.dev")
    api.remove_group("eventing.knative.dev")
    code, checks = examine()
    assert checks["Knative Serving"]["status"] == "missing"
    assert checks["Knative Eventing"]["status"] == "warn"
    assert "feature flags" not in checks


@pytest.mark.parametrize(
    ("level", "status"), [("restricted", "missing"), ("baseline", "missing"), ("privileged", "ok")]
)
def test_the_pod_security_level_has_to_allow_a_host_path(
    installed: KubernetesApi, examine: Examine, level: str, status: str
) -> None:
    labels = {"pod-security.kubernetes.io/enforce": level}
    installed.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "learning", "labels": labels}})
    code, checks = examine("-n", "learning")
    assert checks["namespace learning"]["status"] == status
    assert code == (1 if status == "missing" else 0)
    if status == "missing":
        assert "label namespace learning pod-security" in checks["namespace learning"]["hint"]


def test_permissions_that_are_missing_are_named_one_by_one(installed: KubernetesApi, examine: Examine) -> None:
    installed.forbid("create", "services.serving.knative.dev")
    installed.forbid("patch", "services.serving.knative.dev")
    installed.forbid("get", "pods/log", "default")
    code, checks = examine()
    assert code == 1
    assert checks["may deploy functions"]["value"] == "not create, patch services.serving.knative.dev"
    assert "auth can-i create services.serving.knative.dev -n default" in checks["may deploy functions"]["hint"]
    assert checks["may read logs"]["status"] == "missing"
    assert checks["may subscribe functions"]["status"] == "ok"


def test_what_may_not_be_read_is_a_warning_and_hides_nothing_else(
    installed: KubernetesApi, examine: Examine
) -> None:
    installed.forbid("get", "configmaps", "knative-serving")
    installed.forbid("get", "deployments.apps", "knative-serving")
    installed.forbid("get", "namespaces")
    code, checks = examine()
    assert checks["feature flags"]["status"] == "warn"
    assert checks["Knative Serving"]["value"] == "installed, version unknown"
    assert checks["pod security"]["value"].startswith("could not be examined")
    assert checks["may deploy functions"]["status"] == "ok"
    assert code == 0


def test_what_of_the_platform_is_gone_or_not_ready_is_named(installed: KubernetesApi, examine: Examine) -> None:
    installed.remove("v1", "Service", "lifl-coordinator", SYSTEM)
    node = installed.get("apps/v1", "DaemonSet", "lifl-node", SYSTEM)
    assert node is not None
    installed.set_status(node, {})
    code, checks = examine()
    assert code == 1
    assert "Service lifl-coordinator, DaemonSet lifl-node" in checks["platform"]["value"]


def test_a_node_without_ebpf_is_a_warning_with_its_reason(installed: KubernetesApi, examine: Examine) -> None:
    said = {"data_plane": "unix", "reason": "bpf(2): Operation not permitted"}
    installed.logs[SYSTEM, "lifl-node-0", "agent"] = [json.dumps(said)]
    code, checks = examine()
    assert code == 0
    assert checks["node n1"]["status"] == "warn"
    assert "bpf(2): Operation not permitted" in checks["node n1"]["hint"]


def test_a_namespace_that_is_not_there_is_told(installed: KubernetesApi, examine: Examine) -> None:
    code, checks = examine("-n", "nowhere")
    assert code == 1
    assert checks["namespace nowhere"]["hint"].endswith("create namespace nowhere")


def test_a_cluster_that_does_not_answer_is_the_only_thing_told(
    api: KubernetesApi, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.tokens.clear()
    api.fail("GET", "/version", 401, "Unauthorized")
    code, checks = examine()
    assert code == 1
    assert list(checks) == ["cluster"]
    assert "token has expired" in checks["cluster"]["value"]
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    code, checks = examine()
    assert checks["cluster"]["value"].startswith("no cluster is known")


def test_an_old_cluster_is_a_warning(
    api: KubernetesApi, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "server_version", lambda self: "v1.26.3+k3s1")
    _, checks = examine()
    assert checks["cluster"]["status"] == "warn"
    assert "v1.26.3" in checks["cluster"]["value"]


def test_without_the_kubernetes_client_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    assert main(["doctor", "--cluster"]) == 1
    assert "pip install 'lifl[knative]'" in capsys.readouterr().err


def test_the_table_fits_eighty_columns(installed: KubernetesApi, capsys: pytest.CaptureFixture[str]) -> None:
    installed.forbid("get", "pods/log")
    main(["doctor", "--cluster"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80

"""The connection to a Kubernetes API server: applying, watching, patience, and an error for each refusal."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lifl_knative import cluster as cluster_module
from lifl_knative.api_errors import (
    Conflict,
    Forbidden,
    MissingKind,
    NoCluster,
    NotFound,
    NotLoggedIn,
    Overloaded,
    Rejected,
    Unreachable,
)
from lifl_knative.cluster import Cluster

from tests.kubernetes_api import KubernetesApi, kubernetes_api

SERVING = "serving.knative.dev/v1"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KubernetesApi]:
    with kubernetes_api(tmp_path) as (server, _):
        yield server


@pytest.fixture
def cluster(api: KubernetesApi, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster.connect(tmp_path / "kubeconfig") as connection:
        yield connection


def config_map(name: str = "settings", **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def service(name: str = "fedavg", image: str = "registry.example.com/fedavg:1") -> dict[str, Any]:
    spec = {"template": {"spec": {"containers": [{"image": image}]}}}
    return {"apiVersion": SERVING, "kind": "Service", "metadata": {"name": name}, "spec": spec}


def hints_of(error: Any) -> str:
    return "\n".join(command for command, _ in error.hints)


# --- objects -------------------------------------------------------------------------------------------------


def test_applied_object_is_read_listed_changed_and_deleted(api: KubernetesApi, cluster: Cluster) -> None:
    made = cluster.apply({**config_map(a="1"), "metadata": {"name": "settings", "labels": {"app": "x"}}})
    assert made["metadata"]["namespace"] == "default"
    assert cluster.get("v1", "ConfigMap", "settings") == made
    assert cluster.get("v1", "ConfigMap", "other") is None
    assert [obj["kind"] for obj in cluster.list("v1", "ConfigMap", selector="app=x")] == ["ConfigMap"]
    assert cluster.list("v1", "ConfigMap", selector="app=y") == []
    assert cluster.apply(config_map(b="2"))["data"] == {"b": "2"}, "what is no longer applied is gone"
    assert cluster.patch("v1", "ConfigMap", "settings", {"data": {"c": "3"}})["data"] == {"b": "2", "c": "3"}
    assert cluster.delete("v1", "ConfigMap", "settings")
    assert not cluster.delete("v1", "ConfigMap", "settings")


def test_apply_is_strict_and_in_our_name(api: KubernetesApi, cluster: Cluster) -> None:
    cluster.apply(config_map(a="1"))
    asked = next(a for a in api.asked if a.method == "PATCH")
    assert asked.headers["content-type"] == "application/apply-patch+yaml"
    assert asked.query == {"fieldManager": "lifl-func", "fieldValidation": "Strict", "force": "false"}


def test_dry_run_is_checked_and_keeps_nothing(cluster: Cluster) -> None:
    assert cluster.apply(config_map(a="1"), dry_run=True)["data"] == {"a": "1"}
    assert cluster.get("v1", "ConfigMap", "settings") is None


def test_same_object_applied_twice_is_not_changed(cluster: Cluster) -> None:
    first = cluster.apply(service())
    assert cluster.apply(service())["metadata"] == first["metadata"]
    assert cluster.apply(service(image="registry.example.com/fedavg:2"))["metadata"]["generation"] == 2


def test_namespace_and_context_come_from_the_kubeconfig(api: KubernetesApi, tmp_path: Path) -> None:
    file = api.kubeconfig(tmp_path / "other", context="prod", namespace="learning")
    with Cluster.connect(file) as cluster:
        assert (cluster.context, cluster.namespace) == ("prod", "learning")
    with Cluster.connect(file, "prod", "mine") as cluster:
        assert cluster.namespace == "mine"


def test_first_of_several_kubeconfigs_wins(
    api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = api.kubeconfig(tmp_path / "first", context="one", namespace="a")
    second = api.kubeconfig(tmp_path / "second", context="two", namespace="b")
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path}/missing:{first}:{second}")
    with Cluster.connect() as cluster:
        assert (cluster.context, cluster.namespace) == ("one", "a")
    with Cluster.connect(context="two") as cluster:
        assert cluster.namespace == "b"


def test_status_and_scale_are_patched(api: KubernetesApi, cluster: Cluster) -> None:
    cluster.apply(service())
    cluster.patch_status({**service(), "status": {"url": "http://x"}})
    found = cluster.get(SERVING, "Service", "fedavg")
    assert found is not None and found["status"] == {"url": "http://x"}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "d"},
        "spec": {"replicas": 1},
    }
    cluster.apply(deployment)
    cluster.patch_scale("apps/v1", "Deployment", "d", 0)
    assert api.get("apps/v1", "Deployment", "d")["spec"]["replicas"] == 0  # type: ignore[index]


# --- watching ------------------------------------------------------------------------------------------------


def test_watch_tells_what_is_there_and_what_changes(api: KubernetesApi, cluster: Cluster) -> None:
    cluster.apply(config_map("a", v="1"))
    events = cluster.watch("v1", "ConfigMap", name="a", seconds=20)
    assert next(events)["type"] == "ADDED"
    api.put({**config_map("b"), "metadata": {"name": "b", "namespace": "default"}})
    api.put({**config_map("a", v="2"), "metadata": {"name": "a", "namespace": "default"}})
    changed = next(events)
    assert (changed["type"], changed["object"]["data"]) == ("MODIFIED", {"v": "2"})
    api.remove("v1", "ConfigMap", "a")
    assert next(events)["type"] == "DELETED"
    events.close()


def test_watch_goes_on_after_410_gone(api: KubernetesApi, cluster: Cluster) -> None:
    for name in "ab":
        cluster.apply(config_map(name, v="1"))
    events = cluster.watch("v1", "ConfigMap", seconds=20)
    assert [next(events)["object"]["metadata"]["name"] for _ in "ab"] == ["a", "b"]
    api.remove("v1", "ConfigMap", "a")
    api.put({**config_map("b", v="2"), "metadata": {"name": "b", "namespace": "default"}})
    api.forget()
    seen = [next(events), next(events)]
    assert [(e["type"], e["object"]["metadata"]["name"]) for e in seen] == [("DELETED", "a"), ("MODIFIED", "b")]
    events.close()


def test_watch_goes_on_after_the_connection_ends(api: KubernetesApi, cluster: Cluster) -> None:
    cluster.apply(config_map("a", v="1"))
    events = cluster.watch("v1", "ConfigMap", name="a", seconds=20)
    next(events)

    def interrupt() -> None:
        deadline = time.monotonic() + 10
        while not any(a.query.get("watch") for a in api.asked) and time.monotonic() < deadline:
            time.sleep(0.01)
        api.cut_watches()
        api.put({**config_map("a", v="2"), "metadata": {"name": "a", "namespace": "default"}})

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert next(events)["object"]["data"] == {"v": "2"}
    thread.join()
    events.close()


def test_watch_ends_at_its_time(cluster: Cluster) -> None:
    began = time.monotonic()
    assert list(cluster.watch("v1", "ConfigMap", seconds=0.3)) == []
    assert 0.2 < time.monotonic() - began < 3


# --- refusals ------------------------------------------------------------------------------------------------


def test_missing_kubeconfig_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        NoCluster, match=r"no cluster is known: there is no kubeconfig at '.*/\.kube/config'"
    ) as caught:
        Cluster.connect()
    assert "export KUBECONFIG=FILE" in hints_of(caught.value)
    with pytest.raises(NoCluster, match="there is no kubeconfig at 'nowhere'"):
        Cluster.connect(Path("nowhere"))


def test_unknown_context_names_those_that_exist(api: KubernetesApi, tmp_path: Path) -> None:
    with pytest.raises(NoCluster, match=r'there is no context "prod" in the kubeconfig .*; it has test'):
        Cluster.connect(tmp_path / "kubeconfig", "prod")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid YAML"),
        ("- a", "is no mapping"),
        ("{}", "no context is chosen"),
        (
            json.dumps(
                {"current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "k"}}], "clusters": []}
            ),
            'cannot be used for context "c"',
        ),
    ],
)
def test_broken_kubeconfig_is_explained(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "broken"
    file.write_text(content)
    with pytest.raises(NoCluster, match=said):
        Cluster.connect(file)


def test_failing_credential_plugin_is_named(api: KubernetesApi, tmp_path: Path) -> None:
    file = api.kubeconfig(tmp_path / "exec")
    content = json.loads(file.read_text())
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "no-such-plugin",
        "interactiveMode": "Never",
    }
    content["users"][0]["user"] = {"exec": plugin}
    file.write_text(json.dumps(content))
    with pytest.raises(NoCluster, match="no-such-plugin"):
        Cluster.connect(file)


def test_unreachable_cluster_is_named_at_once(api: KubernetesApi, tmp_path: Path) -> None:
    with KubernetesApi() as gone:
        file = gone.kubeconfig(tmp_path / "gone")
    began = time.monotonic()
    with (
        Cluster.connect(file) as cluster,
        pytest.raises(
            Unreachable, match=r'the cluster of context "test" at http://.* is not accessible: .*refused'
        ) as e,
    ):
        cluster.get("v1", "ConfigMap", "a")
    assert time.monotonic() - began < 2
    assert "cluster-info" in hints_of(e.value)


def test_what_is_no_api_server_is_said(api: KubernetesApi, cluster: Cluster) -> None:
    api.fail("GET", "/version", 200, "", body=b"<html>")
    with pytest.raises(Unreachable, match="is no Kubernetes API server"):
        cluster.server_version()


def test_certificate_of_somebody_else_is_refused(tmp_path: Path) -> None:
    certificates = [make_certificate(tmp_path / name) for name in ("own", "other")]
    with KubernetesApi(certificate=certificates[0]) as api:
        file = api.kubeconfig(tmp_path / "kubeconfig")
        with Cluster.connect(file) as cluster:
            assert cluster.server_version() == "v1.35.0"
        content = json.loads(file.read_text())
        content["clusters"][0]["cluster"]["certificate-authority"] = str(certificates[1][0])
        file.write_text(json.dumps(content))
        with (
            Cluster.connect(file) as cluster,
            pytest.raises(Unreachable, match=r"cannot be trusted: .*CERTIFICATE"),
        ):
            cluster.server_version()


def make_certificate(directory: Path) -> tuple[Path, Path]:
    directory.mkdir()
    certificate, key = directory / "tls.crt", directory / "tls.key"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    )
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True, timeout=30)
    return certificate, key


def test_expired_token_is_401(api: KubernetesApi, cluster: Cluster) -> None:
    api.tokens.clear()
    with pytest.raises(
        NotLoggedIn, match='not logged in to the cluster of context "test", or the token has expired'
    ):
        cluster.list("v1", "ConfigMap")


def test_missing_permission_is_named_with_a_command_to_check_it(api: KubernetesApi, cluster: Cluster) -> None:
    api.forbid("patch", "services.serving.knative.dev")
    with pytest.raises(Forbidden) as caught:
        cluster.apply(service())
    assert str(caught.value) == (
        'user "alice" may not patch services.serving.knative.dev in namespace "default"; ask for a Role with verb '
        "'patch' on resource 'services' of API group 'serving.knative.dev'"
    )
    assert "auth can-i patch services.serving.knative.dev --namespace default" in hints_of(caught.value)


def test_missing_component_is_named(api: KubernetesApi, cluster: Cluster) -> None:
    assert cluster.has(SERVING, "Service")
    api.remove_group("eventing.knative.dev")
    assert not cluster.has("eventing.knative.dev/v1", "Trigger")
    with pytest.raises(
        MissingKind, match=r"does not know 'triggers\.eventing\.knative\.dev': Knative Eventing is not"
    ):
        cluster.list("eventing.knative.dev/v1", "Trigger")


def test_missing_namespace_is_named_with_the_command_that_makes_it(cluster: Cluster) -> None:
    with pytest.raises(
        NotFound, match='there is no namespace "learning" in the cluster of context "test"'
    ) as caught:
        cluster.apply({**config_map(), "metadata": {"name": "a", "namespace": "learning"}})
    assert "kubectl" in hints_of(caught.value) and "create namespace learning" in hints_of(caught.value)


def test_conflict_names_who_owns_which_field_and_force_takes_it_over(api: KubernetesApi, cluster: Cluster) -> None:
    other = service(image="registry.example.com/other")
    other["metadata"]["namespace"] = "default"
    api.claim_fields(other, "kn")
    with pytest.raises(Conflict) as caught:
        cluster.apply(service())
    assert caught.value.managers == ("kn",)
    assert '"kn" owns spec.template.spec.containers' in str(caught.value)
    assert "deploy --force" in hints_of(caught.value)
    cluster.apply(service(), force=True)
    assert cluster.apply(service(image="registry.example.com/fedavg:2"))


def test_invalid_object_is_422_with_each_field(api: KubernetesApi, cluster: Cluster) -> None:
    causes = [{"field": "spec.x", "message": "must be positive"}, {"field": "spec.y", "message": "is required"}]
    api.fail("PATCH", "configmaps", 422, "invalid", "Invalid", details={"causes": causes})
    with pytest.raises(Rejected, match=r"(?s)spec\.x: must be positive.*spec\.y: is required"):
        cluster.apply(config_map())


def test_rule_of_knative_is_told_with_the_flag_that_lifts_it(cluster: Cluster) -> None:
    wanted = service()
    wanted["spec"]["template"]["spec"]["volumes"] = [{"name": "run", "hostPath": {"path": "/run/lifl"}}]
    with pytest.raises(Rejected, match="HostPath volume support is disabled") as caught:
        cluster.apply(wanted)
    assert caught.value.flag == "kubernetes.podspec-volumes-hostpath"
    assert (
        "patch configmap config-features -n knative-serving --type merge "
        '-p \'{"data":{"kubernetes.podspec-volumes-hostpath":"enabled"}}\''
    ) in hints_of(caught.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (429, "too many requests"),
        (503, "apiserver is shutting down"),
        (500, 'Internal error occurred: failed calling webhook "webhook.serving.knative.dev": connection refused'),
    ],
)
def test_passing_trouble_is_waited_out(api: KubernetesApi, cluster: Cluster, status: int, message: str) -> None:
    fault = api.fail("PATCH", "configmaps", status, message, times=2, headers={"Retry-After": "0"})
    assert cluster.apply(config_map(a="1"))["data"] == {"a": "1"}
    assert fault.times == 0


def test_dropped_connection_is_tried_again(api: KubernetesApi, cluster: Cluster) -> None:
    api.fail("PATCH", "configmaps", 0, "", times=1, drop=True)
    assert cluster.apply(config_map(a="1"))["data"] == {"a": "1"}


def test_answer_that_is_cut_off_is_asked_for_again(api: KubernetesApi, cluster: Cluster) -> None:
    cluster.apply(config_map(a="1"))
    api.fail("GET", "configmaps/settings", 200, "", times=1, drop=True, body=b'{"kind": "Config')
    found = cluster.get("v1", "ConfigMap", "settings")
    assert found is not None and found["data"] == {"a": "1"}
    fault = api.fail("GET", "watch=true", 200, "", times=1, drop=True, body=b'{"type": "MODIFIED", "obj')
    events = cluster.watch("v1", "ConfigMap", seconds=20)
    assert next(events)["type"] == "ADDED"
    threading.Timer(0.2, cluster.patch, ("v1", "ConfigMap", "settings", {"data": {"a": "2"}})).start()
    assert next(events)["object"]["data"] == {"a": "2"}
    assert fault.times == 0
    events.close()


def test_trouble_that_stays_is_told_after_a_while(
    api: KubernetesApi, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "PATIENCE_S", 0.3)
    message = 'Internal error occurred: failed calling webhook "webhook.serving.knative.dev": connection refused'
    api.fail("PATCH", "configmaps", 500, message)
    api.fail("GET", "secrets", 503, "etcd leader changed")
    with pytest.raises(
        Overloaded, match=r'the webhook "webhook\.serving\.knative\.dev" does not answer'
    ) as caught:
        cluster.apply(config_map())
    assert "get pods -n knative-serving" in hints_of(caught.value)
    with pytest.raises(Overloaded, match=r"is not available \(HTTP 503\): etcd leader changed"):
        cluster.list("v1", "Secret")


def test_error_of_the_server_itself_is_not_repeated(api: KubernetesApi, cluster: Cluster) -> None:
    fault = api.fail("GET", "secrets", 500, "etcdserver: request timed out", times=5)
    with pytest.raises(Overloaded, match=r"failed \(HTTP 500\): etcdserver"):
        cluster.list("v1", "Secret")
    assert fault.times == 4


# --- logs ----------------------------------------------------------------------------------------------------


def test_log_is_read_and_followed(api: KubernetesApi, cluster: Cluster) -> None:
    api.put({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"}})
    assert cluster.pod_log("default", "p", "user-container") == ""
    api.logs["default", "p", "user-container"] = ["one", "two"]
    assert cluster.pod_log("default", "p", "user-container", 1) == "two\n"
    lines = cluster.follow_log("default", "p", "user-container")
    assert [next(lines), next(lines)] == ["one", "two"]
    api.remove("v1", "Pod", "p")
    assert list(lines) == []

"""The manifests are valid, refer to what exists, and give each container what it needs and nothing more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import kubernetes_validate
import lifl
import pytest
from lifl.messages import JobLatencies, Latencies
from lifl_gateway.coordinator_metrics import CoordinatorMetrics
from lifl_gateway.metrics import Metrics
from lifl_knative.kustomize import key_of, load_objects
from lifl_knative.platform import GENERATED_SECRETS
from lifl_knative.platform_manifests import (
    COMPONENTS,
    NAMESPACES,
    WORKLOADS,
    containers_of,
    manifests_directory,
    own_image,
    platform_objects,
    secrets_of,
    version_of,
)
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests import knative_schema
from tests.unit.cluster_walk import PaperCluster
from tests.unit.test_cluster_coordinator import spec as job_spec

OVERLAYS = tuple(NAMESPACES)
KNATIVE = ("serving.knative.dev/v1", "eventing.knative.dev/v1")
MONITOR_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["selector", "endpoints"],
    "properties": {
        "selector": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"matchLabels": {"type": "object", "additionalProperties": {"type": "string"}}},
        },
        "endpoints": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["port"],
                "properties": {
                    "port": {"type": "string"},
                    "path": {"type": "string", "pattern": "^/"},
                    "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
                    "authorization": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "credentials": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["name", "key"],
                                "properties": {"name": {"type": "string"}, "key": {"type": "string"}},
                            }
                        },
                    },
                    "relabelings": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {
                                "sourceLabels": {"type": "array", "items": {"type": "string"}},
                                "targetLabel": {"type": "string"},
                            },
                        },
                    },
                },
            },
        },
    },
}
"""What we use of a ServiceMonitor's spec, as the Prometheus operator documents it."""


@cache
def objects_of(overlay: str) -> list[dict[str, Any]]:
    components = () if overlay == "broker-baseline" else COMPONENTS
    return platform_objects(overlay, components)


def files() -> list[Path]:
    """Every file that holds objects; those of overlays with partial objects (patches) are left to kustomize."""
    root = manifests_directory()
    found = [
        *root.glob("base/*.yaml"),
        *root.glob("knative/*.yaml"),
        *root.glob("overlays/broker-baseline/*.yaml"),
    ]
    found += [root / "components/observability" / name for name in ("monitors.yaml", "network.yaml")]
    return sorted(file for file in found if file.name != "kustomization.yaml")


def pods(overlay: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(workload, pod spec)."""
    for obj in objects_of(overlay):
        if obj["kind"] in WORKLOADS:
            yield obj, obj["spec"]["template"]["spec"]


def containers() -> list[Any]:
    """(pod spec, container) of all overlays."""
    return [
        pytest.param(spec, container, id=f"{overlay}-{container['name']}")
        for overlay in OVERLAYS
        for _, spec in pods(overlay)
        for container in spec["containers"]
    ]


def check(obj: dict[str, Any]) -> None:
    if obj["apiVersion"] in KNATIVE:
        knative_schema.need_fixtures()
        assert knative_schema.problems(obj) == []
    elif obj["kind"] == "ServiceMonitor":
        assert set(obj) == {"apiVersion", "kind", "metadata", "spec"}
        jsonschema.validate(obj["spec"], MONITOR_SCHEMA)
    else:
        for version in ("1.30", "1.37"):
            kubernetes_validate.validate(obj, version, strict=True)


# --- validity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_of_an_overlay_is_valid_and_has_no_unknown_field(overlay: str) -> None:
    for obj in objects_of(overlay):
        check(obj)


@pytest.mark.parametrize("file", files(), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_manifest_is_valid_by_itself(file: Path) -> None:
    for obj in load_objects(file):
        check(obj)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_says_what_it_is_and_whose(overlay: str) -> None:
    keys = [key_of(obj) for obj in objects_of(overlay)]
    assert len(keys) == len(set(keys))
    for obj in objects_of(overlay):
        labels = obj["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"]
        assert labels["app.kubernetes.io/part-of"] == "lifl"
        assert labels["app.kubernetes.io/managed-by"] == "lifl-func"
        assert labels.get("lifl.dev/overlay", overlay) == overlay


def test_the_image_has_the_version_of_this_package() -> None:
    for overlay in ("single-node", "production"):
        assert version_of(own_image(objects_of(overlay))) == lifl.__version__


# --- references ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_pods_refer_to_exists_or_is_made_at_installation(overlay: str) -> None:
    there = {(obj["kind"], obj["metadata"]["name"]) for obj in objects_of(overlay)}
    for _, name, keys in secrets_of(objects_of(overlay)):
        assert keys <= set(GENERATED_SECRETS[name]())
    for workload, spec in pods(overlay):
        assert ("ServiceAccount", spec["serviceAccountName"]) in there
        if "priorityClassName" in spec:
            assert ("PriorityClass", spec["priorityClassName"]) in there
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        claimed = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in there
        for container in spec["containers"]:
            mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounted <= set(volumes) | claimed
            for variable in container.get("env", ()):
                assert set(variable.get("valueFrom", {})) <= {"fieldRef"}  # nothing secret in the environment


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_match_the_labels_of_pods_and_services(overlay: str) -> None:
    pod_labels = [w["spec"]["template"]["metadata"]["labels"] for w, _ in pods(overlay)]
    services = [obj for obj in objects_of(overlay) if obj["kind"] == "Service"]
    for obj in objects_of(overlay):
        spec = obj.get("spec", {})
        if obj["kind"] in WORKLOADS:
            assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
        elif obj["kind"] == "Service":
            assert any(spec["selector"].items() <= labels.items() for labels in pod_labels)
        elif obj["kind"] == "PodDisruptionBudget":
            assert any(spec["selector"]["matchLabels"].items() <= labels.items() for labels in pod_labels)
        elif obj["kind"] == "NetworkPolicy":
            wanted = spec["podSelector"].get("matchLabels", {})
            assert any(wanted.items() <= labels.items() for labels in pod_labels)
        elif obj["kind"] == "ServiceMonitor":
            for endpoint in spec["endpoints"]:
                assert any(
                    spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
                    and endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
                    for service in services
                )


def test_services_probes_and_policies_name_ports_that_containers_have() -> None:
    for overlay in OVERLAYS:
        by_label = {
            workload["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"]: {
                port["name"]: port["containerPort"]
                for container in spec["containers"]
                for port in container.get("ports", ())
            }
            for workload, spec in pods(overlay)
        }
        for obj in objects_of(overlay):
            if obj["kind"] == "Service":
                ports = by_label[obj["spec"]["selector"]["app.kubernetes.io/name"]]
                assert {port["targetPort"]: port["port"] for port in obj["spec"]["ports"]}.items() <= ports.items()
            if obj["kind"] == "NetworkPolicy":
                ports = by_label.get(
                    obj["spec"]["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name")
                )
                for rule in obj["spec"].get("ingress", ()):
                    assert ports is not None
                    assert {port["port"] for port in rule["ports"]} <= set(ports.values())


# --- least privilege -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "container"), containers())
def test_each_container_has_bounds_and_no_privilege_but_the_agents_two(
    spec: dict[str, Any], container: dict[str, Any]
) -> None:
    is_agent = container["name"] == "agent"
    security = {**spec["securityContext"], **container["securityContext"]}
    assert not security.get("privileged")
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"]["drop"] == ["ALL"]
    assert security["capabilities"].get("add", []) == (["BPF", "NET_ADMIN"] if is_agent else [])
    assert security["runAsNonRoot"] is not is_agent
    assert (security["runAsUser"] == 0) is is_agent
    assert security["seccompProfile"]["type"] == "RuntimeDefault" or is_agent
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(spec)
    resources = container["resources"]
    assert {"cpu", "memory"} <= set(resources["requests"])
    assert "memory" in resources["limits"]
    name, tag = container["image"].rpartition(":")[::2]
    assert name
    assert re.fullmatch(r"\d+\.\d+\.\d+", tag)


@pytest.mark.parametrize(("spec", "container"), containers())
def test_each_container_is_probed(spec: dict[str, Any], container: dict[str, Any]) -> None:
    probes = {"startupProbe", "readinessProbe"}
    assert probes <= set(container)
    assert ("livenessProbe" in container) is bool(container.get("ports"))


def test_without_a_component_even_the_agent_is_under_the_default_seccomp_profile() -> None:
    for obj in platform_objects("production"):
        for container in containers_of(obj):
            assert "seccompProfile" not in container["securityContext"]
    found = [container for obj in objects_of("production") for container in containers_of(obj)]
    assert [c["name"] for c in found if "seccompProfile" in c["securityContext"]] == ["agent"]


def test_only_the_directory_of_the_socket_is_shared_with_the_host() -> None:
    for overlay in OVERLAYS:
        for _, spec in pods(overlay):
            paths = [v["hostPath"]["path"] for v in spec.get("volumes", ()) if "hostPath" in v]
            assert paths in ([], ["/run/lifl"])
            for container in spec["containers"]:
                mounts = {mount["name"]: mount for mount in container.get("volumeMounts", ())}
                if paths and container["name"] != "agent":
                    assert mounts["run"]["readOnly"] is True


def test_only_the_autoscaler_has_an_account_that_the_api_server_knows() -> None:
    for overlay in OVERLAYS:
        for workload, spec in pods(overlay):
            assert spec["automountServiceAccountToken"] is (workload["metadata"]["name"] == "lifl-autoscaler")
        subjects = [
            subject["name"]
            for obj in objects_of(overlay)
            if obj["kind"] in ("RoleBinding", "ClusterRoleBinding")
            for subject in obj["subjects"]
        ]
        assert set(subjects) <= {"lifl-autoscaler"}


def test_no_role_has_a_wildcard_or_reads_secrets_of_everybody() -> None:
    for obj in objects_of("production"):
        if obj["kind"] in ("Role", "ClusterRole"):
            for rule in obj["rules"]:
                for words in rule.values():
                    assert "*" not in words
    roles = {obj["metadata"]["name"]: obj for obj in objects_of("production") if obj["kind"] == "ClusterRole"}
    granted = {resource for rule in roles["lifl-autoscaler"]["rules"] for resource in rule["resources"]}
    assert not granted & {"secrets", "configmaps", "nodes", "pods/exec"}
    by_verb = [rule["resources"] for rule in roles["lifl-autoscaler"]["rules"] if "delete" in rule["verbs"]]
    assert by_verb == []


def test_what_the_autoscaler_may_change_of_pods_is_confined_by_a_policy() -> None:
    for overlay in ("single-node", "production"):
        found = {obj["kind"]: obj for obj in objects_of(overlay) if obj["apiVersion"].startswith("admission")}
        policy = found["ValidatingAdmissionPolicy"]["spec"]
        account = "system:serviceaccount:lifl-system:lifl-autoscaler"
        assert policy["matchConditions"][0]["expression"] == f'request.userInfo.username == "{account}"'
        assert policy["validations"][0]["expression"] == "object.spec == oldObject.spec"
        binding = found["ValidatingAdmissionPolicyBinding"]
        assert binding["spec"]["policyName"] == found["ValidatingAdmissionPolicy"]["metadata"]["name"]


def test_everything_in_the_namespace_is_denied_unless_a_policy_allows_it() -> None:
    for overlay in ("single-node", "production"):
        policies = {
            obj["metadata"]["name"]: obj["spec"] for obj in objects_of(overlay) if obj["kind"] == "NetworkPolicy"
        }
        assert policies["lifl-default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        open_to_all = [
            port["port"]
            for spec in policies.values()
            for rule in spec.get("ingress", ())
            if "from" not in rule
            for port in rule["ports"]
        ]
        assert open_to_all == [8080]


# --- dashboard -----------------------------------------------------------------------------------------------


def exported_metrics(directory: Path) -> set[str]:
    """Names of the samples that gateways and the coordinator have for Prometheus."""
    link = SimpleNamespace(pools=list)
    latencies = Latencies(bounds=(0.1,), jobs=(JobLatencies("digits", (1, 2), 0.5),))
    asked = SimpleNamespace(ask=lambda *_: latencies)
    gateway = Metrics(link, asked)  # type: ignore[arg-type]
    cluster = PaperCluster(directory, job_spec(goal=4), 3, 1)
    try:
        service = SimpleNamespace(call=lambda look: look(cluster.coordinator, cluster.now))
        coordinator = CoordinatorMetrics(service)  # type: ignore[arg-type]
        texts = [gateway.render().decode(), coordinator.render().decode()]
    finally:
        cluster.close()
    return sample_names(*texts)


def sample_names(*texts: str) -> set[str]:
    """Names of LIFL's samples in what Prometheus reads, also of those that have no value yet."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    return {
        family.name + suffix
        for text in texts
        for family in text_string_to_metric_families(text)
        for suffix in suffixes[family.type]
        if family.name.startswith("lifl_") and not family.name.endswith("_created")
    }


def shown_metrics() -> set[str]:
    """Names of the samples that the dashboard asks for."""
    text = (manifests_directory() / "components/observability/dashboard.json").read_text()
    expressions = [target["expr"] for panel in json.loads(text)["panels"] for target in panel.get("targets", ())]
    return {name for expression in expressions for name in re.findall(r"lifl_\w+", expression)}


def is_of_autoscaler(name: str) -> bool:
    return name.startswith("lifl_autoscaler_")


def test_the_dashboard_shows_metrics_that_exist_and_leaves_none_out(tmp_path: Path) -> None:
    shown = {name for name in shown_metrics() if not is_of_autoscaler(name)}
    exported = exported_metrics(tmp_path)
    assert shown <= exported
    helpers = {name for name in exported if name.endswith(("_count", "_sum"))}
    assert exported - shown <= helpers


def test_the_dashboard_shows_the_autoscalers_metrics() -> None:
    monitor = pytest.importorskip("lifl_knative.autoscaler.monitor")
    exported = sample_names(generate_latest(monitor.Metrics().registry).decode())
    assert {name for name in shown_metrics() if is_of_autoscaler(name)} == exported


def test_the_dashboard_is_in_the_cluster_as_it_is_in_the_file() -> None:
    text = (manifests_directory() / "components/observability/dashboard.json").read_text()
    found = [obj for obj in objects_of("production") if obj["kind"] == "ConfigMap"]
    assert [obj["data"] for obj in found] == [{"lifl.json": text}]
    assert found[0]["metadata"]["labels"]["grafana_dashboard"] == "1"
    ids = [panel["id"] for panel in json.loads(text)["panels"]]
    assert len(ids) == len(set(ids))

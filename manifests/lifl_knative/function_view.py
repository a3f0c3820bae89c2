"""What the cluster says of a function, in the words and keys of Knative's func."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lifl.func_yaml.config import ROUTE_ANNOTATION

from lifl_knative.api_errors import Forbidden
from lifl_knative.cluster import Cluster
from lifl_knative.rollout import condition, is_ready
from lifl_knative.service import API_VERSION as SERVING
from lifl_knative.service import AUTOSCALER_CLASS, AUTOSCALING, NAME_LABEL, Object
from lifl_knative.triggers import API_VERSION as EVENTING

DEPLOYER = "knative"
_DEPLOYER_ANNOTATION = "function.knative.dev/deployer"


def is_function(service: Mapping[str, Any]) -> bool:
    """Whether `list` shows a Service: unless another deployer says that it is its own."""
    annotations = service["metadata"].get("annotations") or {}
    return str(annotations.get(_DEPLOYER_ANNOTATION, DEPLOYER)) == DEPLOYER


def readiness(service: Mapping[str, Any]) -> str:
    """`true`, `false` or `unknown`."""
    if is_ready(dict(service)):
        return "true"
    return "false" if condition(dict(service), "Ready").get("status") == "False" else "unknown"


def url_of(service: Mapping[str, Any]) -> str:
    """Where the function is reached; empty if nowhere yet."""
    return str((service.get("status") or {}).get("url") or "")


def describe(cluster: Cluster, service: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about one function; the keys of func's JSON, and some of our own."""
    metadata, status = service["metadata"], service.get("status") or {}
    template = service["spec"]["template"]
    url, inner = url_of(service), str((status.get("address") or {}).get("url") or "")
    labels = metadata.get("labels") or {}
    annotations = template.get("metadata", {}).get("annotations") or {}
    is_plan_scaled = annotations.get(f"{AUTOSCALING}class") == AUTOSCALER_CLASS
    ready = condition(dict(service), "Ready")
    return {
        "Route": url,
        "routes": [route for route in (url, inner) if route],
        "name": metadata["name"],
        "image": template["spec"]["containers"][0]["image"],
        "namespace": metadata["namespace"],
        "deployer": DEPLOYER,
        "subscriptions": _subscriptions(cluster, metadata["name"], metadata["namespace"]),
        "labels": labels,
        "revision": status.get("latestReadyRevisionName", ""),
        "generation": metadata.get("generation", 0),
        "ready": readiness(service),
        "reason": ": ".join(ready[name] for name in ("reason", "message") if ready.get(name)),
        "path": annotations.get(ROUTE_ANNOTATION, ""),
        "autoscaler": "plan" if is_plan_scaled else "kpa",
    }


def _subscriptions(cluster: Cluster, name: str, namespace: str) -> list[dict[str, str]]:
    if not cluster.has(EVENTING, "Trigger"):
        return []
    try:
        triggers = cluster.list(EVENTING, "Trigger", namespace)
    except Forbidden:
        return []
    found = []
    for trigger in triggers:
        reference = (trigger["spec"].get("subscriber") or {}).get("ref") or {}
        if (reference.get("kind"), reference.get("name")) == ("Service", name):
            attributes = (trigger["spec"].get("filter") or {}).get("attributes") or {}
            broker = trigger["spec"]["broker"]
            found.append(
                {"source": attributes.get("source", ""), "type": attributes.get("type", ""), "broker": broker}
            )
    return found


def summarise(cluster: Cluster, services: Sequence[Object], namespace: str | None) -> list[dict[str, Any]]:
    """A row for each function, in alphabetical order."""
    replicas = _replicas(cluster, namespace) if services else {}
    rows = []
    for service in sorted(services, key=lambda s: (s["metadata"]["namespace"], s["metadata"]["name"])):
        metadata = service["metadata"]
        labels = metadata.get("labels") or {}
        revision = (service.get("status") or {}).get("latestReadyRevisionName")
        rows.append(
            {
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "runtime": labels.get("function.knative.dev/runtime", ""),
                "deployer": DEPLOYER if NAME_LABEL in labels else "",
                "url": url_of(service),
                "ready": readiness(service),
                "replicas": replicas.get((metadata["namespace"], revision)),
            }
        )
    return rows


def _replicas(cluster: Cluster, namespace: str | None) -> dict[tuple[str, Any], int]:
    try:
        revisions = cluster.list(SERVING, "Revision", namespace)
    except Forbidden:
        return {}
    return {
        (revision["metadata"]["namespace"], revision["metadata"]["name"]): int(
            (revision.get("status") or {}).get("actualReplicas", 0)
        )
        for revision in revisions
    }

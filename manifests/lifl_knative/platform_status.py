"""What of the platform is in a cluster, how much of it is ready, and which data plane each node has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from lifl_knative.api_errors import MissingKind
from lifl_knative.installation import Installation, find_installation
from lifl_knative.kustomize import Object
from lifl_knative.platform_manifests import (
    BROKER_NAMESPACE,
    NAMESPACE,
    WORKLOADS,
    containers_of,
    secrets_of,
    version_of,
)
from lifl_knative.workloads import find_trouble, readiness

if TYPE_CHECKING:
    from lifl_knative.cluster import Cluster

_NODES: Final = "app.kubernetes.io/name=lifl-node"
_LOG_LINES: Final = 200


def describe(cluster: Cluster) -> list[dict[str, Any]]:
    """One document for each overlay in the cluster: its objects, and the nodes with their data planes."""
    found = []
    for namespace in (NAMESPACE, BROKER_NAMESPACE):
        installation = find_installation(cluster, namespace)
        if installation is not None:
            found.append(_describe(cluster, installation))
    return found


def _describe(cluster: Cluster, installation: Installation) -> dict[str, Any]:
    objects = [_describe_object(cluster, obj) for obj in installation.objects()]
    objects += [
        {"kind": "Secret", "name": name, "present": cluster.get("v1", "Secret", name, namespace) is not None}
        for namespace, name, _ in secrets_of(installation.objects())
    ]
    return {
        "overlay": installation.overlay,
        "components": list(installation.components),
        "namespace": installation.namespace,
        "image": installation.image,
        "version": version_of(installation.image) if installation.image else "",
        "ready": all(obj["present"] and obj.get("complete", True) for obj in objects),
        "objects": objects,
        "nodes": _nodes(cluster, installation.namespace) if installation.image else [],
    }


def _describe_object(cluster: Cluster, obj: Object) -> dict[str, Any]:
    metadata = obj["metadata"]
    shown: dict[str, Any] = {"kind": obj["kind"], "name": metadata["name"]}
    try:
        live = cluster.get(obj["apiVersion"], obj["kind"], metadata["name"], metadata.get("namespace"))
    except MissingKind:
        live = None
    shown["present"] = live is not None
    if live is not None and obj["kind"] in WORKLOADS:
        counts = readiness(live)
        images = [container["image"] for container in containers_of(live)]
        shown |= {
            "ready": counts.ready,
            "wanted": counts.wanted,
            "complete": counts.is_complete,
            "version": version_of(images[0]),
        }
        trouble = None if counts.is_complete else find_trouble(cluster, live)
        if trouble:
            shown["trouble"] = trouble.text
    return shown


def _nodes(cluster: Cluster, namespace: str) -> list[dict[str, Any]]:
    """What runs on each node; the agent writes its data plane to its log when it starts."""
    found = []
    for pod in cluster.list("v1", "Pod", namespace, _NODES):
        status = pod.get("status") or {}
        conditions = {entry["type"]: entry["status"] for entry in status.get("conditions", ())}
        name = pod["metadata"]["name"]
        plane, reason = _data_plane(cluster.pod_log(namespace, name, "agent", _LOG_LINES))
        found.append(
            {
                "node": pod["spec"].get("nodeName", ""),
                "pod": name,
                "ready": conditions.get("Ready") == "True",
                "data_plane": plane,
                "reason": reason,
            }
        )
    return sorted(found, key=lambda node: str(node["node"]))


def _data_plane(log: str) -> tuple[str, str]:
    """Data plane, and why it is not eBPF, from the newest line of JSON that names it; empty when unknown."""
    for line in reversed(log.splitlines()):
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and "data_plane" in said:
            return str(said["data_plane"]), str(said.get("reason") or "")
    return "", ""

"""For tests of the platform: makes workloads ready in the API server of `kubernetes_api`, as controllers do."""

from __future__ import annotations

from typing import Any

from tests.kubernetes_api import KubernetesApi, Object

SYSTEM = "lifl-system"


def add_nodes(api: KubernetesApi, *names: str) -> None:
    """Make nodes."""
    for name in names:
        api.put({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})


def enable_host_path(api: KubernetesApi, value: str = "enabled") -> None:
    """Set Knative's feature flag for hostPath volumes."""
    data = {"kubernetes.podspec-volumes-hostpath": value}
    metadata = {"name": "config-features", "namespace": "knative-serving"}
    api.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def run_workloads(api: KubernetesApi, *nodes: str) -> None:
    """Make `nodes`, and have every workload ready at once, a DaemonSet with a pod on each node."""
    add_nodes(api, *nodes)

    def reconcile(server: KubernetesApi, workload: Object) -> None:
        server.set_status(workload, ready_status(workload, len(nodes)))
        if workload["kind"] == "DaemonSet":
            for number, node in enumerate(nodes):
                put_pod(server, workload, f"{workload['metadata']['name']}-{number}", node)

    for kind in ("DaemonSet", "Deployment", "StatefulSet"):
        api.on(kind, reconcile)


def ready_status(workload: Object, nodes: int) -> Object:
    """The status of a workload whose pods are all ready."""
    generation = workload["metadata"]["generation"]
    if workload["kind"] == "DaemonSet":
        counts = dict.fromkeys(("desiredNumberScheduled", "numberReady", "updatedNumberScheduled"), nodes)
    else:
        counts = dict.fromkeys(("replicas", "readyReplicas", "updatedReplicas"), workload["spec"]["replicas"])
    return {"observedGeneration": generation, **counts}


def put_pod(
    api: KubernetesApi, workload: Object, name: str, node: str = "", status: dict[str, Any] | None = None
) -> Object:
    """A pod of `workload`, ready unless `status` says otherwise."""
    ready = {"conditions": [{"type": "Ready", "status": "True"}]}
    return api.put(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": workload["metadata"]["namespace"],
                "labels": dict(workload["spec"]["template"]["metadata"]["labels"]),
            },
            "spec": {"nodeName": node},
            "status": ready if status is None else status,
        }
    )

"""Whether a Deployment, DaemonSet or StatefulSet is ready, and what keeps its pods from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from lifl_knative.cluster import Cluster

Object = Mapping[str, Any]

_USUAL: Final = frozenset({"ContainerCreating", "PodInitializing"})
_HOPELESS: Final = frozenset(
    {
        "CreateContainerConfigError",
        "CreateContainerError",
        "ErrImageNeverPull",
        "ImagePullBackOff",
        "InvalidImageName",
    }
)
"""Reasons that waiting does not change: the kubelet has tried, and will fail again the same way."""
_MANY_RESTARTS: Final = 3
_LOG_LINES: Final = 5


@dataclass(frozen=True)
class Readiness:
    """How many pods of a workload there are."""

    ready: int
    wanted: int
    is_complete: bool
    """Whether all of them are there, ready, and of the newest version."""


@dataclass(frozen=True)
class Trouble:
    """Why a pod does not become ready."""

    text: str
    """A sentence, with the pod's name."""
    log: str = ""
    """The container's last lines."""
    is_hopeless: bool = False
    """Whether waiting is of no use."""


def readiness(workload: Object) -> Readiness:
    """What the status of a workload says; a status that is older than its spec counts as nothing ready."""
    status = workload.get("status") or {}
    is_current = status.get("observedGeneration", 0) >= workload["metadata"].get("generation", 0)
    if workload["kind"] == "DaemonSet":
        wanted = status.get("desiredNumberScheduled", 0)
        ready, updated = status.get("numberReady", 0), status.get("updatedNumberScheduled", 0)
        return Readiness(ready, wanted, is_current and wanted > 0 and ready >= wanted <= updated)
    wanted = workload["spec"].get("replicas", 1)
    ready, updated = status.get("readyReplicas", 0), status.get("updatedReplicas", 0)
    return Readiness(ready, wanted, is_current and ready >= wanted <= updated)


def find_trouble(cluster: Cluster, workload: Object) -> Trouble | None:
    """What keeps the pods of `workload` from being ready; None while nothing is known to be wrong."""
    namespace = workload["metadata"]["namespace"]
    labels = workload["spec"]["selector"]["matchLabels"]
    selector = ",".join(f"{name}={value}" for name, value in labels.items())
    pods = cluster.list("v1", "Pod", namespace, selector)
    for pod in pods:
        for trouble in _troubles_of(cluster, pod):
            return trouble
    if pods:
        return None
    status = workload.get("status") or {}
    if workload["kind"] == "DaemonSet" and status.get("observedGeneration") and not _wanted(status):
        return Trouble("no node takes its pods: all nodes are tainted, or none runs Linux")
    return _event_about(cluster, workload)


def _wanted(status: Object) -> int:
    return int(status.get("desiredNumberScheduled", 0))


def _troubles_of(cluster: Cluster, pod: Object) -> Iterator[Trouble]:
    status, name = pod.get("status") or {}, pod["metadata"]["name"]
    for condition in status.get("conditions", ()):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            yield Trouble(f"pod {name} finds no node: {condition.get('message') or condition.get('reason')}")
    for container in status.get("containerStatuses", ()):
        state = container.get("state") or {}
        waiting, ended = state.get("waiting") or {}, state.get("terminated") or {}
        reason = waiting.get("reason") or ended.get("reason") or ""
        if not reason or reason in _USUAL:
            continue
        restarts = container.get("restartCount", 0)
        before = (container.get("lastState") or {}).get("terminated") or ended
        said = waiting.get("message") or ended.get("message") or ""
        text = f"pod {name}, container {container['name']}: {reason}" + (f": {said}" if said else "")
        if before:
            why = before.get("reason", "")
            text += f" (ended with exit code {before.get('exitCode', '?')}"
            text += f", {why})" if why and why not in ("Error", reason) else ")"
        log = ""
        if restarts or ended:
            namespace = pod["metadata"]["namespace"]
            log = cluster.pod_log(
                namespace, name, container["name"], _LOG_LINES, previous=not ended and restarts > 0
            )
        yield Trouble(text, log.strip(), reason in _HOPELESS or restarts >= _MANY_RESTARTS)


def _event_about(cluster: Cluster, workload: Object) -> Trouble | None:
    """The newest warning about the workload itself: quotas and admission refuse pods before there is one."""
    metadata = workload["metadata"]
    warnings = [
        event
        for event in cluster.list("v1", "Event", metadata["namespace"])
        if event.get("type") == "Warning"
        # A Deployment's are about its ReplicaSet, whose name begins with its own.
        and (event.get("involvedObject") or {}).get("name", "").startswith(metadata["name"])
    ]
    if not warnings:
        return None
    newest = max(warnings, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    return Trouble(f"{newest.get('reason')}: {newest.get('message')}")

"""Names and fields of the objects that the autoscaler reads and writes, as Knative Serving has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

Object = dict[str, Any]
Key = tuple[str, str]
"""Namespace and name."""

CLASS: Final = "plan.autoscaling.lifl.dev"
AUTOSCALER: Final = ("autoscaling.internal.knative.dev/v1alpha1", "PodAutoscaler")
SERVERLESS_SERVICE: Final = ("networking.internal.knative.dev/v1alpha1", "ServerlessService")
DEPLOYMENT: Final = ("apps/v1", "Deployment")

SERVICE_LABEL: Final = "serving.knative.dev/service"
REVISION_LABEL: Final = "serving.knative.dev/revision"
FUNCTION_ANNOTATION: Final = "lifl.dev/function-name"
DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
"""Annotation of a pod: of those that may end, the ones with the lowest number do (Kubernetes 1.22 and later)."""

_AUTOSCALING: Final = "autoscaling.knative.dev/"
_CLASS: Final = f"{_AUTOSCALING}class"
_METRIC: Final = f"{_AUTOSCALING}metric"
_PROGRESS_DEADLINE: Final = "serving.knative.dev/progress-deadline"
_DEFAULT_PROGRESS_SECONDS: Final = 600.0
_UNITS: Final = {"ms": 0.001, "h": 3600.0, "m": 60.0, "s": 1.0}
_LABELS: Final = {"app.kubernetes.io/part-of": "lifl", "app.kubernetes.io/managed-by": "lifl-func"}


def key_of(obj: Mapping[str, Any]) -> Key:
    """What tells an object from all others of its kind."""
    metadata = obj["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def annotations_of(obj: Mapping[str, Any]) -> Mapping[str, str]:
    """Its annotations."""
    found: Mapping[str, str] = obj["metadata"].get("annotations") or {}
    return found


def labels_of(obj: Mapping[str, Any]) -> Mapping[str, str]:
    """Its labels."""
    found: Mapping[str, str] = obj["metadata"].get("labels") or {}
    return found


def status_of(obj: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Its status; empty if nobody has written one."""
    found: Mapping[str, Any] = (obj or {}).get("status") or {}
    return found


def is_ours(autoscaler: Mapping[str, Any]) -> bool:
    """Whether a PodAutoscaler is of our class, and is to stay."""
    is_going = "deletionTimestamp" in autoscaler["metadata"]
    return annotations_of(autoscaler).get(_CLASS) == CLASS and not is_going


def function_of(autoscaler: Mapping[str, Any]) -> str:
    """The function that a PodAutoscaler's pods run: as jobs name it."""
    return annotations_of(autoscaler).get(FUNCTION_ANNOTATION) or service_of(autoscaler)


def service_of(autoscaler: Mapping[str, Any]) -> str:
    """The Knative Service that it belongs to; its own name if there is none."""
    return labels_of(autoscaler).get(SERVICE_LABEL) or str(autoscaler["metadata"]["name"])


def is_reachable(autoscaler: Mapping[str, Any]) -> bool:
    """Whether a route leads to its revision, or may do so soon."""
    return bool(autoscaler["spec"].get("reachability") != "Unreachable")


def target_key(autoscaler: Mapping[str, Any]) -> Key:
    """Its Deployment."""
    return autoscaler["metadata"].get("namespace", ""), autoscaler["spec"]["scaleTargetRef"]["name"]


def scale_annotation(autoscaler: Mapping[str, Any], kebab: str, camel: str) -> int | None:
    """`min-scale` and the like, in either of the spellings that Knative reads; None if absent or no number."""
    annotations = annotations_of(autoscaler)
    text = annotations.get(_AUTOSCALING + kebab, annotations.get(_AUTOSCALING + camel, ""))
    return int(text) if text.isascii() and text.isdigit() else None


def progress_seconds(autoscaler: Mapping[str, Any]) -> float:
    """How long its pods may take to be ready the first time."""
    return parse_duration(annotations_of(autoscaler).get(_PROGRESS_DEADLINE, "")) or _DEFAULT_PROGRESS_SECONDS


def parse_duration(text: str) -> float:
    """Seconds of a duration such as `1m30s`; 0 for what is none."""
    seconds, rest = 0.0, text
    while rest:
        digits = len(rest) - len(rest.lstrip("0123456789."))
        unit = next((unit for unit in _UNITS if rest[digits:].startswith(unit)), None)
        try:
            seconds += float(rest[:digits]) * _UNITS[unit or ""]
        except (ValueError, KeyError):
            return 0.0
        assert unit is not None
        rest = rest[digits + len(unit) :]
    return seconds


def replicas_of(deployment: Mapping[str, Any]) -> int:
    """Pods that a Deployment is to have."""
    replicas = deployment["spec"].get("replicas")
    return 1 if replicas is None else int(replicas)


def ready_of(deployment: Mapping[str, Any] | None) -> int:
    """Pods of a Deployment that are ready."""
    return int(status_of(deployment).get("readyReplicas") or 0)


def is_controlled_by(obj: Mapping[str, Any], owner: Mapping[str, Any]) -> bool:
    """Whether `owner` is the one that made an object."""
    owners = obj["metadata"].get("ownerReferences") or ()
    return any(o.get("controller") and o.get("uid") == owner["metadata"]["uid"] for o in owners)


def make_serverless_service(autoscaler: Mapping[str, Any], mode: str) -> Object:
    """The ServerlessService of a PodAutoscaler, which every autoscaler class has to make."""
    metadata = autoscaler["metadata"]
    owner = {
        "apiVersion": AUTOSCALER[0],
        "kind": AUTOSCALER[1],
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    spec = autoscaler["spec"]
    return {
        "apiVersion": SERVERLESS_SERVICE[0],
        "kind": SERVERLESS_SERVICE[1],
        "metadata": {
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "labels": {**labels_of(autoscaler), **_LABELS},
            "annotations": {n: value for n, value in annotations_of(autoscaler).items() if n != _METRIC},
            "ownerReferences": [owner],
        },
        # Without numActivators Knative uses all activators, as for its own class that scales by CPU.
        "spec": {"mode": mode, "objectRef": spec["scaleTargetRef"], "protocolType": spec["protocolType"]},
    }


def differs(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether what we write into an object's spec is not there."""
    spec = found.get("spec") or {}
    return any(spec.get(name) != value for name, value in wanted["spec"].items())


def deletion_costs(pods: list[Object], keep: frozenset[str]) -> Iterator[tuple[Object, str]]:
    """Pods whose deletion cost is to be changed, so that those on the nodes `keep` are the last to end."""
    for pod in pods:
        is_kept = pod.get("spec", {}).get("nodeName") in keep
        wanted, found = ("100" if is_kept else "0"), annotations_of(pod).get(DELETION_COST, "0")
        if wanted != found:
            yield pod, wanted

"""The Knative Service of a function, made of what func.yaml says.

The same input makes the same object: names of volumes come from what they mount, and nothing holds a time or a
random value, so that an unchanged deployment makes no new revision. Nothing here asks a cluster.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lifl.func_yaml.config import ANNOTATION_PREFIX, ROUTE_ANNOTATION, Env, FunctionConfig, Volume
from lifl.func_yaml.expressions import (
    ConfigMapReference,
    LocalVariable,
    SecretReference,
    evaluate,
    evaluate_labels,
)

API_VERSION = "serving.knative.dev/v1"
AGENT_DIRECTORY = "/run/lifl"
AUTOSCALER_CLASS = "plan.autoscaling.lifl.dev"
"""The coordinator's plan sets the number of pods, not requests in progress."""
AUTOSCALING = "autoscaling.knative.dev/"
NAME_LABEL = "function.knative.dev/name"
FUNCTION_NAME_ANNOTATION = "lifl.dev/function-name"
"""Of a revision, and so of its PodAutoscaler: by which name the coordinator's plan knows the function."""
FUNCTION_USER = 65532
_CONTENT_ANNOTATION = "lifl.dev/image-content"
PORT = 8080

Route = Literal["lifl", "broker"]
Object = dict[str, Any]

_MOST_LABEL = 63


@dataclass(frozen=True)
class Deployment:
    """A function as it is to be deployed."""

    config: FunctionConfig
    """func.yaml, with what the command line said instead."""
    image: str
    namespace: str
    route: Route = "lifl"
    function: str = ""
    """The name by which jobs call the function; empty: that of its file."""
    image_content: str = ""
    """Tells one content of `image` from another where it is not pinned: another one makes a new revision."""
    is_plan_scaled: bool = False
    """Whether the coordinator's plan sets the scale; else Knative's own autoscaler does."""
    least_pods: int | None = None
    """`min-scale` where func.yaml says none; None: Knative's default, 0."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Where `{{ env:NAME }}` is looked up."""

    @property
    def name(self) -> str:
        """The function's, hence the Service's."""
        return self.config.name or ""


def make_service(deployment: Deployment) -> Object:
    """The Service. Raises InvalidInput if a `{{ env:NAME }}` cannot be had, or is no value for a label."""
    labels = make_labels(deployment)
    own, revision = _annotations(deployment)
    return {
        "apiVersion": API_VERSION,
        "kind": "Service",
        "metadata": {
            "name": deployment.name,
            "namespace": deployment.namespace,
            "labels": labels,
            "annotations": own,
        },
        "spec": {
            "template": {"metadata": {"labels": dict(labels), "annotations": revision}, "spec": _pod(deployment)}
        },
    }


def make_labels(deployment: Deployment) -> dict[str, str]:
    """Labels of every object of the function; the user's own cannot replace those by which we find them."""
    config = deployment.config
    domain = {"func.domain": config.domain} if config.domain else {}
    return {
        **evaluate_labels(config.deploy.labels, deployment.environment),
        "app.kubernetes.io/name": deployment.name,
        "app.kubernetes.io/part-of": "lifl",
        "app.kubernetes.io/managed-by": "lifl-func",
        NAME_LABEL: deployment.name,
        "function.knative.dev/runtime": config.runtime or "python",
        "boson.dev/function": "true",
        **domain,
    }


def _annotations(deployment: Deployment) -> tuple[dict[str, str], dict[str, str]]:
    """Those of the Service, and those of its revisions, where alone Knative takes settings of autoscaling."""
    given = deployment.config.deploy.annotations
    shared = {key: value for key, value in given.items() if not key.startswith((AUTOSCALING, ANNOTATION_PREFIX))}
    ours = {key: value for key, value in given.items() if key.startswith(ANNOTATION_PREFIX)}
    scaling = {key: value for key, value in given.items() if key.startswith(AUTOSCALING)}
    content = {_CONTENT_ANNOTATION: deployment.image_content} if deployment.image_content else {}
    named = {FUNCTION_NAME_ANNOTATION: deployment.function} if deployment.function else {}
    shared["function.knative.dev/deployer"] = "knative"
    return (
        {**shared, **ours, ROUTE_ANNOTATION: deployment.route},
        {**shared, ROUTE_ANNOTATION: deployment.route, **named, **content, **_scaling(deployment), **scaling},
    )


def _scaling(deployment: Deployment) -> dict[str, str]:
    scale = deployment.config.deploy.options.scale
    values = {
        "class": AUTOSCALER_CLASS if deployment.is_plan_scaled else None,
        "min-scale": deployment.least_pods if scale.min is None else scale.min,
        "max-scale": scale.max,
        "metric": scale.metric,
        "target": scale.target,
        "target-utilization-percentage": scale.utilization,
    }
    return {f"{AUTOSCALING}{name}": _number(value) for name, value in values.items() if value is not None}


def _number(value: float | str) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _pod(deployment: Deployment) -> Object:
    config, deploy = deployment.config, deployment.config.deploy
    volumes, mounts = _volumes(config.run.volumes)
    if deployment.route == "lifl":
        # The directory, not the socket in it, so that a restarted agent is seen.
        volumes.append({"name": "lifl-agent", "hostPath": {"path": AGENT_DIRECTORY, "type": "Directory"}})
        mounts.append({"name": "lifl-agent", "mountPath": AGENT_DIRECTORY, "readOnly": True})
    pod: Object = {"containers": [_container(deployment, mounts)]}
    if volumes:
        pod["volumes"] = volumes
    if deploy.service_account_name:
        pod["serviceAccountName"] = deploy.service_account_name
    else:
        pod["automountServiceAccountToken"] = False  # aggregating needs nothing of the cluster's API
    if deploy.image_pull_secret:
        pod["imagePullSecrets"] = [{"name": deploy.image_pull_secret}]
    concurrency = deploy.options.resources.limits.concurrency
    if concurrency is not None:
        pod["containerConcurrency"] = concurrency
    return pod


def _container(deployment: Deployment, mounts: list[Object]) -> Object:
    health = deployment.config.deploy.health_endpoints
    variables, sources = _environment(deployment)
    container: Object = {
        "image": deployment.image,
        "livenessProbe": _probe(health.liveness or "/health/liveness"),
        "readinessProbe": _probe(health.readiness or "/health/readiness"),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": FUNCTION_USER,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    optional = {
        "env": variables,
        "envFrom": sources,
        "volumeMounts": mounts,
        "resources": _resources(deployment.config),
    }
    return container | {name: value for name, value in optional.items() if value}


def _probe(path: str) -> Object:
    # Without a period Knative's queue-proxy probes many times a second while a pod starts.
    return {"httpGet": {"path": path, "port": PORT}}


def _environment(deployment: Deployment) -> tuple[list[Object], list[Object]]:
    """`env` and `envFrom`."""
    variables: list[Object] = []
    sources: list[Object] = []
    for env in deployment.config.run.envs:
        if env.name is None:
            sources.append(_all_keys(env))
        else:
            variables.append(_variable(env, deployment.environment))
    ours = {"LIFL_AGENT_DIRECTORY": AGENT_DIRECTORY} if deployment.route == "lifl" else {}
    if deployment.function:
        ours["LIFL_FUNCTION_NAME"] = deployment.function
    given = {variable["name"] for variable in variables}
    variables += [{"name": name, "value": value} for name, value in ours.items() if name not in given]
    return variables, sources


def _variable(env: Env, environment: Mapping[str, str]) -> Object:
    match env.source:
        case SecretReference(name, key):
            return {"name": env.name, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}
        case ConfigMapReference(name, key):
            return {"name": env.name, "valueFrom": {"configMapKeyRef": {"name": name, "key": key}}}
        case LocalVariable():
            return {"name": env.name, "value": evaluate(env.value or "", environment)}
        case _:
            return {"name": env.name, "value": env.value or ""}


def _all_keys(env: Env) -> Object:
    source = env.source
    if isinstance(source, SecretReference):
        return {"secretRef": {"name": source.secret}}
    assert isinstance(source, ConfigMapReference)
    return {"configMapRef": {"name": source.config_map}}


def _volumes(given: Sequence[Volume]) -> tuple[list[Object], list[Object]]:
    """`volumes` and `volumeMounts`; what is mounted at two paths is one volume."""
    volumes: dict[str, Object] = {}
    mounts: list[Object] = []
    for volume in given:
        name, source, is_read_only = _volume_source(volume)
        volumes[name] = {"name": name, **source}
        mount: Object = {"name": name, "mountPath": volume.path}
        mounts.append(mount | ({"readOnly": True} if is_read_only else {}))
    return list(volumes.values()), mounts


def _volume_source(volume: Volume) -> tuple[str, Object, bool]:
    """Name, source, and whether it is mounted for reading only; Knative asks that of Secrets and ConfigMaps."""
    if volume.secret is not None:
        return _volume_name("secret", volume.secret), {"secret": {"secretName": volume.secret}}, True
    if volume.config_map is not None:
        return _volume_name("config-map", volume.config_map), {"configMap": {"name": volume.config_map}}, True
    claim = volume.persistent_volume_claim
    if claim is not None:
        source = {"claimName": claim.claim_name} | ({"readOnly": True} if claim.read_only else {})
        kind = "pvc-read-only" if claim.read_only else "pvc"
        return _volume_name(kind, claim.claim_name or ""), {"persistentVolumeClaim": source}, claim.read_only
    assert volume.empty_dir is not None
    directory = {"medium": volume.empty_dir.medium, "sizeLimit": volume.empty_dir.size_limit}
    given = {name: value for name, value in directory.items() if value}
    return _volume_name("empty-dir", volume.path or ""), {"emptyDir": given}, False


def _volume_name(kind: str, identity: str) -> str:
    """A DNS label that says what the volume is, and is the same in each deployment."""
    slug = re.sub(r"[^a-z0-9]+", "-", identity.lower()).strip("-")
    name = f"{kind}-{slug}"
    if slug == identity.strip("/") and len(name) <= _MOST_LABEL:
        return name
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{name[: _MOST_LABEL - 9].rstrip('-')}-{digest}"


def _resources(config: FunctionConfig) -> Object:
    resources = config.deploy.options.resources
    requests = {"cpu": resources.requests.cpu, "memory": resources.requests.memory}
    limits = {"cpu": resources.limits.cpu, "memory": resources.limits.memory}
    found: Object = {}
    for name, values in (("requests", requests), ("limits", limits)):
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            found[name] = given
    return found

"""What has to hold in the cluster before a function is deployed; everything that does not is told at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lifl.cli.common import CommandError, note, program

from lifl_knative import features
from lifl_knative.api_errors import Forbidden, Request, missing_kind
from lifl_knative.cluster import Cluster
from lifl_knative.references import missing_references
from lifl_knative.rules import broken_rules
from lifl_knative.service import API_VERSION as SERVING
from lifl_knative.service import Deployment, make_service
from lifl_knative.triggers import API_VERSION as EVENTING
from lifl_knative.triggers import BROKER, BROKER_CLASS, CLASS_ANNOTATION, subscriptions_of

PLATFORM_NAMESPACE = "lifl-system"
_NODE, _AUTOSCALER = "lifl-node", "lifl-autoscaler"
_POD_SECURITY = "pod-security.kubernetes.io/enforce"


@dataclass(frozen=True)
class Platform:
    """What of LIFL's platform is in a cluster."""

    nodes: int | None
    """How many nodes run its agent; None if it is not installed."""
    has_autoscaler: bool


def find_platform(cluster: Cluster) -> Platform:
    """Look at the platform. Who may not look at its namespace is told so, and gets what works without it."""
    try:
        node = cluster.get("apps/v1", "DaemonSet", _NODE, PLATFORM_NAMESPACE)
        autoscaler = cluster.get("apps/v1", "Deployment", _AUTOSCALER, PLATFORM_NAMESPACE)
    except Forbidden:
        note(f"Warning: the platform in namespace {PLATFORM_NAMESPACE} is not checked: there is no permission to")
        return Platform(1, False)
    nodes = (node.get("status") or {}).get("desiredNumberScheduled", 0) if node else None
    available = (autoscaler or {}).get("status", {}).get("availableReplicas", 0)
    return Platform(nodes, available > 0)


def choose_scaling(deployment: Deployment, platform: Platform) -> Deployment:
    """`deployment`, scaled by the coordinator's plan if its autoscaler runs; else by Knative's, which is said."""
    if deployment.route == "broker":
        return deployment
    if platform.has_autoscaler:
        return replace(deployment, is_plan_scaled=True)
    # Updates that come through the agent are no requests, by which Knative's autoscaler would keep a pod.
    least = max(1, platform.nodes or 1)
    said = deployment.config.deploy.options.scale.min
    note(
        f"Warning: {_AUTOSCALER} is not available in namespace {PLATFORM_NAMESPACE}, so Knative's own autoscaler "
        f"(KPA) scales the function: min-scale {least if said is None else said}, whatever the coordinator plans"
    )
    return replace(deployment, least_pods=least)


def check(cluster: Cluster, deployment: Deployment, platform: Platform, done: str) -> None:
    """Raise CommandError with everything that keeps `deployment` from being accepted, and what helps.

    `done` is a sentence on what was changed in the cluster until now.
    """
    _check_kinds(cluster, deployment)
    problems: list[str] = []
    hints: list[tuple[str, str]] = []
    if deployment.route == "lifl":
        _check_platform(platform, problems, hints)
        _check_pod_security(cluster, deployment, problems, hints)
    else:
        _check_broker(cluster, deployment, problems, hints)
    missing = missing_references(cluster, deployment)
    if missing:
        problems += missing
        hints.append(
            (f"{cluster.kubectl} get secrets,configmaps,pvc,sa -n {deployment.namespace}", "what there is")
        )
    for broken in broken_rules(make_service(deployment), _feature_flags(cluster)):
        problems.append(broken.text)
        if broken.flag:
            hints.append(
                (features.flag_command(broken.flag, cluster.kubectl), "as an administrator of the cluster")
            )
            if broken.flag == features.HOST_PATH and deployment.route == "lifl":
                hints.append((f"{program()} deploy --route broker", "without it: events through a broker"))
    if problems:
        lines = "".join(f"\n\t{problem}" for problem in problems)
        raise CommandError(
            f"function '{deployment.name}' cannot be deployed to namespace '{deployment.namespace}' of context "
            f"'{cluster.context}':{lines}\n{done}",
            list(dict.fromkeys(hints)),
        )


def _check_kinds(cluster: Cluster, deployment: Deployment) -> None:
    needed = [(SERVING, "Service", "services")]
    if subscriptions_of(deployment):
        needed.append((EVENTING, "Trigger", "triggers"))
    for api_version, kind, plural in needed:
        if not cluster.has(api_version, kind):
            group = api_version.partition("/")[0]
            raise missing_kind(
                Request("get", group, plural, kind, context=cluster.context, kubectl=cluster.kubectl)
            )


def _check_platform(platform: Platform, problems: list[str], hints: list[tuple[str, str]]) -> None:
    if platform.nodes is None:
        problems.append(f"LIFL's platform is not installed: there is no {_NODE} in namespace {PLATFORM_NAMESPACE}")
        hints.append((f"{program()} deploy --install-platform", "install it, then deploy"))
        hints.append((f"{program()} deploy --route broker", "without it: events through a broker"))
    elif platform.nodes == 0:
        problems.append(f"LIFL's agent runs on no node: {_NODE} in namespace {PLATFORM_NAMESPACE} has no pods")
        hints.append((f"{program()} platform status", "why"))


def _check_pod_security(
    cluster: Cluster, deployment: Deployment, problems: list[str], hints: list[tuple[str, str]]
) -> None:
    try:
        namespace = cluster.get("v1", "Namespace", deployment.namespace)
    except Forbidden:
        return
    level = ((namespace or {}).get("metadata", {}).get("labels") or {}).get(_POD_SECURITY)
    if level in ("baseline", "restricted"):
        problems.append(
            f"namespace '{deployment.namespace}' enforces the Pod Security level '{level}', which admits no pod "
            "with the hostPath of LIFL's agent"
        )
        hints.append(
            (
                f"{cluster.kubectl} label namespace {deployment.namespace} {_POD_SECURITY}=privileged --overwrite",
                "admit it",
            )
        )


def _check_broker(
    cluster: Cluster, deployment: Deployment, problems: list[str], hints: list[tuple[str, str]]
) -> None:
    broker = cluster.get(EVENTING, "Broker", BROKER, deployment.namespace)
    found = ((broker or {}).get("metadata", {}).get("annotations") or {}).get(CLASS_ANNOTATION, "")
    if broker is not None and found != BROKER_CLASS:
        problems.append(
            f"the Broker '{BROKER}' of namespace '{deployment.namespace}' is a '{found}', not a {BROKER_CLASS}, "
            "and no Broker changes its class"
        )
        hints.append((f"{program()} deploy --route broker -n NAMESPACE", "deploy where there is none yet"))


def _feature_flags(cluster: Cluster) -> Mapping[str, str] | None:
    try:
        found = cluster.get("v1", "ConfigMap", features.CONFIG_MAP, features.NAMESPACE)
    except Forbidden:
        note("Warning: Knative's feature flags are not checked: there is no permission to read config-features")
        return None
    return dict((found or {}).get("data") or {})

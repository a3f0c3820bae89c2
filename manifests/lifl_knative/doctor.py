"""What a cluster can do for LIFL, for `func doctor --cluster`: looks only, changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from lifl.cli.common import CommandError, program
from lifl.doctor import Check

from lifl_knative import features
from lifl_knative.api_errors import ClusterError, Forbidden
from lifl_knative.cluster import Cluster
from lifl_knative.platform_manifests import NAMESPACE
from lifl_knative.platform_status import describe

_OLDEST_KUBERNETES: Final = (1, 30)
_VERSION_LABEL: Final = "app.kubernetes.io/version"
_LEVEL_LABEL: Final = "pod-security.kubernetes.io/enforce"

_PERMISSIONS: Final = (
    ("deploy functions", "serving.knative.dev", "services", ("create", "patch", "delete", "get")),
    ("subscribe functions", "eventing.knative.dev", "triggers", ("create", "patch", "delete")),
    ("see why a function fails", "", "pods", ("list",)),
    ("read logs", "", "pods/log", ("get",)),
)
"""(what for, API group, resource, verbs) in the namespace of functions."""


def examine_cluster(kubeconfig: Path | None, context: str | None, namespace: str | None) -> list[Check]:
    """Look at a cluster, in the order in which it is worth reading; functions are to be in `namespace`."""
    try:
        with Cluster.connect(kubeconfig, context, namespace) as cluster:
            version = cluster.server_version()
            return [_cluster(cluster, version), *_look(cluster)]
    except CommandError as error:
        hint = "; ".join(f"{command} ({comment})" for command, comment in error.hints)
        return [Check("cluster", "missing", str(error), hint, needed=True)]


def _look(cluster: Cluster) -> Iterator[Check]:
    for look in (_serving, _eventing, _flags, _pod_security, _permissions, _platform):
        try:
            yield from look(cluster)
        except ClusterError as error:
            name = look.__name__.strip("_").replace("_", " ")
            hint = "; ".join(command for command, _ in error.hints[:1])
            yield Check(name, "warn", f"could not be examined: {error}", hint)


def _cluster(cluster: Cluster, version: str) -> Check:
    value = f'{cluster.server} (context "{cluster.context}"), Kubernetes {version}'
    numbers = tuple(int(part) for part in version.lstrip("v").split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < _OLDEST_KUBERNETES:
        wanted = ".".join(map(str, _OLDEST_KUBERNETES))
        return Check(
            "cluster", "warn", value, f"older than {wanted}, the oldest that the manifests are checked with"
        )
    return Check("cluster", "ok", value)


def _serving(cluster: Cluster) -> Iterator[Check]:
    name = "Knative Serving"
    if not cluster.has("serving.knative.dev/v1", "Service"):
        hint = "functions are Knative Services: install Serving, see https://knative.dev/docs/install"
        yield Check(name, "missing", "not installed", hint, needed=True)
        return
    yield Check(name, "ok", _release(cluster, "knative-serving", "controller"))


def _eventing(cluster: Cluster) -> Iterator[Check]:
    name = "Knative Eventing"
    if not cluster.has("eventing.knative.dev/v1", "Trigger"):
        hint = "only subscriptions and --route broker need it; see https://knative.dev/docs/install"
        yield Check(name, "warn", "not installed", hint)
        return
    yield Check(name, "ok", _release(cluster, "knative-eventing", "eventing-controller"))


def _release(cluster: Cluster, namespace: str, controller: str) -> str:
    """Version as the controller's Deployment is labelled; users often may not read it."""
    try:
        found = cluster.get("apps/v1", "Deployment", controller, namespace)
    except Forbidden:
        found = None
    version = (found or {}).get("metadata", {}).get("labels", {}).get(_VERSION_LABEL, "")
    return f"version {version}" if version else "installed, version unknown"


def _flags(cluster: Cluster) -> Iterator[Check]:
    if not cluster.has("serving.knative.dev/v1", "Service"):
        return
    name, flag = "feature flags", features.HOST_PATH
    try:
        found = cluster.get("v1", "ConfigMap", features.CONFIG_MAP, features.NAMESPACE)
    except Forbidden:
        yield Check(name, "warn", "may not be read", f"'func deploy' tells if {flag} is not enabled")
        return
    value = str(((found or {}).get("data") or {}).get(flag, "disabled")).lower()
    if value == "enabled":
        yield Check(name, "ok", f"{flag}: enabled")
    else:
        hint = f"functions reach their node's agent by a hostPath: {features.flag_command(flag, cluster.kubectl)}"
        yield Check(name, "missing", f"{flag}: {value}", hint, needed=True)


def _pod_security(cluster: Cluster) -> Iterator[Check]:
    for namespace in dict.fromkeys((cluster.namespace, NAMESPACE)):
        name = f"namespace {namespace}"
        found = cluster.get("v1", "Namespace", namespace)
        if found is None:
            if namespace != NAMESPACE:  # that one is made by `func platform install`
                hint = f"{cluster.kubectl} create namespace {namespace}"
                yield Check(name, "missing", "does not exist", hint, needed=True)
            continue
        level = found["metadata"].get("labels", {}).get(_LEVEL_LABEL, "")
        if level in ("baseline", "restricted"):
            hint = (
                "this level refuses the hostPath of functions with --route lifl: "
                f"{cluster.kubectl} label namespace {namespace} {_LEVEL_LABEL}=privileged --overwrite"
            )
            yield Check(name, "missing", f"Pod Security level {level}", hint, needed=True)
        else:
            said = f"Pod Security level {level}" if level else "no Pod Security level of its own"
            yield Check(name, "ok", said)


def _permissions(cluster: Cluster) -> Iterator[Check]:
    for purpose, group, resource, verbs in _PERMISSIONS:
        lacking = [verb for verb in verbs if not _may(cluster, group, resource, verb)]
        qualified = resource if not group else f"{resource}.{group}"
        if lacking:
            hint = (
                f"ask for the ClusterRole lifl-functions, or edit, in namespace {cluster.namespace}; "
                f"{cluster.kubectl} auth can-i {lacking[0]} {qualified} -n {cluster.namespace}"
            )
            is_needed = group != "eventing.knative.dev"
            status: Any = "missing" if is_needed else "warn"
            yield Check(f"may {purpose}", status, f"not {', '.join(lacking)} {qualified}", hint, needed=is_needed)
        else:
            yield Check(f"may {purpose}", "ok", f"{', '.join(verbs)} {qualified}")


def _may(cluster: Cluster, group: str, resource: str, verb: str) -> bool:
    plural, _, subresource = resource.partition("/")
    attributes = {"namespace": cluster.namespace, "verb": verb, "group": group, "resource": plural}
    if subresource:
        attributes["subresource"] = subresource
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "metadata": {},
        "spec": {"resourceAttributes": attributes},
    }
    answer: Mapping[str, Any] = cluster.create(review)
    return bool((answer.get("status") or {}).get("allowed"))


def _platform(cluster: Cluster) -> Iterator[Check]:
    found = [entry for entry in describe(cluster) if entry["namespace"] == NAMESPACE]
    if not found:
        yield Check("platform", "missing", "not installed", f"{program()} platform install", needed=True)
        return
    status = found[0]
    value = f"overlay {status['overlay']}, version {status['version']}"
    wrong = [f"{obj['kind']} {obj['name']}" for obj in status["objects"] if not _is_well(obj)]
    if wrong:
        hint = f"{program()} platform status, then {program()} platform install"
        yield Check("platform", "missing", f"{value}; missing or not ready: {', '.join(wrong)}", hint, needed=True)
    else:
        yield Check("platform", "ok", value)
    for node in status["nodes"]:
        yield _node(node)


def _is_well(obj: Mapping[str, Any]) -> bool:
    return bool(obj["present"] and obj.get("complete", True))


def _node(node: Mapping[str, Any]) -> Check:
    name = f"node {node['node'] or node['pod']}"
    if not node["ready"]:
        return Check(name, "warn", "not ready", f"{program()} platform status")
    if node["data_plane"] == "unix":
        return Check(name, "warn", "routes over UNIX sockets", f"no eBPF there: {node['reason']}")
    return Check(name, "ok", f"data plane {node['data_plane'] or 'unknown'}")

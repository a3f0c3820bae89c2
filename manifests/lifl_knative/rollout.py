"""Applying a function's objects, and waiting until the new revision serves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from lifl.cli.common import CommandError, note, program

from lifl_knative.api_errors import ClusterError, Forbidden
from lifl_knative.cluster import Cluster
from lifl_knative.service import API_VERSION as SERVING
from lifl_knative.service import Deployment, Object, make_service
from lifl_knative.triggers import API_VERSION as EVENTING
from lifl_knative.triggers import BROKER, make_broker, make_triggers, trigger_selector
from lifl_knative.workloads import Trouble, find_trouble

ERROR_WINDOW_S = 2.0
"""A Service that is not ready for so long has failed; for less, its parts only appear one after the other."""
_LOOK_S = 2.0
"""How often pods are looked at while the Service is watched."""
_LOG_LINES = 20


@dataclass
class Rollout:
    """What of a deployment has reached the cluster."""

    service: Object = field(default_factory=dict)
    """The Service as it was answered."""
    is_new: bool = False
    is_changed: bool = True
    """Whether the Service is not what it was before."""
    applied: list[str] = field(default_factory=list)
    """Names such as `Trigger fedavg-trigger-1a2b3c4d`."""
    deleted: list[str] = field(default_factory=list)


def manifests(deployment: Deployment) -> list[Object]:
    """All objects of `deployment`, in the order in which they are applied."""
    brokers = [make_broker(deployment)] if deployment.route == "broker" else []
    return [make_service(deployment), *brokers, *make_triggers(deployment)]


def apply_all(cluster: Cluster, deployment: Deployment, *, force: bool = False) -> Rollout:
    """Apply the Service, the Broker if there is none, and the Triggers; delete Triggers that are no longer wanted.

    If one is refused, the error says what is in the cluster already.
    """
    rollout = Rollout()
    try:
        before = cluster.get(SERVING, "Service", deployment.name, deployment.namespace)
        rollout.service = cluster.apply(make_service(deployment), force=force)
        rollout.is_new = before is None
        rollout.is_changed = before is None or _generation(before) != _generation(rollout.service)
        rollout.applied.append(f"Service {deployment.name}")
        _apply_broker(cluster, deployment, rollout, force=force)
        triggers = make_triggers(deployment, rollout.service)
        for trigger in triggers:
            cluster.apply(trigger, force=force)
            rollout.applied.append(_named(trigger))
        _prune(cluster, deployment, {trigger["metadata"]["name"] for trigger in triggers}, rollout)
    except ClusterError as error:
        if not rollout.applied:
            raise
        done = ", ".join(rollout.applied)
        hints = [*error.hints, (f"{program()} deploy", "the same again goes on from there")]
        raise CommandError(
            f"{error}\nThe function is deployed in part: {done} in namespace '{deployment.namespace}' "
            f"{'is' if len(rollout.applied) == 1 else 'are'} applied, the rest is not.",
            hints,
        ) from None
    return rollout


def _generation(obj: Mapping[str, Object]) -> int:
    return int(obj["metadata"].get("generation", 0))


def _named(obj: Object) -> str:
    return f"{obj['kind']} {obj['metadata']['name']}"


def has_broker(cluster: Cluster, deployment: Deployment) -> bool:
    """Whether the function's namespace has the Broker already."""
    return cluster.get(EVENTING, "Broker", BROKER, deployment.namespace) is not None


def _apply_broker(cluster: Cluster, deployment: Deployment, rollout: Rollout, *, force: bool) -> None:
    if deployment.route != "broker" or has_broker(cluster, deployment):
        return
    cluster.apply(make_broker(deployment), force=force)
    rollout.applied.append(f"Broker {BROKER}")


def _prune(cluster: Cluster, deployment: Deployment, wanted: set[str], rollout: Rollout) -> None:
    """Delete our Triggers of former subscriptions."""
    if not cluster.has(EVENTING, "Trigger"):
        return
    try:
        found = cluster.list(EVENTING, "Trigger", deployment.namespace, trigger_selector(deployment.name))
    except Forbidden:
        if wanted:
            raise
        return  # a user of no Triggers needs no permission for them
    for trigger in found:
        if trigger["metadata"]["name"] not in wanted:
            cluster.delete(EVENTING, "Trigger", trigger["metadata"]["name"], deployment.namespace)
            rollout.deleted.append(_named(trigger))


# --- waiting -------------------------------------------------------------------------------------------------


def wait_until_ready(cluster: Cluster, service: Object, timeout_s: float) -> Object:
    """The Service when it is ready. Raises CommandError with the cause if that is hopeless, or takes too long.

    Ready counts for the generation that was applied; not ready only if it stays so for `ERROR_WINDOW_S`.
    """
    try:
        return _wait(cluster, service, timeout_s)
    except ClusterError as error:
        name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
        raise CommandError(
            f"'{name}' is applied in namespace '{namespace}', but nobody can tell whether it is ready: {error}",
            error.hints,
        ) from None


def _wait(cluster: Cluster, service: Object, timeout_s: float) -> Object:
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    generation = _generation(service)
    deadline = time.monotonic() + timeout_s
    bad_since: float | None = None
    latest: Object = service
    while (now := time.monotonic()) < deadline:
        for event in cluster.watch(SERVING, "Service", namespace, name, seconds=min(_LOOK_S, deadline - now)):
            if event["type"] == "DELETED":
                raise CommandError(f'Service "{name}" was deleted by somebody else while we waited for it')
            latest = event["object"]
            if is_ready(latest, generation):
                return latest
            if not _has_failed(latest, generation):
                bad_since = None
            elif bad_since is None:
                bad_since = time.monotonic()
        if bad_since is not None and time.monotonic() - bad_since >= ERROR_WINDOW_S:
            raise _failure(cluster, latest, None)
        trouble = _trouble(cluster, latest)
        if trouble is not None and trouble.is_hopeless and _observed(latest, generation):
            raise _failure(cluster, latest, None)
    raise _failure(cluster, latest, timeout_s)


def is_ready(service: Object, generation: int | None = None) -> bool:
    """Whether a Service is ready, as of `generation` (default: its own)."""
    return _observed(service, generation) and condition(service, "Ready").get("status") == "True"


def condition(obj: Object, kind: str) -> Object:
    """A condition of an object's status; empty if it has none of that kind."""
    conditions = (obj.get("status") or {}).get("conditions") or ()
    return next((dict(found) for found in conditions if found.get("type") == kind), {})


def _observed(service: Object, generation: int | None) -> bool:
    wanted = _generation(service) if generation is None else generation
    return int((service.get("status") or {}).get("observedGeneration", 0)) >= wanted


def _has_failed(service: Object, generation: int) -> bool:
    return _observed(service, generation) and condition(service, "Ready").get("status") == "False"


def _latest_revision(service: Object) -> str:
    return str((service.get("status") or {}).get("latestCreatedRevisionName", ""))


def _trouble(cluster: Cluster, service: Object) -> Trouble | None:
    """What is wrong with the pods of the newest revision."""
    revision = _latest_revision(service)
    if not revision:
        return None
    labels = {"serving.knative.dev/revision": revision}
    workload = {
        "kind": "Revision",
        "metadata": {"name": revision, "namespace": service["metadata"]["namespace"]},
        "spec": {"selector": {"matchLabels": labels}},
    }
    try:
        return find_trouble(cluster, workload)
    except Forbidden:
        return None


def _failure(cluster: Cluster, service: Object, waited_s: float | None) -> CommandError:
    """Why the Service is not ready: the reason of its revision, the state of the pods, their last lines."""
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    revision = _latest_revision(service)
    lines = _reasons(cluster, service, revision)
    trouble = _trouble(cluster, service)
    if trouble is not None:
        lines.append(trouble.text)
    log = _last_lines(cluster, namespace, revision) or (trouble.log if trouble else "")
    if log:
        note("Service output:")
        note("".join(f"  {line}\n" for line in log.splitlines()[-_LOG_LINES:]).rstrip())
    serving = (service.get("status") or {}).get("latestReadyRevisionName")
    if serving and serving != revision:
        lines.append(f"revision {serving} still serves")
    state = f"is not ready after {waited_s:g} s" if waited_s is not None else "has failed"
    said = "".join(f"\n\t{line}" for line in dict.fromkeys(lines)) or "\n\tit has no revision yet"
    kubectl = cluster.kubectl
    return CommandError(
        f"function '{name}' is applied in namespace '{namespace}', but {state}:{said}",
        [
            (f"{program()} logs --name {name} -n {namespace}", "what the function says"),
            (
                f"{kubectl} describe pods -n {namespace} -l serving.knative.dev/service={name}",
                "what its pods wait for",
            ),
            (f"{program()} deploy --timeout 600", "wait longer")
            if waited_s is not None
            else (f"{program()} delete {name} -n {namespace}", "take it back"),
        ],
    )


def _reasons(cluster: Cluster, service: Object, revision: str) -> list[str]:
    """Conditions that are not met, the most telling first: the revision's, then the Service's."""
    found: list[Object] = []
    if revision:
        try:
            obj = cluster.get(SERVING, "Revision", revision, service["metadata"]["namespace"])
            found += ((obj or {}).get("status") or {}).get("conditions") or []
        except Forbidden:
            pass
    lines: list[str] = []
    for conditions, owner in (
        (found, f"revision {revision}"),
        ((service.get("status") or {}).get("conditions"), ""),
    ):
        if lines:
            break  # the Service's only repeats the Revision's
        for entry in conditions or ():
            if entry.get("status") != "True" and entry.get("reason"):
                text = ": ".join(part for part in (owner, entry["reason"], entry.get("message")) if part)
                lines.append(text)
    return lines


def _last_lines(cluster: Cluster, namespace: str, revision: str) -> str:
    """The last lines of the function in the newest revision, or before it was restarted."""
    if not revision:
        return ""
    try:
        pods = cluster.list("v1", "Pod", namespace, f"serving.knative.dev/revision={revision}")
        for pod in pods:
            name = pod["metadata"]["name"]
            for previous in (False, True):
                log = cluster.pod_log(namespace, name, "user-container", _LOG_LINES, previous=previous)
                if log.strip():
                    return log
    except Forbidden:
        pass
    return ""

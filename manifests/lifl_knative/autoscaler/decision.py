"""From a PodAutoscaler, what is around it and the plan to what is to be written. No input or output, no clock.

The rules, in this order:

1. A revision whose place another has taken needs no pods; neither does one of a Service whose function another
   Service has, beyond what proves that it can start.
2. Until a revision has been ready once it gets its initial scale (1 unless annotated), because Knative calls it
   ready only then, and deploying waits for that. Pods that are not ready by the progress deadline are given up.
3. Otherwise the number is the plan's. While the plan is not known the number stays what it is.
4. `min-scale` and `max-scale` bound it. A revision that no route leads to has no minimum.
5. The last pod ends only when Knative has put its activator in the way, so that a request finds somebody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from lifl_knative.autoscaler.conditions import (
    ACTIVE,
    INITIALIZED,
    PLAN_KNOWN,
    SERVICE_READY,
    Condition,
    find,
    since,
    truth_of,
    write,
)
from lifl_knative.autoscaler.objects import (
    Object,
    differs,
    is_controlled_by,
    is_reachable,
    make_serverless_service,
    progress_seconds,
    ready_of,
    replicas_of,
    scale_annotation,
    status_of,
)
from lifl_knative.autoscaler.plan import Need
from lifl_knative.autoscaler.roles import Role

GRACE_SECONDS: Final = 30.0
"""Longest wait for the activator to be in the way before the last pod ends: Knative's own grace period."""
_PROGRESS_SLACK_SECONDS: Final = 10.0
"""So that the Deployment says first why its pods are not ready."""
_TIMED_OUT: Final = "TimedOut"
_UNKNOWN: Final = -1
"""As a number of pods: Knative's word for it."""


@dataclass(frozen=True)
class Observed:
    """What there is around a PodAutoscaler, as it was last seen."""

    autoscaler: Object
    serverless_service: Object | None
    deployment: Object | None
    need: Need | None
    """What the plan says of its function; None while that is not known."""
    problem: str = ""
    """Why it is not known."""
    role: Role = "current"


@dataclass(frozen=True)
class Decision:
    """What is to be written. What is None stays as it is."""

    desired: int
    """Pods that there should be in the end."""
    replicas: int | None = None
    """For the Deployment's scale."""
    serverless_service: Object | None = None
    """To be applied."""
    status: Object | None = None
    """Of the PodAutoscaler."""
    keep: frozenset[str] = frozenset()
    """When pods end: nodes whose pods shall be the last."""
    recheck_seconds: float | None = None
    """When to decide anew though nothing was heard."""


def decide(seen: Observed, now: datetime) -> Decision:
    """What to do about one PodAutoscaler."""
    service = seen.serverless_service
    if service is not None and not is_controlled_by(service, seen.autoscaler):
        return _not_owned(seen, now)
    if seen.deployment is None:  # Knative makes it first; its event brings us back
        return Decision(_UNKNOWN, status=_changed(seen, _status(seen, _UNKNOWN, 0, False, now)))
    ready, before = ready_of(seen.deployment), status_of(seen.autoscaler)
    has_given_up, deadline = _activation(seen, ready, now)
    desired = _desired(seen, has_given_up)
    wanted = make_serverless_service(seen.autoscaler, "Serve" if desired and ready else "Proxy")
    present = replicas_of(seen.deployment)
    replicas: int | None = None if desired == present else desired
    recheck = deadline
    if replicas == 0 and not has_given_up:
        wait = _wait_for_activator(seen, before, now)
        if wait > 0:
            replicas, recheck = None, wait
    return Decision(
        desired,
        replicas,
        wanted if service is None or differs(wanted, service) else None,
        _changed(seen, _status(seen, desired, ready, has_given_up, now)),
        seen.need.keep if seen.need is not None and 0 < desired < present else frozenset(),
        recheck,
    )


# --- how many ------------------------------------------------------------------------------------------------


def _desired(seen: Observed, has_given_up: bool) -> int:
    assert seen.deployment is not None
    least, most = _bounds(seen)
    if seen.role == "superseded":
        return 0
    if seen.role == "rival":
        number = 0
    elif seen.need is None:
        number = replicas_of(seen.deployment)
    else:
        number = seen.need.wanted
    least = least if has_given_up else max(least, _initial(seen))
    number = max(number, least)
    return min(number, most) if most else number


def _bounds(seen: Observed) -> tuple[int, int]:
    """Least and most; 0 for no bound."""
    least = scale_annotation(seen.autoscaler, "min-scale", "minScale") or 0
    most = scale_annotation(seen.autoscaler, "max-scale", "maxScale") or 0
    return (least if is_reachable(seen.autoscaler) else 0), most


def _initial(seen: Observed) -> int:
    """Pods that have to be there to prove that the revision works; 0 once it has."""
    return 0 if _is_initialized(seen) or not is_reachable(seen.autoscaler) else _initial_scale(seen)


def _initial_scale(seen: Observed) -> int:
    asked = scale_annotation(seen.autoscaler, "initial-scale", "initialScale")
    return 1 if asked is None else asked


def _is_initialized(seen: Observed) -> bool:
    return truth_of(status_of(seen.autoscaler), INITIALIZED) == "True"


def _threshold(seen: Observed) -> int:
    """Pods that have to be ready for the revision to have been proved, and after that to count as active."""
    least, _ = _bounds(seen)
    return max(least, 1 if _is_initialized(seen) else _initial_scale(seen))


def _activation(seen: Observed, ready: int, now: datetime) -> tuple[bool, float | None]:
    """Whether pods that nobody needs but as a proof were waited for in vain; else when that will be."""
    status = status_of(seen.autoscaler)
    if seen.need is None or seen.need.wanted or not _initial(seen) or ready >= _threshold(seen):
        return False, None
    active = find(status, ACTIVE)
    if active.get("status") == "False" and active.get("reason") == _TIMED_OUT:
        return True, None
    if active.get("status") != "Unknown":
        return False, None
    left = progress_seconds(seen.autoscaler) + _PROGRESS_SLACK_SECONDS - since(status, ACTIVE, now)
    return left <= 0, max(left, 0.0) or None


def _wait_for_activator(seen: Observed, before: Mapping[str, Any], now: datetime) -> float:
    """Seconds to go on keeping the last pod; 0 when it may end."""
    service = seen.serverless_service
    status = status_of(service)
    if service is not None and (service.get("spec") or {}).get("mode") == "Proxy":
        is_observed = status.get("observedGeneration") == service["metadata"].get("generation")
        if is_observed and truth_of(status, "ActivatorEndpointsPopulated") == "True":
            return 0.0
    if truth_of(before, ACTIVE) != "False":
        return GRACE_SECONDS  # our own status comes first, and is what the time is counted from
    return max(0.0, GRACE_SECONDS - since(before, ACTIVE, now))


# --- what is said of it --------------------------------------------------------------------------------------


def _status(seen: Observed, desired: int, ready: int, has_given_up: bool, now: datetime) -> Object:
    before, service = status_of(seen.autoscaler), status_of(seen.serverless_service)
    name = str(service.get("serviceName") or "")
    parts = [
        _active(seen, desired, ready, has_given_up),
        _initialized(seen, ready, name),
        _service_ready(seen),
        _plan_known(seen),
    ]
    return {
        "observedGeneration": seen.autoscaler["metadata"].get("generation", 0),
        "desiredScale": desired,
        "actualScale": ready,
        "serviceName": name,
        "metricsServiceName": str(service.get("privateServiceName") or ""),
        "conditions": write(parts, before, now),
    }


def _active(seen: Observed, desired: int, ready: int, has_given_up: bool) -> Condition:
    if seen.deployment is None:
        return Condition(ACTIVE, "Unknown", "Deploying", "There is no Deployment yet.")
    if desired == 0 and has_given_up:
        return Condition(ACTIVE, "False", _TIMED_OUT, "No pod was ready in time.")
    if desired == 0:
        return Condition(ACTIVE, "False", *_why_none(seen))
    if ready < max(1, _threshold(seen)):
        return Condition(ACTIVE, "Unknown", "Queued", f"{ready} of {desired} pods are ready.")
    return Condition(ACTIVE, "True")


def _why_none(seen: Observed) -> tuple[str, str]:
    """Reason and message; the reason is Knative's own where it has the same meaning."""
    if seen.role == "superseded":
        return "NoTraffic", "Another revision has taken its place."
    if seen.role == "rival":
        return (
            "FunctionTaken",
            "Another, older Service has this function; delete it, or name the function otherwise.",
        )
    if seen.need is None:
        return "NoTraffic", "It has no pods, and the plan is not known."
    return "NoTraffic", "No job in use needs the function."


def _initialized(seen: Observed, ready: int, service_name: str) -> Condition:
    is_up = seen.deployment is not None and ready >= _threshold(seen) and bool(service_name)
    return Condition(INITIALIZED, "True" if _is_initialized(seen) or is_up else "Unknown")


def _service_ready(seen: Observed) -> Condition:
    found = find(status_of(seen.serverless_service), "Ready")
    if found.get("status") == "True":
        return Condition(SERVICE_READY, "True")
    message = str(found.get("message") or "The ServerlessService is not ready.")
    return Condition(SERVICE_READY, "Unknown", "NotReady", message)


def _plan_known(seen: Observed) -> Condition:
    if seen.need is not None:
        return Condition(PLAN_KNOWN, "True", is_information=True)
    message = f"The number of pods stays as it is: {seen.problem}"
    return Condition(PLAN_KNOWN, "False", "CoordinatorUnreachable", message, is_information=True)


def _not_owned(seen: Observed, now: datetime) -> Decision:
    """A ServerlessService of this name is somebody else's: nothing is done, and the condition says so."""
    name = seen.autoscaler["metadata"]["name"]
    replicas, ready = (replicas_of(seen.deployment) if seen.deployment else 0), ready_of(seen.deployment)
    message = f'There is an existing ServerlessService "{name}" that we do not own.'
    status = _status(seen, replicas, ready, False, now)
    parts = [
        Condition(ACTIVE, "False", "NotOwned", message),
        _initialized(seen, 0, ""),
        _service_ready(seen),
        _plan_known(seen),
    ]
    status["conditions"] = write(parts, status_of(seen.autoscaler), now)
    return Decision(replicas, status=_changed(seen, status))


def _changed(seen: Observed, status: Object) -> Object | None:
    before = status_of(seen.autoscaler)
    return status if any(before.get(name) != value for name, value in status.items()) else None

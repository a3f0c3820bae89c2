"""A PodAutoscaler's conditions: what Knative makes a revision's readiness of, and what operators read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

Truth = Literal["True", "False", "Unknown"]

ACTIVE: Final = "Active"
INITIALIZED: Final = "ScaleTargetInitialized"
SERVICE_READY: Final = "SKSReady"
READY: Final = "Ready"
PLAN_KNOWN: Final = "PlanKnown"
"""Our own: whether the plan is what the coordinator says now. It has no part in `Ready`."""


@dataclass(frozen=True)
class Condition:
    """One condition without its time."""

    name: str
    truth: Truth
    reason: str = ""
    message: str = ""
    is_information: bool = False
    """It does not count for `Ready`."""


def find(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A condition as it was written; empty if it was not."""
    return next((found for found in status.get("conditions") or () if found.get("type") == name), {})


def truth_of(status: Mapping[str, Any], name: str) -> str:
    """`True`, `False`, `Unknown`, or empty."""
    return str(find(status, name).get("status", ""))


def since(status: Mapping[str, Any], name: str, now: datetime) -> float:
    """Seconds since a condition became what it is; 0 if that cannot be told."""
    text = str(find(status, name).get("lastTransitionTime", ""))
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return 0.0
    if moment.tzinfo is None:
        return 0.0
    return max(0.0, (now - moment).total_seconds())


def ready(parts: Sequence[Condition]) -> Condition:
    """`Ready`, as Knative makes it of the others: the first that is False, else the first Unknown."""
    relevant = [part for part in parts if not part.is_information]
    for truth in ("False", "Unknown"):
        for part in relevant:
            if part.truth == truth:
                return Condition(READY, part.truth, part.reason, part.message)
    return Condition(READY, "True")


def write(parts: Sequence[Condition], before: Mapping[str, Any], now: datetime) -> list[dict[str, str]]:
    """The list for a status, by name. A time stays as it was while its condition is neither truer nor falser."""
    written = []
    for part in sorted([*parts, ready(parts)], key=lambda part: part.name):
        former = find(before, part.name)
        moment = former.get("lastTransitionTime") if former.get("status") == part.truth else None
        entry = {
            "type": part.name,
            "status": part.truth,
            "lastTransitionTime": moment or now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        entry |= {"reason": part.reason} if part.reason else {}
        entry |= {"message": part.message} if part.message else {}
        entry |= {"severity": "Info"} if part.is_information else {}
        written.append(entry)
    return written

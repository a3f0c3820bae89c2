"""Which PodAutoscalers stand for a function: of several only one Service's, and of its revisions those in use.

Each revision of a Service has a PodAutoscaler. While a new revision is rolled out the old one has the function's
pods too, until no route leads to it. Two Services for one function would put two pods of it on each node: the
older Service has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lifl_knative.autoscaler.objects import Key, function_of, is_reachable, key_of, service_of

Role = Literal["current", "superseded", "rival"]
"""`superseded`: another revision has taken its place. `rival`: another Service has the function."""


def roles_of(autoscalers: Iterable[Mapping[str, Any]]) -> dict[Key, Role]:
    """The role of each PodAutoscaler of our class."""
    services: dict[str, dict[Key, list[Mapping[str, Any]]]] = {}
    for autoscaler in autoscalers:
        service = key_of(autoscaler)[0], service_of(autoscaler)
        services.setdefault(function_of(autoscaler), {}).setdefault(service, []).append(autoscaler)
    roles: dict[Key, Role] = {}
    for claims in services.values():
        holder = min(claims, key=lambda service: (min(map(_age, claims[service])), service))
        for service, revisions in claims.items():
            current = [revision for revision in revisions if is_reachable(revision)]
            current = current or [max(revisions, key=lambda r: (_age(r), key_of(r)))]
            for revision in revisions:
                is_current = any(revision is other for other in current)
                role: Role = "rival" if service != holder else "current"
                roles[key_of(revision)] = role if is_current else "superseded"
    return roles


def _age(autoscaler: Mapping[str, Any]) -> str:
    """When it was made, RFC 3339 in UTC: the order of the texts is that of the times."""
    return str(autoscaler["metadata"].get("creationTimestamp", ""))

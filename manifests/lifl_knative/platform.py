"""Installs the platform in a cluster, and removes it; see docs/platform.md for what it consists of."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from lifl.cli.common import CommandError, program

from lifl_knative.api_errors import ClusterError, Conflict, Forbidden, MissingKind
from lifl_knative.installation import Installation, plan
from lifl_knative.kustomize import Object, key_of
from lifl_knative.platform_manifests import (
    KINDS,
    MANAGED_BY,
    NAMESPACES,
    OVERLAY,
    PART_OF,
    SELECTOR,
    WORKLOADS,
    secrets_of,
)
from lifl_knative.workloads import Trouble, find_trouble, readiness

if TYPE_CHECKING:
    from lifl_knative.cluster import Cluster

_LOOK_AGAIN_S: Final = 1.0
_KEPT: Final = frozenset({"Namespace", "PersistentVolumeClaim", "Secret"})
"""Kinds that hold data, and the namespace that goes with all that is in it."""

Note = Callable[[str], None]


def install(
    cluster: Cluster,
    *,
    overlay: str | None = None,
    components: Sequence[str] | None = None,
    image: str | None = None,
    version: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    wait: bool = True,
    timeout: float = 300,
    note: Note,
) -> Installation:
    """Install or upgrade the platform, and wait until its pods are ready; the same again changes nothing.

    Objects are applied as ours (server-side): what users have set in other fields stays, and fields of ours that
    somebody else owns are an error unless `force`. Secrets are made when missing and never changed. `dry_run` has
    the server check everything and keep nothing. Raises CommandError that says what is in the cluster then.
    """
    wanted = plan(cluster, overlay=overlay, components=components, image=image, version=version)
    objects = wanted.objects()
    if not dry_run:
        _check_secrets(cluster, objects)
    if wanted.image and "/" not in wanted.image:
        note(f"the nodes have to have the image {wanted.image}; --image names one that they can fetch")
    note(f"applying overlay {wanted.overlay}" + "".join(f" with {name}" for name in wanted.components))
    _apply_all(cluster, objects, dry_run=dry_run, force=force, note=note)
    if dry_run:
        return wanted
    _prune(cluster, wanted, objects, note)
    if wait:
        wait_until_ready(cluster, objects, timeout, note)
    return wanted


def _apply_all(cluster: Cluster, objects: Sequence[Object], *, dry_run: bool, force: bool, note: Note) -> None:
    """Apply in order; Secrets come when the namespace is there, before the pods that mount them."""
    applied: list[Object] = []
    has_secrets = dry_run
    namespaces = {obj["metadata"]["name"] for obj in objects if obj["kind"] == "Namespace"}
    absent = {name for name in namespaces if dry_run and cluster.get("v1", "Namespace", name) is None}
    try:
        for obj in objects:
            if obj["kind"] in WORKLOADS and not has_secrets:
                _make_secrets(cluster, objects, note)
                has_secrets = True
            if obj["metadata"].get("namespace") in absent:
                continue
            cluster.apply(obj, dry_run=dry_run, force=force)
            applied.append(obj)
    except ClusterError as error:
        raise _interrupted(error, objects, applied, dry_run) from None
    for name in sorted(absent):
        note(f"namespace {name} is not there yet, so the server could not check what goes into it")


def _interrupted(
    error: ClusterError, objects: Sequence[Object], applied: Sequence[Object], dry_run: bool
) -> CommandError:
    """The error, with what has been done before it."""
    hints = list(error.hints)
    if isinstance(error, Conflict):
        command = f"{program()} platform install --force"
        hints = [(command, "take these fields over"), *(hint for hint in hints if "--force" not in hint[0])]
    if dry_run:
        return CommandError(f"{error}\n\tNothing was changed.", hints)
    missing = [_name(obj) for obj in objects[len(applied) :]]
    done = f"{len(applied)} of {len(objects)} objects are applied" if applied else "nothing is applied"
    hints.append((f"{program()} platform install", "go on, when that is repaired"))
    if applied:
        hints.append((f"{program()} platform uninstall", "remove what is there"))
    return CommandError(f"{error}\n\tSo far {done}; missing: {_listing(missing)}.", hints)


def _listing(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _name(obj: Mapping[str, Any]) -> str:
    return f"{obj['kind']} {obj['metadata']['name']}"


# --- secrets -------------------------------------------------------------------------------------------------


def _tokens() -> dict[str, str]:
    operator = secrets.token_urlsafe(32)
    text = f"# One 'client-id token' in each line; the client-id * stands for an operator.\n* {operator}\n"
    return {"tokens": text, "operator": operator}


GENERATED_SECRETS: Final[Mapping[str, Callable[[], dict[str, str]]]] = {
    "lifl-tokens": _tokens,
    "lifl-member-token": lambda: {"token": secrets.token_urlsafe(32)},
}
"""Makes the content of each Secret that is made when it is missing."""


def _check_secrets(cluster: Cluster, objects: Sequence[Object]) -> None:
    """Find out before anything is applied whether a Secret that somebody made lacks a key."""
    for namespace, name, keys in secrets_of(objects):
        try:
            found = cluster.get("v1", "Secret", name, namespace)
        except Forbidden:
            continue  # making it will tell
        lacking = sorted(keys - set(found.get("data", {}))) if found else []
        if lacking:
            kubectl = f"{cluster.kubectl} -n {namespace}"
            raise CommandError(
                f"Secret {name} in namespace {namespace} lacks {' and '.join(lacking)}; nothing was changed",
                [
                    (f"{kubectl} edit secret {name}", "add it: docs/platform.md says what it holds"),
                    (f"{kubectl} delete secret {name}", "or have a new one made, with new tokens"),
                ],
            )


def _make_secrets(cluster: Cluster, objects: Sequence[Object], note: Note) -> None:
    for namespace, name, _ in secrets_of(objects):
        if cluster.get("v1", "Secret", name, namespace) is not None:
            continue
        labels = {"app.kubernetes.io/name": "lifl", PART_OF: "lifl", MANAGED_BY: "lifl-func"}
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "type": "Opaque",
            "data": {
                key: base64.b64encode(value.encode()).decode() for key, value in GENERATED_SECRETS[name]().items()
            },
        }
        try:
            cluster.create(secret)
        except Conflict:
            continue  # somebody else was quicker, and theirs is as good
        key = "operator" if name == "lifl-tokens" else "token"
        note(f"made Secret {name} with random values; an operator reads them with")
        note(f"  {cluster.kubectl} -n {namespace} get secret {name} -o jsonpath='{{.data.{key}}}' | base64 -d")


# --- waiting -------------------------------------------------------------------------------------------------


def wait_until_ready(cluster: Cluster, objects: Sequence[Object], timeout: float, note: Note) -> None:
    """Return when the workloads among `objects` are ready.

    Raises CommandError with the reason and a pod's last lines after `timeout` seconds, or as soon as waiting is
    known to be of no use.
    """
    deadline = time.monotonic() + timeout
    waiting = [obj for obj in objects if obj["kind"] in WORKLOADS]
    said: dict[str, str] = {}
    while True:
        live = [_live(cluster, obj) for obj in waiting]
        waiting = [obj for obj in live if not readiness(obj).is_complete]
        if not waiting:
            return
        is_late = time.monotonic() >= deadline
        for workload in waiting:
            name, trouble = _name(workload), find_trouble(cluster, workload)
            if is_late or (trouble and trouble.is_hopeless):
                raise _not_ready(cluster, workload, trouble, timeout if is_late else None)
            text = (
                trouble.text if trouble else f"{readiness(workload).ready} of {readiness(workload).wanted} ready"
            )
            if said.get(name) != text:
                said[name] = text
                note(f"waiting for {name}: {text}")
        time.sleep(_LOOK_AGAIN_S)


def _live(cluster: Cluster, obj: Object) -> Object:
    metadata = obj["metadata"]
    found = cluster.get(obj["apiVersion"], obj["kind"], metadata["name"], metadata["namespace"])
    if found is None:
        raise CommandError(
            f"{_name(obj)} was deleted while it started", [(f"{program()} platform install", "apply it again")]
        )
    return found


def _not_ready(cluster: Cluster, workload: Object, trouble: Trouble | None, waited: float | None) -> CommandError:
    metadata, counts = workload["metadata"], readiness(workload)
    when = f" after {waited:g} s" if waited is not None else ""
    message = f"{_name(workload)} is not ready{when}: {counts.ready} of {counts.wanted} pods are"
    if trouble:
        message += f"\n\t{trouble.text}" + "".join(f"\n\t| {line}" for line in trouble.log.splitlines())
    message += "\n\tEverything is applied and stays: it becomes ready when the cause is gone."
    kubectl = f"{cluster.kubectl} -n {metadata['namespace']}"
    return CommandError(
        message,
        [
            (f"{kubectl} describe {workload['kind'].lower()} {metadata['name']}", "events, with the cause"),
            (f"{program()} platform status", "what is ready and what is not"),
            (f"{program()} platform install --timeout 900", "wait again, for longer"),
        ],
    )


# --- removing ------------------------------------------------------------------------------------------------


def labelled_objects(cluster: Cluster, namespace: str) -> list[Object]:
    """Everything of the platform in the cluster that belongs to the overlays of `namespace`, in order."""
    overlays = {overlay for overlay, home in NAMESPACES.items() if home == namespace}
    found: list[Object] = []
    for api_version, kind in KINDS:
        if kind == "Secret":  # made, not applied: without the label
            continue
        try:
            objects = cluster.list(api_version, kind, namespace, SELECTOR)
        except MissingKind:
            continue
        found += [obj for obj in objects if obj["metadata"].get("labels", {}).get(OVERLAY) in overlays]
    return found


def _prune(cluster: Cluster, wanted: Installation, objects: Sequence[Object], note: Note) -> None:
    """Delete what an earlier version or another overlay had and this one has not."""
    keys = {key_of(obj) for obj in objects}
    for obj in reversed(labelled_objects(cluster, wanted.namespace)):
        if key_of(obj) not in keys and obj["kind"] not in _KEPT:
            _delete(cluster, obj)
            note(f"removed {_name(obj)}, which the overlay no longer has")


def _delete(cluster: Cluster, obj: Object) -> None:
    metadata = obj["metadata"]
    cluster.delete(obj["apiVersion"], obj["kind"], metadata["name"], metadata.get("namespace"))


def uninstall(cluster: Cluster, namespaces: Sequence[str], *, delete_data: bool, note: Note) -> list[str]:
    """Remove the platform from these namespaces, last applied first; the names of what is kept.

    Volumes and Secrets stay, and the namespace with them, unless `delete_data`. Raises CommandError that says what
    is left when the server refuses something.
    """
    kept: list[str] = []
    for namespace in namespaces:
        removed = 0
        objects = [obj for obj in reversed(labelled_objects(cluster, namespace)) if obj["kind"] not in _KEPT]
        try:
            for obj in objects:
                _delete(cluster, obj)
                removed += 1
            data = _data(cluster, namespace)
            if delete_data:
                for obj in data:
                    _delete(cluster, obj)
        except ClusterError as error:
            left = [_name(obj) for obj in objects[removed:]]
            said = f"{error}\n\t{removed} of {len(objects)} objects are removed" + (
                f"; left: {_listing(left)}." if left else ", and the data is left."
            )
            hint = (f"{program()} platform uninstall --yes", "go on, when that is repaired")
            raise CommandError(said, [*error.hints, hint]) from None
        note(f"removed {removed} objects of namespace {namespace}")
        kept += [] if delete_data else [_name(obj) for obj in data]
    return kept


def _data(cluster: Cluster, namespace: str) -> list[Object]:
    """What `uninstall` keeps: Secrets, volumes (a StatefulSet's too) and at last the namespace."""
    found: list[Object] = []
    for kind in ("Secret", "PersistentVolumeClaim"):
        found += cluster.list("v1", kind, namespace, SELECTOR)
    home = cluster.get("v1", "Namespace", namespace)
    is_ours = home is not None and OVERLAY in home["metadata"].get("labels", {})
    return [*found, home] if home is not None and is_ours else found

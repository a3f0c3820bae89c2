"""The platform's objects: which overlays there are, where their files lie, and in which order they are applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from lifl.cli.common import CommandError, program

from lifl_knative.kustomize import Object, image_name, render, replace_image

NAMESPACE: Final = "lifl-system"
BROKER_NAMESPACE: Final = "lifl-broker"
NAMESPACES: Final = {
    "single-node": NAMESPACE,
    "production": NAMESPACE,
    "broker-baseline": BROKER_NAMESPACE,
}
"""Overlays, and the namespace of each."""
COMPONENTS: Final = ("observability", "seccomp-unconfined")
IMAGE: Final = "lifl-node"
"""Name of the platform's image in the files."""

PART_OF: Final = "app.kubernetes.io/part-of"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
OVERLAY: Final = "lifl.dev/overlay"
SELECTOR: Final = f"{PART_OF}=lifl,{MANAGED_BY}=lifl-func"
"""Labels of everything that func makes; what the platform consists of has `lifl.dev/overlay` besides."""

WORKLOADS: Final = frozenset({"DaemonSet", "Deployment", "StatefulSet"})
KINDS: Final = (
    ("v1", "Namespace"),
    ("scheduling.k8s.io/v1", "PriorityClass"),
    ("rbac.authorization.k8s.io/v1", "ClusterRole"),
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy"),
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding"),
    ("v1", "ServiceAccount"),
    ("v1", "Secret"),
    ("v1", "ConfigMap"),
    ("v1", "PersistentVolumeClaim"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("policy/v1", "PodDisruptionBudget"),
    ("v1", "Service"),
    ("apps/v1", "StatefulSet"),
    ("apps/v1", "Deployment"),
    ("apps/v1", "DaemonSet"),
    ("monitoring.coreos.com/v1", "ServiceMonitor"),
)
"""In the order in which they are applied: what others refer to comes first."""


def manifests_directory() -> Path:
    """Where `base`, `overlays` and `components` lie: in the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for directory in (here / "manifests", here.parent):
        if (directory / "base").is_dir():
            return directory
    raise CommandError(
        f"the platform's manifests are missing from this installation: neither {here / 'manifests'} nor "
        f"{here.parent} has them",
        [("pip install --force-reinstall 'lifl[knative]'", "install it anew")],
    )


def platform_objects(overlay: str, components: Sequence[str] = (), image: str | None = None) -> list[Object]:
    """The objects of an overlay with `components`, in the order in which they are applied.

    `image` (a whole reference, with tag or digest) takes the place of the platform's own. Raises CommandError for
    an overlay or component that does not exist.
    """
    _require("overlay", overlay, list(NAMESPACES))
    for component in components:
        _require("component", component, list(COMPONENTS))
    directory = manifests_directory()
    objects = render(
        directory / "overlays" / overlay, [directory / "components" / component for component in components]
    )
    if image is not None:
        replace_image(objects, IMAGE, image)
    order = {kind: number for number, kind in enumerate(KINDS)}
    return sorted(objects, key=lambda obj: order[obj["apiVersion"], obj["kind"]])


def own_image(objects: Sequence[Object]) -> str:
    """The image of the platform in these objects; empty where none of them runs it (the broker's)."""
    images = (container["image"] for obj in objects for container in containers_of(obj))
    return next((image for image in images if image_name(image).rpartition("/")[2] == IMAGE), "")


def containers_of(obj: Object) -> list[dict[str, Any]]:
    """Containers of a workload's pods; none for other objects."""
    if obj["kind"] not in WORKLOADS:
        return []
    containers: list[dict[str, Any]] = obj["spec"]["template"]["spec"]["containers"]
    return containers


def secrets_of(objects: Sequence[Object]) -> Iterator[tuple[str, str, set[str]]]:
    """(namespace, name, keys) of the Secrets that pods mount."""
    found: dict[tuple[str, str], set[str]] = {}
    for obj in objects:
        if obj["kind"] in WORKLOADS:
            for volume in obj["spec"]["template"]["spec"].get("volumes", ()):
                if secret := volume.get("secret"):
                    keys = found.setdefault((obj["metadata"]["namespace"], secret["secretName"]), set())
                    keys.update(item["key"] for item in secret.get("items", ()))
    for (namespace, name), keys in found.items():
        yield namespace, name, keys


def version_of(image: str) -> str:
    """An image's tag, or the beginning of its digest."""
    name, _, digest = image.partition("@")
    if digest:
        return digest.removeprefix("sha256:")[:12]
    return name.removeprefix(image_name(name)).lstrip(":") or "latest"


def _require(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise CommandError(
            f"there is no {what} '{name}'; there are {', '.join(known)}",
            [(f"{program()} platform install --{what} {known[0]}", f"a {what} that exists")],
        )

"""What of the platform a cluster has, and what it is to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lifl.cli.common import CommandError

from lifl_knative.kustomize import Object, image_name
from lifl_knative.platform_manifests import (
    NAMESPACE,
    NAMESPACES,
    OVERLAY,
    containers_of,
    own_image,
    platform_objects,
    version_of,
)

if TYPE_CHECKING:
    from lifl_knative.cluster import Cluster

_COMPONENTS: Final = "lifl.dev/components"
_IMAGE: Final = "lifl.dev/image"
# Annotations of the namespace: with what the overlay was installed last.


@dataclass(frozen=True)
class Installation:
    """An overlay that is in the cluster, or is to be."""

    overlay: str
    components: tuple[str, ...]
    image: str
    """Of node, coordinator and autoscaler; empty for the broker's overlay, which has none of them."""

    @property
    def namespace(self) -> str:
        """Where its objects are."""
        return NAMESPACES[self.overlay]

    def objects(self) -> list[Object]:
        """What it consists of, but for Secrets, which are made in the cluster."""
        objects = platform_objects(self.overlay, self.components, self.image or None)
        for obj in objects:
            metadata = obj["metadata"]
            # An overlay labels its own objects; what a component brings belongs to it as well.
            obj["metadata"] = metadata | {"labels": metadata["labels"] | {OVERLAY: self.overlay}}
            if obj["kind"] == "Namespace":
                obj["metadata"]["annotations"] = {_COMPONENTS: ",".join(self.components), _IMAGE: self.image}
        return objects


def plan(
    cluster: Cluster | None,
    *,
    overlay: str | None = None,
    components: Sequence[str] | None = None,
    image: str | None = None,
    version: str | None = None,
) -> Installation:
    """What `install` would install: what is not given is as it is now, else as it fits the cluster.

    The overlay is `single-node` for a cluster of one node and `production` for others. `observability` is added
    where the cluster knows ServiceMonitors. An image keeps its name and gets this version's tag. Without a
    cluster to ask, what is not given is as in the files.
    """
    now = find_installation(cluster, NAMESPACES.get(overlay or "", NAMESPACE)) if cluster else None
    if overlay is None:
        overlay = now.overlay if now else _fitting_overlay(cluster)
    if components is None:
        components = now.components if now else _fitting_components(cluster, overlay)
    return Installation(
        overlay, tuple(sorted(components)), _image(overlay, image, version, now.image if now else "")
    )


def _fitting_overlay(cluster: Cluster | None) -> str:
    return "single-node" if cluster and len(cluster.list("v1", "Node")) == 1 else "production"


def _fitting_components(cluster: Cluster | None, overlay: str) -> list[str]:
    if cluster is None:
        return []
    is_monitored = overlay != "broker-baseline" and cluster.has("monitoring.coreos.com/v1", "ServiceMonitor")
    return ["observability"] if is_monitored else []


def _image(overlay: str, image: str | None, version: str | None, now: str) -> str:
    """The reference of the image to run; see `plan`."""
    default = own_image(platform_objects(overlay))
    if not default:
        if image or version:
            raise CommandError(f"overlay {overlay} runs no image of LIFL's: --image and --version are not for it")
        return ""
    given = image or now or default
    name, has_tag = image_name(given), given != image_name(given)
    if version is not None:
        if image and has_tag:
            raise CommandError(f"--version {version} and the tag or digest of --image {image} exclude each other")
        return f"{name}:{version}"
    if (image and has_tag) or "@" in given:
        return given
    return f"{name}:{version_of(default)}"


def find_installation(cluster: Cluster, namespace: str) -> Installation | None:
    """What of the platform is in `namespace`; None if nothing is."""
    found = cluster.get("v1", "Namespace", namespace)
    metadata = (found or {}).get("metadata", {})
    overlay = metadata.get("labels", {}).get(OVERLAY, "")
    if NAMESPACES.get(overlay) != namespace:
        return None
    annotations = metadata.get("annotations", {})
    components = tuple(name for name in annotations.get(_COMPONENTS, "").split(",") if name)
    return Installation(overlay, components, annotations.get(_IMAGE) or _running_image(cluster, namespace))


def _running_image(cluster: Cluster, namespace: str) -> str:
    """The image where `kubectl apply -k` installed the overlay."""
    live = cluster.get("apps/v1", "DaemonSet", "lifl-node", namespace)
    images = [container["image"] for container in containers_of(live)] if live else []
    return str(images[0]) if images else ""

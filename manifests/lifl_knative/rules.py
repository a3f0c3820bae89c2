"""What Knative Serving's webhook asks of a Service beyond its schema, checked before anything is applied.

The webhook stops at the first kind of problem and names no flag; here all are found at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lifl_knative import features
from lifl_knative.service import AUTOSCALING

_RESERVED_PATHS = frozenset({"/", "/dev", "/dev/log"})
_RESERVED_PORTS = frozenset({8008, 8012, 8013, 8022, 9090, 9091})
_RESERVED_ENVS = frozenset({"PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION"})
_READ_ONLY = ("hostPath", "secret", "configMap", "projected", "csi", "image")
_VOLUME_FLAGS = {
    "hostPath": features.HOST_PATH,
    "emptyDir": features.EMPTY_DIR,
    "persistentVolumeClaim": features.CLAIM,
    "ephemeral": "kubernetes.podspec-volumes-ephemeral",
    "csi": "kubernetes.podspec-volumes-csi",
    "image": "kubernetes.podspec-volumes-image",
}
_NEVER_IN_POD = ("nodeName", "terminationGracePeriodSeconds", "restartPolicy", "hostname", "subdomain")
_NEVER_IN_CONTAINER = ("lifecycle", "volumeDevices", "stdin", "tty")
_MOST_SECONDS = 600
_MOST_CONCURRENCY = 1000


@dataclass(frozen=True)
class Broken:
    """A rule that is broken; with `flag`, it holds only until the cluster's administrator sets that feature."""

    text: str
    flag: str | None = None


def broken_rules(service: Mapping[str, Any], flags: Mapping[str, str] | None) -> list[Broken]:
    """All rules that `service` breaks. `flags` is what config-features says; None: unknown, so none is missed."""
    template = service["spec"]["template"]
    return [
        *_annotations(service, template),
        *_pod(template["spec"], flags),
        *_volumes(template["spec"], flags),
        *_containers(template["spec"], flags),
    ]


def is_enabled(flag: str, flags: Mapping[str, str] | None) -> bool:
    """Whether a feature is set, or on by default; unknown features count as set."""
    if flags is None:
        return True
    default = "enabled" if flag in features.ENABLED_BY_DEFAULT else "disabled"
    return flags.get(flag, default).lower() in ("enabled", "allowed")


def _needs(flag: str, what: str, flags: Mapping[str, str] | None) -> Iterator[Broken]:
    if not is_enabled(flag, flags):
        yield Broken(f"{what} needs the feature '{flag}', which is not enabled in this cluster", flag)


def _annotations(service: Mapping[str, Any], template: Mapping[str, Any]) -> Iterator[Broken]:
    for name in service["metadata"].get("annotations") or {}:
        if name.startswith(AUTOSCALING):
            yield Broken(f"annotation '{name}' has to stand in the revision's template, not on the Service")
    annotations = template.get("metadata", {}).get("annotations") or {}
    scale: dict[str, float] = {}
    limits = (("min-scale", 0.0), ("max-scale", 0.0), ("target", 0.01), ("target-utilization-percentage", 1.0))
    for name, least in limits:
        value = annotations.get(AUTOSCALING + name)
        if value is None:
            continue
        try:
            scale[name] = float(value)
        except ValueError:
            yield Broken(f"annotation '{AUTOSCALING}{name}' is '{value}', but has to be a number")
            continue
        if scale[name] < least or (name.endswith("percentage") and scale[name] > 100):
            yield Broken(f"annotation '{AUTOSCALING}{name}' is {value}, which is out of range")
    if 0 < scale.get("max-scale", 0) < scale.get("min-scale", 0):
        yield Broken(f"min-scale {scale['min-scale']:g} is more than max-scale {scale['max-scale']:g}")


def _pod(spec: Mapping[str, Any], flags: Mapping[str, str] | None) -> Iterator[Broken]:
    for field, flag in features.POD_FIELDS.items():
        if spec.get(field):
            yield from _needs(flag, f"'{field}'", flags)
    for field in _NEVER_IN_POD:
        if field in spec:
            yield Broken(f"'{field}' is never allowed in a Knative Service")
    if spec.get("timeoutSeconds", 0) > _MOST_SECONDS:
        yield Broken(f"timeoutSeconds {spec['timeoutSeconds']} is more than {_MOST_SECONDS}")
    if not 0 <= spec.get("containerConcurrency", 0) <= _MOST_CONCURRENCY:
        yield Broken(f"containerConcurrency {spec['containerConcurrency']} is not from 0 to {_MOST_CONCURRENCY}")


def _volumes(spec: Mapping[str, Any], flags: Mapping[str, str] | None) -> Iterator[Broken]:
    kinds: dict[str, str] = {}
    for volume in spec.get("volumes", ()):
        kind = kinds[volume["name"]] = next(name for name in volume if name != "name")
        if flag := _VOLUME_FLAGS.get(kind):
            yield from _needs(flag, f"volume '{volume['name']}' ({kind})", flags)
        if kind == "persistentVolumeClaim" and not volume[kind].get("readOnly"):
            yield from _needs(features.CLAIM_WRITE, f"writing to volume '{volume['name']}' ({kind})", flags)
    mounted: set[str] = set()
    for container in spec["containers"]:
        paths: set[str] = set()
        for mount in container.get("volumeMounts", ()):
            name, path = mount["name"], mount["mountPath"]
            mounted.add(name)
            if name not in kinds:
                yield Broken(f"mount '{path}' is of volume '{name}', which does not exist")
            elif kinds[name] in _READ_ONLY and not mount.get("readOnly"):
                yield Broken(f"mount '{path}' has to be readOnly, because its volume is a {kinds[name]}")
            if path.rstrip("/") in _RESERVED_PATHS or path == "/":
                yield Broken(f"nothing can be mounted at '{path}'")
            if not path.startswith("/"):
                yield Broken(f"mount '{path}' has to be an absolute path")
            if path in paths:
                yield Broken(f"two volumes are mounted at '{path}'")
            paths.add(path)
            if mount.get("subPathExpr") or mount.get("mountPropagation") == "Bidirectional":
                yield Broken(f"mount '{path}' has a field that is never allowed in a Knative Service")
    for name in kinds.keys() - mounted:
        yield Broken(f"volume '{name}' is not mounted")


def _containers(spec: Mapping[str, Any], flags: Mapping[str, str] | None) -> Iterator[Broken]:
    ports = [port for container in spec["containers"] for port in container.get("ports", ())]
    if len(ports) > 1:
        yield Broken("a Knative Service has one port at most")
    for port in ports:
        if port["containerPort"] in _RESERVED_PORTS:
            yield Broken(f"port {port['containerPort']} is taken by Knative's queue-proxy")
        if port.get("hostPort"):
            yield Broken("'hostPort' is never allowed in a Knative Service")
    for container in spec["containers"]:
        if container.get("name") == "queue-proxy":
            yield Broken("no container may be called 'queue-proxy'")
        for field in _NEVER_IN_CONTAINER:
            if field in container:
                yield Broken(f"'{field}' is never allowed in a Knative Service")
        for variable in container.get("env", ()):
            if variable["name"] in _RESERVED_ENVS:
                yield Broken(
                    f"the environment variable '{variable['name']}' is set by Knative; choose another name"
                )
            source = variable.get("valueFrom", {})
            if "fieldRef" in source or "resourceFieldRef" in source:
                yield from _needs(
                    "kubernetes.podspec-fieldref", f"environment variable '{variable['name']}'", flags
                )
        security = container.get("securityContext", {})
        if security.get("privileged"):
            yield Broken("a privileged container is never allowed in a Knative Service")
        if security.get("capabilities", {}).get("add"):
            yield from _needs("kubernetes.containerspec-addcapabilities", "adding capabilities", flags)

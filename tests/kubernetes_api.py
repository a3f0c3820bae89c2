"""A local server that behaves as a Kubernetes API server does, as far as LIFL asks one.

Discovery, objects with namespaces, server-side apply with owners of fields, strict field validation, merge
patches, watches with resource versions that expire, logs, tokens, permissions, and faults on request. Nothing runs
in it: a test plays the controllers by hooks, see `on` and `KnativeController`.
"""

from __future__ import annotations

import copy
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests import knative_schema

Object = dict[str, Any]
Path_ = tuple[str, ...]
Hook = Callable[["KubernetesApi", Object], None]
Webhook = Callable[["KubernetesApi", Object], str | None]

TOKEN = "secret-token"
USER = "alice"

_KINDS: dict[str, dict[str, tuple[str, bool]]] = {
    "v1": {
        "Namespace": ("namespaces", False),
        "Node": ("nodes", False),
        "PersistentVolume": ("persistentvolumes", False),
        "Pod": ("pods", True),
        "Secret": ("secrets", True),
        "ConfigMap": ("configmaps", True),
        "PersistentVolumeClaim": ("persistentvolumeclaims", True),
        "ServiceAccount": ("serviceaccounts", True),
        "Service": ("services", True),
        "Endpoints": ("endpoints", True),
        "Event": ("events", True),
        "ResourceQuota": ("resourcequotas", True),
        "LimitRange": ("limitranges", True),
    },
    "apps/v1": {
        "Deployment": ("deployments", True),
        "DaemonSet": ("daemonsets", True),
        "StatefulSet": ("statefulsets", True),
        "ReplicaSet": ("replicasets", True),
    },
    "batch/v1": {"Job": ("jobs", True), "CronJob": ("cronjobs", True)},
    "rbac.authorization.k8s.io/v1": {
        "Role": ("roles", True),
        "RoleBinding": ("rolebindings", True),
        "ClusterRole": ("clusterroles", False),
        "ClusterRoleBinding": ("clusterrolebindings", False),
    },
    "networking.k8s.io/v1": {"NetworkPolicy": ("networkpolicies", True), "Ingress": ("ingresses", True)},
    "policy/v1": {"PodDisruptionBudget": ("poddisruptionbudgets", True)},
    "coordination.k8s.io/v1": {"Lease": ("leases", True)},
    "events.k8s.io/v1": {"Event": ("events", True)},
    "admissionregistration.k8s.io/v1": {
        "ValidatingAdmissionPolicy": ("validatingadmissionpolicies", False),
        "ValidatingAdmissionPolicyBinding": ("validatingadmissionpolicybindings", False),
    },
    "scheduling.k8s.io/v1": {"PriorityClass": ("priorityclasses", False)},
    "authorization.k8s.io/v1": {"SelfSubjectAccessReview": ("selfsubjectaccessreviews", False)},
    "apiextensions.k8s.io/v1": {"CustomResourceDefinition": ("customresourcedefinitions", False)},
    "serving.knative.dev/v1": {
        "Service": ("services", True),
        "Configuration": ("configurations", True),
        "Revision": ("revisions", True),
        "Route": ("routes", True),
    },
    "eventing.knative.dev/v1": {"Broker": ("brokers", True), "Trigger": ("triggers", True)},
    "autoscaling.internal.knative.dev/v1alpha1": {
        "PodAutoscaler": ("podautoscalers", True),
        "Metric": ("metrics", True),
    },
    "monitoring.coreos.com/v1": {"ServiceMonitor": ("servicemonitors", True)},
}
"""Kinds the server knows: {apiVersion: {kind: (plural, namespaced)}}."""

_LIST_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "ownerReferences": "uid",
}
"""Lists that are maps for server-side apply, by field name; others have one owner as a whole."""


@dataclass
class Fault:
    """Requests that match get this answer, `times` times."""

    method: str
    path: str
    status: int
    message: str
    reason: str = ""
    times: int = 1_000_000
    headers: dict[str, str] = field(default_factory=dict)
    details: Object = field(default_factory=dict)
    body: bytes | None = None
    drop: bool = False
    """Close the connection instead of answering; with a `body`, in the middle of it."""


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


class Refusal(Exception):
    """The answer to a request is this Status."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.details = code, reason, message, details or {}

    def status(self) -> Object:
        status: Object = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        status |= {"message": self.message, "reason": self.reason, "code": self.code}
        return status | ({"details": self.details} if self.details else {})


class KubernetesApi:
    """The server; use as a context manager. Every method may be called from any thread."""

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.kinds = copy.deepcopy(_KINDS)
        self.objects: dict[tuple[str, str], dict[tuple[str, str], Object]] = {}
        """{(apiVersion, kind): {(namespace, name): object}}"""
        self.owners: dict[tuple[str, str, str, str], dict[str, set[Path_]]] = {}
        self.events: list[tuple[int, str, Object]] = []
        """(resource version, type, object), for watches."""
        self.version, self.forgotten = 100, 0
        self.tokens = {TOKEN: USER}
        self.forbidden: set[tuple[str, str, str | None]] = set()
        self.faults: list[Fault] = []
        self.hooks: list[tuple[str, Hook]] = []
        self.webhooks: list[Webhook] = [knative_webhook]
        self.logs: dict[tuple[str, str, str], list[str]] = {}
        self.asked: list[Asked] = []
        self.watches_are_cut = 0
        self.is_closing = False
        self._server = _Server(("127.0.0.1", 0), self)
        self.certificate = certificate
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        for name in ("default", "kube-system", "knative-serving"):
            self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    # --- life --------------------------------------------------------------------------------------------------

    def __enter__(self) -> KubernetesApi:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self.changed:
            self.is_closing = True
            self.changed.notify_all()
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self._server.server_port}"

    def kubeconfig(self, path: Path, *, token: str = TOKEN, context: str = "test", namespace: str = "") -> Path:
        """Write a kubeconfig for this server to `path`."""
        cluster: Object = {"server": self.url}
        if self.certificate:
            cluster["certificate-authority"] = str(self.certificate[0])
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": context,
            "clusters": [{"name": "fake", "cluster": cluster}],
            "users": [{"name": USER, "user": {"token": token}}],
            "contexts": [
                {
                    "name": context,
                    "context": {"cluster": "fake", "user": USER} | ({"namespace": namespace} if namespace else {}),
                }
            ],
        }
        path.write_text(json.dumps(content))
        return path

    # --- what a test sets --------------------------------------------------------------------------------------

    def fail(self, method: str, path: str, status: int, message: str, reason: str = "", **rest: Any) -> Fault:
        """Answer requests whose path (with the query) matches the regular expression `path` by an error."""
        fault = Fault(method, path, status, message, reason, **rest)
        with self.lock:
            self.faults.append(fault)
        return fault

    def forbid(self, verb: str, resource: str, namespace: str | None = None) -> None:
        """Deny a verb on a resource such as `services.serving.knative.dev`, everywhere or in one namespace."""
        self.forbidden.add((verb, resource, namespace))

    def remove_group(self, group: str) -> None:
        """Uninstall a component: its kinds are no longer known."""
        with self.lock:
            for api_version in [v for v in self.kinds if v.rpartition("/")[0] == group]:
                del self.kinds[api_version]

    def on(self, kind: str, hook: Hook) -> None:
        """Call `hook(server, object)` after each write by a client to an object of `kind`; a controller's part."""
        self.hooks.append((kind, hook))

    def forget(self) -> None:
        """Drop the history of changes, so that watches of the past get 410 Gone, and cut those that run."""
        with self.changed:
            self.version += 1
            self.forgotten = self.version
            self.events.clear()
            self.cut_watches()

    def cut_watches(self) -> None:
        """End the watches that run."""
        with self.changed:
            self.watches_are_cut += 1
            self.changed.notify_all()

    def put(self, obj: Object) -> Object:
        """Store an object as a controller or an administrator would, without checks and hooks."""
        with self.changed:
            metadata = obj["metadata"]
            if self._is_namespaced(obj):
                metadata.setdefault("namespace", "default")
            return copy.deepcopy(self._store(copy.deepcopy(obj)))

    def get(self, api_version: str, kind: str, name: str, namespace: str = "default") -> Object | None:
        """The object as stored; None if there is none."""
        with self.lock:
            place = namespace if self.kinds.get(api_version, {}).get(kind, ("", True))[1] else ""
            found = self.objects.get((api_version, kind), {}).get((place, name))
            return copy.deepcopy(found)

    def all(self, api_version: str, kind: str) -> list[Object]:
        """All objects of a kind."""
        with self.lock:
            return copy.deepcopy(list(self.objects.get((api_version, kind), {}).values()))

    def set_status(self, obj: Object, status: Object) -> None:
        """Write an object's status, as its controller does; nothing if the object is gone."""
        with self.changed:
            key = obj["metadata"].get("namespace", ""), obj["metadata"]["name"]
            found = self.objects.get((obj["apiVersion"], obj["kind"]), {}).get(key)
            if found is not None:
                self._store({**copy.deepcopy(found), "status": copy.deepcopy(status)})

    def remove(self, api_version: str, kind: str, name: str, namespace: str = "default") -> None:
        """Delete an object and what it owns."""
        with self.changed:
            place = namespace if self.kinds.get(api_version, {}).get(kind, ("", True))[1] else ""
            self._delete(api_version, kind, (place, name))

    def claim_fields(self, obj: Object, manager: str) -> None:
        """Store an object as applied by another manager, such as `kn`, who then owns its fields."""
        obj = copy.deepcopy(obj)
        with self.changed:
            self.put(obj)
            self.owners[_identity(obj)] = {manager: _leaves(_applied(obj), _is_knative(obj))}

    # --- store -------------------------------------------------------------------------------------------------

    def _is_namespaced(self, obj: Object) -> bool:
        return self.kinds.get(obj["apiVersion"], {}).get(obj["kind"], ("", True))[1]

    def _store(self, obj: Object) -> Object:
        """Write as the server does, with versions and events, unless nothing has changed; the object stored."""
        metadata = obj["metadata"]
        objects = self.objects.setdefault((obj["apiVersion"], obj["kind"]), {})
        key = metadata.get("namespace", ""), metadata["name"]
        before = objects.get(key)
        if before is None:
            metadata.setdefault("uid", f"uid-{self.version}")
            metadata.setdefault("creationTimestamp", "2026-11-22T12:00:00Z")
            metadata["generation"] = 1
        else:
            for name in ("uid", "creationTimestamp", "generation", "resourceVersion"):
                metadata[name] = before["metadata"][name]
            if before == obj:
                return before
            if _desired(before) != _desired(obj):
                metadata["generation"] += 1
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        objects[key] = obj
        self.events.append((self.version, "MODIFIED" if before else "ADDED", copy.deepcopy(obj)))
        self.changed.notify_all()
        return obj

    def _delete(self, api_version: str, kind: str, key: tuple[str, str]) -> Object | None:
        obj = self.objects.get((api_version, kind), {}).pop(key, None)
        if obj is None:
            return None
        self.version += 1
        gone = copy.deepcopy(obj)
        gone["metadata"]["resourceVersion"] = str(self.version)
        self.events.append((self.version, "DELETED", gone))
        self.owners.pop(_identity(obj), None)
        self.changed.notify_all()
        uid = obj["metadata"]["uid"]
        owned = [
            (v, k, place)
            for (v, k), objects in self.objects.items()
            for place, other in objects.items()
            if any(owner.get("uid") == uid for owner in other["metadata"].get("ownerReferences", ()))
        ]
        for owned_version, owned_kind, place in owned:
            self._delete(owned_version, owned_kind, place)
        if kind == "Namespace":
            for (v, k), objects in list(self.objects.items()):
                for place in [place for place in objects if place[0] == key[1]]:
                    self._delete(v, k, place)
        return gone

    # --- requests ----------------------------------------------------------------------------------------------

    def answer(self, asked: Asked) -> tuple[int, Any]:
        """(status, document) for a request other than a watch or a followed log."""
        if asked.path == "/version":
            return 200, {"major": "1", "minor": "35", "gitVersion": "v1.35.0"}
        if asked.path in ("/readyz", "/livez", "/healthz"):
            return 200, {"status": "ok"}
        target = self.target(asked)
        if target is None:
            return 200, self._discovery(asked.path)
        with self.changed:
            return self._act(asked, target)

    def target(self, asked: Asked) -> Target | None:
        """What the path names; None for discovery. Raises the 404 of a path that names nothing."""
        parts = [unquote(part) for part in asked.path.strip("/").split("/")]
        size = 2 if parts[0] == "api" else 3
        api_version, rest = "/".join(parts[1:size]), parts[size:]
        if parts[0] not in ("api", "apis"):
            raise _page_not_found()
        if not rest:
            return None
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        for kind, (plural, namespaced) in self.kinds.get(api_version, {}).items():
            if plural == rest[0]:
                name = rest[1] if len(rest) > 1 else ""
                subresource = rest[2] if len(rest) > 2 else ""
                return Target(api_version, kind, plural, namespaced, namespace, name, subresource)
        raise _page_not_found()

    def _discovery(self, path: str) -> Object:
        if path in ("/api", "/apis"):
            groups = sorted({v.rpartition("/")[0] for v in self.kinds} - {""})
            return {"kind": "APIGroupList", "groups": [{"name": group} for group in groups]}
        api_version = path.strip("/").partition("/")[2]
        if api_version not in self.kinds:
            raise _page_not_found()
        verbs = ["create", "delete", "get", "list", "patch", "watch"]
        return {
            "kind": "APIResourceList",
            "groupVersion": api_version,
            "resources": [
                {"name": plural + suffix, "kind": kind, "namespaced": namespaced, "verbs": verbs}
                for kind, (plural, namespaced) in self.kinds[api_version].items()
                for suffix in ("", "/status")
            ],
        }

    def check_permission(self, asked: Asked, target: Target) -> None:
        """Raise 401 or 403 unless whoever asks may."""
        user = self.tokens.get(asked.headers.get("authorization", "").removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Unauthorized", "Unauthorized")
        verb = target.verb(asked)
        resource = target.plural + (f"/{target.subresource}" if target.subresource else "")
        group = target.api_version.rpartition("/")[0]
        qualified = (f"{target.plural}.{group}" if group else target.plural) + (
            f"/{target.subresource}" if target.subresource else ""
        )
        for place in (None, target.namespace):
            if (verb, qualified, place) in self.forbidden:
                where = f' in the namespace "{target.namespace}"' if target.namespace else " at the cluster scope"
                name = f' "{target.name}"' if target.name else ""
                raise Refusal(
                    403,
                    "Forbidden",
                    f'{qualified}{name} is forbidden: User "{user}" cannot {verb} resource "{resource}" '
                    f'in API group "{group}"{where}',
                    {"name": target.name, "group": group, "kind": target.plural},
                )

    def _act(self, asked: Asked, target: Target) -> tuple[int, Any]:
        self.check_permission(asked, target)
        if asked.method == "GET":
            return 200, self._log(asked, target) if target.subresource == "log" else self._read(asked, target)
        if asked.method == "POST" and target.kind == "SelfSubjectAccessReview":
            return 201, self._review(asked)
        if (
            target.namespaced
            and target.namespace
            and asked.method in ("POST", "PATCH", "PUT")
            and ("", target.namespace) not in self.objects[("v1", "Namespace")]
        ):
            details = {"name": target.namespace, "kind": "namespaces"}
            raise Refusal(404, "NotFound", f'namespaces "{target.namespace}" not found', details)
        match asked.method:
            case "POST":
                return 201, self._create(asked, target)
            case "PATCH" | "PUT":
                return 200, self._change(asked, target)
            case "DELETE":
                return 200, self._remove(asked, target)
        raise Refusal(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def _review(self, asked: Asked) -> Object:
        attributes = asked.body["spec"]["resourceAttributes"]
        group = attributes.get("group", "")
        resource = attributes["resource"] + (
            f"/{attributes['subresource']}" if attributes.get("subresource") else ""
        )
        plural, slash, subresource = resource.partition("/")
        qualified = (f"{plural}.{group}" if group else plural) + slash + subresource
        denied = any(
            (attributes["verb"], qualified, place) in self.forbidden
            for place in (None, attributes.get("namespace"))
        )
        return {**asked.body, "status": {"allowed": not denied}}

    def _read(self, asked: Asked, target: Target) -> Object:
        if target.name:
            return self._existing(target)
        return {
            "kind": f"{target.kind}List",
            "apiVersion": target.api_version,
            "metadata": {"resourceVersion": str(self.version)},
            "items": [
                {name: value for name, value in obj.items() if name not in ("kind", "apiVersion")}
                for obj in self.selected(asked, target)
            ],
        }

    def selected(self, asked: Asked, target: Target) -> list[Object]:
        """The objects that a list or watch is about."""
        objects = self.objects.get((target.api_version, target.kind), {})
        return [copy.deepcopy(obj) for obj in objects.values() if target.selects(asked, obj)]

    def _existing(self, target: Target) -> Object:
        objects = self.objects.get((target.api_version, target.kind), {})
        found = objects.get((target.namespace if target.namespaced else "", target.name))
        if found is None:
            raise target.missing()
        obj = copy.deepcopy(found)
        if target.subresource == "scale":
            replicas = obj.get("spec", {}).get("replicas", 1)
            return {"kind": "Scale", "metadata": obj["metadata"], "spec": {"replicas": replicas}}
        return obj

    def _log(self, asked: Asked, target: Target) -> str:
        self._existing(replace(target, subresource=""))
        container = asked.query.get("container", "")
        if asked.query.get("previous") == "true":
            container += ":previous"
        lines = self.logs.get((target.namespace, target.name, container))
        if lines is None:
            said = f'container "{container}" in pod "{target.name}" is waiting to start: ContainerCreating'
            raise Refusal(400, "BadRequest", said)
        tail = asked.query.get("tailLines")
        return "".join(f"{line}\n" for line in (lines[-int(tail) :] if tail else lines))

    def _create(self, asked: Asked, target: Target) -> Object:
        obj = copy.deepcopy(asked.body)
        metadata = obj.setdefault("metadata", {})
        if "generateName" in metadata:
            metadata.setdefault("name", f"{metadata['generateName']}{self.version:05d}")
        if target.namespaced:
            metadata["namespace"] = target.namespace
        key = metadata.get("namespace", ""), metadata["name"]
        if key in self.objects.get((target.api_version, target.kind), {}):
            said = f'{target.plural} "{metadata["name"]}" already exists'
            raise Refusal(409, "AlreadyExists", said, {"name": metadata["name"], "kind": target.plural})
        return self._admit(asked, obj)

    def _remove(self, asked: Asked, target: Target) -> Object:
        obj = self._existing(target)
        if asked.query.get("dryRun") != "All":
            self._delete(target.api_version, target.kind, (obj["metadata"].get("namespace", ""), target.name))
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}

    def _change(self, asked: Asked, target: Target) -> Object:
        content_type = asked.headers.get("content-type", "")
        if content_type == "application/apply-patch+yaml":
            return self._apply(asked, target)
        before = self._existing(replace(target, subresource=""))
        if target.subresource == "scale":
            before.setdefault("spec", {})["replicas"] = asked.body["spec"]["replicas"]
            return self._admit(asked, before)
        after = asked.body if asked.method == "PUT" else _merged(before, asked.body)
        if target.subresource == "status":
            after = {**before, "status": after.get("status", {})}
            stored = self._store(after)
            self._call_hooks(asked, stored)
            return copy.deepcopy(stored)
        wanted = asked.body.get("metadata", {}).get("resourceVersion")
        if wanted and wanted != before["metadata"]["resourceVersion"]:
            said = (
                f'Operation cannot be fulfilled on {target.plural} "{target.name}": the object has been modified'
            )
            raise Refusal(409, "Conflict", said, {"name": target.name, "kind": target.plural})
        return self._admit(asked, after)

    def _apply(self, asked: Asked, target: Target) -> Object:
        """Server-side apply: whoever sets a field owns it, alone or with those who set it to the same value."""
        manager = asked.query.get("fieldManager")
        if not manager:
            raise Refusal(400, "BadRequest", "fieldManager is required for apply patch")
        wanted = copy.deepcopy(asked.body)
        if wanted.get("metadata", {}).get("managedFields"):
            raise Refusal(400, "BadRequest", "metadata.managedFields must be nil")
        if wanted.get("metadata", {}).get("name") != target.name or wanted.get("kind") != target.kind:
            raise Refusal(400, "BadRequest", "the object's name and kind do not match those of the request")
        key = target.namespace if target.namespaced else "", target.name
        if target.namespaced:
            wanted["metadata"]["namespace"] = target.namespace
        self._check_fields(asked, wanted)
        before = copy.deepcopy(self.objects.get((target.api_version, target.kind), {}).get(key))
        is_knative = _is_knative(wanted)
        applied = _leaves(_applied(wanted), is_knative)
        identity = _identity(wanted)
        owners = {name: set(paths) for name, paths in self.owners.get(identity, {}).items()}
        if before is not None:
            self._check_owners(asked, owners, manager, applied, before, wanted)
        after = before or {
            "apiVersion": target.api_version,
            "kind": target.kind,
            "metadata": {"name": target.name},
        }
        others = set().union(*(paths for name, paths in owners.items() if name != manager))
        for path in owners.get(manager, set()) - applied:
            if path not in others:
                _unset(after, path)
        for path in sorted(applied):
            _set(after, path, _value(wanted, path))
        after["metadata"] = {**after["metadata"], "name": target.name}
        if target.namespaced:
            after["metadata"]["namespace"] = target.namespace
        owners[manager] = applied
        after["metadata"]["managedFields"] = [
            {"manager": name, "operation": "Apply", "apiVersion": target.api_version, "fieldsType": "FieldsV1"}
            for name, paths in sorted(owners.items())
            if paths
        ]
        result = self._admit(asked, after, is_checked=True)
        if asked.query.get("dryRun") != "All":
            self.owners[identity] = owners
        return result

    def _check_owners(
        self,
        asked: Asked,
        owners: dict[str, set[Path_]],
        manager: str,
        applied: set[Path_],
        before: Object,
        wanted: Object,
    ) -> None:
        causes = []
        for other, paths in sorted(owners.items()):
            if other == manager:
                continue
            for path in sorted(paths & applied):
                if _value(before, path) == _value(wanted, path):
                    continue
                if asked.query.get("force") == "true":
                    paths.discard(path)
                    continue
                causes.append(
                    {
                        "reason": "FieldManagerConflict",
                        "message": f'conflict with "{other}" using {wanted["apiVersion"]}',
                        "field": "." + ".".join(path),
                    }
                )
        if causes:
            lines = "".join(f"\n- {cause['field']}" for cause in causes)
            said = f"Apply failed with {len(causes)} conflicts: {causes[0]['message']}:{lines}"
            raise Refusal(409, "Conflict", said, {"causes": causes})

    def _check_fields(self, asked: Asked, obj: Object) -> None:
        if (obj["apiVersion"], obj["kind"]) not in knative_schema.schemas():
            return
        found = knative_schema.problems(obj)
        unknown = [place for place, problem in found if problem == "unknown field"]
        if unknown and asked.query.get("fieldValidation") == "Strict":
            said = ", ".join(f'unknown field "{place}"' for place in unknown)
            raise Refusal(400, "BadRequest", f"strict decoding error: {said}")
        wrong = [(place, problem) for place, problem in found if problem != "unknown field"]
        if wrong:
            name = obj["metadata"].get("name", "")
            said = ", ".join(f"{place}: {problem}" for place, problem in wrong)
            raise Refusal(
                422,
                "Invalid",
                f'{obj["kind"]} "{name}" is invalid: {said}',
                {
                    "name": name,
                    "kind": obj["kind"],
                    "causes": [
                        {"reason": "FieldValueInvalid", "message": problem, "field": place}
                        for place, problem in wrong
                    ],
                },
            )

    def _admit(self, asked: Asked, obj: Object, *, is_checked: bool = False) -> Object:
        """What a write goes through before it is kept: field validation and webhooks."""
        if not is_checked:
            self._check_fields(asked, obj)
        for webhook in self.webhooks:
            denial = webhook(self, obj)
            if denial:
                raise Refusal(400, "BadRequest", denial)
        if asked.query.get("dryRun") == "All":
            return obj
        stored = self._store(obj)
        answer = copy.deepcopy(stored)
        self._call_hooks(asked, answer)
        return answer

    def _call_hooks(self, asked: Asked, obj: Object) -> None:
        for kind, hook in self.hooks:
            if kind == obj["kind"]:
                hook(self, copy.deepcopy(obj))


@dataclass(frozen=True)
class Target:
    """What a path names."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool
    namespace: str
    name: str
    subresource: str

    def verb(self, asked: Asked) -> str:
        if asked.method == "GET":
            return "watch" if asked.query.get("watch") == "true" else "get" if self.name else "list"
        return {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[asked.method]

    def missing(self) -> Refusal:
        group = self.api_version.rpartition("/")[0]
        plural = f"{self.plural}.{group}" if group else self.plural
        details = {"name": self.name, "group": group, "kind": self.plural}
        return Refusal(404, "NotFound", f'{plural} "{self.name}" not found', details)

    def selects(self, asked: Asked, obj: Object) -> bool:
        metadata = obj["metadata"]
        if self.namespace and metadata.get("namespace", "") != self.namespace:
            return False
        for term in filter(None, asked.query.get("fieldSelector", "").split(",")):
            name, _, value = term.partition("=")
            if name not in ("metadata.name", "metadata.namespace"):
                raise Refusal(400, "BadRequest", f'field label not supported: "{name}"')
            if metadata.get(name.removeprefix("metadata.")) != value.lstrip("="):
                return False
        labels = metadata.get("labels") or {}
        for term in filter(None, asked.query.get("labelSelector", "").split(",")):
            name, equals, value = term.partition("=")
            if name.endswith("!"):
                if labels.get(name[:-1]) == value:
                    return False
            elif name not in labels or (equals and labels[name] != value.lstrip("=")):
                return False
        return True


def _page_not_found() -> Refusal:
    return Refusal(404, "NotFound", "the server could not find the requested resource")


# --- fields --------------------------------------------------------------------------------------------------


def _identity(obj: Object) -> tuple[str, str, str, str]:
    metadata = obj["metadata"]
    return obj["apiVersion"], obj["kind"], metadata.get("namespace", ""), metadata["name"]


def _is_knative(obj: Object) -> bool:
    return ".knative.dev/" in obj["apiVersion"]


def _applied(obj: Object) -> Object:
    """What of an object can be owned."""
    metadata = {
        name: value
        for name, value in obj["metadata"].items()
        if name in ("labels", "annotations", "ownerReferences")
    }
    rest = {name: v for name, v in obj.items() if name not in ("apiVersion", "kind", "metadata", "status")}
    return {"metadata": metadata, **rest} if metadata else rest


def _leaves(value: Any, is_knative: bool, path: Path_ = ()) -> set[Path_]:
    """Paths of what has one owner; an item of a list that is a map has a step `[key=value]`."""
    if isinstance(value, dict) and (value or not path):
        return set().union(*(_leaves(item, is_knative, (*path, name)) for name, item in value.items()))
    if isinstance(value, list) and value and (key := _list_key(path, is_knative)):
        found: set[Path_] = set()
        for item in value:
            if not isinstance(item, dict) or key not in item:
                return {path}
            found |= _leaves(item, is_knative, (*path, f"[{key}={item[key]}]"))
        return found
    return {path}


def _list_key(path: Path_, is_knative: bool) -> str | None:
    if is_knative and path[-1] in ("containers", "initContainers", "env", "volumeMounts"):
        return None  # the container list of a Knative Service has one owner
    return _LIST_KEYS.get(path[-1])


def _step(value: Any, step: str) -> Any:
    if isinstance(value, list):
        key, _, wanted = step.strip("[]").partition("=")
        return next((item for item in value if str(item.get(key)) == wanted), None)
    return value.get(step) if isinstance(value, dict) else None


def _value(obj: Any, path: Path_) -> Any:
    for step in path:
        obj = _step(obj, step)
    return obj


def _set(obj: Any, path: Path_, value: Any) -> None:
    for step, following in pairwise(path):
        below = _step(obj, step)
        if below is None:
            if isinstance(obj, list):
                key, _, wanted = step.strip("[]").partition("=")
                below = {key: wanted}
                obj.append(below)
            else:
                below = obj[step] = [] if following.startswith("[") else {}
        obj = below
    obj[path[-1]] = copy.deepcopy(value)


def _unset(obj: Any, path: Path_) -> None:
    *steps, last = path
    parents = [obj]
    for step in steps:
        parents.append(_step(parents[-1], step))
        if parents[-1] is None:
            return
    parents[-1].pop(last, None)
    for parent, step in reversed(list(zip(parents, steps, strict=False))):
        below = _step(parent, step)
        if isinstance(parent, list) and set(below) <= {step.strip("[]").partition("=")[0]}:
            parent.remove(below)
        elif isinstance(parent, dict) and not below:
            del parent[step]


def _merged(value: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = dict(value) if isinstance(value, dict) else {}
    for name, item in patch.items():
        if item is None:
            result.pop(name, None)
        else:
            result[name] = _merged(result.get(name), item)
    return result


def _desired(obj: Object) -> Object:
    return {name: value for name, value in obj.items() if name not in ("metadata", "status")}


# --- Knative's parts -----------------------------------------------------------------------------------------

_SERVING_WEBHOOK = (
    'admission webhook "validation.webhook.serving.knative.dev" denied the request: validation failed: '
)


def knative_webhook(api: KubernetesApi, obj: Object) -> str | None:
    """Defaults, and some of the rules, that Knative Serving's webhook applies to a Service."""
    if obj["kind"] != "Service" or not obj["apiVersion"].startswith("serving."):
        return None
    for name in obj["metadata"].get("annotations") or {}:
        if name.startswith("autoscaling.knative.dev/"):
            return (
                f"{_SERVING_WEBHOOK}autoscaling annotations must be put under "
                f'"spec.template.metadata.annotations" to work: metadata.annotations[{name}]'
            )
    spec = obj["spec"]["template"]["spec"]
    features = api.get("v1", "ConfigMap", "config-features", "knative-serving") or {}
    flags = features.get("data") or {}
    for volume in spec.get("volumes", ()):
        if "hostPath" in volume and flags.get("kubernetes.podspec-volumes-hostpath") != "enabled":
            found = f"but found HostPath volume {volume['name']}"
            return f"{_SERVING_WEBHOOK}HostPath volume support is disabled, {found}"
        claim = volume.get("persistentVolumeClaim")
        if claim and flags.get("kubernetes.podspec-persistent-volume-claim") != "enabled":
            return (
                f"{_SERVING_WEBHOOK}Persistent volume claim support is disabled, "
                f"but found persistent volume claim {claim['claimName']}"
            )
    spec.setdefault("containerConcurrency", 0)
    spec.setdefault("timeoutSeconds", 300)
    spec.setdefault("enableServiceLinks", False)
    for container in spec["containers"]:
        container.setdefault("name", "user-container")
        container.setdefault("resources", {})
    return None


class KnativeController:
    """Plays Serving's controllers: each new template becomes a Revision with a pod, and the Service ready.

    With `failure` (reason, message) revisions do not become ready. `pod_status` is that of the pods.
    """

    def __init__(self, api: KubernetesApi, *, failure: tuple[str, str] | None = None) -> None:
        self.failure = failure
        self.pod_status: Object = {
            "phase": "Running",
            "containerStatuses": [{"name": "user-container", "ready": True}],
        }
        self.log: list[str] = []
        api.on("Service", self.reconcile)

    def reconcile(self, api: KubernetesApi, service: Object) -> None:
        if not service["apiVersion"].startswith("serving."):
            return
        metadata = service["metadata"]
        name, namespace, generation = metadata["name"], metadata["namespace"], metadata["generation"]
        revision = f"{name}-{generation:05d}"
        labels = {"serving.knative.dev/service": name, "serving.knative.dev/revision": revision}
        owner = {
            "apiVersion": service["apiVersion"],
            "kind": "Service",
            "name": name,
            "uid": metadata["uid"],
        }
        place = {"namespace": namespace, "labels": labels, "ownerReferences": [owner]}
        ready: Object = {"type": "Ready", "status": "True"}
        if self.failure:
            ready = {"type": "Ready", "status": "False", "reason": self.failure[0], "message": self.failure[1]}
        api.put(
            {
                "apiVersion": "serving.knative.dev/v1",
                "kind": "Revision",
                "metadata": {"name": revision, **copy.deepcopy(place)},
                "spec": service["spec"]["template"]["spec"],
                "status": {"conditions": [ready]},
            }
        )
        pod = f"{revision}-deployment-1"
        api.put(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": pod, **copy.deepcopy(place)},
                "spec": {"containers": [{"name": "user-container"}, {"name": "queue-proxy"}]},
                "status": self.pod_status,
            }
        )
        if self.log:
            api.logs[namespace, pod, "user-container"] = list(self.log)
        if self.failure:
            ready = {
                "type": "Ready",
                "status": "False",
                "reason": "RevisionFailed",
                "message": f'Revision "{revision}" failed with message: {self.failure[1]}.',
            }
        status: Object = {
            "observedGeneration": generation,
            "conditions": [
                ready,
                {**ready, "type": "ConfigurationsReady"},
                {"type": "RoutesReady", "status": "True"},
            ],
            "latestCreatedRevisionName": revision,
        }
        served = {"url", "address", "latestReadyRevisionName"}  # by the revision before, if there is one
        status |= {key: value for key, value in (service.get("status") or {}).items() if key in served}
        if not self.failure:
            status["latestReadyRevisionName"] = revision
            status["url"] = f"http://{name}.{namespace}.example.com"
            status["address"] = {"url": f"http://{name}.{namespace}.svc.cluster.local"}
        api.set_status(service, status)


# --- HTTP ----------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # server_close waits for them

    def __init__(self, address: tuple[str, int], api: KubernetesApi) -> None:
        super().__init__(address, _Handler)
        self.api = api
        self.connections: set[socket.socket] = set()

    def close_connections(self) -> None:
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients may break off, and distrust our certificate


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()
        self.server.connections.add(self.request)
        super().setup()

    def finish(self) -> None:
        self.server.connections.discard(self.request)
        super().finish()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _handle(self) -> None:
        api = self.server.api
        parts = urlsplit(self.path)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = Asked(
            self.command,
            parts.path,
            dict(parse_qsl(parts.query)),
            {name.lower(): value for name, value in self.headers.items()},
            json.loads(content) if content else None,
        )
        with api.lock:
            api.asked.append(asked)
            fault = next(
                (
                    f
                    for f in api.faults
                    if f.method in ("*", asked.method) and f.times and re.search(f.path, self.path)
                ),
                None,
            )
            if fault:
                fault.times -= 1
        try:
            if fault:
                self._fail(fault)
            elif asked.query.get("watch") == "true":
                self._watch(asked)
            elif asked.query.get("follow") == "true":
                self._follow(asked)
            else:
                status, document = api.answer(asked)
                self._reply(status, document)
        except Refusal as refusal:
            self._reply(refusal.code, refusal.status())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _fail(self, fault: Fault) -> None:
        if fault.drop:
            self.close_connection = True
            if fault.body is not None:
                self.send_response(fault.status)
                self.send_header("Content-Length", str(2 * len(fault.body)))
                self.end_headers()
                self.wfile.write(fault.body)
            return
        status = Refusal(fault.status, fault.reason, fault.message, fault.details).status()
        self._reply(fault.status, fault.body if fault.body is not None else status, fault.headers)

    def _reply(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        is_text = isinstance(document, str | bytes)
        content = document.encode() if isinstance(document, str) else document
        content = content if is_text else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if is_text else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def _watch(self, asked: Asked) -> None:
        api = self.server.api
        target = api.target(asked)
        assert target is not None
        api.check_permission(asked, target)
        since = int(asked.query.get("resourceVersion") or 0)
        deadline = time.monotonic() + float(asked.query.get("timeoutSeconds") or 300)
        with api.lock:
            cuts = api.watches_are_cut
        self._begin_stream()
        while True:
            with api.changed:
                if since < api.forgotten:
                    gone = Refusal(410, "Expired", f"too old resource version: {since} ({api.forgotten})").status()
                    events: list[tuple[int, str, Object]] = [(since, "ERROR", gone)]
                else:
                    events = [
                        event
                        for event in api.events
                        if event[0] > since
                        and (event[2]["apiVersion"], event[2]["kind"]) == (target.api_version, target.kind)
                        and target.selects(asked, event[2])
                    ]
                is_over = api.is_closing or api.watches_are_cut != cuts or time.monotonic() >= deadline
                if not events and not is_over:
                    api.changed.wait(min(0.5, max(0.0, deadline - time.monotonic())))
                    continue
            for version, kind, obj in events:
                self._chunk(json.dumps({"type": kind, "object": obj}).encode() + b"\n")
                since = version
            if is_over or (events and events[-1][1] == "ERROR"):
                self._chunk(b"")
                return

    def _follow(self, asked: Asked) -> None:
        api = self.server.api
        target = api.target(asked)
        assert target is not None
        with api.lock:
            api.check_permission(asked, target)
            key = target.namespace, target.name, asked.query.get("container", "")
            lines = api.logs.get(key)
        if lines is None:
            raise Refusal(400, "BadRequest", f'container "{key[2]}" in pod "{key[1]}" is waiting to start')
        self._begin_stream()
        sent = 0
        while True:
            with api.changed:
                new = lines[sent:]
                gone = target.namespaced and api.get("v1", "Pod", target.name, target.namespace) is None
                if not new and not api.is_closing and not gone:
                    api.changed.wait(0.5)
                    continue
            for line in new:
                self._chunk(f"{line}\n".encode())
            sent += len(new)
            if api.is_closing or gone:
                self._chunk(b"")
                return


@contextmanager
def kubernetes_api(directory: Path, **options: Any) -> Iterator[tuple[KubernetesApi, Path]]:
    """A running server, and a kubeconfig for it in `directory`."""
    with KubernetesApi(**options) as api:
        yield api, api.kubeconfig(directory / "kubeconfig")

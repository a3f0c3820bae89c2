"""The connection to a Kubernetes API server: objects as dicts, applied, read, watched and deleted.

The kubernetes client reads the kubeconfig and makes the TLS connections; the requests are our own, because each
answer has to become a sentence for the user and because objects of every kind are the same here.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import quote, urlencode

from lifl_knative.api_errors import (
    ClusterError,
    MissingKind,
    NotFound,
    Overloaded,
    Request,
    Unreachable,
    explain,
    missing_kind,
)
from lifl_knative.kubeconfig import Access, find_access

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

FIELD_MANAGER = "lifl-func"

PATIENCE_S = 20.0
"""How long a request is repeated while the server is busy or a webhook's pod is not up."""
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 4.0
_WATCH_S = 240
"""A watch is renewed after so long; the server may end it sooner."""

Object = dict[str, Any]
Objects = list[Object]
Hints = list[tuple[str, str]]
_Result = TypeVar("_Result")


class _Dropped(Unreachable):
    """The connection ended before the answer: an idle one that the server has closed, or a restart."""


@dataclass(frozen=True)
class Resource:
    """What discovery says of a kind."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool

    @property
    def group(self) -> str:
        """API group; empty for the core one."""
        return self.api_version.rpartition("/")[0]


class Cluster:
    """A connection to one cluster. Every method raises ClusterError (a CommandError) with hints for the user."""

    def __init__(self, access: Access, namespace: str | None = None) -> None:
        from kubernetes.client.rest import RESTClientObject

        self.context = access.context
        self.context_namespace = access.namespace
        """What the kubeconfig's context says; None if it says nothing."""
        self.namespace = namespace or access.namespace or "default"
        self.kubectl = access.kubectl
        self.server = str(access.configuration.host).rstrip("/")
        self._configuration = access.configuration
        try:
            self._pool: PoolManager = RESTClientObject(access.configuration).pool_manager
        except (OSError, ValueError) as error:
            raise Unreachable(f'the TLS settings of context "{self.context}" cannot be used: {error}') from None
        self._resources: dict[str, dict[str, Resource]] = {}

    @classmethod
    def connect(
        cls, kubeconfig: Path | None = None, context: str | None = None, namespace: str | None = None
    ) -> Cluster:
        """The cluster of `context`; nothing is sent yet. `namespace` overrides the context's."""
        return cls(find_access(kubeconfig, context), namespace)

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- objects -----------------------------------------------------------------------------------------------

    def apply(self, obj: Mapping[str, Any], *, dry_run: bool = False, force: bool = False) -> Object:
        """Apply `obj` as ours (server-side apply, unknown fields refused); the object as it is then.

        An object of a namespaced kind without a namespace goes to that of the connection. With `dry_run` the
        server checks and answers as usual and keeps nothing. `force` takes fields over that others own.
        """
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict", "force": str(force).lower()}
        if dry_run:
            query["dryRun"] = "All"
        metadata = obj["metadata"]
        resource = self._resource(obj["apiVersion"], obj["kind"], "patch")
        namespace = self._namespace_for(resource, metadata.get("namespace"))
        body = dict(obj)
        if namespace:
            body["metadata"] = {**metadata, "namespace": namespace}
        return self._json(
            "PATCH", resource, "patch", namespace, metadata["name"], query, body, "application/apply-patch+yaml"
        )

    def create(self, obj: Mapping[str, Any], *, dry_run: bool = False) -> Object:
        """Create `obj`, such as an Event or a review of permissions; Conflict if its name is taken."""
        resource = self._resource(obj["apiVersion"], obj["kind"], "create")
        namespace = self._namespace_for(resource, obj.get("metadata", {}).get("namespace"))
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"} | (
            {"dryRun": "All"} if dry_run else {}
        )
        return self._json("POST", resource, "create", namespace, "", query, dict(obj))

    def get(self, api_version: str, kind: str, name: str, namespace: str | None = None) -> Object | None:
        """The object, or None if there is none. Raises MissingKind if the cluster does not know the kind."""
        resource = self._resource(api_version, kind, "get")
        try:
            return self._json("GET", resource, "get", self._namespace_for(resource, namespace), name)
        except NotFound:
            return None

    def list(self, api_version: str, kind: str, namespace: str | None = None, selector: str = "") -> Objects:
        """The objects of a kind whose labels match `selector`; `namespace="*"` stands for all of them."""
        resource = self._resource(api_version, kind, "list")
        return self._list(resource, self._namespace_for(resource, namespace), selector, None)[0]

    def delete(self, api_version: str, kind: str, name: str, namespace: str | None = None) -> bool:
        """Delete the object, and in the background what it owns; False if there was none."""
        resource = self._resource(api_version, kind, "delete")
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        try:
            self._json("DELETE", resource, "delete", self._namespace_for(resource, namespace), name, body=body)
        except NotFound:
            return False
        return True

    def patch(
        self,
        api_version: str,
        kind: str,
        name: str,
        patch: Mapping[str, Any],
        namespace: str | None = None,
        *,
        subresource: str = "",
    ) -> Object:
        """Merge `patch` into the object (or its `subresource`: `status`, `scale`); the object as it is then."""
        resource = self._resource(api_version, kind, "patch")
        return self._json(
            "PATCH",
            resource,
            "patch",
            self._namespace_for(resource, namespace),
            name,
            {"fieldManager": FIELD_MANAGER},
            dict(patch),
            "application/merge-patch+json",
            subresource,
        )

    def patch_status(self, obj: Mapping[str, Any]) -> Object:
        """Make `obj["status"]` the object's status, field by field; lists in it are replaced whole."""
        metadata = obj["metadata"]
        patch = {"status": obj["status"]}
        return self.patch(
            obj["apiVersion"],
            obj["kind"],
            metadata["name"],
            patch,
            metadata.get("namespace"),
            subresource="status",
        )

    def patch_scale(
        self, api_version: str, kind: str, name: str, replicas: int, namespace: str | None = None
    ) -> Object:
        """Set the number of replicas of a Deployment or the like."""
        patch = {"spec": {"replicas": replicas}}
        return self.patch(api_version, kind, name, patch, namespace, subresource="scale")

    def has(self, api_version: str, kind: str) -> bool:
        """Whether the cluster knows the kind: whether the CRD is installed."""
        try:
            self._resource(api_version, kind, "get")
        except MissingKind:
            return False
        return True

    def server_version(self) -> str:
        """Version of Kubernetes, such as `v1.33.1`; also the cheapest question whether the server answers."""
        request = Request("get", "", "version", "version", context=self.context, kubectl=self.kubectl)
        answer = self._repeat(lambda: self._exchange("GET", "/version", request))
        return str(answer.get("gitVersion", "unknown"))

    # --- watching ----------------------------------------------------------------------------------------------

    def watch(
        self,
        api_version: str,
        kind: str,
        namespace: str | None = None,
        name: str | None = None,
        *,
        selector: str = "",
        seconds: float | None = None,
    ) -> Iterator[Object]:
        """Events `{"type": "ADDED" | "MODIFIED" | "DELETED", "object": ...}` for `seconds` (None: for ever).

        Begins with an ADDED for each object there is. When the server has forgotten where we were (410 Gone), or
        the connection drops, it lists again and yields what has changed meanwhile.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        resource = self._resource(api_version, kind, "watch")
        place = self._namespace_for(resource, namespace)
        known: dict[tuple[str, str], Object] = {}
        version = ""
        while deadline is None or time.monotonic() < deadline:
            if not version:
                objects, version = self._list(resource, place, selector, name)
                yield from self._replaced(known, objects)
            try:
                for event in self._stream(resource, place, selector, name, version, deadline):
                    version = event["object"].get("metadata", {}).get("resourceVersion") or version
                    if event["type"] == "BOOKMARK":
                        continue
                    if event["type"] == "DELETED":
                        known.pop(_key(event["object"]), None)
                    else:
                        known[_key(event["object"])] = event["object"]
                    yield event
            except ClusterError as error:
                if error.status == 410:
                    version = ""
                elif isinstance(error, Unreachable | Overloaded):
                    version = ""  # the list that follows is repeated while the server is away, then raises
                    time.sleep(_FIRST_WAIT_S)
                else:
                    raise

    @staticmethod
    def _replaced(known: dict[tuple[str, str], Object], objects: Objects) -> Iterator[Object]:
        listed = {_key(obj): obj for obj in objects}
        for key in [key for key in known if key not in listed]:
            yield {"type": "DELETED", "object": known.pop(key)}
        for key, obj in listed.items():
            before = known.get(key)
            known[key] = obj
            if before is None:
                yield {"type": "ADDED", "object": obj}
            elif before["metadata"].get("resourceVersion") != obj["metadata"].get("resourceVersion"):
                yield {"type": "MODIFIED", "object": obj}

    def _stream(
        self,
        resource: Resource,
        namespace: str,
        selector: str,
        name: str | None,
        version: str,
        deadline: float | None,
    ) -> Iterator[Object]:
        left = _WATCH_S if deadline is None else min(_WATCH_S, deadline - time.monotonic())
        limit = max(1, round(left))
        query = {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(limit),
            **_selectors(selector, name),
        }
        request = self._request(resource, "watch", namespace, name or "")
        path = _path(resource, namespace) + "?" + urlencode(query)
        # The server ends it in time, so that the connection can be used again, but for less than a second.
        read_s = limit + CONNECT_TIMEOUT_S if left >= 1 else max(0.05, left)
        response = self._send("GET", path, request, read_s=read_s)
        try:
            for line in self._lines(response, request, deadline):
                try:
                    event = json.loads(line)
                except ValueError:  # the stream was cut off within a line
                    return
                if event.get("type") == "ERROR":
                    status = event.get("object") or {}
                    raise explain(int(status.get("code") or 500), json.dumps(status).encode(), request)
                yield event
        finally:
            response.close()

    def _lines(self, response: BaseHTTPResponse, request: Request, deadline: float | None) -> Iterator[bytes]:
        """Lines of a stream until it ends, or `deadline` passes."""
        import urllib3.exceptions

        buffer = b""
        try:
            for chunk in response.stream(1 << 16, decode_content=True):
                *lines, buffer = (buffer + chunk).split(b"\n")
                yield from (line for line in lines if line)
                if deadline is not None and time.monotonic() >= deadline:
                    return
            if buffer:
                yield buffer
        except urllib3.exceptions.ReadTimeoutError:
            return
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _Dropped(f"the connection to {self.server} was lost: {error}", self._hints()) from None

    # --- logs --------------------------------------------------------------------------------------------------

    def pod_log(
        self,
        namespace: str,
        pod: str,
        container: str,
        tail: int | None = None,
        *,
        previous: bool = False,
        since_s: int | None = None,
    ) -> str:
        """The last `tail` lines of a container's log, or of that before its restart; empty if there is none."""
        path, request = self._log_path(namespace, pod, container, tail, since_s, previous=previous)
        try:
            return self._repeat(lambda: self._text(path, request))
        except ClusterError as error:
            if error.status in (400, 404):  # no such container yet, or none before it
                return ""
            raise

    def follow_log(
        self, namespace: str, pod: str, container: str, *, tail: int | None = None, since_s: int | None = None
    ) -> Iterator[str]:
        """Lines of a container's log as they are written, until the container ends."""
        path, request = self._log_path(namespace, pod, container, tail, since_s, follow=True)
        response = self._send("GET", path, request, read_s=None)
        try:
            for line in self._lines(response, request, None):
                yield line.decode(errors="replace")
        finally:
            response.close()

    def _log_path(
        self,
        namespace: str,
        pod: str,
        container: str,
        tail: int | None,
        since_s: int | None,
        *,
        follow: bool = False,
        previous: bool = False,
    ) -> tuple[str, Request]:
        query = {"container": container}
        query |= {"tailLines": str(tail)} if tail is not None else {}
        query |= {"sinceSeconds": str(since_s)} if since_s is not None else {}
        query |= {"follow": "true"} if follow else {}
        query |= {"previous": "true"} if previous else {}
        path = f"/api/v1/namespaces/{quote(namespace)}/pods/{quote(pod)}/log?{urlencode(query)}"
        request = Request("get", "", "pods/log", "Pod", pod, namespace, self.context, self.server, self.kubectl)
        return path, request

    def _text(self, path: str, request: Request) -> str:
        return self._read(self._send("GET", path, request)).decode(errors="replace")

    # --- discovery ---------------------------------------------------------------------------------------------

    def _resource(self, api_version: str, kind: str, verb: str) -> Resource:
        known = self._resources.get(api_version)
        if known is None:
            known = self._discover(api_version)
            if known:  # a group that is missing may be installed while we run
                self._resources[api_version] = known
        if kind in known:
            return known[kind]
        group = api_version.rpartition("/")[0]
        plural = f"{kind.lower()}s"
        raise missing_kind(
            Request(verb, group, plural, kind, context=self.context, server=self.server, kubectl=self.kubectl)
        )

    def _discover(self, api_version: str) -> dict[str, Resource]:
        path = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
        group = api_version.rpartition("/")[0]
        request = Request("get", group, api_version, "API", context=self.context, server=self.server)
        try:
            answer = self._repeat(lambda: self._exchange("GET", path, request))
        except (NotFound, MissingKind):
            return {}
        return {
            entry["kind"]: Resource(api_version, entry["kind"], entry["name"], bool(entry["namespaced"]))
            for entry in answer.get("resources", ())
            if "/" not in entry["name"]
        }

    def _namespace_for(self, resource: Resource, namespace: str | None) -> str:
        if not resource.namespaced or namespace == "*":
            return ""
        return namespace or self.namespace

    # --- requests ----------------------------------------------------------------------------------------------

    def _list(self, resource: Resource, namespace: str, selector: str, name: str | None) -> tuple[Objects, str]:
        """The objects, and the version from which to watch."""
        answer = self._json("GET", resource, "list", namespace, query=_selectors(selector, name))
        objects = answer.get("items") or []
        for obj in objects:  # lists leave these out of their items
            obj.setdefault("apiVersion", resource.api_version)
            obj.setdefault("kind", resource.kind)
        return objects, str(answer.get("metadata", {}).get("resourceVersion", ""))

    def _json(
        self,
        method: str,
        resource: Resource,
        verb: str,
        namespace: str,
        name: str = "",
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        subresource: str = "",
    ) -> Object:
        request = self._request(resource, verb, namespace, name, subresource)
        path = _path(resource, namespace, name, subresource)
        path += f"?{urlencode(query)}" if query else ""
        return self._repeat(lambda: self._exchange(method, path, request, body, content_type))

    def _request(self, resource: Resource, verb: str, namespace: str, name: str, subresource: str = "") -> Request:
        plural = f"{resource.plural}/{subresource}" if subresource else resource.plural
        return Request(
            verb, resource.group, plural, resource.kind, name, namespace, self.context, self.server, self.kubectl
        )

    def _repeat(self, attempt: Callable[[], _Result]) -> _Result:
        """Repeat what may succeed later: a busy server, a webhook whose pod starts, an idle connection closed."""
        from tenacity import (
            RetryCallState,
            Retrying,
            retry_if_exception,
            stop_before_delay,
            wait_random_exponential,
        )

        def may_pass(error: BaseException) -> bool:
            return isinstance(error, _Dropped) or (isinstance(error, Overloaded) and error.may_pass)

        back_off = wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.retry_after if isinstance(error, Overloaded) else None
            return back_off(state) if asked is None else min(asked, PATIENCE_S)

        retrying = Retrying(
            retry=retry_if_exception(may_pass), stop=stop_before_delay(PATIENCE_S), wait=wait, reraise=True
        )
        return retrying(attempt)

    def _exchange(
        self,
        method: str,
        path: str,
        request: Request,
        body: object = None,
        content_type: str = "application/json",
    ) -> Object:
        """Send one request; the JSON object of the answer."""
        content = self._read(self._send(method, path, request, body, content_type))
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Unreachable(f"what answers at {self.server} is no Kubernetes API server", self._hints())
        return answer

    def _read(self, response: BaseHTTPResponse) -> bytes:
        """The whole body; the connection may then be used again."""
        import urllib3.exceptions

        try:
            return bytes(response.data)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreachable(error) from None
        finally:
            response.release_conn()

    def _send(
        self,
        method: str,
        path: str,
        request: Request,
        body: object = None,
        content_type: str = "application/json",
        *,
        read_s: float | None = READ_TIMEOUT_S,
    ) -> BaseHTTPResponse:
        """Send one request; the answer, not yet read, if it is below 400."""
        import urllib3
        import urllib3.exceptions

        headers = {"Accept": "application/json", "User-Agent": "lifl-func"}
        for setting in self._configuration.auth_settings().values():
            if setting["in"] == "header" and setting["value"]:
                headers[setting["key"]] = setting["value"]
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = content_type
        try:
            response = self._pool.request(
                method,
                self.server + path,
                body=data,
                headers=headers,
                preload_content=False,
                retries=False,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=read_s),
            )
            if response.status < 400:
                return response
            content, retry_after = response.data, response.headers.get("Retry-After")
            response.release_conn()
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise self._unreachable(error) from None
        raise explain(response.status, content, request, retry_after)

    def _unreachable(self, error: Exception) -> Unreachable:
        import urllib3.exceptions

        hints = self._hints()
        where = f'the cluster of context "{self.context}" at {self.server}'
        if isinstance(error, urllib3.exceptions.SSLError | ssl.SSLError):
            return Unreachable(
                f"{where} cannot be trusted: {error}",
                [(f"{self.kubectl} config view --minify", "the certificate authority that is expected"), *hints],
            )
        if isinstance(error, urllib3.exceptions.ProtocolError):
            return _Dropped(f"{where} broke off the connection: {error}", hints)
        if isinstance(error, urllib3.exceptions.NewConnectionError):
            cause = str(error).rpartition(": ")[2]
        elif isinstance(error, urllib3.exceptions.TimeoutError):
            cause = "no answer in time"
        else:
            cause = str(error) or type(error).__name__
        return Unreachable(f"{where} is not accessible: {cause}", hints)

    def _hints(self) -> Hints:
        return [
            (f"{self.kubectl} cluster-info", "whether kubectl reaches it"),
            ("kubectl config get-contexts", "the other clusters that you know"),
        ]


def _key(obj: Mapping[str, Any]) -> tuple[str, str]:
    metadata = obj["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _selectors(selector: str, name: str | None) -> dict[str, str]:
    query = {"labelSelector": selector} if selector else {}
    if name:
        query["fieldSelector"] = f"metadata.name={name}"
    return query


def _path(resource: Resource, namespace: str, name: str = "", subresource: str = "") -> str:
    path = f"/apis/{resource.api_version}" if resource.group else f"/api/{resource.api_version}"
    if namespace:
        path += f"/namespaces/{quote(namespace)}"
    path += f"/{resource.plural}"
    if name:
        path += f"/{quote(name)}"
    return path + (f"/{subresource}" if subresource else "")

"""What the API server's refusals mean, in words for the user, with the command that may help.

Each class is one thing that a caller can act on; `explain` makes the right one of an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lifl.cli.common import CommandError, program

from lifl_knative.features import flag_command, flag_for_refusal

_COMPONENTS = {
    "serving.knative.dev": "Knative Serving",
    "autoscaling.internal.knative.dev": "Knative Serving",
    "eventing.knative.dev": "Knative Eventing",
    "monitoring.coreos.com": "the Prometheus operator",
}
_INSTALL = {
    "Knative Serving": "https://knative.dev/docs/install/yaml-install/serving/",
    "Knative Eventing": "https://knative.dev/docs/install/yaml-install/eventing/",
    "the Prometheus operator": "https://prometheus-operator.dev/docs/getting-started/installation/",
}
_FORBIDDEN = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]*)"'
    r'(?: in API group "(?P<group>[^"]*)")?(?: in the namespace "(?P<namespace>[^"]*)")?'
)
_WEBHOOK = re.compile(r'^admission webhook "(?P<name>[^"]+)" denied the request: ?(?P<cause>.*)$', re.DOTALL)
_MANAGER = re.compile(r'conflict with "(?P<manager>[^"]+)"')


class ClusterError(CommandError):
    """The cluster cannot be used, or refused something; `status` is the HTTP status, 0 if there was no answer."""

    def __init__(self, message: str, hints: Sequence[tuple[str, str]] = (), *, status: int = 0) -> None:
        super().__init__(message, hints)
        self.status = status


class NoCluster(ClusterError):
    """There is no usable kubeconfig, or no such context in it."""


class Unreachable(ClusterError):
    """Nobody answered at the API server's address, or not as an API server does."""


class NotLoggedIn(ClusterError):
    """401: no credentials, or they have expired."""


class Forbidden(ClusterError):
    """403: the user lacks a permission."""


class MissingKind(ClusterError):
    """The cluster does not know the kind: a component is not installed."""


class NotFound(ClusterError):
    """404: the object, or the namespace for it, does not exist."""


class Conflict(ClusterError):
    """409: somebody else owns the fields, or changed the object meanwhile; `managers` owns them."""

    def __init__(self, message: str, hints: Sequence[tuple[str, str]], managers: Sequence[str]) -> None:
        super().__init__(message, hints, status=409)
        self.managers = tuple(managers)


class Rejected(ClusterError):
    """400 or 422: the object can never be accepted as it is; `flag` is the Knative feature that would allow it."""

    def __init__(
        self, message: str, hints: Sequence[tuple[str, str]] = (), *, status: int = 400, flag: str | None = None
    ) -> None:
        super().__init__(message, hints, status=status)
        self.flag = flag


class Overloaded(ClusterError):
    """429, 500, 503: the server is busy or broken just now; `retry_after` in seconds if it said so."""

    def __init__(
        self,
        message: str,
        hints: Sequence[tuple[str, str]] = (),
        *,
        status: int,
        retry_after: float | None = None,
        may_pass: bool = True,
    ) -> None:
        super().__init__(message, hints, status=status)
        self.retry_after = retry_after
        self.may_pass = may_pass


@dataclass(frozen=True)
class Request:
    """What was asked for, as far as messages need it."""

    verb: str
    """`get`, `list`, `watch`, `create`, `patch`, `delete`: RBAC's words."""
    group: str
    resource: str
    """Plural, with `/subresource` if there is one."""
    kind: str
    name: str = ""
    namespace: str = ""
    context: str = ""
    server: str = ""
    kubectl: str = "kubectl"
    """`kubectl`, with the options that make it ask the same cluster."""

    @property
    def qualified(self) -> str:
        """`services.serving.knative.dev`, or `pods` in the core group."""
        plural, slash, subresource = self.resource.partition("/")
        return (f"{plural}.{self.group}" if self.group else plural) + slash + subresource

    @property
    def what(self) -> str:
        """`Service "fedavg" in namespace "default"`."""
        name = f' "{self.name}"' if self.name else ""
        return f"{self.kind}{name}" + (f' in namespace "{self.namespace}"' if self.namespace else "")


def explain(status: int, body: bytes, request: Request, retry_after: str | None = None) -> ClusterError:
    """The error that an answer from 400 on stands for. `body` is a `Status` object, if it is the server's own."""
    answer = _status_object(body)
    message = str(answer.get("message") or body[:500].decode(errors="replace")).strip() or f"HTTP {status}"
    match status:
        case 400:
            return _rejected(400, message, answer, request)
        case 401:
            return NotLoggedIn(
                f'not logged in to the cluster of context "{request.context}", or the token has expired',
                [
                    (f"{request.kubectl} auth whoami", "who the API server takes you for"),
                    ("kubectl config view --minify", "the credentials that are used"),
                ],
                status=401,
            )
        case 403:
            return _forbidden(message, request)
        case 404:
            return _not_found(message, answer, request)
        case 409:
            return _conflict(message, answer, request)
        case 410:
            return ClusterError(f"the watch of {request.what} has expired", status=410)
        case 422:
            return _rejected(422, message, answer, request)
        case 429 | 500 | 502 | 503 | 504:
            return _overloaded(status, message, request, retry_after)
        case _:
            return ClusterError(f"the API server answered {status}: {message}", status=status)


def missing_kind(request: Request) -> MissingKind:
    """The error for a kind that the cluster does not know."""
    component = _COMPONENTS.get(request.group)
    what = f"the cluster of context \"{request.context}\" does not know '{request.qualified}'"
    crd = (f"{request.kubectl} get crd {request.qualified}", "whether the kind is there")
    if component is None:
        return MissingKind(what, [(f"{request.kubectl} api-resources", "the kinds that are there")], status=404)
    return MissingKind(
        f"{what}: {component} is not installed there; see {_INSTALL[component]}",
        [crd, (f"{program()} doctor --context {request.context}", "what else this cluster lacks")]
        if request.context
        else [crd],
        status=404,
    )


def _status_object(body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {}
    return answer if isinstance(answer, Mapping) else {}


def _causes(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    details = answer.get("details")
    causes = details.get("causes") if isinstance(details, Mapping) else None
    return [cause for cause in causes or () if isinstance(cause, Mapping)]


def _lines(lines: Sequence[str]) -> str:
    return "".join(f"\n\t{line}" for line in lines)


def _forbidden(message: str, request: Request) -> ClusterError:
    found = _FORBIDDEN.search(message)
    if found is None:
        # Pod Security, quotas and other admission plug-ins answer 403 too; their own words say what.
        return Forbidden(f"the cluster does not allow {request.what}: {message}", status=403)
    resource, group = found["resource"], found["group"] or ""
    plural, slash, subresource = resource.partition("/")
    qualified = (f"{plural}.{group}" if group else plural) + slash + subresource
    where = f' in namespace "{found["namespace"]}"' if found["namespace"] else ""
    option = f" --namespace {found['namespace']}" if found["namespace"] else ""
    hint = f"{request.kubectl} auth can-i {found['verb']} {qualified}{option}"
    return Forbidden(
        f'user "{found["user"]}" may not {found["verb"]} {qualified}{where}; '
        f"ask for a Role with verb '{found['verb']}' on resource '{resource}' of API group '{group}'",
        [(hint, "whether you have the permission"), (f"{request.kubectl} auth whoami", "who you are there")],
        status=403,
    )


def _not_found(message: str, answer: Mapping[str, Any], request: Request) -> ClusterError:
    details = answer.get("details")
    details = details if isinstance(details, Mapping) else {}
    if details.get("kind") == "namespaces" or message.startswith("namespaces "):
        name = str(details.get("name") or request.namespace)
        return NotFound(
            f'there is no namespace "{name}" in the cluster of context "{request.context}"',
            [
                (f"{request.kubectl} create namespace {name}", "make it"),
                (f"{request.kubectl} get namespaces", "those that exist"),
            ],
            status=404,
        )
    if not details.get("name") and ("page not found" in message or "could not find the requested" in message):
        return missing_kind(request)
    return NotFound(f"there is no {request.what}", status=404)


def _conflict(message: str, answer: Mapping[str, Any], request: Request) -> ClusterError:
    fields: dict[str, list[str]] = {}
    for cause in _causes(answer):
        found = _MANAGER.search(str(cause.get("message")))
        if found:
            fields.setdefault(found["manager"], []).append(str(cause.get("field", "")).lstrip("."))
    if not fields:
        hint = (f"{request.kubectl} get {request.qualified} {request.name}", "as it is now")
        return Conflict(f"{request.what} was changed by somebody else meanwhile: {message}", [hint], ())
    owners = _lines([f'"{manager}" owns {", ".join(owned)}' for manager, owned in fields.items()])
    return Conflict(
        f"others than {program()} set fields of {request.what}:{owners}",
        [
            (f"{program()} deploy --force", "take these fields over"),
            (
                f"{request.kubectl} get {request.qualified} {request.name} --namespace {request.namespace} "
                "-o yaml --show-managed-fields",
                "who owns what",
            ),
        ],
        list(fields),
    )


def _rejected(status: int, message: str, answer: Mapping[str, Any], request: Request) -> ClusterError:
    webhook = _WEBHOOK.match(message)
    if webhook is None:
        causes = [f"{cause.get('field')}: {cause.get('message')}" for cause in _causes(answer)]
        said = _lines(causes) if causes else f" {message}"
        return Rejected(f"the API server does not accept {request.what}:{said}", status=status)
    cause = webhook["cause"].strip().removeprefix("validation failed:").strip()
    said = f'{request.what} breaks a rule of "{webhook["name"]}": {cause}'
    flag = flag_for_refusal(cause)
    if flag is None:
        return Rejected(said, status=status)
    return Rejected(
        f"{said}\n\tThe feature '{flag}' in ConfigMap config-features of namespace knative-serving allows it.",
        [(flag_command(flag, request.kubectl), "allow it, as an administrator of the cluster")],
        status=status,
        flag=flag,
    )


def _overloaded(status: int, message: str, request: Request, retry_after: str | None) -> ClusterError:
    try:
        seconds = float(retry_after) if retry_after else None
    except ValueError:
        seconds = None
    webhook = "failed calling webhook" in message
    if webhook:
        found = re.search(r'failed calling webhook "([^"]+)"', message)
        said = f'the webhook "{found[1] if found else "?"}" does not answer the API server: {message}'
        hints = [(f"{request.kubectl} get pods --all-namespaces -l role=webhook", "whether its pod runs")]
        if "knative" in message:
            hints = [
                (f"{request.kubectl} get pods -n knative-serving", "whether the pod 'webhook' runs"),
                (f"{request.kubectl} get pods -n knative-eventing", "whether 'eventing-webhook' runs"),
            ]
    else:
        busy = "is too busy" if status == 429 else "is not available" if status == 503 else "failed"
        said = f"the API server at {request.server} {busy} (HTTP {status}): {message}"
        hints = [(f"{request.kubectl} get --raw /readyz?verbose", "what the API server says of itself")]
    return Overloaded(
        said, hints, status=status, retry_after=seconds, may_pass=webhook or status in (429, 502, 503, 504)
    )

"""The HTTP API of a cluster's coordinator as a Flask application: one part for members, one like the gateways'.

Clients and operators find here what they find at any gateway. What has to do with updates themselves is answered
with the gateway of the node where they belong (307).
"""

from __future__ import annotations

import hmac
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast
from urllib.parse import quote

import msgspec
from flask import Flask, Response, request
from lifl.cluster.coordinator import ClusterCoordinator
from lifl.cluster.messages import Leave, MemberMessages, OrdersRequest, Register
from lifl.cluster.service import ClusterService, StoredModel
from lifl.errors import Busy, Refused
from lifl.messages import Acknowledged, InstallModel, JobState, RoundState

from lifl_gateway.coordinator_client import CoordinatorClient
from lifl_gateway.coordinator_metrics import CONTENT_TYPE, CoordinatorMetrics
from lifl_gateway.event import MAX_ROUND, PAYLOAD_TYPES, event_from_headers
from lifl_gateway.job_spec import decode_job_spec, hide_of_spec
from lifl_gateway.model_responses import (
    LONGEST_WAIT_SECONDS,
    SAFETENSORS,
    FileBody,
    ShardsBody,
    etag,
    newest_known,
)
from lifl_gateway.model_upload import ModelUpload
from lifl_gateway.participation import answer_selection, decode_participant, not_selected
from lifl_gateway.problems import Late, Sharded, Unauthorized, register_error_answers
from lifl_gateway.request_body import RequestBody
from lifl_gateway.tokens import ANYONE, Identity, Tokens
from lifl_gateway.transfer import Pace

_JSON: Final = "application/json"
_MOST_JSON_BYTES: Final = 64 * 1024
_MOST_MESSAGE_BYTES: Final = 16 << 20
_PAGE_UPDATES: Final = 10_000
_MOST_VERSION: Final = 2**53
"""Integers of JSON that every program reads right."""
_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "POST", "PUT"})
# What of a job's state is the cluster's own business.
_INTERNAL: Final = ("type", "updates_pool", "aggregates_pool", "nonce", "elsewhere")

_T = TypeVar("_T")
_Struct = TypeVar("_Struct", bound=msgspec.Struct)


@dataclass(frozen=True)
class CoordinatorParts:
    """What the application is made of."""

    service: ClusterService
    tokens: Tokens
    member_token: str
    """Members have to show it; empty: they need none."""
    most_model_bytes: int
    pace: Pace


def create_coordinator_app(parts: CoordinatorParts) -> Flask:
    """Make the application."""
    app = Flask("lifl_gateway.coordinator", static_folder=None)
    app.url_map.strict_slashes = True
    app.url_map.merge_slashes = False
    register_error_answers(app)
    metrics = CoordinatorMetrics(parts.service)
    _MemberViews(parts).register(app)
    _PublicViews(parts, metrics).register(app)

    @app.after_request
    def count(response: Response) -> Response:
        method = request.method if request.method in _METHODS else "other"
        metrics.requests.labels(method, str(response.status_code)).inc()
        return response

    return app


class _MemberViews:
    """What member nodes ask; see `lifl.cluster.messages`."""

    def __init__(self, parts: CoordinatorParts) -> None:
        self._service = parts.service
        self._token = parts.member_token.encode()

    def register(self, app: Flask) -> None:
        """Bind the URLs."""
        for rule, view in (
            ("/v1/members", self.join),
            ("/v1/members/<node>/messages", self.messages),
            ("/v1/members/<node>/orders", self.orders),
            ("/v1/members/<node>/leave", self.leave),
        ):
            app.add_url_rule(rule, view.__name__, view, methods=["POST"], provide_automatic_options=False)

    def join(self) -> Response:
        """Make a node a member."""
        return _encoded(self._service.register(self._read(Register)))

    def messages(self, node: str) -> Response:
        """Act on messages."""
        return _encoded(self._service.answer(node, self._read(MemberMessages), _arrived()))

    def orders(self, node: str) -> Response:
        """Tell a node what is new, when there is something."""
        return _encoded(self._service.orders(node, self._read(OrdersRequest), _arrived()))

    def leave(self, node: str) -> Response:
        """A node ends."""
        self._service.leave(node, self._read(Leave))
        return _encoded(Acknowledged())

    def _read(self, kind: type[_Struct]) -> _Struct:
        if self._token and not _shows_token(self._token):
            raise Unauthorized("send 'Authorization: Bearer <token>' with the members' token")
        return _decode(_read_body(_MOST_MESSAGE_BYTES), kind)


class _PublicViews:
    """What clients and operators ask."""

    def __init__(self, parts: CoordinatorParts, metrics: CoordinatorMetrics) -> None:
        self._service = parts.service
        self._tokens = parts.tokens
        self._member_token = parts.member_token.encode()
        self._pace = parts.pace
        self._metrics = metrics
        # ModelUpload asks whoever has the jobs to take the file over: a node's coordinator, or this one.
        installer = cast(CoordinatorClient, _Installer(parts.service))
        self._uploads = ModelUpload(installer, parts.service.store.incoming, parts.most_model_bytes)

    def register(self, app: Flask) -> None:
        """Bind the URLs."""
        for rule, method, view in (
            ("/v1/jobs", "GET", self.list_jobs),
            ("/v1/jobs", "POST", self.create_job),
            ("/v1/jobs/<job>", "GET", self.describe_job),
            ("/v1/jobs/<job>", "DELETE", self.delete_job),
            ("/v1/jobs/<job>/model", "GET", self.get_model),
            ("/v1/jobs/<job>/model", "PUT", self.put_model),
            ("/v1/jobs/<job>/updates", "POST", self.post_update),
            ("/v1/jobs/<job>/shards", "GET", self.list_shards),
            ("/v1/jobs/<job>/rounds/<number>", "GET", self.describe_round),
            ("/v1/jobs/<job>/rounds/<number>/participants", "POST", self.take_part),
            ("/v1/jobs/<job>/rounds/<number>/updates", "GET", self.list_updates),
            ("/v1/functions", "GET", self.list_functions),
            ("/v1/nodes", "GET", self.list_nodes),
            ("/v1/nodes/<node>/drain", "POST", self.drain),
            ("/v1/nodes/<node>/undrain", "POST", self.undrain),
            ("/v1/nodes/<node>/calibrate", "POST", self.calibrate),
            ("/healthz", "GET", self.healthz),
            ("/readyz", "GET", self.readyz),
            ("/metrics", "GET", self.metrics),
        ):
            app.add_url_rule(rule, view.__name__, view, methods=[method], provide_automatic_options=False)

    # --- jobs ------------------------------------------------------------------------------------------------

    def list_jobs(self) -> Response:
        """List the jobs."""
        self._identify()
        jobs = self._call(lambda c, now: c.requests.list_jobs(most=None).jobs)
        return _json({"jobs": [_shown(state) for state in jobs]})

    def create_job(self) -> Response:
        """Make a job."""
        self._identify().require_operator()
        if request.mimetype != _JSON:
            raise Refused(415, "Unsupported Media Type", f"send the job as {_JSON}")
        spec = decode_job_spec(_read_body(_MOST_JSON_BYTES))
        state = self._service.create_job(spec)
        return _json(_shown(state), 201, {"Location": f"/v1/jobs/{spec.name}"})

    def describe_job(self, job: str) -> Response:
        """Describe a job."""
        self._identify()
        return _json(_shown(self._call(lambda c, now: c.requests.describe(job))))

    def delete_job(self, job: str) -> Response:
        """Delete a job."""
        self._identify().require_operator()
        self._service.delete_job(job)
        return Response(status=204)

    def describe_round(self, job: str, number: str) -> Response:
        """Describe a round."""
        self._identify()
        round_number = _round_number(number)
        return _json(_shown(self._call(lambda c, now: c.requests.describe_round(job, round_number))))

    def list_updates(self, job: str, number: str) -> Response:
        """List the updates of a round: who took part, on which node, with what weight."""
        self._identify()
        round_number, offset = _round_number(number), _integer("offset", 0) or 0
        status, updates, total = self._service.updates_of(job, round_number, offset, _PAGE_UPDATES)
        following = offset + len(updates)
        shown = {
            "round": round_number,
            "status": status,
            "total": total,
            "next": following if following < total else 0,
            "updates": [update._asdict() | {"counted": update.status == "counted"} for update in updates],
        }
        return _json(shown)

    def take_part(self, job: str, number: str) -> Response:
        """Give a client a place in a round."""
        identity = self._identify()
        round_number = _round_number(number)
        if request.mimetype != _JSON:
            raise Refused(415, "Unsupported Media Type", f"send the participant as {_JSON}")
        client = decode_participant(_read_body(_MOST_JSON_BYTES)).client
        identity.require_client(client)
        selection = self._call(lambda c, now: c.requests.select(job, round_number, client, now))
        return _json(*answer_selection(selection, round_number))

    # --- updates and models ----------------------------------------------------------------------------------

    def post_update(self, job: str) -> Response:
        """Send the client on to the node that its update is placed on."""
        identity = self._identify()
        if self._call(lambda c, now: job in c.jobs.sharded.by_name):
            raise Sharded(job, self._service.shards_of(job))
        event = event_from_headers(request.environ)
        identity.require_client(event.client)
        placed = self._call(lambda c, now: c.place_update(job, event.round, event.client, now))
        if placed.status == "duplicate":
            return _json({"status": "duplicate", "round": placed.round})
        if placed.status == "open":
            return _see_other(f"{placed.address}/v1/jobs/{quote(job, safe='')}/updates")
        if placed.status == "unselected":
            raise not_selected(placed.round)
        if placed.status == "early":
            raise Late("Early", f"round {event.round} is not open yet; round {placed.round} is", placed.round)
        raise Late("Late", f"round {event.round} is closed; round {placed.round} comes next", placed.round)

    def list_shards(self, job: str) -> Response:
        """Tell which part of which tensor goes to which shard."""
        self._identify()
        return _json({"job": job, "shards": self._service.shards_of(job)})

    def get_model(self, job: str) -> Response:
        """Send a stored model, or the client on to a node that has it; with `wait` when there is another one."""
        self._identify()
        wanted, after, wait = _integer("round", 1), _integer("after", 0) or 0, _seconds("wait")
        matches = request.headers.get("If-None-Match", "")
        life = 0
        if wanted is None:
            life = self._service.wait_for_model(job, lambda nonce: max(after, newest_known(matches, nonce)), wait)
        model = self._service.stored_model(job, wanted)
        is_old = life == model.state.nonce and model.round <= after
        if is_old or newest_known(matches, model.state.nonce) == model.round:
            return _described(Response(status=304), model.state, model.round)
        if not model.paths:
            return _see_other(model.address + request.full_path.rstrip("?"))
        body = self._body(model)
        response = Response(body, 200, content_type=SAFETENSORS, direct_passthrough=True)
        response.headers["Content-Length"] = str(body.nbytes)
        return _described(response, model.state, model.round)

    def _body(self, model: StoredModel) -> FileBody | ShardsBody:
        files: list[int] = []
        try:
            for path in model.paths:
                files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            if model.header:
                return ShardsBody(model.header, files, self._pace, self._metrics.sent_bytes.inc)
            return FileBody(files[0], self._pace, self._metrics.sent_bytes.inc)
        except OSError as error:
            for file in files:
                os.close(file)
            if not isinstance(error, FileNotFoundError):
                raise
            raise Refused(404, "No such model", f"round {model.round} is not kept any more") from None

    def put_model(self, job: str) -> Response:
        """Take in the initial model."""
        self._identify().require_operator()
        _require_length()
        if request.mimetype not in PAYLOAD_TYPES:
            raise Refused(415, "Unsupported Media Type", f"send the model as {' or '.join(PAYLOAD_TYPES)}")
        state = self._uploads.install(self._call(lambda c, now: c.requests.describe(job)), _body())
        return _json(_shown(state), 201, {"Location": f"/v1/jobs/{job}/model"})

    # --- nodes -----------------------------------------------------------------------------------------------

    def list_nodes(self) -> Response:
        """Describe the nodes."""
        self._identify()
        nodes = self._call(lambda c, now: c.requests.nodes(now)).nodes
        return _json({"nodes": [msgspec.to_builtins(node) for node in nodes]})

    def drain(self, node: str) -> Response:
        """Give a node no more updates."""
        return self._drain(node, True)

    def undrain(self, node: str) -> Response:
        """Give a node updates again."""
        return self._drain(node, False)

    def _drain(self, node: str, is_draining: bool) -> Response:
        self._identify().require_operator()
        self._call(lambda c, now: c.drain(node, is_draining))
        return Response(status=204)

    def calibrate(self, node: str) -> Response:
        """Have a node measure its capacity."""
        self._identify().require_operator()
        self._call(lambda c, now: c.calibrate(node))
        return Response(status=202)

    # --- functions -------------------------------------------------------------------------------------------

    def list_functions(self) -> Response:
        """Tell on how many nodes each function is needed; with `wait` when that is not the `version` known."""
        self._identify().require_operator()
        known, wait = _integer("version", 0, _MOST_VERSION), _seconds("wait")
        version, needs = self._service.functions(known if known is not None else -1, wait)
        return _json({"version": version, "functions": [msgspec.to_builtins(need) for need in needs]})

    # --- the process -------------------------------------------------------------------------------------------

    def healthz(self) -> Response:
        """Say that the process answers."""
        return _json({"status": "ok"})

    def readyz(self) -> Response:
        """Say whether there is a node that could take updates."""
        if not self._call(lambda c, now: len(c.members)):
            raise Busy("Not ready", "no node has joined")
        return _json({"status": "ready"})

    def metrics(self) -> Response:
        """Show the metrics to Prometheus."""
        self._identify().require_operator()
        return Response(self._metrics.render(), content_type=CONTENT_TYPE)

    # --- who asks ----------------------------------------------------------------------------------------------

    def _identify(self) -> Identity:
        """Who asks. A member may do what an operator may: its gateways have seen to whom it acts for."""
        if self._member_token and _shows_token(self._member_token):
            return ANYONE
        return self._tokens.identify(request.headers.get("Authorization"))

    def _call(self, act: Callable[[ClusterCoordinator, float], _T]) -> _T:
        return self._service.call(act)


class _Installer:
    """Takes over initial models, as `ModelUpload` asks for it."""

    def __init__(self, service: ClusterService) -> None:
        self._service = service

    def ask(self, question: InstallModel, answer: type[JobState], seconds: float) -> JobState:
        """Install the model of `question`."""
        del answer, seconds
        return self._service.install_model(question.job, Path(question.path))


def _shows_token(token: bytes) -> bool:
    scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode("latin-1", "replace"), token)


def _arrived() -> float:
    """Monotonic time at which the request came."""
    arrived: float = request.environ.get("lifl.started", 0.0)
    return arrived or time.monotonic()


def _see_other(url: str) -> Response:
    """The same request is to be sent to another address."""
    return Response(status=307, headers={"Location": url})


def _described(response: Response, state: JobState, number: int) -> Response:
    response.headers["ETag"] = etag(state.nonce, number)
    response.headers["LIFL-Round"] = str(number)
    response.headers["LIFL-Status"] = state.status
    response.headers["Cache-Control"] = "no-cache"
    return response


def _shown(state: JobState | RoundState) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(state)
    for part in filter(None, (shown, shown.get("current"), shown.get("last"))):
        for name in _INTERNAL:
            part.pop(name, None)
    hide_of_spec(shown)
    return shown


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, content_type=_JSON)


def _encoded(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), 200, content_type=_JSON)


def _decode(data: bytes, kind: type[_Struct]) -> _Struct:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(422, "Invalid message", str(error)) from None


def _body() -> RequestBody:
    body: RequestBody = request.environ["wsgi.input"]
    return body


def _require_length() -> None:
    if not request.environ.get("CONTENT_LENGTH"):
        raise Refused(411, "Length Required", "send Content-Length")


def _read_body(most: int) -> bytes:
    _require_length()
    body = _body()
    if body.remaining > most:
        raise Refused(413, "Content Too Large", f"at most {most} bytes of JSON")
    return body.read()


def _round_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:11]) <= MAX_ROUND):
        raise Refused(404, "No such round", "rounds are numbered from 1")
    return int(text)


def _integer(name: str, least: int, most: int = MAX_ROUND) -> int | None:
    """An integer query parameter; None when it is not there."""
    value = request.args.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 16 and least <= int(value) <= most):
        raise Refused(400, "Bad Request", f"{name} must be an integer from {least} to {most}")
    return int(value)


def _seconds(name: str) -> float:
    """A duration query parameter; 0 when it is not there."""
    value = request.args.get(name, "0")
    try:
        seconds = float(value) if "_" not in value else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= LONGEST_WAIT_SECONDS:
        raise Refused(400, "Bad Request", f"{name} must be from 0 to {LONGEST_WAIT_SECONDS:g} seconds")
    return seconds

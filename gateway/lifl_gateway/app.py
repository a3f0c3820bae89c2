"""The HTTP API of a node (DESIGN.md section 7) as a Flask application.

A view decodes the request, asks one of the parts, and encodes the answer; errors leave as exceptions and are
answered by `problems`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from flask import Flask, Response, request
from lifl.errors import Busy, Refused, Unavailable
from lifl.messages import (
    Acknowledged,
    CreateJob,
    DeleteJob,
    DescribeJob,
    DescribeNodes,
    DescribeRound,
    DescribeUpdates,
    Jobs,
    JobState,
    ListJobs,
    Nodes,
    RoundState,
    RoundUpdates,
    SelectClient,
    Selection,
)

from lifl_gateway import metrics as metrics_module
from lifl_gateway.coordinator_client import CoordinatorClient, JobBoard
from lifl_gateway.event import MAX_ROUND, PAYLOAD_TYPES
from lifl_gateway.ingest import Ingest
from lifl_gateway.job_spec import decode_job_spec, hide_of_spec
from lifl_gateway.metrics import Metrics
from lifl_gateway.model_responses import LONGEST_WAIT_SECONDS, ModelResponses
from lifl_gateway.model_upload import ModelUpload
from lifl_gateway.node_link import NodeLink
from lifl_gateway.openapi import document
from lifl_gateway.participation import answer_selection, decode_participant
from lifl_gateway.problems import Elsewhere, register_error_answers
from lifl_gateway.request_body import RequestBody
from lifl_gateway.tokens import Identity, Tokens

_JSON: Final = "application/json"
_MOST_JSON_BYTES: Final = 64 * 1024
# What of a job's state is the node's own business.
_INTERNAL: Final = ("type", "updates_pool", "aggregates_pool", "nonce", "elsewhere")

View = TypeVar("View", bound=Callable[..., Response])


@dataclass(frozen=True)
class Parts:
    """What the application is made of."""

    coordinator: CoordinatorClient
    board: JobBoard
    link: NodeLink
    ingest: Ingest
    models: ModelResponses
    uploads: ModelUpload
    metrics: Metrics
    tokens: Tokens


def create_app(parts: Parts) -> Flask:
    """Make the application."""
    app = Flask("lifl_gateway", static_folder=None)
    app.url_map.strict_slashes = True
    app.url_map.merge_slashes = False
    register_error_answers(app)
    _Views(parts).register(app)

    @app.after_request
    def count(response: Response) -> Response:
        method = request.method if request.method in _METHODS else "other"
        parts.metrics.requests.labels(method, str(response.status_code)).inc()
        return response

    return app


_METHODS: Final = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "POST", "PUT"})


class _Views:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._openapi = msgspec.json.encode(document())

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
            ("/v1/jobs/<job>/rounds/<number>/updates", "GET", self.list_updates),
            ("/v1/jobs/<job>/rounds/<number>/participants", "POST", self.take_part),
            ("/v1/nodes", "GET", self.list_nodes),
            ("/healthz", "GET", self.healthz),
            ("/readyz", "GET", self.readyz),
            ("/metrics", "GET", self.metrics),
            ("/openapi.json", "GET", self.openapi),
        ):
            app.add_url_rule(rule, view.__name__, view, methods=[method], provide_automatic_options=False)

    # --- updates and models ----------------------------------------------------------------------------------

    def post_update(self, job: str) -> Response:
        """Take in a model update."""
        identity = self._identify()
        _require_length()
        state = self._running(job)
        _require_whole(state)
        outcome = self._parts.ingest.take_in(state, request.environ, identity)
        status = 202 if outcome.status == "accepted" else 200
        return _json({"status": outcome.status, "round": outcome.round}, status)

    def list_shards(self, job: str) -> Response:
        """Send the client on to who knows the shards of a job."""
        self._identify()
        _require_whole(self._ask_state(job))
        raise Refused(404, "Not sharded", f"job {job!r} has no shards")

    def take_part(self, job: str, number: str) -> Response:
        """Select a client for a round."""
        identity = self._identify()
        round_number = _round_number(number)
        participant = decode_participant(_json_body())
        identity.require_client(participant.client)
        self._running(job)
        question = SelectClient(job, round_number, participant.client)
        return _json(*answer_selection(self._parts.coordinator.ask(question, Selection), round_number))

    def get_model(self, job: str) -> Response:
        """Send a global model."""
        self._identify()
        _check_parameters("round", "after", "wait")
        round_number = _integer("round", 1)
        after = _integer("after", 0)
        wait = _seconds("wait")
        state = self._state(job)
        _require_whole(state)
        matches = request.headers.get("If-None-Match", "")
        if round_number is not None:
            return self._parts.models.of_round(state, round_number, matches)
        return self._parts.models.newest(state, matches, after or 0, wait)

    def put_model(self, job: str) -> Response:
        """Take in the initial model."""
        self._identify().require_operator()
        _require_length()
        if request.mimetype not in PAYLOAD_TYPES:
            raise Refused(415, "Unsupported Media Type", f"send the model as {' or '.join(PAYLOAD_TYPES)}")
        state = self._parts.uploads.install(self._ask_state(job), _body())
        return _json(_shown(state), 201, {"Location": f"/v1/jobs/{job}/model"})

    # --- jobs ------------------------------------------------------------------------------------------------

    def list_jobs(self) -> Response:
        """List the jobs."""
        self._identify()
        jobs: list[JobState] = []
        while page := self._parts.coordinator.ask(ListJobs(jobs[-1].job if jobs else ""), Jobs).jobs:
            jobs += page
        return _json({"jobs": [_shown(state) for state in jobs]})

    def create_job(self) -> Response:
        """Make a job."""
        self._identify().require_operator()
        spec = decode_job_spec(_json_body())
        state = self._parts.coordinator.ask(CreateJob(spec), JobState)
        return _json(_shown(state), 201, {"Location": f"/v1/jobs/{spec.name}"})

    def describe_job(self, job: str) -> Response:
        """Describe a job."""
        self._identify()
        return _json(_shown(self._ask_state(job)))

    def describe_round(self, job: str, number: str) -> Response:
        """Describe a round."""
        self._identify()
        round_state = self._parts.coordinator.ask(DescribeRound(job, _round_number(number)), RoundState)
        return _json(_shown(round_state))

    def list_updates(self, job: str, number: str) -> Response:
        """List the updates of a round."""
        self._identify()
        _check_parameters("offset")
        known = self._parts.board.get(job)
        _require_whole(known if known is not None else self._ask_state(job))
        question = DescribeUpdates(job, _round_number(number), _integer("offset", 0) or 0)
        return _json(_shown(self._parts.coordinator.ask(question, RoundUpdates)))

    def delete_job(self, job: str) -> Response:
        """Delete a job."""
        self._identify().require_operator()
        self._parts.coordinator.ask(DeleteJob(job), Acknowledged)
        return Response(status=204)

    # --- the node --------------------------------------------------------------------------------------------

    def list_nodes(self) -> Response:
        """Describe the nodes."""
        self._identify()
        nodes = self._parts.coordinator.ask(DescribeNodes(), Nodes).nodes
        return _json({"nodes": [msgspec.to_builtins(node) for node in nodes]})

    def healthz(self) -> Response:
        """Say that the process answers."""
        return _json({"status": "ok"})

    def readyz(self) -> Response:
        """Say whether updates can be taken."""
        if not self._is_ready():
            raise Busy("Not ready", "the agent or the coordinator is away")
        return _json({"status": "ready"})

    def metrics(self) -> Response:
        """Show the metrics to Prometheus."""
        self._identify().require_operator()
        return Response(self._parts.metrics.render(), content_type=metrics_module.CONTENT_TYPE)

    def openapi(self) -> Response:
        """Describe this API."""
        return Response(self._openapi, content_type=_JSON)

    # --- helpers ---------------------------------------------------------------------------------------------

    def _identify(self) -> Identity:
        return self._parts.tokens.identify(request.headers.get("Authorization"))

    def _is_ready(self) -> bool:
        return self._parts.link.is_ready and self._parts.board.is_current

    def _ask_state(self, job: str) -> JobState:
        return self._parts.coordinator.ask(DescribeJob(job), JobState)

    def _state(self, job: str) -> JobState:
        """The job's state as last told; asked for where a message may still be on its way."""
        known = self._parts.board.get(job) if self._parts.board.is_current else None
        return known if known is not None else self._ask_state(job)

    def _running(self, job: str) -> JobState:
        if not self._is_ready():
            raise Unavailable("the agent or the coordinator is away")
        state = self._state(job)
        if state.status != "running":
            state = self._ask_state(job)
        if state.status == "waiting-for-model" and state.model_round:
            raise Busy("Starting", f"job {job!r} is being restored; try again in a moment")
        if state.status == "waiting-for-model":
            raise Refused(409, "No model yet", f"PUT /v1/jobs/{job}/model first")
        if state.status != "running":
            raise Refused(409, "Job is over", f"job {job!r} is {state.status} and takes no more updates")
        return state


def _require_whole(state: JobState) -> None:
    """Raise Elsewhere for a job whose model is cut into shards: the cluster's coordinator puts them together."""
    if state.elsewhere:
        raise Elsewhere(state.elsewhere)


def _shown(state: JobState | RoundState | RoundUpdates) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(state)
    for part in filter(None, (shown, shown.get("current"), shown.get("last"))):
        for name in _INTERNAL:
            part.pop(name, None)
    hide_of_spec(shown)
    return shown


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, content_type=_JSON)


def _body() -> RequestBody:
    body: RequestBody = request.environ["wsgi.input"]
    return body


def _require_length() -> None:
    if not request.environ.get("CONTENT_LENGTH"):
        raise Refused(411, "Length Required", "send Content-Length")


def _json_body() -> bytes:
    _require_length()
    if request.mimetype != _JSON:
        raise Refused(415, "Unsupported Media Type", f"send {_JSON}")
    body = _body()
    if body.remaining > _MOST_JSON_BYTES:
        raise Refused(413, "Content Too Large", f"at most {_MOST_JSON_BYTES} bytes of JSON")
    return body.read()


def _check_parameters(*known: str) -> None:
    """Refuse query parameters that mean nothing here: a misspelt one would be ignored in silence."""
    unknown = [name for name in request.args if name not in known]
    if unknown:
        raise Refused(400, "Bad Request", f"unknown query parameters; known are {', '.join(known)}")


def _round_number(text: str) -> int:
    """The number of a round in a path."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:11]) <= MAX_ROUND):
        raise Refused(404, "No such round", "rounds are numbered from 1")
    return int(text)


def _integer(name: str, least: int) -> int | None:
    """An integer query parameter; None when it is not there."""
    values = request.args.getlist(name)
    if not values:
        return None
    value = values[0]
    is_number = len(values) == 1 and value.isascii() and value.isdigit() and len(value) <= 10
    if not is_number or not least <= int(value) <= MAX_ROUND:
        raise Refused(400, "Bad Request", f"{name} must be an integer from {least} to {MAX_ROUND}")
    return int(value)


def _seconds(name: str) -> float:
    """A duration query parameter; 0 when it is not there."""
    values = request.args.getlist(name)
    if not values:
        return 0.0
    try:
        seconds = float(values[0]) if len(values) == 1 and "_" not in values[0] else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= LONGEST_WAIT_SECONDS:
        raise Refused(400, "Bad Request", f"{name} must be from 0 to {LONGEST_WAIT_SECONDS:g} seconds")
    return seconds

"""Errors as RFC 9457 problem documents: whatever goes wrong, a client gets one of these, never a stack trace."""

from __future__ import annotations

import math
import re
from http import HTTPStatus
from typing import Any, Final, Literal

import msgspec
from flask import Flask, Response, request
from lifl.errors import Busy, InvalidInput, Refused, Unavailable
from werkzeug.exceptions import HTTPException

from lifl_gateway.transfer import PeerGone, TooSlow

PROBLEM_JSON: Final = "application/problem+json"
_NOT_A_LETTER: Final = re.compile(r"[^a-z0-9]+")


class Late(Refused):
    """The update is for a round that is closed, or not open yet; `round` is the one that is open."""

    def __init__(self, title: str, detail: str, open_round: int) -> None:
        super().__init__(409, title, detail)
        self.round = open_round


def untimely(status: Literal["late", "early"], round_number: int, open_round: int) -> Late:
    """The error for something about a round that is not the open one."""
    if status == "early":
        return Late("Early", f"round {round_number} is not open yet; round {open_round} is", open_round)
    return Late("Late", f"round {round_number} is closed; round {open_round} comes next", open_round)


class Elsewhere(Refused):
    """Another node of the cluster, or its coordinator, answers this; `address` is its base URL."""

    def __init__(self, address: str) -> None:
        super().__init__(307, "Temporary Redirect", f"send this to {address}")
        self.address = address


class Sharded(Refused):
    """The job takes updates in parts; `shards` tells which part of which tensor goes to which job."""

    def __init__(self, job: str, shards: list[dict[str, Any]]) -> None:
        detail = f"the model of {job!r} is cut into {len(shards)} shards: send the part of each to its own job"
        super().__init__(409, "Sharded job", detail)
        self.shards = shards


class Unauthorized(Refused):
    """No token, or a wrong one."""

    def __init__(self, detail: str) -> None:
        super().__init__(401, "Unauthorized", detail)


def encode_problem(status: int, title: str, detail: str = "", **members: Any) -> bytes:
    """The JSON of a problem document; its type is derived from the title, which has to be constant."""
    slug = _NOT_A_LETTER.sub("-", title.lower()).strip("-")
    problem = {"type": f"urn:lifl:problem:{slug}", "title": title, "status": status}
    if detail:
        problem["detail"] = detail
    return msgspec.json.encode(problem | members)


def problem_response(status: int, title: str, detail: str = "", **members: Any) -> Response:
    """A problem document as an answer."""
    return Response(encode_problem(status, title, detail, **members), status, content_type=PROBLEM_JSON)


def answer_refused(error: Refused) -> Response:
    """The answer to a refusal, with the headers that belong to it."""
    members: dict[str, Any] = {"round": error.round} if isinstance(error, Late) else {}
    if isinstance(error, Sharded):
        members = {"shards": error.shards}
    response = problem_response(error.status, error.title, error.detail, **members)
    if isinstance(error, Busy):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Elsewhere):
        response.headers["Location"] = error.address + request.full_path.rstrip("?")
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = 'Bearer realm="lifl"'
    return response


def register_error_answers(app: Flask) -> None:
    """Let every error that leaves a view become a problem document."""
    app.register_error_handler(Refused, answer_refused)
    app.register_error_handler(InvalidInput, _answer_invalid)
    app.register_error_handler(Unavailable, _answer_unavailable)
    app.register_error_handler(TooSlow, _answer_too_slow)
    app.register_error_handler(PeerGone, _answer_cut)
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(Exception, _answer_unexpected)


def _answer_invalid(error: InvalidInput) -> Response:
    return problem_response(422, "Invalid model", str(error))


def _answer_unavailable(error: Unavailable) -> Response:
    del error  # it names sockets of this machine
    return answer_refused(Busy("Not ready", "a part of the node is starting; try again in a moment"))


def _answer_too_slow(error: TooSlow) -> Response:
    return problem_response(408, "Request Timeout", f"the body came too slowly: {error}")


def _answer_cut(error: PeerGone) -> Response:
    return problem_response(400, "Incomplete body", str(error))


def _answer_http(error: HTTPException) -> Response:
    status = error.code or 500
    response = problem_response(status, HTTPStatus(status).phrase, error.description or "")
    for name, value in error.get_headers():
        if name.lower() not in ("content-type", "content-length"):
            response.headers[name] = value
    return response


def _answer_unexpected(error: Exception) -> Response:
    from flask import current_app

    current_app.logger.error("unexpected error", exc_info=error)
    return problem_response(500, "Internal Server Error", "the gateway's log has the details")

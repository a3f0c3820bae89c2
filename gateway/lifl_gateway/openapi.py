"""The OpenAPI 3.1 description of the HTTP API, served at /openapi.json and checked against the live gateway."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from lifl.messages import JobSpec, JobState, NodeState, RoundState, RoundUpdates

from lifl_gateway.event import EVENT_TYPE, MAX_ROUND, MAX_SAMPLES, STRUCTURED_TYPE
from lifl_gateway.job_spec import HIDDEN, JOB_NAME, LIMITS
from lifl_gateway.participation import Participant

_PROBLEM_TITLES: Final = {
    400: "The request is malformed",
    401: "No token, or an unknown one",
    403: "The token does not permit this",
    404: "There is no such job, round or model",
    408: "The body came too slowly",
    409: "The job's state does not permit this",
    411: "Content-Length is missing",
    413: "The body is too large",
    415: "The media type is not taken",
    422: "The content is understood and cannot be used",
    503: "Full, or a part of the node is away; Retry-After says when to ask again",
    507: "No room for the job on disk or in memory",
}
_SHARDS: Final[dict[str, Any]] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["job", "tensors"],
        "properties": {
            "job": {"type": "string", "description": "The job that takes this part."},
            "tensors": {
                "type": "object",
                "description": "By name, in order. Where this is not all of one, it is sent as a flat tensor.",
                "additionalProperties": {
                    "type": "object",
                    "required": ["first", "count", "shape"],
                    "properties": {
                        "first": {"type": "integer", "description": "Item of the whole tensor."},
                        "count": {"type": "integer", "description": "Items from there on."},
                        "shape": {
                            "type": "array",
                            "items": {"type": "integer"},
                            "description": "Of the whole tensor.",
                        },
                    },
                },
            },
        },
    },
}
_HIDDEN: Final = ("type", "updates_pool", "aggregates_pool", "nonce", "elsewhere", *HIDDEN)


def document() -> dict[str, Any]:
    """Build the document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "LIFL gateway",
            "version": "1",
            "description": "Federated-learning jobs, model updates as CloudEvents, global models as safetensors.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _schemas() -> dict[str, Any]:
    types = (JobSpec, JobState, RoundState, RoundUpdates, NodeState, Participant)
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for schema in schemas.values():
        for name in _HIDDEN:
            schema.get("properties", {}).pop(name, None)
            if name in schema.get("required", []):
                schema["required"].remove(name)
    for name, limits in LIMITS.items():
        schemas["JobSpec"]["properties"][name].update(limits)
    schemas["Participant"]["properties"]["client"] = _CLIENT_ID
    schemas["Problem"] = {
        "type": "object",
        "description": "RFC 9457 problem document.",
        "required": ["type", "title", "status"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
            "round": {"type": "integer", "description": "The open round, where an update was late or early."},
            "shards": {
                **_SHARDS,
                "description": "With the title 'Sharded job': each takes its part of the update, at once.",
            },
        },
    }
    schemas["Outcome"] = {
        "type": "object",
        "required": ["status", "round"],
        "properties": {"status": {"enum": ["accepted", "duplicate"]}, "round": {"type": "integer"}},
    }
    schemas["Shards"] = {
        "type": "object",
        "required": ["job", "shards"],
        "properties": {"job": {"type": "string"}, "shards": _SHARDS},
    }
    schemas["Participation"] = {
        "type": "object",
        "required": ["status", "round"],
        "properties": {"status": {"enum": ["selected"]}, "round": {"type": "integer"}},
    }
    return schemas


def _paths() -> dict[str, Any]:
    job = _path_parameter("job", {"type": "string", "pattern": JOB_NAME})
    number = _path_parameter("number", {"type": "integer", "minimum": 1, "maximum": MAX_ROUND})
    return {
        "/v1/jobs": {
            "get": _operation("listJobs", "List the jobs", 200, _object_of("jobs", _ref("JobState")), (401,)),
            "post": _operation(
                "createJob",
                "Make a job; the same again is not an error",
                201,
                _ref("JobState"),
                (400, 401, 403, 409, 411, 413, 415, 422),
                body=_json_body(_ref("JobSpec")),
            ),
        },
        "/v1/jobs/{job}": {
            "parameters": [job],
            "get": _operation("describeJob", "Describe a job", 200, _ref("JobState"), (401, 404)),
            "delete": _operation("deleteJob", "Stop a job; its checkpoints are kept", 204, None, (401, 403, 404)),
        },
        "/v1/jobs/{job}/model": {
            "parameters": [job],
            "get": _get_model(),
            "put": _operation(
                "putModel",
                "Set the initial model, which fixes the layout and opens round 1",
                201,
                _ref("JobState"),
                (400, 401, 403, 404, 408, 409, 411, 413, 415, 422, 507),
                body=_binary_body("application/vnd.safetensors", "application/octet-stream"),
            ),
        },
        "/v1/jobs/{job}/updates": {"parameters": [job], "post": _post_update()},
        "/v1/jobs/{job}/shards": {
            "parameters": [job],
            "get": _moved(
                _operation(
                    "listShards",
                    "Which part of the model each shard of a job has; its job takes that part of every update",
                    200,
                    _ref("Shards"),
                    (401, 404, 409),
                )
            ),
        },
        "/v1/jobs/{job}/rounds/{number}": {
            "parameters": [job, number],
            "get": _operation("describeRound", "Describe a round", 200, _ref("RoundState"), (401, 404)),
        },
        "/v1/jobs/{job}/rounds/{number}/updates": {"parameters": [job, number], "get": _list_updates()},
        "/v1/jobs/{job}/rounds/{number}/participants": {"parameters": [job, number], "post": _take_part()},
        "/v1/nodes": {
            "get": _operation("listNodes", "List the nodes", 200, _object_of("nodes", _ref("NodeState")), (401,))
        },
        "/healthz": {"get": _operation("healthz", "Is the process alive", 200, _STATUS, (), is_open=True)},
        "/readyz": {"get": _operation("readyz", "Can updates be taken", 200, _STATUS, (), is_open=True)},
        "/metrics": {"get": _metrics()},
        "/openapi.json": {
            "get": _operation("openapi", "This document", 200, {"type": "object"}, (), is_open=True)
        },
    }


_CLIENT_ID: Final[dict[str, Any]] = {
    "type": "string",
    "minLength": 1,
    "maxLength": 256,
    "pattern": r"^[a-zA-Z0-9._/:-]+$",
}
_STATUS: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"type": "string"}},
}
_ROUND_HEADER: Final[dict[str, Any]] = {
    "LIFL-Round": {"required": True, "schema": {"type": "integer"}},
    "ETag": {"required": True, "schema": {"type": "string"}},
    "LIFL-Status": {"required": True, "schema": {"type": "string"}, "description": "Status of the job."},
}


def _get_model() -> dict[str, Any]:
    operation = _operation("getModel", "Get a global model", 200, None, (400, 401, 404))
    operation["parameters"] = [
        _query(
            "round",
            {"type": "integer", "minimum": 1, "maximum": MAX_ROUND},
            "The model that starts this round; the newest if not given",
        ),
        _query(
            "wait",
            {"type": "number", "minimum": 0, "maximum": 60},
            "Seconds to wait for a model newer than If-None-Match or `after`",
        ),
        _query("after", {"type": "integer", "minimum": 0, "maximum": MAX_ROUND}, "A round whose model is known"),
        {"name": "If-None-Match", "in": "header", "schema": {"type": "string", "pattern": r'^"[!-~]*"$'}},
    ]
    operation["responses"]["200"] = {
        "description": "The model",
        "headers": _ROUND_HEADER,
        "content": {"application/vnd.safetensors": {}},
    }
    operation["responses"]["304"] = {"description": "There is no newer model", "headers": _ROUND_HEADER}
    return _moved(operation)


def _moved(operation: dict[str, Any]) -> dict[str, Any]:
    """The operation may be for another node of the cluster, or for its coordinator."""
    operation["responses"]["307"] = {
        "description": "In a cluster: the same request is to be sent to this address",
        "headers": {"Location": {"required": True, "schema": {"type": "string"}}},
    }
    return operation


def _post_update() -> dict[str, Any]:
    operation = _operation(
        "postUpdate",
        "Send a model update as a CloudEvent, in binary or structured mode",
        202,
        _ref("Outcome"),
        (400, 401, 403, 404, 408, 409, 411, 413, 415, 422),
        body=_binary_body("application/vnd.safetensors", "application/octet-stream", STRUCTURED_TYPE),
    )
    operation["responses"]["200"] = _response("The round has an update of this client already", _ref("Outcome"))
    # Required in binary mode only; a structured event has them in its body.
    operation["parameters"] = [
        _header("ce-specversion", {"const": "1.0"}),
        _header("ce-type", {"const": EVENT_TYPE}),
        _header("ce-id", _CLIENT_ID),
        _header("ce-source", _CLIENT_ID, "The client's id, percent-encoded UTF-8"),
        _header(
            "ce-round",
            {"type": "integer", "minimum": 1, "maximum": MAX_ROUND},
            "The round whose model it was trained from: the open one, or in an asynchronous job an earlier one",
        ),
        _header("ce-numsamples", {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_SAMPLES}, "The weight"),
        _header(
            "ce-kind",
            {"enum": ["weights", "delta"]},
            "New weights, or their difference to the model; an asynchronous job takes differences only",
        ),
        _header(
            "ce-update",
            {"type": "string", "maxLength": 256, "pattern": r"^[a-zA-Z0-9._/:-]*$"},
            "For a part of an update of a sharded job: the same in all parts, another one in another update",
        ),
    ]
    return _moved(operation)


def _take_part() -> dict[str, Any]:
    operation = _operation(
        "takePart",
        "Ask for a place in a round, before training; needed where the job selects clients (over_selection)",
        201,
        _ref("Participation"),
        (400, 401, 403, 404, 408, 409, 411, 413, 415, 422),
        body=_json_body(_ref("Participant")),
    )
    operation["responses"]["200"] = _response(
        "The client was selected before, or the job lets everyone take part", _ref("Participation")
    )
    return operation


def _list_updates() -> dict[str, Any]:
    operation = _operation(
        "listUpdates",
        "How long each update of a round took; kept of the open round and the last few complete ones. "
        "In a cluster: those of this node; the coordinator lists all, with their nodes",
        200,
        _ref("RoundUpdates"),
        (400, 401, 404),
    )
    operation["parameters"] = [
        _query(
            "offset",
            {"type": "integer", "minimum": 0, "maximum": MAX_ROUND},
            "Updates to leave out at the start: `next` of the answer before, where a round has many",
        )
    ]
    return _moved(operation)


def _metrics() -> dict[str, Any]:
    operation = _operation("metrics", "Prometheus metrics", 200, None, (401, 403))
    operation["responses"]["200"] = {
        "description": "Prometheus text format",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
    return operation


def _operation(
    name: str,
    summary: str,
    status: int,
    schema: dict[str, Any] | None,
    problems: tuple[int, ...],
    *,
    body: dict[str, Any] | None = None,
    is_open: bool = False,
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": name,
        "summary": summary,
        "responses": {str(status): _response("Done", schema)},
    }
    for code in (*problems, 503):
        operation["responses"][str(code)] = {
            "description": _PROBLEM_TITLES[code],
            "content": {"application/problem+json": {"schema": _ref("Problem")}},
        }
    if body:
        operation["requestBody"] = body
    if is_open:
        operation["security"] = []
    return operation


def _response(description: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    if schema is None:
        return {"description": description}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _object_of(name: str, item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": [name], "properties": {name: {"type": "array", "items": item}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _binary_body(*media_types: str) -> dict[str, Any]:
    schemas: dict[str, dict[str, Any]] = {media_type: {} for media_type in media_types}
    if STRUCTURED_TYPE in schemas:
        schemas[STRUCTURED_TYPE] = {"schema": _STRUCTURED_EVENT}
    return {"required": True, "content": schemas}


_STRUCTURED_EVENT: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["specversion", "type", "source", "id", "round", "numsamples", "data_base64"],
    "properties": {
        "specversion": {"const": "1.0"},
        "type": {"const": EVENT_TYPE},
        "source": {"type": "string", "minLength": 1, "maxLength": 256},
        "id": {"type": "string", "minLength": 1, "maxLength": 256},
        "round": {"type": ["integer", "string"]},
        "numsamples": {"type": ["number", "string"]},
        "kind": {"enum": ["weights", "delta"]},
        "update": {"type": "string", "maxLength": 256},
        "datacontenttype": {"type": "string"},
        "data_base64": {"type": "string", "contentEncoding": "base64"},
    },
}


def _path_parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema, "description": description}


def _header(name: str, schema: dict[str, Any], description: str = "") -> dict[str, Any]:
    return {"name": name, "in": "header", "schema": schema, "description": description}

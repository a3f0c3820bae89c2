"""What `POST /v1/jobs` takes: the limits of a job's specification, for the check and for the OpenAPI document.

The coordinator has the last word; what is refused here is refused with the name of the field and its limit.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec
from lifl.errors import Refused
from lifl.messages import JobSpec
from lifl.shards import MOST_SHARDS

JOB_NAME: Final = r"^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$"
LIMITS: Final[dict[str, dict[str, Any]]] = {
    "name": {"pattern": JOB_NAME},
    "function": {"pattern": r"^[a-z0-9]([-_a-z0-9.]{0,61}[a-z0-9])?$"},
    "goal": {"minimum": 1, "maximum": 1_000_000},
    "quorum": {"minimum": 0, "maximum": 1_000_000},
    "deadline": {"minimum": 0, "maximum": 30 * 86_400},
    "rounds": {"minimum": 0, "maximum": 0xFFFF_FFFF},
    "updates_per_leaf": {"minimum": 1, "maximum": 1_000_000},
    "slots": {"minimum": 0, "maximum": 1 << 20},
    "keep_checkpoints": {"minimum": 0, "maximum": 1_000_000_000},
    "idle_seconds": {"minimum": 0.1, "maximum": 86_400},
    "smoothing": {"minimum": 0, "maximum": 1},
    "max_staleness": {"minimum": 0, "maximum": 10_000},
    "staleness_exponent": {"minimum": 0, "maximum": 10},
    "over_selection": {"minimum": 0, "maximum": 10},
    "shards": {"minimum": 1, "maximum": MOST_SHARDS},
}
"""JSON Schema keywords by field, beyond what the types say."""

HIDDEN: Final = ("shard_of", "whole")
"""Fields that only the coordinator of a cluster sets."""

_INTEGERS: Final = frozenset(name for name, kind in JobSpec.__annotations__.items() if kind == "int")


def decode_job_spec(data: bytes) -> JobSpec:
    """Decode and check a job's specification; raises Refused 400 for what is no JSON, 422 for the rest."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, "Bad Request", f"the body is not JSON: {error}") from None
    if isinstance(value, dict):
        for name in HIDDEN:
            if name in value:
                raise Refused(422, "Invalid job", f"{name}: set by the platform; create a job with shards")
        value = {name: _as_integer(name, item) for name, item in value.items()}
    try:
        spec = msgspec.convert(value, JobSpec)
    except msgspec.ValidationError as error:
        raise Refused(422, "Invalid job", str(error)) from None
    broken = [f"{name}: {_said(limits)}" for name, limits in LIMITS.items() if not _keeps(spec, name, limits)]
    if broken:
        raise Refused(422, "Invalid job", "; ".join(broken))
    return spec


def _as_integer(name: str, value: object) -> object:
    """JSON knows one kind of number: 4.0 is an integer."""
    return int(value) if name in _INTEGERS and isinstance(value, float) and value.is_integer() else value


def _keeps(spec: JobSpec, name: str, limits: dict[str, Any]) -> bool:
    value = getattr(spec, name)
    if "pattern" in limits:
        return re.fullmatch(limits["pattern"].strip("^$"), value) is not None
    return bool(limits["minimum"] <= value <= limits["maximum"])


def _said(limits: dict[str, Any]) -> str:
    if "pattern" in limits:
        return "lower-case letters, digits and '-', '.', at most 63, beginning and ending with a letter or digit"
    return f"from {limits['minimum']:,} to {limits['maximum']:,}"


def hide_of_spec(shown: dict[str, Any]) -> None:
    """Take out of a job's state, as it is shown, what its specification has for the platform alone."""
    spec = shown.get("spec", {})
    for name in HIDDEN:
        if not spec.get(name) or name == "whole":
            spec.pop(name, None)

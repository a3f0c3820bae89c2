"""Strict validation against the CRDs that Knative publishes: what `fieldValidation=Strict` does on a real server.

The schemas are read from a directory beside the repository, or LIFL_KNATIVE_FIXTURES; without it nothing is known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
_FILES = (
    "serving-service-crd.yaml",
    "serving-podautoscaler-crd.yaml",
    "eventing-broker-crd.yaml",
    "eventing-trigger-crd.yaml",
)


def fixtures() -> Path | None:
    """The directory of the published schemas; None if it is not there."""
    named = os.environ.get("LIFL_KNATIVE_FIXTURES")
    places = [Path(named)] if named else [p / "shared/fixtures/knative" for p in ROOT.parents]
    return next((place for place in places if (place / _FILES[0]).is_file()), None)


def need_fixtures() -> Path:
    """The directory of the published schemas, or the test is skipped."""
    place = fixtures()
    if place is None:
        pytest.skip("Knative's CRDs are not here; LIFL_KNATIVE_FIXTURES names their directory")
    return place


@cache
def schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """OpenAPI schema of each (apiVersion, kind) that is known."""
    from ruamel.yaml import YAML

    place, found = fixtures(), {}
    for file in _FILES if place else ():
        assert place is not None
        crd = YAML(typ="safe").load((place / file).read_text())["spec"]
        for version in crd["versions"]:
            key = f"{crd['group']}/{version['name']}", crd["names"]["kind"]
            found[key] = version["schema"]["openAPIV3Schema"]
    return found


def problems(obj: dict[str, Any]) -> list[tuple[str, str]]:
    """(field, what is wrong) for everything in `obj` that its CRD does not allow, unknown fields included.

    Raises KeyError for a kind without a schema.
    """
    schema = schemas()[obj["apiVersion"], obj["kind"]]
    metadata = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    always = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": metadata}
    return list(_check(obj, {**schema, "properties": {**schema["properties"], **always}}, ""))


def _check(value: Any, schema: dict[str, Any], where: str) -> Iterator[tuple[str, str]]:
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield where, "must be an integer or a string"
        elif isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
            yield where, f"'{value}' does not match {schema['pattern']}"
        return
    expected = schema.get("type")
    if not _has_type(value, expected):
        yield where, f"must be of type {expected}, not {type(value).__name__}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield where, f"'{value}' is none of {schema['enum']}"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield where, f"'{value}' does not match {schema['pattern']}"
    if isinstance(value, int | float) and value < schema.get("minimum", value):
        yield where, f"{value} is below {schema['minimum']}"
    if isinstance(value, dict):
        yield from _check_mapping(value, schema, where)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _check(item, schema.get("items", {}), f"{where}[{number}]")


def _check_mapping(value: dict[str, Any], schema: dict[str, Any], where: str) -> Iterator[tuple[str, str]]:
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{where}.{name}".lstrip("."), "is required"
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties")
    for name, item in value.items():
        place = f"{where}.{name}".lstrip(".")
        if name in properties:
            yield from _check(item, properties[name], place)
        elif isinstance(others, dict):
            yield from _check(item, others, place)
        elif not (others or schema.get("x-kubernetes-preserve-unknown-fields") or not schema):
            yield place, "unknown field"


def _has_type(value: Any, expected: str | None) -> bool:
    match expected:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case _:
            return True

"""Expressions in values of func.yaml: `{{ env:NAME }}`, `{{ secret:NAME:KEY }}`, `{{ configMap:NAME:KEY }}`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lifl.errors import InvalidInput

if TYPE_CHECKING:
    from lifl.func_yaml.config import Env, Label

_LOCAL = re.compile(r"\{\{\s*env:(\w+)\s*\}\}", re.ASCII)
# As Knative's func reads it: a name may be longer than Kubernetes permits, which the cluster then says.
_CLUSTER = re.compile(
    r"\{\{\s*(?P<kind>secret|configMap):(?P<name>(?:\w|['-]\w)+)(?::(?P<key>[-._a-zA-Z0-9]+))?\s*\}\}", re.ASCII
)


@dataclass(frozen=True)
class Plain:
    """The value itself."""

    value: str


@dataclass(frozen=True)
class LocalVariable:
    """`{{ env:NAME }}`: a variable of whoever deploys or runs the function."""

    name: str


@dataclass(frozen=True)
class SecretReference:
    """`{{ secret:NAME:KEY }}`, or without key all of the Secret."""

    secret: str
    key: str | None


@dataclass(frozen=True)
class ConfigMapReference:
    """`{{ configMap:NAME:KEY }}`, or without key all of the ConfigMap."""

    config_map: str
    key: str | None


Source = Plain | LocalVariable | SecretReference | ConfigMapReference


def parse_source(value: str) -> Source:
    """What a value stands for. Raises ValueError if it begins with '{{' and is no expression."""
    if not value.startswith("{{"):
        return Plain(value)
    if local := _LOCAL.fullmatch(value):
        return LocalVariable(local[1])
    if cluster := _CLUSTER.fullmatch(value):
        kind = SecretReference if cluster["kind"] == "secret" else ConfigMapReference
        return kind(cluster["name"], cluster["key"])
    raise ValueError(f"'{value}' is no expression")


def evaluate(value: str, environment: Mapping[str, str]) -> str:
    """`value` with `{{ env:NAME }}` replaced by that variable; any other value as it is.

    Raises InvalidInput if the variable is not set.
    """
    local = _LOCAL.fullmatch(value)
    if local is None:
        return value
    try:
        return environment[local[1]]
    except KeyError:
        raise InvalidInput(
            f"the environment variable '{local[1]}', which func.yaml asks for with '{value}', is not set"
        ) from None


def local_environment(envs: Iterable[Env], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a function run on this machine gets; references to a cluster stay as they are written.

    Raises InvalidInput that names every variable of `environment` that is missing.
    """
    variables: dict[str, str] = {}
    missing: list[str] = []
    for env in envs:
        if env.name is None or env.value is None:
            continue
        try:
            variables[env.name] = evaluate(env.value, environment)
        except InvalidInput as error:
            missing.append(str(error))
    if missing:
        raise InvalidInput("; ".join(missing))
    return variables


def evaluate_labels(labels: Iterable[Label], environment: Mapping[str, str]) -> dict[str, str]:
    """The labels with their values of now. Raises InvalidInput for a missing variable, or an invalid value."""
    from lifl.func_yaml.names import label_value_problem

    values: dict[str, str] = {}
    for label in labels:
        value = evaluate(label.value or "", environment)
        if problem := label_value_problem(value):
            raise InvalidInput(f"the value of label '{label.key}' {problem}")
        values[label.key or ""] = value
    return values

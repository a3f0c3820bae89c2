"""Which function a command is about, and in which namespace: a name that is given, or the project's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from lifl.cli.common import CommandError, program

if TYPE_CHECKING:
    from lifl.func_yaml.document import Document

    from lifl_knative.cluster import Cluster


@dataclass(frozen=True)
class Target:
    """A function in the cluster."""

    name: str
    namespace: str
    document: Document | None
    """func.yaml of its project, if the command is about a project."""


def find_target(cluster: Cluster, name: str | None, path: Path, namespace: str | None) -> Target:
    """The function called `name`, or that of the project in `path`.

    Raises CommandError for both at once, and InvalidProject if there is neither.
    """
    from lifl.cli.settings import choose_namespace, read_user_config
    from lifl.func_yaml.document import Document

    context = click.get_current_context()
    is_path_given = context.get_parameter_source("path") != click.core.ParameterSource.DEFAULT
    if name and is_path_given:
        raise CommandError(
            "a name and --path exclude each other",
            [
                (f"{context.command_path} {name}", "the function of that name"),
                (f"{context.command_path} --path {path}", "that of the project"),
            ],
        )
    document = None if name else Document.load(path)
    config = document.config if document else None
    chosen = choose_namespace(namespace, config, cluster.context_namespace, read_user_config())
    return Target(name or (config and config.name) or "", chosen.value, document)


def find_service(cluster: Cluster, target: Target) -> dict[str, Any]:
    """The function's Service. Raises CommandError if it is not deployed."""
    from lifl_knative.service import API_VERSION

    service = cluster.get(API_VERSION, "Service", target.name, target.namespace)
    if service is None:
        raise not_deployed(cluster, target)
    return service


def not_deployed(cluster: Cluster, target: Target) -> CommandError:
    """The error for a function that is not there."""
    hints = [
        (f"{program()} list -n {target.namespace}", "the functions that are there"),
        (f"{program()} list --all-namespaces", "those of all namespaces"),
    ]
    if target.document is not None:
        hints.append((f"{program()} deploy", "deploy it"))
    return CommandError(
        f"function not found: there is no '{target.name}' in namespace '{target.namespace}' of context "
        f"'{cluster.context}'",
        hints,
    )

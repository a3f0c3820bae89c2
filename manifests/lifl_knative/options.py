"""The options of every command that asks a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


def cluster_options(command: _Command) -> _Command:
    """`--context`, `--kubeconfig`, `-n/--namespace`, as `context`, `kubeconfig`, `namespace`; None if absent."""
    for decorate in (
        click.option(
            "-n",
            "--namespace",
            metavar="NAME",
            envvar="FUNC_NAMESPACE",
            help="Namespace in the cluster. [default: the context's]",
        ),
        click.option(
            "--context",
            metavar="NAME",
            envvar="FUNC_CONTEXT",
            help="Context of the kubeconfig. [default: its current]",
        ),
        click.option(
            "--kubeconfig",
            type=click.Path(path_type=Path, dir_okay=False),
            envvar="FUNC_KUBECONFIG",
            help="Kubeconfig file. [default: those in KUBECONFIG, else ~/.kube/config]",
        ),
    ):
        command = decorate(command)
    return command

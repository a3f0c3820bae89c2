"""The options of every command that asks a Kubernetes cluster."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

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


def format_option(*formats: str) -> Callable[[_Command], _Command]:
    """`-o FORMAT`, as `output`: one of `formats`, by default the first."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(formats),
        default=formats[0],
        envvar="FUNC_OUTPUT",
        show_default=True,
        help="Format of what is printed on stdout.",
    )


class Duration(click.ParamType[float]):
    """Seconds, from `90`, `90s`, `2m` or `1h30m`."""

    name = "duration"
    _SECONDS: ClassVar[dict[str, float]] = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number of seconds; fails, as click wants it, for anything else."""
        if isinstance(value, int | float):
            return float(value)
        text = str(value)
        if re.fullmatch(r"\d+(\.\d+)?", text):
            return float(text)
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            self.fail(f"'{text}' is no duration such as 90s or 2m", param, ctx)
        return sum(float(number) * self._SECONDS[unit] for number, unit in parts)

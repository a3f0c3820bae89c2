"""`func doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lifl.cli.common import CommandError, output_option, print_json

if TYPE_CHECKING:
    from lifl.doctor import Check

_EXIT_MISSING = 1
_MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "missing": "[red]missing[/]"}


@click.command("doctor")
@click.option("--cluster", "of_cluster", is_flag=True, help="Look at a Kubernetes cluster, not at this machine.")
@click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="FUNC_KUBECONFIG",
    help="With --cluster: kubeconfig file. [default: those in KUBECONFIG, else ~/.kube/config]",
)
@click.option(
    "--context", metavar="NAME", envvar="FUNC_CONTEXT", help="With --cluster: context. [default: its current]"
)
@click.option(
    "-n",
    "--namespace",
    metavar="NAME",
    envvar="FUNC_NAMESPACE",
    help="With --cluster: where functions are to be. [default: the context's]",
)
@output_option
def command(
    of_cluster: bool, kubeconfig: Path | None, context: str | None, namespace: str | None, output: str
) -> int:
    """Show what this machine can do, and what it cannot and why; or a cluster, with --cluster.

    Looks only; changes nothing. The exit code is 1 if something is missing that LIFL cannot do without.

    \b
    Examples:
      func doctor
      func doctor -o json
      sudo func doctor                           # what an agent with privileges would see
      func doctor --cluster -n federated         # may functions be deployed there?
    """
    checks = _examine_cluster(kubeconfig, context, namespace) if of_cluster else _examine_machine()
    if output == "json":
        print_json([check.as_dict() for check in checks])
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        if not console.is_terminal:
            console.width = 80
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("CHECK", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("FOUND, AND WHAT IT MEANS", overflow="fold")
        for check in checks:
            found = Text(check.value)
            if check.hint:
                found.append(f"\n{check.hint}", style="dim")
            table.add_row(check.name, _MARKS[check.status], found)
        console.print(table)
    return _EXIT_MISSING if any(check.status == "missing" and check.needed for check in checks) else 0


def _examine_machine() -> list[Check]:
    from lifl.doctor import examine

    return examine()


def _examine_cluster(kubeconfig: Path | None, context: str | None, namespace: str | None) -> list[Check]:
    """By name, as the command line finds commands: `lifl` does not depend on what speaks to Kubernetes."""
    import importlib

    try:
        doctor = importlib.import_module("lifl_knative.doctor")
        importlib.import_module("kubernetes")
    except ModuleNotFoundError as error:
        hint = ("pip install 'lifl[knative]'", "install what asks clusters")
        raise CommandError(f"clusters cannot be examined here: {error}", [hint]) from None
    checks: list[Check] = doctor.examine_cluster(kubeconfig, context, namespace)
    return checks

"""`func list`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from lifl.cli.common import note, print_json, program

from lifl_knative.options import cluster_options, format_option

_COLUMNS = ("name", "namespace", "runtime", "deployer", "url", "ready", "replicas")


@click.command("list")
@click.option(
    "-A", "--all-namespaces", is_flag=True, envvar="FUNC_ALL_NAMESPACES", help="Those of all namespaces."
)
@cluster_options
@format_option("human", "plain", "json", "yaml")
def command(
    all_namespaces: bool, kubeconfig: Path | None, context: str | None, namespace: str | None, output: str
) -> None:
    """List the functions in a cluster.

    \b
    Examples:
      func list
      func list --all-namespaces -o json
    """
    from lifl.cli.settings import choose_namespace, read_user_config

    from lifl_knative.cluster import Cluster
    from lifl_knative.commands.print_yaml import print_yaml
    from lifl_knative.function_view import is_function, summarise
    from lifl_knative.service import API_VERSION

    with Cluster.connect(kubeconfig, context) as cluster:
        chosen = choose_namespace(namespace, None, cluster.context_namespace, read_user_config()).value
        place = "*" if all_namespaces else chosen
        services = [found for found in cluster.list(API_VERSION, "Service", place) if is_function(found)]
        rows = summarise(cluster, services, place)
    if output == "json":
        print_json(rows)
    elif output == "yaml":
        print_yaml([rows])
    elif not rows:
        where = "any namespace" if all_namespaces else f"namespace '{chosen}'"
        note(
            f"No functions in {where}. '{program()} deploy' deploys one; --all-namespaces looks into all of them."
        )
    else:
        _print_rows(rows, has_header=output == "human")


def _print_rows(rows: list[dict[str, Any]], *, has_header: bool) -> None:
    """Columns as wide as what is in them: URLs are to be copied whole."""
    cells = [[_cell(row[column]) for column in _COLUMNS] for row in rows]
    if has_header:
        cells.insert(0, [column.upper() for column in _COLUMNS])
    widths = [max(len(row[number]) for row in cells) for number in range(len(_COLUMNS))]
    for row in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: object) -> str:
    return "-" if value in (None, "") else str(value)

"""`func describe`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from lifl.cli.common import path_option, print_json

from lifl_knative.options import cluster_options, format_option


@click.command("describe")
@click.argument("name", required=False)
@path_option
@cluster_options
@format_option("human", "plain", "json", "yaml", "url")
def command(
    name: str | None,
    path: Path,
    kubeconfig: Path | None,
    context: str | None,
    namespace: str | None,
    output: str,
) -> None:
    """Describe a function in a cluster: the project's, or the one called NAME.

    \b
    Examples:
      func describe
      func describe fedavg -n learning
      curl $(func describe -o url)/health/readiness
    """
    from lifl_knative.cluster import Cluster
    from lifl_knative.commands.print_yaml import print_yaml
    from lifl_knative.commands.target import find_service, find_target
    from lifl_knative.function_view import describe

    with Cluster.connect(kubeconfig, context) as cluster:
        found = describe(cluster, find_service(cluster, find_target(cluster, name, path, namespace)))
    match output:
        case "json":
            print_json(found)
        case "yaml":
            print_yaml([found])
        case "url":
            click.echo(found["Route"])
        case "plain":
            _print_plain(found)
        case _:
            _print_human(found)


_LABELS = (
    ("Function name", "name"),
    ("Function is built in image", "image"),
    ("Function is deployed in namespace", "namespace"),
    ("Function is deployed using", "deployer"),
    ("Model updates take the route", "path"),
    ("Number of pods is set by", "autoscaler"),
    ("Revision", "revision"),
    ("Ready", "ready"),
    ("Because", "reason"),
)


def _print_human(found: Mapping[str, Any]) -> None:
    """A label in each line, and below it its values."""
    for label, key in _LABELS:
        if found[key]:
            click.echo(f"{label}:\n  {found[key]}")
    _print_values("Routes", found["routes"])
    _print_values("Subscriptions (Source, Type, Broker)", _subscriptions(found))
    _print_values("Labels", [f"{key}: {value}" for key, value in found["labels"].items()])


def _print_values(label: str, values: list[str]) -> None:
    if values:
        click.echo(f"{label}:" + "".join(f"\n  {value}" for value in values))


def _print_plain(found: Mapping[str, Any]) -> None:
    """A word and a value in each line, for scripts."""
    for key in ("name", "image", "namespace", "deployer", "revision", "ready"):
        click.echo(f"{key.upper()} {found[key]}")
    for route in found["routes"]:
        click.echo(f"ROUTE {route}")
    for subscription in _subscriptions(found):
        click.echo(f"SUBSCRIPTION {subscription}")


def _subscriptions(found: Mapping[str, Any]) -> list[str]:
    return [" ".join(s[key] or "-" for key in ("source", "type", "broker")) for s in found["subscriptions"]]

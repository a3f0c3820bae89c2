"""`func logs`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from lifl.cli.common import CommandError, note, path_option

from lifl_knative.options import Duration, cluster_options

if TYPE_CHECKING:
    from lifl_knative.cluster import Cluster

_CONTAINER = "user-container"


@click.command("logs")
@click.option("--name", metavar="NAME", envvar="FUNC_NAME", help="Name of the function. [default: the project's]")
@path_option
@cluster_options
@click.option("--since", type=Duration(), default="1m", show_default=True, help="Begin with what is so old.")
@click.option("-f", "--follow/--no-follow", default=True, show_default=True, help="Go on until Ctrl-C.")
def command(
    name: str | None,
    path: Path,
    kubeconfig: Path | None,
    context: str | None,
    namespace: str | None,
    since: float,
    follow: bool,
) -> None:
    """Show what a function's pods write: the project's, or those of --name.

    \b
    Examples:
      func logs
      func logs --name fedavg --since 1h --no-follow
    """
    from lifl_knative.cluster import Cluster
    from lifl_knative.commands.target import find_service, find_target

    with Cluster.connect(kubeconfig, context) as cluster:
        target = find_target(cluster, name, path, namespace)
        find_service(cluster, target)
        selector = f"serving.knative.dev/service={target.name}"
        if follow:
            note(f"Logs of function '{target.name}' in namespace '{target.namespace}'; Ctrl-C ends this")
            _follow(cluster, target.namespace, selector, since)
        pods = cluster.list("v1", "Pod", target.namespace, selector)
        if not pods:
            note(f"Function '{target.name}' has no pods: it is scaled to zero, or has failed ('func describe')")
        for pod in pods:
            log = cluster.pod_log(target.namespace, pod["metadata"]["name"], _CONTAINER, since_s=round(since))
            for line in log.splitlines():
                _print_line(pod, line, is_alone=len(pods) == 1)


def _follow(cluster: Cluster, namespace: str, selector: str, since_s: float) -> None:
    """Print the lines of all pods, also of those that start later, until Ctrl-C."""
    followed: set[str] = set()
    pods: set[str] = set()
    for event in cluster.watch("v1", "Pod", namespace, selector=selector):
        pod = event["object"]
        name = pod["metadata"]["name"]
        if event["type"] == "DELETED":
            pods.discard(name)
            continue
        pods.add(name)
        if name not in followed and _has_started(pod):
            followed.add(name)
            thread = threading.Thread(target=_follow_pod, args=(cluster, pod, since_s, pods), daemon=True)
            thread.start()


def _has_started(pod: Mapping[str, Any]) -> bool:
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return any(
        status.get("name") == _CONTAINER and not (status.get("state") or {}).get("waiting") for status in statuses
    )


def _follow_pod(cluster: Cluster, pod: Mapping[str, Any], since_s: float, pods: set[str]) -> None:
    metadata = pod["metadata"]
    try:
        for line in cluster.follow_log(
            metadata["namespace"], metadata["name"], _CONTAINER, since_s=max(1, round(since_s))
        ):
            _print_line(pod, line, is_alone=len(pods) == 1)
    except CommandError as error:
        note(f"Warning: the log of pod {metadata['name']} has ended: {error}")


def _print_line(pod: Mapping[str, Any], line: str, *, is_alone: bool) -> None:
    click.echo(line if is_alone else f"{pod['metadata']['name']}: {line}")

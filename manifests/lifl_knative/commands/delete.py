"""`func delete`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from lifl.cli.common import CommandError, note, path_option, print_json

from lifl_knative.options import Duration, cluster_options, format_option

if TYPE_CHECKING:
    from lifl_knative.cluster import Cluster
    from lifl_knative.commands.target import Target


@click.command("delete")
@click.argument("name", required=False)
@path_option
@cluster_options
@click.option(
    "--all",
    "is_all",
    type=click.BOOL,
    default=True,
    show_default=True,
    envvar="FUNC_ALL",
    help="Delete its Triggers too.",
)
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when it is gone.")
@click.option("--timeout", type=Duration(), default="120s", show_default=True, help="How long to wait for that.")
@format_option("human", "json")
def command(
    name: str | None,
    path: Path,
    kubeconfig: Path | None,
    context: str | None,
    namespace: str | None,
    is_all: bool,
    wait: bool,
    timeout: float,
    output: str,
) -> None:
    """Delete a function from a cluster: the project's, or the one called NAME. The project stays as it is.

    \b
    Examples:
      func delete
      func delete fedavg -n learning
    """
    from lifl_knative.cluster import Cluster
    from lifl_knative.commands.target import find_target, not_deployed
    from lifl_knative.service import API_VERSION

    with Cluster.connect(kubeconfig, context) as cluster:
        target = find_target(cluster, name, path, namespace)
        if not cluster.delete(API_VERSION, "Service", target.name, target.namespace):
            raise not_deployed(cluster, target)
        triggers = _delete_triggers(cluster, target) if is_all else []
        if wait:
            _wait_until_gone(cluster, target, timeout)
    if target.document is not None:
        _forget(target)
    if output == "json":
        print_json({"name": target.name, "namespace": target.namespace, "deleted": True, "triggers": triggers})
    else:
        note(f"Function '{target.name}' deleted from namespace '{target.namespace}'")


def _delete_triggers(cluster: Cluster, target: Target) -> list[str]:
    """Delete those that deployments made; the cluster would too, but only after the Service."""
    from lifl_knative.api_errors import Forbidden
    from lifl_knative.triggers import API_VERSION, trigger_selector

    if not cluster.has(API_VERSION, "Trigger"):
        return []
    try:
        found = cluster.list(API_VERSION, "Trigger", target.namespace, trigger_selector(target.name))
    except Forbidden:
        return []  # the Service owns them: they go with it
    names = [str(trigger["metadata"]["name"]) for trigger in found]
    return [name for name in names if cluster.delete(API_VERSION, "Trigger", name, target.namespace)]


def _wait_until_gone(cluster: Cluster, target: Target, timeout_s: float) -> None:
    from lifl_knative.service import API_VERSION

    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        if cluster.get(API_VERSION, "Service", target.name, target.namespace) is None:
            return
        for event in cluster.watch(API_VERSION, "Service", target.namespace, target.name, seconds=left):
            if event["type"] == "DELETED":
                return
    raise CommandError(
        f"function '{target.name}' is being deleted from namespace '{target.namespace}', but still there after "
        f"{timeout_s:g} s",
        [
            (
                f"{cluster.kubectl} get ksvc {target.name} -n {target.namespace} -o yaml",
                "the finalizers that it waits for",
            )
        ],
    )


def _forget(target: Target) -> None:
    """Take out of func.yaml where the function was deployed."""
    assert target.document is not None
    document = target.document
    if document.config.deploy.namespace == target.namespace:
        for field in ("deploy.namespace", "deploy.deployer", "deploy.image"):
            document.clear(field)
        document.save()

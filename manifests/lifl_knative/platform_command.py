"""`func platform`: install the platform in a cluster, look at it, remove it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from lifl.cli.common import CommandError, note, output_option, print_json, program

from lifl_knative.options import Duration, cluster_options

if TYPE_CHECKING:
    from rich.table import Table

    from lifl_knative.cluster import Cluster

_OVERLAYS = ("single-node", "production", "broker-baseline")
_OVERLAY_WITHOUT_CLUSTER = "production"
_COMPONENTS = ("observability", "seccomp-unconfined")


@click.group("platform")
def command() -> None:
    """Install LIFL in a Kubernetes cluster, look at it, remove it.

    The platform is what functions need beside Knative: on each node an agent and a gateway, for the cluster a
    coordinator and an autoscaler. Its manifests are those in manifests/, for kubectl apply -k as well.

    \b
    Examples:
      func platform install
      func platform status
      func platform uninstall
    """


@command.command("install")
@click.option(
    "--overlay",
    type=click.Choice(_OVERLAYS),
    envvar="FUNC_OVERLAY",
    help="Size of the installation. [default: as installed; else single-node for one node, production for more]",
)
@click.option(
    "--component",
    "components",
    multiple=True,
    type=click.Choice([*_COMPONENTS, "none"]),
    help="Add this to the overlay; repeatable. [default: as installed; else observability where it can be]",
)
@click.option(
    "--image",
    metavar="IMAGE",
    envvar="FUNC_PLATFORM_IMAGE",
    help="Image of node, coordinator and autoscaler, where the nodes can fetch it.",
)
@click.option("--version", metavar="TAG", help="Tag of the image. [default: this version of func]")
@click.option(
    "--dry-run",
    type=click.Choice(["client", "server"]),
    help="Change nothing: print the manifests; with 'server' have the cluster check them first.",
)
@click.option("--force", is_flag=True, help="Take over fields that somebody else has set.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when all pods are ready.")
@click.option(
    "--timeout",
    type=Duration(),
    default="300s",
    show_default=True,
    envvar="FUNC_TIMEOUT",
    help="How long to wait for that.",
)
@cluster_options
@output_option
def install_command(
    overlay: str | None,
    components: Sequence[str],
    image: str | None,
    version: str | None,
    dry_run: str | None,
    force: bool,
    wait: bool,
    timeout: float,
    kubeconfig: Path | None,
    context: str | None,
    namespace: str | None,
    output: str,
) -> None:
    """Install the platform, or upgrade it; the same again changes nothing.

    What others have set in the objects stays. Secrets with random tokens are made when they are missing, and are
    neither shown nor changed. Knative's feature flags are not touched; 'func doctor --cluster' says what it takes.

    \b
    Examples:
      func platform install --image registry.example.com/lifl-node
      func platform install --overlay production --timeout 600
      func platform install --dry-run client | kubectl diff -f -
      func platform install --overlay broker-baseline
    """
    from lifl_knative import platform
    from lifl_knative.installation import plan

    _refuse_namespace(namespace)
    choices: dict[str, Any] = {
        "overlay": overlay,
        "components": None if not components else [name for name in components if name != "none"],
        "image": image,
        "version": version,
    }
    if dry_run == "client" and (overlay is not None or not _knows_cluster(kubeconfig, context)):
        choices["overlay"] = overlay or _OVERLAY_WITHOUT_CLUSTER
        if overlay is None:
            note(f"No cluster is known: these are the manifests of overlay {choices['overlay']}")
        _print_manifests(plan(None, **choices).objects(), output)
        return
    with _connect(kubeconfig, context) as cluster:
        if dry_run:
            wanted = plan(cluster, **choices)
            if dry_run == "server":
                platform.install(cluster, **choices, dry_run=True, force=force, note=note)
            _print_manifests(wanted.objects(), output)
            return
        installed = platform.install(cluster, **choices, force=force, wait=wait, timeout=timeout, note=note)
    if output == "json":
        print_json(
            {
                "overlay": installed.overlay,
                "components": list(installed.components),
                "namespace": installed.namespace,
                "image": installed.image,
                "ready": wait,
            }
        )
    else:
        state = "ready" if wait else "applied"
        click.echo(f"platform {state} in namespace {installed.namespace} (overlay {installed.overlay})")


@command.command("status")
@cluster_options
@output_option
def status_command(kubeconfig: Path | None, context: str | None, namespace: str | None, output: str) -> None:
    """Show what is installed, how much of it is ready, and which data plane each node has.

    \b
    Examples:
      func platform status
      func platform status -o json
    """
    from lifl.cli.tables import show

    from lifl_knative.platform_status import describe

    _refuse_namespace(namespace)
    with _connect(kubeconfig, context) as cluster:
        found = describe(cluster)
        if not found:
            raise CommandError(
                f'the platform is not in the cluster of context "{cluster.context}"',
                [
                    (f"{program()} platform install", "install it"),
                    (f"{program()} doctor --cluster", "what the cluster lacks for it"),
                ],
            )
    show(found, output, _render, "")


@command.command("uninstall")
@click.option(
    "--overlay",
    type=click.Choice(_OVERLAYS),
    envvar="FUNC_OVERLAY",
    help="Remove this one. [default: all that is installed]",
)
@click.option("--delete-data", is_flag=True, help="Also delete volumes, tokens and the namespace with all in it.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@cluster_options
@output_option
def uninstall_command(
    overlay: str | None,
    delete_data: bool,
    yes: bool,
    kubeconfig: Path | None,
    context: str | None,
    namespace: str | None,
    output: str,
) -> None:
    """Remove the platform; journals, models and tokens stay unless --delete-data.

    Functions stay too, but those with the route 'lifl' do no work without it.

    \b
    Examples:
      func platform uninstall
      func platform uninstall --delete-data --yes
    """
    from lifl_knative import platform
    from lifl_knative.platform_manifests import NAMESPACES

    _refuse_namespace(namespace)
    with _connect(kubeconfig, context) as cluster:
        homes = [NAMESPACES[overlay]] if overlay else list(dict.fromkeys(NAMESPACES.values()))
        homes = [home for home in homes if platform.labelled_objects(cluster, home)]
        if not homes:
            raise CommandError(
                f'nothing of the platform is in the cluster of context "{cluster.context}"',
                [(f"{program()} platform status --context NAME", "look at another cluster")],
            )
        if not yes:
            _confirm(cluster, homes, delete_data)
        kept = platform.uninstall(cluster, homes, delete_data=delete_data, note=note)
    if output == "json":
        print_json({"removed": homes, "kept": kept})
        return
    click.echo(f"platform removed from namespace {' and '.join(homes)}")
    if kept:
        click.echo(f"kept: {', '.join(kept)}; 'func platform uninstall --delete-data' deletes them")


def _knows_cluster(kubeconfig: Path | None, context: str | None) -> bool:
    """Whether there is a cluster to ask; it need not answer. One that is named and not there is an error."""
    from lifl_knative.api_errors import NoCluster
    from lifl_knative.kubeconfig import find_access

    try:
        find_access(kubeconfig, context)
    except NoCluster:
        if kubeconfig or context:
            raise
        return False
    return True


def _connect(kubeconfig: Path | None, context: str | None) -> Cluster:
    from lifl_knative.cluster import Cluster

    return Cluster.connect(kubeconfig, context)


def _refuse_namespace(namespace: str | None) -> None:
    """The namespaces are fixed; FUNC_NAMESPACE, which is meant for functions, must not stop anyone."""
    source = click.get_current_context().get_parameter_source("namespace")
    if namespace is not None and source is click.core.ParameterSource.COMMANDLINE:
        raise CommandError(
            "the platform's namespaces are fixed, lifl-system and lifl-broker: leave --namespace out",
            [(f"{click.get_current_context().command_path}", "without the option")],
        )


def _confirm(cluster: Cluster, homes: Sequence[str], delete_data: bool) -> None:
    what = f'the platform in namespace {" and ".join(homes)} of context "{cluster.context}"'
    what += ", with all journals, models and tokens" if delete_data else ""
    if not sys.stdin.isatty():
        flags = " --delete-data" if delete_data else ""
        raise CommandError(
            f"this would remove {what}; nobody is there to confirm it",
            [(f"{program()} platform uninstall{flags} --yes", "remove it without being asked")],
        )
    click.confirm(f"Remove {what}?", abort=True, err=True)


def _print_manifests(objects: Sequence[Mapping[str, Any]], output: str) -> None:
    if output == "json":
        print_json(list(objects))
        return
    from ruamel.yaml import YAML

    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.dump_all(objects, sys.stdout)


def _render(found: Sequence[Mapping[str, Any]]) -> Table:
    from lifl.cli.tables import stack

    tables: list[Table] = []
    for installation in found:
        tables += _tables(installation)
    return stack(*tables)


def _tables(installation: Mapping[str, Any]) -> list[Table]:
    from lifl.cli.tables import facts_table, plain_table
    from rich.text import Text

    facts = facts_table(
        ("overlay", installation["overlay"]),
        ("components", ", ".join(installation["components"])),
        ("namespace", installation["namespace"]),
        ("image", installation["image"]),
        ("ready", "yes" if installation["ready"] else "no"),
    )
    objects = plain_table(
        "KIND", "NAME", "STATUS", "VERSION", left=frozenset({"KIND", "NAME", "STATUS", "VERSION"})
    )
    for obj in installation["objects"]:
        objects.add_row(obj["kind"], Text(obj["name"]), _state(obj), obj.get("version", ""))
    troubles = facts_table(*((obj["name"], obj.get("trouble", "")) for obj in installation["objects"]))
    nodes = plain_table(
        *("NODE", "READY", "DATA PLANE", "WHY"),
        left=frozenset({"NODE", "READY", "DATA PLANE", "WHY"}),
        widths={"NODE": 24, "WHY": 36},
    )
    for node in installation["nodes"]:
        plane = node["data_plane"] or "unknown"
        nodes.add_row(Text(node["node"] or "-"), "yes" if node["ready"] else "no", plane, Text(node["reason"]))
    return [facts, objects, troubles, nodes]


def _state(obj: Mapping[str, Any]) -> str:
    if not obj["present"]:
        return "missing"
    if "ready" in obj:
        return f"{obj['ready']}/{obj['wanted']} ready"
    return "there"

"""`func deploy`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from lifl.cli.common import CommandError, note, path_option, print_json, program
from lifl.cli.settings import choose_image, choose_namespace, image_options, read_user_config

from lifl_knative.options import Duration, cluster_options, format_option

if TYPE_CHECKING:
    from lifl.cli.settings import Setting, UserConfig
    from lifl.func_yaml.document import Document

    from lifl_knative.cluster import Cluster
    from lifl_knative.function_image import ImageOrder
    from lifl_knative.rollout import Rollout
    from lifl_knative.service import Deployment, Route


@click.command("deploy")
@path_option
@image_options
@cluster_options
@click.option(
    "-e",
    "--env",
    "envs",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a variable; NAME- removes one. Kept in func.yaml.",
)
@click.option(
    "--build",
    type=click.Choice(["auto", "true", "false"]),
    default="auto",
    show_default=True,
    envvar="FUNC_BUILD",
    help="Build the image: if something has changed, always, or never.",
)
@click.option("-b", "--builder", metavar="PROGRAM", envvar="FUNC_BUILDER", help="What builds; see 'func build'.")
@click.option(
    "--push/--no-push", default=True, show_default=True, envvar="FUNC_PUSH", help="Send it to its registry."
)
@click.option(
    "--service-account", metavar="NAME", envvar="FUNC_SERVICE_ACCOUNT", help="Account that the pods run as."
)
@click.option(
    "--image-pull-secret", metavar="NAME", envvar="FUNC_IMAGE_PULL_SECRET", help="Secret for a private registry."
)
@click.option(
    "--route",
    type=click.Choice(["lifl", "broker"]),
    envvar="FUNC_ROUTE",
    help="How model updates reach the function: by the node's agent and shared memory, or by a broker. "
    "[default: lifl, or as the annotation lifl.dev/route says]",
)
@click.option("--install-platform", is_flag=True, help="Install or upgrade LIFL's platform in the cluster first.")
@click.option("--force", is_flag=True, help="Take over fields that somebody else has set.")
@click.option(
    "--dry-run",
    type=click.Choice(["client", "server"]),
    help="Change nothing: print the manifests; with 'server' have the cluster check them first.",
)
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return when the function is ready.")
@click.option(
    "--timeout",
    type=Duration(),
    default="120s",
    show_default=True,
    envvar="FUNC_TIMEOUT",
    help="How long to wait for that.",
)
@format_option("human", "json", "yaml", "url")
def command(
    path: Path,
    image: str | None,
    registry: str | None,
    kubeconfig: Path | None,
    context: str | None,
    namespace: str | None,
    envs: Sequence[str],
    build: Any,
    builder: str | None,
    push: bool,
    service_account: str | None,
    image_pull_secret: str | None,
    route: str | None,
    install_platform: bool,
    force: bool,
    dry_run: str | None,
    wait: bool,
    timeout: float,
    output: str,
) -> None:
    """Deploy the function project to a Kubernetes cluster with Knative.

    The image is built and pushed first, unless it is given by its digest. Everything that the function refers to
    is looked up before anything is changed. What was chosen is kept in func.yaml. The same again changes nothing.

    \b
    Examples:
      func deploy --registry ghcr.io/ada
      func deploy --image ghcr.io/ada/fedavg@sha256:... -n learning
      func deploy --env ROUNDS=20 --env OLD-
      func deploy --route broker --timeout 5m
      func deploy --dry-run=client > manifests.yaml
    """
    from lifl.func_yaml.document import Document

    from lifl_knative.function_image import ImageOrder

    document = Document.load(path)
    for warning in document.warnings:
        note(f"Warning: {warning}")
    _edit(document, envs, service_account, image_pull_secret)
    user = read_user_config()
    named = choose_image(image, registry, document.config, user)
    order = ImageOrder(build, push, builder)
    plan = _Plan(document, user, named, order, _choose_route(route, document), install_platform)
    if dry_run == "client":
        _print_manifests(_deployment_offline(plan, kubeconfig, context, namespace), output)
        return
    from lifl_knative.cluster import Cluster

    with Cluster.connect(kubeconfig, context) as cluster:
        deployment = _prepare(cluster, plan, namespace, is_dry=bool(dry_run))
        if dry_run:
            _dry_run(cluster, deployment, output, force=force)
            return
        rollout, service = _deploy(cluster, plan, deployment, force=force, timeout_s=timeout if wait else None)
    _keep(plan, deployment, registry, namespace)
    _report(deployment, rollout, service, output, is_waited=wait)


@dataclass(frozen=True)
class _Plan:
    """What the command line and the project say."""

    document: Document
    user: UserConfig
    image: Setting
    order: ImageOrder
    route: Route
    install_platform: bool


# --- func.yaml -----------------------------------------------------------------------------------------------


def _edit(document: Document, envs: Sequence[str], account: str | None, pull_secret: str | None) -> None:
    """Make what the command line says part of func.yaml; it is written when the function is deployed."""
    for text in envs:
        name, equals, value = text.partition("=")
        if equals:
            if any(env.name == name for env in document.config.run.envs):
                document.update("run.envs", {"name": name}, {"value": value})
            else:
                document.append("run.envs", {"name": name, "value": value})
        elif text.endswith("-"):
            document.remove("run.envs", {"name": text[:-1]})
        else:
            raise CommandError(
                f"'--env {text}' sets nothing",
                [
                    (f"{program()} deploy --env {text}=VALUE", "set the variable"),
                    (f"{program()} deploy --env {text}-", "remove it"),
                ],
            )
    if account:
        document.set("deploy.serviceAccountName", account)
    if pull_secret:
        document.set("deploy.imagePullSecret", pull_secret)
    document.check()
    deployer = document.config.deployer
    if deployer not in (None, "knative"):
        raise CommandError(
            f"func.yaml: deployer: '{deployer}' is not supported; LIFL deploys Knative Services",
            [("deployer: knative", "write this in func.yaml, or take the line out")],
        )


def _choose_route(route: str | None, document: Document) -> Route:
    from lifl.func_yaml.config import ROUTE_ANNOTATION

    chosen = route or document.config.deploy.annotations.get(ROUTE_ANNOTATION, "lifl")
    if chosen == "lifl":
        return "lifl"
    if chosen == "broker":
        return "broker"
    raise CommandError(
        f"func.yaml: deploy.annotations: {ROUTE_ANNOTATION}: '{chosen}' is no route: lifl or broker"
    )


def _keep(plan: _Plan, deployment: Deployment, registry: str | None, namespace: str | None) -> None:
    """Write to func.yaml what was chosen, and what is deployed where."""
    document = plan.document
    if registry:
        document.set("registry", registry.rstrip("/"))
        document.clear("image")  # it would come before the registry
    elif plan.image.origin == "the command line":
        document.set("image", plan.image.value)
    if namespace:
        document.set("namespace", namespace)
    document.set("deploy.namespace", deployment.namespace)
    document.set("deploy.image", deployment.image)
    document.set("deploy.deployer", "knative")
    document.save()


# --- preparing -----------------------------------------------------------------------------------------------


def _prepare(cluster: Cluster, plan: _Plan, namespace: str | None, *, is_dry: bool) -> Deployment:
    """What to deploy, checked against the cluster, with its image made; says how it differs from before."""
    from dataclasses import replace

    from lifl_knative import preflight
    from lifl_knative.function_image import is_pinned, make_image

    config = plan.document.config
    chosen = choose_namespace(namespace, config, cluster.context_namespace, plan.user)
    _note_namespace(cluster, plan, chosen)
    done = "Nothing was changed in the cluster."
    if plan.install_platform and not is_dry:
        from lifl_knative import platform

        platform.install(cluster, note=note)
        done = "LIFL's platform is installed; nothing else was changed in the cluster."
    found = preflight.find_platform(cluster)
    deployment = preflight.choose_scaling(_deployment(plan, chosen.value), found)
    preflight.check(cluster, deployment, found, done)
    if not is_dry:
        made = make_image(plan.document.directory, config, deployment.image, plan.order, plan.user)
        deployment = replace(deployment, image=made.reference, image_content=made.content)
    if not is_pinned(deployment.image) and not deployment.image_content:
        note(
            f"Warning: the image is not pinned: the digest of '{deployment.image}' is not known here, so "
            "Knative asks the registry; what is pushed under this tag later is deployed only with another change"
        )
    return deployment


def _deployment(plan: _Plan, namespace: str) -> Deployment:
    from lifl_knative.service import Deployment

    config = plan.document.config
    function = Path(config.function_path).stem if config.function_path else (config.name or "").replace("-", "_")
    return Deployment(config, plan.image.value, namespace, plan.route, function=function, environment=os.environ)


def _deployment_offline(
    plan: _Plan, kubeconfig: Path | None, context: str | None, namespace: str | None
) -> Deployment:
    """What would be deployed to a cluster with LIFL's autoscaler; the kubeconfig says at most the namespace."""
    from dataclasses import replace

    from lifl_knative.api_errors import NoCluster
    from lifl_knative.kubeconfig import find_access

    try:
        active = find_access(kubeconfig, context).namespace
    except NoCluster:
        if kubeconfig or context:
            raise
        active = None
    chosen = choose_namespace(namespace, plan.document.config, active, plan.user)
    deployment = _deployment(plan, chosen.value)
    return replace(deployment, is_plan_scaled=plan.route == "lifl")


def _note_namespace(cluster: Cluster, plan: _Plan, chosen: Setting) -> None:
    before = plan.document.config.deploy.namespace
    if before and before != chosen.value:
        name = plan.document.config.name
        note(
            f"Info: the function stays in namespace '{before}' too; '{program()} delete {name} -n {before}' ends "
            "that"
        )
    active = cluster.context_namespace or "default"
    if chosen.value != active and chosen.origin.startswith("func.yaml"):
        note(f"Warning: namespace chosen is '{chosen.value}' (from {chosen.origin}), but active is '{active}'")


# --- deploying -----------------------------------------------------------------------------------------------


def _deploy(
    cluster: Cluster, plan: _Plan, deployment: Deployment, *, force: bool, timeout_s: float | None
) -> tuple[Rollout, dict[str, Any]]:
    """Apply everything, and wait unless `timeout_s` is None; the Service as it is then."""
    from lifl_knative.rollout import apply_all, wait_until_ready

    rollout = apply_all(cluster, deployment, force=force)
    for name in rollout.applied[1:]:
        note(f"{name} applied")
    for name in rollout.deleted:
        note(f"{name} deleted: func.yaml has no such subscription any more")
    if timeout_s is None:
        return rollout, rollout.service
    return rollout, wait_until_ready(cluster, rollout.service, timeout_s)


def _report(
    deployment: Deployment, rollout: Rollout, service: dict[str, Any], output: str, *, is_waited: bool
) -> None:
    from lifl_knative.commands.print_yaml import print_yaml
    from lifl_knative.function_view import readiness, url_of

    url = url_of(service)
    done = "deployed" if rollout.is_new else "updated" if rollout.is_changed else "unchanged"
    where = f'Function {done} in namespace "{deployment.namespace}"'
    note(
        f"✅ {where} and exposed at URL: \n   {url}" if is_waited else f"{where}; nobody waited until it is ready"
    )
    document = {
        "name": deployment.name,
        "namespace": deployment.namespace,
        "image": deployment.image,
        "route": deployment.route,
        "autoscaler": "plan" if deployment.is_plan_scaled else "kpa",
        "url": url,
        "revision": (service.get("status") or {}).get("latestReadyRevisionName", ""),
        "ready": readiness(service),
        "result": done,
        "applied": rollout.applied,
        "deleted": rollout.deleted,
    }
    if output == "json":
        print_json(document)
    elif output == "yaml":
        print_yaml([document])
    elif output == "url":
        click.echo(url)


def _dry_run(cluster: Cluster, deployment: Deployment, output: str, *, force: bool) -> None:
    """Have the cluster check everything; it keeps nothing."""
    from lifl_knative.rollout import has_broker, manifests

    for obj in manifests(deployment):
        if obj["kind"] == "Broker" and has_broker(cluster, deployment):
            continue  # it stays as it is
        cluster.apply(obj, dry_run=True, force=force)
    note("The cluster accepts all of this; nothing was changed")
    _print_manifests(deployment, output)


def _print_manifests(deployment: Deployment, output: str) -> None:
    from lifl_knative.commands.print_yaml import print_yaml
    from lifl_knative.rollout import manifests

    objects = manifests(deployment)
    if output == "json":
        print_json({"apiVersion": "v1", "kind": "List", "items": objects})
    elif output == "url":
        raise CommandError(
            "a dry run has no URL", [(f"{program()} deploy --dry-run=client -o yaml", "the manifests")]
        )
    else:
        print_yaml(objects)

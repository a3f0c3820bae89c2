"""`func build`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from lifl.cli.common import CommandError, note, output_option, path_option, print_json, program
from lifl.cli.settings import Setting, UserConfig, choose_image, image_options, read_user_config

if TYPE_CHECKING:
    from lifl.func_yaml.config import FunctionConfig

    from lifl_knative.images.builders import Builder
    from lifl_knative.images.recipes import BuildOptions, BuiltImage

_BUILDERS = ("podman", "buildah", "docker")


@click.command("build")
@path_option
@image_options
@click.option(
    "-b",
    "--builder",
    type=click.Choice(_BUILDERS),
    envvar="FUNC_BUILDER",
    help="What builds the image. [default: the first of them that works here]",
)
@click.option("-u", "--push", is_flag=True, envvar="FUNC_PUSH", help="Send the image to its registry.")
@click.option(
    "--base-image",
    metavar="IMAGE",
    envvar="FUNC_BASE_IMAGE",
    help="What to build on, or 'debian-packages' for those that this machine has. [default: those, if it has]",
)
@click.option("--platform", metavar="OS/ARCH", envvar="FUNC_PLATFORM", help="Such as linux/arm64. [default: this]")
@click.option(
    "--registry-insecure",
    is_flag=True,
    default=None,
    envvar="FUNC_REGISTRY_INSECURE",
    help="The registry has no certificate that can be checked.",
)
@click.option("--force", is_flag=True, envvar="FUNC_FORCE", help="Build even if nothing has changed.")
@click.option("--node-image", is_flag=True, help="Build the image of LIFL's own processes instead.")
@click.option("-v", "--verbose", is_flag=True, envvar="FUNC_VERBOSE", help="Show what the builder says.")
@output_option
def command(
    path: Path,
    image: str | None,
    registry: str | None,
    builder: str | None,
    push: bool,
    base_image: str | None,
    platform: str | None,
    registry_insecure: bool | None,
    force: bool,
    node_image: bool,
    verbose: bool,
    output: str,
) -> None:
    """Build the container image of the function project.

    It holds Python, the packages that the project asks for, LIFL and the project's files, but for those that
    .funcignore names. A Containerfile or Dockerfile in the project describes what it is built on. Without a
    registry the image stays on this machine. Image and registry are kept in func.yaml.

    With --node-image it is the image that a cluster runs LIFL's agents, gateways, coordinator and autoscaler from.

    \b
    Examples:
      func build                                         # localhost/NAME:latest
      func build --registry ghcr.io/ada --push
      func build --image registry.example.com/fl/fedavg:1.0
      func build --base-image python:3.12-slim           # instead of this machine's Debian packages
      func build --node-image --registry ghcr.io/ada --push
    """
    from lifl_knative.images.builders import choose_builder
    from lifl_knative.images.recipes import BuildOptions

    user = read_user_config()
    named = builder or (user.builder if user.builder in _BUILDERS else None)
    chosen = choose_builder(named, verbose=verbose or bool(user.verbose))
    insecure = bool(user.registry_insecure) if registry_insecure is None else registry_insecure
    options = BuildOptions(base_image, platform, insecure, force)
    if node_image:
        built = _build_node(chosen, _choose_node_image(image, registry, user, push=push), options)
    else:
        built, insecure = _build_function(chosen, path, image, registry, options, user, push=push)
    document: dict[str, object] = {"image": built.image, "id": built.id}
    document |= {"builder": chosen.program, "built": built.is_new}
    if push:
        document["digest"] = push_image(chosen, built.image, insecure=insecure)
    if output == "json":
        print_json(document)


def push_image(builder: Builder, image: str, *, insecure: bool) -> str:
    """Send an image to its registry and say so; returns its digest there. Raises CommandError."""
    note(f'Pushing image to the registry "{image.rpartition("/")[0]}"')
    digest = builder.push(image, insecure=insecure)
    note(f"Image pushed: {digest}")
    return digest


def _build_function(
    builder: Builder,
    path: Path,
    image: str | None,
    registry: str | None,
    options: BuildOptions,
    user: UserConfig,
    *,
    push: bool,
) -> tuple[BuiltImage, bool]:
    """The function's image, and whether its registry may be insecure; func.yaml keeps what the user chose."""
    from lifl.func_yaml.expressions import local_environment
    from lifl.project import load_project

    from lifl_knative.images.recipes import build_function_image
    from lifl_knative.images.record import BuildRecord, write_record

    project = load_project(path)
    for warning in project.warnings:
        note(f"Warning: {warning}")
    config = project.config
    name = choose_image(image, registry, config, user if push else _with_local_registry(user))
    used = replace(
        options,
        base_image=options.base_image or config.build.base_image,
        insecure=options.insecure or config.registry_insecure,
        variables=local_environment(config.build.build_envs, os.environ),
    )
    note("Building function image")
    built = build_function_image(builder, project, name.value, used)
    write_record(project.directory, BuildRecord(built.image, built.key))
    _keep_choice(project.directory, config, name, registry, options)
    if built.is_new:
        note(f"Function built: {built.image}")
    else:
        note(f"Function image up-to-date: {built.image}. Force a rebuild with --force")
    return built, used.insecure


def _with_local_registry(user: UserConfig) -> UserConfig:
    """The user's configuration, with this machine in place of a registry if it has none."""
    return user if user.registry else replace(user, registry="localhost")


def _keep_choice(
    directory: Path, config: FunctionConfig, name: Setting, registry: str | None, options: BuildOptions
) -> None:
    """Write what the user has chosen to func.yaml, so that the next build and deployment do the same."""
    from lifl.func_yaml.document import Document

    document = Document.load(directory)
    registry = registry or (os.environ.get("FUNC_REGISTRY") if not os.environ.get("FUNC_IMAGE") else None)
    if name.origin in ("the command line", "the environment"):
        if registry:
            document.set("registry", registry.rstrip("/"))
            document.clear("image")  # it would come before the registry
        elif name.value != config.image:
            document.set("image", name.value)
    if options.base_image and options.base_image != config.build.base_image:
        document.set("build.baseImage", options.base_image)
    document.save()


def _choose_node_image(image: str | None, registry: str | None, user: UserConfig, *, push: bool) -> str:
    from lifl.func_yaml.config import FunctionConfig
    from lifl.func_yaml.names import image_problem

    from lifl_knative.images.recipes import NODE_IMAGE, default_node_image

    # FUNC_IMAGE names the function's image, which must not be overwritten.
    environment = {name: value for name, value in os.environ.items() if name != "FUNC_IMAGE"}
    user = user if push else _with_local_registry(user)
    name = choose_image(image, registry, FunctionConfig(name=NODE_IMAGE), user, environment)
    if image:
        return name.value
    tagged = default_node_image(name.value.rpartition("/")[0])
    if problem := image_problem(tagged):
        raise CommandError(f"the image {problem}", [(f"{program()} build --node-image --image IMAGE", "its name")])
    return tagged


def _build_node(builder: Builder, image: str, options: BuildOptions) -> BuiltImage:
    from lifl_knative.images.recipes import build_node_image

    note("Building node image")
    built = build_node_image(builder, image, options)
    if built.is_new:
        note(f"Node image built: {built.image}")
    else:
        note(f"Node image up-to-date: {built.image}. Force a rebuild with --force")
    return built

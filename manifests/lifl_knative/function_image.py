"""The image that a deployment runs: built and pushed when that is asked for, and pinned by its digest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lifl.cli.common import CommandError, note, program
from lifl.cli.settings import UserConfig
from lifl.func_yaml.config import FunctionConfig

Build = Literal["auto", "true", "false"]

_NEVER_LOOKED_UP = ("dev.local/", "kind.local/", "ko.local/")
"""Registries whose tags Knative Serving does not resolve, unless it is configured otherwise."""


@dataclass(frozen=True)
class ImageOrder:
    """What the command line says of the image."""

    build: Build = "auto"
    """`auto` builds unless nothing has changed, `true` always."""
    push: bool = True
    builder: str | None = None


@dataclass(frozen=True)
class FunctionImage:
    """What the pods run."""

    reference: str
    """With its digest, if that is known."""
    content: str = ""
    """The id of what was built, where no digest tells one content of a tag from another."""


def is_pinned(image: str) -> bool:
    """Whether the reference names one content for ever."""
    return "@sha256:" in image


def make_image(
    directory: Path, config: FunctionConfig, image: str, order: ImageOrder, user: UserConfig
) -> FunctionImage:
    """Build and push `image` as asked.

    An image that is given by its digest is taken as it is. Raises CommandError, also if there is no builder here.
    """
    if is_pinned(image):
        return FunctionImage(image)
    if order.build != "false":
        return _build(directory, config, image, order, user)
    if order.push:
        return _push(config, image, order, user)
    return FunctionImage(image)


def _build(
    directory: Path, config: FunctionConfig, image: str, order: ImageOrder, user: UserConfig
) -> FunctionImage:
    from lifl.func_yaml.expressions import local_environment
    from lifl.project import load_project

    from lifl_knative.images.builders import choose_builder
    from lifl_knative.images.recipes import BuildOptions, build_function_image
    from lifl_knative.images.record import BuildRecord, write_record

    builder = choose_builder(_builder_name(order, user), verbose=bool(user.verbose))
    project = load_project(directory)
    note("Building function image")
    options = BuildOptions(
        base_image=config.build.base_image,
        insecure=_is_insecure(config, user),
        force=order.build == "true",
        variables=local_environment(config.build.build_envs, os.environ),
    )
    built = build_function_image(builder, project, image, options)
    write_record(project.directory, BuildRecord(built.image, built.key))
    note(f"Function built: {image}" if built.is_new else "Function up-to-date. Force a rebuild with --build=true")
    if order.push:
        return _push(config, image, order, user)
    note(f"The image {image} is not pushed: the nodes of the cluster have to have it")
    if not image.startswith(_NEVER_LOOKED_UP):
        note(f"Warning: Knative looks {image} up in its registry; it does not for names under dev.local/")
    return FunctionImage(image, built.id)


def _push(config: FunctionConfig, image: str, order: ImageOrder, user: UserConfig) -> FunctionImage:
    if image.startswith("localhost/"):
        raise CommandError(
            f"the image '{image}' is in no registry, so a cluster cannot fetch it",
            [
                (f"{program()} deploy --registry REGISTRY/USER", "push it to a registry"),
                (
                    f"{program()} deploy --image dev.local/{config.name}:1 --no-push",
                    "for nodes that have it already",
                ),
            ],
        )
    from lifl_knative.commands.build import push_image
    from lifl_knative.images.builders import choose_builder

    builder = choose_builder(_builder_name(order, user), verbose=bool(user.verbose))
    digest = push_image(builder, image, insecure=_is_insecure(config, user))
    return FunctionImage(f"{without_tag(image)}@{digest}")


def without_tag(image: str) -> str:
    """The reference without tag and digest."""
    name = image.partition("@")[0]
    directory, slash, last = name.rpartition("/")
    return directory + slash + last.partition(":")[0]


def _builder_name(order: ImageOrder, user: UserConfig) -> str | None:
    from lifl_knative.images.builders import BUILDERS

    return order.builder or (user.builder if user.builder in BUILDERS else None)


def _is_insecure(config: FunctionConfig, user: UserConfig) -> bool:
    return config.registry_insecure or bool(user.registry_insecure)

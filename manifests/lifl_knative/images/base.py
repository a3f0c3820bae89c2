"""The image that all others are put on: one of a registry, or one made of this machine's Debian packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lifl.cli.common import CommandError, program

from lifl_knative.images import debian
from lifl_knative.images.builders import LOCAL_PACKAGES
from lifl_knative.images.image_python import ImagePython, probe_image, probe_local
from lifl_knative.images.layers import EMPTY, Layer, Layers, hash_of, variable_lines

DEFAULT_BASE = "docker.io/library/python:3.12-slim"
"""The base on machines that have no Debian packages."""
CONTAINERFILES = ("Containerfile", "Dockerfile")
"""A project's own description of its base, which may name the base that it would have got as BASE_IMAGE."""

_LOCAL_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}


@dataclass(frozen=True)
class Base:
    """A base image that the builder has."""

    layer: Layer
    python: ImagePython


def ensure_base(
    layers: Layers,
    wanted: str | None,
    *,
    node: bool = False,
    insecure: bool = False,
    project: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Base:
    """The base image `wanted`, pulled or made if it is not there.

    None stands for one made of Debian packages, and on machines without any for `DEFAULT_BASE`. A Containerfile or
    Dockerfile in the directory `project` is built on it, with `variables` as build arguments. Raises CommandError.
    """
    if not wanted:
        wanted = LOCAL_PACKAGES if node or debian.is_debian() else DEFAULT_BASE
    base = _local_base(layers, node=node) if wanted == LOCAL_PACKAGES else _registry_base(layers, wanted, insecure)
    containerfile = _find_containerfile(project) if project else None
    return _extend(layers, base, containerfile, variables or {}) if containerfile else base


def _local_base(layers: Layers, *, node: bool) -> Base:
    python = probe_local()
    _check_platform(layers.platform, python)
    packages = debian.find_packages(debian.NODE_PACKAGES if node else debian.FUNCTION_PACKAGES)
    lines = variable_lines(_LOCAL_ENVIRONMENT)
    key = layers.key(debian.key_of(packages), lines)

    def write(archive: Path, work: Path) -> None:
        debian.write_base(packages, python, archive, work, node=node)

    return Base(layers.cached("lifl-base", key, EMPTY, write, lines), python)


def _check_platform(platform: str | None, python: ImagePython) -> None:
    """Raise CommandError for a platform whose packages this machine does not have."""
    names = {"x86_64": "amd64", "aarch64": "arm64"}
    machine = names.get(python.machine, python.machine)
    if platform and platform.split("/")[1:2] != [machine]:
        raise CommandError(
            f"a base made of this machine's packages is for linux/{machine}, not {platform}",
            [(f"{program()} build --platform {platform} --base-image {DEFAULT_BASE}", "a base from a registry")],
        )


def _registry_base(layers: Layers, image: str, insecure: bool) -> Base:
    facts = layers.builder.inspect(image)
    # An image of another platform may have the same name here, which only the registry can tell.
    if facts is None or layers.platform:
        layers.builder.pull(image, layers.platform, insecure=insecure)
        facts = layers.builder.inspect(image)
    if facts is None:
        raise CommandError(f"{layers.builder.program} has pulled {image}, but does not have it", [])
    return Base(Layer(image, facts.id), probe_image(layers.builder, image, layers.platform))


def _find_containerfile(project: Path) -> Path | None:
    files = (project / name for name in CONTAINERFILES)
    return next((file for file in files if file.is_file()), None)


def _extend(layers: Layers, base: Base, containerfile: Path, variables: Mapping[str, str]) -> Base:
    """Build the project's own base. The builder's cache, not ours, knows what of it is there already."""
    image = f"localhost/lifl-base:{hash_of(str(containerfile.resolve()), layers.platform)[:16]}"
    layers.builder.build(
        containerfile.parent,
        image,
        containerfile=containerfile,
        platform=layers.platform,
        network=None,
        arguments={**variables, "BASE_IMAGE": base.layer.image},
        is_own=False,
    )
    facts = layers.builder.inspect(image)
    if facts is None:
        raise CommandError(f"{layers.builder.program} has built {image}, but does not have it", [])
    return Base(Layer(image, facts.id), probe_image(layers.builder, image, layers.platform))

"""Where a command's settings come from, in order of precedence.

1. the option on the command line, 2. the variable `FUNC_<OPTION>`, 3. func.yaml, 4. the user's configuration file,
5. a default. Most options leave the first two to click (`envvar`); what is set in several places is chosen here.

The user's configuration is `config.yaml` in `~/.config/func`, or in `func` below XDG_CONFIG_HOME, or the file that
FUNC_CONFIG_FILE names: the file of Knative's func, with its keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lifl.cli.common import CommandError, command_path

if TYPE_CHECKING:
    from lifl.func_yaml.config import FunctionConfig

DEFAULT_NAMESPACE = "default"

_Command = TypeVar("_Command", bound=Callable[..., Any])
_SIZE_LIMIT = 1 << 20
_TEXTS = ("builder", "deployer", "language", "namespace", "registry")
_TRUTHS = ("confirm", "registryInsecure", "verbose")


@dataclass(frozen=True)
class UserConfig:
    """The user's configuration file; None for what it does not say."""

    file: Path
    """Where it is read from, whether it exists or not."""
    builder: str | None = None
    confirm: bool | None = None
    deployer: str | None = None
    language: str | None = None
    namespace: str | None = None
    registry: str | None = None
    registry_insecure: bool | None = None
    verbose: bool | None = None


@dataclass(frozen=True)
class Setting:
    """A value that was chosen, and what said so, such as `--namespace` or `func.yaml`."""

    value: str
    origin: str


def user_config_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Path of the user's configuration file."""
    if named := environment.get("FUNC_CONFIG_FILE"):
        return Path(named).expanduser()
    base = environment.get("XDG_CONFIG_HOME")
    return (
        Path(base) if base else Path(environment.get("HOME") or "~").expanduser() / ".config"
    ) / "func/config.yaml"


def read_user_config(environment: Mapping[str, str] = os.environ) -> UserConfig:
    """The user's configuration; an empty one if there is no file. Raises CommandError if it cannot be used."""
    file = user_config_file(environment)
    try:
        with file.open("rb") as stream:
            data = stream.read(_SIZE_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        return UserConfig(file)
    except OSError as error:
        raise CommandError(f"the configuration file '{file}' cannot be read: {error.strerror}") from None
    from lifl.func_yaml.text import InvalidYaml, is_null, parse

    try:
        tree, _ = parse(data)
    except InvalidYaml as error:
        raise CommandError(f"the configuration file '{file}' is not valid YAML: {error}") from None
    if is_null(tree):
        return UserConfig(file)
    if not isinstance(tree, Mapping):
        raise CommandError(
            f"the configuration file '{file}' has to be a mapping such as 'registry: localhost:5000'"
        )
    values: dict[str, Any] = {}
    for key in _TEXTS:
        if not is_null(value := tree.get(key)):
            if not isinstance(value, str):
                raise CommandError(f"the configuration file '{file}' has a {key} that is no text")
            values[key] = str(value)
    for key in _TRUTHS:
        if not is_null(value := tree.get(key)):
            if str(value).lower() not in ("true", "false"):
                raise CommandError(f"the configuration file '{file}' has '{key}: {value}'; it is true or false")
            values["registry_insecure" if key == "registryInsecure" else key] = str(value).lower() == "true"
    return UserConfig(file, **values)


def choose_namespace(
    given: str | None, config: FunctionConfig | None, active: str | None, user: UserConfig
) -> Setting:
    """The namespace to deploy to, or to look in.

    `given` is --namespace or FUNC_NAMESPACE, `config` the project if there is one, `active` the namespace of the
    kubeconfig's context if it names one. Where a function is deployed already comes after where it should be.
    Raises CommandError if it cannot be a namespace.
    """
    from lifl.func_yaml.names import namespace_problem

    candidates = (
        (given, "--namespace"),
        (config and config.namespace, "func.yaml"),
        (config and config.deploy.namespace, "func.yaml, where the function is deployed"),
        (active, "the kubeconfig's context"),
        (user.namespace, str(user.file)),
    )
    chosen = next((Setting(value, origin) for value, origin in candidates if value), None)
    chosen = chosen or Setting(DEFAULT_NAMESPACE, "the default")
    if problem := namespace_problem(chosen.value):
        raise CommandError(f"the namespace {problem} (from {chosen.origin})")
    return chosen


def image_options(command: _Command) -> _Command:
    """`-i IMAGE` and `-r REGISTRY`, as `image` and `registry`, for `choose_image`, which asks the environment."""
    for decorate in (
        click.option(
            "-r",
            "--registry",
            metavar="REGISTRY",
            help="Registry and user, such as ghcr.io/ada. [env: FUNC_REGISTRY]",
        ),
        click.option("-i", "--image", metavar="IMAGE", help="The image's full name. [env: FUNC_IMAGE]"),
    ):
        command = decorate(command)
    return command


def choose_image(
    image: str | None,
    registry: str | None,
    config: FunctionConfig,
    user: UserConfig,
    environment: Mapping[str, str] = os.environ,
) -> Setting:
    """The name of the function's image.

    `image` and `registry` are what the command line said; then the environment, func.yaml and the user's
    configuration are asked in turn, each first for an image, then for a registry: `REGISTRY/NAME:latest`.
    Raises CommandError for both options at once, for names that cannot be, and if nobody says.
    """
    if image and registry:
        raise CommandError(
            "--image and --registry exclude each other",
            [
                (f"{command_path()} --image REGISTRY/USER/NAME:TAG", "the image's full name"),
                (f"{command_path()} --registry REGISTRY/USER", "the function's name is added"),
            ],
        )
    layers = (
        (image, registry, "the command line"),
        (environment.get("FUNC_IMAGE"), environment.get("FUNC_REGISTRY"), "the environment"),
        (config.image, config.registry, "func.yaml"),
        (None, user.registry, str(user.file)),
    )
    from lifl.func_yaml.names import image_problem, registry_problem

    for image_here, registry_here, origin in layers:
        if image_here:
            if problem := image_problem(image_here):
                raise CommandError(f"the image {problem} (from {origin})")
            return Setting(image_here, origin)
        if registry_here:
            if problem := registry_problem(registry_here):
                raise CommandError(f"the registry {problem} (from {origin})")
            return Setting(f"{registry_here.rstrip('/')}/{config.name}:latest", origin)
    raise CommandError(
        "nothing says which image to make: there is neither an image nor a registry",
        [
            (f"{command_path()} --registry REGISTRY/USER", "such as ghcr.io/ada; kept in func.yaml"),
            (f"{command_path()} --image REGISTRY/USER/NAME:TAG", "the image's full name"),
            ("export FUNC_REGISTRY=REGISTRY/USER", "for all functions of this shell"),
        ],
    )

"""`func config`: what func.yaml says of the function's environment, labels and volumes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lifl.cli.common import CommandError, note, output_option, path_option, print_json, program

if TYPE_CHECKING:
    from lifl.func_yaml.config import Volume
    from lifl.func_yaml.document import Document

_TYPES = {"configmap": "configMap", "secret": "secret", "pvc": "persistentVolumeClaim", "emptydir": "emptyDir"}


@click.group("config")
def command() -> None:
    """Show and change the function's environment, labels and volumes.

    What is changed is func.yaml, whose comments and order stay; 'func deploy' brings it to the cluster.

    \b
    Examples:
      func config envs                           # list
      func config envs add --name GOAL --value 8
      func config labels remove --name team
      func config volumes add --type secret --source certificates --mount-path /etc/certificates
    """


def _listing(name: str, summary: str, examples: Sequence[str]) -> Callable[[Callable[..., None]], click.Group]:
    """A group that lists when it is called without a command."""
    lines = "".join(f"\n  func config {name}{example}" for example in examples)
    text = f"{summary}\n\n\b\nExamples:{lines}\n"

    def decorate(function: Callable[..., None]) -> click.Group:
        group = click.group(name, help=text, short_help=summary, invoke_without_command=True)
        made: click.Group = group(path_option(output_option(click.pass_context(function))))
        command.add_command(made)
        return made

    return decorate


def _load(context: click.Context, path: Path) -> Document:
    """The project's document; the group's own --path counts where the command has none."""
    from lifl.func_yaml.document import Document

    source = context.get_parameter_source("path")
    if source is click.core.ParameterSource.DEFAULT and context.parent is not None:
        path = context.parent.params.get("path", path)
    return Document.load(path)


def _print(rows: Iterable[Sequence[str]], header: Sequence[str], nothing: str) -> None:
    table = [header, *rows]
    if len(table) == 1:
        note(nothing)
        return
    widths = [max(len(row[column]) for row in table) for column in range(len(header) - 1)]
    for row in table:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


# --- environment ---------------------------------------------------------------------------------------------


@_listing(
    "envs",
    "Show and change the function's environment variables.",
    [
        "",
        " -o json",
        " add --name GOAL --value 8",
        " add --name TOKEN --value '{{ secret:access:token }}'",
        " add --value '{{ configMap:settings }}'     # all keys of it",
        " remove --name GOAL",
    ],
)
def envs(context: click.Context, path: Path, output: str) -> None:
    if context.invoked_subcommand:
        return
    found = _load(context, path).config.run.envs
    if output == "json":
        print_json([_without_none({"name": env.name, "value": env.value}) for env in found])
    else:
        rows = ((env.name or "(all keys)", env.value or "") for env in found)
        _print(rows, ("NAME", "VALUE"), "The function has no environment variables of its own")


@envs.command("add")
@path_option
@click.option("--name", help="Name of the variable; leave it out for all keys of a Secret or ConfigMap.")
@click.option("--value", required=True, help="Text, or {{ env:N }}, {{ secret:N:KEY }}, {{ configMap:N:KEY }}.")
@click.pass_context
def add_env(context: click.Context, path: Path, name: str | None, value: str) -> None:
    """Add an environment variable, or change its value.

    \b
    Examples:
      func config envs add --name GOAL --value 8
      func config envs add --name USER --value '{{ env:USER }}'
    """
    document = _load(context, path)
    item = _without_none({"name": name, "value": value})
    key = {"name": name} if name else {"value": value}
    present = [env for env in document.config.run.envs if env.name == name and (name or env.value == value)]
    _put(document, "run.envs", key, item, bool(present), f"environment variable '{name or value}'")


@envs.command("remove")
@path_option
@click.option("--name", help="Name of the variable.")
@click.option("--value", help="Value of one that has no name.")
@click.pass_context
def remove_env(context: click.Context, path: Path, name: str | None, value: str | None) -> None:
    """Remove an environment variable.

    \b
    Examples:
      func config envs remove --name GOAL
      func config envs remove --value '{{ configMap:settings }}'
    """
    if (name is None) == (value is None):
        raise CommandError(
            "give either --name or --value",
            [
                (f"{program()} config envs remove --name NAME", "the usual"),
                (f"{program()} config envs", "all of them"),
            ],
        )
    document = _load(context, path)
    known = [env.name if name else env.value for env in document.config.run.envs if bool(env.name) == bool(name)]
    key = {"name": name} if name else {"value": value}
    _remove(document, "run.envs", key, (name or value) in known, f"environment variable '{name or value}'", "envs")


# --- labels --------------------------------------------------------------------------------------------------


@_listing(
    "labels",
    "Show and change the labels of the deployed function.",
    ["", " -o json", " add --name example.com/team --value research", " remove --name example.com/team"],
)
def labels(context: click.Context, path: Path, output: str) -> None:
    if context.invoked_subcommand:
        return
    found = _load(context, path).config.deploy.labels
    if output == "json":
        print_json([_without_none({"key": label.key, "value": label.value}) for label in found])
    else:
        rows = ((label.key or "", label.value or "") for label in found)
        _print(rows, ("KEY", "VALUE"), "The function has no labels of its own")


@labels.command("add")
@path_option
@click.option("--name", required=True, help="Key of the label.")
@click.option("--value", help="Text, or {{ env:NAME }}.")
@click.pass_context
def add_label(context: click.Context, path: Path, name: str, value: str | None) -> None:
    """Add a label, or change its value.

    \b
    Examples:
      func config labels add --name example.com/team --value research
      func config labels add --name user --value '{{ env:USER }}'
    """
    document = _load(context, path)
    present = any(label.key == name for label in document.config.deploy.labels)
    _put(
        document,
        "deploy.labels",
        {"key": name},
        _without_none({"key": name, "value": value}),
        present,
        f"label '{name}'",
    )


@labels.command("remove")
@path_option
@click.option("--name", required=True, help="Key of the label.")
@click.pass_context
def remove_label(context: click.Context, path: Path, name: str) -> None:
    """Remove a label.

    \b
    Examples:
      func config labels remove --name example.com/team
    """
    document = _load(context, path)
    present = any(label.key == name for label in document.config.deploy.labels)
    _remove(document, "deploy.labels", {"key": name}, present, f"label '{name}'", "labels")


# --- volumes -------------------------------------------------------------------------------------------------


@_listing(
    "volumes",
    "Show and change what is mounted into the function.",
    [
        "",
        " -o json",
        " add --type secret --source certificates --mount-path /etc/certificates",
        " add --type emptydir --medium Memory --size 1Gi --mount-path /scratch",
        " remove --mount-path /scratch",
    ],
)
def volumes(context: click.Context, path: Path, output: str) -> None:
    if context.invoked_subcommand:
        return
    document = _load(context, path)
    found = document.config.run.volumes
    if output == "json":
        print_json([_volume_item(volume) for volume in found])
    else:
        rows = ((volume.path or "", *_describe(volume)) for volume in found)
        _print(rows, ("PATH", "TYPE", "SOURCE"), "The function has no volumes")


@volumes.command("add")
@path_option
@click.option("-t", "--type", "kind", type=click.Choice(list(_TYPES)), required=True, help="What is mounted.")
@click.option("-s", "--source", help="Name of the ConfigMap, Secret or claim.")
@click.option("-m", "--mount-path", required=True, help="Where the function sees it.")
@click.option("--size", help="Size of an emptydir at most, such as 1Gi.")
@click.option("--medium", type=click.Choice(["", "Memory"]), help="Where an emptydir lies: on disk, or in memory.")
@click.option("--read-only", is_flag=True, help="Mount a claim without the right to write.")
@click.pass_context
def add_volume(
    context: click.Context,
    path: Path,
    kind: str,
    source: str | None,
    mount_path: str,
    size: str | None,
    medium: str | None,
    read_only: bool,
) -> None:
    """Add a volume.

    \b
    Examples:
      func config volumes add --type configmap --source settings --mount-path /etc/settings
      func config volumes add --type pvc --source data --mount-path /data --read-only
    """
    what: Any
    _check_volume_options(kind, source, size, medium, read_only)
    if kind == "emptydir":
        what = _without_none({"medium": medium or None, "sizeLimit": size})
    elif kind == "pvc":
        what = {"claimName": source} | ({"readOnly": True} if read_only else {})
    else:
        what = source
    document = _load(context, path)
    document.append("run.volumes", {_TYPES[kind]: what, "path": mount_path})
    document.save()
    note(f"Added the volume at '{mount_path}'")


def _check_volume_options(
    kind: str, source: str | None, size: str | None, medium: str | None, read_only: bool
) -> None:
    wrong = [
        option
        for option, given, kinds in (
            ("--source", source is not None, ("configmap", "secret", "pvc")),
            ("--size", size is not None, ("emptydir",)),
            ("--medium", medium is not None, ("emptydir",)),
            ("--read-only", read_only, ("pvc",)),
        )
        if given and kind not in kinds
    ]
    hint = [(f"{program()} config volumes add --help", "which option is for which type")]
    if wrong:
        raise CommandError(f"{' and '.join(wrong)} cannot be given for a volume of type {kind}", hint)
    if kind != "emptydir" and not source:
        raise CommandError(f"a volume of type {kind} needs --source, the name of what is mounted", hint)


@volumes.command("remove")
@path_option
@click.option("-m", "--mount-path", required=True, help="Where the function sees it.")
@click.pass_context
def remove_volume(context: click.Context, path: Path, mount_path: str) -> None:
    """Remove a volume.

    \b
    Examples:
      func config volumes remove --mount-path /scratch
    """
    document = _load(context, path)
    present = any(volume.path == mount_path for volume in document.config.run.volumes)
    _remove(document, "run.volumes", {"path": mount_path}, present, f"volume at '{mount_path}'", "volumes")


def _describe(volume: Volume) -> tuple[str, str]:
    """Type and source of a volume, for people."""
    if volume.secret is not None:
        return "secret", volume.secret
    if volume.config_map is not None:
        return "configmap", volume.config_map
    if claim := volume.persistent_volume_claim:
        return "pvc", f"{claim.claim_name}{' (read only)' if claim.read_only else ''}"
    directory = volume.empty_dir
    parts = (directory.medium, directory.size_limit and f"at most {directory.size_limit}") if directory else ()
    return "emptydir", ", ".join(filter(None, parts))


def _volume_item(volume: Volume) -> dict[str, Any]:
    """A volume as func.yaml writes it."""
    claim, directory = volume.persistent_volume_claim, volume.empty_dir
    return _without_none(
        {
            "secret": volume.secret,
            "configMap": volume.config_map,
            "persistentVolumeClaim": claim and {"claimName": claim.claim_name, "readOnly": claim.read_only},
            "emptyDir": directory
            and _without_none({"medium": directory.medium, "sizeLimit": directory.size_limit}),
            "path": volume.path,
        }
    )


# --- edits ---------------------------------------------------------------------------------------------------


def _put(
    document: Document, field: str, key: dict[str, Any], item: dict[str, Any], present: bool, what: str
) -> None:
    if present:
        document.update(field, key, {name: value for name, value in item.items() if name not in key})
    else:
        document.append(field, item)
    changed = document.save()
    note(f"{'Added' if not present else 'Changed' if changed else 'Nothing to change in'} the {what}")


def _remove(document: Document, field: str, key: dict[str, Any], present: bool, what: str, group: str) -> None:
    if not present:
        raise CommandError(f"there is no {what}", [(f"{program()} config {group}", "what there is")])
    document.remove(field, key)
    document.save()
    note(f"Removed the {what}")


def _without_none(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if value is not None}

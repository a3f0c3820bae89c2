"""`func subscribe`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from lifl.cli.common import CommandError, note, path_option, program


@click.command("subscribe")
@path_option
@click.option(
    "-f",
    "--filter",
    "filters",
    metavar="NAME=VALUE",
    multiple=True,
    help="Only events with this attribute; repeatable.",
)
@click.option(
    "-s",
    "--source",
    default="default",
    show_default=True,
    envvar="FUNC_SOURCE",
    help="Broker whose events the function is sent.",
)
def command(path: Path, filters: Sequence[str], source: str) -> None:
    """Subscribe the function to the events of a broker.

    Changes func.yaml alone; 'func deploy' makes the Trigger. If the function is subscribed to the broker already,
    the filters are added to those it has.

    \b
    Examples:
      func subscribe                             # to all events of the broker default
      func subscribe -f type=dev.lifl.update.v1
      func subscribe -s my-broker -f type=dev.lifl.update.v1 -f source=hospital-3
    """
    wanted = dict(_parse_filter(text) for text in filters)

    from lifl.func_yaml.document import Document

    document = Document.load(path)
    present = next((item for item in document.config.deploy.subscriptions if item.source == source), None)
    merged = {**(present.filters if present else {}), **wanted}
    if present is None:
        document.append("deploy.subscriptions", {"source": source} | ({"filters": merged} if merged else {}))
    elif merged != present.filters:
        document.update("deploy.subscriptions", {"source": source}, {"filters": merged})
    document.save()
    events = ", ".join(f"{name}={value}" for name, value in merged.items())
    note(f"Subscribed to {f'events with {events}' if events else 'all events'} of the broker '{source}'")


def _parse_filter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise CommandError(
            f"the filter '{text}' is not of the form NAME=VALUE",
            [(f"{program()} subscribe -f type=dev.lifl.update.v1", "events of this type")],
        )
    return name, value

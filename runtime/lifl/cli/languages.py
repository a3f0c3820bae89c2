"""`func languages`."""

from __future__ import annotations

import click

from lifl.cli.common import print_json
from lifl.cli.create import LANGUAGES


@click.command("languages")
@click.option("--json", "as_json", is_flag=True, envvar="FUNC_JSON", help="Print a JSON list.")
def command(as_json: bool) -> None:
    """List the languages of functions.

    \b
    Examples:
      func languages
      func languages --json
    """
    if as_json:
        print_json(list(LANGUAGES))
    else:
        click.echo("\n".join(LANGUAGES))

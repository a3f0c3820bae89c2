"""`func templates`."""

from __future__ import annotations

import click

from lifl.cli.common import print_json
from lifl.cli.create import LANGUAGES, check_language


@click.command("templates")
@click.argument("language", required=False)
@click.option("--json", "as_json", is_flag=True, envvar="FUNC_JSON", help="Print JSON: each language's templates.")
def command(language: str | None, as_json: bool) -> None:
    """List the templates of 'func create'.

    \b
    Examples:
      func templates
      func templates python                      # their names only
      func templates --json
    """
    from lifl.templates import NAMES

    if language is not None:
        check_language(language)
        if as_json:
            print_json(list(NAMES))
        else:
            click.echo("\n".join(NAMES))
    elif as_json:
        print_json({name: list(NAMES) for name in LANGUAGES})
    else:
        click.echo(f"{'LANGUAGE':<12}TEMPLATE")
        for name in LANGUAGES:
            for template in NAMES:
                click.echo(f"{name:<12}{template}")

"""`func create`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from lifl.cli.common import CommandError, note, output_option, print_json, program
from lifl.cli.settings import read_user_config
from lifl.errors import InvalidInput

LANGUAGES = ("python",)


@click.command("create")
@click.argument("path", type=click.Path(path_type=Path), default=Path("."), required=False)
@click.option("-l", "--language", envvar="FUNC_LANGUAGE", help="Language of the function. [default: python]")
@click.option(
    "-t", "--template", envvar="FUNC_TEMPLATE", help="What to start from; see 'func templates'. [default: fedavg]"
)
@click.option("-c", "--confirm", is_flag=True, envvar="FUNC_CONFIRM", help="Ask for each value on a terminal.")
@click.option("-v", "--verbose", is_flag=True, envvar="FUNC_VERBOSE", help="List the files that were made.")
@output_option
def command(
    path: Path, language: str | None, template: str | None, confirm: bool, verbose: bool, output: str
) -> None:
    """Create a function project.

    The last element of PATH, or of this directory, is the function's name. Also called 'func init'.

    \b
    Examples:
      func create my-fedavg                      # a directory my-fedavg
      func create -t median my-median
      func create                                # in this directory, which has to be empty
    """
    from lifl.templates import NAMES, create_project, function_stem

    user = read_user_config()
    language = language or user.language or LANGUAGES[0]
    template = template or NAMES[0]
    if (confirm or user.confirm) and sys.stdin.isatty():
        path = Path(click.prompt("Project path", default=str(path), err=True))
        language = str(click.prompt("Language", default=language, err=True))
        template = str(click.prompt("Template", default=template, err=True))
    check_language(language)
    if template not in NAMES:
        raise CommandError(
            f"there is no template '{template}' for {language}; the templates are {', '.join(NAMES)}",
            [
                (f"{program()} create -t {NAMES[0]} {path}", "federated averaging"),
                (f"{program()} templates", "all"),
            ],
        )
    directory = path.absolute()
    name = directory.resolve().name
    _check_name(name, path)
    try:
        create_project(directory, name, template)
    except InvalidInput as error:
        hints = [(f"{program()} create {path / 'my-function'}", "in a new directory")]
        if (directory / "func.yaml").exists():
            hints.append((f"{program()} run --path {path}", "run what is there"))
        raise CommandError(str(error), hints) from None
    except OSError as error:
        raise CommandError(f"the project cannot be written: {error}") from None
    note(f"Created {language} function in {directory}")
    if verbose:
        for file in sorted(directory.rglob("*")):
            if file.is_file():
                note(f"  {file.relative_to(directory)}")
    if output == "json":
        function = f"function/{function_stem(name)}.py"
        print_json(
            {
                "name": name,
                "path": str(directory),
                "language": language,
                "template": template,
                "function": function,
            }
        )


def check_language(language: str) -> None:
    """Raise CommandError for a language that functions cannot be written in."""
    if language not in LANGUAGES:
        raise CommandError(
            f"there is no language '{language}'; functions are written in {', '.join(LANGUAGES)}",
            [
                (f"{program()} create -l {LANGUAGES[0]} PATH", "a function in Python"),
                (f"{program()} languages", "all"),
            ],
        )


def _check_name(name: str, path: Path) -> None:
    from lifl.func_yaml.names import function_name_problem

    problem = function_name_problem(name)
    if problem is None:
        return
    better = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].rstrip("-")
    better = better if function_name_problem(better) is None else "my-function"
    raise CommandError(
        f"the last element of the path is the function's name, and the name {problem}",
        [(f"{program()} create {path.parent / better if path.name else better}", "a name that can be used")],
    )

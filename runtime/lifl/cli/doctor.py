"""`func doctor`."""

from __future__ import annotations

import click

from lifl.cli.common import output_option, print_json

_EXIT_MISSING = 1
_MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "missing": "[red]missing[/]"}


@click.command("doctor")
@output_option
def command(output: str) -> int:
    """Show what this machine can do, and what it cannot and why.

    Looks only; changes nothing. The exit code is 1 if something is missing that LIFL cannot do without.

    \b
    Examples:
      func doctor
      func doctor -o json
      sudo func doctor                           # what an agent with privileges would see
    """
    from lifl.doctor import examine

    checks = examine()
    if output == "json":
        print_json([check.as_dict() for check in checks])
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        if not console.is_terminal:
            console.width = 80
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("CHECK", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("FOUND, AND WHAT IT MEANS", overflow="fold")
        for check in checks:
            found = Text(check.value)
            if check.hint:
                found.append(f"\n{check.hint}", style="dim")
            table.add_row(check.name, _MARKS[check.status], found)
        console.print(table)
    return _EXIT_MISSING if any(check.status == "missing" and check.needed for check in checks) else 0

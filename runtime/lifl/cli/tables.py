"""What the commands that show things share: tables of 80 columns, watching for changes, numbers for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from lifl.cli.common import note, print_json

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80
_INTERVAL_S = 1.0

Render = Callable[[Any], "Table | None"]
"""Makes the table of what was found; None when nothing was."""


def show(found: Any, output: str, render: Render, nothing: str) -> None:
    """Print what was found: as JSON, as a table, or as the note `nothing`."""
    if output == "json":
        print_json(found)
        return
    from rich.console import Console

    console = Console()
    if console.width > WIDTH or not console.is_terminal:
        console.width = WIDTH
    table = render(found)
    if table is None:
        note(nothing)
    else:
        console.print(table)


def watch(look: Callable[[], Any], output: str, render: Render, nothing: str) -> NoReturn:
    """Show what `look` finds, again at each change; on a terminal in place."""
    import time

    from rich.console import Console
    from rich.live import Live

    console = Console()
    if output == "human" and console.is_terminal:
        with Live(render(look()) or nothing, console=console, auto_refresh=False) as live:
            while True:
                time.sleep(_INTERVAL_S)
                live.update(render(look()) or nothing, refresh=True)
    before: Any = None
    while True:
        if (found := look()) != before:
            show(found, output, render, nothing)
            before = found
        time.sleep(_INTERVAL_S)


def plain_table(*columns: str, left: frozenset[str] = frozenset(), widths: dict[str, int] | None = None) -> Table:
    """A table without lines; columns are right-aligned but for those in `left`.

    Those in `widths` have names in them: they get this many columns at most, and less when others need the room.
    """
    from rich.table import Table

    widths = widths or {}
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(
            name,
            justify="left" if name in left else "right",
            no_wrap=name not in widths,  # else they are the first to be cut
            overflow="ellipsis",
            max_width=widths.get(name),
        )
    return table


def facts_table(*facts: tuple[str, object]) -> Table:
    """One fact in each row; those that are empty are left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in facts:
        if value or value is False:
            table.add_row(label, Text(str(value)))
    return table


def stack(*tables: Table) -> Table:
    """Tables below each other with an empty line between, without those that have no rows."""
    from rich.table import Table

    whole = Table.grid()
    for table in tables:
        if table.row_count:
            if whole.row_count:
                whole.add_row("")
            whole.add_row(table)
    return whole


def count(value: Any) -> str:
    """An integer as it is; `-` for anything else."""
    return str(value) if isinstance(value, int) else "-"


def format_seconds(value: Any) -> str:
    """Seconds for people: `3.1 ms` or `2.50 s`; `-` for nothing measured."""
    if not isinstance(value, int | float) or value <= 0:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def format_bytes(value: Any) -> str:
    """Bytes for people: `44.7 MB`; `-` for none."""
    if not isinstance(value, int | float) or value <= 0:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:g} B"

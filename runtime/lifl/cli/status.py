"""`func status`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

import click

from lifl.cli.common import find_node, get_json, node_options, note, output_option, print_json, read_token

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 80
_INTERVAL_S = 1.0


@click.command("status")
@click.argument("job", required=False)
@click.option("-w", "--watch", is_flag=True, help="Go on until Ctrl-C and show what changes.")
@node_options
@output_option
def command(
    job: str | None,
    watch: bool,
    url: str | None,
    token_file: Path | None,
    path: Path,
    state_directory: Path | None,
    output: str,
) -> None:
    """Show jobs and their rounds: all of a node, or one JOB.

    ACT is the aggregation completion time: from the first byte of the round's first update to the new global
    model. LATENCY is the median time of an update from its first byte to folded. STARTED/REUSED counts the
    round's aggregators.

    \b
    Examples:
      func status
      func status digits -w
      func status --url http://10.0.0.7:8080 -o json
    """
    node = find_node(url, path, state_directory)
    token = read_token(token_file)

    def look() -> Any:
        return get_json(node, f"/v1/jobs/{quote(job, safe='')}" if job else "/v1/jobs", token)

    if watch:
        _watch(look, output)
    _show(look(), output)


def _watch(look: Callable[[], Any], output: str) -> NoReturn:
    """Show what `look` finds, again at each change; on a terminal in place."""
    import time

    from rich.console import Console
    from rich.live import Live

    console = Console()
    if output == "human" and console.is_terminal:
        with Live(_render(look()), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(_INTERVAL_S)
                live.update(_render(look()), refresh=True)
    before: Any = None
    while True:
        if (found := look()) != before:
            _show(found, output)
            before = found
        time.sleep(_INTERVAL_S)


def _show(found: Any, output: str) -> None:
    if output == "json":
        print_json(found)
        return
    from rich.console import Console

    console = Console()
    if console.width > _WIDTH or not console.is_terminal:
        console.width = _WIDTH
    if job_list(found):
        console.print(_render(found))
    else:
        note("No jobs.")


def job_list(found: Any) -> list[Mapping[str, Any]]:
    """The jobs in an answer to GET /v1/jobs or GET /v1/jobs/JOB."""
    if isinstance(found, Mapping):
        found = found.get("jobs", [found])
    return [job for job in found if isinstance(job, Mapping)]


def _render(found: Any) -> Table:
    single = isinstance(found, Mapping) and "jobs" not in found
    return round_table(found) if single else job_table(job_list(found))


def job_table(jobs: Iterable[Mapping[str, Any]]) -> Table:
    """One row for each job, at most 80 columns wide."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, width=None)
    table.add_column("JOB", max_width=20, no_wrap=True, overflow="ellipsis")
    table.add_column("STATUS", no_wrap=True)
    table.add_column("ROUND", justify="right")
    table.add_column("UPDATES", justify="right", no_wrap=True)
    table.add_column("ACT", justify="right", no_wrap=True)
    table.add_column("WORKERS", justify="right")
    table.add_column("PLANE", no_wrap=True)
    for job in jobs:
        table.add_row(
            Text(str(job.get("job", job.get("name", "?")))),
            Text(str(job.get("status", "?"))),
            _count(job.get("round")),
            _updates(job),
            format_seconds((job.get("last") or {}).get("act")),
            _count(job.get("workers")),
            Text(str(job.get("data_plane") or "-")),
        )
    return table


def round_table(job: Mapping[str, Any]) -> Table:
    """The facts of one job, and below them its last and its open round."""
    from rich.table import Table
    from rich.text import Text

    spec = job.get("spec") or {}
    rounds = Table(box=None, pad_edge=False)
    for name in ("ROUND", "STATUS", "ACCEPTED", "REJECTED", "LATE", "ACT", "LATENCY", "STARTED/REUSED"):
        rounds.add_column(name, justify="left" if name == "STATUS" else "right", no_wrap=True)
    for state in (job.get("last"), job.get("current")):
        if state:
            rounds.add_row(
                _count(state.get("round")),
                Text(str(state.get("status", "?"))),
                _count(state.get("accepted")),
                _count(state.get("rejected")),
                _count(state.get("late")),
                format_seconds(state.get("act")),
                format_seconds(state.get("latency_median")),
                f"{_count(state.get('started'))}/{_count(state.get('reused'))}",
            )
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for label, value in (
        ("Job", job.get("job", job.get("name", "?"))),
        ("Status", job.get("status", "?")),
        ("Function", spec.get("function", "-")),
        ("Goal", spec.get("goal", "-")),
        ("Model", _model(job)),
        ("Data plane", job.get("data_plane") or "-"),
        ("Workers", job.get("workers", "-")),
        ("Detail", job.get("detail")),
    ):
        if value:
            facts.add_row(label, Text(str(value)))
    whole = Table.grid()
    whole.add_row(facts)
    if rounds.row_count:
        whole.add_row("")
        whole.add_row(rounds)
    return whole


def _model(job: Mapping[str, Any]) -> str:
    size = job.get("model_payload_bytes")
    return f"round {_count(job.get('model_round'))}, {size / 1e6:.1f} MB" if size else "none yet"


def _updates(job: Mapping[str, Any]) -> str:
    accepted = (job.get("current") or {}).get("accepted")
    return f"{_count(accepted)}/{_count((job.get('spec') or {}).get('goal'))}"


def _count(value: Any) -> str:
    return str(value) if isinstance(value, int) else "-"


def format_seconds(value: Any) -> str:
    """Seconds for people: `3.1 ms` or `2.50 s`; `-` for nothing measured."""
    if not isinstance(value, int | float) or value <= 0:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"

"""`func job`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import click

from lifl.cli.common import (
    CommandError,
    find_node,
    get_json,
    node_options,
    note,
    output_option,
    print_json,
    program,
    read_token,
    refusal,
    request_json,
)
from lifl.cli.status import job_list, job_table, round_table, state_tables
from lifl.cli.tables import facts_table, format_seconds, plain_table, show, stack
from lifl.errors import InvalidModel, InvalidProject, Unavailable
from lifl.shards import MOST_SHARDS

if TYPE_CHECKING:
    from rich.table import Table

_MEDIA_TYPE = "application/vnd.safetensors"
_PIECE_BYTES = 1 << 20
_UPLOAD_SECONDS = 600.0
"""Without progress of the upload, or of the node while it takes the model over."""


@click.group("job")
def command() -> None:
    """Create, list, describe and cancel jobs, on a node or in a cluster.

    \b
    Examples:
      func job create digits --function fedavg --goal 20 --model model.safetensors
      func job list
      func job describe digits --round 3
      func job cancel digits
    """


# --- create --------------------------------------------------------------------------------------------------

_COUNT = click.IntRange(min=0)
_SPEC_OPTIONS = (
    click.option("--function", help="The aggregator. [default: the project's function]"),
    click.option("--goal", type=click.IntRange(min=1), required=True, help="Updates that close a round."),
    click.option("--quorum", type=_COUNT, help="Updates that suffice after the deadline. [default: the goal]"),
    click.option(
        "--deadline", type=click.FloatRange(min=0), metavar="SECONDS", help="Of a round. [default: none]"
    ),
    click.option("--rounds", type=_COUNT, help="Rounds after which the job is complete. [default: no end]"),
    click.option(
        "--mode",
        type=click.Choice(["sync", "async"]),
        help="async: buffers of --goal updates, to older models too (FedBuff). [default: sync]",
    ),
    click.option("--max-staleness", type=_COUNT, metavar="ROUNDS", help="Of updates in mode async. [default: 20]"),
    click.option(
        "--staleness-exponent",
        type=click.FloatRange(min=0),
        metavar="A",
        help="Mode async: t rounds old counts (1+t)^-A. [default: 0.5]",
    ),
    click.option(
        "--over-selection",
        type=click.FloatRange(min=0),
        metavar="SHARE",
        help="Mode sync: select so many more clients than the goal. [default: no selection]",
    ),
    click.option(
        "--shards",
        type=click.IntRange(1, MOST_SHARDS),
        help="In a cluster: parts of the model, on different nodes. [default: 1]",
    ),
    click.option(
        "--timing", type=click.Choice(["eager", "lazy"]), help="When updates are folded. [default: eager]"
    ),
    click.option(
        "--placement",
        type=click.Choice(["best-fit", "first-fit", "worst-fit", "round-robin"]),
        help="Which node of a cluster folds an update. [default: best-fit]",
    ),
    click.option(
        "--redirect/--no-redirect", default=None, help="Send clients to the node of their update, or not."
    ),
    click.option("--updates-per-leaf", type=click.IntRange(min=1), help="I of the hierarchy. [default: 2]"),
    click.option("--smoothing", type=click.FloatRange(0, 1), help="a of the hierarchy. [default: 0.7]"),
    click.option("--reuse/--no-reuse", default=None, help="Whether workers go on with the next round."),
    click.option("--slots", type=_COUNT, help="Updates that a node holds at once. [default: as memory allows]"),
    click.option("--precision", type=click.Choice(["float32", "float64"]), help="Of the sums. [default: float32]"),
    click.option("--keep-checkpoints", type=_COUNT, help="Newest models kept on disk; 0: all. [default: 10]"),
    click.option(
        "--durability",
        type=click.Choice(["async", "sync"]),
        help="sync: a model is offered when it is on disk. [default: async]",
    ),
    click.option(
        "--idle-seconds", type=click.FloatRange(min=0.1), help="Until workers and memory go. [default: 60]"
    ),
)


def _spec_options(function: Any) -> Any:
    for decorate in reversed(_SPEC_OPTIONS):
        function = decorate(function)
    return function


@command.command("create")
@click.argument("name")
@_spec_options
@click.option(
    "-m",
    "--model",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The initial model, a safetensors file; it opens round 1.",
)
@node_options
@output_option
def create(
    name: str,
    model: Path | None,
    url: str | None,
    token_file: Path | None,
    path: Path,
    state_directory: Path | None,
    output: str,
    **spec: Any,
) -> None:
    """Create a job, and with --model give it its initial model. To repeat it does no harm.

    \b
    Examples:
      func job create digits --goal 20 --model model.safetensors
      func job create digits --function fedavg --goal 100 --quorum 80 --deadline 60
      func job create digits --goal 20 --placement worst-fit --url http://10.0.0.1:7070
    """
    given = {field: value for field, value in spec.items() if value is not None}
    if "function" not in given:
        given["function"] = _default_function(path)
    if model is not None:
        _check_model(model)
    node, token = find_node(url, path, state_directory), read_token(token_file)
    state = request_json("POST", node, "/v1/jobs", token, {"name": name, **given})
    if model is not None:
        if state.get("model_round"):
            note(f"Job {name} has a model already, in round {state['model_round']}; this one was not sent")
        else:
            state = _upload(node, name, model, token)
    if output == "json":
        print_json(state)
    else:
        click.echo(_what_is_next(name, state))


def _default_function(path: Path) -> str:
    from lifl.project import load_project

    try:
        return load_project(path).function
    except InvalidProject as error:
        hint = (f"{program()} job create NAME --function fedavg --goal 20", "name the function")
        raise CommandError(f"--function is not given, and the project does not tell: {error}", [hint]) from None


def _what_is_next(name: str, state: Mapping[str, Any]) -> str:
    if state.get("status") == "waiting-for-model":
        return f"Job {name} created; it waits for its model"
    if state.get("status") == "running":
        return f"Job {name}: round {state.get('round')} is open"
    return f"Job {name} is {state.get('status')}"


def _check_model(file: Path) -> None:
    """Raises CommandError for what no node would take, before anything is made."""
    import mmap

    from lifl.tensors import split

    try:
        with file.open("rb") as content:
            split(mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ))
    except (InvalidModel, ValueError) as error:  # ValueError: an empty file
        raise CommandError(f"'{file}' is no safetensors file: {error}") from None
    except OSError as error:
        raise CommandError(f"'{file}' cannot be read: {error.strerror}") from None


def _upload(node: str, job: str, file: Path, token: str | None) -> Any:
    """Send the model, with a progress bar on a terminal, and return the job's state."""
    import http.client
    import json

    parts = urlsplit(node)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=_UPLOAD_SECONDS)
    headers = {"Content-Type": _MEDIA_TYPE, "Content-Length": str(file.stat().st_size)}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        with file.open("rb") as content, _progress(file.stat().st_size) as advance:
            body = _pieces(content, advance)
            try:
                connection.request("PUT", f"{parts.path}/v1/jobs/{quote(job, safe='')}/model", body, headers)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a refusal comes before the end of the body
        answer = connection.getresponse()
        data = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"the model was not sent to {node}: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if answer.status >= 400:
        raise refusal(answer.status, data, answer.headers.get("Retry-After"))
    return json.loads(data)


def _pieces(content: IO[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    while piece := content.read(_PIECE_BYTES):
        yield piece
        advance(len(piece))


@contextmanager
def _progress(size: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("Sending the model"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=size)
        yield lambda nbytes: bar.advance(task, nbytes)


# --- list, describe, cancel ------------------------------------------------------------------------------------


@command.command("list")
@node_options
@output_option
def list_command(
    url: str | None, token_file: Path | None, path: Path, state_directory: Path | None, output: str
) -> None:
    """List the jobs. 'func status -w' shows how they go on.

    \b
    Examples:
      func job list
      func job list --url http://10.0.0.1:7070 -o json
    """
    found = get_json(find_node(url, path, state_directory), "/v1/jobs", read_token(token_file))
    show(found, output, lambda found: job_table(jobs) if (jobs := job_list(found)) else None, "No jobs.")


@command.command("describe")
@click.argument("name")
@click.option("--round", "round_number", type=click.IntRange(min=1), help="Show this round only.")
@click.option("--updates", is_flag=True, help="Show each update of the round. [default: the open round]")
@node_options
@output_option
def describe(
    name: str,
    round_number: int | None,
    updates: bool,
    url: str | None,
    token_file: Path | None,
    path: Path,
    state_directory: Path | None,
    output: str,
) -> None:
    """Describe a job, one of its rounds, or the updates of a round.

    LATENCY is the time of an update from its first byte to folded. A node knows the updates of the open round and
    a few before it; a cluster's coordinator those of all rounds, and the node of each.

    \b
    Examples:
      func job describe digits
      func job describe digits --round 3
      func job describe digits --round 3 --updates -o json
    """
    node, token = find_node(url, path, state_directory), read_token(token_file)
    base = f"/v1/jobs/{quote(name, safe='')}"
    if updates:
        number = round_number or _newest_round(get_json(node, base, token))
        show(_all_updates(node, f"{base}/rounds/{number}/updates", token), output, _update_table, "No updates.")
    elif round_number is not None:
        show(get_json(node, f"{base}/rounds/{round_number}", token), output, _one_round, "")
    else:
        show(get_json(node, base, token), output, _whole_job, "")


def _newest_round(job: Mapping[str, Any]) -> int:
    number = job.get("round") or (job.get("last") or {}).get("round")
    if not number:
        raise CommandError(f"job {job.get('job')} has no round yet")
    return int(number)


def _all_updates(node: str, path: str, token: str | None) -> dict[str, Any]:
    """All parts of the list in one."""
    whole: dict[str, Any] = get_json(node, path, token)
    while offset := whole.pop("next", 0):
        part = get_json(node, f"{path}?offset={offset}", token)
        whole["updates"] += part["updates"]
        whole["next"] = part.get("next", 0)
    return whole


def _whole_job(job: Mapping[str, Any]) -> Table:
    spec = {field: value for field, value in (job.get("spec") or {}).items() if field not in _SHOWN_ABOVE}
    return stack(round_table(job), facts_table(*((field.replace("_", "-"), spec[field]) for field in spec)))


_SHOWN_ABOVE = ("name", "function", "goal")


def _one_round(state: Mapping[str, Any]) -> Table:
    rejected = ", ".join(state.get("rejected_clients") or ())
    facts = facts_table(
        ("Weight", f"{state.get('weight', 0):g}"),
        ("Duplicates", state.get("duplicates")),
        ("Latency p95, max", _pair(state)),
        ("Rejected clients", rejected),
    )
    return stack(*state_tables([state]), facts)


def _pair(state: Mapping[str, Any]) -> str:
    values = [format_seconds(state.get(name)) for name in ("latency_p95", "latency_max")]
    return "" if values == ["-", "-"] else ", ".join(values)


def _update_table(found: Mapping[str, Any]) -> Table | None:
    from rich.text import Text

    if not found["updates"]:
        return None
    in_cluster = "node" in found["updates"][0]
    table = plain_table(
        *("CLIENT", "STATUS", "WEIGHT"),
        *(("NODE",) if in_cluster else ("AGGREGATOR", "LATENCY")),
        left=frozenset({"CLIENT", "STATUS", "NODE"}),
        widths={"CLIENT": 36, "NODE": 20},
    )
    for update in found["updates"]:
        where = [str(update.get("aggregator")), format_seconds(update.get("latency"))]
        table.add_row(
            Text(str(update.get("client"))),
            Text(str(update.get("status"))),
            f"{update.get('num_samples', 0):g}",
            *([Text(str(update["node"]))] if in_cluster else where),
        )
    return table


@command.command("cancel")
@click.argument("name")
@node_options
@output_option
def cancel(
    name: str,
    url: str | None,
    token_file: Path | None,
    path: Path,
    state_directory: Path | None,
    output: str,
) -> None:
    """Cancel a job: its workers end and its memory is given back. Its checkpoints are kept.

    \b
    Examples:
      func job cancel digits
      func job cancel digits --url http://10.0.0.1:7070
    """
    node, token = find_node(url, path, state_directory), read_token(token_file)
    request_json("DELETE", node, f"/v1/jobs/{quote(name, safe='')}", token)
    if output == "json":
        print_json({"job": name, "status": "deleted"})
    else:
        click.echo(f"Job {name} cancelled; its checkpoints are kept")

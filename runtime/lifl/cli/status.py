"""`func status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from lifl.cli.common import find_node, get_json, node_options, output_option, read_token
from lifl.cli.tables import count, facts_table, format_bytes, format_seconds, plain_table, show, stack, watch

if TYPE_CHECKING:
    from rich.table import Table

_NOTHING = "No jobs."


@click.command("status")
@click.argument("job", required=False)
@click.option("-w", "--watch", "is_watching", is_flag=True, help="Go on until Ctrl-C and show what changes.")
@node_options
@output_option
def command(
    job: str | None,
    is_watching: bool,
    url: str | None,
    token_file: Path | None,
    path: Path,
    state_directory: Path | None,
    output: str,
) -> None:
    """Show jobs and their rounds: all of a node, or one JOB.

    ACT is the aggregation completion time: from the first byte of the round's first update to the new global
    model. LATENCY is the median time of an update from its first byte to folded. STARTED/REUSED counts the
    round's aggregators; COLD are those started when an update already waited. In a cluster one sees how many NODES
    had updates, which was the TOP, how many updates were LOST with their node, and the bytes BETWEEN NODES.

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

    if is_watching:
        watch(look, output, _render, _NOTHING)
    show(look(), output, _render, _NOTHING)


def job_list(found: Any) -> list[Mapping[str, Any]]:
    """The jobs in an answer to GET /v1/jobs or GET /v1/jobs/JOB."""
    if isinstance(found, Mapping):
        found = found.get("jobs", [found])
    return [job for job in found if isinstance(job, Mapping)]


def _render(found: Any) -> Table | None:
    if isinstance(found, Mapping) and "jobs" not in found:
        return round_table(found)
    jobs = job_list(found)
    return job_table(jobs) if jobs else None


def job_table(jobs: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each job, at most 80 columns wide."""
    from rich.text import Text

    in_cluster = any(_is_clustered(state) for job in jobs for state in _rounds(job))
    are_cut = any(_is_cut(job) for job in jobs)
    ends = (*(("SHARDS",) if are_cut else ()), "NODES", "TOP") if in_cluster or are_cut else ("PLANE",)
    table = plain_table(
        *("JOB", "STATUS", "ROUND", "UPDATES", "ACT", "WORKERS", *ends),
        left=frozenset({"JOB", "STATUS", "PLANE", "TOP"}),
        widths={"JOB": 12 if are_cut else 16 if in_cluster else 20, "TOP": 8 if are_cut else 12},
    )
    for job in jobs:
        last = job.get("last") or {}
        where = [Text(str(job.get("data_plane") or "-"))]
        if in_cluster or are_cut:
            shards = [Text(count((job.get("spec") or {}).get("shards", 1)))] if are_cut else []
            where = [*shards, Text(count(last.get("nodes"))), Text(str(last.get("top") or "-"))]
        table.add_row(
            Text(str(job.get("job", job.get("name", "?")))),
            Text(str(job.get("status", "?"))),
            count(job.get("round")),
            _updates(job),
            format_seconds(last.get("act")),
            count(job.get("workers")),
            *where,
        )
    return table


def round_table(job: Mapping[str, Any]) -> Table:
    """The facts of one job, and below them its last and its open round."""
    spec = job.get("spec") or {}
    facts = facts_table(
        ("Job", job.get("job", job.get("name", "?"))),
        ("Status", job.get("status", "?")),
        ("Function", spec.get("function", "-")),
        ("Goal", spec.get("goal", "-")),
        ("Shards", _shards(spec)),
        ("Model", _model(job)),
        ("Data plane", job.get("data_plane") or "-"),
        ("Workers", job.get("workers", "-")),
        ("Detail", job.get("detail")),
    )
    return stack(facts, *state_tables(_rounds(job)))


def state_tables(rounds: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What happened in these rounds, and in a cluster also where."""
    from rich.text import Text

    in_cluster = any(map(_is_clustered, rounds))
    columns = ["ROUND", "STATUS", "ACCEPTED", "REJECTED", "LATE", "ACT", "LATENCY"]
    what = plain_table(*columns, *([] if in_cluster else ["STARTED/REUSED"]), left=frozenset({"STATUS"}))
    for state in rounds:
        aggregators = [] if in_cluster else [f"{count(state.get('started'))}/{count(state.get('reused'))}"]
        what.add_row(
            count(state.get("round")),
            Text(str(state.get("status", "?"))),
            count(state.get("accepted")),
            count(state.get("rejected")),
            count(state.get("late")),
            format_seconds(state.get("act")),
            format_seconds(state.get("latency_median")),
            *aggregators,
        )
    return [what, _where(rounds)] if in_cluster else [what]


def _where(rounds: Sequence[Mapping[str, Any]]) -> Table:
    from rich.text import Text

    table = plain_table(
        *("ROUND", "NODES", "TOP", "LEAVES", "STARTED/REUSED/COLD", "LOST", "BETWEEN NODES"),
        left=frozenset({"TOP"}),
        widths={"TOP": 16},
    )
    for state in rounds:
        table.add_row(
            count(state.get("round")),
            count(state.get("nodes")),
            Text(str(state.get("top") or "-")),
            count(state.get("leaves")),
            "/".join(count(state.get(name)) for name in ("started", "reused", "cold")),
            count(state.get("lost")),
            format_bytes(state.get("internode_bytes")),
        )
    return table


def _rounds(job: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The job's last and its open round, as far as there are any."""
    return [state for state in (job.get("last"), job.get("current")) if state]


def _is_clustered(state: Mapping[str, Any]) -> bool:
    """Whether a round is one of several nodes; a node on its own is always one node, which it does not name."""
    return bool(state.get("top")) or state.get("nodes", 1) != 1


def _is_cut(job: Mapping[str, Any]) -> bool:
    return bool((job.get("spec") or {}).get("shards", 1) > 1)


def _shards(spec: Mapping[str, Any]) -> str | None:
    """How a job's model is cut, if it is; None leaves the line out."""
    if spec.get("shard_of"):
        return f"this is one of {spec['shard_of']}"
    return count(spec["shards"]) if spec.get("shards", 1) > 1 else None


def _model(job: Mapping[str, Any]) -> str:
    if not job.get("model_round"):
        return "none yet"
    size = job.get("model_payload_bytes")  # a cluster's coordinator need not know
    return f"round {count(job['model_round'])}" + (f", {size / 1e6:.1f} MB" if size else "")


def _updates(job: Mapping[str, Any]) -> str:
    accepted = (job.get("current") or {}).get("accepted")
    return f"{count(accepted)}/{count((job.get('spec') or {}).get('goal'))}"

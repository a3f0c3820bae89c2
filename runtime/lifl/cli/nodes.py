"""`func nodes`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

import click

from lifl.cli.common import (
    CommandError,
    find_node,
    get_json,
    node_options,
    output_option,
    print_json,
    program,
    read_token,
    request_json,
)
from lifl.cli.tables import count, plain_table, show, watch
from lifl.errors import Refused

if TYPE_CHECKING:
    from rich.table import Table

_NOTHING = "No nodes."
_INTERVAL_S = 0.2


class _ListByDefault(click.Group):
    """A group that lists when no subcommand is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group("nodes", cls=_ListByDefault)
def command() -> None:
    """Show the nodes of a cluster, and drain them. Without a subcommand they are listed.

    \b
    Examples:
      func nodes                                    # as 'func nodes list'
      func nodes -w --url http://10.0.0.1:7070
      func nodes drain h3 --wait --url http://10.0.0.1:7070
    """


@command.command("list")
@click.option("-w", "--watch", "is_watching", is_flag=True, help="Go on until Ctrl-C and show what changes.")
@node_options
@output_option
def list_command(
    is_watching: bool,
    url: str | None,
    token_file: Path | None,
    path: Path,
    state_directory: Path | None,
    output: str,
) -> None:
    """Show the nodes: all that the coordinator knows, or the one node that runs here.

    MC is how many updates a node can aggregate at once, with ~ if that is a guess ('func node calibrate' measures
    it). K*E is how many it works on now: arrival rate times execution time. RESIDUAL is what is left. UPDATES
    counts those of open rounds, HEARD tells when the node was last heard of.

    \b
    Examples:
      func nodes list
      func nodes list -w
      func nodes list --url http://10.0.0.1:7070 -o json
    """
    node, token = find_node(url, path, state_directory), read_token(token_file)
    if is_watching:
        watch(lambda: get_json(node, "/v1/nodes", token), output, _render, _NOTHING)
    show(get_json(node, "/v1/nodes", token), output, _render, _NOTHING)


@command.command("drain")
@click.argument("name")
@click.option("--wait", is_flag=True, help="Return when the node has nothing left.")
@node_options
@output_option
def drain(
    name: str,
    wait: bool,
    url: str | None,
    token_file: Path | None,
    path: Path,
    state_directory: Path | None,
    output: str,
) -> None:
    """Give a node no more updates; what it has is finished with the round.

    Ask the coordinator: nodes do not decide this. A node that is drained can be ended without a loss.

    \b
    Examples:
      func nodes drain h3 --url http://10.0.0.1:7070
      func nodes drain h3 --wait --url http://10.0.0.1:7070
    """
    coordinator, token = find_node(url, path, state_directory), read_token(token_file)
    _order(coordinator, name, "drain", token)
    if wait:
        _wait_until_drained(coordinator, name, token)
    if output == "json":
        print_json({"name": name, "status": "drained" if wait else "draining"})
    else:
        click.echo(f"{name} is drained" if wait else f"{name} gets no more updates")


@command.command("undrain")
@click.argument("name")
@node_options
@output_option
def undrain(
    name: str,
    url: str | None,
    token_file: Path | None,
    path: Path,
    state_directory: Path | None,
    output: str,
) -> None:
    """Give a node updates again.

    \b
    Examples:
      func nodes undrain h3 --url http://10.0.0.1:7070
    """
    _order(find_node(url, path, state_directory), name, "undrain", read_token(token_file))
    if output == "json":
        print_json({"name": name, "status": "ready"})
    else:
        click.echo(f"{name} gets updates again")


@command.command("calibrate")
@click.argument("name")
@node_options
@output_option
def calibrate(
    name: str,
    url: str | None,
    token_file: Path | None,
    path: Path,
    state_directory: Path | None,
    output: str,
) -> None:
    """Have a node measure again what it can aggregate at once.

    Its work goes on meanwhile, so let it be idle. 'func node calibrate' measures before a node joins.

    \b
    Examples:
      func nodes calibrate h3 --url http://10.0.0.1:7070
    """
    _order(find_node(url, path, state_directory), name, "calibrate", read_token(token_file))
    if output == "json":
        print_json({"name": name, "calibrates": True})
    else:
        click.echo(f"{name} was asked to measure its capacity; 'func nodes' shows it when it has")


def _order(coordinator: str, name: str, action: str, token: str | None) -> None:
    try:
        request_json("POST", coordinator, f"/v1/nodes/{quote(name, safe='')}/{action}", token)
    except Refused as refusal:
        if refusal.status == 404:
            _explain(coordinator, name, action, token, refusal)
        if refusal.status == 405:
            raise _not_the_coordinator(coordinator, name, action) from None
        raise


def _explain(coordinator: str, name: str, action: str, token: str | None, refusal: Refused) -> NoReturn:
    """Tell a name that no node has from a server that cannot do this."""
    known = {node.get("name"): node for node in _nodes(get_json(coordinator, "/v1/nodes", token))}
    is_alone = not any(node.get("capacity") for node in known.values())
    if name in known or is_alone:
        raise _not_the_coordinator(coordinator, name, action) from None
    raise CommandError(
        str(refusal), [(f"{program()} nodes --url {coordinator}", "the nodes that exist")]
    ) from None


def _not_the_coordinator(url: str, name: str, action: str) -> CommandError:
    hint = (f"{program()} nodes {action} {name} --url http://HOST:7070", "ask the coordinator")
    return CommandError(f"what answers at {url} is no coordinator of a cluster", [hint])


def _wait_until_drained(coordinator: str, name: str, token: str | None) -> None:
    import time

    while True:
        found = {
            node.get("name"): node.get("status") for node in _nodes(get_json(coordinator, "/v1/nodes", token))
        }
        if found.get(name) == "lost":
            raise CommandError(f"node {name} was lost while it was drained")
        if found.get(name) == "drained":
            return
        time.sleep(_INTERVAL_S)


def _nodes(found: Any) -> list[Mapping[str, Any]]:
    nodes = found.get("nodes", ()) if isinstance(found, Mapping) else ()
    return [node for node in nodes if isinstance(node, Mapping)]


def _render(found: Any) -> Table | None:
    nodes = _nodes(found)
    return node_table(nodes) if nodes else None


def node_table(nodes: list[Mapping[str, Any]]) -> Table:
    """One row for each node, at most 80 columns wide."""
    from rich.text import Text

    table = plain_table(
        *("NAME", "STATUS", "CORES", "MC", "K*E", "RESIDUAL", "UPDATES", "WORKERS", "HEARD"),
        left=frozenset({"NAME", "STATUS"}),
        widths={"NAME": 18},
    )
    for node in nodes:
        is_member = bool(node.get("capacity"))
        guess = "" if node.get("is_calibrated") else "~"
        table.add_row(
            Text(str(node.get("name", "?"))),
            Text(str(node.get("status", "?"))),
            count(node.get("cores")),
            f"{guess}{_short(node['capacity'])}" if is_member else "-",
            _short(node.get("arrival_rate", 0) * node.get("execution_seconds", 0)) if is_member else "-",
            _short(node.get("residual", 0)) if is_member else "-",
            count(node.get("updates")) if is_member else "-",
            count(node.get("workers")),
            _ago(node.get("last_heard", 0)) if is_member else "-",
        )
    return table


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _ago(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"

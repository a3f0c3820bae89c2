"""`func node`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lifl.cli.common import (
    DEFAULT_ADDRESS,
    STATE_DIRECTORY,
    note,
    output_option,
    path_option,
    read_run_file,
    state_directory_option,
)
from lifl.cli.run import choose_address, gateway_options, member_options, membership_of, run_node
from lifl.cli.tables import format_seconds, plain_table, show
from lifl.errors import InvalidProject

if TYPE_CHECKING:
    from rich.table import Table

    from lifl.calibration import Calibration, Level, Options


@click.group("node")
def command() -> None:
    """Measure this node, or run it without its agent.

    A coordinator places updates by what its nodes can aggregate at once; 'func node calibrate' finds that out. In
    a container without privileges 'func node run' runs all of a node but its agent.

    \b
    Examples:
      func node calibrate
      func node calibrate --model 100MB --seconds 4
      func node run --agent-directory /run/lifl --join http://lifl-coordinator:7070
    """


@command.command("run")
@click.option(
    "--agent-directory",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    envvar="FUNC_AGENT_DIRECTORY",
    help="Where the agent of the other container has its socket.",
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    default=DEFAULT_ADDRESS,
    envvar="FUNC_ADDRESS",
    show_default=True,
    help="Where to listen; port 0: any.",
)
@gateway_options
@click.option(
    "--state-directory",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    envvar="FUNC_STATE_DIRECTORY",
    help="Where jobs and models are kept.",
)
@member_options
@output_option
def run(
    agent_directory: Path,
    address: str,
    gateways: int,
    state_directory: Path,
    token_file: Path | None,
    allow_anonymous: bool,
    access_log: bool,
    output: str,
    **member: Any,
) -> int:
    """Run the part of a node that needs no privileges, until Ctrl-C.

    These are its gateways, and what plans its aggregators. The agent, which needs CAP_BPF and CAP_NET_ADMIN, runs
    in another container of the machine, and so does each function. They meet at the agent's socket. That is how
    LIFL runs on Kubernetes; on a machine of your own use 'func run', which starts everything.

    \b
    Examples:
      python3 -m lifl_gateway.agent --runtime-directory /run/lifl --node-user 65533 --function-user 65532
      func node run --agent-directory /run/lifl --state-directory /var/lib/lifl
      func node run --agent-directory /run/lifl --state-directory /var/lib/lifl \\
          --join http://lifl-coordinator:7070 --address 10.0.0.7:8080 --token-file token
    """
    host, port = choose_address(address)
    membership = membership_of(member, host)

    from lifl.node import NodeOptions

    options = NodeOptions(
        functions={},
        state_directory=state_directory.absolute(),
        host=host,
        port=port,
        gateways=gateways,
        agent_directory=agent_directory,
        token_file=token_file.absolute() if token_file else None,
        allow_anonymous=allow_anonymous,
        access_log=access_log,
        **membership,
    )
    return run_node(options, output)


@command.command("calibrate")
@path_option
@state_directory_option
@click.option(
    "--model",
    default="resnet18",
    metavar="NAME|SIZE",
    show_default=True,
    help="Size of the updates: resnet18, resnet34, resnet152, or such as 45MB.",
)
@click.option(
    "--seconds", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Time for each level."
)
@click.option(
    "--growth",
    type=click.FloatRange(min=1, min_open=True),
    default=1.5,
    show_default=True,
    help="E has grown when it is so many times the smallest.",
)
@click.option(
    "--most-senders", type=click.IntRange(min=1), default=32, show_default=True, help="Do not try more of them."
)
@click.option(
    "--data-plane",
    type=click.Choice(["auto", "ebpf", "unix"]),
    default="auto",
    envvar="FUNC_DATA_PLANE",
    show_default=True,
    help="As for 'func run'.",
)
@output_option
def calibrate(
    path: Path,
    state_directory: Path | None,
    model: str,
    seconds: float,
    growth: float,
    most_senders: int,
    data_plane: str,
    output: str,
) -> None:
    """Measure MC of this machine: how many updates it can aggregate at once.

    Starts a node for a moment, with the project's function, and has 1, 2, 3, 4, 6, 8, ... senders send updates to
    it. K is how many arrive in a second, E the mean time of an update from its first byte to folded. When E has
    grown at two levels running, MC is K*E of the last level before. A node that joins a cluster from this project
    tells the coordinator.

    Let the machine be idle meanwhile. It takes some 20 seconds.

    \b
    Examples:
      func node calibrate
      func node calibrate --model resnet152 --seconds 4
      func node calibrate --state-directory /var/lib/lifl -o json
    """
    from dataclasses import asdict

    from lifl import calibration as measure

    directory = state_directory or (path.parent if path.name == "func.yaml" else path) / STATE_DIRECTORY
    if read_run_file(directory):
        note(f"Warning: a node is running on {directory}; what it does meanwhile makes MC too small")
    options = measure.Options(
        function_file=_function_file(path),
        model_bytes=measure.model_size(model),
        seconds=seconds,
        growth=growth,
        most_senders=most_senders,
        data_plane=data_plane,
    )
    with _progress(options) as on_level:
        result = measure.calibrate(options, on_level)
    file = result.save(directory)
    note(_conclusion(result, file))
    show(asdict(result), output, lambda _: level_table(result, growth), "")


def _function_file(path: Path) -> Path | None:
    """That of the project's function; None, and a note, without a project."""
    from lifl.project import load_project

    try:
        project = load_project(path)
    except InvalidProject as error:
        note(f"Measuring with FedAvg: {error}")
        return None
    return project.functions[project.function]


def _conclusion(result: Calibration, file: Path) -> str:
    kept = f"MC is {result.capacity:g}, kept in {file}"
    return kept if result.is_limit else f"{kept}. E did not grow, so it may be more (see --most-senders)"


@contextmanager
def _progress(options: Options) -> Iterator[Callable[[Level], None]]:
    """A bar on stderr, drawn when a level is done: a thread of its own would not survive the forks."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from lifl.calibration import LEVELS

    console = Console(stderr=True)
    levels = [number for number in LEVELS if number <= options.most_senders]
    columns = (TextColumn("{task.description:<36}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(
        *columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("Starting a node", total=len(levels))

        def on_level(level: Level) -> None:
            text = f"{level.senders} senders: E is {format_seconds(level.execution_seconds)}"
            bar.update(task, advance=1, description=text, refresh=True)

        bar.refresh()
        yield on_level


def level_table(result: Calibration, growth: float) -> Table:
    """One row for each level; the one that gave MC is marked."""
    from lifl.calibration import last_good

    best = last_good(result.levels, growth)
    table = plain_table("SENDERS", "UPDATES", "K (1/s)", "E", "K*E", "GROWTH", "", left=frozenset({""}))
    for level in result.levels:
        table.add_row(
            str(level.senders),
            str(level.updates),
            f"{level.arrival_rate:.4g}",
            format_seconds(level.execution_seconds),
            f"{level.concurrency:.3g}",
            f"{level.growth:.2f}",
            "<- MC" if level is best else "",
        )
    return table

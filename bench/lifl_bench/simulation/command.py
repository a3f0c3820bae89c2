"""`func simulate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
from lifl.cli.common import CommandError, note
from lifl.cluster.placement import POLICIES, Policy

if TYPE_CHECKING:
    from lifl_bench.simulation.costs import Costs
    from lifl_bench.simulation.outcome import PolicyOutcome
    from lifl_bench.simulation.scenario import Scenario


@click.command("simulate")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(POLICIES),
    help="Placement policy; may be repeated. [default: all, one after the other]",
)
@click.option("--nodes", default=5, show_default=True, help="Nodes of the cluster, 10,000 at most.")
@click.option("--clients", default=2800, show_default=True, help="All clients, 1,000,000 at most.")
@click.option("--updates", default=60, show_default=True, help="Aggregation goal of a round.")
@click.option(
    "--model",
    default="resnet18",
    show_default=True,
    help="resnet18, resnet34, resnet152, a .safetensors file, or a size such as 64MiB.",
)
@click.option("--rounds", default=5, show_default=True, help="Rounds to simulate.")
@click.option(
    "--trace",
    default="burst",
    show_default=True,
    metavar="burst|poisson|mobile|always-on|FILE.csv",
    help="When clients send: at once, at random, after hibernating and training, after training, or as in a file "
    "with seconds in its first column.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=50.0,
    show_default=True,
    help="Of poisson, a second.",
)
@click.option(
    "--train",
    "train_s",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Median training time of mobile and always-on clients.",
)
@click.option(
    "--hibernation",
    "hibernation_s",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Longest sleep of mobile clients.",
)
@click.option("--capacity", default="20", show_default=True, help="MC of the nodes; several in turn: 20,40.")
@click.option("--cores", default="8", show_default=True, help="Cores of the nodes; several in turn: 4,16.")
@click.option(
    "--link", type=click.FloatRange(0), default=10.0, show_default=True, help="Gbit/s of a node; 0: no limit."
)
@click.option(
    "--client-link",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Mbit/s of a client; 0: no limit.",
)
@click.option(
    "--over-selection",
    type=click.FloatRange(0, 10),
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Clients selected beyond the goal, as a share of it.",
)
@click.option(
    "--deadline", type=click.FloatRange(0), default=0.0, show_default=True, help="Seconds of a round; 0: none."
)
@click.option(
    "--quorum", default=0, show_default=True, help="Updates that suffice after the deadline; 0: the goal."
)
@click.option("--updates-per-leaf", type=click.IntRange(1), default=2, show_default=True, help="I of the planner.")
@click.option(
    "--idle",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds to scale to zero.",
)
@click.option(
    "--shared-cores",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="All nodes and clients are on one machine with so many cores; 0: each node has its own.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=1, show_default=True, help="The same seed gives the same result."
)
@click.option(
    "--costs",
    "costs_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Costs of the machines, in JSON. [default: those of docs/performance.md]",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Measure costs on this machine first (a few seconds), write them to this file, and use them.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write plots, results.json and report.txt to this directory.",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "human"]),
    default="table",
    envvar="FUNC_OUTPUT",
    show_default=True,
    help="Format of what is printed on stdout; human is table.",
)
def command(
    policies: tuple[Policy, ...],
    nodes: int,
    clients: int,
    updates: int,
    model: str,
    rounds: int,
    trace: str,
    rate: float,
    train_s: float,
    hibernation_s: float,
    capacity: str,
    cores: str,
    link: float,
    client_link: float,
    over_selection: float,
    deadline: float,
    quorum: int,
    updates_per_leaf: int,
    idle: float,
    shared_cores: int,
    seed: int,
    costs_file: Path | None,
    calibrate: Path | None,
    report: Path | None,
    output: str,
) -> None:
    """Simulate the rounds of a cluster under different placement policies.

    Placement, planning and the coordinator are the platform's own; cores, links and clients are simulated with
    measured costs. A simulation of a million clients on 10,000 nodes takes some minutes.

    \b
    Examples:
      func simulate                              # 60 updates at once, 5 nodes
      func simulate --trace mobile --updates 120 --report report
      func simulate --nodes 1000 --clients 100000 --updates 10000 --rounds 3
      func simulate --policy best-fit --policy worst-fit --capacity 20,40
      func simulate --over-selection 0.3 --trace always-on --train 30
      func simulate --calibrate costs.json -o json
    """
    from lifl_bench.simulation.arrivals import parse_trace
    from lifl_bench.simulation.scenario import Scenario

    _check_report(report)
    scenario = Scenario(
        updates=updates,
        nodes=nodes,
        clients=clients,
        rounds=rounds,
        model_bytes=_model_bytes(model),
        capacities=tuple(_numbers(capacity, "--capacity")),
        cores=tuple(map(int, _numbers(cores, "--cores", whole=True))),
        over_selection=over_selection,
        quorum=quorum,
        deadline_s=deadline,
        updates_per_leaf=updates_per_leaf,
        idle_s=idle,
        link_gbit=link,
        client_mbit=client_link,
        shared_cores=shared_cores,
        seed=seed,
    )
    scenario = replace(scenario, trace=parse_trace(trace, rate, train_s, hibernation_s, scenario.selected))
    costs = _costs(costs_file, calibrate)
    outcomes = _run(scenario, costs, policies or POLICIES)
    _show(scenario, costs, outcomes, output)
    if report is not None:
        from lifl_bench.simulation.report import write_report

        note(f"Report: {', '.join(map(str, write_report(scenario, costs, outcomes, report)))}")


def _model_bytes(model: str) -> int:
    from lifl_bench.workload import parse_model

    try:
        return parse_model(model).payload_bytes
    except CommandError as error:
        raise CommandError(str(error), [("func simulate --model 64MiB", "a size instead of a model")]) from None


def _numbers(text: str, option: str, *, whole: bool = False) -> list[float]:
    try:
        numbers = [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError:
        kind = "whole numbers" if whole else "numbers"
        hint = (f"func simulate {option} 20,40", "one for each node in turn")
        raise CommandError(f"{option} takes {kind} separated by commas, not '{text}'", [hint]) from None
    return cast(list[float], numbers)


def _check_report(report: Path | None) -> None:
    """What would fail at the end is said at the start."""
    import importlib.util

    if report is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--report needs matplotlib", [("pip install 'lifl[bench]'", "installs it")])
    try:
        report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"the report cannot be written to '{report}': {error.strerror}") from None
    if not os.access(report, os.W_OK):
        raise CommandError(f"the report cannot be written to '{report}': no permission")


def _costs(costs_file: Path | None, calibrate: Path | None) -> Costs:
    from lifl_bench.simulation.costs import Costs, read_costs, write_costs

    costs = Costs() if costs_file is None else read_costs(costs_file)
    if calibrate is not None:
        from lifl.errors import LiflError
        from rich.console import Console

        from lifl_bench.simulation.calibration import calibrate as measure

        try:
            with Console(stderr=True).status("Measuring") as status:
                costs = measure(costs, lambda what: status.update(f"Measuring: {what}"))
        except (RuntimeError, TimeoutError, LiflError) as error:
            hint = ("func simulate", "uses the costs of docs/performance.md")
            raise CommandError(f"the costs cannot be measured: {error}", [hint]) from None
        write_costs(costs, calibrate)
        note(f"Costs: {calibrate}")
    return costs


def _run(scenario: Scenario, costs: Costs, policies: Sequence[Policy]) -> list[PolicyOutcome]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from lifl_bench.simulation.simulator import simulate

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        total = len(policies) * scenario.rounds * scenario.updates
        task = progress.add_task("", total=total)
        outcomes = []
        for policy in policies:
            progress.update(task, description=policy)
            outcomes.append(
                simulate(replace(scenario, policy=policy), costs, lambda count: progress.advance(task, count))
            )
    return outcomes


def _show(scenario: Scenario, costs: Costs, outcomes: Sequence[PolicyOutcome], output: str) -> None:
    from rich.console import Console

    from lifl_bench.simulation.report import print_report, to_json

    if output == "json":
        click.echo(to_json(scenario, costs, outcomes))
    else:
        print_report(scenario, outcomes, Console(width=80))

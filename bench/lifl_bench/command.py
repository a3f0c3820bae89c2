"""`func bench`."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
from lifl.cli.common import CommandError, note, program

if TYPE_CHECKING:
    from lifl_bench.modes import Mode, Setting
    from lifl_bench.plan import CellPlan
    from lifl_bench.results import Results
    from lifl_bench.session import Session

DEFAULT_MODES = "lifl,lifl-unix,broker,broker-wire,broker-stock,grpc"


@click.command("bench")
@click.option(
    "--modes",
    default=DEFAULT_MODES,
    show_default=True,
    help="Ways to aggregate, separated by commas; they take turns within the run.",
)
@click.option(
    "--models",
    default="resnet18",
    show_default=True,
    help="resnet18, resnet34, resnet152, a .safetensors file, or a size such as 64MiB; separated by commas.",
)
@click.option("--updates", default="4,20", show_default=True, help="Updates of a round, separated by commas.")
@click.option("--levels", default="2", show_default=True, help="Levels of the tree: 1, 2, or 1,2.")
@click.option(
    "--cell",
    "cells",
    multiple=True,
    metavar="MODEL:UPDATES:LEVELS[:MODE+MODE]",
    help="Run just this combination (may be repeated), instead of all of --models, --updates, --levels.",
)
@click.option(
    "--repeat", type=click.IntRange(1, 1000), default=5, show_default=True, help="Measured rounds of each mode."
)
@click.option(
    "--budget",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="A mode whose rounds of a cell have taken this long gets no further one.",
)
@click.option(
    "--arrival",
    default="burst",
    show_default=True,
    metavar="burst|poisson|FILE.csv",
    help="When clients send: all at once, at random, or as in a file with seconds in its first column.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=50.0,
    show_default=True,
    help="Updates a second of --arrival poisson.",
)
@click.option(
    "--ablation",
    is_flag=True,
    help="Also go from the broker to LIFL in single steps, with the largest of the cells.",
)
@click.option(
    "--ablation-nodes",
    type=click.IntRange(0, 16),
    default=2,
    show_default=True,
    help="Nodes (network namespaces) on which --ablation adds placement, planning and reuse; 0 leaves that out.",
)
@click.option("--train", is_flag=True, help="Also train a model through each mode, up to --target.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=15, show_default=True, help="Rounds of --train.")
@click.option(
    "--target",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Accuracy of --train that counts as reached.",
)
@click.option(
    "--nats-url",
    metavar="URL",
    envvar="FUNC_NATS_URL",
    help="Use this NATS server (with JetStream) instead of starting one; its CPU time is then not counted.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write report.html, plots, results.json and report.txt to this directory.",
)
@click.option(
    "--from",
    "saved",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="Run nothing: show a results.json of an earlier run.",
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
    modes: str,
    models: str,
    updates: str,
    levels: str,
    cells: tuple[str, ...],
    repeat: int,
    budget: float,
    arrival: str,
    rate: float,
    ablation: bool,
    ablation_nodes: int,
    train: bool,
    rounds: int,
    target: float,
    nats_url: str | None,
    report: Path | None,
    saved: Path | None,
    output: str,
) -> int:
    """Compare LIFL with a message broker and with gRPC on this machine.

    Every mode aggregates the same updates with the same function over the same tree; only the way to the
    aggregators differs. Each round is checked against the mean in float64. The exit code is 1 if a mode failed.

    \b
    Examples:
      func bench                                 # 4 and 20 updates of ResNet-18
      func bench --modes lifl,broker --updates 4,20,60,100 --report report
      func bench --cell resnet152:1:1 --cell resnet18:20:2 --repeat 9
      func bench --models 64MiB --arrival poisson --rate 20 -o json
      func bench --ablation --train --report report
      func bench --from report/results.json      # show it again
    """
    if saved is not None:
        return _show_saved(saved, report, output)
    environment = _prepare()
    from lifl_bench import plan, session
    from lifl_bench.modes import Setting
    from lifl_bench.runner import Options
    from lifl_bench.workload import parse_arrival

    wanted = plan.parse_modes(modes)
    plans = plan.parse_cells(cells) if cells else _product(models, updates, levels)
    arriving = parse_arrival(arrival, rate, max(one.updates for one in plans))
    setting = Setting(nats_url)
    chosen, absent = _available(wanted, setting)
    running = session.Session(
        modes=chosen,
        setting=setting,
        cells=plans,
        options=Options(repeat, arriving, budget),
        ablation=max(plans, key=lambda cell: (cell.levels, cell.updates * cell.model.nbytes))
        if ablation
        else None,
        training=session.Training(20, rounds, target) if train else None,
        environment=environment,
        results=_blank_results(arriving.describe(), repeat, chosen),
        has_broker=not absent,
        ablation_nodes=ablation_nodes,
    )
    _check(running, report)
    running.results.notes += [*absent, *_isolate(running.results, nats_url)]
    return _run(running, report, output)


def _prepare() -> dict[str, str]:
    """Limit numerical libraries to one thread; before any of them is imported."""
    from lifl_bench.processes import limit_threads

    return limit_threads()


def _product(models: str, updates: str, levels: str) -> list[CellPlan]:
    from lifl_bench import plan

    names = [part.strip() for part in models.split(",") if part.strip()]
    if not names:
        raise CommandError("--models names no model")
    return plan.plan_cells(names, plan.parse_numbers(updates, "--updates"), plan.parse_numbers(levels, "--levels"))


def _available(modes: list[Mode], setting: Setting) -> tuple[list[Mode], list[str]]:
    """The modes whose parts are there, and what is to be said of the others."""
    ready, notes = [], []
    hints: dict[str, str] = {}
    for mode in modes:
        missing = mode.missing(setting)
        if not missing:
            ready.append(mode)
            continue
        hints |= {how: f"installs {what}" for what, how in missing}
        notes.append(f"mode {mode.name} left out: {', '.join(what for what, _ in missing)} is not installed")
    if not ready:
        raise CommandError("none of the modes can run: " + "; ".join(notes), list(hints.items()))
    for text in notes:
        note(f"Warning: {text}")
    for how, what in hints.items():
        note(f"  {how}  # {what}")
    return ready, notes


def _check(running: Session, report: Path | None) -> None:
    """What can be known to fail is said before anything starts."""
    running.check()
    if running.setting.nats_url is not None:
        _check_nats(running.setting.nats_url)
    if running.training is not None:
        _need_packages(["torch", "sklearn"], "--train", "pip install 'lifl[demo]'")
    if report is not None:
        _need_packages(["matplotlib", "jinja2"], "--report", "pip install 'lifl[bench]'")
        try:
            report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"the report cannot be written to '{report}': {error.strerror}") from None
        if not os.access(report, os.W_OK):
            raise CommandError(f"the report cannot be written to '{report}': no permission")


def _check_nats(url: str) -> None:
    """See that a NATS server with JetStream answers there. Raises CommandError."""
    import json
    import socket
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        with socket.create_connection((parts.hostname or "", parts.port or 4222), timeout=5) as connection:
            greeting = connection.makefile("rb").readline(1 << 16)
        information = json.loads(greeting.removeprefix(b"INFO "))
    except (OSError, ValueError) as error:
        shown = _without_password(url)
        hints = [("nats-server -js", "starts one"), ("func bench", "starts one of its own")]
        raise CommandError(f"no NATS server answers at {shown}: {str(error).lower()}", hints) from None
    if not information.get("jetstream"):
        raise CommandError(f"the NATS server at {_without_password(url)} has no JetStream; start it with -js")


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", text)


def _need_packages(modules: list[str], option: str, how: str) -> None:
    import importlib.util

    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    if absent:
        raise CommandError(f"{option} needs {', '.join(absent)}", [(how, "installs it")])


def _isolate(results: Results, nats_url: str | None) -> list[str]:
    """Give the run a network of its own, and note what machine it is; returns notes for the report."""
    from lifl_bench.machine import machine_facts
    from lifl_bench.namespace import congestion_control, enter_private_network

    default = congestion_control()
    reason = "" if nats_url else enter_private_network()
    results.machine = machine_facts(default)
    if nats_url:
        return ["a given NATS server is used: its CPU time and memory are not counted"]
    if reason and default == "bbr":
        return [f"{reason}: the baselines have to use bbr, which costs them CPU over loopback; run as root"]
    return []


def _blank_results(arrival: str, repeat: int, modes: list[Mode]) -> Results:
    from lifl_bench.machine import versions
    from lifl_bench.results import Results

    # Published with the report: no passwords.
    command_line = shlex.join([program(), *map(_without_password, sys.argv[1:])])
    date = datetime.now(UTC).isoformat(timespec="seconds")
    results = Results(command_line, date, {}, versions(), arrival, repeat)
    results.modes = {mode.name: mode.summary for mode in modes}
    return results


def _run(running: Session, report: Path | None, output: str) -> int:
    from rich.console import Console

    begin = time.monotonic()
    results = running.results
    running.run(Console(stderr=True))
    results.seconds = time.monotonic() - begin
    _show(results, report, output)
    failures = [outcome.failure for outcome in [*results.cells, *(row.result for row in results.ablation)]]
    return 1 if any([*failures, *(outcome.failure for outcome in results.training)]) else 0


def _show_saved(saved: Path, report: Path | None, output: str) -> int:
    from lifl_bench.report import from_json

    try:
        results = from_json(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"'{saved}' holds no results of a run: {error}") from None
    _show(results, report, output)
    return 0


def _show(results: Results, report: Path | None, output: str) -> None:
    from rich.console import Console

    from lifl_bench.report import to_json, write_report
    from lifl_bench.tables import print_results

    if output == "json":
        click.echo(to_json(results))
    else:
        console = Console()
        console.width = min(console.width, 80) if console.is_terminal else 80
        print_results(results, console)
    if report is not None:
        note(f"Report: {write_report(results, report)}")

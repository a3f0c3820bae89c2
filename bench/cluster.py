"""Placement policies on a real cluster: a coordinator, nodes and clients in network namespaces of this machine.

    python bench/cluster.py                                   # 2 and 4 nodes, 20, 60 and 100 updates, all policies
    python bench/cluster.py --nodes 4 --updates 20 --model resnet18 --policy best-fit --policy worst-fit
    python bench/cluster.py --nodes 1,2,3,4 --updates 20,60 --predict   # beside what the simulator predicts
    python bench/cluster.py --plot placement.png -o json

All clients begin at one moment, each at another gateway in turn; they follow redirects, stay where they were sent
and fetch each new model from there. Policies take turns round by round, on the same cluster, and every model is
compared with the weighted mean in float64.

Models have 4 MB by default, not the 44.7 MB of ResNet-18: all nodes and clients share this machine's cores, so
large models measure nothing but contention for them, and the jobs of four policies on four nodes would need more
memory than most machines have. With 20 updates on 2 nodes ResNet-18 fits: --model resnet18.

The exit status is 1 if BestFit loses against another policy in bytes, nodes, aggregators or ACT, or if a round
fails.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from lifl_bench.processes import limit_threads

ENVIRONMENT = limit_threads()

import click  # noqa: E402
from lifl.cli.common import CommandError, note  # noqa: E402
from lifl.cluster.placement import POLICIES, Policy  # noqa: E402
from lifl_bench.hosts import why_not  # noqa: E402
from lifl_bench.machine import machine_facts  # noqa: E402
from lifl_bench.placement_comparison.judgement import losses  # noqa: E402
from lifl_bench.placement_comparison.measurement import measure  # noqa: E402
from lifl_bench.placement_comparison.plan import Plan  # noqa: E402
from lifl_bench.placement_comparison.results import ClusterResults, to_document  # noqa: E402
from lifl_bench.placement_comparison.tables import print_comparison  # noqa: E402
from lifl_bench.plan import parse_numbers  # noqa: E402
from lifl_bench.workload import parse_model  # noqa: E402
from rich.console import Console  # noqa: E402


@click.command(help=__doc__)
@click.option("--nodes", default="2,4", show_default=True, help="Nodes of the cluster, separated by commas.")
@click.option("--updates", default="20,60,100", show_default=True, help="Updates of a round, separated by commas.")
@click.option("--policy", "policies", multiple=True, type=click.Choice(POLICIES), help="All by default.")
@click.option("--model", default="4MB", show_default=True, help="resnet18, resnet34, resnet152, or a size.")
@click.option("--rounds", default=7, type=click.IntRange(1, 1000), show_default=True, help="Measured ones.")
@click.option(
    "--capacity",
    default=20.0,
    type=click.FloatRange(1),
    show_default=True,
    help="MC: updates that a node can aggregate at once (LIFL paper: 20).",
)
@click.option("--predict", is_flag=True, help="Lay the simulator's prediction beside it; measures costs first.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write a plot to this PNG file.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def main(
    nodes: str,
    updates: str,
    policies: tuple[Policy, ...],
    model: str,
    rounds: int,
    capacity: float,
    predict: bool,
    plot: Path | None,
    output: str,
) -> None:
    try:
        plan = Plan(
            tuple(parse_numbers(nodes, "--nodes")),
            tuple(parse_numbers(updates, "--updates")),
            tuple(dict.fromkeys(policies)) or POLICIES,
            parse_model(model),
            rounds,
            capacity,
        )
        plan.check()
    except CommandError as error:
        raise click.ClickException(str(error)) from None
    if reason := why_not():
        raise click.ClickException(reason)
    results = run(plan, predict)
    if plot is not None:
        from lifl_bench.placement_comparison.plots import draw

        note(f"Plot: {draw(results, plot)}")
    lost = losses(results)
    if output == "json":
        print(json.dumps(to_document(results, lost)))
    else:
        print_comparison(results, Console(width=80))
    sys.exit(1 if lost or results.failures() else 0)


def run(plan: Plan, with_prediction: bool) -> ClusterResults:
    """Measure, and predict if that is asked for."""
    begin = time.monotonic()
    results = ClusterResults(
        datetime.now(UTC).isoformat(timespec="seconds"),
        machine_facts(),
        plan.model.name,
        plan.model.payload_bytes,
        plan.capacity,
        plan.rounds,
    )
    costs = None
    if with_prediction:
        from lifl_bench.placement_comparison.prediction import predict_all
        from lifl_bench.simulation.calibration import calibrate
        from lifl_bench.simulation.costs import Costs

        note("measuring costs")
        costs = calibrate(Costs())
    measure(plan, results, ENVIRONMENT, note)
    if costs is not None:
        predict_all(results, costs)
    results.seconds = time.monotonic() - begin
    return results


if __name__ == "__main__":
    main()

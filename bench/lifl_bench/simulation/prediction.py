"""What a small cluster should need for a round, to be laid beside what is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from lifl_bench.results import median
from lifl_bench.simulation.costs import Costs
from lifl_bench.simulation.outcome import RoundOutcome
from lifl_bench.simulation.scenario import Scenario
from lifl_bench.simulation.simulator import simulate

_FEWEST_ROUNDS: Final = 3


@dataclass(frozen=True)
class Prediction:
    """Medians over the rounds, and of ACT the extremes.

    The first round does not count: in it nodes fetch the model and start workers.
    """

    act_s: float
    lowest_act_s: float
    highest_act_s: float
    internode_bytes: float
    """Partial aggregates, and the new model for the nodes that had updates."""
    nodes: float
    aggregators: float
    started: float
    reused: float
    cold: float
    cpu_s: float
    """Of gateways, workers, coordinator and checkpoint; clients are not part of it."""
    clients_cpu_s: float
    """Of the clients, where they share the nodes' cores; else 0."""


def predict(scenario: Scenario, costs: Costs) -> Prediction:
    """Simulate a scenario, of three rounds at least, and sum it up.

    For nodes in network namespaces of one machine set `shared_cores` to its cores and `cores` to what each node
    says it has; `link_gbit` is 0 unless their links are slowed down.
    """
    scenario = replace(scenario, rounds=max(_FEWEST_ROUNDS, scenario.rounds))
    rounds = simulate(scenario, costs).rounds[1:]

    def middle(name: str) -> float:
        return median([getattr(each, name) for each in rounds])

    acts = [each.act_s for each in rounds]
    return Prediction(
        act_s=median(acts),
        lowest_act_s=min(acts),
        highest_act_s=max(acts),
        internode_bytes=middle("internode_bytes"),
        nodes=middle("nodes"),
        aggregators=middle("aggregators"),
        started=middle("started"),
        reused=middle("reused"),
        cold=middle("cold"),
        cpu_s=middle("total_cpu_s"),
        clients_cpu_s=median([_clients(each) for each in rounds]),
    )


def _clients(outcome: RoundOutcome) -> float:
    return outcome.cpu_s.get("clients", 0.0)

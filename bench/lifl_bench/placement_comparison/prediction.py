"""The simulator's prediction for what was measured, with costs of this machine."""

from __future__ import annotations

import os
from typing import Final

from lifl.cluster.placement import Policy

from lifl_bench.placement_comparison.results import ClusterResults, PlacementCell, Predicted
from lifl_bench.simulation.arrivals import Trace
from lifl_bench.simulation.costs import Costs
from lifl_bench.simulation.prediction import predict
from lifl_bench.simulation.scenario import Scenario

REST_SECONDS: Final = 2.0
"""Between a new model and the next updates, which all come at once: as measured, from a cluster at rest."""


def predict_all(results: ClusterResults, costs: Costs) -> None:
    """Put a prediction beside everything that was measured."""
    for cell in results.cells:
        for each in cell.policies:
            if each.rounds:
                cell.predicted[each.policy] = _predict(results, cell, each.policy, costs)


def _predict(results: ClusterResults, cell: PlacementCell, policy: Policy, costs: Costs) -> Predicted:
    cores = os.cpu_count() or 1
    scenario = Scenario(
        updates=cell.updates,
        nodes=cell.nodes,
        clients=cell.updates,
        rounds=results.rounds + 1,
        policy=policy,
        model_bytes=results.model_bytes,
        capacities=(results.capacity,),
        # Each node says that it has all cores of the machine; in truth all of them share these, with the clients.
        cores=(cores,),
        shared_cores=cores,
        link_gbit=0.0,
        trace=Trace("burst", offsets=(REST_SECONDS,) * cell.updates),
    )
    found = predict(scenario, costs)
    return Predicted(found.act_s, found.internode_bytes, found.nodes, found.aggregators)

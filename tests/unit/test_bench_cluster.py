"""The comparison of placement policies on a cluster: its plan, what counts as a loss, tables, JSON and plot."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from lifl.cli.common import CommandError
from lifl.cluster.placement import POLICIES, Policy
from lifl_bench.placement_comparison import judgement
from lifl_bench.placement_comparison.plan import Plan, turns
from lifl_bench.placement_comparison.results import (
    ClusterResults,
    PlacedRound,
    PlacementCell,
    PolicyResult,
    Predicted,
    to_document,
)
from lifl_bench.placement_comparison.tables import print_comparison
from lifl_bench.workload import parse_model
from rich.console import Console

MEGABYTE = 1_000_000
ROUND = PlacedRound(0.1, 0.2, 0, 0, 1, 2, 0, 3, 0, 0.3, [20], 2e-7)


def make_policy(policy: Policy, act_s: float, sent: int, nodes: int = 1, rounds: int = 5) -> PolicyResult:
    """Rounds with ACTs 1 % apart, the middle one having this."""
    measured = [
        replace(ROUND, act_s=act_s * (1 + (number - rounds // 2) / 100), internode_bytes=sent, nodes=nodes)
        for number in range(rounds)
    ]
    return PolicyResult(policy, [replace(each, aggregators=2 * nodes) for each in measured])


def make_results(*policies: PolicyResult, nodes: int = 4, updates: int = 20) -> ClusterResults:
    cell = PlacementCell(nodes, updates, list(policies))
    return ClusterResults("2026-11-22T12:00:00Z", {}, "4MB", 4 * MEGABYTE, 20.0, 5, cells=[cell])


def printed(results: ClusterResults) -> str:
    stream = io.StringIO()
    print_comparison(results, Console(file=stream, width=80, color_system=None))
    return stream.getvalue()


# --- the plan ------------------------------------------------------------------------------------------------


def test_each_policy_begins_a_turn_now_and_then_and_none_always_follows_the_same_one() -> None:
    orders = turns(POLICIES, 8)

    assert all(sorted(order) == sorted(POLICIES) for order in orders)
    assert set(Counter(order[0] for order in orders)) == set(POLICIES)
    assert len({order[order.index("first-fit") - 1] for order in orders if order[0] != "first-fit"}) > 1


@pytest.mark.parametrize(
    ("nodes", "updates", "model", "message"),
    [
        (0, 20, "4MB", "0 nodes"),
        (17, 20, "4MB", "17 nodes"),
        (2, 251, "4MB", "251 updates"),
        (16, 250, "resnet152", "GB of memory, and"),
    ],
)
def test_what_cannot_be_run_is_refused(nodes: int, updates: int, model: str, message: str) -> None:
    plan = Plan((nodes,), (updates,), POLICIES, parse_model(model), 3, 20.0)

    with pytest.raises(CommandError, match=message):
        plan.check()


def test_memory_grows_with_nodes_policies_updates_and_the_model() -> None:
    small = Plan((2,), (20,), ("best-fit",), parse_model("1MB"), 3, 20.0)

    for larger in (
        replace(small, nodes=(2, 4)),
        replace(small, policies=POLICIES),
        replace(small, updates=(20, 60)),
        replace(small, model=parse_model("4MB")),
    ):
        assert larger.memory() > small.memory()


# --- winning and losing ----------------------------------------------------------------------------------------


def test_best_fit_loses_when_it_is_worse_beyond_the_spread() -> None:
    results = make_results(make_policy("best-fit", 0.2, 0), make_policy("worst-fit", 0.1, 8 * MEGABYTE, nodes=2))

    assert judgement.losses(results) == [
        "4 nodes, 20 updates: best-fit loses against worst-fit in ACT, 0.2 against 0.1"
    ]


@pytest.mark.parametrize("act_s", [0.1, 0.109])
def test_a_difference_of_less_than_a_tenth_is_no_loss(act_s: float) -> None:
    results = make_results(make_policy("best-fit", act_s, 0), make_policy("worst-fit", 0.1, 0))

    assert judgement.losses(results) == []


def test_a_worse_median_that_a_second_run_may_turn_round_is_no_loss() -> None:
    ours, theirs = make_policy("best-fit", 0.2, 0), make_policy("worst-fit", 0.1, 0)
    theirs.rounds[0] = replace(theirs.rounds[0], act_s=0.25)

    assert judgement.losses(make_results(ours, theirs)) == []


def test_one_node_more_in_a_few_rounds_is_no_loss() -> None:
    ours, theirs = make_policy("best-fit", 0.1, 0), make_policy("first-fit", 0.1, 0)
    ours.rounds[:2] = [replace(one, nodes=2, internode_bytes=8 * MEGABYTE) for one in ours.rounds[:2]]

    assert judgement.losses(make_results(ours, theirs)) == []


def test_one_node_more_in_every_round_is_a_loss_in_nodes_and_aggregators() -> None:
    results = make_results(make_policy("best-fit", 0.1, 0, nodes=2), make_policy("first-fit", 0.1, 0, nodes=1))

    assert [text.split(" in ")[1].split(",")[0] for text in judgement.losses(results)] == ["nodes", "aggregators"]


def test_protocol_bytes_are_no_loss_and_a_model_more_is_one() -> None:
    theirs = make_policy("first-fit", 0.1, 4 * MEGABYTE)

    assert not judgement.losses(make_results(make_policy("best-fit", 0.1, 4_100_000), theirs))
    assert judgement.losses(make_results(make_policy("best-fit", 0.1, 8 * MEGABYTE), theirs))


def test_a_clear_win_in_bytes_is_asked_for_only_where_fewer_nodes_are_enough() -> None:
    ours, theirs = make_policy("best-fit", 0.1, 7 * MEGABYTE), make_policy("worst-fit", 0.1, 8 * MEGABYTE)

    few, many = make_results(ours, theirs, updates=60), make_results(ours, theirs, updates=100)

    assert [is_win for _, _, is_win in judgement.byte_wins(few)] == [False]
    assert list(judgement.byte_wins(many)) == []
    assert "no clear win in bytes: 4 nodes, 60 updates, against worst-fit" in printed(few)


@pytest.mark.parametrize(
    ("nodes", "updates", "goal"), [(1, 20, 1.05), (2, 20, 0.1), (2, 21, 1.05), (4, 60, 2 / 3 + 0.1), (4, 61, 1.05)]
)
def test_a_clear_win_is_measured_by_the_fewest_nodes_that_are_enough(
    nodes: int, updates: int, goal: float
) -> None:
    assert judgement.byte_goal(nodes, updates, 20.0) == pytest.approx(goal)


def test_without_best_fit_or_with_a_policy_that_failed_nothing_is_lost() -> None:
    failed = PolicyResult("best-fit", [], "it broke")
    results = make_results(failed, make_policy("worst-fit", 0.1, 0))

    assert judgement.losses(results) == [] and judgement.verdict(results) == []
    assert results.failures() == ["4 nodes, 20 updates, best-fit: it broke"]


# --- what is shown ---------------------------------------------------------------------------------------------


def test_tables_fit_80_columns_with_large_numbers_and_failures() -> None:
    slow = [
        replace(ROUND, act_s=act, round_s=99.0, internode_bytes=99_999 * MEGABYTE) for act in (10.1, 55.5, 99.9)
    ]
    results = make_results(
        make_policy("best-fit", 0.1, 0), PolicyResult("round-robin", slow), PolicyResult("worst-fit", [], "broke")
    )
    results.cells[0].predicted = {"best-fit": Predicted(0.09, 0, 1, 2), "round-robin": Predicted(9.9, 1e11, 4, 8)}

    text = printed(results)

    assert max(map(len, text.splitlines())) <= 80
    assert "55500 [10100..99900]" in text and "failed" in text
    assert "FAILED: 4 nodes, 20 updates, worst-fit: broke" in text


def test_a_row_shows_the_medians_and_the_prediction_stands_beside_them() -> None:
    results = make_results(make_policy("best-fit", 0.1, 4 * MEGABYTE))
    results.cells[0].predicted = {"best-fit": Predicted(0.09, 5e6, 1, 2)}

    lines = [line.split() for line in printed(results).splitlines() if "best-fit " in line]

    assert lines[0] == ["best-fit", "100", "[98..102]", "200", "4.0", "0.0", "1", "2", "0", "0", "0.30"]
    assert lines[1] == ["4", "20", "best-fit", "90", "100", "5.0", "4.0", "1", "1", "2", "2"]


def test_json_has_medians_and_null_for_what_is_no_number() -> None:
    results = make_results(make_policy("best-fit", 0.1, 0), PolicyResult("worst-fit", [], "broke"))
    results.cells[0].policies[0].rounds[0].error = math.nan

    document = json.loads(json.dumps(to_document(results, ["lost"]), allow_nan=False))

    best, worst = document["cells"][0]["policies"]
    assert best["medians"]["act_s"] == 0.1 and best["rounds"][0]["error"] is None
    assert worst["medians"]["act_s"] is None and document["losses"] == ["lost"]


def test_the_plot_is_drawn_with_gaps_where_a_policy_failed(tmp_path: Path) -> None:
    from lifl_bench.placement_comparison.plots import draw

    results = make_results(*(make_policy(policy, 0.1, 0) for policy in POLICIES))
    results.cells.append(
        PlacementCell(4, 60, [PolicyResult("best-fit", [], "broke"), make_policy("worst-fit", 1, 9)])
    )
    results.cells.append(PlacementCell(1, 20, [make_policy("best-fit", 0.1, 0)]))

    assert draw(results, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --- `make bench` ----------------------------------------------------------------------------------------------


@pytest.fixture
def bench_run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/run.py, which is a script."""
    file = Path(__file__).resolve().parents[2] / "bench" / "run.py"
    spec = importlib.util.spec_from_file_location("bench_run", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_run", module)
    spec.loader.exec_module(module)
    return module


def test_make_bench_wants_a_clear_win_where_it_can_be_had_and_no_loss_elsewhere(bench_run: ModuleType) -> None:
    policies = (
        make_policy("best-fit", 0.1, 0),
        make_policy("worst-fit", 0.2, 24 * MEGABYTE, nodes=4),
        make_policy("round-robin", 0.2, 24 * MEGABYTE, nodes=4),
    )
    results = make_results(*policies)
    results.cells.append(PlacementCell(4, 100, [*policies[1:], make_policy("best-fit", 0.1, 24 * MEGABYTE)]))

    figures = list(bench_run.cluster_figures(to_document(results, [])))

    assert [(figure.measured, figure.goal) for figure in figures] == [(0, 0.1)] * 2 + [(1, 1.05)] * 2 + [
        (0, 0)
    ] * 2
    assert all(figure.is_met for figure in figures)


def test_make_bench_takes_a_policy_without_rounds_for_a_missed_goal(bench_run: ModuleType) -> None:
    results = make_results(
        PolicyResult("best-fit", [], "broke"), make_policy("worst-fit", 1, 9), make_policy("round-robin", 1, 9)
    )

    figures = list(bench_run.cluster_figures(to_document(results, [])))

    assert [figure.is_met for figure in figures] == [False, False, True, False]

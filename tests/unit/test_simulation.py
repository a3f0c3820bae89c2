"""The simulation counts right, takes the time that arithmetic tells, and has the real coordinator decide."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifl import cli
from lifl.cli.common import CommandError
from lifl.cluster import hierarchy
from lifl.cluster.member_link import BATCH
from lifl.cluster.placement import POLICIES, PlacementIndex, Policy
from lifl.control.hierarchy import Hierarchy
from lifl_bench.simulation.arrivals import TRACES, Trace, parse_trace
from lifl_bench.simulation.control import Coordinator, Outbox
from lifl_bench.simulation.costs import Costs, read_costs, write_costs
from lifl_bench.simulation.events import EventLoop
from lifl_bench.simulation.host import Host, Lane, Link, Turns
from lifl_bench.simulation.machine import Machines
from lifl_bench.simulation.outcome import PolicyOutcome
from lifl_bench.simulation.prediction import predict
from lifl_bench.simulation.report import arrivals_over_time, workers_over_time
from lifl_bench.simulation.scenario import Scenario
from lifl_bench.simulation.simulator import simulate

MB = 1_000_000
LINK_S = 40 * MB * 8 / 10e9
"""Seconds that a model of 40 MB takes over 10 Gbit/s."""
READ_S = 0.002
FREE = Costs(
    receive_s_per_gb=0,
    upload_s=0,
    send_s_per_gb=0,
    flow_gb_per_s=1e5,
    peer_send_s_per_gb=0,
    peer_receive_s_per_gb=0,
    fold_s_per_gb=READ_S / 0.04,
    start_s=0,
    hop_s=0,
    request_s=0,
    message_s=0,
    node_request_s=0,
    redirect_s=0,
    client_s=0,
    latency_s=0,
    checkpoint_s_per_gb=0,
)
"""Nothing costs anything but links and folding, so that times can be told by hand."""
FEW = Scenario(updates=3, nodes=1, rounds=2, model_bytes=40 * MB, updates_per_leaf=100)
MOBILE = Trace("mobile", train_s=5.0, hibernation_s=20.0)


def without_real_time(outcome: PolicyOutcome) -> PolicyOutcome:
    return replace(outcome, seconds=0.0)


# --- counting ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    updates=st.integers(1, 60),
    nodes=st.integers(1, 7),
    policy=st.sampled_from(POLICIES),
    trace=st.sampled_from([Trace(name, rate=100.0, train_s=0.5, hibernation_s=2.0) for name in TRACES]),
    over_selection=st.sampled_from([0.0, 0.3]),
    capacities=st.lists(st.floats(0.5, 30), min_size=1, max_size=3).map(tuple),
    shared_cores=st.sampled_from([0, 2]),
    idle_s=st.sampled_from([0.2, 60.0]),
    seed=st.integers(0, 5),
)
def test_every_round_has_exactly_its_goal_and_each_update_counts_once(
    updates, nodes, policy, trace, over_selection, capacities, shared_cores, idle_s, seed
):
    scenario = Scenario(
        updates=updates, nodes=nodes, clients=100, rounds=3, policy=policy, trace=trace, cores=(2, 4),
        over_selection=over_selection, capacities=capacities, shared_cores=shared_cores, idle_s=idle_s, seed=seed,
    )  # fmt: skip
    outcome = simulate(scenario, Costs())
    assert [each.accepted for each in outcome.rounds] == [updates] * 3
    assert all(each.accepted + each.late == each.selected == scenario.selected for each in outcome.rounds)
    assert sum(outcome.placed.values()) == len(outcome.arrivals) == 3 * updates
    for each in outcome.rounds:
        assert each.partial_bytes == (each.nodes - 1) * scenario.model_bytes
        assert each.nodes <= each.aggregators <= 4 * each.nodes
        assert 0 < each.tail_s <= each.act_s <= each.round_s
    if not over_selection:  # with it a node may start workers for updates that then are late, and reports nothing
        assert sum(each.started for each in outcome.rounds) >= outcome.peak_workers


@pytest.mark.parametrize("shared_cores", [0, 2])
def test_the_same_seed_gives_the_same_outcome_and_another_one_another(shared_cores: int):
    scenario = Scenario(updates=40, trace=MOBILE, policy="worst-fit", shared_cores=shared_cores)
    first, second = (without_real_time(simulate(scenario, Costs())) for _ in range(2))
    assert first == second
    other = simulate(replace(scenario, seed=2), Costs())
    assert [each.act_s for each in other.rounds] != [each.act_s for each in first.rounds]


def test_clients_beyond_the_goal_come_too_late():
    outcome = simulate(Scenario(updates=50, over_selection=0.5, trace=MOBILE, rounds=2), Costs())
    assert [(each.selected, each.accepted, each.late) for each in outcome.rounds] == [(75, 50, 25)] * 2


def test_after_the_deadline_the_quorum_closes_the_round():
    scenario = Scenario(updates=100, quorum=30, deadline_s=12.0, trace=MOBILE, rounds=2)
    for each in simulate(scenario, Costs()).rounds:
        assert 30 <= each.accepted < 100
        assert each.round_s >= 12.0


# --- time ----------------------------------------------------------------------------------------------------


def test_on_one_node_uploads_share_the_link_and_one_pass_folds_them():
    for each in simulate(FEW, FREE).rounds[1:]:
        assert each.act_s == pytest.approx(3 * LINK_S + 3 * READ_S)


def test_on_one_node_without_a_slow_link_uploads_share_the_cores():
    scenario = replace(FEW, updates=6, link_gbit=0.0, cores=(2,))
    costs = replace(FREE, receive_s_per_gb=0.01 / 0.04)
    # The fourth update starts a pass; the last one reads two updates and the sums so far.
    expected = 6 * 0.01 / 2 + 4 * READ_S + 3 * READ_S
    assert simulate(scenario, costs).rounds[1].act_s == pytest.approx(expected)


def test_what_a_gateway_does_besides_receiving_is_done_by_one_process():
    scenario = replace(FEW, link_gbit=0.0, cores=(8,))
    costs = replace(FREE, upload_s=0.01)
    # The first of three waits for EAGER_LINGER or for others; the last one comes after all turns.
    act_s = simulate(scenario, costs).rounds[1].act_s
    assert 3 * 0.01 + 2 * READ_S <= act_s + 1e-5 <= 3 * 0.01 + 4 * READ_S


# --- questions to the coordinator ----------------------------------------------------------------------------

REQUEST = replace(FREE, request_s=0.010, message_s=0.001, node_request_s=0.002, latency_s=0.003)
ALONE_S = 0.010 + 0.001 + 0.002 + 0.003


@pytest.fixture(params=["cores of its own", "shared cores"])
def outbox(request: pytest.FixtureRequest) -> Iterator[tuple[EventLoop, Coordinator, Outbox]]:
    loop = EventLoop()
    shared = 8 if request.param == "shared cores" else 0
    scenario = replace(FEW, shared_cores=shared)
    own, node = itertools.islice(Machines(scenario, REQUEST, loop), 2)
    coordinator = Coordinator(scenario.spec(), REQUEST, loop, own if shared else None)
    yield loop, coordinator, Outbox(coordinator, node)
    coordinator.close()


def test_messages_that_come_while_a_request_is_on_its_way_cost_one_more_request(
    outbox: tuple[EventLoop, Coordinator, Outbox],
):
    loop, coordinator, box = outbox
    answered: list[tuple[str, float]] = []

    def answer(name: str) -> None:
        answered.append((name, loop.now))
        if len(answered) == 6:
            loop.stop()

    for name in "abcdef":
        box.send(answer, name)
    loop.run()
    assert [name for name, _ in answered] == list("abcdef")
    assert answered[0][1] == pytest.approx(ALONE_S)
    assert [time for _, time in answered[1:]] == pytest.approx([2 * ALONE_S + 4 * 0.001] * 5)
    assert coordinator.requests == 2
    assert coordinator.cpu_s == pytest.approx(2 * 0.010 + 6 * 0.001)


def test_a_request_has_no_more_messages_than_a_node_sends_at_a_time(
    outbox: tuple[EventLoop, Coordinator, Outbox],
):
    loop, coordinator, box = outbox
    for number in range(2 + BATCH):
        box.send(lambda last: loop.stop() if last else None, number == 1 + BATCH)
    loop.run()
    assert coordinator.requests == 3


def test_requests_of_several_nodes_are_dealt_with_one_after_another(
    outbox: tuple[EventLoop, Coordinator, Outbox],
):
    loop, coordinator, box = outbox
    other = Outbox(coordinator, box.machine)
    times: list[float] = []

    def answer(_: object) -> None:
        times.append(loop.now)
        if len(times) == 2:
            loop.stop()

    box.send(answer)
    other.send(answer)
    loop.run()
    assert times == [pytest.approx(ALONE_S), pytest.approx(ALONE_S + 0.011)]


def test_a_client_that_is_sent_on_costs_time_once_and_stays_where_it_was_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PlacementIndex, "choose", lambda *_: "node2")
    scenario = replace(FEW, updates=2, clients=2, nodes=2, rounds=3, policy="round-robin", link_gbit=0.0)
    first, second, third = simulate(scenario, replace(FREE, redirect_s=0.5)).rounds
    assert 0.5 <= first.act_s < 0.6
    assert max(second.act_s, third.act_s) < 0.1


def test_clients_count_where_they_share_the_cores():
    scenario = replace(FEW, link_gbit=0.0)
    costs = replace(FREE, client_s=0.01)
    alone = simulate(scenario, costs).rounds[1]
    shared = simulate(replace(scenario, shared_cores=1), costs).rounds[1]
    assert (alone.cpu_s["clients"], shared.cpu_s["clients"]) == (0.0, pytest.approx(0.03))
    assert shared.act_s >= alone.act_s + 0.02 - 1e-3


def test_turns_are_taken_in_order_and_so_many_at_a_time():
    loop = EventLoop()
    host = Host(loop, 8)
    turns = Turns(host, Lane(1.0, 1.0), 2)
    ends: list[tuple[str, float]] = []

    def finish(name: str) -> None:
        ends.append((name, loop.now))
        if len(ends) == 3:
            loop.stop()

    for name in "abc":
        turns.start(1.0, finish, name)
    loop.run()
    assert ends == [("a", pytest.approx(1.0)), ("b", pytest.approx(1.0)), ("c", pytest.approx(2.0))]


def test_a_second_node_costs_one_transfer_of_its_partial_aggregate():
    scenario = replace(FEW, updates=2, nodes=2, policy="round-robin")
    each = simulate(scenario, FREE).rounds[1]
    # Upload and a pass on both, the transfer, and on the top a pass over the partial aggregate and its own sums.
    assert each.act_s == pytest.approx(LINK_S + READ_S + LINK_S + 2 * READ_S)
    assert (each.partial_bytes, each.model_bytes) == (40 * MB, 40 * MB)
    # The coordinator reads the model for its disk over the same link as the other node.
    assert each.round_s == pytest.approx(each.act_s + 2 * LINK_S)


def test_clients_with_a_slow_link_take_their_time():
    scenario = replace(FEW, client_mbit=100.0)
    assert simulate(scenario, FREE).rounds[1].act_s == pytest.approx(40 * MB * 8 / 100e6 + 3 * READ_S)


def test_with_its_defaults_it_comes_close_to_what_was_measured_on_one_node():
    """docs/performance.md: 20 x ResNet-18 on two cores that the clients share, 149 ms and 0.28 s of CPU.

    A node by itself has no coordinator to ask.
    """
    scenario = Scenario(updates=20, nodes=1, cores=(2,), shared_cores=2, link_gbit=0.0)
    prediction = predict(scenario, replace(Costs(), request_s=0, message_s=0, node_request_s=0, latency_s=0))
    assert prediction.act_s == pytest.approx(0.149, rel=0.15)
    assert prediction.cpu_s + prediction.clients_cpu_s == pytest.approx(0.28, rel=0.15)
    assert (prediction.nodes, prediction.aggregators, prediction.internode_bytes) == (1, 2, 0)
    assert prediction.lowest_act_s <= prediction.act_s <= prediction.highest_act_s


# --- what decides is the platform's code ---------------------------------------------------------------------


def test_when_clients_come_one_by_one_best_fit_uses_fewer_nodes_and_bytes_than_spreading():
    scenario = Scenario(updates=120, nodes=8, trace=MOBILE, client_mbit=100.0)
    found = {policy: simulate(replace(scenario, policy=policy), Costs()) for policy in POLICIES}
    for measure in ("nodes", "internode_bytes", "aggregators", "started", "total_cpu_s"):
        totals = {
            policy: sum(getattr(each, measure) for each in outcome.rounds) for policy, outcome in found.items()
        }
        assert totals["best-fit"] < totals["worst-fit"], measure
        assert totals["best-fit"] < totals["round-robin"], measure


def test_another_placement_code_gives_another_outcome(monkeypatch: pytest.MonkeyPatch):
    def choose_last(index: PlacementIndex, policy: Policy) -> str:
        return "node5"

    monkeypatch.setattr(PlacementIndex, "choose", choose_last)
    outcome = simulate(Scenario(policy="round-robin", rounds=2), Costs())
    assert set(outcome.placed) == {"node5"}
    assert {each.top for each in outcome.rounds} == {"node5"}


def test_another_planning_code_gives_other_aggregators(monkeypatch: pytest.MonkeyPatch):
    scenario = Scenario(updates=4, nodes=4, policy="round-robin", rounds=2, cores=(8,))
    assert simulate(scenario, Costs()).rounds[1].aggregators == 4
    monkeypatch.setattr(hierarchy, "plan_hierarchy", lambda *_, gather: Hierarchy(3))
    assert simulate(scenario, Costs()).rounds[1].aggregators == 12


def test_workers_are_started_once_used_again_and_stopped_when_idle():
    busy = simulate(Scenario(updates=20, nodes=1, rounds=4), Costs())
    assert [each.started for each in busy.rounds] == [8, 0, 0, 0]
    assert [each.reused for each in busy.rounds] == [1, 9, 9, 9]
    seldom = Scenario(updates=20, nodes=1, rounds=3, idle_s=2.0, trace=Trace("always-on", train_s=30.0))
    numbers = [number for _, number in simulate(seldom, Costs()).workers]
    assert numbers.count(0) >= 2 and max(numbers) == 8


# --- size ----------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_clients_are_simulated_in_seconds():
    scenario = Scenario(updates=100_000, clients=100_000, nodes=500, rounds=1, trace=Trace("poisson", rate=20_000))
    told: list[int] = []
    outcome = simulate(scenario, Costs(), told.append)
    assert outcome.rounds[0].accepted == sum(told) == 100_000
    assert outcome.seconds < 60


def test_many_nodes_spread_a_model_through_those_that_have_it():
    scenario = Scenario(updates=1000, clients=1000, nodes=1000, rounds=1, policy="round-robin")
    (each,) = simulate(scenario, Costs()).rounds
    one_after_another = 999 * scenario.model_bytes / 1.25e9
    assert each.round_s - each.act_s < one_after_another / 3


# --- cores and links -----------------------------------------------------------------------------------------


@given(
    works=st.lists(st.floats(0.01, 10), min_size=1, max_size=20),
    cores=st.floats(0.5, 8),
    cpu_s=st.floats(0.1, 2),
)
def test_a_host_is_never_idle_while_there_is_work_for_all_cores(works: list[float], cores: float, cpu_s: float):
    loop = EventLoop()
    host, lane, done = Host(loop, cores), Lane(cpu_s, 1 / cpu_s), []

    def finish(number: int) -> None:
        done.append((loop.now, number))
        if len(done) == len(works):
            loop.stop()

    for number, work in enumerate(works):
        host.start(lane, work, finish, number)
    loop.run()
    bound = max(max(works) * cpu_s, sum(works) * cpu_s / cores)
    assert bound * (1 - 1e-6) <= loop.now <= (sum(works) / cores + max(works)) * cpu_s * (1 + 1e-6)
    assert [works[number] for _, number in done] == sorted(works)


def test_cores_that_a_slow_transfer_leaves_go_to_others():
    loop = EventLoop()
    host, link = Host(loop, 2), Link(0.5)
    ends: dict[str, float] = {}

    def finish(name: str) -> None:
        ends[name] = loop.now
        if len(ends) == 4:
            loop.stop()

    slow, fast = Lane(1.0, 1.0, link), Lane(1.0, 1.0)
    host.start(slow, 1.0, finish, "slow")
    for name in "abc":
        host.start(fast, 1.0, finish, name)
    loop.run()
    # Half a core for the transfer, a half for each of the others; nobody is slowed down by the link but the first.
    assert ends == pytest.approx({"slow": 2.0, "a": 2.0, "b": 2.0, "c": 2.0})


def test_nothing_left_to_do_before_the_end_is_an_error_and_no_endless_loop():
    with pytest.raises(RuntimeError, match="standstill"):
        EventLoop().run()


# --- arrivals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_has_a_time_for_each_client_in_order(name: str):
    times = Trace(name, hibernation_s=60.0).times(1000, np.random.default_rng(3))
    assert len(times) == 1000
    assert min(times) >= 0 and list(times) == sorted(times)


def test_mobile_clients_come_over_a_minute_and_servers_at_about_the_same_time():
    spreads = {
        name: np.ptp(Trace(name, train_s=10.0).times(2000, np.random.default_rng(3)))
        for name in ("mobile", "always-on")
    }
    assert spreads["mobile"] > 50
    assert spreads["always-on"] < 10


def test_a_trace_of_a_file_is_used_as_it_is(tmp_path: Path):
    file = tmp_path / "trace.csv"
    file.write_text("seconds\n3.5\n1\n2\n")
    trace = parse_trace(str(file), 1.0, 1.0, 1.0, 3)
    assert list(trace.times(3, np.random.default_rng(0))) == [0.0, 1.0, 2.5]
    assert trace.describe() == "trace.csv"
    with pytest.raises(CommandError, match="has 3 arrivals"):
        parse_trace(str(file), 1.0, 1.0, 1.0, 4)


# --- costs ---------------------------------------------------------------------------------------------------


def test_costs_keep_their_values_and_sources_in_a_file(tmp_path: Path):
    costs = Costs().measured("here and now", fold_s_per_gb=0.03)
    write_costs(costs, tmp_path / "costs.json")
    read = read_costs(tmp_path / "costs.json")
    assert read == costs
    assert read.source("fold_s_per_gb") == "here and now"
    assert "performance.md" in read.source("start_s")


def test_a_file_from_before_there_were_requests_keeps_the_defaults_for_them(tmp_path: Path):
    (tmp_path / "costs.json").write_text(
        '{"format": "lifl-simulation-costs/1", "costs": {"message_s": {"value": 7e-6, "source": "then"}}}'
    )
    read = read_costs(tmp_path / "costs.json")
    assert read == replace(Costs(), message_s=7e-6)
    assert "--calibrate" in read.source("request_s")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": "something"}',
        '{"format": "lifl-simulation-costs/1", "costs": {"coffee": {"value": 1}}}',
        '{"format": "lifl-simulation-costs/1", "costs": {"start_s": 1}}',
        '{"format": "lifl-simulation-costs/1", "costs": {"start_s": {"value": -1}}}',
        '{"format": "lifl-simulation-costs/1", "costs": {"start_s": {"value": "1"}}}',
        '{"format": "lifl-simulation-costs/1", "costs": {"flow_gb_per_s": {"value": 0}}}',
    ],
)
def test_a_file_that_holds_no_costs_is_refused(content: str, tmp_path: Path):
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(CommandError, match="cannot be used"):
        read_costs(tmp_path / "costs.json")


# --- the command ---------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_of_80_columns(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["simulate", "--rounds", "2", "--trace", "mobile", "--over-selection", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert all(policy in printed for policy in POLICIES)
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed


def test_json_has_the_scenario_the_costs_and_every_round(capsys: pytest.CaptureFixture[str]):
    arguments = ["--policy", "best-fit", "--rounds", "2", "--updates", "30", "--nodes", "2", "-o", "json"]
    assert cli.main(["simulate", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    (policy,) = document["policies"]
    assert [each["accepted"] for each in policy["rounds"]] == [30, 30]
    assert sum(policy["updates"].values()) == policy["summary"]["accepted"] == 60
    assert document["scenario"]["nodes"] == 2
    assert document["costs"]["start_s"]["source"]


def test_a_report_has_its_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--rounds", "2", "--updates", "20", "--report", str(tmp_path / "report")]
    assert cli.main(["simulate", *arguments]) == 0
    files = {file.name: file for file in (tmp_path / "report").iterdir()}
    assert set(files) == {"report.txt", "results.json", "comparison.png", "workers.png", "rounds.png"}
    assert all(files[name].read_bytes().startswith(b"\x89PNG") for name in files if name.endswith(".png"))
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "10001"], "1 to 10,000 nodes"),
        (["--clients", "10"], "selects 60 clients, but there are 10"),
        (["--trace", "sometimes"], "unknown trace 'sometimes'"),
        (["--capacity", "many"], "--capacity takes numbers"),
        (["--capacity", "nan"], "numbers above 0"),
        (["--cores", "1.5"], "--cores takes whole numbers"),
        (["--quorum", "5"], "a quorum needs a deadline"),
        (["--quorum", "61", "--deadline", "1"], "above the number of updates"),
        (["--model", "gpt"], "unknown model 'gpt'"),
        (["--costs", "no-such-file"], "cannot be read"),
    ],
)
def test_what_cannot_be_simulated_is_said_with_a_hint(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["simulate", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Try this:" in error


def test_series_over_time_cover_the_whole_run():
    outcome = simulate(Scenario(trace=MOBILE, rounds=2), Costs())
    times, rates = arrivals_over_time(outcome)
    assert math.isclose(sum(rates) * (times[1] - times[0]), 120)
    times, workers = workers_over_time(outcome)
    assert times[-1] == outcome.simulated_s
    assert max(workers) <= outcome.peak_workers

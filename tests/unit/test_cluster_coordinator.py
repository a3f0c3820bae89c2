"""The coordinator of a cluster as its nodes see it, over all that can go wrong, and over restarts in between."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from lifl.cluster.coordinator import ClusterCoordinator
from lifl.cluster.journal import Journal
from lifl.cluster.members import Expired
from lifl.cluster.messages import (
    Counted,
    CountUpdate,
    EndUpload,
    FunctionFacts,
    JobBroken,
    MemberMessages,
    OrdersRequest,
    Placed,
    PlaceUpdate,
    RejectUpdate,
)
from lifl.errors import Refused
from lifl.messages import Acknowledged, DescribeNodes, JobSpec, Problem

from tests.unit.cluster_walk import (
    CLOCK,
    FUNCTION,
    JOB,
    PaperCluster,
    check_account,
    registration,
    snapshot,
)


def spec(**options: object) -> JobSpec:
    return JobSpec(name=JOB, function=FUNCTION, **{"goal": 6, "max_staleness": 3, **options})  # type: ignore[arg-type]


def rebuilt(cluster: PaperCluster) -> ClusterCoordinator:
    journal = Journal(cluster.path, CLOCK)
    try:
        return ClusterCoordinator(
            journal, cluster.now, own_address="coordinator:9000", lease_seconds=cluster.lease
        )
    finally:
        journal.close()


def work(cluster: PaperCluster) -> None:
    """Most nodes do most of what there is to do, so that rounds also complete."""
    rng = cluster.random
    for node in cluster.nodes.values():
        actions = (
            lambda node=node: cluster.poll(node),
            lambda node=node: cluster.upload(f"c{rng.randrange(14)}", node),
            lambda node=node: cluster.finish_upload(node),
            lambda node=node: cluster.flush_one(node),
            lambda node=node: cluster.send_partial(node),
            lambda node=node: cluster.finish(node),
            lambda node=node: cluster.fetch_model(node),
        )
        for action in actions:
            if rng.random() < 0.8:
                action()


def random_step(cluster: PaperCluster) -> None:
    rng = cluster.random
    node = rng.choice(list(cluster.nodes.values()))
    client = f"c{rng.randrange(14)}"
    actions = [
        (40, lambda: work(cluster)),
        (30, lambda: cluster.upload(client, node, here=rng.random() < 0.2)),
        (30, lambda: cluster.finish_upload(node)),
        (50, lambda: cluster.flush_one(node, lose_answer=rng.random() < 0.15)),
        (50, lambda: cluster.poll(node)),
        (30, lambda: cluster.send_partial(node)),
        (30, lambda: cluster.finish(node)),
        (15, lambda: cluster.fetch_model(node)),
        (3, cluster.store_checkpoint),
        (4, lambda: cluster.reject(node)),
        (3, lambda: cluster.kill(node)),
        (6, lambda: cluster.revive(node)),
        (1, lambda: cluster.leave(node)),
        (3, lambda: setattr(node, "is_cut_off", not node.is_cut_off)),
        (1, lambda: cluster.pass_time(rng.choice([0.5, 4.0, 11.0]))),
        (3, cluster.pass_lease),
        (1, lambda: cluster.coordinator.drain(node.name, rng.random() < 0.5) or cluster.commit()),
        (4, cluster.restart),
    ]
    (action,) = rng.choices([action for _, action in actions], [weight for weight, _ in actions])
    action()


def run_fairly(cluster: PaperCluster, rounds: int, steps: int = 400) -> None:
    """With nothing going wrong any more, rounds complete."""
    for node in cluster.nodes.values():
        node.is_cut_off = False
        cluster.revive(node)
        cluster.coordinator.drain(node.name, False)
        cluster.commit()
    wanted = len(cluster.models) + rounds
    for number in range(steps):
        if len(cluster.models) >= wanted:
            return
        for node in cluster.nodes.values():
            cluster.poll(node)
            cluster.upload(f"c{number % 14}", node)
            cluster.finish_upload(node)
            while node.queue:
                cluster.flush_one(node)
            cluster.poll(node)
            cluster.send_partial(node)
            cluster.finish(node)
        cluster.store_checkpoint()
        check_account(cluster.coordinator)
    raise AssertionError(f"no round completed: {cluster.job.round} {cluster.nodes}")


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("durability", ["async", "sync"])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_no_update_is_lost_or_counted_twice_and_a_restart_changes_nothing(
    tmp_path: Path, seed: int, durability: str, mode: str
) -> None:
    over_selection = 0.5 if mode == "sync" and seed % 2 else 0.0
    options = {"durability": durability, "mode": mode, "goal": 2 + seed % 5, "over_selection": over_selection}
    cluster = PaperCluster(tmp_path, spec(**options), 4, seed)
    for _ in range(350):
        random_step(cluster)
        check_account(cluster.coordinator)
        assert snapshot(rebuilt(cluster)) == snapshot(cluster.coordinator)
    run_fairly(cluster, 2)
    cluster.close()


@pytest.mark.parametrize("policy", ["first-fit", "worst-fit", "round-robin"])
def test_rounds_go_on_under_every_placement_and_behind_a_load_balancer(tmp_path: Path, policy: str) -> None:
    cluster = PaperCluster(tmp_path, spec(placement=policy, redirect=policy != "worst-fit"), 3, 5)
    for _ in range(500):
        random_step(cluster)
        check_account(cluster.coordinator)
    run_fairly(cluster, 2)
    cluster.close()


# --- single behaviours ---------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[PaperCluster]:
    made = PaperCluster(tmp_path, spec(goal=4), 3, 1)
    for node in made.nodes.values():
        made.poll(node)
    yield made
    made.close()


def count(cluster: PaperCluster, name: str, *clients: str) -> None:
    node = cluster.nodes[name]
    assert node.order is not None
    for client in clients:
        node.held[client] = 1.0
        order = node.order
        message = CountUpdate(JOB, order.nonce, order.round, order.attempt, client, 1.0)
        assert cluster.send(node, message) == Counted("accepted", order.round)


def close_round(cluster: PaperCluster) -> None:
    """`n0` is the top with two updates, `n1` and `n2` have one each."""
    count(cluster, "n0", "w", "x")
    count(cluster, "n1", "y")
    count(cluster, "n2", "z")
    for node in cluster.nodes.values():
        cluster.poll(node)


def finish_round(cluster: PaperCluster) -> None:
    for node in cluster.nodes.values():
        cluster.send_partial(node)
    top = cluster.nodes["n0"]
    while top.queue:
        cluster.flush_one(top)
    cluster.finish(top)
    cluster.flush_one(top)


def test_a_new_incarnation_replaces_the_old_one_which_never_comes_back(cluster: PaperCluster) -> None:
    count(cluster, "n1", "y")
    register = cluster.coordinator.register
    register(registration("n1", "n1.2"), cluster.now)
    assert cluster.job.round.accepted == 0
    with pytest.raises(Expired):
        cluster.send(cluster.nodes["n1"], DescribeNodes())
    with pytest.raises(Expired):
        register(registration("n1", "n1.1"), cluster.now)
    register(registration("n1", "n1.2"), cluster.now)
    assert len(cluster.coordinator.members) == 3


def test_a_lease_runs_from_the_last_request(cluster: PaperCluster) -> None:
    cluster.pass_time(6)
    cluster.poll(cluster.nodes["n0"])
    assert cluster.coordinator.next_timer(cluster.now) == cluster.now + 4
    cluster.pass_time(4)
    assert [member.name for member in cluster.coordinator.members.living] == ["n0"]


def test_after_a_restart_every_member_has_a_full_lease(cluster: PaperCluster) -> None:
    cluster.now += 9
    cluster.restart()
    cluster.pass_time(9)
    assert len(cluster.coordinator.members) == 3


@pytest.fixture
def quorate(tmp_path: Path) -> Iterator[PaperCluster]:
    """A round with a deadline after 5 s, and the two updates that suffice then."""
    made = PaperCluster(tmp_path, spec(goal=4, quorum=2, deadline=5.0), 1, 1, lease=100.0)
    made.poll(made.nodes["n0"])
    count(made, "n0", "w", "x")
    yield made
    made.close()


def run_timers(cluster: PaperCluster, until: float) -> None:
    """Let time pass as the timer's thread sees it: it wakes a moment after what it waits for."""
    for _ in range(10):
        due = cluster.coordinator.next_timer(cluster.now)
        if due is None or due > until:
            cluster.now = max(cluster.now, until)
            return
        if due > cluster.now:
            cluster.now = due + 0.001
        else:
            cluster.coordinator.tick(cluster.now)
            cluster.commit()
    raise AssertionError("the timer never sleeps")


def test_a_deadline_closes_a_round_without_any_request(quorate: PaperCluster) -> None:
    run_timers(quorate, quorate.now + 4.9)
    assert quorate.job.round.phase == "open"
    run_timers(quorate, quorate.now + 0.2)
    assert quorate.job.round.phase == "closing"


def test_a_deadline_without_the_quorum_is_not_waited_for_once_it_has_passed(tmp_path: Path) -> None:
    cluster = PaperCluster(tmp_path, spec(goal=4, quorum=2, deadline=5.0), 1, 1, lease=100.0)
    cluster.poll(cluster.nodes["n0"])
    count(cluster, "n0", "w")
    run_timers(cluster, cluster.now + 6)
    due = cluster.coordinator.next_timer(cluster.now)
    assert cluster.job.round.phase == "open"
    assert due is not None and due > cluster.now
    count(cluster, "n0", "x")
    assert cluster.job.round.phase == "closing"
    cluster.close()


def test_a_deadline_that_passed_while_the_coordinator_was_away_is_due_at_once(quorate: PaperCluster) -> None:
    quorate.now += 6
    quorate.restart()
    assert quorate.job.round.phase == "open"
    run_timers(quorate, quorate.now + 0.1)
    assert quorate.job.round.phase == "closing"


@pytest.mark.parametrize("now", [7.0, 500_000.0])
def test_with_another_clock_a_deadline_runs_anew_once(quorate: PaperCluster, now: float) -> None:
    quorate.clock, quorate.now = "another boot", now
    quorate.restart()
    quorate.commit()
    run_timers(quorate, now + 3)
    # It is the journal's clock from now on.
    quorate.restart()
    run_timers(quorate, now + 4.9)
    assert quorate.job.round.phase == "open"
    run_timers(quorate, now + 5.1)
    assert quorate.job.round.phase == "closing"
    assert quorate.job.round.first == now


def test_a_clock_that_was_set_back_under_the_same_name_puts_no_deadline_off(quorate: PaperCluster) -> None:
    quorate.now = 7.0
    quorate.restart()
    run_timers(quorate, 12.1)
    assert quorate.job.round.phase == "closing"


def test_a_retry_goes_to_the_node_where_the_update_was_placed(cluster: PaperCluster) -> None:
    places = [cluster.send(node, PlaceUpdate(JOB, 1, "x")) for node in cluster.nodes.values()]
    assert len({placed.node for placed in places}) == 1
    chosen = cluster.nodes[places[0].node]
    assert cluster.coordinator.members.node(chosen.name).placed == 1
    cluster.send(chosen, EndUpload(JOB, 1, "x"))
    assert cluster.coordinator.members.node(chosen.name).placed == 0


def test_worst_fit_spreads_updates_that_come_one_by_one(tmp_path: Path) -> None:
    cluster = PaperCluster(tmp_path, spec(placement="worst-fit"), 3, 1)
    for node in cluster.nodes.values():
        cluster.poll(node)
    for number in range(6):
        placed = cluster.send(cluster.nodes["n0"], PlaceUpdate(JOB, 1, f"c{number}"))
        count(cluster, placed.node, f"c{number}")
    assert sorted(share.updates for share in cluster.job.round.shares.values()) == [2, 2, 2]
    cluster.close()


def test_best_fit_keeps_updates_that_come_one_by_one_on_one_node(cluster: PaperCluster) -> None:
    for number in range(4):
        placed = cluster.send(cluster.nodes["n0"], PlaceUpdate(JOB, 1, f"c{number}"))
        count(cluster, placed.node, f"c{number}")
    assert len(cluster.job.round.shares) == 1


def test_updates_for_another_round_are_late_or_early(cluster: PaperCluster) -> None:
    node = cluster.nodes["n0"]
    assert cluster.send(node, PlaceUpdate(JOB, 2, "x")) == Placed("early", 1)
    close_round(cluster)
    assert cluster.send(node, PlaceUpdate(JOB, 1, "new")) == Placed("late", 2)
    assert cluster.send(node, PlaceUpdate(JOB, 1, "x")) == Placed("duplicate", 1)
    finish_round(cluster)
    assert cluster.send(node, PlaceUpdate(JOB, 1, "new")) == Placed("late", 2)


def test_nobody_is_asked_for_the_optimisers_arrays_before_there_are_any(cluster: PaperCluster) -> None:
    node = cluster.nodes["n0"]
    cluster.send(node, FunctionFacts(FUNCTION, False, 2))
    member = cluster.coordinator.members.node("n0")
    assert cluster.job.order_for(member, "coordinator:9000").model_sources == ("coordinator:9000",)
    assert cluster.job.order_for(member, "coordinator:9000").state_sources == ()


def test_a_request_that_its_own_repetition_has_overtaken_counts_nothing_again(cluster: PaperCluster) -> None:
    node = cluster.nodes["n1"]
    order = node.order
    assert order is not None
    of = (order.round, order.attempt)
    first = MemberMessages(
        node.incarnation, (CountUpdate(JOB, order.nonce, *of, "w", 1.0), RejectUpdate(JOB, *of, "w")), 1
    )
    second = MemberMessages(node.incarnation, (EndUpload(JOB, order.round, "w"),), 2)
    answer = partial(cluster.coordinator.answer, node.name, arrived=cluster.now, now=cluster.now)
    assert answer(first) == answer(first) == [Counted("accepted", order.round), Acknowledged()]
    assert answer(second) == [Acknowledged()]
    with pytest.raises(Refused, match="answered before"):
        answer(first)
    assert cluster.job.round.accepted == 0


def test_a_question_repeated_after_the_round_is_over_has_the_same_answer(cluster: PaperCluster) -> None:
    node = cluster.nodes["n0"]
    assert node.order is not None
    question = CountUpdate(JOB, node.order.nonce, 1, 0, "x", 1.0)
    close_round(cluster)
    finish_round(cluster)
    assert cluster.job.round.number == 2
    assert cluster.send(node, question) == Counted("accepted", 1)
    cluster.restart()
    assert cluster.send(node, question) == Counted("accepted", 1)
    assert cluster.send(cluster.nodes["n1"], question) == Counted("late", 2)


def test_a_top_cut_off_from_the_coordinator_cannot_finish_the_round(cluster: PaperCluster) -> None:
    close_round(cluster)
    for node in cluster.nodes.values():
        cluster.send_partial(node)
    cluster.nodes["n0"].is_cut_off = True
    cluster.pass_lease()
    assert (cluster.job.round.phase, cluster.job.round.accepted, cluster.job.round.lost) == ("open", 2, 2)
    cluster.nodes["n0"].is_cut_off = False
    cluster.finish(cluster.nodes["n0"])
    cluster.flush_one(cluster.nodes["n0"])  # 410, so it joins anew
    assert cluster.job.round.number == 1
    run_fairly(cluster, 1)


def test_a_middle_cut_off_from_the_coordinator_counts_if_the_top_has_its_sums(cluster: PaperCluster) -> None:
    close_round(cluster)
    cluster.send_partial(cluster.nodes["n1"])  # the top has it, and has not told so yet
    cluster.nodes["n1"].is_cut_off = True
    cluster.nodes["n2"].is_cut_off = True
    cluster.pass_lease()
    assert cluster.job.round.accepted == 4
    top = cluster.nodes["n0"]
    cluster.flush_one(top)
    cluster.poll(top)
    cluster.poll(top)
    round_ = cluster.job.round
    assert (round_.accepted, round_.lost, round_.is_reopened) == (3, 1, True)
    assert cluster.send(top, PlaceUpdate(JOB, 1, "z")) == Placed("open", 1, "n0", "http://n0:8080")


def test_a_model_lost_before_it_was_stored_takes_the_job_back(cluster: PaperCluster) -> None:
    close_round(cluster)
    finish_round(cluster)
    nonce = cluster.job.nonce
    assert (cluster.job.model_round, cluster.job.checkpointed_round) == (2, 1)
    cluster.leave(cluster.nodes["n0"])
    job = cluster.job
    assert (job.model_round, job.round.number, job.attempt, job.round.accepted) == (1, 1, 1, 0)
    assert job.nonce != nonce  # or clients would take a new model for the lost one, by its ETag
    assert snapshot(rebuilt(cluster)) == snapshot(cluster.coordinator)
    run_fairly(cluster, 2)


def test_a_model_that_another_node_has_is_not_lost_with_its_maker(cluster: PaperCluster) -> None:
    close_round(cluster)
    finish_round(cluster)
    for name in ("n1", "n2"):
        cluster.poll(cluster.nodes[name])
    cluster.fetch_model(cluster.nodes["n1"])
    cluster.flush_one(cluster.nodes["n1"])
    cluster.leave(cluster.nodes["n0"])
    assert (cluster.job.model_round, cluster.job.attempt) == (2, 0)
    cluster.poll(cluster.nodes["n2"])
    order = cluster.nodes["n2"].order
    assert order is not None and order.model_sources == ("n1:9000",)


def test_with_durable_models_the_next_round_opens_when_the_model_is_stored(tmp_path: Path) -> None:
    cluster = PaperCluster(tmp_path, spec(goal=4, durability="sync"), 3, 1)
    for node in cluster.nodes.values():
        cluster.poll(node)
    close_round(cluster)
    finish_round(cluster)
    cluster.poll(cluster.nodes["n1"])
    order = cluster.nodes["n1"].order
    assert order is not None
    assert (order.round, order.model_round, cluster.job.made_round) == (1, 1, 2)
    cluster.store_checkpoint()
    cluster.poll(cluster.nodes["n1"])
    order = cluster.nodes["n1"].order
    assert order is not None
    assert (order.round, order.model_round, order.model_sources) == (2, 2, ("n0:9000", "coordinator:9000"))
    cluster.close()


def test_a_gathering_function_has_all_updates_on_one_node(cluster: PaperCluster) -> None:
    cluster.send(cluster.nodes["n1"], FunctionFacts(FUNCTION, True, 0))
    homes = {
        cluster.send(node, PlaceUpdate(JOB, 1, f"{node.name}-{number}")).node
        for node in cluster.nodes.values()
        for number in range(3)
    }
    assert len(homes) == 1
    home = homes.pop()
    count(cluster, home, f"{home}-0")
    other = next(node for node in cluster.nodes.values() if node.name != home)
    assert other.order is not None
    answer = cluster.send(other, CountUpdate(JOB, other.order.nonce, 1, 0, "elsewhere", 1.0))
    assert isinstance(answer, Problem) and answer.status == 503


def test_the_top_stays_where_the_optimisers_state_is(cluster: PaperCluster) -> None:
    cluster.send(cluster.nodes["n0"], FunctionFacts(FUNCTION, False, 2))
    close_round(cluster)
    finish_round(cluster)
    for node in cluster.nodes.values():
        cluster.poll(node)
    count(cluster, "n1", "w", "x", "y", "z")
    cluster.poll(cluster.nodes["n0"])
    order = cluster.nodes["n0"].order
    assert order is not None
    assert (order.role, order.updates, order.partials) == ("top", 0, ("n1.1",))


def test_updates_wait_until_a_node_knows_the_function(tmp_path: Path) -> None:
    with_facts = PaperCluster(tmp_path, spec(), 1, 1)
    with_facts.coordinator.jobs.kinds.clear()
    answer = with_facts.send(with_facts.nodes["n0"], PlaceUpdate(JOB, 1, "x"))
    assert isinstance(answer, Problem) and answer.status == 503
    with_facts.close()


def test_a_job_that_no_node_can_go_on_with_fails_and_says_why(cluster: PaperCluster) -> None:
    count(cluster, "n1", "y")
    for name in ("n0", "n1"):
        cluster.send(cluster.nodes[name], JobBroken(JOB, 0, f"no memory on {name}"))
    assert (cluster.job.status, cluster.job.round.accepted) == ("running", 0)
    assert cluster.send(cluster.nodes["n0"], PlaceUpdate(JOB, 1, "x")).node == "n2"
    cluster.send(cluster.nodes["n2"], JobBroken(JOB, 0, "no memory on n2"))
    assert (cluster.job.status, cluster.job.detail) == ("failed", "no memory on n2")
    cluster.poll(cluster.nodes["n2"])
    order = cluster.nodes["n2"].order
    assert order is not None and (order.status, order.round) == ("failed", 0)


def test_the_last_round_completes_the_job_and_only_its_loss_brings_it_back(tmp_path: Path) -> None:
    cluster = PaperCluster(tmp_path, spec(goal=4, rounds=1), 3, 1)
    for node in cluster.nodes.values():
        cluster.poll(node)
    close_round(cluster)
    finish_round(cluster)
    assert (cluster.job.status, cluster.job.model_round, cluster.job.round) == ("complete", 2, None)
    assert snapshot(rebuilt(cluster)) == snapshot(cluster.coordinator)
    cluster.leave(cluster.nodes["n0"])
    assert (cluster.job.status, cluster.job.attempt) == ("running", 1)
    cluster.close()


def test_a_job_is_what_its_first_creation_says(cluster: PaperCluster) -> None:
    coordinator = cluster.coordinator
    assert coordinator.create_job(spec(goal=4)).job == JOB
    refusals = (
        (spec(goal=5), 409),
        (JobSpec("new", "unknown", 1), 422),
        (JobSpec("X", FUNCTION, 0), 422),
    )
    for other, status in refusals:
        with pytest.raises(Refused) as refused:
            coordinator.create_job(other)
        assert refused.value.status == status


def test_a_node_that_knows_a_job_which_is_gone_is_told_once(cluster: PaperCluster) -> None:
    coordinator, node = cluster.coordinator, cluster.nodes["n0"]
    seen = {JOB: 1 << 60, "gone": 5}
    for expected in (["deleted"], []):
        member = coordinator.note_request("n0", OrdersRequest(node.incarnation, seen), cluster.now, cluster.now)
        orders = coordinator.orders(member) or coordinator.no_orders(member)
        assert [order.status for order in orders.jobs] == expected
        seen |= {order.job: order.version for order in orders.jobs}


def test_counting_needs_no_new_orders(cluster: PaperCluster) -> None:
    coordinator = cluster.coordinator
    for node in cluster.nodes.values():
        cluster.poll(node)
    cluster.poll(cluster.nodes["n0"])
    count(cluster, "n0", "w", "x")
    member = coordinator.members.node("n0")
    assert coordinator.orders(member) is None

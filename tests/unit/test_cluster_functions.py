"""Functions that come with pods: how many nodes need one, and that updates only go where it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lifl.cluster.cluster_jobs import AWAY_SECONDS
from lifl.cluster.function_needs import FunctionNeed
from lifl.cluster.messages import (
    AttachedFunctions,
    Counted,
    CountUpdate,
    FunctionFacts,
    JobBroken,
    Placed,
    PlaceUpdate,
)
from lifl.errors import Refused
from lifl.messages import Acknowledged, JobSpec, Problem

from tests.unit.cluster_walk import FUNCTION, JOB, PaperCluster, PaperNode, check_account
from tests.unit.test_cluster_coordinator import random_step

IDLE = 60.0


def spec(**options: object) -> JobSpec:
    fields = {"name": JOB, "function": FUNCTION, "goal": 6, "max_staleness": 3, "idle_seconds": IDLE} | options
    return JobSpec(**fields)  # type: ignore[arg-type]


def need(cluster: PaperCluster) -> FunctionNeed:
    (found,) = cluster.coordinator.jobs.needs.describe()
    return found


def settle(cluster: PaperCluster) -> None:
    """Scale until nothing changes, and let everybody hear of it."""
    for _ in range(2 * len(cluster.nodes)):
        cluster.scale()
        for node in cluster.nodes.values():
            while node.queue:
                cluster.flush_one(node)
            cluster.poll(node)


def count(cluster: PaperCluster, node: PaperNode, client: str) -> object:
    assert node.order is not None
    order = node.order
    return cluster.send(node, CountUpdate(JOB, order.nonce, order.round, order.attempt, client, 1.0))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[PaperCluster]:
    made = PaperCluster(tmp_path, spec(), 3, 1, attaches=True)
    yield made
    made.close()


def idle(cluster: PaperCluster) -> None:
    """So much time passes that a job without clients is idle; all nodes go on to be heard of."""
    for _ in range(int(IDLE / cluster.lease) + 1):
        cluster.pass_lease()


def test_a_job_asks_for_as_many_nodes_as_its_plan_has_and_an_idle_one_for_none(cluster: PaperCluster) -> None:
    # Each node can take four updates at once: six need two nodes.
    assert (need(cluster).wanted, need(cluster).nodes) == (2, ())
    settle(cluster)
    assert (need(cluster).wanted, len(need(cluster).nodes)) == (2, 2)
    assert set(need(cluster).needed_on) == set(need(cluster).nodes)
    idle(cluster)
    assert (need(cluster).wanted, need(cluster).jobs) == (0, ())
    settle(cluster)
    assert need(cluster).nodes == ()


def test_the_first_client_of_an_idle_job_is_asked_to_wait_and_brings_the_function_back(
    cluster: PaperCluster,
) -> None:
    idle(cluster)
    version = cluster.coordinator.jobs.needs.version
    node = cluster.nodes["n0"]
    answer = cluster.send(node, PlaceUpdate(JOB, 1, "c1"))
    assert isinstance(answer, Problem)
    assert (answer.status, answer.title, answer.retry_after) == (503, "function not here yet", 1.0)
    assert need(cluster).wanted == 2
    assert cluster.coordinator.jobs.needs.version > version
    pauses = []
    while sum(pauses) < 35.0:
        pauses.append(cluster.send(node, PlaceUpdate(JOB, 1, "c1")).retry_after)
        cluster.now += pauses[-1]
    assert len(pauses) <= 6  # as often as a client tries
    settle(cluster)
    answer = cluster.send(node, PlaceUpdate(JOB, 1, "c1"))
    assert isinstance(answer, Placed)
    assert answer.node in need(cluster).nodes


def test_updates_go_only_to_nodes_that_have_the_function_whichever_these_are(cluster: PaperCluster) -> None:
    cluster.attach(cluster.nodes["n2"], True)
    cluster.flush_one(cluster.nodes["n2"])
    asking = cluster.nodes["n0"]
    # More than it has room for: nevertheless they go nowhere else.
    for number in range(6):
        for here in (False, True):
            placed = cluster.send(asking, PlaceUpdate(JOB, 1, f"c{number}", here))
            assert (placed.status, placed.node) == ("open", "n2")
    # One more pod is still wanted; that one came up elsewhere than planned does not change how many.
    assert need(cluster).wanted == 2
    assert need(cluster).needed_on[0] == "n2"


def test_what_a_job_uses_is_not_given_up_before_it_is_idle(cluster: PaperCluster) -> None:
    settle(cluster)
    node = cluster.nodes[need(cluster).nodes[0]]
    cluster.send(node, PlaceUpdate(JOB, 1, "c1", here=True))
    assert count(cluster, node, "c1") == Counted("accepted", 1)
    for _ in range(3):
        idle(cluster)
    assert need(cluster).busy == (node.name,)
    assert node.name in need(cluster).needed_on


def test_a_function_that_goes_away_takes_no_update_with_it_that_was_not_counted(cluster: PaperCluster) -> None:
    settle(cluster)
    first, second = (cluster.nodes[name] for name in need(cluster).nodes)
    assert cluster.send(first, PlaceUpdate(JOB, 1, "c1", here=True)).node == first.name
    cluster.send(first, AttachedFunctions(()))
    answer = count(cluster, first, "c1")
    assert isinstance(answer, Problem) and answer.status == 503
    assert cluster.send(first, PlaceUpdate(JOB, 1, "c1", here=True)).node == second.name
    check_account(cluster.coordinator)


def test_a_repeated_question_about_an_update_that_counts_is_answered_alike_without_the_function(
    cluster: PaperCluster,
) -> None:
    settle(cluster)
    node = cluster.nodes[need(cluster).nodes[0]]
    assert count(cluster, node, "c1") == Counted("accepted", 1)
    cluster.send(node, AttachedFunctions(()))
    assert count(cluster, node, "c1") == Counted("accepted", 1)


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_node_with_updates_is_given_up_when_their_function_does_not_come_back(
    cluster: PaperCluster, comes_back: bool
) -> None:
    settle(cluster)
    node = cluster.nodes[need(cluster).nodes[0]]
    assert count(cluster, node, "c1") == Counted("accepted", 1)
    cluster.send(node, AttachedFunctions(()))
    assert cluster.coordinator.next_timer(cluster.now) is not None
    for _ in range(int(AWAY_SECONDS / cluster.lease) - 1):
        cluster.pass_lease()
    assert cluster.job.round.accepted == 1
    if comes_back:
        cluster.send(node, AttachedFunctions((FUNCTION,)))
    for _ in range(2):
        cluster.pass_lease()
    assert cluster.job.round.accepted == (1 if comes_back else 0)
    assert node.life == (1 if comes_back else 2)


def test_after_a_restart_nodes_have_what_they_had_until_they_tell(cluster: PaperCluster) -> None:
    settle(cluster)
    name = need(cluster).nodes[0]
    cluster.restart()
    node = cluster.nodes[name]
    assert cluster.send(node, PlaceUpdate(JOB, 1, "c1", here=True)).node == name
    assert need(cluster).nodes == ()  # nobody has said so yet
    for other in cluster.nodes.values():
        cluster.send(other, AttachedFunctions((FUNCTION,) if other.has_function else ()))
    assert name in need(cluster).nodes
    assert need(cluster).wanted == 2


def test_a_function_that_cannot_be_imported_fails_its_job_and_another_version_is_given_a_chance(
    tmp_path: Path,
) -> None:
    cluster = PaperCluster(tmp_path, spec(), 1, 1, attaches=True)
    node = cluster.nodes["n0"]
    cluster.send(node, FunctionFacts(FUNCTION, False, 0, "no module named nowhere"))
    cluster.send(node, AttachedFunctions((FUNCTION,)))
    assert cluster.job.status == "failed"
    assert (need(cluster).wanted, need(cluster).nodes) == (0, ())
    assert need(cluster).failures == {"n0": "no module named nowhere"}
    other = JobSpec("other", FUNCTION, 2)
    with pytest.raises(Refused, match="nowhere"):
        cluster.coordinator.create_job(other)
    assert cluster.send(node, FunctionFacts(FUNCTION, False, 0)) == Acknowledged()
    cluster.coordinator.create_job(other)
    assert (need(cluster).wanted, need(cluster).nodes) == (1, ("n0",))
    cluster.restart()
    assert cluster.coordinator.members.node("n0").failures == {}
    cluster.close()


def test_nodes_that_cannot_be_used_are_not_counted_on(cluster: PaperCluster) -> None:
    settle(cluster)
    for name in ("n0", "n1"):
        cluster.coordinator.drain(name, True)
    assert (need(cluster).wanted, need(cluster).needed_on) == (1, ("n2",))
    cluster.coordinator.drain("n0", False)
    cluster.send(cluster.nodes["n0"], JobBroken(JOB, 0, "no memory"))
    assert need(cluster).needed_on == ("n2",)


def test_shards_ask_for_a_node_each_if_there_are_so_many(tmp_path: Path) -> None:
    cluster = PaperCluster(tmp_path, spec(), 3, 1, attaches=True)
    cluster.coordinator.delete_job(JOB)
    cluster.coordinator.create_job(JobSpec("large", FUNCTION, 2, shards=2))
    assert (need(cluster).wanted, need(cluster).jobs) == (2, ("large",))
    cluster.coordinator.model_installed("large", cluster.coordinator.jobs.sharded.by_name["large"].nonce, 0.0)
    shards = cluster.coordinator.jobs.sharded.by_name["large"].shards
    for name in ("n2", "n1"):
        cluster.send(cluster.nodes[name], AttachedFunctions((FUNCTION,)))
        assert need(cluster).wanted == 2
    assert {job.name_of(job.home_node) for job in shards} == {"n1", "n2"}
    cluster.close()


def test_a_cluster_whose_nodes_start_functions_themselves_needs_them_where_its_plan_is(tmp_path: Path) -> None:
    cluster = PaperCluster(tmp_path, spec(), 3, 1)
    assert (need(cluster).wanted, need(cluster).nodes) == (2, ("n0", "n1", "n2"))
    assert cluster.coordinator.jobs.next_sleep(cluster.now) is None
    cluster.close()


def run_scaled(cluster: PaperCluster, rounds: int) -> None:
    """With pods as they are wanted, and nothing else going wrong, rounds complete."""
    for node in cluster.nodes.values():
        node.is_cut_off = False
        cluster.revive(node)
        cluster.coordinator.drain(node.name, False)
        cluster.commit()
    wanted = len(cluster.models) + rounds
    for number in range(400):
        if len(cluster.models) >= wanted:
            return
        settle(cluster)
        for node in cluster.nodes.values():
            cluster.upload(f"c{number % 14}", node)
            cluster.finish_upload(node)
            while node.queue:
                cluster.flush_one(node)
            cluster.poll(node)
            cluster.send_partial(node)
            cluster.finish(node)
        cluster.store_checkpoint()
        cluster.pass_lease()
        check_account(cluster.coordinator)
        check_needs(cluster)
    raise AssertionError(f"no round completed: {cluster.job.round} {need(cluster)} {cluster.nodes}")


def check_needs(cluster: PaperCluster) -> None:
    """Nothing that has updates is left without pods, and no update is on its way to where the function is not."""
    found, job = need(cluster), cluster.job
    living = {member.name for member in cluster.coordinator.members.living}
    assert found.wanted == len(found.needed_on) <= len(living)
    assert set(found.busy) & living <= set(found.needed_on)
    if job.is_awake and any(map(job.may_need, cluster.coordinator.members.living)):
        assert found.wanted
    for placed in job.round.placements.values() if job.round is not None else ():
        member = cluster.coordinator.members.find(placed.member)
        assert member is not None and member.has_function(FUNCTION)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("seed", range(8))
def test_pods_that_come_and_go_lose_no_update_unnoticed_and_rounds_go_on(
    tmp_path: Path, seed: int, mode: str
) -> None:
    cluster = PaperCluster(tmp_path, spec(mode=mode, goal=2 + seed % 5), 4, seed, attaches=True)
    for _ in range(350):
        if cluster.random.random() < 0.3:
            cluster.scale()
        if cluster.random.random() < 0.03:
            cluster.attach(cluster.random.choice(list(cluster.nodes.values())), cluster.random.random() < 0.5)
        random_step(cluster)
        check_account(cluster.coordinator)
        check_needs(cluster)
    run_scaled(cluster, 2)
    cluster.close()

"""Whole rounds through agent, coordinator, zygote and workers, with the test process as the gateway."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lifl.messages import (
    Abandon,
    Acknowledged,
    Admit,
    Commit,
    DeleteJob,
    DescribeLatencies,
    DescribeUpdates,
    Latencies,
    Problem,
    RoundUpdates,
    Verdict,
)
from lifl.slot import slot_reference

from tests.integration.platform_harness import Platform, until

MODEL = {"layer.weight": np.zeros((50, 101), np.float32), "layer.bias": np.zeros(101, np.float32)}
SIZE = sum(array.size for array in MODEL.values())


def random_update(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


def weighted_mean(updates: list[np.ndarray], weights: list[float]) -> np.ndarray:
    return np.average(np.stack(updates).astype(np.float64), axis=0, weights=weights)


def assert_close(result: np.ndarray, updates: list[np.ndarray], weights: list[float]) -> None:
    scale = np.average(np.abs(np.stack(updates)).astype(np.float64), axis=0, weights=weights)
    assert np.max(np.abs(result - weighted_mean(updates, weights)) / scale) < 1e-6


@pytest.fixture
def platform(tmp_path: Path, data_plane: str) -> Iterator[Platform]:
    with Platform(tmp_path, data_plane) as platform:
        yield platform


@pytest.mark.parametrize("timing", ["eager", "lazy"])
def test_three_rounds_give_the_weighted_mean_of_each(platform: Platform, timing: str):
    platform.create_job(MODEL, goal=6, timing=timing)
    for round_number in range(1, 4):
        updates = [random_update(10 * round_number + client) for client in range(6)]
        weights = [1.0 + 3 * client for client in range(6)]
        for client, (update, weight) in enumerate(zip(updates, weights, strict=True)):
            verdict = platform.submit(f"client-{client}", update.tobytes(), round_number, weight)
            assert isinstance(verdict, Verdict)
            assert verdict.status == "accepted"
        state = platform.wait_for_round(round_number + 1)
        assert state.status == "running", state.detail
        assert_close(platform.model(), updates, weights)
    platform.wait_for_all_slots()


def test_a_pool_of_few_slots_serves_a_round_of_many_updates(platform: Platform):
    platform.create_job(MODEL, goal=50, slots=3)
    updates = [random_update(client) for client in range(50)]
    for client, update in enumerate(updates):
        platform.submit(str(client), update.tobytes())
    platform.wait_for_round(2)
    assert_close(platform.model(), updates, [1.0] * 50)
    platform.wait_for_all_slots()


def test_differences_to_the_model_and_whole_models_mix(platform: Platform):
    base = random_update(99)
    start = {"a": base[:50].reshape(5, 10), "b": base[50:]}
    platform.create_job(start, goal=3)
    flat = np.concatenate([start["a"].ravel(), start["b"].ravel()])
    whole, first, second = random_update(1), random_update(2), random_update(3)
    platform.submit("whole", whole.tobytes(), num_samples=2.0)
    platform.submit("first", first.tobytes(), num_samples=3.0, is_delta=True)
    platform.submit("second", second.tobytes(), num_samples=5.0, is_delta=True)
    platform.wait_for_round(2)
    expected = weighted_mean([whole, flat + first, flat + second], [2.0, 3.0, 5.0])
    assert np.max(np.abs(platform.model() - expected)) < 1e-5


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_rejected_by_client_and_leaves_the_model_alone(platform, poison):
    platform.create_job(MODEL, goal=4)
    bad = random_update(7)
    bad[SIZE - 1] = poison
    updates = [random_update(client) for client in range(4)]
    platform.submit("bad", bad.tobytes())
    for client, update in enumerate(updates):
        platform.submit(str(client), update.tobytes())
    until(lambda: platform.describe().model_round == 2 or platform.describe().current.rejected == 1)
    if platform.describe().model_round == 1:
        # The bad one was counted first, so the fourth good one came too late and is wanted again.
        platform.submit("3", updates[3].tobytes())
    state = platform.wait_for_round(2)
    assert state.last.rejected_clients == ("bad",)
    assert_close(platform.model(), updates, [1.0] * 4)
    platform.wait_for_all_slots()


def test_updates_that_overflow_only_together_lose_the_heaviest(tmp_path: Path, data_plane: str):
    with Platform(tmp_path, data_plane, cores=1) as platform:
        platform.create_job(MODEL, goal=5)
        huge = np.full(SIZE, 3e38, np.float32)
        small = [random_update(1), random_update(2), random_update(3), random_update(4)]
        platform.submit("a", small[0].tobytes())
        platform.submit("huge-1", huge.tobytes())
        platform.submit("huge-2", huge.tobytes())
        until(lambda: platform.describe().current.rejected, what="rejection")
        for client, update in zip("bcd", small[1:], strict=True):
            platform.submit(client, update.tobytes())
        state = platform.wait_for_round(2)
        assert state.last.accepted == 5
        assert state.last.rejected_clients[0].startswith("huge")
        assert_close(platform.model(), [huge, *small], [1.0] * 5)


def test_updates_that_overflow_together_but_not_in_the_mean_all_count(tmp_path: Path, data_plane: str):
    with Platform(tmp_path, data_plane, cores=1) as platform:
        platform.create_job(MODEL, goal=3, timing="lazy")  # so that one pass makes the model of all three
        huge = np.full(SIZE, 3e38, np.float32)
        small = random_update(1)
        platform.submit("a", small.tobytes())
        platform.submit("huge-1", huge.tobytes())
        platform.submit("huge-2", huge.tobytes())
        state = platform.wait_for_round(2)
        assert (state.last.accepted, state.last.folded, state.last.rejected) == (3, 3, 0)
        assert_close(platform.model(), [huge, huge, small], [1.0] * 3)
        platform.wait_for_all_slots()


def test_an_update_that_is_not_finite_is_found_though_all_come_in_one_pass(tmp_path: Path, data_plane: str):
    with Platform(tmp_path, data_plane, cores=1) as platform:
        platform.create_job(MODEL, goal=3, timing="lazy")
        updates = [random_update(client) for client in range(3)]
        broken = updates[1].copy()
        broken[SIZE // 2] = np.nan
        for client, update in enumerate([updates[0], broken, updates[2]]):
            platform.submit(str(client), update.tobytes())
        until(lambda: platform.describe().current.rejected, what="rejection")
        platform.submit("1", updates[1].tobytes())
        state = platform.wait_for_round(2)
        assert (state.last.accepted, state.last.rejected_clients) == (3, ("1",))
        assert_close(platform.model(), updates, [1.0] * 3)
        platform.wait_for_all_slots()


@pytest.mark.parametrize("victims", ["one", "all"])
@pytest.mark.parametrize("moment", ["before", "between", "closing"])
def test_killed_workers_lose_and_double_nothing(platform: Platform, victims: str, moment: str):
    platform.create_job(MODEL, goal=12)
    updates = [random_update(client) for client in range(12)]
    weights = [1.0 + client for client in range(12)]

    def kill() -> None:
        workers = until(platform.workers, what="workers")
        for pid in workers if victims == "all" else workers[:1]:
            os.kill(pid, signal.SIGKILL)

    for client in range(12):
        if client == 1 and moment == "before":
            kill()
        if client == 7 and moment == "between":
            until(lambda: platform.describe().current.folded >= 4, what="folds")
            kill()
        platform.submit(str(client), updates[client].tobytes(), num_samples=weights[client])
    if moment == "closing":
        kill()
    state = platform.wait_for_round(2)
    assert state.status == "running", state.detail
    assert_close(platform.model(), updates, weights)
    platform.wait_for_all_slots()


def test_workers_killed_again_and_again_while_updates_come_lose_nothing(platform: Platform):
    platform.create_job(MODEL, goal=40, slots=8)
    updates = [random_update(client) for client in range(40)]
    for client, update in enumerate(updates):
        platform.submit(str(client), update.tobytes())
        if client % 10 == 9:
            for pid in platform.workers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    state = platform.wait_for_round(2)
    assert state.status == "running", state.detail
    assert_close(platform.model(), updates, [1.0] * 40)
    platform.wait_for_all_slots()


def test_a_killed_agent_comes_back_and_the_round_goes_on(platform: Platform):
    platform.create_job(MODEL, goal=10)
    updates = [random_update(client) for client in range(10)]
    for client in range(5):
        platform.submit(str(client), updates[client].tobytes())
    agent = platform.processes["agent"]
    agent.kill()
    agent.wait()
    agent.stdout.close()
    platform.start_agent()
    platform.rejoin()
    for client in range(5, 10):
        platform.submit(str(client), updates[client].tobytes())
    state = platform.wait_for_round(2)
    assert state.status == "running", state.detail
    assert_close(platform.model(), updates, [1.0] * 10)
    platform.wait_for_all_slots()


def test_a_gateway_that_dies_before_it_sends_leaves_its_updates_to_the_coordinator(platform: Platform):
    platform.create_job(MODEL, goal=5)
    updates = [random_update(client) for client in range(5)]
    platform.submit("0", updates[0].tobytes())
    until(lambda: platform.describe().current.folded == 1, what="a worker that is assigned")
    destinations = [
        platform.submit(str(client), updates[client].tobytes(), send=False).destination for client in (1, 2, 3)
    ]
    assert any(destinations), "the coordinator left nothing to the gateway, so nothing is tested"
    platform.connection.close()
    until(lambda: platform.describe().current.folded == 4, what="descriptors from the coordinator")
    platform.rejoin()
    platform.submit("4", updates[4].tobytes())
    platform.wait_for_round(2)
    assert_close(platform.model(), updates, [1.0] * 5)
    platform.wait_for_all_slots()


def test_a_commit_of_a_gateway_that_was_replaced_is_refused(platform: Platform):
    platform.create_job(MODEL, goal=1)
    former = platform.gateway
    platform.connection.close()
    platform.rejoin()
    stale = Commit("job", 1, "a", "id", slot_reference(platform.updates_pool, 0), 1, 1.0, 0.0, former)
    answer = platform.ask(stale)
    assert isinstance(answer, Problem)
    assert answer.status == 503
    assert platform.describe().current.accepted == 0


def test_the_quorum_closes_a_round_after_its_deadline(platform: Platform):
    platform.create_job(MODEL, goal=5, quorum=2, deadline=1.0)
    updates = [random_update(client) for client in range(2)]
    for client, update in enumerate(updates):
        platform.submit(str(client), update.tobytes())
    assert platform.describe().model_round == 1
    state = platform.wait_for_round(2)
    assert state.last.accepted == 2
    assert_close(platform.model(), updates, [1.0] * 2)


def test_an_idle_job_keeps_no_worker_and_no_memory_and_wakes_up_again(platform: Platform):
    platform.create_job(MODEL, goal=2, idle_seconds=0.3)
    for round_number in (1, 2):
        updates = [random_update(10 * round_number + client) for client in range(2)]
        for client, update in enumerate(updates):
            platform.ask(Admit("job", round_number, str(client), "id", platform.gateway))
            platform.submit(str(client), update.tobytes(), round_number)
        platform.wait_for_round(round_number + 1)
        assert_close(platform.model(), updates, [1.0] * 2)
        until(lambda: not platform.workers(), what="end of the workers")
        memory = platform.pools[platform.updates_pool]
        until(lambda pool=memory: platform.pool_pages(pool) == 0, what="return of the memory")


def test_a_restarted_coordinator_goes_on_with_the_right_round(platform: Platform):
    platform.create_job(MODEL, goal=2)
    updates = [random_update(client) for client in range(4)]
    for client in range(2):
        platform.submit(str(client), updates[client].tobytes())
    until(lambda: platform.describe().checkpointed_round == 2, what="checkpoint")
    platform.submit("0", updates[2].tobytes(), 2)
    platform.restart_everything()
    state = until(lambda: state if (state := platform.describe()).status == "running" else None)
    assert (state.round, state.current.accepted) == (2, 0)
    assert_close(platform.model(), updates[:2], [1.0] * 2)
    platform.updates_pool = state.updates_pool
    until(lambda: platform.take_pools() or state.updates_pool in platform.pools, what="pool")
    for client in range(2):
        platform.submit(str(client), updates[2 + client].tobytes(), 2)
    platform.wait_for_round(3)
    assert_close(platform.model(), updates[2:], [1.0] * 2)


def test_a_function_that_dies_on_every_update_fails_the_job_and_says_so(tmp_path: Path, data_plane: str):
    file = tmp_path / "deadly.py"
    file.write_text(
        "import os\nfrom lifl import aggregator\n\n@aggregator\ndef deadly(total, update):\n    os._exit(3)\n"
    )
    with Platform(tmp_path, data_plane, function="deadly", function_file=file) as platform:
        platform.create_job(MODEL, goal=2)
        platform.submit("a", random_update(1).tobytes())
        state = until(lambda: state if (state := platform.describe()).status == "failed" else None)
        assert "died 5 times" in state.detail


@pytest.mark.parametrize("function", ["median", "fedadam"])
def test_gathering_functions_and_server_optimisers_run_two_rounds(tmp_path: Path, data_plane: str, function: str):
    with Platform(tmp_path, data_plane, function=function) as platform:
        platform.create_job(MODEL, goal=5)
        for round_number in (1, 2):
            before = platform.model()
            updates = [random_update(10 * round_number + client) for client in range(5)]
            for client, update in enumerate(updates):
                platform.submit(str(client), update.tobytes(), round_number)
            state = platform.wait_for_round(round_number + 1)
            assert state.status == "running", state.detail
            after = platform.model()
            if function == "median":
                assert np.allclose(after, np.median(np.stack(updates), axis=0))
            else:
                assert (
                    np.all(np.sign(after - before) == np.sign(weighted_mean(updates, [1.0] * 5) - before))
                    or round_number > 1
                )
                assert not np.allclose(after, weighted_mean(updates, [1.0] * 5))
        platform.wait_for_all_slots()


def test_workers_killed_before_they_have_joined_are_replaced(platform: Platform):
    """Whatever the instant of its death, the agent notices: the connection is older than the worker."""
    platform.create_job(MODEL, goal=4)
    updates = [random_update(client) for client in range(4)]
    platform.submit("0", updates[0].tobytes())
    end = time.monotonic() + 0.3
    killed: set[int] = set()
    while time.monotonic() < end and len(killed) < 3:
        for pid in set(platform.workers()) - killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    assert killed
    for client in range(1, 4):
        platform.submit(str(client), updates[client].tobytes())
    state = platform.wait_for_round(2)
    assert state.status == "running", state.detail
    assert_close(platform.model(), updates, [1.0] * 4)


def test_a_job_deleted_in_the_middle_of_a_round_is_gone_and_its_name_is_free(platform: Platform):
    for _ in range(3):
        platform.create_job(MODEL, goal=8)
        for client in range(6):
            platform.submit(str(client), random_update(client).tobytes())
        assert isinstance(platform.ask(DeleteJob("job")), Acknowledged)
        assert isinstance(platform.describe(), Problem)
        platform.busy.clear()
        until(lambda: not platform.workers(), what="end of the workers")
    platform.create_job(MODEL, goal=1)
    platform.submit("a", random_update(1).tobytes())
    platform.wait_for_round(2)


def test_a_job_does_not_go_idle_while_an_update_is_on_its_way(platform: Platform):
    platform.create_job(MODEL, goal=1, idle_seconds=0.2)
    assert platform.ask(Admit("job", 1, "slow", "id", platform.gateway)).status == "open"
    pool = platform.pools[platform.updates_pool]
    pool.payload(0)[:4] = b"half"
    time.sleep(0.6)  # several times the idle time
    assert bytes(pool.payload(0)[:4]) == b"half"
    assert isinstance(platform.ask(Abandon("job", 1, "client", platform.gateway)), Acknowledged)
    until(lambda: platform.pool_pages(pool) == 0, what="return of the memory")


def test_an_optimiser_goes_on_after_a_restart_as_if_nothing_had_happened(tmp_path: Path, data_plane: str):
    updates = [[random_update(10 * number + client) for client in range(2)] for number in range(3)]
    results = []
    for restart in (False, True):
        with Platform(tmp_path / str(restart), data_plane, function="fedadam") as platform:
            platform.create_job(MODEL, goal=2)
            for number in range(1, 4):
                for client in range(2):
                    platform.submit(str(client), updates[number - 1][client].tobytes(), number)
                platform.wait_for_round(number + 1)
                until(lambda n=number: platform.describe().checkpointed_round == n + 1, what="checkpoint")
                if restart and number == 2:
                    platform.restart_everything()
                    until(lambda: platform.describe().status == "running")
                    platform.updates_pool = platform.describe().updates_pool
                    until(lambda: platform.take_pools() or platform.updates_pool in platform.pools)
            results.append(platform.model())
    assert np.array_equal(*results)


def test_reports_lost_with_the_agent_do_not_have_updates_counted_twice(platform: Platform):
    """The agent dies again and again while workers fold; what they had sealed is never folded anew."""
    platform.create_job(MODEL, goal=30)
    updates = [random_update(client) for client in range(30)]
    weights = [1.0 + client for client in range(30)]
    for client in range(30):
        platform.submit(str(client), updates[client].tobytes(), num_samples=weights[client])
        if client % 7 == 6:
            agent = platform.processes["agent"]
            agent.kill()
            agent.wait()
            agent.stdout.close()
            platform.start_agent()
            platform.rejoin()
    state = platform.wait_for_round(2)
    assert state.status == "running", state.detail
    assert_close(platform.model(), updates, weights)
    platform.wait_for_all_slots()


# --- times of updates ----------------------------------------------------------------------------------------


def updates_of(platform: Platform, number: int) -> RoundUpdates:
    answer = platform.ask(DescribeUpdates("job", number))
    assert isinstance(answer, RoundUpdates), answer
    return answer


@pytest.mark.parametrize("function", ["fedavg", "median"])
def test_the_times_of_each_update_are_told_while_the_round_is_open_and_after(
    tmp_path: Path, data_plane: str, function: str
):
    with Platform(tmp_path, data_plane, function=function) as platform:
        platform.create_job(MODEL, goal=4)
        begin = time.monotonic()
        platform.submit("0", random_update(0).tobytes(), num_samples=3.0)
        told = updates_of(platform, 1)
        assert (told.status, told.total, told.updates[0].client) == ("open", 1, "0")
        assert abs(told.time - time.time()) < 5
        for client in range(1, 4):
            platform.submit(str(client), random_update(client).tobytes())
        state = platform.wait_for_round(2)
        told = updates_of(platform, 1)
        assert (told.status, told.next) == ("complete", 0)
        assert [(update.client, update.num_samples) for update in told.updates] == [
            ("0", 3.0),
            ("1", 1.0),
            ("2", 1.0),
            ("3", 1.0),
        ]
        for update in told.updates:
            assert update.status == "folded"
            assert begin <= update.first_byte < update.folded <= told.monotonic
            assert update.latency == update.folded - update.first_byte
        latencies = sorted(update.latency for update in told.updates)
        last = state.last
        assert (last.latency_median, last.latency_p95, last.latency_max) == (latencies[1], *[latencies[3]] * 2)
        counted = platform.ask(DescribeLatencies())
        assert isinstance(counted, Latencies)
        assert sum(counted.jobs[0].counts) == 4
        assert counted.jobs[0].seconds == pytest.approx(sum(latencies))


def test_a_rejected_update_is_told_as_such_and_has_no_time(platform: Platform):
    platform.create_job(MODEL, goal=2)
    bad = random_update(7)
    bad[0] = np.nan
    platform.submit("bad", bad.tobytes())
    until(lambda: platform.describe().current.rejected, what="rejection")
    platform.submit("good", random_update(1).tobytes())
    until(lambda: platform.describe().current.folded == 1, what="fold")
    told = updates_of(platform, 1)
    assert [(update.client, update.status) for update in told.updates] == [("bad", "rejected"), ("good", "folded")]
    assert (told.updates[0].folded, told.updates[0].latency) == (0.0, 0.0)


def test_the_updates_of_old_and_of_unknown_rounds_are_not_found_for_different_reasons(platform: Platform):
    platform.create_job(MODEL, goal=1, rounds=6)
    for number in range(1, 7):
        platform.submit("a", random_update(number).tobytes(), number)
        platform.wait_for_round(number + 1)
    assert [isinstance(platform.ask(DescribeUpdates("job", number)), RoundUpdates) for number in range(1, 8)] == [
        *(False, False, True, True, True, True, False),
    ]
    old, unknown = (platform.ask(DescribeUpdates("job", number)) for number in (2, 7))
    assert (old.status, old.title) == (404, "updates not kept")
    assert "rounds that have them: 3, 4, 5, 6" in old.detail
    assert (unknown.status, unknown.title) == (404, "no such round")


def test_lazy_timing_folds_nothing_before_the_round_is_closed(platform: Platform):
    platform.create_job(MODEL, goal=12, timing="lazy")
    for number in (1, 2):
        updates = [random_update(20 * number + client) for client in range(12)]
        for client in range(11):
            platform.submit(str(client), updates[client].tobytes(), number)
        time.sleep(0.2)  # forty times what an eager fold waits for
        told = updates_of(platform, number)
        assert {update.aggregator for update in told.updates} == {0, 1}
        assert {update.status for update in told.updates} == {"accepted"}
        closed = time.monotonic()
        platform.submit("11", updates[11].tobytes(), number)
        platform.wait_for_round(number + 1)
        assert all(update.folded > closed for update in updates_of(platform, number).updates)
        assert_close(platform.model(), updates, [1.0] * 12)
    platform.wait_for_all_slots()


def test_a_lazy_top_folds_its_own_updates_while_it_waits_for_a_leaf(platform: Platform):
    platform.create_job(MODEL, goal=8, timing="lazy")
    updates = [random_update(client) for client in range(8)]
    for client in range(7):
        platform.submit(str(client), updates[client].tobytes())
    _, leaf = until(lambda: len(found := platform.workers()) == 2 and found, what="workers")
    os.kill(leaf, signal.SIGSTOP)
    try:
        platform.submit("7", updates[7].tobytes())
        until(lambda: platform.describe().current.folded == 4, what="folds of the top")
        told = updates_of(platform, 1).updates
        assert {(update.aggregator, update.status) for update in told} == {(0, "folded"), (1, "accepted")}
    finally:
        os.kill(leaf, signal.SIGCONT)
    platform.wait_for_round(2)
    assert_close(platform.model(), updates, [1.0] * 8)
    platform.wait_for_all_slots()


# --- workers of one round only -------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [True, False])
def test_a_job_without_reuse_has_new_workers_in_each_round(platform: Platform, reuse: bool):
    platform.create_job(MODEL, goal=6, reuse=reuse)
    seen: list[set[int]] = []
    for number in (1, 2, 3):
        updates = [random_update(10 * number + client) for client in range(6)]
        for client in range(5):
            platform.submit(str(client), updates[client].tobytes(), number)
        until(lambda: len(platform.workers()) == 2, what="two workers, and no third one")
        seen.append(set(platform.workers()))
        platform.submit("5", updates[5].tobytes(), number)
        state = platform.wait_for_round(number + 1)
        assert_close(platform.model(), updates, [1.0] * 6)
        if reuse:
            assert (state.last.started, state.last.reused) == ((2, 1) if number == 1 else (0, 3))
        else:
            assert (state.last.started, state.last.reused) == (2, 0)
            until(lambda: not platform.workers(), what="end of the workers")
    assert len(set.union(*seen)) == (2 if reuse else 6)
    platform.wait_for_all_slots()


def test_rounds_without_reuse_that_follow_each_other_at_once_lose_nothing(platform: Platform):
    platform.create_job(MODEL, goal=3, reuse=False, slots=3)
    for number in range(1, 16):
        updates = [random_update(100 * number + client) for client in range(3)]
        for client, update in enumerate(updates):
            platform.submit(str(client), update.tobytes(), number)
        state = platform.wait_for_round(number + 1)
        assert state.status == "running", state.detail
        assert_close(platform.model(), updates, [1.0] * 3)
    platform.wait_for_all_slots()

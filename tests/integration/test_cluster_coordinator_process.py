"""The coordinator's process: what members, clients and operators get from it, and what it survives."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from lifl.cluster.messages import Counted, Placed, PlaceUpdate
from lifl.errors import Refused
from lifl.messages import Acknowledged

from tests.integration.scripted_member import CoordinatorUnderTest, ScriptedMember

pytestmark = pytest.mark.timeout(60)

JOB = "digits"
WAIT_SECONDS = 10.0


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorUnderTest]:
    with CoordinatorUnderTest(tmp_path / "state") as running:
        yield running


@pytest.fixture
def members(coordinator: CoordinatorUnderTest) -> Iterator[list[ScriptedMember]]:
    with ExitStack() as stack:
        nodes = [stack.enter_context(ScriptedMember(coordinator, name)) for name in ("a", "b")]
        for node in nodes:
            node.register()
        yield nodes


def until(condition: Callable[[], Any]) -> Any:
    """Wait for what another process does."""
    end = time.monotonic() + WAIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


def run_to(phase: str, members: list[ScriptedMember]) -> None:
    """Bring round 1 with a goal of 3 so far: `open`, `closing`, `delivered` or `made`."""
    a, b = members
    a.poll()
    b.poll()
    assert a.tell(a.count(JOB, "one", 2.0)) == (Counted("accepted", 1),)
    if phase == "open":
        return
    finish_counting(members)
    if phase == "closing":
        return
    assert a.tell(a.delivered(JOB, b)) == (Acknowledged(),)
    if phase == "delivered":
        return
    assert a.tell(a.made(JOB, [a, b], 9.0)) == (Acknowledged(),)


def finish_counting(members: list[ScriptedMember]) -> None:
    a, b = members
    a.tell(a.count(JOB, "two", 3.0))
    b.tell(b.count(JOB, "three", 4.0))
    assert a.poll().jobs[0].role == "top"
    assert b.poll().jobs[0].role == "middle"
    assert (a.orders[JOB].updates, a.orders[JOB].partials) == (2, (b.incarnation,))


def test_a_round_of_two_nodes_completes_and_its_model_and_record_can_be_had(
    coordinator: CoordinatorUnderTest, members: list[ScriptedMember]
) -> None:
    a, _ = members
    coordinator.create_job(JOB, goal=3)
    run_to("made", members)
    order = a.poll().jobs[0]
    assert (order.round, order.model_round, order.phase, order.role) == (2, 2, "open", "")
    until(lambda: coordinator.get(f"/v1/jobs/{JOB}")["checkpointed_round"] == 2)
    response, data = coordinator.request("GET", f"/v1/jobs/{JOB}/model")
    assert (response.status, response.headers["LIFL-Round"], data) == (200, "2", a.models[2])
    response, _ = coordinator.request(
        "GET", f"/v1/jobs/{JOB}/model", headers={"If-None-Match": response.headers["ETag"]}
    )
    assert response.status == 304
    updates = coordinator.get(f"/v1/jobs/{JOB}/rounds/1/updates")
    assert [(u["client"], u["node"], u["num_samples"], u["counted"]) for u in updates["updates"]] == [
        ("one", "a", 2.0, True),
        ("two", "a", 3.0, True),
        ("three", "b", 4.0, True),
    ]
    round_ = coordinator.get(f"/v1/jobs/{JOB}/rounds/1")
    assert (round_["status"], round_["accepted"], round_["weight"], round_["top"]) == ("complete", 3, 9.0, "a")
    assert a.poll().jobs[0].model_sources == (coordinator.peer_address,)


@pytest.mark.parametrize("phase", ["open", "closing", "delivered", "made"])
def test_killed_in_any_phase_it_goes_on_with_the_same_round(
    coordinator: CoordinatorUnderTest, members: list[ScriptedMember], phase: str
) -> None:
    a, b = members
    coordinator.create_job(JOB, goal=3)
    run_to(phase, members)
    boot, orders = a.boot, {node.name: node.orders[JOB] for node in members}
    coordinator.restart()
    for node in members:
        node.hang_up()
        node.poll()
        assert node.boot != boot
        after, before = node.orders[JOB], orders[node.name]
        assert after.version > before.version
        if phase != "made":
            assert (after.round, after.attempt, after.epoch, after.phase, after.role, after.partials) == (
                before.round,
                before.attempt,
                before.epoch,
                before.phase,
                before.role,
                before.partials,
            )
    if phase == "open":
        assert a.tell(a.count(JOB, "one", 2.0)) == (Counted("accepted", 1),)
        finish_counting(members)
    if phase in ("open", "closing"):
        assert a.tell(a.delivered(JOB, b)) == (Acknowledged(),)
    if phase != "made":
        assert a.tell(a.made(JOB, [a, b], 9.0)) == (Acknowledged(),)
    a.poll()
    assert a.orders[JOB].round == 2
    until(lambda: coordinator.get(f"/v1/jobs/{JOB}")["checkpointed_round"] == 2)
    assert coordinator.get(f"/v1/jobs/{JOB}/rounds/1")["accepted"] == 3


def test_a_silent_node_is_lost_and_its_clients_may_send_again(tmp_path: Path) -> None:
    with (
        CoordinatorUnderTest(tmp_path, "--lease", "1.0") as coordinator,
        ScriptedMember(coordinator, "a") as a,
        ScriptedMember(coordinator, "b") as b,
    ):
        a.register()
        b.register()
        coordinator.create_job(JOB, goal=3)
        a.poll()
        b.poll()
        b.tell(b.count(JOB, "one"))

        def is_lost() -> bool:
            a.poll(0.2)
            nodes = coordinator.get("/v1/nodes")["nodes"]
            return [node["status"] for node in nodes] == ["ready", "lost"]

        until(is_lost)
        with pytest.raises(Refused) as refused:
            b.poll()
        assert refused.value.status == 410
        assert a.tell(PlaceUpdate(JOB, 1, "one"))[0] == Placed("open", 1, "a", "http://a.test:8080")
        assert a.tell(a.count(JOB, "one")) == (Counted("accepted", 1),)
        assert coordinator.get(f"/v1/jobs/{JOB}")["current"]["lost"] == 1


def test_a_waiting_request_is_answered_when_there_is_something_new(
    coordinator: CoordinatorUnderTest, members: list[ScriptedMember]
) -> None:
    a, _ = members
    a.poll()
    found: list[float] = []

    def wait() -> None:
        assert a.poll(3.0).jobs[0].job == JOB
        found.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)  # so that the request waits
    begun = time.monotonic()
    coordinator.create_job(JOB, goal=3)
    thread.join(WAIT_SECONDS)
    assert found and found[0] - begun < 1.0


def test_it_uses_no_processor_time_while_nothing_happens(
    coordinator: CoordinatorUnderTest, members: list[ScriptedMember]
) -> None:
    coordinator.create_job(JOB, goal=3)
    members[0].poll()
    until(lambda: coordinator.get(f"/v1/jobs/{JOB}")["round"] == 1)

    def ticks() -> int:
        fields = Path(f"/proc/{coordinator.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(1.5)
    assert ticks() - before <= 1


def test_terminated_it_answers_who_waits_and_ends_with_status_0(
    coordinator: CoordinatorUnderTest, members: list[ScriptedMember]
) -> None:
    a, _ = members
    a.poll()
    thread = threading.Thread(target=a.poll, args=(3.0,))
    thread.start()
    time.sleep(0.3)
    begun = time.monotonic()
    assert coordinator.terminate() == 0
    assert time.monotonic() - begun < 2.5
    thread.join(WAIT_SECONDS)


def test_members_on_many_connections_count_each_update_once(
    coordinator: CoordinatorUnderTest, members: list[ScriptedMember]
) -> None:
    clients, batch = 400, 20
    coordinator.create_job(JOB, goal=2 * clients)

    def count(node: ScriptedMember) -> None:
        node.poll()
        for start in range(0, clients, batch):
            # Both nodes claim every client: only one of them gets it.
            messages = [node.count(JOB, f"c{number}") for number in range(start, start + batch)]
            answers.setdefault(node.name, []).extend(node.tell(*messages))

    answers: dict[str, list[Any]] = {}
    threads = [threading.Thread(target=count, args=(node,)) for node in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    for one, other in zip(answers["a"], answers["b"], strict=True):
        assert sorted((one.status, other.status)) == ["accepted", "duplicate"]
    assert coordinator.get(f"/v1/jobs/{JOB}")["current"]["accepted"] == clients
    coordinator.restart()
    assert coordinator.get(f"/v1/jobs/{JOB}")["current"]["accepted"] == clients


def test_a_client_is_sent_on_to_the_node_that_takes_its_update(
    coordinator: CoordinatorUnderTest, members: list[ScriptedMember]
) -> None:
    coordinator.create_job(JOB, goal=3)
    event = {
        "Content-Type": "application/octet-stream",
        "ce-specversion": "1.0",
        "ce-type": "dev.lifl.update.v1",
        "ce-id": "1",
        "ce-source": "one",
        "ce-numsamples": "5",
    }
    response, _ = coordinator.request("POST", f"/v1/jobs/{JOB}/updates", b"", event | {"ce-round": "1"})
    assert response.status == 307
    assert response.headers["Location"].endswith(f".test:8080/v1/jobs/{JOB}/updates")
    response, data = coordinator.request("POST", f"/v1/jobs/{JOB}/updates", b"", event | {"ce-round": "9"})
    assert (response.status, json.loads(data)["round"]) == (409, 1)


def test_a_draining_node_gets_no_updates_and_is_told(
    coordinator: CoordinatorUnderTest, members: list[ScriptedMember]
) -> None:
    a, b = members
    coordinator.create_job(JOB, goal=3)
    response, _ = coordinator.request("POST", "/v1/nodes/a/drain")
    assert response.status == 204
    assert a.poll().drain
    places = a.tell(*(PlaceUpdate(JOB, 1, f"c{number}", here=True) for number in range(4)))
    assert {placed.node for placed in places} == {b.name}
    assert [node["status"] for node in coordinator.get("/v1/nodes")["nodes"]] == ["drained", "ready"]
    coordinator.request("POST", "/v1/nodes/a/undrain")
    assert not a.poll().drain
    coordinator.request("POST", "/v1/nodes/a/calibrate")
    assert a.poll().calibrate == 1


def test_a_deleted_job_is_told_until_seen_and_its_name_can_be_used_again(
    coordinator: CoordinatorUnderTest, members: list[ScriptedMember]
) -> None:
    a, b = members
    coordinator.create_job(JOB, goal=3)
    a.poll()
    b.poll()
    assert coordinator.request("DELETE", f"/v1/jobs/{JOB}")[0].status == 204
    coordinator.restart()
    for node in members:
        node.hang_up()
        assert [order.status for order in node.poll().jobs] == ["deleted"]
        assert not node.poll().jobs
    coordinator.create_job(JOB, goal=4)
    assert a.poll().jobs[0].spec.goal == 4


def test_members_have_to_show_their_token_and_nodes_too(tmp_path: Path) -> None:
    secret = tmp_path / "member-token"
    secret.write_text("s3cret\n")
    with (
        CoordinatorUnderTest(tmp_path / "state", "--member-token-file", str(secret)) as coordinator,
        ScriptedMember(coordinator, "a", "wrong") as stranger,
        ScriptedMember(coordinator, "b", "s3cret") as friend,
    ):
        with pytest.raises(Refused) as refused:
            stranger.register()
        assert refused.value.status == 401
        friend.register()
        assert [node["name"] for node in coordinator.get("/v1/nodes")["nodes"]] == ["b"]


def test_the_metrics_tell_of_jobs_nodes_and_updates(
    coordinator: CoordinatorUnderTest, members: list[ScriptedMember]
) -> None:
    coordinator.create_job(JOB, goal=3)
    run_to("open", members)
    _, text = coordinator.request("GET", "/metrics")
    for line in (
        'lifl_coordinator_jobs{status="running"} 1.0',
        'lifl_coordinator_nodes{status="ready"} 2.0',
        "lifl_coordinator_updates_counted_total 1.0",
        f'lifl_coordinator_accepted{{job="{JOB}"}} 1.0',
    ):
        assert line in text.decode().splitlines()


def run_and_fail(*arguments: str) -> str:
    command = [sys.executable, "-m", "lifl_gateway.coordinator", *arguments]
    ended = subprocess.run(command, capture_output=True, timeout=30, check=False, text=True)
    assert ended.returncode == 2
    return ended.stderr


def test_it_does_not_let_strangers_in_unless_told_to(tmp_path: Path) -> None:
    assert "--allow-anonymous" in run_and_fail("--state-directory", str(tmp_path), "--address", "0.0.0.0:0")


def test_a_second_one_does_not_start_on_the_same_directory(coordinator: CoordinatorUnderTest) -> None:
    arguments = ("--state-directory", str(coordinator.directory), "--address", "127.0.0.1:0")
    assert "another coordinator" in run_and_fail(*arguments, "--peer-address", "127.0.0.1:0")

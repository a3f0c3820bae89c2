"""What the coordinator's process tells of functions, to who scales their pods."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lifl.cluster.messages import Placed, PlaceUpdate
from lifl.messages import Problem

from tests.integration.platform_harness import Platform, until
from tests.integration.scripted_member import FUNCTION, CoordinatorUnderTest, ScriptedMember

pytestmark = pytest.mark.timeout(60)

JOB = "digits"


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorUnderTest]:
    # The nodes here are silent in between, however long that takes.
    with CoordinatorUnderTest(tmp_path / "state", "--lease", "60") as running:
        yield running


def functions(coordinator: CoordinatorUnderTest, query: str = "") -> tuple[int, dict[str, Any]]:
    answer = coordinator.get(f"/v1/functions{query}")
    return answer["version"], {need["function"]: need for need in answer["functions"]}


def test_who_waits_hears_at_once_that_a_function_is_needed_and_that_it_is_no_more(
    coordinator: CoordinatorUnderTest,
) -> None:
    with ScriptedMember(coordinator, "a", attaches=True) as node:
        node.register()
        version, needs = functions(coordinator)
        assert needs == {}
        heard: list[tuple[float, int, dict[str, Any]]] = []

        def listen() -> None:
            known = version
            while len(heard) < 3:
                known, found = functions(coordinator, f"?wait=10&version={known}")
                heard.append((time.monotonic(), known, found))

        thread = threading.Thread(target=listen)
        thread.start()
        time.sleep(0.3)  # so that the request waits
        begun = time.monotonic()
        coordinator.create_job(JOB, goal=3, idle_seconds=1.0)
        until(lambda: heard, what="the function is needed")
        assert heard[0][0] - begun < 1.0
        assert (heard[0][2][FUNCTION]["wanted"], heard[0][2][FUNCTION]["nodes"]) == (1, [])
        (answer,) = node.tell(PlaceUpdate(JOB, 1, "one"))
        assert isinstance(answer, Problem) and answer.status == 503
        node.attach(FUNCTION)
        assert node.tell(PlaceUpdate(JOB, 1, "one")) == (Placed("open", 1, "a", "http://a.test:8080"),)
        until(lambda: len(heard) > 1, what="the function is there")
        thread.join(5)
        assert not thread.is_alive()
        until(lambda: functions(coordinator)[1][FUNCTION]["busy"] == ["a"])


def test_an_idle_job_lets_go_of_its_function_and_a_client_that_asks_brings_it_back(
    coordinator: CoordinatorUnderTest,
) -> None:
    with ScriptedMember(coordinator, "a", attaches=True) as node:
        node.register()
        coordinator.create_job(JOB, goal=3, idle_seconds=0.4)
        version, needs = functions(coordinator)
        assert (needs[FUNCTION]["wanted"], needs[FUNCTION]["needed_on"]) == (1, ["a"])
        begun = time.monotonic()
        version, needs = functions(coordinator, f"?wait=10&version={version}")
        assert (needs[FUNCTION]["wanted"], needs[FUNCTION]["jobs"]) == (0, [])
        assert 0.2 < time.monotonic() - begun < 2.0
        assert isinstance(node.tell(PlaceUpdate(JOB, 1, "one"))[0], Problem)
        assert functions(coordinator, f"?version={version}")[1][FUNCTION]["wanted"] == 1


def test_only_an_operator_may_ask_and_nonsense_is_refused(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("* op-token\none its-token\n")
    with CoordinatorUnderTest(tmp_path / "state", "--token-file", str(tokens)) as coordinator:
        for token, status in ("op-token", 200), ("its-token", 403), ("", 401):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            assert coordinator.request("GET", "/v1/functions", headers=headers)[0].status == status
        for query in ("wait=61", "wait=x", "version=-1", "version=1e3", "version=99999999999999999"):
            headers = {"Authorization": "Bearer op-token"}
            response, data = coordinator.request("GET", f"/v1/functions?{query}", headers=headers)
            assert (response.status, json.loads(data)["status"]) == (400, 400), query


def test_a_node_tells_of_a_function_whose_pod_comes_and_goes(
    coordinator: CoordinatorUnderTest, tmp_path: Path
) -> None:
    node = Platform(tmp_path / "node", "unix")
    try:
        node.start_agent()
        # In place of a gateway, which this test needs none of.
        (node.runtime / "member.json").write_text('{"address": "http://n0:8080", "peer_address": "n0:8090"}')
        node.spawn(
            "coordinator",
            *("lifl.control.coordinator", "--runtime-directory", str(node.runtime)),
            *("--state-directory", str(node.state), "--name", "n0"),
            *("--join", f"http://{coordinator.address}"),
        )
        until(lambda: coordinator.get("/v1/nodes")["nodes"], what="the node joins")
        coordinator.create_job(JOB, goal=3)
        assert functions(coordinator)[1][FUNCTION]["wanted"] == 1
        for _ in range(2):
            node.start_zygote()
            until(lambda: functions(coordinator)[1][FUNCTION]["nodes"] == ["n0"], what="the function comes")
            zygote = node.processes.pop("zygote")
            zygote.kill()
            zygote.communicate()
            until(lambda: functions(coordinator)[1][FUNCTION]["nodes"] == [], what="the function goes")
            coordinator.restart()  # after which the node tells it anew
            until(lambda: coordinator.get("/v1/nodes")["nodes"], what="the coordinator is back")
    finally:
        for process in reversed(node.processes.values()):
            process.terminate()
            process.communicate()

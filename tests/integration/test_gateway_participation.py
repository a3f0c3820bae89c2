"""What a gateway lets take part: clients that ask for a place in a round, and updates of asynchronous jobs."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lifl.client import Client, Submission
from lifl.errors import Refused
from lifl.messages import Admit, Commit, SelectClient, Selection, Verdict
from lifl.slot import UpdateHeader, split_slot_reference
from lifl_gateway.tokens import Identity, Tokens

from tests.integration.gateway_harness import AGGREGATOR, JOB, Node, eventually, raw_post, read_response

PARTICIPANTS = f"/v1/jobs/{JOB}/rounds/1/participants"

Response = tuple[int, http.client.HTTPMessage, bytes]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.fixture
def asynchronous(node: Node) -> Node:
    """Its job is asynchronous, and buffer 9 is open."""
    spec = msgspec.structs.replace(node.coordinator.states[JOB].spec, mode="async", max_staleness=4)
    node.coordinator.change(JOB, spec=spec, round=9, model_round=9)
    node.coordinator.answers[Admit] = Verdict("open", 9)
    return node


def ask(
    node: Node, client: Any, number: object = 1, token: str = "", media_type: str = "application/json"
) -> Response:
    body = client if isinstance(client, bytes) else json.dumps({"client": client}).encode()
    headers = {"Content-Type": media_type} | ({"Authorization": f"Bearer {token}"} if token else {})
    return node.request("POST", f"/v1/jobs/{JOB}/rounds/{number}/participants", body, headers)


def problem_of(response: Response) -> dict[str, Any]:
    status, headers, body = response
    assert headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = json.loads(body)
    assert document["status"] == status
    return document


# --- a place in a round ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "status"), [("selected", 201), ("again", 200), ("everyone", 200)])
def test_a_client_that_asks_is_selected(node: Node, answer: Any, status: int) -> None:
    node.coordinator.answers[SelectClient] = Selection(answer, 1, 3, 4)
    response = ask(node, "älice")
    assert (response[0], json.loads(response[2])) == (status, {"status": "selected", "round": 1})
    assert node.coordinator.questions[-1] == SelectClient(JOB, 1, "älice")


def test_a_client_too_many_is_told_how_many_there_are(node: Node) -> None:
    node.coordinator.answers[SelectClient] = Selection("enough", 1, 13, 13)
    document = problem_of(ask(node, "alice"))
    assert (document["status"], document["title"]) == (409, "Enough clients")
    assert "13 of 13" in document["detail"]


@pytest.mark.parametrize(("number", "title"), [(1, "Late"), (3, "Early")])
def test_a_client_that_asks_about_another_round_is_told_the_open_one(node: Node, number: int, title: str) -> None:
    node.coordinator.change(JOB, round=2, model_round=2)
    document = problem_of(ask(node, "alice", number))
    assert (document["status"], document["title"], document["round"]) == (409, title, 2)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 3000, 422),
        (b"[]", 422),
        (b"{}", 422),
        (b'{"client": 7}', 422),
        (b'{"client": ""}', 422),
        (b'{"client": "a\\u0007b"}', 422),
        (b'{"client": "\\ud800"}', 400),
        (json.dumps({"client": "ä" * 129}).encode(), 422),
        (b'{"client": "a", "places": 9}', 422),
        (b" " * 70_000, 413),
    ],
)
def test_a_bad_request_for_a_place_is_refused(node: Node, body: bytes, status: int) -> None:
    assert problem_of(ask(node, body))["status"] == status
    assert not any(isinstance(question, SelectClient) for question in node.coordinator.questions)


def test_a_place_is_asked_for_in_json_about_a_round_that_can_be(node: Node) -> None:
    assert problem_of(ask(node, "alice", media_type="text/plain"))["status"] == 415
    assert problem_of(ask(node, "alice", 0))["status"] == 404
    node.coordinator.change(JOB, status="complete")
    assert problem_of(ask(node, "alice"))["status"] == 409


def test_a_client_asks_for_itself_only(tmp_path: Path) -> None:
    identities = {"a-token": Identity("alice", False), "boss": Identity("*", True)}
    node = Node(tmp_path, tokens=Tokens(identities))
    try:
        statuses = [ask(node, "alice", token=token)[0] for token in ("", "a-token", "boss")]
        assert statuses == [401, 200, 200]
        assert ask(node, "bob", token="a-token")[0] == 403
    finally:
        node.close()


def test_a_client_of_the_sdk_takes_part_or_not(node: Node) -> None:
    url = f"http://{node.address[0]}:{node.address[1]}"
    with Client(url, JOB, "alice", retries=0) as client:
        for answer, takes_part in [("selected", True), ("again", True), ("everyone", True), ("enough", False)]:
            node.coordinator.answers[SelectClient] = Selection(answer, 1, 2, 2)  # type: ignore[arg-type]
            assert client.take_part(1) is takes_part
        node.coordinator.answers[SelectClient] = Selection("late", 2)
        assert client.take_part(1) is False
        node.coordinator.answers[SelectClient] = Selection("early", 2)
        with pytest.raises(Refused, match="Early"):
            client.take_part(7)
        node.coordinator.answers[Admit] = Verdict("unselected", 1)
        assert client.submit(node.body, num_samples=1, round=1) == Submission("unselected", 1)


def test_an_update_of_a_client_that_was_not_selected_is_refused(node: Node) -> None:
    node.coordinator.answers[Commit] = Verdict("unselected", 1)
    document = problem_of(node.post())
    assert (document["status"], document["title"]) == (409, "Not selected")
    assert node.free_slots == node.coordinator.slots


# --- asynchronous jobs -----------------------------------------------------------------------------------------


def test_an_update_keeps_its_base_and_its_descriptor_has_the_round_it_counts_in(asynchronous: Node) -> None:
    node = asynchronous
    node.coordinator.answers[Commit] = accept = Verdict("accepted", 9, AGGREGATOR)
    status, _, body = node.post(ce_kind="delta", ce_round="6")
    assert (status, json.loads(body)) == (202, {"status": "accepted", "round": 9})
    assert eventually(lambda: node.agent.received)
    assert (node.agent.received[0].destination, node.agent.received[0].round) == (accept.destination, 9)
    commit = next(question for question in node.coordinator.questions if isinstance(question, Commit))
    header = UpdateHeader.unpack_from(node.coordinator.memory[JOB][0].header(split_slot_reference(commit.slot)[1]))
    assert header is not None
    assert (commit.round, header.round, header.is_delta) == (6, 6, True)


def test_new_weights_are_refused_before_they_are_sent(asynchronous: Node) -> None:
    with asynchronous.connect() as sock:
        sock.sendall(raw_post(len(asynchronous.body), "Expect: 100-continue"))
        status, _, body = read_response(sock)
    document = json.loads(body)
    assert (status, document["title"]) == (422, "Not a difference")
    assert "minus the model of round 1" in document["detail"]
    assert not any(isinstance(question, Admit) for question in asynchronous.coordinator.questions)


def test_new_weights_in_a_structured_event_are_refused_too(asynchronous: Node) -> None:
    event = {
        "specversion": "1.0",
        "type": "dev.lifl.update.v1",
        "source": "alice",
        "id": "1",
        "round": 9,
        "numsamples": 1,
        "data_base64": base64.b64encode(asynchronous.body).decode(),
    }
    for kind, status in [("weights", 422), ("delta", 202)]:
        asynchronous.coordinator.answers[Commit] = Verdict("accepted", 9)
        response = asynchronous.post(
            json.dumps(event | {"kind": kind}).encode(), content_type="application/cloudevents+json"
        )
        assert response[0] == status


def test_a_difference_to_a_model_that_is_too_old_is_told_how_old_it_may_be(asynchronous: Node) -> None:
    asynchronous.coordinator.answers[Admit] = Verdict("late", 9)
    document = problem_of(asynchronous.post(ce_kind="delta", ce_round="3"))
    assert (document["status"], document["title"], document["round"]) == (409, "Late", 9)
    assert "up to 4 rounds old" in document["detail"]


def test_a_client_of_the_sdk_is_told_the_round_that_its_difference_counts_in(asynchronous: Node) -> None:
    asynchronous.coordinator.answers[Commit] = Verdict("accepted", 9)
    url = f"http://{asynchronous.address[0]}:{asynchronous.address[1]}"
    with Client(url, JOB, "alice", retries=0) as client:
        assert client.submit(asynchronous.body, num_samples=1, round=6, delta=True) == Submission("accepted", 9)
        asynchronous.coordinator.answers[Admit] = Verdict("duplicate", 9)
        assert client.submit(asynchronous.body, num_samples=1, round=6, delta=True) == Submission("duplicate", 6)

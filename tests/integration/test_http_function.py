"""Functions over plain HTTP CloudEvents: the ASGI contract in this process, and a served file in another."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from cloudevents.core.v1.event import CloudEvent
from lifl import InvalidInput, aggregator, load_function
from lifl.aggregate import Aggregate, ModelUpdate
from lifl.function import AggregatorFunction
from lifl.http_function import MODEL, PARTIAL, UPDATE, HttpFunction, Settings, listen_addresses, main
from lifl.model_layout import plan_update
from lifl.tensors import Encoder, split
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
FUNCTIONS = ROOT / "functions"
Tensors = dict[str, NDArray[Any]]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json"
        result: dict[str, Any] = json.loads(self.body)
        assert result["status"] == self.status
        return result

    def tensors(self) -> Tensors:
        return decode(self.body)


def encode(tensors: Mapping[str, Any]) -> bytes:
    return bytes(Encoder().encode(tensors))


def decode(data: bytes) -> Tensors:
    layout, payload = split(data)
    view = ModelUpdate(payload, layout, plan_update(layout, layout), client="", round=1, num_samples=1)
    return {name: view.array(name) for name in view.names}


def make_tensors(seed: int) -> Tensors:
    random = np.random.default_rng(seed)
    return {
        "a": random.normal(size=33).astype(np.float16),
        "b": random.normal(size=(5, 3)).astype(np.float32),
        "c": random.normal(size=4),
        "n": np.array(random.integers(0, 50)),
    }


def mean(models: list[Tensors], weights: list[float]) -> Tensors:
    return {
        name: np.average(np.stack([m[name].astype(np.float64) for m in models]), axis=0, weights=weights)
        for name in models[0]
    }


def assert_close(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
        if array.dtype.kind == "i":
            np.testing.assert_allclose(array, expected[name], atol=0.5 + 1e-9)
        else:
            tolerance = 2e-3 if array.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(array, expected[name], rtol=tolerance, atol=tolerance)


def update_headers(client: str, number: int, samples: float, **more: str) -> dict[str, str]:
    return {
        "content-type": "application/vnd.safetensors",
        "ce-specversion": "1.0",
        "ce-type": UPDATE,
        "ce-source": client,
        "ce-id": f"{client}-{number}",
        "ce-round": str(number),
        "ce-numsamples": str(samples),
    } | {f"ce-{name}": value for name, value in more.items()}


class Instance:
    """An instance in this process, called as an ASGI server calls it."""

    def __init__(self, function: AggregatorFunction, **environment: str) -> None:
        self.http = HttpFunction(function)
        self.http.start({f"LIFL_{name.upper()}": value for name, value in environment.items()})

    async def request(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"", *, chunk: int = 100
    ) -> Answer:
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": encoded}
        pieces = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        messages[-1]["more_body"] = False
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.http.handle(scope, receive, send)
        start, end = sent
        reply_headers = {name.decode(): value.decode() for name, value in start["headers"]}
        assert reply_headers["content-length"] == str(len(end["body"]))
        return Answer(start["status"], reply_headers, bytes(end["body"]))

    def post(self, headers: Mapping[str, str], body: bytes) -> Answer:
        return asyncio.run(self.request("POST", "/", {"content-length": str(len(body)), **headers}, body))

    def update(self, client: str, tensors: Tensors, samples: float = 1, number: int = 1, **more: str) -> Answer:
        return self.post(update_headers(client, number, samples, **more), encode(tensors))

    def model(self, tensors: Tensors, number: int = 1) -> Answer:
        headers = update_headers("operator", number, 1) | {"ce-type": MODEL, "ce-id": "model"}
        return self.post(headers, encode(tensors))


@pytest.fixture
def fedavg() -> AggregatorFunction:
    return load_function(FUNCTIONS / "fedavg.py")


# --- rounds --------------------------------------------------------------------------------------------------


def test_the_update_that_reaches_the_goal_is_answered_with_the_model(fedavg: AggregatorFunction) -> None:
    models = [make_tensors(seed) for seed in range(3)]
    top = Instance(fedavg, goal="3")
    assert top.update("a", models[0], 1) == (202, {"content-length": "0"}, b"")
    assert top.update("b", models[1], 2).status == 202
    answer = top.update("c", models[2], 5)
    assert answer.status == 200
    assert answer.headers["ce-type"] == MODEL
    assert answer.headers["ce-round"] == "2"
    assert answer.headers["ce-updates"] == "3"
    assert answer.headers["content-type"] == "application/vnd.safetensors"
    assert_close(answer.tensors(), mean(models, [1, 2, 5]))
    assert {name: array.dtype for name, array in answer.tensors().items()} == {
        name: array.dtype for name, array in models[0].items()
    }


def test_leaves_and_a_top_give_the_same_as_one_instance(fedavg: AggregatorFunction) -> None:
    models = [make_tensors(seed) for seed in range(4)]
    leaves = [Instance(fedavg, role="leaf"), Instance(fedavg, role="leaf")]
    top = Instance(fedavg)
    answers = []
    for leaf, pair in zip(leaves, ([0, 1], [2, 3]), strict=True):
        leaf.update(f"c{pair[0]}", models[pair[0]], pair[0] + 1)
        partial = leaf.update(f"c{pair[1]}", models[pair[1]], pair[1] + 1)
        assert partial.headers["ce-type"] == PARTIAL
        assert partial.headers["ce-updates"] == "2"
        forwarded = {name: value for name, value in partial.headers.items() if name != "content-length"}
        answers.append(top.post(forwarded, partial.body))
    assert [answer.status for answer in answers] == [202, 200]
    assert answers[1].headers["ce-updates"] == "4"
    assert_close(answers[1].tensors(), mean(models, [1, 2, 3, 4]))
    assert answers[1].tensors()["a"].dtype == np.float16


def test_deltas_are_added_to_the_posted_model_through_a_leaf_too(fedavg: AggregatorFunction) -> None:
    base, delta, weights = make_tensors(1), make_tensors(2), make_tensors(3)
    leaf, top = Instance(fedavg, role="leaf"), Instance(fedavg, goal="1")
    assert top.model(base).status == 202
    leaf.update("a", delta, 3, kind="delta")
    partial = leaf.update("b", weights, 1)
    assert float(partial.headers["ce-deltaweight"]) == 3
    headers = {name: value for name, value in partial.headers.items() if name != "content-length"}
    answer = top.post(headers, partial.body)
    shifted = {name: base[name].astype(np.float64) + delta[name] for name in base}
    assert_close(answer.tensors(), mean([shifted, weights], [3, 1]))


def test_a_delta_without_the_model_is_refused_and_may_be_sent_again(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg, goal="1")
    assert top.update("a", make_tensors(1), kind="delta").problem()["title"] == "Model needed"
    top.model(make_tensors(0))
    assert top.update("a", make_tensors(1), kind="delta").status == 200


def test_a_server_optimizer_steps_from_the_posted_model_and_keeps_its_state() -> None:
    top = Instance(load_function(FUNCTIONS / "fedavgm.py"), goal="1")
    zero = {"x": np.zeros(3, np.float32)}
    assert top.update("a", zero).problem()["title"] == "Model needed"
    top.model(zero)
    first = top.update("a", {"x": np.ones(3, np.float32)}, number=1)
    np.testing.assert_allclose(first.tensors()["x"], 1)
    second = top.update("a", {"x": np.ones(3, np.float32)}, number=2)
    np.testing.assert_allclose(second.tensors()["x"], 1.9)  # momentum 0.9 of the first step, no new difference


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum"])
def test_gathering_functions_work_at_the_top(name: str) -> None:
    top = Instance(load_function(FUNCTIONS / f"{name}.py"), goal="3")
    for client, value in (("a", 1.0), ("b", 1.5)):
        assert top.update(client, {"x": np.full(5, value, np.float32)}).status == 202
    answer = top.update("c", {"x": np.full(5, 2.0, np.float32)})
    assert answer.status == 200
    assert 1 <= answer.tensors()["x"][0] <= 2


@pytest.mark.parametrize("padding", range(8))
def test_headers_of_any_length_are_taken(fedavg: AggregatorFunction, padding: int) -> None:
    model = make_tensors(1)
    layout, payload = split(encode(model))
    header = layout.header.rstrip() + b" " * padding
    body = len(header).to_bytes(8, "little") + header + bytes(payload)
    answer = Instance(fedavg, goal="1").post(update_headers("a", 1, 1), body)
    assert_close(answer.tensors(), mean([model], [1]))


def test_a_gathering_function_cannot_be_a_leaf() -> None:
    with pytest.raises(InvalidInput, match="can only be the top"):
        Instance(load_function(FUNCTIONS / "median.py"), role="leaf")


def test_concurrent_updates_are_all_counted(fedavg: AggregatorFunction) -> None:
    models = [make_tensors(seed) for seed in range(20)]
    top = Instance(fedavg, goal="20")

    async def all_at_once() -> list[Answer]:
        requests = []
        for i, model in enumerate(models):
            body = encode(model)
            headers = update_headers(f"c{i}", 1, i + 1) | {"content-length": str(len(body))}
            requests.append(top.request("POST", "/", headers, body))
        return await asyncio.gather(*requests)

    answers = asyncio.run(all_at_once())
    assert sorted(answer.status for answer in answers) == [200] + [202] * 19
    result = next(answer for answer in answers if answer.status == 200)
    assert_close(result.tensors(), mean(models, list(range(1, 21))))


def test_updates_beyond_the_goal_in_one_batch_are_late(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg, goal="2")

    async def all_at_once() -> list[Answer]:
        body = encode(make_tensors(1))
        return await asyncio.gather(
            *(top.request("POST", "/", update_headers(f"c{i}", 1, 1), body) for i in range(4))
        )

    assert sorted(answer.status for answer in asyncio.run(all_at_once())) == [200, 202, 409, 409]


# --- retries and rejections ----------------------------------------------------------------------------------


def test_a_client_counts_once_in_a_round(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg)
    assert top.update("a", make_tensors(1)).status == 202
    assert top.update("a", make_tensors(2)).status == 200
    assert top.update("x", make_tensors(3), id="a-1").status == 200
    answer = top.update("b", make_tensors(3))
    assert_close(answer.tensors(), mean([make_tensors(1), make_tensors(3)], [1, 1]))


def test_the_result_is_answered_again_to_a_retry_of_the_last_input_only(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg)
    top.update("a", make_tensors(1))
    result = top.update("b", make_tensors(2))
    assert top.update("b", make_tensors(2)) == result
    assert top.update("a", make_tensors(1)).body == b""
    late = top.update("c", make_tensors(3))
    assert late.status == 409
    assert late.problem()["round"] == 2


def test_an_update_that_is_not_finite_is_rejected_and_its_round_goes_on(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg)
    bad = make_tensors(1) | {"b": np.full((5, 3), np.nan, np.float32)}
    top.update("a", make_tensors(1))
    assert top.update("b", bad).problem()["title"] == "Update rejected"
    assert top.update("b", make_tensors(2)).status == 200


def test_a_culprit_in_a_batch_is_found_and_the_others_count(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg, goal="3")
    good = [make_tensors(seed) for seed in range(3)]
    bad = make_tensors(9) | {"b": np.full((5, 3), np.inf, np.float32)}

    async def all_at_once() -> list[Answer]:
        bodies = [encode(model) for model in (good[0], bad, good[1], good[2])]
        return await asyncio.gather(
            *(top.request("POST", "/", update_headers(f"c{i}", 1, 1), body) for i, body in enumerate(bodies))
        )

    answers = asyncio.run(all_at_once())
    assert [answer.status for answer in answers] == [202, 422, 202, 200]
    assert_close(answers[3].tensors(), mean(good, [1, 1, 1]))


def test_an_update_of_another_model_is_rejected(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg)
    top.update("a", make_tensors(1))
    problem = top.update("b", {"other": np.ones(3, np.float32)}).problem()
    assert problem["title"] == "Invalid model"
    assert "other" in problem["detail"]


def test_the_error_of_a_function_reaches_the_client() -> None:
    @aggregator
    def picky(total: Aggregate, update: ModelUpdate) -> None:
        if update.client == "value":
            raise ValueError("not from you")
        if update.client == "other":
            raise RuntimeError("broken")
        total.add(update)

    top = Instance(picky, goal="1")
    assert "not from you" in top.update("value", make_tensors(1)).problem()["detail"]
    answer = top.update("other", make_tensors(1))
    assert answer.status == 500
    assert "broken" in answer.problem()["detail"]
    assert top.update("good", make_tensors(1)).status == 200


def test_what_the_function_leaves_out_counts_for_the_goal_but_not_for_the_mean() -> None:
    @aggregator
    def choosy(total: Aggregate, update: ModelUpdate) -> None:
        if update.client != "outsider":
            total.add(update, weight=1.0)

    top = Instance(choosy)
    assert top.update("outsider", make_tensors(1)).status == 202
    assert_close(top.update("a", make_tensors(2)).tensors(), mean([make_tensors(2)], [1]))
    top = Instance(choosy, goal="1")
    assert "left out every update" in top.update("outsider", make_tensors(1)).problem()["detail"]


def test_a_leaf_without_any_update_to_count_sends_an_empty_partial() -> None:
    @aggregator
    def none(total: Aggregate, update: ModelUpdate) -> None:
        pass

    leaf, top = Instance(none, role="leaf", goal="1"), Instance(none)
    partial = leaf.update("a", make_tensors(1))
    headers = {name: value for name, value in partial.headers.items() if name != "content-length"}
    assert float(headers["ce-weight"]) == 0
    assert top.post(headers, partial.body).status == 202


def test_the_oldest_of_too_many_open_rounds_is_given_up(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg)
    for number in range(1, 6):
        assert top.update("a", make_tensors(1), number=number).status == 202
    assert top.update("b", make_tensors(1), number=1).status == 409
    assert top.update("b", make_tensors(1), number=2).status == 200


def test_partials_of_another_precision_are_refused(fedavg: AggregatorFunction) -> None:
    partial = Instance(fedavg, role="leaf", goal="1", precision="float64").update("a", make_tensors(1))
    headers = {name: value for name, value in partial.headers.items() if name != "content-length"}
    assert "LIFL_PRECISION" in Instance(fedavg).post(headers, partial.body).problem()["detail"]


# --- events --------------------------------------------------------------------------------------------------


def structured(client: str, tensors: Tensors, number: int = 1) -> bytes:
    headers = update_headers(client, number, 1)
    event = {name[3:]: value for name, value in headers.items() if name.startswith("ce-")}
    event |= {
        "datacontenttype": "application/vnd.safetensors",
        "data_base64": base64.b64encode(encode(tensors)).decode(),
    }
    return json.dumps(event).encode()


def test_structured_events_are_taken(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg)
    headers = {"content-type": "application/cloudevents+json; charset=utf-8"}
    assert top.post(headers, structured("a", make_tensors(1))).status == 202
    assert top.post(headers, structured("b", make_tensors(2))).status == 200


def test_tensors_of_zeros_are_not_taken_for_text(fedavg: AggregatorFunction) -> None:
    zeros = {"x": np.zeros(100, np.float32)}
    answer = Instance(fedavg, goal="1").update("a", zeros)
    np.testing.assert_array_equal(answer.tensors()["x"], 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ce-type": "com.example"}, "type must be"),
        ({"ce-round": "0"}, "round must be"),
        ({"ce-round": ""}, "round must be"),
        ({"ce-numsamples": "nan"}, "numsamples"),
        ({"ce-numsamples": "0"}, "numsamples"),
        ({"ce-numsamples": "-1"}, "numsamples"),
        ({"ce-kind": "gradient"}, "kind"),
        ({"ce-specversion": "9"}, "not a CloudEvent"),
        ({"ce-id": ""}, "not a CloudEvent"),
        ({"ce-time": "yesterday"}, "not a CloudEvent"),
    ],
)
def test_a_bad_event_is_refused_by_name(fedavg: AggregatorFunction, change: dict[str, str], text: str) -> None:
    answer = Instance(fedavg).post(update_headers("a", 1, 1) | change, encode(make_tensors(1)))
    assert answer.status == 400
    assert text in answer.problem()["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"1", b"\xff", b'{"specversion": "1.0"}', b"[" * 100_000])
def test_a_broken_structured_event_is_refused(fedavg: AggregatorFunction, body: bytes) -> None:
    assert Instance(fedavg).post({"content-type": "application/cloudevents+json"}, body).status == 400


@pytest.mark.parametrize("body", [b"", b"x", b"\x02" + bytes(7) + b"{}", b"\xff" * 100])
def test_data_that_is_no_safetensors_is_refused(fedavg: AggregatorFunction, body: bytes) -> None:
    answer = Instance(fedavg).post(update_headers("a", 1, 1), body)
    assert answer.problem()["title"] == "Invalid model"
    assert answer.status == 422


def test_a_request_that_is_no_event_is_refused(fedavg: AggregatorFunction) -> None:
    assert Instance(fedavg).post({"content-type": "text/plain"}, b"hello").status == 400
    assert Instance(fedavg).post({"content-type": "application/cloudevents+avro"}, b"x").status == 415


def test_bodies_are_limited_and_must_have_the_length_they_claim(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg, max_body_bytes="1000")
    headers = update_headers("a", 1, 1)
    assert top.post(headers, bytes(1001)).status == 413
    assert top.post(headers | {"content-length": "900"}, bytes(901)).status == 400
    assert top.post(headers | {"content-length": "900"}, bytes(899)).status == 400
    assert top.post(headers | {"content-length": "9" * 50}, bytes(1)).status == 413
    assert top.post(headers | {"content-length": "-1"}, bytes(1)).status == 400
    assert asyncio.run(top.request("POST", "/", headers, bytes(1001))).status == 413


def test_a_body_without_a_length_is_taken(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg, goal="1")
    answer = asyncio.run(top.request("POST", "/", update_headers("a", 1, 1), encode(make_tensors(1))))
    assert answer.status == 200


def test_a_client_that_goes_away_in_its_body_leaves_no_trace(fedavg: AggregatorFunction) -> None:
    top = Instance(fedavg, goal="1")
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"10")]}
    asyncio.run(top.http.handle(scope, receive, send))
    assert sent == []
    assert top.update("a", make_tensors(1)).status == 200


# --- the contract --------------------------------------------------------------------------------------------


def test_health_probes_follow_start_and_stop(fedavg: AggregatorFunction) -> None:
    instance = Instance(fedavg)

    def probe(name: str) -> int:
        return asyncio.run(instance.request("GET", f"/health/{name}", {})).status

    assert (probe("liveness"), probe("readiness")) == (200, 200)
    instance.http.stop()
    assert (probe("liveness"), probe("readiness")) == (200, 503)
    assert instance.update("a", make_tensors(1)).status == 503
    assert asyncio.run(instance.request("GET", "/", {})).status == 404
    assert asyncio.run(instance.request("PUT", "/", {})).status == 405


def test_an_event_from_the_cloudevents_wrapper_is_answered_through_its_raw_send(
    fedavg: AggregatorFunction,
) -> None:
    """func-python decodes the event itself, and turns data that happens to be UTF-8 into text."""
    instance = Instance(fedavg, goal="1")
    data = encode({"x": np.zeros(3, np.float32)})
    attributes = {
        "type": UPDATE,
        "source": "a",
        "id": "1",
        "round": "1",
        "numsamples": "2",
        "datacontenttype": "application/vnd.safetensors",
    }
    sent: list[dict[str, Any]] = []

    async def raw(message: dict[str, Any]) -> None:
        sent.append(message)

    async def run() -> None:
        scope = {"type": "http", "event": CloudEvent(attributes, data.decode())}
        await instance.http.handle(scope, None, SimpleNamespace(http=raw))  # type: ignore[arg-type]

    asyncio.run(run())
    assert sent[0]["status"] == 200
    np.testing.assert_array_equal(decode(bytes(sent[1]["body"]))["x"], 0)


@pytest.mark.parametrize(
    "environment",
    [{"LIFL_GOAL": "0"}, {"LIFL_GOAL": "many"}, {"LIFL_ROLE": "root"}, {"LIFL_PRECISION": "float16"}],
)
def test_settings_that_cannot_be_used_are_refused(fedavg: AggregatorFunction, environment: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(environment))):
        HttpFunction(fedavg).start(environment)


def test_settings_have_defaults() -> None:
    assert Settings.of({}) == Settings()


def test_addresses_come_from_arguments_or_the_environment() -> None:
    assert listen_addresses({}, None, None) == ["127.0.0.1:8080"]
    assert listen_addresses({"PORT": "9", "ADDRESS": "0.0.0.0"}, None, None) == ["0.0.0.0:9"]
    assert listen_addresses({"LISTEN_ADDRESS": "[::]:8080,0.0.0.0:8080"}, None, None) == [
        "[::]:8080",
        "0.0.0.0:8080",
    ]
    assert listen_addresses({"LISTEN_ADDRESS": "[::]:8080"}, "::1", 7) == ["[::1]:7"]


def test_a_file_that_cannot_be_served_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.py")]) == 1
    assert "does not exist" in capsys.readouterr().err


# --- a served file -------------------------------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[int]:
    """The port of `python -m lifl.http_function functions/fedavg.py` with a goal of 2."""
    pytest.importorskip("hypercorn")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    command = [sys.executable, "-m", "lifl.http_function", str(FUNCTIONS / "fedavg.py"), "--port", str(port)]
    process = subprocess.Popen(command, env={**os.environ, "LIFL_GOAL": "2"}, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health/readiness")
                assert connection.getresponse().status == 200
                break
            except ConnectionRefusedError:
                assert process.poll() is None, process.stderr and process.stderr.read().decode()
                assert time.monotonic() < deadline
                time.sleep(0.05)  # there is no event to wait for before somebody listens
            finally:
                connection.close()
        yield port
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors.decode()
    assert b"Traceback" not in errors


def test_a_served_file_answers_over_real_http(served: int) -> None:
    models = [{"x": np.random.default_rng(seed).normal(size=3_000_000).astype(np.float32)} for seed in (1, 2)]
    connection = http.client.HTTPConnection("127.0.0.1", served, timeout=30)
    for client, model in zip("ab", models, strict=True):
        connection.request("POST", "/", encode(model), update_headers(client, 1, 1))
        response = connection.getresponse()
        answer = Answer(response.status, {n.lower(): v for n, v in response.getheaders()}, response.read())
    connection.close()
    assert answer.status == 200
    assert answer.headers["ce-type"] == MODEL
    assert_close(answer.tensors(), mean(models, [1, 1]))


def test_a_served_file_receives_large_bodies_in_time_that_grows_with_their_size(served: int) -> None:
    """64 MiB take func-python's own receiver 16 seconds (knative.md 3.5)."""
    body = encode({"x": np.ones(16 << 20, np.float32)})
    connection = http.client.HTTPConnection("127.0.0.1", served, timeout=30)
    start = time.monotonic()
    connection.request("POST", "/", body, update_headers("a", 1, 1))
    assert connection.getresponse().status == 202
    connection.close()
    assert time.monotonic() - start < 5

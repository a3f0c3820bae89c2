"""What a node must survive: killed processes, clients that misbehave, restarts. No slot may be lost with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from lifl.client import Client, Submission
from lifl.errors import Refused

from tests.e2e.node_harness import (
    FUNCTIONS,
    PATIENCE,
    ROOT,
    SMALL,
    LiveNode,
    Round,
    Watch,
    assert_mean,
    connected,
    create_job,
    encode,
    head,
    headers_of_update,
    make_round,
    model_after,
    post_update,
    random_like,
    read_answer,
    run_round,
    submit,
    submit_all,
    until,
)

pytestmark = pytest.mark.timeout(90)

BIG = {"weight": np.zeros((2048, 2560), np.float32)}
"""21 MB: its folds take long enough to be killed in the midst of one."""


@contextlib.contextmanager
def sending(node: LiveNode, job: str, round_: Round, threads: int = 4) -> Iterator[list[Future[Submission]]]:
    """Submit a whole round in the background; at the end all of it has been taken."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(submit, node, job, round_, client) for client in round_.clients]
        yield futures
        for future in futures:
            # Whoever had to send again may find that the update counted, or even that it closed the round.
            assert future.result(60).status in ("accepted", "duplicate", "late")


def count(futures: list[Future[Submission]]) -> int:
    return sum(future.done() for future in futures)


def assert_round(node: LiveNode, job: str, round_: Round) -> None:
    """Round 1 comes out right, no slot is lost, and the next round is right, too."""
    assert_mean(model_after(node, job, 1), round_.updates, round_.weights)
    node.assert_all_slots_free(job)
    model = {name: np.zeros_like(array) for name, array in round_.updates[0].items()}
    run_round(node, job, model, len(round_.updates), 2)
    node.assert_all_slots_free(job)


# --- killed processes ----------------------------------------------------------------------------------------


def test_workers_killed_again_and_again_while_they_fold_lose_and_double_nothing(node: LiveNode) -> None:
    create_job(node, "job", BIG, goal=24, slots=6)
    round_ = make_round(BIG, 24, distinct=4)
    killed = 0
    for first in range(0, 24, 4):
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(submit, node, "job", round_, client) for client in range(first, first + 4)]
            # One death for each four updates, so that there is progress between two deaths.
            while not node.kill_busy_worker() and count(futures) < 4:
                pass
            killed += count(futures) < 4
            for future in futures:
                future.result(60)
        until(lambda least=first: node.describe("job")["round"] == 2 or folded(node) > least, "progress")
    assert killed >= 2, "no worker was met at work"
    assert_round(node, "job", round_)


def folded(node: LiveNode) -> int:
    return int(node.describe("job")["current"]["folded"])


def test_all_workers_killed_at_once_lose_and_double_nothing(node: LiveNode) -> None:
    create_job(node, "job", SMALL, goal=16, slots=4)
    round_ = make_round(SMALL, 16)
    for client in round_.clients:
        submit(node, "job", round_, client)
        if client in (0, 1, 5, 11):  # 0: perhaps before they have joined the agent
            assert node.kill_workers()
    node.kill_workers()
    assert_round(node, "job", round_)


def test_workers_killed_before_they_have_joined_are_replaced(node: LiveNode) -> None:
    create_job(node, "job", SMALL, goal=4)
    round_ = make_round(SMALL, 4)
    zygote = node.pid("zygote-fedavg")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(submit, node, "job", round_, 0)
        for _ in range(3):
            until(lambda: Path(f"/proc/{zygote}/task/{zygote}/children").read_text(), "worker")
            node.kill_workers()
        first.result(30)
    submit_all(node, "job", round_, range(1, 4))
    assert_round(node, "job", round_)


def test_a_killed_agent_comes_back_in_mid_round(node: LiveNode) -> None:
    create_job(node, "job", BIG, goal=16, slots=6)
    round_ = make_round(BIG, 16, distinct=4)
    with sending(node, "job", round_) as futures:
        until(lambda: count(futures) >= 3, "first updates")
        node.kill("agent")
    assert_round(node, "job", round_)


def test_a_killed_gateway_comes_back_and_clients_in_mid_upload_send_again(node: LiveNode) -> None:
    create_job(node, "job", BIG, goal=16, slots=6)
    round_ = make_round(BIG, 16, distinct=4)
    with sending(node, "job", round_) as futures:
        for least in (2, 8):
            until(lambda least=least: count(futures) >= least, "first updates")
            node.kill("gateway-0")
    assert_round(node, "job", round_)


def test_a_killed_coordinator_goes_on_from_the_journal_and_the_round_starts_again(node: LiveNode) -> None:
    create_job(node, "job", SMALL, goal=6)
    run_round(node, "job", SMALL, 6, 1)
    until(lambda: node.describe("job")["checkpointed_round"] == 2, "checkpoint")
    before = model_after(node, "job", 1)
    round_ = make_round(SMALL, 6, seed=2)
    submit_all(node, "job", round_, range(4), number=2)
    node.kill("coordinator")
    with node.client("job") as client:
        assert client.fetch_model().round == 2  # also while the job is being restored
    state = until(lambda: state if (state := node.describe("job"))["status"] == "running" else None, "job")
    assert (state["round"], state["current"]["accepted"]) == (2, 0)
    after = model_after(node, "job", 1)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert {outcome.status for outcome in submit_all(node, "job", round_, number=2)} == {"accepted"}
    assert_mean(model_after(node, "job", 2), round_.updates, round_.weights)
    node.assert_all_slots_free("job")
    run_round(node, "job", SMALL, 6, 3)


def test_clients_that_wait_send_again_what_a_killed_coordinator_has_forgotten(node: LiveNode) -> None:
    """Nobody does anything but submit once and wait; the clients find out for themselves."""
    create_job(node, "job", SMALL, goal=3)
    round_ = make_round(SMALL, 3)
    results: dict[int, dict[str, Any]] = {}

    def take_part(number: int, *, wait_first: threading.Event) -> None:
        with node.client("job", str(number)) as client:
            assert wait_first.wait(PATIENCE)
            outcome = client.submit(round_.updates[number], num_samples=round_.weights[number], round=1)
            assert outcome.status == "accepted"
            results[number] = client.wait_for_round(after=1, timeout=PATIENCE).tensors

    now, later = threading.Event(), threading.Event()
    now.set()
    threads = [
        threading.Thread(target=take_part, args=(number,), kwargs={"wait_first": later if number == 2 else now})
        for number in range(3)
    ]
    for thread in threads:
        thread.start()
    until(lambda: node.describe("job")["current"]["accepted"] == 2, "two updates")
    node.kill("coordinator")
    until(lambda: node.describe("job")["status"] == "running", "job")
    later.set()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for result in results.values():
        assert_mean(result, round_.updates, round_.weights)


def test_a_coordinator_killed_while_updates_come_in_loses_no_slot(node: LiveNode) -> None:
    create_job(node, "job", BIG, goal=12, slots=4)
    round_ = make_round(BIG, 12, distinct=4)
    with sending(node, "job", round_) as futures:
        until(lambda: count(futures) >= 3, "first updates")
        node.kill("coordinator")
    until(lambda: node.describe("job")["status"] == "running", "job")
    submit_all(node, "job", round_)  # as clients that wait for the next round in vain would
    assert_round(node, "job", round_)


@pytest.mark.parametrize("with_workers", [False, True], ids=["alone", "with its workers"])
def test_a_killed_zygote_comes_back(node: LiveNode, with_workers: bool) -> None:
    create_job(node, "job", SMALL, goal=8)
    round_ = make_round(SMALL, 8)
    submit_all(node, "job", round_, range(4))
    workers = until(node.workers, "workers")
    node.kill("zygote-fedavg")
    if with_workers:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    submit_all(node, "job", round_, range(4, 8))
    assert_round(node, "job", round_)


def test_a_zygote_killed_while_it_starts_workers_leaves_no_place_empty(node: LiveNode) -> None:
    create_job(node, "job", SMALL, goal=4)
    round_ = make_round(SMALL, 4)
    zygote = node.pid("zygote-fedavg")
    os.kill(zygote, signal.SIGSTOP)  # so that it has been told to fork and has not
    submit(node, "job", round_, 0)
    os.kill(zygote, signal.SIGKILL)
    submit_all(node, "job", round_, range(1, 4))
    assert_round(node, "job", round_)


# --- clients -------------------------------------------------------------------------------------------------


@pytest.fixture
def job(shared_node: LiveNode, request: pytest.FixtureRequest) -> Iterator[str]:
    """A job of the test's own, of which all slots are free at the end and a whole round comes out right."""
    name = f"job-{abs(hash(request.node.name)):x}"
    create_job(shared_node, name, SMALL, goal=4, slots=2)
    yield name
    shared_node.assert_all_slots_free(name)
    number = shared_node.describe(name)["round"]
    run_round(shared_node, name, SMALL, 4, number, threads=4)
    with shared_node.client(name) as client:
        client.delete()


def good_body(seed: int = 1) -> bytes:
    return encode(random_like(SMALL, seed))


def refused(node: LiveNode, job: str, body: bytes, statuses: set[int], why: str, **options: Any) -> dict[str, Any]:
    answer = post_update(node, job, body, options.pop("headers", headers_of_update("bad")), **options)
    assert answer.status in statuses, f"{why}: {answer}"
    assert answer.problem["status"] == answer.status and answer.problem["title"], why
    return answer.problem


def test_clients_that_vanish_in_mid_body_hold_no_slot(shared_node: LiveNode, job: str) -> None:
    body = good_body()
    for part in (0, 5, 8, 50, len(body) // 2, len(body) - 1):
        for _ in range(3):
            with connected(shared_node.address) as sock:
                start = head(f"/v1/jobs/{job}/updates", headers_of_update("gone"), len(body))
                sock.sendall(start + body[:part])


def test_200_clients_at_once_share_8_slots(shared_node: LiveNode) -> None:
    model = {"weight": np.zeros((300, 300), np.float32)}
    create_job(shared_node, "crowd", model, goal=200, slots=8)
    round_ = make_round(model, 200)
    outcomes = submit_all(shared_node, "crowd", round_, threads=200)
    assert {outcome.status for outcome in outcomes} == {"accepted"}
    assert_mean(model_after(shared_node, "crowd", 1), round_.updates, round_.weights)
    shared_node.assert_all_slots_free("crowd")


def test_a_body_shorter_than_its_length_is_refused(shared_node: LiveNode, job: str) -> None:
    body = good_body()
    for part in (0, 4, 100, len(body) - 1):
        with connected(shared_node.address) as sock:
            start = head(f"/v1/jobs/{job}/updates", headers_of_update("short"), len(body))
            sock.sendall(start + body[:part])
            sock.shutdown(socket.SHUT_WR)
            answer = read_answer(sock)
        assert (answer.status, answer.problem["title"]) == (400, "Incomplete body"), part


def test_a_body_longer_than_its_length_is_refused_or_cut_off(shared_node: LiveNode, job: str) -> None:
    body = good_body()
    refused(shared_node, job, body, {422}, "the rest is missing in the length", length=len(body) - 8)
    with connected(shared_node.address) as sock:
        start = head(f"/v1/jobs/{job}/updates", headers_of_update("long"), len(body))
        sock.sendall(start + body + b"and more that is no request\r\n\r\n")
        assert read_answer(sock).status == 202
        assert read_answer(sock).status == 400
        assert sock.recv(1) == b""
    round_ = make_round(SMALL, 4)
    submit_all(shared_node, job, round_, range(1, 4))
    updates = [random_like(SMALL, 1), *round_.updates[1:]]
    assert_mean(model_after(shared_node, job, 1), updates, [1.0, *round_.weights[1:]])


@pytest.mark.parametrize("encoding", [{"Transfer-Encoding": "chunked"}, {}], ids=["chunked", "no length"])
def test_a_body_without_a_length_is_refused(shared_node: LiveNode, job: str, encoding: dict[str, str]) -> None:
    body = good_body()
    chunked = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    with connected(shared_node.address) as sock:
        start = head(f"/v1/jobs/{job}/updates", headers_of_update("unknown") | encoding, None)
        sock.sendall(start + chunked)
        assert read_answer(sock).status == 411


def test_a_header_that_claims_a_gibibyte_is_refused_before_it_is_read(shared_node: LiveNode, job: str) -> None:
    claim = (1 << 30).to_bytes(8, "little")
    refused(shared_node, job, claim + b"{}" * 100, {422}, "more than the body has")
    refused(shared_node, job, claim + b"{}", {413}, "with a length to match", length=(1 << 30) + 8)
    refused(shared_node, job, b"\xff" * 500, {422}, "the largest number there is")


def safetensors(header: str | bytes, payload: bytes = b"") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + payload


def malformed() -> dict[str, bytes]:
    good = good_body()
    length = int.from_bytes(good[:8], "little")
    header, payload = good[8 : 8 + length].decode(), good[8 + length :]
    entries = json.loads(header)
    entry = json.dumps(entries["bias"])
    overlap, hole = json.loads(header), json.loads(header)
    first, second = sorted(overlap, key=lambda name: overlap[name]["data_offsets"])
    overlap[second]["data_offsets"] = [offset - 4 for offset in overlap[second]["data_offsets"]]
    hole[second]["data_offsets"] = [offset + 4 for offset in hole[second]["data_offsets"]]
    negative = json.loads(header)
    negative[first]["shape"] = [-1, -101]
    return {
        "nothing": b"",
        "no header": b"\0" * 8,
        "only a length": good[:8],
        "no JSON": safetensors("hello, world; this is no JSON" * 3, payload),
        "not UTF-8": safetensors(b'{"\xff\xfe": 1}' + b" " * 20, payload),
        "an array": safetensors("[" + header + "]", payload),
        "nested": safetensors('{"a":' * 500 + "1" + "}" * 500, payload),
        "nested far too deeply": safetensors("[" * 4000 + "]" * 4000, payload),
        "nested tensors": safetensors(json.dumps({"outer": entries}), payload),
        "a key twice": safetensors(header.rstrip()[:-1] + f', "bias": {entry}}}', payload),
        "NaN as offset": safetensors(header.replace("[0,", "[NaN,", 1), payload),
        "overlapping offsets": safetensors(json.dumps(overlap), payload),
        "a hole": safetensors(json.dumps(hole), payload + b"1234"),
        "negative sizes": safetensors(json.dumps(negative), payload),
        "an enormous number": safetensors(header.replace("101", "1" + "0" * 400, 1), payload),
        "truncated header": good[: length // 2],
        "truncated payload": good[:-4],
        "a longer payload": good + b"1234",
        "unknown dtype": safetensors(header.replace("F32", "F33", 1), payload),
        "null bytes": b"\0" * len(good),
    }


def test_malformed_safetensors_are_refused(shared_node: LiveNode, job: str) -> None:
    for why, body in malformed().items():
        refused(shared_node, job, body, {400, 413, 422}, why)


def test_tensors_that_are_not_the_models_are_refused(shared_node: LiveNode, job: str) -> None:
    bias, weight = SMALL["bias"], SMALL["weight"]
    wrong: dict[str, dict[str, Any]] = {
        "a missing tensor": {"bias": bias},
        "another name": {"bias": bias, "heavy": weight},
        "one too many": {"bias": bias, "weight": weight, "c": np.zeros(0, np.float32)},
        "another shape": {"bias": bias, "weight": weight.T},
        "another rank": {"bias": bias, "weight": weight.ravel()},
        "float64": {"bias": bias, "weight": weight.astype(np.float64)},
        "int32": {"bias": bias, "weight": weight.astype(np.int32)},
        "bool": {"bias": bias.astype(np.bool_), "weight": weight},
    }
    for why, tensors in wrong.items():
        refused(shared_node, job, encode(tensors), {413, 422}, why)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_rejected_by_client_and_may_come_again(
    shared_node: LiveNode, job: str, poison: float
) -> None:
    round_ = make_round(SMALL, 4)
    bad = {name: array.copy() for name, array in round_.updates[0].items()}
    bad["weight"][-1, -1] = poison
    with shared_node.client(job, "client-0") as client:
        before = client.fetch_model()
        assert client.submit(bad, num_samples=5.0, round=1).status == "accepted"
        until(lambda: client.describe()["current"]["rejected"] == 1, "rejection")
        assert client.describe()["current"]["rejected_clients"] == ["client-0"]
        assert client.fetch_model().data == before.data
        submit_all(shared_node, job, round_, range(1, 4))
        assert client.describe()["round"] == 1
        again = client.submit(round_.bodies[0], num_samples=round_.weights[0], round=1)
        assert again.status == "accepted"
    assert_mean(model_after(shared_node, job, 1), round_.updates, round_.weights)


def test_weights_that_are_none_are_refused(shared_node: LiveNode, job: str) -> None:
    for samples in ("0", "-0.0", "-1", "nan", "inf", "-inf", "1e300", "1e-400", "", "many", "0x10", "1_0"):
        refused(shared_node, job, good_body(), {400}, samples, headers=headers_of_update("bad", samples=samples))


def test_updates_of_other_rounds_are_told_which_one_is_open(shared_node: LiveNode, job: str) -> None:
    run_round(shared_node, job, SMALL, 4, 1)
    late = refused(shared_node, job, good_body(), {409}, "past", headers=headers_of_update("x", 1))
    assert (late["title"], late["round"]) == ("Late", 2)
    for number in (3, 1000, 2**31 - 1):
        early = refused(shared_node, job, good_body(), {409}, "future", headers=headers_of_update("x", number))
        assert (early["title"], early["round"]) == ("Early", 2)
    for text in ("0", "-1", str(2**31), "1.0", "one"):
        headers = headers_of_update("x") | {"ce-round": text}
        refused(shared_node, job, good_body(), {400}, text, headers=headers)
    with shared_node.client(job, "tardy") as client:
        assert client.submit(good_body(), num_samples=1.0, round=1) == Submission("late", 2)


def test_the_same_update_twice_counts_once(shared_node: LiveNode, job: str) -> None:
    round_ = make_round(SMALL, 4)
    other = random_like(SMALL, 77)
    assert submit(shared_node, job, round_, 0).status == "accepted"
    assert submit(shared_node, job, round_, 0).status == "duplicate"
    with shared_node.client(job, "client-0") as client:
        assert client.submit(other, num_samples=100.0, round=1).status == "duplicate"
        assert client.describe()["current"]["duplicates"] == 2
    submit_all(shared_node, job, round_, range(1, 4))
    assert_mean(model_after(shared_node, job, 1), round_.updates, round_.weights)


def test_the_same_update_twice_at_once_counts_once(shared_node: LiveNode) -> None:
    clients = 12
    create_job(shared_node, "twins", SMALL, goal=clients, slots=8)
    round_ = make_round(SMALL, clients)
    barrier = threading.Barrier(2 * clients)

    def send(number: int) -> str:
        with shared_node.client("twins", f"client-{number}") as client:
            client.describe()
            barrier.wait(PATIENCE)
            return client.submit(round_.bodies[number], num_samples=round_.weights[number], round=1).status

    with ThreadPoolExecutor(2 * clients) as pool:
        statuses = Counter(pool.map(send, [number for number in range(clients) for _ in range(2)]))
    # A twin that comes after the last of the others finds the round closed.
    assert statuses["accepted"] == clients and statuses["duplicate"] + statuses["late"] == clients
    assert_mean(model_after(shared_node, "twins", 1), round_.updates, round_.weights)
    shared_node.assert_all_slots_free("twins")


def test_an_unknown_job_is_not_found(shared_node: LiveNode) -> None:
    refused(shared_node, "nobody", good_body(), {404}, "update")
    with shared_node.client("nobody") as client:
        for call in (client.describe, client.fetch_model, client.delete):
            with pytest.raises(Refused) as caught:
                call()
            assert caught.value.status == 404


# --- several gateways, restarts ------------------------------------------------------------------------------


def test_two_gateways_share_port_and_slots(make_node: Callable[..., LiveNode]) -> None:
    node = make_node(gateways=2)
    create_job(node, "stream", SMALL, goal=60, slots=8)
    round_ = make_round(SMALL, 60)
    with sending(node, "stream", round_, threads=30) as futures:
        until(lambda: count(futures) >= 10, "first updates")
        node.kill("gateway-1")
    assert_mean(model_after(node, "stream", 1), round_.updates, round_.weights)
    # Lazily all updates of a round lie in memory at once: every slot of both gateways is needed.
    # Bodies so small that a gateway without a free slot has them whole when it says so, and keeps the connection.
    tiny = {"weight": np.zeros(300, np.float32)}
    create_job(node, "store", tiny, goal=8, slots=8, timing="lazy")
    for number in (1, 2, 3):
        run_round(node, "store", tiny, 8, number)


def test_a_node_that_was_stopped_goes_on_with_round_and_model(make_node: Callable[..., LiveNode]) -> None:
    node = make_node()
    create_job(node, "job", SMALL, goal=3)
    for number in (1, 2):
        run_round(node, "job", SMALL, 3, number)
    before = model_after(node, "job", 2)
    submit(node, "job", make_round(SMALL, 3), 0, number=3)
    node.stop()
    node = make_node()
    state = until(lambda: state if (state := node.describe("job"))["status"] == "running" else None, "job")
    assert (state["round"], state["current"]["accepted"]) == (3, 0)
    after = model_after(node, "job", 2)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    run_round(node, "job", SMALL, 3, 3)
    node.assert_all_slots_free("job")


def start_func_run(watch: Watch, state: Path, data_plane: str) -> tuple[subprocess.Popen[bytes], str]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "lifl.cli", "run", "--path", str(ROOT), "--address", "127.0.0.1:0"),
            *("--state-directory", str(state), "--data-plane", data_plane, "-o", "json"),
        ],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    process.stdout.close()
    if not line:
        process.kill()
        process.wait()
        pytest.fail("func run did not start")
    return process, f"http://{json.loads(line)['address'].removeprefix('http://')}"


def test_a_node_whose_supervisor_is_killed_ends_and_starts_again(
    watch: Watch, tmp_path: Path, data_plane: str
) -> None:
    process, address = start_func_run(watch, tmp_path / "state", data_plane)
    round_ = make_round(SMALL, 3)
    with Client(address, "job", "observer") as observer:
        observer.create_job(function="fedavg", goal=3)
        observer.upload_model(SMALL)
        for client in range(3):
            with Client(address, "job", f"client-{client}") as connection:
                connection.submit(round_.bodies[client], num_samples=round_.weights[client], round=1)
        before = dict(observer.wait_for_round(after=1, timeout=PATIENCE).tensors)
        until(lambda: observer.describe()["checkpointed_round"] == 2, "checkpoint")
        assert len(watch.processes()) >= 6  # the supervisor, agent, coordinator, gateway, zygote, a worker
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: not watch.processes(), "end of all processes", 10)
    process, address = start_func_run(watch, tmp_path / "state", data_plane)
    try:
        with Client(address, "job", "observer") as observer:
            until(lambda: observer.describe()["round"] == 2, "open round")
            after = dict(observer.fetch_model().tensors)
            assert all(np.array_equal(before[name], after[name]) for name in before)
            for client in range(3):
                with Client(address, "job", f"client-{client}") as connection:
                    connection.submit(round_.bodies[client], num_samples=round_.weights[client], round=2)
            result = dict(observer.wait_for_round(after=2, timeout=PATIENCE).tensors)
            assert_mean(result, round_.updates, round_.weights)
    finally:
        process.terminate()
        process.wait(20)


# --- a hostile function --------------------------------------------------------------------------------------

HOSTILE = '''
import contextlib
import gc
import os
import random

from lifl import Aggregate, ModelUpdate, aggregator
from lifl.descriptor import Kind
from lifl.endpoint import Endpoint
from lifl.messages import ROLE_CODES


@aggregator
def hostile(total: Aggregate, update: ModelUpdate) -> None:
    """Lie to everybody, in well-formed descriptors and in others."""
    total.add(update, weight=update.num_samples)
    endpoint = next(thing for thing in gc.get_objects() if isinstance(thing, Endpoint))
    everybody = [code << 24 | number for code in (*ROLE_CODES.values(), 0, 9, 255) for number in range(12)]
    slots = [pool << 22 | index for pool in range(5) for index in range(10)]
    with contextlib.suppress(Exception):
        for kind in Kind:
            for destination in everybody:
                endpoint.send(destination, random.choice(slots), random.randrange(4), kind, random.randrange(4))
            for slot in slots:
                for generation in range(3):
                    endpoint.send(1 << 24, slot, 1, kind, generation)
        if os.environ["LIFL_E2E_GARBAGE"] == "frames":
            for size in (1, 15, 17, 4096, 60000):
                endpoint.near.send(os.urandom(size), 64)
'''


@pytest.mark.parametrize("garbage", ["lies", "frames"])
def test_a_worker_that_sends_garbage_harms_no_other_job(
    make_node: Callable[..., LiveNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, garbage: str
) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE)
    monkeypatch.setenv("LIFL_E2E_GARBAGE", garbage)
    node = make_node(functions={**FUNCTIONS, "hostile": tmp_path / "hostile.py"})
    create_job(node, "good", SMALL, goal=12, slots=6)
    create_job(node, "bad", SMALL, goal=12, slots=6, function="hostile")
    round_ = make_round(SMALL, 12)
    for client in round_.clients:
        submit(node, "good", round_, client)
        with contextlib.suppress(Refused), node.client("bad", f"client-{client}", retries=0, timeout=5) as hostile:
            hostile.submit(round_.bodies[client], num_samples=1.0, round=1)
    assert_mean(model_after(node, "good", 1), round_.updates, round_.weights)
    run_round(node, "good", SMALL, 12, 2)
    node.assert_all_slots_free("good")
    with node.client("bad") as client:
        client.delete()
    run_round(node, "good", SMALL, 12, 3)
    until(lambda: node.metric("lifl_gateway_slots", "bad") < 0, "end of the hostile job's memory")


def test_a_function_that_never_returns_does_not_outlive_its_node(
    make_node: Callable[..., LiveNode], tmp_path: Path
) -> None:
    code = "from lifl import aggregator\n\n@aggregator\ndef endless(total, update):\n    while True: pass\n"
    (tmp_path / "endless.py").write_text(code)
    node = make_node(functions={"endless": tmp_path / "endless.py"})
    create_job(node, "job", SMALL, goal=2, function="endless")
    submit_all(node, "job", make_round(SMALL, 2))
    workers = until(node.workers, "worker")
    with node.client("job") as client:
        client.delete()
    until(lambda: not set(workers) & set(node.workers()), "end of workers that never look up")
    create_job(node, "other", SMALL, goal=2, function="endless")
    submit_all(node, "other", make_round(SMALL, 2))
    until(node.workers, "worker")
    node.stop()
    assert not node.watch.processes()


def test_a_job_for_a_function_that_the_project_does_not_have_is_refused(shared_node: LiveNode) -> None:
    with shared_node.client("no-such-function") as client:
        with pytest.raises(Refused, match=r"no function 'nonsense'; it has: .*fedavg") as refusal:
            client.create_job(function="nonsense", goal=1)
        assert refusal.value.status == 422


def test_more_jobs_than_one_message_can_name_are_all_listed(node: LiveNode) -> None:
    names = [f"job-{number:03}" for number in range(700)]
    with Client(node.address, "x", "operator") as client:
        for name in names:
            client.job = name
            client.create_job(function="fedavg", goal=2)

    with urlopen(f"{node.address}/v1/jobs", timeout=30) as answer:
        listed = json.loads(answer.read())["jobs"]

    assert [job["job"] for job in listed] == names
    assert len(json.dumps(listed)) > 256 * 1024
    assert node.describe(names[-1])["status"] == "waiting-for-model"

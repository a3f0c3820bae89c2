"""The gateway over real sockets: well-behaved clients, broken ones and hostile ones."""

import base64
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from lifl.descriptor import Kind
from lifl.messages import (
    AcquireModel,
    Admit,
    BusySlots,
    Commit,
    InstallModel,
    JobSpec,
    PoolInfo,
    Problem,
    Verdict,
)
from lifl.model_layout import encode_header
from lifl.slot import PAGE, UpdateHeader, slot_reference, split_slot_reference
from lifl_gateway.server import GatewayServer, Limits
from lifl_gateway.tokens import Identity, Tokens
from lifl_gateway.transfer import Pace

from tests.integration.gateway_harness import (
    AGGREGATOR,
    JOB,
    UPDATES_POOL,
    Node,
    as_body,
    event_headers,
    eventually,
    make_model,
    raw_post,
    read_response,
)

UPDATES = f"/v1/jobs/{JOB}/updates"
MODEL = f"/v1/jobs/{JOB}/model"
IMPATIENT = Limits(head_seconds=0.3, idle_seconds=0.5, pace=Pace(0.3, 1000))


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.fixture
def impatient(tmp_path):
    node = Node(tmp_path, limits=IMPATIENT, values=100_000)
    yield node
    node.close()


def problem_of(response):
    """The problem document of an answer."""
    status, headers, body = response
    assert headers["content-type"] == "application/problem+json"
    document = json.loads(body)
    assert document["status"] == status
    assert document["type"].startswith("urn:lifl:problem:")
    assert b"Traceback" not in body
    return document


def all_free(node):
    """Whether every slot comes back."""
    return eventually(lambda: node.free_slots == node.coordinator.slots)


# --- a good update -------------------------------------------------------------------------------------------


def test_an_update_lands_in_a_slot_and_its_descriptor_at_the_aggregator(node):
    status, _, body = node.post(client="alice", ce_kind="delta", ce_numsamples="12.5")
    assert status == 202
    assert json.loads(body) == {"status": "accepted", "round": 1}
    commit = node.coordinator.accepted[JOB, 1, "alice"]
    assert eventually(lambda: node.agent.received)
    message = node.agent.received[0]
    assert (message.destination, message.slot, message.round, message.kind) == (
        AGGREGATOR,
        commit.slot,
        1,
        Kind.UPDATE,
    )
    assert message.generation == commit.generation == 1
    memory, _ = node.coordinator.memory[JOB]
    index = split_slot_reference(commit.slot)[1]
    assert UpdateHeader.unpack_from(memory.header(index)) == UpdateHeader(
        1, 1, True, 12.5, 0, len(node.payload), "alice"
    )
    assert memory.payload(index, len(node.payload)) == node.payload


def test_a_released_slot_is_free_again_and_its_generation_grows(node):
    node.post(client="alice")
    assert node.free_slots == 7
    node.coordinator.release_all()
    assert all_free(node)
    node.post(client="bob")
    assert node.coordinator.accepted[JOB, 1, "bob"].generation == 2


def test_the_same_client_again_is_a_duplicate_and_costs_no_slot(node):
    node.post()
    status, _, body = node.post()
    assert (status, json.loads(body)) == (200, {"status": "duplicate", "round": 1})
    assert node.free_slots == 7


def test_a_duplicate_found_at_commit_frees_the_slot(node):
    node.coordinator.answers[Commit] = Verdict("duplicate", 1)
    assert node.post()[0] == 200
    assert node.free_slots == 8


def test_an_update_that_is_late_at_commit_names_the_open_round_and_frees_the_slot(node):
    node.coordinator.answers[Commit] = Verdict("late", 2)
    document = problem_of(node.post())
    assert (document["status"], document["title"], document["round"]) == (409, "Late", 2)
    assert node.free_slots == 8


@pytest.mark.parametrize(("number", "title"), [("1", "Late"), ("9", "Early")])
def test_an_update_of_another_round_is_told_the_open_one(node, number, title):
    node.coordinator.change(JOB, round=2, model_round=2)
    document = problem_of(node.post(ce_round=number))
    assert (document["status"], document["title"], document["round"]) == (409, title, 2)


def test_no_descriptor_is_sent_when_the_aggregator_is_only_being_started(node):
    node.coordinator.destination = 0
    assert node.post()[0] == 202
    assert not node.agent.received


def test_a_release_that_comes_before_the_answer_is_not_lost(node):
    node.coordinator.release_at_once = True
    for number in range(20):
        assert node.post(client=str(number))[0] == 202
    assert all_free(node)


def test_a_header_of_another_order_and_dtype_is_stored_beside_the_payload(node):
    header = encode_header({"weight": ("BF16", [1000]), "bias": ("F32", [1])})
    payload = bytes(2004)
    assert node.post(as_body(header, payload))[0] == 202
    memory, _ = node.coordinator.memory[JOB]
    index = split_slot_reference(node.coordinator.accepted[JOB, 1, "alice"].slot)[1]
    written = UpdateHeader.unpack_from(memory.header(index))
    assert (written.layout_bytes, written.payload_bytes) == (len(header), 2004)
    assert memory.slot(index)[PAGE : PAGE + len(header)] == header


def test_a_client_id_of_any_language_reaches_the_slot(node):
    assert node.post(client="%E2%82%AC%20%C3%BC")[0] == 202
    assert (JOB, 1, "\u20ac \u00fc") in node.coordinator.accepted


def test_a_structured_event_is_taken_too(node):
    event = {
        "specversion": "1.0",
        "type": "dev.lifl.update.v1",
        "id": "1",
        "source": "alice",
        "round": 1,
        "numsamples": "32",
        "data_base64": base64.b64encode(node.body).decode(),
    }
    headers = {"content-type": "application/cloudevents+json; charset=UTF-8"}
    assert node.request("POST", UPDATES, json.dumps(event), headers)[0] == 202
    memory, _ = node.coordinator.memory[JOB]
    index = split_slot_reference(node.coordinator.accepted[JOB, 1, "alice"].slot)[1]
    assert memory.payload(index, len(node.payload)) == node.payload
    assert node.request("POST", UPDATES, json.dumps(event), headers)[0] == 200
    event |= {"source": "bob", "data_base64": base64.b64encode(node.body[:-1]).decode()}
    assert problem_of(node.request("POST", UPDATES, json.dumps(event), headers))["status"] == 422
    assert problem_of(node.request("POST", UPDATES, "[" * 5000, headers))["status"] == 400
    assert problem_of(node.request("POST", UPDATES, bytes(200_000), headers))["status"] == 413
    assert node.free_slots == 7


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({"ce_specversion": None}, 400, "specversion"),
        ({"ce_specversion": "0.3"}, 400, "specversion"),
        ({"ce_type": "other"}, 400, "type"),
        ({"ce_id": None}, 400, "id"),
        ({"ce_source": None}, 400, "source"),
        ({"ce_source": "x" * 257}, 400, "source"),
        ({"ce_source": "%ff"}, 400, "source"),
        ({"ce_round": None}, 400, "round"),
        ({"ce_round": "0"}, 400, "round"),
        ({"ce_round": "x"}, 400, "round"),
        ({"ce_numsamples": None}, 400, "numsamples"),
        ({"ce_numsamples": "0"}, 400, "numsamples"),
        ({"ce_numsamples": "inf"}, 400, "numsamples"),
        ({"ce_kind": "gradient"}, 400, "kind"),
        ({"content_type": None}, 415, "octet-stream"),
        ({"content_type": "application/json"}, 415, "octet-stream"),
    ],
)
def test_a_bad_header_is_refused_by_name_before_a_slot_is_taken(node, changes, status, word):
    document = problem_of(node.post(**changes))
    assert document["status"] == status
    assert word in document["detail"]
    assert node.free_slots == 8
    assert not any(isinstance(question, Admit) for question in node.coordinator.questions)


def test_an_unknown_job_is_not_found(node):
    assert problem_of(node.post(job="nobody"))["status"] == 404


@pytest.mark.parametrize("status", ["waiting-for-model", "complete", "failed"])
def test_a_job_that_does_not_run_takes_no_updates(node, status):
    node.coordinator.change(JOB, status=status, model_round=0 if status == "waiting-for-model" else 1)
    assert problem_of(node.post())["status"] == 409


def test_a_job_that_is_being_restored_asks_for_patience(node):
    node.coordinator.change(JOB, status="waiting-for-model")
    assert problem_of(node.post())["status"] == 503


@pytest.mark.parametrize("nbytes", [0, 9])
def test_a_body_too_short_for_safetensors_is_refused(node, nbytes):
    with node.connect() as sock:
        sock.sendall(raw_post(nbytes) + bytes(nbytes))
        assert read_response(sock)[0] == 422


def test_a_body_too_large_for_the_job_is_refused_unread(node):
    with node.connect() as sock:
        sock.sendall(raw_post(1 << 40))
        assert problem_of(read_response(sock))["status"] == 413


@pytest.mark.parametrize(
    "claim", [1 << 30, 2**64 - 1, 4097 + 4096], ids=["a gigabyte", "everything", "more than the room"]
)
def test_a_header_that_claims_too_much_is_refused_at_once(node, claim):
    body = claim.to_bytes(8, "little") + node.body[8:]
    assert "claims" in problem_of(node.post(body))["detail"]
    assert node.free_slots == 8


@pytest.mark.parametrize(
    "change",
    [
        lambda header, payload: as_body(header, payload[:-1]),
        lambda header, payload: as_body(header, payload + b"x"),
        lambda header, payload: as_body(header[: len(header) // 2], payload),
        lambda header, payload: as_body(b"x" * len(header), payload),
        lambda header, payload: as_body(header.replace(b"bias", b"bass"), payload),
        lambda header, payload: as_body(b"{}", payload),
        lambda header, payload: as_body(*make_model(999)),
        lambda header, payload: as_body(b"[" * len(header), payload),
    ],
)
def test_bytes_that_are_not_the_jobs_model_are_refused_and_the_slot_is_freed(node, change):
    assert problem_of(node.post(change(node.header, node.payload)))["status"] == 422
    assert node.free_slots == 8


def test_a_full_pool_answers_503_before_the_body_is_read(node):
    for number in range(8):
        assert node.post(client=str(number))[0] == 202
    with node.connect() as sock:
        sock.sendall(raw_post(len(node.body), "Expect: 100-continue", client="late"))
        status, headers, _ = read_response(sock)
    assert (status, headers["retry-after"]) == (503, "1")
    node.coordinator.release_all()
    assert all_free(node)


def test_two_hundred_clients_share_eight_slots(node):
    node.coordinator.release_at_once = True

    def upload(number):
        for attempt in range(200):
            status = node.post(client=f"client-{number}")[0]
            if status != 503:
                return status
            time.sleep(0.002 * (attempt + 1))
        return 0

    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(upload, range(200))) == [202] * 200
    assert len(node.coordinator.accepted) == 200
    assert all_free(node)


# --- bodies that do not come as announced ----------------------------------------------------------------------


def test_a_body_without_a_length_is_refused(node):
    with node.connect() as sock:
        sock.sendall(raw_post(None))
        assert problem_of(read_response(sock))["status"] == 411


def test_a_chunked_body_is_refused(node):
    with node.connect() as sock:
        sock.sendall(raw_post(None, "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n")
        assert problem_of(read_response(sock))["status"] == 411


def test_a_request_with_two_lengths_is_refused(node):
    with node.connect() as sock:
        sock.sendall(raw_post(10, "Content-Length: 20"))
        assert problem_of(read_response(sock))["status"] == 400


def test_a_body_cut_short_frees_the_slot(node):
    with node.connect() as sock:
        sock.sendall(raw_post(len(node.body)) + node.body[:-100])
        assert eventually(lambda: node.free_slots == 7)
        sock.shutdown(socket.SHUT_WR)
        assert problem_of(read_response(sock))["title"] == "Incomplete body"
    assert node.free_slots == 8


def test_a_reset_connection_frees_the_slot(node):
    sock = node.connect()
    sock.sendall(raw_post(len(node.body)) + node.body[:-100])
    assert eventually(lambda: node.free_slots == 7)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    assert all_free(node)


def test_what_follows_a_body_is_the_next_request_or_an_error(node):
    with node.connect() as sock:
        sock.sendall(raw_post(len(node.body)) + node.body + b"GARBAGE\r\n\r\n")
        assert read_response(sock)[0] == 202
        assert problem_of(read_response(sock))["status"] == 400
        assert sock.recv(1) == b""


def test_a_silent_body_times_out_and_frees_the_slot(impatient):
    with impatient.connect() as sock:
        sock.sendall(raw_post(len(impatient.body)) + impatient.body[:1000])
        assert problem_of(read_response(sock))["status"] == 408
    assert all_free(impatient)


def test_a_trickling_body_times_out_and_frees_the_slot(impatient):
    with impatient.connect() as sock:
        sock.sendall(raw_post(len(impatient.body)) + impatient.body[:1000])
        ended = threading.Event()

        def trickle():
            while not ended.wait(0.02):
                try:
                    sock.send(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=trickle)
        thread.start()
        assert read_response(sock)[0] == 408
        ended.set()
        thread.join()
    assert all_free(impatient)


def test_a_slow_body_that_makes_progress_is_accepted(impatient):
    body = impatient.body
    step = len(body) // 20
    with impatient.connect() as sock:
        sock.sendall(raw_post(len(body)))
        for start in range(0, len(body), step):
            sock.sendall(body[start : start + step])
            time.sleep(0.05)
        assert read_response(sock)[0] == 202


def test_an_early_answer_reaches_a_client_that_is_still_sending(tmp_path):
    node = Node(tmp_path, values=5_000_000)
    try:
        node.post()
        with node.connect() as sock:
            sock.sendall(raw_post(len(node.body)))
            sock.sendall(node.body)  # blocks unless somebody takes it
            status, headers, body = read_response(sock)
        assert (status, json.loads(body)["status"]) == (200, "duplicate")
        assert headers["connection"] == "close"
    finally:
        node.close()


# --- expectations and connections ------------------------------------------------------------------------------


def test_a_client_is_asked_for_its_body_when_it_is_wanted(node):
    with node.connect() as sock:
        sock.sendall(raw_post(len(node.body), "Expect: 100-continue"))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(node.body)
        assert read_response(sock)[0] == 202


@pytest.mark.parametrize(
    ("prepare", "status"),
    [
        (lambda node: node.post(), 200),
        (lambda node: node.coordinator.change(JOB, round=2), 409),
        (lambda node: node.coordinator.change(JOB, status="complete"), 409),
    ],
)
def test_a_client_is_not_asked_for_a_body_that_nobody_wants(node, prepare, status):
    prepare(node)
    with node.connect() as sock:
        sock.sendall(raw_post(len(node.body), "Expect: 100-continue"))
        answer = read_response(sock)
        assert answer[0] == status
        assert answer[1]["connection"] == "close"


def test_a_connection_is_used_again(node):
    connection = http.client.HTTPConnection(*node.address, timeout=10)
    connection.connect()
    sock = connection.sock
    for number in range(5):
        connection.request("POST", UPDATES, node.body, event_headers(str(number)))
        response = connection.getresponse()
        response.read()
        assert response.status == 202
        assert connection.sock is sock
    connection.request("GET", "/nowhere")
    assert connection.getresponse().read()
    assert connection.sock is sock
    connection.close()


def test_pipelined_requests_are_answered_in_order(node):
    with node.connect() as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\nGET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n")
        sock.sendall(raw_post(len(node.body)) + node.body)
        assert [read_response(sock)[0] for _ in range(3)] == [200, 404, 202]


def test_a_client_of_http_1_0_is_answered_and_closed(node):
    with node.connect() as sock:
        sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert read_response(sock)[0] == 200
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"1" * 70_000, 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"BREW /healthz HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"GET //healthz HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"GET /%ff%00 HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 405),
    ],
)
def test_a_strange_request_gets_the_right_answer(node, data, status):
    with node.connect() as sock:
        sock.sendall(data)
        assert read_response(sock)[0] == status


def test_a_slow_head_times_out_in_all(impatient):
    with impatient.connect() as sock:
        started = time.monotonic()
        for byte in b"GET / HTTP/1.1\r\nHost: aaaaaaaaaaaaaaaaa":
            try:
                sock.send(bytes([byte]))
            except OSError:
                break
            time.sleep(0.02)
        assert problem_of(read_response(sock))["status"] == 408
        assert time.monotonic() - started < 3


def test_silent_connections_are_closed(impatient):
    with impatient.connect() as fresh, impatient.connect() as used:
        used.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert read_response(used)[0] == 200
        assert fresh.recv(1) == b""
        assert used.recv(1) == b""
    assert eventually(lambda: impatient.gateway.server.connections == 0)


def test_connections_beyond_the_limit_are_turned_away(tmp_path):
    node = Node(tmp_path, limits=Limits(connections=4))
    try:
        kept = [node.connect() for _ in range(4)]
        assert eventually(lambda: node.gateway.server.connections == 4)
        with node.connect() as sock:
            assert problem_of(read_response(sock))["status"] == 503
        for sock in kept:
            sock.close()
        assert eventually(lambda: node.gateway.server.connections == 0)
        assert node.request("GET", "/healthz")[0] == 200
    finally:
        node.close()


# --- models --------------------------------------------------------------------------------------------------


def test_the_model_comes_from_shared_memory_and_the_loan_ends(node):
    status, headers, body = node.request("GET", MODEL)
    assert (status, body) == (200, node.body)
    assert headers["LIFL-Round"] == "1"
    assert headers["Content-Type"] == "application/vnd.safetensors"
    assert headers["ETag"] == '"abc-1"'
    assert eventually(lambda: not node.coordinator.leases)


def test_the_model_comes_from_its_file(node, tmp_path):
    node.coordinator.model_in_file = tmp_path / "model"
    node.coordinator.model_in_file.write_bytes(node.body)
    assert node.request("GET", MODEL)[2] == node.body
    status, headers, body = node.request("HEAD", MODEL)
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(node.body)))
    node.coordinator.model_in_file.unlink()
    assert problem_of(node.request("GET", MODEL))["status"] == 404


def test_a_head_request_gives_the_loan_back(node):
    assert node.request("HEAD", MODEL)[0] == 200
    assert eventually(lambda: not node.coordinator.leases)


def test_a_reader_that_stops_reading_gives_the_loan_back(tmp_path):
    node = Node(tmp_path, limits=Limits(pace=Pace(0.3, 1000)), values=10_000_000)
    try:
        with node.connect() as sock:
            sock.sendall(f"GET {MODEL} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert eventually(lambda: node.coordinator.leases)
            assert eventually(lambda: not node.coordinator.leases)
        with node.connect() as sock:
            sock.sendall(f"GET {MODEL} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            assert eventually(lambda: node.coordinator.leases)
        assert eventually(lambda: not node.coordinator.leases)
    finally:
        node.close()


def test_a_known_model_is_not_sent_again(node):
    status, headers, body = node.request("GET", MODEL, headers={"If-None-Match": '"abc-1"'})
    assert (status, body, headers["ETag"]) == (304, b"", '"abc-1"')
    assert node.request("GET", f"{MODEL}?after=1")[0] == 304
    assert node.request("GET", f"{MODEL}?round=1", headers={"If-None-Match": 'W/"abc-1", "x"'})[0] == 304
    assert node.request("GET", MODEL, headers={"If-None-Match": '"def-1"'})[0] == 200
    assert node.request("GET", f"{MODEL}?round=1")[0] == 200
    assert node.request("GET", f"{MODEL}?round=7")[0] == 404


def test_a_long_poll_ends_with_the_next_round(node):
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(node.request, "GET", f"{MODEL}?wait=20", None, {"If-None-Match": '"abc-1"'})
        time.sleep(0.1)
        assert not future.done()
        node.coordinator.change(JOB, round=2, model_round=2)
        status, headers, _ = future.result(5)
    assert (status, headers["LIFL-Round"]) == (200, "2")


@pytest.mark.parametrize(("change", "status"), [({"status": "complete"}, 304), ({"status": "deleted"}, 404)])
def test_a_long_poll_ends_with_the_job(node, change, status):
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(node.request, "GET", f"{MODEL}?wait=20&after=1")
        time.sleep(0.1)
        node.coordinator.change(JOB, **change)
        assert future.result(5)[0] == status


def test_a_long_poll_ends_in_time(node):
    started = time.monotonic()
    assert node.request("GET", f"{MODEL}?wait=0.2&after=1")[0] == 304
    assert 0.15 < time.monotonic() - started < 2


@pytest.mark.parametrize(
    "query",
    [
        "wait=61",
        "wait=-1",
        "wait=nan",
        "wait=x",
        "round=0",
        "round=x",
        "after=-1",
        "round=1&round=2",
        "round=",
        "wiat=3",
    ],
)
def test_a_bad_query_is_refused(node, query):
    assert problem_of(node.request("GET", f"{MODEL}?{query}"))["status"] == 400


def upload_model(node, body, job="new", **headers):
    headers = {"content-type": "application/vnd.safetensors"} | headers
    return node.request("PUT", f"/v1/jobs/{job}/model", body, headers)


def create_job(node, **changes):
    spec = {"name": "new", "function": "fedavg", "goal": 4} | changes
    return node.request("POST", "/v1/jobs", json.dumps(spec), {"content-type": "application/json"})


def test_a_job_lives_from_its_creation_to_its_deletion(node):
    status, headers, body = create_job(node)
    assert (status, headers["Location"]) == (201, "/v1/jobs/new")
    assert json.loads(body)["status"] == "waiting-for-model"
    assert problem_of(node.post(job="new"))["title"] == "No model yet"
    status, _, body = upload_model(node, node.body)
    assert (status, json.loads(body)["status"]) == (201, "running")
    assert not list((node.directory / "incoming").iterdir())
    assert not {"nonce", "updates_pool", "aggregates_pool", "type"} & json.loads(body).keys()
    assert node.post(job="new")[0] == 202
    assert problem_of(upload_model(node, node.body))["status"] == 409
    assert node.request("GET", "/v1/jobs/new/model")[2] == node.body
    assert node.request("DELETE", "/v1/jobs/new")[0] == 204
    assert node.request("DELETE", "/v1/jobs/new")[0] == 404
    assert eventually(lambda: node.post(job="new")[0] == 404)


def test_a_job_of_the_same_name_is_refused_only_if_it_differs(node):
    assert create_job(node)[0] == 201
    assert create_job(node)[0] == 201
    assert problem_of(create_job(node, goal=5))["status"] == 409


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 50_000, 400),
        (b"[]", 422),
        (b'{"name":"a"}', 422),
        (b'{"name":"a","function":"f","goal":"4"}', 422),
        (b'{"name":"a","function":"f","goal":4,"unknown":1}', 422),
        (b'{"name":"A","function":"f","goal":4}', 422),
        (b'{"name":"a","function":"f","goal":0}', 422),
        (b'{"name":"a","function":"f","goal":4.5}', 422),
        (b'{"name":"a","function":"f","goal":4,"idle_seconds":1e300}', 422),
        (b" " * 70_000, 413),
    ],
)
def test_a_bad_job_is_refused(node, body, status):
    answer = node.request("POST", "/v1/jobs", body, {"content-type": "application/json"})
    assert problem_of(answer)["status"] == status


def test_a_job_of_another_media_type_is_refused(node):
    assert node.request("POST", "/v1/jobs", b"{}", {"content-type": "text/plain"})[0] == 415


@pytest.mark.parametrize("cut", [slice(0), slice(7), slice(9), slice(0, -1)])
def test_a_broken_initial_model_is_refused_and_leaves_no_file(node, cut):
    create_job(node)
    assert problem_of(upload_model(node, node.body[cut] or b""))["status"] in (411, 422)
    assert not list((node.directory / "incoming").iterdir())


def test_an_initial_model_that_breaks_off_leaves_no_file(node):
    create_job(node)
    with node.connect() as sock:
        head = f"PUT /v1/jobs/new/model HTTP/1.1\r\nHost: a\r\nContent-Length: {len(node.body)}\r\n"
        sock.sendall(head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + node.body[:-1])
        assert eventually(lambda: list((node.directory / "incoming").iterdir()))
        sock.shutdown(socket.SHUT_WR)
        assert read_response(sock)[0] == 400
    assert not list((node.directory / "incoming").iterdir())


def test_a_refused_initial_model_leaves_no_file(node):
    create_job(node)
    node.coordinator.answers[InstallModel] = Problem(507, "no memory")
    assert problem_of(upload_model(node, node.body))["status"] == 507
    assert not list((node.directory / "incoming").iterdir())


# --- the rest of the API -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs",
        f"/v1/jobs/{JOB}",
        f"/v1/jobs/{JOB}/rounds/1",
        "/v1/nodes",
        "/healthz",
        "/readyz",
        "/openapi.json",
    ],
)
def test_what_can_be_read_is_json(node, path):
    status, headers, body = node.request("GET", path)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    json.loads(body)
    status, headers, empty = node.request("HEAD", path)
    assert (status, headers["Content-Length"], empty) == (200, str(len(body)), b"")


@pytest.mark.parametrize("number", ["0", "2", "x", "-1", "9" * 5000, "\u00b2".encode().hex()])
def test_an_unknown_round_is_not_found(node, number):
    assert problem_of(node.request("GET", f"/v1/jobs/{JOB}/rounds/{number}"))["status"] == 404


def test_jobs_are_listed_though_the_coordinator_names_only_some_at_a_time(node):
    names = sorted(["a", "b.c", "zz", "k-1", "k-2"])
    for name in names:
        body = json.dumps({"name": name, "function": "fedavg", "goal": 1}).encode()
        assert node.request("POST", "/v1/jobs", body, {"Content-Type": "application/json"})[0] == 201

    listed = json.loads(node.request("GET", "/v1/jobs")[2])["jobs"]

    assert [job["job"] for job in listed] == sorted([*names, JOB])


def test_the_updates_of_a_round_are_listed_from_an_offset(node):
    for client in ("alice", "bob", "carol"):
        node.post(client=client)
    path = f"/v1/jobs/{JOB}/rounds/1/updates"
    status, headers, body = node.request("GET", path)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    told = json.loads(body)
    assert "type" not in told
    assert [update["client"] for update in told["updates"]] == ["alice", "bob", "carol"]
    assert all(0 <= told["monotonic"] - update["first_byte"] < 10 for update in told["updates"])
    assert abs(told["time"] - time.time()) < 10
    rest = json.loads(node.request("GET", f"{path}?offset=2")[2])
    assert [update["client"] for update in rest["updates"]] == ["carol"]


@pytest.mark.parametrize("number", ["0", "2", "x"])
def test_updates_of_an_unknown_round_are_not_found(node, number):
    assert problem_of(node.request("GET", f"/v1/jobs/{JOB}/rounds/{number}/updates"))["status"] == 404


@pytest.mark.parametrize("query", ["offset=-1", "offset=x", "offset=1&offset=2", "limit=3"])
def test_a_part_of_the_updates_that_cannot_be_is_refused(node, query):
    assert problem_of(node.request("GET", f"/v1/jobs/{JOB}/rounds/1/updates?{query}"))["status"] == 400


def test_the_latencies_that_the_coordinator_counts_are_metrics(node):
    text = node.request("GET", "/metrics")[2].decode()
    for line in (
        f'lifl_update_latency_seconds_bucket{{job="{JOB}",le="0.1"}} 3.0',
        f'lifl_update_latency_seconds_bucket{{job="{JOB}",le="1.0"}} 5.0',
        f'lifl_update_latency_seconds_bucket{{job="{JOB}",le="+Inf"}} 6.0',
        f'lifl_update_latency_seconds_count{{job="{JOB}"}} 6.0',
        f'lifl_update_latency_seconds_sum{{job="{JOB}"}} 6.5',
    ):
        assert line in text


def test_the_metrics_can_be_read_while_the_coordinator_is_away(node):
    node.coordinator.stop()
    try:
        status, _, body = node.request("GET", "/metrics")
    finally:
        node.coordinator.start()
    assert status == 200
    assert b"lifl_gateway_slots" in body
    assert b"lifl_update_latency_seconds" not in body


def test_the_metrics_count_what_happened(node):
    node.post()
    node.post()
    node.post(client="bob", ce_round="7")
    text = node.request("GET", "/metrics")[2].decode()
    assert 'lifl_gateway_updates_total{outcome="accepted"} 1.0' in text
    assert 'lifl_gateway_updates_total{outcome="duplicate"} 1.0' in text
    assert 'lifl_gateway_updates_total{outcome="early"} 1.0' in text
    assert f'lifl_gateway_slots{{job="{JOB}"}} 8.0' in text
    assert f'lifl_gateway_slots_free{{job="{JOB}"}} 7.0' in text
    assert f"lifl_gateway_received_bytes_total {len(node.body)}.0" in text


def test_an_unexpected_error_shows_nothing_of_the_inside(node, capfd):
    node.coordinator.answers[Admit] = lambda question: Verdict("accepted", 1)
    node.gateway.server.app.config["PROPAGATE_EXCEPTIONS"] = False
    node.gateway.server.app.view_functions["healthz"] = lambda: 1 / 0
    document = problem_of(node.request("GET", "/healthz"))
    assert document["status"] == 500
    assert "ZeroDivision" not in json.dumps(document)


# --- tokens --------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path):
    identities = {"secret-a": Identity("alice", False), "secret-o": Identity("*", True)}
    node = Node(tmp_path, tokens=Tokens(identities))
    yield node
    node.close()


def test_without_a_token_nothing_but_health_is_answered(guarded):
    answer = guarded.post()
    assert problem_of(answer)["status"] == 401
    assert answer[1]["WWW-Authenticate"].startswith("Bearer")
    for path in ("/v1/jobs", "/v1/nodes", "/metrics", MODEL):
        assert guarded.request("GET", path)[0] == 401
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert guarded.request("GET", path)[0] == 200


def test_a_client_may_send_its_own_updates_only(guarded):
    assert guarded.post(client="alice", authorization="Bearer secret-a")[0] == 202
    assert problem_of(guarded.post(client="bob", authorization="Bearer secret-a"))["status"] == 403
    assert guarded.post(client="bob", authorization="Bearer secret-o")[0] == 202
    headers = {"Authorization": "Bearer secret-a", "content-type": "application/json"}
    assert guarded.request("POST", "/v1/jobs", b"{}", headers)[0] == 403
    assert guarded.request("DELETE", f"/v1/jobs/{JOB}", None, headers)[0] == 403
    assert guarded.request("PUT", MODEL, b"x", headers)[0] == 403
    assert guarded.request("GET", MODEL, None, headers)[0] == 200


# --- death and return --------------------------------------------------------------------------------------------


def test_while_the_coordinator_is_away_updates_are_put_off(node):
    node.coordinator.stop()
    assert eventually(lambda: node.request("GET", "/readyz")[0] == 503)
    answer = node.post()
    assert problem_of(answer)["status"] == 503
    assert answer[1]["Retry-After"] == "1"
    assert node.request("GET", "/healthz")[0] == 200
    node.coordinator.start()
    assert eventually(lambda: node.request("GET", "/readyz")[0] == 200)
    assert node.post()[0] == 202


def test_while_the_agent_is_away_updates_are_put_off(node):
    node.post(client="alice")
    node.agent.die()
    assert eventually(lambda: not node.gateway.link.is_ready)
    answer = node.post(client="bob")
    assert (answer[0], answer[1]["Retry-After"]) == (503, "1")
    node.agent.is_up = True
    assert eventually(lambda: node.post(client="bob")[0] == 202)
    assert node.agent.joins == 2
    assert node.free_slots == 6
    node.coordinator.release_all()
    assert all_free(node)


def test_slots_whose_release_was_lost_are_free_after_a_new_joining(node):
    node.post(client="alice")
    node.post(client="bob")
    node.coordinator.busy.pop(node.coordinator.accepted[JOB, 1, "alice"].slot)
    node.agent.die()
    node.agent.is_up = True
    assert eventually(lambda: node.free_slots == 7)


def test_a_gateway_started_anew_goes_on_with_the_slots_of_the_old(node):
    node.post(client="alice")
    node.post(client="bob")
    node.coordinator.release(node.coordinator.accepted[JOB, 1, "alice"])
    assert eventually(lambda: node.free_slots == 7)
    node.stop_gateway()
    node.start_gateway()
    assert eventually(lambda: node.request("GET", "/readyz")[0] == 200)
    assert node.free_slots == 7
    assert node.post(client="carol")[0] == 202
    assert {commit.generation for commit in node.coordinator.accepted.values()} == {1, 2}
    node.coordinator.release_all()
    assert all_free(node)


def test_a_commit_without_an_answer_leaves_its_slot_to_the_coordinator(node):
    stopper = threading.Thread(target=node.coordinator.stop)

    def die(question):
        stopper.start()
        time.sleep(0.1)

    node.coordinator.answers[Commit] = die
    assert node.post()[0] == 503
    assert node.free_slots == 7
    del node.coordinator.answers[Commit]
    stopper.join()
    node.coordinator.start()
    assert eventually(lambda: node.request("GET", "/readyz")[0] == 200)
    for number in range(8):
        assert node.post(client=str(number))[0] == 202
    assert node.post(client="one too many")[0] == 503


def test_a_dropped_pool_is_unmapped_and_a_new_one_used(node):
    node.post()
    node.agent.drop_pool(UPDATES_POOL)
    assert eventually(lambda: not node.gateway.link.pools())
    info = PoolInfo(UPDATES_POOL, "updates", JOB, 99, 2, *node.coordinator.memory[JOB][0].geometry[1:])
    node.agent.create_pool(info).close()
    assert eventually(lambda: node.gateway.link.pools())
    assert node.free_slots == 2
    node.agent.release(slot_reference(UPDATES_POOL, 0), 1, 1)
    node.coordinator.busy.clear()
    assert node.post(client="bob")[0] == 202


def test_a_stopping_gateway_finishes_what_it_has_begun(node):
    with node.connect() as sock, node.connect() as idle:
        sock.sendall(raw_post(len(node.body)) + node.body[:100])
        assert eventually(lambda: node.free_slots == 7)
        stopper = threading.Thread(target=node.stop_gateway)
        stopper.start()
        assert idle.recv(1) == b""
        sock.sendall(node.body[100:])
        status, headers, _ = read_response(sock)
        stopper.join()
    assert (status, headers["connection"]) == (202, "close")
    with pytest.raises(ConnectionRefusedError):
        node.connect()
    node.start_gateway()


def test_an_address_in_use_is_an_error(node):
    with pytest.raises(OSError, match="in use"):
        GatewayServer(*node.address, lambda environ, start: [])


def test_gateways_on_several_seats_share_a_port():
    first = GatewayServer("127.0.0.1", 0, lambda environ, start: [], share_port=True)
    second = GatewayServer(*first.server_address, lambda environ, start: [], share_port=True)
    for server in (first, second):
        server.stop()
        server.serve()


def test_asking_for_busy_slots_names_the_seat(node):
    assert any(isinstance(question, BusySlots) and question.seat == 0 for question in node.coordinator.questions)


def test_the_models_header_is_asked_for_once(node):
    for number in range(3):
        node.post(client=str(number))
    assert sum(isinstance(question, AcquireModel) for question in node.coordinator.questions) == 1


def test_a_spec_reaches_the_coordinator_as_it_was_sent(node):
    create_job(node, timing="lazy", quorum=2, deadline=1.5)
    assert node.coordinator.states["new"].spec == JobSpec(
        name="new", function="fedavg", goal=4, timing="lazy", quorum=2, deadline=1.5
    )


def test_a_gateway_that_is_stopped_lets_long_polls_go(node):
    answered = []

    def wait() -> None:
        answered.append(node.request("GET", f"{MODEL}?wait=20&after=1")[0])

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)  # until the request waits: nothing tells from outside
    begun = time.monotonic()
    node.stop_gateway()
    waiting.join(10)
    assert answered == [304]
    assert time.monotonic() - begun < 2
    node.start_gateway()

"""The command line for clusters: coordinator, members, nodes, jobs and the calibration of a node."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import safetensors.numpy
from lifl import calibration, cli
from lifl.calibration import Calibration, Level, Options, has_grown, last_good, model_size
from lifl.cli.common import request_json
from lifl.cli.job import create as create_command
from lifl.cli.tables import format_bytes
from lifl.errors import InvalidInput, Refused
from lifl.messages import JobSpec
from lifl.node import Node, NodeOptions

GROUPS = {
    "job": ["create", "list", "describe", "cancel"],
    "nodes": ["list", "drain", "undrain", "calibrate"],
    "node": ["calibrate"],
}
CLUSTERED = {
    "job": "digits",
    "status": "running",
    "round": 3,
    "model_round": 3,
    "spec": {"name": "digits", "function": "fedavg", "goal": 20, "placement": "best-fit", "reuse": False},
    "data_plane": "ebpf",
    "model_payload_bytes": 44_695_848,
    "workers": 4,
    "current": {"round": 3, "status": "open", "accepted": 7, "rejected": 0, "late": 0, "nodes": 1, "top": ""},
    "last": {
        "round": 2,
        "status": "complete",
        "accepted": 20,
        "rejected": 1,
        "late": 2,
        "act": 0.0123,
        "latency_median": 0.0045,
        "started": 3,
        "reused": 4,
        "cold": 1,
        "leaves": 5,
        "nodes": 2,
        "top": "h1.example.org",
        "internode_bytes": 89_391_696,
        "lost": 6,
        "weight": 20.0,
        "duplicates": 0,
        "rejected_clients": ["c9"],
        "latency_p95": 0.02,
        "latency_max": 0.5,
    },
}
MEMBER = {
    "name": "h1",
    "status": "ready",
    "cores": 2,
    "capacity": 20.0,
    "is_calibrated": True,
    "arrival_rate": 100.0,
    "execution_seconds": 0.025,
    "residual": 17.5,
    "updates": 3,
    "workers": 2,
    "last_heard": 0.3,
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("FUNC_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["func"])


class Scripted(ThreadingHTTPServer):
    """Answers each request with what was scripted for it, in turn; the last answer is given again."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: dict[str, list[tuple[int, bytes]]] = {}
        self.seen: list[tuple[str, bytes, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, request: str, document: object = None, status: int = 200) -> None:
        body = b"" if document is None else json.dumps(document).encode()
        self.script.setdefault(request, []).append((status, body))

    @property
    def requests(self) -> list[str]:
        return [request for request, _, _ in self.seen]


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def _answer(self) -> None:
        request = f"{self.command} {self.path}"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((request, body, dict(self.headers)))
        answers = self.server.script.get(request, [(404, b'{"title": "Not Found"}')])
        status, content = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def coordinator() -> Iterator[Scripted]:
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "functions").mkdir()
    (tmp_path / "functions/fedavg.py").write_text("")
    (tmp_path / "func.yaml").write_text(
        "specVersion: 0.36.0\nname: fedavg\nruntime: python\ncreated: 2026-11-22T12:00:00Z\ninvoke: cloudevent\n"
    )
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors.numpy.save({"w": np.zeros(700_000, np.float32)}))
    return file


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def rows(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines() if line.strip()]


def assert_narrow(out: str) -> None:
    assert max(map(len, out.splitlines())) <= 80


# --- help ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{group} {name}" for group, names in GROUPS.items() for name in names])
def test_each_subcommand_shows_examples(run: Run, name: str) -> None:
    code, out, _ = run(*name.split(), "--help")

    assert code == 0
    assert f"Examples:\n    func {name}" in out


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_subcommands(run: Run, group: str) -> None:
    out = run(group, "--help")[1]

    assert all(f"  {name} " in out for name in GROUPS[group])


# --- nodes ---------------------------------------------------------------------------------------------------


def test_nodes_are_shown_in_80_columns_with_what_is_left_of_each(run: Run, coordinator: Scripted) -> None:
    lost = {
        **MEMBER,
        "name": "[b]" + "x" * 60,
        "status": "draining",
        "capacity": 12345.678,
        "is_calibrated": False,
    }
    coordinator.answer(
        "GET /v1/nodes", {"nodes": [MEMBER, {**lost, "residual": -12345.678, "last_heard": 1234.5}]}
    )

    code, out, err = run("nodes", "--url", coordinator.url)

    assert (code, err) == (0, "")
    assert rows(out)[0] == ["NAME", "STATUS", "CORES", "MC", "K*E", "RESIDUAL", "UPDATES", "WORKERS", "HEARD"]
    assert rows(out)[1] == ["h1", "ready", "2", "20", "2.5", "17.5", "3", "2", "0.3", "s"]
    assert rows(out)[2][0].startswith("[b]xxx")
    assert rows(out)[2][1:] == ["draining", "2", "~12346", "2.5", "-12346", "3", "2", "21", "min"]
    assert_narrow(out)


def test_a_guessed_capacity_is_told_from_a_measured_one(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("GET /v1/nodes", {"nodes": [{**MEMBER, "is_calibrated": False}]})

    assert "~20" in run("nodes", "list", "--url", coordinator.url)[1]


def test_a_node_on_its_own_has_no_capacity(run: Run, coordinator: Scripted) -> None:
    alone = {"name": "box", "cores": 8, "workers": 0, "status": "ready", "capacity": 0.0, "updates": 0}
    coordinator.answer("GET /v1/nodes", {"nodes": [alone]})

    out = run("nodes", "--url", coordinator.url)[1]

    assert rows(out)[1] == ["box", "ready", "8", "-", "-", "-", "-", "0", "-"]


def test_no_nodes_are_no_error(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("GET /v1/nodes", {"nodes": []})

    assert run("nodes", "--url", coordinator.url) == (0, "", "No nodes.\n")


def test_nodes_as_json_are_what_the_coordinator_said(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("GET /v1/nodes", {"nodes": [MEMBER]})

    assert json.loads(run("nodes", "-o", "json", "--url", coordinator.url)[1]) == {"nodes": [MEMBER]}


def test_watching_shows_nodes_again_only_when_they_change(
    run: Run, coordinator: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    for status in ("ready", "ready", "draining"):
        coordinator.answer("GET /v1/nodes", {"nodes": [{**MEMBER, "status": status}]})
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(time, "sleep", nap)

    code, out, _ = run("nodes", "-w", "--url", coordinator.url)

    assert code == 130
    assert [row[1] for row in rows(out) if row[0] == "h1"] == ["ready", "draining"]


def test_draining_is_ordered_from_the_coordinator(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("POST /v1/nodes/h%2F1/drain")
    coordinator.answer("POST /v1/nodes/h%2F1/undrain", {})

    assert run("nodes", "drain", "h/1", "--url", coordinator.url) == (0, "h/1 gets no more updates\n", "")
    assert run("nodes", "undrain", "h/1", "--url", coordinator.url) == (0, "h/1 gets updates again\n", "")
    assert json.loads(run("nodes", "undrain", "h/1", "--url", coordinator.url, "-o", "json")[1]) == {
        "name": "h/1",
        "status": "ready",
    }


def test_a_node_can_be_asked_to_measure_again(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("POST /v1/nodes/h1/calibrate", None, 202)

    code, out, _ = run("nodes", "calibrate", "h1", "--url", coordinator.url)

    assert code == 0 and out.startswith("h1 was asked to measure")


def test_draining_can_wait_until_nothing_is_left(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("POST /v1/nodes/h1/drain")
    for status in ("draining", "drained"):
        coordinator.answer("GET /v1/nodes", {"nodes": [{**MEMBER, "status": status}]})

    code, out, _ = run("nodes", "drain", "h1", "--wait", "--url", coordinator.url)

    assert (code, out) == (0, "h1 is drained\n")
    assert coordinator.requests.count("GET /v1/nodes") == 2


def test_a_node_that_is_lost_while_it_drains_is_an_error(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("POST /v1/nodes/h1/drain")
    coordinator.answer("GET /v1/nodes", {"nodes": [{**MEMBER, "status": "lost"}]})

    code, _, err = run("nodes", "drain", "h1", "--wait", "--url", coordinator.url)

    assert code == 1 and "was lost" in err


def test_a_name_that_no_node_has_suggests_the_list(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("POST /v1/nodes/h9/drain", {"title": "no such node"}, 404)
    coordinator.answer("GET /v1/nodes", {"nodes": [MEMBER]})

    code, _, err = run("nodes", "drain", "h9", "--url", coordinator.url)

    assert code == 1
    assert "no such node" in err and f"func nodes --url {coordinator.url}" in err


@pytest.mark.parametrize(("status", "node"), [(404, MEMBER), (405, MEMBER), (404, {"name": "alone", "cores": 2})])
def test_a_node_that_is_asked_to_drain_points_to_the_coordinator(
    run: Run, coordinator: Scripted, status: int, node: dict[str, Any]
) -> None:
    coordinator.answer("POST /v1/nodes/h1/drain", {"title": "no"}, status)
    coordinator.answer("GET /v1/nodes", {"nodes": [node]})

    code, _, err = run("nodes", "drain", "h1", "--url", coordinator.url)

    assert code == 1
    assert "is no coordinator" in err and "func nodes drain h1 --url http://HOST:7070" in err


# --- status and jobs -----------------------------------------------------------------------------------------


def test_status_of_a_clusters_job_tells_where_its_rounds_were(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("GET /v1/jobs/digits", CLUSTERED)

    out = run("status", "digits", "--url", coordinator.url)[1]

    head = "ROUND  NODES  TOP             LEAVES  STARTED/REUSED/COLD  LOST  BETWEEN NODES"
    assert head.split() in rows(out)
    assert ["2", "2", "h1.example.org", "5", "3/4/1", "6", "89.4", "MB"] in rows(out)
    assert ["2", "complete", "20", "1", "2", "12.3", "ms", "4.5", "ms"] in rows(out)
    assert_narrow(out)


def test_status_of_a_clusters_jobs_tells_how_many_nodes_each_used(run: Run, coordinator: Scripted) -> None:
    long = {**CLUSTERED, "job": "x" * 60, "status": "waiting-for-model", "workers": 10_000}
    coordinator.answer("GET /v1/jobs", {"jobs": [CLUSTERED, long, {**CLUSTERED, "last": None}]})

    out = run("status", "--url", coordinator.url)[1]

    assert rows(out)[0] == ["JOB", "STATUS", "ROUND", "UPDATES", "ACT", "WORKERS", "NODES", "TOP"]
    assert_narrow(out)
    coordinator.script.clear()
    coordinator.answer("GET /v1/jobs", {"jobs": [CLUSTERED]})
    out = run("job", "list", "--url", coordinator.url)[1]
    assert rows(out)[1] == ["digits", "running", "3", "7/20", "12.3", "ms", "4", "2", "h1.example.…"]


def test_a_job_is_described_with_its_settings(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("GET /v1/jobs/digits", CLUSTERED)

    out = run("job", "describe", "digits", "--url", coordinator.url)[1]

    assert ["placement", "best-fit"] in rows(out) and ["reuse", "False"] in rows(out)
    assert_narrow(out)
    assert json.loads(run("job", "describe", "digits", "--url", coordinator.url, "-o", "json")[1]) == CLUSTERED


def test_a_job_in_shards_says_so(run: Run, coordinator: Scripted) -> None:
    big = {**CLUSTERED, "job": "b" * 60, "spec": {**CLUSTERED["spec"], "shards": 256}}
    part = {**CLUSTERED, "job": "big.7", "spec": {**CLUSTERED["spec"], "shards": 1, "shard_of": "big"}}
    coordinator.answer("GET /v1/jobs/big", big)
    coordinator.answer("GET /v1/jobs/big.7", part)
    coordinator.answer("GET /v1/jobs", {"jobs": [big, CLUSTERED]})

    out = run("job", "describe", "big", "--url", coordinator.url)[1]
    assert ["Shards", "256"] in rows(out)
    assert_narrow(out)
    assert "this is one of big" in run("job", "describe", "big.7", "--url", coordinator.url)[1]
    out = run("job", "list", "--url", coordinator.url)[1]
    assert "SHARDS" in rows(out)[0]
    assert "256" in rows(out)[1] and "1" in rows(out)[2]
    assert_narrow(out)


def test_a_model_of_unknown_size_is_a_model_all_the_same(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("GET /v1/jobs/digits", {**CLUSTERED, "model_payload_bytes": 0})
    coordinator.answer("GET /v1/jobs/new", {**CLUSTERED, "model_payload_bytes": 0, "model_round": 0})

    assert ["Model", "round", "3"] in rows(run("status", "digits", "--url", coordinator.url)[1])
    assert ["Model", "none", "yet"] in rows(run("status", "new", "--url", coordinator.url)[1])


def test_one_round_is_described_with_those_it_rejected(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("GET /v1/jobs/digits/rounds/2", CLUSTERED["last"])

    out = run("job", "describe", "digits", "--round", "2", "--url", coordinator.url)[1]

    assert "Rejected clients  c9" in out and "20.0 ms, 500.0 ms" in out and "h1.example.org" in out
    assert_narrow(out)


def update(client: str, **fields: Any) -> dict[str, Any]:
    return {"client": client, "status": "folded", "num_samples": 7.0, "aggregator": 1, "latency": 0.004, **fields}


def test_the_updates_of_a_round_are_fetched_part_by_part(run: Run, coordinator: Scripted) -> None:
    base = "GET /v1/jobs/digits/rounds/3/updates"
    coordinator.answer("GET /v1/jobs/digits", CLUSTERED)
    coordinator.answer(base, {"round": 3, "updates": [update("c1"), update("c" * 99)], "next": 2})
    coordinator.answer(f"{base}?offset=2", {"round": 3, "updates": [update("c3", latency=0)], "next": 0})

    out = run("job", "describe", "digits", "--updates", "--url", coordinator.url)[1]

    assert rows(out)[1] == ["c1", "folded", "7", "1", "4.0", "ms"]
    assert rows(out)[3] == ["c3", "folded", "7", "1", "-"]
    assert_narrow(out)
    found = json.loads(run("job", "describe", "digits", "--updates", "-o", "json", "--url", coordinator.url)[1])
    assert [each["client"] for each in found["updates"]] == ["c1", "c" * 99, "c3"] and "next" not in found


def test_the_coordinator_tells_on_which_node_each_update_is(run: Run, coordinator: Scripted) -> None:
    record = {"client": "c1", "node": "h2", "incarnation": "x", "num_samples": 3.0, "status": "lost"}
    coordinator.answer("GET /v1/jobs/digits/rounds/1/updates", {"round": 1, "updates": [record], "next": 0})

    out = run("job", "describe", "digits", "--round", "1", "--updates", "--url", coordinator.url)[1]

    assert rows(out) == [["CLIENT", "STATUS", "WEIGHT", "NODE"], ["c1", "lost", "3", "h2"]]


def test_a_job_without_a_round_has_no_updates(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("GET /v1/jobs/digits", {"job": "digits", "round": 0})

    code, _, err = run("job", "describe", "digits", "--updates", "--url", coordinator.url)

    assert code == 1 and "has no round yet" in err


def test_cancelling_deletes_the_job(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("DELETE /v1/jobs/digits", None, 204)

    assert run("job", "cancel", "digits", "--url", coordinator.url)[:2] == (
        0,
        "Job digits cancelled; its checkpoints are kept\n",
    )
    assert run("job", "cancel", "none", "--url", coordinator.url)[0] == 1


# --- job create ----------------------------------------------------------------------------------------------


def test_every_field_of_a_jobs_specification_has_an_option() -> None:
    options = {parameter.name for parameter in create_command.params}

    assert set(JobSpec.__struct_fields__) - {"shard_of", "whole"} <= options


def test_only_what_is_given_is_sent(run: Run, coordinator: Scripted) -> None:
    coordinator.answer("POST /v1/jobs", {"job": "j", "status": "waiting-for-model", "round": 0}, 201)

    options = ["--function", "f", "--goal", "3", "--no-reuse", "--deadline", "1.5", "--placement", "worst-fit"]
    code, out, _ = run("job", "create", "j", *options, "--url", coordinator.url)

    assert (code, out) == (0, "Job j created; it waits for its model\n")
    spec = {"name": "j", "function": "f", "goal": 3, "reuse": False, "deadline": 1.5, "placement": "worst-fit"}
    assert json.loads(coordinator.seen[0][1]) == spec


def test_the_projects_function_is_the_default(run: Run, coordinator: Scripted, project: Path) -> None:
    coordinator.answer("POST /v1/jobs", {"status": "waiting-for-model"}, 201)

    assert run("job", "create", "j", "--goal", "1", "--url", coordinator.url)[0] == 0
    assert json.loads(coordinator.seen[0][1])["function"] == "fedavg"


def test_without_a_project_the_function_has_to_be_named(run: Run) -> None:
    code, _, err = run("job", "create", "j", "--goal", "1")

    assert code == 1
    assert "--function is not given" in err and "func job create NAME --function fedavg" in err


def test_the_initial_model_is_sent_as_it_is(
    run: Run, coordinator: Scripted, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.answer("POST /v1/jobs", {"status": "waiting-for-model", "round": 0}, 201)
    coordinator.answer("PUT /v1/jobs/j/model", {"status": "running", "round": 1}, 201)
    monkeypatch.setenv("FUNC_TOKEN", "secret")

    code, out, err = run(
        *("job", "create", "j", "--function", "f", "--goal", "3", "--model", str(model), "--url", coordinator.url)
    )

    assert (code, out, err) == (0, "Job j: round 1 is open\n", "")
    request, body, headers = coordinator.seen[1]
    assert (request, body) == ("PUT /v1/jobs/j/model", model.read_bytes())
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/vnd.safetensors"


def test_a_job_that_has_its_model_gets_no_other(run: Run, coordinator: Scripted, model: Path) -> None:
    coordinator.answer("POST /v1/jobs", {"status": "running", "round": 4, "model_round": 4}, 200)

    code, out, err = run(
        *("job", "create", "j", "--function", "f", "--goal", "3", "--model", str(model), "--url", coordinator.url)
    )

    assert (code, out) == (0, "Job j: round 4 is open\n")
    assert "has a model already" in err
    assert coordinator.requests == ["POST /v1/jobs"]


def test_a_refused_model_is_an_error_in_the_nodes_words(run: Run, coordinator: Scripted, model: Path) -> None:
    coordinator.answer("POST /v1/jobs", {"status": "waiting-for-model"}, 201)
    coordinator.answer("PUT /v1/jobs/j/model", {"title": "Too large", "detail": "no node has room"}, 507)

    code, _, err = run(
        *("job", "create", "j", "--function", "f", "--goal", "3", "--model", str(model), "--url", coordinator.url)
    )

    assert code == 1 and "Too large: no node has room" in err


@pytest.mark.parametrize("content", [b"", b"no model at all"])
def test_what_is_no_model_creates_no_job(run: Run, coordinator: Scripted, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)

    code, _, err = run("job", "create", "j", "--function", "f", "--goal", "1", "--model", "m")

    assert code == 1 and "'m' is no safetensors file" in err
    assert coordinator.seen == []


def test_an_empty_answer_is_none_and_a_refusal_keeps_its_status(coordinator: Scripted) -> None:
    coordinator.answer("POST /empty")
    coordinator.answer("POST /no", {"title": "Conflict"}, 409)

    assert request_json("POST", coordinator.url, "/empty", body={"a": 1}) is None
    with pytest.raises(Refused) as refused:
        request_json("POST", coordinator.url, "/no")
    assert refused.value.status == 409
    assert coordinator.seen[0][1:][0] == b'{"a": 1}'


@pytest.mark.parametrize(
    ("size", "text"), [(0, "-"), (None, "-"), (5, "5 B"), (1234, "1.2 kB"), (44.7e6, "44.7 MB"), (3e9, "3.0 GB")]
)
def test_bytes_are_shown_for_people(size: float | None, text: str) -> None:
    assert format_bytes(size) == text


# --- members and their coordinator -----------------------------------------------------------------------------

STAND_IN = """#!/bin/sh
echo "$*" >> {record}
case "$*" in
*lifl_gateway.agent*) echo '{{"data_plane": "unix"}}' ;;
*lifl.control.coordinator*) echo '{{"ready": true}}' ;;
*lifl_gateway.coordinator*) echo '{{"address": "http://127.0.0.1:4713", "peer_address": "127.0.0.1:4714"}}' ;;
*"-m lifl_gateway "*) echo '{{"address": "http://127.0.0.1:4711", "peer_address": "{peer}:4712"}}' ;;
esac
exec sleep 600
"""


class Processes:
    """Puts a script in the place of Python: what is started says that it is ready, and goes on."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._record = directory / "started"
        self._script = directory / "stand-in"
        self.listen_on("127.0.0.1")
        self._script.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(self._script))

    def listen_on(self, peer: str) -> None:
        """Where gateways say that they listen for other nodes."""
        self._script.write_text(STAND_IN.format(record=self._record, peer=peer))

    def started(self, module: str) -> list[list[str]]:
        """The arguments of each process of this module."""
        lines = [line.split() for line in self._record.read_text().splitlines()]
        return [words[2:] for words in lines if words[:2] == ["-m", module]]


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Processes:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return Processes(tmp_path, monkeypatch)


def value_of(arguments: list[str], option: str) -> str | None:
    return arguments[arguments.index(option) + 1] if option in arguments else None


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def make_options(tmp_path: Path, **options: Any) -> NodeOptions:
    return NodeOptions(functions={}, state_directory=tmp_path / "state", port=0, **options)


def test_a_members_processes_are_told_of_the_cluster(tmp_path: Path, processes: Processes) -> None:
    token = tmp_path / "token"
    options = make_options(
        tmp_path, join="http://c:7070", name="h1", capacity=12.5, member_token_file=token, gateways=2
    )

    with Node(options) as node:
        assert node.ready().peer_address == "127.0.0.1:4712"

    (arguments,) = processes.started("lifl.control.coordinator")
    assert value_of(arguments, "--join") == "http://c:7070" and value_of(arguments, "--name") == "h1"
    assert value_of(arguments, "--capacity") == "12.5" and "--advertise" not in arguments
    assert value_of(arguments, "--member-token-file") == str(token)
    first, second = processes.started("lifl_gateway")
    assert value_of(first, "--peer-address") == "127.0.0.1:0"
    assert value_of(first, "--member-token-file") == value_of(second, "--member-token-file") == str(token)
    assert "--peer-address" not in second


def test_a_node_on_its_own_hears_nothing_of_clusters(tmp_path: Path, processes: Processes) -> None:
    with Node(make_options(tmp_path)) as node:
        assert node.ready().peer_address == ""
        assert not list(tmp_path.glob("lifl-*/member.json"))

    assert all("--join" not in words for words in processes.started("lifl.control.coordinator"))
    assert all("--peer-address" not in words for words in processes.started("lifl_gateway"))


def test_the_gateways_addresses_are_left_for_the_members_coordinator(tmp_path: Path, processes: Processes) -> None:
    with Node(make_options(tmp_path, join="http://c:7070", name="h1")):
        (file,) = tmp_path.glob("lifl-*/member.json")
        assert json.loads(file.read_text()) == {
            "address": "http://127.0.0.1:4711",
            "peer_address": "127.0.0.1:4712",
        }


def test_a_peer_address_that_nobody_can_connect_to_is_given_with_the_advertised_host(
    tmp_path: Path, processes: Processes
) -> None:
    processes.listen_on("0.0.0.0")
    options = make_options(tmp_path, host="0.0.0.0", join="http://c:7070", advertise="http://10.0.0.7:80")

    with Node(options) as node:
        assert node.ready().peer_address == "10.0.0.7:4712"
        (file,) = tmp_path.glob("lifl-*/member.json")
        assert json.loads(file.read_text()) == {"address": "http://10.0.0.7:80", "peer_address": "10.0.0.7:4712"}


def test_a_gateway_that_is_started_again_keeps_its_peer_port(tmp_path: Path, processes: Processes) -> None:
    with Node(make_options(tmp_path, join="http://c:7070", name="h1")) as node:
        (file,) = tmp_path.glob("lifl-*/member.json")
        file.unlink()
        os.kill(node.processes()["gateway-0"], signal.SIGKILL)
        wait_for(file.exists)

    assert [value_of(words, "--peer-address") for words in processes.started("lifl_gateway")] == [
        "127.0.0.1:0",
        "127.0.0.1:4712",
    ]


def test_a_member_that_starts_anew_keeps_its_ports(tmp_path: Path, processes: Processes) -> None:
    with Node(make_options(tmp_path, join="http://c:7070", name="h1")) as node:
        os.kill(node.processes()["coordinator"], signal.SIGKILL)
        wait_for(lambda: len(processes.started("lifl_gateway")) == 2)
        wait_for(lambda: list(tmp_path.glob("lifl-*/member.json")))

    again = processes.started("lifl_gateway")[1]
    assert (value_of(again, "--port"), value_of(again, "--peer-address")) == ("4711", "127.0.0.1:4712")


def interrupt_after_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifl.node.Node.wait", lambda self: signal.raise_signal(signal.SIGINT))


def test_run_joins_a_cluster_and_tells_programs_where_others_find_it(
    run: Run, project: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after_start(monkeypatch)

    code, out, err = run("run", "--address", "127.0.0.1:0", "--join", "c:7070", "--name", "h1", "-o", "json")

    assert code == 130
    assert "Node h1 of the cluster of http://c:7070" in err
    assert json.loads(out) == {
        "address": "127.0.0.1:4711",
        "host": "127.0.0.1",
        "port": 4711,
        "data_plane": "unix",
        "name": "h1",
        "peer_address": "127.0.0.1:4712",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "h1"], "--name is for members of a cluster"),
        (["--peer-address", "127.0.0.1:0"], "--peer-address is for members of a cluster"),
        (["--join", "c:7070", "--peer-address", "8081"], "the address '8081' is not of the form HOST:PORT"),
        (["--join", "c:7070", "--address", "0.0.0.0:0"], "no one can connect to 0.0.0.0"),
        (["--join", "c:7070", "--capacity", "0"], "Invalid value for '--capacity'"),
    ],
)
def test_run_refuses_half_a_membership(run: Run, project: Path, arguments: list[str], message: str) -> None:
    code, _, err = run("run", "--address", "127.0.0.1:0", *arguments)

    assert code == 1
    assert err.startswith(f"Error: {message}") and "Try this:\n  func run" in err


def test_a_wildcard_address_will_do_with_what_to_advertise(
    run: Run, project: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after_start(monkeypatch)

    run("run", "--address", "0.0.0.0:0", "--join", "c:7070", "--advertise", "10.0.0.7:8080/")

    (arguments,) = processes.started("lifl.control.coordinator")
    assert value_of(arguments, "--advertise") == "http://10.0.0.7:8080"
    assert value_of(arguments, "--name")


@pytest.mark.parametrize(("coordinator", "warns"), [("10.0.0.1:7070", True), ("localhost:7070", False)])
def test_run_warns_of_a_member_that_others_cannot_reach(
    run: Run,
    project: Path,
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    coordinator: str,
    warns: bool,
) -> None:
    interrupt_after_start(monkeypatch)

    err = run("run", "--address", "127.0.0.1:0", "--join", coordinator)[2]

    assert ("Warning: other machines cannot reach 127.0.0.1" in err) == warns


def test_the_coordinator_says_how_nodes_join(
    run: Run, processes: Processes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("t")
    monkeypatch.setattr("lifl.cli.coordinator._keep_running", lambda process: signal.raise_signal(signal.SIGINT))

    code, out, err = run("coordinator", "--member-token-file", "token", "--lease", "2.5", "-o", "json")

    assert code == 130
    assert json.loads(out) == {"address": "127.0.0.1:4713", "peer_address": "127.0.0.1:4714"}
    assert "func run --join http://127.0.0.1:4713 --member-token-file token\n" in err
    (arguments,) = processes.started("lifl_gateway.coordinator")
    assert value_of(arguments, "--lease") == "2.5"
    assert value_of(arguments, "--state-directory") == str(tmp_path / ".lifl-coordinator")
    assert "--allow-anonymous" not in arguments and "--token-file" not in arguments


def test_a_coordinator_with_tls_passes_its_files_on_and_says_what_nodes_need(
    run: Run, processes: Processes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"--peer-certificate": "node.pem", "--peer-key": "node.key", "--peer-authority": "authority.pem"}
    for name in files.values():
        (tmp_path / name).write_text("")
    monkeypatch.setattr("lifl.cli.coordinator._keep_running", lambda process: signal.raise_signal(signal.SIGINT))

    code, _, err = run("coordinator", *(word for pair in files.items() for word in pair))

    assert code == 130
    assert " --peer-certificate FILE --peer-key FILE --peer-authority authority.pem\n" in err
    (arguments,) = processes.started("lifl_gateway.coordinator")
    assert {option: value_of(arguments, option) for option in files} == files


def test_a_coordinator_that_dies_is_started_again_on_its_ports(
    run: Run, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    real = __import__("lifl.cli.coordinator", fromlist=["_Process"])._Process.start

    def start(self: Any) -> None:
        real(self)
        started.append(self._process.pid)
        if len(started) == 1:
            os.kill(started[0], signal.SIGKILL)
        else:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("lifl.cli.coordinator._Process.start", start)

    code, _, err = run("coordinator", "--allow-anonymous")

    assert code == 130 and "starting it again" in err
    first, second = processes.started("lifl_gateway.coordinator")
    assert (value_of(first, "--address"), value_of(second, "--address")) == ("127.0.0.1:7070", "127.0.0.1:4713")
    assert "--allow-anonymous" in second
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def test_a_coordinator_that_does_not_come_up_suggests_other_ports(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "false").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "false").chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "false"))

    code, _, err = run("coordinator")

    assert code == 1
    assert "did not start (exit status 3)" in err and "func coordinator --address 127.0.0.1:0" in err


def test_a_wrong_address_of_the_coordinator_is_refused_with_its_own_hint(run: Run) -> None:
    code, _, err = run("coordinator", "--peer-address", "7071")

    assert code == 1 and "func coordinator --peer-address" in err


# --- calibration ---------------------------------------------------------------------------------------------


def levels(*seconds: float) -> list[Level]:
    """Levels with these execution times, and a k that gives 10 updates at a time at the first of them."""
    made: list[Level] = []
    for number, each in enumerate(seconds, start=1):
        growth = each / min(seconds[:number])
        made.append(Level(number, 10 * number / seconds[0], each, 100, growth))
    return made


def test_the_capacity_is_what_was_there_before_execution_times_grew() -> None:
    measured = levels(1.0, 1.0, 1.1, 1.6, 1.9)

    assert has_grown(measured, 1.5) and not has_grown(measured[:-1], 1.5)
    assert last_good(measured, 1.5).senders == 3
    assert last_good(measured, 1.5).concurrency == pytest.approx(33)


def test_one_slow_level_is_taken_for_a_disturbance() -> None:
    measured = levels(1.0, 9.0, 1.0, 1.2, 2.0)

    assert not any(has_grown(measured[:count], 1.5) for count in range(1, 6))
    assert last_good(measured, 1.5).senders == 4


def test_growth_is_counted_from_the_smallest_time() -> None:
    assert has_grown(levels(2.0, 1.0, 1.6, 1.7), 1.5)
    assert last_good(levels(2.0, 1.0, 1.6, 1.7), 1.5).senders == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("resnet18", 44_695_848), ("45MB", 45_000_000), ("1.5 GB", 1_500_000_000), ("100kB", 100_000), ("64", 64)],
)
def test_models_are_named_or_measured_in_bytes(text: str, size: int) -> None:
    assert model_size(text) == size


@pytest.mark.parametrize("text", ["", "resnet", "-1MB", "nanMB", "infGB", "1TB", "3"])
def test_what_is_no_size_of_a_model_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="resnet18"):
        model_size(text)


RESULT = Calibration(20.0, 1.0, 44_695_848, 2, "2026-11-22T12:00:00+00:00", True, levels(1.0, 1.0, 1.7, 1.8))


def test_a_result_is_kept_where_the_node_reads_it(tmp_path: Path) -> None:
    path = RESULT.save(tmp_path / "state")
    RESULT.save(tmp_path / "state")

    assert path == tmp_path / "state/calibration.json"
    assert json.loads(path.read_text()) == dataclasses.asdict(RESULT)
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Puts a result in the place of measuring; returns what was asked for."""
    asked: list[Options] = []

    def calibrate(options: Options, on_level: Callable[[Level], None]) -> Calibration:
        asked.append(options)
        for level in RESULT.levels:
            on_level(level)
        return RESULT

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    return asked


def test_calibrate_shows_the_levels_and_keeps_the_result(run: Run, project: Path, measured: list[Options]) -> None:
    code, out, err = run("node", "calibrate", "--model", "10MB", "--growth", "1.4")

    assert code == 0
    assert err == "MC is 20, kept in .lifl/calibration.json\n"
    assert rows(out)[0] == ["SENDERS", "UPDATES", "K", "(1/s)", "E", "K*E", "GROWTH"]
    assert rows(out)[2] == ["2", "100", "20", "1.00", "s", "20", "1.00", "<-", "MC"]
    assert (project / ".lifl/calibration.json").exists()
    assert_narrow(out)
    (options,) = measured
    assert options.function_file == project.resolve() / "functions/fedavg.py"
    assert (options.model_bytes, options.growth) == (10_000_000, 1.4)


def test_calibrate_prints_the_result_as_json(run: Run, measured: list[Options]) -> None:
    code, out, err = run("node", "calibrate", "--state-directory", "s", "-o", "json")

    assert code == 0
    assert json.loads(out) == dataclasses.asdict(RESULT)
    assert "Measuring with FedAvg: no function project" in err and measured[0].function_file is None


def test_calibrate_says_when_the_limit_was_not_found(
    run: Run, measured: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_end = dataclasses.replace(RESULT, is_limit=False)
    monkeypatch.setattr(calibration, "calibrate", lambda options, on_level: open_end)

    assert "E did not grow, so it may be more" in run("node", "calibrate")[2]


def test_calibrate_warns_of_a_node_that_runs_meanwhile(run: Run, tmp_path: Path, measured: list[Options]) -> None:
    (tmp_path / ".lifl/run").mkdir(parents=True)
    (tmp_path / ".lifl/run/node.json").write_text(json.dumps({"address": "127.0.0.1:1", "pid": os.getpid()}))

    assert "Warning: a node is running" in run("node", "calibrate")[2]


def test_a_model_larger_than_the_memory_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifl.control.job.available_memory", lambda: 1 << 30)

    with pytest.raises(InvalidInput, match="too large"):
        calibration.calibrate(Options(model_bytes=1 << 29))


def test_commands_are_found_by_their_modules() -> None:
    for name in ("coordinator", "job", "nodes", "node"):
        command = cli.cli.get_command(click.Context(cli.cli), name)
        assert command is not None and command.name == name

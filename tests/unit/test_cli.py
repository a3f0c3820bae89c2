"""The command line: help, formats, exit codes, errors with hints, and how the node is found."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import click
import numpy as np
import pytest
import safetensors.numpy
from lifl import cli
from lifl.cli.common import CommandError, find_node, get_json, read_run_file
from lifl.cli.run import choose_address, parse_address
from lifl.client import GlobalModel, Submission
from lifl.doctor import Check, examine
from lifl.errors import Busy, ProtocolError, Refused, Unavailable

COMMANDS = list(cli.SUMMARIES)
FUNC = [sys.executable, "-m", "lifl.cli"]
JOB = {
    "job": "digits",
    "status": "running",
    "round": 3,
    "model_round": 3,
    "spec": {"name": "digits", "function": "fedavg", "goal": 20},
    "data_plane": "ebpf",
    "model_payload_bytes": 54_824,
    "workers": 4,
    "current": {"round": 3, "status": "open", "accepted": 7, "rejected": 0, "late": 0, "act": 0},
    "last": {
        "round": 2,
        "status": "complete",
        "accepted": 20,
        "rejected": 1,
        "late": 2,
        "act": 0.0123,
        "latency_median": 0.0045,
        "started": 0,
        "reused": 4,
    },
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("FUNC_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["func"])


class StandIn(HTTPServer):
    """Answers each path with (status, headers, body) and remembers the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, document: object, status: int = 200, **headers: str) -> None:
        self.answers[path] = (status, headers, json.dumps(document).encode())


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        status, headers, body = self.server.answers.get(self.path, (404, {}, b'{"title": "Not Found"}'))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def node() -> Iterator[StandIn]:
    server = StandIn()
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


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- help and start-up ---------------------------------------------------------------------------------------


def test_help_lists_every_command_with_the_first_sentence_of_its_own_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, "--help")

    assert code == 0
    for name, summary in cli.SUMMARIES.items():
        assert f"{name} " in out and summary in out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_examples_and_begins_with_its_summary(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    code, out, _ = run(capsys, name, "--help")

    assert code == 0
    assert f"Examples:\n    func {name}" in out
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None and command.name == name
    assert (command.help or "").startswith(cli.SUMMARIES[name])


def test_no_arguments_print_the_help_and_succeed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys)

    assert (code, err) == (0, "")
    assert out.startswith("Usage: func ")


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from lifl.cli import main; main(['--help']);"
        "print(sorted(set(sys.modules) & {'rich', 'numpy', 'torch', 'ruamel', 'msgspec', 'http', 'kubernetes',"
        "'lifl.doctor', 'lifl.project', 'lifl.func_yaml', 'lifl.templates', 'lifl.cli.create'}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stdout.splitlines()[-1] == "[]"


def test_help_appears_within_300_ms() -> None:
    def measure() -> float:
        begin = time.monotonic()
        subprocess.run([*FUNC, "--help"], capture_output=True, check=True)
        return time.monotonic() - begin

    assert min(measure() for _ in range(5)) < 0.3


# --- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'."),
        (["run", "--bogus"], "No such option '--bogus'."),
        (["status", "-o", "xml"], "Invalid value for '-o' / '--output': 'xml' is not one of 'human', 'json'."),
        (["run"], "no function project in '.': there is no func.yaml"),
    ],
)
def test_an_error_goes_to_stderr_with_something_to_try_and_code_1(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *arguments)

    assert (code, out) == (1, "")
    assert err.startswith(f"Error: {message}\n\nTry this:\n  func ")
    assert err.endswith("--help'.\n")


def test_hints_are_aligned() -> None:
    text = cli.render_error(CommandError("no", [("func a", "one"), ("func abc", "two")]))

    assert text == (
        "Error: no\n\nTry this:\n  func a    # one\n  func abc  # two\n\nFor more options, run 'func --help'."
    )


def test_no_node_suggests_to_run_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "status", "--url", f"http://127.0.0.1:{closed_port()}")

    assert code == 1
    assert "no node answers at http://127.0.0.1:" in err
    assert "func run " in err


def test_the_program_is_called_as_the_user_called_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lifl"])

    assert "lifl --help" in run(capsys, "nonsense")[2]


def test_an_interrupt_prints_nothing_and_returns_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, node: StandIn
) -> None:
    node.answer("/v1/jobs", [])
    monkeypatch.setattr(time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))

    assert run(capsys, "status", "--url", node.url, "-w", "-o", "json") == (130, "[]\n", "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_that_goes_away_is_no_error() -> None:
    shell = f"{sys.executable} -m lifl.cli version -v | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)

    assert result.stderr == ""


# --- finding and asking the node -------------------------------------------------------------------------------


def write_run_file(directory: Path, **content: Any) -> None:
    (directory / "run").mkdir(parents=True)
    (directory / "run/node.json").write_text(json.dumps(content))


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_node_is_the_given_one_before_the_one_that_runs_here(tmp_path: Path) -> None:
    write_run_file(tmp_path / ".lifl", address="127.0.0.1:9001", pid=os.getpid())

    assert find_node("host:1/", tmp_path, None) == "http://host:1"
    assert find_node(None, tmp_path, None) == "http://127.0.0.1:9001"
    assert find_node(None, tmp_path / "func.yaml", None) == "http://127.0.0.1:9001"
    assert find_node(None, tmp_path, tmp_path / "elsewhere") == "http://127.0.0.1:8080"


def test_the_environment_names_the_node(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, node: StandIn
) -> None:
    node.answer("/v1/jobs", [])
    monkeypatch.setenv("FUNC_URL", node.url)
    monkeypatch.setenv("FUNC_TOKEN", "secret")

    assert run(capsys, "status", "-o", "json")[0] == 0
    assert node.seen[0][1]["Authorization"] == "Bearer secret"


def test_a_run_file_of_a_process_that_is_gone_does_not_count(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    write_run_file(tmp_path, address="127.0.0.1:9001", pid=gone.pid)

    assert read_run_file(tmp_path) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"address": "a"}', '{"address": "a", "pid": null}', "\xff"])
def test_a_broken_run_file_does_not_count(tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/node.json").write_text(content, encoding="latin-1")

    assert read_run_file(tmp_path) is None


def test_the_nodes_refusals_keep_their_words(node: StandIn) -> None:
    node.answer("/no", {"title": "Conflict", "detail": "taken"}, status=409)
    node.answer("/full", {"title": "Full"}, status=503, Retry_After="2.5")

    with pytest.raises(Refused, match="Conflict: taken") as refused:
        get_json(node.url, "/no")
    assert refused.value.status == 409
    with pytest.raises(Busy) as busy:
        get_json(node.url, "/full")
    assert busy.value.retry_after == 2.5


def test_what_is_no_node_is_told_from_no_answer(node: StandIn) -> None:
    node.answers["/page"] = (200, {}, b"<html>")

    with pytest.raises(ProtocolError, match="no LIFL node"):
        get_json(node.url, "/page")
    with pytest.raises(Unavailable):
        get_json(f"http://127.0.0.1:{closed_port()}", "/page")
    with pytest.raises(CommandError, match="no URL"):
        get_json("http://[", "/")


# --- status --------------------------------------------------------------------------------------------------


def test_status_shows_jobs_in_80_columns(capsys: pytest.CaptureFixture[str], node: StandIn) -> None:
    node.answer("/v1/jobs", {"jobs": [JOB, {**JOB, "job": "[red]" + "x" * 70, "last": None, "current": None}]})

    code, out, err = run(capsys, "status", "--url", node.url)

    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["JOB", "STATUS", "ROUND", "UPDATES", "ACT", "WORKERS", "PLANE"]
    assert lines[1] == ["digits", "running", "3", "7/20", "12.3", "ms", "4", "ebpf"]
    assert lines[2][0].startswith("[red]xxx")
    assert max(map(len, out.splitlines())) <= 80


def test_status_of_one_job_shows_its_rounds(capsys: pytest.CaptureFixture[str], node: StandIn) -> None:
    node.answer("/v1/jobs/digits", JOB)

    code, out, _ = run(capsys, "status", "digits", "--url", node.url)

    assert code == 0
    assert "round 3, 0.1 MB" in out
    assert max(map(len, out.splitlines())) <= 80
    assert ["2", "complete", "20", "1", "2", "12.3", "ms", "4.5", "ms", "0/4"] in [
        line.split() for line in out.splitlines()
    ]


def test_status_prints_what_the_node_said_as_json(capsys: pytest.CaptureFixture[str], node: StandIn) -> None:
    node.answer("/v1/jobs", [JOB])

    assert json.loads(run(capsys, "status", "--url", node.url, "-o", "json")[1]) == [JOB]


def test_no_jobs_are_no_error_and_no_data(capsys: pytest.CaptureFixture[str], node: StandIn) -> None:
    node.answer("/v1/jobs", [])

    assert run(capsys, "status", "--url", node.url) == (0, "", "No jobs.\n")


def test_an_unknown_job_suggests_the_list(capsys: pytest.CaptureFixture[str], node: StandIn) -> None:
    code, _, err = run(capsys, "status", "a/b", "--url", node.url)

    assert code == 1
    assert "func status  # the jobs that exist" in err
    assert node.seen[0][0] == "/v1/jobs/a%2Fb"


# --- run -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class NodeReady:
    address: str
    data_plane: str
    reason: str


@pytest.fixture
def stand_in_node(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts a module in the place of lifl.node; returns what happens to it."""
    happened: dict[str, Any] = {"calls": []}

    class NodeOptions:
        def __init__(self, **options: Any) -> None:
            self.__dict__.update({"join": "", **options})
            happened["options"] = options

    class Node:
        def __init__(self, options: Any) -> None:
            self.options = options

        def start(self) -> NodeReady:
            happened["calls"].append("start")
            return NodeReady(f"http://{self.options.host}:{self.options.port}", "unix", "CAP_BPF is missing")

        def wait(self) -> int:
            happened["calls"].append("wait")
            happened.get("during", lambda: None)()
            return int(happened.get("code", 0))

        def stop(self) -> None:
            happened["calls"].append("stop")

    module = ModuleType("lifl.node")
    module.Node, module.NodeOptions = Node, NodeOptions  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lifl.node", module)
    return happened


def test_run_says_where_it_listens_and_why_it_does_without_ebpf(
    capsys: pytest.CaptureFixture[str], project: Path, stand_in_node: dict[str, Any]
) -> None:
    port = closed_port()

    code, out, err = run(capsys, "run", "--address", f"127.0.0.1:{port}")

    assert (code, out) == (0, "")
    assert f"Function running on 127.0.0.1:{port}\nData plane: unix (CAP_BPF is missing)\n" in err
    assert stand_in_node["calls"] == ["start", "wait", "stop"]
    options = stand_in_node["options"]
    assert options["functions"] == {"fedavg": project.resolve() / "functions/fedavg.py"}
    assert options["default_function"] == "fedavg"
    assert options["state_directory"] == project.resolve() / ".lifl"


@pytest.mark.parametrize(("arguments", "start"), [((), "fork"), (("--start", "spawn"), "spawn")])
def test_run_tells_the_node_how_workers_start(
    project: Path, stand_in_node: dict[str, Any], capsys: pytest.CaptureFixture[str], arguments: Any, start: str
) -> None:
    assert run(capsys, "run", "--address", "127.0.0.1:0", *arguments)[0] == 0
    assert stand_in_node["options"]["start"] == start


def test_run_prints_one_json_line_for_programs(
    capsys: pytest.CaptureFixture[str], project: Path, stand_in_node: dict[str, Any]
) -> None:
    port = closed_port()
    code, out, _ = run(capsys, "run", "--address", f"127.0.0.1:{port}", "--data-plane", "unix", "-o", "json")

    assert code == 0
    assert json.loads(out) == {
        "address": f"127.0.0.1:{port}",
        "host": "127.0.0.1",
        "port": port,
        "data_plane": "unix",
    }


def test_run_warns_of_what_it_ignores(
    capsys: pytest.CaptureFixture[str], project: Path, stand_in_node: dict[str, Any]
) -> None:
    with (project / "func.yaml").open("a") as file:
        file.write("imag: x\n")

    assert 'Warning: line 6: unknown field "imag"' in run(capsys, "run", "--address", "127.0.0.1:0")[2]


def test_run_returns_the_nodes_exit_code(
    capsys: pytest.CaptureFixture[str], project: Path, stand_in_node: dict[str, Any]
) -> None:
    stand_in_node["code"] = 1

    assert run(capsys, "run", "--address", "127.0.0.1:0")[0] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_node_and_returns_130(
    capsys: pytest.CaptureFixture[str], project: Path, stand_in_node: dict[str, Any], number: signal.Signals
) -> None:
    stand_in_node["during"] = lambda: signal.raise_signal(number)

    assert run(capsys, "run", "--address", "127.0.0.1:0")[0] == 130
    assert stand_in_node["calls"] == ["start", "wait", "stop"]


def test_a_taken_port_is_avoided_by_default_and_an_error_if_it_was_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("lifl.cli.run.DEFAULT_ADDRESS", f"127.0.0.1:{port}")

        host, chosen = choose_address(None)
        assert (host, chosen) == ("127.0.0.1", 0)
        assert capsys.readouterr().err == f"Port {port} is taken; using a free one\n"
        with pytest.raises(CommandError, match="cannot listen on") as refused:
            choose_address(f"127.0.0.1:{port}")
        assert refused.value.hints


def test_addresses_are_read_with_names_and_ipv6() -> None:
    assert parse_address("localhost:80") == ("localhost", 80)
    assert parse_address("[::1]:8080") == ("::1", 8080)


@pytest.mark.parametrize("address", ["", "8080", ":8080", "host:", "host:x", "host:65536", "::1:80", "host:-1"])
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(CommandError, match="HOST:PORT"):
        parse_address(address)


# --- invoke --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to send"),
        (["--random", "--create"], "a new job needs an initial model"),
        (["--random", "--file", "m"], "--file and --random together need --create"),
        (["--random"], "--job is not given, and the project does not tell: no function project"),
        (["--create", "--job", "j", "--file", "m"], "--function is not given, and the project does not tell"),
        (["--job", "j", "--file", "m"], "'m' is no safetensors file: "),
        (["--file", "none"], "Invalid value for '-f' / '--file': File 'none' does not exist."),
        (["--random", "--samples", "0"], "Invalid value for '--samples': 0.0 is not in the range x>0."),
    ],
)
def test_invoke_says_what_it_lacks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "m").write_bytes(b"no model at all")

    code, out, err = run(capsys, "invoke", *arguments)

    assert (code, out) == (1, "")
    assert err.startswith(f"Error: {message}")


class StandInClient:
    """In the place of lifl.client.Client; `calls` and `answer` belong to the test."""

    calls: ClassVar[list[tuple[str, Any]]] = []
    answer = Submission("accepted", 1)
    model = b""

    def __init__(self, url: str, job: str, client_id: str, **options: Any) -> None:
        self.job = job
        self.calls.append(("open", (url, job, client_id)))

    def __enter__(self) -> StandInClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def create_job(self, **spec: Any) -> dict[str, Any]:
        self.calls.append(("create", spec))
        return {"job": self.job, "round": 0}

    def upload_model(self, model: bytes) -> dict[str, Any]:
        self.calls.append(("upload", model))
        return {"job": self.job, "round": 1}

    def round(self) -> int:
        return 1

    def fetch_model(self) -> GlobalModel:
        return GlobalModel(1, bytearray(self.model), "")

    def submit(self, update: bytes, *, num_samples: float, round: int) -> Submission:
        self.calls.append(("submit", (bytes(update), num_samples, round)))
        return self.answer


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, project: Path) -> type[StandInClient]:
    tensors = {"w": np.zeros((2, 3), np.float32), "h": np.zeros(5, np.float16), "steps": np.arange(3)}
    StandInClient.model = safetensors.numpy.save(tensors)
    (project / "m").write_bytes(StandInClient.model)
    monkeypatch.setattr(StandInClient, "calls", [])
    monkeypatch.setattr(StandInClient, "answer", Submission("accepted", 1))
    monkeypatch.setattr("lifl.client.Client", StandInClient)
    return StandInClient


def test_invoke_sends_a_file_as_it_is_to_the_projects_job(
    capsys: pytest.CaptureFixture[str], client: type[StandInClient]
) -> None:
    code, out, err = run(capsys, "invoke", "--file", "m", "--client", "c", "--samples", "7", "--round", "4")

    assert (code, out, err) == (0, "accepted: round 1 of job fedavg, client c\n", "")
    assert client.calls == [
        ("open", ("http://127.0.0.1:8080", "fedavg", "c")),
        ("submit", (client.model, 7.0, 4)),
    ]


def test_invoke_tells_how_to_reach_a_function_that_is_deployed(
    capsys: pytest.CaptureFixture[str], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr("lifl.cli.common.DEFAULT_ADDRESS", f"127.0.0.1:{closed_port()}")
    code, _, err = run(capsys, "invoke", "--random")
    assert code == 1
    assert "port-forward" not in err
    with (project / "func.yaml").open("a") as file:
        file.write("\ndeploy:\n  namespace: learning\n")
    code, _, err = run(capsys, "invoke", "--random")
    assert code == 1
    assert "deployed in namespace 'learning'" in err
    assert "kubectl -n lifl-system port-forward service/lifl-gateway 8080" in err


def test_invoke_creates_the_job_only_when_told(
    capsys: pytest.CaptureFixture[str], client: type[StandInClient]
) -> None:
    code, _, err = run(capsys, "invoke", "--create", "--file", "m", "--goal", "3", "-o", "json")

    assert code == 0
    assert err == "Job fedavg created: function fedavg, goal 3, round 1 open\n"
    assert [name for name, _ in client.calls] == ["open", "create", "upload", "submit"]
    assert client.calls[1][1] == {"function": "fedavg", "goal": 3}


def test_random_changes_floats_and_nothing_else(
    capsys: pytest.CaptureFixture[str], client: type[StandInClient]
) -> None:
    assert run(capsys, "invoke", "--random")[0] == 0

    sent = safetensors.numpy.load(client.calls[-1][1][0])
    assert sent["w"].dtype == np.float32 and np.all(sent["w"] != 0) and np.abs(sent["w"]).max() < 0.1
    assert sent["h"].dtype == np.float16 and np.all(sent["h"] != 0)
    assert np.array_equal(sent["steps"], np.arange(3))


def test_each_invocation_is_another_client_unless_told(
    capsys: pytest.CaptureFixture[str], client: type[StandInClient]
) -> None:
    for _ in range(2):
        run(capsys, "invoke", "--random")

    names = [details[2] for name, details in client.calls if name == "open"]
    assert len(set(names)) == 2


def test_a_late_update_is_told_and_returns_1(
    capsys: pytest.CaptureFixture[str], client: type[StandInClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "answer", Submission("late", 5))

    code, out, _ = run(capsys, "invoke", "--random", "--round", "2")

    assert (code, out) == (1, "late: round 2 of job fedavg is over; round 5 is open\n")
    assert run(capsys, "invoke", "--random", "-o", "json")[0] == 1


def test_a_node_that_does_not_come_up_suggests_the_doctor(
    capsys: pytest.CaptureFixture[str],
    project: Path,
    stand_in_node: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: Any) -> NodeReady:
        raise Unavailable("agent did not start")

    monkeypatch.setattr(sys.modules["lifl.node"].Node, "start", fail)

    code, _, err = run(capsys, "run", "--address", "127.0.0.1:0")

    assert code == 1
    assert "the node did not come up: agent did not start" in err and "func doctor" in err
    assert stand_in_node["calls"] == []


# --- doctor and version ----------------------------------------------------------------------------------------


def test_doctor_explains_whatever_is_not_well() -> None:
    checks = examine()

    assert {"kernel", "capabilities", "eBPF data plane", "cores", "memory", "huge pages", "TCP", "torch"} <= {
        check.name for check in checks
    }
    assert all(check.hint for check in checks if check.status != "ok")
    assert not any(check.needed and check.status == "missing" for check in checks)


@pytest.mark.parametrize(("needed", "code"), [(True, 1), (False, 0)])
def test_doctor_fails_only_for_what_is_needed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, needed: bool, code: int
) -> None:
    checks = [Check("one", "ok", "fine"), Check("[two]", "missing", "not [found]", "get it", needed)]
    monkeypatch.setattr("lifl.doctor.examine", lambda: checks)

    assert run(capsys, "doctor", "-o", "json")[:2] == (code, json.dumps([c.as_dict() for c in checks]) + "\n")
    human = run(capsys, "doctor")
    assert human[0] == code
    assert "not [found]" in human[1] and "get it" in human[1]


def test_one_look_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lifl.doctor._ask_python", lambda program: (-1, "", "killed"))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: (_ for _ in ()).throw(OSError("no such call")))

    by_name = {check.name: check for check in examine()}

    assert by_name["cores"].value == "could not be examined: no such call"
    assert by_name["torch"].status == "warn"
    assert by_name["memfd"].status == "ok"


def test_version_is_one_line_and_more_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "version")
    assert code == 0 and out.startswith("v") and len(out.splitlines()) == 1
    assert "numpy" in run(capsys, "version", "-v")[1]
    assert json.loads(run(capsys, "version", "-o", "json")[1])["version"] == out.strip()

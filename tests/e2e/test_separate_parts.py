"""A node in parts that share no more than the agent's socket, as containers do: agent, gateways, functions."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from tests.e2e.node_harness import (
    FUNCTIONS,
    PATIENCE,
    SMALL,
    LiveNode,
    Watch,
    assert_mean,
    create_job,
    make_round,
    model_after,
    run_round,
    submit_all,
    until,
)
from tests.hosts import require

pytestmark = pytest.mark.timeout(90)

NODE_USER, FUNCTION_USER = 65533, 65532


def as_user(user: int) -> Sequence[str]:
    """What to put before a command so that it runs as `user`; nothing where that is not possible."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        return ()
    words = [setpriv, f"--reuid={user}", f"--regid={user}", "--clear-groups", "--inh-caps=-all", "--no-new-privs"]
    probe = subprocess.run([*words, sys.executable, "-c", "import lifl"], capture_output=True, timeout=PATIENCE)
    return words if probe.returncode == 0 else ()  # the checkout may be closed to others


class Pod:
    """A function's pod."""

    def __init__(self, runtime: Path, name: str, file: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.process = subprocess.Popen(
            [*as_user(FUNCTION_USER), sys.executable, "-m", "lifl.function_pod"],
            env=dict(
                os.environ,
                LIFL_FUNCTION=str(file),
                LIFL_FUNCTION_NAME=name,
                LIFL_AGENT_DIRECTORY=str(runtime),
                ADDRESS="127.0.0.1",
                PORT=str(self.port),
                LIFL_LOG_FORMAT="json",
            ),
        )

    def probe(self, what: str) -> tuple[int, str]:
        """Status and text of a health probe; status 0 while nobody answers."""
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/health/{what}", timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def until_ready(self) -> Pod:
        until(lambda: self.probe("readiness")[0] == 200, "a pod that is ready")
        return self

    def zygote(self) -> int:
        """Pid of its zygote."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return until(lambda: next(map(int, children.read_text().split()), 0), "a zygote")


class SeparateNode(LiveNode):
    """A node whose agent, gateways and functions nobody has started together."""

    def start(self) -> LiveNode:
        self.runtime = Path(tempfile.mkdtemp(prefix="lifl-parts-", dir="/tmp"))
        self.runtime.chmod(0o755)
        self.state_directory.mkdir(exist_ok=True)
        self.ended = contextlib.ExitStack()
        self.ended.callback(shutil.rmtree, self.runtime)
        if as_user(NODE_USER):
            self.state_directory = Path(tempfile.mkdtemp(prefix="state-", dir=self.runtime))
            os.chown(self.state_directory, NODE_USER, NODE_USER)
        self.parts: dict[str, subprocess.Popen[bytes]] = {}
        self.start_agent()
        self.start_gateway()
        return self

    def _launch(self, part: str, command: Sequence[str], **environment: str) -> dict[str, str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ, **environment))
        self.parts[part] = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"{part} ended instead of getting ready"
        ready: dict[str, str] = json.loads(line)
        return ready

    def start_agent(self) -> None:
        words = ["--runtime-directory", str(self.runtime), "--data-plane", self.data_plane]
        words += ["--node-user", str(NODE_USER), "--function-user", str(FUNCTION_USER)]
        ready = self._launch("agent", [sys.executable, "-m", "lifl_gateway.agent", *words])
        assert ready["data_plane"] == self.data_plane

    def start_gateway(self) -> None:
        words = ["node", "run", "--agent-directory", str(self.runtime), "--address", "127.0.0.1:0", "-o", "json"]
        words += ["--state-directory", str(self.state_directory)]
        command = [*as_user(NODE_USER), sys.executable, "-m", "lifl.cli", *words]
        # Not the directory that is watched, which is another user's.
        ready = self._launch("gateway", command, XDG_RUNTIME_DIR=str(self.state_directory))
        assert ready["data_plane"] == self.data_plane
        self.address = f"http://{ready['address']}"

    def pod(self, name: str = "fedavg") -> Pod:
        pod = Pod(self.runtime, name, FUNCTIONS["fedavg"])
        self.parts[f"pod-{len(self.parts)}"] = pod.process
        return pod

    def stop(self) -> None:
        for part in sorted(self.parts, key=lambda name: name == "agent"):
            process = self.parts[part]
            process.terminate()
            process.wait(PATIENCE)
            if process.stdout is not None:
                process.stdout.close()
        self.ended.close()


@pytest.fixture
def node(watch: Watch, tmp_path: Path, data_plane: str) -> Iterator[SeparateNode]:
    node = SeparateNode(watch, tmp_path / "state", data_plane)
    try:
        node.start()
        yield node
    finally:
        node.stop()


def test_functions_of_other_users_fold_what_the_gateway_of_another_receives(node: SeparateNode) -> None:
    pod = node.pod().until_ready()
    create_job(node, "job", SMALL, goal=6)
    for number in (1, 2):
        run_round(node, "job", SMALL, 6, number)
    node.assert_all_slots_free("job")
    if as_user(FUNCTION_USER):
        status = Path(f"/proc/{pod.zygote()}/status").read_text()
        assert re.search(rf"^Uid:\t{FUNCTION_USER}\t", status, re.M)
        assert re.search(r"^CapEff:\t0+$", status, re.M)


def upload_model(node: SeparateNode) -> None:
    with node.client("job") as client:
        client.upload_model(SMALL)


def test_a_job_waits_for_the_pod_of_its_function(node: SeparateNode) -> None:
    other = node.pod("another").until_ready()
    with ThreadPoolExecutor(1) as thread:
        with node.client("job") as client:
            client.create_job(function="fedavg", goal=4)
        created = thread.submit(upload_model, node)
        with pytest.raises(TimeoutError):
            created.result(0.5)
        node.pod("fedavg")
        created.result(PATIENCE)
    run_round(node, "job", SMALL, 4, 1)
    assert other.probe("liveness")[0] == 200


@pytest.mark.parametrize("victim", ["pod", "zygote", "agent", "gateway"])
def test_a_round_survives_the_end_of_any_part(node: SeparateNode, victim: str) -> None:
    pod = node.pod().until_ready()
    create_job(node, "job", SMALL, goal=8)
    round_ = make_round(SMALL, 8)
    submit_all(node, "job", round_, range(4))
    if victim == "pod":
        pod.process.terminate()
        pod.process.wait(PATIENCE)
        pod = node.pod()
    elif victim == "zygote":
        os.kill(pod.zygote(), signal.SIGKILL)
    else:
        _end(node, victim)
    pod.until_ready()
    # What was accepted is in memory that has outlived the victim, unless that was who kept account of it.
    again = {outcome.status for outcome in submit_all(node, "job", round_, range(4))}
    assert again == {"accepted" if victim == "gateway" else "duplicate"}
    assert {outcome.status for outcome in submit_all(node, "job", round_, range(4, 8))} == {"accepted"}
    assert_mean(model_after(node, "job", 1), round_.updates, round_.weights)
    node.assert_all_slots_free("job")


def _end(node: SeparateNode, part: str) -> None:
    """SIGKILL a part, and start it again as Kubernetes would."""
    process = node.parts[part]
    process.kill()
    process.wait(PATIENCE)
    assert process.stdout is not None
    process.stdout.close()
    start: Callable[[], None] = node.start_agent if part == "agent" else node.start_gateway
    start()


def test_a_new_pod_takes_over_before_the_old_one_ends(node: SeparateNode) -> None:
    old = node.pod().until_ready()
    create_job(node, "job", SMALL, goal=4)
    run_round(node, "job", SMALL, 4, 1)
    new = node.pod().until_ready()
    old.process.terminate()
    old.process.wait(PATIENCE)
    run_round(node, "job", SMALL, 4, 2)
    older = node.pod().until_ready()
    older.process.terminate()  # the newest goes, and the one before it is turned to
    older.process.wait(PATIENCE)
    run_round(node, "job", SMALL, 4, 3)
    assert new.probe("readiness")[0] == 200


def test_what_a_function_prints_is_taken_for_no_message(
    node: SeparateNode, capfd: pytest.CaptureFixture[str]
) -> None:
    file = node.runtime / "fedavg.py"
    text = "import sys\nprint('{\"joined\": false}', flush=True)\n"
    text += 'sys.stdout.write("x" * 200_000)\nsys.stdout.flush()\n'
    file.write_text(FUNCTIONS["fedavg"].read_text() + text)
    pod = Pod(node.runtime, "fedavg", file)
    node.parts["pod"] = pod.process
    pod.until_ready()
    create_job(node, "job", SMALL, goal=4)
    run_round(node, "job", SMALL, 4, 1)
    assert pod.probe("readiness")[0] == 200
    assert '{"joined": false}' in capfd.readouterr().err


def test_a_function_cannot_pass_for_a_gateway(node: SeparateNode) -> None:
    require(
        "processes of another user", None if os.geteuid() == 0 else "only root can give a process another user"
    )
    program = (
        "import os, sys\n"
        "from lifl.agent_client import join\n"
        "from lifl.messages import Hello\n"
        f"os.setgroups([]); os.setresgid(*[{FUNCTION_USER}] * 3); os.setresuid(*[{FUNCTION_USER}] * 3)\n"
        "try: join(sys.argv[1], Hello(sys.argv[2]))\n"
        "except Exception as error: sys.exit(str(error))\n"
    )
    for role in ("gateway", "coordinator"):
        command = [sys.executable, "-c", program, str(node.runtime / "agent.sock"), role]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert result.returncode == 1
        assert f"a process of this user cannot be a {role}" in result.stderr


def test_a_pod_without_an_agent_says_what_it_lacks(watch: Watch, tmp_path: Path) -> None:
    pod = Pod(tmp_path / "nowhere", "fedavg", FUNCTIONS["fedavg"])
    try:
        until(lambda: pod.probe("liveness")[0] == 200, "liveness")
        status, text = pod.probe("readiness")
        assert status == 503
        # pytest's directories are closed to other users.
        assert str(tmp_path / "nowhere" / "agent.sock") in text
        assert "DaemonSet" in text or "Permission denied" in text
    finally:
        pod.process.terminate()
        assert pod.process.wait(PATIENCE) == 0


def test_a_pod_whose_function_cannot_be_loaded_says_so_and_ends(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    result = subprocess.run(
        [sys.executable, "-m", "lifl.function_pod"],
        env=dict(os.environ, LIFL_FUNCTION=str(broken), LIFL_LOG_FORMAT="json"),
        capture_output=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 1
    record = json.loads(result.stderr.splitlines()[-1])
    assert record["level"] == "error"
    assert record["process"] == "function"
    assert "no_such_module" in record["message"]

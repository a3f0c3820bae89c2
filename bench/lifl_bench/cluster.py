"""A cluster on one machine: a coordinator and its nodes, each on a host of its own, started as users start them.

    with Cluster(3, directory) as cluster:
        cluster.call(run_a_round, cluster.url(1))
        cluster.kill(2)

Clients have a host of their own, too. A node is its supervisor and everything below it: it is killed, paused and
slowed down as one, the way a machine is.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, Final, ParamSpec, TypeVar

from lifl_bench.hosts import Host, Hosts
from lifl_bench.measure import tree_cpu, tree_of
from lifl_bench.processes import REPOSITORY

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 15.0
_GATEWAY_PORT, _PEER_PORT = 8080, 8081
_COORDINATOR_PORT, _COORDINATOR_PEER_PORT = 7070, 7071
_REQUEST_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.02
_SLOW_PERIOD_SECONDS: Final = 0.02
_STOPPING_SECONDS: Final = 0.0005
_TAIL_LINES: Final = 20

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Cluster:
    """Nodes h1, h2, ... and their coordinator; use it in a `with` statement, which waits until all are up.

    Raises HostsUnavailable without the privilege for hosts, RuntimeError with the end of its log if something does
    not start.
    """

    def __init__(
        self,
        nodes: int,
        directory: Path,
        *,
        data_plane: str = "auto",
        capacity: float = 0.0,
        lease: float = 0.0,
        gateways: int = 1,
        project: Path = REPOSITORY,
        arguments: Sequence[str] = (),
        coordinator_arguments: Sequence[str] = (),
        arguments_of: Callable[[str], Sequence[str]] | None = None,
        clock_offsets: Mapping[str, int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """State and logs go below `directory`. `capacity` (MC) and `lease` are those of `func run` and
        `func coordinator`, 0 for the default; `arguments` are further ones for each node, `arguments_of` those for
        `coordinator`, or for a node, by its name. `clock_offsets` says by how many seconds their monotonic clocks
        are ahead of this machine's."""
        self._directory = directory
        self._numbers = range(1, nodes + 1)
        self.hosts = Hosts(["coordinator", "clients", *map(_name, self._numbers)])
        self._environment = {
            name: value
            for name, value in (os.environ if environment is None else environment).items()
            if not name.startswith("FUNC_")
        }
        self._token_file = directory / "member-token"
        self._node_arguments = [
            *("--path", str(project), "--data-plane", data_plane, "--gateways", str(gateways), *arguments),
            *(("--capacity", str(capacity)) if capacity else ()),
        ]
        self._coordinator_arguments = [*coordinator_arguments, *(("--lease", str(lease)) if lease else ())]
        self._arguments_of = arguments_of
        self._clock_offsets = dict(clock_offsets or {})
        self._programs: dict[str, Program] = {}
        self._slowness: dict[int, _Slowness] = {}
        self._ended_cpu: dict[str, float] = {}
        self._runtime_base = ""

    def __enter__(self) -> Cluster:
        try:
            self.hosts.__enter__()
            for name, seconds in self._clock_offsets.items():
                self.hosts[name].set_clock(seconds)
            self._directory.mkdir(parents=True, exist_ok=True)
            # Short, for the sockets below it, whose paths may have 107 bytes.
            self._runtime_base = tempfile.mkdtemp(prefix="cluster-")
            self._environment["XDG_RUNTIME_DIR"] = self._runtime_base
            self._token_file.touch(0o600)
            self._token_file.write_text(f"{secrets.token_hex(16)}\n")
            self.start_coordinator()
            self.start_nodes(self._numbers)
            self.wait_for_nodes(len(self._numbers))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything; may be called twice."""
        for number in list(self._slowness):
            self._end_slowness(number)
        for program in self._programs.values():
            program.resume()
            program.terminate()
        for name in list(self._programs):
            self._end(name, Program.stop)
        self.hosts.close()
        if self._runtime_base:
            shutil.rmtree(self._runtime_base, ignore_errors=True)

    # --- where everything is ---------------------------------------------------------------------------------

    @property
    def numbers(self) -> range:
        """The numbers of the nodes, from 1."""
        return self._numbers

    def host(self, number: int) -> Host:
        """The host of a node."""
        return self.hosts[_name(number)]

    def peer_address(self, number: int) -> str:
        """HOST:PORT where a node listens for other nodes."""
        return f"{self.host(number).address}:{_PEER_PORT}"

    @property
    def coordinator_peer_address(self) -> str:
        """HOST:PORT where the coordinator listens for nodes."""
        return f"{self.hosts['coordinator'].address}:{_COORDINATOR_PEER_PORT}"

    def url(self, number: int) -> str:
        """Base URL of a node's gateways."""
        return f"http://{self.host(number).address}:{_GATEWAY_PORT}"

    @property
    def coordinator_url(self) -> str:
        """Base URL of the coordinator."""
        return f"http://{self.hosts['coordinator'].address}:{_COORDINATOR_PORT}"

    def state_directory(self, number: int) -> Path:
        """Where a node keeps its state, also while it is down."""
        return self._directory / _name(number)

    def log(self, name: str) -> Path:
        """What a program has printed on stderr in all its lives: of `coordinator`, or of a node by its name."""
        return self._directory / f"{name}.log"

    # --- talking to it ---------------------------------------------------------------------------------------

    def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a function in a thread on the clients' host."""
        return self.hosts["clients"].call(function, *args, **kwargs)

    def get(self, path: str, url: str = "") -> Any:
        """The JSON that the coordinator, or a node's `url`, has at a path. Raises OSError if nobody answers.

        The coordinator is asked on its own host: that works while the host is cut off, and crosses no link.
        """
        if url:
            return self.call(_get, url + path)
        return self.hosts["coordinator"].call(_get, self.coordinator_url + path)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The nodes by name as the coordinator sees them."""
        return {node["name"]: node for node in self.get("/v1/nodes")["nodes"]}

    def wait_for_nodes(self, count: int, status: str = "ready", seconds: float = START_SECONDS) -> None:
        """Wait until the coordinator has exactly `count` nodes of this status. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while True:
            found: object
            try:
                found = {name: node["status"] for name, node in self.nodes().items()}
                if list(found.values()).count(status) == count:
                    return
            except OSError as error:
                found = error
            if time.monotonic() > end:
                raise TimeoutError(f"not {count} nodes {status} within {seconds:g} s, but: {found}")
            time.sleep(_POLL_SECONDS)

    # --- starting and ending -----------------------------------------------------------------------------------

    def start_coordinator(self) -> None:
        """Start it on its old state and wait until it listens."""
        host = self.hosts["coordinator"]
        arguments = ["coordinator", "--address", f"{host.address}:{_COORDINATOR_PORT}"]
        arguments += ["--peer-address", self.coordinator_peer_address]
        arguments += ["--state-directory", str(self._directory / "coordinator")]
        self._start("coordinator", [*arguments, *self._coordinator_arguments])

    def start_node(self, number: int) -> None:
        """Start a node on its old state and wait until it listens; it joins the cluster soon after."""
        host = self.host(number)
        arguments = ["run", "--address", f"{host.address}:{_GATEWAY_PORT}", "--name", host.name]
        arguments += ["--peer-address", self.peer_address(number), "--join", self.coordinator_url]
        arguments += ["--state-directory", str(self.state_directory(number))]
        self._start(host.name, [*arguments, *self._node_arguments])

    def start_nodes(self, numbers: Iterable[int]) -> None:
        """Start several at the same time."""
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self.start_node, numbers))

    def stop(self, number: int) -> None:
        """End a node in order."""
        self._end_slowness(number)
        self._end(_name(number), Program.stop)

    def kill(self, number: int) -> None:
        """Kill all processes of a node, none of which sees another one's end."""
        self._end_slowness(number)
        self._end(_name(number), Program.kill)

    def stop_coordinator(self) -> None:
        """End the coordinator in order."""
        self._end("coordinator", Program.stop)

    def kill_coordinator(self) -> None:
        """Kill the coordinator and whatever would start it again."""
        self._end("coordinator", Program.kill)

    def _start(self, name: str, arguments: Sequence[str]) -> None:
        if name in self._programs:
            raise ValueError(f"{name} runs already")
        command = [sys.executable, "-m", "lifl.cli", *arguments, "-o", "json"]
        command += ["--member-token-file", str(self._token_file), "--allow-anonymous"]
        command += self._arguments_of(name) if self._arguments_of is not None else ()
        program = Program(self.hosts[name], command, self._environment, self.log(name))
        self._programs[name] = program
        program.hear()

    def _end(self, name: str, how: Callable[[Program], None]) -> None:
        program = self._programs.pop(name, None)
        if program is None:
            return
        self._ended_cpu[name] = self._ended_cpu.get(name, 0.0) + program.cpu_seconds()
        how(program)

    # --- what can happen to a node -----------------------------------------------------------------------------

    def is_running(self, number: int) -> bool:
        """Whether a node's supervisor is there."""
        program = self._programs.get(_name(number))
        return program is not None and program.is_running

    def pids(self, number: int) -> list[int]:
        """All processes of a node, its supervisor first; empty while it is down."""
        program = self._programs.get(_name(number))
        return program.pids() if program is not None else []

    def pause(self, number: int) -> None:
        """Stop all processes of a node, as a machine that hangs; its links stay up."""
        self._end_slowness(number)
        self._programs[_name(number)].pause()

    def resume(self, number: int) -> None:
        """Let a paused node go on."""
        self._programs[_name(number)].resume()

    def slow_down(self, number: int, factor: float) -> None:
        """Have a node run at 1/factor of its speed, until it is told otherwise; 1 is full speed again."""
        self._end_slowness(number)
        if factor > 1:
            self._slowness[number] = _Slowness(self._programs[_name(number)], factor)

    def _end_slowness(self, number: int) -> None:
        slowness = self._slowness.pop(number, None)
        if slowness is not None:
            slowness.end()

    # --- what it costs -----------------------------------------------------------------------------------------

    def cpu_seconds(self, name: str | None = None) -> float:
        """CPU seconds of the coordinator and all nodes so far, earlier lives included; or of one by its name."""
        names = [name] if name is not None else ["coordinator", *map(_name, self._numbers)]
        running = sum(self._programs[each].cpu_seconds() for each in names if each in self._programs)
        return running + sum(self._ended_cpu.get(each, 0.0) for each in names)

    def internode_bytes(self) -> int:
        """Bytes that nodes have sent to nodes so far, counted at their links, with all protocols' headers.

        It is what has reached the nodes less what the hosts of the clients and the coordinator have sent. All of
        that counts as sent to nodes: a client that talks to the coordinator, and a link that was cut, make it less
        than it is. Broadcasts, which all hosts receive, make it some hundred bytes more.
        """
        received = sum(self.host(number).traffic().received for number in self._numbers)
        return received - sum(self.hosts[name].traffic().sent for name in ("clients", "coordinator"))


class Program:
    """A process on a host, with everything below it."""

    def __init__(self, host: Host, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """stderr is added to `log`."""
        self._name = host.name
        self._log = log
        with log.open("ab") as output:
            self._process = host.popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether the first process has not ended."""
        return self._process.poll() is None

    def pids(self) -> list[int]:
        """The process and all below it, each after its parent."""
        return _tree(self._process.pid) if self.is_running else []

    def cpu_seconds(self) -> float:
        """CPU seconds of all of them so far."""
        return tree_cpu(self._process.pid) if self.is_running else 0.0

    def hear(self) -> Any:
        """The line of JSON by which it says that it is ready. Raises RuntimeError with the end of its log."""
        assert self._process.stdout is not None
        descriptor, line = self._process.stdout.fileno(), b""
        end = time.monotonic() + START_SECONDS
        while not line.endswith(b"\n"):
            if not connection.wait([descriptor], max(0.0, end - time.monotonic())):
                raise self._failed("did not start in time")
            if not (piece := os.read(descriptor, 65536)):
                raise self._failed("did not start")
            line += piece
        return json.loads(line)

    def _failed(self, what: str) -> RuntimeError:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        return RuntimeError(f"{self._name} {what}:\n{tail}")

    def pause(self) -> None:
        """Stop all processes; returns when none runs any more."""
        stopped: list[int] = []
        while True:
            pids = self.pids()
            for pid in pids:
                if pid not in stopped:
                    _signal(pid, signal.SIGSTOP)
            # One that was just forking has a child now.
            if pids == stopped and all(_state(pid) in "TtZX" for pid in pids):
                return
            stopped = pids
            time.sleep(_STOPPING_SECONDS)

    def resume(self) -> None:
        """Let all go on."""
        for pid in self.pids():
            _signal(pid, signal.SIGCONT)

    def terminate(self) -> None:
        """Ask it to end, without waiting."""
        if self.is_running:
            self._process.terminate()

    def stop(self) -> None:
        """End it in order, by force if that takes too long, and see the end of all processes below it."""
        below = _open_pidfds(self.pids())
        self.resume()
        self.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.pause()
            self._kill_all()
        self._see_end(below)

    def kill(self) -> None:
        """Kill all processes; none sees another one's end, for they are stopped before."""
        self.pause()
        below = _open_pidfds(self.pids())
        self._kill_all()
        self._see_end(below)

    def _kill_all(self) -> None:
        for pid in self.pids():
            _signal(pid, signal.SIGKILL)

    def _see_end(self, below: Sequence[int]) -> None:
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        end = time.monotonic() + STOP_SECONDS
        for descriptor in below:
            if not connection.wait([descriptor], max(0.0, end - time.monotonic())):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)


class _Slowness:
    """A thread that stops a program and lets it go on by turns."""

    def __init__(self, program: Program, factor: float) -> None:
        self._program = program
        self._pause_seconds = _SLOW_PERIOD_SECONDS * (factor - 1)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slowness", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Full speed again."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(_SLOW_PERIOD_SECONDS) and self._program.is_running:
            self._program.pause()
            self._is_over.wait(self._pause_seconds)
            self._program.resume()


def _name(number: int) -> str:
    return f"h{number}"


def _get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=_REQUEST_SECONDS) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            raise OSError(f"{url}: {error.code} {error.read()[:500].decode(errors='replace')}") from None


def _tree(pid: int) -> list[int]:
    """`pid` and all processes below it, each after its parent."""
    found = [pid]
    for member in found:
        children = _children(member)
        if children is None:  # a kernel without CONFIG_PROC_CHILDREN: look at every process of the machine
            return list(tree_of(pid))
        found += children
    return found


def _children(pid: int) -> list[int] | None:
    """The children of all threads of a process; None if the kernel does not tell."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            file = Path(f"/proc/{pid}/task/{thread}/children")
            try:
                found += map(int, file.read_bytes().split())
            except FileNotFoundError:
                if file.parent.exists():
                    return None
    return found


def _state(pid: int) -> str:
    """The letter of its state in /proc; X for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _open_pidfds(pids: Iterable[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            found.append(os.pidfd_open(pid))
    return found

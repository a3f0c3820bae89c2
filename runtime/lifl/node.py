"""The node's supervisor: starts agent, coordinator, zygotes and gateways, and starts again what dies.

Each is a child process that prints one JSON line when it is ready. The supervisor waits for deaths through
pidfds, so it uses no CPU while nothing happens. If the coordinator dies all others are started anew: it goes on
from the journal, and the open round starts again.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from lifl.errors import InvalidInput, Unavailable
from lifl.event_loop import ready_keys
from lifl.logs import say

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 8.0
_QUICK_DEATH: Final = 1.0
"""A process that lived for less than these seconds is started again only after a pause."""
_LONGEST_PAUSE: Final = 5.0
_RUNTIME_PREFIX: Final = "lifl-"


@dataclass
class NodeOptions:
    """What a node runs. `functions` maps the names that jobs use to files; port 0 means any free one.

    With `agent_directory` the agent and the functions run elsewhere, in containers of their own; then `functions`,
    `data_plane`, `default_function` and `start` are not used.
    """

    functions: dict[str, Path]
    state_directory: Path
    host: str = "127.0.0.1"
    port: int = 8080
    gateways: int = 1
    data_plane: str = "auto"
    default_function: str = ""
    token_file: Path | None = None
    allow_anonymous: bool = False
    access_log: bool = False
    agent_directory: Path | None = None
    """Where the agent of another container has its socket; None: the node starts an agent."""
    start: Literal["fork", "spawn"] = "fork"
    """How workers come to be: forked from a zygote that has loaded the function, or each a fresh interpreter."""
    join: str = ""
    """Base URL of the coordinator of the cluster to join; empty: the node is alone. The rest is for members."""
    name: str = ""
    advertise: str = ""
    """Base URL that others reach the gateways by; empty: where they listen."""
    peer_address: str = ""
    """HOST:PORT to listen on for other nodes; empty: the same host, any free port."""
    member_token_file: Path | None = None
    peer_certificate: Path | None = None
    peer_key: Path | None = None
    peer_authority: Path | None = None
    capacity: float = 0.0
    """MC: updates that it can aggregate at once; 0: what was measured, else a guess (`lifl.calibration`)."""


@dataclass(frozen=True)
class NodeReady:
    """Where a started node listens and what it found. `processes` maps names to pids."""

    address: str
    data_plane: str
    reason: str
    """Why this data plane was chosen; empty when eBPF was."""
    huge_pages: bool
    processes: dict[str, int]
    peer_address: str = ""
    """Where other nodes of the cluster reach this one; empty for a node on its own."""


@dataclass
class _Child:
    """One supervised process."""

    name: str
    arguments: list[str]
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    started: float = 0.0
    pause: float = 0.0
    buffer: bytes = b""
    ready: dict[str, Any] = field(default_factory=dict)


class Node:
    """Starts and supervises the processes of one node. `start`, `wait` and `stop` belong to one thread."""

    def __init__(self, options: NodeOptions) -> None:
        self.options = options
        self._children: dict[str, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._stop_event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._restarts: list[tuple[float, Callable[[], None]]] = []
        self._runtime_directory: Path
        self._lock_fd = -1
        self._ended = threading.Event()
        self._failure: BaseException | None = None

    # --- start and stop ------------------------------------------------------------------------------------

    def start(self) -> NodeReady:
        """Start everything and return once HTTP is answered.

        Raises `InvalidInput` when the state directory is in use or the options cannot work, `Unavailable`
        with the last words of the process that did not start.
        """
        self._take_state_directory()
        base = os.environ.get("XDG_RUNTIME_DIR")
        self._runtime_directory = Path(
            tempfile.mkdtemp(prefix=_RUNTIME_PREFIX, dir=base if base and os.path.isdir(base) else None)
        )
        try:
            self._runtime_note.write_text(str(self._runtime_directory))
            self._start_all()
        except BaseException:
            self.stop()
            raise
        self._selector.register(self._stop_event, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._thread.start()
        return self.ready()

    def ready(self) -> NodeReady:
        """What the running processes have said of themselves."""
        # An agent in another container tells the coordinator what carries descriptors, and no more.
        agent = self._children["agent" if "agent" in self._children else "coordinator"].ready
        gateway = self._children["gateway-0"].ready
        return NodeReady(
            address=gateway["address"],
            data_plane=agent["data_plane"],
            reason=agent.get("reason", ""),
            huge_pages=bool(agent.get("huge_pages")),
            processes=self.processes(),
            peer_address=self._peer_address() if self.options.join else "",
        )

    def processes(self) -> dict[str, int]:
        """Pid of each supervised process that runs now."""
        return {
            child.name: child.process.pid
            for child in list(self._children.values())
            if child.process is not None and child.process.poll() is None
        }

    def wait(self) -> int:
        """Block until `stop` is called (then 0) or the node cannot go on (then 1)."""
        while not self._ended.wait(3600):
            pass
        return 1 if self._failure else 0

    def stop(self) -> None:
        """End all processes, gateways first, and remove the runtime directory. May be called twice."""
        self._stopping = True
        if self._thread is not None:
            os.eventfd_write(self._stop_event, 1)
            self._thread.join()
            self._thread = None
        self._end_children(list(self._children))
        self._children.clear()
        self._ended.set()
        if hasattr(self, "_runtime_directory"):
            shutil.rmtree(self._runtime_directory, ignore_errors=True)
        if self._lock_fd >= 0:  # otherwise the state directory is another node's
            with contextlib.suppress(OSError):
                (self.options.state_directory / "run" / "node.json").unlink()
            with contextlib.suppress(OSError):
                self._runtime_note.unlink()
            os.close(self._lock_fd)
            self._lock_fd = -1
        self._selector.close()
        if self._stop_event >= 0:
            os.close(self._stop_event)
            self._stop_event = -1

    def __enter__(self) -> Node:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _take_state_directory(self) -> None:
        directory = self.options.state_directory
        for part in ("run", "incoming", "jobs"):
            (directory / part).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_fd = os.open(directory / "run" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            self._lock_fd = -1
            raise InvalidInput(
                f"{directory} belongs to a node that is running; stop that one or choose another --state-directory"
            ) from None
        for leftover in (directory / "incoming").iterdir():
            leftover.unlink()
        self._remove_stale_runtime_directory()

    @property
    def _runtime_note(self) -> Path:
        """The file that names the runtime directory, for the next node if this one is killed."""
        return self.options.state_directory / "run" / "runtime"

    def _remove_stale_runtime_directory(self) -> None:
        with contextlib.suppress(OSError):
            stale = Path(self._runtime_note.read_text())
            is_ours = stale.lstat().st_uid == os.geteuid() and not stale.is_symlink()
            if stale.name.startswith(_RUNTIME_PREFIX) and is_ours:
                shutil.rmtree(stale, ignore_errors=True)

    # --- processes -----------------------------------------------------------------------------------------

    def _start_all(self) -> None:
        options, runtime = self.options, str(self._runtime_directory)
        state = str(options.state_directory)
        self._member_file.unlink(missing_ok=True)  # of gateways that are no more
        agent = self._start_agent()
        self._launch(
            "coordinator",
            [
                *("-m", "lifl.control.coordinator", "--runtime-directory", runtime),
                *("--state-directory", state, "--gateways", str(options.gateways)),
                *(() if options.agent_directory else ("--functions", ",".join(options.functions))),
                *self._membership(),
            ],
        )
        if options.default_function:
            self._launch_zygote(options.default_function)
        if agent is not None:
            self._await_ready(agent)
        self._await_ready(self._children["coordinator"])
        port = options.port
        for seat in range(options.gateways):
            gateway = self._launch_gateway(seat, port)
            self._await_ready(gateway)
            # With port 0 the first gateway chooses and the others share.
            port = int(gateway.ready["address"].rsplit(":", 1)[1])
            gateway.arguments[gateway.arguments.index("--port") + 1] = str(port)
            if options.join and seat == 0:
                self._keep_peer_port(gateway)
        description = {"address": self._children["gateway-0"].ready["address"], "pid": os.getpid()}
        (options.state_directory / "run" / "node.json").write_text(json.dumps(description))

    def _start_agent(self) -> _Child | None:
        """Start the agent, unless there is one; then its socket is made to be found where ours would be."""
        options, runtime = self.options, self._runtime_directory
        if options.agent_directory is None:
            words = ("--runtime-directory", str(runtime), "--data-plane", options.data_plane)
            return self._launch("agent", ["-m", "lifl_gateway.agent", *words])
        link = runtime / "agent.sock"
        link.unlink(missing_ok=True)
        link.symlink_to(options.agent_directory.absolute() / "agent.sock")
        return None

    def _launch_gateway(self, seat: int, port: int) -> _Child:
        options = self.options
        arguments = [
            *("-m", "lifl_gateway", "--runtime-directory", str(self._runtime_directory)),
            *("--state-directory", str(options.state_directory), "--host", options.host, "--port", str(port)),
            *("--seat", str(seat), "--seats", str(options.gateways)),
        ]
        if options.token_file is not None:
            arguments += ["--token-file", str(options.token_file)]
        if options.allow_anonymous:
            arguments.append("--allow-anonymous")
        if options.access_log:
            arguments.append("--access-log")
        if options.join:
            arguments += _flags(**self._trust())
        if options.join and seat == 0:  # one is heard by other nodes; all may send to them
            options.peer_address = options.peer_address or _host_port(options.host, 0)
            arguments += _flags(peer_address=options.peer_address)
        return self._launch(f"gateway-{seat}", arguments)

    # --- membership of a cluster -----------------------------------------------------------------------------

    def _membership(self) -> list[str]:
        """What the coordinator process of a member has to know; nothing for a node on its own."""
        options = self.options
        if not options.join:
            return []
        named = {"name": options.name, "advertise": options.advertise, "capacity": options.capacity}
        return _flags(join=options.join, **named, **self._trust())

    def _trust(self) -> dict[str, Path | None]:
        options = self.options
        return {
            "member_token_file": options.member_token_file,
            "peer_certificate": options.peer_certificate,
            "peer_key": options.peer_key,
            "peer_authority": options.peer_authority,
        }

    @property
    def _member_file(self) -> Path:
        """Tells the coordinator process, which is started first, where the gateways listen."""
        return self._runtime_directory / "member.json"

    def _keep_peer_port(self, gateway: _Child) -> None:
        """Have the gateway listen on the same port when it is started again."""
        host, port = self.options.peer_address.rpartition(":")[0], gateway.ready["peer_address"].rpartition(":")[2]
        self.options.peer_address = f"{host}:{port}"
        gateway.arguments[gateway.arguments.index("--peer-address") + 1] = self.options.peer_address

    def _peer_address(self) -> str:
        """Where the first gateway listens for other nodes, with a host that they can connect to."""
        address = str(self._children["gateway-0"].ready["peer_address"])
        host, _, port = address.rpartition(":")
        advertised = urlsplit(self.options.advertise).hostname
        return _host_port(advertised, int(port)) if advertised and _is_wildcard(host) else address

    def _write_member_file(self, gateway: _Child) -> None:
        address = self.options.advertise or gateway.ready["address"]
        new = self._member_file.with_suffix(".new")
        new.write_text(json.dumps({"address": address, "peer_address": self._peer_address()}))
        new.rename(self._member_file)

    # --- children --------------------------------------------------------------------------------------------

    def _launch_zygote(self, function: str) -> None:
        name = f"zygote-{function}"
        if name in self._children or self.options.agent_directory is not None:
            return
        file = self.options.functions.get(function)
        # A missing file is the zygote's to report: then the job's owner hears of it.
        path = str(file if file is not None else Path("functions") / f"{function}.py")
        arguments = [
            *("-m", "lifl.zygote", "--runtime-directory", str(self._runtime_directory)),
            *("--name", function, "--file", path, "--start", self.options.start),
        ]
        self._launch(name, arguments)

    def _launch(self, name: str, arguments: list[str]) -> _Child:
        child = self._children.setdefault(name, _Child(name, arguments))
        self._spawn(child)
        return child

    def _spawn(self, child: _Child) -> None:
        environment = dict(os.environ, PYTHONUNBUFFERED="1", LIFL_SUPERVISOR=str(os.getpid()))
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[variable] = "1"
        child.process = subprocess.Popen(
            [sys.executable, *child.arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        child.started = time.monotonic()
        child.buffer = b""
        child.ready = {}
        child.pidfd = os.pidfd_open(child.process.pid)
        assert child.process.stdout is not None
        os.set_blocking(child.process.stdout.fileno(), False)
        self._selector.register(child.process.stdout, selectors.EVENT_READ, partial(self._read, child))
        self._selector.register(child.pidfd, selectors.EVENT_READ, partial(self._died, child))

    def _read(self, child: _Child) -> None:
        """Take lines of JSON from a child: what it says when ready, or what it wants."""
        assert child.process is not None
        assert child.process.stdout is not None
        data = child.process.stdout.read(65536)
        if not data:
            if data == b"":
                self._selector.unregister(child.process.stdout)
            return
        *lines, child.buffer = (child.buffer + data).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if "zygote" in message:
                    self._launch_zygote(message["zygote"])
                else:
                    child.ready = message
                    if self.options.join and child.name == "gateway-0":
                        self._write_member_file(child)

    def _await_ready(self, child: _Child) -> None:
        end = time.monotonic() + _START_SECONDS
        while not child.ready:
            assert child.process is not None
            if child.process.poll() is not None:
                raise Unavailable(f"{child.name} did not start (exit status {child.process.returncode})")
            if time.monotonic() > end:
                raise Unavailable(f"{child.name} was not ready within {_START_SECONDS:g} s")
            for key in ready_keys(self._selector, 0.5):
                if key.data is not None and key.fileobj != child.pidfd:
                    key.data()

    def _supervise(self) -> None:
        try:
            while not self._stopping:
                for key in ready_keys(self._selector, self._seconds_to_restart()):
                    if key.data is not None and not self._stopping:
                        key.data()
                if not self._stopping:
                    self._restart_due()
            # Here and not in `stop`: what this thread has started gets a signal when the thread ends, in no order.
            self._end_children(list(self._children))
        except BaseException as error:
            self._failure = error
            self._ended.set()
            raise

    def _seconds_to_restart(self) -> float | None:
        if not self._restarts:
            return None
        return max(0.0, min(when for when, _ in self._restarts) - time.monotonic())

    def _restart_due(self) -> None:
        now = time.monotonic()
        due = [action for when, action in self._restarts if when <= now]
        self._restarts = [(when, action) for when, action in self._restarts if when > now]
        for action in due:
            action()

    def _died(self, child: _Child) -> None:
        self._bury(child)
        assert child.process is not None
        if self._stopping:
            return
        say("node", f"{child.name} ended (status {child.process.returncode}); starting it again")
        if child.name == "coordinator":
            self._restart_node()
            return
        lived = time.monotonic() - child.started
        child.pause = min(_LONGEST_PAUSE, max(0.1, child.pause * 2)) if lived < _QUICK_DEATH else 0.0
        self._restarts.append((time.monotonic() + child.pause, partial(self._spawn, child)))

    def _bury(self, child: _Child) -> None:
        """Forget a dead process: its descriptors and its entry in the poll set."""
        assert child.process is not None
        child.process.wait()
        for fileobj in (child.pidfd, child.process.stdout):
            if fileobj is not None:
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(fileobj)
        os.close(child.pidfd)
        child.pidfd = -1
        if child.process.stdout is not None:
            child.process.stdout.close()

    def _restart_node(self) -> None:
        names = [name for name in self._children if name != "coordinator"]
        self._end_children(names)
        self._restarts.clear()
        zygotes = [name.removeprefix("zygote-") for name in names if name.startswith("zygote-")]
        address = self._children["gateway-0"].ready.get("address") if "gateway-0" in self._children else None
        port = int(address.rsplit(":", 1)[1]) if address else self.options.port
        self._children.clear()
        self.options.port = port
        self._start_all()
        for function in zygotes:
            self._launch_zygote(function)

    def _end_children(self, names: list[str]) -> None:
        for kind in ("gateway", "coordinator", "zygote", "agent"):
            children = [self._children[name] for name in names if name.startswith(kind)]
            for child in children:
                if child.pidfd < 0 or child.process is None:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    if kind == "zygote" and child.process.returncode is None:
                        # With its workers, one of which may be in a function that never returns.
                        os.killpg(child.process.pid, signal.SIGKILL)
                    else:
                        signal.pidfd_send_signal(child.pidfd, signal.SIGTERM)
            end = time.monotonic() + _STOP_SECONDS
            for child in children:
                if child.pidfd < 0 or child.process is None:
                    continue
                try:
                    child.process.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
                self._bury(child)


def _flags(**values: object) -> list[str]:
    """`--name value` for each value that is given."""
    given = [(name, value) for name, value in values.items() if value]
    return [word for name, value in given for word in (f"--{name.replace('_', '-')}", str(value))]


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False

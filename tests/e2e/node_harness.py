"""A whole node for tests, clients that speak HTTP to it, and a watch over what it leaves behind."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.request import urlopen

import numpy as np
from lifl.client import Client, Submission
from lifl.node import Node, NodeOptions
from lifl.tensors import Encoder
from lifl_ebpf.bpf_syscall import BpfError, map_ids, program_ids
from numpy.typing import NDArray

from tests.leftovers import shared_memory

ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = {path.stem: path for path in (ROOT / "functions").glob("*.py")}
PATIENCE = 30.0
"""Seconds after which a test gives up waiting for one thing."""
MARK = "LIFL_E2E"
"""Environment variable that tells the processes of one watch from all others on the machine."""

Tensors = Mapping[str, NDArray[Any]]
T = TypeVar("T")


def until(condition: Callable[[], T | None], what: str, seconds: float = PATIENCE) -> T:
    """Poll a condition of real processes and return what it returns; fails after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"no {what} within {seconds:g} s"
        time.sleep(0.005)


# --- nothing left behind -------------------------------------------------------------------------------------


class Watch:
    """Finds what is left of everything that was started while it was entered, and of nobody else's.

    Processes are known by a mark in their environment, which children inherit, orphans too. Runtime directories
    are made in a directory of the watch's own.
    """

    def __enter__(self) -> Watch:
        self._mark = uuid.uuid4().hex
        # Short, for the sockets in it: a UNIX socket's path has 107 bytes at most.
        self.runtime_base = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))
        self._before = {name: os.environ.get(name) for name in (MARK, "XDG_RUNTIME_DIR")}
        os.environ[MARK] = self._mark
        os.environ["XDG_RUNTIME_DIR"] = str(self.runtime_base)
        self._shared_memory = shared_memory()
        self._bpf = _bpf_objects()
        gc.collect()
        self._descriptors = len(os.listdir("/proc/self/fd"))
        self._threads = threading.active_count()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        try:
            if kind is None:
                self._assert_clean()
        finally:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for left in self.runtime_base.glob("lifl-*"):
                for file in left.iterdir():
                    file.unlink()
                left.rmdir()
            self.runtime_base.rmdir()

    def processes(self) -> dict[int, str]:
        """Every living process that this watch has seen started, with its command line."""
        mark = f"{MARK}={self._mark}".encode()
        found = {}
        for pid in _pids():
            with contextlib.suppress(OSError):
                if pid != os.getpid() and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    command = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if command:  # else it is a zombie
                        found[pid] = command.replace(b"\0", b" ").decode(errors="replace")
        return found

    def _assert_clean(self) -> None:
        _settle("processes", self.processes)
        _settle("zombies", _zombie_children)
        _settle("runtime directories", lambda: [path.name for path in self.runtime_base.iterdir()])
        _settle("entries in /dev/shm", lambda: sorted(shared_memory() - self._shared_memory))
        _settle("BPF objects", lambda: sorted(_unowned_bpf(self._bpf)))
        _settle("threads", lambda: threading.enumerate() if threading.active_count() > self._threads else [])
        gc.collect()
        _settle("file descriptors", self._more_descriptors)

    def _more_descriptors(self) -> list[str]:
        open_now = os.listdir("/proc/self/fd")
        if len(open_now) <= self._descriptors:
            return []
        targets = []
        for descriptor in open_now:
            with contextlib.suppress(OSError):
                targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return [f"{len(open_now)} instead of {self._descriptors}", *targets]


def _settle(what: str, left: Callable[[], Any]) -> None:
    """Some things end a moment after their process (RCU grace periods); they are given ten seconds.

    A look is taken twice: a process that has just begun another program has no environment for a moment.
    """
    end = time.monotonic() + 10
    clean = 0
    while clean < 2:
        rest = left()
        clean = 0 if rest else clean + 1
        assert time.monotonic() < end, f"left behind: {what}: {rest}"
        time.sleep(0.02)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _zombie_children() -> list[int]:
    me, zombies = os.getpid(), []
    for pid in _pids():
        with contextlib.suppress(OSError):
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z" and int(parent) == me:
                zombies.append(pid)
    return zombies


def _bpf_objects() -> set[tuple[str, int]]:
    try:
        return {("map", number) for number in map_ids()} | {("program", number) for number in program_ids()}
    except BpfError:  # may not look; then no eBPF data plane runs either
        return set()


def _foreign_agents() -> set[int]:
    """Pids of the agents on this machine that do not descend from this process."""
    found = set()
    for pid in _pids():
        with contextlib.suppress(OSError):
            if b"lifl_gateway.agent" in Path(f"/proc/{pid}/cmdline").read_bytes() and not _descends(pid):
                found.add(pid)
    return found


def _descends(pid: int) -> bool:
    """Whether a process descends from this one."""
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def _unowned_bpf(before: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """BPF objects that came since then and that no process holds open.

    An agent also has some to which it keeps no file descriptor. So nothing is said while an agent runs that this
    process has not started: another worker's, perhaps. Those of this watch have ended.
    """
    new = _bpf_objects() - before
    if not new or _foreign_agents():
        return set()
    held = set()
    for pid in _pids():
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fdinfo"):
                with contextlib.suppress(OSError):
                    text = Path(f"/proc/{pid}/fdinfo/{name}").read_text()
                    held |= {("map", int(number)) for number in re.findall(r"^map_id:\s*(\d+)", text, re.M)}
    return new - held


# --- the node ------------------------------------------------------------------------------------------------


@dataclass
class LiveNode:
    """A `lifl.node.Node` in this process; its parts are real processes."""

    watch: Watch
    state_directory: Path
    data_plane: str
    gateways: int = 1
    functions: Mapping[str, Path] = field(default_factory=lambda: FUNCTIONS)
    start_workers: Literal["fork", "spawn"] = "fork"

    def start(self) -> LiveNode:
        self.node = Node(
            NodeOptions(
                functions=dict(self.functions),
                state_directory=self.state_directory,
                port=0,
                gateways=self.gateways,
                data_plane=self.data_plane,
                start=self.start_workers,
            )
        )
        ready = self.node.start()
        assert ready.data_plane == self.data_plane
        self.address = ready.address
        return self

    def stop(self) -> None:
        self.node.stop()

    def __enter__(self) -> LiveNode:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- processes ---

    def pid(self, name: str) -> int:
        """Of a process that runs now or is being started again."""
        return until(lambda: self.node.processes().get(name), f"process {name}")

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until the supervisor has started another."""
        before = self.pid(name)
        os.kill(before, signal.SIGKILL)
        until(lambda: self.node.processes().get(name, before) != before, f"new {name}")

    def workers(self) -> list[int]:
        """The children of the zygotes that have not ended, in the order of their start."""
        found = []
        for name, pid in self.node.processes().items():
            if name.startswith("zygote-"):
                with contextlib.suppress(OSError):
                    found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return sorted(pid for pid in found if _state(pid) not in ("", "Z"))

    def kill_workers(self, count: int | None = None) -> int:
        """SIGKILL workers, of which there must be one at least; returns how many."""
        victims = until(self.workers, "worker")[:count]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(victims)

    def kill_busy_worker(self) -> bool:
        """SIGKILL a worker if one is using the CPU at this moment."""
        for pid in self.workers():
            if _state(pid) == "R":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return True
        return False

    # --- what the node says ---

    def client(self, job: str, name: str = "observer", *, retries: int = 100, timeout: float = 30.0) -> Client:
        """A client that repeats more often, and after shorter pauses, than one out of the box."""
        client = Client(self.address, job, name, retries=retries, timeout=timeout)
        client._sleep = lambda seconds: time.sleep(min(seconds, 0.2))
        return client

    def describe(self, job: str) -> dict[str, Any]:
        with self.client(job) as client:
            return client.describe()

    def metric(self, name: str, job: str) -> float:
        with urlopen(f"{self.address}/metrics", timeout=PATIENCE) as answer:
            text = answer.read().decode()
        match = re.search(rf'^{name}{{job="{re.escape(job)}"}} (\S+)$', text, re.M)
        return float(match[1]) if match else -1.0

    def assert_all_slots_free(self, job: str) -> None:
        """Of a job on a node with one gateway."""
        total = until(lambda: max(0.0, self.metric("lifl_gateway_slots", job)), "slots of the job")
        until(lambda: self.metric("lifl_gateway_slots_free", job) == total, "release of all slots")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


# --- jobs and their arithmetic -------------------------------------------------------------------------------

SMALL: Tensors = {"bias": np.zeros(101, np.float32), "weight": np.zeros((50, 101), np.float32)}


def random_like(model: Tensors, seed: int) -> dict[str, NDArray[Any]]:
    """Normally distributed tensors of the shapes of a float32 model."""
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(array.shape, np.float32) for name, array in model.items()}


def encode(tensors: Tensors) -> bytes:
    return bytes(Encoder().encode(tensors))


def flat(tensors: Tensors) -> NDArray[np.float64]:
    """All parameters, in float64, in the order of the names."""
    return np.concatenate([np.asarray(tensors[name], np.float64).ravel() for name in sorted(tensors)])


def relative_error(result: Tensors, updates: Sequence[Tensors], weights: Sequence[float]) -> float:
    """Largest error against the sequential float64 weighted mean, relative to sum |w x| / sum w."""
    total = magnitude = np.zeros(1)
    for update, weight in zip(updates, weights, strict=True):
        term = flat(update) * weight
        total = total + term
        magnitude = magnitude + np.abs(term)
    mean, scale = total / sum(weights), magnitude / sum(weights)
    error = np.abs(flat(result) - mean)
    return float(np.max(error / np.where(scale > 0, scale, 1.0)))


def assert_mean(result: Tensors, updates: Sequence[Tensors], weights: Sequence[float] | None = None) -> None:
    assert relative_error(result, updates, weights or [1.0] * len(updates)) < 1e-6


class Round(NamedTuple):
    """Updates of one round: who sends what with which weight."""

    updates: list[dict[str, NDArray[Any]]]
    weights: list[float]
    bodies: list[bytes]

    @property
    def clients(self) -> range:
        return range(len(self.updates))

    @property
    def pairs(self) -> Iterable[tuple[dict[str, NDArray[Any]], float]]:
        return zip(self.updates, self.weights, strict=True)


def make_round(model: Tensors, count: int, seed: int = 0, distinct: int = 8) -> Round:
    """`count` updates with different weights; many share their tensors, for the sake of time and memory."""
    kinds = [random_like(model, 1000 * seed + number) for number in range(min(distinct, count))]
    encoded = [encode(kind) for kind in kinds]
    chosen = [number % len(kinds) for number in range(count)]
    weights = [1.0 + (7 * number + seed) % 13 for number in range(count)]
    return Round([kinds[k] for k in chosen], weights, [encoded[k] for k in chosen])


def create_job(node: LiveNode, job: str, model: Tensors, **spec: Any) -> None:
    with node.client(job) as client:
        client.create_job(**{"function": "fedavg", **spec})
        client.upload_model(model)


def submit(node: LiveNode, job: str, round_: Round, client: int, number: int = 1) -> Submission:
    with node.client(job, f"client-{client}") as connection:
        return connection.submit(round_.bodies[client], num_samples=round_.weights[client], round=number)


def submit_all(
    node: LiveNode,
    job: str,
    round_: Round,
    clients: Iterable[int] | None = None,
    number: int = 1,
    threads: int = 8,
) -> list[Submission]:
    """Submit from many threads at once, and return what became of each."""
    with ThreadPoolExecutor(threads) as pool:
        chosen = round_.clients if clients is None else clients
        return list(pool.map(lambda client: submit(node, job, round_, client, number), chosen))


def model_after(node: LiveNode, job: str, number: int, seconds: float = PATIENCE) -> dict[str, NDArray[Any]]:
    """The result of a round, once it is there."""
    with node.client(job) as client:
        return dict(client.wait_for_round(after=number, timeout=seconds).tensors)


def run_round(node: LiveNode, job: str, model: Tensors, count: int, number: int, **options: Any) -> None:
    """A whole round of `count` updates that must come out right."""
    round_ = make_round(model, count, seed=number)
    outcomes = submit_all(node, job, round_, number=number, **options)
    assert {outcome.status for outcome in outcomes} == {"accepted"}
    assert_mean(model_after(node, job, number), round_.updates, round_.weights)


# --- HTTP as no good client speaks it ------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    problem: dict[str, Any]
    headers: dict[str, str]


def headers_of_update(client: str, number: int = 1, samples: str = "1", **others: str) -> dict[str, str]:
    return {
        "Content-Type": "application/vnd.safetensors",
        "ce-specversion": "1.0",
        "ce-type": "dev.lifl.update.v1",
        "ce-id": f"{client}-{number}",
        "ce-source": client,
        "ce-round": str(number),
        "ce-numsamples": samples,
        **{name.replace("_", "-"): value for name, value in others.items()},
    }


@contextlib.contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    host, _, port = address.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as sock:
        yield sock


def head(path: str, headers: Mapping[str, str], length: int | None) -> bytes:
    lines = {"Host": "node", **headers}
    if length is not None:
        lines["Content-Length"] = str(length)
    return "\r\n".join([f"POST {path} HTTP/1.1", *map(": ".join, lines.items()), "\r\n"]).encode()


def read_answer(sock: socket.socket) -> Answer:
    """One answer that has a length, and not a byte of what follows it."""
    received = bytearray()
    while not received.endswith(b"\r\n\r\n"):
        received += _receive(sock, 1)
    status, *lines = received.decode("latin-1").rstrip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = _receive(sock, int(headers["content-length"]))
    return Answer(int(status.split()[1]), json.loads(body) if body else {}, headers)


def _receive(sock: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        piece = sock.recv(size - len(received))
        assert piece, f"the connection ended after {received!r}"
        received += piece
    return received


def post_update(
    node: LiveNode, job: str, body: bytes, headers: Mapping[str, str], length: int | None = None
) -> Answer:
    """Send an update as it is, with the right length unless another is given."""
    with connected(node.address) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # answered before the end
            length = len(body) if length is None else length
            sock.sendall(head(f"/v1/jobs/{job}/updates", headers, length) + body)
        return read_answer(sock)

"""A real agent in a process of its own, and processes that join it."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from lifl.agent_client import AgentConnection, join
from lifl.control_channel import close_fds
from lifl.descriptor import Descriptor
from lifl.endpoint import Endpoint
from lifl.messages import (
    Allow,
    CreatePool,
    Done,
    Fork,
    GetTraffic,
    Hello,
    Joined,
    Left,
    PoolInfo,
    PoolKind,
    StartWorkers,
    WorkerSpec,
)

PATIENCE = 20.0
"""Seconds after which a test gives up waiting."""

Message = TypeVar("Message", bound=msgspec.Struct)
_requests = itertools.count(1)


class AgentProcess:
    """Starts an agent; `connections` made through it are closed with it."""

    def __init__(self, runtime: Path, data_plane: str, *options: str) -> None:
        self.runtime = runtime
        self.socket = str(runtime / "agent.sock")
        self.connections: list[AgentConnection] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lifl_gateway.agent", "--runtime-directory", str(runtime),
             "--data-plane", data_plane, *options],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.stop()
            raise AssertionError("the agent ended instead of getting ready")
        self.ready = json.loads(line)

    def join(self, hello: Hello) -> AgentConnection:
        connection = join(self.socket, hello, timeout=PATIENCE)
        connection.channel.settimeout(PATIENCE)
        self.connections.append(connection)
        return connection

    def coordinator(self) -> AgentConnection:
        return self.join(Hello("coordinator"))

    def gateway(self, seat: int = 0) -> AgentConnection:
        return self.join(Hello("gateway", seat=seat))

    def zygote(self, function: str = "fedavg") -> AgentConnection:
        return self.join(Hello("zygote", function=function))

    def worker(self, coordinator: AgentConnection, zygote: AgentConnection, job: str = "job") -> AgentConnection:
        """Join as a worker that the coordinator has asked for."""
        spec = ask_for_worker(coordinator, zygote, job)
        return self.join(Hello("worker", ticket=spec.ticket))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()
        self.connections.clear()
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def descriptors_open(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def capabilities(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapPrm")), 16)

    def cpu_ticks(self) -> int:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])


def receive(connection: AgentConnection, kind: type[Message]) -> tuple[Message, list[int]]:
    """The next message of this kind; others before it are dropped."""
    while True:
        message, fds = connection.channel.receive()
        if isinstance(message, kind):
            return message, fds
        close_fds(fds)


def request(
    coordinator: AgentConnection, make: Callable[[int], msgspec.Struct], fds: tuple[int, ...] = ()
) -> tuple[Done, list[int]]:
    """Ask and wait for the answer; what else comes meanwhile is dropped."""
    number = next(_requests)
    coordinator.channel.send(make(number), fds)
    while True:
        done, received = receive(coordinator, Done)
        if done.id == number:
            return done, received


def allow(coordinator: AgentConnection, *pairs: tuple[int, int]) -> None:
    done, _ = request(coordinator, lambda number: Allow(number, pairs))
    assert not done.error


def traffic(coordinator: AgentConnection) -> dict[int, dict[str, int]]:
    done, _ = request(coordinator, GetTraffic)
    return {entry.endpoint: msgspec.structs.asdict(entry) for entry in done.traffic}


def worker_spec(ticket: str, job: str = "job", function: str = "fedavg") -> WorkerSpec:
    return WorkerSpec(ticket, job, function, accumulator=2, model_slots=2, state_slots=0)


def ask_for_worker(coordinator: AgentConnection, zygote: AgentConnection, job: str = "job") -> WorkerSpec:
    spec = worker_spec(f"ticket-{next(_requests)}", job)
    done, _ = request(coordinator, lambda number: StartWorkers(number, (spec,)))
    assert not done.error
    fork, _ = receive(zygote, Fork)
    assert fork.workers == (spec,)
    return spec


def pool_info(pool: int, kind: PoolKind, slots: int = 4, job: str = "job", nonce: int = 7) -> PoolInfo:
    return PoolInfo(pool, kind, job, nonce, slots, header_capacity=4096, payload_capacity=1 << 20)


def create_pool(coordinator: AgentConnection, info: PoolInfo, *fds: int) -> int:
    done, received = request(coordinator, lambda number: CreatePool(number, info), fds)
    assert not done.error
    (memory,) = received
    return memory


def collect(endpoint: Endpoint, count: int, bounces: bool = False) -> list[Descriptor]:
    """Read until `count` descriptors have arrived (or bounced)."""
    found: list[Descriptor] = []
    end = time.monotonic() + PATIENCE
    while len(found) < count:
        fd = endpoint.far_fileno() if bounces else endpoint.fileno()
        found += endpoint.bounced() if bounces else endpoint.receive()
        if len(found) < count:
            left = end - time.monotonic()
            assert left > 0, f"only {len(found)} of {count} descriptors came"
            select.select([fd], [], [], left)
    assert len(found) == count
    return found


def bounces_until(endpoint: Endpoint, slot: int) -> list[Descriptor]:
    """Read what has bounced, until the descriptor of this slot has."""
    found: list[Descriptor] = []
    end = time.monotonic() + PATIENCE
    while not found or found[-1].slot != slot:
        left = end - time.monotonic()
        assert left > 0, f"slot {slot} did not bounce, but {found}"
        select.select([endpoint.far_fileno()], [], [], left)
        found += endpoint.bounced()
    return found


def nothing_comes(endpoint: Endpoint) -> bool:
    time.sleep(0.05)
    return not endpoint.receive() and not endpoint.bounced()


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it is so."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.01)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)


def left_endpoint(connection: AgentConnection) -> Left:
    return receive(connection, Left)[0]


def joined_endpoint(connection: AgentConnection) -> Joined:
    return receive(connection, Joined)[0]

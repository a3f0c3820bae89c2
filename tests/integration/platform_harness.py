"""A node without HTTP: real agent, coordinator, zygote and workers; the test process plays the gateway."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lifl.agent_client import AgentConnection, join
from lifl.control_channel import ControlChannel, close_fds
from lifl.descriptor import Kind
from lifl.errors import Unavailable
from lifl.messages import (
    AcquireModel,
    BusySlots,
    Commit,
    CreateJob,
    DescribeJob,
    FromCoordinator,
    Hello,
    InstallModel,
    JobSpec,
    JobState,
    ModelSource,
    PoolAdded,
    Problem,
    ReturnModel,
    Slots,
    Verdict,
)
from lifl.model_layout import encode_header
from lifl.pool import MappedPool
from lifl.slot import UpdateHeader, slot_reference, split_slot_reference

ROOT = Path(__file__).resolve().parents[2]


def until(condition: Any, seconds: float = 20.0, what: str = "condition") -> Any:
    """Poll a condition that real processes bring about; fails after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"{what} did not come true within {seconds} s"
        time.sleep(0.005)


def encode_model(tensors: Mapping[str, np.ndarray]) -> tuple[bytes, bytes]:
    """Return (header, payload) of float32 tensors in safetensors' order."""
    header = encode_header({name: ("F32", array.shape) for name, array in tensors.items()})
    from lifl.model_layout import parse_header

    layout = parse_header(header)
    payload = b"".join(np.ascontiguousarray(tensors[spec.name]).tobytes() for spec in layout.tensors)
    return header, payload


def is_alive(pid: int) -> bool:
    """Whether a process runs, so that it is neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_busy(answer: Any) -> bool:
    """Whether the same request may succeed a little later."""
    return isinstance(answer, Problem) and answer.status == 503


@dataclass
class Platform:
    """Starts the processes and speaks for the gateway."""

    directory: Path
    data_plane: str
    function: str = "fedavg"
    cores: int = 2
    function_file: Path | None = None
    start_workers: str = "fork"
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    pools: dict[int, MappedPool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runtime = self.directory / "runtime"
        self.state = self.directory / "state"
        for part in (self.runtime, self.state / "incoming", self.state / "jobs"):
            part.mkdir(parents=True, exist_ok=True)
        self.generations: dict[int, int] = {}
        self.busy: dict[int, int] = {}

    # --- processes ---

    def spawn(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1")
        )
        self.processes[name] = process
        return process

    def start_agent(self) -> None:
        process = self.spawn(
            "agent",
            "lifl_gateway.agent",
            "--runtime-directory",
            str(self.runtime),
            "--data-plane",
            self.data_plane,
        )
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["data_plane"] == self.data_plane

    def start_zygote(self) -> None:
        file = self.function_file or ROOT / "functions" / f"{self.function}.py"
        self.spawn(
            "zygote",
            *("lifl.zygote", "--runtime-directory", str(self.runtime)),
            *("--name", self.function, "--file", str(file), "--start", self.start_workers),
        )

    def start_coordinator(self) -> None:
        process = self.spawn(
            "coordinator",
            *("lifl.control.coordinator", "--runtime-directory", str(self.runtime)),
            *("--state-directory", str(self.state), "--cores", str(self.cores)),
        )
        assert process.stdout is not None
        while not json.loads(process.stdout.readline()).get("ready"):
            pass

    def start(self) -> Platform:
        self.start_agent()
        self.start_zygote()
        self.start_coordinator()
        self.join_as_gateway()
        return self

    def stop(self) -> None:
        for name in ("zygote", "coordinator", "agent"):
            process = self.processes.pop(name, None)
            if process is not None:
                process.terminate()
                process.wait(10)
                assert process.stdout is not None
                process.stdout.close()
        for pool in self.pools.values():
            pool.close()
        self.connection.close()
        self.coordinator.close()

    def __enter__(self) -> Platform:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def gateway(self) -> int:
        """Endpoint of this gateway."""
        assert self.connection.endpoint is not None
        return self.connection.endpoint.identifier

    def rejoin(self) -> None:
        """Be a gateway that has come back: join again and ask which slots are in use."""
        known = set(self.pools)
        self.connection.close()
        self.coordinator.close()
        self.join_as_gateway()
        assert known <= set(self.pools)
        answer = self.ask(BusySlots(0))
        self.busy = {split_slot_reference(slot)[1]: generation for slot, generation in answer.keys}

    def restart_everything(self) -> None:
        """What the supervisor does when the coordinator died."""
        self.processes["coordinator"].kill()
        self.stop()
        self.pools.clear()
        self.busy.clear()
        self.start()

    @staticmethod
    def pool_pages(pool: MappedPool) -> int:
        """Blocks of memory behind a pool."""
        return os.fstat(pool.fd).st_blocks

    # --- the gateway's part ---

    def join_as_gateway(self) -> None:
        def attempt() -> AgentConnection | None:
            try:
                return join(str(self.runtime / "agent.sock"), Hello("gateway", seat=0), keep_fds=True)
            except Unavailable:
                return None

        self.connection: AgentConnection = until(attempt, what="agent")
        for number, pool in self.connection.pools.items():
            self.pools.setdefault(number, pool)
        self.coordinator = self.connect()

    def connect(self) -> ControlChannel[Any]:
        """Another connection to the coordinator, for a question whose answer takes a while."""
        return ControlChannel.connect(str(self.runtime / "coordinator.sock"), FromCoordinator, 30.0)

    def take_pools(self) -> None:
        """Map the pools that the agent has announced."""
        channel = self.connection.channel
        while select.select([channel.socket], [], [], 0)[0]:
            message, fds = channel.receive()
            if isinstance(message, PoolAdded):
                self.pools[message.info.pool] = MappedPool(message.info, fds[0], keep_fd=True)
            else:
                close_fds(fds)

    def ask(self, request: Any) -> Any:
        self.coordinator.send(request)
        answer, fds = self.coordinator.receive()
        close_fds(fds)
        return answer

    def create_job(self, model: Mapping[str, np.ndarray], **options: Any) -> JobState:
        spec = JobSpec(**{"name": "job", "function": self.function, "goal": 4, **options})
        state = until(lambda: None if is_busy(state := self.ask(CreateJob(spec))) else state, what="free name")
        assert isinstance(state, JobState), state
        self.header, payload = encode_model(model)
        path = self.state / "incoming" / "model"
        path.write_bytes(len(self.header).to_bytes(8, "little") + self.header + payload)
        state = self.ask(InstallModel(spec.name, str(path)))
        assert isinstance(state, JobState), state
        until(lambda: self.take_pools() or state.updates_pool in self.pools, what="pool")
        self.updates_pool = state.updates_pool
        return state

    def describe(self) -> JobState:
        return self.ask(DescribeJob("job"))

    def releases(self) -> None:
        """Take the RELEASE descriptors that have arrived."""
        assert self.connection.endpoint is not None
        for message in self.connection.endpoint.receive():
            if message.kind == Kind.RELEASE:
                pool, index = split_slot_reference(message.slot)
                if pool != self.updates_pool:
                    continue  # of a job that was deleted meanwhile
                assert self.busy.get(index) == message.generation, "a slot was released that is not in use"
                del self.busy[index]

    def free_slot(self) -> int:
        pool = self.pools[self.updates_pool]

        def find() -> int | None:
            self.releases()
            return next((i for i in range(pool.geometry.slots) if i not in self.busy), None)

        return until(lambda: None if find() is None else [find()], what="free slot")[0]

    def submit(
        self,
        client: str,
        payload: bytes,
        round_number: int = 1,
        num_samples: float = 1.0,
        *,
        is_delta: bool = False,
        layout: bytes = b"",
        send: bool = True,
    ) -> Verdict | Problem:
        """Write an update into a slot, commit it, and send its descriptor."""
        commit = self.fill_slot(client, payload, round_number, num_samples, is_delta=is_delta, layout=layout)
        verdict = until(lambda: None if is_busy(answer := self.ask(commit)) else answer, what="answer to a commit")
        if isinstance(verdict, Verdict) and verdict.status == "accepted":
            _, index = split_slot_reference(commit.slot)
            self.busy[index] = commit.generation
            if send and verdict.destination:
                assert self.connection.endpoint is not None
                self.connection.endpoint.send(
                    verdict.destination, commit.slot, verdict.round, Kind.UPDATE, commit.generation
                )
        return verdict

    def fill_slot(
        self,
        client: str,
        payload: bytes,
        round_number: int = 1,
        num_samples: float = 1.0,
        *,
        is_delta: bool = False,
        layout: bytes = b"",
    ) -> Commit:
        """Write an update into a free slot; returns the question whether it counts."""
        started = time.monotonic()
        index = self.free_slot()
        pool = self.pools[self.updates_pool]
        self.generations[index] = self.generations.get(index, 0) + 1
        generation = self.generations[index]
        pool.payload(index, len(payload))[:] = payload
        pool.layout(index)[: len(layout)] = layout
        header = UpdateHeader(generation, round_number, is_delta, num_samples, len(layout), len(payload), client)
        header.pack_into(pool.header(index))
        return Commit(
            "job",
            round_number,
            client,
            f"{client}/{round_number}",
            slot_reference(self.updates_pool, index),
            generation & 0xFF,
            num_samples,
            started,
            self.gateway,
        )

    def wait_for_round(self, number: int, seconds: float = 20.0) -> JobState:
        return until(
            lambda: (
                state if (state := self.describe()).model_round >= number or state.status == "failed" else None
            ),
            seconds,
            f"round {number}",
        )

    def wait_for_all_slots(self) -> None:
        until(lambda: self.releases() or not self.busy, what="release of all slots")
        assert self.ask(BusySlots(0)) == Slots(())

    def model(self, round_number: int = 0) -> np.ndarray:
        """The global model as one flat float32 array."""
        source = self.ask(AcquireModel("job", round_number))
        assert isinstance(source, ModelSource), source
        if source.path:
            return np.frombuffer(Path(source.path).read_bytes()[8 + source.header_bytes :], np.float32).copy()
        _, index = split_slot_reference(source.slot)
        self.take_pools()
        pool = self.pools[source.slot >> 22]
        data = np.frombuffer(pool.payload(index, source.payload_bytes), np.float32).copy()
        self.ask(ReturnModel(source.lease))
        return data

    def workers(self) -> list[int]:
        """Pids of the workers: the children of the zygote that have not ended."""
        zygote = self.processes["zygote"].pid
        with open(f"/proc/{zygote}/task/{zygote}/children") as file:
            return [int(pid) for pid in file.read().split() if is_alive(int(pid))]

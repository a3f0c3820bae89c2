"""The agent's control protocol, its pools, and what it leaves behind: nothing."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lifl.agent_client import AgentConnection, join
from lifl.control_channel import ControlChannel
from lifl.descriptor import Kind
from lifl.errors import Refused, Unavailable
from lifl.messages import (
    CreatePool,
    DropPool,
    Fork,
    FromAgent,
    GetTraffic,
    Hello,
    Joined,
    PoolAdded,
    PoolDropped,
    ReclaimPool,
    StartWorkers,
    StopWorkers,
)
from lifl.pool import MappedPool
from lifl_ebpf.bpf_syscall import map_ids, program_ids, program_map_ids
from lifl_ebpf.preflight import ebpf_reason

from tests import leftovers
from tests.integration.agent_process import (
    PATIENCE,
    AgentProcess,
    ask_for_worker,
    collect,
    create_pool,
    eventually,
    joined_endpoint,
    left_endpoint,
    pool_info,
    receive,
    request,
    worker_spec,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def agent(tmp_path: Path, data_plane: str) -> Iterator[AgentProcess]:
    process = AgentProcess(tmp_path, data_plane)
    try:
        yield process
    finally:
        process.stop()


# --- start and end -------------------------------------------------------------------------------------------


def test_the_agent_keeps_only_the_privilege_its_data_plane_needs(agent: AgentProcess, data_plane: str) -> None:
    assert agent.ready["data_plane"] == data_plane
    assert agent.capabilities() == (1 << 39 | 1 << 12 if data_plane == "ebpf" else 0)
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "libbcc" not in Path(f"/proc/{agent.process.pid}/maps").read_text()


def test_sigterm_ends_it_cleanly_and_removes_the_socket(agent: AgentProcess) -> None:
    assert Path(agent.socket).exists()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.wait(PATIENCE) == 0
    assert not Path(agent.socket).exists()


def test_it_listens_on_no_network_port(agent: AgentProcess) -> None:
    agent.coordinator()
    listening = [
        line.split()[9]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{agent.process.pid}/net/{name}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    links = [
        os.readlink(f"/proc/{agent.process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{agent.process.pid}/fd")
    ]
    assert not {f"socket:[{inode}]" for inode in listening} & set(links)


_UNPRIVILEGED = """
import os, sys
from lifl.capabilities import drop_capabilities
drop_capabilities()
os.execv(sys.executable, [sys.executable, "-m", "lifl_gateway.agent", *sys.argv[1:]])
"""


@pytest.mark.parametrize("choice", ["auto", "ebpf"])
def test_without_privilege_auto_takes_the_unix_plane_and_says_why_in_one_line(tmp_path: Path, choice: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _UNPRIVILEGED, "--runtime-directory", str(tmp_path), "--data-plane", choice],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    ready = process.stdout.readline()
    if choice == "auto":
        assert '"data_plane": "unix"' in ready
        process.terminate()
    _, complaint = process.communicate(timeout=PATIENCE)
    assert len(complaint.splitlines()) == 1
    assert "CAP_BPF" in complaint
    assert process.returncode == (0 if choice == "auto" else 1)


# --- joining -------------------------------------------------------------------------------------------------


def test_the_coordinator_is_told_of_everyone_already_there_and_of_everyone_after(agent: AgentProcess) -> None:
    gateway = agent.gateway(seat=3)
    zygote = agent.join(Hello("zygote", function="broken", failure="no module", gather=True, state_arrays=2))
    coordinator = agent.coordinator()
    first, second = joined_endpoint(coordinator), joined_endpoint(coordinator)
    assert (first.endpoint, first.role, first.seat) == (gateway.welcome.endpoint, "gateway", 3)
    assert (second.endpoint, second.role, second.function) == (zygote.welcome.endpoint, "zygote", "broken")
    assert (second.failure, second.gather, second.state_arrays) == ("no module", True, 2)
    assert first.pid == second.pid == os.getpid()
    later = agent.gateway(seat=4)
    assert joined_endpoint(coordinator).endpoint == later.welcome.endpoint
    later.close()
    left = left_endpoint(coordinator)
    assert (left.endpoint, left.seat) == (later.welcome.endpoint, 4)


def test_a_second_coordinator_is_refused_while_the_first_lives(agent: AgentProcess) -> None:
    first = agent.coordinator()
    with pytest.raises(Refused, match=f"process {os.getpid()} is the coordinator"):
        agent.coordinator()
    done, _ = request(first, GetTraffic)
    assert not done.error
    first.close()
    second = agent.coordinator()
    assert second.welcome.endpoint != first.welcome.endpoint


def test_a_new_coordinator_starts_without_the_old_ones_pools(agent: AgentProcess) -> None:
    gateway = agent.gateway()
    first = agent.coordinator()
    os.close(create_pool(first, pool_info(0, "updates")))
    first.close()
    second = agent.coordinator()
    assert receive(gateway, PoolDropped)[0].pool == 0
    os.close(create_pool(second, pool_info(0, "updates", slots=2, nonce=8)))


def test_a_worker_needs_a_ticket_that_was_handed_out_and_uses_it_once(agent: AgentProcess) -> None:
    coordinator, zygote = agent.coordinator(), agent.zygote()
    for ticket in ("", "guessed"):
        with pytest.raises(Refused, match="ticket"):
            agent.join(Hello("worker", ticket=ticket))
    spec = ask_for_worker(coordinator, zygote)
    worker = agent.join(Hello("worker", ticket=spec.ticket))
    assert worker.welcome.worker == spec
    with pytest.raises(Refused, match="ticket"):
        agent.join(Hello("worker", ticket=spec.ticket))


def test_another_user_is_refused(agent: AgentProcess) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    Path(agent.socket).chmod(0o666)
    directory = Path(agent.socket).parent
    script = (
        "import os, socket, sys; os.fchdir(int(sys.argv[1])); os.setgroups([]); os.setresgid(65534, 65534, 65534);"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); os.setresuid(65534, 65534, 65534);"
        "s.connect('agent.sock'); print(s.recv(4096).decode(), flush=True)"
    )
    handle = os.open(directory, os.O_RDONLY)
    mode = directory.stat().st_mode
    directory.chmod(0o711)
    try:
        answer = subprocess.run(
            [sys.executable, "-c", script, str(handle)],
            pass_fds=[handle], capture_output=True, text=True, timeout=PATIENCE, check=True,
        )  # fmt: skip
    finally:
        directory.chmod(mode)
        os.close(handle)
    assert "RefusedJoin" in answer.stdout
    assert "user 65534" in answer.stdout


# --- hostile and clumsy peers ----------------------------------------------------------------------------------


def raw(agent: AgentProcess) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(PATIENCE)
    sock.connect(agent.socket)
    return sock


def still_serves(agent: AgentProcess) -> None:
    gateway = agent.gateway()
    assert gateway.welcome.endpoint
    gateway.close()


def test_garbage_on_the_control_socket_ends_that_connection_only(agent: AgentProcess) -> None:
    choose = random.Random(2)
    packets = [
        b"{}",
        b"[]",
        b"\0",
        b'{"type":"Hello"}',
        b'{"type":"Hello","role":"king"}',
        b"x" * 200_000,
        b"[" * 9999,
    ]
    packets += [
        b'{"type":"GetTraffic","id":1}',
        b'{"type":"Welcome","endpoint":1}',
        b'{"type":"Hello","role":"zygote"}',
    ]
    packets += [b'{"a":' + b"[" * 100_000, b'{"type":"Hello","role":' + b"[" * 100_000]
    packets += [choose.randbytes(choose.randrange(1, 500)) for _ in range(50)]
    for packet in packets:
        with raw(agent) as sock:
            sock.send(packet)
            answer = sock.recv(4096)
            assert answer == b"" or b"RefusedJoin" in answer
    still_serves(agent)


def test_a_member_that_talks_out_of_turn_is_disconnected(agent: AgentProcess) -> None:
    coordinator = agent.coordinator()
    for message in (Hello("gateway"), GetTraffic(1)):
        gateway = agent.gateway()
        gateway.channel.send(message)
        with pytest.raises(Unavailable):
            receive(gateway, Joined)
        assert left_endpoint(coordinator).endpoint == gateway.welcome.endpoint


def test_unasked_file_descriptors_are_closed(agent: AgentProcess) -> None:
    coordinator = agent.coordinator()
    request(coordinator, GetTraffic)  # the agent has closed its copies of our endpoint by now
    before = agent.descriptors_open()
    for _ in range(30):
        _, received = request(coordinator, GetTraffic, (0, 1, 2))
        assert not received
    eventually(lambda: agent.descriptors_open() == before)


def test_many_silent_connections_keep_nobody_out(agent: AgentProcess) -> None:
    silent = [raw(agent) for _ in range(300)]
    try:
        still_serves(agent)
    finally:
        for sock in silent:
            sock.close()


def test_a_coordinator_that_does_not_read_is_served_later_or_given_up_without_harm(agent: AgentProcess) -> None:
    coordinator = agent.coordinator()
    coordinator.channel.settimeout(0.2)
    sent = 0
    try:
        for sent in range(20_000):
            coordinator.channel.send(GetTraffic(sent))
    except Unavailable:
        pass
    assert sent > 100
    still_serves(agent)


# --- workers -------------------------------------------------------------------------------------------------


def test_the_zygote_of_the_function_is_told_to_fork(agent: AgentProcess) -> None:
    coordinator, median, fedavg = agent.coordinator(), agent.zygote("median"), agent.zygote("fedavg")
    specs = (worker_spec("a"), worker_spec("b", function="median"), worker_spec("c"))
    done, _ = request(coordinator, lambda number: StartWorkers(number, specs))
    assert not done.error
    assert [spec.ticket for spec in receive(fedavg, Fork)[0].workers] == ["a", "c"]
    assert [spec.ticket for spec in receive(median, Fork)[0].workers] == ["b"]


def test_without_a_zygote_starting_a_worker_is_an_error_and_starts_none(agent: AgentProcess) -> None:
    coordinator, fedavg = agent.coordinator(), agent.zygote()
    agent.join(Hello("zygote", function="broken", failure="no module named x"))
    for other, complaint in (("absent", "no zygote"), ("broken", "no module named x")):
        specs = (worker_spec("a"), worker_spec("b", function=other))
        done, _ = request(coordinator, lambda number, specs=specs: StartWorkers(number, specs))  # type: ignore[misc]
        assert complaint in done.error
    fedavg.channel.settimeout(0.1)
    with pytest.raises(TimeoutError):
        receive(fedavg, Fork)


def test_stopping_a_worker_ends_its_connection_and_is_reported_when_it_is_gone(agent: AgentProcess) -> None:
    coordinator, zygote = agent.coordinator(), agent.zygote()
    worker = agent.worker(coordinator, zygote)
    assert worker.endpoint is not None
    assert coordinator.endpoint is not None
    request(coordinator, lambda number: StopWorkers(number, (worker.welcome.endpoint, 12345)))
    with pytest.raises(Unavailable):
        receive(worker, Fork)
    worker.endpoint.send(coordinator.welcome.endpoint, 1, 1, Kind.FOLDED)  # it may finish what it is doing
    assert collect(coordinator.endpoint, 1)
    worker.close()
    assert left_endpoint(coordinator).endpoint == worker.welcome.endpoint


def test_a_worker_that_does_not_stop_is_killed_when_asked_again(agent: AgentProcess) -> None:
    coordinator, zygote = agent.coordinator(), agent.zygote()
    spec = ask_for_worker(coordinator, zygote)
    script = (
        "import sys, time; from lifl.agent_client import join; from lifl.messages import Hello;"
        "c = join(sys.argv[1], Hello('worker', ticket=sys.argv[2])); print(c.welcome.endpoint, flush=True);"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", script, agent.socket, spec.ticket]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        endpoint = int(process.stdout.readline())
        for _ in range(2):
            assert process.poll() is None
            request(coordinator, lambda number: StopWorkers(number, (endpoint,)))
        assert process.wait(PATIENCE) == -signal.SIGKILL
    assert left_endpoint(coordinator).endpoint == endpoint


def test_workers_that_a_dead_zygote_owes_are_reported_after_it(agent: AgentProcess) -> None:
    coordinator, zygote = agent.coordinator(), agent.zygote()
    specs = [ask_for_worker(coordinator, zygote) for _ in range(2)]
    zygote.close()
    assert left_endpoint(coordinator).role == "zygote"
    assert {left_endpoint(coordinator).ticket for _ in specs} == {spec.ticket for spec in specs}


# --- pools -----------------------------------------------------------------------------------------------------


def test_pool_memory_is_shared_between_coordinator_gateway_and_worker(agent: AgentProcess) -> None:
    coordinator, zygote, early = agent.coordinator(), agent.zygote(), agent.gateway()
    updates, aggregates = pool_info(0, "updates"), pool_info(1, "aggregates")
    other = pool_info(2, "updates", job="other")
    handles = [create_pool(coordinator, info) for info in (updates, aggregates, other)]
    added, (handle,) = receive(early, PoolAdded)
    assert added.info == updates
    worker, late = agent.worker(coordinator, zygote), agent.gateway()
    assert set(worker.pools) == {0, 1}
    assert set(late.pools) == {0, 1, 2}
    with MappedPool(updates, handle) as at_gateway, MappedPool(aggregates, handles[1]) as at_coordinator:
        at_gateway.payload(3, 5)[:] = b"hello"
        assert bytes(worker.pools[0].payload(3, 5)) == b"hello"
        worker.pools[1].header(2)[:3] = b"sum"
        assert bytes(at_coordinator.header(2)[:3]) == b"sum"
        assert bytes(late.pools[1].header(2)[:3]) == b"sum"
    os.close(handles[0])
    os.close(handles[2])


def test_who_may_not_write_a_pool_cannot_map_it_for_writing(agent: AgentProcess) -> None:
    coordinator, zygote = agent.coordinator(), agent.zygote()
    for info in (pool_info(0, "updates"), pool_info(1, "aggregates")):
        os.close(create_pool(coordinator, info))
    gateway = join(agent.socket, Hello("gateway"), keep_fds=True)
    agent.connections.append(gateway)
    spec = ask_for_worker(coordinator, zygote)
    worker = join(agent.socket, Hello("worker", ticket=spec.ticket), keep_fds=True)
    agent.connections.append(worker)
    assert (worker.pools[0].writable, worker.pools[1].writable) == (False, True)
    assert (gateway.pools[0].writable, gateway.pools[1].writable) == (True, False)
    for pool in (worker.pools[0], gateway.pools[1]):
        with pytest.raises(PermissionError):
            mmap.mmap(pool.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(TypeError, match="read-only"):
            pool.slot(0)[0] = 1


def test_a_mapped_pool_keeps_to_its_geometry(agent: AgentProcess) -> None:
    info = pool_info(0, "updates", slots=3)
    with MappedPool(info, create_pool(agent.coordinator(), info), keep_fd=True) as pool:
        assert pool.payload_address(1) - pool.payload_address(0) == info.geometry.stride
        assert pool.payload_address(0) % 4096 == 0
        pool.payload(2)[:4] = b"here"
        assert os.pread(pool.fd, 4, pool.payload_offset(2)) == b"here"
        for index in (-1, 3):
            with pytest.raises(IndexError):
                pool.slot(index)
        with pytest.raises(ValueError, match="do not fit"):
            pool.payload(0, info.payload_capacity + 1)


def test_a_new_pool_is_filled_with_pages_behind_the_answer(agent: AgentProcess) -> None:
    info = pool_info(0, "updates", slots=200)
    handle = create_pool(agent.coordinator(), info)
    eventually(lambda: os.fstat(handle).st_blocks * 512 >= info.geometry.size)
    os.close(handle)


def test_a_reclaimed_pool_gives_its_memory_back_and_stays_usable(agent: AgentProcess) -> None:
    coordinator = agent.coordinator()
    info = pool_info(0, "updates", slots=100)
    with MappedPool(info, create_pool(coordinator, info), keep_fd=True) as pool:
        eventually(lambda: os.fstat(pool.fd).st_blocks * 512 >= info.geometry.size)
        pool.payload(0)[:4] = b"gone"
        done, _ = request(coordinator, lambda number: ReclaimPool(number, 0))
        assert not done.error
        assert os.fstat(pool.fd).st_blocks == 0
        assert os.fstat(pool.fd).st_size == info.geometry.size
        assert bytes(pool.payload(0, 4)) == bytes(4)
        pool.payload(0)[:3] = b"new"
        assert bytes(pool.payload(0, 3)) == b"new"


def test_reclaiming_or_dropping_a_pool_that_is_still_being_filled_works(agent: AgentProcess) -> None:
    coordinator = agent.coordinator()
    info = pool_info(0, "updates", slots=500)
    handle = create_pool(coordinator, info)
    request(coordinator, lambda number: ReclaimPool(number, 0))
    assert os.fstat(handle).st_blocks == 0
    os.close(handle)
    request(coordinator, lambda number: DropPool(number, 0))
    os.close(create_pool(coordinator, info))
    done, _ = request(coordinator, lambda number: DropPool(number, 0))
    assert not done.error


def test_a_dropped_pool_is_gone_for_gateways_and_its_memory_returns(agent: AgentProcess) -> None:
    coordinator, gateway = agent.coordinator(), agent.gateway()
    before = shared_memory()
    info = pool_info(0, "updates", slots=150)
    handle = create_pool(coordinator, info)
    _, fds = receive(gateway, PoolAdded)
    eventually(lambda: os.fstat(handle).st_blocks * 512 >= info.geometry.size)
    done, _ = request(coordinator, lambda number: DropPool(number, 0))
    assert not done.error
    assert receive(gateway, PoolDropped)[0].pool == 0
    for fd in (handle, *fds):
        os.close(fd)
    eventually(lambda: shared_memory() < before + info.geometry.size // 2)
    done, _ = request(coordinator, lambda number: DropPool(number, 0))
    assert "no pool 0" in done.error


def shared_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Shmem:"))


def test_a_pool_larger_than_the_memory_is_refused_in_words(agent: AgentProcess) -> None:
    coordinator = agent.coordinator()
    info = pool_info(0, "updates", slots=1 << 20)
    done, fds = request(coordinator, lambda number: CreatePool(number, info))
    assert "MiB are free" in done.error
    assert not fds
    nonsense = pool_info(0, "updates", slots=0)
    done, _ = request(coordinator, lambda number: CreatePool(number, nonsense))
    assert "no slots" in done.error


def test_asking_twice_for_a_pool_gives_the_same_memory_and_another_pool_of_that_id_is_refused(
    agent: AgentProcess,
) -> None:
    coordinator = agent.coordinator()
    info = pool_info(0, "updates")
    first, second = create_pool(coordinator, info), create_pool(coordinator, info)
    assert os.fstat(first).st_ino == os.fstat(second).st_ino
    os.close(first)
    os.close(second)
    done, _ = request(coordinator, lambda number: CreatePool(number, pool_info(0, "updates", nonce=99)))
    assert "another" in done.error


def test_a_new_agent_adopts_the_memory_of_the_killed_one(tmp_path: Path, data_plane: str) -> None:
    info = pool_info(0, "updates")
    old = AgentProcess(tmp_path, data_plane)
    try:
        handle = create_pool(old.coordinator(), info)
        old.kill()
    finally:
        old.stop()
    new = AgentProcess(tmp_path, data_plane)
    try:
        with MappedPool(info, handle, keep_fd=True) as pool:
            pool.payload(1, 4)[:] = b"kept"
            coordinator, gateway = new.coordinator(), new.gateway()
            wrong = pool_info(5, "updates", slots=3)
            done, _ = request(coordinator, lambda number: CreatePool(number, wrong), (pool.fd,))
            assert "not the memory" in done.error
            os.close(create_pool(coordinator, info, pool.fd))
            added, (other,) = receive(gateway, PoolAdded)
            assert added.info == info
            with MappedPool(info, other) as at_gateway:
                assert bytes(at_gateway.payload(1, 4)) == b"kept"
    finally:
        new.stop()


# --- what is left ----------------------------------------------------------------------------------------------


def join_and_leave(agent: AgentProcess, coordinator: AgentConnection, zygote: AgentConnection) -> None:
    worker = agent.worker(coordinator, zygote)
    worker.close()
    agent.connections.remove(worker)
    assert left_endpoint(coordinator).endpoint == worker.welcome.endpoint


def test_two_hundred_joins_and_leaves_leak_no_file_descriptor(agent: AgentProcess) -> None:
    coordinator, zygote = agent.coordinator(), agent.zygote()
    for _ in range(33):
        join_and_leave(agent, coordinator, zygote)
    ours, theirs = len(os.listdir("/proc/self/fd")), agent.descriptors_open()
    for _ in range(200):
        join_and_leave(agent, coordinator, zygote)
    assert len(os.listdir("/proc/self/fd")) == ours
    # the kernel plane keeps up to one stock of prepared credit pages
    assert abs(agent.descriptors_open() - theirs) <= 32


def test_sixty_four_workers_join_and_are_reached(agent: AgentProcess) -> None:
    coordinator, zygote = agent.coordinator(), agent.zygote()
    assert coordinator.endpoint is not None
    workers = [agent.worker(coordinator, zygote) for _ in range(64)]
    for number, worker in enumerate(workers):
        coordinator.endpoint.send(worker.welcome.endpoint, number, 1, Kind.CLOSE)
    for number, worker in enumerate(workers):
        assert worker.endpoint is not None
        assert collect(worker.endpoint, 1)[0].slot == number
    assert agent.descriptors_open() < 400


def test_nothing_is_left_in_the_kernel_or_in_shared_memory_after_the_last_process(
    tmp_path: Path, data_plane: str
) -> None:
    files, mounts = leftovers.shared_memory(), leftovers.mounts()
    agent = AgentProcess(tmp_path, data_plane)
    try:
        coordinator, zygote = agent.coordinator(), agent.zygote()
        os.close(create_pool(coordinator, pool_info(0, "updates")))
        agent.worker(coordinator, zygote)
        maps = maps_of(agent.process.pid)
        programs = {program for program in program_ids() if program_map_ids(program) & maps} if maps else set()
        assert len(programs) == (data_plane == "ebpf")
        agent.kill()
        assert programs <= set(program_ids())  # the sockets of the living processes keep it
    finally:
        agent.stop()
    eventually(lambda: not programs & set(program_ids()) and not maps & set(map_ids()))
    assert leftovers.shared_memory() <= files
    assert leftovers.mounts() == mounts


def maps_of(pid: int) -> set[int]:
    """Ids of the BPF maps that a process has open."""
    found: set[int] = set()
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found |= {
                int(line.split()[1]) for line in entry.read_text().splitlines() if line.startswith("map_id:")
            }
    return found


def test_the_preflight_names_what_is_missing() -> None:
    script = (
        "from lifl.capabilities import *; from lifl_ebpf.preflight import ebpf_reason;"
        "drop_capabilities({CAP_BPF}); print(ebpf_reason()); drop_capabilities(); print(ebpf_reason())"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    one, none = output.stdout.splitlines()
    if os.geteuid() == 0 and ebpf_reason() is None:
        assert "CAP_NET_ADMIN" in one
        assert "CAP_BPF" not in one
    assert "CAP_BPF and CAP_NET_ADMIN" in none


def test_a_process_that_finds_no_agent_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="nobody answers"):
        join(str(tmp_path / "agent.sock"), Hello("gateway"))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "agent.sock"))
    listener.listen()
    start = time.monotonic()
    with pytest.raises(Unavailable, match="did not answer"):
        join(str(tmp_path / "agent.sock"), Hello("gateway"), timeout=0.2)
    listener.close()
    assert time.monotonic() - start < PATIENCE


def test_the_agent_answers_only_the_protocol_it_knows(agent: AgentProcess) -> None:
    channel: ControlChannel[FromAgent] = ControlChannel.connect(agent.socket, FromAgent, PATIENCE)
    channel.send(DropPool(1, 1))
    with pytest.raises(Unavailable):
        channel.receive()
    channel.close()

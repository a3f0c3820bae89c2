"""Network namespaces as hosts: who reaches whom, what can happen to their links, and that nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from lifl_bench import hosts as module
from lifl_bench.cluster import Program, _Slowness
from lifl_bench.hosts import MARK, Host, Hosts, HostsUnavailable
from lifl_bench.measure import read_stat

pytestmark = pytest.mark.timeout(60)

PORT = 7000
MakeHosts = Callable[[int], Hosts]


class Echo:
    """Answers datagrams, and swallows what comes over TCP, on a host."""

    def __init__(self, host: Host) -> None:
        self.address = (host.address, PORT)
        self.datagrams = host.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
        self.datagrams.bind(self.address)
        self.listener = host.call(socket.create_server, self.address)
        self.threads = [threading.Thread(target=work) for work in (self._answer, self._swallow)]
        for thread in self.threads:
            thread.start()

    def _answer(self) -> None:
        with suppress(OSError):
            while True:
                data, sender = self.datagrams.recvfrom(2048)
                if sender is None:  # shut down
                    return
                self.datagrams.sendto(data, sender)

    def _swallow(self) -> None:
        with suppress(OSError):
            while True:
                link, _ = self.listener.accept()
                with link:
                    while link.recv(1 << 20):
                        pass
                    link.sendall(b"done")

    def close(self) -> None:
        for sock in (self.datagrams, self.listener):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self.threads:
            thread.join()


def ask(address: tuple[str, int], seconds: float) -> bool:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.settimeout(seconds)
        sock.sendto(b"?", address)
        return sock.recv(16) == b"?"


def hears(host: Host, address: tuple[str, int], seconds: float = 0.3) -> bool:
    try:
        return host.call(ask, address, seconds)
    except OSError:
        return False


def soon_hears(host: Host, address: tuple[str, int]) -> bool:
    end = time.monotonic() + 10
    while not hears(host, address):
        if time.monotonic() > end:
            return False
    return True


def send(host: Host, address: tuple[str, int], size: int) -> float:
    """Seconds that so many bytes take."""

    def work() -> float:
        begin = time.monotonic()
        with closing(socket.create_connection(address, 20)) as sock:
            sock.sendall(bytes(size))
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(16) == b"done"
        return time.monotonic() - begin

    return host.call(work)


@pytest.fixture
def hosts(make_hosts: MakeHosts) -> Hosts:
    return make_hosts(3)


@pytest.fixture
def echo(hosts: Hosts) -> Iterator[Echo]:
    with closing(Echo(hosts["h1"])) as echo:
        yield echo


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def test_hosts_reach_each_other_and_nothing_is_seen_outside(make_hosts: MakeHosts) -> None:
    before = interfaces()

    hosts = make_hosts(2)

    assert [host.name for host in hosts] == ["h1", "h2"] and len(hosts) == 2
    with closing(Echo(hosts["h1"])) as echo:
        assert hears(hosts["h2"], echo.address)
        assert interfaces() == before
        with pytest.raises(OSError):
            ask(echo.address, 0.2)


def test_a_host_has_a_loopback_and_a_congestion_control_of_its_own(hosts: Hosts) -> None:
    text = hosts["h1"].run(["cat", "/proc/sys/net/ipv4/tcp_congestion_control"])

    assert text.strip() in ("cubic", "reno")
    assert "inet 127.0.0.1/8" in hosts["h1"].run(["ip", "addr", "show", "lo"])
    assert {name for _, name in hosts["h1"].call(socket.if_nameindex)} >= {"lo", "eth0"}


def test_a_host_that_is_cut_off_is_heard_again_after_healing(hosts: Hosts, echo: Echo) -> None:
    hosts.cut("h1")
    assert not hears(hosts["h2"], echo.address)
    assert hears(hosts["h1"], echo.address)

    hosts.heal("h1")
    assert soon_hears(hosts["h2"], echo.address)


def test_a_partition_parts_two_hosts_and_no_others(hosts: Hosts, echo: Echo) -> None:
    assert hears(hosts["h2"], echo.address)  # so that it knows the way already

    hosts.partition("h1", "h2")
    assert not hears(hosts["h2"], echo.address)
    assert hears(hosts["h3"], echo.address)
    with closing(Echo(hosts["h3"])) as other:
        assert hears(hosts["h2"], other.address)

    hosts.heal("h1", "h2")
    hosts.heal("h2", "h1")
    assert soon_hears(hosts["h2"], echo.address)


def test_a_connection_outlives_a_short_cut(hosts: Hosts, echo: Echo) -> None:
    with closing(hosts["h2"].call(socket.create_connection, echo.address, 20)) as sock:
        hosts.cut("h1")
        sock.sendall(b"while nobody hears")
        time.sleep(0.3)
        hosts.heal("h1")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(16) == b"done"


def test_a_slow_link_takes_its_time_both_ways_until_it_is_released(hosts: Hosts, echo: Echo) -> None:
    size, rate = 1 << 20, 4 << 20
    with closing(Echo(hosts["h2"])) as other:
        hosts.slow("h1", bytes_per_second=rate)
        assert send(hosts["h2"], echo.address, size) > 0.5 * size / rate
        assert send(hosts["h1"], other.address, size) > 0.5 * size / rate

        hosts.slow("h1")
        assert send(hosts["h2"], echo.address, size) < 0.5 * size / rate


def test_a_delay_is_made_or_refused_with_the_reason(hosts: Hosts, echo: Echo) -> None:
    if not hosts.can_delay():
        with pytest.raises(HostsUnavailable, match="cannot delay packets"):
            hosts.slow("h1", delay_seconds=0.05)
        return
    hosts.slow("h1", delay_seconds=0.05)
    assert not hears(hosts["h2"], echo.address, 0.08)
    assert hears(hosts["h2"], echo.address, 5.0)


def test_bytes_are_counted_at_each_link(hosts: Hosts, echo: Echo) -> None:
    before = {host.name: host.traffic() for host in hosts}
    send(hosts["h2"], echo.address, 1 << 20)
    after = {host.name: host.traffic() for host in hosts}

    received, sent = (after[name][way] - before[name][way] for name, way in (("h1", 0), ("h2", 1)))
    assert 1 << 20 <= sent <= 1.2 * (1 << 20)
    assert abs(received - sent) < 1 << 14
    assert sum(after["h3"]) - sum(before["h3"]) < 1 << 12


def test_a_program_runs_on_its_host_under_the_pid_that_was_told(hosts: Hosts) -> None:
    program = "import os, socket; print(os.getpid(), [n for _, n in socket.if_nameindex()], flush=True)"

    process = hosts["h2"].popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)

    words = process.communicate(timeout=20)[0].decode()
    assert words.startswith(f"{process.pid} [") and "'eth0'" in words
    assert process.returncode == 0


def test_a_program_that_fails_is_an_error_with_its_words(hosts: Hosts) -> None:
    with pytest.raises(RuntimeError, match=r"sh on h1: no luck"):
        hosts["h1"].run(["sh", "-c", "echo no luck >&2; exit 3"])


def test_closing_kills_what_runs_in_hosts_and_their_children(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(1)
    script = "trap '' TERM; sleep 600 & echo $!; wait"
    process = hosts["h1"].popen(["bash", "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        child = int(process.stdout.readline())

    hosts.close()
    hosts.close()

    assert process.poll() == -signal.SIGKILL
    assert is_gone(child)


def test_a_program_outlives_the_thread_that_started_it(hosts: Hosts) -> None:
    started: list[subprocess.Popen[bytes]] = []
    thread = threading.Thread(target=lambda: started.append(hosts["h1"].popen(["sleep", "600"])))
    thread.start()
    thread.join()

    time.sleep(0.2)
    assert started[0].poll() is None


def test_a_killed_maker_leaves_nothing_that_sweeping_does_not_find(make_hosts: MakeHosts) -> None:
    script = (
        "from lifl_bench.hosts import Hosts\n"
        "import os, signal\n"
        "with Hosts(1) as hosts:\n"
        "    quiet = dict.fromkeys(('stdout', 'stderr'), -3)\n"
        "    mild = hosts['h1'].popen(['sleep', '600'], **quiet)\n"
        "    hard = hosts['h1'].popen(['sh', '-c', 'kill -STOP $$; sleep 600'], **quiet)\n"
        "    print(mild.pid, hard.pid, flush=True)\n"
        "    os.waitid(os.P_PID, hard.pid, os.WSTOPPED)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    mild, hard = map(int, next(line for line in done.stdout.splitlines() if " " in line).split())

    assert is_gone(mild)
    assert read_stat(hard) is not None
    make_hosts(1)
    assert is_gone(hard)


def is_gone(pid: int) -> bool:
    """Within a few seconds; an orphan's new parent has to see its end."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
                continue
        return True
    return False


def test_marks_of_the_living_are_left_alone(hosts: Hosts) -> None:
    process = hosts["h1"].popen(["sleep", "600"])

    Hosts.sweep()

    time.sleep(0.05)
    assert process.poll() is None


@pytest.mark.parametrize("mark", ["", "1", "::::", "a:b:c:d", "-1:-1:-1:x"])
def test_a_mark_of_nobody_is_left_alone(mark: str) -> None:
    with subprocess.Popen(["sleep", "600"], env={MARK: mark, "PATH": os.environ["PATH"]}) as process:
        Hosts.sweep()
        assert process.poll() is None
        process.kill()


def test_nothing_stays_open_after_closing(make_hosts: MakeHosts) -> None:
    make_hosts(1).close()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()

    hosts = make_hosts(5)
    assert hosts["h5"].call(int, "5") == 5
    hosts.close()

    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_without_the_privilege_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module, "_new_namespace", refuse)
    with pytest.raises(HostsUnavailable, match="hosts need root"), Hosts(1):
        pass
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostsUnavailable, match="iproute2"), Hosts(1):
        pass


def test_names_that_no_interface_can_have_are_refused() -> None:
    for names in (["x" * 16], [""], 251):
        with pytest.raises(ValueError, match="at most"):
            Hosts(names)  # type: ignore[arg-type]


# --- a node's processes, taken as one --------------------------------------------------------------------------

TREE = r"""
import os, subprocess, sys, threading, time
counter = "import os, sys, time\nwhile True: os.write(1, b'.'); time.sleep(0.001)"
def start():
    with open(sys.argv[1], "ab") as file:
        subprocess.Popen([sys.executable, "-c", counter], stdout=file)
threading.Thread(target=start).start()  # children may be any thread's
start()
while len(open(sys.argv[1], "rb").read()) < 10: time.sleep(0.01)
print('{"ready": true}', flush=True)
while True: time.sleep(0.01)
"""


@pytest.fixture
def program(make_hosts: MakeHosts, tmp_path: Path) -> Iterator[Program]:
    command = [sys.executable, "-c", TREE, str(tmp_path / "count")]
    program = Program(make_hosts(1)["h1"], command, dict(os.environ), tmp_path / "log")
    try:
        assert program.hear() == {"ready": True}
        yield program
    finally:
        program.kill()


def progress(tmp_path: Path, seconds: float) -> int:
    """How often the children of a tree have counted in this time."""
    before = (tmp_path / "count").stat().st_size
    time.sleep(seconds)
    return (tmp_path / "count").stat().st_size - before


def test_a_program_is_paused_and_goes_on_with_all_below_it(program: Program, tmp_path: Path) -> None:
    assert len(program.pids()) == 3

    program.pause()
    assert progress(tmp_path, 0.1) == 0
    program.resume()
    assert progress(tmp_path, 0.1) > 0


def test_a_slow_program_does_a_fraction_of_its_work(program: Program, tmp_path: Path) -> None:
    slowness = _Slowness(program, 10)
    slow = progress(tmp_path, 1.0)
    slowness.end()
    fast = progress(tmp_path, 1.0)

    assert 0 < slow < fast / 3


def test_a_killed_program_leaves_no_child(program: Program) -> None:
    pids = program.pids()
    cpu = program.cpu_seconds()

    program.kill()

    assert cpu > 0 and not program.is_running and program.pids() == []
    assert all(is_gone(pid) for pid in pids)


def test_a_paused_program_is_stopped_with_children_that_would_go_on(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lifl_bench.cluster.STOP_SECONDS", 0.3)
    pids = program.pids()
    program.pause()

    program.stop()

    assert all(is_gone(pid) for pid in pids)


def test_a_program_that_does_not_start_shows_the_end_of_its_log(make_hosts: MakeHosts, tmp_path: Path) -> None:
    program = Program(make_hosts(1)["h1"], ["sh", "-c", "echo no luck >&2"], dict(os.environ), tmp_path / "log")

    with pytest.raises(RuntimeError, match="h1 did not start:\nno luck"):
        program.hear()
    program.stop()

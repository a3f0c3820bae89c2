"""Network namespaces as hosts: each with an address of its own, all on one switch, for tests and benchmarks.

    with Hosts(3) as hosts:
        server = hosts["h1"].popen([...])
        hosts["h3"].call(urlopen, f"http://{hosts['h1'].address}:8080/healthz")
        hosts.cut("h1")

Nothing of it appears outside: the switch is a bridge in a namespace of its own, to which a veth pair leads from
each host. The namespaces have no names either. File descriptors of this process keep them, so they are gone with
it, however it ends; the processes in them get SIGTERM then, and `Hosts.sweep` kills those that could not take it.

A host may also have clocks of its own: those that count from the start of a machine, by a time namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar

from lifl_bench.measure import read_stat

MARK: Final = "LIFL_HOSTS"
"""Environment variable by which processes in hosts are known, with their maker's pid and start time in it."""

_CLONE_NEWNET: Final = 0x40000000
_CLONE_NEWTIME: Final = 0x00000080
_PROGRAMS: Final = ("ip", "tc", "nsenter", "setpriv")
_COMMAND_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 5.0
_MOST_HOSTS: Final = 250
_THREADS: Final = 256
_LINK: Final = "eth0"
_BURST_SECONDS: Final = 0.01
_SMALLEST_BURST: Final = 128 << 10
"""Bytes: a token bucket lets nothing pass that is larger, and one TCP segment of a veth has up to 64 KiB."""
_SETTINGS: Final = """
for name in cubic reno; do
  if echo $name > /proc/sys/net/ipv4/tcp_congestion_control; then break; fi
done 2>/dev/null
file=/proc/sys/net/ipv6/conf/default/disable_ipv6
if [ -e $file ]; then echo 1 > $file; fi
"""
"""bbr, the default of many machines, is slow between namespaces; IPv6 would only add packets to the counters."""

_libc = ctypes.CDLL(None, use_errno=True)
_P = ParamSpec("_P")
_T = TypeVar("_T")


class HostsUnavailable(RuntimeError):
    """This machine or this user cannot do it; the message says what is missing."""


class Traffic(NamedTuple):
    """Bytes that have crossed the link of a host so far, Ethernet headers included."""

    received: int
    sent: int


def why_not() -> str:
    """Why there can be no hosts here; empty if there can."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"hosts need the programs {', '.join(missing)} (packages iproute2 and util-linux)"
    try:
        os.close(_new_namespace())
    except OSError as error:
        return f"hosts need root: no network namespace can be made ({(error.strerror or str(error)).lower()})"
    return ""


def why_no_clocks() -> str:
    """Why hosts can have no clocks of their own here; empty if they can."""
    try:
        os.close(_new_clocks(0))
    except OSError as error:
        cause = (error.strerror or str(error)).lower()
        return f"clocks of hosts need root and a kernel with time namespaces ({cause})"
    return ""


class Host:
    """One namespace with a link to the switch. Made by `Hosts`, and of no use after it is closed."""

    def __init__(self, name: str, number: int, mark: str) -> None:
        self.name = name
        self.address = f"10.77.0.{number}"
        self._hardware_address = f"02:00:0a:4d:00:{number:02x}"
        self._mark = mark
        self._descriptor = _new_namespace()
        # Not /proc/self: those who open it are other processes.
        self.namespace = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        """Path of the namespace, as for `nsenter --net=PATH`."""
        self._clocks: int | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._started: list[subprocess.Popen[bytes]] = []

    # --- processes -----------------------------------------------------------------------------------------

    def popen(
        self, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start a program here; `options` are subprocess.Popen's, but for preexec_fn.

        The pid is the program's. It gets SIGTERM when this process dies, and is killed when the hosts are closed.
        """
        # Entered, not made by unshare(1): that would stay as the program's parent, and signals would not reach it.
        clocks = [f"--time=/proc/{os.getpid()}/fd/{self._clocks}"] if self._clocks is not None else []
        command = ["nsenter", f"--net={self.namespace}", *clocks, "setpriv", "--pdeathsig", "TERM", "--", *argv]
        environment = dict(os.environ if env is None else env) | {MARK: self._mark}

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, env=environment, **options)

        # The signal comes when the thread ends that has started the program; one of ours lasts.
        process = start() if threading.current_thread() is threading.main_thread() else self.call(start)
        self._started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        input: str | None = None,
        timeout: float = _COMMAND_SECONDS,
    ) -> str:
        """Run a program here to its end and return what it printed.

        Raises RuntimeError with its words if it fails, subprocess.TimeoutExpired if it takes longer.
        """
        command = ["nsenter", f"--net={self.namespace}", *argv]
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode:
            raise RuntimeError(f"{argv[0]} on {self.name}: {done.stderr.strip() or f'status {done.returncode}'}")
        return done.stdout

    def set_clock(self, seconds: int) -> None:
        """Have CLOCK_MONOTONIC and CLOCK_BOOTTIME of programs started by `popen` from now on differ by so much.

        Raises HostsUnavailable where the kernel does not do it, ValueError for a clock that would be below zero.
        """
        if time.monotonic() + seconds < 0:
            raise ValueError(f"{seconds} s: a clock cannot go back to before the start of the machine")
        if reason := why_no_clocks():
            raise HostsUnavailable(reason)
        clocks = _new_clocks(seconds)
        if self._clocks is not None:
            os.close(self._clocks)
        self._clocks = clocks

    # --- calls from this process ---------------------------------------------------------------------------

    def call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a function in a thread whose sockets are this host's, and return what it returns."""
        return self.submit(function, *args, **kwargs).result()

    def submit(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """As `call`, without waiting. Threads and processes that the function starts belong to the host, too."""
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_THREADS, f"host-{self.name}", initializer=self.enter)
        return self._threads.submit(function, *args, **kwargs)

    def enter(self) -> None:
        """Move the calling thread here for good: for a forked process that plays a client."""
        _enter(self._descriptor)

    # --- the link ------------------------------------------------------------------------------------------

    def traffic(self) -> Traffic:
        """Bytes that have crossed its link so far."""
        for line in self.run(["cat", "/proc/net/dev"]).splitlines():
            name, _, fields = line.partition(":")
            if name.strip() == _LINK:
                numbers = [int(field) for field in fields.split()]
                return Traffic(numbers[0], numbers[8])
        raise RuntimeError(f"host {self.name} has no link")

    def ip(self, *lines: str) -> None:
        """Carry out commands of ip(8) here, one after another, up to the first that fails."""
        self.run(["ip", "-batch", "-"], input="".join(f"{line}\n" for line in lines))

    def _set_up(self) -> None:
        self.ip(f"addr add {self.address}/24 dev {_LINK}", f"link set {_LINK} up", "link set lo up")

    def _lose(self, other: Host) -> None:
        """Send what is for the other to the own hardware address, from where the switch returns nothing."""
        self.ip(f"neigh replace {other.address} lladdr {self._hardware_address} nud permanent dev {_LINK}")

    def _find(self, other: Host) -> None:
        with contextlib.suppress(RuntimeError):  # it was not lost
            self.ip(f"neigh del {other.address} dev {_LINK}")

    def _close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._started:
            process.wait(_STOP_SECONDS)  # `Hosts` has killed it
        os.close(self._descriptor)
        if self._clocks is not None:
            os.close(self._clocks)


class Hosts:
    """Hosts on one switch; use it in a `with` statement. `names` are theirs, or how many: h1, h2, ...

    Raises HostsUnavailable where there can be none.
    """

    def __init__(self, names: int | Sequence[str]) -> None:
        self._names = [f"h{number + 1}" for number in range(names)] if isinstance(names, int) else list(names)
        if len(self._names) > _MOST_HOSTS or any(not 0 < len(name) < 16 for name in self._names):
            raise ValueError(f"at most {_MOST_HOSTS} hosts, with names of 1 to 15 characters")
        self._hosts: dict[str, Host] = {}
        self._switch: Host | None = None
        self._mark = _mark_of(os.getpid()) + secrets.token_hex(8)

    def __enter__(self) -> Hosts:
        if reason := why_not():
            raise HostsUnavailable(reason)
        Hosts.sweep()
        try:
            self._switch = Host("switch", 254, self._mark)
            for number, name in enumerate(self._names, start=1):
                self._hosts[name] = Host(name, number, self._mark)
            self._connect(self._switch)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    def __len__(self) -> int:
        return len(self._hosts)

    def close(self) -> None:
        """Kill every process in the hosts and give the namespaces back. May be called twice."""
        _kill_marked(lambda mark: mark == self._mark)
        for host in [*self._hosts.values(), *([self._switch] if self._switch else [])]:
            host._close()
        self._hosts.clear()
        self._switch = None

    def _connect(self, switch: Host) -> None:
        for host in (switch, *self):
            host.run(["sh", "-c", _SETTINGS])
        lines = ["link add switch type bridge stp_state 0 mcast_snooping 0", "link set switch up"]
        for host in self:
            peer = f"name {_LINK} address {host._hardware_address} netns {host.namespace}"
            lines += [f"link add {host.name} type veth peer {peer}", f"link set {host.name} master switch up"]
        switch.ip(*lines)
        for host in self:
            host._set_up()

    # --- what can happen to a network ------------------------------------------------------------------------

    def cut(self, name: str) -> None:
        """Pull the plug of a host: nothing reaches it or leaves it. It still talks to itself."""
        self._ports.ip(f"link set {name} down")

    def partition(self, one: str, other: str) -> None:
        """These two hear nothing of each other any more; all others hear both."""
        self._hosts[one]._lose(self._hosts[other])
        self._hosts[other]._lose(self._hosts[one])

    def heal(self, one: str, other: str | None = None) -> None:
        """Undo `cut`, or with two names `partition`; nothing happens if there is nothing to undo."""
        if other is None:
            self._ports.ip(f"link set {one} up")
        else:
            self._hosts[one]._find(self._hosts[other])
            self._hosts[other]._find(self._hosts[one])

    def slow(self, name: str, *, bytes_per_second: float = 0.0, delay_seconds: float = 0.0) -> None:
        """Limit the link of a host in both directions, instead of what was set before; without values, not at all.

        Raises HostsUnavailable for a delay that the kernel cannot make (it needs netem).
        """
        for host, link in ((self._hosts[name], _LINK), (self._ports, name)):
            with contextlib.suppress(RuntimeError):  # there was no limit
                host.run(["tc", "qdisc", "del", "dev", link, "root"])
            if bytes_per_second or delay_seconds:
                _limit(host, link, bytes_per_second, delay_seconds)

    def can_delay(self) -> bool:
        """Whether the kernel can make a link slow to answer (netem)."""
        try:
            _limit(self._ports, "lo", 0.0, 0.001)
        except HostsUnavailable:
            return False
        self._ports.run(["tc", "qdisc", "del", "dev", "lo", "root"])
        return True

    @property
    def _ports(self) -> Host:
        if self._switch is None:
            raise RuntimeError("the hosts are closed")
        return self._switch

    # --- what others left ------------------------------------------------------------------------------------

    @staticmethod
    def sweep() -> None:
        """Kill processes in hosts whose maker is gone: those that were stopped, or did not heed SIGTERM."""
        _kill_marked(_is_orphaned)


def _limit(host: Host, link: str, bytes_per_second: float, delay_seconds: float) -> None:
    begin = ["tc", "qdisc", "add", "dev", link, "root"]
    bits = f"{max(8, round(bytes_per_second * 8))}bit"
    if not delay_seconds:
        burst = max(_SMALLEST_BURST, round(bytes_per_second * _BURST_SECONDS))
        host.run([*begin, "tbf", "rate", bits, "burst", str(burst), "latency", "100ms"])
        return
    rate = ["rate", bits] if bytes_per_second else []
    try:
        host.run([*begin, "netem", "delay", f"{round(delay_seconds * 1e6)}us", "limit", "100000", *rate])
    except RuntimeError as error:
        raise HostsUnavailable(f"this kernel cannot delay packets: {error}") from None


# --- namespaces ----------------------------------------------------------------------------------------------


def _new_namespace() -> int:
    """File descriptor of a new network namespace; the caller's stays as it is. Raises OSError."""

    def make() -> int:
        _unshare(_CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return _in_thread(make)


def _new_clocks(seconds: int) -> int:
    """File descriptor of a new time namespace, whose clocks are so much ahead of the machine's. Raises OSError."""

    def make() -> int:
        _unshare(_CLONE_NEWTIME)
        # The file is a process's, not a thread's, but /proc finds it by a thread's number, too.
        with open(f"/proc/{threading.get_native_id()}/timens_offsets", "w") as file:
            file.write(f"monotonic {seconds} 0\nboottime {seconds} 0\n")
        return os.open("/proc/thread-self/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC)

    return _in_thread(make)


def _in_thread(make: Callable[[], int]) -> int:
    """Call a function in a thread that ends with it, whose namespaces may change. Raises OSError as it does."""
    result: list[int | OSError] = []

    def call() -> None:
        try:
            result.append(make())
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


def _unshare(flag: int) -> None:
    if _libc.unshare(flag):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _enter(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# --- processes and their maker -------------------------------------------------------------------------------


def _mark_of(pid: int) -> str:
    """What the marks of a maker begin with: pids come again, with another start time or in another namespace."""
    stat = read_stat(pid)
    return f"{os.stat('/proc/self/ns/pid').st_ino}:{pid}:{stat.started if stat else 0}:"


def _is_orphaned(mark: str) -> bool:
    space, pid, started, _ = mark.split(":")
    if not (pid.isdecimal() and started.isdecimal()) or space != str(os.stat("/proc/self/ns/pid").st_ino):
        return False
    maker = read_stat(int(pid))
    return maker is None or maker.started != int(started)


def _kill_marked(is_victim: Callable[[str], bool]) -> None:
    """Kill processes by their mark, and see their end; repeated, for a process may start another meanwhile."""
    for _ in range(100):
        found = [pid for pid, mark in _marked() if is_victim(mark)]
        if not found:
            return
        for descriptor in filter(None, map(_kill, found)):
            with contextlib.suppress(OSError):
                _wait_for_end(descriptor)
            os.close(descriptor)


def _marked() -> Iterator[tuple[int, str]]:
    beginning = f"{MARK}=".encode()
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError, ValueError):
            for entry in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                if entry.startswith(beginning) and entry.count(b":") == 3:
                    yield int(name), entry.removeprefix(beginning).decode()


def _kill(pid: int) -> int | None:
    """Kill a process; a pidfd by which its end can be waited for, unless it has ended before."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    return descriptor


def _wait_for_end(descriptor: int) -> None:
    connection.wait([descriptor], _STOP_SECONDS)

"""What this machine can do for LIFL: looks at the kernel, privileges, memory, programs; changes nothing.

The eBPF preflight and torch are asked in processes of their own, because `lifl` may not import the layers above
it, because importing torch takes seconds, and because neither can then take the examination down.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "missing"]

_PROBE_TIMEOUT_S = 60.0
_MINIMUM_KERNEL = (5, 13)
_MINIMUM_FILES = 1024
_LOW_MEMORY_BYTES = 2 << 30

_CAP_NET_ADMIN = 12
_CAP_SYS_ADMIN = 21
_CAP_BPF = 39


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    status: Status
    value: str
    """What was found."""
    hint: str = ""
    """What its absence costs, or what to do about it; empty when all is well."""
    needed: bool = False
    """Whether LIFL cannot work without it."""

    def as_dict(self) -> dict[str, object]:
        """The check as JSON."""
        return asdict(self)


def examine() -> list[Check]:
    """Look at everything, in the order in which it is worth reading; takes some seconds."""
    from concurrent.futures import ThreadPoolExecutor

    looks: tuple[Callable[[], Check], ...] = (
        _python,
        _kernel,
        _capabilities,
        _btf,
        _bcc,
        _ebpf,
        _cores,
        _vector_width,
        _memory,
        _shared_memory,
        _huge_pages,
        _congestion_control,
        _open_files,
        _torch,
        lambda: _program("nats-server", "the broker baseline of `func bench` cannot run"),
        lambda: _program("nginx", "the baselines of `func bench` run without their reverse proxy"),
        lambda: _program("podman", "function images are neither built nor run here; docker will do", "docker"),
    )
    with ThreadPoolExecutor(len(looks)) as pool:
        return list(pool.map(_guard, looks))


def _guard(look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as error:  # one strange machine must not hide what else can be told of it
        name = getattr(look, "__name__", "check").strip("_").replace("_", " ")
        return Check(name, "warn", f"could not be examined: {error}")


# --- kernel and privileges -----------------------------------------------------------------------------------


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _kernel() -> Check:
    release = platform.release()
    if platform.system() != "Linux":
        return Check("kernel", "missing", f"{platform.system()} {release}", "LIFL runs on Linux only", needed=True)
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < _MINIMUM_KERNEL:
        wanted = ".".join(map(str, _MINIMUM_KERNEL))
        return Check("kernel", "warn", release, f"older than {wanted}: the eBPF data plane may not load")
    return Check("kernel", "ok", f"{release} {platform.machine()}")


def effective_capabilities() -> int:
    """The bit set CapEff of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _capabilities() -> Check:
    held = effective_capabilities()
    wanted = {"CAP_BPF": _CAP_BPF, "CAP_NET_ADMIN": _CAP_NET_ADMIN}
    lacking = [name for name, bit in wanted.items() if not held >> bit & 1]
    # CAP_SYS_ADMIN contains CAP_BPF, on every kernel.
    if held >> _CAP_SYS_ADMIN & 1 and "CAP_BPF" in lacking:
        lacking.remove("CAP_BPF")
    value = f"CapEff {held:016x}"
    if lacking:
        hint = f"without {' and '.join(lacking)} the data plane is UNIX sockets; nothing else changes"
        return Check("capabilities", "warn", value, hint)
    return Check("capabilities", "ok", f"{value}: CAP_BPF, CAP_NET_ADMIN")


def _btf() -> Check:
    file = Path("/sys/kernel/btf/vmlinux")
    if file.exists():
        return Check("kernel BTF", "ok", f"{file}, {file.stat().st_size / 1e6:.1f} MB")
    return Check("kernel BTF", "warn", "none", "the router does not need it; tools that read its maps' types do")


def _bcc() -> Check:
    if importlib.util.find_spec("bcc") is None:
        hint = "eBPF data plane off: apt install python3-bpfcc, and a venv with --system-site-packages"
        return Check("bcc", "warn", "not importable", hint)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return Check("bcc", "ok", version("bcc"))
    except PackageNotFoundError:
        return Check("bcc", "ok", "importable")


def _ebpf() -> Check:
    name = "eBPF data plane"
    if importlib.util.find_spec("lifl_ebpf") is None:
        return Check(name, "warn", "not installed", "the package lifl_ebpf is not there; UNIX sockets are used")
    program = "from lifl_ebpf.preflight import ebpf_reason; print('reason:' + (ebpf_reason() or ''))"
    code, output, errors = _ask_python(program)
    answers = [line.removeprefix("reason:") for line in output.splitlines() if line.startswith("reason:")]
    if code != 0 or not answers:
        cause = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
        return Check(name, "warn", f"the preflight failed: {cause}", "UNIX sockets are used")
    if answers[-1]:
        return Check(name, "warn", f"not usable: {answers[-1]}", "UNIX sockets are used; all else is the same")
    return Check(name, "ok", "usable")


# --- processors and memory -----------------------------------------------------------------------------------


def _cores() -> Check:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    value = f"{usable} usable of {present}"
    quota = _cpu_quota()
    if quota is not None and quota < usable:
        value += f", limited to {quota:g}"
        return Check("cores", "warn", value, "the cgroup's CPU limit throttles aggregators")
    if usable == 1:
        return Check("cores", "warn", value, "gateway and aggregators take turns on the one core")
    return Check("cores", "ok", value)


def _cpu_quota() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _vector_width() -> Check:
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError) as error:
        return Check("fold kernel", "missing", f"llvmlite: {error}", "pip install llvmlite", needed=True)
    features = llvm.get_host_cpu_features()
    widths = {"avx512f": 512, "avx2": 256, "avx": 256}
    width = max((bits for name, bits in widths.items() if features.get(name)), default=128)
    value = f"{llvm.get_host_cpu_name()}, {width}-bit vectors"
    if width < 256 and platform.machine() == "x86_64":
        return Check("fold kernel", "warn", value, "no AVX2: folds that are not bound by memory are slower")
    return Check("fold kernel", "ok", value)


def _memory() -> Check:
    facts: dict[str, int] = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        facts[name] = int(rest.split()[0]) << 10
    total, available = facts["MemTotal"], facts["MemAvailable"]
    value = f"{available / 2**30:.1f} GiB available of {total / 2**30:.1f}"
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        value += f", limited to {limit / 2**30:.1f}"
        available = min(available, limit)
    except (OSError, ValueError):
        pass
    if available < _LOW_MEMORY_BYTES:
        return Check("memory", "warn", value, "a job's pool takes slots x model size; choose few slots")
    return Check("memory", "ok", value)


def _shared_memory() -> Check:
    try:
        descriptor = os.memfd_create("lifl-doctor", os.MFD_CLOEXEC)
    except OSError as error:
        return Check("memfd", "missing", str(error), "pools are memfds: nothing runs without", needed=True)
    os.close(descriptor)
    return Check("memfd", "ok", "available")


_FSOPEN = 430
_FSOPEN_CLOEXEC = 1


def _huge_pages() -> Check:
    """Pools get huge pages from a private tmpfs (needs CAP_SYS_ADMIN) or where the system allows memfds to."""
    shmem = _bracketed(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))
    if shmem in ("always", "within_size", "advise", "force"):
        return Check("huge pages", "ok", f"shmem_enabled is {shmem}")
    value = f"shmem_enabled is {shmem or 'unknown'}"
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.syscall(_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC))
    if descriptor >= 0:
        os.close(descriptor)
        return Check("huge pages", "ok", f"{value}; a private tmpfs with huge pages is possible")
    cause = os.strerror(ctypes.get_errno()).lower()
    hint = (
        f"no private tmpfs either ({cause}; it takes CAP_SYS_ADMIN): the first touch of a pool costs more. "
        "root can: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
    )
    return Check("huge pages", "warn", value, hint)


def _bracketed(file: Path) -> str | None:
    try:
        return next((word[1:-1] for word in file.read_text().split() if word.startswith("[")), None)
    except OSError:
        return None


# --- network, files, programs --------------------------------------------------------------------------------


def _congestion_control() -> Check:
    name = "TCP"
    directory = Path("/proc/sys/net/ipv4")
    default = (directory / "tcp_congestion_control").read_text().strip()
    available = (directory / "tcp_available_congestion_control").read_text().split()
    value = f"default {default}; available {', '.join(available)}"
    if not default.startswith("bbr"):
        return Check(name, "ok", value)
    for choice in ("cubic", "reno"):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, choice.encode())
            return Check(name, "ok", f"{value}; LIFL's own sockets use {choice}")
    return Check(name, "warn", value, f"{default} costs CPU on loopback, and this process may use no other")


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{soft} (at most {'unlimited' if hard == resource.RLIM_INFINITY else hard})"
    if soft < _MINIMUM_FILES:
        return Check("open files", "warn", value, f"each connected client takes one; ulimit -n {_MINIMUM_FILES}")
    return Check("open files", "ok", value)


def _torch() -> Check:
    hint = "functions that look at tensors need it, and so does `make demo`; FedAvg and the optimisers do not"
    if importlib.util.find_spec("torch") is None:
        return Check("torch", "warn", "not installed", hint)
    code, output, errors = _ask_python("import torch; print(torch.__version__, torch.get_num_threads())")
    if code != 0 or not output.split():
        cause = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
        return Check("torch", "warn", f"cannot be imported: {cause}", hint)
    version, threads = output.split()[-2:]
    return Check("torch", "ok", f"{version}, {threads} threads by default; an aggregator uses 1")


def _program(name: str, cost: str, *alternatives: str) -> Check:
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    for candidate in (name, *alternatives):
        if found := shutil.which(candidate, path=search):
            return Check(name, "ok", found)
    return Check(name, "missing", "not found", cost)


def _ask_python(program: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a few lines of Python in a process of their own."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1, "", f"no answer within {_PROBE_TIMEOUT_S:.0f} s"
    return result.returncode, result.stdout, result.stderr

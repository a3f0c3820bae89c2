"""What a run was made on: facts of the machine and versions of the software, without names of hosts or users.

Only a few reads of /proc and /sys; what cannot be found out is left out.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

_PACKAGES: Final = ("lifl", "numpy", "torch", "llvmlite", "flask", "grpcio", "nats-py", "hypercorn", "bcc")
_PROGRAMS: Final = (("nats-server", "--version"), ("nginx", "-v"))
_PROGRAM_TIMEOUT_S = 10.0
_VERSION = re.compile(r"\d+(\.\d+)+[\w.+~-]*")
_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_CGROUP = Path("/sys/fs/cgroup")


def machine_facts(default_congestion_control: str = "") -> dict[str, str]:
    """Facts by name, most telling first.

    `default_congestion_control` is the machine's, for callers that have moved to a network namespace of their own
    since: what is in use there is found out here.
    """
    looks: dict[str, Callable[[], str]] = {
        "processor": _processor,
        "cores": _cores,
        "L3 cache": _l3_cache,
        "memory": _memory,
        "swap": _swap,
        "kernel": lambda: f"{platform.system()} {platform.release()}",
        "operating system": lambda: platform.freedesktop_os_release()["PRETTY_NAME"],
        "virtual machine": _hypervisor,
        "clock governor": lambda: _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "TCP congestion control": lambda: _congestion_control(default_congestion_control),
        "huge pages": _huge_pages,
    }
    return _known(looks)


def versions() -> dict[str, str]:
    """Versions by name of what was compared and of what it runs on."""
    looks: dict[str, Callable[[], str]] = {"python": platform.python_version}
    looks |= {name: _package_look(name) for name in _PACKAGES}
    looks |= {name: _program_look(name, option) for name, option in _PROGRAMS}
    looks["kernel"] = platform.release
    return _known(looks)


def _known(looks: Mapping[str, Callable[[], str]]) -> dict[str, str]:
    """What the looks find; one that fails, in whatever way, is left out: no report is lost over a fact."""
    found = {}
    for name, look in looks.items():
        try:
            value = look()
        except Exception:
            continue
        if value:
            found[name] = value
    return found


# --- processor -----------------------------------------------------------------------------------------------


def _processor() -> str:
    facts = _fields("/proc/cpuinfo")
    name = facts.get("model name") or facts.get("Model") or facts.get("CPU part") or platform.machine()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    widest = next((text for flag, text in _VECTORS if flag in flags), "")
    return f"{name} ({platform.machine()}{widest})"


_VECTORS: Final = (("avx512f", ", AVX-512"), ("avx2", ", AVX2"), ("sve", ", SVE"), ("asimd", ", NEON"))


def _cores() -> str:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    text = f"{usable} usable of {present}"
    if _read_or_nothing("/sys/devices/system/cpu/smt/active") == "1":
        text += ", hyper-threads"
    quota, _, period = _read_or_nothing(_CGROUP / "cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal():
        text += f", limited to {int(quota) / int(period):g}"
    return text


def _l3_cache() -> str:
    for index in sorted(_CACHES.glob("index*")):
        if _read(index / "level") == "3":
            return f"{_mebibytes(_read(index / 'size'))}, for CPUs {_read(index / 'shared_cpu_list')}"
    return ""


def _mebibytes(size: str) -> str:
    """`32768K` as `32 MB`."""
    return f"{int(size[:-1]) / 1024:g} MB" if size.endswith("K") and size[:-1].isdecimal() else size


def _hypervisor() -> str:
    maker = " ".join(
        text for name in ("sys_vendor", "product_name") if (text := _read_or_nothing(f"/sys/class/dmi/id/{name}"))
    )
    kind = _read_or_nothing("/sys/hypervisor/type")
    virtual = "hypervisor" in _fields("/proc/cpuinfo").get("flags", "").split() or bool(kind)
    named = ", ".join(text for text in (kind, maker) if text)
    return f"yes ({named})" if virtual and named else "yes" if virtual else "no sign of one"


# --- memory and network --------------------------------------------------------------------------------------


def _memory() -> str:
    text = _gibibytes(_fields("/proc/meminfo")["MemTotal"])
    limit = _read_or_nothing(_CGROUP / "memory.max")
    return f"{text}, limited to {int(limit) / 2**30:.1f} GiB" if limit.isdecimal() else text


def _swap() -> str:
    facts = _fields("/proc/meminfo")
    if facts["SwapTotal"].startswith("0 "):
        return "none"
    used = int(facts["SwapTotal"].split()[0]) - int(facts["SwapFree"].split()[0])
    return f"{_gibibytes(facts['SwapTotal'])}, {_gibibytes(f'{used} kB')} in use"


def _gibibytes(text: str) -> str:
    """`25165824 kB` as `24.0 GiB`."""
    return f"{int(text.split()[0]) / 2**20:.1f} GiB"


def _congestion_control(default: str) -> str:
    in_use = _read(_CONGESTION_CONTROL)
    return f"{in_use} (the machine's default is {default})" if default and default != in_use else in_use


def _huge_pages() -> str:
    parts = []
    for file, what in (("enabled", "anonymous"), ("shmem_enabled", "shared")):
        choice = re.search(r"\[(\w+)\]", _read_or_nothing(_HUGE_PAGES / file))
        if choice:
            parts.append(f"{what} memory {choice[1]}")
    reserved = _fields("/proc/meminfo").get("HugePages_Total", "0")
    if reserved != "0":
        parts.append(f"{reserved} reserved")
    return ", ".join(parts)


# --- versions ------------------------------------------------------------------------------------------------


def _package_look(name: str) -> Callable[[], str]:
    return lambda: metadata.version(name)


def _program_look(name: str, option: str) -> Callable[[], str]:
    return lambda: _program_version(name, option)


def _program_version(name: str, option: str) -> str:
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    program = shutil.which(name, path=search)
    if program is None:
        return ""
    result = subprocess.run(
        [program, option],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # where nginx prints it
        text=True,
        errors="replace",
        timeout=_PROGRAM_TIMEOUT_S,
        check=False,
    )
    # The number alone: what a program prints when something is wrong may have paths in it.
    found = _VERSION.search(result.stdout)
    return found[0] if found else ""


# --- reading -------------------------------------------------------------------------------------------------


def _read(file: str | Path) -> str:
    return Path(file).read_text(errors="replace").strip()


def _read_or_nothing(file: str | Path) -> str:
    try:
        return _read(file)
    except OSError:
        return ""


def _fields(file: str) -> dict[str, str]:
    """`name: value` lines; the first of each name."""
    found: dict[str, str] = {}
    for line in _read(file).splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found

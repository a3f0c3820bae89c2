"""Why the eBPF data plane cannot be used here, found out cheaply: nothing is compiled and bcc is not imported."""

from __future__ import annotations

import errno
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Final

from lifl.capabilities import CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN, effective_capabilities

from lifl_ebpf.bpf_syscall import SOCKHASH, BpfError, map_create

OLDEST_KERNEL: Final = (5, 13)
"""Batched updates of maps in maps; socket storage in SK_MSG and mappable arrays are older."""


def ebpf_reason() -> str | None:
    """Say in one sentence why eBPF cannot be used and what to do about it; None when it can, as far as is seen
    without compiling."""
    return _kernel_reason() or _capability_reason() or _bcc_reason() or _map_reason()


def _kernel_reason() -> str | None:
    if platform.system() != "Linux":
        return "eBPF needs Linux"
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    if found and (int(found[1]), int(found[2])) < OLDEST_KERNEL:
        return f"kernel {platform.release()} is too old for the eBPF router; it needs {_dotted(OLDEST_KERNEL)}"
    return None


def _capability_reason() -> str | None:
    held = effective_capabilities()
    missing = [
        name
        for name, number in (("CAP_BPF", CAP_BPF), ("CAP_NET_ADMIN", CAP_NET_ADMIN))
        if number not in held and CAP_SYS_ADMIN not in held
    ]
    if missing:
        return (
            f"the agent lacks {' and '.join(missing)}; run it as root, or give it these capabilities "
            "(setpriv --ambient-caps, AmbientCapabilities=, or a container's capabilities.add)"
        )
    return None


def _bcc_reason() -> str | None:
    try:
        found = importlib.util.find_spec("bcc")
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        return (
            "Python cannot import bcc; install python3-bpfcc and make the environment with "
            "/usr/bin/python3 -m venv --system-site-packages"
        )
    if not any(os.path.exists(os.path.join(place, "libbcc.py")) for place in found.submodule_search_locations):
        return "the bcc found is not the BPF Compiler Collection; uninstall it and install python3-bpfcc"
    return None


def _map_reason() -> str | None:
    try:
        os.close(map_create(SOCKHASH, 4, 4, 1))
    except BpfError as error:
        if error.errno == errno.EPERM:
            return f"the kernel refuses to create a SOCKHASH map; {_refusal()}"
        if error.errno == errno.EINVAL:
            return "this kernel was built without SOCKHASH maps (CONFIG_BPF_STREAM_PARSER); use another kernel"
        if error.errno == errno.ENOSYS:
            return "this kernel has no bpf(2) (CONFIG_BPF_SYSCALL); use another kernel"
        return f"a SOCKHASH map cannot be created: {error}"
    return None


def _refusal() -> str:
    try:
        if "[confidentiality]" in Path("/sys/kernel/security/lockdown").read_text():
            return "it is locked down (confidentiality): boot it without lockdown=confidentiality"
    except OSError:
        pass
    return (
        "the capabilities count in a user namespace only, or a seccomp filter forbids bpf(2): "
        "run the agent in the initial user namespace and without that filter"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))

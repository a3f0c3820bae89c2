"""Compiles and loads the router with BCC, in a child process that ends when it has done so.

LLVM is 100 MB of code that an agent needs for a quarter of a second. In a child it leaves neither memory nor
attack surface behind in the privileged process: only the file descriptors of the loaded program's maps cross over.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Final, NoReturn

from lifl.control_channel import close_fds
from lifl.errors import LiflError

from lifl_ebpf.stub_headers import write_stub_headers

SOURCE: Final = Path(__file__).with_name("router.bpf.c")
MAPS: Final = ("sockets", "identities", "destinations", "policies", "traffic", "credits")
"""Maps whose file descriptors the agent gets, in this order."""
_TIMEOUT: Final = 60.0
_CHUNK: Final = 4096


class EbpfUnavailable(LiflError):
    """The eBPF data plane cannot be used here; the text is one line that says why."""


def compile_router(
    credit: int, max_endpoints: int, source: Path = SOURCE, maps: tuple[str, ...] = MAPS
) -> list[int]:
    """Compile, load and attach the router; return the file descriptors of `maps` (close-on-exec).

    Program and maps live as long as one of the maps or a routed socket does. `source` and `maps` serve
    measurements of other programs; its function `route` is attached to the first map. Raises `EbpfUnavailable`.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, tempfile.TemporaryFile() as noise:
        with theirs:
            child = os.fork()
            if child == 0:
                _child(theirs, noise.fileno(), credit, max_endpoints, source, maps)
        try:
            answer, fds = _answer(ours, len(maps))
        finally:
            _end(child)
        if len(fds) == len(maps):
            return fds
        close_fds(fds)
        noise.seek(0)
        output = noise.read().decode(errors="replace").splitlines()
        raise EbpfUnavailable(_one_line(answer, output))


def _answer(ours: socket.socket, count: int) -> tuple[str, list[int]]:
    if not select.select([ours], [], [], _TIMEOUT)[0]:
        return f"BCC did not finish within {_TIMEOUT:g} s", []
    data, fds, _, _ = socket.recv_fds(ours, _CHUNK, count)
    for fd in fds:
        os.set_inheritable(fd, False)
    return data.decode(errors="replace") or "the compiler process died", fds


def _end(child: int) -> None:
    """Reap the child; one that hangs is killed."""
    pidfd = os.pidfd_open(child)
    try:
        if not select.select([pidfd], [], [], 1.0)[0]:
            os.kill(child, 9)
    finally:
        os.close(pidfd)
    os.waitpid(child, 0)


def _one_line(answer: str, output: list[str]) -> str:
    """What failed, and the line of the compiler's or the verifier's output that tells why."""
    telling = [line for line in output if "error" in line.lower()]
    telling += [before for before, line in pairwise(output) if line.startswith("processed ")]
    return " ".join(f"BCC cannot load the router: {answer}; {(telling or output[-1:] or [''])[0]}".split())


def _child(
    theirs: socket.socket, noise: int, credit: int, max_endpoints: int, source: Path, maps: tuple[str, ...]
) -> NoReturn:
    """Compile, send the file descriptors (or the error) and end without running any of the parent's clean-up."""
    try:
        os.dup2(noise, 1)
        os.dup2(noise, 2)
        try:
            fds = _load(credit, max_endpoints, source, maps)
            socket.send_fds(theirs, [b"done"], fds)
        except BaseException as error:
            theirs.send(f"{type(error).__name__}: {error}"[: _CHUNK - 100].splitlines()[0].encode()[:_CHUNK])
    finally:
        sys.stderr.flush()
        os._exit(0)


def _load(credit: int, max_endpoints: int, source: Path, maps: tuple[str, ...]) -> list[int]:
    with tempfile.TemporaryDirectory(prefix="lifl-bpf-") as directory:
        write_stub_headers(Path(directory))
        os.environ["BCC_KERNEL_SOURCE"] = directory
        from bcc import BPF, BPFAttachType, lib

        program = BPF(
            text=source.read_text(),
            cflags=[f"-DCREDIT={credit}ULL", f"-DMAX_ENDPOINTS={max_endpoints}"],
        )
        function = program.load_func("route", BPF.SK_MSG)
        fds = [int(lib.bpf_table_fd(program.module, name.encode())) for name in maps]
        program.attach_func(function, fds[0], BPFAttachType.SK_MSG_VERDICT)
    return fds

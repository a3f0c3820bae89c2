"""`func coordinator`."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click

from lifl.cli.common import CommandError, normalise_url, note, output_option, print_json, program
from lifl.cli.run import is_wildcard, parse_address
from lifl.errors import Unavailable
from lifl.logs import say
from lifl.process import SUPERVISOR_VARIABLE

DEFAULT_COORDINATOR = "127.0.0.1:7070"
DEFAULT_PEER_ADDRESS = "127.0.0.1:7071"
COORDINATOR_DIRECTORY = ".lifl-coordinator"

_MODULE = "lifl_gateway.coordinator"
"""Named, not imported: the runtime does not depend on the gateway."""
_START_SECONDS = 60.0
_STOP_SECONDS = 10.0
_QUICK_DEATH = 1.0
"""A process that lived for less than these seconds is started again only after a pause."""
_LONGEST_PAUSE = 5.0


@click.command("coordinator")
@click.option(
    "--address",
    metavar="HOST:PORT",
    default=DEFAULT_COORDINATOR,
    envvar="FUNC_COORDINATOR_ADDRESS",
    show_default=True,
    help="Where members and operators reach it; port 0: any.",
)
@click.option(
    "--peer-address",
    metavar="HOST:PORT",
    default=DEFAULT_PEER_ADDRESS,
    envvar="FUNC_COORDINATOR_PEER_ADDRESS",
    show_default=True,
    help="Where nodes fetch models that no other node has.",
)
@click.option(
    "--state-directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(COORDINATOR_DIRECTORY),
    envvar="FUNC_COORDINATOR_STATE_DIRECTORY",
    show_default=True,
    help="Where the journal and the checkpoints are kept.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    envvar="FUNC_TOKEN_FILE",
    help="Operators have to show the bearer token in this file.",
)
@click.option(
    "--member-token-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    envvar="FUNC_MEMBER_TOKEN_FILE",
    help="Members have to show the bearer token in this file.",
)
@click.option(
    "--peer-certificate",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    envvar="FUNC_PEER_CERTIFICATE",
    help="For TLS with nodes.",
)
@click.option(
    "--peer-key",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    envvar="FUNC_PEER_KEY",
    help="The certificate's key.",
)
@click.option(
    "--peer-authority",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    envvar="FUNC_PEER_AUTHORITY",
    help="What signs the nodes' certificates.",
)
@click.option(
    "--allow-anonymous",
    is_flag=True,
    envvar="FUNC_ALLOW_ANONYMOUS",
    help="Do without tokens even where other machines can connect.",
)
@click.option(
    "--lease",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    envvar="FUNC_LEASE",
    help="Silence after which a node counts as lost.",
)
@output_option
def command(
    address: str,
    peer_address: str,
    state_directory: Path,
    token_file: Path | None,
    member_token_file: Path | None,
    peer_certificate: Path | None,
    peer_key: Path | None,
    peer_authority: Path | None,
    allow_anonymous: bool,
    lease: float | None,
    output: str,
) -> None:
    """Run the coordinator of a cluster until Ctrl-C.

    It decides which node aggregates which updates, and keeps the journal of all rounds: started again at any
    moment it goes on with them. No model updates pass through it, so a small machine will do.

    \b
    Examples:
      func coordinator                                   # on this machine only
      func coordinator --address 10.0.0.1:7070 --peer-address 10.0.0.1:7071 \\
          --token-file token --member-token-file member-token
      func coordinator --peer-certificate node.pem --peer-key node.key --peer-authority authority.pem
      func coordinator --lease 10 -o json
    """
    parse_address(address, "--address")
    parse_address(peer_address, "--peer-address")
    options = {
        "address": address,
        "peer-address": peer_address,
        "state-directory": state_directory.absolute(),
        "token-file": token_file,
        "member-token-file": member_token_file,
        "peer-certificate": peer_certificate,
        "peer-key": peer_key,
        "peer-authority": peer_authority,
        "lease": lease,
    }
    process = _Process(options, ["--allow-anonymous"] if allow_anonymous else [])
    try:
        _start(process)
        _announce(process, output)
        _keep_running(process)
    finally:
        process.stop()


def _start(process: _Process) -> None:
    try:
        process.start()
    except Unavailable as error:
        hint = (f"{program()} coordinator --address 127.0.0.1:0 --peer-address 127.0.0.1:0", "on free ports")
        raise CommandError(str(error), [hint]) from None


def _announce(process: _Process, output: str) -> None:
    """Say where it listens, and how nodes join."""
    host, port = parse_address(process.options["address"])
    reached_at = f"{socket.gethostname()}:{port}" if is_wildcard(host) else process.options["address"]
    token, authority = process.options["member-token-file"], process.options["peer-authority"]
    words = f" --member-token-file {token}" if token else ""
    if authority:
        words += f" --peer-certificate FILE --peer-key FILE --peer-authority {authority}"
    note(f"Coordinator running on {process.options['address']}")
    note(f"Nodes join with: {program()} run --join {normalise_url(reached_at)}{words}")
    if output == "json":
        print_json({name.replace("-", "_"): process.options[name] for name in ("address", "peer-address")})


def _keep_running(process: _Process) -> NoReturn:
    """Start it again whenever it ends; its journal has all that it needs."""
    pause = 0.0
    while True:
        status, lived = process.wait()
        pause = min(_LONGEST_PAUSE, max(0.1, pause * 2)) if lived < _QUICK_DEATH else 0.0
        say("node", f"the coordinator ended (status {status}); starting it again")
        time.sleep(pause)
        try:
            process.start()
        except Unavailable as error:
            say("node", str(error))


class _Process:
    """The coordinator's process, which is started anew with the ports it had before."""

    def __init__(self, options: dict[str, Any], flags: list[str]) -> None:
        self.options = options
        """Without a leading `--`; None: not given."""
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def start(self) -> None:
        """Start it and wait until it listens; then the addresses in `options` are the real ones.

        Raises Unavailable if it ends before.
        """
        self.stop()
        words = [
            word for name, value in self.options.items() if value is not None for word in (f"--{name}", str(value))
        ]
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, *words, *self._flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=dict(os.environ, PYTHONUNBUFFERED="1", **{SUPERVISOR_VARIABLE: str(os.getpid())}),
            start_new_session=True,
        )
        ready = self._hear()
        for name in ("address", "peer-address"):
            self.options[name] = str(ready[name.replace("-", "_")]).removeprefix("http://").rstrip("/")

    def _hear(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        descriptor, line = self._process.stdout.fileno(), b""
        end = time.monotonic() + _START_SECONDS
        while not line.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                raise Unavailable(f"the coordinator was not ready within {_START_SECONDS:g} s")
            if not (piece := os.read(descriptor, 4096)):
                raise Unavailable(f"the coordinator did not start (exit status {self._process.wait()})")
            line += piece
        ready: dict[str, Any] = json.loads(line)
        return ready

    def wait(self) -> tuple[int, float]:
        """Wait for its end; returns the exit status and how many seconds it has lived."""
        assert self._process is not None
        return self._process.wait(), time.monotonic() - self._started

    def stop(self) -> None:
        """End it, by force if it takes too long."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

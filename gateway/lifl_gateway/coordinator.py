"""The coordinator of a cluster: `python -m lifl_gateway.coordinator --state-directory DIR`.

Prints one JSON line, {"address": "http://127.0.0.1:7070", "peer_address": "127.0.0.1:7071"}, on standard output
when it answers. SIGTERM ends it; killed at any moment, it goes on with the same rounds when it is started again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lifl.capabilities import drop_capabilities
from lifl.clock import clock_name
from lifl.cluster.checkpoints import CheckpointStore
from lifl.cluster.coordinator import LEASE_SECONDS, ClusterCoordinator
from lifl.cluster.journal import Journal
from lifl.cluster.service import ClusterService
from lifl.errors import InvalidInput, LiflError
from lifl.logs import configure_logging, say
from lifl.peer.connection import split_address
from lifl.peer.interruption import Interruption
from lifl.peer.security import OPEN, Credentials, is_loopback
from lifl.peer.server import PeerServer
from lifl.process import end_with_supervisor

from lifl_gateway.coordinator_app import CoordinatorParts, create_coordinator_app
from lifl_gateway.coordinator_peer import StoredModels, fetch_from_nodes
from lifl_gateway.server import GatewayServer, Limits
from lifl_gateway.tokens import Tokens

_CANNOT_START: Final = 2
_DRAIN_SECONDS: Final = 5.0
_JOURNAL_NAME: Final = "coordinator.db"
_CONNECTIONS: Final = 1024
_IDLE_SECONDS: Final = 600.0
"""A member has little to say while nothing happens, and shall not have to connect anew for it."""


@dataclass(frozen=True)
class CoordinatorOptions:
    """How a coordinator is to run."""

    state_directory: Path
    address: str = "127.0.0.1:7070"
    """HOST:PORT; port 0 takes a free one."""
    peer_address: str = "127.0.0.1:7071"
    tokens: Tokens = field(default_factory=Tokens)
    credentials: Credentials = OPEN
    """What members show, also to the peer address."""
    allow_anonymous: bool = False
    lease_seconds: float = LEASE_SECONDS
    limits: Limits = field(default_factory=lambda: Limits(connections=_CONNECTIONS, idle_seconds=_IDLE_SECONDS))
    most_model_bytes: int = 64 << 30


class CoordinatorProcess:
    """A whole coordinator. Constructing it reads the journal and binds both ports.

    Raises OSError or InvalidInput when that cannot be.
    """

    def __init__(self, options: CoordinatorOptions) -> None:
        options.state_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock_directory(options.state_directory)
        self._interruption = Interruption()
        self.has_failed = False
        """The journal could not be written; the process should end and be started anew."""
        host, port = split_address(options.peer_address)
        self._peers = PeerServer(
            host,
            port,
            StoredModels(lambda: self.service),
            credentials=options.credentials,
            allow_anonymous=options.allow_anonymous,
        )
        self.service = ClusterService(
            self._coordinator(options),
            CheckpointStore(options.state_directory),
            fetch_from_nodes(options.credentials, self._interruption, options.most_model_bytes),
            self._fail,
        )
        parts = CoordinatorParts(
            service=self.service,
            tokens=options.tokens,
            member_token=options.credentials.token,
            most_model_bytes=options.most_model_bytes,
            pace=options.limits.pace,
        )
        host, port = split_address(options.address)
        self.server = GatewayServer(host, port, create_coordinator_app(parts), limits=options.limits)

    def _coordinator(self, options: CoordinatorOptions) -> ClusterCoordinator:
        journal = Journal(options.state_directory / _JOURNAL_NAME, clock_name())
        return ClusterCoordinator(
            journal, time.monotonic(), own_address=self._peers.address, lease_seconds=options.lease_seconds
        )

    @property
    def addresses(self) -> dict[str, str]:
        """Where it listens."""
        return {"address": self.server.url, "peer_address": self._peers.address}

    def start(self) -> None:
        """Start the threads."""
        self.service.start()
        self._peers.start()

    def serve(self) -> None:
        """Serve HTTP until `stop`, then finish the requests in progress and let go of everything."""
        self.server.serve()
        self._interruption.set()
        self.service.release()
        self.server.drain(_DRAIN_SECONDS)
        self._peers.stop()
        self.service.stop()
        os.close(self._lock)

    def stop(self) -> None:
        """Make `serve` return; may be called in a signal handler."""
        self.server.stop()

    def _fail(self) -> None:
        self.has_failed = True
        self.server.stop()


def _lock_directory(directory: Path) -> int:
    """Keep a second coordinator from using the same journal; the kernel unlocks when this process ends."""
    import fcntl

    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise InvalidInput(f"{directory}: another coordinator uses this state directory") from error
    return fd


def main() -> int:
    """Run the process; returns its exit status."""
    end_with_supervisor()
    arguments = _parser().parse_args()
    configure_logging("coordinator", "coordinator: %(message)s", logging.WARNING)
    try:
        process = CoordinatorProcess(_options(arguments))
    except (LiflError, OSError) as error:
        say("coordinator", str(error))
        return _CANNOT_START
    drop_capabilities()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.stop())
    process.start()
    print(json.dumps(process.addresses), flush=True)
    process.serve()
    return 1 if process.has_failed else 0


def _options(arguments: argparse.Namespace) -> CoordinatorOptions:
    host, _ = split_address(arguments.address)
    has_tokens = arguments.token_file is not None and arguments.member_token_file is not None
    if not has_tokens and not arguments.allow_anonymous and not is_loopback(host):
        raise InvalidInput(
            f"{host} can be reached from other machines: give --token-file and --member-token-file, or "
            "--allow-anonymous if everyone who reaches it may use it"
        )
    if not arguments.lease > 0:
        raise InvalidInput("--lease: a number of seconds above 0")
    return CoordinatorOptions(
        state_directory=arguments.state_directory,
        address=arguments.address,
        peer_address=arguments.peer_address,
        tokens=Tokens.from_file(arguments.token_file) if arguments.token_file else Tokens(),
        credentials=Credentials.from_files(
            arguments.member_token_file,
            arguments.peer_certificate,
            arguments.peer_key,
            arguments.peer_authority,
        ),
        allow_anonymous=arguments.allow_anonymous,
        lease_seconds=arguments.lease,
        limits=Limits(connections=arguments.max_connections, idle_seconds=_IDLE_SECONDS),
        most_model_bytes=arguments.max_model_bytes,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lifl_gateway.coordinator", description="The coordinator of a cluster."
    )
    add = parser.add_argument
    add("--address", default="127.0.0.1:7070", help="HOST:PORT for members, clients and operators")
    add("--peer-address", default="127.0.0.1:7071", help="HOST:PORT where nodes fetch stored models")
    add("--state-directory", type=Path, required=True, help="where the journal and the models are kept")
    add("--token-file", type=Path, help="lines 'client-id token', '*' for an operator")
    add("--member-token-file", type=Path, help="the token that nodes of the cluster show")
    add("--peer-certificate", type=Path, help="PEM; with --peer-key and --peer-authority, TLS with nodes")
    add("--peer-key", type=Path)
    add("--peer-authority", type=Path)
    add("--allow-anonymous", action="store_true", help="listen beyond loopback without tokens")
    add("--lease", type=float, default=LEASE_SECONDS, help="silence in seconds after which a node is lost")
    add("--max-connections", type=int, default=_CONNECTIONS, help="two for each node, and those of clients")
    add("--max-model-bytes", type=int, default=64 << 30)
    return parser


if __name__ == "__main__":
    sys.exit(main())

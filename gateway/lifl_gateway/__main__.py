"""The gateway process: `python -m lifl_gateway --runtime-directory DIR --state-directory DIR`.

Prints one JSON line, {"address": "http://127.0.0.1:8080", "peer_address": "127.0.0.1:8090"}, on standard output
when it takes updates; the second is empty when other nodes cannot reach it.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Final

from lifl.agent_client import join
from lifl.capabilities import drop_capabilities
from lifl.errors import InvalidInput
from lifl.logs import configure_logging, say
from lifl.messages import Hello
from lifl.peer.security import Credentials, is_loopback
from lifl.process import end_with_supervisor

from lifl_gateway.gateway import Gateway, Options
from lifl_gateway.node_link import REJOIN_SECONDS
from lifl_gateway.peer_exchange import PeerOptions
from lifl_gateway.server import Limits
from lifl_gateway.tokens import Tokens
from lifl_gateway.transfer import Pace

_CANNOT_START: Final = 2


def main() -> int:
    """Run the process; returns its exit status."""
    end_with_supervisor()
    arguments = _parser().parse_args()
    configure_logging("gateway", "gateway: %(message)s", logging.WARNING)
    try:
        options = _options(arguments)
        agent = str(arguments.runtime_directory / "agent.sock")
        gateway = Gateway(options, partial(join, agent, Hello("gateway", seat=options.seat), keep_fds=True))
    except (InvalidInput, OSError) as error:
        say("gateway", str(error))
        return _CANNOT_START
    drop_capabilities()  # the port is bound, no thread is there yet, and the rest needs no privilege
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: gateway.stop())
    gateway.start()
    if gateway.wait_until_ready(REJOIN_SECONDS):
        print(json.dumps({"address": gateway.server.url, "peer_address": gateway.peers.address}), flush=True)
    elif not gateway.server.is_stopping:
        say("gateway", "the agent or the coordinator is not there")
        return 1
    gateway.serve()
    return 1 if gateway.has_failed else 0


def _options(arguments: argparse.Namespace) -> Options:
    tokens = Tokens.from_file(arguments.token_file) if arguments.token_file else Tokens()
    is_open = not arguments.token_file and not arguments.allow_anonymous
    if is_open and not is_loopback(arguments.host):
        raise InvalidInput(
            f"{arguments.host} can be reached from other machines: give --token-file, or --allow-anonymous "
            "if everyone who reaches it may use it"
        )
    if not 0 <= arguments.seat < arguments.seats:
        raise InvalidInput(f"seat {arguments.seat} is not one of {arguments.seats}")
    pace = Pace(arguments.pace_seconds, arguments.pace_bytes)
    limits = Limits(
        connections=arguments.max_connections,
        head_seconds=arguments.head_seconds,
        idle_seconds=arguments.idle_seconds,
        pace=pace,
        access_log=arguments.access_log,
    )
    return Options(
        runtime_directory=arguments.runtime_directory,
        state_directory=arguments.state_directory,
        host=arguments.host,
        port=arguments.port,
        seat=arguments.seat,
        seats=arguments.seats,
        limits=limits,
        most_model_bytes=arguments.max_model_bytes,
        tokens=tokens,
        peers=_peer_options(arguments, pace),
    )


def _peer_options(arguments: argparse.Namespace, pace: Pace) -> PeerOptions:
    credentials = Credentials.from_files(
        arguments.member_token_file,
        arguments.peer_certificate,
        arguments.peer_key,
        arguments.peer_authority,
    )
    return PeerOptions(arguments.peer_address, credentials, arguments.allow_anonymous, pace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lifl_gateway", description="The HTTP gateway of a node.")
    add = parser.add_argument
    limits = Limits()
    add("--runtime-directory", type=Path, required=True, help="where agent.sock and coordinator.sock are")
    add("--state-directory", type=Path, required=True, help="where the coordinator keeps models")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8080, help="0 takes a free one")
    add("--seat", type=int, default=0, help="which of the node's gateways this is")
    add("--seats", type=int, default=1, help="how many there are; they share the port")
    add(
        "--token-file", type=Path, help="lines 'client-id token', '*' for an operator; without it no one needs one"
    )
    add("--allow-anonymous", action="store_true", help="listen beyond loopback without tokens")
    add("--peer-address", default="", help="HOST:PORT for other nodes; without it this gateway only sends to them")
    add("--member-token-file", type=Path, help="the token that nodes of the cluster show each other")
    add("--peer-certificate", type=Path, help="PEM file: this node's certificate; then nodes use TLS")
    add("--peer-key", type=Path, help="PEM file: its key")
    add("--peer-authority", type=Path, help="PEM file: who signs the certificates of nodes")
    add("--max-connections", type=int, default=limits.connections)
    add("--head-seconds", type=float, default=limits.head_seconds, help="longest time for a request's head")
    add("--idle-seconds", type=float, default=limits.idle_seconds, help="longest silence between two requests")
    add("--pace-seconds", type=float, default=limits.pace.seconds, help="a body must make progress in this time")
    add("--pace-bytes", type=int, default=limits.pace.nbytes, help="least bytes of that progress")
    add("--max-model-bytes", type=int, default=64 << 30)
    add("--access-log", action="store_true", help="a line on standard error for each request")
    return parser


if __name__ == "__main__":
    sys.exit(main())

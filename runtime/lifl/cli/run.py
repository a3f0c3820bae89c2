"""`func run`."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Literal

import click

from lifl.cli.common import (
    DEFAULT_ADDRESS,
    STATE_DIRECTORY,
    CommandError,
    note,
    output_option,
    path_option,
    print_json,
    program,
    state_directory_option,
)
from lifl.errors import Unavailable


@click.command("run")
@path_option
@click.option(
    "--address",
    metavar="HOST:PORT",
    envvar="FUNC_ADDRESS",
    help=f"Where to listen; port 0: any. [default: {DEFAULT_ADDRESS}, or a free port if that is taken]",
)
@click.option(
    "--gateways",
    type=click.IntRange(1, 64),
    default=1,
    envvar="FUNC_GATEWAYS",
    show_default=True,
    help="Gateway processes that share the port.",
)
@click.option(
    "--data-plane",
    "--dataplane",
    type=click.Choice(["auto", "ebpf", "unix"]),
    default="auto",
    envvar="FUNC_DATA_PLANE",
    show_default=True,
    help="What carries descriptors: the kernel (needs CAP_BPF and CAP_NET_ADMIN) or UNIX sockets.",
)
@click.option(
    "--start",
    type=click.Choice(["fork", "spawn"]),
    default="fork",
    envvar="FUNC_START",
    show_default=True,
    help="How workers start: forked with the function loaded, or each a fresh interpreter (to compare).",
)
@state_directory_option
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    envvar="FUNC_TOKEN_FILE",
    help="Clients have to show the bearer token in this file.",
)
@click.option(
    "--allow-anonymous",
    is_flag=True,
    envvar="FUNC_ALLOW_ANONYMOUS",
    help="Accept clients without a token even where other machines can connect.",
)
@click.option("--access-log", is_flag=True, envvar="FUNC_ACCESS_LOG", help="Log every request on stderr.")
@output_option
def command(
    path: Path,
    address: str | None,
    gateways: int,
    data_plane: str,
    start: Literal["fork", "spawn"],
    state_directory: Path | None,
    token_file: Path | None,
    allow_anonymous: bool,
    access_log: bool,
    output: str,
) -> int:
    """Run the function project on this machine until Ctrl-C.

    Starts a node: agent, coordinator, gateways, and a zygote for each function in functions/. It needs no
    privileges; with CAP_BPF and CAP_NET_ADMIN the kernel routes between its processes.

    \b
    Examples:
      func run                                   # the project in this directory
      func run --path ~/my-project --address 127.0.0.1:0
      func run --data-plane unix                 # as without privileges
      func run --address 0.0.0.0:8080 --token-file token
      func run -o json                           # one line for programs: where it listens
    """
    from lifl.project import load_project

    project = load_project(path)
    for warning in project.warnings:
        note(f"Warning: {warning}")
    host, port = choose_address(address)

    from lifl.node import Node, NodeOptions

    node = Node(
        NodeOptions(
            functions=dict(project.functions),
            state_directory=(state_directory or project.directory / STATE_DIRECTORY).absolute(),
            host=host,
            port=port,
            gateways=gateways,
            data_plane=data_plane,
            default_function=project.function,
            token_file=token_file.absolute() if token_file else None,
            allow_anonymous=allow_anonymous,
            access_log=access_log,
            start=start,
        )
    )
    try:
        ready = node.start()  # stops by itself what it has started, if it fails
    except Unavailable as error:
        raise CommandError(
            f"the node did not come up: {error}", [(f"{program()} doctor", "what this machine lacks")]
        ) from None
    try:
        listening = ready.address.removeprefix("http://").rstrip("/")
        note(f"Function running on {listening}")
        chosen_because = f" ({ready.reason})" if data_plane == "auto" and ready.reason else ""
        note(f"Data plane: {ready.data_plane}{chosen_because}")
        if output == "json":
            actual_host, actual_port = parse_address(listening)
            print_json(
                {
                    "address": listening,
                    "host": actual_host,
                    "port": actual_port,
                    "data_plane": ready.data_plane,
                }
            )
        return node.wait()
    finally:
        node.stop()


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, with `[...]` around an IPv6 host. Raises CommandError."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise CommandError(
            f"the address '{address}' is not of the form HOST:PORT",
            [(f"{program()} run --address {DEFAULT_ADDRESS}", "on loopback only")],
        )
    return host, int(port)


def choose_address(address: str | None) -> tuple[str, int]:
    """Where to listen: the given address, which has to be free; else the default, or port 0 if that is taken."""
    host, port = parse_address(address or DEFAULT_ADDRESS)
    try:
        _probe(host, port)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        if address is None and taken:
            note(f"Port {port} is taken; using a free one")
            return host, 0
        cause = f"cannot listen on {address or DEFAULT_ADDRESS}: {error.strerror or error}"
        raise CommandError(cause, [(f"{program()} run", "let a free port be chosen")] if taken else []) from None
    return host, port


def _probe(host: str, port: int) -> None:
    """Bind as a server would, but without SO_REUSEPORT, so that another server's port counts as taken."""
    family, kind, protocol, _, target = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(target)
        probe.listen(1)

"""`func run`."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import click

from lifl.cli.common import (
    DEFAULT_ADDRESS,
    STATE_DIRECTORY,
    CommandError,
    command_path,
    normalise_url,
    note,
    output_option,
    path_option,
    print_json,
    program,
    state_directory_option,
)
from lifl.errors import Unavailable

if TYPE_CHECKING:
    from lifl.node import NodeOptions

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
_MEMBER_OPTIONS = (
    click.option("--join", metavar="URL", envvar="FUNC_JOIN", help="Be a member of this coordinator's cluster."),
    click.option("--name", envvar="FUNC_NODE_NAME", help="The node's name in the cluster. [default: the host's]"),
    click.option(
        "--advertise",
        metavar="URL",
        envvar="FUNC_ADVERTISE",
        help="Where clients and members reach its gateways. [default: the address]",
    ),
    click.option(
        "--peer-address",
        metavar="HOST:PORT",
        envvar="FUNC_PEER_ADDRESS",
        help="Where to listen for other nodes. [default: the address's host, any free port]",
    ),
    click.option(
        "--member-token-file", type=_FILE, envvar="FUNC_MEMBER_TOKEN_FILE", help="Token of the cluster's members."
    ),
    click.option("--peer-certificate", type=_FILE, envvar="FUNC_PEER_CERTIFICATE", help="For TLS between nodes."),
    click.option("--peer-key", type=_FILE, envvar="FUNC_PEER_KEY", help="The certificate's key."),
    click.option(
        "--peer-authority", type=_FILE, envvar="FUNC_PEER_AUTHORITY", help="What signs the nodes' certificates."
    ),
    click.option(
        "--capacity",
        type=click.FloatRange(min=0, min_open=True),
        envvar="FUNC_CAPACITY",
        help="MC: updates to aggregate at once. [default: as 'func node calibrate' found, else a guess]",
    ),
)


_GATEWAY_OPTIONS = (
    click.option(
        "--gateways",
        type=click.IntRange(1, 64),
        default=1,
        envvar="FUNC_GATEWAYS",
        show_default=True,
        help="Gateway processes that share the port.",
    ),
    click.option(
        "--token-file", type=_FILE, envvar="FUNC_TOKEN_FILE", help="Clients show the bearer token in this file."
    ),
    click.option(
        "--allow-anonymous",
        is_flag=True,
        envvar="FUNC_ALLOW_ANONYMOUS",
        help="Accept clients without a token even where other machines can connect.",
    ),
    click.option("--access-log", is_flag=True, envvar="FUNC_ACCESS_LOG", help="Log every request on stderr."),
)


def member_options(command: Any) -> Any:
    """The options of a member of a cluster; see `membership_of`."""
    for decorate in reversed(_MEMBER_OPTIONS):
        command = decorate(command)
    return command


def gateway_options(command: Any) -> Any:
    """`--gateways`, `--token-file`, `--allow-anonymous` and `--access-log`."""
    for decorate in reversed(_GATEWAY_OPTIONS):
        command = decorate(command)
    return command


@click.command("run")
@path_option
@click.option(
    "--address",
    metavar="HOST:PORT",
    envvar="FUNC_ADDRESS",
    help=f"Where to listen; port 0: any. [default: {DEFAULT_ADDRESS}, or a free port if that is taken]",
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
@gateway_options
@member_options
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
    **member: Any,
) -> int:
    """Run the function project on this machine until Ctrl-C.

    Starts a node: agent, coordinator, gateways, and a zygote for each function in functions/. It needs no
    privileges; with CAP_BPF and CAP_NET_ADMIN the kernel routes between its processes. With --join it is a member
    of a cluster; start the cluster's coordinator with 'func coordinator'.

    \b
    Examples:
      func run                                   # the project in this directory
      func run --path ~/my-project --address 127.0.0.1:0
      func run --data-plane unix                 # as without privileges
      func run --address 0.0.0.0:8080 --token-file token
      func run -o json                           # one line for programs: where it listens
      func run --join http://10.0.0.1:7070 --address 10.0.0.7:8080 --token-file token
    """
    from lifl.func_yaml.expressions import local_environment
    from lifl.project import load_project

    project = load_project(path)
    for warning in project.warnings:
        note(f"Warning: {warning}")
    # Every process of the node takes them from this one's environment.
    os.environ.update(local_environment(project.config.run.envs, os.environ))
    host, port = choose_address(address)
    membership = membership_of(member, host)

    from lifl.node import NodeOptions

    options = NodeOptions(
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
        **membership,
    )
    return run_node(options, output)


def run_node(options: NodeOptions, output: str) -> int:
    """Run a node until it is interrupted, and say where it listens; returns the exit code."""
    from lifl.node import Node

    node = Node(options)
    try:
        ready = node.start()  # stops by itself what it has started, if it fails
    except Unavailable as error:
        raise CommandError(
            f"the node did not come up: {error}", [(f"{program()} doctor", "what this machine lacks")]
        ) from None
    try:
        listening = ready.address.removeprefix("http://").rstrip("/")
        note(f"Function running on {listening}")
        chosen_because = f" ({ready.reason})" if options.data_plane == "auto" and ready.reason else ""
        note(f"Data plane: {ready.data_plane}{chosen_because}")
        if options.join:
            note(f"Node {options.name} of the cluster of {options.join}")
        if output == "json":
            actual_host, actual_port = parse_address(listening)
            document = {"address": listening, "host": actual_host, "port": actual_port}
            document |= {"data_plane": ready.data_plane}
            if options.join:
                document |= {"name": options.name, "peer_address": ready.peer_address}
            print_json(document)
        return node.wait()
    finally:
        node.stop()


def membership_of(member: dict[str, Any], host: str) -> dict[str, Any]:
    """The options of a member that were given, with defaults for the others; empty for a node on its own."""
    given = {name: value for name, value in member.items() if value is not None}
    if "join" not in given:
        for name in given:
            option = f"--{name.replace('_', '-')}"
            hint = (f"{program()} run --join http://HOST:7070 {option} ...", "name the cluster's coordinator")
            raise CommandError(f"{option} is for members of a cluster", [hint])
        return {}
    for name in ("join", "advertise"):
        if name in given:
            given[name] = normalise_url(given[name])
    if "peer_address" in given:
        parse_address(given["peer_address"], "--peer-address")
    if "advertise" not in given and is_wildcard(host):
        hint = (
            f"{program()} run --join {given['join']} --advertise http://HOST:PORT ...",
            "where others reach it",
        )
        raise CommandError(
            f"no one can connect to {host}, so the cluster cannot be told where the node is", [hint]
        )
    is_far = not _is_loopback(urlsplit(given["join"]).hostname or "")
    if "advertise" not in given and _is_loopback(host) and is_far:
        note(f"Warning: other machines cannot reach {host}; choose --address, or --advertise another one")
    for name, value in given.items():
        given[name] = value.absolute() if isinstance(value, Path) else value
    return {"name": socket.gethostname(), **given}


def is_wildcard(host: str) -> bool:
    """Whether a host stands for all addresses of a machine, so that no client can connect to it."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_address(address: str, option: str = "--address") -> tuple[str, int]:
    """Host and port of `HOST:PORT`, with `[...]` around an IPv6 host. Raises CommandError.

    `option` is what the user gave it as.
    """
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise CommandError(
            f"the address '{address}' is not of the form HOST:PORT",
            [(f"{command_path()} {option} {DEFAULT_ADDRESS}", "on loopback only")],
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

"""What the commands share: options, errors with hints, finding and asking the node."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import click

from lifl.errors import Busy, LiflError, ProtocolError, Refused, Unavailable

DEFAULT_ADDRESS = "127.0.0.1:8080"
STATE_DIRECTORY = ".lifl"
RUN_FILE = Path("run") / "node.json"
"""Below the state directory: where the node says what it listens on."""

_REPLY_LIMIT = 64 << 20
_Command = TypeVar("_Command", bound=Callable[..., Any])


class CommandError(LiflError):
    """A command cannot go on; `hints` are (command line, what it does) to try instead."""

    def __init__(self, message: str, hints: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.hints = tuple(hints)


def program() -> str:
    """The name this command line was called by."""
    context = click.get_current_context(silent=True)
    return (context.find_root().info_name if context else None) or "func"


def command_path() -> str:
    """The command that is being run, as it was called: program and verbs."""
    context = click.get_current_context(silent=True)
    return context.command_path if context else program()


def note(text: str) -> None:
    """Tell the user something that is not data: one line on stderr."""
    click.echo(text, err=True)


def print_json(value: object) -> None:
    """One JSON document on one line of stdout."""
    click.echo(json.dumps(value, default=str))


def print_yaml(value: object) -> None:
    """One YAML document on stdout, of mappings, lists and plain values."""
    from lifl.func_yaml.text import Style, render, tree_of

    click.echo(render(tree_of(value), Style()), nl=False)


# --- options -------------------------------------------------------------------------------------------------


@overload
def output_option(command: _Command, /) -> _Command: ...


@overload
def output_option(*formats: str) -> Callable[[_Command], _Command]: ...


def output_option(*arguments: Any) -> Any:
    """`-o human|json`, or other formats with the first as default, as `output`; used bare or with the formats."""
    if callable(arguments[0]):
        return output_option("human", "json")(arguments[0])
    return click.option(
        "-o",
        "--output",
        type=click.Choice(arguments),
        default=arguments[0],
        envvar="FUNC_OUTPUT",
        show_default=True,
        help="Format of what is printed on stdout.",
    )


def path_option(command: _Command) -> _Command:
    """`-p PATH`, the directory of the function project, as `path`."""
    return click.option(
        "-p",
        "--path",
        type=click.Path(path_type=Path),
        default=Path("."),
        envvar="FUNC_PATH",
        help="Directory of the function project. [default: this directory]",
    )(command)


def node_options(command: _Command) -> _Command:
    """`--url`, `--token-file`, `--path` and `--state-directory`: which node to ask; see `find_node`."""
    for decorate in (
        click.option(
            "--url", metavar="URL", envvar="FUNC_URL", help="Node, or coordinator. [default: the node run here]"
        ),
        click.option(
            "--token-file",
            type=click.Path(path_type=Path, dir_okay=False),
            envvar="FUNC_TOKEN_FILE",
            help="File with the bearer token that the node asks for.",
        ),
        path_option,
        state_directory_option,
    ):
        command = decorate(command)
    return command


def state_directory_option(command: _Command) -> _Command:
    """`--state-directory`, as `state_directory`; None stands for `.lifl` in the project."""
    return click.option(
        "--state-directory",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="FUNC_STATE_DIRECTORY",
        help="Where jobs, models and the run file are kept. [default: .lifl in the project]",
    )(command)


# --- the node ------------------------------------------------------------------------------------------------


def normalise_url(address: str) -> str:
    """`http://HOST:PORT` without a trailing slash, from that or from `HOST:PORT`."""
    url = address if "://" in address else f"http://{address}"
    return url.rstrip("/")


def find_node(url: str | None, path: Path, state_directory: Path | None) -> str:
    """URL of the node: `url`, else what a node running from this project wrote, else http://127.0.0.1:8080."""
    if url:
        return normalise_url(url)
    directory = path.parent if path.name == "func.yaml" else path
    address = read_run_file(state_directory or directory / STATE_DIRECTORY)
    return normalise_url(address or DEFAULT_ADDRESS)


def read_run_file(state_directory: Path) -> str | None:
    """Address of the node that runs on this state directory; None if none does."""
    try:
        content = json.loads((state_directory / RUN_FILE).read_bytes())
        address, pid = str(content["address"]), int(content["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        os.kill(pid, 0)
    except PermissionError:
        return address  # it runs, as another user
    except (OSError, OverflowError):
        return None
    return address


def read_token(token_file: Path | None) -> str | None:
    """The token in the file, or FUNC_TOKEN's, or None."""
    if token_file is None:
        return os.environ.get("FUNC_TOKEN") or None
    try:
        return token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"the token file '{token_file}' cannot be read: {error}") from None


def get_json(url: str, path: str, token: str | None = None, *, timeout_s: float = 10.0) -> Any:
    """The JSON document that the node at `url` has at `path`; raises as `request_json`."""
    return request_json("GET", url, path, token, timeout_s=timeout_s)


def request_json(
    method: str, url: str, path: str, token: str | None = None, body: object = None, *, timeout_s: float = 10.0
) -> Any:
    """Send a request, with `body` as JSON unless it is None; the JSON of the answer, or None if that is empty.

    Raises Unavailable if nobody answers, Refused (Busy) for an error of the node, ProtocolError if it is no node.
    """
    import http.client
    import urllib.error
    import urllib.request

    headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    if data is not None:
        headers["Content-Type"] = "application/json"
    try:
        request = urllib.request.Request(url + path, data, headers, method=method)  # noqa: S310 (the user's own URL)
    except ValueError:
        hint = (f"{program()} status --url http://{DEFAULT_ADDRESS}", "a URL has this form")
        raise CommandError(f"'{url}' is no URL", [hint]) from None
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:  # noqa: S310
            content = reply.read(_REPLY_LIMIT)
            return json.loads(content) if content else None
    except urllib.error.HTTPError as error:
        with error:
            raise refusal(error.code, error.read(_REPLY_LIMIT), error.headers.get("Retry-After")) from None
    except urllib.error.URLError as error:
        raise Unavailable(f"no node answers at {url}: {_reason(error.reason)}") from None
    except OSError as error:
        raise Unavailable(f"the node at {url} does not answer: {_reason(error)}") from None
    except (http.client.HTTPException, ValueError):
        raise ProtocolError(f"what answers at {url} is no LIFL node") from None


def _reason(error: object) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


def refusal(status: int, body: bytes, retry_after: str | None = None) -> Refused:
    """The error that an answer from 400 on stands for; its problem document says more (RFC 9457)."""
    title, detail = f"HTTP {status}", ""
    try:
        problem = json.loads(body)
        title, detail = str(problem.get("title") or title), str(problem.get("detail") or "")
    except (ValueError, AttributeError):
        pass
    if status == 503:
        try:
            return Busy(title, detail, retry_after=float(retry_after or 1))
        except ValueError:
            return Busy(title, detail)
    return Refused(status, title, detail)

"""The command line, installed as `func` and `lifl`, with the verbs and conventions of Knative's `func`.

Data goes to stdout, progress and errors to stderr. Exit codes: 0 done, 1 any error, wrong options included,
130 stopped by Ctrl-C or SIGTERM, 137 stopped by a second one. A command's module is imported when the command
is called, so that `func --help` costs click alone; modules of the commands import what is heavy inside functions.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from lifl.cli.common import CommandError
from lifl.errors import LiflError, MissingProject, Refused, Unavailable

SUMMARIES = {
    "create": "Create a function project",
    "build": "Build the container image of the function project",
    "run": "Run the function project on this machine",
    "deploy": "Deploy the function project to a Kubernetes cluster",
    "describe": "Describe a function in a cluster",
    "list": "List the functions in a cluster",
    "delete": "Delete a function from a cluster",
    "logs": "Show what a function's pods write",
    "coordinator": "Run the coordinator of a cluster",
    "invoke": "Send a model update to a job",
    "job": "Create, list, describe and cancel jobs",
    "status": "Show jobs and their rounds",
    "nodes": "Show the nodes of a cluster, and drain them",
    "node": "Measure this node, or run it without its agent",
    "platform": "Install LIFL in a Kubernetes cluster, look at it, remove it",
    "bench": "Compare LIFL with a message broker and with gRPC",
    "simulate": "Simulate the rounds of a cluster",
    "config": "Show and change the function's environment, labels and volumes",
    "subscribe": "Subscribe the function to the events of a broker",
    "languages": "List the languages of functions",
    "templates": "List the templates of 'func create'",
    "doctor": "Show what this machine can do, and what it cannot and why",
    "version": "Print the version",
    "completion": "Print a script that completes commands and options in a shell",
}
"""The commands, in the order in which they are listed, and what `--help` says of each."""

ALIASES = {"init": "create", "info": "describe", "desc": "describe", "ls": "list", "rm": "delete"}
"""Other names that Knative's func has for commands; they are not listed."""

_ELSEWHERE = {
    "build": "lifl_knative.commands.build",
    "deploy": "lifl_knative.commands.deploy",
    "describe": "lifl_knative.commands.describe",
    "list": "lifl_knative.commands.list",
    "delete": "lifl_knative.commands.delete",
    "logs": "lifl_knative.commands.logs",
    "platform": "lifl_knative.platform_command",
    "bench": "lifl_bench.command",
    "simulate": "lifl_bench.simulation.command",
}
"""Modules of commands that are not part of `lifl.cli`, which does not depend on them."""

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_KILLED = 137


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM; no KeyboardInterrupt, for which click prints an empty line."""


class _LazyGroup(click.Group):
    """A group that imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        cmd_name = ALIASES.get(cmd_name, cmd_name)
        if cmd_name not in SUMMARIES:
            return None
        module = _ELSEWHERE.get(cmd_name, f"lifl.cli.{cmd_name}")
        command: click.Command = importlib.import_module(module).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="For more on a command, run 'func COMMAND --help'.",
)
def cli() -> None:
    """LIFL aggregates the model updates of federated learning, as serverless functions.

    \b
    Examples:
      func run                                    # in a directory with a func.yaml
      func invoke --create --file model.safetensors
      func status
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return the exit code; prints errors itself."""
    name = os.path.basename(sys.argv[0])
    name = name if name in ("func", "lifl") else "func"
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            os._exit(EXIT_KILLED)
        interrupted = True
        raise _Interrupted

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = cli.main(
            args=None if arguments is None else list(arguments),
            prog_name=name,
            standalone_mode=False,
        )
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (click.Abort, _Interrupted):
        return EXIT_INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except BrokenPipeError:
        # Whoever read our output has had enough; the interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except (CommandError, click.ClickException, LiflError) as error:
        click.echo(render_error(error, name), err=True)
        return EXIT_ERROR
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def render_error(error: Exception, func: str = "func") -> str:
    """What the user reads: the error, and below it commands that may help; `func` is the program's name."""
    hints: list[tuple[str, str]] = []
    help_for = func
    if isinstance(error, CommandError):
        message, hints = str(error), list(error.hints)
    elif isinstance(error, click.UsageError):
        message = error.format_message()
        help_for = error.ctx.command_path if error.ctx else help_for
        hints = [(f"{help_for} --help", "the options, with examples")]
    elif isinstance(error, click.ClickException):
        message = error.format_message()
    else:
        message = str(error) or type(error).__name__
        hints = _hints_for(error, func)
    if not hints:
        return f"Error: {message}"
    width = max(len(command) for command, _ in hints)
    lines = "".join(f"\n  {command:<{width}}  # {comment}" for command, comment in hints)
    return f"Error: {message}\n\nTry this:{lines}\n\nFor more options, run '{help_for} --help'."


def _hints_for(error: Exception, func: str) -> list[tuple[str, str]]:
    match error:
        case Unavailable():
            return [
                (f"{func} run", "start a node on this machine"),
                (f"{func} status --url URL", "name the node to ask"),
            ]
        case Refused(status=404):
            return [(f"{func} status", "the jobs that exist")]
        case MissingProject():
            return [
                (f"{func} COMMAND --path DIRECTORY", "name the directory of the project"),
                (f"{func} create PATH", "make a new one"),
            ]
        case _:
            return []


def console_main() -> NoReturn:
    """`python -m lifl.cli`."""
    sys.exit(main())

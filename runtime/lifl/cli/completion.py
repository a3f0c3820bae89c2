"""`func completion`."""

from __future__ import annotations

import click

from lifl.cli.common import program

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print a script that completes commands and options in a shell.

    \b
    Examples:
      func completion bash                       # look at it
      source <(func completion bash)             # for this shell
      func completion fish > ~/.config/fish/completions/func.fish
    """
    from click.shell_completion import get_completion_class

    name = program()
    find = get_completion_class(shell)
    assert find is not None
    root = click.get_current_context().find_root().command
    click.echo(find(root, {}, name, f"_{name.upper()}_COMPLETE").source())

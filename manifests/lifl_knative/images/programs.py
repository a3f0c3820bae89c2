"""Running the programs that build images: what they say is kept for errors, and long ones are not silent."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from lifl.cli.common import note

STILL_AFTER_S = 10.0
"""Seconds between two signs of life."""


class ProgramFailed(Exception):
    """A program ended with an exit code other than 0; `output` is what it wrote, `code` the exit code."""

    def __init__(self, command: Sequence[str], code: int, output: str) -> None:
        super().__init__(f"{command[0]} ended with exit code {code}")
        self.command = tuple(command)
        self.code = code
        self.output = output

    def last_lines(self, count: int = 15) -> str:
        """The end of the output, which says why, each line indented."""
        lines = [line.rstrip() for line in self.output.splitlines() if line.strip()]
        return "\n".join(f"  {line}" for line in lines[-count:])


def run_program(
    command: Sequence[str],
    *,
    verbose: bool = False,
    still: str | None = None,
    environment: Mapping[str, str] | None = None,
    directory: str | None = None,
) -> str:
    """Run a program to its end and return what it wrote on stdout and stderr together.

    With `verbose` its lines are shown as they come. `still` is noted every ten seconds until it ends. When the
    wait is interrupted, the program is ended, too. Raises ProgramFailed, and FileNotFoundError if there is none.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=directory,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        show: Callable[[str], None] = (lambda line: note(line.rstrip("\n"))) if verbose else (lambda line: None)
        reader = threading.Thread(target=_read, args=(process.stdout, lines, show), daemon=True)
        reader.start()
        try:
            code = _wait(process, still)
            reader.join()
        except BaseException:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    output = "".join(lines)
    if code:
        raise ProgramFailed(command, code, output)
    return output


def _read(stream: IO[str], lines: list[str], show: Callable[[str], None]) -> None:
    for line in stream:
        lines.append(line)
        show(line)


def _wait(process: subprocess.Popen[str], still: str | None) -> int:
    while True:
        try:
            return process.wait(STILL_AFTER_S)
        except subprocess.TimeoutExpired:
            if still:
                note(still)

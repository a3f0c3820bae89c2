"""`.funcignore`: which files of a project stay out of its image, in the form of a `.gitignore`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lifl.errors import InvalidProject

FILE_NAME = ".funcignore"

ALWAYS_IGNORED = (
    ".git/",
    ".func/",
    ".lifl/",
    "__pycache__/",
    "*.py[co]",
    ".venv/",
    ".pytest_cache/",
    ".mypy_cache/",
    ".ruff_cache/",
    "*.egg-info/",
)
"""What no image needs; a later `!pattern` in the file takes one back."""

_SIZE_LIMIT = 1 << 20


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    is_negated: bool
    is_for_directories: bool


class IgnoreRules:
    """The rules of one file; the last that matches a path decides."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._rules = [rule for line in lines if (rule := _parse(line))]

    def ignores(self, path: str, *, is_directory: bool) -> bool:
        """Whether `path` (relative, with `/`) is left out, given that the directory it is in is not."""
        for rule in reversed(self._rules):
            if (is_directory or not rule.is_for_directories) and rule.pattern.fullmatch(path):
                return not rule.is_negated
        return False


def read_rules(directory: Path) -> IgnoreRules:
    """The rules of the project in `directory`, those that always hold included. Raises InvalidProject."""
    file = directory / FILE_NAME
    try:
        with file.open("rb") as stream:
            text = stream.read(_SIZE_LIMIT).decode()
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidProject(f"'{file}' cannot be read: {error}") from None
    return IgnoreRules([*ALWAYS_IGNORED, *text.splitlines()])


def _parse(line: str) -> _Rule | None:
    line = line.rstrip()
    if not line or line.startswith("#"):
        return None
    is_negated = line.startswith("!")
    line = line[1:] if is_negated else line
    line = line.removeprefix("\\")  # \# and \! stand for the characters themselves
    is_for_directories = line.endswith("/")
    line = line.rstrip("/")
    if not line:
        return None
    is_anchored = "/" in line
    regex = _translate(line.removeprefix("/"))
    return _Rule(re.compile(regex if is_anchored else f"(?:.*/)?{regex}"), is_negated, is_for_directories)


def _translate(pattern: str) -> str:
    """The regular expression of a pattern: `**` crosses directories, `*`, `?` and `[...]` do not."""
    regex = ""
    rest = pattern
    while rest:
        if rest.startswith("**/"):
            regex, rest = f"{regex}(?:.*/)?", rest[3:]
        elif rest.startswith("**"):
            regex, rest = f"{regex}.*", rest[2:]
        elif rest[0] == "*":
            regex, rest = f"{regex}[^/]*", rest[1:]
        elif rest[0] == "?":
            regex, rest = f"{regex}[^/]", rest[1:]
        elif match := re.match(r"\[(!?)([^]/]+)\]", rest):
            characters = match[2].replace("\\", "\\\\").replace("^", "\\^")
            regex, rest = f"{regex}[{'^/' if match[1] else ''}{characters}]", rest[match.end() :]
        elif rest[0] == "\\" and len(rest) > 1:
            regex, rest = f"{regex}{re.escape(rest[1])}", rest[2:]
        else:
            regex, rest = f"{regex}{re.escape(rest[0])}", rest[1:]
    return regex

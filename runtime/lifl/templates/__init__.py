"""What `func create` makes: a project that LIFL runs, and that Knative's func takes for one of its own.

The functions are those of the repository's `functions/`, which a wheel carries as `lifl/templates/functions`, and
one to start from. The files around them, in `project/`, are texts with `$names`.
"""

from __future__ import annotations

import keyword
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from string import Template

from lifl.errors import InvalidInput
from lifl.func_yaml.config import SPEC_VERSION

NAMES = ("fedavg", "fedadam", "median", "minimal")
"""The templates; the first is the default."""

_HERE = Path(__file__).parent
_MINIMAL = "minimal"
# Names that would hide what the function's file, or the package around it, needs.
_TAKEN = frozenset({"new", "handle", "aggregator"})
_TO_ALL = {
    "func.yaml": "func.yaml.in",
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    ".funcignore": "funcignore.in",
    ".gitignore": "gitignore.in",
    "function/__init__.py": "function.py.in",
    "tests/__init__.py": "tests/init.py.in",
    "tests/events.py": "tests/events.py.in",
    "tests/test_contract.py": "tests/test_contract.py.in",
}
_TO_STREAMING = {"tests/test_any_tree.py": "tests/test_any_tree.py.in"}
_TO_GATHERING = {"tests/test_any_order.py": "tests/test_any_order.py.in"}


@dataclass(frozen=True)
class _Function:
    """The text of a function's file under a new name."""

    text: str
    summary: str
    gather: bool


def function_stem(name: str) -> str:
    """Name of the Python file, and of the aggregator in it, in a project called `name`."""
    stem = name.replace("-", "_")
    return f"{stem}_function" if keyword.iskeyword(stem) or stem in _TAKEN else stem


def create_project(directory: Path, name: str, template: str, *, created: datetime | None = None) -> None:
    """Make the project `name` in `directory`, all of it or nothing.

    `directory` need not exist; if it does, it may hold hidden files only, none of which is replaced. `name` has to
    be a valid name of a function, and `template` one of NAMES. `created` is the time to write, now unless given.
    Raises InvalidInput if the directory is not free, and OSError if it cannot be written.
    """
    directory = directory.absolute()
    files = dict(_render(name, template, created or datetime.now(UTC)))
    _check_free(directory, files)
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    with tempfile.TemporaryDirectory(dir=existing, prefix=".func-create-") as temporary:
        for path, text in files.items():
            file = Path(temporary, path)
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        _move(Path(temporary), directory)


def _move(source: Path, target: Path) -> None:
    """Move what is in one directory to another, which is made if it does not exist; all of it or nothing."""
    made = [parent for parent in (target, *target.parents) if not parent.exists()]
    moved: list[Path] = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for entry in sorted(source.iterdir()):
            moved.append(entry.rename(target / entry.name))
    except BaseException:
        for entry in moved:
            entry.rename(source / entry.name)
        for directory in made:
            if directory.exists():
                directory.rmdir()
        raise


def _check_free(directory: Path, files: dict[str, str]) -> None:
    try:
        entries = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise InvalidInput(f"'{directory}' is no directory") from None
    if "func.yaml" in entries:
        raise InvalidInput(f"'{directory}' is a function project already: it has a func.yaml")
    ours = {path.partition("/")[0] for path in files}
    found = next((entry for entry in entries if entry in ours or not entry.startswith(".")), None)
    if found is not None:
        raise InvalidInput(f"the directory '{directory}' is not empty: it has '{found}'")


def _render(name: str, template: str, created: datetime) -> Iterator[tuple[str, str]]:
    """The files of a project: path and text."""
    stem = function_stem(name)
    function = _read_function(template, stem)
    values = {
        "name": name,
        "stem": stem,
        "template": template,
        "summary": function.summary,
        "created": created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "spec_version": SPEC_VERSION,
        "property": "the order in which updates come changes nothing"
        if function.gather
        else "whatever tree sums the updates up, the model is the same",
    }
    yield f"function/{stem}.py", function.text
    for path, source in (_TO_ALL | (_TO_GATHERING if function.gather else _TO_STREAMING)).items():
        text = (_HERE / "project" / source).read_text(encoding="utf-8")
        yield path, Template(text).substitute(values)


def _read_function(template: str, stem: str) -> _Function:
    text = _function_file(template).read_text(encoding="utf-8")
    decorated = re.search(rf"^@aggregator(?P<options>.*)\ndef (?P<name>{template})\(", text, re.MULTILINE)
    assert decorated is not None, f"the template {template} has no aggregator of its name"
    text = f"{text[: decorated.start('name')]}{stem}{text[decorated.end('name') :]}"
    summary = text.partition('"""')[2].partition("\n")[0]
    return _Function(text, summary, "gather=True" in decorated["options"])


def _function_file(template: str) -> Path:
    """Where a function is: in a wheel below this package, in a checkout at the top."""
    if template == _MINIMAL:
        return _HERE / "minimal.py"
    installed = _HERE / "functions" / f"{template}.py"
    return installed if installed.is_file() else _HERE.parents[2] / "functions" / f"{template}.py"

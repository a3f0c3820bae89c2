"""One func.yaml file: what it says, and edits that keep its comments, order and layout."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap, CommentedSeq

from lifl.errors import InvalidProject, MissingProject
from lifl.func_yaml import layout
from lifl.func_yaml.config import SPEC_VERSION, FunctionConfig
from lifl.func_yaml.migrations import Version, migrate
from lifl.func_yaml.reading import Findings, read_config
from lifl.func_yaml.text import InvalidYaml, is_null, line_of, parse, render, tree_of
from lifl.func_yaml.validation import problems_of

FILE_NAME = "func.yaml"

_SIZE_LIMIT = 1 << 20
_CURRENT: Version = (0, 36, 0)
_CREATION_STAMPED: Version = (0, 19, 0)
"""Files of before have no time of creation."""


class Document:
    """A func.yaml in memory.

    `config` says what it contains with all edits so far, `problems` why it cannot be used, and `warnings` what was
    ignored, each one sentence a line. Edits reach the file with `save`.
    """

    def __init__(self, file: Path) -> None:
        """Read the file; see `read`."""
        self.file = file
        """The path of func.yaml itself."""
        self._edits: list[Callable[[], None]] = []
        self._load()

    @classmethod
    def read(cls, path: Path) -> Document:
        """The func.yaml in the directory `path`, or the func.yaml `path`, whatever problems its content has.

        Raises InvalidProject if there is no such file, or if it is no YAML mapping.
        """
        return cls(path if path.name == FILE_NAME and not path.is_dir() else path / FILE_NAME)

    @classmethod
    def load(cls, path: Path) -> Document:
        """As `read`, but raises InvalidProject with every problem of the content, too."""
        document = cls.read(path)
        document.check()
        return document

    @property
    def directory(self) -> Path:
        """Absolute path of the project."""
        return self.file.parent.resolve()

    def check(self) -> None:
        """Raise InvalidProject with all problems, one on each line."""
        raise_for(self.file, self.problems)

    def line(self, field: str, key: str) -> int:
        """Line, from 1, of a key of a mapping such as `deploy.annotations`; 0 if it was not read from the file."""
        return line_of(self._find(field), key)

    # --- edits ---

    def set(self, field: str, value: str | bool | int | float | Mapping[str, Any] | list[Any]) -> None:
        """Give a field such as `deploy.namespace` a value; what is there already is replaced."""

        def edit() -> None:
            node = self._tree
            first, *others = field.split(".")
            while others and isinstance(node.get(first), CommentedMap) and node[first]:
                node, first, *others = node[first], *others
            whole: object = value
            for name in reversed(others):
                whole = {name: whole}
            self._put(node, first, tree_of(whole))

        self._edit(edit)

    def clear(self, field: str) -> None:
        """Take a field out, and the sections that hold nothing but it; nothing happens if it is not there."""

        def edit() -> None:
            path: list[tuple[CommentedMap, str]] = []
            node: Any = self._tree
            for name in field.split("."):
                if not isinstance(node, CommentedMap) or name not in node:
                    return
                path.append((node, name))
                node = node[name]
            while len(path) > 1 and len(path[-1][0]) == 1:
                path.pop()
            layout.remove(*path[-1])

        self._edit(edit)

    def append(self, field: str, item: Mapping[str, Any]) -> None:
        """Add an item to the end of a list such as `run.envs`, which is made if it is not there."""

        def edit() -> None:
            items = self._find(field)
            if isinstance(items, CommentedSeq) and items:
                layout.append(items, tree_of(item))
            else:
                self.set(field, [item])
                self._edits.pop()

        self._edit(edit)

    def update(self, field: str, match: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Give fields of the items of a list that equal `match` in its fields new values."""

        def edit() -> None:
            for item in self._items(field, match):
                for name, value in values.items():
                    layout.put(item, name, tree_of(value))

        self._edit(edit)

    def remove(self, field: str, match: Mapping[str, Any]) -> None:
        """Take the items that equal `match` in its fields out of a list; nothing happens if there are none."""

        def edit() -> None:
            items, matching = self._find(field), self._items(field, match)
            if matching and len(matching) == len(items):
                self.clear(field)
                self._edits.pop()
                return
            for item in matching:
                layout.remove(items, next(index for index, other in enumerate(items) if other is item))

        self._edit(edit)

    def save(self) -> bool:
        """Write the edits to the file, all or nothing; whether that changed it.

        If the file has changed since it was read, the edits are made to what it says now. Raises InvalidProject if
        the result would not be valid, or the file cannot be written.
        """
        if self._read_file() != self._original:
            self._load()
            for edit in self._edits:
                edit()
            self._examine()
        self.check()
        content = self._render()
        changed = bool(self._edits) and content != self._original
        if changed:
            try:
                write_atomically(self.file, content)
            except OSError as error:
                raise InvalidProject(f"'{self.file}' cannot be written: {error.strerror or error}") from None
            self._load()
        self._edits.clear()
        return changed

    # --- the tree ---

    def _edit(self, edit: Callable[[], None]) -> None:
        self._edits.append(edit)
        edit()
        self._examine()

    def _put(self, node: CommentedMap, name: str, value: Any) -> None:
        (layout.put_at_top if node is self._tree else layout.put)(node, name, value)

    def _find(self, field: str) -> Any:
        node: Any = self._tree
        for name in field.split("."):
            node = node.get(name) if isinstance(node, CommentedMap) else None
        return node

    def _items(self, field: str, match: Mapping[str, Any]) -> list[CommentedMap]:
        items = self._find(field)
        return [
            item
            for item in (items if isinstance(items, CommentedSeq) else ())
            if isinstance(item, CommentedMap) and all(item.get(name) == value for name, value in match.items())
        ]

    def _load(self) -> None:
        self._original = self._read_file()
        try:
            tree, self._style = parse(self._original)
        except InvalidYaml as error:
            raise InvalidProject(f"'{self.file}' is not valid YAML:\n\t{error}") from None
        if not isinstance(tree, CommentedMap):
            raise_for(self.file, ["it has to be a mapping with 'name', 'runtime' and so on"])
        self._tree: CommentedMap = tree
        self._found = Findings()
        self._migrate()
        self._examine()

    def _read_file(self) -> bytes:
        file = self.file
        try:
            with file.open("rb") as stream:
                data = stream.read(_SIZE_LIMIT + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingProject(f"no function project in '{file.parent}': there is no {FILE_NAME}") from None
        except OSError as error:
            raise InvalidProject(f"'{file}' cannot be read: {error.strerror}") from None
        if len(data) > _SIZE_LIMIT:
            raise InvalidProject(f"'{file}' is larger than {_SIZE_LIMIT} bytes, so it is hardly a {FILE_NAME}")
        return data

    def _migrate(self) -> None:
        """Bring a file of an earlier specVersion to ours, and say so."""
        written = self._tree.get("specVersion")
        if is_null(written):
            version: Version = (0, 0, 0)
            said = f"specVersion is missing, so the file is read as one of before 0.25 (now: {SPEC_VERSION})"
        else:
            match = re.fullmatch(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", str(written))
            if match is None:
                if isinstance(written, str):
                    self._found.problems.append(f"specVersion: '{written}' is no version; write '{SPEC_VERSION}'")
                return
            version = (int(match[1]), int(match[2]), int(match[3]))
            said = f"specVersion {written} is read as {SPEC_VERSION}"
        if version == _CURRENT:
            return
        self._found.warnings.append((0, said))
        if version < _CURRENT:
            migrate(self._tree, version)
            if version < _CREATION_STAMPED and is_null(self._tree.get("created")):
                stamp = datetime.fromtimestamp(self.file.stat().st_mtime, UTC)
                layout.put_at_top(self._tree, "created", stamp.strftime("%Y-%m-%dT%H:%M:%SZ"))
            layout.put_at_top(self._tree, "specVersion", SPEC_VERSION)

    def _examine(self) -> None:
        """Take `config`, `problems` and `warnings` from the tree as it is now."""
        found = Findings([*self._found.problems], [*self._found.warnings])
        config: FunctionConfig = read_config(self._tree, found)
        if config.created is None and not any(problem.startswith("created:") for problem in found.problems):
            found.problems.append("created: is missing; write the time, such as 'created: 2026-11-22T12:00:00Z'")
        wrong = {problem.partition(":")[0] for problem in found.problems}
        found.problems += [problem for problem in problems_of(config) if problem.partition(":")[0] not in wrong]
        found.warnings.sort(key=lambda warning: warning[0])
        self.config = replace(config, spec_version=SPEC_VERSION)
        self.problems = tuple(found.problems)
        self.warnings = tuple(f"line {line}: {text}" if line else text for line, text in found.warnings)

    def _render(self) -> bytes:
        text = render(self._tree, self._style)
        newline = "\r\n" if b"\r\n" in self._original else "\n"
        return text.replace("\n", newline).encode()


def raise_for(file: Path, problems: list[str] | tuple[str, ...]) -> None:
    """Raise InvalidProject that lists the problems of a file, unless there are none."""
    if problems:
        raise InvalidProject(f"'{file}' contains errors:" + "".join(f"\n\t{problem}" for problem in problems))


def write_atomically(file: Path, content: bytes) -> None:
    """Replace a file's content so that a reader, or a crash, sees the old or the new one; its mode stays."""
    target = file.resolve()
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, target.stat().st_mode & 0o7777)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise

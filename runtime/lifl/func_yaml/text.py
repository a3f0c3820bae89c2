"""Text of a func.yaml to a tree and back, so that what nobody changed stays as it was written.

Scalars are left as text: no `010` becomes 8, no time loses its nanoseconds, and whoever reads a field decides what
it is. Comments, order, quotes and the file's indentation stay.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, ScalarString

_WIDTH = 1 << 20
"""No line is folded."""
_MERGE = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
# What some reader of YAML 1.1 or 1.2 takes for something other than text when it is not quoted.
_NOT_TEXT = re.compile(
    r"(?i:|~|null|true|false|yes|no|on|off|y|n|[-+]?[0-9._][0-9a-fox_.:+eT Z-]*|[-+]?\.(inf|nan))|=|<<"
)


class _TextResolver(VersionedResolver):
    """Takes every plain scalar for text, apart from the key of a merge."""

    @property
    def versioned_resolver(self) -> Any:
        return _MERGE


class InvalidYaml(Exception):
    """The text is no YAML document; says where and why."""


@dataclass(frozen=True)
class Style:
    """How a file is laid out."""

    mapping: int = 2
    sequence: int = 2
    """From the parent's column to the content of an item."""
    dash: int = 0
    """From the parent's column to an item's dash."""
    explicit_start: bool = False


def parse(text: bytes) -> tuple[Any, Style]:
    """The tree of a document, and its style. Raises InvalidYaml."""
    try:
        tree = _yaml(Style()).load(text)
    except MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InvalidYaml(f"{place}{error.problem or error.context}") from None
    except (YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidYaml(cause[0]) from None
    return tree, _style(tree, text)


def render(tree: Any, style: Style) -> str:
    """The text of a tree."""
    stream = io.StringIO()
    _yaml(style).dump(tree, stream)
    return stream.getvalue()


def scalar(value: str) -> str:
    """Text as a scalar that every reader of YAML takes for text."""
    return DoubleQuotedScalarString(value) if _NOT_TEXT.fullmatch(value) else value


def bare(value: object) -> str:
    """A number, truth value or time as a scalar that is not quoted."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def tree_of(value: object) -> Any:
    """Plain values as a tree: text is quoted where it has to be, numbers and truth values are not."""
    if isinstance(value, Mapping):
        return CommentedMap({scalar(str(key)): tree_of(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return CommentedSeq([tree_of(item) for item in value])
    return scalar(value) if isinstance(value, str) else bare(value)


def is_null(node: object) -> bool:
    """Whether a node stands for nothing: a plain empty scalar, `~` or `null`."""
    return node is None or (isinstance(node, str) and not is_quoted(node) and node in _NULLS)


def is_quoted(node: object) -> bool:
    """Whether a scalar was written in quotes or as a block, and so is text whatever it looks like."""
    return isinstance(node, ScalarString)


def line_of(parent: Any, key: Any) -> int:
    """Line of a mapping's key or of a list's item, from 1; 0 for one that was not read from a file."""
    try:
        place = parent.lc.item(key) if isinstance(parent, CommentedSeq) else parent.lc.key(key)
        return int(place[0]) + 1
    except (AttributeError, KeyError, TypeError):
        return 0


def _yaml(style: Style) -> YAML:
    yaml = YAML(typ="rt")
    yaml.Resolver = _TextResolver
    yaml.preserve_quotes = True
    yaml.width = _WIDTH
    yaml.explicit_start = style.explicit_start
    yaml.indent(mapping=style.mapping, sequence=style.sequence, offset=style.dash)
    return yaml


def _style(tree: Any, text: bytes) -> Style:
    """The style of the first nested mapping and of the first list of a file."""
    mapping: int | None = None
    dash: int | None = None
    content = 2
    pending = [(tree, 0)]
    while pending:
        node, column = pending.pop(0)
        if not isinstance(node, CommentedMap) or node.fa.flow_style():
            continue
        for child in node.values():
            if not isinstance(child, CommentedMap | CommentedSeq) or child.fa.flow_style() or not child:
                continue
            if isinstance(child, CommentedMap):
                mapping = child.lc.col - column if mapping is None else mapping
                pending.append((child, child.lc.col))
            elif dash is None:
                dash = child.lc.col - column
                item = child[0]
                content = item.lc.col - child.lc.col if isinstance(item, CommentedMap) else 2
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(b"#"))
    explicit = next(lines, b"").startswith(b"---")
    dash = max(0, dash or 0)
    return Style(max(1, mapping or 2), dash + max(2, content), dash, explicit)

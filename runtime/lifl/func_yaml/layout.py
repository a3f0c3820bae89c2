"""Changes to a tree that leave every comment where its reader expects it.

ruamel.yaml hangs comment lines, and empty ones, on the value before them, though they speak of what follows. A
field that is added or removed behind such a value would tear them from it. So the lines after a value, here its
*tail*, go to whatever value comes to stand last before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import CommentMark
from ruamel.yaml.scalarstring import FoldedScalarString, LiteralScalarString
from ruamel.yaml.tokens import CommentToken

_Node = CommentedMap | CommentedSeq

_ORDER = (
    "specVersion",
    "name",
    "domain",
    "runtime",
    "registry",
    "registryInsecure",
    "image",
    "namespace",
    "deployer",
    "created",
    "invoke",
    "build",
    "run",
    "deploy",
)
"""In which order Knative's func writes the fields at the top."""


def put(node: CommentedMap, name: str, value: Any, order: Sequence[str] = ()) -> None:
    """Set a field; a new one comes behind those that precede it in `order`, or last."""
    if name in node:
        tail = _take_tail(node, name)
        node[name] = value
    else:
        before = [other for other in node if name in order and other in order[: order.index(name)]]
        position = list(node).index(before[-1]) + 1 if before else 0 if name in order else len(node)
        tail = _take_tail(node, list(node)[position - 1]) if position else ""
        node.insert(position, name, value)
    _give_tail(node, name, tail)


def put_at_top(tree: CommentedMap, name: str, value: Any) -> None:
    """Set a field of the file itself, where Knative's func would write it."""
    put(tree, name, value, _ORDER)


def append(items: CommentedSeq, item: Any) -> None:
    """Add an item to a list."""
    tail = _take_tail(items, len(items) - 1) if items else ""
    items.append(item)
    _give_tail(items, len(items) - 1, tail)


def remove(node: _Node, key: Any) -> None:
    """Take a field or an item out, with the comment on its own line."""
    tail = _before(node, key) + _take_tail(node, key)
    keys = _keys(node)
    place = keys.index(key)
    del node[key]
    if place:
        _give_tail(node, keys[place - 1], tail)
    elif tail and node:
        _put_before(node, tail)


def take_out(parent: CommentedMap, name: str) -> Any:
    """As `remove`, and return the value."""
    value = parent[name]
    remove(parent, name)
    return value


def _keys(node: _Node) -> list[Any]:
    return list(node) if isinstance(node, CommentedMap) else list(range(len(node)))


def _leaf(node: _Node, key: Any) -> tuple[_Node, Any]:
    """Where the last scalar of a value is: what comes after the value hangs on it."""
    value = node[key]
    while isinstance(value, _Node) and value and not value.fa.flow_style():
        node, key = value, _keys(value)[-1]
        value = node[key]
    return node, key


def _slot(node: _Node) -> int:
    return 2 if isinstance(node, CommentedMap) else 0


def _is_block(value: Any) -> bool:
    """Whether a scalar is a block, which has no comment on its own line."""
    return isinstance(value, LiteralScalarString | FoldedScalarString)


def _take_tail(node: _Node, key: Any) -> str:
    node, key = _leaf(node, key)
    tokens = node.ca.items.get(key)
    token = tokens[_slot(node)] if tokens else None
    if token is None:
        return ""
    if _is_block(node[key]):
        own, tail = "", token.value
    else:
        own, _, tail = token.value.partition("\n")
    if own:
        token.value = f"{own}\n"
    else:
        tokens[_slot(node)] = None
        if not any(tokens):
            del node.ca.items[key]
    return str(tail)


def _give_tail(node: _Node, key: Any, tail: str) -> None:
    if not tail:
        return
    node, key = _leaf(node, key)
    slot = _slot(node)
    tokens = node.ca.items.setdefault(key, [None, None, None, None])
    if tokens[slot] is not None:
        tokens[slot].value += tail
    else:
        text = tail if _is_block(node[key]) else f"\n{tail}"
        tokens[slot] = CommentToken(text, CommentMark(0), None)


def _before(node: _Node, key: Any) -> str:
    """What `_put_before` put before a field or item."""
    tokens = (node.ca.items.get(key) or [None, None])[1] or []
    return "".join(f"{' ' * token.column}{token.value}" for token in tokens)


def _put_before(node: _Node, tail: str) -> None:
    """Put comment lines before the first field or item of a node."""
    key = _keys(node)[0]
    tokens = node.ca.items.setdefault(key, [None, None, None, None])
    lines = [line for line in tail.splitlines() if line.strip()]
    before = [
        CommentToken(f"{line.strip()}\n", CommentMark(len(line) - len(line.lstrip())), None) for line in lines
    ]
    tokens[1] = [*before, *(tokens[1] or [])]

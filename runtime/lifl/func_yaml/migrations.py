"""Files of earlier specVersions: their fields are moved to where specVersion 0.36.0 has them.

Knative's func does the same when it reads such a file. The tree is changed in place, so that a file that is
written again is one of 0.36.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ruamel.yaml.comments import CommentedMap

from lifl.func_yaml import layout
from lifl.func_yaml.text import is_null

Version = tuple[int, int, int]

_MOVED = {
    "build": ("git", "builderImages", "buildpacks", "buildEnvs"),
    "run": ("envs", "volumes"),
    "deploy": ("namespace", "annotations", "options", "labels", "healthEndpoints"),
}


def migrate(tree: CommentedMap, version: Version) -> None:
    """Bring a file of `version` to 0.36.0; (0, 0, 0) stands for one that has no specVersion yet."""
    for since, step in _STEPS:
        if version < since:
            step(tree)


def _drop_version(tree: CommentedMap) -> None:
    """Before specVersion the field was called version; `builders` listed images to choose from."""
    _drop(tree, "version")
    _drop(tree, "builders")


def _name_builder_image(tree: CommentedMap) -> None:
    """`builder` was the image of the only builder there was."""
    image = _drop(tree, "builder")
    if is_null(image) or image == "":
        return
    if not isinstance(tree.get("builderImages"), CommentedMap):
        layout.put(tree, "builderImages", CommentedMap())
    tree["builderImages"].setdefault("pack", image)


def _make_sections(tree: CommentedMap) -> None:
    """All fields were at the top; `build` said where to build, which is no setting any more."""
    for section, fields in _MOVED.items():
        if section in tree and not isinstance(tree[section], CommentedMap):
            layout.remove(tree, section)
        for field in fields:
            _move(tree, field, section, field)
    _move(tree, "builder", "build", "builder")


def _flatten_invocation(tree: CommentedMap) -> None:
    invocation = _drop(tree, "invocation")
    form = invocation.get("format") if isinstance(invocation, CommentedMap) else None
    if not is_null(form) and "invoke" not in tree:
        layout.put_at_top(tree, "invoke", form)


def _spell_claim(tree: CommentedMap) -> None:
    """The field's name had a slip of the pen."""
    run = tree.get("run")
    volumes = run.get("volumes") if isinstance(run, CommentedMap) else None
    for volume in volumes if isinstance(volumes, list) else ():
        if isinstance(volume, CommentedMap) and "presistentVolumeClaim" in volume:
            layout.put(volume, "persistentVolumeClaim", layout.take_out(volume, "presistentVolumeClaim"))


def _drop(tree: CommentedMap, field: str) -> Any:
    return layout.take_out(tree, field) if field in tree else None


def _move(tree: CommentedMap, field: str, section: str, name: str) -> None:
    if field not in tree:
        return
    value: Any = layout.take_out(tree, field)
    if is_null(value) or value in ("", [], {}):
        return
    if section not in tree:
        layout.put_at_top(tree, section, CommentedMap())
    if name not in tree[section]:
        layout.put(tree[section], name, value)


_STEPS: tuple[tuple[Version, Callable[[CommentedMap], None]], ...] = (
    ((0, 23, 0), _name_builder_image),
    ((0, 25, 0), _drop_version),
    ((0, 34, 0), _make_sections),
    ((0, 35, 0), _flatten_invocation),
    ((0, 36, 0), _spell_claim),
)

"""Renders the project's own kustomizations, as `kubectl kustomize` would; kubectl need not be there.

It knows what the files in `manifests/` use and refuses everything else, so that nothing is quietly left out:
resources, components, labels, images (newName, newTag, digest), strategic merge patches from files, and
configMapGenerator without a hash in the name. Patches merge maps; lists of named things are merged by the key
that Kubernetes merges them by, other lists are replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lifl.errors import InvalidInput

Object = dict[str, Any]
Key = tuple[str, str, str, str]
"""apiVersion, kind, namespace, name."""

_FILE: Final = "kustomization.yaml"
_KINDS: Final = {
    "Kustomization": "kustomize.config.k8s.io/v1beta1",
    "Component": "kustomize.config.k8s.io/v1alpha1",
}
_KEYS: Final = frozenset(
    {"apiVersion", "kind", "resources", "components", "labels", "images", "patches", "configMapGenerator"}
)
_MERGE_KEYS: Final = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
}
_REPLACED: Final = frozenset({"args", "command", "tolerations"})
"""Lists of which a patch gives the whole; any other list in a patch is refused, for want of a rule."""
_TEMPLATES: Final = frozenset({"DaemonSet", "Deployment", "StatefulSet"})


class InvalidKustomization(InvalidInput):
    """A kustomization, or a file that it names, cannot be rendered; says which and why."""


def render(directory: Path, components: Sequence[Path] = ()) -> list[Object]:
    """The objects of the kustomization in `directory`, in the order of its files; `components` are added last.

    Raises `InvalidKustomization`.
    """
    objects = _accumulate(directory.resolve(), [])
    for component in components:
        objects = _accumulate(component.resolve(), objects)
    return objects


def key_of(obj: Mapping[str, Any]) -> Key:
    """What tells an object from all others of a cluster."""
    metadata = obj["metadata"]
    return obj["apiVersion"], obj["kind"], metadata.get("namespace", ""), metadata["name"]


def load_objects(file: Path) -> list[Object]:
    """The YAML documents of a file, each of which has to be a Kubernetes object. Raises `InvalidKustomization`."""
    objects = [document for document in _load_all(file) if document is not None]
    for obj in objects:
        is_object = isinstance(obj, dict) and isinstance(obj.get("metadata"), dict)
        if not is_object or not obj.get("apiVersion") or not obj.get("kind") or not obj["metadata"].get("name"):
            raise InvalidKustomization(f"{file}: a document in it is no object with apiVersion, kind and name")
    return objects


def _load_all(file: Path) -> list[Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        with file.open(encoding="utf-8") as content:
            return list(YAML(typ="safe", pure=True).load_all(content))
    except OSError as error:
        raise InvalidKustomization(f"{file}: {error.strerror}") from None
    except (UnicodeDecodeError, YAMLError) as error:
        raise InvalidKustomization(f"{file}: {error}") from None


def _accumulate(directory: Path, objects: list[Object]) -> list[Object]:
    """`objects` and those of this directory, after everything that its kustomization does to all of them."""
    file = directory / _FILE
    kustomization = _load_kustomization(file)
    if kustomization["kind"] == "Kustomization":
        objects, outer = [], objects
    else:
        outer = []
    objects = [*objects, *_resources(directory, kustomization.get("resources", ()))]
    for component in kustomization.get("components", ()):
        objects = _accumulate((directory / component).resolve(), objects)
    objects += [_config_map(file, entry) for entry in kustomization.get("configMapGenerator", ())]
    _check_unique(file, [*outer, *objects])
    for entry in kustomization.get("patches", ()):
        _require_keys(file, "patches", entry, {"path"})
        for patch in load_objects(directory / entry["path"]):
            _patch(directory / entry["path"], objects, patch)
    for entry in kustomization.get("labels", ()):
        _label(file, objects, entry)
    for entry in kustomization.get("images", ()):
        _set_image(file, objects, entry)
    return [*outer, *objects]


def _load_kustomization(file: Path) -> Object:
    documents = _load_all(file)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise InvalidKustomization(f"{file}: one kustomization is expected in it")
    kustomization: Object = documents[0]
    kind = kustomization.get("kind")
    if kind not in _KINDS or kustomization.get("apiVersion") != _KINDS[kind]:
        raise InvalidKustomization(f"{file}: kind has to be one of {', '.join(_KINDS)}, with its apiVersion")
    _require_keys(file, kind, kustomization, _KEYS)
    return kustomization


def _require_keys(file: Path, what: str, found: Any, known: Iterable[str]) -> None:
    if not isinstance(found, dict):
        raise InvalidKustomization(f"{file}: {what} is no mapping")
    if unknown := sorted(set(found) - set(known)):
        raise InvalidKustomization(f"{file}: {what} has {', '.join(unknown)}, which func cannot render")


def _resources(directory: Path, names: Iterable[str]) -> list[Object]:
    objects: list[Object] = []
    for name in names:
        path = (directory / name).resolve()
        objects += _accumulate(path, []) if path.is_dir() else load_objects(path)
    return objects


def _check_unique(file: Path, objects: Iterable[Object]) -> None:
    seen: set[Key] = set()
    for key in map(key_of, objects):
        if key in seen:
            raise InvalidKustomization(f"{file}: {key[1]} {key[3]} is there twice")
        seen.add(key)


# --- what is done to objects ---------------------------------------------------------------------------------


def _config_map(file: Path, entry: Any) -> Object:
    _require_keys(file, "configMapGenerator", entry, {"name", "namespace", "files", "options"})
    options = entry.get("options", {})
    _require_keys(file, "configMapGenerator options", options, {"disableNameSuffixHash", "labels"})
    if options.get("disableNameSuffixHash") is not True:
        raise InvalidKustomization(f"{file}: configMapGenerator needs disableNameSuffixHash: true")
    data: dict[str, str] = {}
    for source in entry.get("files", ()):
        name, _, path = source.rpartition("=")
        try:
            data[name or path] = (file.parent / path).read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidKustomization(f"{file.parent / path}: {error.strerror}") from None
    metadata: Object = {"name": entry["name"]}
    if "namespace" in entry:
        metadata["namespace"] = entry["namespace"]
    if "labels" in options:
        metadata["labels"] = dict(options["labels"])
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _patch(file: Path, objects: list[Object], patch: Object) -> None:
    wanted = key_of(patch)
    for index, obj in enumerate(objects):
        if key_of(obj) == wanted:
            objects[index] = _merge(file, obj, patch)
            return
    raise InvalidKustomization(f"{file}: there is no {wanted[1]} {wanted[3]} to patch")


def _merge(file: Path, base: Object, patch: Mapping[str, Any]) -> Object:
    """`base` with `patch` merged into it; None in a patch removes."""
    if directives := [name for name in patch if name.startswith("$")]:
        raise InvalidKustomization(f"{file}: {directives[0]} is a directive that func cannot render")
    merged = dict(base)
    for name, value in patch.items():
        before = merged.get(name)
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            merged[name] = _merge(file, before if isinstance(before, dict) else {}, value)
        elif isinstance(value, list) and name in _MERGE_KEYS:
            merged[name] = _merge_list(file, before or [], value, _MERGE_KEYS[name])
        elif isinstance(value, list) and name not in _REPLACED:
            raise InvalidKustomization(f"{file}: func has no rule for patching the list {name}")
        else:
            merged[name] = copy.deepcopy(value)
    return merged


def _merge_list(file: Path, base: Sequence[Object], patch: Sequence[Object], key: str) -> list[Object]:
    """The patch's items come first, in its order, as kustomize has it; then what it does not name."""
    before = {item[key]: item for item in base}
    for item in patch:
        if key not in item:
            raise InvalidKustomization(f"{file}: an item of a list that is merged by {key} has none")
    patched = [_merge(file, before.pop(item[key], {}), item) for item in patch]
    return [*patched, *before.values()]


def _label(file: Path, objects: Iterable[Object], entry: Any) -> None:
    _require_keys(file, "labels", entry, {"pairs", "includeTemplates"})
    pairs = entry["pairs"]
    for obj in objects:
        obj["metadata"] = _labelled(obj["metadata"], pairs)
        if entry.get("includeTemplates") and obj["kind"] in _TEMPLATES:
            spec = obj["spec"] = dict(obj["spec"])
            spec["template"] = {**spec["template"], "metadata": _labelled(spec["template"]["metadata"], pairs)}
            if "volumeClaimTemplates" in spec:
                claims = spec["volumeClaimTemplates"]
                spec["volumeClaimTemplates"] = [
                    {**claim, "metadata": _labelled(claim["metadata"], pairs)} for claim in claims
                ]


def _labelled(metadata: Mapping[str, Any], pairs: Mapping[str, str]) -> Object:
    return {**metadata, "labels": {**metadata.get("labels", {}), **pairs}}


def _set_image(file: Path, objects: Iterable[Object], entry: Any) -> None:
    _require_keys(file, "images", entry, {"name", "newName", "newTag", "digest"})
    name = entry["name"]
    replacement = entry.get("newName", name)
    if "digest" in entry:
        replacement += f"@{entry['digest']}"
    elif "newTag" in entry:
        replacement += f":{entry['newTag']}"
    replace_image(objects, name, replacement)


def replace_image(objects: Iterable[Object], name: str, image: str) -> None:
    """Have containers whose image is `name`, with whatever tag or digest, run `image` instead."""
    for obj in objects:
        if obj["kind"] in _TEMPLATES:
            for container in obj["spec"]["template"]["spec"]["containers"]:
                if image_name(container["image"]) == name:
                    container["image"] = image


def image_name(image: str) -> str:
    """An image's name without tag and digest."""
    name = image.partition("@")[0]
    head, colon, tag = name.rpartition(":")
    return head if colon and "/" not in tag else name

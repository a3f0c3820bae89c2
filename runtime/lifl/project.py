"""Reading a function project: the directory that holds a `func.yaml` and the `@aggregator` files beside it.

The file is knative/func's, specVersion 0.36.0, so that Knative's own tools read the same project. What only LIFL
needs stands in `deploy.annotations` under `lifl.dev/`, because those tools keep annotations when they write the
file. As with them, a field nobody knows is a warning. All that makes the project unusable is reported at once.
"""

from __future__ import annotations

import difflib
import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifl.errors import InvalidProject

FILE_NAME = "func.yaml"
SPEC_VERSION = "0.36.0"
ANNOTATION_PREFIX = "lifl.dev/"
FUNCTION_ANNOTATION = "lifl.dev/function"
"""Path of the project's own function, relative to `func.yaml`."""
FUNCTIONS_DIRECTORY = "functions"

_ANNOTATIONS = frozenset({FUNCTION_ANNOTATION})
_SIZE_LIMIT = 1 << 20

# The fields of func.yaml that exist; None: not looked into. A list stands for the fields of each of its items.
_ENVS: list[Any] = [{"name": None, "value": None}]
_MOUNT = {
    "path": None,
    "secret": None,
    "configMap": None,
    "persistentVolumeClaim": {"claimName": None, "readOnly": None},
    "emptyDir": {"medium": None, "sizeLimit": None},
}
_FIELDS: dict[str, Any] = {
    "specVersion": None,
    "name": None,
    "domain": None,
    "runtime": None,
    "registry": None,
    "registryInsecure": None,
    "image": None,
    "namespace": None,
    "deployer": None,
    "created": None,
    "invoke": None,
    "build": {
        "git": {"url": None, "revision": None, "contextDir": None},
        "builderImages": None,
        "buildpacks": None,
        "builder": None,
        "buildEnvs": _ENVS,
        "baseImage": None,
        "pvcSize": None,
        "remoteStorageClass": None,
        "volumes": [{"hostPath": None, "path": None}],
    },
    "run": {
        "volumes": [_MOUNT],
        "envs": _ENVS,
        "startTimeout": None,
        "kafka": {"brokers": None, "topic": None, "consumerGroup": None},
    },
    "deploy": {
        "namespace": None,
        "image": None,
        "annotations": None,
        "options": {
            "scale": {"min": None, "max": None, "metric": None, "target": None, "utilization": None},
            "resources": {
                "requests": {"cpu": None, "memory": None},
                "limits": {"cpu": None, "memory": None, "concurrency": None},
            },
        },
        "labels": [{"key": None, "value": None}],
        "healthEndpoints": {"liveness": None, "readiness": None},
        "serviceAccountName": None,
        "imagePullSecret": None,
        "deployer": None,
        "subscriptions": [{"source": None, "filters": None}],
        "managementDisabled": None,
    },
}


@dataclass(frozen=True)
class Project:
    """A project that can be run."""

    name: str
    """`name` of func.yaml: a DNS label."""
    directory: Path
    """Absolute path of the directory that holds func.yaml."""
    function_file: Path
    """Absolute path of the project's own function, the default of a new job."""
    functions: Mapping[str, Path]
    """Every function a job may name, with its file (absolute), in alphabetical order."""
    warnings: tuple[str, ...] = ()
    """What was ignored, one sentence each, for the user to read."""

    @property
    def function(self) -> str:
        """Name of the project's own function, a key of `functions`."""
        return self.function_file.stem


def load_project(path: Path) -> Project:
    """Read the project in the directory `path` (or that of the func.yaml `path`).

    Raises InvalidProject with every problem found, one on each line.
    """
    file = path if path.name == FILE_NAME and not path.is_dir() else path / FILE_NAME
    directory = file.parent.resolve()
    document = _parse(file)
    problems: list[str] = []
    warnings = [*_unknown_fields(document, _FIELDS, "")]
    name = _check_identity(document, problems, warnings)
    annotations = _annotations(document, problems, warnings)
    functions = _find_functions(directory, problems, warnings)
    function_file = _choose_function(directory, annotations.get(FUNCTION_ANNOTATION), name, functions, problems)
    if problems or function_file is None:
        lines = "".join(f"\n\t{problem}" for problem in problems)
        raise InvalidProject(f"'{file}' contains errors:{lines}")
    return Project(name, directory, function_file, dict(sorted(functions.items())), tuple(warnings))


def _parse(file: Path) -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        with file.open("rb") as stream:
            data = stream.read(_SIZE_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidProject(f"no function project in '{file.parent}': there is no {FILE_NAME}") from None
    except OSError as error:
        raise InvalidProject(f"'{file}' cannot be read: {error.strerror}") from None
    if len(data) > _SIZE_LIMIT:
        raise InvalidProject(f"'{file}' is larger than {_SIZE_LIMIT} bytes, so it is hardly a {FILE_NAME}")
    try:
        document = YAML(typ="rt").load(data)
    except MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InvalidProject(f"'{file}' is not valid YAML:\n\t{place}{error.problem or error.context}") from None
    except (YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidProject(f"'{file}' is not valid YAML:\n\t{cause[0]}") from None
    if not isinstance(document, Mapping):
        raise InvalidProject(
            f"'{file}' contains errors:\n\tit has to be a mapping with 'name', 'runtime' and so on"
        )
    return document


def _unknown_fields(node: Any, fields: Any, prefix: str) -> Iterator[str]:
    if isinstance(fields, list):
        for item in node if isinstance(node, list) else ():
            yield from _unknown_fields(item, fields[0], prefix)
    elif isinstance(fields, dict) and isinstance(node, Mapping):
        for key, value in node.items():
            if key in fields:
                yield from _unknown_fields(value, fields[key], f"{prefix}{key}.")
            else:
                yield f'line {_line(node, key)}: unknown field "{prefix}{key}" is ignored{_suggest(key, fields)}'


def _line(node: Any, key: Any) -> int:
    return int(node.lc.key(key)[0]) + 1


def _suggest(word: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _check_identity(document: Mapping[str, Any], problems: list[str], warnings: list[str]) -> str:
    version = document.get("specVersion")
    if version is None:
        problems.append(f"specVersion: is missing; write 'specVersion: {SPEC_VERSION}'")
    elif not re.fullmatch(r"\d+\.\d+\.\d+", str(version)):
        problems.append(f"specVersion: '{version}' is no version; write '{SPEC_VERSION}'")
    elif str(version) != SPEC_VERSION:
        warnings.append(f"specVersion {version} is read as {SPEC_VERSION}")

    name = document.get("name")
    if name is None:
        problems.append("name: is missing")
    elif not isinstance(name, str) or not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
        problems.append(
            f"name: '{name}' has to be at most 63 lower-case letters, digits and '-', starting with a letter"
        )

    runtime = document.get("runtime")
    if runtime != "python":
        said = "is missing" if runtime is None else f"'{runtime}' is not supported"
        problems.append(f"runtime: {said}; LIFL runs 'python'")

    created = document.get("created")
    if created is None:
        problems.append("created: is missing; write the time, such as 'created: 2026-11-22T12:00:00Z'")
    elif not hasattr(created, "year"):
        problems.append(f"created: '{created}' is no time, such as 2026-11-22T12:00:00Z")

    invoke = document.get("invoke")
    if invoke is None:
        warnings.append("invoke is not set; write 'invoke: cloudevent' so that Knative's tools send events too")
    elif invoke != "cloudevent":
        problems.append(f"invoke: '{invoke}' is not supported; an aggregator takes 'cloudevent'")
    return str(name)


def _annotations(document: Mapping[str, Any], problems: list[str], warnings: list[str]) -> dict[str, str]:
    deploy = document.get("deploy")
    if deploy is None:
        return {}
    if not isinstance(deploy, Mapping):
        problems.append("deploy: has to be a mapping")
        return {}
    annotations = deploy.get("annotations")
    if annotations is None:
        return {}
    if not isinstance(annotations, Mapping):
        problems.append("deploy.annotations: has to be a mapping")
        return {}
    ours: dict[str, str] = {}
    for key, value in annotations.items():
        if not isinstance(key, str) or not isinstance(value, str):
            problems.append(f"deploy.annotations: '{key}: {value}' has to be text; put it in quotes")
        elif key in _ANNOTATIONS:
            ours[key] = value
        elif key.startswith(ANNOTATION_PREFIX):
            line = _line(annotations, key)
            warnings.append(f'line {line}: unknown annotation "{key}" is ignored{_suggest(key, _ANNOTATIONS)}')
    return ours


def _find_functions(directory: Path, problems: list[str], warnings: list[str]) -> dict[str, Path]:
    """The files of functions/; one that starts with an underscore is a helper of the others."""
    functions: dict[str, Path] = {}
    try:
        files = sorted((directory / FUNCTIONS_DIRECTORY).glob("*.py"))
    except OSError as error:
        problems.append(f"{FUNCTIONS_DIRECTORY}: cannot be read: {error.strerror}")
        return functions
    for file in files:
        if file.name.startswith("_") or not file.is_file():
            continue
        if _is_function_name(file.stem):
            functions[file.stem] = file.resolve()
        else:
            warnings.append(f"{FUNCTIONS_DIRECTORY}/{file.name} is ignored: its name is no Python identifier")
    return functions


def _is_function_name(stem: str) -> bool:
    return stem.isascii() and stem.isidentifier() and not keyword.iskeyword(stem)


def _choose_function(
    directory: Path, annotation: str | None, name: str, functions: dict[str, Path], problems: list[str]
) -> Path | None:
    """The project's own function; one that lies outside of functions/ is added to `functions`."""
    if annotation is None:
        candidates = [name.replace("-", "_"), *(functions if len(functions) == 1 else ())]
        for candidate in candidates:
            if candidate in functions:
                return functions[candidate]
        choice = ", ".join(f"{FUNCTIONS_DIRECTORY}/{stem}.py" for stem in functions)
        problems.append(
            f"deploy.annotations: '{FUNCTION_ANNOTATION}' is missing; name one of {choice}"
            if functions
            else f"there is no function: write {FUNCTIONS_DIRECTORY}/{name.replace('-', '_')}.py"
        )
        return None

    where = f"deploy.annotations: {FUNCTION_ANNOTATION}:"
    file = (directory / annotation).resolve()
    if not file.is_relative_to(directory):
        problems.append(f"{where} '{annotation}' lies outside of the project")
    elif not file.is_file():
        problems.append(f"{where} there is no file '{annotation}'")
    elif file.suffix != ".py" or not _is_function_name(file.stem):
        problems.append(f"{where} '{annotation}' is no Python file whose name is an identifier")
    elif functions.setdefault(file.stem, file) != file:
        problems.append(f"{where} '{annotation}' has the name of {FUNCTIONS_DIRECTORY}/{file.name}; rename one")
    else:
        return file
    return None

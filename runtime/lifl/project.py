"""Reading a function project: the directory that holds a `func.yaml` and the `@aggregator` files beside it.

The file is knative/func's, specVersion 0.36.0, so that Knative's own tools read the same project. What only LIFL
needs stands in `deploy.annotations` under `lifl.dev/`, because those tools keep annotations when they write the
file. As with them, a field nobody knows is a warning. All that makes the project unusable is reported at once.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lifl.func_yaml.config import ANNOTATION_PREFIX, FUNCTION_ANNOTATION, ROUTE_ANNOTATION, FunctionConfig
from lifl.func_yaml.document import Document, raise_for
from lifl.func_yaml.reading import suggest

FUNCTIONS_DIRECTORY = "functions"

_ANNOTATIONS = frozenset({FUNCTION_ANNOTATION, ROUTE_ANNOTATION})


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
    config: FunctionConfig
    """All of func.yaml."""
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
    document = Document.read(path)
    config, directory = document.config, document.directory
    problems = [*document.problems]
    warnings = [*document.warnings]
    _check_runtime(config, problems, warnings)
    warnings.extend(_unknown_annotations(document))
    functions = _find_functions(directory, problems, warnings)
    name = config.name or "function"
    function_file = _choose_function(directory, config.function_path, name, functions, problems)
    raise_for(document.file, problems)
    assert function_file is not None
    return Project(name, directory, function_file, dict(sorted(functions.items())), config, tuple(warnings))


def _check_runtime(config: FunctionConfig, problems: list[str], warnings: list[str]) -> None:
    if config.runtime not in (None, "python"):
        problems.append(f"runtime: '{config.runtime}' is not supported; LIFL runs 'python'")
    if config.invoke is None:
        warnings.append("invoke is not set; write 'invoke: cloudevent' so that Knative's tools send events too")


def _unknown_annotations(document: Document) -> Iterator[str]:
    for key in document.config.deploy.annotations:
        if key.startswith(ANNOTATION_PREFIX) and key not in _ANNOTATIONS:
            line = document.line("deploy.annotations", key)
            yield f'line {line}: unknown annotation "{key}" is ignored{suggest(key, _ANNOTATIONS)}'


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

"""The Python packages that an image needs, installed on this machine for the Python of the image.

pip asks whatever indexes it is configured for. It takes the versions that LIFL runs with here, as long as the
project's own requirements permit them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from lifl.cli.common import CommandError, note, program
from lifl.errors import InvalidProject

from lifl_knative.images.archive import Archive
from lifl_knative.images.bytecode import compile_files
from lifl_knative.images.image_python import ImagePython
from lifl_knative.images.lifl_code import requirements_of_lifl
from lifl_knative.images.programs import ProgramFailed, run_program

_FORMAT = "1"
_NAME = re.compile(r"\s*([A-Za-z0-9][-A-Za-z0-9._]*)\s*(?:\[([^]]*)\])?")
_OLDEST_GLIBC = 17
_DROPPED_DIRECTORIES = frozenset({"tests", "__pycache__"})


@dataclass(frozen=True)
class Dependencies:
    """What pip is asked for."""

    requirements: tuple[str, ...]
    pins: tuple[str, ...]
    """Versions to take, for as many of the packages as run here."""
    local_files: tuple[tuple[str, str], ...] = ()
    """Files of the project that the requirements name, with the SHA-256 of each."""

    def key(self, python: ImagePython) -> str:
        """A hash of all that decides what is installed for this Python."""
        parts = [_FORMAT, repr(self), repr(python)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def canonical(name: str) -> str:
    """A package's name as packages are compared by (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    """The package that a requirement names, in canonical form; empty for a path or a URL."""
    match = _NAME.match(requirement)
    rest = requirement[match.end() :] if match else "/"
    return "" if match is None or rest[:1] in ("/", ":", "\\") else canonical(match[1])


def find_dependencies(
    extras: Sequence[str] = (), project: Path | None = None, *, without: Iterable[str] = ()
) -> Dependencies:
    """Those of LIFL with `extras` and of the project in a directory; packages in `without` are LIFL's own affair.

    Raises InvalidProject for a pyproject.toml or requirements.txt that cannot be read.
    """
    asked = list(_project_requirements(project)) if project else []
    more_extras = {extra for line in asked if requirement_name(line) == "lifl" for extra in _extras(line)}
    of_lifl = [
        requirement
        for requirement in requirements_of_lifl((*extras, *sorted(more_extras)))
        if requirement_name(requirement) not in without
    ]
    of_project = [requirement for requirement in asked if requirement_name(requirement) != "lifl"]
    requirements = tuple(sorted({*of_lifl, *of_project}))
    return Dependencies(requirements, tuple(_pins(requirements)), tuple(_hash_local(project, of_project)))


def _extras(requirement: str) -> list[str]:
    match = _NAME.match(requirement)
    return [extra.strip() for extra in (match[2] or "").split(",") if extra.strip()] if match else []


def _project_requirements(project: Path) -> Iterator[str]:
    file = project / "pyproject.toml"
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
        listed = document.get("project", {}).get("dependencies", [])
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise InvalidProject(f"'{file}': project.dependencies has to be a list of texts")
        yield from listed
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, InvalidProject):
            raise
        raise InvalidProject(f"'{file}' cannot be read: {error}") from None
    if (file := project / "requirements.txt").exists():
        yield from _read_requirements(file, 8)


def _read_requirements(file: Path, depth: int) -> Iterator[str]:
    """The lines of a requirements file, those of files that it includes too."""
    try:
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidProject(f"'{file}' cannot be read: {error}") from None
    for line in text.splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        included = re.fullmatch(r"(?:-r|--requirement)[ =]?\s*(\S+)", line)
        if included and depth:
            yield from _read_requirements(file.parent / included[1], depth - 1)
        elif line.startswith(("-e", "--editable")):
            raise InvalidProject(f"'{file}': '{line}' cannot be part of an image; name the package itself")
        elif line:
            yield line


def _hash_local(project: Path | None, requirements: Iterable[str]) -> Iterator[tuple[str, str]]:
    for requirement in requirements if project else ():
        words = requirement.split()
        path = words[1] if len(words) == 2 and words[0] in ("-c", "--constraint") else requirement
        if project and (file := project / path).is_file():
            yield path, hashlib.sha256(file.read_bytes()).hexdigest()


def _pins(requirements: Iterable[str]) -> list[str]:
    """`name==version` for all that the requirements need and that is installed here with LIFL."""
    prefix = Path(sys.prefix)
    installed: dict[str, Distribution] = {}
    for found in distributions():
        place = Path(str(found.locate_file("")))
        # Debian's own packages are patched, and an index may not have their versions.
        if place.is_relative_to(prefix) and not place.match("python3/dist-packages"):
            installed.setdefault(canonical(found.metadata["Name"] or ""), found)
    pins: dict[str, str] = {}
    todo = [requirement_name(requirement) for requirement in requirements]
    while todo:
        name = todo.pop()
        if name in pins or name == "lifl" or (package := installed.get(name)) is None:
            continue
        pins[name] = f"{name}=={package.version}"
        todo += [requirement_name(each) for each in package.requires or [] if "extra ==" not in each]
    return sorted(pins.values())


# --- installation --------------------------------------------------------------------------------------------


def install(
    dependencies: Dependencies,
    python: ImagePython,
    archive_file: Path,
    work: Path,
    *,
    project: Path | None = None,
    verbose: bool = False,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Install them into a tar archive; `work` is an empty directory for what is made meanwhile.

    `variables` are set for pip. Raises CommandError with the end of what pip says.
    """
    target = work / "packages"
    _run_pip(dependencies, python, target, work, project, verbose, variables or {})
    _prune(target)
    files = {
        f"{python.site_packages}/{file.relative_to(target).as_posix()}": file
        for file in sorted(target.rglob("*"))
        if file.is_file() or file.is_symlink()
    }
    if python.compiler:
        bytecode = work / "bytecode"
        bytecode.mkdir()
        files |= compile_files(python.compiler, python.cache_tag, files, bytecode)
    with Archive(archive_file) as archive:
        for path, file in files.items():
            archive.add_file(path, file)


def pip_command(python: ImagePython, target: Path, requirements: Path, constraints: Path | None) -> list[str]:
    """How pip is called. For another Python than this machine's own it may take wheels only."""
    command = [sys.executable, "-m", "pip", "install", "--target", str(target), "--no-compile"]
    command += ["--progress-bar", "off", "--disable-pip-version-check", "--no-warn-conflicts", "--no-input"]
    command += ["--requirement", str(requirements)]
    command += ["--constraint", str(constraints)] if constraints else []
    if python.is_local and sys.implementation.cache_tag == python.cache_tag:
        return command
    major, minor = python.version
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", f"{major}.{minor}"]
    for abi in (f"cp{major}{minor}", "abi3", "none"):
        command += ["--abi", abi]
    for glibc in range(python.glibc[1], _OLDEST_GLIBC - 1, -1):
        command += ["--platform", f"manylinux_2_{glibc}_{python.machine}"]
    for name in ("manylinux2014", "manylinux2010", "manylinux1", "linux"):
        command += ["--platform", f"{name}_{python.machine}"]
    return command


def _run_pip(
    dependencies: Dependencies,
    python: ImagePython,
    target: Path,
    work: Path,
    project: Path | None,
    verbose: bool,
    variables: Mapping[str, str],
) -> None:
    requirements, constraints = work / "requirements.txt", work / "constraints.txt"
    requirements.write_text("".join(f"{line}\n" for line in dependencies.requirements))
    constraints.write_text("".join(f"{line}\n" for line in dependencies.pins))
    environment = {**os.environ, **variables, "PIP_USER": "0"}

    def run(constraints: Path | None) -> None:
        run_program(
            pip_command(python, target, requirements, constraints),
            verbose=verbose,
            still="Still installing the function's Python packages",
            environment=environment,
            directory=str(project) if project else None,
        )

    try:
        try:
            run(constraints)
        except ProgramFailed as error:
            if not dependencies.pins or "ResolutionImpossible" not in error.output:
                raise
            note("Warning: the versions that LIFL runs with here do not go with the project's; pip chooses others")
            shutil.rmtree(target, ignore_errors=True)
            run(None)
    except ProgramFailed as error:
        raise CommandError(
            f"pip could not install what the image needs. It says:\n{_pip_errors(error)}",
            [
                (f"{program()} build --verbose", "see all that pip says"),
                (f"{sys.executable} -m pip config list", "the indexes that it asks"),
            ],
        ) from None
    except OSError as error:
        raise CommandError(f"pip could not be run: {error.strerror or error}", []) from None


def _pip_errors(error: ProgramFailed) -> str:
    """pip's own errors, without the warnings before them."""
    lines = [line.rstrip() for line in error.output.splitlines() if line.startswith("ERROR")]
    return "\n".join(f"  {line}" for line in lines[-10:]) or error.last_lines()


def _prune(target: Path) -> None:
    """Remove what no running function asks for: scripts, tests, and stubs for type checkers."""
    target.mkdir(exist_ok=True)
    shutil.rmtree(target / "bin", ignore_errors=True)
    for directory, names, files in os.walk(target):
        for name in list(names):
            is_inside_package = Path(directory, "__init__.py").exists()
            if name == "__pycache__" or (name in _DROPPED_DIRECTORIES and is_inside_package):
                shutil.rmtree(Path(directory, name))
                names.remove(name)
        for name in files:
            # A RECORD lists what pip wrote, and direct_url.json where from: of this machine, not the image.
            if name.endswith(".pyi") or (
                directory.endswith(".dist-info") and name in ("RECORD", "direct_url.json")
            ):
                Path(directory, name).unlink()

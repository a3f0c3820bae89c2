"""How the image of a function and that of a node are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lifl.cli.common import CommandError, note

from lifl_knative.images import dependencies
from lifl_knative.images.archive import Archive
from lifl_knative.images.base import Base, ensure_base
from lifl_knative.images.builders import Builder
from lifl_knative.images.bytecode import compile_files
from lifl_knative.images.debian import FUNCTION_USER, NODE_USER
from lifl_knative.images.ignore import FILE_NAME as IGNORE_FILE
from lifl_knative.images.image_python import ImagePython
from lifl_knative.images.layers import BUILD_LABEL, Layer, Layers, label_lines, variable_lines
from lifl_knative.images.lifl_code import FUNCTION_CODE, NODE_CODE, find_code, find_metadata
from lifl_knative.images.project_files import find_project_files, hash_files

if TYPE_CHECKING:
    from lifl.project import Project

FUNCTION_DIRECTORY = "/function"
"""Where the project lies in its image."""
NODE_IMAGE = "lifl-node"
"""Name of the node's image within its registry."""
STATE_DIRECTORY = "/var/lib/lifl"

_FORMAT = "1"
"""Changes when the same content is put together in another way."""
_ENVIRONMENT = {
    "HOME": "/tmp",  # noqa: S108 (in the image: the one directory that may be written)
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}
# func.yaml says how the image is built and deployed, and both write to it; the running function reads none of it.
_NOT_IN_IMAGE = frozenset({"func.yaml"})


@dataclass(frozen=True)
class BuildOptions:
    """What both recipes are told."""

    base_image: str | None = None
    platform: str | None = None
    insecure: bool = False
    """Whether a registry may be spoken to without TLS that can be checked."""
    force: bool = False
    """Whether an image that is up to date is built again."""
    variables: Mapping[str, str] | None = None
    """For pip and a Containerfile of the project: `build.buildEnvs`."""


@dataclass(frozen=True)
class BuiltImage:
    """An image that the builder has."""

    image: str
    id: str
    """SHA-256 of its configuration: the same content has the same one."""
    key: str
    """Hash of all that it was made of."""
    is_new: bool
    """False if it was there already and nothing had changed."""


def build_function_image(builder: Builder, project: Project, image: str, options: BuildOptions) -> BuiltImage:
    """Make the image of a function, unless it is there and nothing has changed.

    Raises CommandError, and InvalidProject for what is wrong with the project's files.
    """
    layers = Layers(builder, options.platform)
    files = find_project_files(project.directory)
    function = project.function_file.relative_to(project.directory).as_posix()
    if function not in files:
        raise CommandError(
            f"the function '{function}' would not be in the image, because {IGNORE_FILE} leaves it out",
            [(f"printf '!/{function}\\n' >> {IGNORE_FILE}", "keep it")],
        )
    files = {path: file for path, file in files.items() if path not in _NOT_IN_IMAGE}
    base = ensure_base(
        layers,
        options.base_image,
        insecure=options.insecure,
        project=project.directory,
        variables=options.variables,
    )
    wanted = dependencies.find_dependencies(["http"], project.directory)
    code = _Code(FUNCTION_CODE, base.python)
    lines = [
        *variable_lines({**_ENVIRONMENT, "USER": "function", "LIFL_FUNCTION": f"{FUNCTION_DIRECTORY}/{function}"}),
        *label_lines(
            {
                **_labels("function", base, code.version),
                "org.opencontainers.image.title": project.name,
                "dev.lifl.function": project.function,
            }
        ),
        "EXPOSE 8080",
        f"USER {FUNCTION_USER}:{FUNCTION_USER}",
        f"WORKDIR {FUNCTION_DIRECTORY}",
        'ENTRYPOINT ["python3", "-m", "lifl.function_pod"]',
    ]
    key = layers.key(_FORMAT, base.layer.id, wanted.key(base.python), code.key, hash_files(files), lines)
    if not options.force and (built := _find_built(builder, image, key)):
        return built

    packages = _dependencies_layer(layers, base, wanted, project.directory, options)
    runtime = layers.cached("lifl-runtime", layers.key(_FORMAT, packages.id, code.key), packages.image, code.write)

    def write(archive_file: Path, work: Path) -> None:
        with Archive(archive_file) as archive:
            archive.add_directory(FUNCTION_DIRECTORY)
            for path, file in files.items():
                archive.add_file(f"{FUNCTION_DIRECTORY}/{path}", file)

    made = layers.make(image, key, runtime.image, write, lines)
    return BuiltImage(image, made.id, key, is_new=True)


def build_node_image(builder: Builder, image: str, options: BuildOptions) -> BuiltImage:
    """Make the image of a node's processes, the coordinator and the autoscaler, unless it is up to date.

    Raises CommandError.
    """
    layers = Layers(builder, options.platform)
    base = ensure_base(layers, options.base_image, node=True, insecure=options.insecure)
    if not base.python.has_bcc:
        note(
            f"Warning: the base image {base.layer.image} has no bcc for its python3, so that agents of this image "
            "route through UNIX sockets instead of eBPF; Debian's package is python3-bpfcc"
        )
    # A node's processes fold nothing: the functions' do. llvmlite is two thirds of what they would not use.
    wanted = dependencies.find_dependencies(["knative"], without={"llvmlite"})
    code = _Code(NODE_CODE, base.python, commands=True)
    lines = [
        *variable_lines({**_ENVIRONMENT, "USER": "lifl"}),
        *label_lines(
            {
                **_labels("node", base, code.version),
                "org.opencontainers.image.title": NODE_IMAGE,
                "org.opencontainers.image.description": "Agent, gateway, coordinator and autoscaler of LIFL",
                "org.opencontainers.image.licenses": "Apache-2.0",
                "org.opencontainers.image.version": code.version,
            }
        ),
        f"USER {NODE_USER}:{NODE_USER}",
        "WORKDIR /",  # the agent, root without CAP_DAC_OVERRIDE, could not be where only the node's user may be
        'CMD ["func", "--help"]',
    ]
    key = layers.key(_FORMAT, base.layer.id, wanted.key(base.python), code.key, lines)
    if not options.force and (built := _find_built(builder, image, key)):
        return built
    packages = _dependencies_layer(layers, base, wanted, None, options)
    made = layers.make(image, key, packages.image, code.write, lines)
    return BuiltImage(image, made.id, key, is_new=True)


def default_node_image(registry: str | None) -> str:
    """What the node's image is called: `REGISTRY/lifl-node:VERSION`, on this machine alone without a registry."""
    return f"{(registry or 'localhost').rstrip('/')}/{NODE_IMAGE}:{find_metadata()[0]}"


def _find_built(builder: Builder, image: str, key: str) -> BuiltImage | None:
    facts = builder.inspect(image)
    if facts is None or facts.labels.get(BUILD_LABEL) != key:
        return None
    return BuiltImage(image, facts.id, key, is_new=False)


def _labels(kind: str, base: Base, version: str) -> dict[str, str]:
    return {
        "org.opencontainers.image.base.name": base.layer.image,
        "dev.lifl.image": kind,
        "dev.lifl.version": version,
        "dev.lifl.python": ".".join(map(str, base.python.version)),
    }


def _dependencies_layer(
    layers: Layers,
    base: Base,
    wanted: dependencies.Dependencies,
    project: Path | None,
    options: BuildOptions,
) -> Layer:
    def write(archive: Path, work: Path) -> None:
        dependencies.install(
            wanted,
            base.python,
            archive,
            work,
            project=project,
            verbose=layers.builder.verbose,
            variables=options.variables,
        )

    key = layers.key(_FORMAT, base.layer.id, wanted.key(base.python))
    return layers.cached("lifl-dependencies", key, base.layer.image, write)


class _Code:
    """LIFL itself as a layer."""

    def __init__(self, packages: Sequence[str], python: ImagePython, *, commands: bool = False) -> None:
        self._python = python
        self._files = find_code(packages, python.site_packages)
        self._commands = ("func", "lifl") if commands else ()
        self.version, self._metadata = find_metadata()
        self.key = f"{hash_files(self._files)} {self._metadata} {self._commands} {python}"

    def write(self, archive_file: Path, work: Path) -> None:
        """Write the layer to the archive."""
        python = self._python
        with Archive(archive_file) as archive:
            for path, file in self._files.items():
                archive.add_file(path, file)
            if python.compiler:
                for path, file in compile_files(python.compiler, python.cache_tag, self._files, work).items():
                    archive.add_file(path, file)
            archive.add_bytes(
                f"{python.site_packages}/lifl-{self.version}.dist-info/METADATA", self._metadata.encode()
            )
            script = f"#!{python.executable}\nimport sys\n\nfrom lifl.cli import main\n\nsys.exit(main())\n"
            for name in self._commands:
                archive.add_bytes(f"/usr/local/bin/{name}", script.encode(), 0o755)
            if self._commands:
                archive.add_directory(STATE_DIRECTORY, 0o750, owner=NODE_USER)

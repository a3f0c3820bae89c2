"""The programs that build images: podman, buildah and docker, each with its own command lines."""

from __future__ import annotations

import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lifl.cli.common import CommandError, program

from lifl_knative.images.archive import source_date
from lifl_knative.images.programs import ProgramFailed, run_program

_UNREACHABLE = ("no such host", "connection refused", "timeout", "unreachable")
# The label that is left out names the builder's version.
_FIXED = ["--layers=false", "--format=oci", "--pull=never", "--identity-label=false"]

LOCAL_PACKAGES = "debian-packages"
"""As the name of a base image: one made of Debian packages that this machine has."""


@dataclass(frozen=True)
class ImageFacts:
    """What a builder knows of an image it has."""

    id: str
    """SHA-256 of the image's configuration, hexadecimal: the same for the same content."""
    layers: tuple[str, ...]
    """Digests of the layers, the base's first."""
    labels: Mapping[str, str] = field(default_factory=dict)


class Builder(ABC):
    """One program; the methods that end in `_command` say how it is called, the others call it."""

    program: ClassVar[str]

    def __init__(self, *, verbose: bool = False) -> None:
        self.verbose = verbose

    # --- command lines ---

    def build_command(
        self,
        context: Path,
        image: str,
        *,
        containerfile: Path | None = None,
        platform: str | None = None,
        network: str | None = "none",
        arguments: Mapping[str, str] | None = None,
        is_own: bool = True,
    ) -> list[str]:
        """How an image is built from the Containerfile in the directory `context`, or another one.

        Our own Containerfiles (`is_own`) make one layer of files that are fixed, on an image that is there; those
        of others may ask registries, and the builder caches their steps.
        """
        file = containerfile or context / "Containerfile"
        command = [self.program, "build", "--tag", image, "--file", str(file)]
        command += self._reproducible() if is_own else self._layered()
        if platform:
            command += ["--platform", platform]
        if network:
            command += ["--network", network]
        for name, value in (arguments or {}).items():
            command += ["--build-arg", f"{name}={value}"]
        return [*command, str(context)]

    @abstractmethod
    def _reproducible(self) -> list[str]:
        """Options that make the same image of the same content, as one layer."""

    def _layered(self) -> list[str]:
        """Options that make a layer of each step and keep it for the next build."""
        return ["--layers", "--format=oci"]

    def pull_command(self, image: str, platform: str | None, *, insecure: bool) -> list[str]:
        """How an image is got from its registry."""
        command = [self.program, "pull", "--quiet"]
        command += ["--platform", platform] if platform else []
        return [*command, *self._registry_options(insecure), image]

    def push_command(self, image: str, digest_file: Path, *, insecure: bool) -> list[str]:
        """How an image is sent to its registry; its digest goes to the file."""
        return [
            self.program,
            "push",
            "--digestfile",
            str(digest_file),
            *self._registry_options(insecure),
            image,
        ]

    def _registry_options(self, insecure: bool) -> list[str]:
        return ["--tls-verify=false"] if insecure else []

    def inspect_command(self, image: str) -> list[str]:
        """How an image is described, in JSON."""
        return [self.program, "image", "inspect", image]

    def python_command(self, image: str, code: str, platform: str | None) -> list[str]:
        """How the Python of an image runs some code without network."""
        platforms = ["--platform", platform] if platform else []
        options = ["run", "--rm", "--network", "none", *platforms, "--entrypoint", "python3"]
        return [self.program, *options, image, "-I", "-c", code]

    # --- calls ---

    def build(self, context: Path, image: str, **options: Any) -> None:
        """Build an image, see `build_command`. Raises CommandError with the end of what the program said."""
        try:
            self._run(self.build_command(context, image, **options), still="Still building")
        except ProgramFailed as error:
            raise self.explain(error, f"the image {image} could not be built") from None

    def inspect(self, image: str) -> ImageFacts | None:
        """What is known of an image on this machine; None if it is not there."""
        try:
            output = run_program(self.inspect_command(image))
        except ProgramFailed:
            return None
        return self._facts(json.loads(output))

    def _facts(self, document: Any) -> ImageFacts:
        image = document[0]
        return ImageFacts(
            image["Id"].removeprefix("sha256:"),
            tuple(image["RootFS"]["Layers"]),
            (image.get("Config") or {}).get("Labels") or {},
        )

    def pull(self, image: str, platform: str | None = None, *, insecure: bool = False) -> None:
        """Get an image from its registry. Raises CommandError."""
        try:
            self._run(self.pull_command(image, platform, insecure=insecure), still="Still pulling")
        except ProgramFailed as error:
            raise self.explain(error, f"the base image {image} could not be pulled") from None

    def push(self, image: str, *, insecure: bool = False) -> str:
        """Send an image to its registry; returns its digest there, `sha256:...`. Raises CommandError."""
        with tempfile.TemporaryDirectory(prefix="lifl-push-") as directory:
            file = Path(directory, "digest")
            try:
                output = self._run(self.push_command(image, file, insecure=insecure), still="Still pushing")
            except ProgramFailed as error:
                raise self.explain(error, f"the image {image} could not be pushed") from None
            return self._pushed_digest(file, output)

    def _pushed_digest(self, file: Path, output: str) -> str:
        return file.read_text().strip()

    def run_python(self, image: str, code: str, platform: str | None = None) -> str:
        """What some code prints with the Python of an image. Raises ProgramFailed."""
        return run_program(self.python_command(image, code, platform))

    def _run(self, command: Sequence[str], still: str) -> str:
        return run_program(command, verbose=self.verbose, still=still)

    def explain(self, error: ProgramFailed, what: str) -> CommandError:
        """The error that a user sees: what failed, the end of the program's output, and what may help."""
        output = error.output.lower()
        func = program()
        hints: list[tuple[str, str]] = []
        if "no space left on device" in output:
            what += ": no space is left on the disk"
            prune = "rmi --prune" if self.program == "buildah" else "system prune"
            hints.append((f"{self.program} {prune}", "remove images that have no name"))
            hints.append((f"TMPDIR=/another/disk {func} build", "put what is built together elsewhere"))
        elif any(word in output for word in ("unauthorized", "authentication required", "denied")):
            hints.append((f"{self.program} login REGISTRY", "the registry asks who you are"))
        elif any(word in output for word in ("http response to https client", "tls: first record", "x509")):
            hints.append((f"{func} build --registry-insecure", "nothing here vouches for the registry"))
        elif error.command[1] != "push" and any(word in output for word in _UNREACHABLE):
            hints.append((f"{func} build --base-image {LOCAL_PACKAGES}", "a base that needs no registry"))
        if not self.verbose:
            hints.append((f"{func} build --verbose", f"see all that {self.program} says"))
        return CommandError(f"{what}. {self.program} says:\n{error.last_lines()}", hints)


class Podman(Builder):
    """podman, which also runs images."""

    program = "podman"

    def _reproducible(self) -> list[str]:
        return [*_FIXED, "--timestamp", str(source_date())]


class Buildah(Builder):
    """buildah, which shares its images with podman."""

    program = "buildah"

    def _reproducible(self) -> list[str]:
        return [*_FIXED, "--timestamp", str(source_date())]

    def inspect_command(self, image: str) -> list[str]:
        return [self.program, "inspect", "--type", "image", image]

    def _facts(self, document: Any) -> ImageFacts:
        image = document["OCIv1"]
        layers = tuple(image["rootfs"]["diff_ids"])
        return ImageFacts(document["FromImageID"], layers, image["config"].get("Labels") or {})

    def run_python(self, image: str, code: str, platform: str | None = None) -> str:
        """What some code prints with the Python of an image: a working container is made and removed."""
        platforms = ["--platform", platform] if platform else []
        container = run_program([self.program, "from", "--pull=never", *platforms, image]).split()[-1]
        try:
            command = [self.program, "run", "--network", "none", container, "--", "python3", "-I", "-c", code]
            return run_program(command)
        finally:
            run_program([self.program, "rm", container])


class Docker(Builder):
    """docker, whose daemon builds."""

    program = "docker"

    def _reproducible(self) -> list[str]:
        return ["--build-arg", f"SOURCE_DATE_EPOCH={source_date()}"]

    def _layered(self) -> list[str]:
        return []

    def push_command(self, image: str, digest_file: Path, *, insecure: bool) -> list[str]:
        return [self.program, "push", image]

    def _registry_options(self, insecure: bool) -> list[str]:
        return []  # docker asks its daemon's configuration (insecure-registries)

    def _pushed_digest(self, file: Path, output: str) -> str:
        word = "digest: "
        for line in output.splitlines():
            if word in line:
                return line.partition(word)[2].split()[0]
        raise CommandError("docker did not say which digest the registry gave the image", [])


BUILDERS: dict[str, type[Builder]] = {"podman": Podman, "buildah": Buildah, "docker": Docker}
"""The builders, in the order in which one is chosen."""


def choose_builder(name: str | None, *, verbose: bool = False) -> Builder:
    """The builder called `name`, or the first that this machine has and that works.

    Raises CommandError if there is none.
    """
    if name:
        if not shutil.which(name):
            raise CommandError(
                f"there is no {name} on this machine", [(f"{program()} build", "take the builder that is there")]
            )
        if reason := _why_not(name):
            raise CommandError(
                f"{name} does not work here: {reason}",
                [(f"{program()} build", "take a builder that works"), (f"{name} version", "see what it lacks")],
            )
        return BUILDERS[name](verbose=verbose)
    for builder in BUILDERS.values():
        if shutil.which(builder.program) and not _why_not(builder.program):
            return builder(verbose=verbose)
    raise CommandError(
        "no program that builds images was found: podman, buildah, or docker with its daemon running",
        [("sudo apt-get install buildah", "on Debian and Ubuntu"), ("sudo dnf install podman", "on Fedora")],
    )


def _why_not(name: str) -> str | None:
    """Why a builder cannot build; None if it can. Only docker needs something that may not run: a daemon."""
    if name != "docker":
        return None
    try:
        run_program(["docker", "version", "--format", "{{.Server.Version}}"])
    except ProgramFailed as error:
        return error.last_lines(1).strip()
    return None

"""Images made of one archive on top of another image, and kept under a tag made of what went in."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lifl.cli.common import CommandError, program

from lifl_knative.images.archive import source_date
from lifl_knative.images.builders import Builder, ImageFacts

EMPTY = "scratch"
"""What a root file system is put on."""
BUILD_LABEL = "dev.lifl.build"
"""Label of an image: the hash of all that went into it."""

_TAG_DIGITS = 16


@dataclass(frozen=True)
class Layer:
    """An image that the builder has."""

    image: str
    id: str


def hash_of(*parts: object) -> str:
    """SHA-256 (hexadecimal) of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Layers:
    """Makes layers with one builder for one platform (`linux/arm64`; None: this machine's)."""

    def __init__(self, builder: Builder, platform: str | None = None) -> None:
        self.builder = builder
        self.platform = platform

    def key(self, *parts: object) -> str:
        """A hash of what an image is made of; the platform and the time that files bear are part of it."""
        return hash_of(self.platform, source_date(), *parts)

    def cached(
        self, name: str, key: str, parent: str, write: Callable[[Path, Path], None], lines: Sequence[str] = ()
    ) -> Layer:
        """The image `localhost/NAME:KEY`, made if it is not there; see `make` for the other arguments."""
        image = f"localhost/{name}:{key[:_TAG_DIGITS]}"
        facts = self.builder.inspect(image)
        if facts is not None and facts.labels.get(BUILD_LABEL) == key:
            return Layer(image, facts.id)
        return self.make(image, key, parent, write, lines)

    def make(
        self, image: str, key: str, parent: str, write: Callable[[Path, Path], None], lines: Sequence[str] = ()
    ) -> Layer:
        """Build `image`: what `write(archive, work)` writes to the file `archive`, on top of the image `parent`.

        `work` is an empty directory. `lines` are further ones of the Containerfile. Raises CommandError.
        """
        with tempfile.TemporaryDirectory(prefix="lifl-build-") as directory:
            context, work = Path(directory, "context"), Path(directory, "work")
            context.mkdir()
            work.mkdir()
            try:
                write(context / "layer.tar", work)
            except OSError as error:
                raise _unwritten(error, directory) from None
            content = [f"FROM {parent}", "ADD layer.tar /", *lines, *label_lines({BUILD_LABEL: key})]
            (context / "Containerfile").write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
            self.builder.build(context, image, platform=self.platform)
        return Layer(image, self._facts(image).id)

    def _facts(self, image: str) -> ImageFacts:
        facts = self.builder.inspect(image)
        if facts is None:
            raise CommandError(f"{self.builder.program} has built {image}, but does not have it", [])
        return facts


def label_lines(labels: Mapping[str, str]) -> list[str]:
    """Lines of a Containerfile that set labels."""
    return [f"LABEL {quoted(name)}={quoted(value)}" for name, value in sorted(labels.items())]


def variable_lines(variables: Mapping[str, str]) -> list[str]:
    """Lines of a Containerfile that set variables of the environment."""
    return [f"ENV {name}={quoted(value)}" for name, value in sorted(variables.items())]


def quoted(text: str) -> str:
    """Text in quotes, for a Containerfile. Raises CommandError for text of several lines."""
    if "\n" in text or "\r" in text:
        raise CommandError(f"{text!r} has to be one line to become part of an image", [])
    for character in '\\"$':
        text = text.replace(character, f"\\{character}")
    return f'"{text}"'


def _unwritten(error: OSError, directory: str) -> CommandError:
    where = error.filename or directory
    return CommandError(
        f"the content of the image cannot be put together: '{where}': {error.strerror or error}",
        [(f"TMPDIR=/another/disk {program()} build", "put it together elsewhere")],
    )

"""What was built last, in `.func/` of the project, as Knative's func keeps it: `built-image` and `built-hash`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lifl.cli.common import CommandError

DIRECTORY = ".func"
_IMAGE, _HASH = "built-image", "built-hash"


@dataclass(frozen=True)
class BuildRecord:
    """An image, and the hash of what it was built of."""

    image: str
    key: str


def read_record(project: Path) -> BuildRecord | None:
    """What was built of the project last; None if nothing was."""
    try:
        image = (project / DIRECTORY / _IMAGE).read_text(encoding="utf-8").strip()
        key = (project / DIRECTORY / _HASH).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return BuildRecord(image, key) if image and key else None


def write_record(project: Path, record: BuildRecord) -> None:
    """Keep what was built. Raises CommandError."""
    directory = project / DIRECTORY
    try:
        directory.mkdir(exist_ok=True)
        (directory / _IMAGE).write_text(f"{record.image}\n", encoding="utf-8")
        (directory / _HASH).write_text(f"{record.key}\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"'{directory}' cannot be written: {error.strerror}") from None

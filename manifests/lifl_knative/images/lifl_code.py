"""The very LIFL that runs, as files of an image: it is in no package index, and a checkout may be ahead of any."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

FUNCTION_CODE = ("lifl",)
"""The Python packages of a function's image."""
NODE_CODE = ("lifl", "lifl_ebpf", "lifl_gateway", "lifl_knative")
"""Those of the image of a node's processes, the coordinator and the autoscaler."""

_SKIPPED = re.compile(r"(^|/)(__pycache__|\.[^/]*)(/|$)|\.py[co]$")


def find_code(packages: Sequence[str], site_packages: str) -> dict[str, Path]:
    """Path in the image of each file of these packages, to the file that runs here."""
    files: dict[str, Path] = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"no package named {package}")
        root = Path(spec.submodule_search_locations[0])
        for file in sorted(root.rglob("*")):
            inside = file.relative_to(root).as_posix()
            if file.is_file() and not _SKIPPED.search(inside):
                files[f"{site_packages}/{package}/{inside}"] = file
    return files


def find_metadata() -> tuple[str, str]:
    """Version of LIFL, and the METADATA file by which Python knows it."""
    found = _distribution()
    if found is None:
        return "0", "Metadata-Version: 2.1\nName: lifl\nVersion: 0\n"
    return found.version, found.read_text("METADATA") or ""


def requirements_of_lifl(extras: Sequence[str] = ()) -> list[str]:
    """What LIFL asks for, with these extras."""
    found = _distribution()
    requirements: list[str] = []
    for requirement in (found.requires if found else None) or []:
        text, _, marker = requirement.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if extra is None:
            requirements.append(requirement)
        elif extra[1] in extras and not text.startswith("lifl["):
            requirements.append(text.strip())
    return requirements


def _distribution() -> Distribution | None:
    try:
        return distribution("lifl")
    except PackageNotFoundError:
        return None

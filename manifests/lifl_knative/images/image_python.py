"""The Python of a base image: where its packages go, and which wheels it can use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifl.cli.common import CommandError, program

from lifl_knative.images.builders import LOCAL_PACKAGES, Builder
from lifl_knative.images.programs import ProgramFailed

SYSTEM_PYTHON = Path("/usr/bin/python3")
"""The Python of Debian's packages, of which a base made of them has a copy."""

_OLDEST = (3, 11)
_PROBE = """
import importlib.util, json, platform, sys, sysconfig
print(json.dumps({
    "executable": sys.executable, "version": sys.version_info[:2], "tag": sys.implementation.cache_tag,
    "site_packages": sysconfig.get_path("purelib"), "machine": platform.machine(),
    "glibc": platform.libc_ver()[1] if platform.libc_ver()[0] == "glibc" else "",
    "has_bcc": importlib.util.find_spec("bcc") is not None}))
"""


@dataclass(frozen=True)
class ImagePython:
    """What has to be known of it to put packages beside it."""

    executable: str
    """Its path in the image."""
    version: tuple[int, int]
    cache_tag: str
    """What the names of its bytecode files contain: cpython-311."""
    site_packages: str
    """Where packages go in the image; it is on its module search path."""
    machine: str
    """The processor: x86_64 or aarch64."""
    glibc: tuple[int, int]
    """Version of the C library, which decides on the wheels."""
    has_bcc: bool
    """Whether an agent can load eBPF programs with it."""
    is_local: bool
    """Whether it is this machine's own `SYSTEM_PYTHON`."""

    @property
    def compiler(self) -> Path | None:
        """An interpreter of this machine that makes bytecode for it; None if there is none."""
        if self.is_local:
            return SYSTEM_PYTHON
        if sys.implementation.cache_tag == self.cache_tag:
            return Path(sys.executable)
        found = shutil.which(f"python{self.version[0]}.{self.version[1]}")
        return Path(found) if found else None


def probe_local() -> ImagePython:
    """The Python of this machine's Debian packages. Raises CommandError if there is none that LIFL can use."""
    try:
        probe = subprocess.run([SYSTEM_PYTHON, "-I", "-c", _PROBE], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        raise CommandError(
            f"there is no {SYSTEM_PYTHON} to make a base image of",
            [(f"{program()} build --base-image python:3.12-slim", "a base from a registry")],
        ) from None
    return _read(json.loads(probe.stdout), str(SYSTEM_PYTHON), is_local=True)


def probe_image(builder: Builder, image: str, platform: str | None) -> ImagePython:
    """The Python of an image, which is run for that. Raises CommandError if there is none that LIFL can use."""
    try:
        output = builder.run_python(image, _PROBE, platform)
        facts = json.loads(output.strip().splitlines()[-1])
    except (ProgramFailed, ValueError, IndexError) as error:
        said = f" {builder.program} says:\n{error.last_lines(5)}" if isinstance(error, ProgramFailed) else ""
        raise CommandError(
            f"the base image {image} has no python3 that runs here.{said}",
            [
                (f"{program()} build --base-image python:3.12-slim", "a base with Python, from a registry"),
                (f"{program()} build --base-image {LOCAL_PACKAGES}", "one of this machine's Debian packages"),
            ],
        ) from None
    return _read(facts, image, is_local=False)


def _read(facts: dict[str, Any], where: str, *, is_local: bool) -> ImagePython:
    version = (int(facts["version"][0]), int(facts["version"][1]))
    if version < _OLDEST:
        raise CommandError(
            f"the Python of {where} is {version[0]}.{version[1]}, "
            f"but LIFL needs {_OLDEST[0]}.{_OLDEST[1]} or newer",
            [(f"{program()} build --base-image python:3.12-slim", "a newer one, from a registry")],
        )
    if not facts["glibc"]:
        raise CommandError(
            f"{where} has no glibc (Alpine has musl), for which numpy and llvmlite are built",
            [(f"{program()} build --base-image python:3.12-slim", "the same with glibc")],
        )
    major, minor = (int(part) for part in facts["glibc"].split(".")[:2])
    return ImagePython(
        executable=facts["executable"],
        version=version,
        cache_tag=facts["tag"],
        site_packages=facts["site_packages"],
        machine=facts["machine"],
        glibc=(major, minor),
        has_bcc=bool(facts["has_bcc"]),
        is_local=is_local,
    )

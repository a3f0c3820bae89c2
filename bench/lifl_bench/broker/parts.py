"""What the broker modes need beside LIFL."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from typing import Final

_PROGRAMS: Final = {"nats-server": "apt-get install nats-server", "nginx": "apt-get install nginx-light"}
_PACKAGES: Final = {"nats": "pip install 'lifl[bench]'", "hypercorn": "pip install 'lifl[http]'"}
_FURTHER_DIRECTORIES: Final = ("/usr/sbin", "/sbin")
"""Where servers are, and where ordinary users have no PATH to."""


def find_program(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The file of a program, None if it is not installed."""
    return shutil.which(name, path=os.pathsep.join([environment.get("PATH", os.defpath), *_FURTHER_DIRECTORIES]))


def program(name: str, environment: Mapping[str, str]) -> str:
    """The file of a program that is needed. Raises FileNotFoundError."""
    found = find_program(name, environment)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def missing_parts(*, own_server: bool = True) -> list[tuple[str, str]]:
    """What is missing, each with the command that installs it; `own_server` if no running one is given."""
    missing = [
        (name, command)
        for name, command in _PROGRAMS.items()
        if find_program(name) is None and (own_server or name != "nats-server")
    ]
    return missing + [
        (f"Python package {name}", command)
        for name, command in _PACKAGES.items()
        if importlib.util.find_spec(name) is None
    ]

"""What the broker modes need beside LIFL."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Final

_PROGRAMS: Final = {"nats-server": "apt-get install nats-server", "nginx": "apt-get install nginx-light"}
_PACKAGES: Final = {"nats": "pip install 'lifl[bench]'", "hypercorn": "pip install 'lifl[http]'"}


def missing_parts(*, own_server: bool = True) -> list[tuple[str, str]]:
    """What is missing, each with the command that installs it; `own_server` if no running one is given."""
    missing = [
        (name, command)
        for name, command in _PROGRAMS.items()
        if shutil.which(name) is None and (own_server or name != "nats-server")
    ]
    return missing + [
        (f"Python package {name}", command)
        for name, command in _PACKAGES.items()
        if importlib.util.find_spec(name) is None
    ]

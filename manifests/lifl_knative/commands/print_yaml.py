"""YAML on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def print_yaml(documents: Sequence[Any]) -> None:
    """The documents, with `---` between them."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 4096  # texts stay on their lines
    yaml.representer.ignore_aliases = lambda data: True
    if len(documents) == 1:
        yaml.dump(documents[0], sys.stdout)
    else:
        yaml.dump_all(documents, sys.stdout)

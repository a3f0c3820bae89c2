"""What the coordinator tells the process that started it: one JSON object per line on standard output."""

from __future__ import annotations

import json
from typing import Any


def tell_supervisor(message: dict[str, Any]) -> None:
    """Print one line: {"ready": true}, or {"zygote": NAME} when a function is needed for the first time."""
    print(json.dumps(message), flush=True)

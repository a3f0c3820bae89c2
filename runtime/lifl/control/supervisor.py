"""What the coordinator tells the process that started it: one JSON object per line on standard output."""

from __future__ import annotations

import json
from typing import Any


def tell_supervisor(message: dict[str, Any]) -> None:
    """Print one line: {"ready": true, "data_plane": "ebpf"}, or {"zygote": NAME} if a function is needed."""
    print(json.dumps(message), flush=True)

"""Over-selection: which clients have a place in a round of a job that lets more clients train than it needs."""

from __future__ import annotations

import math
from typing import Literal

from lifl.messages import JobSpec

Selected = Literal["selected", "again", "enough"]


def places_of(spec: JobSpec) -> int:
    """How many clients are selected for a round of a job that selects them."""
    # 10 * (1 + 0.1) is a little more than 11 in floating point, and must not become 12.
    return math.ceil(round(spec.goal * (1 + spec.over_selection), 6))


def select_client(selected: set[str], client: str, spec: JobSpec) -> Selected:
    """Give a client one of the places of a round, if one is left."""
    if client in selected:
        return "again"
    if len(selected) >= places_of(spec):
        return "enough"
    selected.add(client)
    return "selected"

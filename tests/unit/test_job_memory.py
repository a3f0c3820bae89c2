"""Pool ids are few and jobs come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from lifl.control.context import Context
from lifl.control.job_memory import JobMemory
from lifl.errors import Refused
from lifl.slot import MAX_POOLS


@pytest.fixture
def memory(tmp_path: Path) -> JobMemory:
    return JobMemory(Context(tmp_path, tmp_path, 1, 2), cast(Any, None))


def test_pool_ids_are_used_again_but_not_at_once(memory: JobMemory):
    first = memory._new_pool_ids()
    memory._pools_in_use.discard(first)
    seen = []
    for _ in range(3 * MAX_POOLS):
        number = memory._new_pool_ids()
        memory._pools_in_use.discard(number)
        seen.append(number)
    assert first not in seen[: MAX_POOLS // 2 - 1]
    assert set(seen) == set(range(0, MAX_POOLS, 2))


def test_two_jobs_never_share_a_pool_and_the_last_id_is_said_to_be_the_last(memory: JobMemory):
    numbers = [memory._new_pool_ids() for _ in range(MAX_POOLS // 2)]
    assert len(set(numbers)) == MAX_POOLS // 2
    with pytest.raises(Refused, match="too many jobs"):
        memory._new_pool_ids()
    memory._pools_in_use.discard(numbers[7])
    assert memory._new_pool_ids() == numbers[7]

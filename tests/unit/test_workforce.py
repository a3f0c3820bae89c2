"""Which zygote of a function a node forks from, when several come and go."""

from __future__ import annotations

from pathlib import Path

from lifl.control.context import Context
from lifl.control.workforce import Workforce
from lifl.messages import Joined, Left


def joined(endpoint: int, failure: str = "") -> Joined:
    return Joined(endpoint, "zygote", 1, function="fedavg", failure=failure)


def left(endpoint: int) -> Left:
    return Left(endpoint, "zygote", 1, function="fedavg")


def test_while_any_pod_of_a_function_is_there_the_function_is(tmp_path: Path) -> None:
    workforce = Workforce(Context(tmp_path, tmp_path, 1, 1))
    waited: list[int] = []
    workforce.when_ready("fedavg", lambda: waited.append(1))
    for endpoint in (1, 2, 3):
        workforce.zygote_joined(joined(endpoint, failure="broken" if endpoint == 3 else ""))
    assert waited == [1]

    def current() -> int | None:
        zygote = workforce.zygote("fedavg")
        return zygote.endpoint if zygote is not None else None

    # The agent has the newest one fork; when it ends the one before takes its place.
    for ending, remaining in ((2, 3), (3, 1), (1, None)):
        workforce.zygote_left(left(ending))
        assert current() == remaining
    assert workforce.functions == ()
    workforce.zygote_joined(joined(4))
    workforce.zygote_left(left(1))  # told once more
    assert current() == 4

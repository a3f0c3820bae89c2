"""The runner of `func bench` measures what happens and lets no wrong result pass."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from lifl_bench import runner
from lifl_bench.deployment import Stamps
from lifl_bench.results import CellResult
from lifl_bench.runner import Contestant, Options, run_cell
from lifl_bench.workload import Workload, parse_arrival, parse_model

# The usual timer is a thread, and clients are forked from processes without any.
pytestmark = pytest.mark.timeout(60, method="signal")

UPDATES = 5
MODEL = parse_model("40000")


@pytest.fixture(autouse=True)
def nothing_to_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SETTLE_SECONDS", 0.01)


@dataclass
class FolderSender:
    directory: Path
    client: int

    def connect(self) -> None: ...

    def send(self, update: memoryview, *, num_samples: float, round: int) -> None:
        target = self.directory / f"{round}-{self.client}"
        target.with_suffix(".part").write_bytes(np.float64(num_samples).tobytes() + bytes(update))
        target.with_suffix(".part").rename(target)

    def fetch_model(self, round: int) -> memoryview:
        raise AssertionError("clients fetch models only where something is trained")

    def close(self) -> None: ...


@dataclass
class FolderObserver:
    deployment: FolderDeployment

    def connect(self) -> None: ...

    def wait(self, round: int, timeout: float) -> float:
        directory, deadline = self.deployment.directory, time.monotonic() + timeout
        while len(list(directory.glob(f"{round}-?"))) < UPDATES:
            time.sleep(0.001)
            if time.monotonic() > deadline:
                raise TimeoutError("not all updates came")
        stamps = Stamps(directory / "stamps", UPDATES)
        for client in range(UPDATES):
            stamps.note(client)
        return time.monotonic()

    def fetch(self, round: int) -> memoryview:
        if round == self.deployment.breaks_in:
            raise RuntimeError("the folder is gone")
        sums, weight = np.zeros(MODEL.elements), 0.0
        for client in range(UPDATES):
            if client == self.deployment.loses and round > 1:
                continue
            data = (self.deployment.directory / f"{round}-{client}").read_bytes()
            samples = float(np.frombuffer(data, np.float64, 1)[0])
            sums += samples * MODEL.decode(memoryview(data)[8:])
            weight += samples
        return MODEL.encode((sums / weight).astype(np.float32))

    def close(self) -> None: ...


@dataclass
class FolderDeployment:
    """The slowest way to aggregate: through files. It can be told to go wrong."""

    directory: Path
    mode: str = "folder"
    loses: int = -1
    """A client whose update it forgets, after the first round."""
    breaks_in: int = 0
    """The round in which it fails."""
    starts: int = 0
    running: bool = False

    def start(self) -> None:
        self.starts += 1
        self.running = True
        Stamps(self.directory / "stamps", UPDATES)

    def stop(self) -> None:
        self.running = False
        for file in self.directory.iterdir():
            file.unlink()

    def sender(self, client: int) -> FolderSender:
        return FolderSender(self.directory, client)

    def observer(self) -> FolderObserver:
        return FolderObserver(self)

    def components(self) -> Mapping[str, Sequence[int]]:
        return {"folder": [os.getpid()]}

    def folded(self, round: int) -> Sequence[float]:
        return Stamps(self.directory / "stamps", UPDATES).read()

    def before_round(self, round: int) -> None:
        Stamps(self.directory / "stamps", UPDATES).clear()

    def after_round(self, round: int) -> None: ...


class Silence:
    def __init__(self) -> None:
        self.done_count = 0

    def begin(self, contestant: Contestant, what: str) -> None: ...

    def done(self, contestant: Contestant) -> None:
        self.done_count += 1


def contestants(tmp_path: Path, *deployments: FolderDeployment) -> list[Contestant]:
    workload = Workload(MODEL, UPDATES)
    return [
        Contestant(one, workload, CellResult(one.mode, MODEL.name, MODEL.nbytes, UPDATES, 1, 1))
        for one in deployments
    ]


def folder(tmp_path: Path, name: str, **options: int) -> FolderDeployment:
    directory = tmp_path / name
    directory.mkdir()
    return FolderDeployment(directory, name, **options)  # type: ignore[arg-type]


def options(repeat: int, **others: float) -> Options:
    return Options(repeat, parse_arrival("burst", 1, UPDATES), others.get("budget", 60.0))


def test_each_mode_gets_its_rounds_and_is_stopped(tmp_path: Path) -> None:
    both = contestants(tmp_path, folder(tmp_path, "a"), folder(tmp_path, "b"))
    watcher = Silence()

    run_cell(both, options(3), watcher, at_once=True)

    assert [len(one.result.rounds) for one in both] == [3, 3]
    assert [one.deployment.running for one in both] == [False, False]  # type: ignore[attr-defined]
    assert [one.deployment.starts for one in both] == [1, 1]  # type: ignore[attr-defined]
    assert watcher.done_count == 6
    assert not any(one.result.failure for one in both)


def test_a_round_is_measured_from_the_first_byte_to_the_model(tmp_path: Path) -> None:
    (one,) = contestants(tmp_path, folder(tmp_path, "a"))

    run_cell([one], options(1), Silence(), at_once=True)

    (round_,) = one.result.rounds
    assert len(round_.latencies_s) == UPDATES
    assert 0 < round_.act_s < 5 and all(0 < latency <= round_.act_s for latency in round_.latencies_s)
    assert set(round_.cpu_s) == {"clients", "folder"} and round_.cpu_s["clients"] > 0
    assert round_.error < 1e-6
    assert one.result.peak_memory_bytes > 1 << 20


def test_late_arrivals_count_from_the_first_one(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("10\n10.1\n10.2\n10.3\n10.4\n")
    (one,) = contestants(tmp_path, folder(tmp_path, "a"))
    arrival = parse_arrival(str(trace), 1, UPDATES)

    run_cell([one], Options(1, arrival, 60.0, watch_memory=False), Silence(), at_once=True)

    assert 0.4 < one.result.rounds[0].act_s < 2


def test_a_mode_that_loses_an_update_fails_and_the_others_go_on(tmp_path: Path) -> None:
    wrong, right = contestants(tmp_path, folder(tmp_path, "wrong", loses=2), folder(tmp_path, "right"))

    run_cell([wrong, right], options(2), Silence(), at_once=True)

    assert "the model is off by" in wrong.result.failure and not wrong.result.rounds
    assert not right.result.failure and len(right.result.rounds) == 2


def test_a_mode_that_breaks_says_why_and_keeps_what_was_measured(tmp_path: Path) -> None:
    (one,) = contestants(tmp_path, folder(tmp_path, "a", breaks_in=3))

    run_cell([one], options(5), Silence(), at_once=True)

    assert one.result.failure == "the observer: RuntimeError: the folder is gone"
    assert len(one.result.rounds) == 1
    assert not one.deployment.running  # type: ignore[attr-defined]


def test_a_mode_that_has_used_up_its_time_gets_no_further_round(tmp_path: Path) -> None:
    (one,) = contestants(tmp_path, folder(tmp_path, "a"))

    run_cell([one], options(4, budget=1e-6), Silence(), at_once=True)

    assert len(one.result.rounds) == 1 and one.result.peak_memory_bytes


def test_without_memory_for_all_each_is_deployed_for_its_turn_alone(tmp_path: Path) -> None:
    both = contestants(tmp_path, folder(tmp_path, "a"), folder(tmp_path, "b"))

    run_cell(both, options(2), Silence(), at_once=False)

    assert [one.deployment.starts for one in both] == [2, 2]  # type: ignore[attr-defined]
    assert [len(one.result.rounds) for one in both] == [2, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_stops_everything(tmp_path: Path, error: type[BaseException]) -> None:
    (one,) = contestants(tmp_path, folder(tmp_path, "a"))

    class Interrupt(Silence):
        def begin(self, contestant: Contestant, what: str) -> None:
            if what == "measured round":
                raise error

    with pytest.raises(error):
        run_cell([one], options(1), Interrupt(), at_once=True)

    assert not one.deployment.running and one.team is None  # type: ignore[attr-defined]

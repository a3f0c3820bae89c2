"""Measures how many updates this machine can aggregate at once: MC of the placement's RC = MC - k E.

    python -m lifl.calibration --state-directory DIR

A temporary node, with a state directory of its own, gets updates from more and more senders, each of which sends
its next update as soon as the last one is accepted. At each level two things are read from the node:

    k   updates that arrive in a second
    E   mean time of an update from its first byte to folded

While there is room E stays as it is and k grows with the senders. From some level on updates only wait for each
other: E grows. By Little's law k E is the number of updates that were there at a time, so MC is k E of the last
level before E began to grow. The placement counts a node's load in the same unit: it takes updates that are still
being uploaded one by one, and adds k E of those that wait at an aggregator or are being folded.

Senders run on the same machine, for lack of another, and take CPU time from the node. So MC is rather too small
than too large, which costs another node and not time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import mmap
import multiprocessing
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lifl.errors import Busy, InvalidInput, LiflError, Refused, Unavailable
from lifl.process import end_with_parent

if TYPE_CHECKING:
    from lifl.client import Client

FILE: Final = "calibration.json"
"""In the node's state directory."""
LEVELS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of senders that are tried, one after the other."""
MODELS: Final = {"resnet18": 4 * 11_173_962, "resnet34": 4 * 21_282_122, "resnet152": 4 * 58_156_618}
"""Bytes of models that have a name."""

_JOB: Final = "calibration"
_FUNCTION: Final = """from lifl import Aggregate, ModelUpdate, aggregator


@aggregator
def calibration(total: Aggregate, update: ModelUpdate) -> None:
    total.add(update, weight=update.num_samples)
"""
_BAD_LEVELS: Final = 2
"""E has to have grown at so many levels running: one may be a disturbance."""
_WARM_SHARE: Final = 0.25
"""Of the time of a level, before it counts."""
_FOLD_SECONDS: Final = 20.0
_BUSY_PAUSE_SECONDS: Final = 0.005
_SPARE_SLOTS: Final = 4
_MEMORY_SHARE: Final = 0.4
_GOAL: Final = 1_000_000
_IDLE_SECONDS: Final = 3600.0


@dataclass(frozen=True)
class Options:
    """What is measured and how. Without `function_file` the updates are averaged (FedAvg)."""

    function_file: Path | None = None
    model_bytes: int = MODELS["resnet18"]
    seconds: float = 2.0
    """Of each level."""
    growth: float = 1.5
    """E has grown when it is so many times the smallest so far."""
    most_senders: int = 32
    data_plane: str = "auto"


@dataclass(frozen=True)
class Level:
    """What was measured with a number of senders."""

    senders: int
    arrival_rate: float
    """k, updates a second."""
    execution_seconds: float
    """E."""
    updates: int
    growth: float = 1.0
    """E over the smallest E of this and all earlier levels."""

    @property
    def concurrency(self) -> float:
        """Updates that were there at a time, k E."""
        return self.arrival_rate * self.execution_seconds


@dataclass(frozen=True)
class Calibration:
    """The result, as it is kept in the state directory."""

    capacity: float
    """MC."""
    execution_seconds: float
    """E at the level that gave the capacity."""
    model_bytes: int
    cores: int
    when: str
    """Date and time, ISO 8601, UTC."""
    is_limit: bool
    """E had begun to grow. Otherwise the levels or the memory were at their end before, and MC may be larger."""
    levels: list[Level] = field(default_factory=list)

    def save(self, state_directory: Path) -> Path:
        """Write it for the node that has this state directory; readers see the old one or this one."""
        state_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = state_directory / FILE
        new = path.with_name(f"{FILE}.{os.getpid()}")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n")
        new.rename(path)
        return path


def calibrate(options: Options, on_level: Callable[[Level], None] = lambda level: None) -> Calibration:
    """Measure level after level until E has grown; `on_level` hears of each.

    Has to be called while this process has one thread, because the senders are forked. Raises InvalidInput for
    what cannot be measured, Unavailable if the node does not come up.
    """
    levels: list[Level] = []
    numbers = list(_numbers(options))
    with (
        _Senders(numbers[-1], options.model_bytes) as senders,
        _node(options) as address,
        _Job(address, options, senders.update, numbers[-1]) as job,
    ):
        for number in numbers:
            level = _measure(job, senders, number, options.seconds)
            smallest = min(each.execution_seconds for each in [*levels, level])
            levels.append(_with_growth(level, smallest))
            on_level(levels[-1])
            if has_grown(levels, options.growth):
                break
    return _result(levels, options)


def _with_growth(level: Level, smallest: float) -> Level:
    return Level(**asdict(level) | {"growth": level.execution_seconds / smallest})


def has_grown(levels: Sequence[Level], growth: float) -> bool:
    """Whether the newest levels show that E grows."""
    newest = levels[-_BAD_LEVELS:]
    return len(newest) == _BAD_LEVELS and all(level.growth > growth for level in newest)


def last_good(levels: Sequence[Level], growth: float) -> Level:
    """The last level at which E had not grown; the first one is the measure, so there always is one."""
    return [level for level in levels if level.growth <= growth][-1]


def _result(levels: Sequence[Level], options: Options) -> Calibration:
    best = last_good(levels, options.growth)
    return Calibration(
        capacity=float(max(1, round(best.concurrency))),
        execution_seconds=best.execution_seconds,
        model_bytes=options.model_bytes,
        cores=len(os.sched_getaffinity(0)),
        when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        is_limit=has_grown(levels, options.growth),
        levels=list(levels),
    )


def _numbers(options: Options) -> Iterator[int]:
    """The levels that the memory has room for; each update may be there twice, sent and being folded."""
    from lifl.control.job import available_memory

    room = int(available_memory() * _MEMORY_SHARE / options.model_bytes - _SPARE_SLOTS) // 2
    if room < 1:
        raise InvalidInput(
            f"a model of {options.model_bytes / 1e6:.0f} MB is too large to be measured on this machine"
        )
    most = min(room, options.most_senders)
    yield from (number for number in LEVELS if number <= most)


# --- one level -----------------------------------------------------------------------------------------------


def _measure(job: _Job, senders: _Senders, number: int, seconds: float) -> Level:
    """Have `number` senders send for some time."""
    before = job.accepted()
    with senders.sending(job.address, number):
        time.sleep(seconds * _WARM_SHARE)
        begin = time.monotonic()
        time.sleep(seconds)
        end = time.monotonic()
    job.wait_until_folded()
    # The node's first bytes are on the same clock.
    latencies = [update["latency"] for update in job.updates(before) if begin <= update["first_byte"] < end]
    if not latencies:
        raise InvalidInput(f"no update was through within {seconds:g} s; give the levels more time")
    mean = sum(latencies) / len(latencies)
    return Level(number, len(latencies) / (end - begin), mean, len(latencies))


class _Job:
    """The job that is measured: one round that takes all updates there will be."""

    def __init__(self, address: str, options: Options, model: mmap.mmap, most_senders: int) -> None:
        from lifl.client import Client

        self.address = address
        self._model = model
        self._spec = {
            "function": options.function_file.stem if options.function_file else _JOB,
            "goal": _GOAL,
            "slots": 2 * most_senders + _SPARE_SLOTS,
            "idle_seconds": _IDLE_SECONDS,
        }
        self._client = Client(address, _JOB, "calibration", timeout=60.0)

    def __enter__(self) -> _Job:
        try:
            self._client.create_job(**self._spec)
            self._client.upload_model(self._model)
        except Refused as refusal:  # for one, a function that gathers a round folds nothing before its end
            self._client.close()
            raise InvalidInput(f"this function cannot be measured: {refusal}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def _current(self) -> dict[str, Any]:
        state = self._client.describe()
        if state["status"] == "failed":
            raise InvalidInput(f"the function fails: {state.get('detail')}")
        current: dict[str, Any] = state["current"]
        return current

    def accepted(self) -> int:
        """Updates so far."""
        return int(self._current()["accepted"])

    def wait_until_folded(self) -> None:
        """Wait until nothing is pending, which takes a moment."""
        end = time.monotonic() + _FOLD_SECONDS
        while (current := self._current())["folded"] < current["accepted"]:
            if time.monotonic() > end:
                raise InvalidInput(f"{current['accepted'] - current['folded']} updates are not folded")
            time.sleep(0.01)

    def updates(self, offset: int) -> Iterator[dict[str, Any]]:
        """Those after the first `offset` ones."""
        from lifl.cli.common import get_json

        while True:
            part = get_json(self.address, f"/v1/jobs/{_JOB}/rounds/1/updates?offset={offset}", timeout_s=60.0)
            yield from part["updates"]
            offset = part["next"]
            if not offset:
                return


@contextlib.contextmanager
def _node(options: Options) -> Iterator[str]:
    """A node of the measurement's own; yields its address."""
    from lifl.node import Node, NodeOptions

    with tempfile.TemporaryDirectory(prefix="lifl-calibration-") as directory:
        file = options.function_file
        if file is None:
            file = Path(directory) / f"{_JOB}.py"
            file.write_text(_FUNCTION)
        node = Node(
            NodeOptions(
                functions={file.stem: file.absolute()},
                default_function=file.stem,
                state_directory=Path(directory) / "state",
                port=0,
                data_plane=options.data_plane,
            )
        )
        with node:
            yield node.ready().address


# --- senders -------------------------------------------------------------------------------------------------


class _Senders:
    """Forked processes, each of which sends one update after another while it is told to."""

    def __init__(self, count: int, model_bytes: int) -> None:
        self.update = _random_update(model_bytes)
        """Shared memory."""
        self._is_sending = mmap.mmap(-1, mmap.PAGESIZE)
        self._links: list[connection.Connection] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("fork")
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=self._run, args=(number, theirs, os.getpid()), daemon=True)
            self._links.append(ours)
            self._processes.append(process)
            process.start()
            theirs.close()

    def __enter__(self) -> _Senders:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process, link in zip(self._processes, self._links, strict=True):
            process.join()
            process.close()
            link.close()

    @contextlib.contextmanager
    def sending(self, address: str, number: int) -> Iterator[None]:
        """`number` of them send, and at the end have sent. Raises what went wrong in one of them."""
        self._is_sending[0] = 1
        try:
            for link in self._links[:number]:
                link.send(address)
            yield
        finally:
            self._is_sending[0] = 0
        for failure in [link.recv() for link in self._links[:number]]:
            if failure:
                raise Unavailable(f"an update was not sent: {failure}")

    def _run(self, number: int, link: connection.Connection, parent: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent(parent, signal.SIGKILL)
        with contextlib.suppress(EOFError):
            self._serve(number, link)

    def _serve(self, number: int, link: connection.Connection) -> None:
        from lifl.client import Client

        client: Client | None = None
        while True:
            address = link.recv()
            client = client or Client(address, _JOB, "sender", retries=0)
            try:
                self._send(client, number)
            except (LiflError, OSError) as error:
                link.send(str(error))
            else:
                link.send("")

    def _send(self, client: Client, number: int) -> None:
        while self._is_sending[0]:
            # A client counts once in a round, so each update is another client's.
            client.client_id = f"{number}-{secrets.token_hex(6)}"
            try:
                client.submit(self.update, num_samples=1.0, round=1)
            except Busy:
                time.sleep(_BUSY_PAUSE_SECONDS)


def _random_update(model_bytes: int) -> mmap.mmap:
    """A model of one tensor as safetensors, in memory that forked processes share."""
    import numpy as np

    from lifl.tensors import Encoder

    count = max(1, model_bytes // 4)
    encoded = Encoder().encode({"weights": np.random.default_rng(0).random(count, np.float32)})
    shared = mmap.mmap(-1, len(encoded))
    shared[:] = encoded
    return shared


# --- as a program --------------------------------------------------------------------------------------------


def model_size(text: str) -> int:
    """Bytes of a model that is named, or given as a number with kB, MB or GB. Raises InvalidInput."""
    if text in MODELS:
        return MODELS[text]
    number, factor = text.strip(), 1.0
    for unit, size in (("kB", 1e3), ("KB", 1e3), ("MB", 1e6), ("GB", 1e9), ("B", 1)):
        if number.endswith(unit):
            number, factor = number.removesuffix(unit).strip(), size
            break
    try:
        nbytes = int(float(number) * factor)
    except (ValueError, OverflowError):
        nbytes = 0
    if nbytes < 4:
        raise InvalidInput(f"'{text}' is no model: {', '.join(MODELS)}, or a size such as 45MB")
    return nbytes


def main() -> int:
    """Calibrate, keep the result in the state directory and print it as one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m lifl.calibration", description="Measures MC of this machine.")
    parser.add_argument("--state-directory", type=Path, required=True, help="of the node that is to know")
    parser.add_argument("--function-file", type=Path, help="the aggregator; without it FedAvg")
    parser.add_argument("--model", default="resnet18", help=f"{', '.join(MODELS)}, or a size such as 45MB")
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="of each level")
    parser.add_argument(
        "--growth", type=float, default=Options.growth, help="of E, from which on it counts as grown"
    )
    parser.add_argument("--most-senders", type=int, default=Options.most_senders)
    parser.add_argument("--data-plane", choices=("auto", "ebpf", "unix"), default="auto")
    given = vars(parser.parse_args())
    state_directory, model = given.pop("state_directory"), given.pop("model")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    try:
        calibration = calibrate(Options(model_bytes=model_size(model), **given))
    except (InvalidInput, Refused, Unavailable) as error:
        print(f"calibration: {error}", file=sys.stderr)
        return 1
    calibration.save(state_directory)
    print(json.dumps(asdict(calibration)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

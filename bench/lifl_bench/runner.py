"""Runs rounds through several modes, one after the other in turn, and measures each.

A round: at one moment agreed on beforehand the client processes begin to send, each after its time of arrival; the
observer's process has been waiting for the new model since before. Clients report when they sent their first byte
and what CPU they used; what the mode's own processes used is read from outside once all is quiet again. The
observer fetches the model and compares it with the weighted mean in float64.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Protocol

from lifl.errors import LiflError

from lifl_bench.deployment import Deployment, Observer, Sender
from lifl_bench.measure import Usage, memory_of, peak_memory, usage_of
from lifl_bench.processes import Team
from lifl_bench.results import TOLERANCE, CellResult, Round
from lifl_bench.workload import Arrival, Workload

SETTLE_SECONDS = 0.4
"""After a round: until what happens behind it (checkpoints, purges) is done and all sleep."""
ROUND_SECONDS = 600.0
"""A round that takes longer has failed."""
_LEAD_SECONDS = 0.15
"""Between the order to send and the moment to do so: time for the order to reach everybody."""


class Incorrect(RuntimeError):
    """A mode made a wrong model."""


@dataclass
class Options:
    """What to run, for all cells."""

    repeat: int
    arrival: Arrival
    budget_seconds: float
    """A mode whose measured rounds of a cell have taken this long gets no further one."""
    watch_memory: bool = True


@dataclass(frozen=True)
class _Sent:
    """What a client says of its update."""

    first_byte: float
    cpu: float


@dataclass(frozen=True)
class _Failed:
    text: str


@dataclass
class Contestant:
    """One mode, deployed, with its clients."""

    deployment: Deployment
    workload: Workload
    result: CellResult
    team: Team | None = None
    round: int = 0
    """Rounds run so far, measured or not."""
    spent: float = 0.0
    """Seconds that measured rounds took."""
    started: bool = field(default=False)

    def deploy(self) -> None:
        """Start the deployment, its clients and its observer."""
        self.started = True
        self.deployment.start()
        clients = self.workload.updates
        self.team = Team(clients + 1, self._work)
        self._collect(self.team, clients + 1)

    def stop(self) -> None:
        """End everything; harmless if nothing runs."""
        if self.team is not None:
            self.team.stop()
            self.team = None
        if self.started:
            self.deployment.stop()
            self.started = False

    # --- in the processes of clients and observer --------------------------------------------------------------

    def _work(self, number: int, link: Connection) -> None:
        """What client `number` does; the one after the last client is the observer."""
        try:
            if number == self.workload.updates:
                self._observe(self.deployment.observer(), link)
            else:
                self._send(self.deployment.sender(number), number, link)
        except EOFError:
            raise
        except Exception as error:
            link.send(_Failed(f"{type(error).__name__}: {error}"))

    def _send(self, sender: Sender, number: int, link: Connection) -> None:
        sender.connect()
        update = self.workload.update_of(number)
        link.send(None)
        while order := link.recv():
            round_, at = order
            samples = float(self.workload.samples(round_)[number])
            before = time.process_time()
            _sleep_until(at)
            first_byte = time.monotonic()
            sender.send(update, num_samples=samples, round=round_)
            link.send(_Sent(first_byte, time.process_time() - before))

    def _observe(self, observer: Observer, link: Connection) -> None:
        observer.connect()
        link.send(None)
        while order := link.recv():
            link.send(observer.wait(order, ROUND_SECONDS))
            link.recv()
            link.send(self.workload.error(observer.fetch(order), order))

    # --- here --------------------------------------------------------------------------------------------------

    def _collect(self, team: Team, count: int) -> dict[int, object]:
        """One answer from each of `count` processes, by their numbers. Raises RuntimeError for a failure."""
        answers: dict[int, object] = {}
        for number, answer in team.receive(count, ROUND_SECONDS + 60):
            if isinstance(answer, _Failed):
                who = "the observer" if number == self.workload.updates else f"client {number}"
                raise RuntimeError(f"{who}: {answer.text}")
            answers[number] = answer
        return answers

    def run_round(self, arrival: Arrival) -> Round:
        """One round. Raises RuntimeError if it fails, Incorrect if its model is wrong."""
        assert self.team is not None
        self.round += 1
        team, deployment, observer = self.team, self.deployment, self.workload.updates
        before = usage_of(deployment.components())
        deployment.before_round(self.round)
        team.send_to(observer, self.round)
        at = time.monotonic() + _LEAD_SECONDS
        for client, offset in enumerate(arrival.times(self.workload.updates, self.round)):
            team.send_to(client, (self.round, at + offset))
        answers = self._collect(team, observer + 1)
        ready = answers.pop(observer)
        assert isinstance(ready, float)
        sent = {client: answer for client, answer in answers.items() if isinstance(answer, _Sent)}
        time.sleep(SETTLE_SECONDS)
        after = usage_of(deployment.components())
        folded = deployment.folded(self.round)
        deployment.after_round(self.round)
        return Round(
            act_s=ready - min(one.first_byte for one in sent.values()),
            latencies_s=[folded[client] - one.first_byte for client, one in sent.items() if folded[client]],
            cpu_s={"clients": sum(one.cpu for one in sent.values()), **_cpu_between(before, after)},
            written_bytes=max(0, _written(after) - _written(before)),
            error=self._check(team),
        )

    def _check(self, team: Team) -> float:
        """Have the observer compare the model of the last round. Raises Incorrect."""
        observer = self.workload.updates
        team.send_to(observer, self.round)
        error = self._collect(team, 1)[observer]
        assert isinstance(error, float)
        if not error <= TOLERANCE:
            raise Incorrect(f"round {self.round}: the model is off by {error:.2e} of its summands' magnitude")
        return error

    def watch_round(self, arrival: Arrival) -> None:
        """A round that is not timed, because looking costs CPU, to find the peak of memory."""

        def look() -> int:
            return memory_of(pid for pids in self.deployment.components().values() for pid in pids)

        peak = peak_memory(look, partial(self.run_round, arrival))
        self.result.peak_memory_bytes = max(self.result.peak_memory_bytes, peak)


def _cpu_between(before: Mapping[str, Usage], after: Mapping[str, Usage]) -> dict[str, float]:
    return {
        name: max(0.0, usage.cpu - (before[name].cpu if name in before else 0.0)) for name, usage in after.items()
    }


def _written(usage: Mapping[str, Usage]) -> int:
    return sum(one.written for one in usage.values())


def _sleep_until(at: float) -> None:
    if (left := at - time.monotonic()) > 0:
        time.sleep(left)


# --- a cell --------------------------------------------------------------------------------------------------


class Watcher(Protocol):
    """Is told how a run goes on."""

    def begin(self, contestant: Contestant, what: str) -> None:
        """The contestant is about to do something."""
        ...

    def done(self, contestant: Contestant) -> None:
        """A step of the contestant is over: a round, or all that were left when it failed."""
        ...


def run_cell(contestants: Sequence[Contestant], options: Options, watcher: Watcher, *, at_once: bool) -> None:
    """Run one cell: a first round of each mode that is not counted, then measured rounds in turn.

    `at_once`: all deployments stay up at the same time, idle while it is another's turn; otherwise, to save
    memory, each is deployed anew for each of its turns. What goes wrong is written into the contestant's result,
    and the others go on.
    """
    try:
        for turn in range(options.repeat):
            # Another order in each turn, so that none is always the one after the same neighbour.
            shift = turn % len(contestants)
            for contestant in [*contestants[shift:], *contestants[:shift]]:
                _take_turn(contestant, options, watcher, is_last=turn == options.repeat - 1)
                if not at_once:
                    contestant.stop()
    finally:
        for contestant in contestants:
            contestant.stop()


def _take_turn(contestant: Contestant, options: Options, watcher: Watcher, *, is_last: bool) -> None:
    result = contestant.result
    if result.failure:
        return
    try:
        if not result.rounds or contestant.spent < options.budget_seconds:
            _deploy(contestant, options, watcher)
            watcher.begin(contestant, "measured round")
            begin = time.monotonic()
            result.rounds.append(contestant.run_round(options.arrival))
            contestant.spent += time.monotonic() - begin
            if is_last and options.watch_memory and contestant.spent < options.budget_seconds:
                watcher.begin(contestant, "memory")
                contestant.watch_round(options.arrival)
    except (RuntimeError, OSError, TimeoutError, LiflError) as error:
        result.failure = str(error) or type(error).__name__
        contestant.stop()
    finally:
        watcher.done(contestant)


def _deploy(contestant: Contestant, options: Options, watcher: Watcher) -> None:
    """Start it, if it does not run, and let it have a first round, which is not timed."""
    if contestant.started:
        return
    watcher.begin(contestant, "starting")
    contestant.round = 0
    contestant.deploy()
    watcher.begin(contestant, "first round")
    if options.watch_memory:
        contestant.watch_round(options.arrival)
    else:
        contestant.run_round(options.arrival)

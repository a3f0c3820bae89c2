"""Runs the rounds of a scenario: clients, nodes and the network between them, event by event."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from lifl.cluster.coordinator import CheckpointTask
from lifl.cluster.messages import JobOrder, NodeLoad
from lifl.messages import RoundState
from lifl.peer.server import DEFAULT_LIMITS

from lifl_bench.simulation.control import ADDRESS, Coordinator, Outbox
from lifl_bench.simulation.costs import Costs
from lifl_bench.simulation.events import Action, EventLoop
from lifl_bench.simulation.host import Turns
from lifl_bench.simulation.machine import Machine, Machines, Work
from lifl_bench.simulation.node import Node, Tally
from lifl_bench.simulation.outcome import PolicyOutcome, RoundOutcome
from lifl_bench.simulation.scenario import Scenario

Progress = Callable[[int], None]
"""Called with the number of updates that were counted since the last call."""

_REPORT_EVERY: Final = 1000
_QUIET: Final = 0.01
"""A load (k E) that is not worth simulating."""
_RETRY_S: Final = 1.0
"""After which a node asks again for a model, when everyone who has it was busy."""
_UPLINK_RETRY_S: Final = 0.02
"""After which a node offers its partial aggregate again to a top that does not know yet that it is the top."""

_Upload = tuple[int, Node, int]
"""Client, node and round."""


def simulate(scenario: Scenario, costs: Costs, progress: Progress = lambda _: None) -> PolicyOutcome:
    """Run all rounds of a scenario under its policy. The same scenario and costs give the same outcome."""
    begin = time.perf_counter()
    with _without_collector():
        outcome = Simulation(scenario, costs, progress).run()
    outcome.seconds = time.perf_counter() - begin
    return outcome


def _busy(load: NodeLoad) -> float:
    return load.arrival_rate * load.execution_seconds


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Millions of objects live until their round ends, and looking for cycles would take half the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Simulation:
    """A cluster with one job, and its clients."""

    def __init__(self, scenario: Scenario, costs: Costs, progress: Progress) -> None:
        self._scenario = scenario
        self._costs = costs
        self._progress = progress
        self._loop = EventLoop()
        self._work = Work.of(scenario, costs)
        self._tally = Tally()
        self._outcome = PolicyOutcome(scenario.policy, workers=self._tally.history)
        self._round = RoundOutcome(0, 0.0, 0)
        """What is known of the open round, or of the one whose model is being distributed."""
        self._spent = {"gateway": 0.0, "clients": 0.0, "checkpoint": 0.0}
        self._placed: Counter[str] = Counter()
        machines = iter(Machines(scenario, costs, self._loop))
        self._own_machine = next(machines)
        shared = self._own_machine if scenario.shared_cores else None
        self._coordinator = Coordinator(scenario.spec(), costs, self._loop, shared)
        self._turns = Turns(self._own_machine.host, self._own_machine.compute, max(1, scenario.shared_cores))
        """Those of clients, where they share the nodes' cores."""
        self._nodes: dict[str, Node] = {}
        for number, machine in zip(range(scenario.nodes), machines, strict=False):
            self._add_node(f"node{number + 1}", number, machine)
        self._names = list(self._nodes)
        self._homes: dict[int, Node] = {}
        """Where clients were sent, and stay."""
        self._in_use: dict[Node, None] = {}
        """Nodes that have the job's memory."""
        self._outdated: set[Node] = set()
        """Those of them that lack the newest model."""
        self._active: dict[Node, None] = {}
        """Nodes whose load is not negligible."""
        self._times: list[float] = []
        self._clients: list[int] = []
        self._next = 0
        self._counted: list[float] = []
        self._reported = 0
        self._is_open = True

    def _add_node(self, name: str, number: int, machine: Machine) -> None:
        self._coordinator.join(name, self._scenario.cores_of(number), self._scenario.capacity_of(number))
        outbox = Outbox(self._coordinator, machine)
        node = Node(name, machine, outbox, self._loop, self._costs, self._work, self._tally)
        node.on_partial, node.on_model = self._send_partial, self._model_made
        self._nodes[name] = node

    def run(self) -> PolicyOutcome:
        """Simulate all rounds."""
        try:
            self._coordinator.begin(self._names[0])
            self._begin_round(1)
            self._beat(None)
            self._loop.run()
        finally:
            self._coordinator.close()
        self._report()
        outcome = self._outcome
        outcome.arrivals = self._counted
        outcome.placed = {name: self._placed[name] for name in self._names if name in self._placed}
        outcome.simulated_s, outcome.events = self._loop.now, self._loop.events
        return outcome

    def _report(self) -> None:
        self._progress(len(self._counted) - self._reported)
        self._reported = len(self._counted)

    # --- clients -------------------------------------------------------------------------------------------

    def _begin_round(self, number: int) -> None:
        """The clients of a round that is open begin: every node in use has its model."""
        scenario, now = self._scenario, self._loop.now
        self._is_open = True
        self._round = RoundOutcome(number, now, scenario.selected)
        random = np.random.default_rng((scenario.seed, number))
        self._times = (now + scenario.trace.times(scenario.selected, random)).tolist()
        self._clients = random.choice(scenario.clients, scenario.selected, replace=False).tolist()
        self._next = 0
        self._loop.at(self._times[0], self._clients_come, number)
        if scenario.deadline_s:
            self._loop.at(now + scenario.deadline_s, self._deadline_passed, number)

    def _clients_come(self, number: int) -> None:
        """Everyone whose time has come asks where to send its update."""
        while self._next < len(self._times) and self._times[self._next] <= self._loop.now:
            if number != self._round.number or not self._is_open:
                return
            client = self._clients[self._next]
            self._next += 1
            home = self._homes.get(client) or self._nodes[self._names[client % len(self._names)]]
            self._connect(home, self._ask_for_place, (client, home, number))
        if self._next < len(self._times):
            self._loop.at(self._times[self._next], self._clients_come, number)

    def _connect(self, node: Node, action: Action, upload: _Upload) -> None:
        """A client comes to a node, which then has something to ask the coordinator."""
        if self._scenario.shared_cores:
            self._spent["clients"] += self._costs.client_s
            self._turns.start(self._costs.client_s, self._ask, (node, action, upload))
        else:
            node.outbox.send(action, upload)

    def _ask(self, question: tuple[Node, Action, _Upload]) -> None:
        node, action, upload = question
        node.outbox.send(action, upload)

    def _ask_for_place(self, upload: _Upload) -> None:
        client, asking, number = upload
        placed = self._coordinator.place(asking.name, number, str(client))
        if placed.status != "open":
            return
        node = self._nodes[placed.node]
        node.uploads += 1
        if node is asking:
            self._upload(upload)
            return
        self._homes[client] = node
        self._spent["gateway"] += self._costs.redirect_s
        asking.machine.gateway.start(self._costs.redirect_s, self._redirected, (client, node, number))

    def _redirected(self, upload: _Upload) -> None:
        # That node asks the coordinator once more, whose answer is known: the update has its place.
        self._connect(upload[1], self._upload, upload)

    def _upload(self, upload: _Upload) -> None:
        """A body comes, once the node has the model that it is an update of."""
        client, node, number = upload
        if number != self._round.number or not self._is_open:
            node.uploads -= 1
            return
        if node.order is None or node.order.round != number:
            self._read_orders(node)
        order = node.order
        assert order is not None
        self._active[node] = None
        if node.held_round != order.model_round:
            node.waiting.append(client)
            self._fetch_if_needed(node)
            return
        if node.round is None:
            node.begin()
        node.wake()
        self._watch(node)
        node.last_activity = self._loop.now
        self._spent["gateway"] += self._costs.upload_s + self._work.receive
        self._spent["clients"] += self._work.client
        node.machine.gateway.start(self._costs.upload_s, self._receive, upload)

    def _receive(self, upload: _Upload) -> None:
        machine = upload[1].machine
        machine.host.start(machine.upload, 1.0, self._uploaded, upload)

    def _uploaded(self, upload: _Upload) -> None:
        upload[1].outbox.send(self._count, upload)

    def _count(self, upload: _Upload) -> None:
        client, node, number = upload
        node.uploads -= 1
        if node.round is None or node.round.number != number:
            return  # too late, and the round's model is made already
        assert node.order is not None
        if self._coordinator.count(node.name, node.order, str(client)).status != "accepted":
            return
        self._counted.append(self._loop.now)
        node.take(client, self._loop.now)
        if len(self._counted) - self._reported >= _REPORT_EVERY:
            self._report()
        self._spread_news()
        node.close_if_ordered()

    def _deadline_passed(self, number: int) -> None:
        if number == self._round.number and self._is_open:
            self._coordinator.tick()
            self._spread_news()

    # --- orders and load -----------------------------------------------------------------------------------

    def _spread_news(self) -> None:
        """Answer the nodes that wait for orders; those that the job does not use yet read theirs when they do."""
        woken = self._coordinator.take_news()
        nodes = list(self._in_use) if woken is None else [self._nodes[name] for name in woken]
        for node in nodes:
            if not node.has_news:
                node.has_news = True
                self._coordinator.request(node.machine, 0, self._hear, node)
        if woken is None:
            self._coordinator.answer_polls(len(self._nodes) - len(nodes))

    def _read_orders(self, node: Node) -> None:
        """Hear what is new, and ask for what comes next, with the load as it is now."""
        node.load_before = node.load()
        order = self._coordinator.orders(node.name, node.seen, node.load_before)
        if order is not None:
            node.order = order
            node.seen = {order.job: order.version}

    def _hear(self, node: Node) -> None:
        """Carry out what is ordered."""
        node.has_news = False
        self._read_orders(node)
        if node in self._in_use:
            self._fetch_if_needed(node)
            node.close_if_ordered()

    def _beat(self, _: object) -> None:
        """Every node that was busy asks for orders once more, and so tells its load."""
        for node in [*self._active]:
            before = node.load_before
            self._read_orders(node)
            if max(map(_busy, (before, node.load_before))) < _QUIET and not node.uploads:
                del self._active[node]
        self._loop.chore_at(self._loop.now + self._scenario.heartbeat_s, self._beat)

    def _watch(self, node: Node) -> None:
        if not node.is_watched:
            node.is_watched = True
            self._loop.chore_at(self._loop.now + self._scenario.idle_s, self._look_whether_idle, node)

    def _look_whether_idle(self, node: Node) -> None:
        idle_s = self._scenario.idle_s
        if self._loop.now < node.last_activity + idle_s:
            self._loop.chore_at(node.last_activity + idle_s, self._look_whether_idle, node)
            return
        if not node.go_idle():
            node.last_activity = self._loop.now  # something is going on after all
            self._loop.chore_at(self._loop.now + idle_s, self._look_whether_idle, node)
            return
        node.is_watched = False
        if not node.is_in_use:
            self._in_use.pop(node, None)
            self._outdated.discard(node)
            self._go_on_if_distributed()

    # --- the end of a round --------------------------------------------------------------------------------

    def _send_partial(self, node: Node) -> None:
        assert node.order is not None
        top = self._nodes[node.order.top]
        if not top.is_finishing(node.order):
            self._loop.at(self._loop.now + _UPLINK_RETRY_S, self._send_partial, node)
            return
        self._spent["gateway"] += self._work.peer_send + self._work.peer_receive
        self._round.partial_bytes += self._scenario.model_bytes
        top.machine.host.start(top.machine.receive, 1.0, self._partial_arrived, (node, top))

    def _partial_arrived(self, transfer: tuple[Node, Node]) -> None:
        node, top = transfer
        assert node.round is not None
        top.outbox.send(self._deliver, transfer)
        top.take_partial(node.name)

    def _deliver(self, transfer: tuple[Node, Node]) -> None:
        node, top = transfer
        assert node.round is not None
        assert top.order is not None
        self._coordinator.partial_delivered(
            top.name, top.order, node.name, node.round.folded, self._scenario.model_bytes
        )

    def _model_made(self, top: Node) -> None:
        top.outbox.send(self._complete, top)

    def _complete(self, top: Node) -> None:
        """The coordinator takes the model for the round's; nodes hear of it, and it goes to those in use."""
        order, round_ = top.order, top.round
        assert order is not None
        assert round_ is not None
        contributors = (top.name, *sorted(round_.remote))
        parts = [part for name in contributors if (part := self._nodes[name].round) is not None]
        state = self._coordinator.model_made(top.name, order, contributors, sum(part.folded for part in parts))
        self._is_open = False
        self._note_round(state, contributors)
        top.held_round = order.round + 1
        self._outdated = {node for node in self._in_use if node is not top}
        self._spread_news()
        for task in self._coordinator.models_to_store():
            self._spent["checkpoint"] += self._work.checkpoint + self._work.peer_send
            top.machine.host.start(top.machine.send, 1.0, self._stored, task)
        self._go_on_if_distributed()

    def _stored(self, task: CheckpointTask) -> None:
        self._coordinator.stored(task)
        self._spread_news()

    def _note_round(self, state: RoundState, contributors: tuple[str, ...]) -> None:
        """Write down what the round took, but for the models."""
        outcome = self._round
        outcome.accepted, outcome.late = state.accepted, outcome.selected - state.accepted
        outcome.nodes, outcome.top, outcome.act_s = state.nodes, state.top, state.act
        outcome.tail_s = self._loop.now - self._counted[-1]
        for name in contributors:
            round_ = self._nodes[name].round
            assert round_ is not None
            outcome.aggregators += round_.hierarchy.leaves
            self._placed[name] += round_.accepted
        for node in self._in_use:
            if node.round is not None:
                started, cold, reused = node.end()
                outcome.started += started
                outcome.cold += cold
                outcome.reused += reused if node.name in contributors else 0

    # --- models --------------------------------------------------------------------------------------------

    def _fetch_if_needed(self, node: Node) -> None:
        """Have a node read the newest model, if it lacks it and has not begun."""
        order = node.order
        assert order is not None
        if not node.fetching and node.held_round != order.model_round:
            self._in_use[node] = None
            node.fetching = order.model_round
            self._fetch(node)

    def _fetch(self, node: Node) -> None:
        """Read from the first of the sources in the node's order that has a connection to spare."""
        assert node.order is not None
        for source in node.order.model_sources:
            machine = self._own_machine if source == ADDRESS else self._nodes[source].machine
            if machine.send.count < DEFAULT_LIMITS.connections:
                self._spent["gateway"] += self._work.peer_send + self._work.peer_receive
                self._round.model_bytes += self._scenario.model_bytes
                machine.host.start(machine.send, 1.0, self._fetched, node)
                return
        self._loop.at(self._loop.now + _RETRY_S, self._fetch, node)

    def _fetched(self, node: Node) -> None:
        order = node.order
        assert order is not None
        node.held_round, node.fetching = node.fetching, 0
        if node.held_round != order.model_round:
            self._fetch_if_needed(node)
            return
        node.outbox.send(self._note_held, (node, order))
        self._outdated.discard(node)
        waiting, node.waiting = node.waiting, []
        for client in waiting:
            self._upload((client, node, order.round))
        self._go_on_if_distributed()

    def _note_held(self, held: tuple[Node, JobOrder]) -> None:
        node, order = held
        self._coordinator.model_held(node.name, order)
        self._spread_news()

    def _go_on_if_distributed(self) -> None:
        """When every node in use has the new model, the round is over, and clients train on it."""
        if self._is_open or self._outdated:
            return
        self._is_open = True
        outcome = self._round
        outcome.round_s = self._loop.now - outcome.opened_s
        spent = self._spent | {
            "worker": self._tally.worker_s,
            "coordinator": self._coordinator.cpu_s,
            "node": self._coordinator.requests * self._costs.node_request_s,
        }
        if not self._scenario.shared_cores:
            spent["clients"] = 0.0
        before = {name: sum(each.cpu_s[name] for each in self._outcome.rounds) for name in spent}
        outcome.cpu_s = {name: spent[name] - before[name] for name in spent}
        self._outcome.rounds.append(outcome)
        if outcome.number == self._scenario.rounds:
            self._loop.stop()
        else:
            self._begin_round(outcome.number + 1)

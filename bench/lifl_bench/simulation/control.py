"""The platform's coordinator as simulated nodes see it: the real one, which takes its time to answer."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, Final, TypeVar

from lifl.cluster.coordinator import CheckpointTask, ClusterCoordinator
from lifl.cluster.journal import Journal
from lifl.cluster.member_link import BATCH
from lifl.cluster.messages import (
    Counted,
    CountUpdate,
    FunctionFacts,
    JobOrder,
    MemberMessage,
    MemberMessages,
    ModelHeld,
    ModelMade,
    NodeLoad,
    OrdersRequest,
    PartialDelivered,
    Placed,
    PlaceUpdate,
    Register,
)
from lifl.messages import Acknowledged, DescribeRound, JobSpec, Message, RoundState

from lifl_bench.simulation.costs import Costs
from lifl_bench.simulation.events import Action, EventLoop
from lifl_bench.simulation.host import Turns
from lifl_bench.simulation.machine import Machine

ADDRESS: Final = "coordinator"
"""Where models can be had that no node has."""
_ENDLESS_LEASE_S: Final = 1e12
_FORGET_EVERY: Final = 1000

_Answer = TypeVar("_Answer", bound=Message)


class Coordinator:
    """Asks `ClusterCoordinator`, and keeps account of the time that it takes: one request after another.

    With `machine` it works on the cores of that one, as far as others leave them to it; so do the nodes for what a
    request costs them. Without, it has a core of its own, and a request is one event only: clusters of thousands
    of nodes make millions.
    """

    def __init__(self, spec: JobSpec, costs: Costs, loop: EventLoop, machine: Machine | None) -> None:
        self.cpu_s = 0.0
        self.requests = 0
        """HTTP requests of nodes so far."""
        self._spec = spec
        self._costs = costs
        self._loop = loop
        self._turns = Turns(machine.host, machine.compute, 1) if machine is not None else None
        self._free = 0.0
        """When it has dealt with all requests so far, if it has a core of its own."""
        self._asked = 0
        self._journal = Journal(Path(":memory:"))
        self._real = ClusterCoordinator(self._journal, 0.0, own_address=ADDRESS, lease_seconds=_ENDLESS_LEASE_S)

    def close(self) -> None:
        """Let go of the journal."""
        self._journal.close()

    # --- requests ------------------------------------------------------------------------------------------

    def request(self, machine: Machine, messages: int, action: Action, argument: Any = None) -> None:
        """A node's HTTP request with so many messages; `action` is what it has the coordinator do, and the answer.

        The way of the answer is counted to that of the request, which saves an event.
        """
        costs = self._costs
        seconds = costs.request_s + messages * costs.message_s
        self.requests += 1
        self.cpu_s += seconds
        if self._turns is None:
            arrival = self._loop.now + costs.node_request_s + costs.latency_s
            self._free = max(self._free, arrival) + seconds
            self._loop.at(self._free, action, argument)
        else:
            machine.host.start(machine.compute, costs.node_request_s, self._leave, (seconds, action, argument))

    def _leave(self, request: tuple[float, Action, Any]) -> None:
        self._loop.at(self._loop.now + self._costs.latency_s, self._arrive, request)

    def _arrive(self, request: tuple[float, Action, Any]) -> None:
        assert self._turns is not None
        self._turns.start(*request)

    def answer_polls(self, polls: int) -> None:
        """Answer nodes that wait for orders and do nothing upon these."""
        seconds = polls * self._costs.request_s
        self.requests += polls
        self.cpu_s += seconds
        if self._turns is None:
            self._free = max(self._free, self._loop.now) + seconds
        elif polls:
            self._turns.start(seconds, _do_nothing)

    # --- what nodes say ------------------------------------------------------------------------------------

    def join(self, name: str, cores: int, capacity: float) -> None:
        """A node registers."""
        self._real.register(Register(name, name, name, name, cores, 0, "ebpf", (), capacity), self._loop.now)

    def begin(self, first_node: str) -> None:
        """Create the job with its initial model: round 1 opens."""
        self._real.create_job(self._spec)
        self._ask(first_node, FunctionFacts(self._spec.function, gather=False, state_arrays=0), Acknowledged)
        self._real.model_installed(
            self._spec.name, self._real.require_no_model(self._spec.name).nonce, self._loop.now
        )

    def _ask(self, node: str, message: MemberMessage, kind: type[_Answer]) -> _Answer:
        now = self._loop.now
        (answer,) = self._real.answer(node, MemberMessages(node, (message,)), now, now)
        if not isinstance(answer, kind):
            raise RuntimeError(f"the coordinator answers {message!r} with {answer!r}")
        self._asked += 1
        if self._asked % _FORGET_EVERY == 0:
            self._journal.take()  # nothing here has to survive
        return answer

    def place(self, node: str, number: int, client: str) -> Placed:
        """Where an update of a client that came to this node belongs."""
        return self._ask(node, PlaceUpdate(self._spec.name, number, client), Placed)

    def count(self, node: str, order: JobOrder, client: str) -> Counted:
        """An update is complete on this node."""
        message = CountUpdate(order.job, order.nonce, order.round, order.attempt, client, 1.0)
        return self._ask(node, message, Counted)

    def partial_delivered(self, top: str, order: JobOrder, source: str, updates: int, nbytes: int) -> None:
        """The top has another node's partial aggregate."""
        message = PartialDelivered(order.job, order.round, order.attempt, order.epoch, source, updates, nbytes)
        self._ask(top, message, Acknowledged)

    def model_made(self, top: str, order: JobOrder, contributors: tuple[str, ...], updates: int) -> RoundState:
        """The top has the model; the round as it is then."""
        message = ModelMade(
            order.job, order.round, order.attempt, order.epoch, contributors, updates, float(updates)
        )
        self._ask(top, message, Acknowledged)
        return self._ask(top, DescribeRound(order.job, order.round), RoundState)

    def model_held(self, node: str, order: JobOrder) -> None:
        """The node has the newest model."""
        self._ask(node, ModelHeld(order.job, order.attempt, order.model_round), Acknowledged)

    def models_to_store(self) -> list[CheckpointTask]:
        """Models that are to be read from their nodes and stored."""
        return self._real.checkpoint_tasks()

    def stored(self, task: CheckpointTask) -> None:
        """A model is on the disk."""
        self._real.checkpoint_stored(task, self._loop.now)

    def tick(self) -> None:
        """A deadline has passed."""
        self._real.tick(self._loop.now)

    # --- what nodes are told -------------------------------------------------------------------------------

    def note_load(self, node: str, seen: dict[str, int], load: NodeLoad) -> None:
        """A node's heartbeat."""
        self._real.note_request(node, OrdersRequest(node, seen, load), self._loop.now, self._loop.now)

    def orders(self, node: str, seen: dict[str, int], load: NodeLoad) -> JobOrder | None:
        """What is new for a node that has carried out `seen`."""
        request = OrdersRequest(node, seen, load)
        member = self._real.note_request(node, request, self._loop.now, self._loop.now)
        orders = self._real.orders(member)
        return orders.jobs[0] if orders is not None and orders.jobs else None

    def take_news(self) -> set[str] | None:
        """Nodes that there are new orders for since the last call; None for all."""
        return self._real.news.take()


def _do_nothing(_: object) -> None:
    """Nothing follows."""


class Outbox:
    """A node's messages to the coordinator, as `lifl.cluster.member_link` sends them.

    One request is on its way at a time, and what is to be said meanwhile goes with the next one.
    """

    def __init__(self, coordinator: Coordinator, machine: Machine) -> None:
        self.machine = machine
        self._coordinator = coordinator
        self._waiting: deque[tuple[Action, Any]] = deque()
        self._is_sending = False

    def send(self, action: Action, argument: Any = None) -> None:
        """A message after all earlier ones; `action` is what it has the coordinator do, and the answer."""
        self._waiting.append((action, argument))
        if not self._is_sending:
            self._is_sending = True
            self._send_batch()

    def _send_batch(self) -> None:
        waiting = self._waiting
        batch = [waiting.popleft() for _ in range(min(BATCH, len(waiting)))]
        self._coordinator.request(self.machine, len(batch), self._answered, batch)

    def _answered(self, batch: list[tuple[Action, Any]]) -> None:
        if self._waiting:
            self._send_batch()
        else:
            self._is_sending = False
        for action, argument in batch:
            action(argument)

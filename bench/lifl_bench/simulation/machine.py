"""Where nodes run: cores, links, and what each kind of work takes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, repeat

from lifl_bench.simulation.costs import Costs
from lifl_bench.simulation.events import EventLoop
from lifl_bench.simulation.host import Host, Lane, Link, Turns
from lifl_bench.simulation.scenario import Scenario


@dataclass(frozen=True)
class Machine:
    """One node's part of a host. The unit of the lanes is a model, but for `compute`, where it is a CPU second."""

    host: Host
    upload: Lane
    """Updates from clients."""
    receive: Lane
    """Partial aggregates from other nodes."""
    send: Lane
    """Models to other nodes."""
    compute: Lane
    """Passes of workers, and starting these; one core each at most."""
    gateway: Turns
    """The gateway's own work: it is one Python process."""


@dataclass(frozen=True)
class Work:
    """CPU seconds of what a node does, for one model size."""

    receive: float
    """Receive an update."""
    client: float
    """Send one."""
    peer_send: float
    peer_receive: float
    read: float
    """Read a model in a pass."""
    checkpoint: float

    @classmethod
    def of(cls, scenario: Scenario, costs: Costs) -> Work:
        """With these costs."""
        gigabytes = scenario.model_bytes / 1e9
        return cls(
            receive=costs.receive_s_per_gb * gigabytes,
            client=costs.send_s_per_gb * gigabytes,
            peer_send=costs.peer_send_s_per_gb * gigabytes,
            peer_receive=costs.peer_receive_s_per_gb * gigabytes,
            read=costs.fold_s_per_gb * gigabytes,
            checkpoint=costs.checkpoint_s_per_gb * gigabytes,
        )


class Machines:
    """Makes the machines of a scenario: the coordinator's first, then those of the nodes, in order.

    A transfer between nodes is limited where many of them meet: partial aggregates at the node that receives them,
    models at the one that sends them. The other end's cores are not slowed down by it.
    """

    def __init__(self, scenario: Scenario, costs: Costs, loop: EventLoop) -> None:
        self._scenario = scenario
        self._work = Work.of(scenario, costs)
        self._flow = costs.flow_gb_per_s * 1e9 / scenario.model_bytes
        self._loop = loop
        self._shared = Host(loop, scenario.shared_cores) if scenario.shared_cores else None

    def __iter__(self) -> Iterator[Machine]:
        cores = repeat(1) if self._shared else map(self._scenario.cores_of, count())
        yield self._machine(1)
        for each in cores:
            yield self._machine(each)

    def _machine(self, cores: int) -> Machine:
        work, scenario = self._work, self._scenario
        client = scenario.client_mbit * 125e3 / scenario.model_bytes or math.inf
        incoming, outgoing = (Link(rate) if (rate := self._link_rate()) else None for _ in range(2))
        host, compute = self._shared or Host(self._loop, cores), Lane(1.0, 1.0)
        return Machine(
            host,
            self._lane(work.receive, work.client, min(client, self._flow), incoming),
            self._lane(work.peer_receive, work.peer_send, self._flow, incoming),
            self._lane(work.peer_send, work.peer_receive, self._flow, outgoing),
            compute,
            Turns(host, compute, 1),
        )

    def _link_rate(self) -> float:
        return self._scenario.link_gbit * 125e6 / self._scenario.model_bytes

    def _lane(self, here: float, there: float, most: float, link: Link | None) -> Lane:
        """A lane of transfers; where the other end is on the same cores, both work at the same time."""
        cpu = here + there if self._shared else here
        busiest = max(here, there) if self._shared else here
        return Lane(cpu, min(most, 1 / busiest) if busiest else most, link)

"""What a router promises, on both data planes, seen from the processes it connects."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from lifl.agent_client import AgentConnection
from lifl.descriptor import MAX_BATCH, SIZE, Descriptor, Kind, encode
from lifl.endpoint import Endpoint
from lifl.errors import ProtocolError
from lifl.messages import endpoint_id

from tests.integration.agent_process import (
    PATIENCE,
    AgentProcess,
    allow,
    ask_for_worker,
    bounces_until,
    collect,
    kill,
    left_endpoint,
    nothing_comes,
    traffic,
)

pytestmark = pytest.mark.timeout(60)
CREDIT = 256


class Node(NamedTuple):
    agent: AgentProcess
    coordinator: AgentConnection
    zygote: AgentConnection
    gateway: AgentConnection
    leaf: AgentConnection
    top: AgentConnection


@pytest.fixture
def node(tmp_path: Path, data_plane: str) -> Iterator[Node]:
    agent = AgentProcess(tmp_path, data_plane, "--credit", str(CREDIT))
    try:
        assert agent.ready["data_plane"] == data_plane
        coordinator, zygote = agent.coordinator(), agent.zygote()
        gateway = agent.gateway()
        leaf = agent.worker(coordinator, zygote)
        yield Node(agent, coordinator, zygote, gateway, leaf, agent.worker(coordinator, zygote))
    finally:
        agent.stop()


def end(connection: AgentConnection) -> Endpoint:
    assert connection.endpoint is not None
    return connection.endpoint


def test_a_descriptor_arrives_as_it_was_sent(node: Node) -> None:
    gateway, leaf = end(node.gateway), end(node.leaf)
    gateway.send(leaf.identifier, 0xDEADBEEF, 65537, Kind.UPDATE, 257)
    (item,) = collect(leaf, 1)
    assert item == (leaf.identifier, gateway.identifier, 0xDEADBEEF, 1, Kind.UPDATE, 1)
    assert nothing_comes(gateway)


def test_a_forged_source_is_overwritten(node: Node) -> None:
    gateway, leaf, top = end(node.gateway), end(node.leaf), end(node.top)
    forged = bytearray(encode(leaf.identifier, 1, 1, Kind.UPDATE))
    forged[4:8] = top.identifier.to_bytes(4, "little")
    for copies in (1, 3, MAX_BATCH):
        gateway.near.send(bytes(forged) * copies)
        assert {item.source for item in collect(leaf, copies)} == {gateway.identifier}


def test_what_the_policy_denies_comes_back_and_counts(node: Node) -> None:
    leaf, top = end(node.leaf), end(node.top)
    leaf.send(top.identifier, 5, 1, Kind.PARTIAL)
    (item,) = collect(leaf, 1, bounces=True)
    assert (item.slot, item.source) == (5, leaf.identifier)
    assert nothing_comes(top)
    counts = traffic(node.coordinator)
    assert counts[leaf.identifier]["denied"] == 1
    allow(node.coordinator, (leaf.identifier, top.identifier))
    leaf.send(top.identifier, 6, 1, Kind.PARTIAL)
    assert collect(top, 1)[0].slot == 6


@pytest.mark.parametrize(
    ("source", "destination", "passes"),
    [
        ("coordinator", "leaf", True),
        ("leaf", "coordinator", True),
        ("coordinator", "gateway", True),
        ("gateway", "coordinator", True),
        ("gateway", "leaf", True),
        ("leaf", "gateway", False),
        ("leaf", "leaf", False),
        ("gateway", "gateway", False),
    ],
)
def test_the_default_policy_is_the_documented_one(node: Node, source: str, destination: str, passes: bool) -> None:
    sender, receiver = end(getattr(node, source)), end(getattr(node, destination))
    sender.send(receiver.identifier, 1, 1, Kind.FOLDED)
    if passes:
        assert collect(receiver, 1)[0].source == sender.identifier
    else:
        assert collect(sender, 1, bounces=True)


def test_what_nobody_has_comes_back_and_counts(node: Node) -> None:
    gateway = end(node.gateway)
    gateway.send(endpoint_id("worker", 999), 1, 1, Kind.UPDATE)
    assert collect(gateway, 1, bounces=True)[0].destination == endpoint_id("worker", 999)
    assert traffic(node.coordinator)[0]["unroutable"] == 1


def test_used_up_credit_bounces_and_recovers_when_the_receiver_reads(node: Node) -> None:
    gateway, leaf = end(node.gateway), end(node.leaf)
    bounced: list[Descriptor] = []
    for number in range(1000):
        gateway.send(leaf.identifier, number, 1, Kind.UPDATE)
        # The unix router keeps only so many bounces for a sender that does not read them.
        bounced += gateway.bounced()
    bounced += collect(gateway, 1000 - CREDIT - len(bounced), bounces=True)
    assert [item.slot for item in bounced] == list(range(CREDIT, 1000))
    assert [item.slot for item in collect(leaf, CREDIT)] == list(range(CREDIT))
    assert traffic(node.coordinator)[leaf.identifier]["full"] == 1000 - CREDIT
    gateway.send(leaf.identifier, 7, 1, Kind.UPDATE)
    assert collect(leaf, 1)[0].slot == 7


def test_a_receiver_that_claims_too_much_gets_nothing_and_harms_nobody(node: Node) -> None:
    gateway, leaf, top = end(node.gateway), end(node.leaf), end(node.top)
    assert leaf._credit is not None
    leaf._credit[0] = 1 << 60
    gateway.send(leaf.identifier, 1, 1, Kind.UPDATE)
    assert collect(gateway, 1, bounces=True)
    gateway.send(top.identifier, 2, 1, Kind.UPDATE)
    assert collect(top, 1)[0].slot == 2


def test_a_send_with_two_destinations_comes_back_whole(node: Node) -> None:
    gateway, leaf, top = end(node.gateway), end(node.leaf), end(node.top)
    one, two = (encode(receiver.identifier, 1, 1, Kind.UPDATE) for receiver in (leaf, top))
    for parts in ([one, two], [one] * (MAX_BATCH - 1) + [two]):
        gateway.near.send(b"".join(parts))
        assert len(collect(gateway, len(parts), bounces=True)) == len(parts)
    assert nothing_comes(leaf)
    assert nothing_comes(top)
    assert traffic(node.coordinator)[gateway.identifier]["denied"] == 2 + MAX_BATCH
    with pytest.raises(ProtocolError):
        gateway.send_many(leaf.identifier, [one, two])


@pytest.mark.parametrize("size", [1, 15, 17, MAX_BATCH * SIZE + SIZE, 3000])
def test_a_send_of_the_wrong_size_reaches_nobody(node: Node, size: int) -> None:
    gateway, leaf = end(node.gateway), end(node.leaf)
    gateway.near.send((encode(leaf.identifier, 1, 1, Kind.UPDATE) * 200)[:size])
    gateway.far.settimeout(PATIENCE)
    assert gateway.far.recv(65536)
    assert nothing_comes(leaf)
    assert traffic(node.coordinator)[gateway.identifier]["denied"] == max(1, size // SIZE)


def test_an_oversized_send_and_an_empty_one_leave_the_others_alone(node: Node) -> None:
    leaf, top, gateway = end(node.leaf), end(node.top), end(node.gateway)
    leaf.near.settimeout(PATIENCE)
    leaf.near.send(b"\xff" * 100_000)
    leaf.near.send(b"")
    gateway.send(top.identifier, 1, 1, Kind.UPDATE)
    assert collect(top, 1)


def test_a_thousand_descriptors_coalesce_in_order(node: Node) -> None:
    gateway, leaf = end(node.gateway), end(node.leaf)
    sent = 0
    received: list[int] = []
    while sent < 1000:
        batch = min(CREDIT // 2, 1000 - sent)
        gateway.send_many(
            leaf.identifier, (encode(leaf.identifier, sent + k, 1, Kind.UPDATE) for k in range(batch))
        )
        sent += batch
        received += [item.slot for item in collect(leaf, batch)]
    assert received == list(range(1000))
    counts = traffic(node.coordinator)[leaf.identifier]
    assert counts["descriptors"] == 1000
    assert counts["bytes"] == 1000 * SIZE


def test_sends_that_straddle_two_pages_are_routed_like_any_other(node: Node) -> None:
    gateway, leaf = end(node.gateway), end(node.leaf)
    choose = random.Random(1)
    for number in range(3000):
        count = choose.randrange(1, MAX_BATCH + 1)
        gateway.near.send(b"?" * choose.randrange(1, 40))  # moves the kernel's page fragment by an odd number
        gateway.near.send(encode(leaf.identifier, number, 1, Kind.UPDATE) * count)
        assert {item[1:3] for item in collect(leaf, count)} == {(gateway.identifier, number)}
        gateway.bounced()


def test_the_counters_tell_when_and_how_often_descriptors_come(node: Node) -> None:
    gateway, leaf = end(node.gateway), end(node.leaf)
    before = time.monotonic_ns()
    for _ in range(40):
        gateway.send(leaf.identifier, 1, 1, Kind.UPDATE)
        time.sleep(0.005)
    collect(leaf, 40)
    counts = traffic(node.coordinator)[leaf.identifier]
    assert before < counts["last_nanoseconds"] < time.monotonic_ns()
    assert 4e6 < counts["interarrival_nanoseconds"] < 60e6


_SENDER = """
import os, sys
from lifl.agent_client import join
from lifl.descriptor import Kind
from lifl.messages import Hello
connection = join(sys.argv[1], Hello("worker", ticket=sys.argv[2]))
for number in range(int(sys.argv[4])):
    connection.endpoint.send(int(sys.argv[3]), number, 1, Kind.FOLDED)
print(connection.welcome.endpoint, flush=True)
sys.stdin.read()
"""


def start_sender(node: Node, count: int) -> tuple[subprocess.Popen[bytes], int]:
    """A worker in a process of its own that sends to the coordinator and then waits."""
    spec = ask_for_worker(node.coordinator, node.zygote)
    to = str(end(node.coordinator).identifier)
    process = subprocess.Popen(
        [sys.executable, "-c", _SENDER, node.agent.socket, spec.ticket, to, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def close_pipes(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()


def test_a_killed_worker_has_left_only_after_all_its_descriptors(node: Node) -> None:
    process, endpoint = start_sender(node, 200)
    kill(process)
    close_pipes(process)
    assert left_endpoint(node.coordinator).endpoint == endpoint
    found = end(node.coordinator).receive()
    assert [(item.source, item.slot) for item in found] == [(endpoint, number) for number in range(200)]
    end(node.coordinator).send(endpoint, 1, 1, Kind.CLOSE)
    assert collect(end(node.coordinator), 1, bounces=True)


def test_a_worker_killed_in_the_midst_of_sending_leaves_whole_descriptors(node: Node) -> None:
    spec = ask_for_worker(node.coordinator, node.zygote)
    coordinator = end(node.coordinator)
    process = subprocess.Popen(
        [sys.executable, "-c", _SENDER, node.agent.socket, spec.ticket, str(coordinator.identifier), "100000000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    slots = [item.slot for item in collect_at_least(coordinator, 2000)]
    kill(process)
    close_pipes(process)
    left_endpoint(node.coordinator)
    slots += [item.slot for item in coordinator.receive()]
    assert slots == sorted(slots)
    assert coordinator.receive() == []


def collect_at_least(endpoint: Endpoint, count: int) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    while len(found) < count:
        assert endpoint.wait(PATIENCE)
        found += endpoint.receive()
    return found  # type: ignore[return-value]


def test_a_destination_that_is_killed_makes_sends_bounce_and_others_go_on(node: Node) -> None:
    process, endpoint = start_sender(node, 0)
    gateway, leaf = end(node.gateway), end(node.leaf)
    gateway.send(endpoint, 99, 1, Kind.UPDATE)
    kill(process)
    close_pipes(process)
    left_endpoint(node.coordinator)
    for number in range(10):
        gateway.send(endpoint, number, 1, Kind.UPDATE)
    # The first one bounces, too, if it had not arrived before the death.
    bounced = [one.slot for one in bounces_until(gateway, 9)]
    assert bounced in ([*range(10)], [99, *range(10)])
    gateway.send(leaf.identifier, 1, 1, Kind.UPDATE)
    assert collect(leaf, 1)


def test_a_worker_that_only_closes_its_control_connection_can_send_no_more(node: Node) -> None:
    leaf, coordinator = end(node.leaf), end(node.coordinator)
    node.leaf.channel.close()
    left_endpoint(node.coordinator)
    leaf.send(coordinator.identifier, 1, 1, Kind.FOLDED)
    assert nothing_comes(coordinator)


def test_many_unread_bounces_block_nobody(node: Node) -> None:
    gateway, leaf, top = end(node.gateway), end(node.leaf), end(node.top)
    for _ in range(20_000):
        gateway.send(endpoint_id("worker", 999), 1, 1, Kind.UPDATE)
    end(node.coordinator).send(leaf.identifier, 9, 1, Kind.CLOSE)
    assert collect(leaf, 1)[0].slot == 9
    assert gateway.bounced()
    gateway.send(top.identifier, 3, 1, Kind.UPDATE)
    assert collect(top, 1)[0].slot == 3


def test_a_kernel_plane_goes_on_when_its_agent_is_killed(node: Node) -> None:
    gateway, leaf = end(node.gateway), end(node.leaf)
    node.agent.kill()
    gateway.send(leaf.identifier, 4, 1, Kind.UPDATE)
    if node.agent.ready["data_plane"] == "ebpf":
        assert collect(leaf, 1)[0].slot == 4
    else:
        assert len(gateway.bounced()) == 1
        assert leaf.receive() == []
        assert leaf.closed


def test_an_endpoint_wakes_a_waiting_process(node: Node) -> None:
    gateway, leaf = end(node.gateway), end(node.leaf)
    assert not leaf.wait(0.01)
    gateway.send(leaf.identifier, 1, 1, Kind.UPDATE)
    assert leaf.wait(PATIENCE)
    read, write = os.pipe()
    try:
        os.write(write, b"!")
        assert leaf.receive()
        assert leaf.wait(PATIENCE, others=[read])
    finally:
        os.close(read)
        os.close(write)


def test_an_idle_node_costs_the_agent_no_time(node: Node) -> None:
    time.sleep(0.1)
    before = node.agent.cpu_ticks()
    leaf = end(node.leaf)
    leaf.near.shutdown(1)  # hangs up one way; must not wake the agent for ever
    time.sleep(0.5)
    assert node.agent.cpu_ticks() - before <= 2

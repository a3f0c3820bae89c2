"""A gateway and other nodes: partial aggregates in and out, models to whoever asks."""

import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from lifl.descriptor import Kind
from lifl.errors import Busy, Refused, Unavailable
from lifl.messages import (
    Acknowledged,
    AcquireModel,
    BusySlots,
    CommitPartial,
    DescribeUplink,
    ModelSource,
    OfferPartial,
    PartialSent,
    PartialVerdict,
    Problem,
    Uplink,
    endpoint_id,
)
from lifl.peer.checksum import FileRange
from lifl.peer.client import Outgoing, pull, pull_bytes, push
from lifl.peer.protocol import PartialOffer, PullRequest
from lifl.peer.security import Credentials
from lifl.pool import MappedPool
from lifl.slot import PARTIAL_SEAL_OFFSET, Seal, UpdateHeader, slot_reference, split_slot_reference
from lifl_gateway.peer_exchange import PeerOptions

from tests.integration.gateway_harness import (
    AGGREGATES_POOL,
    AGGREGATOR,
    JOB,
    UPDATES_POOL,
    Node,
    as_body,
    eventually,
)
from tests.integration.peer_harness import GivingNode, Link, quick

VALUES = 600_000
NONCE = 0xABC
ACCUMULATOR = slot_reference(AGGREGATES_POOL, 2)
OPEN = PartialVerdict("open", updates_pool=UPDATES_POOL, aggregates_nonce=1001)
ACCEPTED = PartialVerdict("accepted", AGGREGATOR)
WORKER, COORDINATOR = endpoint_id("worker", 3), endpoint_id("coordinator", 1)


class PeerNode(Node):
    """A node whose gateway keeps the pools' file descriptors, as the process does."""

    def __init__(self, directory, **options):
        super().__init__(directory, values=VALUES, peers=PeerOptions("127.0.0.1:0", **options))

    def start_gateway(self):
        join = type(self.agent).join

        def join_and_keep():
            connection = join(self.agent)
            for number, pool in connection.pools.items():
                pool.close()
                info, fd = self.agent._memory[number]
                connection.pools[number] = MappedPool(info, os.dup(fd), keep_fd=True)
            return connection

        self.agent.join = join_and_keep
        super().start_gateway()

    @property
    def peer_address(self):
        return self.gateway.peers.address

    @property
    def memory(self):
        return self.coordinator.memory[JOB]

    def asked(self, kind):
        return [question for question in self.coordinator.questions if isinstance(question, kind)]

    def send_from(self, source, slot=ACCUMULATOR, kind=Kind.PARTIAL, round_number=1):
        """Bring the gateway a descriptor as the router does."""
        data = struct.pack("<IIIHBB", self.gateway.link.endpoint_id, source, slot, round_number, kind, 5)
        self.agent._near.send(data)


@pytest.fixture
def node(tmp_path):
    node = PeerNode(tmp_path)
    node.coordinator.answers = {OfferPartial: OPEN, CommitPartial: ACCEPTED}
    yield node
    node.close()


def offer_of(nbytes, **changes):
    offer = PartialOffer(JOB, NONCE, 1, 2, 3, "left", 5, nbytes, 4, 6, 96.5, 0.5)
    for name, value in changes.items():
        setattr(offer, name, value)
    return offer


@pytest.fixture
def sums():
    """The bytes of a partial aggregate, and a way to push them."""

    class Sums:
        data = os.urandom(4 * (VALUES + 1))
        file = os.memfd_create("sums")
        os.pwrite(file, data, 0)

        def push(self, address, **changes):
            part = FileRange(self.file, 0, len(self.data), memoryview(self.data))
            return push(address, offer_of(len(self.data), **changes), Outgoing(part))

    sums = Sums()
    yield sums
    os.close(sums.file)


# --- partial aggregates in -----------------------------------------------------------------------------------


def test_a_partial_aggregate_lands_in_a_slot_with_its_seal_and_its_descriptor_at_the_aggregator(node, sums):
    assert sums.push(node.peer_address) == "accepted"
    (question,) = node.asked(CommitPartial)
    pool, index = split_slot_reference(question.slot)
    updates, _ = node.memory
    assert pool == UPDATES_POOL
    assert updates.payload(index, len(sums.data)) == sums.data
    seal = Seal.unpack_from(updates.header(index), PARTIAL_SEAL_OFFSET)
    assert seal == Seal(1001, 1, 5, 4, 6, 96.5, 0.5, ())
    assert UpdateHeader.unpack_from(updates.header(index)).generation == question.generation == 1
    assert (question.round, question.attempt, question.epoch, question.source) == (1, 2, 3, "left")
    assert (question.updates, question.nbytes) == (6, len(sums.data))
    assert question.gateway == node.gateway.link.endpoint_id
    assert eventually(lambda: node.agent.received)
    message = node.agent.received[0]
    assert message.destination == AGGREGATOR
    assert (message.slot, message.round, message.kind, message.generation) == (question.slot, 1, Kind.PARTIAL, 1)
    assert node.free_slots == 7


def test_its_slot_is_free_again_when_it_is_released(node, sums):
    sums.push(node.peer_address)
    (question,) = node.asked(CommitPartial)
    node.agent.release(question.slot, 1, question.generation)
    assert eventually(lambda: node.free_slots == 8)


def test_no_descriptor_is_sent_when_the_aggregator_is_only_being_started(node, sums):
    node.coordinator.answers[CommitPartial] = PartialVerdict("accepted", 0)
    assert sums.push(node.peer_address) == "accepted"
    node.post()  # the next descriptor is that of an update
    assert eventually(lambda: node.agent.received)
    assert node.agent.received[0].kind == Kind.UPDATE


def test_a_cut_link_costs_neither_a_byte_nor_a_slot(node, sums):
    link = Link(node.peer_address, cuts=[1_000_000, 700_000], upstream=True)
    try:
        for _ in range(2):
            with pytest.raises(Unavailable):
                sums.push(link.address)
            assert node.free_slots == 7
        assert sums.push(link.address) == "accepted"
        assert link.passed < len(sums.data) + 500_000  # and not 1.7 MB more
    finally:
        link.close()
    assert len(node.asked(OfferPartial)) == 1
    updates, _ = node.memory
    _, index = split_slot_reference(node.asked(CommitPartial)[0].slot)
    assert updates.payload(index, len(sums.data)) == sums.data


def test_an_unfinished_one_frees_its_slot_when_a_newer_one_comes(node, sums):
    link = Link(node.peer_address, cuts=[1_000_000], upstream=True)
    try:
        with pytest.raises(Unavailable):
            sums.push(link.address)
        assert eventually(lambda: not node.gateway.peers._server._connections)
        assert sums.push(link.address, epoch=4) == "accepted"
    finally:
        link.close()
    assert node.free_slots == 7


def test_what_is_not_wanted_is_refused_before_it_is_sent(node, sums):
    node.coordinator.answers[OfferPartial] = PartialVerdict("refused")
    with pytest.raises(Refused, match="Not wanted"):
        sums.push(node.peer_address)
    node.coordinator.answers[OfferPartial] = PartialVerdict("duplicate")
    assert sums.push(node.peer_address) == "duplicate"
    node.coordinator.answers[OfferPartial] = Problem(503, "not there yet", retry_after=0.02)
    with pytest.raises(Busy) as caught:
        sums.push(node.peer_address)
    assert caught.value.retry_after == 0.02
    assert node.free_slots == 8


def test_what_does_not_fit_a_slot_is_refused(node, sums):
    sums.data += bytes(8192)
    with pytest.raises(Refused, match="Too Large"):
        sums.push(node.peer_address)
    assert node.free_slots == 8


def test_a_node_without_a_free_slot_is_busy(node, sums):
    for number in range(8):
        assert sums.push(node.peer_address, source=f"node-{number}") == "accepted"
    with pytest.raises(Busy):
        sums.push(node.peer_address, source="one more")


@pytest.mark.parametrize("status", ["refused", "duplicate"])
def test_what_does_not_count_at_the_end_frees_its_slot(node, sums, status):
    node.coordinator.answers[CommitPartial] = PartialVerdict(status)
    assert sums.push(node.peer_address) == status
    assert node.free_slots == 8
    assert not node.agent.received


def test_a_commit_without_an_answer_leaves_its_slot_alone_until_the_coordinator_is_asked(node, sums):
    node.coordinator.answers[CommitPartial] = Acknowledged()  # no answer to this question
    with pytest.raises(Busy, match="instead of"):
        sums.push(node.peer_address)
    assert node.free_slots == 7
    (question,) = node.asked(CommitPartial)
    node.coordinator.busy[question.slot] = question.generation
    node.coordinator.answers[CommitPartial] = ACCEPTED
    before = len(node.asked(BusySlots))
    assert sums.push(node.peer_address) == "accepted"
    assert len(node.asked(BusySlots)) == before + 1
    assert node.free_slots == 6, "it counts, so its slot is in use"
    assert node.asked(CommitPartial)[1].slot != question.slot


def test_a_gateway_started_anew_goes_on_with_the_generation_of_a_partial_aggregate(node, sums):
    for number in range(3):
        sums.push(node.peer_address, source=f"node-{number}")
        question = node.asked(CommitPartial)[-1]
        node.agent.release(question.slot, 1, question.generation)
        assert eventually(lambda: node.free_slots == 8)
    node.stop_gateway()
    node.start_gateway()
    generations = []
    for number in range(8):
        sums.push(node.peer_address, source=f"after-{number}")
        generations.append(node.asked(CommitPartial)[-1].generation)
    assert sorted(generations) == [1] * 7 + [4]


# --- partial aggregates out ----------------------------------------------------------------------------------


@pytest.fixture
def target():
    target = GivingNode(b"", limits=quick())
    yield target
    target.close()


class Sealed:
    """A finished accumulator on the node."""

    def __init__(self, node, sequence=5):
        self.node = node
        _, self.aggregates = node.memory
        self.write(sequence)
        node.coordinator.answers |= {DescribeUplink: Uplink(), PartialSent: Acknowledged()}

    def write(self, sequence):
        self.data = os.urandom(4 * (VALUES + 1))
        self.aggregates.payload(2, len(self.data))[:] = self.data
        Seal(1001, 1, sequence, 4, 6, 96.5, 0.5, ()).pack_into(self.aggregates.header(2))

    def uplink(self, address, **changes):
        fields = {"epoch": 3, "attempt": 2} | changes
        return Uplink(address, JOB, NONCE, 1, source="here", nbytes=len(self.data), **fields)

    def go_to(self, *addresses):
        """Where it goes, asked for the first time, the second, and so on."""
        left = list(addresses)
        self.node.coordinator.answers[DescribeUplink] = lambda question: self.uplink(
            left.pop(0) if len(left) > 1 else left[0]
        )


@pytest.fixture
def sealed(node):
    return Sealed(node)


def is_sent(node):
    return eventually(lambda: node.asked(PartialSent))


def test_a_partial_aggregate_of_this_node_goes_to_the_node_that_wants_it(node, sealed, target):
    sealed.go_to(target.address)
    node.send_from(WORKER)
    assert is_sent(node)
    (taken,) = target.taken
    assert taken.memory == sealed.data
    assert taken.ends == ["commit"]
    assert taken.offer == PartialOffer(JOB, NONCE, 1, 2, 3, "here", 5, len(sealed.data), 4, 6, 96.5, 0.5)
    assert node.asked(DescribeUplink) == [DescribeUplink(ACCUMULATOR, 1)]
    assert node.asked(PartialSent) == [PartialSent(JOB, 1, 2, 3)]


def test_it_goes_on_where_a_cut_link_stopped_it(node, sealed, target):
    link = Link(target.address, cuts=[800_000, 900_000], upstream=True)
    try:
        sealed.go_to(link.address)
        node.send_from(WORKER)
        assert is_sent(node)
        assert link.passed < len(sealed.data) + 500_000  # and not 1.7 MB more
    finally:
        link.close()
    assert [taken.memory == sealed.data for taken in target.taken] == [True]
    assert len(node.asked(DescribeUplink)) == 3, "asked before each attempt"


def test_it_goes_elsewhere_when_another_node_wants_it(node, sealed, target):
    gone = GivingNode(b"", limits=quick())
    gone.close()
    sealed.go_to(gone.address, gone.address, target.address)
    node.send_from(WORKER)
    assert is_sent(node)
    assert target.taken[0].memory == sealed.data


def test_it_is_tried_again_when_the_other_node_has_not_heard_of_it_or_is_full(node, sealed, target):
    target.problems = [Refused(409, "Not wanted"), Busy("Full", retry_after=0.01), Unavailable("no agent")]
    sealed.go_to(target.address)
    node.send_from(WORKER)
    assert is_sent(node)
    assert len(node.asked(DescribeUplink)) == 4


def test_damage_on_the_way_is_repaired(node, sealed, target):
    link = Link(target.address, flips=[1_500_000], upstream=True)
    try:
        sealed.go_to(link.address)
        node.send_from(WORKER)
        assert is_sent(node)
    finally:
        link.close()
    assert [taken.memory == sealed.data for taken in target.taken] == [True]


def test_the_same_partial_aggregate_again_is_sent_no_second_time(node, sealed, target):
    sealed.go_to(target.address)
    node.send_from(WORKER)
    assert is_sent(node)
    target.is_duplicate = True
    node.send_from(WORKER)
    assert eventually(lambda: len(node.asked(PartialSent)) == 2)
    assert len(target.taken) == 1


def test_what_is_wanted_nowhere_is_dropped(node, sealed):
    node.send_from(WORKER)
    assert eventually(lambda: node.asked(DescribeUplink))
    time.sleep(0.1)
    assert len(node.asked(DescribeUplink)) == 1


def test_a_newer_partial_aggregate_takes_the_place_of_one_that_waits(node, sealed, target):
    target.problems = [Refused(409, "Not wanted")] * 3
    sealed.go_to(target.address)
    node.send_from(WORKER)
    assert eventually(lambda: node.asked(DescribeUplink))
    sealed.write(6)
    node.send_from(WORKER)
    assert is_sent(node)
    assert target.taken[-1].memory == sealed.data
    assert target.taken[-1].offer.sequence == 6
    time.sleep(0.1)
    assert len(node.asked(PartialSent)) == 1


def test_a_slot_without_a_seal_is_not_sent(node, sealed, target):
    sealed.aggregates.header(2)[:4] = bytes(4)
    sealed.go_to(target.address)
    node.send_from(WORKER)
    assert eventually(lambda: len(node.asked(DescribeUplink)) > 1)
    assert not target.taken
    sealed.write(5)
    assert is_sent(node)


def test_only_an_aggregator_may_have_something_sent_and_only_out_of_its_pool(node, sealed, target):
    sealed.go_to(target.address)
    node.send_from(COORDINATOR)
    node.send_from(endpoint_id("gateway", 2))
    node.send_from(WORKER, slot=slot_reference(UPDATES_POOL, 0))
    node.send_from(WORKER, slot=slot_reference(AGGREGATES_POOL, 4))
    node.send_from(WORKER, slot=slot_reference(77, 0))
    node.send_from(WORKER, kind=Kind.FOLDED)
    node.send_from(WORKER)
    assert is_sent(node)
    assert len(node.asked(DescribeUplink)) == 1


def test_a_slow_receiver_keeps_nothing_else_waiting(node, sealed, target):
    blocked = threading.Event()
    held = threading.Event()

    def hold():
        held.set()
        blocked.wait(10)

    target.verdict = hold
    sealed.go_to(target.address)
    node.send_from(WORKER)
    assert held.wait(5)
    assert node.post()[0] == 202
    node.coordinator.release_all()
    assert eventually(lambda: node.free_slots == 8), "the gateway still reads its descriptors"
    blocked.set()
    assert is_sent(node)


def test_a_gateway_stops_while_it_cannot_reach_anybody(node, sealed):
    gone = GivingNode(b"", limits=quick())
    gone.close()
    sealed.go_to(gone.address)
    node.send_from(WORKER)
    assert eventually(lambda: len(node.asked(DescribeUplink)) > 2)
    node.stop_gateway()
    node.start_gateway()


def test_from_gateway_to_gateway(node, sealed, tmp_path):
    other_directory = tmp_path / "other"
    other_directory.mkdir()
    other = PeerNode(other_directory)
    try:
        other.coordinator.answers = {OfferPartial: OPEN, CommitPartial: ACCEPTED}
        sealed.go_to(other.peer_address)
        node.send_from(WORKER)
        assert is_sent(node)
        updates, _ = other.memory
        _, index = split_slot_reference(other.asked(CommitPartial)[0].slot)
        assert updates.payload(index, len(sealed.data)) == sealed.data
        assert eventually(lambda: other.agent.received)
    finally:
        other.close()


# --- models --------------------------------------------------------------------------------------------------


def pulled(node, part="model", **changes):
    request = PullRequest(JOB, NONCE, changes.pop("round_number", 1), part)
    return pull_bytes([node.peer_address], request, 1 << 30, patience=5, **changes)


def test_a_model_is_given_out_of_its_slot_and_the_slot_given_back(node):
    answer, data = pulled(node)
    assert data == as_body(node.header, node.payload)
    assert (answer.round, answer.header_bytes) == (1, 8 + len(node.header))
    assert eventually(lambda: not node.coordinator.leases)


def test_a_model_is_given_out_of_its_file(node, tmp_path):
    node.coordinator.model_in_file = tmp_path / "model"
    node.coordinator.model_in_file.write_bytes(node.body)
    answer, data = pulled(node, round_number=0)
    assert data == node.body
    assert (answer.round, answer.header_bytes) == (1, 8 + len(node.header))


@pytest.mark.parametrize("in_file", [True, False])
def test_the_header_is_given_alone(node, tmp_path, in_file):
    if in_file:
        node.coordinator.model_in_file = tmp_path / "model"
        node.coordinator.model_in_file.write_bytes(node.body)
    answer, data = pulled(node, "header")
    assert data == node.body[: 8 + len(node.header)]
    assert answer.total == answer.header_bytes == len(data)


def test_a_model_goes_straight_into_the_slot_of_another_pool(node):
    _, aggregates = node.memory
    header = bytearray(8 + len(node.header))
    payload = aggregates.payload(3, len(node.payload))
    payload[:] = bytes(len(payload))
    request = PullRequest(JOB, NONCE, 1)
    pull([node.peer_address], request, lambda answer: [memoryview(header), payload])
    assert payload == node.payload


def test_the_arrays_of_the_optimiser_are_given_from_memory_or_from_their_file(node, tmp_path):
    _, aggregates = node.memory
    slots = tuple(slot_reference(AGGREGATES_POOL, index) for index in (2, 3))
    for index in (2, 3):
        aggregates.payload(index, 5000)[:] = bytes([index]) * 5000
    expected = b"\2" * 5000 + b"\3" * 5000
    source = ModelSource(1, "", 9, state_slots=slots, state_bytes=5000)
    node.coordinator.answers[AcquireModel] = source
    answer, data = pulled(node, "state")
    assert data == expected
    assert answer.header_bytes == 0
    path = tmp_path / "state"
    path.write_bytes(expected)
    node.coordinator.answers[AcquireModel] = ModelSource(1, "", 0, state_path=str(path))
    assert pulled(node, "state")[1] == expected
    node.coordinator.answers[AcquireModel] = ModelSource(1, "", 0)
    with pytest.raises(Refused, match="No such state"):
        pulled(node, "state")


def test_a_model_that_is_not_here_is_refused(node, tmp_path):
    with pytest.raises(Refused, match="no such model"):
        pulled(node, round_number=9)
    with pytest.raises(Refused, match="No such job"):
        pull_bytes([node.peer_address], PullRequest(JOB, NONCE + 1, 1), 1 << 30)
    with pytest.raises(Refused, match="No such job"):
        pull_bytes([node.peer_address], PullRequest("other", NONCE, 1), 1 << 30)
    node.coordinator.model_in_file = tmp_path / "gone"
    with pytest.raises(Refused, match="not kept any more"):
        pulled(node)
    node.coordinator.model_in_file = tmp_path / "damaged"
    node.coordinator.model_in_file.write_bytes(b"\xff" * 100)
    with pytest.raises(Refused, match="damaged"):
        pulled(node)


def test_a_receiver_that_vanishes_does_not_keep_the_slot(node):
    link = Link(node.peer_address, cuts=[100_000])
    try:
        with pytest.raises(Unavailable):
            pull(
                [link.address], PullRequest(JOB, NONCE, 1), lambda a: [memoryview(bytearray(a.total))], patience=0
            )
    finally:
        link.close()
    assert eventually(lambda: not node.coordinator.leases)


# --- options and resources -----------------------------------------------------------------------------------


def test_the_token_of_the_cluster_is_asked_for(tmp_path, sums):
    node = PeerNode(tmp_path, credentials=Credentials("sesame"))
    try:
        with pytest.raises(Refused, match="Unauthorized"):
            sums.push(node.peer_address)
        assert not node.asked(OfferPartial)
        assert pulled(node, "header", credentials=Credentials("sesame"))[1]
    finally:
        node.close()


def test_the_file_of_a_pool_is_closed_when_the_pool_is_gone(node):
    def open_pools():
        links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return sum("pool-9" in link for link in links)

    state = node.coordinator
    for _ in range(3):
        state._next_pool = 90
        state.add_job("short", node.header, node.payload)
        assert eventually(lambda: len(node.gateway.link.pools()) == 2)
        for memory in state.memory.pop("short"):
            node.agent.drop_pool(memory.info.pool)
            memory.close()
        assert eventually(lambda: len(node.gateway.link.pools()) == 1)
        assert eventually(lambda: open_pools() == 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peer-address", "0.0.0.0:0"], "other machines"),
        (["--peer-address", "8090"], "HOST:PORT"),
        (["--peer-certificate", "node.pem"], "all three"),
        (["--member-token-file", "/none"], "/none"),
    ],
)
def test_it_does_not_start_with_options_that_cannot_be(tmp_path, arguments, words):
    where = ["--runtime-directory", tmp_path, "--state-directory", tmp_path, "--port", "0"]
    command = [sys.executable, "-m", "lifl_gateway", *where, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert finished.returncode == 2
    assert words in finished.stderr
    assert "Traceback" not in finished.stderr

"""Bulk bytes between nodes over real sockets: whole, cut, damaged, refused, forged."""

import os
import random
import socket
import threading
import time
from contextlib import ExitStack
from itertools import count

import pytest
from lifl.errors import Busy, InvalidInput, Refused, Unavailable
from lifl.peer.checksum import PIECE_BYTES, Corrupt, FileRange
from lifl.peer.client import Outgoing, pull, pull_bytes, pull_file, push
from lifl.peer.interruption import Interrupted, Interruption
from lifl.peer.protocol import LENGTH, OfferAnswer, PartialOffer, PeerHello, PullRequest, encode
from lifl.peer.security import Credentials
from lifl.peer.server import PeerServer
from lifl.peer.transfer import Pace, limit_receive, limit_send, receive_into, send_file

from tests.integration.gateway_harness import eventually
from tests.integration.peer_harness import HEADER, Authority, GivingNode, Link, quick

PAYLOAD = os.urandom(3 * PIECE_BYTES + 12_345)
REQUEST = PullRequest("job", 7, 3)
FAST = Pace(0.3, 1000)


@pytest.fixture
def stack():
    """Closes in reverse order what a test opens."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def opened(stack):
    """Makes things that have `close`."""

    def make(kind, *arguments, **options):
        made = kind(*arguments, **options)
        stack.callback(made.close)
        return made

    return make


@pytest.fixture
def node(opened):
    return opened(GivingNode, PAYLOAD, limits=quick())


class Room:
    """Memory to pull into, made when the size is known."""

    def __init__(self):
        self.header = self.payload = None
        self.calls = 0

    def place(self, answer):
        self.calls += 1
        self.header = bytearray(answer.header_bytes)
        self.payload = bytearray(answer.total - answer.header_bytes)
        return [memoryview(self.header), memoryview(self.payload)]

    def is_right(self, payload=PAYLOAD):
        return self.header == HEADER and self.payload == payload


@pytest.fixture
def room():
    return Room()


class Partial:
    """A partial aggregate in memory that can be sent with sendfile."""

    def __init__(self, payload=PAYLOAD):
        self.fd = os.memfd_create("partial")
        os.pwrite(self.fd, b"before" + payload, 0)
        self.view = memoryview(payload)
        self.offer = PartialOffer("job", 7, 3, 1, 2, "left", 9, len(payload), 2, 4, 64.0, 8.0)

    def outgoing(self):
        return Outgoing(FileRange(self.fd, 6, len(self.view), self.view))

    def close(self):
        os.close(self.fd)


@pytest.fixture
def partial(opened):
    return opened(Partial)


def push_until_final(address, partial, attempts=20, **options):
    """What a sender does; returns the status and how many attempts it took."""
    outgoing = partial.outgoing()
    for attempt in range(1, attempts + 1):
        try:
            status = push(address, partial.offer, outgoing, **options)
        except Unavailable:
            continue
        if status != "corrupt":
            return status, attempt
        outgoing = partial.outgoing()
    raise AssertionError("it never came to an end")


# --- whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 5 * PIECE_BYTES + 3])
@pytest.mark.parametrize("is_mapped", [True, False])
def test_a_model_is_pulled_straight_into_memory(opened, room, size, is_mapped):
    payload = random.Random(size).randbytes(size)
    node = opened(GivingNode, payload, is_mapped=is_mapped)
    answer = pull([node.address], REQUEST, room.place)
    assert (answer.round, answer.total, answer.header_bytes) == (3, len(HEADER) + size, len(HEADER))
    assert room.is_right(payload)


def test_a_header_is_pulled_before_the_rest_is_wanted(node):
    answer, header = pull_bytes([node.address], PullRequest("job", 7, 3, "header"), 1000)
    assert header == HEADER
    assert answer.total == len(HEADER)


def test_a_part_that_is_larger_than_asked_for_is_not_received(node):
    with pytest.raises(InvalidInput, match="at most 1000"):
        pull_bytes([node.address], REQUEST, 1000)


def test_a_model_is_pulled_into_a_file(node, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(bytes(len(PAYLOAD) * 2))
    pull_file([node.address], REQUEST, path)
    assert path.read_bytes() == HEADER + PAYLOAD
    assert path.stat().st_mode & 0o777 == 0o644 & path.stat().st_mode


def test_a_file_that_cannot_be_completed_is_removed(node, tmp_path):
    path = tmp_path / "model"
    with pytest.raises(Refused):
        pull_file([node.address], PullRequest("other", 7, 3), path)
    assert not path.exists()


def test_the_newest_model_is_the_one_that_the_answer_names(node, room):
    assert pull([node.address], PullRequest("job", 7, 0), room.place).round == 3


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, 5 * PIECE_BYTES + 3])
def test_a_partial_aggregate_is_pushed_and_committed_once(node, opened, size):
    partial = opened(Partial, random.Random(size).randbytes(size))
    assert push(node.address, partial.offer, partial.outgoing()) == "accepted"
    (taken,) = node.taken
    assert taken.memory == partial.view
    assert taken.offer == partial.offer
    assert taken.ends == ["commit"]


def test_what_the_receiver_has_already_is_not_sent(node, partial, opened):
    node.is_duplicate = True
    link = opened(Link, node.address, upstream=True)
    assert push(link.address, partial.offer, partial.outgoing()) == "duplicate"
    assert link.passed < 1000


def test_many_transfers_at_once_do_not_mix(opened):
    nodes = [opened(GivingNode, os.urandom(PIECE_BYTES + n)) for n in range(4)]
    rooms = [Room() for _ in range(12)]
    threads = [
        threading.Thread(target=pull, args=([nodes[i % 4].address], REQUEST, room.place))
        for i, room in enumerate(rooms)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(room.is_right(nodes[i % 4].payload) for i, room in enumerate(rooms))


def test_a_sender_works_while_its_receiver_is_slow():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    received = bytearray(len(PAYLOAD) * 8)
    steps = iter(range(5))

    def work():
        return next(steps, None) is not None

    def receive():
        time.sleep(0.2)
        receive_into(right, memoryview(received), Pace())

    fd = os.memfd_create("file")
    os.pwrite(fd, PAYLOAD * 8, 0)
    with left, right:
        limit_send(left, 5)
        limit_receive(right, 5)
        thread = threading.Thread(target=receive)
        thread.start()
        send_file(left, fd, len(received), Pace(), meanwhile=work)
        thread.join()
        assert left.gettimeout() is None
    os.close(fd)
    assert next(steps, None) is None, "all of the work was done"
    assert received == PAYLOAD * 8


# --- cut links -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_pull_goes_on_at_the_byte_where_the_link_was_cut(node, room, opened, seed):
    choose = random.Random(seed)
    cuts = [choose.randrange(1, len(PAYLOAD) // 3) for _ in range(4)]
    link = opened(Link, node.address, cuts=cuts)
    pull([link.address], REQUEST, room.place)
    assert room.is_right()
    assert room.calls == 1
    assert link.connections == 5
    offsets = [request.offset for request in node.requests]
    assert offsets == sorted(offsets)
    assert link.passed < len(PAYLOAD) + sum(cuts) // 2 + 5 * 1000


@pytest.mark.parametrize("seed", range(8))
def test_a_push_goes_on_at_the_byte_where_the_link_was_cut(node, partial, opened, seed):
    choose = random.Random(seed)
    cuts = [choose.randrange(1, len(PAYLOAD) // 3) for _ in range(4)]
    link = opened(Link, node.address, cuts=cuts, upstream=True)
    assert push_until_final(link.address, partial) == ("accepted", 5)
    assert node.taken[-1].memory == PAYLOAD
    # What was on its way when the link was cut may be sent twice, and the heads are.
    assert link.passed < len(PAYLOAD) + sum(cuts) // 2 + 5 * 1000
    assert len(node.taken) == 1


def test_a_push_whose_answer_was_lost_is_a_duplicate_the_next_time(node, partial, opened):
    def counted():
        node.is_duplicate = True

    node.verdict = counted
    link = opened(Link, node.address, cuts=[len(encode(OfferAnswer("open", 0))) + 1])  # inside of PartialAnswer
    outgoing = partial.outgoing()
    with pytest.raises(Unavailable):
        push(link.address, partial.offer, outgoing)
    assert eventually(lambda: node.is_duplicate)
    assert push(link.address, partial.offer, outgoing) == "duplicate"
    assert len(node.taken) == 1


def test_a_model_is_pulled_to_its_end_from_the_second_source_when_the_first_dies(opened, room):
    first, second = (opened(GivingNode, PAYLOAD, limits=quick()) for _ in range(2))
    link = opened(Link, first.address, cuts=[PIECE_BYTES + 7])
    link.at[PIECE_BYTES] = first.server.stop
    pull([link.address, second.address], REQUEST, room.place)
    assert room.is_right()
    assert second.requests[0].offset > 0, "what the first had sent was kept"


def test_a_source_that_has_something_else_is_pulled_from_its_first_byte(opened, room):
    first = opened(GivingNode, PAYLOAD, limits=quick())
    second = opened(GivingNode, PAYLOAD[:-1000], limits=quick())
    link = opened(Link, first.address, cuts=[PIECE_BYTES])
    link.at[PIECE_BYTES // 2] = first.server.stop
    pull([link.address, second.address], REQUEST, room.place)
    assert room.is_right(PAYLOAD[:-1000])


def test_a_link_that_heals_is_used_again(node, room, opened):
    link = opened(Link, node.address, cuts=[0, 0, 0, PIECE_BYTES, 0, 0])
    pull([link.address], REQUEST, room.place, patience=10)
    assert room.is_right()


def test_patience_ends_with_the_last_byte_and_not_before(node, room, opened):
    link = opened(Link, node.address, cuts=[1000, *[0] * 1000])
    started = time.monotonic()
    with pytest.raises(Unavailable):
        pull([link.address], REQUEST, room.place, patience=0.5)
    assert 0.4 < time.monotonic() - started < 5


def test_nobody_there_is_unavailable(partial, room):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(Unavailable):
        pull([address], REQUEST, room.place, patience=0.1)
    with pytest.raises(Unavailable):
        push(address, partial.offer, partial.outgoing())


def test_a_node_that_says_nothing_is_given_up(room, partial):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(Unavailable):
            pull([address], REQUEST, room.place, patience=0.2)
        assert time.monotonic() - started < 2
        interruption = Interruption()
        timer = threading.Timer(0.2, interruption.set)
        timer.start()
        with pytest.raises(Interrupted):
            push(address, partial.offer, partial.outgoing(), interruption=interruption)
        timer.join()


# --- damaged bytes -------------------------------------------------------------------------------------------


def test_a_damaged_byte_is_found_and_the_model_pulled_again(node, room, opened):
    link = opened(Link, node.address, flips=[PIECE_BYTES + 99])
    pull([link.address], REQUEST, room.place)
    assert room.is_right()
    assert link.connections == 2


def test_a_byte_that_was_damaged_before_the_link_was_cut_is_found(node, room, opened):
    link = opened(Link, node.address, cuts=[PIECE_BYTES], flips=[PIECE_BYTES // 2])
    pull([link.address], REQUEST, room.place)
    assert room.is_right()
    assert link.connections == 3


def test_a_link_that_always_damages_is_given_up(node, room, opened):
    link = opened(Link, node.address, flips=[5000] * 10)
    with pytest.raises(Corrupt):
        pull([link.address], REQUEST, room.place)
    assert link.connections == 3


def test_a_damaged_partial_aggregate_is_not_committed_but_sent_again(node, partial, opened):
    link = opened(Link, node.address, flips=[PIECE_BYTES + 99], upstream=True)
    assert push(link.address, partial.offer, partial.outgoing()) == "corrupt"
    (taken,) = node.taken
    assert taken.ends == []
    assert push(link.address, partial.offer, partial.outgoing()) == "accepted"
    assert taken.memory == PAYLOAD
    assert taken.ends == ["commit"]


def test_memory_that_was_written_meanwhile_is_not_committed(node, partial):
    with pytest.raises(Unavailable, match="replaced"):
        push(node.address, partial.offer, partial.outgoing(), is_current=lambda: False)
    assert eventually(lambda: not node.server._connections)
    assert node.taken[0].ends == []


# --- refusals ------------------------------------------------------------------------------------------------


def test_a_source_that_refuses_is_left_for_the_next(opened, room):
    first, second = (opened(GivingNode, PAYLOAD) for _ in range(2))
    first.problems = [Refused(404, "No such model", "here")] * 10
    pull([first.address, second.address], REQUEST, room.place)
    assert room.is_right()
    assert len(first.requests) == 1


def test_a_model_that_nobody_has_is_refused(opened, room):
    nodes = [opened(GivingNode, PAYLOAD) for _ in range(2)]
    with pytest.raises(Refused, match="No such model") as caught:
        pull([node.address for node in nodes], PullRequest("other", 7, 3), room.place)
    assert caught.value.status == 404
    assert room.calls == 0


def test_a_busy_source_is_asked_again(node, room):
    node.problems = [Busy("Full", retry_after=0.05), Unavailable("the coordinator is away")]
    pull([node.address], REQUEST, room.place)
    assert room.is_right()


def test_a_source_that_stays_busy_is_busy_when_patience_is_over(node, room):
    node.problems = [Busy("Full", retry_after=0.01)] * 1000
    with pytest.raises(Busy):
        pull([node.address], REQUEST, room.place, patience=0.2)


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (Busy("Full", "no slot", retry_after=0.5), Busy),
        (Refused(409, "Not wanted", "another round"), Refused),
        (Unavailable("no agent"), Busy),
    ],
)
def test_a_push_that_the_receiver_refuses_says_why(node, partial, problem, kind):
    node.problems = [problem]
    with pytest.raises(kind, match=problem.args[0]):
        push(node.address, partial.offer, partial.outgoing())


def test_a_partial_aggregate_refused_at_the_end_is_final(node, partial):
    node.verdict = "refused"
    assert push(node.address, partial.offer, partial.outgoing()) == "refused"


def test_a_commit_that_fails_says_why_and_is_not_repeated_in_the_same_memory(node, partial):
    def fail():
        raise Unavailable("the coordinator is away")

    node.verdict = fail
    with pytest.raises(Busy, match="coordinator is away"):
        push(node.address, partial.offer, partial.outgoing())
    node.verdict = "accepted"
    assert push(node.address, partial.offer, partial.outgoing()) == "accepted"
    assert [taken.ends for taken in node.taken] == [["commit"], ["commit"]]


def test_an_error_of_the_place_ends_the_pull(node):
    def place(answer):
        raise InvalidInput(f"no room for {answer.total}")

    with pytest.raises(InvalidInput, match="no room"):
        pull([node.address], REQUEST, place)
    with pytest.raises(InvalidInput, match="was given"):
        pull([node.address], REQUEST, lambda answer: [memoryview(bytearray(10))])


# --- unfinished pushes ---------------------------------------------------------------------------------------


def test_an_unfinished_push_is_given_up_after_a_while(partial, opened):
    node = opened(GivingNode, PAYLOAD, limits=quick(keep_seconds=0.2))
    link = opened(Link, node.address, cuts=[PIECE_BYTES], upstream=True)
    with pytest.raises(Unavailable):
        push(link.address, partial.offer, partial.outgoing())
    assert node.taken[0].ends == []
    assert eventually(lambda: node.taken[0].ends == ["abandon"])
    assert push(link.address, partial.offer, partial.outgoing()) == "accepted"


def test_a_newer_partial_aggregate_takes_the_place_of_an_unfinished_one(node, partial, opened):
    link = opened(Link, node.address, cuts=[PIECE_BYTES], upstream=True)
    with pytest.raises(Unavailable):
        push(link.address, partial.offer, partial.outgoing())
    assert eventually(lambda: not node.server._connections)
    partial.offer.epoch += 1
    assert push(link.address, partial.offer, partial.outgoing()) == "accepted"
    assert [taken.ends for taken in node.taken] == [["abandon"], ["commit"]]


def test_a_new_connection_takes_over_from_one_that_is_dead(partial, opened):
    node = opened(GivingNode, PAYLOAD, limits=quick(pace=Pace(30, 1000)))
    link = opened(Link, node.address, upstream=True)

    def freeze():
        link.is_frozen = True

    link.at[PIECE_BYTES] = freeze
    interruption = Interruption()

    def push_and_freeze():
        with pytest.raises((Interrupted, Unavailable)):
            push(link.address, partial.offer, partial.outgoing(), interruption=interruption)

    thread = threading.Thread(target=push_and_freeze)
    thread.start()
    assert eventually(lambda: link.is_frozen)
    started = time.monotonic()
    assert push(node.address, partial.offer, partial.outgoing()) == "accepted"
    assert time.monotonic() - started < 3
    assert len(node.taken) == 1
    interruption.set()
    thread.join(5)


def test_there_is_a_limit_to_unfinished_pushes(partial, opened):
    node = opened(GivingNode, PAYLOAD, limits=quick(receptions=2))
    link = opened(Link, node.address, cuts=[PIECE_BYTES] * 2, upstream=True)
    for source in ("a", "b"):
        partial.offer.source = source
        with pytest.raises(Unavailable):
            push(link.address, partial.offer, partial.outgoing())
    partial.offer.source = "c"
    with pytest.raises(Busy):
        push(link.address, partial.offer, partial.outgoing())
    partial.offer.source = "a"
    assert push(link.address, partial.offer, partial.outgoing()) == "accepted"


# --- interruptions and ends ----------------------------------------------------------------------------------


def test_an_interruption_ends_a_transfer_at_once(node, room, partial, opened):
    link = opened(Link, node.address)
    interruption = Interruption()

    def freeze():
        link.is_frozen = True
        interruption.set()

    link.at[PIECE_BYTES] = freeze
    started = time.monotonic()
    with pytest.raises(Interrupted):
        pull([link.address], REQUEST, room.place, interruption=interruption)
    with pytest.raises(Interrupted):
        push(node.address, partial.offer, partial.outgoing(), interruption=interruption)
    assert time.monotonic() - started < 2


def test_a_model_is_lent_until_the_receiver_has_all_of_it(node, room, opened):
    seen = []

    def place(answer):
        seen.append(node.lent)
        return room.place(answer)

    pull([node.address], REQUEST, place)
    assert seen == [1]
    assert eventually(lambda: node.lent == 0)


def test_a_model_comes_back_when_the_receiver_vanishes(node):
    with socket.create_connection(tuple(node.address.split(":"))) as sock:
        sock.sendall(encode(PeerHello()) + encode(REQUEST))
        assert sock.recv(4, socket.MSG_WAITALL)
        assert node.lent == 1
    assert eventually(lambda: node.lent == 0)


def test_a_model_comes_back_when_the_receiver_takes_nothing(opened):
    node = opened(GivingNode, bytes(80 << 20), limits=quick(pace=FAST))
    with socket.create_connection(tuple(node.address.split(":"))) as sock:
        sock.sendall(encode(PeerHello()) + encode(REQUEST))
        assert sock.recv(4, socket.MSG_WAITALL)
        assert eventually(lambda: node.lent == 0)


def test_a_server_that_stops_gives_everything_back(opened, partial):
    node = opened(GivingNode, PAYLOAD, limits=quick(pace=Pace(30, 1000)))
    link = opened(Link, node.address, upstream=True)
    link.at[PIECE_BYTES] = node.server.stop
    with pytest.raises(Unavailable):
        push(link.address, partial.offer, partial.outgoing())
    assert eventually(lambda: node.taken[0].ends == ["abandon"])


# --- strangers -----------------------------------------------------------------------------------------------


def test_a_server_beyond_loopback_wants_to_be_told_who_may_come(node):
    with pytest.raises(InvalidInput):
        PeerServer("0.0.0.0", 0, node)


@pytest.mark.parametrize("shown", ["", "wrong", "sesame2"])
def test_a_wrong_token_is_refused_before_anything_is_opened(opened, room, partial, shown):
    node = opened(GivingNode, PAYLOAD, credentials=Credentials("sesame"))
    with pytest.raises(Refused) as caught:
        pull([node.address], REQUEST, room.place, credentials=Credentials(shown))
    assert caught.value.status == 401
    with pytest.raises(Refused):
        push(node.address, partial.offer, partial.outgoing(), credentials=Credentials(shown))
    assert not node.requests
    assert not node.taken


def test_the_right_token_is_let_in(opened, room):
    node = opened(GivingNode, PAYLOAD, credentials=Credentials("sesame"))
    pull([node.address], REQUEST, room.place, credentials=Credentials("sesame"))
    assert room.is_right()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\0\0\0\0",
        LENGTH.pack(2**32 - 1),
        LENGTH.pack(5) + b"hello",
        encode(PeerHello()) + LENGTH.pack(3) + b"[[[",
        encode(REQUEST) * 2,
        encode(PeerHello())[:-1],
    ],
)
def test_nonsense_ends_the_connection_and_nothing_else(node, room, capsys, said):
    with socket.create_connection(tuple(node.address.split(":"))) as sock:
        sock.settimeout(5)
        try:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1000) == b""
        except TimeoutError:
            raise
        except OSError:  # the node was quicker
            pass
    pull([node.address], REQUEST, room.place)
    assert room.is_right()
    assert capsys.readouterr().err == ""


def test_another_version_is_told_so(node):
    with socket.create_connection(tuple(node.address.split(":"))) as sock:
        sock.settimeout(5)
        sock.sendall(encode(PeerHello(version=99)) + encode(REQUEST))
        assert b"Unknown protocol" in sock.recv(1000)


def test_who_sends_no_request_is_not_waited_for(opened):
    node = opened(GivingNode, PAYLOAD, limits=quick(head_seconds=0.2))
    with socket.create_connection(tuple(node.address.split(":"))) as sock:
        sock.settimeout(5)
        for _ in count():
            try:
                sock.send(b"\1")  # a byte of a head now and then
                time.sleep(0.05)
            except OSError:
                break


def test_connections_above_the_limit_are_turned_away(opened, room):
    node = opened(GivingNode, PAYLOAD, limits=quick(connections=2, head_seconds=30))
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(socket.create_connection(tuple(node.address.split(":"))))
        assert eventually(lambda: len(node.server._connections) == 2)
        with pytest.raises(Unavailable):
            pull([node.address], REQUEST, room.place, patience=0.1)
    pull([node.address], REQUEST, room.place, patience=5)
    assert room.is_right()


# --- TLS -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authorities(tmp_path_factory):
    """Ours and somebody else's."""
    directory = tmp_path_factory.mktemp("authorities")
    return Authority(directory, "ours"), Authority(directory, "theirs")


@pytest.mark.parametrize("is_mapped", [True, False])
def test_with_tls_all_of_it_works_the_same(opened, room, partial, authorities, is_mapped):
    ours, _ = authorities
    node = opened(GivingNode, PAYLOAD, is_mapped=is_mapped, credentials=ours.credentials("server"), limits=quick())
    mine = ours.credentials("client")
    cut = opened(Link, node.address, cuts=[PIECE_BYTES])
    pull([cut.address], REQUEST, room.place, credentials=mine)
    assert room.is_right()
    cut = opened(Link, node.address, cuts=[PIECE_BYTES], upstream=True)
    assert push_until_final(cut.address, partial, credentials=mine) == ("accepted", 2)
    assert node.taken[0].memory == PAYLOAD


def test_with_tls_strangers_and_impostors_are_kept_out(opened, room, partial, authorities):
    ours, theirs = authorities
    node = opened(GivingNode, PAYLOAD, credentials=ours.credentials("server"), limits=quick())
    stranger = theirs.credentials("stranger", authority=ours.certificate)  # believes the server, who is not fooled
    fooled = ours.credentials("fooled", authority=theirs.certificate)  # takes the server for an impostor
    for credentials in (stranger, fooled, Credentials()):
        with pytest.raises(Unavailable):
            pull([node.address], REQUEST, room.place, credentials=credentials, patience=0.1)
        with pytest.raises(Unavailable):
            push(node.address, partial.offer, partial.outgoing(), credentials=credentials, pace=FAST)
    assert not node.requests
    assert not node.taken


def test_with_tls_the_pace_is_kept_too(opened, authorities):
    ours, _ = authorities
    node = opened(GivingNode, bytes(40 << 20), credentials=ours.credentials("server"), limits=quick(pace=FAST))
    context = ours.credentials("client").client_tls
    with socket.create_connection(tuple(node.address.split(":"))) as plain, context.wrap_socket(plain) as sock:
        sock.sendall(encode(PeerHello()) + encode(REQUEST))
        assert sock.recv(4)
        assert eventually(lambda: node.lent == 0), "a receiver that takes nothing holds the model only so long"


def test_an_interruption_ends_a_transfer_with_tls(opened, room, authorities):
    ours, _ = authorities
    node = opened(GivingNode, PAYLOAD, credentials=ours.credentials("server"), limits=quick())
    link = opened(Link, node.address)
    interruption = Interruption()

    def freeze():
        link.is_frozen = True
        interruption.set()

    link.at[PIECE_BYTES] = freeze
    started = time.monotonic()
    with pytest.raises(Interrupted):
        pull(
            [link.address], REQUEST, room.place, credentials=ours.credentials("client"), interruption=interruption
        )
    assert time.monotonic() - started < 3

"""Clusters in surroundings of their own: hosts whose clocks differ, and TLS on every link between nodes."""

from __future__ import annotations

import json
import math
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from lifl.errors import Refused, Unavailable
from lifl.peer.client import pull_bytes
from lifl.peer.protocol import PullRequest
from lifl.peer.security import Credentials
from lifl_bench.cluster import Cluster
from lifl_bench.hosts import Hosts
from lifl_bench.processes import REPOSITORY

from tests.e2e import cluster_clients as clients
from tests.e2e.cluster_state import accepted, job_state, spread, until
from tests.hosts import require_clocks, require_ebpf
from tests.integration.peer_harness import Authority

pytestmark = pytest.mark.timeout(120)

SIZE = 5000
LEASE = 1.5
DAY = 86_400
OFFSETS = {"h2": 100_000, "h3": 5_000_000}


def do_round(cluster: Cluster, number: int, count: int) -> None:
    """One round with that many clients, after which every gateway has the exact mean."""
    assert clients.submit_all(cluster, spread(cluster, count), number, SIZE) == ["accepted"] * count
    models = [clients.wait_for_model(cluster, node, number) for node in cluster.numbers]
    assert sorted(clients.check_round(cluster, models[0], number)) == list(range(count))
    assert all(np.array_equal(model, models[0]) for model in models)


# --- clocks ----------------------------------------------------------------------------------------------------


def check_loads(cluster: Cluster) -> None:
    """What the placement goes by: numbers that a small job on a small cluster can have."""
    for name, node in cluster.nodes().items():
        load = {key: node[key] for key in ("arrival_rate", "execution_seconds", "residual", "last_heard")}
        assert all(math.isfinite(value) for value in load.values()), (name, load)
        assert 0 <= load["arrival_rate"] < 1e5, (name, load)
        assert 0 <= load["execution_seconds"] < 60, (name, load)
        assert 0 < load["residual"] <= node["capacity"], (name, load)
        assert 0 <= load["last_heard"] < 2 * LEASE, (name, load)


def clock_of(pid: int) -> int:
    """By how many seconds a process's monotonic clock is ahead of the machine's."""
    for line in Path(f"/proc/{pid}/timens_offsets").read_text().splitlines():
        name, seconds, _ = line.split()
        if name == "monotonic":
            return int(seconds)
    raise AssertionError("no monotonic clock")


def is_running(pid: int) -> bool:
    """Whether a process has not ended, which its parent may not have seen yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_nodes_whose_clocks_are_days_apart_make_the_exact_mean(make_cluster: Callable[..., Cluster]):
    require_clocks()
    cluster = make_cluster(3, capacity=20, clock_offsets=OFFSETS)
    for number in cluster.numbers:
        offsets = {clock_of(pid) for pid in cluster.pids(number)}
        assert offsets == {OFFSETS.get(f"h{number}", 0)}, "not all of the node has the clock"
    clients.create_job(cluster, SIZE, goal=9, redirect=False)
    for number in (1, 2):
        do_round(cluster, number, 9)
        check_loads(cluster)


def test_the_death_of_a_node_is_noticed_within_its_lease_whatever_its_clock_said(
    make_cluster: Callable[..., Cluster],
):
    require_clocks()
    cluster = make_cluster(3, clock_offsets={"coordinator": DAY, **OFFSETS})
    clients.create_job(cluster, SIZE, goal=6, redirect=False)
    assert clients.submit_all(cluster, [(1, 0), (2, 1), (2, 2), (3, 3)], 1, SIZE) == ["accepted"] * 4
    pids = cluster.pids(2)
    cluster.kill(2)
    assert not [pid for pid in pids if is_running(pid)]
    until(lambda: accepted(cluster) == 2, LEASE + 3, "the loss of two updates")
    assert clients.submit_all(cluster, [(1, 1), (3, 2), (1, 4), (3, 5)], 1, SIZE) == ["accepted"] * 4
    model = clients.wait_for_model(cluster, 3, 1)
    assert sorted(clients.check_round(cluster, model, 1)) == list(range(6))
    # It comes back as a machine that was started anew.
    cluster.host(2).set_clock(0)
    cluster.start_node(2)
    cluster.wait_for_nodes(3)
    check_loads(cluster)


def test_a_deadline_still_comes_when_the_coordinator_goes_on_with_an_earlier_clock(
    make_cluster: Callable[..., Cluster],
):
    """As after a reboot, or on another machine: the moments in its journal are in the future."""
    require_clocks()
    cluster = make_cluster(2, clock_offsets={"coordinator": DAY})
    clients.create_job(cluster, SIZE, goal=4, quorum=2, deadline=3.0, redirect=False)
    assert clients.submit_all(cluster, [(1, 0), (2, 1)], 1, SIZE) == ["accepted"] * 2
    cluster.kill_coordinator()
    cluster.hosts["coordinator"].set_clock(0)
    cluster.start_coordinator()
    # Once more, for it to find a journal in which this clock was used before.
    cluster.wait_for_nodes(2)
    cluster.kill_coordinator()
    cluster.start_coordinator()
    model = clients.wait_for_model(cluster, 2, 1, seconds=15)
    assert sorted(clients.check_round(cluster, model, 1)) == [0, 1]
    do_round(cluster, 2, 4)


_ROUTER = """
import json, time
from lifl.descriptor import Kind, encode
from lifl.messages import endpoint_id
from lifl.cluster.load import arrival_rate
from lifl_ebpf.router import EbpfRouter
router = EbpfRouter()
gateway, worker = endpoint_id("gateway", 1), endpoint_id("worker", 1)
before = time.monotonic_ns()
sender, receiver = router.add_endpoint(gateway), router.add_endpoint(worker)
router.allow(gateway, worker)
unused = {row.endpoint: row.last_nanoseconds for row in router.traffic()}[worker]
for _ in range(20):
    sender.near.send(encode(worker, 1, 1, Kind.UPDATE))
    time.sleep(0.005)
row = next(row for row in router.traffic() if row.endpoint == worker)
now = time.monotonic_ns()
print(json.dumps([before, unused, row.last_nanoseconds, now, arrival_rate([row], now)]))
"""


@pytest.mark.parametrize("offset", [DAY, -1])
def test_the_kernels_counters_are_told_in_the_clock_of_the_node(make_hosts: Callable[[int], Hosts], offset: int):
    require_clocks()
    require_ebpf()
    host = make_hosts(1)["h1"]
    host.set_clock(offset)
    process = host.popen([sys.executable, "-c", _ROUTER], stdout=subprocess.PIPE, cwd=REPOSITORY)
    printed, _ = process.communicate(timeout=30)
    before, unused, last, now, rate = json.loads(printed)
    assert unused == 0
    assert before < last < now
    assert 10 < rate < 200


# --- TLS -------------------------------------------------------------------------------------------------------


def sent_to(address: str, client_tls: ssl.SSLContext | None) -> bytes:
    """All that a stranger gets from a peer port before it is closed; with TLS what comes out of that."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        try:
            link = client_tls.wrap_socket(plain) if client_tls is not None else plain
            with link:
                link.sendall(b"\0\0\0\x02{}" * 3)
                return b"".join(iter(lambda: link.recv(4096), b""))
        except (ssl.SSLError, ConnectionError):
            return b""


def test_a_cluster_with_tls_between_its_nodes_does_rounds_and_has_nothing_for_strangers(
    make_cluster: Callable[..., Cluster], tmp_path: Path
):
    authority, other = Authority(tmp_path, "authority"), Authority(tmp_path, "other")

    def arguments_of(name: str) -> Sequence[str]:
        authority.credentials(name)
        files = [tmp_path / f"authority-{name}.{end}" for end in ("pem", "key")]
        options = ("--peer-certificate", "--peer-key", "--peer-authority")
        pairs = zip(options, [*files, authority.certificate], strict=True)
        return [str(word) for pair in pairs for word in pair]

    cluster = make_cluster(2, arguments_of=arguments_of)
    clients.create_job(cluster, SIZE, goal=4, redirect=False)
    for number in (1, 2):
        do_round(cluster, number, 4)
        assert cluster.get(f"/v1/jobs/{clients.JOB}/rounds/{number}")["nodes"] == 2
    # The coordinator fetches from nodes what it keeps.
    until(lambda: job_state(cluster)["checkpointed_round"] == 3, what="the checkpoint")

    token = (tmp_path / "cluster" / "member-token").read_text().strip()
    member = authority.credentials("member")
    unsigned = other.credentials("stranger", authority=authority.certificate)

    def ask(address: str, token: str, tls: ssl.SSLContext | None) -> None:
        request, shown = PullRequest("nothing", 1, 1), Credentials(token, None, tls)
        cluster.call(pull_bytes, [address], request, 100, credentials=shown, patience=0.5)

    for address in (cluster.peer_address(1), cluster.coordinator_peer_address):
        # TLS itself may say in plain why it ends.
        assert cluster.call(sent_to, address, None)[:1] in (b"", b"\x15")
        assert cluster.call(sent_to, address, unsigned.client_tls) == b""
        # A member is told that there is no such model, a stranger nothing.
        with pytest.raises(Refused) as refused:
            ask(address, token, member.client_tls)
        assert refused.value.status == 404
        with pytest.raises(Refused) as refused:
            ask(address, "", member.client_tls)
        assert refused.value.status in (401, 403)
        for tls in (None, unsigned.client_tls):
            with pytest.raises(Unavailable):
                ask(address, token, tls)

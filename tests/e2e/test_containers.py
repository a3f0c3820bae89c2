"""A round of federated averaging through the built images: agent, gateway and function, each in its container."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.containers import Container, Images, running
from tests.e2e.node_harness import SMALL, LiveNode, Watch, create_job, run_round, until
from tests.hosts import require_ebpf

pytestmark = pytest.mark.timeout(300)

NODE_USER, FUNCTION_USER = 65533, 65532
NO_RIGHTS = 0
CAP_NET_ADMIN, CAP_BPF = 12, 39
READY = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8080/health/readiness').read().decode())"


class ContainerNode(LiveNode):
    """A node whose agent, gateway and function run in containers that share one directory."""

    def __init__(self, watch: Watch, directory: Path, images: Images) -> None:
        super().__init__(watch, directory / "state", "ebpf")
        self.images = images
        self.runtime = directory / "run"
        self.containers = contextlib.ExitStack()

    def start(self) -> LiveNode:
        self.runtime.mkdir(mode=0o755)
        self.state_directory.mkdir()
        os.chown(self.state_directory, NODE_USER, NODE_USER)
        self.agent = self._agent()
        until(
            lambda: self.agent.exec("test", "-S", "/run/lifl/agent.sock", check=False).returncode == 0, "an agent"
        )
        self.gateway = self._gateway()
        self.address = until(self._address, "a gateway")
        self.function = self._function()
        until(lambda: self.readiness() == "fedavg is ready", "a function")
        return self

    def stop(self) -> None:
        self.containers.close()

    def _run(self, image: str, *command: str, options: list[str], network: str = "none") -> Container:
        storage = self.images.storage
        return self.containers.enter_context(running(storage, image, *command, options=options, network=network))

    def _agent(self) -> Container:
        return self._run(
            self.images.node["image"],
            *("python3", "-m", "lifl_gateway.agent", "--runtime-directory", "/run/lifl", "--data-plane", "ebpf"),
            *("--node-user", str(NODE_USER), "--function-user", str(FUNCTION_USER)),
            options=[
                *("--user=0", "--cap-add=BPF", "--cap-add=NET_ADMIN"),
                f"--security-opt=seccomp={self.images.storage.seccomp()}",
                f"--volume={self.runtime}:/run/lifl",
            ],
        )

    def _gateway(self) -> Container:
        """On the machine's network, where it listens on loopback only."""
        return self._run(
            self.images.node["image"],
            *("func", "node", "run", "--agent-directory", "/run/lifl", "--state-directory", "/var/lib/lifl"),
            *("--address", "127.0.0.1:0", "-o", "json"),
            options=[
                f"--volume={self.runtime}:/run/lifl:ro",
                f"--volume={self.state_directory}:/var/lib/lifl",
            ],
            network="host",
        )

    def _function(self) -> Container:
        return self._run(
            self.images.function["image"],
            options=[
                *("--user", str(FUNCTION_USER), "--env=LIFL_AGENT_DIRECTORY=/run/lifl"),
                f"--volume={self.runtime}:/run/lifl:ro",
            ],
        )

    def _address(self) -> str:
        for line in self.gateway.log().splitlines():
            if line.startswith("{"):
                ready = json.loads(line)
                assert ready["data_plane"] == "ebpf"
                return f"http://{ready['address']}"
        return ""

    def readiness(self) -> str:
        """What the function's readiness probe says; empty until it is ready."""
        return self.function.exec("python3", "-c", READY, check=False).stdout.strip()


@pytest.fixture
def node(images: Images, watch: Watch) -> Iterator[ContainerNode]:
    require_ebpf()
    with tempfile.TemporaryDirectory(prefix="lifl-node-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        node = ContainerNode(watch, Path(directory), images)
        try:
            node.start()
            yield node
        finally:
            node.stop()


def test_rounds_of_fedavg_through_containers_without_rights(node: ContainerNode) -> None:
    create_job(node, "job", SMALL, goal=6)
    for number in (1, 2):
        run_round(node, "job", SMALL, 6, number)
    assert node.describe("job")["data_plane"] == "ebpf"
    assert routed(node) >= 2 * 6

    agent, gateway, function = (each.status() for each in (node.agent, node.gateway, node.function))
    assert int(agent["CapEff"], 16) == 1 << CAP_BPF | 1 << CAP_NET_ADMIN
    for status, user in ((gateway, NODE_USER), (function, FUNCTION_USER)):
        assert status["Uid"].split() == [str(user)] * 4
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == NO_RIGHTS
        assert status["NoNewPrivs"] == "1"
    refused = node.function.exec("python3", "-c", "open('/run/lifl/x', 'w')", check=False)
    assert "Read-only file system" in refused.stderr


def routed(node: ContainerNode) -> int:
    """Descriptors that the kernel has brought to their destinations."""
    with urlopen(f"{node.address}/v1/nodes", timeout=10) as answer:
        (described,) = json.load(answer)["nodes"]
    assert described["data_plane"] == "ebpf"
    return sum(endpoint["descriptors"] for endpoint in described["traffic"])

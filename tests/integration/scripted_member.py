"""A coordinator process, and members of its cluster that say what a test has them say."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from lifl.cluster.messages import (
    Answers,
    AttachedFunctions,
    CountUpdate,
    FunctionFacts,
    JobOrder,
    Leave,
    MemberMessages,
    ModelMade,
    Orders,
    OrdersRequest,
    PartialDelivered,
    Register,
    Registered,
)
from lifl.errors import Refused
from lifl.model_layout import encode_header
from lifl.peer.checksum import Segment
from lifl.peer.protocol import PartialOffer, PullRequest
from lifl.peer.server import PeerServer

FUNCTION = "fedavg"
START_SECONDS = 30.0
END_SECONDS = 20.0
REQUEST_SECONDS = 20.0


def safetensors(seed: int) -> bytes:
    """A small model whose bytes depend on the seed."""
    header = encode_header({"weight": ("F32", [64])})
    return len(header).to_bytes(8, "little") + header + bytes((seed + i) % 251 for i in range(256))


class CoordinatorUnderTest:
    """`python -m lifl_gateway.coordinator`, which can be killed and started again on the same ports."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory = directory
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.address = self.peer_address = "127.0.0.1:0"

    def __enter__(self) -> CoordinatorUnderTest:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Start it and wait until it answers."""
        words = ["--address", self.address, "--peer-address", self.peer_address, *self._arguments]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lifl_gateway.coordinator", "--state-directory", str(self.directory), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        assert select.select([descriptor], [], [], START_SECONDS)[0], "the coordinator did not start in time"
        line = os.read(descriptor, 4096)
        assert line, f"the coordinator ended with status {self._process.wait()}"
        ready = json.loads(line)
        self.address = urlsplit(ready["address"]).netloc
        self.peer_address = ready["peer_address"]

    def terminate(self) -> int:
        """End it as a supervisor does; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_SECONDS)

    def kill(self) -> None:
        """End it without a chance to do anything."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    # --- what operators and clients ask ----------------------------------------------------------------------

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """One request over a connection of its own."""
        connection = http.client.HTTPConnection(self.address, timeout=REQUEST_SECONDS)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def get(self, path: str, status: int = 200) -> Any:
        """The JSON of an answer that has to have this status."""
        response, data = self.request("GET", path)
        assert response.status == status, data
        return json.loads(data)

    def create_job(self, name: str, goal: int, **options: Any) -> bytes:
        """Make a job and give it its initial model, which is returned."""
        spec = {"name": name, "function": FUNCTION, "goal": goal, **options}
        response, data = self.request(
            "POST", "/v1/jobs", json.dumps(spec).encode(), {"Content-Type": "application/json"}
        )
        assert response.status == 201, data
        model = safetensors(1)
        headers = {"Content-Type": "application/vnd.safetensors"}
        response, data = self.request("PUT", f"/v1/jobs/{name}/model", model, headers)
        assert response.status == 201, data
        return model


class _Memory:
    """A model as `lifl.peer.server.Source`."""

    def __init__(self, round_number: int, data: bytes) -> None:
        self.round = round_number
        self.header_bytes = 8 + int.from_bytes(data[:8], "little")
        self.segments: Sequence[Segment] = [data]

    def close(self) -> None:
        """Nothing was lent."""


class ScriptedMember:
    """A node that keeps no updates: it says what it is told to say, and gives models that it was given."""

    def __init__(
        self, coordinator: CoordinatorUnderTest, name: str, token: str = "", attaches: bool = False
    ) -> None:
        """With `attaches` its functions come as pods: see `attach`."""
        self._coordinator = coordinator
        self._attaches = attaches
        self.name = name
        self.life = 1
        self._token = token
        self.models: dict[int, bytes] = {}
        self.orders: dict[str, JobOrder] = {}
        self.seen: dict[str, int] = {}
        self.boot = ""
        self._connection: http.client.HTTPConnection | None = None
        self._peers = PeerServer("127.0.0.1", 0, self)
        self._peers.start()

    def __enter__(self) -> ScriptedMember:
        return self

    def __exit__(self, *_: object) -> None:
        self._peers.stop()
        self.hang_up()

    @property
    def incarnation(self) -> str:
        return f"{self.name}-{self.life}"

    # --- for other nodes -------------------------------------------------------------------------------------

    def open_model(self, request: PullRequest) -> _Memory:
        """Give a model."""
        if request.round not in self.models:
            raise Refused(404, "No such model")
        return _Memory(request.round, self.models[request.round])

    def open_partial(self, offer: PartialOffer) -> None:
        """Take none."""
        raise Refused(404, "Not here")

    # --- to the coordinator ----------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def post(self, path: str, body: msgspec.Struct) -> tuple[int, bytes]:
        """Send one request; a connection that the coordinator's end has broken is made anew."""
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._coordinator.address, timeout=REQUEST_SECONDS)
        self._connection.request("POST", path, msgspec.json.encode(body), headers)
        response = self._connection.getresponse()
        data = response.read()
        if response.will_close:
            self.hang_up()
        return response.status, data

    def _post(self, path: str, body: msgspec.Struct, answer: Any) -> Any:
        status, data = self.post(path, body)
        if status != 200:
            raise Refused(status, json.loads(data)["title"], data.decode())
        return msgspec.json.decode(data, type=answer)

    def register(self) -> Registered:
        """Become a member, and tell what the function is like."""
        registration = Register(
            self.name,
            self.incarnation,
            f"http://{self.name}.test:8080",
            self._peers.address,
            4,
            1 << 30,
            "unix",
            () if self._attaches else (FUNCTION,),
            100.0,
            attaches=self._attaches,
        )
        answer: Registered = self._post("/v1/members", registration, Registered)
        if not self._attaches:
            self.tell(FunctionFacts(FUNCTION, False, 0))
        return answer

    def attach(self, *functions: str) -> None:
        """The pods of these functions, and of no others, are here."""
        facts = [FunctionFacts(function, False, 0) for function in functions]
        self.tell(*facts, AttachedFunctions(functions))

    def tell(self, *messages: Any) -> tuple[Any, ...]:
        """Send messages; returns the answers."""
        request = MemberMessages(self.incarnation, messages)
        answers: Answers = self._post(f"/v1/members/{self.name}/messages", request, Answers)
        return answers.answers

    def poll(self, wait: float = 0.0) -> Orders:
        """Ask for orders, and take each as carried out."""
        request = OrdersRequest(self.incarnation, dict(self.seen), wait=wait)
        orders: Orders = self._post(f"/v1/members/{self.name}/orders", request, Orders)
        for order in orders.jobs:
            self.orders[order.job] = order
            self.seen[order.job] = order.version
        self.boot = orders.boot
        return orders

    def leave(self) -> None:
        """End."""
        self.post(f"/v1/members/{self.name}/leave", Leave(self.incarnation))

    # --- what a node says of a job ---------------------------------------------------------------------------

    def count(self, job: str, client: str, num_samples: float = 1.0) -> CountUpdate:
        """The message that an update is in this node's memory."""
        order = self.orders[job]
        return CountUpdate(job, order.nonce, order.round, order.attempt, client, num_samples)

    def delivered(self, job: str, source: ScriptedMember) -> PartialDelivered:
        """The message that another node's partial aggregate is here."""
        order = self.orders[job]
        updates = source.orders[job].updates
        return PartialDelivered(job, order.round, order.attempt, order.epoch, source.incarnation, updates, 1000)

    def made(self, job: str, contributors: Sequence[ScriptedMember], weight: float) -> ModelMade:
        """The message that the round's model is here; from here on it is given to who asks."""
        order = self.orders[job]
        self.models[order.round + 1] = safetensors(order.round + 1)
        names = tuple(member.incarnation for member in contributors)
        return ModelMade(job, order.round, order.attempt, order.epoch, names, order.accepted, weight)

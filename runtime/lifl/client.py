"""The client of a job: fetch the global model, train, submit the update, wait for the next round.

    with Client("http://127.0.0.1:8080", "mnist", "client-7") as client:
        model = client.fetch_model()
        while True:
            tensors, samples = train(model.torch())
            client.submit(tensors, num_samples=samples, round=model.round)
            model = client.wait_for_round(after=model.round)

In an asynchronous job (`mode: async`) it sends differences, and need not wait for anybody: it trains on whatever
model is the newest, and what it sends counts less the older that model is by then. One update counts for each
model.

        model = client.fetch_model()
        client.submit(difference, num_samples=samples, round=model.round, delta=True)

In a cluster a job's model may be cut into shards, of which each node has some. Nothing changes for whoever uses a
client: it learns of the shards when it first submits, and from then on sends the part of each to its own job, all
at the same time.

In a cluster any gateway will do, and several may be named: when one is gone the next is asked. A gateway sends an
update on to the node that folds it (307), and the client stays with that one as long as it answers.

One connection is kept open. It is spoken to on the socket itself, with only the answers parsed by `http.client`:
a gateway that is full, or that has the update already, answers before the body and closes, and
`http.client.HTTPConnection` would lose that answer to the broken pipe it meets while sending.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import ipaddress
import json
import math
import random
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from http.client import HTTPException, HTTPResponse
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar, cast
from urllib.parse import quote, urlsplit

from lifl.congestion import avoid_bbr
from lifl.errors import Busy, InvalidInput, InvalidModel, Refused, Unavailable

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from lifl.model_layout import ModelLayout
    from lifl.shard_sender import ShardSender
    from lifl.tensors import Buffer, Encoder, Tensor

EVENT_TYPE: Final = "dev.lifl.update.v1"
MEDIA_TYPE: Final = "application/vnd.safetensors"
EXPECT_BYTES: Final = 1 << 20
"""Longer bodies are announced first, and sent when the gateway asks for them or says nothing for a second."""
LONG_POLL_SECONDS: Final = 30.0
"""How long one request waits at the gateway for the next round."""

_EXPECT_SECONDS: Final = 1.0
_SEND_BYTES: Final = 16 << 20  # the timeout counts anew for each piece of this size
_MAX_HEAD_BYTES: Final = 64 << 10
_MAX_UNSIZED_BYTES: Final = 16 << 20
_MAX_BACKOFF_SECONDS: Final = 60.0
_CONNECT_SECONDS: Final = 10.0
_MOST_MOVES: Final = 5
# A peer that has lost its power says nothing; it is given up within half a minute.
_KEEPALIVE: Final = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
# CloudEvents HTTP 3.1.3.2: printable ASCII but space, quote and percent stands for itself.
_SAFE: Final = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in '"%')

_T = TypeVar("_T")
_Body = Sequence[bytes | memoryview]
"""Pieces that are sent one behind the other."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What became of an update.

    `accepted`: it counts. `duplicate`: this client's update of the round counted already. `late`: the round is
    closed, and the update does not count. `unselected`: it does not count, for enough other clients take part in
    the round. `round` is the round that the update counts in, the open one if it was late, or else its own.
    """

    status: Literal["accepted", "duplicate", "late", "unselected"]
    round: int


@dataclass(frozen=True)
class GlobalModel:
    """The global model that a round starts from, in the one buffer it was received in."""

    round: int
    data: bytearray = field(repr=False)
    """The safetensors bytes."""
    etag: str

    @cached_property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """The tensors by name as read-only numpy views; BF16 comes as a float32 copy, BOOL as a copy.

        Raises InvalidModel if the bytes are not right.
        """
        from lifl.tensors import as_array, byte_view

        layout, payload = self._split
        view = byte_view(payload)
        return {spec.name: as_array(view, spec) for spec in layout.tensors}

    def torch(self) -> dict[str, torch.Tensor]:
        """The tensors by name as torch tensors: a state dict. They share memory with `data`; needs torch.

        Training in place changes `data`: `load_state_dict` copies, but do not optimise these tensors themselves.
        """
        from lifl.tensors import as_torch, byte_view

        layout, payload = self._split
        view = byte_view(payload)
        return {spec.name: as_torch(view, spec) for spec in layout.tensors}

    @cached_property
    def _split(self) -> tuple[ModelLayout, memoryview]:
        from lifl.tensors import split

        return split(self.data)


class _Cut(Exception):
    """While this client waited its gateway was lost: what it had sent may have to be sent again first."""


class _Sent(NamedTuple):
    """The last update that was submitted, as long as its buffer holds it."""

    round: int
    headers: Mapping[str, str]
    body: Buffer


class Client:
    """Talks to a job over one kept-alive connection. Not for use by several threads at once.

    `timeout` is the time in seconds that any one step may take without progress: connecting, 16 MiB of a body,
    the answer. `retries` is how often a call is repeated when the gateway is busy (after the time it asks for)
    or nobody answers; every call may safely be repeated. `token` is sent as a bearer token.
    Calls raise Refused when the platform says no, Busy or Unavailable when retries did not help.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        job: str,
        client_id: str,
        *,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
    ) -> None:
        """`url` is the gateway's, such as http://127.0.0.1:8080, or those of several gateways of a cluster.

        Raises InvalidInput for a URL of another form.
        """
        if not client_id:
            raise InvalidInput("a client needs an id, so that its updates can be told from others'")
        self.job = job
        self.client_id = client_id
        self._retries = retries
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout = timeout
        self._gateways = [url] if isinstance(url, str) else list(url)
        if not self._gateways:
            raise InvalidInput("name a gateway, such as http://127.0.0.1:8080")
        self._home = 0
        """Which of these is asked."""
        self._was_moved = False
        """A gateway has sent this client to another one."""
        self._was_cut = False
        """A gateway was gone since the last update was sent, perhaps with that update."""
        self._connection = _Connection(self._gateways[0], timeout)
        self._base = f"/v1/jobs/{quote(job, safe='')}"
        self._encoder: Encoder | None = None
        self._sent: _Sent | None = None
        self._shards: ShardSender | None = None
        """For a job whose model is cut into shards."""
        self._is_over: threading.Event | None = None
        """Of the client of a shard: set when its part need not be sent any more."""
        self._patience = 0.0
        """How much longer than `timeout` an answer may take."""
        self._newest: tuple[int, str] = (0, "")  # round and etag of the newest model seen
        self._sleep: Callable[[float], None] = time.sleep

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        self._connection.close()
        if self._shards is not None:
            self._shards.close()

    # --- training --------------------------------------------------------------------------------------------

    def take_part(self, round: int) -> bool:
        """Ask for a place in a round; False when enough others have one, or the round is closed.

        A job with `over_selection` takes the updates of so many clients and no more: who asks before training does
        not train for nothing. In any other job everyone may take part. Asking again does no harm.
        """
        body = json.dumps({"client": self.client_id}).encode()
        path = f"{self._base}/rounds/{round}/participants"
        try:
            self._call("POST", path, {"Content-Type": "application/json"}, (body,))
        except Refused as refusal:
            if _open_round_after(refusal, round) or (refusal.status, refusal.title) == (409, "Enough clients"):
                return False
            raise
        return True

    def submit(
        self,
        update: Mapping[str, Tensor] | Buffer,
        *,
        num_samples: float,
        round: int,
        delta: bool = False,
    ) -> Submission:
        """Send a model update and return what became of it.

        `update` maps names to numpy arrays or torch tensors, which are copied once into a buffer that is used
        again, or is safetensors bytes, which are sent as they are. `round` is that of the model it was trained
        from; `delta` says that it is the difference to that model, which an asynchronous job asks for.
        `num_samples` is its weight. A repeated call for the same round cannot count twice.
        Raises InvalidInput for what no gateway would accept, before anything is sent.
        """
        if not (math.isfinite(num_samples) and num_samples > 0):
            raise InvalidInput(f"num_samples must be finite and more than 0, not {num_samples}")
        headers = {
            "Content-Type": MEDIA_TYPE,
            "ce-specversion": "1.0",
            "ce-type": EVENT_TYPE,
            "ce-source": quote(self.client_id, safe=_SAFE),
            # The same for each attempt, and unique across clients: brokers look at nothing else.
            "ce-id": self._event_id(round),
            "ce-round": str(round),
            "ce-numsamples": repr(float(num_samples)),
        }
        if delta:
            headers["ce-kind"] = "delta"
        body = self._encode(update)
        self._was_cut = False
        # A buffer of the caller's that may be written to is the caller's: it may hold something else later.
        is_ours = isinstance(update, Mapping | bytes)
        self._sent = _Sent(round, headers, body) if is_ours else None
        return self._send_update(round, headers, body)

    def _event_id(self, round: int) -> str:
        identity = hashlib.blake2s(f"{self.job}\0{self.client_id}".encode(), digest_size=16).hexdigest()
        return f"{identity}-{round}"

    def _send_update(self, round: int, headers: Mapping[str, str], body: Buffer) -> Submission:
        if self._shards is not None:
            try:
                return Submission(*self._shards.send(round, headers, body))
            except (InvalidModel, Refused) as error:
                if isinstance(error, Refused) and error.status != 404:
                    raise
                self._shards.close()  # another job may have the name now: ask whether it is cut, and how
                self._shards = None
        try:
            return self._post_update(round, headers, (memoryview(cast(bytes, body)).cast("B"),))
        except Refused as refusal:
            if (refusal.status, refusal.title) != (409, "Sharded job"):
                raise
            self._shards = self._reach_shards(getattr(refusal, "shards", None))
        return Submission(*self._shards.send(round, headers, body))

    def _reach_shards(self, described: Any) -> ShardSender:
        from lifl.shard_sender import ShardSender
        from lifl.shards import read_shards

        def connect(job: str) -> Client:
            client = Client(self._gateways, job, self.client_id, timeout=self._timeout, retries=self._retries)
            client._headers = self._headers
            return client

        return ShardSender(read_shards(described), connect)

    def _post_update(self, round: int, headers: Mapping[str, str], body: _Body) -> Submission:
        try:
            answer = self._call("POST", f"{self._base}/updates", headers, body)
        except Refused as refusal:
            if open_round := _open_round_after(refusal, round):
                return Submission("late", open_round)
            if (refusal.status, refusal.title) == (409, "Not selected"):
                return Submission("unselected", round)
            raise
        if answer.status == 200:
            return Submission("duplicate", round)
        counts_in = answer.json().get("round")
        return Submission("accepted", counts_in if isinstance(counts_in, int) else round)

    def _make_part(self, is_over: threading.Event, patience: float) -> None:
        """Make this the client of one shard; for `lifl.shard_sender`.

        `is_over` is set when its part need not be sent any more; answers may take `patience` seconds longer.
        """
        self._is_over, self._patience = is_over, patience
        self._connection = self._connect(self._gateways[self._home])
        self._sleep = partial(_sleep_until, is_over)

    def _send_part(self, round: int, headers: Mapping[str, str], body: _Body) -> Submission:
        """Send one shard's part of an update, the pieces of a safetensors file; for `lifl.shard_sender`."""
        return self._post_update(round, {**headers, "ce-id": self._event_id(round)}, body)

    def _interrupt(self) -> None:
        """Have whatever waits for an answer, in another thread, wait no longer."""
        self._connection.interrupt()

    def _send_again(self, round: int) -> None:
        """Send this round's update again, in case the node was started anew and has forgotten it."""
        if self._sent is not None and self._sent.round == round:
            with contextlib.suppress(Refused):  # whether it still counts is seen from the next model
                self._send_update(*self._sent)

    def fetch_model(self, round: int | None = None) -> GlobalModel:
        """Return the model that the open round starts from, or an earlier round's while that is kept.

        Raises Refused 404 if there is none.
        """
        query = "" if round is None else f"?round={round}"
        return self._model(self._call("GET", f"{self._base}/model{query}"), newest=round is None)

    def wait_for_round(self, *, after: int, timeout: float | None = None) -> GlobalModel:
        """Wait until a round later than `after` is open and return its model.

        `timeout` is in seconds, None waits for ever. Raises TimeoutError when it is over. When the round does not
        end, this client's update for it is sent again now and then: a node that was started anew has lost the
        updates of its open round, and for any other it is a duplicate that is answered before the body is sent.
        (Not if it was given as a buffer that the caller can write to.)
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            wait = max(0.0, min(LONG_POLL_SECONDS, deadline - time.monotonic()))
            if self._was_cut:
                self._was_cut = False
                self._send_again(after)
            # Without the tag of that round's model the answer is the newest model at once, and its tag.
            newest, etag = self._newest
            headers = {"If-None-Match": etag} if etag and newest <= after else {}
            try:
                answer = self._call("GET", f"{self._base}/model?wait={wait:.3g}", headers, wait=wait)
            except _Cut:
                continue
            if answer.status != 304:
                model = self._model(answer)
                if model.round > after:
                    return model
            if time.monotonic() >= deadline:
                raise TimeoutError(f"round {after} of job {self.job!r} is still open after {timeout:g} seconds")
            self._send_again(after)
            if answer.status != 304 and headers:
                self._sleep(0.1)  # the model was replaced within its round: do not ask for it in a tight loop

    def round(self) -> int:
        """The number of the open round; 0 before there is a model."""
        return int(self.describe().get("round", 0))

    # --- operating -------------------------------------------------------------------------------------------

    def create_job(self, **spec: Any) -> dict[str, Any]:
        """Create the job; `spec` is function, goal, quorum, deadline, rounds and so on. Returns its state.

        Raises Refused 409 if the name belongs to a job with another specification.
        """
        body = json.dumps({"name": self.job, **spec}).encode()
        return self._call("POST", "/v1/jobs", {"Content-Type": "application/json"}, (body,)).json()

    def upload_model(self, model: Mapping[str, Tensor] | Buffer) -> dict[str, Any]:
        """Give the job its initial model, which fixes the layout and opens round 1. Returns the job's state."""
        body = memoryview(cast(bytes, self._encode(model))).cast("B")
        return self._call("PUT", f"{self._base}/model", {"Content-Type": MEDIA_TYPE}, (body,)).json()

    def describe(self) -> dict[str, Any]:
        """The state of the job as the gateway tells it."""
        return self._call("GET", self._base).json()

    def delete(self) -> None:
        """Stop the job: its workers end and its memory is given back; checkpoints stay."""
        self._call("DELETE", self._base)

    # --- requests --------------------------------------------------------------------------------------------

    def _encode(self, model: Mapping[str, Tensor] | Buffer) -> Buffer:
        if not isinstance(model, Mapping):
            return model
        if self._encoder is None:
            from lifl.tensors import Encoder  # the first thing here to need numpy

            self._encoder = Encoder()
        return self._encoder.encode(model)

    def _model(self, answer: _Answer, *, newest: bool = True) -> GlobalModel:
        number = answer.headers.get("lifl-round", "")
        if not number.isdecimal():
            raise Unavailable(f"{self._connection.origin} sent a model without LIFL-Round; is it a LIFL gateway?")
        model = GlobalModel(int(number), answer.body, answer.headers.get("etag", ""))
        if newest:
            self._newest = (model.round, model.etag)
        return model

    def _call(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: _Body | None = None,
        *,
        wait: float = 0.0,
    ) -> _Answer:
        """One request, repeated while that may help; Refused for every status from 400 on."""

        def attempt() -> _Answer:
            if wait and self._was_cut:
                raise _Cut
            self._check_not_over()
            try:
                answer = self._request(method, path, {**self._headers, **(headers or {})}, body, wait)
            except Unavailable:
                self._check_not_over()
                raise
            if answer.status >= 400:
                raise _refusal(answer)
            return answer

        return self._repeat(attempt)

    def _check_not_over(self) -> None:
        if self._is_over is not None and self._is_over.is_set():
            from lifl.shard_sender import Abandoned

            raise Abandoned

    def _request(
        self, method: str, path: str, headers: Mapping[str, str], body: _Body | None, wait: float
    ) -> _Answer:
        """Ask the gateway, and whom it names instead."""
        try:
            for _ in range(_MOST_MOVES):
                answer = self._connection.request(method, path, headers, body, wait + self._patience)
                if answer.status != 307:
                    return answer
                self._move(answer.headers.get("location", ""), path)
        except Unavailable:
            self._leave()
            raise
        raise Unavailable(f"sent from one gateway to another {_MOST_MOVES} times; is the cluster in order?")

    def _move(self, location: str, path: str) -> None:
        """Go where a gateway says; a secure connection never becomes an open one."""
        url = location.removesuffix(path)
        if url == location or (self._connection.origin.startswith("https:") and not url.startswith("https:")):
            raise Unavailable(
                f"{self._connection.origin} sends its clients to {location!r}, which cannot be right"
            )
        self._connection.close()
        self._connection = self._connect(url)
        self._was_moved = True

    def _connect(self, url: str) -> _Connection:
        connection = _Connection(url, self._timeout)
        connection.is_over = self._is_over
        return connection

    def _leave(self) -> None:
        """The gateway does not answer: go back to the one that was named, or on to the next."""
        self._was_cut = True
        if not self._was_moved:
            self._home = (self._home + 1) % len(self._gateways)
        if self._was_moved or len(self._gateways) > 1:
            self._connection.close()
            self._connection = self._connect(self._gateways[self._home])
        self._was_moved = False

    def _repeat(self, attempt: Callable[[], _T]) -> _T:
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt

        retrying = Retrying(
            sleep=self._sleep,
            stop=stop_after_attempt(self._retries + 1),
            wait=_pause,
            retry=retry_if_exception_type((Busy, Unavailable)),
            reraise=True,
        )
        return retrying(attempt)


def _sleep_until(event: threading.Event, seconds: float) -> None:
    event.wait(seconds)


def _pause(state: Any) -> float:
    """Seconds before the next attempt: what the gateway asked for, or ever longer; never the same for all."""
    error = state.outcome.exception()
    if isinstance(error, Busy):
        return min(_MAX_BACKOFF_SECONDS, error.retry_after * random.uniform(1.0, 1.5))
    attempts: int = state.attempt_number
    return min(_MAX_BACKOFF_SECONDS, 0.1 * 2.0**attempts) * random.uniform(0.5, 1.0)


def _refusal(answer: _Answer) -> Refused:
    """The error that a problem document (RFC 9457), or any other answer from 400 on, stands for."""
    problem: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):
        decoded = json.loads(bytes(answer.body))
        problem = decoded if isinstance(decoded, dict) else {}
    title = str(problem.get("title") or answer.reason or f"HTTP status {answer.status}")
    detail = str(problem.get("detail") or "")
    refusal: Refused
    if answer.status == 503:
        refusal = Busy(title, detail, retry_after=_retry_after(answer.headers.get("retry-after", "")))
    else:
        refusal = Refused(answer.status, title, detail)
    # Only what is late or early carries a round, only a job that is cut its shards; `submit` looks for both.
    refusal.round = problem.get("round")  # type: ignore[attr-defined]
    refusal.shards = problem.get("shards")  # type: ignore[attr-defined]
    return refusal


def _open_round_after(refusal: Refused, round: int) -> int:
    """The open round if the refusal says that `round` is closed; else 0."""
    open_round = getattr(refusal, "round", None)
    return open_round if refusal.status == 409 and isinstance(open_round, int) and open_round > round else 0


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header; its date form, which no gateway here sends, counts as 1."""
    return float(value) if value.isascii() and value.isdigit() and len(value) <= 6 else 1.0


# --- the connection ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Answer:
    status: int
    reason: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytearray

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; {} for an empty one. Raises Unavailable for anything else."""
        try:
            decoded = json.loads(bytes(self.body)) if self.body else {}
        except ValueError:
            decoded = None
        if not isinstance(decoded, dict):
            raise Unavailable("the answer is not JSON; is this a LIFL gateway?")
        return decoded


class _Replay(io.RawIOBase):
    """Reads bytes that were received already, then from the socket; its close leaves the socket open."""

    def __init__(self, received: bytearray, sock: socket.socket) -> None:
        self._received = memoryview(bytes(received))
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._received:
            return self._sock.recv_into(buffer)
        count = min(len(buffer), len(self._received))
        buffer[:count] = self._received[:count]
        self._received = self._received[count:]
        return count

    def makefile(self, *_: Any) -> io.BufferedReader:
        """What HTTPResponse asks of a socket."""
        return io.BufferedReader(self)


class _Connection:
    """One kept-alive HTTP/1.1 connection, opened when it is needed."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            raise InvalidInput(f"{url!r} has a port that is no number from 0 to 65535") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InvalidInput(f"{url!r} is not the URL of a gateway; it looks like http://127.0.0.1:8080")
        self.prefix = parts.path.rstrip("/")
        self._host = parts.hostname
        self._tls = parts.scheme == "https"
        self._port = port or (443 if self._tls else 80)
        self._host_header = parts.netloc.rpartition("@")[2]
        self.origin = f"{parts.scheme}://{self._host_header}"
        self._timeout = timeout
        self._socket: socket.socket | None = None
        self.is_over: threading.Event | None = None
        """When this is set, no exchange begins any more."""

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def interrupt(self) -> None:
        """End the exchange that another thread is in: it fails."""
        sock = self._socket
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def request(
        self, method: str, path: str, headers: Mapping[str, str], body: _Body | None, wait: float
    ) -> _Answer:
        """Send one request and return the whole answer. `wait` is how much longer the gateway may take.

        Raises Unavailable when nobody answers; then the connection is closed.
        """
        path = self.prefix + path
        try:
            # A connection that the gateway closed while it was idle is no failure; that is seen before sending.
            if self._socket is not None and _readable(self._socket, 0.0):
                self.close()
            sock = self._socket or self._open()
            return self._exchange(sock, method, path, headers, body, wait)
        except (OSError, HTTPException) as error:
            self.close()
            raise Unavailable(f"{self.origin} does not answer: {error or type(error).__name__}") from error
        except BaseException:
            self.close()  # in the middle of an exchange the connection is of no more use
            raise

    def _open(self) -> socket.socket:
        sock = socket.create_connection((self._host, self._port), min(self._timeout, _CONNECT_SECONDS))
        sock.settimeout(self._timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)
            _avoid_bbr_on_loopback(sock)
            if self._tls:
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=self._host)
        except BaseException:
            sock.close()
            raise
        self._socket = sock
        if self.is_over is not None and self.is_over.is_set():
            raise ConnectionAbortedError("nobody waits for the answer any more")
        return sock

    def _exchange(
        self,
        sock: socket.socket,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: _Body | None,
        wait: float,
    ) -> _Answer:
        nbytes = sum(map(len, body or ()))
        expects = nbytes > EXPECT_BYTES
        sock.settimeout(self._timeout)
        head = self._head(method, path, headers, body, expects)
        received = bytearray()
        answered = False
        sent = True
        if body is None:
            sock.sendall(head)
        elif expects:
            sock.sendall(head)
            answered = _readable(sock, _EXPECT_SECONDS) and not _is_interim(sock, received)
            sent = not answered and _send(sock, body)
        elif nbytes <= 1 << 16:
            sent = _send(sock, (head + b"".join(body),))
        else:
            sock.sendall(head)
            sent = _send(sock, body)
        sock.settimeout(self._timeout + wait)
        while not answered:
            answered = not _is_interim(sock, received)
        answer, keep = _read(sock, received, method)
        # Where the body was not sent in full the gateway waits for the rest of it, or has closed.
        if not (keep and sent):
            self.close()
        return answer

    def _head(
        self, method: str, path: str, headers: Mapping[str, str], body: _Body | None, expects: bool
    ) -> bytes:
        from lifl import __version__

        lines = {"Host": self._host_header, "User-Agent": f"lifl/{__version__}", **headers}
        if body is not None:
            lines["Content-Length"] = str(sum(map(len, body)))
        if expects:
            lines["Expect"] = "100-continue"
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        if "\r" in path or any(c in value for value in lines.values() for c in "\r\n\0"):
            raise InvalidInput("a header value must be one line")
        try:
            return f"{method} {path} HTTP/1.1\r\n{text}\r\n".encode("ascii")
        except UnicodeEncodeError:
            raise InvalidInput("the token and the URL must be ASCII") from None


def _send(sock: socket.socket, body: _Body) -> bool:
    """Send a body; False if the peer stopped reading, which it does once it has answered. Raises TimeoutError."""
    try:
        for piece in body:
            view = memoryview(piece)
            for start in range(0, len(view), _SEND_BYTES):
                sock.sendall(view[start : start + _SEND_BYTES])
    except TimeoutError:
        raise
    except OSError:  # broken pipe, connection reset, TLS end of file: its answer may be here already
        return False
    return True


def _readable(sock: socket.socket, seconds: float) -> bool:
    """Whether something (or the end) comes in within this time."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return True
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _is_interim(sock: socket.socket, received: bytearray) -> bool:
    """Receive one head into `received`; if it is a 1xx one take it out again and return True."""
    while (end := received.find(b"\r\n\r\n")) < 0:
        if len(received) > _MAX_HEAD_BYTES:
            raise HTTPException("the head of the answer does not end")
        piece = sock.recv(1 << 16)
        if not piece:
            raise ConnectionResetError("the connection was closed without an answer")
        received += piece
    status = received[: received.find(b"\r\n")].split(b" ")
    if len(status) < 2 or not status[0].startswith(b"HTTP/1.") or not status[1].startswith(b"1"):
        return False
    if status[1] == b"101":
        raise HTTPException("the gateway changed the protocol, which nobody asked for")
    del received[: end + 4]
    return True


def _read(sock: socket.socket, received: bytearray, method: str) -> tuple[_Answer, bool]:
    """Read a whole answer whose head is in `received`; also tells whether the connection can be kept."""
    # HTTPResponse uses nothing of a socket but makefile.
    response = HTTPResponse(cast(socket.socket, _Replay(received, sock)), method=method)
    try:
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        length = response.length
        if length is None:
            body = bytearray(response.read(_MAX_UNSIZED_BYTES))
            if not response.isclosed() and response.read(1):
                raise HTTPException(f"an answer without Content-Length is longer than {_MAX_UNSIZED_BYTES} bytes")
            keep = not response.will_close
        else:
            body = _read_exactly(response, length)
            keep = not response.will_close
        return _Answer(response.status, response.reason, headers, body), keep
    finally:
        response.close()


def _read_exactly(response: HTTPResponse, length: int) -> bytearray:
    body = bytearray(length)
    with memoryview(body) as view:
        done = 0
        while done < length:
            count = response.readinto(view[done:])
            if not count:
                raise ConnectionResetError(f"the answer ended after {done} of {length} bytes")
            done += count
    return body


def _keep_alive(sock: socket.socket) -> None:
    """Have the kernel ask now and then whether the peer is still there, where it knows how."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _avoid_bbr_on_loopback(sock: socket.socket) -> None:
    """Choose the congestion control for a loopback connection; over a network the system's choice stands."""
    with contextlib.suppress(OSError, ValueError):
        if ipaddress.ip_address(sock.getpeername()[0]).is_loopback:
            avoid_bbr(sock)

"""The deployment of a broker mode, and its clients."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from lifl.http_function import MEDIA_TYPE, MODEL, UPDATE

from lifl_bench.broker import chunk_store, events
from lifl_bench.broker.events import CLIENT_SOURCE, LEAF, Attributes
from lifl_bench.broker.http_client import Peer, read_all
from lifl_bench.broker.nats_server import NatsServer
from lifl_bench.broker.parts import missing_parts as missing_parts
from lifl_bench.broker.replica import Replica
from lifl_bench.broker.service import python_command, python_environment
from lifl_bench.broker.setup import Setup
from lifl_bench.broker.shared_memory_store import create_pool, slots_for
from lifl_bench.broker.tuning import Store, Tuning
from lifl_bench.broker.wire import Wire, WireError
from lifl_bench.deployment import Cell, Stamps, Timing
from lifl_bench.service import Service

_TIMEOUT_S: Final = 3600.0
_CONTROL_TIMEOUT_S: Final = 60.0
_LOOK_EVERY_S: Final = 0.5
_HEADER_ROOM: Final = 1024  # for the NATS headers of an event
_METADATA_ROOM: Final = 4096


class BrokerDeployment:
    """A broker with one function for each leaf. See the package for what it consists of."""

    def __init__(
        self,
        cell: Cell,
        tuning: Tuning,
        *,
        nats_url: str | None = None,
        timing: Timing = "eager",
        cold: bool = False,
        store: Store | None = None,
        message_limit: int | None = None,
    ) -> None:
        """`nats_url` is a running server to use instead of one of its own; `cold` has functions and sidecars run
        only while there are events for them; `store` is another one than the tuning's; `message_limit` makes
        messages smaller than the server permits."""
        tuning = tuning if store is None else replace(tuning, store=store)
        if tuning.store == "shared-memory" and tuning.resolve == "filter":
            raise ValueError("a filter that streams payloads needs no shared memory")
        self.mode = tuning.mode
        self._cell = cell
        self._tuning = tuning
        self._nats_url = nats_url
        self._timing: Timing = timing
        self._cold = cold
        self._message_limit = message_limit
        self._setup: Setup | None = None
        self._stamps: Stamps | None = None
        self._nats: NatsServer | None = None
        self._ingress: Service | None = None
        self._filter: Service | None = None
        self._replicas: list[Replica] = []
        self._pool = -1
        self._ingress_port = self._filter_port = 0

    # --- start and stop --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything; see `Deployment`."""
        missing = missing_parts(own_server=self._nats_url is None)
        if missing:
            raise RuntimeError("; ".join(f"{what} is missing: {command}" for what, command in missing))
        try:
            self._start()
        except (OSError, WireError) as error:
            self.stop()
            raise RuntimeError(f"the broker did not start: {error}") from error
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        cell = self._cell
        if self._nats_url is None:
            self._nats = NatsServer(cell.directory, self._tuning, cell.environment)
        url = self._nats.url if self._nats is not None else str(self._nats_url)
        wire = Wire(url)
        try:
            self._setup = setup = self._make_setup(url, wire.max_payload)
            if self._tuning.store == "shared-memory":
                self._pool = create_pool(setup)
                self._setup = setup = replace(setup, pool=f"/proc/{os.getpid()}/fd/{self._pool}")
            setup.write()
            setup.initial_model.write_bytes(cell.initial_model)
            self._stamps = Stamps(setup.stamps, cell.updates)
            _create_streams(wire, setup)
        finally:
            wire.close()
        environment = python_environment(cell.environment, keep_large_blocks=self._tuning.recycle_memory)
        self._ingress = self._service("ingress", environment, str(setup.path))
        if not self._cold:
            self._replicas = [Replica(setup, leaf, cell.environment) for leaf in range(cell.tree.leaves)]
        self._ingress_port = int(self._ingress.hear())
        for one in self._replicas:
            one.wait_ready()
        ports = [str(one.port) for one in self._replicas]
        self._filter = self._service("filter", environment, str(setup.path), str(self._ingress_port), *ports)
        self._filter_port = int(self._filter.hear())
        self._give_initial_model()

    def _service(self, module: str, environment: Mapping[str, str], *arguments: str) -> Service:
        log = self._cell.directory / f"{module}.log"
        return Service(module, python_command(module, *arguments), environment, log)

    def _make_setup(self, url: str, max_payload: int) -> Setup:
        cell, tuning = self._cell, self._tuning
        limit = min(max_payload, tuning.max_payload or max_payload, self._message_limit or max_payload)
        # Partial aggregates may be float64, and have the header of the model beside their own.
        factor = 2 if cell.precision == "float64" else 1
        payload_limit = factor * cell.payload_bytes + 3 * len(cell.safetensors_header) + _METADATA_ROOM
        return Setup(
            name=f"lifl-bench-{uuid.uuid4().hex[:12]}",
            nats_url=url,
            tuning=replace(tuning, chunk_bytes=min(tuning.chunk_bytes, limit)),
            tree=cell.tree,
            directory=str(cell.directory.resolve()),
            function=str(cell.function.resolve()),
            precision=cell.precision,
            timing=self._timing,
            cold=self._cold,
            update_bytes=cell.update_bytes,
            payload_limit=payload_limit,
            max_event_bytes=max(limit - _HEADER_ROOM, _HEADER_ROOM),
            pool_slots=slots_for(cell.updates, cell.tree.leaves) if tuning.store == "shared-memory" else 0,
        )

    def _give_initial_model(self) -> None:
        """Have the model of round 1 pass by the ingress, where clients get it."""
        attributes = _event(MODEL, "/server", "initial-model", 1)
        model = memoryview(self._cell.initial_model)
        peer = Peer(self._ingress_port, timeout=_CONTROL_TIMEOUT_S)
        try:
            _check(peer.post("/", events.headers_of(attributes), (model,), len(model)))
        finally:
            peer.close()

    def stop(self) -> None:
        """End everything; see `Deployment`."""
        for service in (self._filter, self._ingress):
            if service is not None:
                service.stop()
        for one in self._replicas:
            one.stop()
        self._filter = self._ingress = None
        self._replicas = []
        if self._nats is not None:
            self._nats.service.stop()
            self._nats = None
        elif self._setup is not None:
            _delete_streams(self._setup)
        if self._pool >= 0:
            os.close(self._pool)
            self._pool = -1
        self._remove_files()
        self._setup = None

    def _remove_files(self) -> None:
        if self._setup is None:
            return
        directory = Path(self._setup.directory)
        for path in (self._setup.path, self._setup.initial_model, self._setup.stamps, self._setup.failures):
            path.unlink(missing_ok=True)
        shutil.rmtree(directory / "jetstream", ignore_errors=True)

    # --- rounds ----------------------------------------------------------------------------------------------

    def sender(self, client: int) -> BrokerSender:
        """See `Deployment`."""
        return BrokerSender(client, self._cell.tree.leaf_of(client), self._ingress_port)

    def observer(self) -> BrokerObserver:
        """See `Deployment`."""
        assert self._setup is not None
        return BrokerObserver(self._setup, self._ingress_port)

    def components(self) -> Mapping[str, Sequence[int]]:
        """See `Deployment`."""
        found: dict[str, list[int]] = {"sidecar": [], "function": []}
        if self._cold and self._filter is not None:
            found = json.loads(self._control("GET", self._filter_port, "/pids"))
        for one in self._replicas:
            found["sidecar"] += one.sidecar_pids()
            found["function"] += one.function_pids()
        theirs = {pid for pids in found.values() for pid in pids}
        services = {"ingress": self._ingress, "filter": self._filter}
        services["nats-server"] = self._nats.service if self._nats is not None else None
        for name, service in services.items():
            if service is not None:
                found[name] = [pid for pid in service.pids() if pid not in theirs]
        return found

    def folded(self, round: int) -> Sequence[float]:
        """See `Deployment`."""
        assert self._stamps is not None
        return self._stamps.read()

    def before_round(self, round: int) -> None:
        """See `Deployment`."""
        assert self._stamps is not None
        self._stamps.clear()

    def after_round(self, round: int) -> None:
        """Have the payloads of the round forgotten, and cold functions ended."""
        self._control("POST", self._ingress_port, f"/discard?round={round}")
        if self._cold:
            self._control("POST", self._filter_port, "/stop")

    def failure(self) -> str | None:
        """What the filter gave up, if it did."""
        return None if self._setup is None else _failure(self._setup)

    def _control(self, method: str, port: int, target: str) -> bytes:
        peer = Peer(port, timeout=_CONTROL_TIMEOUT_S)
        try:
            return _check(peer.get(target) if method == "GET" else peer.post(target, {}))
        except (OSError, http.client.HTTPException) as error:
            raise RuntimeError(f"{target} failed: {error!r}") from error
        finally:
            peer.close()


class BrokerSender:
    """A client that posts its updates to the ingress."""

    def __init__(self, client: int, leaf: int, port: int) -> None:
        self._client = client
        self._leaf = leaf
        self._peer = Peer(port, timeout=_TIMEOUT_S)

    def connect(self) -> None:
        """See `Sender`."""
        self._peer.connect()

    def send(self, update: memoryview, *, num_samples: float, round: int) -> None:
        """See `Sender`."""
        source = f"{CLIENT_SOURCE}{self._client}"
        attributes = _event(UPDATE, source, f"update-{round}-{self._client}", round)
        attributes |= {LEAF: str(self._leaf), "numsamples": repr(float(num_samples))}
        try:
            _check(self._peer.post("/", events.headers_of(attributes), (update,), len(update)))
        except (OSError, http.client.HTTPException) as error:
            raise RuntimeError(f"the ingress did not take the update: {error!r}") from error

    def fetch_model(self, round: int) -> memoryview:
        """See `Sender`."""
        return _fetch_model(self._peer, round)

    def close(self) -> None:
        """See `Sender`."""
        self._peer.close()


class BrokerObserver:
    """Subscribes to the broker's events without a leaf, which are the global models."""

    def __init__(self, setup: Setup, port: int) -> None:
        self._setup = setup
        self._peer = Peer(port, timeout=_TIMEOUT_S)
        self._wire: Wire | None = None

    def connect(self) -> None:
        """See `Observer`."""
        self._wire = Wire(self._setup.nats_url)
        self._wire.subscribe(self._setup.subject(None))
        self._peer.connect()

    def wait(self, round: int, timeout: float) -> float:
        """See `Observer`. Raises RuntimeError if an event of the round was given up."""
        assert self._wire is not None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            message = self._wire.poll(min(_LOOK_EVERY_S, deadline - time.monotonic()))
            now = time.monotonic()
            if message is None:
                failure = _failure(self._setup)
                if failure:
                    raise RuntimeError(f"round {round} cannot end: {failure}")
                continue
            attributes, _ = events.decode(message.payload)
            if attributes.get("type") == MODEL and attributes.get("round") == str(round + 1):
                return now
        raise TimeoutError(f"round {round} made no model within {timeout:.0f} s")

    def fetch(self, round: int) -> memoryview:
        """See `Observer`."""
        return _fetch_model(self._peer, round + 1)

    def close(self) -> None:
        """See `Observer`."""
        self._peer.close()
        if self._wire is not None:
            self._wire.close()


def _event(kind: str, source: str, name: str, round_number: int) -> Attributes:
    attributes = {"specversion": "1.0", "type": kind, "source": source, "id": name}
    return attributes | {"datacontenttype": MEDIA_TYPE, "round": str(round_number)}


def _check(response: http.client.HTTPResponse) -> bytes:
    """The body of an answer. Raises RuntimeError unless it is 2xx."""
    body = response.read()
    if not 200 <= response.status < 300:
        raise RuntimeError(f"status {response.status}: {body[:500].decode(errors='replace')}")
    return body


def _fetch_model(peer: Peer, number: int) -> memoryview:
    try:
        response = peer.get(f"/model?round={number}")
        body = read_all(response)
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(f"the model of round {number} was not served: {error!r}") from error
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {bytes(body[:500]).decode(errors='replace')}")
    return body


def _failure(setup: Setup) -> str | None:
    try:
        return setup.failures.read_text().strip() or None
    except FileNotFoundError:
        return None


def _create_streams(wire: Wire, setup: Setup) -> None:
    """The broker's stream, a consumer for each Trigger, and the stream of the payloads where there is one."""
    tuning = setup.tuning
    options = {"subjects": [f"{setup.name}.event.>"], "storage": tuning.storage, "num_replicas": 1}
    wire.call(
        f"STREAM.CREATE.{setup.event_stream}", {"name": setup.event_stream, "retention": "interest", **options}
    )
    for leaf in range(setup.tree.leaves):
        config = {
            "durable_name": setup.trigger(leaf),
            "ack_policy": "explicit",
            "ack_wait": int(tuning.ack_wait_s * 1e9),
            "deliver_policy": "all",
            "filter_subject": setup.subject(str(leaf)) if tuning.route_by_subject else f"{setup.name}.event.>",
        }
        wire.call(
            f"CONSUMER.DURABLE.CREATE.{setup.event_stream}.{setup.trigger(leaf)}",
            {"stream_name": setup.event_stream, "config": config},
        )
    if tuning.store == "nats" and tuning.client != "nats-py-stock":
        chunk_store.create(wire, setup)


def _delete_streams(setup: Setup) -> None:
    """Leave nothing on a server that is not ours."""
    try:
        wire = Wire(setup.nats_url)
    except (OSError, WireError):
        return
    try:
        for name in (setup.event_stream, setup.payload_stream, f"OBJ_{setup.payload_stream}"):
            try:
                wire.call(f"STREAM.DELETE.{name}")
            except WireError:
                pass  # it was not made
    finally:
        wire.close()

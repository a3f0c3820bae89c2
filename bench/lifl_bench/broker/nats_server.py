"""A nats-server with JetStream on a free port, with its files in the deployment's directory."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lifl_bench.broker.parts import program
from lifl_bench.broker.tuning import MIB, Tuning
from lifl_bench.service import START_SECONDS, Service

DEFAULT_MAX_PAYLOAD: Final = MIB
_MAX_PENDING: Final = 256 * MIB
_LOOK_EVERY_S: Final = 0.01


def configuration(directory: Path, tuning: Tuning) -> str:
    """The server's configuration file. Without tuning it has only what a private server needs."""
    lines = [
        'listen: "127.0.0.1:-1"',
        f"ports_file_dir: {json.dumps(str(directory))}",
        # A filter reads nothing while it waits for its function, be it for minutes; it is not gone.
        'ping_interval: "1h"',
        f"jetstream {{ store_dir: {json.dumps(str(directory / 'jetstream'))} }}",
    ]
    if tuning.max_payload:
        # A burst of chunks is for one connection: it must not be taken for a slow consumer.
        lines += [f"max_payload: {tuning.max_payload}", f"max_pending: {_MAX_PENDING}", 'write_deadline: "60s"']
    return "\n".join(lines) + "\n"


class NatsServer:
    """A server of its own."""

    def __init__(self, directory: Path, tuning: Tuning, environment: Mapping[str, str]) -> None:
        """Start it and wait until it answers. Raises RuntimeError with its log."""
        directory = directory.resolve()
        path = directory / "nats-server.conf"
        path.write_text(configuration(directory, tuning))
        command = [program("nats-server", environment), "-c", str(path)]
        self.service = Service("nats-server", command, {**environment, **tuning.go}, directory / "nats-server.log")
        try:
            self.url = self._wait_ready(directory / f"nats-server_{self.service.pid}.ports")
        except BaseException:
            self.service.stop()
            raise

    def _wait_ready(self, ports: Path) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if not self.service.is_running:
                raise self.service.failed("ended")
            try:
                url: str = json.loads(ports.read_text())["nats"][0]
            except (FileNotFoundError, json.JSONDecodeError):
                time.sleep(_LOOK_EVERY_S)
                continue
            return url
        raise self.service.failed(f"was not ready within {START_SECONDS:.0f} s")

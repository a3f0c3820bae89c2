"""What all processes of a broker deployment are told: one file that the deployment writes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
from lifl.model_layout import Precision

from lifl_bench.broker.tuning import Tuning
from lifl_bench.deployment import Timing, Tree


@dataclass(frozen=True)
class Setup:
    """The deployment as its processes need to know it."""

    name: str
    """Prefix of every stream and subject, so that several deployments can share a server."""
    nats_url: str
    tuning: Tuning
    tree: Tree
    directory: str
    function: str
    precision: Precision
    timing: Timing
    cold: bool
    update_bytes: int
    """Bytes of one update."""
    payload_limit: int
    """Most bytes of one payload: an update, a model, or a partial aggregate."""
    max_event_bytes: int
    """Largest event that is published; what would be larger gets a reference for its data."""
    pool: str = ""
    """File of the shared-memory pool, where there is one."""
    pool_slots: int = 0

    @property
    def event_stream(self) -> str:
        """The stream of all events of the broker."""
        return f"{self.name}-events"

    @property
    def payload_stream(self) -> str:
        """The stream, or bucket, of payloads above the message limit."""
        return f"{self.name}-payloads"

    def subject(self, leaf: str | None) -> str:
        """Where an event for this leaf, or for none, is published."""
        return f"{self.name}.event.{'all' if leaf is None else f'leaf-{leaf}'}"

    def trigger(self, leaf: int) -> str:
        """The durable consumer of a function's Trigger."""
        return f"trigger-{leaf}"

    @property
    def failures(self) -> Path:
        """File with a line for each event that was given up."""
        return Path(self.directory) / "failures"

    @property
    def initial_model(self) -> Path:
        """File with the model that round 1 starts from."""
        return Path(self.directory) / "initial-model"

    @property
    def stamps(self) -> Path:
        """File of the shared stamps."""
        return Path(self.directory) / "stamps"

    @property
    def path(self) -> Path:
        """The file with all of this."""
        return Path(self.directory) / "setup.json"

    def write(self) -> None:
        """Write the file; it may contain a password of the server."""
        with open(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(self))

    @classmethod
    def read(cls, path: str) -> Setup:
        """Read what `write` wrote."""
        return msgspec.json.decode(Path(path).read_bytes(), type=cls)

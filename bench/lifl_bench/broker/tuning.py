"""Every knob of the broker path, and the three sets of them that are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

KIB: Final = 1 << 10
MIB: Final = 1 << 20

Client = Literal["nats-py", "wire", "nats-py-stock"]
Resolve = Literal["function", "filter"]
Store = Literal["nats", "shared-memory"]
Server = Literal["threads", "hypercorn"]


@dataclass(frozen=True)
class Tuning:
    """How one broker deployment is set up."""

    mode: str
    copies: int
    """Copies of a payload above the message limit between the client's buffer and the fold."""
    copies_detail: str

    # nats-server
    storage: Literal["memory", "file"] = "memory"
    max_payload: int = 8 * MIB
    """Largest message; 0 leaves the server's settings alone altogether."""
    go: dict[str, str] = field(default_factory=dict)
    """Environment of nats-server for Go's runtime."""

    warm_up_bytes: int = 4 << 30
    """Most bytes that are stored and discarded before the first round, otherwise as much as a round has: the
    server then has its memory, as one that runs for long."""

    # payloads above the message limit
    store: Store = "nats"
    client: Client = "nats-py"
    """What moves chunks: nats-py's core client, our own blocking connection, or nats-py's object store with all
    its defaults."""
    chunk_bytes: int = 2 * MIB - 4 * KIB
    """Not a multiple of 8 KiB: nats-server appends two bytes to a chunk that it loaded, and if there is no room
    for them in Go's size class, it copies all of it."""
    window: int = 16
    """Chunks on their way at a time, for which no acknowledgement or no content has come yet."""
    resolve: Resolve = "function"
    """Who exchanges a reference for the payload: the function, or the filter, which then streams it over HTTP."""

    # ingress and filter
    uploads: int = 2
    """Bodies received by the ingress at a time; others wait in their sockets."""
    deliveries: int = 2
    """Events that a filter delivers to one function at a time."""
    batch: int = 1
    """Events that a filter asks the server for at a time."""
    route_by_subject: bool = True
    """Whether the server selects a trigger's events by subject, or the filter by attribute as Knative's does."""
    ack_wait_s: float = 600.0
    max_deliver: int = 5
    retry_delay_s: float = 0.2

    # sidecar and function
    sidecar_buffer: int = MIB
    """nginx's client_body_buffer_size; 0 for its default of 16 KiB."""
    server: Server = "threads"
    """What serves the function: threads that receive into recycled buffers, or hypercorn as in func-python."""
    recycle_memory: bool = True
    """Have malloc keep large blocks, and touch what a function needs before the first round."""


TUNED: Final = Tuning(
    mode="broker",
    copies=20,
    copies_detail=(
        "client to socket; in the ingress: from socket, command (2), to socket; in nats-server: socket to buffer,"
        " whole message, queue of the stream, store (2), out of the store, out buffer, to socket; in the function:"
        " from socket, stream buffer (2), parser (3), to its place; not counted: two more in the ingress of what"
        " its socket does not take at once"
    ),
)
WIRE: Final = Tuning(
    mode="broker-wire",
    copies=12,
    copies_detail=(
        "client to socket, socket to ingress, ingress to socket; in nats-server: socket to buffer, whole message,"
        " queue of the stream, store (2), out of the store, out buffer, to socket; socket to function"
    ),
    client="wire",
    window=8,
)
STOCK: Final = Tuning(
    mode="broker-stock",
    copies=22,
    copies_detail=(
        "client to socket; in the ingress: from socket, bytes, chunk (2), command (2), joined, to socket; in"
        " nats-server: from socket, whole message, queue, file buffer, out of it, out buffer, to socket; in the"
        " function: from socket, stream buffer (2), parser (3), `data +=`, which copies all that is there"
        " once more for each chunk"
    ),
    storage="file",
    max_payload=0,
    warm_up_bytes=0,
    client="nats-py-stock",
    chunk_bytes=128 * KIB,
    window=1,
    uploads=1000,
    deliveries=1,
    batch=10,
    route_by_subject=False,
    max_deliver=3,
    sidecar_buffer=0,
    server="hypercorn",
    recycle_memory=False,
)

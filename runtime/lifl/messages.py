"""The messages of the control plane: between agent, gateways, zygotes, workers and the coordinator of a node.

Two listeners exist, both UNIX SEQPACKET (`control_channel`): the agent's (`agent.sock`), which every process of
the node joins and whose end-of-file means its death, and the coordinator's (`coordinator.sock`), which answers
the gateways. Every message is a msgspec struct tagged with its class name.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from lifl.slot import PoolGeometry

Role = Literal["coordinator", "gateway", "zygote", "worker"]
PoolKind = Literal["updates", "aggregates"]
DataPlane = Literal["ebpf", "unix"]


class Message(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Base of all control messages; the tag is the class name."""


# --- endpoints ---------------------------------------------------------------------------------------------

_ROLE_SHIFT = 24
ROLE_CODES: dict[Role, int] = {"coordinator": 1, "gateway": 2, "worker": 3, "zygote": 4}


def endpoint_id(role: Role, number: int) -> int:
    """The u32 id of an endpoint: the role's code in the top byte, a number that grows per role below."""
    return ROLE_CODES[role] << _ROLE_SHIFT | number


def endpoint_role(endpoint: int) -> Role | None:
    """The role that an endpoint id names; None for a number that is no endpoint."""
    code = endpoint >> _ROLE_SHIFT
    return next((role for role, value in ROLE_CODES.items() if value == code), None)


# --- pools -------------------------------------------------------------------------------------------------


class PoolInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Describes one pool of a job on this node; its memory travels beside it as a file descriptor."""

    pool: int
    """Id, part of every slot reference."""
    kind: PoolKind
    """`updates`: written by gateways, read-only to workers. `aggregates`: models, optimiser state and
    accumulators, written by workers."""
    job: str
    nonce: int
    """Random 63-bit number of this pool's life: whoever knows the nonce already has the same memory."""
    slots: int
    header_capacity: int
    payload_capacity: int

    @property
    def geometry(self) -> PoolGeometry:
        """Where the slots lie."""
        return PoolGeometry(self.slots, self.header_capacity, self.payload_capacity)


# --- joining the agent -------------------------------------------------------------------------------------


class Hello(Message):
    """First message to the agent. A worker shows the ticket it was forked with; a gateway names its seat.

    A zygote names its function in `function`, and in `failure` why it could not import it, if so.
    """

    role: Role
    ticket: str = ""
    seat: int = 0
    function: str = ""
    failure: str = ""
    gather: bool = False
    """The zygote's function wants all updates of a round at once."""
    state_arrays: int = 0
    """Arrays that the server optimiser of the zygote's function keeps between rounds."""


class Welcome(Message):
    """The agent's answer to `Hello`.

    File descriptors, in this order: for every role but the zygote the near and the far end of its data-plane
    connection; then, if `has_credit_page`, a memory object of one page whose first u64 the receiver sets to
    the number of descriptors it has read so far; then one for each of `pools` (for a worker the pools of its
    job, for a gateway all `updates` and `aggregates` pools, for the coordinator none).
    """

    endpoint: int
    data_plane: DataPlane
    has_credit_page: bool
    pools: tuple[PoolInfo, ...] = ()
    worker: WorkerSpec | None = None


class RefusedJoin(Message):
    """The agent does not admit the process; it closes the connection after this."""

    reason: str


# --- coordinator to agent; each is answered by Done with the same id -----------------------------------------


class WorkerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a new worker has to know; all the rest reaches it as descriptors and through its pools."""

    ticket: str
    """Random, single use: proves to the agent that the joining process is the one that was asked for."""
    job: str
    function: str
    accumulator: int
    """Index of the first of its two accumulator slots in the aggregates pool."""
    model_slots: int
    """Model slots at the start of the aggregates pool; the safetensors header lies in each."""
    state_slots: int
    """Optimiser state slots (two generations of each array) that follow the model slots."""
    timing: Literal["eager", "lazy"] = "eager"
    precision: Literal["float32", "float64"] = "float32"
    staleness_exponent: float = 0.0
    """Of `JobSpec`; 0 for a synchronous job, whose updates are all trained from the round's own model."""


class CreatePool(Message):
    """Make the pool (or adopt its memory when a file descriptor is attached), pre-fault it, and hand it to
    every gateway. `Done` carries one file descriptor: the memory, writable."""

    id: int
    info: PoolInfo


class DropPool(Message):
    """Forget the pool and tell the gateways."""

    id: int
    pool: int


class ReclaimPool(Message):
    """Give the pool's pages back to the kernel but keep the pool; content is lost, the next use faults in."""

    id: int
    pool: int


class Allow(Message):
    """Let each (source, destination) pair of endpoints exchange descriptors. Pairs of a worker with a
    gateway (gateway to worker) or with the coordinator (both ways) are allowed at joining; these are the
    others."""

    id: int
    pairs: tuple[tuple[int, int], ...]


class StartWorkers(Message):
    """Have the zygote of the function fork one worker for each spec. `Done` means the request was handed
    over; each worker then appears as `Joined`."""

    id: int
    workers: tuple[WorkerSpec, ...]


class StopWorkers(Message):
    """End these workers: their connections are closed, which makes them exit."""

    id: int
    endpoints: tuple[int, ...]


class GetTraffic(Message):
    """Ask for the router's counters; `Done.traffic` carries them."""

    id: int


class EndpointTraffic(msgspec.Struct, frozen=True):
    """The in-kernel sidecar's counters of one destination endpoint (paper: eBPF sidecar metrics)."""

    endpoint: int
    descriptors: int
    bytes: int
    last_nanoseconds: int
    """CLOCK_MONOTONIC of the node when the last descriptor came; 0 for never."""
    interarrival_nanoseconds: int
    """Exponentially weighted mean of the time between descriptors (weight 1/8)."""
    denied: int
    """Descriptors this endpoint sent to where it may not."""
    unroutable: int
    """Descriptors for this endpoint that found nobody."""
    full: int
    """Descriptors for this endpoint that were returned because its credit was used up."""


class Done(Message):
    """Answer of the agent to a request of the coordinator; `error` is empty on success."""

    id: int
    error: str = ""
    traffic: tuple[EndpointTraffic, ...] = ()


# --- agent to coordinator, unasked ---------------------------------------------------------------------------


class Joined(Message):
    """A process has joined; `ticket` tells which worker it is, `seat` which gateway.

    After the coordinator itself joins, the agent sends one of these for every process already there.
    """

    endpoint: int
    role: Role
    pid: int
    ticket: str = ""
    seat: int = 0
    function: str = ""
    failure: str = ""
    gather: bool = False
    state_arrays: int = 0


class Left(Message):
    """A process is gone. Every descriptor it had sent is already in its receiver's queue.

    Each ticket of `StartWorkers` ends as a `Joined` or, when its zygote died or the agent had no room, as a `Left`
    with endpoint 0.
    """

    endpoint: int
    role: Role
    pid: int
    ticket: str = ""
    seat: int = 0
    function: str = ""


# --- agent to gateway and zygote -----------------------------------------------------------------------------


class PoolAdded(Message):
    """To a gateway: a pool exists now; one file descriptor is attached."""

    info: PoolInfo


class PoolDropped(Message):
    """To a gateway: the pool is gone; unmap it."""

    pool: int


class Fork(Message):
    """To a zygote: fork one worker for each spec."""

    workers: tuple[WorkerSpec, ...]


# --- gateway to coordinator (coordinator.sock): request and answer ---------------------------------------------


class JobSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `POST /v1/jobs` takes (DESIGN.md section 7)."""

    name: str
    function: str
    goal: int
    """Updates that close a round."""
    quorum: int = 0
    """Updates that suffice once the deadline has passed; 0 means the goal."""
    deadline: float = 0.0
    """Seconds from the opening of a round after which the quorum suffices; 0 means none."""
    rounds: int = 0
    """Rounds after which the job is complete; 0 means no end."""
    timing: Literal["eager", "lazy"] = "eager"
    updates_per_leaf: int = 2
    """I of the hierarchy planner: updates for each leaf, before the limit of the cores."""
    slots: int = 0
    """Update slots of the pool on a node; 0 lets the platform choose from the goal and the memory."""
    precision: Literal["float32", "float64"] = "float32"
    keep_checkpoints: int = 10
    """Newest global models kept on disk; 0 keeps all."""
    durability: Literal["async", "sync"] = "async"
    """`async`: a model is offered at once and written to disk behind it. `sync`: first written."""
    idle_seconds: float = 60.0
    """Time without traffic after which workers stop and the pool's memory goes back to the kernel."""
    placement: Literal["best-fit", "first-fit", "worst-fit", "round-robin"] = "best-fit"
    """Which node of a cluster folds an update. `best-fit`: the fullest that still has capacity, so that few nodes
    are used; `worst-fit`: the emptiest; `first-fit`: the first that has capacity; `round-robin`: each in turn."""
    redirect: bool = True
    """Whether a gateway sends a client to the node that its update was placed on. False: an update is folded where
    it arrives, for clients that reach the gateways through a load balancer only."""
    smoothing: float = 0.7
    """a of the hierarchy planner: the share of the old estimate in the smoothed number of pending updates."""
    reuse: bool = True
    """Whether workers go on with the next round. False: they end with their round, and each round starts new ones
    when its first update comes, so no state of a function outlives a round."""
    mode: Literal["sync", "async"] = "sync"
    """`sync`: a round takes updates that were trained from its own model. `async`: it is a buffer of `goal`
    updates, and takes differences to older models too (FedBuff)."""
    max_staleness: int = 20
    """Asynchronous jobs: an update is late when its model is older than so many rounds."""
    staleness_exponent: float = 0.5
    """Asynchronous jobs: a difference to a model that is t rounds old is multiplied with (1 + t)^-a; this is a. 0
    treats all alike."""
    over_selection: float = 0.0
    """Synchronous jobs: ceil(goal x (1 + this)) clients are selected for a round, so that it reaches its goal
    though some of them fail or are slow. 0: everyone may take part."""
    shards: int = 1
    """In a cluster: parts into which the model is cut, each on a node of its own as far as there are so many. For
    models larger than the memory of one node."""
    shard_of: str = ""
    """The job that this one is a shard of; set by the coordinator alone."""
    whole: JobSpec | None = None
    """The same job as it was asked for; set by the coordinator alone."""


class CreateJob(Message):
    """Answered by `JobState`, or `Problem` 409/422."""

    spec: JobSpec


class InstallModel(Message):
    """The initial model, complete and checked, lies in this file of the state directory; the coordinator takes
    it over (rename). Answered by `JobState` once round 1 is open, or `Problem`."""

    job: str
    path: str


class Admit(Message):
    """Asked before the body is read: would this update be taken? Answered by `Verdict` or `Problem`; in an
    asynchronous job whose buffer is just being closed, when the next one opens.

    After the answer `open` the gateway owes a `Commit` or an `Abandon`: meanwhile the job does not go idle, for
    its memory is being written.
    """

    job: str
    round: int
    """The round whose model it was trained from."""
    client: str
    event_id: str
    gateway: int
    """The gateway's endpoint."""


class Abandon(Message):
    """An upload that was admitted will not be committed. Answered by `Acknowledged`."""

    job: str
    round: int
    client: str
    gateway: int


class Commit(Message):
    """The update is complete in this slot: count it, once. Answered by `Verdict`.

    On `accepted` the coordinator itself sends nothing: the gateway sends the UPDATE descriptor to
    `Verdict.destination`. On any other verdict the slot stays the gateway's to reuse.
    """

    job: str
    round: int
    client: str
    event_id: str
    slot: int
    """Slot reference."""
    generation: int
    """Generation modulo 256, as in the descriptor."""
    num_samples: float
    started: float
    """CLOCK_MONOTONIC seconds of the first byte of the request, for ACT."""
    gateway: int
    """The gateway's endpoint. A commit of a gateway that has been replaced on its seat meanwhile is refused, for
    its slots are the successor's."""
    update: str = ""
    """Of a part for a shard: what tells the parts of this update from those of another one by the same client."""


class Verdict(Message):
    """`open`: go on and read the body. `accepted`: counted. `duplicate`: this client already has its update
    in this round, or, in an asynchronous job, had one with this base counted before. `late`: the round is closed;
    `round` is the open one. `early`: no such round yet. `unselected`: enough other clients take part. `elsewhere`:
    another node of the cluster takes it."""

    status: Literal["open", "accepted", "duplicate", "late", "early", "unselected", "elsewhere"]
    round: int
    """On `accepted`: the round that it counts in, which its descriptor carries."""
    destination: int = 0
    """The aggregator's endpoint; 0 when it is only being started: the coordinator then sends the descriptor."""
    address: str = ""
    """On `elsewhere`: base URL of the gateways of the node that takes this client's update."""
    updates_pool: int = -1
    """On `open`: the pool whose slots it may go to, if the gateway may not know it yet."""


class SelectClient(Message):
    """A client wants to take part in a round. Answered by `Selection` or `Problem`."""

    job: str
    round: int
    client: str


class Selection(Message):
    """`selected`: the client has a place in the round. `again`: it had one before. `enough`: others have them all.
    `everyone`: the job selects nobody, all may take part. `late`, `early`: as in `Verdict`."""

    status: Literal["selected", "again", "enough", "everyone", "late", "early"]
    round: int
    """The open one."""
    selected: int = 0
    """Clients that have a place in the round."""
    places: int = 0
    """Of so many."""


class BusySlots(Message):
    """Asked by a gateway after each joining of the agent: which slots of its `seat` hold accepted updates that
    are not folded yet? Whatever else it thought in use is free. Answered by `Slots`."""

    seat: int


class Slots(Message):
    """Slot references with the generation (8 bits) they hold."""

    keys: tuple[tuple[int, int], ...]


class DescribeUplink(Message):
    """From the gateway that got a PARTIAL descriptor from an aggregator: where does this partial aggregate go?

    Asked again before each attempt to send it. Answered by `Uplink`.
    """

    slot: int
    """Slot reference of the accumulator."""
    round: int
    """Modulo 65,536, as in the descriptor."""


class Uplink(Message):
    """The node that gets a partial aggregate; all empty when it is wanted nowhere (any more)."""

    peer_address: str = ""
    """HOST:PORT of the gateway that takes it."""
    job: str = ""
    nonce: int = 0
    """Of the job's life."""
    round: int = 0
    attempt: int = 0
    epoch: int = 0
    source: str = ""
    """This node's incarnation."""
    nbytes: int = 0
    """Bytes of the sums in the slot's payload."""


class PartialSent(Message):
    """The gateway has sent a partial aggregate, and the other node has it. Answered by `Acknowledged`."""

    job: str
    round: int
    attempt: int
    epoch: int


class OfferPartial(Message):
    """Asked before a partial aggregate of another node is received: is it wanted? See `PartialVerdict`."""

    job: str
    nonce: int
    round: int
    attempt: int
    epoch: int
    source: str
    """Incarnation of the node it comes from."""
    nbytes: int


class CommitPartial(Message):
    """The partial aggregate is complete in this update slot, its seal in the header page: count it, once.

    Answered by `PartialVerdict`. On `accepted` the gateway sends a PARTIAL descriptor to `destination`.
    """

    job: str
    nonce: int
    round: int
    attempt: int
    epoch: int
    source: str
    slot: int
    generation: int
    gateway: int
    """The gateway's endpoint; see `Commit`."""
    updates: int = 0
    """Client updates contained, from the seal."""
    nbytes: int = 0
    """Bytes that came over the network for it."""


class PartialVerdict(Message):
    """`open`: go on and receive it. `accepted`: it is part of the round. `duplicate`: it is already. `refused`: it
    is not wanted, and sending it again does not help."""

    status: Literal["open", "accepted", "duplicate", "refused"]
    destination: int = 0
    """The aggregator's endpoint; 0 when it is only being started: the coordinator then sends the descriptor."""
    updates_pool: int = -1
    aggregates_nonce: int = 0
    """Nonce of the job's aggregates pool, which the seal has to carry here."""


class AcquireModel(Message):
    """Borrow the bytes of a global model. Answered by `ModelSource`, or `Problem` 404. `round` 0 = newest."""

    job: str
    round: int = 0


class ModelSource(Message):
    """Where the bytes of the model are: in the file `path`, or, while that is not yet written, in slot `slot` of
    the job's aggregates pool. Both stay as they are until `ReturnModel` or the end of the connection."""

    round: int
    path: str
    lease: int
    slot: int = 0
    header_bytes: int = 0
    """Bytes of the safetensors header in the slot's header room, without the 8-byte length."""
    payload_bytes: int = 0
    state_slots: tuple[int, ...] = ()
    """Slot references of the server optimiser's arrays at the start of the round, if they are in memory."""
    state_bytes: int = 0
    """Bytes of each array."""
    state_path: str = ""
    """The file that has them one after another, if they are on disk."""


class ReturnModel(Message):
    """Give back what `AcquireModel` lent; answered by `Acknowledged`."""

    lease: int


class DescribeJob(Message):
    """Answered by `JobState` or `Problem` 404."""

    job: str


class ListJobs(Message):
    """Answered by `Jobs`: those after the name `after`, in order, as many as one message takes."""

    after: str = ""


class DescribeRound(Message):
    """Answered by `RoundState` or `Problem` 404."""

    job: str
    round: int


class DescribeUpdates(Message):
    """Answered by `RoundUpdates`, or `Problem` 404 when there is no such round or its updates are not kept."""

    job: str
    round: int
    offset: int = 0
    """Updates to leave out at the start, in the order in which they were accepted."""


class DescribeLatencies(Message):
    """Answered by `Latencies`."""


class DeleteJob(Message):
    """Stop the job's workers and give its memory back; checkpoints stay. Answered by `Acknowledged`."""

    job: str


class DescribeNodes(Message):
    """Answered by `Nodes`."""


class Subscribe(Message):
    """Turn this connection into a stream of `JobState`: one for each job now, then `Acknowledged` to say that
    these are all, then one at each change of a job's round or status. Nothing more is answered on it."""


class Acknowledged(Message):
    """Done; nothing to say."""


class Problem(Message):
    """The request was refused (RFC 9457 fields)."""

    status: int
    title: str
    detail: str = ""
    retry_after: float = 0.0


class RoundState(Message):
    """One round of a job, as `GET /v1/jobs/{job}/rounds/{n}` shows it. Times in seconds."""

    round: int
    status: Literal["open", "closing", "complete"]
    accepted: int
    folded: int
    rejected: int
    late: int
    duplicates: int
    weight: float
    act: float
    """Aggregation completion time: first byte of the first update in, to global model offered; 0 if open."""
    leaves: int
    started: int
    """Workers started for this round."""
    reused: int
    """Workers that served an earlier round or another place of the hierarchy; 0 for a job without reuse."""
    rejected_clients: tuple[str, ...] = ()
    latency_median: float = 0.0
    """Median time of the folded updates, each from its first byte in to folded; 0 when none is."""
    latency_p95: float = 0.0
    """The time that 95 % of them kept to."""
    latency_max: float = 0.0
    """The longest of them."""
    cold: int = 0
    """Workers started while an update already waited for them."""
    nodes: int = 1
    """Nodes that had updates of the round."""
    top: str = ""
    """The node that finished it, in a cluster."""
    internode_bytes: int = 0
    """Bytes of partial aggregates and models that went from node to node."""
    lost: int = 0
    """Accepted updates that were lost with their node; their clients were asked to send them again."""
    selected: int = 0
    """Clients that were selected for the round; 0 when everyone may take part."""


class UpdateState(msgspec.Struct, frozen=True):
    """One update of a round. Times in seconds, 0 for what has not happened."""

    client: str
    """In an asynchronous job CLIENT@ROUND, with the round whose model it was trained from."""
    num_samples: float
    aggregator: int
    """The place in the tree that folds it; 0 is the top."""
    status: Literal["accepted", "folded", "rejected"]
    """`folded`: it is part of a sealed accumulator, of which nothing is lost any more when a worker dies."""
    first_byte: float
    """CLOCK_MONOTONIC of the node when the first byte of the request had come."""
    folded: float
    """CLOCK_MONOTONIC of the node when the coordinator heard of that."""
    latency: float
    """From the first byte to folded."""


class RoundUpdates(Message):
    """The updates of a round in the order in which they were accepted, so many as one answer takes.

    CLOCK_MONOTONIC counts from the start of the machine. An instant t of it is `time - monotonic + t` in unix
    time; on the same machine it can be compared with what other processes read from that clock.
    """

    round: int
    status: Literal["open", "closing", "complete"]
    monotonic: float
    """CLOCK_MONOTONIC of the node now."""
    time: float
    """Unix time now."""
    total: int
    """Updates of the round, those that were rejected among them."""
    next: int
    """The offset of the next part; 0 when nothing follows."""
    updates: tuple[UpdateState, ...]


class JobLatencies(msgspec.Struct, frozen=True):
    """How long the updates of a job took from their first byte to folded, since the coordinator started."""

    job: str
    counts: tuple[int, ...]
    """Updates in each bucket; the last is for those above all bounds."""
    seconds: float
    """Sum over all updates."""


class Latencies(Message):
    """A histogram for each job that is running."""

    bounds: tuple[float, ...]
    """Upper bounds of the buckets, in seconds."""
    jobs: tuple[JobLatencies, ...]


class JobState(Message):
    """One job, as `GET /v1/jobs/{job}` shows it."""

    job: str
    status: Literal["waiting-for-model", "running", "complete", "deleted", "failed"]
    """`waiting-for-model` with a `model_round` is a job that is being restored: its updates are taken soon."""
    round: int
    """The open round; 0 before the model is there."""
    model_round: int
    """The round that the newest global model starts (equal to `round` while one is open)."""
    spec: JobSpec
    data_plane: str
    model_header_bytes: int = 0
    model_payload_bytes: int = 0
    updates_pool: int = -1
    aggregates_pool: int = -1
    model_layout: str = ""
    """Hex SHA-256 of the model's safetensors header."""
    nonce: int = 0
    """Random number of this life of the job; part of the model's ETag."""
    current: RoundState | None = None
    last: RoundState | None = None
    checkpointed_round: int = 0
    workers: int = 0
    detail: str = ""
    elsewhere: str = ""
    """Base URL of who has the model of a sharded job and takes its updates apart, if this node does not."""


class Jobs(Message):
    """All jobs of the coordinator."""

    jobs: tuple[JobState, ...]


class NodeState(msgspec.Struct, frozen=True):
    """One node."""

    name: str
    cores: int
    data_plane: str
    gateways: int
    workers: int
    pool_bytes: int
    zygotes: tuple[str, ...] = ()
    traffic: tuple[EndpointTraffic, ...] = ()
    status: Literal["ready", "draining", "drained", "lost"] = "ready"
    address: str = ""
    """Base URL of its gateways; empty outside a cluster."""
    capacity: float = 0.0
    """MC: updates that it can aggregate at once; 0 outside a cluster."""
    is_calibrated: bool = False
    """`capacity` was measured."""
    arrival_rate: float = 0.0
    """k: updates that arrive in a second."""
    execution_seconds: float = 0.0
    """E: smoothed time of an update from arrival to folded."""
    residual: float = 0.0
    """RC = MC - k E, less the updates that are being uploaded to it."""
    updates: int = 0
    """Updates of open rounds that it has."""
    last_heard: float = 0.0
    """Seconds since its last heartbeat."""


class Nodes(Message):
    """All nodes of the coordinator."""

    nodes: tuple[NodeState, ...]


ToAgent = Hello | CreatePool | DropPool | ReclaimPool | Allow | StartWorkers | StopWorkers | GetTraffic
FromAgent = Welcome | RefusedJoin | Done | Joined | Left | PoolAdded | PoolDropped | Fork
ToCoordinator = (
    CreateJob
    | InstallModel
    | Admit
    | Abandon
    | Commit
    | SelectClient
    | BusySlots
    | DescribeUplink
    | PartialSent
    | OfferPartial
    | CommitPartial
    | AcquireModel
    | ReturnModel
    | DescribeJob
    | ListJobs
    | DescribeRound
    | DescribeUpdates
    | DescribeLatencies
    | DeleteJob
    | DescribeNodes
    | Subscribe
)
FromCoordinator = (
    JobState
    | Problem
    | Verdict
    | Selection
    | Uplink
    | PartialVerdict
    | Slots
    | ModelSource
    | RoundState
    | RoundUpdates
    | Latencies
    | Acknowledged
    | Jobs
    | Nodes
)

"""What the members of a cluster and its coordinator tell each other: JSON over HTTP, every request a node's.

    POST /v1/members                   Register        -> Registered
    POST /v1/members/NODE/messages     MemberMessages  -> Answers, one for each message, in order
    POST /v1/members/NODE/orders       OrdersRequest   -> Orders; waits for something new, and is the heartbeat
    POST /v1/members/NODE/leave        Leave           -> Acknowledged

Errors are problem+json. 410 says that the node's lease has run out: all that it holds of open rounds is void, and
it registers anew with another incarnation.

Orders are states and not steps: a `JobOrder` says how things shall be, whoever missed some only needs the last
one, and a coordinator that was started again sends the same from its journal. `version` grows with each change. A
node that has carried out what an order says names its version in `seen`. Messages are steps; each may safely be
repeated, and those of one node are sent one after another, so they arrive in order.

Times are durations, never instants: no two nodes need agree about the time of day.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from lifl.messages import (
    Acknowledged,
    CreateJob,
    DeleteJob,
    DescribeJob,
    DescribeNodes,
    DescribeRound,
    Jobs,
    JobSpec,
    JobState,
    ListJobs,
    Message,
    Nodes,
    Problem,
    RoundState,
    SelectClient,
    Selection,
)

Phase = Literal["open", "closing"]
NodeRole = Literal["", "middle", "top"]
CountVerdict = Literal["accepted", "duplicate", "late", "early", "unselected", "ask-again"]
PlaceVerdict = Literal["open", "duplicate", "late", "early", "unselected"]

# --- joining -----------------------------------------------------------------------------------------------


class Register(Message):
    """A node joins the cluster. Registering again with the same incarnation is a repeat and changes nothing.

    A new incarnation of a known name replaces the old one, whose updates are lost unless they were delivered.
    """

    name: str
    incarnation: str
    """Random; a node whose memory does not go on from before has a new one."""
    address: str
    """Base URL of its gateways for clients, such as http://10.0.0.7:8080."""
    peer_address: str
    """HOST:PORT where it takes partial aggregates from other nodes and gives models to them."""
    cores: int
    memory: int
    """Bytes that its pools may take."""
    data_plane: str
    functions: tuple[str, ...]
    capacity: float
    """MC: updates that it can aggregate at once (`func node calibrate`)."""
    is_calibrated: bool = False
    """`capacity` was measured here; otherwise it is a guess from the cores."""
    version: str = ""
    attaches: bool = False
    """Its functions come from outside, as pods: it has those that `AttachedFunctions` names, and starts none."""


class Registered(Message):
    """The node is a member. It asks for orders before `heartbeat_seconds` have passed since it last did."""

    boot: str
    """Random, of this life of the coordinator."""
    lease_seconds: float
    """Time without any request after which the node counts as lost."""
    heartbeat_seconds: float


class Leave(Message):
    """The node ends. What it holds of open rounds is lost; a drained node holds nothing."""

    incarnation: str


# --- orders ------------------------------------------------------------------------------------------------


class NodeLoad(msgspec.Struct, frozen=True):
    """How busy a node is (paper: metrics of the eBPF sidecar). RC = MC - k E."""

    arrival_rate: float = 0.0
    """k: descriptors of updates that reach its aggregators in a second, from the router's inter-arrival EWMA."""
    execution_seconds: float = 0.0
    """E: smoothed time from an update's arrival at an aggregator to folded; 0 before there was one."""
    workers: int = 0
    pool_bytes: int = 0


class OrdersRequest(Message):
    """Ask for every order newer than those carried out; the answer waits for one for up to `wait` seconds."""

    incarnation: str
    seen: dict[str, int] = msgspec.field(default_factory=dict)
    """Version of the order of each job that was carried out."""
    load: NodeLoad = NodeLoad()
    capacity: float = 0.0
    """MC as it is now; 0 leaves it as registered."""
    wait: float = 0.0


class JobOrder(msgspec.Struct, frozen=True):
    """How a job stands, and what this node is to do for it."""

    job: str
    version: int
    spec: JobSpec
    nonce: int
    """Random number of this life of the job; part of the model's ETag."""
    status: Literal["waiting-for-model", "running", "complete", "deleted", "failed"]
    detail: str = ""
    round: int = 0
    """The open round; 0 without one."""
    model_round: int = 0
    """The round that the newest model starts; 0 before there is a model."""
    attempt: int = 0
    """Grows when a round starts again without any of its updates, because its model was lost. Whatever belongs to
    another attempt is void."""
    epoch: int = 0
    """Grows whenever another node becomes the round's top. A partial aggregate of another epoch is refused."""
    model_sources: tuple[str, ...] = ()
    """Peer addresses that have the newest model, nearest first; the coordinator's own may be among them."""
    state_sources: tuple[str, ...] = ()
    """The same for the server optimiser's arrays."""
    phase: Phase = "open"
    """`closing`: fold what is here and send it to the top, or, as the top, wait for `partials` and finish."""
    role: NodeRole = ""
    """While a top is chosen: what this node is. The top of a round that was opened once more stays the top."""
    top: str = ""
    """Peer address of the top."""
    updates: int = 0
    """Updates of this node that count; while closing, it finishes when it has just so many."""
    partials: tuple[str, ...] = ()
    """For the top: incarnations whose partial aggregates belong to the round. It refuses any other, but keeps and
    reports (`PartialDelivered`) one that it had taken in before it saw this order."""
    leaves: int = 1
    """Aggregators that the plan gives this node for the round; 1 at least."""
    accepted: int = 0
    """Updates that count in the whole round so far."""
    last: RoundState | None = None
    """The last complete round."""
    checkpointed_round: int = 0


class Orders(Message):
    """Everything newer than what the node has carried out; empty when the time was over."""

    boot: str
    """Another one than before: the coordinator was started again, and the node tells once more which models it
    holds."""
    jobs: tuple[JobOrder, ...]
    drain: bool = False
    """The node gets no more updates. What it has is finished with the round."""
    calibrate: int = 0
    """Grows when the operator asks the node to measure its capacity again."""


# --- messages of a member ----------------------------------------------------------------------------------


class PlaceUpdate(Message):
    """Asked before an update's body is read: would it be taken, and on which node? Answered by `Placed`.

    The choice holds for the client until the round ends or the upload does, so a retry goes to the same node. In
    an asynchronous job it holds from one round to the next.
    """

    job: str
    round: int
    """The round whose model the update was trained from."""
    client: str
    here: bool = False
    """It cannot be sent elsewhere: answer with the asking node unless that one is draining."""


class Placed(Message):
    """`open`: send it to `node`, whose gateways are at `address`. Else as `Verdict`."""

    status: PlaceVerdict
    round: int
    node: str = ""
    address: str = ""


class EndUpload(Message):
    """An upload that was placed will not be counted. Answered by `Acknowledged`."""

    job: str
    round: int
    """As in `PlaceUpdate`."""
    client: str


class CountUpdate(Message):
    """The update is complete in this node's memory: count it, once. Answered by `Counted`.

    It counts from the moment it is in the coordinator's journal. A repeat by the same incarnation is answered
    `accepted` again. The node keeps the update until it has an answer, however long that takes.
    """

    job: str
    nonce: int
    round: int
    """The round that is open on the node: the update is to count in it and in no other."""
    attempt: int
    client: str
    """What names the update among others: see `lifl.staleness.contributor_of`."""
    num_samples: float
    update: str = ""
    """Of a part for a shard: only parts with the same text here are of one update."""


class Counted(Message):
    """`accepted`, or why the update does not count; `round` is the open one.

    `ask-again`: that cannot be told before things have changed. The node keeps the update, and asks again when it
    has carried out an order of `version` or later by which the round takes updates.
    """

    status: CountVerdict
    round: int
    version: int = 0


class RejectUpdate(Message):
    """A counted update is not finite: it counts no more. Answered by `Acknowledged`.

    Sent before the partial aggregate or model that is without it. A round that is closing does not wait for a
    replacement, unless nothing would be left of it.
    """

    job: str
    round: int
    attempt: int
    client: str


class PartialDelivered(Message):
    """From the top: the partial aggregate of `source` (an incarnation) is in its memory.

    Answered by `Acknowledged`. From here on the loss of that node loses no update.
    """

    job: str
    round: int
    attempt: int
    epoch: int
    source: str
    updates: int
    nbytes: int


class ModelMade(Message):
    """From the top: the round's model is there. Answered by `Acknowledged` when it counts: the round is complete.

    `Problem` 409 when it does not: another epoch has begun, or `contributors` are not those that the round has.
    """

    job: str
    round: int
    attempt: int
    epoch: int
    contributors: tuple[str, ...]
    """Incarnations whose updates are in the model, its own among them if it has any."""
    updates: int
    """The top's own."""
    weight: float
    """Of these."""


class ModelHeld(Message):
    """The node has the model that starts `round` and gives it to others. Answered by `Acknowledged`."""

    job: str
    attempt: int
    round: int
    slots: int = 0
    """Updates that each of its gateways can hold at once."""


class RoundReport(Message):
    """What a round took on a node; sent once it is complete there. Answered by `Acknowledged`."""

    job: str
    round: int
    attempt: int
    leaves: int
    started: int
    """Workers started for it."""
    cold: int
    """Of these, those that an update had to wait for."""
    reused: int
    received_bytes: int
    """Bytes of partial aggregates and models that came from other nodes."""
    latency_median: float = 0.0
    latency_p95: float = 0.0
    latency_max: float = 0.0


class FunctionFacts(Message):
    """What a function asks of the platform, known once it was imported on a node. Answered by `Acknowledged`.

    Before the first of these a job's updates cannot be placed: a gathering function has all of them on one node.
    """

    function: str
    gather: bool
    state_arrays: int
    """Arrays that its server optimiser keeps: the top of the next round needs them."""
    failure: str = ""
    """Why it could not be imported."""


class AttachedFunctions(Message):
    """The functions whose zygotes are at a node that can start none itself: all of them, whenever they change.

    What is not named can fold nothing there, and gets no updates. Answered by `Acknowledged`.
    """

    functions: tuple[str, ...]


class JobBroken(Message):
    """The job cannot go on on this node: its function fails, or there is no memory. Answered by `Acknowledged`."""

    job: str
    attempt: int
    detail: str


MemberMessage = (
    PlaceUpdate
    | EndUpload
    | CountUpdate
    | RejectUpdate
    | PartialDelivered
    | ModelMade
    | ModelHeld
    | RoundReport
    | FunctionFacts
    | AttachedFunctions
    | JobBroken
    | CreateJob
    | DeleteJob
    | DescribeJob
    | DescribeRound
    | ListJobs
    | DescribeNodes
    | SelectClient
)
MemberAnswer = Placed | Counted | Selection | Acknowledged | Problem | JobState | RoundState | Jobs | Nodes


class MemberMessages(Message):
    """Messages in the order in which they are to be acted on."""

    incarnation: str
    messages: tuple[MemberMessage, ...]
    sequence: int = 0
    """Counts the requests of an incarnation from 1, and is the same when one is repeated; 0: not counted.

    So a repetition is answered as before, and a request that comes after a later one is not acted on.
    """


class Answers(Message):
    """One answer for each message."""

    answers: tuple[MemberAnswer, ...]

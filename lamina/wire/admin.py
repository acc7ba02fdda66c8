"""An operator asks a node for its status, a trace of its device, and measurements between nodes."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from lamina.limits import MAX_LEASE
from lamina.runtime.spans import Span
from lamina.transport import Lane, Link, RemoteRegion
from lamina.wire.codec import Message

MAX_SPANS = 4096
"""So many fit into a message, with the longest names."""


class AskStatus(Message):
    """Ask for the status of the node; Status answers it."""


class PeerStatus(Struct, frozen=True, kw_only=True):
    """Describes a node at the other end of a link, as this node sees it."""

    name: str
    transport: str
    choice: str
    """What each end asked for, which transport was taken, and why."""
    kv_heads: int
    """KV heads per layer that lie on the peer; 0 for a compute node."""
    bytes_sent: int
    bytes_received: int
    bulk_sent: int = 0
    """The part of ``bytes_sent`` that took the bulk lane."""
    bulk_received: int = 0
    waited_s: float = 0.0
    """The seconds that steps have waited for what comes on the decode lane, added up over batches."""
    bulk_waited_s: float = 0.0
    """The seconds that prompts have waited for room on the bulk lane."""

    @classmethod
    def over(
        cls, link: Link, name: str, kv_heads: int = 0, *, waited_s: float = 0.0, bulk_waited_s: float = 0.0
    ) -> PeerStatus:
        """Describe the node at the other end of ``link``, which the file calls ``name``."""
        state = link.state
        return cls(
            name=name,
            transport=link.info.transport,
            choice=link.info.choice,
            kv_heads=kv_heads,
            bytes_sent=sum(state.bytes_written),
            bytes_received=sum(state.bytes_received),
            bulk_sent=state.bytes_written[Lane.BULK],
            bulk_received=state.bytes_received[Lane.BULK],
            waited_s=waited_s,
            bulk_waited_s=bulk_waited_s,
        )


class TenantStatus(Struct, frozen=True, kw_only=True):
    """Describes what a memory node has for one tenant."""

    name: str
    model: str
    compute_nodes: list[str]
    """The compute nodes that are attached, beginning with the front."""
    sequences: int
    kv_tokens_total: int
    kv_tokens_free: int
    quota: int
    """The bytes of memory that only this tenant may use."""
    busy_s: float
    """The seconds that the device has computed for it."""
    lease_s: float | None = None
    """The seconds after which it ends unless its front comes back. None while the front is attached."""


class MemberStatus(Struct, frozen=True, kw_only=True):
    """Describes a member of the cluster, as the front sees it."""

    name: str
    state: Literal["joining", "serving", "leaving", "gone", "lost"]
    for_s: float
    """The seconds that the member has been in this state."""
    role: Literal["compute", "memory"]
    address: str
    """Where other nodes reach it."""


class Status(Message):
    """Reports a node's state and its counters since it started. Times are seconds, sizes are bytes."""

    name: str
    role: str
    state: Literal["starting", "waiting", "ready", "draining"]
    waiting_for: str = ""
    pid: int = 0
    model: str = ""
    requests_running: int = 0
    requests_waiting: int = 0
    tokens_generated: int = 0
    steps: int = 0
    layers: int = 0
    """The number of attention layers run, over all steps."""
    busy_s: float = 0.0
    """The seconds that the device has computed."""
    preemptions: int = 0
    """How often a sequence lost its space to others."""
    prompt_tokens: int = 0
    """The number of tokens that had to be prefilled or found."""
    shared_tokens: int = 0
    """How many of these the memory nodes already held."""
    moves: int = 0
    """How often blocks of a sequence went from one memory node to another."""
    moved_bytes: int = 0
    """The bytes of keys and values in them."""
    failed_moves: int = 0
    """How often that was begun, and nothing came of it."""
    redirections: int = 0
    """How often a sequence went on on another memory node, without a copy."""
    sequences: int = 0
    kv_tokens_total: int = 0
    kv_tokens_free: int = 0
    stale_tags: int = 0
    journal: Literal["off", "process", "machine"] = "off"
    """What the front's journal outlives, if it has one."""
    journal_bytes: int = 0
    """The length of its file."""
    journal_failure: str = ""
    """Why it cannot be written, so that no request is taken."""
    requests_resumed: int = 0
    """How often a client came back for an answer."""
    peers: list[PeerStatus] = field(default_factory=list)
    tenants: list[TenantStatus] = field(default_factory=list)
    front: str = ""
    """The compute node that is the front, as a compute node knows it."""
    epoch: int = 0
    """The number of changes of the members, as a compute node knows it."""
    members: list[MemberStatus] = field(default_factory=list)
    """All members of the cluster; only the front tells them."""


class Record(Message):
    """Record what your device does in the next ``seconds``, and forget what was recorded before; Spans answers it."""

    seconds: Annotated[float, Meta(gt=0, le=60)]


class AskSpans(Message):
    """Stop recording and give out the oldest spans that are left, at most ``count``; Spans answers it."""

    count: Annotated[int, Meta(ge=0, le=MAX_SPANS)]


class Spans(Message):
    """Gives out spans. ``clock_s`` is the present time on the clock of the spans, the node's monotonic one.

    ``forgotten`` counts older spans for which there was no room.
    """

    clock_s: float
    forgotten: int = 0
    spans: Annotated[list[Span], Meta(max_length=MAX_SPANS)] = field(default_factory=list)


class Probe(Message):
    """Measure the link to memory node ``node`` of your own file over one transport; Probed answers it."""

    node: Annotated[str, Meta(max_length=64)]
    kind: Literal["rdma", "shm", "tcp"]


class Probed(Message):
    """Reports what was measured: round trips of 8 KiB and bandwidth; or, in ``error``, why that was impossible."""

    kind: str
    choice: str = ""
    p50_s: float = 0.0
    p99_s: float = 0.0
    bytes_per_s: float = 0.0
    error: str = ""


class Drain(Message):
    """Ask the front to let memory node ``node`` leave: all that it holds goes elsewhere. Draining answers how far that
    is.

    What finds no room elsewhere within ``patience`` seconds is computed anew there. None: only tell how far it is.
    """

    node: Annotated[str, Meta(max_length=64)]
    patience: Annotated[float, Meta(ge=0, le=MAX_LEASE)] | None


class Draining(Message):
    """Reports how far a memory node is that is to leave; or, in ``error``, why it is not to."""

    state: Literal["leaving", "gone", "lost", "back"] = "leaving"
    """The last one: it takes part in the cluster, and was not told to leave since it was started."""
    tokens: int = 0
    """The positions of KV cache that are still held there."""
    note: str = ""
    """What is special about this cluster."""
    error: str = ""


class EchoRegion(Message):
    """Names the region of the sender that the peer may write while the link is measured."""

    region: RemoteRegion

    def __post_init__(self) -> None:
        RemoteRegion.from_wire(list(self.region))

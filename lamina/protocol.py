"""What nodes and clients say to each other, above the transport.

Control messages are structs, checked when they arrive. On the hot path nothing is serialised: a write carries a
32-bit tag, the plan of a step and the head of a bulk chunk are packed at fixed offsets.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta, Struct

from lamina.attention import LayerShape, Run
from lamina.errors import LaminaError, ProtocolError
from lamina.spans import Span
from lamina.transport import Link, RemoteRegion
from lamina.validation import explain

MAX_SPANS = 8192
"""Of one message, which may have 1 MiB."""

Count = Annotated[int, Meta(ge=0, le=2**40)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]

MAX_COMPUTE = 32
"""Compute nodes of a tenant."""
FRONT = 0
"""The number of the one that schedules."""
KEY_BYTES = 16
"""Of the key of a block."""
MAX_KEYS = 2**15
"""The most keys of one message."""


class Message(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag=True):
    """Base of the control messages; the class name travels as ``type``."""


# -- compute node and memory node


class Attach(Message):
    """A compute node asks a memory node to hold a shard of the KV cache of its model.

    The compute nodes of a tenant share one cache. Its front, which has number 0, attaches first, and alone reserves,
    publishes and releases; the others say the same but for ``compute`` and ``outputs``.
    """

    tenant: Annotated[str, Meta(min_length=1, max_length=128)]
    """Of which tenant."""
    model: str
    """Fingerprint of the checkpoint."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of queries, keys, values and outputs on the wire."""
    kv_dtype: Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]
    """Of keys and values as they are stored."""
    block_tokens: Annotated[int, Meta(ge=1, le=1024)]
    layers: Annotated[list[LayerShape], Meta(min_length=1, max_length=1024)]
    """The attention of every layer over this node's heads."""
    slots: Annotated[int, Meta(ge=1, le=32)]
    """Batches in flight."""
    max_rows: Annotated[int, Meta(ge=1, le=4096 + 256)]
    """The most rows of one step."""
    outputs: RemoteRegion
    """Where the attention output is written."""
    compute: Annotated[int, Meta(ge=0, lt=MAX_COMPUTE)] = 0
    """The number of this compute node among those of the tenant; 0 is the front."""
    quota: Annotated[int, Meta(ge=1, le=2**60)] | None = None
    """The most bytes that the tenant may take here. None: all that nobody else has."""

    def __post_init__(self) -> None:
        RemoteRegion.from_wire(list(self.outputs))


class Attached(Message):
    """The answer: where to write, and how many tokens of KV cache there are."""

    capacity_tokens: Count
    plans: RemoteRegion
    queries: RemoteRegion
    keys_values: RemoteRegion
    chunks: RemoteRegion

    def __post_init__(self) -> None:
        for region in (self.plans, self.queries, self.keys_values, self.chunks):
            RemoteRegion.from_wire(list(region))


Keys = Annotated[bytes, Meta(max_length=MAX_KEYS * KEY_BYTES)]
"""Keys of blocks, one after the other."""


class Reserve(Message):
    """Set space aside for ``tokens`` positions of a sequence, a new one or one that needs more than it has; answered by
    Reserved or Refused."""

    sequence: Count
    tokens: Positive
    keys: Keys = b""
    """Of leading blocks of a new sequence, which it may share with others."""
    ahead: Positive | None = None
    """Of a new sequence: the most positions by which its layers can be apart, a step's own rows included, so that where
    these have windows less is set aside. None: any number."""


class Reserved(Message):
    sequence: Count
    shared: Count = 0
    """Leading positions of a new sequence that were found."""


class Publish(Message):
    """Let others share the leading blocks of a sequence, under these keys, when they are complete in every layer."""

    sequence: Count
    keys: Keys


class Release(Message):
    """The sequence is over; its space is free again."""

    sequence: Count


class Refused(Message):
    """What was asked cannot be done. ``sequence`` is None where the answer is not to a Reserve."""

    reason: str
    sequence: Count | None = None


# -- compute nodes among themselves


class Greeting(Message):
    """Where a compute node takes carries, and under ``terms``, by key, what all must have read in their files."""

    carries: RemoteRegion
    terms: Annotated[dict[str, str], Meta(max_length=64)]

    def __post_init__(self) -> None:
        RemoteRegion.from_wire(list(self.carries))


class Enlist(Message):
    """The front says as which tenant to attach to the memory nodes; answered by Enlisted."""

    tenant: Annotated[str, Meta(min_length=1, max_length=128)]


class Enlisted(Message):
    """Ready for orders."""


# -- client and front


class Generate(Message):
    """A request. ``id`` is the client's; a prompt is text or token ids."""

    id: Count
    prompt: str | list[Count]
    max_tokens: Positive | None = None
    """None: as many as the context allows."""
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """0 is greedy."""
    top_k: Count = 0
    """Only the k likeliest tokens; 0 is all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that together have this probability."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """None: a random one."""
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    """Higher goes first; equal ones in the order of their arrival."""
    share_prefix: bool = True
    """Whether it may share the keys and values of a prompt that begins alike."""
    salt: Annotated[str, Meta(max_length=256)] = ""
    """Only requests with the same salt share anything."""


class Cancel(Message):
    id: Count


class Token(Message):
    """One generated token and the text that it completes, which may be empty."""

    id: Count
    token: Count
    text: str


class Finished(Message):
    id: Count
    reason: Literal["stop", "length"]
    prompt_tokens: Count
    text: str
    """Text that was held back until the end."""


class Failed(Message):
    """The request, or with ``id`` None everything on this link, failed. ``kind`` names a class of lamina.errors."""

    kind: str
    message: str
    id: Count | None = None
    node: str | None = None
    retry_after_s: float | None = None
    """After so many seconds the same request may be taken."""


# -- anybody and a node


class AskStatus(Message):
    """Answered by Status."""


class Peer(Struct, frozen=True, kw_only=True):
    """A memory node, or another compute node, as a compute node sees it."""

    name: str
    transport: str
    choice: str
    """What either end asked for, which transport was taken, and why."""
    kv_heads: int
    """KV heads per layer that lie on the node; 0 for a compute node."""
    bytes_sent: int
    bytes_received: int

    @classmethod
    def over(cls, link: Link, name: str, kv_heads: int = 0) -> Peer:
        """The node at the other end of ``link``, which the file calls ``name``."""
        return cls(
            name=name,
            transport=link.transport,
            choice=link.choice,
            kv_heads=kv_heads,
            bytes_sent=sum(link.bytes_written),
            bytes_received=sum(link.bytes_received),
        )


class TenantStatus(Struct, frozen=True, kw_only=True):
    """What a memory node has for one tenant."""

    name: str
    model: str
    compute_nodes: list[str]
    """Those that are attached, beginning with the front."""
    sequences: int
    kv_tokens_total: int
    kv_tokens_free: int
    quota: int
    """Bytes of memory that it may use, and nobody else."""
    busy_s: float
    """Time that the device thread spent computing for it."""


class Status(Message):
    """A node's state and its counters since it started. Times are seconds, sizes are bytes."""

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
    """Attention layers run, over all steps."""
    busy_s: float = 0.0
    """Time that the device thread spent computing."""
    preemptions: int = 0
    """How often a sequence lost its space to others."""
    prompt_tokens: int = 0
    """Tokens that were to be prefilled,"""
    shared_tokens: int = 0
    """and those of them that lay on the memory nodes already."""
    sequences: int = 0
    kv_tokens_total: int = 0
    kv_tokens_free: int = 0
    stale_tags: int = 0
    peers: list[Peer] = []
    tenants: list[TenantStatus] = []


# -- lamina trace and a node


class Record(Message):
    """Record what your device does in the next ``seconds``, and forget what was recorded before; answered by Spans."""

    seconds: Annotated[float, Meta(gt=0, le=60)]


class AskSpans(Message):
    """Stop recording and give out the oldest spans that are left, at most ``count``; answered by Spans."""

    count: Annotated[int, Meta(ge=0, le=MAX_SPANS)]


class Spans(Message):
    """``clock_s`` is what the node's monotonic clock says, that of the spans."""

    clock_s: float
    spans: Annotated[list[Span], Meta(max_length=MAX_SPANS)] = []


# -- lamina doctor and a node


class Probe(Message):
    """Measure the way to memory node ``node`` of your own file by one transport; answered by Probed."""

    node: Annotated[str, Meta(max_length=64)]
    kind: Literal["rdma", "shm", "tcp"]


class Probed(Message):
    """What was measured: round trips of 8 KiB and bandwidth; or, in ``error``, why it could not be."""

    kind: str
    choice: str = ""
    p50_s: float = 0.0
    p99_s: float = 0.0
    bytes_per_s: float = 0.0
    error: str = ""


class Echo(Message):
    """Where the end that says so may be written while the way to it is measured."""

    region: RemoteRegion

    def __post_init__(self) -> None:
        RemoteRegion.from_wire(list(self.region))


FromCompute = Attach | Reserve | Publish | Release
FromMemory = Attached | Reserved | Refused
FromClient = Generate | Cancel | AskStatus
ToClient = Token | Finished | Failed | Status


def encode(message: Message) -> dict[str, Any]:
    """A plain map, as links send it."""
    plain: dict[str, Any] = msgspec.to_builtins(message, builtin_types=(bytes,))
    return plain


def decode(plain: dict[str, Any], kinds: Any) -> Any:
    """The message of one of the types in the union ``kinds``; ProtocolError if it is none."""
    try:
        return msgspec.convert(plain, kinds)
    except msgspec.ValidationError as e:
        known = ", ".join(k.__name__ for k in get_args(kinds) or (kinds,))
        raise ProtocolError(f"message {plain.get('type')!r}: {explain(e, plain)}; expected one of {known}") from e
    except LaminaError as e:
        raise ProtocolError(f"message {plain.get('type')!r}: {e}") from e


# -- the hot path


class Kind(IntEnum):
    """What a finished write brought."""

    PLAN = 0
    QUERY = 1
    KEY_VALUE = 2
    OUTPUT = 3
    CHUNK = 4
    CREDIT = 5
    CARRY = 6


_KINDS = tuple(Kind)  # which is faster than to ask the class


class Tag(NamedTuple):
    """The 32-bit tag of a write: kind (3 bits), slot (5), layer (10), step (14, the low bits).

    For CHUNK and CREDIT, ``step`` is the number of the bulk buffer.
    """

    kind: Kind
    slot: int
    layer: int
    step: int

    def pack(self) -> int:
        return self.kind << 29 | self.slot << 24 | self.layer << 14 | self.step & STEP_MASK

    @classmethod
    def unpack(cls, tag: int) -> Tag:
        """ProtocolError for a kind that does not exist."""
        try:
            kind = _KINDS[tag >> 29]
        except IndexError as e:
            raise ProtocolError(f"tag {tag:#010x} has the unknown kind {tag >> 29}") from e
        return cls(kind, tag >> 24 & 31, tag >> 14 & 1023, tag & STEP_MASK)


STEP_MASK = 2**14 - 1

SECONDS = struct.Struct("<d")
"""How long a step's attention has taken so far, at the beginning of each answer."""
_PLAN = struct.Struct("<IIII")
_RUN = struct.Struct("<QII")
_CHUNK = struct.Struct("<QIII")
CHUNK_HEADER = 64
"""Bytes before the keys of a bulk chunk: the header, padded so that the numbers behind it are aligned."""


@dataclass(frozen=True)
class StepPlan:
    """What a memory node is told of a step: whose rows come, in this order.

    It stores k and v of the rows of ``storing``; those of ``reading`` only meet what it holds. The first ``whole`` rows
    are answered with their attention, in the model's type; all others with a partial in float32. The answer to a layer
    goes to the compute node of the tenant that ``answers`` names, with one byte for each layer; without it, to whoever
    sent the plan. Each of the compute nodes that send queries in a step sends its plan.
    """

    storing: tuple[Run, ...]
    reading: tuple[Run, ...]
    whole: int
    answers: bytes = b""

    @cached_property
    def stored_rows(self) -> int:
        return sum(run.count for run in self.storing)

    @cached_property
    def rows(self) -> int:
        return self.stored_rows + sum(run.count for run in self.reading)


def plan_bytes(max_rows: int, layers: int) -> int:
    """Bytes of the largest step plan."""
    return _PLAN.size + layers + max_rows * _RUN.size


def pack_plan(plan: StepPlan) -> bytes:
    runs = (*plan.storing, *plan.reading)
    head = _PLAN.pack(len(plan.storing), len(plan.reading), plan.whole, len(plan.answers))
    return head + b"".join(_RUN.pack(run.sequence, run.start, run.count) for run in runs) + plan.answers


def unpack_plan(buffer: memoryview, max_rows: int, layers: int) -> StepPlan:
    """ProtocolError for more rows than ``max_rows``, a sequence that comes twice, or answers to part of the layers."""
    storing, reading, whole, answers = _PLAN.unpack_from(buffer)
    count = storing + reading
    if not 1 <= count <= max_rows:
        raise ProtocolError(f"step plan with {count} runs; expected 1 to {max_rows}")
    if answers not in (0, layers):
        raise ProtocolError(f"step plan that says of {answers} layers where answers go; expected none or {layers}")
    stop = _PLAN.size + count * _RUN.size
    runs = [Run(*run) for run in _RUN.iter_unpack(buffer[_PLAN.size : stop])]
    plan = StepPlan(tuple(runs[:storing]), tuple(runs[storing:]), whole, bytes(buffer[stop : stop + answers]))
    if len({run.sequence for run in runs}) < count or any(run.count < 1 for run in runs):
        raise ProtocolError("step plan with an empty run, or two runs of one sequence")
    if plan.rows > max_rows or whole > plan.stored_rows:
        raise ProtocolError(
            f"step plan with {plan.rows} rows, {plan.stored_rows} of them to be stored and {whole} whole; "
            f"expected at most {max_rows}"
        )
    return plan


class ChunkHeader(NamedTuple):
    """Which keys and values a bulk chunk brings: ``tokens`` positions from ``start``, of one layer of one sequence."""

    sequence: int
    layer: int
    start: int
    tokens: int

    def pack(self) -> bytes:
        return _CHUNK.pack(*self)

    @classmethod
    def unpack(cls, buffer: memoryview) -> ChunkHeader:
        return cls(*_CHUNK.unpack_from(buffer))

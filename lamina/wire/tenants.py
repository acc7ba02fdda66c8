"""A compute node and a memory node exchange these messages: to attach as a tenant, about the space of its sequences,
and about blocks that move from one memory node to another."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from lamina.attention import LayerShape
from lamina.errors import ProtocolError
from lamina.limits import MAX_BATCH, MAX_BATCHES, MAX_BYTES, MAX_LEASE, MAX_REMOTE_TOKENS
from lamina.transport import RemoteRegion
from lamina.wire.codec import Count, MemberId, Message, Positive

KEY_BYTES = 16
"""The bytes of the key of a block."""
MAX_KEYS = 2**15
"""The most keys of one message."""

Token = Annotated[bytes, Meta(min_length=16, max_length=64)]
"""Proves that a compute node belongs to a tenant."""


class Attach(Message):
    """A compute node asks a memory node to hold a shard of the KV cache of its model.

    The compute nodes of a tenant share one cache. Its front attaches first, and alone reserves, publishes and
    releases; the others send the same but for ``member``, ``outputs`` and ``lease``.

    Each attachment of the front begins a new *term*. It ends the links of the term before and releases all sequences;
    published blocks stay if the front asks for the same cache as before. Another compute node becomes the front only
    where the link of the front before it has ended.
    """

    tenant: Annotated[str, Meta(min_length=1, max_length=128)]
    """The name of the tenant."""
    token: Token
    """The same for all compute nodes of the tenant, in all terms."""
    term: Count
    """From the front: greater than that of the tenant if it is here. From the others: the present one."""
    model: str
    """Fingerprint of the checkpoint."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """The type of queries, keys, values and outputs on the wire."""
    kv_dtype: Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]
    """The type of keys and values as they are stored."""
    block_tokens: Annotated[int, Meta(ge=1, le=1024)]
    layers: Annotated[list[LayerShape], Meta(min_length=1, max_length=1024)]
    """The attention of every layer over this node's heads."""
    slots: Annotated[int, Meta(ge=1, le=MAX_BATCHES)]
    """The number of batches in flight."""
    max_rows: Annotated[int, Meta(ge=1, le=MAX_BATCH + MAX_REMOTE_TOKENS)]
    """The most rows of one step."""
    outputs: RemoteRegion
    """The region to which the attention output is written."""
    member: MemberId = 0
    """The member id of this compute node."""
    front: MemberId = 0
    """The member id of the tenant's front."""
    lease: Annotated[float, Meta(ge=0, le=MAX_LEASE)] = 0.0
    """The seconds for which the tenant stays when the link of its front is lost. Only the front's counts."""
    first_heads: Annotated[list[Count], Meta(max_length=1024)] = []  # noqa: RUF012
    """The number of the first of this node's KV heads in every layer, as shapes do not tell one node's heads from
    another's."""
    quota: Annotated[int, Meta(ge=1, le=MAX_BYTES)] | None = None
    """The most bytes that the tenant may take here. None means all that no other tenant has."""

    def __post_init__(self) -> None:
        RemoteRegion.from_wire(list(self.outputs))

    @property
    def from_front(self) -> bool:
        """Return whether the front of the tenant sends this."""
        return self.member == self.front


class Attached(Message):
    """Answers Attach: where to write, and how many tokens of KV cache there are."""

    capacity_tokens: Count
    plans: RemoteRegion
    queries: RemoteRegion
    keys_values: RemoteRegion
    chunks: RemoteRegion

    def __post_init__(self) -> None:
        for region in (self.plans, self.queries, self.keys_values, self.chunks):
            RemoteRegion.from_wire(list(region))


Keys = Annotated[bytes, Meta(max_length=MAX_KEYS * KEY_BYTES)]
"""The keys of blocks, one after the other."""


class Reserve(Message):
    """Set space aside for ``tokens`` positions of a sequence: a new one, or one that needs more than it has.

    Reserved or Refused answers it.
    """

    sequence: Count
    tokens: Positive
    keys: Keys = b""
    """The keys of the leading blocks of a new sequence, which it may share with others."""
    ahead: Positive | None = None
    """For a new sequence, the most positions by which its layers can be apart, a step's own rows included: where these
    have windows, less is set aside. None: any number."""
    parent: Count | None = None
    """A new sequence is derived from this one: it shares all of its blocks, also the one that is not full."""
    without: tuple[Count, Positive] | None = None
    """The first block, in the parent's table, and the number of blocks that a derived sequence does not share. They are
    full in every layer."""
    transfer: Count | None = None
    """The blocks that a transfer has brought come before those of the parent, and belong to the sequence from now
    on."""

    def __post_init__(self) -> None:
        if self.is_derived and (self.keys or self.ahead is not None):
            raise ProtocolError(
                f"sequence {self.sequence} has a parent or a transfer, and keys or a distance of layers"
            )
        if self.without is not None and self.parent is None:
            raise ProtocolError(f"sequence {self.sequence} leaves out blocks of a parent, but names none")

    @property
    def is_derived(self) -> bool:
        """Return whether the sequence consists of blocks that are there already."""
        return self.parent is not None or self.transfer is not None


class Reserved(Message):
    """The memory node has set the space aside."""

    sequence: Count
    shared: Count = 0
    """Leading positions of a new sequence that were found, or that a derived one consists of."""


class Publish(Message):
    """Let others share consecutive blocks of a sequence, under these keys, when they are complete in every layer."""

    sequence: Count
    keys: Keys
    first: Count = 0
    """The number of the first of these blocks on the memory node."""


class Release(Message):
    """The sequence is over; its space is free again."""

    sequence: Count


class Expect(Message):
    """Hold space for ``blocks`` blocks of every layer, which another memory node is going to send.

    Expected or MoveFailed answers it; when all blocks have come, Moved says so. MoveFailed says that they will not
    come, and that the space is free again.
    """

    transfer: Count
    """A number that the front draws at random, so that no other transfer ever has it."""
    blocks: Positive


class Expected(Message):
    """The memory node holds the space for a transfer."""

    transfer: Count


class Send(Message):
    """Send ``blocks`` blocks of a sequence, from number ``first`` of its table here on, to another memory node.

    They are full in every layer. The node there holds the space already. Moved or MoveFailed answers it.
    """

    transfer: Count
    sequence: Count
    first: Count
    blocks: Positive
    to: Annotated[str, Meta(max_length=512)]
    """The address of the other memory node."""
    name: Annotated[str, Meta(min_length=1, max_length=128)]
    """The name of the other memory node."""


class ForgetTransfer(Message):
    """Stop a transfer, at either end, and free the blocks that it has brought, unless they belong to a sequence.

    A transfer that is not known is ignored. It has no answer, and the transfer is not spoken of any more.
    """

    transfer: Count


class Moved(Message):
    """All blocks of a transfer are there: said by the node that sent them, and by the one that has them."""

    transfer: Count


class MoveFailed(Message):
    """A transfer has ended before all its blocks were there."""

    transfer: Count
    reason: str


class Detach(Message):
    """The front leaves for good: the tenant ends at once."""


class Refused(Message):
    """A memory node cannot do what was asked. ``sequence`` is None if the answer is not to a Reserve."""

    reason: str
    sequence: Count | None = None
    term: Count | None = None
    """The present term of the tenant, if the compute node was of an earlier one. A front may attach again, in a later
    one, unless there is a ``holder``."""
    holder: Annotated[str, Meta(max_length=128)] = ""
    """The name of the tenant's front, if that is another compute node, and its link lives."""


class Void(Message):
    """A memory node gives up a step: of these sequences something is not there and will not come."""

    slot: Annotated[int, Meta(ge=0, lt=MAX_BATCHES)]
    step: Count
    """The low bits of the step's number."""
    sequences: Annotated[list[Count], Meta(min_length=1, max_length=MAX_BATCH + MAX_REMOTE_TOKENS)]


FromCompute = Attach | Reserve | Publish | Release | Expect | Send | ForgetTransfer | Detach
FromMemory = Attached | Reserved | Refused | Void | Expected | Moved | MoveFailed


def short_name(tenant: str) -> str:
    """Return what people are shown of a tenant's name: the front's, and the beginning of the digest behind it."""
    front, dash, digest = tenant.rpartition("-")
    return f"{front}{dash}{digest[:8]}"

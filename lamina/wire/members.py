"""Who is a member of a cluster, and how a node becomes one that the cluster file does not name."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from lamina.config import ModelConfig, PipelineConfig, RecoveryConfig
from lamina.limits import MAX_BYTES, MAX_COMPUTE
from lamina.wire.codec import Count, MemberId, Message


class MemberEntry(Struct, frozen=True, array_like=True):
    """Describes one node of the cluster."""

    id: MemberId
    name: Annotated[str, Meta(min_length=1, max_length=128)]
    role: Literal["compute", "memory"]
    state: Literal["joining", "serving", "leaving", "gone", "lost"] = "joining"
    term: Count = 0
    """Of a memory node: the number of the front's latest attachment to it. 0: the front has never attached."""
    address: Annotated[str, Meta(max_length=512)] = ""
    """Where other nodes reach it."""
    quota: Annotated[int, Meta(ge=1, le=MAX_BYTES)] | None = None
    """Of a memory node: the most bytes that the cluster takes there. None: all that no other tenant has."""


class Candidate(Message):
    """A node asks the front to take it in as a member, though the cluster file does not name it. Accepted answers it.

    When it has been accepted, it keeps the link, on which Left may follow. If the link is lost, it asks again.
    """

    name: Annotated[str, Meta(max_length=128)]
    role: Literal["compute", "memory"]
    address: Annotated[str, Meta(max_length=512)]
    """Where the front and the other nodes reach it."""
    memory: Annotated[int, Meta(ge=0, le=MAX_BYTES)] = 0
    """Of a memory node: the bytes that it has for keys and values."""
    member: MemberId | None = None
    """The id that it was given before, also by an earlier front of the cluster."""
    listens: bool = True
    """Whether it can be reached already. A replica is not before it has the answer to its first question."""


class ClusterFacts(Struct, frozen=True, kw_only=True):
    """What a replica needs to know of a cluster of which it has no file."""

    model: ModelConfig
    """Its path is absolute."""
    pipeline: PipelineConfig
    recovery: RecoveryConfig
    start_timeout: float
    """The seconds that a starting node waits for the others."""
    members: Annotated[list[MemberEntry], Meta(min_length=1, max_length=4096)]
    """All members, the new one among them. The compute node with the smallest id is the first one of the file, which is
    the front until another one takes its part."""


class Accepted(Message):
    """The node that asked is member ``member`` of the cluster; or, in ``error``, why it is not."""

    member: MemberId = 0
    cluster: ClusterFacts | None = None
    """For a replica."""
    error: str = ""
    is_starting: bool = False
    """Whether the error is only that the front is still starting."""
    fronts: Annotated[list[Annotated[str, Meta(max_length=512)]], Meta(max_length=MAX_COMPUTE)] = field(
        default_factory=list
    )
    """The addresses of all compute nodes that can be the front; or, of one that is not, that of the front, as far as it
    knows."""


class Left(Message):
    """The front tells a node that has joined that it is a member no more. It may ask again when it is started anew."""

"""Compute nodes exchange these messages: when they meet, and when the front orders a step."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from lamina.errors import ProtocolError
from lamina.limits import MAX_BATCHES, MAX_COMPUTE, MAX_STEP_TOKENS
from lamina.transport import RemoteRegion
from lamina.wire.codec import Count, MemberId, Message
from lamina.wire.placement import Placement
from lamina.wire.requests import Sampling

Slot = Annotated[int, Meta(ge=0, lt=MAX_BATCHES)]


class Greeting(Message):
    """A compute node says where it takes carries, and in ``terms``, by key, which settings all compute nodes must
    share.

    The peer answers with its own Greeting.
    """

    carries: RemoteRegion
    terms: Annotated[dict[str, str], Meta(max_length=64)]

    def __post_init__(self) -> None:
        RemoteRegion.from_wire(list(self.carries))


class MemberEntry(Struct, frozen=True, array_like=True):
    """Describes one node of the cluster."""

    id: MemberId
    name: Annotated[str, Meta(min_length=1, max_length=128)]
    role: Literal["compute", "memory"]
    state: Literal["joining", "serving", "leaving", "lost"] = "joining"


class Membership(Message):
    """The front tells the other compute nodes the states of all members, after every change."""

    epoch: Count
    members: Annotated[list[MemberEntry], Meta(min_length=1, max_length=4096)]


class Enlist(Message):
    """The front tells a compute node the tenant under which it attaches to the memory nodes. Enlisted answers it."""

    tenant: Annotated[str, Meta(min_length=1, max_length=128)]


class Enlisted(Message):
    """The compute node is ready for orders."""


class GaveUp(Message):
    """The sender ends and will carry out nothing more."""

    reason: str


class Choice(Struct, frozen=True, array_like=True):
    """A token is sampled from the last row of a run, for this position."""

    sampling: Sampling
    """Its seed is set: the front has drawn it."""
    position: int

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            raise ProtocolError(f"the choice for position {self.position} has no seed; the front has to draw one")


class TokenRun(Struct, frozen=True, array_like=True):
    """Holds consecutive tokens of one sequence, from position ``start``: one that decodes, or a chunk of a prompt.

    Keys and values of the first ``local_tokens`` positions of the sequence are kept on the compute nodes until its
    prompt is prefilled. The past of all later positions lies on the memory nodes of its ``placement``.
    """

    sequence: Count
    start: Count
    tokens: Annotated[list[Count], Meta(min_length=1, max_length=MAX_STEP_TOKENS)]
    placement: Placement
    local_tokens: Count = 0
    choice: Choice | None = None

    @property
    def remote(self) -> bool:
        """Return whether what it attends to lies on the memory nodes, and not where it is computed."""
        return self.start >= self.local_tokens


class Order(Message):
    """Run your slices of step number ``step`` of batch ``slot``; Done answers it.

    The placements and the schedule are those of the members at ``epoch``. Runs whose past is remote come first.
    """

    epoch: Count
    slot: Slot
    step: Count
    runs: Annotated[list[TokenRun], Meta(min_length=1, max_length=MAX_STEP_TOKENS)]


class Limits(NamedTuple):
    """Holds the limits of orders on a compute node: batch slots, tokens of a step, the member ids of memory nodes,
    positions of a sequence, and the vocabulary."""

    slots: int
    tokens: int
    memory_nodes: frozenset[int]
    context: int
    vocabulary: int

    def check(self, order: Order) -> None:
        """Raise ProtocolError for an order that could not be carried out."""
        tokens = sum(len(run.tokens) for run in order.runs)
        ordered = sorted(order.runs, key=lambda run: not run.remote) == order.runs
        if order.slot >= self.slots or tokens > self.tokens or not ordered:
            raise ProtocolError(
                f"an order for batch slot {order.slot} of {tokens} tokens; expected a slot below {self.slots}, at most "
                f"{self.tokens} tokens, and those whose past is remote first"
            )
        for run in order.runs:
            place = run.placement
            if (
                not place.members
                or not self.memory_nodes.issuperset(place.members)
                or (place.stripe is not None and place.stripe < 1)
                or max(run.local_tokens, run.start + len(run.tokens)) > self.context
                or max(run.tokens) >= self.vocabulary
            ):
                raise ProtocolError(
                    f"an order for {len(run.tokens)} positions from {run.start} of a sequence on {place}; expected "
                    f"positions below {self.context}, tokens below {self.vocabulary}, and memory nodes among "
                    f"{sorted(self.memory_nodes)}"
                )


class Done(Message):
    """Reports the result of an order: tokens, from the node of the last slice, which are None where the logits were not
    numbers. ``attention_s`` says for compute nodes,
    by member id, how many seconds the busiest memory node has attended for them so far, as far as this one knows."""

    slot: Slot
    step: Count
    tokens: Annotated[list[Count | None], Meta(max_length=MAX_STEP_TOKENS)]
    compute_s: float
    attention_s: Annotated[list[tuple[MemberId, float]], Meta(max_length=MAX_COMPUTE)]


class Forget(Message):
    """Drop the keys and values that are kept of the prompts of these sequences: they are over."""

    sequences: Annotated[list[Count], Meta(max_length=MAX_STEP_TOKENS)]


FromPeer = Greeting | Membership | Enlist | Enlisted | Order | Done | Forget | GaveUp

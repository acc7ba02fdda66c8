"""What the front has the compute nodes do: the rows of a step, as all of them see it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from lamina.errors import ProtocolError
from lamina.limits import MAX_BATCHES, MAX_COMPUTE, MAX_STEP_TOKENS
from lamina.transport import RemoteRegion
from lamina.wire.codec import Count, Message
from lamina.wire.placement import Placement
from lamina.wire.requests import Sampling

Slot = Annotated[int, Meta(ge=0, lt=MAX_BATCHES)]


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


class Choice(Struct, frozen=True, array_like=True):
    """A token is sampled from the last row of a run, for this position."""

    sampling: Sampling
    position: int


class TokenRun(Struct, frozen=True, array_like=True):
    """Consecutive tokens of one sequence, from position ``start``: one that decodes, or a chunk of a prompt.

    Of the sequence, keys and values of the first ``here`` positions are kept on the compute nodes until its prompt is
    prefilled; the past of all others lies on the memory nodes of its ``placement``.
    """

    sequence: Count
    start: Count
    tokens: Annotated[list[Count], Meta(min_length=1, max_length=MAX_STEP_TOKENS)]
    placement: Placement
    here: Count = 0
    choice: Choice | None = None

    @property
    def remote(self) -> bool:
        """Whether what it attends to lies on the memory nodes, and not where it is computed."""
        return self.start >= self.here


class Order(Message):
    """Do your slices of step number ``step`` of batch ``slot``; answered by Done.

    Runs whose past is remote come first.
    """

    slot: Slot
    step: Count
    runs: Annotated[list[TokenRun], Meta(min_length=1, max_length=MAX_STEP_TOKENS)]


class Limits(NamedTuple):
    """What an order has to keep to, as a compute node sees it: batch slots, tokens of a step, memory nodes, positions
    of a sequence, and the vocabulary."""

    slots: int
    tokens: int
    memory_nodes: int
    context: int
    vocabulary: int

    def check(self, order: Order) -> None:
        """ProtocolError for an order that could not be carried out."""
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
                not place.nodes
                or min(place.nodes) < 0
                or max(place.nodes) >= self.memory_nodes
                or (place.stripe is not None and place.stripe < 1)
                or max(run.here, run.start + len(run.tokens)) > self.context
                or max(run.tokens) >= self.vocabulary
            ):
                raise ProtocolError(
                    f"an order for {len(run.tokens)} positions from {run.start} of a sequence on {place}; expected "
                    f"positions below {self.context}, tokens below {self.vocabulary}, and memory nodes below "
                    f"{self.memory_nodes}"
                )


class Done(Message):
    """What came of an order: tokens from the node of the last slice. ``attention_s`` says for each compute node how
    long the busiest memory node has attended for it so far, as far as this one was told."""

    slot: Slot
    step: Count
    tokens: Annotated[list[Count], Meta(max_length=MAX_STEP_TOKENS)]
    compute_s: float
    attention_s: Annotated[list[float], Meta(max_length=MAX_COMPUTE)]


class Forget(Message):
    """Drop what is kept of the prompts of these sequences: they are over."""

    sequences: Annotated[list[Count], Meta(max_length=MAX_STEP_TOKENS)]

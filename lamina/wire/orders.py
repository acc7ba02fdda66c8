"""Compute nodes exchange these messages: when they meet, and when the front orders a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
from msgspec import Meta, Struct

from lamina.errors import NodeError, ProtocolError, SpaceLostError, StaleOrderError
from lamina.limits import MAX_BATCHES, MAX_COMPUTE, MAX_MOVED, MAX_STEP_TOKENS
from lamina.transport import RemoteRegion
from lamina.wire.codec import Count, MemberId, Message
from lamina.wire.members import MemberEntry
from lamina.wire.parts import Part
from lamina.wire.placement import Placement
from lamina.wire.requests import Sampling, Score, Top
from lamina.wire.tenants import Token

MAX_BANNED = 4096
"""The most tokens that one choice bans: stop tokens and the ends of bad words, far more than requests may name."""
MAX_MASK = 1 << 20
"""The most bytes of a mask: one bit for each token of a vocabulary."""

Tokens = Annotated[bytes, Meta(max_length=1 << 26)]
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


class Membership(Message):
    """The front tells the other compute nodes the states of all members, after every change.

    They have links to these members and to no others, attach to the memory nodes that are joining or serving, anew in
    each term, and run steps with those that serve.
    """

    epoch: Count
    members: Annotated[list[MemberEntry], Meta(min_length=1, max_length=4096)]


class Claim(Message):
    """Says which compute node is the front. Every compute node says what it knows on each new link, and a front when it
    becomes one."""

    front: MemberId
    term: Count
    """A front that takes the part of another one has a later one: the latest in which it has attached to a memory node.
    One that has only started again knows that before it attaches, and has that of the front before."""


class Records(Message):
    """The front tells its standby, the compute node that is to take its part, what it writes into its journal."""

    kind: Literal["all", "more", "none"]
    """"all": this is the whole journal, and what was told before is void. "more" comes behind it. "none": the node is
    the standby no longer."""
    data: bytes = b""
    """Whole records, as `lamina.front.journal` writes them. Nothing if the front has no journal."""


class Enlist(Message):
    """The front tells a compute node the tenant under which it attaches to the memory nodes. Enlisted answers it."""

    tenant: Annotated[str, Meta(min_length=1, max_length=128)]
    token: Token


class Enlisted(Message):
    """The compute node is ready for orders: it has loaded its weights, and has attached to all memory nodes."""


class Reached(Message):
    """A compute node has attached to a memory node in a term."""

    member: MemberId
    term: Count


class Missing(Message):
    """A compute node has lost its link to a member, or cannot attach to it."""

    member: MemberId
    term: Count
    reason: str


class GaveUp(Message):
    """The sender ends and will carry out nothing more."""

    reason: str


NONE_ALLOWED = -1
"""Stands for the token of a sequence whose choice allows none."""


class Choice(Struct, frozen=True, array_like=True):
    """A token is sampled from the last row of a run, for this position. This is all that it depends on, besides the
    logits, so any compute node can sample it, in any step. Bytes of tokens are little-endian int32."""

    sampling: Sampling
    """Its seed is set: the front has drawn it."""
    position: Count
    prompt: Tokens = b""
    """The different tokens of the prompt, if a penalty needs them."""
    answer: Tokens = b""
    """The tokens of the answer so far, if a penalty needs them."""
    banned: Annotated[list[Count], Meta(max_length=MAX_BANNED)] = []
    """Tokens that it may not be."""
    mask: Annotated[bytes, Meta(max_length=MAX_MASK)] | None = None
    """Which tokens it may be: bit i % 8 of byte i // 8 for token i, the least significant bit being bit 0. It may be no
    token beyond the mask, as a tokenizer can have fewer tokens than the model has logits. Bits beyond the vocabulary
    are ignored."""
    logprobs: Top | None = None
    """Return its score, with so many of the likeliest tokens."""

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            raise ProtocolError(f"the choice for position {self.position} has no seed; the front has to draw one")
        if len(self.prompt) % 4 or len(self.answer) % 4:
            raise ProtocolError(f"the choice for position {self.position} has tokens that are not 4 bytes each")

    @property
    def changes_logits(self) -> bool:
        """Return whether some token is more or less likely for this choice than for the model."""
        s = self.sampling
        return bool(
            self.banned
            or self.mask is not None
            or s.logit_bias
            or s.repetition != 1
            or s.presence_penalty
            or s.frequency_penalty
        )

    def fits(self, context: int, vocabulary: int) -> bool:
        """Return whether all its tokens are of the vocabulary, and it has no more than there can be."""
        largest = max(*self.sampling.logit_bias, *self.banned, _largest(self.prompt), _largest(self.answer), 0)
        return (
            largest < vocabulary
            and min(_smallest(self.prompt), _smallest(self.answer)) >= 0
            and max(len(self.prompt), len(self.answer)) <= 4 * context
        )


def _largest(tokens: bytes) -> int:
    return int(np.frombuffer(tokens, "<i4").max(initial=0))


def _smallest(tokens: bytes) -> int:
    return int(np.frombuffer(tokens, "<i4").min(initial=0))


class Targets(Struct, frozen=True, array_like=True):
    """The scores of these tokens are wanted, each given all tokens before it: the first is the token after row ``row``
    of a run, each of the others comes after the next row."""

    row: Count
    tokens: Annotated[list[Count], Meta(min_length=1, max_length=MAX_STEP_TOKENS)]
    top: Top

    def fit(self, rows: int, vocabulary: int) -> bool:
        """Return whether a run of so many rows has all of theirs, and their tokens are of the vocabulary."""
        return self.row + len(self.tokens) <= rows and max(self.tokens) < vocabulary


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
    targets: Targets | None = None

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
    positions of a sequence, the vocabulary, and positions of a block."""

    slots: int
    tokens: int
    memory_nodes: frozenset[int]
    context: int
    vocabulary: int
    block_tokens: int

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
                or (place.moved and not self._are_blocks(place.moved))
                or max(run.local_tokens, run.start + len(run.tokens)) > self.context
                or max(run.tokens) >= self.vocabulary
            ):
                raise ProtocolError(
                    f"an order for {len(run.tokens)} positions from {run.start} of a sequence on {place}; expected "
                    f"positions below {self.context}, tokens below {self.vocabulary}, memory nodes among "
                    f"{sorted(self.memory_nodes)}, and at most {MAX_MOVED} moved parts of whole blocks of "
                    f"{self.block_tokens}, in order"
                )
            if (choice := run.choice) and not choice.fits(self.context, self.vocabulary):
                raise ProtocolError(
                    f"a choice for position {choice.position} with tokens that do not fit; expected tokens below "
                    f"{self.vocabulary}, and at most {self.context} in prompt and answer each"
                )
            if (targets := run.targets) and not targets.fit(len(run.tokens), self.vocabulary):
                raise ProtocolError(
                    f"an order for the scores of {len(targets.tokens)} targets from row {targets.row} of a run of "
                    f"{len(run.tokens)} tokens; expected no more rows than it has, and targets below "
                    f"{self.vocabulary}"
                )

    def _are_blocks(self, moved: Sequence[tuple[int, int, int]]) -> bool:
        """Return whether parts of a sequence can lie where they are said to lie."""
        bounds = [0, *(bound for start, stop, _ in moved for bound in (start, stop))]
        return (
            len(moved) <= MAX_MOVED
            and bounds == sorted(bounds)
            and bounds[-1] <= self.context + self.block_tokens
            and all(start < stop for start, stop, _ in moved)
            and not any(bound % self.block_tokens for bound in bounds)
            and self.memory_nodes.issuperset(member for _, _, member in moved)
        )


class Done(Message):
    """Reports the result of an order. ``attention_s`` says for compute nodes, by member id, how many seconds memory
    nodes have attended for them so far, as far as this one knows: the busiest, and the mean of all. What else it says
    comes from the node of the last slice."""

    slot: Slot
    step: Count
    tokens: Annotated[list[Annotated[int, Meta(ge=NONE_ALLOWED, le=2**40)] | None], Meta(max_length=MAX_STEP_TOKENS)]
    """The token of each choice: None where the logits were not numbers, and ``NONE_ALLOWED`` where none is allowed."""
    compute_s: float
    attention_s: Annotated[list[tuple[MemberId, float, float]], Meta(max_length=MAX_COMPUTE)]
    scores: Annotated[list[Score | None], Meta(max_length=MAX_STEP_TOKENS)] = []  # noqa: RUF012
    """The scores of ``tokens`` where they are wanted. Empty if none is."""
    prompt_scores: Annotated[
        list[Annotated[list[Score | None], Meta(max_length=MAX_STEP_TOKENS)]], Meta(max_length=MAX_STEP_TOKENS)
    ] = []  # noqa: RUF012
    """The scores of the targets of each run that has some, in their order. None where the logits were not numbers."""


class GivenUp(Message):
    """Answers an order that was not carried out to its end."""

    slot: Slot
    step: Count
    reason: str
    node: str = ""
    """The node that is to blame; none if the order was for members that have changed since."""
    sequences: Annotated[list[Count], Meta(max_length=MAX_STEP_TOKENS)] = []  # noqa: RUF012
    """The sequences of which something is missing, if that is why."""

    @classmethod
    def because(cls, order: Order, error: NodeError) -> GivenUp:
        """Return the answer for an error that an order ended with."""
        sequences = error.sequences if isinstance(error, SpaceLostError) else []
        stale = isinstance(error, StaleOrderError)
        return cls(
            slot=order.slot,
            step=order.step,
            reason=str(error),
            node="" if stale else error.node,
            sequences=sequences,
        )

    def error(self, peer: str) -> NodeError:
        """Return the error of the step, for the front; ``peer`` is the compute node that gave up."""
        if self.sequences:
            return SpaceLostError(self.node, self.sequences)
        if not self.node:
            return StaleOrderError(f"compute node {peer}: {self.reason}", node=peer)
        return NodeError(f"compute node {peer}: {self.reason}", node=self.node)


class Forget(Message):
    """Drop the keys and values that are kept of the prompts of these sequences: they are over."""

    sequences: Annotated[list[Count], Meta(max_length=MAX_STEP_TOKENS)]


FromPeer = (
    Greeting
    | Membership
    | Claim
    | Records
    | Enlist
    | Enlisted
    | Reached
    | Missing
    | Order
    | Done
    | GivenUp
    | Forget
    | GaveUp
    | Part
)

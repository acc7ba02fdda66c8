"""These plain values describe a request while it is being answered, and what one step of a batch does for it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lamina.constrain.matcher import Matcher
from lamina.front.cost import StepLoad
from lamina.front.tables import IN_ORDER, TableOrder
from lamina.wire.orders import Targets
from lamina.wire.placement import Placement, Range
from lamina.wire.requests import Request, Score

MAX_PREEMPTIONS = 4
"""After this many preemptions a sequence ranks before all that were preempted less often."""

NOWHERE = Placement(())


@dataclass(eq=False, slots=True)
class Sequence:
    """A sequence is one request while it is being answered. Prompt and output are its whole state; the rest belongs to
    the scheduler.

    A waiting sequence holds no space. A preempted one loses what it had and waits again; when it is admitted again, all
    its tokens up to the last are prefilled as if they were a prompt.
    """

    request: Request
    """What the client asked for."""
    prompt: list[int]
    max_tokens: int
    """The length of the output at most: what the request says, or what the context leaves."""
    stop_tokens: frozenset[int]
    """The tokens that end it: those of the model unless the request ignores them, and those of the request."""
    matcher: Matcher | None = None
    """Follows the answer, if the request constrains it. A thread has it while ``mask`` is None."""
    mask: bytes | None = None
    """Which tokens the constraint lets come next; None while that is being found out, and without a constraint."""
    output: list[int] = field(default_factory=list)
    arrival: int = -1
    """Its number among all sequences that were submitted."""
    id: int = -1
    """The memory nodes know it by this number while it runs. Each admission draws a new one, because messages about the
    previous one may still be under way."""
    slot: int = -1
    placement: Placement = NOWHERE
    """The memory nodes that hold its keys and values while it runs."""
    order: TableOrder = IN_ORDER
    """In which order they have its blocks."""
    transfer: Transfer | None = None
    """Its blocks that are on their way from one memory node to another."""
    successor: ReservationRequest | None = None
    """Asks the memory nodes to let it go on under another id. Until they have answered it sits out."""
    refusals: int = 0
    """How often a memory node has refused that since it was admitted."""
    tokens: list[int] = field(default_factory=list)
    """The tokens to prefill: the prompt, and the output up to the last preemption."""
    prefilled: int = 0
    """How many of ``tokens`` have been computed, or were found on the memory nodes."""
    shared: int = 0
    """How many of ``tokens`` were found on the memory nodes."""
    found: int = 0
    """How many tokens of the prompt were found there when it was admitted first."""
    scored: int = 0
    """How many tokens of the prompt, from its second on, have their scores, if the request wants them."""
    local_tokens: int = 0
    """How many of ``tokens`` are prefilled with their keys and values kept on the compute node. The past of all later
    ones is read from the memory nodes."""
    reserved: int = 0
    """Positions for which space was requested from the memory nodes."""
    confirmed: int = 0
    """Positions for which the memory nodes have confirmed the space."""
    keys: list[bytes] = field(default_factory=list)
    """The keys of its leading full blocks, as far as they have been needed."""
    published: int = 0
    """How many of its leading blocks others may share already."""
    prompt_bytes: bytes | None = None
    """The different tokens of the prompt as int32, once a penalty has needed them."""
    answer_array: array[int] = field(default_factory=lambda: array("i"))
    """The output as int32, as far as a penalty has needed it."""
    admitted: bool = False
    """Whether it has run before."""
    preemptions: int = 0
    yielding: bool = False
    """Whether it will be preempted when its present step ends."""
    evicted: bool = False
    """Whether it yields because a part of its space was lost, and not to another sequence."""
    cancelled: bool = False

    @property
    def lacks_mask(self) -> bool:
        """Return whether it cannot be given its next token yet."""
        return self.matcher is not None and self.mask is None

    @property
    def is_unscored(self) -> bool:
        """Return whether scores of its prompt are wanted that are still to be computed."""
        return self.request.prompt_logprobs is not None and self.scored < len(self.prompt) - 1

    @property
    def max_context(self) -> int:
        """Return the most positions that it can come to need."""
        return len(self.prompt) + self.max_tokens

    @property
    def context(self) -> int:
        """Return the tokens it has. Keys and values of the last one are stored in the next step."""
        return len(self.prompt) + len(self.output)

    @property
    def is_decoding(self) -> bool:
        """Return whether all tokens before the last are stored, or on their way to the memory nodes."""
        return 0 < len(self.tokens) == self.prefilled

    @property
    def is_settled(self) -> bool:
        """Return whether all its tokens before the last are on the memory nodes, after a step with its row, and all
        space that was requested is there."""
        return 0 < len(self.tokens) < self.context - 1 and self.is_decoding and self.confirmed == self.reserved

    @property
    def stored(self) -> int:
        """Return how many positions of a decoding sequence are stored, between two of its steps."""
        return self.context - 1

    @property
    def rank(self) -> tuple[int, ...]:
        """Return the order of admission: the smallest rank is admitted first, and preempted last."""
        return (-int(self.preemptions >= MAX_PREEMPTIONS), -self.request.priority, self.arrival)

    @property
    def stopped_by(self) -> int | None:
        """Return the token that ended it, if one did."""
        return self.output[-1] if self.output and self.output[-1] in self.stop_tokens else None

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        """Return why it is over, or None while it goes on."""
        if self.stopped_by is not None:
            return "stop"
        return "length" if len(self.output) >= self.max_tokens else None


class DecodeRow(NamedTuple):
    """A decode row has ``token`` at ``position``, directly before the token to be sampled."""

    sequence: Sequence
    token: int
    position: int


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """A chunk holds consecutive tokens of a prompt, from position ``start``."""

    sequence: Sequence
    start: int
    tokens: list[int]

    @property
    def completes(self) -> bool:
        """Return whether it ends the prompt, so that a token is sampled from its last row."""
        return self.start + len(self.tokens) == len(self.sequence.tokens)

    @property
    def remote(self) -> bool:
        """Return whether it attends to a past on the memory nodes, and not to the chunks kept on the compute node."""
        return self.start >= self.sequence.local_tokens

    @property
    def targets(self) -> Targets | None:
        """Return the tokens of the prompt whose scores are wanted and come with this chunk, if there are any."""
        sequence, top = self.sequence, self.sequence.request.prompt_logprobs
        # Those that had theirs before a preemption are computed again, but not scored again.
        first, stop = max(self.start, sequence.scored), self.start + len(self.tokens)
        tokens = sequence.prompt[first + 1 : stop + 1]
        return Targets(first - self.start, tokens, top) if top is not None and tokens else None


@dataclass(frozen=True, slots=True)
class ReservationRequest:
    """Asks the memory nodes for space for the positions 0..tokens-1 of a sequence.

    The answer goes to `Scheduler.confirm`.
    """

    sequence: Sequence
    id: int
    placement: Placement
    tokens: int
    reserved: int = 0
    """Positions that were reserved before; 0 for a sequence that is new to the memory nodes."""
    keys: tuple[bytes, ...] = ()
    """The keys of the leading full blocks that a new sequence may share with others."""
    ahead: int | None = None
    """How many positions the layers of a new sequence can be apart at most. None: any number."""
    succession: Succession | None = None
    """What a sequence that is new to the memory nodes consists of, if it has run under another id."""

    @property
    def is_new(self) -> bool:
        """Return whether the sequence has no space yet."""
        return not self.reserved

    @property
    def is_current(self) -> bool:
        """Return whether the sequence still runs under this id, or is to do so."""
        return self.sequence.id == self.id or self.sequence.successor is self


@dataclass(eq=False, slots=True)
class Transfer:
    """Blocks of a running sequence go from one memory node to another, and are on both until it goes on without those
    on the first."""

    sequence: Sequence
    id: int
    """The id of the sequence meanwhile."""
    source: int
    target: int
    first: int
    """The number of the first block, in the table of the source."""
    blocks: int
    ranges: list[Range]
    """Their positions, in the order of that table."""
    arrived: bool = False

    @property
    def positions(self) -> int:
        """Return how many positions they have."""
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True, slots=True)
class Succession:
    """Says from what a sequence is made that goes on under another id: from the blocks that it had under the id
    before, and from those that a transfer has brought."""

    parent: int
    members: frozenset[int]
    """The members that know the parent."""
    stored: int
    """The positions that are there."""
    order: TableOrder
    """The order of its blocks from now on."""
    transfer: Transfer | None = None


@dataclass(frozen=True, slots=True)
class Publication:
    """Names blocks of a sequence that others may share from now on: those from number ``first`` on."""

    id: int
    placement: Placement
    keys: tuple[bytes, ...]
    first: int = 0
    order: TableOrder = IN_ORDER


@dataclass(slots=True)
class CacheChanges:
    """Lists what the memory nodes have to be told, in this order: publications, releases, transfers that are given up,
    reservations, transfers that begin."""

    published: list[Publication] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    """The ids of sequences that no longer run."""
    dropped: list[Transfer] = field(default_factory=list)
    reservations: list[ReservationRequest] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.published or self.released or self.dropped or self.reservations or self.transfers)


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """Holds the rows that go through the slices together: decode rows first, then chunks of prompts. There may be none.

    The memory nodes are told ``changes`` before the step runs.
    """

    decode: tuple[DecodeRow, ...] = ()
    prompts: tuple[PromptChunk, ...] = ()
    changes: CacheChanges = field(default_factory=CacheChanges)
    moved: bool = False
    """Whether sequences moved to another slot, which may have to be woken."""

    @property
    def has_rows(self) -> bool:
        """Return whether there is anything to run."""
        return bool(self.decode or self.prompts)

    @property
    def sampled(self) -> list[Sequence]:
        """Return the sequences that get a token, in the order of the sampled rows."""
        return [r.sequence for r in self.decode] + [c.sequence for c in self.prompts if c.completes]

    @property
    def load(self) -> StepLoad:
        """Return the size of the step, for the cost model."""
        prompt_tokens = sum(len(chunk.tokens) for chunk in self.prompts)
        return StepLoad(len(self.decode), prompt_tokens, sum(row.position + 1 for row in self.decode))


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """Holds what a finished step brought. The memory nodes are told ``changes`` afterwards."""

    tokens: list[tuple[Sequence, int, Score | None]]
    """New tokens in the order of the sampled rows, with their scores where they are wanted."""
    finished: list[Sequence]
    cancelled: list[Sequence]
    broken: list[Sequence]
    """Those that end because the model gave no numbers from which their next token could be chosen."""
    stuck: list[Sequence]
    """Those that end because their request allows no next token."""
    prompt_scores: list[tuple[Sequence, list[Score]]]
    """The scores of the next tokens of prompts. They come before ``tokens``."""
    changes: CacheChanges

"""Decide which sequences run and what each step consists of. Pure Python: no clock, no tensor, no connection."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field

from lamina.errors import CapacityError
from lamina.front.blocks import Room
from lamina.front.cost import CostModel, Load
from lamina.front.prefix import PrefixKeys
from lamina.front.waiting import Waiting
from lamina.wire.placement import Placement
from lamina.wire.requests import Sampling

AHEAD_BLOCKS = 4
"""Blocks that are reserved beyond what a sequence has, so that it seldom has to ask for more."""

MAX_PREEMPTIONS = 4
"""A sequence that gave way so often gives way to nobody but its likes that came before it."""

UNEVEN = 0.9
"""A sequence changes its slot where the longer of the two slots' steps gets shorter at least to this part of it."""

NOWHERE = Placement(())


@dataclass(eq=False, slots=True)
class Sequence:
    """One request while it is being answered. Prompt and output are its whole state; the rest is the scheduler's.

    It holds no space while it waits. When it is preempted it loses what it had, waits again, and then everything up to
    its last token is prefilled as if it were a prompt.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    priority: int = 0
    """Higher goes first."""
    share_prefix: bool = True
    """Whether it may share leading blocks with others that have the same ``salt``."""
    salt: str = ""
    output: list[int] = field(default_factory=list)
    arrival: int = -1
    """Its number among all that were submitted."""
    id: int = -1
    """What memory nodes know it by while it runs: another one each time it is admitted, for what they are told of the
    last time may still be on its way."""
    slot: int = -1
    placement: Placement = NOWHERE
    """Where its keys and values lie while it runs."""
    tokens: list[int] = field(default_factory=list)
    """What is prefilled: the prompt, and the output up to its last preemption."""
    prefilled: int = 0
    """How many of these have gone through the slices, or were found on the memory nodes."""
    shared: int = 0
    """How many were found."""
    here: int = 0
    """How many are prefilled with their keys and values kept on the compute node; the others' past is remote."""
    reserved: int = 0
    """Positions for which memory nodes were asked to have space,"""
    granted: int = 0
    """and those for which they said that they have."""
    keys: list[bytes] = field(default_factory=list)
    """Of its leading full blocks, as far as they were needed so far."""
    preemptions: int = 0
    yielding: bool = False
    """Whether it will be preempted after the step that it is in."""
    cancelled: bool = False

    @property
    def most_tokens(self) -> int:
        """Positions that its keys and values can come to take."""
        return len(self.prompt) + self.max_tokens

    @property
    def context(self) -> int:
        """Tokens that there are. The last one's keys and values are stored with the next step."""
        return len(self.prompt) + len(self.output)

    @property
    def is_decoding(self) -> bool:
        """Whether all before the last token is stored, or on its way to be."""
        return 0 < len(self.tokens) == self.prefilled

    @property
    def rank(self) -> tuple[int, ...]:
        """Who goes first, and gives way last: the smallest."""
        return (-int(self.preemptions >= MAX_PREEMPTIONS), -self.priority, self.arrival)

    @property
    def finish_reason(self) -> str | None:
        if self.output and self.output[-1] in self.stop_tokens:
            return "stop"
        return "length" if len(self.output) >= self.max_tokens else None


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One decode row: ``token`` is at ``position``, the one before the token to be chosen."""

    sequence: Sequence
    token: int
    position: int


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Consecutive tokens of a prompt, from position ``start``."""

    sequence: Sequence
    start: int
    tokens: list[int]

    @property
    def completes(self) -> bool:
        """Whether it ends the prompt, so that a token is sampled from its last row."""
        return self.start + len(self.tokens) == len(self.sequence.tokens)

    @property
    def remote(self) -> bool:
        """Whether what it attends to lies on the memory nodes, and not here with the chunks before it."""
        return self.start >= self.sequence.here


@dataclass(frozen=True, slots=True)
class Ask:
    """Space that memory nodes are to have for the positions 0..tokens-1 of a sequence: new, or more than before.

    ``keys`` name its leading full blocks that may be shared. The answer goes to `Scheduler.grant`.
    """

    sequence: Sequence
    id: int
    placement: Placement
    tokens: int
    had: int = 0
    """Positions for which there is space already; 0 for a sequence that is new there."""
    keys: tuple[bytes, ...] = ()
    ahead: int | None = None
    """By how many positions its layers can be apart at most, if it is new there. None: by any number."""

    def stands(self) -> bool:
        """Whether the sequence still runs under this id."""
        return self.sequence.id == self.id


@dataclass(frozen=True, slots=True)
class Publication:
    """Leading blocks of a sequence that others may share from now on."""

    id: int
    placement: Placement
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What goes through the slices together, decode rows first, then chunks of prompts; and what memory nodes are to be
    told before: first ``published``, then ``released``, then ``asks``. There may be no rows."""

    decode: tuple[DecodeRow, ...] = ()
    prompts: tuple[PromptChunk, ...] = ()
    published: tuple[Publication, ...] = ()
    released: tuple[int, ...] = ()
    """The ids of sequences that no longer run."""
    asks: tuple[Ask, ...] = ()
    moved: bool = False
    """Whether another slot got sequences, and may have to be woken."""

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token, in the order of the sampled rows."""
        return [r.sequence for r in self.decode] + [c.sequence for c in self.prompts if c.completes]

    @property
    def load(self) -> Load:
        """Its size, for the cost model."""
        prompt_tokens = sum(len(chunk.tokens) for chunk in self.prompts)
        return Load(len(self.decode), prompt_tokens, sum(row.position + 1 for row in self.decode))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished step brought: new tokens in order of the sampled rows, and the sequences that are over.

    Memory nodes are to be told ``published``, then ``released``.
    """

    tokens: list[tuple[Sequence, int]]
    finished: list[Sequence]
    cancelled: list[Sequence]
    published: tuple[Publication, ...]
    released: tuple[int, ...]


class _Slot:
    """One batch that may be in flight."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.context = 0
        """Of all of them together."""
        self.stepping = False
        """Whether a step of it is on its way."""

    @property
    def load(self) -> Load:
        """See `Scheduler.loads`."""
        return Load(rows=len(self.sequences), context_tokens=self.context)

    def join(self, sequence: Sequence) -> None:
        self.sequences.append(sequence)
        self.context += sequence.context

    def leave(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        self.context -= sequence.context


class _News:
    """What memory nodes are to be told."""

    def __init__(self) -> None:
        self.published: list[Publication] = []
        self.released: list[int] = []
        self.asks: list[Ask] = []


class Scheduler:
    """Continuous batching over ``batches`` slots: sequences join and leave between steps.

    A sequence is admitted, in the order of `Sequence.rank`, when there is ``room`` for what it has and some blocks
    ahead; while it runs it takes more, a few blocks at a time and a step before it needs them. Where there are none,
    those of a higher rank preempt those of the lowest, and who has no one below sits out. So the first by rank among
    those that run always goes on to its end, and then another is the first: nobody is in the way of everybody.

    Slots get equal work, by ``cost``, which also says how many of them are worth using. ``prefill_tokens`` is the
    most prompt tokens of a step, ``remote_tokens`` the most of those whose past lies on the memory nodes: because it
    was found there, or because the compute node keeps no more than ``prefill_kv`` tokens of prompts, and without
    ``keep_chunks`` none but a prompt's first chunk. With 0 nobody shares anything, and it keeps all.
    """

    def __init__(
        self,
        *,
        batches: int,
        max_batch: int,
        prefill_tokens: int,
        room: Room,
        max_waiting: int,
        cost: CostModel | None = None,
        prefix: PrefixKeys | None = None,
        remote_tokens: int = 0,
        prefill_kv: int = 2**40,
        keep_chunks: bool = True,
        ahead_blocks: int = AHEAD_BLOCKS,
    ) -> None:
        self.cost = cost or CostModel()
        self.preemptions = 0
        self.prompt_tokens = 0
        """Tokens that were to be prefilled,"""
        self.shared_tokens = 0
        """and those of them that were found on the memory nodes."""
        self._max_batch = max_batch
        self._prefill_tokens = prefill_tokens
        self._room = room
        self._max_waiting = max_waiting
        self._prefix = prefix if remote_tokens else None
        self._remote_tokens = remote_tokens
        self._prefill_kv = prefill_kv
        self._keep_chunks = keep_chunks
        self._ahead_blocks = ahead_blocks
        self._slots = [_Slot() for _ in range(batches)]
        self._waiting: Waiting[Sequence] = Waiting()
        self._arrivals = itertools.count()
        self._ids = itertools.count()
        self._in_use = batches

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return sum(len(slot.sequences) for slot in self._slots)

    @property
    def free_blocks(self) -> int:
        return self._room.free

    @property
    def block_tokens(self) -> int:
        return self._room.block_tokens

    @property
    def loads(self) -> list[Load]:
        """By slot: its next decode step, as if all prompts were prefilled."""
        return [slot.load for slot in self._slots]

    @property
    def batches_in_use(self) -> int:
        """Slots that new sequences go to."""
        return self._in_use

    # -- requests

    def submit(self, sequence: Sequence, *, retry_after_s: float | None = None) -> None:
        """Queue a sequence. CapacityError if it could never run, or if too many wait: that says ``retry_after_s``."""
        room = self._room
        if sequence.most_tokens > room.most_tokens:
            raise CapacityError(
                f"the request needs {sequence.most_tokens} tokens of KV cache ({len(sequence.prompt)} prompt + "
                f"{sequence.max_tokens} new), the memory nodes hold {room.most_tokens}; ask for fewer"
            )
        self.require_place(retry_after_s=retry_after_s)
        sequence.arrival = next(self._arrivals)
        self._waiting.push(sequence)

    def require_place(self, coming: int = 0, *, retry_after_s: float | None = None) -> None:
        """CapacityError, which says ``retry_after_s``, if with ``coming`` others too many wait for one more."""
        waiting = len(self._waiting) + coming
        if waiting >= self._max_waiting:
            when = "later" if retry_after_s is None else f"in {retry_after_s:.0f} s"
            raise CapacityError(
                f"{waiting} requests are waiting already, the limit is {self._max_waiting}; retry {when}",
                retry_after_s=retry_after_s,
            )

    def cancel(self, sequence: Sequence) -> bool:
        """End a sequence early; True if it was waiting, else it ends at the next step boundary of its slot."""
        sequence.cancelled = True
        return self._waiting.remove(sequence)

    def grant(self, ask: Ask, shared: int = 0) -> None:
        """Memory nodes have the space that was asked for, and had ``shared`` leading positions already."""
        if not ask.stands():
            return
        sequence = ask.sequence
        sequence.granted = ask.tokens
        if not ask.had:
            sequence.prefilled = sequence.shared = shared
            sequence.here = 0 if shared else self._kept_here(len(sequence.tokens))
            self.prompt_tokens += len(sequence.tokens)
            self.shared_tokens += shared

    def _kept_here(self, tokens: int) -> int:
        """Of so many tokens to be prefilled, those for which the compute node still has room."""
        if not self._remote_tokens:
            return tokens
        running = (s for slot in self._slots for s in slot.sequences)
        return min(tokens, max(0, self._prefill_kv - sum(s.here for s in running if s.prefilled < s.here)))

    # -- steps

    def next_step(self, slot: int) -> Step | None:
        """The next step of batch ``slot``, or None while it has nothing to do or to say."""
        own, news = self._slots[slot], _News()
        for sequence in [s for s in own.sequences if s.cancelled]:
            self._remove(sequence, news)
        self._choose_batches()
        moved = self._even_out(slot)
        if slot < self._in_use:
            self._admit(slot, news)
        self._grow(own, news)
        decode, prompts = self._compose(own)
        own.stepping = bool(decode or prompts)
        if not (own.stepping or moved or news.released or news.asks):
            return None
        return Step(decode, prompts, tuple(news.published), tuple(news.released), tuple(news.asks), moved)

    def finish(self, slot: int, step: Step, tokens: Listed[int]) -> Outcome:
        """Take in the tokens of a step's sampled rows, and free the space of the sequences that leave."""
        own, news = self._slots[slot], _News()
        own.stepping = False
        sampled = step.sampled
        for chunk in step.prompts:
            chunk.sequence.prefilled += len(chunk.tokens)
        fresh = [(s, t) for s, t in zip(sampled, tokens, strict=True) if not s.cancelled]
        for sequence, token in fresh:
            sequence.output.append(token)
            own.context += 1
        for chunk in step.prompts:
            if chunk.completes and not chunk.sequence.cancelled:
                self._publish(chunk.sequence, len(chunk.sequence.tokens), news)
        finished, cancelled = [], []
        for sequence in list(own.sequences):
            if sequence.cancelled:
                cancelled.append(sequence)
                self._remove(sequence, news)
            elif sequence.finish_reason:
                finished.append(sequence)
                self._publish(sequence, sequence.context - 1, news)
                self._remove(sequence, news)
            elif sequence.yielding:
                self._preempt(sequence, news)
        return Outcome(fresh, finished, cancelled, tuple(news.published), tuple(news.released))

    def _compose(self, own: _Slot) -> tuple[tuple[DecodeRow, ...], tuple[PromptChunk, ...]]:
        """The rows of those whose space the memory nodes have."""
        decode: list[DecodeRow] = []
        local: list[Sequence] = []
        remote: list[Sequence] = []
        for s in own.sequences:
            if s.is_decoding:
                if s.context <= s.granted:
                    decode.append(DecodeRow(s, s.output[-1], s.context - 1))
            elif s.granted:
                (remote if s.prefilled >= s.here else local).append(s)
        prompts = _chunks(remote, min(self._remote_tokens, self._prefill_tokens))
        first = _chunks(local, self._prefill_tokens - sum(len(chunk.tokens) for chunk in prompts))
        if not self._keep_chunks:
            for chunk in first:
                chunk.sequence.here = len(chunk.tokens)
        return tuple(decode), tuple(prompts + first)

    # -- space

    def _admit(self, slot: int, news: _News) -> None:
        """Admit waiting sequences to the slot while it has the least to do and there is room."""
        own = self._slots[slot]
        while (sequence := self._waiting.head()) and len(own.sequences) < self._max_batch:
            others = [s for s in self._slots[: self._in_use] if len(s.sequences) < self._max_batch]
            if self._work(own) > min(map(self._work, others)):
                break
            tokens = sequence.prompt + sequence.output
            first = self._with_blocks_ahead(sequence, len(tokens))
            # Whoever runs can take blocks once more, or this one would soon have to give way again.
            growing = sum(s.reserved < s.most_tokens for slot in self._slots for s in slot.sequences)
            # Never all of them: from the last one a token is to be sampled.
            keys = self._keys(sequence, len(tokens) - 1)
            # A step can be planned while all that was prefilled is still on its way, whatever the order of the layers.
            ahead = len(tokens) + 1
            placement = self._room.place(
                sequence,
                first,
                sequence.most_tokens,
                ahead=ahead,
                spare=growing * self._ahead_blocks,
                key=keys[0] if keys else None,
            )
            if placement is None:
                break
            self._waiting.take(sequence)
            own.join(sequence)
            sequence.slot, sequence.id, sequence.placement = slot, next(self._ids), placement
            sequence.tokens, sequence.reserved = tokens, first
            news.asks.append(Ask(sequence, sequence.id, placement, first, keys=keys, ahead=ahead))

    def _grow(self, own: _Slot, news: _News) -> None:
        """Take more blocks for sequences that will need them in the next step, or need them in this one."""
        short = [
            s for s in own.sequences if s.is_decoding and s.context + 1 > s.reserved and s.reserved < s.most_tokens
        ]
        for sequence in sorted(short, key=lambda s: s.rank):
            if sequence.id < 0:
                continue  # preempted by one before it
            tokens = self._with_blocks_ahead(sequence, sequence.reserved)
            if not self._room.extend(sequence, tokens):
                # As long as it has space for this step, that of others may come free by itself.
                if sequence.context <= sequence.reserved:
                    continue
                self._make_room(sequence, tokens, news)
                if not self._room.extend(sequence, tokens):
                    continue
            news.asks.append(Ask(sequence, sequence.id, sequence.placement, tokens, sequence.reserved))
            sequence.reserved = tokens

    def _make_room(self, sequence: Sequence, tokens: int, news: _News) -> None:
        """Preempt those of the lowest rank, as many as it takes, if those below ``sequence`` have enough together.

        Who is in the middle of a step gives way after it.
        """
        missing = self._room.missing(sequence, tokens)
        below = [s for slot in self._slots for s in slot.sequences if s.rank > sequence.rank]
        if any(_less(missing, self._room.held(below))):
            return
        leaving = [s for s in below if s.yielding or s.cancelled]
        missing = _less(missing, self._room.held(leaving))
        for victim in sorted(below, key=lambda s: s.rank, reverse=True):
            if not any(missing):
                break
            rest = _less(missing, self._room.held([victim]))
            if victim.yielding or victim.cancelled or rest == missing:
                continue
            missing = rest
            if self._slots[victim.slot].stepping:
                victim.yielding = True
            else:
                self._preempt(victim, news)

    def _preempt(self, sequence: Sequence, news: _News) -> None:
        """Take everything from a sequence but its tokens, and let it wait."""
        if sequence.is_decoding:
            self._publish(sequence, sequence.context - 1, news)
        self._remove(sequence, news)
        sequence.prefilled = sequence.shared = sequence.here = sequence.granted = sequence.reserved = 0
        sequence.tokens, sequence.yielding = [], False
        sequence.preemptions += 1
        self.preemptions += 1
        self._waiting.push(sequence)

    def _remove(self, sequence: Sequence, news: _News) -> None:
        """A sequence leaves its slot and gives its space back."""
        self._slots[sequence.slot].leave(sequence)
        self._room.give(sequence)
        news.released.append(sequence.id)
        sequence.slot = sequence.id = -1
        sequence.placement = NOWHERE

    def _with_blocks_ahead(self, sequence: Sequence, tokens: int) -> int:
        """So many positions and some blocks more, up to what the sequence can need."""
        blocks = self._room.needed(tokens) + self._ahead_blocks
        return min(sequence.most_tokens, blocks * self._room.block_tokens)

    # -- what is shared

    def _publish(self, sequence: Sequence, tokens: int, news: _News) -> None:
        """Let others share the blocks of the first ``tokens`` positions."""
        if keys := self._keys(sequence, tokens):
            news.published.append(Publication(sequence.id, sequence.placement, keys))

    def _keys(self, sequence: Sequence, tokens: int) -> tuple[bytes, ...]:
        """Of the full blocks of the first ``tokens`` positions."""
        blocks = tokens // self._room.block_tokens
        if not (self._prefix and sequence.share_prefix):
            return ()
        if blocks > len(sequence.keys):
            sequence.keys = self._prefix.keys(sequence.prompt + sequence.output, sequence.salt, sequence.keys)
        return tuple(sequence.keys[:blocks])

    # -- which slot

    def _work(self, slot: _Slot) -> tuple[float, int]:
        """What the next step of a slot costs: the contexts of one that steps now will have grown by then."""
        load = slot.load
        if slot.stepping:
            load = Load(rows=load.rows, context_tokens=load.context_tokens + load.rows)
        return self.cost.cost(load).alone_s, len(slot.sequences)

    def _choose_batches(self) -> None:
        """Decide how many slots to use for those that run and those that could."""
        most = len(self._slots)
        running, context = self.running, sum(slot.context for slot in self._slots)
        rows = min(running + len(self._waiting), most * self._max_batch)
        if not rows:
            return
        head = self._waiting.head()
        each = context / running if running else head.context if head else 0
        load = Load(rows=rows, context_tokens=round(each * rows))
        least = -(-rows // self._max_batch)
        self._in_use = self.cost.batches(load, least=least, most=most, present=self._in_use)

    def _even_out(self, slot: int) -> bool:
        """Hand sequences of a slot, which is between two steps, to slots that have less to do.

        Only those that decode: others have keys and values on the compute node, and soon decode as well.
        """
        own, moved = self._slots[slot], False
        for sequence in sorted((s for s in own.sequences if s.is_decoding), key=lambda s: s.context, reverse=True):
            others = [s for s in self._slots[: self._in_use] if s is not own and len(s.sequences) < self._max_batch]
            if not others:
                break
            other = min(others, key=self._work)
            if slot < self._in_use:
                if self._work(other)[0] >= UNEVEN * self._work(own)[0]:
                    break
                if not self._is_better(own, other, sequence):
                    continue
            own.leave(sequence)
            other.join(sequence)
            sequence.slot = self._slots.index(other)
            moved = True
        return moved

    def _is_better(self, own: _Slot, other: _Slot, sequence: Sequence) -> bool:
        """Whether the longer of two slots' steps gets clearly shorter when the sequence moves."""
        rows, context = len(own.sequences), own.context
        without = self.cost.cost(Load(rows=rows - 1, context_tokens=context - sequence.context)).alone_s
        rows, context = len(other.sequences), other.context
        with_it = self.cost.cost(Load(rows=rows + 1, context_tokens=context + sequence.context)).alone_s
        return max(without, with_it) < UNEVEN * self.cost.cost(own.load).alone_s


def _less(missing: Listed[int], held: Listed[int]) -> list[int]:
    """By node, what is still missing when so much comes free."""
    return [max(0, m - h) for m, h in zip(missing, held, strict=True)]


def _chunks(sequences: Iterable[Sequence], budget: int) -> list[PromptChunk]:
    """Divide ``budget`` tokens over prompts: half to the oldest, half of the rest to the next, and so on; what short
    ones leave over goes to the oldest again. So a short prompt does not wait for a long one, and few are under way."""
    ordered = sorted(sequences, key=lambda s: s.arrival)
    most = [_next_tokens(s) for s in ordered]
    lengths = []
    left = budget
    for i in range(len(ordered)):
        share = left if i + 1 == len(ordered) else -(-left // 2)
        lengths.append(min(most[i], share))
        left -= lengths[-1]
    for i in range(len(ordered)):
        more = min(most[i] - lengths[i], left)
        lengths[i] += more
        left -= more
    return [
        PromptChunk(s, s.prefilled, s.tokens[s.prefilled : s.prefilled + length])
        for s, length in zip(ordered, lengths, strict=True)
        if length
    ]


def _next_tokens(sequence: Sequence) -> int:
    """The most tokens of a sequence's next chunk: of those kept here, or of those that the same nodes store."""
    if sequence.prefilled < sequence.here:
        return sequence.here - sequence.prefilled
    rest, room = len(sequence.tokens) - sequence.prefilled, sequence.placement.until_next(sequence.prefilled)
    return rest if room is None else min(rest, room)

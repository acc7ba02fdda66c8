"""Decide which sequences run and what each step consists of. This is pure Python: no clock, no tensor, no
connection."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Listed

from lamina.errors import CapacityError
from lamina.front.blocks import BlockManager
from lamina.front.cost import CostModel, StepLoad
from lamina.front.moves import MoveSchedule
from lamina.front.preemption import choose_victims
from lamina.front.prefill import divide_prefill
from lamina.front.prefix import PrefixKeys
from lamina.front.sequence import (
    NOWHERE,
    CacheChanges,
    DecodeRow,
    PromptChunk,
    Publication,
    ReservationRequest,
    ScheduledStep,
    Sequence,
    StepOutcome,
)
from lamina.front.slots import BatchSlot, SlotBalancer
from lamina.front.tables import IN_ORDER
from lamina.front.waiting import WaitingQueue
from lamina.wire.orders import NONE_ALLOWED
from lamina.wire.requests import Score

AHEAD_BLOCKS = 4
"""The number of blocks reserved beyond what a sequence has, so that it seldom has to request more."""


class Scheduler:
    """The scheduler does continuous batching over ``batches`` slots: sequences join and leave between steps.

    Waiting sequences are admitted in the order of `Sequence.rank`, when ``block_manager`` has space for their tokens
    and some blocks ahead. A running sequence reserves more, a few blocks at a time and one step before it needs them.
    When there are none left, it goes on on other memory nodes that have some, if the block manager allows that; else
    sequences of a higher rank preempt those of the lowest, and one with none below it sits out. So the first running
    sequence by rank always goes on to its end, and then another one is the first: no sequence blocks all others.

    The slots get equal work by ``cost``, which also says how many of them are worth using. A step has at most
    ``prefill_tokens`` prompt tokens, of which the past of at most ``remote_tokens`` lies on the memory nodes. It lies
    there if it was found there, if the compute node already keeps ``prefill_kv_tokens`` tokens of prompts, or, without
    ``keep_chunks``, behind the first chunk of a prompt. If ``remote_tokens`` is 0, sequences share nothing and the
    compute node keeps everything.
    """

    def __init__(
        self,
        *,
        batches: int,
        max_batch: int,
        prefill_tokens: int,
        block_manager: BlockManager,
        max_waiting: int,
        cost: CostModel | None = None,
        prefix: PrefixKeys | None = None,
        remote_tokens: int = 0,
        prefill_kv_tokens: int = 2**40,
        keep_chunks: bool = True,
        ahead_blocks: int = AHEAD_BLOCKS,
    ) -> None:
        self.cost = cost or CostModel()
        self.keep_chunks = keep_chunks
        """Whether the compute nodes keep the keys and values of a prompt from chunk to chunk."""
        self.preemptions = 0
        self.prompt_tokens = 0
        """Tokens of admitted sequences that had to be prefilled or found."""
        self.shared_tokens = 0
        """The part of ``prompt_tokens`` that was found on the memory nodes."""
        self._prefill_tokens = prefill_tokens
        self._block_manager = block_manager
        self._max_waiting = max_waiting
        self._prefix = prefix if remote_tokens else None
        self._remote_tokens = remote_tokens
        self._prefill_kv_tokens = prefill_kv_tokens
        self._ahead_blocks = ahead_blocks
        self._slots = SlotBalancer(batches, max_batch, prefill_tokens, self.cost)
        self._waiting: WaitingQueue[Sequence] = WaitingQueue()
        self._limit = block_manager.max_context
        """The most positions that a sequence may come to need: what the memory nodes held when `settle` was called."""
        self._arrivals = itertools.count()
        self._ids = itertools.count()
        self.mover = MoveSchedule(block_manager, self._ids, self.cost, ahead_blocks)
        """Moves what is stored of running sequences."""

    @property
    def waiting(self) -> int:
        """Return how many sequences wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Return how many sequences run."""
        return self._slots.running

    @property
    def total_blocks(self) -> int:
        """Return the blocks of all memory nodes, as the block manager counts them."""
        return self._block_manager.total_blocks

    @property
    def free_blocks(self) -> int:
        """Return the free blocks on the memory nodes, as the block manager counts them."""
        return self._block_manager.free_blocks

    @property
    def block_tokens(self) -> int:
        """Return how many positions a block has."""
        return self._block_manager.block_tokens

    @property
    def loads(self) -> list[StepLoad]:
        """Return the next decode step of each slot, as if all prompts were prefilled."""
        return [slot.load for slot in self._slots]

    @property
    def batches_in_use(self) -> int:
        """Return how many slots new sequences go to."""
        return self._slots.in_use

    # -- requests

    def submit(self, sequence: Sequence, *, retry_after_s: float | None = None, restored: bool = False) -> None:
        """Queue a sequence. Raises CapacityError if it could never run, or, with ``retry_after_s``, if too many
        wait; one that is ``restored`` had its place before."""
        self._require_fit(sequence)
        if not restored:
            self.require_place(retry_after_s=retry_after_s)
        sequence.arrival = next(self._arrivals)
        self._waiting.push(sequence)

    def _require_fit(self, sequence: Sequence) -> None:
        """Raise CapacityError if a sequence can never run."""
        if not self._limit:
            raise CapacityError("all memory nodes are lost, so nothing holds keys and values; start them again")
        if sequence.max_context > self._limit:
            raise CapacityError(
                f"the request needs {sequence.max_context} tokens of KV cache ({len(sequence.prompt)} prompt + "
                f"{sequence.max_tokens} new), the memory nodes hold {self._limit}; ask for fewer"
            )

    def require_place(self, coming: int = 0, *, retry_after_s: float | None = None) -> None:
        """Raise CapacityError, which gives ``retry_after_s``, if the queue has no place left.

        ``coming`` requests that will be submitted soon count as waiting.
        """
        waiting = len(self._waiting) + coming
        if waiting >= self._max_waiting:
            when = "later" if retry_after_s is None else f"in {retry_after_s:.0f} s"
            raise CapacityError(
                f"{waiting} requests are waiting already, the limit is {self._max_waiting}; retry {when}",
                retry_after_s=retry_after_s,
            )

    def cancel(self, sequence: Sequence) -> bool:
        """End a sequence early. Returns True if it was waiting; else it ends at the next step boundary of its slot."""
        sequence.cancelled = True
        return self._waiting.remove(sequence)

    # -- memory nodes

    def lose(self, member: int) -> CacheChanges:
        """A memory node is gone. The sequences that had blocks there lose all their space and wait, in the place that
        they had; those in the middle of a step do so when it ends."""
        self._block_manager.remove(member)
        changes = self.mover.lose(member, self._slots.sequences())
        self._evict([s for s in self._slots.sequences() if member in s.placement.all_members], changes)
        return changes

    def evict(self, ids: Iterable[int]) -> CacheChanges:
        """Sequences have lost some of what was kept of them: they lose all their space and wait, as after a loss."""
        gone = set(ids)
        return self._evict([s for s in self._slots.sequences() if s.id in gone], CacheChanges())

    def evict_unprefilled(self) -> CacheChanges:
        """A compute node is gone, and with it what it kept of prompts: those that are being prefilled begin anew."""
        unprefilled = [s for s in self._slots.sequences() if not s.is_decoding and s.confirmed]
        return self._evict(unprefilled, CacheChanges())

    def drain(self, member: int, context: int) -> None:
        """Let a memory node become empty by and by: see `BlockManager.drain`."""
        self._block_manager.drain(member, context)

    def evacuate(self, member: int) -> CacheChanges:
        """What still lies on a draining memory node is given up: its sequences wait, and lie elsewhere afterwards."""
        there = [s for s in self._slots.sequences() if member in s.placement.all_members]
        return self._evict(there, CacheChanges())

    @property
    def can_move(self) -> bool:
        """Return whether sequences can change where they lie while they run."""
        return self._block_manager.can_move

    @property
    def draining(self) -> dict[int, int]:
        """Return how many blocks are still held on each draining memory node."""
        return {member: self._block_manager.used_on(member) for member in sorted(self._block_manager.draining)}

    def _evict(self, sequences: Iterable[Sequence], changes: CacheChanges) -> CacheChanges:
        for sequence in sequences:
            if self._slots[sequence.slot].stepping:
                sequence.yielding = sequence.evicted = True
            else:
                self._wait_again(sequence, changes)
        return changes

    def gain(self, member: int, blocks: int) -> None:
        """A memory node has come, with so many blocks."""
        self._block_manager.add(member, blocks)
        self._limit = max(self._limit, self._block_manager.max_context)

    def settle(self) -> list[tuple[Sequence, CapacityError]]:
        """Take the memory nodes that are there for all that there will be. Returns the sequences that can never run on
        them, which the caller cancels, and why."""
        self._limit = self._block_manager.max_context
        unfit = []
        for sequence in self._waiting:
            try:
                self._require_fit(sequence)
            except CapacityError as error:
                unfit.append((sequence, error))
        return unfit

    def everything(self) -> list[Sequence]:
        """Return all sequences, those that wait and those that have space."""
        return [*self._waiting, *self._slots.sequences()]

    def has(self, member: int) -> bool:
        """Return whether sequences may be placed on a memory node."""
        return self._block_manager.has(member)

    # -- reservations

    def confirm(self, request: ReservationRequest, shared: int = 0) -> CacheChanges:
        """The memory nodes have reserved the space, and already had the first ``shared`` positions."""
        if not request.is_current:
            return CacheChanges()
        if request.succession:
            return self.mover.confirm(request)
        sequence = request.sequence
        sequence.confirmed = request.tokens
        if request.is_new:
            sequence.prefilled = sequence.shared = shared
            sequence.published = shared // self.block_tokens
            if not sequence.admitted:
                sequence.admitted, sequence.found = True, shared
            sequence.local_tokens = 0 if shared else self._keepable(len(sequence.tokens))
            self.prompt_tokens += len(sequence.tokens)
            self.shared_tokens += shared
        return CacheChanges()

    def _keepable(self, tokens: int) -> int:
        """Return how many of the tokens of a new prompt the compute node still has room to keep."""
        if not self._remote_tokens:
            return tokens
        kept = sum(s.local_tokens for s in self._slots.sequences() if s.prefilled < s.local_tokens)
        return min(tokens, max(0, self._prefill_kv_tokens - kept))

    def refuse(self, request: ReservationRequest) -> CacheChanges:
        """A memory node refuses a successor of a sequence, which goes on as it was."""
        return self.mover.refuse(request) if request.is_current else CacheChanges()

    # -- steps

    def next_step(self, slot: int) -> ScheduledStep | None:
        """Return the next step of batch ``slot``, or None while there is nothing to run and nothing to tell."""
        own, changes = self._slots[slot], CacheChanges()
        for sequence in [s for s in own.sequences if s.cancelled]:
            self._remove(sequence, changes)
        head = self._waiting.head()
        space = self._block_manager.free_blocks * self._block_manager.block_tokens
        self._slots.choose_in_use(len(self._waiting), head.context if head else 0, space)
        moved = self._slots.rebalance(own)
        self._admit(own, changes)
        self.mover.switch(own.sequences, changes)
        self._grow(own, changes)
        self.mover.plan(self._slots.sequences(), changes)
        decode, prompts = self._compose(own)
        step = ScheduledStep(decode, prompts, changes, moved)
        own.stepping = step.has_rows
        return step if step.has_rows or moved or changes else None

    def finish(
        self,
        slot: int,
        step: ScheduledStep,
        tokens: Listed[int | None],
        scores: Listed[Score | None] = (),
        prompt_scores: Listed[Listed[Score | None]] = (),
    ) -> StepOutcome:
        """Take in what a step brought, as `lamina.wire.orders.Done` has it, and free the space of the sequences that
        leave.

        A sequence that gets no token leaves too, and so does one whose prompt gets no scores; it shares nothing of what
        this step computed.
        """
        own, changes = self._slots[slot], CacheChanges()
        own.stepping = False
        sampled = list(zip(step.sampled, tokens, scores or [None] * len(tokens), strict=True))
        broken = [s for s, token, _ in sampled if token is None]
        stuck = [s for s, token, _ in sampled if token == NONE_ALLOWED]
        scored = []
        targeted = [chunk.sequence for chunk in step.prompts if chunk.targets]
        for sequence, found in zip(targeted, prompt_scores, strict=True):
            numbers = [score for score in found if score is not None]
            if len(numbers) < len(found):
                broken += [] if sequence in broken else [sequence]
            elif not sequence.cancelled:
                sequence.scored += len(numbers)
                scored.append((sequence, numbers))
        for chunk in step.prompts:
            chunk.sequence.prefilled += len(chunk.tokens)
        without = {*broken, *stuck}
        fresh = [
            (sequence, token, score)
            for sequence, token, score in sampled
            if token is not None and not sequence.cancelled and sequence not in without
        ]
        for sequence, token, _ in fresh:
            sequence.output.append(token)
            own.context += 1
        for chunk in step.prompts:
            if chunk.completes and not chunk.sequence.cancelled and chunk.sequence not in without:
                self._publish(chunk.sequence, len(chunk.sequence.tokens), changes)
        finished, cancelled = [], []
        for sequence in list(own.sequences):
            if sequence.cancelled:
                cancelled.append(sequence)
                self._remove(sequence, changes)
            elif sequence in without:
                self._remove(sequence, changes)
            elif sequence.finish_reason:
                finished.append(sequence)
                self._publish(sequence, sequence.context - 1, changes)
                self._remove(sequence, changes)
            elif sequence.yielding:
                self._yield(sequence, changes)
        broken, stuck = [[s for s in some if not s.cancelled] for some in (broken, stuck)]
        return StepOutcome(fresh, finished, cancelled, broken, stuck, scored, changes)

    def give_up(self, slot: int) -> CacheChanges:
        """A step has failed. Its rows come again in a later step, except those of sequences that have to leave now."""
        own, changes = self._slots[slot], CacheChanges()
        own.stepping = False
        for sequence in list(own.sequences):
            if sequence.cancelled:
                self._remove(sequence, changes)
            elif sequence.yielding:
                self._yield(sequence, changes)
        return changes

    def _compose(self, own: BatchSlot) -> tuple[tuple[DecodeRow, ...], tuple[PromptChunk, ...]]:
        """Return the rows of the sequences whose space the memory nodes have confirmed, and whose next token may be
        chosen."""
        decode: list[DecodeRow] = []
        local: list[Sequence] = []
        remote: list[Sequence] = []
        for s in own.sequences:
            if s.lacks_mask or s.successor is not None:
                continue
            if s.is_decoding:
                if (context := s.context) <= s.confirmed:
                    decode.append(DecodeRow(s, s.output[-1], context - 1))
            elif s.confirmed:
                (remote if s.prefilled >= s.local_tokens else local).append(s)
        prompts = divide_prefill(remote, min(self._remote_tokens, self._prefill_tokens))
        first = divide_prefill(local, self._prefill_tokens - sum(len(chunk.tokens) for chunk in prompts))
        if not self.keep_chunks:
            for chunk in first:
                chunk.sequence.local_tokens = len(chunk.tokens)
        return tuple(decode), tuple(prompts + first)

    # -- space

    def _admit(self, own: BatchSlot, changes: CacheChanges) -> None:
        """Admit waiting sequences to the slot while it has the least work and there is space."""
        while (sequence := self._waiting.head()) and self._slots.takes_next(own):
            tokens = sequence.prompt + sequence.output
            first = self._with_blocks_ahead(sequence, len(tokens))
            # Running sequences keep blocks to grow into once more; else the new one would soon be preempted again.
            growing = sum(s.reserved < s.max_context for s in self._slots.sequences())
            moving = sum(self.draining.values())
            # Never all tokens: the next token is sampled from the last one, which has to be computed.
            # None either while the prompt's scores are wanted, which only come from computing it.
            keys = () if sequence.is_unscored else self._keys(sequence, len(tokens) - 1)
            # A step can be planned while all prefilled positions are still under way, the layers in any order.
            ahead = len(tokens) + 1
            placement = self._block_manager.allocate(
                sequence,
                first,
                sequence.max_context,
                ahead=ahead,
                spare=growing * self._ahead_blocks + moving,
                key=keys[0] if keys else None,
            )
            if placement is None:
                break
            self._waiting.take(sequence)
            own.add(sequence)
            sequence.id, sequence.placement = next(self._ids), placement
            sequence.tokens, sequence.reserved = tokens, first
            request = ReservationRequest(sequence, sequence.id, placement, first, keys=keys, ahead=ahead)
            changes.reservations.append(request)

    def _grow(self, own: BatchSlot, changes: CacheChanges) -> None:
        """Reserve more blocks for sequences that will need them in the next step, or need them in this one."""
        short = [s for s in own.sequences if s.reserved <= s.context and s.is_decoding and s.reserved < s.max_context]
        for sequence in sorted(short, key=lambda s: s.rank):
            if sequence.id < 0 or sequence.successor is not None:
                continue  # preempted by an earlier one of this loop, or about to lie elsewhere
            tokens = self._with_blocks_ahead(sequence, sequence.reserved)
            if not self._block_manager.extend(sequence, tokens):
                # While it has space for this step, it waits for others to free theirs.
                if sequence.context <= sequence.reserved or self.mover.redirect(sequence, tokens, changes):
                    continue
                self._make_space(sequence, tokens, changes)
                if not (sequence.id >= 0 and self._block_manager.extend(sequence, tokens)):
                    continue
            request = ReservationRequest(sequence, sequence.id, sequence.placement, tokens, sequence.reserved)
            changes.reservations.append(request)
            sequence.reserved = tokens
            # What is published is found again when the sequence has to be prefilled anew.
            self._publish(sequence, sequence.context - 1, changes)

    def _make_space(self, sequence: Sequence, tokens: int, changes: CacheChanges) -> None:
        """Preempt sequences of a lower rank, at once or when the step ends that they are in."""
        running = list(self._slots.sequences())
        for shortage in self.mover.shortages(sequence, tokens):
            victims = choose_victims(sequence, shortage, running, self._block_manager)
            if victims is None:
                continue
            for victim in victims:
                if self._slots[victim.slot].stepping:
                    victim.yielding = True
                else:
                    self._preempt(victim, changes)
            return
        if sequence.placement.moved and sequence.rank == min(s.rank for s in running):
            self._preempt(sequence, changes)  # it lies in such parts that it could not even go on alone

    def _yield(self, sequence: Sequence, changes: CacheChanges) -> None:
        if sequence.evicted:
            self._wait_again(sequence, changes)
        else:
            self._preempt(sequence, changes)

    def _preempt(self, sequence: Sequence, changes: CacheChanges) -> None:
        """Take the space of a sequence for another one, and let it wait."""
        sequence.preemptions += 1
        self.preemptions += 1
        self._wait_again(sequence, changes)

    def _wait_again(self, sequence: Sequence, changes: CacheChanges) -> None:
        """Take everything except its tokens from a sequence, and let it wait."""
        if sequence.is_decoding:
            self._publish(sequence, sequence.context - 1, changes)
        self._remove(sequence, changes)
        sequence.prefilled = sequence.shared = sequence.local_tokens = sequence.confirmed = sequence.reserved = 0
        sequence.published = 0
        sequence.tokens, sequence.yielding, sequence.evicted = [], False, False
        self._waiting.push(sequence)

    def _remove(self, sequence: Sequence, changes: CacheChanges) -> None:
        """Remove a sequence from its slot and free its space."""
        self.mover.drop(sequence, changes)
        self._slots[sequence.slot].remove(sequence)
        self._block_manager.free(sequence)
        changes.released.append(sequence.id)
        sequence.id, sequence.placement, sequence.order, sequence.refusals = -1, NOWHERE, IN_ORDER, 0

    def _with_blocks_ahead(self, sequence: Sequence, tokens: int) -> int:
        """Return the positions of ``tokens`` and of some blocks more, up to what the sequence can need."""
        blocks = self._block_manager.blocks_for(tokens) + self._ahead_blocks
        return min(sequence.max_context, blocks * self.block_tokens)

    # -- sharing

    def _publish(self, sequence: Sequence, tokens: int, changes: CacheChanges) -> None:
        """Let others share the blocks of the first ``tokens`` positions."""
        first = sequence.published
        if keys := self._keys(sequence, tokens)[first:]:
            changes.published.append(Publication(sequence.id, sequence.placement, keys, first, sequence.order))
            sequence.published = first + len(keys)

    def _keys(self, sequence: Sequence, tokens: int) -> tuple[bytes, ...]:
        """Return the keys of the full blocks of the first ``tokens`` positions; none for a sequence that shares
        nothing."""
        request, blocks = sequence.request, tokens // self.block_tokens
        if not (self._prefix and request.share_prefix):
            return ()
        if blocks > len(sequence.keys):
            sequence.keys = self._prefix.keys(sequence.prompt + sequence.output, request.salt, sequence.keys)
        return tuple(sequence.keys[:blocks])

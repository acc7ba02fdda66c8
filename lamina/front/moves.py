"""Let running sequences change where they lie: what has been stored moves, and what is to come is stored elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lamina.errors import LaminaError
from lamina.front.blocks import BlockManager
from lamina.front.cost import CostModel
from lamina.front.pool import Movable, NodeLoad, propose
from lamina.front.sequence import CacheChanges, ReservationRequest, Sequence, Succession, Transfer
from lamina.front.tables import TableOrder, part_of
from lamina.limits import MAX_MOVED
from lamina.wire.placement import Placement

MAX_TRANSFERS = 2
"""The most transfers under way at once. Each keeps a link between two memory nodes busy."""
PLAN_EVERY = 16
"""The steps between two plans, and after a failure before the next; twice as many after the next failure, and so on."""
MAX_PAUSE = 1024
"""The most steps between two plans."""
MAX_REFUSALS = 3
"""A sequence stays where it is when memory nodes have refused a successor so often."""
MIN_LEFT = 64
"""A sequence that is going to end after fewer tokens is not worth a transfer."""


class MoveSchedule:
    """Gives running sequences other placements. This is the part of the scheduler that has no part in admission.

    In a *transfer*, a memory node copies whole blocks of a sequence to another one while the sequence goes on. A
    sequence is *redirected* when what it stores from now on lies on other memory nodes, at a moment when its last block
    is full; nothing is copied. Either ends in a *succession*: between two of its steps, the sequence sits out until the
    memory nodes have confirmed a successor, the same sequence under another id, which has the blocks where the new
    placement has them. Whatever fails before that leaves the sequence as it was.
    """

    def __init__(self, block_manager: BlockManager, ids: Iterator[int], cost: CostModel, ahead_blocks: int) -> None:
        """``ids`` are those of sequences."""
        self.moves = self.moved_blocks = self.failures = self.redirections = 0
        self._block_manager = block_manager
        self._ids = ids
        self._cost = cost
        self._ahead_blocks = ahead_blocks
        self._transfers: set[Transfer] = set()
        self._pause, self._steps = PLAN_EVERY, 0
        """The steps between two plans, and those since the last one."""

    # -- transfers

    def plan(self, running: Iterable[Sequence], changes: CacheChanges) -> None:
        """Begin the transfers that are worth it; called with every step."""
        manager = self._block_manager
        self._steps += 1
        is_due = self._steps >= (PLAN_EVERY if manager.draining else self._pause)
        if not is_due or not manager.can_move or len(self._transfers) >= MAX_TRANSFERS:
            return
        self._steps = 0
        nodes = {
            member: NodeLoad(manager.blocks_on(member), manager.free_on(member))
            for member in (*manager.members, *manager.draining)
        }
        if len(nodes) < 2:
            return
        sequences = list(running)
        movable = []
        for sequence in sequences:
            shares = sequence.placement.shares(sequence.stored)
            for member, tokens in shares.items():
                if member in nodes and tokens:
                    nodes[member].rows += 1
                    nodes[member].context += tokens
            for member in sequence.placement.members:
                if member in nodes and sequence.reserved < sequence.max_context:
                    nodes[member].kept += self._ahead_blocks
            lasts = sequence.max_context - sequence.context >= MIN_LEFT or bool(manager.draining)
            if lasts and self.can_begin(sequence):
                whole = {member: tokens // manager.block_tokens for member, tokens in shares.items()}
                movable.append(Movable(sequence, {member: n for member, n in whole.items() if n and member in nodes}))
        proposals = propose(
            nodes,
            movable,
            self._cost,
            rows=len(sequences),
            block_tokens=manager.block_tokens,
            draining=manager.draining,
            most=MAX_TRANSFERS - len(self._transfers),
        )
        for sequence, source, target, blocks in proposals:
            self.begin(sequence, source, target, blocks, changes)

    @staticmethod
    def can_begin(sequence: Sequence) -> bool:
        """Return whether blocks of a sequence can move now: it is not about to leave, and nothing of it moves yet."""
        is_staying = not (sequence.yielding or sequence.cancelled or sequence.refusals >= MAX_REFUSALS)
        return is_staying and sequence.transfer is None and sequence.successor is None and sequence.is_settled

    def begin(self, sequence: Sequence, source: int, target: int, blocks: int, changes: CacheChanges) -> None:
        """Begin to move the first whole blocks that a sequence has on one memory node to another one, if that has
        space for them."""
        size = self._block_manager.block_tokens
        table = sequence.order.ranges(sequence.placement, source, sequence.stored // size * size)
        ranges = part_of(table, 0, blocks * size)
        if len(sequence.placement.relocated(ranges, target).moved) > MAX_MOVED:
            return
        if self._block_manager.expect(sequence, target, blocks):
            sequence.transfer = Transfer(sequence, sequence.id, source, target, 0, blocks, ranges)
            self._transfers.add(sequence.transfer)
            changes.transfers.append(sequence.transfer)

    def transferred(self, transfer: Transfer, error: LaminaError | None) -> None:
        """Take in how a transfer has ended. The memory nodes have forgotten one that failed."""
        if transfer.sequence.transfer is not transfer:
            return
        if error is None:
            transfer.arrived = True
        else:
            self._fail()
            self._forget(transfer)

    def _fail(self) -> None:
        self.failures += 1
        self._pause, self._steps = min(2 * self._pause, MAX_PAUSE), 0

    def _forget(self, transfer: Transfer) -> None:
        self._transfers.discard(transfer)
        self._block_manager.expect_none(transfer.sequence)
        transfer.sequence.transfer = None

    # -- successions

    def switch(self, own: Iterable[Sequence], changes: CacheChanges) -> None:
        """Let sequences between two steps go on where their blocks have arrived, and away from members that are to be
        empty."""
        draining, size = self._block_manager.draining, self._block_manager.block_tokens
        for sequence in own:
            if sequence.successor is not None or not sequence.is_settled:
                continue
            transfer = sequence.transfer
            if transfer is not None and transfer.arrived:
                self._take_over(sequence, transfer, changes)
            elif not transfer and not draining.isdisjoint(sequence.placement.members):
                tokens = min(sequence.max_context, sequence.stored + self._ahead_blocks * size)
                self.redirect(sequence, tokens, changes)

    def redirect(self, sequence: Sequence, tokens: int, changes: CacheChanges) -> bool:
        """Let a sequence go on where there is space for ``tokens`` positions, or for a block more at least.

        Returns False, and changes nothing, if that is not possible: if there is none, or its last block is not full.
        """
        manager = self._block_manager
        stored, size = sequence.stored, manager.block_tokens
        if not manager.can_move or stored % size or not self.can_begin(sequence):
            return False
        for wanted in (tokens, min(tokens, stored + size)):
            place = manager.elsewhere(sequence, stored, wanted)
            if place is not None:
                return self._succeed(sequence, place, sequence.order, wanted, None, changes)
        return False

    def _take_over(self, sequence: Sequence, transfer: Transfer, changes: CacheChanges) -> None:
        """Let a sequence go on where its transfer has brought blocks. It keeps no space ahead, as both its ids would
        need that for a moment."""
        manager = self._block_manager
        place = sequence.placement.relocated(transfer.ranges, transfer.target)
        order = sequence.order.moved(transfer.ranges, transfer.source, transfer.target)
        tokens = min(sequence.reserved, manager.blocks_for(sequence.context) * manager.block_tokens)
        self._succeed(sequence, place, order, tokens, transfer, changes)

    def _succeed(
        self,
        sequence: Sequence,
        place: Placement,
        order: TableOrder,
        tokens: int,
        transfer: Transfer | None,
        changes: CacheChanges,
    ) -> bool:
        if not self._block_manager.succeed(sequence, place, sequence.stored, tokens):
            return False
        before = sequence.placement.shares(sequence.reserved)
        known = frozenset(member for member, held in before.items() if held)
        succession = Succession(sequence.id, known, sequence.stored, order, transfer)
        request = ReservationRequest(sequence, next(self._ids), place, tokens, succession=succession)
        sequence.successor = request
        changes.reservations.append(request)
        return True

    def confirm(self, request: ReservationRequest) -> CacheChanges:
        """The memory nodes know the successor of a sequence: it takes over."""
        sequence, succession = request.sequence, request.succession
        assert succession is not None
        changes = CacheChanges(released=[sequence.id])
        self._block_manager.go(sequence)
        sequence.id, sequence.placement, sequence.order = request.id, request.placement, succession.order
        sequence.reserved = sequence.confirmed = request.tokens
        sequence.successor = None
        if (transfer := succession.transfer) is None:
            self.redirections += 1
        else:
            self.moves += 1
            self.moved_blocks += transfer.blocks
            self._pause = PLAN_EVERY
            self._transfers.discard(transfer)
            sequence.transfer = None
            # What is published is so where it was. The copies are published with what comes next.
            moved = min(start for start, _ in transfer.ranges) // self._block_manager.block_tokens
            sequence.published = min(sequence.published, moved)
        return changes

    def refuse(self, request: ReservationRequest) -> CacheChanges:
        """A memory node does not take the successor of a sequence, which goes on as it was."""
        sequence, changes = request.sequence, CacheChanges()
        self._fail()
        sequence.refusals += 1
        self.drop(sequence, changes)
        return changes

    def drop(self, sequence: Sequence, changes: CacheChanges) -> None:
        """Nothing comes of a sequence's successor and transfer."""
        if sequence.successor is not None:
            changes.released.append(sequence.successor.id)
            self._block_manager.stay(sequence)
            sequence.successor = None
        if sequence.transfer is not None:
            changes.dropped.append(sequence.transfer)
            self._forget(sequence.transfer)

    def lose(self, member: int, running: Iterable[Sequence]) -> CacheChanges:
        """A memory node is gone: nothing moves there, or away from there, any more."""
        changes = CacheChanges()
        for sequence in running:
            successor, transfer = sequence.successor, sequence.transfer
            ends = () if transfer is None else (transfer.source, transfer.target)
            if member in ends or (successor is not None and member in successor.placement.all_members):
                self._fail()
                self.drop(sequence, changes)
        return changes

    # -- space

    def shortages(self, sequence: Sequence, tokens: int) -> Iterator[Mapping[int, int]]:
        """Return, by member id, the blocks that have to come free so that a sequence can go on: where it grows, and
        then on any other member."""
        manager = self._block_manager
        yield manager.shortage(sequence, tokens)
        if manager.can_move and sequence.refusals < MAX_REFUSALS and len(sequence.placement.moved) < MAX_MOVED:
            for member in sorted(manager.members, key=manager.free_on, reverse=True):
                yield {member: 1}

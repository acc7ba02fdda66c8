"""Carry out what the scheduler decided about the space on the memory nodes, on the node's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from lamina.compute.shard_control import ShardControl
from lamina.errors import CapacityError, LaminaError, NodeError, ProtocolError, TransportError
from lamina.front.sequence import CacheChanges, ReservationRequest, Succession
from lamina.front.transfers import TransferAsker
from lamina.wire.tenants import Reserved


class Space:
    """Tells the memory nodes, by member id, what of the scheduler's decisions concerns them.

    Those that are not among ``shards`` at a moment are lost, and so is what they held; the engine is told of it.
    ``on_answer`` gets every reservation with its answer: the number of leading positions that are shared, or the error
    of a memory node that refuses. ``transfers`` are carried out between the same nodes; None: nothing ever moves.
    """

    def __init__(
        self,
        shards: Mapping[int, ShardControl],
        block_tokens: int,
        on_answer: Callable[[ReservationRequest, int | CapacityError], None],
        transfers: TransferAsker | None = None,
    ) -> None:
        self._shards = shards
        self._block_tokens = block_tokens
        self._on_answer = on_answer
        self._transfers = transfers
        self._held: set[int] = set()
        """The ids of sequences that have space, or for which it was asked."""
        self._tasks: set[asyncio.Task[None]] = set()

    def apply(self, changes: CacheChanges) -> None:
        """Tell the memory nodes, in the order of `CacheChanges`."""
        for publication in changes.published:
            size, placement = self._block_tokens, publication.placement
            for member in placement.all_members:
                runs = publication.order.runs_on(placement, member, publication.keys, size, publication.first)
                for first, keys in runs if member in self._shards else ():
                    self._shards[member].publish(publication.id, keys, first)
        for sequence in changes.released:
            self._held.discard(sequence)
            for shard in self._shards.values():
                shard.release(sequence)
        for transfer in changes.dropped:
            self._moving.drop(transfer)
        released = set(changes.released)
        for request in changes.reservations:
            if request.id in released:
                continue  # admitted or extended, and preempted by another sequence before the step was complete
            if request.is_new:
                self._held.add(request.id)
            task = asyncio.get_running_loop().create_task(self._reserve(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        for transfer in changes.transfers:
            self._moving.begin(transfer)

    @property
    def _moving(self) -> TransferAsker:
        assert self._transfers is not None, "something moves"
        return self._transfers

    async def _reserve(self, request: ReservationRequest) -> None:
        try:
            self._on_answer(request, await self.reserve(request))
        except CapacityError as error:
            if request.id in self._held:
                self._on_answer(request, error)
        except LaminaError as error:
            if isinstance(error, (NodeError, TransportError)) and not isinstance(error, ProtocolError):
                return  # a memory node is lost, which is announced elsewhere
            self._on_answer(request, CapacityError(f"space cannot be reserved: {error}"))

    async def hold(self, request: ReservationRequest) -> int:
        """Reserve space that the scheduler did not request through `apply`; see `reserve`."""
        self._held.add(request.id)
        return await self.reserve(request)

    async def reserve(self, request: ReservationRequest) -> int:
        """Reserve what was requested on the memory nodes, and return the number of leading positions that they share.

        A prompt can share only what all its memory nodes still have, and each of them forgets blocks when it needs the
        space. If one has less than another, the reservation starts anew with the keys that all of them had. They share
        less each time, so this ends. Once the sequence is released, nothing more is requested. Raises CapacityError if
        a node has too little space; the others hold theirs until the release.
        """
        if request.succession is not None:
            return await self._succeed(request, request.succession)
        keys, place = request.keys, request.placement
        held = {
            member: tokens
            for member in place.all_members
            if (tokens := place.held(member, request.tokens)) > place.held(member, request.reserved)
        }
        while request.id in self._held:
            shards = {member: shard for member in held if (shard := self._shards.get(member)) is not None}
            if len(shards) < len(held):
                raise TransportError(f"a memory node of sequence {request.id} is lost")
            # Sent at once, so that a Release that is decided meanwhile comes after it.
            asked = [
                shards[member].reserve(
                    request.id, tokens, place.keys_on(member, keys, self._block_tokens), request.ahead
                )
                for member, tokens in held.items()
            ]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
            found = {
                member: answer.shared
                for member, answer in zip(held, answers, strict=True)
                if isinstance(answer, Reserved)
            }
            shared = place.usable(len(keys) * self._block_tokens, found)
            if all(tokens == place.held(member, shared) for member, tokens in found.items()):
                return shared
            if request.id in self._held:
                keys = keys[: shared // self._block_tokens]
                for shard in shards.values():
                    shard.release(request.id)
        return 0

    # -- blocks that move

    async def _succeed(self, request: ReservationRequest, succession: Succession) -> int:
        """Have the memory nodes make a sequence of another one and of what a transfer has brought."""
        place, transfer = request.placement, succession.transfer
        if request.id not in self._held:
            return 0
        asked, expected = [], []
        for member, tokens in place.shares(request.tokens).items():
            if not tokens:
                continue
            if (shard := self._shards.get(member)) is None:
                raise TransportError(f"a memory node of sequence {request.id} is lost")
            parent = succession.parent if member in succession.members else None
            without = brought = None
            if transfer is not None and member == transfer.source:
                without = transfer.first, transfer.blocks
            if transfer is not None and member == transfer.target:
                brought = self._moving.number(transfer)
            if parent is None and brought is None:
                asked.append(shard.reserve(request.id, tokens))
            else:
                asked.append(shard.derive(request.id, tokens, parent=parent, without=without, transfer=brought))
            expected.append(place.held(member, succession.stored))
        answers: list[Reserved] = await asyncio.gather(*asked)
        if any(answer.shared < tokens for answer, tokens in zip(answers, expected, strict=True)):
            found = [answer.shared for answer in answers]
            raise CapacityError(f"sequence {request.id} has {found} positions on its memory nodes, it needs {expected}")
        if transfer is not None:
            self._moving.taken(transfer)
        return succession.stored

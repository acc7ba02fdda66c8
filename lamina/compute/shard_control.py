"""Talk to one memory node, on the node's loop of a compute node: attaching, and the space of sequences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from msgspec import structs

from lamina.attention import KVLayout
from lamina.compute.shard_lane import ShardLane
from lamina.errors import (
    CapacityError,
    LaminaError,
    MoveError,
    NodeError,
    ProtocolError,
    SupersededError,
    TransportError,
)
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.transport import Address, Link, Region
from lamina.wire.admin import PeerStatus
from lamina.wire.codec import decode, encode
from lamina.wire.geometry import Geometry, HeadShard
from lamina.wire.questions import Questions
from lamina.wire.tenants import (
    MAX_KEYS,
    Attach,
    Attached,
    Detach,
    Expect,
    Expected,
    ForgetTransfer,
    FromMemory,
    Moved,
    MoveFailed,
    Publish,
    Refused,
    Release,
    Reserve,
    Reserved,
    Send,
    Void,
)

_ATTACH = "attach"
"""The key of the question that Attached answers. Questions that Reserved answers have their sequence as key."""
_ATTEMPTS = 5
"""How often a front asks for a later term before it takes for certain that another one does the same."""
_EXPECT, _MOVE = "expect", "move"
"""With the number of the transfer, the keys of the questions that Expected answers, and that Moved answers."""


class Arrival(NamedTuple):
    """Blocks that a memory node expects from another one.

    ``held`` is done when it holds the space for them, and raises MoveError if there is none; ``complete`` is done when
    they are all there, and raises MoveError if they will not come. The space is free again after an error.
    """

    held: asyncio.Future[Expected]
    complete: asyncio.Future[Moved]


class ShardControl:
    """Represents one memory node, member ``member`` of the cluster, on the node's loop.

    Its counterpart on the device's loop is ``lane``, which exists from `attach` on. When the link is lost, every
    question fails, the lane fails, and ``on_lost`` is called: in a node,
    `lamina.front.members.Members.lose`.
    """

    def __init__(
        self, member: int, name: str, link: Link, device: Device, on_lost: Callable[[int, NodeError], None]
    ) -> None:
        """Nothing may be delivered from ``link`` yet; its lanes will belong to ``device``."""
        self.member = member
        self.name = name
        self.link = link
        self.capacity_tokens = 0
        """Tokens of KV cache that the memory node has for this model's shard."""
        self.term = 0
        """The term in which this node is attached."""
        self._device = device
        self._there = Crossing(device.loop)
        self._on_lost_member = on_lost
        self._questions = Questions(link)
        self._lane: ShardLane | None = None
        self._kv_heads = 0
        self._error: NodeError | None = None
        link.deliver(on_message=self._on_message, on_lost=self._on_lost, lane_loop=device.loop)

    @property
    def is_attached(self) -> bool:
        """Return whether there is a lane."""
        return self._lane is not None

    @property
    def lane(self) -> ShardLane:
        """Return the counterpart on the device's loop."""
        assert self._lane is not None, "the memory node is attached first"
        return self._lane

    async def attach(
        self,
        shard: HeadShard,
        layout: KVLayout,
        *,
        tenant: str,
        token: bytes,
        model: str,
        dtype: str,
        slots: int,
        max_rows: int,
        member: int,
        front: int,
        term: int = 1,
        lease: float = 0.0,
        quota: int | None = None,
    ) -> ShardLane:
        """Ask the memory node for a cache of ``layout``, in ``quota`` bytes, for the heads of ``shard``.

        This node attaches as ``member`` of a tenant whose front is ``front``. A front attaches in ``term``, or in the
        next one of the tenant if that is later; then ``lease`` says for how many seconds the node keeps the tenant when
        the link is lost. Everything travels in the type ``dtype``, in ``slots`` batches of at most ``max_rows`` rows.
        Raises NodeError if the node refuses, SupersededError for a term that is over, or a place that is taken.
        """
        geometry = Geometry(shard.layers, dtype, slots, max_rows)
        outputs = Region(f"{self.name}.outputs", slots * geometry.output_bytes)
        try:
            exposed = self.link.expose(outputs)
        except TransportError as e:
            outputs.close()
            raise NodeError.lost("memory", self.name, e) from e
        attach = Attach(
            tenant=tenant,
            token=token,
            term=term,
            lease=lease,
            member=member,
            front=front,
            model=model,
            dtype=dtype,  # type: ignore[arg-type]
            kv_dtype=layout.dtype,  # type: ignore[arg-type]
            block_tokens=layout.block_tokens,
            layers=list(shard.layers),
            first_heads=[heads.start for heads in shard.kv],
            slots=slots,
            max_rows=max_rows,
            outputs=exposed,
            quota=quota,
        )
        try:
            attached, self.term = await self._ask_for_term(attach)
        except BaseException:
            outputs.close()
            raise
        self.capacity_tokens = attached.capacity_tokens
        self._kv_heads = len(shard.kv[0])
        self._lane = lane = ShardLane(self.name, self.link, self._device, shard, geometry, attached, outputs)
        self.link.deliver(on_message=self._on_message, on_tag=lane.on_tag, on_lost=self._on_lost)
        return lane

    async def _ask_for_term(self, attach: Attach) -> tuple[Attached, int]:
        """Attach; a front does so in a term that is later than the tenant's. Return the answer, and the term."""
        for _ in range(_ATTEMPTS):
            try:
                attached: Attached = await self._questions.ask(attach, _ATTACH)
            except SupersededError as error:
                if not attach.from_front or error.holder:
                    raise
                superseded = error
                attach = structs.replace(attach, term=error.term + 1)
            else:
                return attached, attach.term
        raise superseded

    def detach(self) -> None:
        """Tell the memory node, as the front, that the tenant ends. Nothing else may be asked afterwards."""
        if self._lane is not None:
            self._tell(Detach())

    def close(self) -> None:
        """Free the memory of this end. The link and the device's loop have ended."""
        if self._lane is not None:
            self._lane.close()

    def drop(self, reason: str) -> None:
        """End the link; to its owner, the memory node is lost."""
        self.link.abort(reason)
        self._on_lost(TransportError(reason))

    # -- the space of sequences

    def reserve(
        self, sequence: int, tokens: int, keys: Sequence[bytes] = (), ahead: int | None = None
    ) -> asyncio.Future[Reserved]:
        """Reserve space before any of it is used, or more than before; the answer says what is shared.

        ``keys`` name leading blocks that a new sequence may share, ``ahead`` says how far its layers can be apart (see
        `lamina.wire.tenants.Reserve`). The future raises CapacityError if there is no space. The question is sent
        before this returns, so that a later `release` cannot overtake it.
        """
        return self._questions.ask(Reserve(sequence=sequence, tokens=tokens, keys=_joined(keys), ahead=ahead), sequence)

    def derive(
        self,
        sequence: int,
        tokens: int,
        *,
        parent: int | None,
        without: tuple[int, int] | None = None,
        transfer: int | None = None,
    ) -> asyncio.Future[Reserved]:
        """Reserve space for a new sequence out of blocks that are there.

        It has the blocks that ``transfer`` has brought, then all of ``parent``, except a number of blocks from one on
        (``without``, (first, blocks)); and space up to ``tokens`` positions. The answer says how many positions are
        there. The parent keeps what it has, and nothing of it may be stored any more, once something of the new
        sequence is. The future raises CapacityError, and nothing has changed, if there is no space or something is not
        there.
        """
        derived = Reserve(sequence=sequence, tokens=tokens, parent=parent, without=without, transfer=transfer)
        return self._questions.ask(derived, sequence)

    def publish(self, sequence: int, keys: Sequence[bytes], first: int = 0) -> None:
        """Let others share the blocks of a sequence from its ``first`` one there, when all has arrived that they are to
        hold."""
        self._tell(Publish(sequence=sequence, keys=_joined(keys), first=first))

    def release(self, sequence: int) -> None:
        """Give back a sequence's space."""
        self._tell(Release(sequence=sequence))

    # -- blocks that move to another memory node

    def expect(self, transfer: int, blocks: int) -> Arrival:
        """Have the memory node hold space for ``blocks`` blocks that another one is going to send.

        ``transfer`` is a number that no other transfer has ever had, also of other fronts: see
        `lamina.wire.tenants.Expect`.
        """
        complete = self._questions.expect((_MOVE, transfer))
        return Arrival(self._questions.ask(Expect(transfer=transfer, blocks=blocks), (_EXPECT, transfer)), complete)

    def send(
        self, transfer: int, sequence: int, first: int, blocks: int, *, to: Address, name: str
    ) -> asyncio.Future[Moved]:
        """Have the memory node send blocks of a sequence to the memory node ``name``, which holds the space for them.

        ``first`` counts the blocks in this node's table of the sequence. All of them are full. The sequence goes on
        meanwhile. The future raises MoveError if they are not all there in the end.
        """
        message = Send(transfer=transfer, sequence=sequence, first=first, blocks=blocks, to=str(to), name=name)
        return self._questions.ask(message, (_MOVE, transfer))

    def forget(self, transfer: int) -> None:
        """Stop a transfer, and free the blocks that it brought here, unless a sequence has them. It may be over
        already. What was asked about it raises MoveError."""
        for kind in (_EXPECT, _MOVE):
            self._questions.refuse(
                MoveError(f"memory node {self.name}: transfer {transfer} was given up"), (kind, transfer)
            )
        self._tell(ForgetTransfer(transfer=transfer))

    def _tell(self, message: Publish | Release | ForgetTransfer | Detach) -> None:
        if not self.link.state.closed:  # a lost node has forgotten the sequence anyway
            self.link.send(encode(message))

    # -- what arrives

    def _on_message(self, plain: dict[str, object]) -> None:
        message = decode(plain, FromMemory)
        if isinstance(message, Void):
            self._there.post(self.lane.give_up, message.slot, message.step, message.sequences)
            return
        if isinstance(message, Expected | Moved | MoveFailed):
            self._on_move(message)
            return
        key = _ATTACH if isinstance(message, Attached) or message.sequence is None else message.sequence
        if isinstance(message, Refused):
            error = self._error_of(message)
            if self._questions.refuse(error, key):
                return
            if isinstance(error, SupersededError):
                self._fail(error)
            else:
                self._on_lost(TransportError(message.reason))  # the memory node ends the tenant
        elif not self._questions.answer(message, key):
            raise ProtocolError(f"{self.name} answers {plain.get('type')!r} to a question that was not asked")

    def _on_move(self, message: Expected | Moved | MoveFailed) -> None:
        """Take in what concerns a transfer. It may have been given up here meanwhile; then nobody waits for it."""
        transfer = message.transfer
        if isinstance(message, MoveFailed):
            error = MoveError(f"memory node {self.name}: {message.reason}")
            for kind in (_EXPECT, _MOVE):
                self._questions.refuse(error, (kind, transfer))
        else:
            self._questions.answer(message, (_EXPECT if isinstance(message, Expected) else _MOVE, transfer))

    def _error_of(self, refused: Refused) -> LaminaError:
        reason = f"memory node {self.name}: {refused.reason}"
        if refused.sequence is not None:
            return CapacityError(reason)
        if refused.term is not None:
            return SupersededError(reason, node=self.name, term=refused.term, holder=refused.holder)
        return NodeError(reason, node=self.name)

    def _on_lost(self, reason: TransportError) -> None:
        self._fail(NodeError.lost("memory", self.name, reason))

    def _fail(self, error: NodeError) -> None:
        if self._error is not None:
            return
        self._error = error
        self._questions.fail(error)
        if self._lane is not None:
            self._there.post(self._lane.fail, error)
        self._on_lost_member(self.member, error)

    def describe(self) -> PeerStatus:
        """Return what the status of the compute node says about this memory node."""
        lane = self.lane
        return PeerStatus.over(
            self.link, self.name, self._kv_heads, waited_s=lane.waited_s, bulk_waited_s=lane.bulk_waited_s
        )


def _joined(keys: Sequence[bytes]) -> bytes:
    return b"".join(keys[:MAX_KEYS])

"""Exchange carries with another compute node, on the device's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.compute.arrivals import Arrivals
from lamina.errors import NodeError, ProtocolError, TransportError
from lamina.transport import Lane, Link, Region, RemoteRegion
from lamina.wire import views
from lamina.wire.geometry import aligned
from lamina.wire.tags import Kind, Tag, pack

Shape = tuple[tuple[int, ...], torch.dtype]
"""The shape and type of a tensor that is handed over."""


class PeerLane:
    """Represents another compute node in steps.

    The memory of a slot's carry is written again only after the step has come back, so nothing has to be acknowledged.
    """

    def __init__(self, name: str, link: Link) -> None:
        self.name = name
        self.waited_s = 0.0
        """The seconds that steps have waited for carries."""
        self._link = link
        self._carry_bytes = 0
        self._own: Region | None = None
        self._remote: RemoteRegion
        self._out = memoryview(b"")
        self._arrivals = Arrivals()

    def open(self, own: Region, remote: RemoteRegion, carry_bytes: int) -> None:
        """Take carries in ``own`` and hand them over in ``remote``; both have ``carry_bytes`` for each slot.

        Raises ProtocolError if the two do not have the same size.
        """
        self._own, self._remote, self._carry_bytes = own, remote, carry_bytes
        self._out = views.outgoing(self._link, remote, own.nbytes)

    def close(self) -> None:
        """Free the memory of this end. The link has ended, and no step uses it any more."""
        if self._own is not None:
            self._own.close()
        self._out = memoryview(b"")

    @property
    def stale_tags(self) -> int:
        """Return the number of carries for which no step waited."""
        return self._arrivals.stale

    def stage(self, slot: int, values: Sequence[Tensor]) -> int:
        """Copy what the next slice starts from, within an operation of the device; return its size in bytes."""
        if self._arrivals.error is not None:
            raise self._arrivals.error
        start = stop = slot * self._carry_bytes
        for value in values:
            out = torch.frombuffer(self._out, dtype=torch.uint8, count=value.nbytes, offset=stop)
            out.view(value.dtype).view(value.shape).copy_(value)
            stop += aligned(value.nbytes)
        return stop - start

    def hand_over(self, slot: int, piece: int, step: int, nbytes: int) -> None:
        """Send the ``nbytes`` that were staged: what slice ``piece`` starts from."""
        if self._arrivals.error:
            raise self._arrivals.error
        start = slot * self._carry_bytes
        tag = pack(Kind.CARRY, slot, piece, step)
        try:
            self._link.write(Lane.DECODE, self._remote, start, [self._out[start : start + nbytes]], tag)
        except TransportError as error:
            if not self._link.state.closed:
                raise
            # The link has ended just now, in its own thread, which has not come to tell us.
            raise NodeError.lost("compute", self.name, error) from error

    async def take_over(self, slot: int, piece: int, step: int, shapes: Sequence[Shape]) -> list[Tensor]:
        """Wait for what slice ``piece`` starts from, and return it in tensors of these shapes and types.

        They lie where they arrived, and are good until the peer hands over to this node again in the slot.
        """
        now = asyncio.get_running_loop().time
        begun_s = now()
        await self._arrivals.wait(slot, pack(Kind.CARRY, slot, piece, step))
        self.waited_s += now() - begun_s
        assert self._own is not None, "opened before any step"
        values, start = [], slot * self._carry_bytes
        for shape, dtype in shapes:
            count = torch.Size(shape).numel()
            values.append(torch.frombuffer(self._own.buffer, dtype=dtype, count=count, offset=start).view(shape))
            start += aligned(count * dtype.itemsize)
        return values

    def on_tag(self, lane: Lane, packed: int) -> None:
        """Take in the tag of a write by the peer."""
        tag = Tag.unpack(packed)
        if tag.kind is not Kind.CARRY:
            raise ProtocolError(f"a tag of kind {tag.kind.name} from a compute node; expected {Kind.CARRY.name}")
        self._arrivals.arrive(tag.slot, packed)

    def fail(self, error: NodeError) -> None:
        """The peer is lost: every step that waits for it, or writes to it, raises ``error``."""
        self._arrivals.fail(error)

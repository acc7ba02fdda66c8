"""A compute node for tests, which says to a memory node what it is told to, also what no real one would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch
from torch import Tensor

from lamina.attention import LayerShape, Partial
from lamina.config import NodeConfig
from lamina.sim.cluster import SimCluster
from lamina.transport import Hello, Lane, Link, Options, Region
from lamina.wire import views
from lamina.wire.codec import Message, decode, encode
from lamina.wire.geometry import Geometry
from lamina.wire.plan import CHUNK_HEADER, ChunkHeader, StepPlan
from lamina.wire.tags import Kind, Tag, pack
from lamina.wire.tenants import (
    Attach,
    Attached,
    Expect,
    Expected,
    ForgetTransfer,
    FromMemory,
    Moved,
    MoveFailed,
    Refused,
    Release,
    Reserve,
    Reserved,
    Send,
    Void,
    short_name,
)
from lamina.wire.views import StepViews

PATIENCE_S = 30.0


class RawCompute:
    """One end of a link to a memory node. ``ended`` gives the reason, in the memory node's words if it has said any."""

    def __init__(self, link: Link, attach: Attach, outputs: Region) -> None:
        self.link = link
        self._geometry = g = Geometry(tuple(attach.layers), attach.dtype, attach.slots, attach.max_rows)
        self._dtype: torch.dtype = getattr(torch, attach.dtype)
        self._output_parts = views.parts(outputs.buffer, attach.slots, g.output_bytes, torch.uint8)
        self._replies: asyncio.Queue[Attached | Reserved | Refused] = asyncio.Queue()
        self._answers: asyncio.Queue[Tag] = asyncio.Queue()
        self.moves: asyncio.Queue[Expected | Moved | MoveFailed] = asyncio.Queue()
        """What the memory node says of transfers."""
        self.voids: list[Void] = []
        """The steps that the memory node has given up."""
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        link.deliver(
            on_message=self._on_message,
            on_tag=self._on_tag,
            on_lost=lambda error: self._end(str(error)),
        )
        link.send(encode(attach))

    async def attached(self) -> None:
        """Wait for the answer to the Attach. AssertionError with the reason of a refusal."""
        reply = asyncio.ensure_future(self._replies.get())
        await asyncio.wait({reply, self.ended}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        assert reply.done(), self.ended.result()
        self.remote = reply.result()
        assert isinstance(self.remote, Attached)

    def _on_message(self, plain: dict[str, Any]) -> None:
        message = decode(plain, FromMemory)
        if isinstance(message, Void):
            self.voids.append(message)
        elif isinstance(message, Expected | Moved | MoveFailed):
            self.moves.put_nowait(message)
        elif isinstance(message, Refused) and message.sequence is None:
            self._end(message.reason)
        else:
            self._replies.put_nowait(message)

    def _on_tag(self, lane: Lane, packed: int) -> None:
        tag = Tag.unpack(packed)
        if tag.kind is not Kind.CREDIT:
            self._answers.put_nowait(tag)

    def _end(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)

    async def end(self) -> str:
        """Wait until the memory node ends the link, and say why."""
        return await asyncio.wait_for(asyncio.shield(self.ended), PATIENCE_S)

    def send(self, message: Message) -> None:
        self.link.send(encode(message))

    async def reserve(self, sequence: int, tokens: int, **told: Any) -> Reserved | Refused:
        self.send(Reserve(sequence=sequence, tokens=tokens, **told))
        reply = await asyncio.wait_for(self._replies.get(), PATIENCE_S)
        assert not isinstance(reply, Attached)
        return reply

    def release(self, sequence: int) -> None:
        self.send(Release(sequence=sequence))

    async def move(self) -> Expected | Moved | MoveFailed:
        """What the memory node says next of a transfer."""
        return await asyncio.wait_for(self.moves.get(), PATIENCE_S)

    async def expect(self, transfer: int, blocks: int) -> Expected | Moved | MoveFailed:
        """Have space held, and return the answer."""
        self.send(Expect(transfer=transfer, blocks=blocks))
        return await self.move()

    def send_blocks(self, transfer: int, sequence: int, first: int, blocks: int, to: NodeConfig) -> None:
        """Have blocks sent to another memory node."""
        told = Send(transfer=transfer, sequence=sequence, first=first, blocks=blocks, to=str(to.address), name=to.name)
        self.send(told)

    def forget(self, transfer: int) -> None:
        self.send(ForgetTransfer(transfer=transfer))

    def tag(self, kind: int, slot: int = 0, layer: int = 0, step: int = 0, lane: Lane = Lane.DECODE) -> None:
        """Nothing but a tag."""
        packed = kind << 29 | slot << 24 | layer << 14 | step
        self.link.write(lane, self.remote.plans, 0, [], packed)

    def plan(self, step: int, told: StepPlan, *, slot: int = 0) -> None:
        tag = pack(Kind.PLAN, slot, 0, step)
        self.link.write(Lane.DECODE, self.remote.plans, self._geometry.plan_offset(slot, step), [told.packed], tag)

    def query(self, layer: int, step: int, q: Tensor, *, slot: int = 0) -> None:
        tag = pack(Kind.QUERY, slot, layer, step)
        self.link.write(Lane.DECODE, self.remote.queries, slot * self._geometry.query_bytes, [_bytes(q)], tag)

    def key_value(self, layer: int, step: int, k: Tensor, v: Tensor, *, slot: int = 0) -> None:
        tag = pack(Kind.KEY_VALUE, slot, layer, step)
        offset = slot * self._geometry.key_value_bytes
        self.link.write(Lane.DECODE, self.remote.keys_values, offset, [_bytes(k), _bytes(v)], tag)

    def chunk(self, buffer: int, sequence: int, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Keys and values of a prompt, over the bulk lane."""
        header = ChunkHeader(sequence, layer, start, len(k)).pack().ljust(CHUNK_HEADER, b"\0")
        offset, tag = buffer * self._geometry.chunk_bytes, pack(Kind.CHUNK, 0, 0, buffer)
        self.link.write(Lane.BULK, self.remote.chunks, offset, [header, _bytes(k), _bytes(v)], tag)

    async def answer(self) -> Tag:
        """The next answer's tag. AssertionError with the reason if the link ends first."""
        answer = asyncio.ensure_future(self._answers.get())
        await asyncio.wait({answer, self.ended}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            answer.cancel()
            raise AssertionError(self.ended.result() if self.ended.done() else "no answer has come")
        return answer.result()

    def output(self, told: StepPlan, layer: int, *, slot: int = 0) -> Tensor:
        """The attention that has arrived of the rows that are whole."""
        return self._views(told, layer, slot).whole.clone()

    def partial(self, told: StepPlan, layer: int, *, slot: int = 0) -> Partial:
        """The attention that has arrived of the other rows."""
        return Partial(*(part.clone() for part in self._views(told, layer, slot).partial))

    def _views(self, told: StepPlan, layer: int, slot: int) -> StepViews:
        empty, shape = torch.empty(1 << 16), self._geometry.layers[layer]
        return StepViews.of(told, shape, empty, empty, self._output_parts[slot], self._dtype)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def asking(
    layers: Sequence[LayerShape],
    *,
    tenant: str = "t",
    token: bytes = b"the tenant's own",
    term: int = 1,
    lease: float = 0.0,
    member: int = 0,
    front: int = 0,
    model: str = "m",
    dtype: str = "float32",
    kv_dtype: str | None = None,
    slots: int = 1,
    max_rows: int = 8,
    block_tokens: int = 16,
    quota: int | None = None,
    first_heads: Sequence[int] = (),
) -> dict[str, Any]:
    """What an Attach says, but for the outputs."""
    return {
        "layers": list(layers),
        "tenant": tenant,
        "token": token,
        "term": term,
        "lease": lease,
        "member": member,
        "front": front,
        "model": model,
        "dtype": dtype,
        "kv_dtype": kv_dtype or dtype,
        "slots": slots,
        "max_rows": max_rows,
        "block_tokens": block_tokens,
        "quota": quota,
        "first_heads": list(first_heads),
    }


@asynccontextmanager
async def raw_compute(
    cluster: SimCluster, layers: Sequence[LayerShape], *, node: str = "m0", **told: Any
) -> AsyncIterator[RawCompute]:
    """A compute node that is attached to a memory node. AssertionError with the reason if that refuses."""
    said = asking(layers, **told)
    name = f"{short_name(said['tenant'])}{said['member']}"
    address, network = cluster.config.find(node).address, cluster.world.network
    async with await network.connect(address, Hello("compute", name), Options(), deadline_s=PATIENCE_S) as link:
        geometry = Geometry(tuple(layers), said["dtype"], said["slots"], said["max_rows"])
        outputs = Region("outputs", said["slots"] * geometry.output_bytes)
        raw = RawCompute(link, Attach(**said, outputs=link.expose(outputs)), outputs)
        await raw.attached()
        yield raw

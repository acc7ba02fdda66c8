"""The compute node's end of the way to one memory node."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.attention import KVLayout, Partial
from lamina.compute.arrivals import Arrivals, fail
from lamina.compute.prompts import PromptKV
from lamina.errors import CapacityError, LaminaError, NodeError, ProtocolError, TransportError
from lamina.runtime.device import Device
from lamina.transport import Lane, Link, Region, RemoteRegion
from lamina.wire import views
from lamina.wire.admin import PeerStatus
from lamina.wire.codec import decode, encode
from lamina.wire.geometry import CHUNK_TOKENS, CHUNKS, Geometry, HeadShard
from lamina.wire.plan import CHUNK_HEADER, SECONDS, ChunkHeader, StepPlan, pack_plan
from lamina.wire.tags import Kind, Tag
from lamina.wire.tenants import MAX_KEYS, Attach, Attached, FromMemory, Publish, Refused, Release, Reserve, Reserved
from lamina.wire.views import StepViews


class RemoteShard:
    """The shard of the KV cache on one memory node, as the compute node uses it.

    Set-up and control belong to the node's loop, steps and prompts to the device's, where the lanes are. A batch slot's
    buffers are written again only after the answer to their contents has come back.
    """

    def __init__(
        self,
        name: str,
        link: Link,
        shard: HeadShard,
        layout: KVLayout,
        device: Device,
        *,
        dtype: str,
        slots: int,
        max_rows: int,
    ) -> None:
        """``layout`` is what the memory node stores, ``dtype`` the type of everything on the way there and back.

        The lanes of ``link`` have to belong to ``device``.
        """
        self._device = device
        self.name = name
        self.link = link
        self.capacity_tokens = 0
        self._heads = shard
        self._layout = layout
        self._geometry = g = Geometry(shard.layers, dtype, slots, max_rows)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._q_heads, self._kv_heads = [_span(heads) for heads in shard.q], [_span(heads) for heads in shard.kv]
        self._outputs = Region(f"{name}.outputs", slots * g.output_bytes)
        self._output_parts = views.parts(self._outputs.buffer, slots, g.output_bytes, torch.uint8)
        self._told: dict[int, StepPlan] = {}
        self._views: dict[int, dict[int, StepViews]] = {}
        """By slot and kind of layer, of the present step."""

        self._remote: Attached | None = None
        self._replies: dict[int | None, asyncio.Future[Attached | Reserved]] = {}
        self._arrivals = Arrivals()
        self._idle_chunks: asyncio.Queue[int] = asyncio.Queue()
        for i in range(CHUNKS):
            self._idle_chunks.put_nowait(i)
        self._to_ship: asyncio.Queue[tuple[PromptKV, int, int, int, int]] = asyncio.Queue()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        link.deliver(on_tag=self._on_tag, on_message=self._on_message, on_lost=self._on_lost)

    @property
    def stale_tags(self) -> int:
        """Answers that came to nobody's question."""
        return self._arrivals.stale

    # -- set-up and control

    async def attach(self, tenant: str, model: str, *, compute: int = 0, quota: int | None = None) -> None:
        """Ask the memory node for its cache, of ``quota`` bytes, as compute node number ``compute`` of a tenant, and
        learn where to write. NodeError if it refuses."""
        attach = Attach(
            tenant=tenant,
            compute=compute,
            model=model,
            dtype=self._geometry.dtype,  # type: ignore[arg-type]
            kv_dtype=self._layout.dtype,  # type: ignore[arg-type]
            block_tokens=self._layout.block_tokens,
            layers=list(self._heads.layers),
            slots=self._geometry.slots,
            max_rows=self._geometry.max_rows,
            outputs=self.link.expose(self._outputs),
            quota=quota,
        )
        attached = await self._ask(None, attach)
        assert isinstance(attached, Attached)
        self._remote = attached
        self.capacity_tokens = attached.capacity_tokens
        g, slots, own = self._geometry, self._geometry.slots, self._dtype
        self._queries = views.outgoing(self.link, attached.queries, slots * g.query_bytes)
        self._keys_values = views.outgoing(self.link, attached.keys_values, slots * g.key_value_bytes)
        self._chunks = views.outgoing(self.link, attached.chunks, CHUNKS * g.chunk_bytes)
        self._query_parts = views.parts(self._queries, slots, g.query_bytes, own)
        self._key_value_parts = views.parts(self._keys_values, slots, g.key_value_bytes, own)
        self._chunk_parts = views.parts(self._chunks, CHUNKS, g.chunk_bytes, own)

    async def reserve(self, sequence: int, tokens: int, keys: Sequence[bytes] = (), ahead: int | None = None) -> int:
        """Have space set aside before any of it is used, or more than before. CapacityError if there is none.

        ``keys`` name leading blocks that a new sequence may share, ``ahead`` says how far its layers can be apart (see
        `lamina.wire.tenants.Reserve`); returns how many positions of it were found.
        """
        asked = Reserve(sequence=sequence, tokens=tokens, keys=_joined(keys), ahead=ahead)
        reserved = await self._ask(sequence, asked)
        assert isinstance(reserved, Reserved)
        return reserved.shared

    def publish(self, sequence: int, keys: Sequence[bytes]) -> None:
        """Let others share the leading blocks of a sequence, when all has arrived that they are to hold."""
        self._check()
        self.link.send(encode(Publish(sequence=sequence, keys=_joined(keys))))

    def release(self, sequence: int) -> None:
        """Give back a sequence's space."""
        self._check()
        self.link.send(encode(Release(sequence=sequence)))

    async def _ask(self, key: int | None, message: Attach | Reserve) -> Attached | Reserved:
        self._check()
        self._replies[key] = reply = asyncio.get_running_loop().create_future()
        try:
            self.link.send(encode(message))
            answer: Attached | Reserved = await reply
            return answer
        finally:
            del self._replies[key]

    # -- a step, layer by layer

    def plan(self, slot: int, step: int, told: StepPlan, *, asks: bool = True) -> None:
        """Say which rows the next step of ``slot`` consists of: to the memory node, too, if this node ``asks`` it
        anything in this step and does not only get an answer."""
        assert self._remote is not None
        self._told[slot] = told
        self._views[slot] = {}
        if not asks:
            return
        tag = Tag(Kind.PLAN, slot, 0, step)
        self._write(Lane.DECODE, self._remote.plans, slot * self._geometry.plan_bytes, pack_plan(told), tag)

    def send_query(self, slot: int, layer: int, step: int, q: Tensor) -> None:
        """Send this node's heads of q [rows, Hq, Dk]: of its rows, in the order of its plan."""
        assert self._remote is not None
        own = self._view(slot, layer)
        own.q.copy_(q[:, self._q_heads[layer]])
        offset = slot * self._geometry.query_bytes
        source = self._queries[offset : offset + own.q_bytes]
        self._write(Lane.DECODE, self._remote.queries, offset, source, Tag(Kind.QUERY, slot, layer, step))

    def send_key_value(self, slot: int, layer: int, step: int, k: Tensor, v: Tensor) -> None:
        """Send this node's heads of k [rows, Hkv, Dk] and v [rows, Hkv, Dv]: of the rows that it stores."""
        assert self._remote is not None
        own, heads = self._view(slot, layer), self._kv_heads[layer]
        own.k.copy_(k[:, heads])
        own.v.copy_(v[:, heads])
        offset = slot * self._geometry.key_value_bytes
        source = self._keys_values[offset : offset + own.key_value_bytes]
        self._write(Lane.DECODE, self._remote.keys_values, offset, source, Tag(Kind.KEY_VALUE, slot, layer, step))

    async def answered(self, slot: int, layer: int, step: int) -> None:
        """Wait until the output of a layer has arrived, whoever sent the query; NodeError if the node is lost."""
        await self._arrivals.wait(slot, Tag(Kind.OUTPUT, slot, layer, step).pack())

    def output(self, slot: int, layer: int) -> Tensor:
        """The attention that has arrived of the rows that are whole: o [rows, own Hq, Dv].

        It lies where it arrived, and is good until the slot's next query is sent.
        """
        return self._view(slot, layer).whole

    def partials(self, slot: int, layer: int) -> Partial:
        """The partials that have arrived of the other rows; good for as long."""
        return self._view(slot, layer).partial

    def attention_s(self, slot: int) -> float:
        """Seconds that the attention of the slot's step has taken so far, as its last answer says."""
        (seconds,) = SECONDS.unpack_from(self._outputs.buffer, slot * self._geometry.output_bytes)
        return float(seconds)

    def heads(self, layer: int) -> slice:
        """The query heads of a layer that this node has."""
        return self._q_heads[layer]

    def _view(self, slot: int, layer: int) -> StepViews:
        of_slot, kind = self._views[slot], self._geometry.kinds[layer]
        if kind not in of_slot:
            of_slot[kind] = StepViews.of(
                self._told[slot],
                self._heads.layers[layer],
                self._query_parts[slot],
                self._key_value_parts[slot],
                self._output_parts[slot],
                self._dtype,
            )
        return of_slot[kind]

    # -- prompts, on the bulk lane

    def ship(self, prompt: PromptKV, layer: int, start: int, count: int, at: int) -> None:
        """Queue keys and values of a prompt, for position ``at`` there; ``run`` sends them as buffers come free."""
        for done in range(0, count, CHUNK_TOKENS):
            self._to_ship.put_nowait((prompt, layer, start + done, min(CHUNK_TOKENS, count - done), at + done))

    async def run(self) -> None:
        """Send what ``ship`` queued, until cancelled."""
        assert self._remote is not None
        while True:
            prompt, layer, start, count, at = await self._to_ship.get()
            i = await self._idle_chunks.get()
            nbytes = await self._device.compute(self._stage_chunk, i, prompt, layer, start, count, at)
            offset = i * self._geometry.chunk_bytes
            source = self._chunks[offset : offset + nbytes]
            self._write(Lane.BULK, self._remote.chunks, offset, source, Tag(Kind.CHUNK, 0, layer, i))

    def _stage_chunk(self, i: int, prompt: PromptKV, layer: int, start: int, count: int, at: int) -> int:
        offset = i * self._geometry.chunk_bytes
        header = ChunkHeader(prompt.sequence, layer, at, count).pack()
        self._chunks[offset : offset + len(header)] = header
        first = CHUNK_HEADER // self._geometry.item
        k, v = views.key_value(self._chunk_parts[i], self._heads.layers[layer], count, first)
        own_k, own_v = prompt.read(layer, start, count, self._heads.kv[layer])
        k.copy_(own_k)
        v.copy_(own_v)
        return CHUNK_HEADER + k.nbytes + v.nbytes

    # -- arrivals

    def _on_tag(self, lane: Lane, packed: int) -> None:
        tag = Tag.unpack(packed)
        if tag.kind is Kind.CREDIT:
            if tag.step >= CHUNKS:
                raise ProtocolError(f"credit for bulk buffer {tag.step}; there are {CHUNKS}")
            self._idle_chunks.put_nowait(tag.step)
            return
        self._arrivals.arrive(tag.slot, packed)

    def _on_message(self, plain: dict[str, object]) -> None:
        message = decode(plain, FromMemory)
        key = None if isinstance(message, Attached) else message.sequence
        reply = self._replies.get(key)
        if reply is None and isinstance(message, Refused):
            self._on_lost(TransportError(message.reason))  # it cannot go on
            return
        if reply is None:
            raise ProtocolError(f"{self.name} answers {plain.get('type')!r} to a question that nobody asked")
        if reply.done():
            return
        if isinstance(message, Refused):
            reason = f"memory node {self.name}: {message.reason}"
            error: LaminaError = NodeError(reason, node=self.name) if key is None else CapacityError(reason)
            reply.set_exception(error)
        else:
            reply.set_result(message)

    def _on_lost(self, error: TransportError) -> None:
        lost = self._lost_by(error)
        fail([self.lost, *self._replies.values()], lost)
        self._device.loop.call_soon_threadsafe(self._arrivals.fail, lost)

    def _lost_by(self, error: TransportError) -> NodeError:
        return NodeError(f"memory node {self.name} was lost: {error}", node=self.name)

    def _write(self, lane: Lane, remote: RemoteRegion, offset: int, source: bytes | memoryview, tag: Tag) -> None:
        self._check()
        try:
            self.link.write(lane, remote, offset, [source], tag.pack())
        except TransportError as error:
            if not self.link.state.closed:
                raise
            # The link has ended just now, in its own thread, which has not come to tell us.
            raise self._lost_by(error) from error

    def _check(self) -> None:
        """Raise the NodeError of a memory node that is lost."""
        if self.lost.done():
            self.lost.result()

    async def watch(self) -> None:
        """Wait until the memory node is lost, and raise the NodeError that says so."""
        await self.lost

    def describe(self) -> PeerStatus:
        """What the status of the compute node says about this memory node."""
        return PeerStatus.over(self.link, self.name, len(self._heads.kv[0]))


def _joined(keys: Sequence[bytes]) -> bytes:
    return b"".join(keys[:MAX_KEYS])


def _span(heads: range) -> slice:
    return slice(heads.start, heads.stop)

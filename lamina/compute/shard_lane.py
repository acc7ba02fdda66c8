"""Send steps, layer by layer, and prompts to one memory node, on the device's loop of a compute node."""

from __future__ import annotations

import torch
from torch import Tensor

from lamina.attention import LayerShape, Partial
from lamina.compute.arrivals import Arrivals
from lamina.compute.prompts import PromptKV
from lamina.errors import NodeError, ProtocolError, TransportError
from lamina.runtime.device import Device
from lamina.runtime.mailbox import Mailbox
from lamina.transport import Lane, Link, Region, RemoteRegion
from lamina.wire import views
from lamina.wire.geometry import CHUNK_TOKENS, CHUNKS, Geometry, HeadShard
from lamina.wire.plan import CHUNK_HEADER, SECONDS, ChunkHeader, StepPlan
from lamina.wire.tags import Kind, Tag, slot_of
from lamina.wire.tenants import Attached
from lamina.wire.views import StepViews


class ShardLane:
    """Gives steps access to the shard of the KV cache on one memory node.

    The methods named ``stage_...`` copy into what will be sent; they are called within operations of the device. The
    buffers of a batch slot are written again only after the answer to their contents has come back.
    """

    def __init__(
        self, name: str, link: Link, shard: HeadShard, geometry: Geometry, attached: Attached, outputs: Region
    ) -> None:
        """``attached`` says where to write, and ``outputs`` is where the answers come."""
        self.name = name
        self._link = link
        self._heads = shard
        self._geometry = g = geometry
        self._remote = attached
        self._outputs = outputs
        self._dtype: torch.dtype = getattr(torch, g.dtype)
        self._q_heads, self._kv_heads = [_span(heads) for heads in shard.q], [_span(heads) for heads in shard.kv]
        self._queries = views.outgoing(link, attached.queries, g.slots * g.query_bytes)
        self._keys_values = views.outgoing(link, attached.keys_values, g.slots * g.key_value_bytes)
        self._chunks = views.outgoing(link, attached.chunks, CHUNKS * g.chunk_bytes)
        self._query_parts = views.parts(self._queries, g.slots, g.query_bytes, self._dtype)
        self._key_value_parts = views.parts(self._keys_values, g.slots, g.key_value_bytes, self._dtype)
        self._chunk_parts = views.parts(self._chunks, CHUNKS, g.chunk_bytes, self._dtype)
        self._output_parts = views.parts(outputs.buffer, g.slots, g.output_bytes, torch.uint8)
        self._plans: dict[int, StepPlan] = {}
        self._views: dict[int, dict[int, StepViews]] = {}
        """The views of the present step, by slot and kind of layer."""
        self._current: dict[int, StepViews] = {}
        """The views of the layer whose query was staged last, by slot."""
        self._arrivals = Arrivals()
        self._idle_chunks: Mailbox[int] = Mailbox()
        for i in range(CHUNKS):
            self._idle_chunks.put(i)
        self._to_send: Mailbox[tuple[PromptKV, int, int, int, int]] = Mailbox()

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """Return the attention of each layer, over the heads that this memory node has."""
        return self._heads.layers

    @property
    def stale_tags(self) -> int:
        """Return the number of answers for which no step waited."""
        return self._arrivals.stale

    # -- a step, layer by layer

    def plan(self, slot: int, step: int, plan: StepPlan, *, asks: bool = True) -> None:
        """Begin a step of ``slot`` with these rows.

        The memory node gets the plan only if this node ``asks`` it anything in the step; a node that only receives
        answers sends no plan.
        """
        self._plans[slot] = plan
        self._views[slot] = {}
        if asks:
            tag = Tag(Kind.PLAN, slot, 0, step)
            self._write(Lane.DECODE, self._remote.plans, slot * self._geometry.plan_bytes, plan.packed, tag)

    def stage_query(self, slot: int, layer: int, q: Tensor) -> None:
        """Copy this node's heads of q [rows, Hq, Dk], of its rows in the order of its plan."""
        view, heads = self._view(slot, layer), self._q_heads[layer]
        self._current[slot] = view
        view.q.copy_(q if q.shape[1] == heads.stop - heads.start else q[:, heads])

    def send_query(self, slot: int, layer: int, step: int) -> None:
        """Send the query that was staged."""
        offset = slot * self._geometry.query_bytes
        source = self._queries[offset : offset + self._current[slot].q_bytes]
        self._write(Lane.DECODE, self._remote.queries, offset, source, Tag(Kind.QUERY, slot, layer, step))

    def stage_key_value(self, slot: int, layer: int, k: Tensor, v: Tensor) -> None:
        """Copy this node's heads of k [rows, Hkv, Dk] and v [rows, Hkv, Dv], of the rows that it stores."""
        own, heads = self._current[slot], self._kv_heads[layer]
        if k.shape[1] != heads.stop - heads.start:
            k, v = k[:, heads], v[:, heads]
        own.k.copy_(k)
        own.v.copy_(v)

    def send_key_value(self, slot: int, layer: int, step: int) -> None:
        """Send the keys and values that were staged."""
        offset = slot * self._geometry.key_value_bytes
        source = self._keys_values[offset : offset + self._current[slot].key_value_bytes]
        self._write(Lane.DECODE, self._remote.keys_values, offset, source, Tag(Kind.KEY_VALUE, slot, layer, step))

    async def answered(self, slot: int, layer: int, step: int) -> None:
        """Wait until the output of a layer has arrived, to a query of this node or of another compute node.

        Raises NodeError if the memory node is lost.
        """
        await self._arrivals.wait(slot, Tag(Kind.OUTPUT, slot, layer, step).pack())

    def output(self, slot: int, layer: int) -> Tensor:
        """Return the attention that has arrived for the rows that are whole: o [rows, own Hq, Dv].

        It lies where it arrived, and stays valid until the slot's next query is sent.
        """
        return self._view(slot, layer).whole

    def partials(self, slot: int, layer: int) -> Partial:
        """Return the partials that have arrived for the other rows; they stay valid as long as `output`."""
        return self._view(slot, layer).partial

    def attention_s(self, slot: int) -> float:
        """Return the seconds that the attention of the slot's step has taken so far, as its last answer says."""
        (seconds,) = SECONDS.unpack_from(self._outputs.buffer, slot * self._geometry.output_bytes)
        return float(seconds)

    def heads(self, layer: int) -> slice:
        """Return the query heads of a layer that this node has."""
        return self._q_heads[layer]

    def _view(self, slot: int, layer: int) -> StepViews:
        own, kind = self._views[slot], self._geometry.kinds[layer]
        if kind not in own:
            own[kind] = StepViews.of(
                self._plans[slot],
                self._heads.layers[layer],
                self._query_parts[slot],
                self._key_value_parts[slot],
                self._output_parts[slot],
                self._dtype,
            )
        return own[kind]

    # -- prompts, on the bulk lane

    def queue_prompt(self, prompt: PromptKV, layer: int, start: int, count: int, at: int) -> None:
        """Queue keys and values of a prompt, for position ``at`` there; `send_prompts` sends them."""
        for done in range(0, count, CHUNK_TOKENS):
            self._to_send.put((prompt, layer, start + done, min(CHUNK_TOKENS, count - done), at + done))

    async def send_prompts(self, device: Device) -> None:
        """Send what `queue_prompt` queued as buffers come free, until cancelled. Nothing of a sequence that is over."""
        while True:
            prompt, layer, start, count, at = await self._to_send.get()
            if prompt.is_over:
                continue
            i = await self._idle_chunks.get()
            nbytes, _ = await device.run(self._stage_chunk, i, prompt, layer, start, count, at)
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

    # -- what arrives

    def on_tag(self, lane: Lane, packed: int) -> None:
        """Take in the tag of a write by the memory node."""
        if lane is Lane.DECODE:  # the answer to a layer: nothing of it is unpacked but the slot
            self._arrivals.arrive(slot_of(packed), packed)
            return
        tag = Tag.unpack(packed)
        if tag.kind is not Kind.CREDIT or tag.step >= CHUNKS:
            raise ProtocolError(f"{tag} on the bulk lane; expected a credit for a buffer below {CHUNKS}")
        self._idle_chunks.put(tag.step)

    def fail(self, error: NodeError) -> None:
        """The memory node is lost: every step that waits for it, or writes to it, raises ``error``."""
        self._arrivals.fail(error)

    def _write(self, lane: Lane, remote: RemoteRegion, offset: int, source: bytes | memoryview, tag: Tag) -> None:
        if self._arrivals.error:
            raise self._arrivals.error
        try:
            self._link.write(lane, remote, offset, [source], tag.pack())
        except TransportError as error:
            if not self._link.state.closed:
                raise
            # The link has ended just now, in its own thread, and that news is still on its way.
            raise NodeError.lost("memory", self.name, error) from error


def _span(heads: range) -> slice:
    return slice(heads.start, heads.stop)

"""Send steps, layer by layer, and prompts to one memory node, on the device's loop of a compute node."""

from __future__ import annotations

import torch
from torch import Tensor

from lamina.attention import LayerShape, Partial
from lamina.compute.arrivals import Arrivals
from lamina.compute.prompts import PromptKV
from lamina.errors import NodeError, ProtocolError, SpaceLostError, TransportError
from lamina.runtime.device import Device
from lamina.runtime.mailbox import Mailbox
from lamina.runtime.spans import ANSWER, QUERY, Activity
from lamina.transport import Lane, Link, Region, RemoteRegion
from lamina.wire import views
from lamina.wire.geometry import CHUNK_TOKENS, CHUNKS, Geometry, HeadShard
from lamina.wire.plan import CHUNK_HEADER, SECONDS, ChunkHeader, StepPlan
from lamina.wire.tags import Kind, Tag, pack, place_of, slot_of
from lamina.wire.tenants import Attached
from lamina.wire.views import StepViews


class ShardLane:
    """Gives steps access to the shard of the KV cache on one memory node, and sends prompts there."""

    def __init__(
        self,
        name: str,
        link: Link,
        device: Device,
        shard: HeadShard,
        geometry: Geometry,
        attached: Attached,
        outputs: Region,
    ) -> None:
        """``attached`` says where to write, and ``outputs`` is where the answers come. Lanes of ``link`` belong to
        ``device``."""
        self.name = name
        self.waited_s = self.bulk_waited_s = 0.0
        """The seconds that steps have waited for answers, and prompts for a buffer."""
        self._device = device
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

    def close(self) -> None:
        """Free the memory of this end. The link has ended, and no step uses it any more."""
        self._outputs.close()
        self._queries = self._keys_values = self._chunks = memoryview(b"")
        for parts in (self._query_parts, self._key_value_parts, self._chunk_parts, self._output_parts):
            parts.clear()

    def begin(self, slot: int, step: int, plan: StepPlan, *, asks: bool) -> ShardStep:
        """Begin a step of ``slot`` with these rows.

        The memory node gets the plan only if this node ``asks`` it anything in the step; a node that only receives
        answers sends no plan.
        """
        if asks:
            offset = self._geometry.plan_offset(slot, step)
            self._write(Lane.DECODE, self._remote.plans, offset, plan.packed, pack(Kind.PLAN, slot, 0, step))
        return ShardStep(self, slot, step, plan)

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
            begun_s = device.loop.time()
            i = await self._idle_chunks.get()
            self.bulk_waited_s += device.loop.time() - begun_s
            self._require_memory()
            nbytes, _ = await device.run(self._stage_chunk, i, prompt, layer, start, count, at)
            offset = i * self._geometry.chunk_bytes
            source = self._chunks[offset : offset + nbytes]
            self._write(Lane.BULK, self._remote.chunks, offset, source, pack(Kind.CHUNK, 0, layer, i))

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
            if (recorder := self._device.recorder) is not None:
                recorder.mark(ANSWER, place_of(packed, self.name), self._device.loop.time(), Activity.ARRIVED)
            self._arrivals.arrive(slot_of(packed), packed)
            return
        tag = Tag.unpack(packed)
        if tag.kind is not Kind.CREDIT or tag.step >= CHUNKS:
            raise ProtocolError(f"{tag} on the bulk lane; expected a credit for a buffer below {CHUNKS}")
        self._idle_chunks.put(tag.step)

    def give_up(self, slot: int, step: int, sequences: list[int]) -> None:
        """The memory node has given up a step, as it does not have all of some sequences: the step raises
        SpaceLostError."""
        self._arrivals.give_up(slot, step, SpaceLostError(self.name, sequences))

    def fail(self, error: NodeError) -> None:
        """The memory node is lost: every step that waits for it, or writes to it, raises ``error``."""
        self._arrivals.fail(error)

    def _require_memory(self) -> None:
        """Raise the error of the loss, after which the memory of this end is freed, also that of answers."""
        if self._arrivals.error is not None:
            raise self._arrivals.error

    def _write(self, lane: Lane, remote: RemoteRegion, offset: int, source: bytes | memoryview, tag: int) -> None:
        self._require_memory()
        try:
            self._link.write(lane, remote, offset, [source], tag)
        except TransportError as error:
            if not self._link.state.closed:
                raise
            # The link has ended just now, in its own thread, and that news is still on its way.
            raise NodeError.lost("memory", self.name, error) from error


class ShardStep:
    """Takes the rows of one step to one memory node and back, layer by layer. `ShardLane.begin` makes it.

    The methods named ``stage_...`` copy into what will be sent; they are called within operations of the device. The
    buffers of a batch slot are written again only after the answer to their contents has come back.
    """

    __slots__ = ("_lane", "_plan", "_slot", "_step", "_views", "_views_by_kind")

    def __init__(self, lane: ShardLane, slot: int, step: int, plan: StepPlan) -> None:
        self._plan = plan
        self._lane = lane
        self._slot = slot
        self._step = step
        self._views: StepViews
        """Those of the layer whose query was staged last."""
        self._views_by_kind: dict[int, StepViews] = {}

    def stage_query(self, layer: int, q: Tensor) -> None:
        """Copy q [rows, Hq, Dk], of all heads or of the memory node's alone, of its rows in the order of its plan."""
        self._views = views = self._views_of(layer)
        heads = self._lane._q_heads[layer]
        views.q.copy_(q if q.shape[1] == heads.stop - heads.start else q[:, heads])

    def send_query(self, layer: int) -> None:
        """Send the query that was staged."""
        lane, slot = self._lane, self._slot
        offset = slot * lane._geometry.query_bytes
        source = lane._queries[offset : offset + self._views.q_bytes]
        tag = pack(Kind.QUERY, slot, layer, self._step)
        if (recorder := lane._device.recorder) is not None:
            recorder.mark(QUERY, place_of(tag, lane.name), lane._device.loop.time(), Activity.SENT)
        lane._write(Lane.DECODE, lane._remote.queries, offset, source, tag)

    def stage_key_value(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Copy k [rows, Hkv, Dk] and v [rows, Hkv, Dv], of all heads or of the memory node's alone, of the rows that
        it stores."""
        heads, views = self._lane._kv_heads[layer], self._views
        if k.shape[1] != heads.stop - heads.start:
            k, v = k[:, heads], v[:, heads]
        views.k.copy_(k)
        views.v.copy_(v)

    def send_key_value(self, layer: int) -> None:
        """Send the keys and values that were staged."""
        lane, slot = self._lane, self._slot
        offset = slot * lane._geometry.key_value_bytes
        source = lane._keys_values[offset : offset + self._views.key_value_bytes]
        tag = pack(Kind.KEY_VALUE, slot, layer, self._step)
        lane._write(Lane.DECODE, lane._remote.keys_values, offset, source, tag)

    async def answered(self, layer: int) -> float:
        """Wait until the output of a layer has arrived, to a query of this node or of another compute node.

        Returns the seconds that the step's attention has taken so far on the memory node. Raises NodeError if the
        memory node is lost.
        """
        lane, slot, device = self._lane, self._slot, self._lane._device
        tag, recorder = pack(Kind.OUTPUT, slot, layer, self._step), device.recorder
        begun_s = device.loop.time()
        await lane._arrivals.wait(slot, tag)
        lane.waited_s += (ended_s := device.loop.time()) - begun_s
        if recorder is not None and recorder is device.recorder:  # else it is being read already
            recorder.add(ANSWER, place_of(tag, lane.name), begun_s, ended_s, Activity.WAIT)
        seconds: float
        (seconds,) = SECONDS.unpack_from(lane._outputs.buffer, slot * lane._geometry.output_bytes)
        return seconds

    def output(self, layer: int) -> Tensor:
        """Return the attention that has arrived for the rows that are whole: o [rows, own Hq, Dv].

        It lies where it arrived, and stays valid until the slot's next keys and values are sent, or its next query if
        the step stores none: the answer to that takes its place.
        """
        return self._views_of(layer).whole

    def partials(self, layer: int) -> Partial:
        """Return the partials that have arrived for the other rows; they stay valid as long as `output`."""
        return self._views_of(layer).partial

    def heads(self, layer: int) -> slice:
        """Return the query heads of a layer that the memory node has."""
        return self._lane._q_heads[layer]

    def kv_heads(self, layer: int) -> slice:
        """Return the KV heads of a layer that the memory node has."""
        return self._lane._kv_heads[layer]

    def _views_of(self, layer: int) -> StepViews:
        lane, slot = self._lane, self._slot
        lane._require_memory()
        kind = lane._geometry.kinds[layer]
        views = self._views_by_kind.get(kind)
        if views is None:
            views = self._views_by_kind[kind] = StepViews.of(
                self._plan,
                lane._heads.layers[layer],
                lane._query_parts[slot],
                lane._key_value_parts[slot],
                lane._output_parts[slot],
                lane._dtype,
            )
        return views


def _span(heads: range) -> slice:
    return slice(heads.start, heads.stop)

"""A memory node's end of a link: what one compute node sends to its tenant's cache, and attention over that."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import torch

from lamina.attention import Partial, Plan, Rows, Run
from lamina.errors import CapacityError, ProtocolError, TransportError
from lamina.memory.tenant import Tenant
from lamina.runtime.device import Device
from lamina.runtime.spans import Place
from lamina.transport import Lane, Link, Region
from lamina.wire import views
from lamina.wire.codec import FRONT, decode, encode
from lamina.wire.geometry import CHUNK_TOKENS, CHUNKS
from lamina.wire.plan import CHUNK_HEADER, SECONDS, ChunkHeader, StepPlan, unpack_plan
from lamina.wire.tags import Kind, Tag
from lamina.wire.tenants import Attach, Attached, FromCompute, Publish, Refused, Release, Reserve, Reserved
from lamina.wire.views import StepViews


@dataclass
class _Slot:
    """One batch in flight, as the memory node sees it on one link: how far its present step is."""

    step: int = -1
    layer: int = -1
    """Of the last query."""
    planning: bool = False
    """From the arrival of the step's plan until it has been read."""
    asked: bool = False
    """From the arrival of a query until its answer is sent."""
    stored: bool = False
    """Whether k and v to the last query have arrived."""
    tags: asyncio.Queue[Tag] = field(default_factory=asyncio.Queue)
    """What has arrived, in order."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A step's plan, as the backend has it: of the rows that are stored, and of those that are not."""

    told: StepPlan
    storing: Plan | None
    reading: Plan | None
    behind: tuple[Run, ...]
    """Runs of which something may still be on its way on the other lane."""
    views: dict[tuple[AttentionShard, int], StepViews] = field(default_factory=dict)
    """By who gets the answer, and the kind of layer."""


_Parts = tuple[Partial | None, Partial | None]


class AttentionShard:
    """Serves one link of a compute node of ``tenant``, from its Attach until the link ends.

    The lanes belong to ``device``, where everything happens but control. ``ended`` is set when it serves no more.
    """

    def __init__(self, link: Link, attach: Attach, tenant: Tenant, device: Device) -> None:
        self._link = link
        self._device = device
        self._tenant = tenant
        self._number = attach.compute
        self._layers = tenant.geometry.layers
        self._geometry = g = tenant.geometry
        self._outputs_remote = attach.outputs
        self._dtype = dtype = getattr(torch, attach.dtype)
        n = attach.slots
        self._plans = Region("plans", n * g.plan_bytes)
        self._queries = Region("queries", n * g.query_bytes)
        self._keys_values = Region("keys_values", n * g.key_value_bytes)
        self._outputs = views.outgoing(link, attach.outputs, n * g.output_bytes)
        self._chunks = Region("chunks", CHUNKS * g.chunk_bytes)
        self._query_parts = views.parts(self._queries.buffer, n, g.query_bytes, dtype)
        self._key_value_parts = views.parts(self._keys_values.buffer, n, g.key_value_bytes, dtype)
        self._output_parts = views.parts(self._outputs, n, g.output_bytes, torch.uint8)
        self._chunk_parts = views.parts(self._chunks.buffer, CHUNKS, g.chunk_bytes, dtype)
        self._slots = [_Slot() for _ in range(n)]
        self._control: asyncio.Queue[Reserve | Publish | Release] = asyncio.Queue()
        self._chunks_arrived: asyncio.Queue[int] = asyncio.Queue()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()

    @property
    def peer(self) -> str:
        """The name of the compute node."""
        return self._link.info.peer.name

    async def serve(self) -> None:
        """Answer until the link ends; raises the error that ended it."""
        link = self._link
        self._tenant.join(self._number, self)
        try:
            link.deliver(on_tag=self._on_tag, on_message=self._on_message, on_lost=self._on_lost)
            link.send(
                encode(
                    Attached(
                        capacity_tokens=self._tenant.cache.capacity_tokens,
                        plans=link.expose(self._plans),
                        queries=link.expose(self._queries),
                        keys_values=link.expose(self._keys_values),
                        chunks=link.expose(self._chunks),
                    )
                )
            )
            async with asyncio.TaskGroup() as tasks:
                for number in range(len(self._slots)):
                    tasks.create_task(self._on_device(self._attend(number)))
                tasks.create_task(self._on_device(self._keep()))
                tasks.create_task(self._obey())
                tasks.create_task(self._watch())
        finally:
            del self._tenant.shards[self._number]
            self.ended.set()

    def end(self, reason: str) -> None:
        """Have ``serve`` raise a TransportError that says why."""
        self._on_lost(TransportError(reason))

    async def _on_device(self, work: Coroutine[Any, Any, None]) -> None:
        await self._device.start(work)

    async def _watch(self) -> None:
        await self._lost

    # -- decode

    async def _attend(self, number: int) -> None:
        """Answer the steps of one batch: q meets the past as it comes, k and v finish it, o goes back.

        Of a step come the layers that this compute node runs, in their order.
        """
        slot, compute = self._slots[number], self._tenant.share.compute
        while True:
            tag = await slot.tags.get()
            if tag.kind is Kind.PLAN:
                step, spent_s = await compute(self._plan, number, at=Place(number))
                slot.planning = False
                continue
            if tag.kind is not Kind.QUERY:
                raise ProtocolError(f"keys and values of layer {tag.layer} in step {tag.step}, which stores none")
            layer = tag.layer
            receiver = self._receiver(step, layer)
            view = self._view(step, number, layer, receiver or self)
            await self._filled(step, layer)
            at = Place(number, layer)
            parts, past_s = await compute(self._past, step, layer, view, at=at)
            if step.storing:
                await slot.tags.get()  # k and v, as nothing else is let in before the answer
            _, finish_s = await compute(self._finish, step, layer, view, parts, receiver is not None, at=at)
            spent_s += past_s + finish_s
            self._tenant.layers += 1
            slot.asked = False
            if receiver is not None:
                receiver._answer(tag._replace(kind=Kind.OUTPUT), view.answer_bytes, spent_s, own=receiver is self)

    def _receiver(self, step: _Step, layer: int) -> AttentionShard | None:
        """Who gets the answer to a layer; None for one whose link has ended."""
        answers = step.told.answers
        return self._tenant.shards.get(answers[layer]) if answers else self

    def _answer(self, tag: Tag, nbytes: int, spent_s: float, *, own: bool) -> None:
        """Send an answer that has been laid out; one to a query of another link only as long as this one is there."""
        start = tag.slot * self._geometry.output_bytes
        SECONDS.pack_into(self._outputs, start, spent_s)
        try:
            self._link.write(
                Lane.DECODE, self._outputs_remote, start, [self._outputs[start : start + nbytes]], tag.pack()
            )
        except TransportError:
            if own or not self._link.state.closed:
                raise

    def _plan(self, number: int) -> _Step:
        g, start, cache = self._geometry, number * self._geometry.plan_bytes, self._tenant.cache
        told = unpack_plan(self._plans.buffer[start : start + g.plan_bytes], g.max_rows, len(g.layers))
        if unknown := set(told.answers) - self._tenant.numbers:
            raise ProtocolError(
                f"step plan lets answers go to compute node {min(unknown)}; "
                f"tenant {self._tenant.name} has {sorted(self._tenant.numbers)}"
            )
        runs = (*told.storing, *told.reading)
        for run in runs:
            if run.sequence not in cache.sequences:
                raise ProtocolError(f"step plan names sequence {run.sequence}, which has no space reserved")
            if run.start > cache.reserved(run.sequence):
                raise ProtocolError(
                    f"step plan names position {run.start} of sequence {run.sequence}, "
                    f"which has space for {cache.reserved(run.sequence)}"
                )
        plan = self._tenant.backend.plan
        return _Step(
            told,
            plan(Rows(told.storing)) if told.storing else None,
            plan(Rows(told.reading), store=False) if told.reading else None,
            tuple(run for run in runs if cache.complete(run.sequence) < run.start),
        )

    async def _filled(self, step: _Step, layer: int) -> None:
        """Wait until the prompts' keys and values, which come on the other lane, are there."""
        tenant = self._tenant
        while any(tenant.cache.filled(run.sequence, layer) < run.start for run in step.behind):
            tenant.grown.clear()
            await tenant.grown.wait()

    def _past(self, step: _Step, layer: int, view: StepViews) -> _Parts:
        """What q sees of the past: of the rows whose k and v are still to come, and of those that have none here."""
        q, stored, past = view.q, step.told.stored_rows, self._tenant.backend.past
        return (
            past(step.storing, layer, q[:stored]) if step.storing else None,
            past(step.reading, layer, q[stored:]) if step.reading else None,
        )

    def _finish(self, step: _Step, layer: int, view: StepViews, parts: _Parts, answer: bool) -> None:
        """Store k and v, attend to them, and lay out the answer if there is to be one."""
        told, (past, read) = step.told, parts
        if step.storing:
            assert past is not None
            q = view.q[: told.stored_rows]
            past = self._tenant.backend.finish(step.storing, layer, q, view.k, view.v, past)
        if not answer:
            return
        if told.whole:
            assert past is not None
            view.whole.copy_(past.o[: told.whole])
        if told.rows == told.whole:
            return
        row = 0
        for part in (past and Partial(past.o[told.whole :], past.lse[told.whole :]), read):
            if part is not None:
                stop = row + part.o.shape[0]
                view.partial.o[row:stop], view.partial.lse[row:stop] = part.o, part.lse
                row = stop

    def _view(self, step: _Step, number: int, layer: int, receiver: AttentionShard) -> StepViews:
        """Where a layer's rows lie: what came on this link, and the answer on the one of ``receiver``."""
        key = (receiver, self._geometry.kinds[layer])
        if key not in step.views:
            step.views[key] = StepViews.of(
                step.told,
                self._layers[layer],
                self._query_parts[number],
                self._key_value_parts[number],
                receiver._output_parts[number],
                self._dtype,
            )
        return step.views[key]

    # -- prompts, from the bulk lane

    async def _keep(self) -> None:
        """Put chunks of prompts into the cache and give their buffers back."""
        while True:
            i = await self._chunks_arrived.get()
            start = i * self._geometry.chunk_bytes
            header = ChunkHeader.unpack(self._chunks.buffer[start : start + CHUNK_HEADER])
            if header.layer >= len(self._layers) or not 1 <= header.tokens <= CHUNK_TOKENS:
                raise ProtocolError(f"bulk chunk with {header}; expected a layer below {len(self._layers)}")
            stored, _ = await self._tenant.share.compute(self._append, i, header)
            self._tenant.stale_tags += not stored
            self._link.write(Lane.BULK, self._outputs_remote, 0, [], Tag(Kind.CREDIT, 0, 0, i).pack())

    def _append(self, i: int, header: ChunkHeader) -> bool:
        """False for a sequence that is over: releases come on the other lane, and overtake chunks."""
        first = CHUNK_HEADER // self._geometry.item
        k, v = views.key_value(self._chunk_parts[i], self._layers[header.layer], header.tokens, first)
        return self._tenant.append(header.layer, Run(header.sequence, header.start, header.tokens), k, v)

    # -- control

    async def _obey(self) -> None:
        """Reserve, publish and release, in the order of the messages."""
        while True:
            message = await self._control.get()
            if not isinstance(message, Reserve):
                await self._device.run(self._tenant.publish_or_release, message)
                continue
            try:
                shared = await self._device.run(self._tenant.reserve, message)
            except CapacityError as e:
                self._link.send(encode(Refused(reason=str(e), sequence=message.sequence)))
            else:
                self._link.send(encode(Reserved(sequence=message.sequence, shared=shared)))

    # -- arrivals

    def _on_tag(self, lane: Lane, packed: int) -> None:
        tag = Tag.unpack(packed)
        if tag.kind is Kind.CHUNK:
            if tag.step >= CHUNKS:
                raise ProtocolError(f"bulk chunk in buffer {tag.step}; there are {CHUNKS}")
            self._chunks_arrived.put_nowait(tag.step)
            return
        if tag.slot >= len(self._slots):
            raise ProtocolError(f"tag for batch slot {tag.slot}; this link has {len(self._slots)}")
        slot = self._slots[tag.slot]
        if tag.kind is Kind.PLAN:
            if slot.planning or slot.asked:
                raise ProtocolError(f"a step plan for batch slot {tag.slot} in the middle of step {slot.step}")
            slot.step, slot.layer, slot.planning = tag.step, -1, True
        elif tag.kind not in (Kind.QUERY, Kind.KEY_VALUE) or tag.step != slot.step:
            self._tenant.stale_tags += 1
            return
        elif tag.kind is Kind.QUERY:
            if slot.asked or not slot.layer < tag.layer < len(self._layers):
                raise ProtocolError(
                    f"a query of layer {tag.layer} in step {slot.step} of batch slot {tag.slot}, after one of layer "
                    f"{slot.layer}{' that is not answered' * slot.asked}; expected increasing layers below "
                    f"{len(self._layers)}, one at a time"
                )
            slot.layer, slot.asked, slot.stored = tag.layer, True, False
        else:
            if not slot.asked or slot.stored or tag.layer != slot.layer:
                raise ProtocolError(
                    f"keys and values of layer {tag.layer} in step {slot.step} of batch slot {tag.slot}; expected them "
                    f"once, between the query of that layer and its answer"
                )
            slot.stored = True
        slot.tags.put_nowait(tag)

    def _on_message(self, plain: dict[str, object]) -> None:
        message = decode(plain, FromCompute)
        if isinstance(message, Attach):
            raise ProtocolError("a second Attach on a link that is attached already")
        if self._number != FRONT:
            raise ProtocolError(
                f"a {plain['type']} from compute node {self._number} of tenant {self._tenant.name}; "
                f"only its front, number {FRONT}, says what is kept"
            )
        self._control.put_nowait(message)

    def _on_lost(self, error: TransportError) -> None:
        if not self._lost.done():
            self._lost.set_exception(error)
            self._lost.exception()  # it may come after the end of ``serve``

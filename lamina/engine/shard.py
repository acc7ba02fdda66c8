"""A memory node's end: the shard of one compute node's KV cache, and attention over it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import torch

from lamina.attention import Backend, KVLayout, Memory, Partial, Plan, Rows, Run, create_backend
from lamina.device import Device
from lamina.engine import views
from lamina.engine.geometry import CHUNK_TOKENS, CHUNKS, Geometry
from lamina.engine.views import StepViews
from lamina.errors import CapacityError, ProtocolError, TransportError
from lamina.protocol import (
    CHUNK_HEADER,
    KEY_BYTES,
    SECONDS,
    Attach,
    Attached,
    ChunkHeader,
    FromCompute,
    Kind,
    Publish,
    Refused,
    Release,
    Reserve,
    Reserved,
    StepPlan,
    Tag,
    decode,
    encode,
    unpack_plan,
)
from lamina.spans import Place
from lamina.transport import Lane, Link, Region


@dataclass
class _Slot:
    """One batch in flight, as the memory node sees it: what has arrived of its present step."""

    step: int = -1
    busy: bool = False
    """From the arrival of the step's plan until its last output is sent."""
    planned: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: set[tuple[Kind, int]] = field(default_factory=set)
    news: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step's plan, as the backend has it: of the rows that are stored, and of those that are not."""

    told: StepPlan
    storing: Plan | None
    reading: Plan | None
    behind: tuple[Run, ...]
    """Runs of which something may still be on its way on the other lane."""
    views: dict[int, StepViews] = field(default_factory=dict)
    """By kind of layer."""


_Parts = tuple[Partial | None, Partial | None]


class AttentionShard:
    """Serves one link of a compute node, from its Attach until the link ends.

    ``backend`` is what ``make_backend`` made. The lanes belong to ``device``, where everything happens but control.
    ``stale_tags`` counts arrivals that belonged to no present step or to a sequence that was over.
    """

    def __init__(self, link: Link, attach: Attach, backend: Backend, device: Device) -> None:
        self._link = link
        self._device = device
        self._layers = tuple(attach.layers)
        self.cache = backend.cache
        self._backend = backend
        self._geometry = g = Geometry(self._layers, attach.dtype, attach.slots, attach.max_rows)
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
        self._to_publish: dict[int, list[bytes]] = {}
        """Keys of sequences' leading blocks that are not complete yet."""
        self._chunks_arrived: asyncio.Queue[int] = asyncio.Queue()
        self._grown = asyncio.Event()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.layers = 0
        self.stale_tags = 0

    async def serve(self) -> None:
        """Answer until the link ends; raises the error that ended it."""
        link = self._link
        link.on_tag, link.on_message, link.on_lost = self._on_tag, self._on_message, self._on_lost
        link.send(
            encode(
                Attached(
                    capacity_tokens=self.cache.capacity_tokens,
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

    async def _on_device(self, work: Coroutine[Any, Any, None]) -> None:
        await self._device.start(work)

    async def _watch(self) -> None:
        await self._lost

    # -- decode

    async def _attend(self, number: int) -> None:
        """Answer the steps of one batch: q meets the past as it comes, k and v finish it, o goes back."""
        slot = self._slots[number]
        while True:
            await slot.planned.wait()
            slot.planned.clear()
            busy_s = self._device.busy_s
            step = await self._device.compute(self._plan, number, at=Place(number))
            spent_s = self._device.busy_s - busy_s
            start = number * self._geometry.output_bytes
            for layer in range(len(self._layers)):
                await self._arrival(slot, Kind.QUERY, layer)
                await self._filled(step, layer)
                at = Place(number, layer)
                busy_s = self._device.busy_s
                parts = await self._device.compute(self._past, step, number, layer, at=at)
                spent_s += self._device.busy_s - busy_s
                if step.storing:
                    await self._arrival(slot, Kind.KEY_VALUE, layer)
                busy_s = self._device.busy_s
                await self._device.compute(self._finish, step, number, layer, parts, at=at)
                spent_s += self._device.busy_s - busy_s
                SECONDS.pack_into(self._outputs, start, spent_s)
                # The next plan may come as soon as the last output is out.
                slot.busy = layer + 1 < len(self._layers)
                tag = Tag(Kind.OUTPUT, number, layer, slot.step).pack()
                source = self._outputs[start : start + self._view(step, number, layer).answer_bytes]
                self._link.write(Lane.DECODE, self._outputs_remote, start, [source], tag)
                self.layers += 1

    def _plan(self, number: int) -> _Step:
        g, start = self._geometry, number * self._geometry.plan_bytes
        told = unpack_plan(self._plans.buffer[start : start + g.plan_bytes], g.max_rows, len(g.layers))
        runs = (*told.storing, *told.reading)
        for run in runs:
            if run.sequence not in self.cache.sequences:
                raise ProtocolError(f"step plan names sequence {run.sequence}, which has no space reserved")
            if run.start > self.cache.reserved(run.sequence):
                raise ProtocolError(
                    f"step plan names position {run.start} of sequence {run.sequence}, "
                    f"which has space for {self.cache.reserved(run.sequence)}"
                )
        plan = self._backend.plan
        return _Step(
            told,
            plan(Rows(told.storing)) if told.storing else None,
            plan(Rows(told.reading), store=False) if told.reading else None,
            tuple(run for run in runs if self.cache.complete(run.sequence) < run.start),
        )

    async def _arrival(self, slot: _Slot, kind: Kind, layer: int) -> None:
        while (kind, layer) not in slot.arrived:
            slot.news.clear()
            await slot.news.wait()

    async def _filled(self, step: _Step, layer: int) -> None:
        """Wait until the prompts' keys and values, which come on the other lane, are there."""
        while any(self.cache.filled(run.sequence, layer) < run.start for run in step.behind):
            self._grown.clear()
            await self._grown.wait()

    def _past(self, step: _Step, number: int, layer: int) -> _Parts:
        """What q sees of the past: of the rows whose k and v are still to come, and of those that have none here."""
        q, stored = self._view(step, number, layer).q, step.told.stored_rows
        return (
            self._backend.past(step.storing, layer, q[:stored]) if step.storing else None,
            self._backend.past(step.reading, layer, q[stored:]) if step.reading else None,
        )

    def _finish(self, step: _Step, number: int, layer: int, parts: _Parts) -> None:
        """Store k and v, attend to them, and lay out the answer."""
        told, view, (past, read) = step.told, self._view(step, number, layer), parts
        if step.storing:
            assert past is not None
            past = self._backend.finish(step.storing, layer, view.q[: told.stored_rows], view.k, view.v, past)
            if told.whole:
                view.whole.copy_(past.o[: told.whole])
        if told.rows == told.whole:
            return
        row = 0
        for part in (past and Partial(past.o[told.whole :], past.lse[told.whole :]), read):
            if part is not None:
                stop = row + part.o.shape[0]
                view.partial.o[row:stop], view.partial.lse[row:stop] = part.o, part.lse
                row = stop

    def _view(self, step: _Step, number: int, layer: int) -> StepViews:
        kind = self._geometry.kinds[layer]
        if kind not in step.views:
            step.views[kind] = StepViews.of(
                step.told,
                self._layers[layer],
                self._query_parts[number],
                self._key_value_parts[number],
                self._output_parts[number],
                self._dtype,
            )
        return step.views[kind]

    # -- prompts, from the bulk lane

    async def _keep(self) -> None:
        """Put chunks of prompts into the cache and give their buffers back."""
        while True:
            i = await self._chunks_arrived.get()
            start = i * self._geometry.chunk_bytes
            header = ChunkHeader.unpack(self._chunks.buffer[start : start + CHUNK_HEADER])
            if header.layer >= len(self._layers) or not 1 <= header.tokens <= CHUNK_TOKENS:
                raise ProtocolError(f"bulk chunk with {header}; expected a layer below {len(self._layers)}")
            if await self._device.compute(self._append, i, header):
                self._grown.set()
            else:
                self.stale_tags += 1
            self._link.write(Lane.BULK, self._outputs_remote, 0, [], Tag(Kind.CREDIT, 0, 0, i).pack())

    def _append(self, i: int, header: ChunkHeader) -> bool:
        """False for a sequence that is over: releases come on the other lane, and overtake chunks."""
        if header.sequence not in self.cache.sequences:
            return False
        first = CHUNK_HEADER // self._geometry.item
        k, v = views.key_value(self._chunk_parts[i], self._layers[header.layer], header.tokens, first)
        self._backend.append(header.layer, Rows((Run(header.sequence, header.start, header.tokens),)), k, v)
        self._publish_complete(header.sequence)
        return True

    # -- control

    async def _obey(self) -> None:
        """Reserve, publish and release, in the order of the messages."""
        while True:
            message = await self._control.get()
            if isinstance(message, Reserve):
                try:
                    shared = await self._device.run(self._reserve, message)
                except CapacityError as e:
                    self._link.send(encode(Refused(reason=str(e), sequence=message.sequence)))
                else:
                    self._link.send(encode(Reserved(sequence=message.sequence, shared=shared)))
            elif message.sequence in self.cache.sequences:
                await self._device.run(self._publish_or_release, message)

    def _reserve(self, message: Reserve) -> int:
        if message.sequence not in self.cache.sequences:
            keys = _split(message.keys)
            return self.cache.reserve(message.sequence, message.tokens, ahead=message.ahead, keys=keys)
        self.cache.extend(message.sequence, message.tokens)
        return 0

    def _publish_or_release(self, message: Publish | Release) -> None:
        if isinstance(message, Publish):
            self._to_publish[message.sequence] = _split(message.keys)
            self._publish_complete(message.sequence)
        else:
            self._to_publish.pop(message.sequence, None)
            self.cache.release(message.sequence)
            self._grown.set()  # whoever waits for more of it waits in vain, and is to learn that

    def _publish_complete(self, sequence: int) -> None:
        """Publish what is to be, once all of it has arrived."""
        keys = self._to_publish.get(sequence)
        if keys and self.cache.complete(sequence) >= len(keys) * self.cache.layout.block_tokens:
            self.cache.publish(sequence, self._to_publish.pop(sequence))

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
            if slot.busy:
                raise ProtocolError(f"a step plan for batch slot {tag.slot} in the middle of step {slot.step}")
            slot.step, slot.busy = tag.step, True
            slot.arrived.clear()
            slot.planned.set()
        elif tag.kind in (Kind.QUERY, Kind.KEY_VALUE) and tag.step == slot.step:
            slot.arrived.add((tag.kind, tag.layer))
            slot.news.set()
        else:
            self.stale_tags += 1

    def _on_message(self, plain: dict[str, object]) -> None:
        message = decode(plain, FromCompute)
        if isinstance(message, Attach):
            raise ProtocolError("a second Attach on a link that is attached already")
        self._control.put_nowait(message)

    def _on_lost(self, error: TransportError) -> None:
        if not self._lost.done():
            self._lost.set_exception(error)


def _split(keys: bytes) -> list[bytes]:
    """ProtocolError unless they are keys, one after the other."""
    if len(keys) % KEY_BYTES:
        raise ProtocolError(f"{len(keys)} bytes of keys; expected a multiple of {KEY_BYTES}")
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def make_backend(attach: Attach, name: str, memory: Memory, device: Device) -> Backend:
    """The backend called ``name`` over the cache that a compute node asks for.

    ``memory`` is the node's: it stays as it is when the backend is closed.
    """
    layout = KVLayout(layers=tuple(attach.layers), dtype=attach.kv_dtype, block_tokens=attach.block_tokens)
    return create_backend(name, layout, memory, threads=device.threads, cpus=device.cpus)

"""Serve the steps and prompts of one compute node, on the device's loop of a memory node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from lamina.attention import Partial, Plan, Rows, Run
from lamina.errors import ProtocolError, TransportError, UsageError
from lamina.memory.tenant import Tenant
from lamina.runtime.mailbox import Mailbox
from lamina.runtime.spans import ANSWER, QUERY, Activity, Place
from lamina.transport import Lane, Link, Region
from lamina.wire import views
from lamina.wire.geometry import CHUNK_TOKENS, CHUNKS
from lamina.wire.plan import CHUNK_HEADER, SECONDS, ChunkHeader, StepPlan, unpack_plan
from lamina.wire.slots import MemorySlot
from lamina.wire.tags import Kind, Tag, pack, place_of
from lamina.wire.tenants import Attach, Attached, Void
from lamina.wire.views import StepViews


class _GoneError(Exception):
    """A step names sequences of which something is not here and will not come. The compute node is told."""

    def __init__(self, sequences: list[int]) -> None:
        super().__init__(f"the sequences {sequences} are not here")
        self.sequences = sequences


@dataclass(slots=True)
class _PlannedStep:
    """Holds a step's plan as the backend needs it: one for the rows that are stored, and one for the others."""

    number: int
    """The low bits of the step's number."""
    plan: StepPlan
    storing: Plan | None
    reading: Plan | None
    behind: tuple[Run, ...]
    """The runs of which some keys and values may still be on their way on the other lane."""
    views: dict[tuple[ServingLane, int], StepViews] = field(default_factory=dict)
    """The views by the receiver of the answer and the kind of layer."""
    spent_s: float = 0.0
    """The seconds that its operations have taken so far."""

    @property
    def runs(self) -> tuple[Run, ...]:
        return (*self.plan.storing, *self.plan.reading)


_Parts = tuple[Partial | None, Partial | None]


class ServingLane:
    """Serves the steps and prompts that one compute node of ``tenant`` sends over ``link``.

    What the link delivers on the lanes goes to `on_tag`.
    """

    def __init__(self, link: Link, attach: Attach, tenant: Tenant, say: Callable[[Void], None]) -> None:
        """``say`` sends a message to the compute node, from any loop."""
        self._link = link
        self._say = say
        self._peer = link.info.peer.name
        self._tenant = tenant
        self._device = tenant.device
        self._is_closed = False
        self._layers = tenant.geometry.layers
        self._geometry = g = tenant.geometry
        self._outputs_remote = attach.outputs
        self._dtype = dtype = getattr(torch, attach.dtype)
        n = attach.slots
        self._outputs = views.outgoing(link, attach.outputs, n * g.output_bytes)  # first, as the link may have ended
        self._plans = Region("plans", g.plan_offset(n, 0))
        self._queries = Region("queries", n * g.query_bytes)
        self._keys_values = Region("keys_values", n * g.key_value_bytes)
        self._chunks = Region("chunks", CHUNKS * g.chunk_bytes)
        self._query_parts = views.parts(self._queries.buffer, n, g.query_bytes, dtype)
        self._key_value_parts = views.parts(self._keys_values.buffer, n, g.key_value_bytes, dtype)
        self._output_parts = views.parts(self._outputs, n, g.output_bytes, torch.uint8)
        self._chunk_parts = views.parts(self._chunks.buffer, CHUNKS, g.chunk_bytes, dtype)
        self._slots = [MemorySlot(number, len(g.layers)) for number in range(n)]
        self._arrived: list[Mailbox[Tag]] = [Mailbox() for _ in range(n)]
        """What has arrived and was not looked at yet, by slot."""
        self._chunks_arrived: Mailbox[int] = Mailbox()

    def attached(self) -> Attached:
        """Return the answer to the Attach: where the compute node may write from now on."""
        expose = self._link.expose
        return Attached(
            capacity_tokens=self._tenant.cache.capacity_tokens,
            plans=expose(self._plans),
            queries=expose(self._queries),
            keys_values=expose(self._keys_values),
            chunks=expose(self._chunks),
        )

    async def run(self) -> None:
        """Serve until cancelled. For what the compute node must not send, raise ProtocolError in an exception group."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(len(self._slots)):
                tasks.create_task(self._attend(number))
            tasks.create_task(self._keep())

    def close(self) -> None:
        """Free the memory into which the compute node wrote. `run` has ended.

        Tracebacks keep this object until the garbage collector finds them, which takes long where little is allocated.
        """
        self._is_closed = True
        for region in (self._plans, self._queries, self._keys_values, self._chunks):
            region.close()
        self._outputs = memoryview(b"")
        for parts in (self._query_parts, self._key_value_parts, self._output_parts, self._chunk_parts):
            parts.clear()

    # -- decode

    async def _attend(self, number: int) -> None:
        """Answer the steps of one batch, each until the compute node gives it up."""
        slot, arrived, run = self._slots[number], self._arrived[number], self._tenant.share.run
        step: _PlannedStep | None = None
        while True:
            tag = await arrived.get()
            if tag.step != slot.step:
                continue  # given up, as a later plan has arrived
            at = Place(number, step=tag.step, peer=self._peer)
            try:
                if tag.kind is Kind.PLAN:
                    step = None  # until this one is planned, as it may name a sequence that is gone
                    planned, spent_s = await run(self._plan, number, tag.step, at=at)
                    planned.spent_s, step = spent_s, planned
                    slot.planned(tag.step, stores=step.storing is not None)
                elif step is not None and tag.kind is Kind.QUERY:
                    await self._attend_layer(number, step, tag.layer)
            except UsageError:  # a sequence was released after the step had been planned
                assert step is not None
                gone = self._gone(step.runs)
                if not gone:
                    raise
                step = None
                self._say(Void(slot=number, step=tag.step, sequences=gone))
            except _GoneError as error:
                step = None
                self._say(Void(slot=number, step=tag.step, sequences=error.sequences))

    async def _attend_layer(self, number: int, step: _PlannedStep, layer: int) -> None:
        """Answer a query: q attends to the past when it comes, k and v complete the result, o goes back.

        Only the layers that the compute node runs come, in their order.
        """
        slot, arrived, run = self._slots[number], self._arrived[number], self._tenant.share.run
        at = Place(number, layer, step.number, self._peer)
        answers = step.plan.answers
        receiver = self._tenant.lanes.get(answers[layer]) if answers else self  # None if that link has ended
        view = self._view(step, number, layer, receiver or self)
        if step.behind and not await self._filled(slot, step, layer):
            return
        parts, past_s = await run(self._past, step, layer, view, at=at)
        if step.storing:
            if (await arrived.peek()).kind is Kind.PLAN:
                return  # the step is given up
            await arrived.get()  # k and v
        _, finish_s = await run(self._finish, step, layer, view, parts, receiver is not None, at=at)
        step.spent_s += past_s + finish_s
        self._tenant.layers += 1
        slot.answered(step.number)
        if receiver is not None:
            packed = pack(Kind.OUTPUT, number, layer, step.number)
            receiver._answer(number, packed, view.answer_bytes, step.spent_s, own=receiver is self)

    def _answer(self, number: int, tag: int, nbytes: int, spent_s: float, *, own: bool) -> None:
        """Send an answer that has been laid out for a slot. An answer to a query of another link is dropped if this
        link has ended."""
        if self._is_closed:
            return
        start = number * self._geometry.output_bytes
        SECONDS.pack_into(self._outputs, start, spent_s)
        if (recorder := self._device.recorder) is not None:
            recorder.mark(ANSWER, place_of(tag, self._peer), self._device.loop.time(), Activity.SENT)
        try:
            self._link.write(Lane.DECODE, self._outputs_remote, start, [self._outputs[start : start + nbytes]], tag)
        except TransportError:
            if own or not self._link.state.closed:
                raise

    def _plan(self, number: int, step: int) -> _PlannedStep:
        g, cache = self._geometry, self._tenant.cache
        start = g.plan_offset(number, step)
        told = unpack_plan(self._plans.buffer[start : start + g.plan_bytes], g.max_rows, len(g.layers))
        if unknown := set(told.answers) - self._tenant.members:
            raise ProtocolError(
                f"step plan sends answers to compute node {min(unknown)}; tenant {self._tenant.name} has compute nodes "
                f"{sorted(self._tenant.members)}"
            )
        runs, reserved = (*told.storing, *told.reading), cache.reserved
        if gone := self._gone(runs):
            raise _GoneError(gone)
        for run in runs:
            if run.start > (tokens := reserved(run.sequence) or 0):
                raise ProtocolError(
                    f"step plan names position {run.start} of sequence {run.sequence}, which has space for {tokens}"
                )
        plan = self._tenant.backend.plan
        return _PlannedStep(
            step,
            told,
            plan(Rows(told.storing)) if told.storing else None,
            plan(Rows(told.reading), store=False) if told.reading else None,
            cache.behind(runs),
        )

    def _gone(self, runs: Iterable[Run]) -> list[int]:
        """Return the sequences that have no space here: they were released, or this node has come back."""
        return [run.sequence for run in runs if run.sequence not in self._tenant.cache.sequences]

    async def _filled(self, slot: MemorySlot, step: _PlannedStep, layer: int) -> bool:
        """Wait until the prompts' keys and values, which come on the other lane, are there; False if the step is given
        up. Raises _GoneError for those that will not come."""
        tenant = self._tenant
        while True:
            if gone := self._gone(step.behind):
                raise _GoneError(gone)
            late = [run for run in step.behind if tenant.cache.filled(run.sequence, layer) < run.start]
            if not late:
                return True
            if slot.step != step.number:
                return False
            if broken := [run.sequence for run in late if run.sequence in tenant.broken]:
                raise _GoneError(broken)
            tenant.grown.clear()
            await tenant.grown.wait()

    def _past(self, step: _PlannedStep, layer: int, view: StepViews) -> _Parts:
        """Attend to the past: for the rows whose k and v are still to come, and for those that have none here."""
        past = self._tenant.backend.past
        return (
            past(step.storing, layer, view.stored_q) if step.storing else None,
            past(step.reading, layer, view.read_q) if step.reading else None,
        )

    def _finish(self, step: _PlannedStep, layer: int, view: StepViews, parts: _Parts, answer: bool) -> None:
        """Store k and v, attend to them, and lay out the answer if there is to be one."""
        told, (past, read) = step.plan, parts
        if step.storing:
            assert past is not None
            past = self._tenant.backend.finish(step.storing, layer, view.stored_q, view.k, view.v, past)
        if not answer:
            return
        if told.whole:
            assert past is not None
            view.whole.copy_(past.o if told.whole == told.stored_rows else past.o[: told.whole])
        if told.rows == told.whole:
            return
        row = 0
        for part in (past and Partial(past.o[told.whole :], past.lse[told.whole :]), read):
            if part is not None:
                stop = row + part.o.shape[0]
                view.partial.o[row:stop], view.partial.lse[row:stop] = part.o, part.lse
                row = stop

    def _view(self, step: _PlannedStep, number: int, layer: int, receiver: ServingLane) -> StepViews:
        """Return the views of a layer's rows: of what came on this link, and of the answer on the link of
        ``receiver``."""
        key = (receiver, self._geometry.kinds[layer])
        found = step.views.get(key)
        if found is None:
            found = step.views[key] = StepViews.of(
                step.plan,
                self._layers[layer],
                self._query_parts[number],
                self._key_value_parts[number],
                receiver._output_parts[number],
                self._dtype,
            )
        return found

    # -- prompts, from the bulk lane

    async def _keep(self) -> None:
        """Put chunks of prompts into the cache and give their buffers back."""
        while True:
            i = await self._chunks_arrived.get()
            start = i * self._geometry.chunk_bytes
            header = ChunkHeader.unpack(self._chunks.buffer[start : start + CHUNK_HEADER])
            if header.layer >= len(self._layers) or not 1 <= header.tokens <= CHUNK_TOKENS:
                raise ProtocolError(
                    f"bulk chunk with {header}; expected a layer below {len(self._layers)} and 1 to {CHUNK_TOKENS} "
                    "tokens"
                )
            stored, _ = await self._tenant.share.run(self._append, i, header)
            self._tenant.stale_tags += not stored
            self._link.write(Lane.BULK, self._outputs_remote, 0, [], pack(Kind.CREDIT, 0, 0, i))

    def _append(self, i: int, header: ChunkHeader) -> bool:
        """Store a chunk; return False for a sequence that is over, as releases come on another connection and overtake
        chunks."""
        first = CHUNK_HEADER // self._geometry.item
        k, v = views.key_value(self._chunk_parts[i], self._layers[header.layer], header.tokens, first)
        return self._tenant.append(header.layer, Run(header.sequence, header.start, header.tokens), k, v)

    # -- what arrives

    def on_tag(self, lane: Lane, packed: int) -> None:
        """Take in the tag of a write by the compute node."""
        tag = Tag.unpack(packed)
        if tag.kind is Kind.CHUNK:
            if tag.step >= CHUNKS:
                raise ProtocolError(f"bulk chunk in buffer {tag.step}; there are {CHUNKS}")
            self._chunks_arrived.put(tag.step)
            return
        if tag.slot >= len(self._slots):
            raise ProtocolError(f"tag for batch slot {tag.slot}; this link has {len(self._slots)}")
        if self._slots[tag.slot].receive(tag):
            if tag.kind is Kind.PLAN:
                self._tenant.grown.set()  # the step before may wait for prompts
            if tag.kind is Kind.QUERY and (recorder := self._device.recorder) is not None:
                recorder.mark(QUERY, place_of(packed, self._peer), self._device.loop.time(), Activity.ARRIVED)
            self._arrived[tag.slot].put(tag)
        else:
            self._tenant.stale_tags += 1

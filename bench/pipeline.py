"""What several batches in flight gain: two nodes with one processor each, whose work overlaps or does not.

A compute node and a memory node run as usual, over shared memory, except that prompts cost nothing (`filled`). The
model has random weights, and at a context of one or two thousand tokens its attention takes as long as everything else.
The benchmark finds that context by measuring: with one batch in flight one node waits for the other, so each is timed
alone. A load with a shorter context is bound by the compute node, one with a longer context by attention. All figures
come from traces of the nodes' devices: a step lasts from one sampling to the next, and a node is busy while it runs an
operation.

No schedule is faster than the slower node working without a pause. So the yardstick of a step is the larger of the
times that the two nodes spent on it while they overlapped. What that exceeds the same work alone by is contention.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from lamina.bench import plots, report
from lamina.bench.checkpoints import RandomLlama, checkpoint
from lamina.bench.clusters import FilledCluster, QueryLastCluster
from lamina.bench.pinned import write_pinned
from lamina.bench.variants import two_processors
from lamina.client import AsyncClient, AsyncStream, connect
from lamina.config import ClusterConfig, ModelConfig, PipelineConfig
from lamina.errors import ConfigError, LaminaError
from lamina.recording import Trace, record
from lamina.runtime.spans import Activity, Span

MODEL = RandomLlama("P", hidden=1024, ffn=2816, layers=12, heads=16, kv_heads=4, head_dim=128, vocabulary=4096)
"""A model with grouped queries: its k and v are little work, so that one batch alone overlaps little."""
BATCH = 8
FLIGHTS, QUICK_FLIGHTS = (1, 2, 3, 4), (1, 2)
"""The numbers of batches in flight."""
SHORT, MIDDLE, MAX_CONTEXT = 64, 1024, 4096
"""Contexts: that of the compute-bound load, and the first and the longest that are tried for the balanced load."""
BALANCED, TRIES = 0.05, 5
"""The share by which the nodes' times may differ in the balanced load, and how many contexts are tried."""
MIN_TOKEN_MS = 1e-4
"""The least that a token of context is assumed to cost, if noise makes it look cheaper."""
LONGER = 2.0
"""The context of the attention-bound load, in contexts of the balanced load."""
MAX_TOKENS = 256
"""The steps of a sequence, which must suffice to fill all batches and to measure."""
WINDOW_S = 1.0
SETTLE_STEPS = 3
START_S, PATIENCE_S = 90.0, 60.0

STEPS = {
    "load": "load",
    "batches": "n",
    "batch": "batch",
    "context": "context",
    "step_ms": "step ms",
    "compute_ms": "compute",
    "attention_ms": "attend",
    "wire_ms": "idle",
    "speedup_over_one": "gain",
}
"""The first table: ``n`` batches in flight, the parts of a step, and tokens/s over those of one batch in flight."""
OVERLAP = {
    "load": "load",
    "batches": "n",
    "compute_contention": "compute x",
    "attention_contention": "attend x",
    "busy_compute": "compute busy",
    "busy_memory": "attend busy",
    "step_over_max": "x max",
}
"""The second table: each node's work over the same work alone, its share of a step, and the step over the larger."""


def run(*, as_json: bool, plot: Path | None, quick: bool) -> None:
    """Measure and print; draw into ``plot`` if it is given."""
    plots.check(plot)
    if two_processors()[0] < 0:
        raise ConfigError("bench pipeline: needs two processors, one for each node")
    rows, timeline = uvloop.run(_measure(quick=quick))
    about = f"{MODEL.layers} layers of {MODEL.hidden} in bfloat16, batches of {BATCH}, links over shm"
    result = report.Result("pipeline", about, rows, report.machine(), _blocks(timeline))
    if as_json:
        report.print_json(result)
    else:
        report.print_table("steps of a pipeline of two nodes with n batches in flight, in ms", rows, STEPS)
        report.print_table("work over the same work alone (x), and the share of a step that it takes", rows, OVERLAP)
    if plot:
        plots.draw(plot, result)


# -- what is measured


@dataclass(frozen=True)
class Window:
    """What both nodes did between two samplings, with the mean times of the steps that ended in between."""

    compute: list[Span]
    memory: list[Span]
    start_s: float
    end_s: float
    steps: int
    tokens: float
    """The tokens of a step, which is the number of sequences in a batch."""

    @classmethod
    def of(cls, traces: dict[str, Trace], tokens: float) -> Window:
        compute, memory = (
            [s for s in traces[name].spans if s.batch >= 0 and s.activity is Activity.OPERATION]
            for name in ("c0", "m0")
        )
        ends = [s.end_s for s in compute if s.name == "sample"]
        if len(ends) < 3:
            raise LaminaError(f"bench pipeline: {len(ends)} steps were completed in {WINDOW_S} s, too few to measure")
        if any(s.name == "attend_to_prompts" for s in compute):
            raise LaminaError("bench pipeline: a prompt was still being processed when the steps were to be measured")
        return cls(compute, memory, ends[0], ends[-1], len(ends) - 1, tokens)

    @property
    def step_ms(self) -> float:
        return (self.end_s - self.start_s) / self.steps * 1e3

    @property
    def compute_ms(self) -> float:
        return sum(b - a for a, b in self._within(self.compute)) / self.steps * 1e3

    @property
    def attention_ms(self) -> float:
        return sum(b - a for a, b in self._within(self.memory)) / self.steps * 1e3

    @property
    def neither_ms(self) -> float:
        """The part of a step in which neither node computes: the wire, the event loops, and wake-ups."""
        until, idle = self.start_s, 0.0
        for start, end in sorted([*self._within(self.compute), *self._within(self.memory)]):
            idle += max(0.0, start - until)
            until = max(until, end)
        return (idle + max(0.0, self.end_s - until)) / self.steps * 1e3

    def _within(self, spans: Iterable[Span]) -> Iterator[tuple[float, float]]:
        for span in spans:
            start, end = max(span.start_s, self.start_s), min(span.end_s, self.end_s)
            if start < end:
                yield start, end


async def _measure(*, quick: bool) -> tuple[list[report.Row], Window]:
    flights = QUICK_FLIGHTS if quick else FLIGHTS
    rows: list[report.Row] = []
    alone: dict[str, Window] = {}
    timeline: Window | None = None
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as name, report.progress(transient=False) as progress:
        task = progress.add_task("pipeline", total=None)
        folder = Path(name)
        model = await asyncio.to_thread(checkpoint, MODEL)
        contexts: dict[str, int] = {}
        for batches in flights:
            async with _running(folder, model, batches, FilledCluster) as bench:
                if not contexts:
                    contexts = await _choose(bench, alone)
                for load_name, context in contexts.items():
                    if quick and load_name != "balanced" and (batches > 1 or load_name not in alone):
                        continue  # a quick run keeps only what it measured to find the context
                    if batches == 1 and load_name in alone:
                        window = alone[load_name]
                    else:
                        window = await bench.measure(BATCH * batches, context)
                    if batches == 1:
                        alone[load_name] = window
                    rows.append(_row(load_name, batches, context, window, alone[load_name]))
                    if batches > 1 and load_name == "balanced":
                        timeline = timeline or window
                        window = await bench.measure(BATCH, context)
                        rows.append(_row(f"{load_name}, equal total", batches, context, window, alone[load_name]))
                    progress.advance(task)
        if not quick:
            for batches in (1, 2):
                async with _running(folder, model, batches, QueryLastCluster) as bench:
                    context = contexts["balanced"]
                    window = await bench.measure(BATCH * batches, context)
                    rows.append(_row("balanced, query last", batches, context, window, alone["balanced"]))
    assert timeline is not None
    return rows, timeline


async def _choose(bench: _PipelineBench, measured: dict[str, Window]) -> dict[str, int]:
    """Return the context of each load, and add the windows that were measured on the way to ``measured``.

    Attention alone takes a time that grows linearly with the context.
    """
    short = measured["compute-bound"] = await bench.measure(BATCH, SHORT)
    balanced = MIDDLE
    for _ in range(TRIES):
        window = measured["balanced"] = await bench.measure(BATCH, balanced)
        missing = window.compute_ms - window.attention_ms
        if abs(missing) < BALANCED * window.compute_ms:
            break
        per_token = max((window.attention_ms - short.attention_ms) / (balanced - SHORT), MIN_TOKEN_MS)
        balanced = max(2 * SHORT, min(balanced + round(missing / per_token), round(MAX_CONTEXT / LONGER)))
    else:
        raise LaminaError(f"bench pipeline: found no context with which both nodes are equally busy, up to {balanced}")
    return {
        "compute-bound": SHORT,
        "balanced": balanced,
        "attention-bound": round(LONGER * balanced),
    }


def _row(load_name: str, batches: int, context: int, window: Window, alone: Window) -> report.Row:
    compute, attention, step = window.compute_ms, window.attention_ms, window.step_ms
    comparable = round(window.tokens) == round(alone.tokens)
    return {
        "load": load_name,
        "batches": batches,
        "batch": round(window.tokens, 1),
        "context": context,
        "step_ms": step,
        "compute_ms": compute,
        "attention_ms": attention,
        "compute_alone_ms": alone.compute_ms,
        "attention_alone_ms": alone.attention_ms,
        "compute_contention": compute / alone.compute_ms if comparable else None,
        "attention_contention": attention / alone.attention_ms if comparable else None,
        "wire_ms": window.neither_ms,
        # This is the ratio of tokens per second; where batches are of equal size, it is that of the steps' times.
        "speedup_over_one": (window.tokens / step) / (alone.tokens / alone.step_ms),
        "step_over_max": step / max(compute, attention),
        "busy_compute": compute / step,
        "busy_memory": attention / step,
    }


# -- the cluster


class _PipelineBench:
    """A running cluster and a client of it."""

    def __init__(self, config: ClusterConfig, client: AsyncClient) -> None:
        self._config = config
        self._client = client

    async def measure(self, sequences: int, context: int) -> Window:
        """Decode ``sequences`` with prompts of ``context`` tokens, and trace the nodes for ``WINDOW_S`` seconds."""
        prompts = [[(7 * i + 13 * j) % MODEL.vocabulary for j in range(context)] for i in range(sequences)]
        streams = [self._client.stream(p, max_tokens=MAX_TOKENS, share_prefix=False) for p in prompts]
        readers = [_Reader(stream) for stream in streams]
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*(reader.read(SETTLE_STEPS) for reader in readers))
            before = await self._client.status()
            traces = await record(self._config, WINDOW_S)
            after = await self._client.status()
            if any(reader.ended for reader in readers):
                raise LaminaError("bench pipeline: an answer ended before the measurement did")
        finally:
            for reader in readers:
                await reader.close()
        while (await self._client.status()).requests_running:  # noqa: ASYNC110 - the node reports it only when asked
            await asyncio.sleep(0.01)
        tokens = (after.tokens_generated - before.tokens_generated) / (after.steps - before.steps)
        return Window.of(traces, tokens)


class _Reader:
    """Reads an answer and discards it."""

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream
        self._count = 0
        self._grown = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    @property
    def ended(self) -> bool:
        return self._task.done()

    async def read(self, count: int) -> None:
        """Wait until ``count`` tokens have arrived."""
        while self._count < count:
            if self._task.done():
                self._task.result()
                raise LaminaError("bench pipeline: an answer ended before it was measured")
            self._grown.clear()
            await self._grown.wait()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            async for _ in self._stream:
                self._count += 1
                self._grown.set()
        finally:
            self._grown.set()


@asynccontextmanager
async def _running(folder: Path, model: Path, batches: int, kind: type[FilledCluster]) -> AsyncIterator[_PipelineBench]:
    config = _write_config(folder, model, batches)
    with (folder / "nodes.log").open("wb") as log:
        async with kind(config, log_file=log) as cluster:
            await cluster.ready()
            async with connect(config.front.address, peer_timeout=PATIENCE_S) as client:
                yield _PipelineBench(config, client)


def _write_config(folder: Path, model: Path, batches: int) -> ClusterConfig:
    context = MAX_CONTEXT + MAX_TOKENS
    memory = BATCH * batches * context * MODEL.kv_bytes_per_token
    return write_pinned(
        folder,
        ModelConfig(path=str(model), dtype="bfloat16", context=context),
        PipelineConfig(batches=batches, max_batch=BATCH, prefill_tokens=2048),
        memory=min(memory, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2),
        peer_timeout=PATIENCE_S,
    )


# -- the timeline


def _blocks(window: Window) -> list[list[Any]]:
    """Return what each node computed in one step of batch 0, as far as it lies within the step."""
    ends = [s.end_s for s in window.compute if s.name == "sample" and s.batch == 0]
    start, end = ends[0], ends[1]
    return [
        [node, s.name, s.batch, s.layer, (max(s.start_s, start) - start) * 1e3, (min(s.end_s, end) - start) * 1e3]
        for node, spans in (("compute", window.compute), ("memory", window.memory))
        for s in spans
        if s.end_s > start and s.start_s < end
    ]

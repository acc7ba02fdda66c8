"""What flying several batches gains: two nodes of a processor each, whose work overlaps or does not.

A compute node and a memory node run as always, over shared memory, but that prompts cost nothing (`filled`). The
model is random, and its attention is as much work as all else at a context of one or two thousand tokens. That context
is found by measuring: with one batch in flight one node waits for the other, so that each is timed alone. Loads with a
shorter and a longer context are bound by computing and by attention. Everything is read from traces of the nodes'
devices: a step lasts from one sampling to the next, and a node is busy while it runs an operation.

No order of work can be faster than the slower node working without a pause, so a step's yardstick is the larger of what
both nodes spent on it while they overlapped; what that is above the same work alone is contention.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import Progress

from lamina.bench import report
from lamina.bench.checkpoints import Model, checkpoint
from lamina.bench.pinned import write_pinned
from lamina.bench.variants import two_processors
from lamina.client import Client, Stream, connect
from lamina.cluster.local import Cluster
from lamina.config import ClusterConfig, ModelConfig, NodeConfig, PipelineConfig
from lamina.errors import ConfigError, LaminaError
from lamina.ops.trace import Trace, record
from lamina.runtime.spans import Span

MODEL = Model("P", hidden=1024, ffn=2816, layers=12, heads=16, kv_heads=4, head_dim=128, vocabulary=4096)
"""Of grouped queries: there, k and v are little of the work, so that little of one batch alone overlaps."""
BATCH = 8
FLIGHTS, QUICK_FLIGHTS = (1, 2, 3, 4), (1, 2)
"""Batches in flight."""
SHORT, MIDDLE, MAX_CONTEXT = 64, 1024, 4096
"""Contexts: of the load that computing bounds; the first and the longest that are tried for the balanced one."""
BALANCED, TRIES = 0.05, 5
"""How far from each other attention and the rest may be in it, as a part; and how often a context is chosen anew."""
MIN_TOKEN_MS = 1e-4
"""The least that a token of context is taken to cost, where noise says less."""
LONGER = 2.0
"""The context of the load that attention bounds, by that of the balanced one."""
MAX_TOKENS = 256
"""Steps before a sequence is over, which have to suffice to fill all batches and measure."""
WINDOW_S = 1.0
SETTLE_STEPS = 3
START_S, PATIENCE_S = 90.0, 60.0

COLUMNS = {
    "load": "load",
    "batches": "n",
    "batch": "batch",
    "context": "context",
    "step_ms": "step ms",
    "compute_ms": "compute",
    "attention_ms": "attention",
    "wire_ms": "neither",
    "compute_contention": "x alone",
    "attention_contention": "x alone",
    "busy_compute": "busy",
    "busy_memory": "busy",
    "speedup_over_one": "speedup",
    "step_over_max": "step/max",
}


def run(*, as_json: bool, plot: Path | None, quick: bool) -> None:
    """Measure, print, and draw if asked."""
    if plot:
        report.figure_class()
    if two_processors()[0] < 0:
        raise ConfigError("bench pipeline: needs two processors, one for each node")
    rows, timeline = uvloop.run(_measure(quick=quick))
    if as_json:
        report.print_json(rows)
    else:
        report.print_table("steps of a pipeline of two nodes", rows, COLUMNS)
    if plot:
        _draw(plot, timeline)


# -- what is measured


@dataclass(frozen=True)
class Window:
    """What both nodes did between two samplings, and the mean time of the steps that ended in it."""

    compute: list[Span]
    memory: list[Span]
    start_s: float
    end_s: float
    steps: int
    tokens: float
    """Of a step, and so sequences of a batch."""

    @classmethod
    def of(cls, traces: dict[str, Trace], tokens: float) -> Window:
        compute, memory = ([s for s in traces[name].spans if s.batch >= 0] for name in ("c0", "m0"))
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
        """Time of a step in which neither node computes: the wire, the loops, and waking up."""
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
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as name, Progress(console=console) as progress:
        task = progress.add_task("pipeline", total=None)
        folder = Path(name)
        model = await asyncio.to_thread(checkpoint, MODEL)
        contexts: dict[str, int] = {}
        for batches in flights:
            async with _running(folder, model, batches, Filled) as bench:
                if not contexts:
                    contexts = await _choose(bench, alone)
                for load_name, context in contexts.items():
                    if quick and load_name != "balanced" and (batches > 1 or load_name not in alone):
                        continue  # there is only time for what was needed to find the context
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
                async with _running(folder, model, batches, QueryLast) as bench:
                    context = contexts["balanced"]
                    window = await bench.measure(BATCH * batches, context)
                    rows.append(_row("balanced, query last", batches, context, window, alone["balanced"]))
    assert timeline is not None
    return rows, timeline


async def _choose(bench: _Bench, measured: dict[str, Window]) -> dict[str, int]:
    """Contexts by load. Attention alone takes a time that grows evenly with the context; what is measured is kept."""
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
        # Of tokens per second: of a step's time where batches are of equal size.
        "speedup_over_one": (window.tokens / step) / (alone.tokens / alone.step_ms),
        "step_over_max": step / max(compute, attention),
        "busy_compute": compute / step,
        "busy_memory": attention / step,
    }


# -- the cluster


class Filled(Cluster):
    """Prompts cost its compute node nothing, so that contexts are there at once."""

    module = "filled"

    def command(self, node: NodeConfig) -> list[str]:
        if node.role == "memory":
            return super().command(node)
        return ["-m", f"lamina.bench.{self.module}", str(self._config.file), node.name]


class QueryLast(Filled):
    """And it sends q together with k and v, as if there were no query-first order."""

    module = "query_last"


class _Bench:
    """A running cluster and a client of it."""

    def __init__(self, config: ClusterConfig, client: Client) -> None:
        self._config = config
        self._client = client

    async def measure(self, sequences: int, context: int) -> Window:
        """Decode ``sequences`` with prompts of ``context`` tokens for a while."""
        prompts = [[(7 * i + 13 * j) % MODEL.vocabulary for j in range(context)] for i in range(sequences)]
        streams = [self._client.stream(p, max_tokens=MAX_TOKENS, share_prefix=False) for p in prompts]
        readers = [_Reader(stream) for stream in streams]
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*(reader.read(SETTLE_STEPS) for reader in readers))
            before = await self._client.status()
            traces = await record(self._config, WINDOW_S)
            after = await self._client.status()
            if any(reader.over for reader in readers):
                raise LaminaError("bench pipeline: an answer was over before the end of the measurement")
        finally:
            for reader in readers:
                await reader.close()
        while (await self._client.status()).requests_running:  # noqa: ASYNC110 - nobody sets an event
            await asyncio.sleep(0.01)
        tokens = (after.tokens_generated - before.tokens_generated) / (after.steps - before.steps)
        return Window.of(traces, tokens)


class _Reader:
    """Reads an answer to nobody."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._count = 0
        self._grown = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    @property
    def over(self) -> bool:
        return self._task.done()

    async def read(self, count: int) -> None:
        """Wait until so many tokens have come."""
        while self._count < count:
            if self._task.done():
                self._task.result()
                raise LaminaError("bench pipeline: an answer was over before it was measured")
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
async def _running(folder: Path, model: Path, batches: int, kind: type[Filled]) -> AsyncIterator[_Bench]:
    config = _write_config(folder, model, batches)
    with (folder / "nodes.log").open("wb") as log:
        async with kind(config, log_file=log) as cluster:
            await cluster.ready()
            async with connect(config.front.address, peer_timeout=PATIENCE_S) as client:
                yield _Bench(config, client)


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


# -- the picture


def _draw(path: Path, window: Window) -> None:
    """One step of each batch: what either node computes, layer by layer."""
    ends = [s.end_s for s in window.compute if s.name == "sample" and s.batch == 0]
    start, end = ends[0], ends[1]
    figure = report.figure_class()(figsize=(16, 4.5), layout="constrained")
    axes = figure.subplots()
    heights = {"compute": 1.0, "memory": 0.0}
    batches = sorted({s.batch for s in window.compute})
    shades = {"head": 0.95, "tail": 0.65, "past": 0.95, "finish": 0.65}
    for node, spans in (("compute", window.compute), ("memory", window.memory)):
        for s in spans:
            if s.end_s > start and s.start_s < end:
                at, width = (s.start_s - start) * 1e3, (s.end_s - s.start_s) * 1e3
                row = heights[node] + 0.45 * (s.batch % 2)
                axes.broken_barh([(at, width)], (row, 0.4), color=f"C{s.batch}", alpha=shades.get(s.name, 0.4))
                if s.name in ("tail", "past"):
                    axes.text(at + width / 2, row + 0.2, str(s.layer), ha="center", va="center", fontsize=6)
    axes.set_yticks([heights[node] + 0.42 for node in heights], list(heights))
    axes.set_xlim(0, (end - start) * 1e3)
    axes.set(xlabel="ms", title=f"One step of {len(batches)} batches in flight, by layer; a colour for each batch")
    figure.savefig(path, dpi=120)

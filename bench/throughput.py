"""Decode throughput of whole engines on this machine: Lamina's two nodes beside others, with the same checkpoints.

All systems have the same random weights and decode greedily in bfloat16. Only steps in which every sequence decodes
are timed, and a figure counts the tokens of all sequences together. Contexts are created without prefilling all
prompts: the caches of Lamina and vLLM are filled at random, while transformers and llama.cpp prefill one prompt and
copy its cache. In all systems every sequence has its own keys and values.

Each system uses the thread setting that does best in a short sweep at one small shape; in a quick run, all cores. Then
the systems take turns: round after round at each shape, in a different order each time. A plain read of the memory
precedes and follows each turn, because the bandwidth of a virtual machine changes within minutes. The benchmark reports
medians, and the median over the rounds of the ratio of Lamina to the best peer.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import Progress

from lamina.bench import plots, report
from lamina.bench.bandwidth import MAX_OTHERS, Bandwidth, OtherWork, free_bytes
from lamina.bench.checkpoints import MODELS, RandomLlama, checkpoint
from lamina.bench.installed import RECIPES, Environment, install
from lamina.bench.systems import CacheDemand, Lamina, PeerEngine, Sample, System, Work
from lamina.errors import ConfigError, LaminaError
from lamina.table import print_facts, print_text

Shape = tuple[int, int]
"""Batch and context."""

PEERS = tuple(RECIPES)
SHAPES = tuple((batch, context) for context in (512, 2048, 4096) for batch in (1, 8, 32))
QUICK_SHAPES = ((1, 512), (32, 2048))
SWEEP_SHAPE = (8, 512)
ROUNDS, QUICK_ROUNDS = 3, 1
SWEEP_ROUNDS = 2
"""The sweep counts the better of these rounds: threads that wait for each other are sometimes unusually slow."""

WARM_STEPS = 3
STEPS, QUICK_STEPS = (16, 96), (8, 48)
"""The fewest and the most steps that are timed."""
ASSUMED_RATE = 20e9
"""Between these limits, as many steps are timed as a machine that reads this many bytes per second does in a second."""
SETTLE_S = 0.3
"""How long idle OpenMP threads may spin before they release the cores."""

WEIGHT_COPIES = 1.5
"""The memory that the weights of a system take on average, in sizes of the file; some systems pack a second copy."""
SPARE_BYTES = 2 << 30
"""The memory that is left to everything else."""

COLUMNS = {
    "shape": "BxC",
    "system": "system",
    "tokens_per_s": "tokens/s",
    "step_ms": "step ms",
    "ratio": "ratio",
    "read_share": "of read",
    "bandwidth_before": "GB/s before",
    "bandwidth_after": "after",
}
PARTS = {
    "shape": "BxC",
    "step_ms": "step",
    "compute_ms": "compute",
    "attention_ms": "attention",
    "wire_ms": "wire",
    "read_ms": "plain read",
    "best_peer": "best peer",
    "peer_step_ms": "its step",
}

MEASURED = (
    *("tokens_per_s", "step_ms", "ratio", "best_peer", "peer_step_ms", "bandwidth_before", "bandwidth_after"),
    *("read_ms", "read_share", "compute_ms", "attention_ms", "wire_ms", "detail", "rounds"),
)
"""The keys that are None in the row of a system that failed. ``read_ms`` is the time of a plain read of the bytes that
a step must read, and ``read_share`` its share of the step. Only Lamina's rows have parts of a step and a best peer."""


def run(
    peers: Sequence[str],
    models: Sequence[str],
    shapes: Sequence[Shape] | None,
    *,
    as_json: bool,
    plot: Path | None,
    quick: bool,
) -> None:
    """Measure at ``shapes``, by default those of this module, and print; draw into ``plot`` if it is given."""
    plots.check(plot)
    _check("--peers", peers, PEERS)
    _check("--models", models, tuple(MODELS))
    comparison = _Comparison(Console(stderr=True), quick=quick)
    chosen = shapes or (QUICK_SHAPES if quick else SHAPES)
    try:
        rows = uvloop.run(comparison.run(list(dict.fromkeys(peers)), [MODELS[name] for name in models], chosen))
    finally:
        comparison.close()
    for row in rows:
        if row["failed"]:
            shape = f"{row['model']} at {row['batch']} x {row['context']}"
            print_text(f"{row['system']}, {shape}: {row['failed']}", comparison.console)
    if comparison.other_cores > MAX_OTHERS:
        busy = f"{comparison.other_cores:.2f} cores were busy in the pauses between the turns"
        print_text(f"{busy}; a quiet machine gives better figures", comparison.console)
    about = "bfloat16 weights, tokens/s of all sequences together"
    result = report.Result("throughput", about, rows, {**report.machine(), "other_cores": comparison.other_cores})
    if as_json:
        report.print_json(result)
    else:
        _print(rows)
    if plot:
        plots.draw(plot, result)


def parse_shapes(text: str) -> list[Shape]:
    """Parse a list such as "1x512,32x2048" into pairs of batch and context. ConfigError if it is not such a list."""
    shapes = []
    for part in text.split(","):
        batch, _, context = part.strip().partition("x")
        if not (batch.isdecimal() and context.isdecimal() and 1 <= int(batch) <= 1024 and 16 <= int(context) <= 8192):
            raise ConfigError(
                "--shapes: expected batch x context such as 1x512,32x2048, up to 1024 x 8192 and contexts from 16, "
                f"got {part!r:.50}"
            )
        shapes.append((int(batch), int(context)))
    return shapes


def _check(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")


@dataclass
class Turn:
    """One measurement, with the plain reads before and after it in GB/s."""

    sample: Sample
    before: float
    after: float


@dataclass
class Contestant:
    """A system with one model, and its results."""

    name: str
    system: System | None = None
    threads: str = ""
    """The chosen setting of its threads."""
    sweep: dict[str, float] = field(default_factory=dict)
    """The tokens/s of each thread setting, at the shape of the sweep."""
    failed: str = ""
    """Why the system cannot be measured at all."""
    failed_at: dict[Shape, str] = field(default_factory=dict)
    """Why the system cannot be measured at some shapes."""
    turns: dict[Shape, list[Turn]] = field(default_factory=dict)

    def why_not(self, shape: Shape) -> str:
        """Return why the system has no result at ``shape``; empty if it has one."""
        return self.failed or self.failed_at.get(shape, "")


class _Comparison:
    """All measurements of one run."""

    def __init__(self, console: Console, *, quick: bool) -> None:
        self.console = console
        self._quick = quick
        self._bandwidth = Bandwidth(len(os.sched_getaffinity(0)))
        self._others: list[float] = []

    @property
    def other_cores(self) -> float:
        """The average number of cores that were busy while no system was measured."""
        return statistics.mean(self._others) if self._others else 0.0

    def close(self) -> None:
        self._bandwidth.close()

    async def run(
        self, peers: Sequence[str], models: Sequence[RandomLlama], shapes: Sequence[Shape]
    ) -> list[report.Row]:
        """Return a row for each model, shape and system."""
        environments = {name: self._install(name) for name in peers}
        rows: list[report.Row] = []
        with report.progress(self.console) as progress:
            for model in models:
                if fitting := self._fitting(model, shapes, len(peers)):
                    rows += await self._compare(model, fitting, environments, progress)
        return rows

    def _install(self, name: str) -> Environment | str:
        """Return the environment, or the reason why there is none."""
        with self.console.status(f"installing {name}, which takes minutes the first time"):
            try:
                return install(name)
            except LaminaError as e:
                return str(e)

    def _fitting(self, model: RandomLlama, shapes: Sequence[Shape], peers: int) -> list[Shape]:
        """Return the shapes for which memory suffices while all systems run; a note names the others."""
        free = free_bytes()
        room = free - SPARE_BYTES - int(WEIGHT_COPIES * model.file_bytes * (1 + peers))
        # Two systems reserve their cache for the largest shape; of the others, one at a time has a cache.
        fitting = [s for s in shapes if 3 * self._work(model, s).tokens * model.kv_bytes_per_token <= room]
        if missing := ", ".join(f"{batch} x {context}" for batch, context in shapes if (batch, context) not in fitting):
            why = f"not enough memory, {free / 2**30:.1f} GiB are free"
            print_text(f"{model.name} at {missing} is left out: {why}", self.console)
        return fitting

    def _work(self, model: RandomLlama, shape: Shape) -> Work:
        fewest, most = QUICK_STEPS if self._quick else STEPS
        steps = round(ASSUMED_RATE / model.step_bytes(*shape))
        return Work(*shape, warm=WARM_STEPS, steps=min(max(steps, fewest), most))

    async def _compare(
        self,
        model: RandomLlama,
        shapes: Sequence[Shape],
        environments: Mapping[str, Environment | str],
        progress: Progress,
    ) -> list[report.Row]:
        batches, contexts = zip(*shapes, strict=True)
        sweep = self._work(model, (min(SWEEP_SHAPE[0], max(batches)), min(SWEEP_SHAPE[1], max(contexts))))
        works = {shape: self._work(model, shape) for shape in shapes}
        rounds = QUICK_ROUNDS if self._quick else ROUNDS
        task = progress.add_task("", total=(1 + len(environments)) * (1 + rounds * len(shapes)))

        def show(name: str, what: str) -> None:
            progress.update(task, description=f"{model.name} {what} {name}")

        show("", "making the checkpoint")
        path, demand = checkpoint(model), CacheDemand.of([*works.values(), sweep])
        contestants = [Contestant(Lamina.name, Lamina(model, path, demand))]
        for name, environment in environments.items():
            if isinstance(environment, str):
                contestants.append(Contestant(name, failed=environment))
            else:
                contestants.append(Contestant(name, PeerEngine(environment, model, path, demand)))
        try:
            for contestant in contestants:
                show(contestant.name, "threads of")
                await self._prepare(contestant, sweep)
                progress.advance(task)
            for shape, work in works.items():
                for turn in range(rounds):
                    first = turn % len(contestants)
                    for contestant in contestants[first:] + contestants[:first]:
                        show(contestant.name, f"{shape[0]} x {shape[1]}")
                        await self._take_turn(contestant, shape, work)
                        progress.advance(task)
        finally:
            for contestant in contestants:
                if contestant.system:
                    await contestant.system.close()
            progress.remove_task(task)
        return rows_of(model, shapes, contestants)

    async def _prepare(self, contestant: Contestant, sweep: Work) -> None:
        """Start the system and find the thread setting that suits it."""
        if contestant.system is None:
            return
        try:
            await contestant.system.start()
            default, *others = contestant.system.candidates
            if self._quick:
                contestant.threads = default
                return
            for threads in (*others, default):
                for _ in range(SWEEP_ROUNDS):
                    await self._quiet()
                    sample = await contestant.system.measure(sweep, threads)
                    contestant.sweep[threads] = max(contestant.sweep.get(threads, 0.0), sample.tokens_per_s)
        except LaminaError as e:
            contestant.failed = str(e)
            await contestant.system.close()
            return
        contestant.threads = max(contestant.sweep, key=lambda threads: contestant.sweep[threads])

    async def _quiet(self) -> None:
        """Let the threads of the last turn stop spinning, and record how busy other processes keep the cores."""
        await asyncio.sleep(SETTLE_S)
        others = OtherWork()
        await asyncio.sleep(SETTLE_S)
        self._others.append(others.cores())

    async def _take_turn(self, contestant: Contestant, shape: Shape, work: Work) -> None:
        if contestant.system is None or contestant.why_not(shape):
            return
        await self._quiet()
        before = self._bandwidth.all_threads()
        try:
            sample = await contestant.system.measure(work, contestant.threads)
        except LaminaError as e:
            contestant.failed_at[shape] = str(e)
            return
        await asyncio.sleep(SETTLE_S)
        contestant.turns.setdefault(shape, []).append(Turn(sample, before, self._bandwidth.all_threads()))


def rows_of(model: RandomLlama, shapes: Sequence[Shape], contestants: Sequence[Contestant]) -> list[report.Row]:
    """Return a row for each shape and contestant, also if it failed. The first is compared with the best other one."""
    own, *peers = contestants
    rows = []
    for shape in shapes:
        there = [peer for peer in peers if not peer.why_not(shape)]
        best = max(there, key=lambda peer: _median_rate(peer.turns[shape]), default=None)
        for contestant in contestants:
            row = _row(model, shape, contestant)
            if best and contestant is own and not row["failed"]:
                pairs = zip(own.turns[shape], best.turns[shape], strict=True)
                row["ratio"] = statistics.median(x.sample.tokens_per_s / y.sample.tokens_per_s for x, y in pairs)
                row |= {"best_peer": best.name, "peer_step_ms": shape[0] / _median_rate(best.turns[shape]) * 1e3}
            rows.append(row)
    return rows


def _row(model: RandomLlama, shape: Shape, contestant: Contestant) -> report.Row:
    batch, context = shape
    row: report.Row = {
        "model": model.name,
        "batch": batch,
        "context": context,
        "system": contestant.name,
        "version": contestant.system.version if contestant.system else "",
        "threads": contestant.threads,
        "sweep": contestant.sweep,
        **dict.fromkeys(MEASURED),
        "failed": contestant.why_not(shape),
    }
    if not row["failed"]:
        turns = contestant.turns[shape]
        rate = _median_rate(turns)
        middle = min(turns, key=lambda turn: abs(turn.sample.tokens_per_s - rate))
        step_s = batch / rate
        read_s = model.step_bytes(*shape) / 1e9 / statistics.median((t.before + t.after) / 2 for t in turns)
        row |= {
            "tokens_per_s": rate,
            "step_ms": step_s * 1e3,
            "bandwidth_before": statistics.median(turn.before for turn in turns),
            "bandwidth_after": statistics.median(turn.after for turn in turns),
            "read_ms": read_s * 1e3,
            "read_share": read_s / step_s,
            **{f"{part}_ms": value for part, value in middle.sample.parts_ms.items()},
            "detail": middle.sample.detail,
            "rounds": [
                {"tokens_per_s": turn.sample.tokens_per_s, "before": turn.before, "after": turn.after} for turn in turns
            ],
        }
    return row


def _median_rate(turns: Sequence[Turn]) -> float:
    return statistics.median(turn.sample.tokens_per_s for turn in turns)


def _print(rows: Sequence[report.Row]) -> None:
    for model in dict.fromkeys(row["model"] for row in rows):
        shown = [{**row, "shape": f"{row['batch']}x{row['context']}"} for row in rows if row["model"] == model]
        report.print_table(f"decode of model {model}: tokens/s of all sequences together", shown, COLUMNS)
        own = [row for row in shown if row["system"] == Lamina.name]
        report.print_table(f"the parts of a step of lamina, model {model}, in ms; wire includes waiting", own, PARTS)
        print_facts({f"threads of {row['system']}": row["threads"] for row in shown})

"""Decode throughput of a local cluster over the batch size, beside ``transformers`` in one process.

All sequences have the same prompt of token ids and generate greedily, until the model ends its answers or ``--tokens``
tokens are generated; ``transformers`` then runs as many steps as the longest answer has tokens. A figure counts the
tokens of all sequences from the first step that includes all of them to the last; the figure of ``transformers`` counts
its steps after the prompt. Both run in turns, several times, and the medians are compared. Each node uses one thread. A
short trial decides whether ``transformers`` gets one thread or one per core.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import uvloop

from lamina.bench import plots, report
from lamina.client import AsyncClient, AsyncStream, connect
from lamina.cluster.local import Cluster, local_config
from lamina.demo.run import CHECKPOINT
from lamina.errors import LaminaError
from lamina.model.checkpoint import Checkpoint
from lamina.ops.figures import Figures, between

BATCHES = (1, 4, 16, 64)
QUICK_BATCHES = (1, 16)
PROMPT_TOKENS = 32
TRIAL_BATCH, TRIAL_TOKENS = 4, 8
MIN_TOKENS = 8
"""A shorter answer ends before it can be measured."""

COLUMNS = {
    "batch": "batch",
    "tokens_per_s": "tokens/s",
    "transformers_tokens_per_s": "transformers",
    "ratio": "ratio",
    "layer_whole_us": "layer µs",
    "layer_compute_us": "compute",
    "layer_attention_us": "attend",
    "layer_wire_us": "wire",
    "wire_bytes_per_token": "B/token",
}


def run(
    model: Path | None, *, memory_nodes: int, tokens: int, repeats: int, as_json: bool, plot: Path | None, quick: bool
) -> None:
    """Measure and print; draw into ``plot`` if it is given."""
    plots.check(plot)
    model = model or CHECKPOINT
    Checkpoint.open(model, "float32")
    batches = QUICK_BATCHES if quick else BATCHES
    rows = uvloop.run(_measure(model, memory_nodes, batches, tokens, 1 if quick else repeats))
    name = "the demo's model" if model == CHECKPOINT else f"model {model.name}"
    about = f"{name}, float32, {memory_nodes} memory nodes, prompts of {PROMPT_TOKENS} tokens"
    about += f", links over {', '.join(sorted({row['transport'] for row in rows}))}"
    result = report.Result("decode", about, rows, report.machine())
    if as_json:
        report.print_json(result)
    else:
        title = "decode: tokens/s of all sequences together, and the parts of a layer's time in µs"
        report.print_table(title, rows, COLUMNS)
    if plot:
        plots.draw(plot, result)


async def _measure(
    model: Path, memory_nodes: int, batches: tuple[int, ...], tokens: int, repeats: int
) -> list[report.Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as folder, report.progress(transient=False) as progress:
        config = local_config(Path(folder), model, memory_nodes=memory_nodes, dtype="float32", memory=2**30)
        task = progress.add_task("decode", total=len(batches) * repeats)
        with (Path(folder) / "nodes.log").open("wb") as log, _TransformersYardstick(model) as yardstick:
            async with Cluster(config, log_file=log) as cluster:
                await cluster.ready()
                async with connect(config.front.address, peer_timeout=60.0) as client:
                    await _decode(client, cluster, 2, MIN_TOKENS)
                    await asyncio.to_thread(yardstick.choose_threads)
                    for batch in batches:
                        ours, theirs = [], []
                        for _ in range(repeats):
                            ours.append(await _decode(client, cluster, batch, tokens))
                            theirs.append(await asyncio.to_thread(yardstick.tokens_per_s, batch, ours[-1].tokens))
                            progress.advance(task)
                        rows.append(_row(batch, ours, theirs))
    return rows


@dataclass(frozen=True)
class _DecodeRun:
    """One run of a batch over the cluster."""

    figures: Figures
    """What the nodes did in the steps in which all sequences decode."""
    tokens: int
    """The tokens of the longest answer."""
    transport: str


async def _decode(client: AsyncClient, cluster: Cluster, batch: int, tokens: int) -> _DecodeRun:
    streams = [client.stream(list(range(1, PROMPT_TOKENS + 1)), max_tokens=tokens) for _ in range(batch)]
    await asyncio.gather(*(anext(s) for s in streams))
    before, started = await cluster.statuses(), time.perf_counter()

    async def rest(stream: AsyncStream) -> int:
        return len([token async for token in stream])

    longest = 1 + max(await asyncio.gather(*(rest(s) for s in streams)))
    seconds = time.perf_counter() - started
    if longest < MIN_TOKENS:
        raise LaminaError(f"the model ends its answer after {longest} tokens, too few to measure; use another model")
    after = await cluster.statuses()
    transport = ", ".join(sorted({peer.transport for status in after.values() for peer in status.peers}))
    return _DecodeRun(between(before, after, seconds), longest, transport)


def _row(batch: int, ours: list[_DecodeRun], theirs: list[float]) -> report.Row:
    run = sorted(ours, key=lambda r: r.figures.tokens_per_s)[len(ours) // 2]
    middle = run.figures
    yardstick = statistics.median(theirs)
    return {
        "batch": batch,
        "tokens_per_s": middle.tokens_per_s,
        "transformers_tokens_per_s": yardstick,
        "runs": [own.figures.tokens_per_s for own in ours],
        "transformers_runs": theirs,
        "ratio": middle.tokens_per_s / yardstick,
        **{f"layer_{name}_us": value for name, value in middle.layer_us.items()},
        "wire_bytes_per_token": middle.wire_bytes_per_token,
        "transport": run.transport,
    }


_SCRIPT = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, DynamicCache
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, local_files_only=True).eval()
for line in sys.stdin:
    batch, prompt_tokens, tokens, threads = json.loads(line)
    torch.set_num_threads(threads)
    ids = torch.arange(1, prompt_tokens + 1).repeat(batch, 1)
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        started = time.perf_counter()
        for _ in range(tokens - 1):
            ids = logits[:, -1].argmax(-1, keepdim=True)
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        seconds = time.perf_counter() - started
    print(batch * (tokens - 1) / seconds, flush=True)
"""


class _TransformersYardstick:
    """``transformers`` with its default cache, in a separate process."""

    def __init__(self, model: Path) -> None:
        self._threads = 1
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _SCRIPT, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> _TransformersYardstick:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def tokens_per_s(self, batch: int, tokens: int) -> float:
        """Return the tokens per second of ``batch`` sequences together, after their prompts."""
        return self._ask(batch, tokens, self._threads)

    def choose_threads(self) -> None:
        """Warm up, and use the faster number of threads from now on."""
        candidates = sorted({1, len(os.sched_getaffinity(0))})
        self._ask(TRIAL_BATCH, TRIAL_TOKENS, 1)
        self._threads = max(candidates, key=lambda threads: self._ask(TRIAL_BATCH, TRIAL_TOKENS, threads))

    def _ask(self, batch: int, tokens: int, threads: int) -> float:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([batch, PROMPT_TOKENS, tokens, threads]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise LaminaError("the yardstick process (transformers) has ended")
        return float(answer)

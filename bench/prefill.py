"""How much a long prompt slows down sequences that decode at the same time, by ``pipeline.prefill_tokens``.

A compute and a memory node run on one processor each, with one batch in flight. Some sequences decode: first alone,
then while long prompts arrive one after the other. A step then holds their rows and a chunk of a prompt, so it should
take no longer than a step without the chunk plus the chunk alone. This sum is the bound; its second part is measured
with a prompt of the same length while no sequence decodes. All times are taken by a client.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from lamina.bench import report
from lamina.bench.checkpoints import MODELS, checkpoint
from lamina.bench.pinned import write_pinned
from lamina.bench.streams import DecodingStreams
from lamina.bench.variants import two_processors
from lamina.client import AsyncClient, connect
from lamina.cluster.local import Cluster
from lamina.config import ClusterConfig, ModelConfig, PipelineConfig
from lamina.errors import ConfigError

MODEL = MODELS["S"]
SEQUENCES, CONTEXT = 8, 128
"""How many sequences decode, and the tokens of their prompts."""
PROMPT_TOKENS, QUICK_PROMPT_TOKENS = 2048, 512
PROMPTS, QUICK_PROMPTS = 4, 1
PREFILL_TOKENS = (128, 512)
ALONE_S = 1.0
MAX_TOKENS = 1500
"""The tokens that each of them generates, which must suffice for the whole measurement."""
PATIENCE_S = 60.0

COLUMNS = {
    "prefill_tokens": "chunk",
    "alone_ms": "ITL ms",
    "beside_ms": "beside",
    "longest_ms": "worst",
    "slowdown": "ratio",
    "chunk_ms": "chunk ms",
    "bound_ms": "bound",
    "of_bound": "/bound",
    "prompt_alone_s": "TTFT s",
    "prompt_beside_s": "beside s",
}
"""Inter-token latency (ITL) of the sequences that decode, alone and beside prompts, and time to the prompts' first
token (TTFT), alone and beside those sequences."""


def run(*, as_json: bool, quick: bool) -> None:
    """Measure and print the results."""
    if two_processors()[0] < 0:
        raise ConfigError("bench prefill: needs two processors, one for each node")
    prompts, tokens = (QUICK_PROMPTS, QUICK_PROMPT_TOKENS) if quick else (PROMPTS, PROMPT_TOKENS)
    rows = uvloop.run(_measure(prompts, tokens))
    if as_json:
        report.print_json(
            report.Result(
                "prefill",
                f"model {MODEL.name}, {SEQUENCES} sequences decode beside prompts of {tokens:,} tokens",
                rows,
                report.machine(),
            )
        )
    else:
        title = f"{SEQUENCES} sequences decode, alone and beside prompts of {tokens:,} tokens"
        report.print_table(title, rows, COLUMNS)


async def _measure(prompts: int, tokens: int) -> list[report.Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as name, report.progress(transient=False) as progress:
        task = progress.add_task("prefill", total=len(PREFILL_TOKENS))
        model = await asyncio.to_thread(checkpoint, MODEL)
        for prefill_tokens in PREFILL_TOKENS:
            async with _running(Path(name), model, prefill_tokens) as client:
                rows.append(await _row(client, prefill_tokens, prompts, tokens))
            progress.advance(task)
    return rows


async def _row(client: AsyncClient, prefill_tokens: int, prompts: int, tokens: int) -> report.Row:
    async def prompt_s() -> float:
        return statistics.fmean([await _prompt_s(client, tokens, seed=i) for i in range(prompts)])

    async with asyncio.timeout(PATIENCE_S * (1 + prompts)):
        await _prompt_s(client, prefill_tokens, seed=0)  # the first prompt takes longer
        prompt_alone_s = await prompt_s()
        decoders = [_tokens(CONTEXT, i) for i in range(SEQUENCES)]
        async with DecodingStreams("prefill", client, decoders, max_tokens=MAX_TOKENS) as decoding:
            await decoding.settle()
            started = time.perf_counter()
            await asyncio.sleep(ALONE_S)
            alone = decoding.between(started, time.perf_counter())
            started = time.perf_counter()
            prompt_beside_s = await prompt_s()
            # The client sees the end of a prompt a little late, when a step without a chunk may have begun.
            beside = decoding.between(started, time.perf_counter() - statistics.fmean(alone))
    alone_ms, beside_ms = statistics.fmean(alone) * 1e3, statistics.fmean(beside) * 1e3
    chunk_ms = prompt_alone_s * 1e3 / -(-tokens // prefill_tokens)
    return {
        "prefill_tokens": prefill_tokens,
        "sequences": SEQUENCES,
        "prompt_tokens": tokens,
        "alone_ms": alone_ms,
        "beside_ms": beside_ms,
        "longest_ms": max(beside) * 1e3,
        "slowdown": beside_ms / alone_ms,
        "chunk_ms": chunk_ms,
        "bound_ms": alone_ms + chunk_ms,
        "of_bound": beside_ms / (alone_ms + chunk_ms),
        "prompt_alone_s": prompt_alone_s,
        "prompt_beside_s": prompt_beside_s,
    }


async def _prompt_s(client: AsyncClient, tokens: int, seed: int) -> float:
    """Return the seconds from a request with a long prompt to its first token."""
    started = time.perf_counter()
    await client.generate(_tokens(tokens, seed), max_tokens=1, share_prefix=False)
    return time.perf_counter() - started


def _tokens(count: int, seed: int) -> list[int]:
    return [(7 * seed + 13 * i) % MODEL.vocabulary for i in range(count)]


@asynccontextmanager
async def _running(folder: Path, model: Path, prefill_tokens: int) -> AsyncIterator[AsyncClient]:
    config = _write_config(folder, model, prefill_tokens)
    with (folder / "nodes.log").open("wb") as log:
        async with Cluster(config, log_file=log) as cluster:
            await cluster.ready()
            async with connect(config.front.address, peer_timeout=PATIENCE_S) as client:
                yield client


def _write_config(folder: Path, model: Path, prefill_tokens: int) -> ClusterConfig:
    context = PROMPT_TOKENS + MAX_TOKENS
    return write_pinned(
        folder,
        ModelConfig(path=str(model), context=context),
        PipelineConfig(max_batch=SEQUENCES + 1, prefill_tokens=prefill_tokens),
        memory=(SEQUENCES + 2) * context * MODEL.kv_bytes_per_token,
        peer_timeout=PATIENCE_S,
    )

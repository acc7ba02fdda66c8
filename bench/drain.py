"""What those who decode notice while a memory node leaves, and how fast its keys and values move.

A compute node and three memory nodes share this machine, with sequences on one memory node each. Contexts are filled in
at random (`lamina.bench.filled`). The time between tokens is measured before one of the memory nodes is drained, and
while it is. The yardstick of a move is the bulk lane alone, between two processes that do nothing else.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import msgspec
import uvloop

from lamina.bench import report
from lamina.bench.checkpoints import MODELS, checkpoint
from lamina.bench.clusters import FilledCluster
from lamina.bench.ends import Task
from lamina.bench.streams import DecodingStreams
from lamina.bench.variants import find
from lamina.bench.yardsticks import Program
from lamina.client import AsyncClient, connect
from lamina.cluster.local import free_addresses
from lamina.config import (
    ClusterConfig,
    ComputeNodeConfig,
    MemoryNodeConfig,
    ModelConfig,
    PipelineConfig,
    TransportConfig,
    TransportKind,
    write_cluster,
)
from lamina.ops.drain import drained

MODEL = MODELS["S"]
TRANSPORTS: tuple[TransportKind, ...] = ("shm", "tcp")
MEMORY_NODES, SEQUENCES, CONTEXT, QUICK_CONTEXT = 3, 12, 4096, 512
BEFORE_S = 5.0
MAX_TOKENS = 3000
"""The tokens that each of them generates, which must suffice for the whole measurement."""
PATIENCE_S = 60.0
CHUNK_BYTES, CHUNKS_IN_FLIGHT = 1 << 18, 4
"""The writes of the yardstick."""

COLUMNS = {
    "transport": "by",
    "p50_ms": "ITL ms",
    "p99_ms": "p99",
    "drained_p50_ms": "drained ms",
    "drained_p99_ms": "its p99",
    "ratio": "ratio",
    "moved_mb": "MB",
    "seconds": "s",
    "mb_per_s": "MB/s",
    "bulk_mb_per_s": "bulk MB/s",
}
"""Inter-token latency (ITL), median and p99, before the drain and during it, and the ratio of the two p99."""


def run(*, as_json: bool, quick: bool) -> None:
    """Measure and print the results."""
    context = QUICK_CONTEXT if quick else CONTEXT
    rows = uvloop.run(_measure(TRANSPORTS[:1] if quick else TRANSPORTS, context))
    about = f"model {MODEL.name}, {SEQUENCES} sequences of {context:,} tokens on {MEMORY_NODES} memory nodes"
    if as_json:
        report.print_json(report.Result("drain", about, rows, report.machine()))
    else:
        report.print_table(f"one memory node leaves: {about}", rows, COLUMNS)


async def _measure(transports: tuple[TransportKind, ...], context: int) -> list[report.Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as name, report.progress(transient=False) as progress:
        task = progress.add_task("drain", total=len(transports))
        model = await asyncio.to_thread(checkpoint, MODEL)
        for transport in transports:
            bulk = await asyncio.to_thread(_bulk_bytes_per_s, Path(name), transport)
            config = _write_config(Path(name), model, transport, context)
            with (Path(name) / "nodes.log").open("wb") as log:
                async with FilledCluster(config, log_file=log) as cluster:
                    await cluster.ready()
                    async with connect(config.front.address, peer_timeout=PATIENCE_S) as client:
                        rows.append(await _row(config, client, transport, context, bulk))
            progress.advance(task)
    return rows


async def _row(
    config: ClusterConfig, client: AsyncClient, transport: str, context: int, bulk_bytes_per_s: float
) -> report.Row:
    prompts = [[(7 * i + 13 * j) % MODEL.vocabulary for j in range(context)] for i in range(SEQUENCES)]
    async with (
        asyncio.timeout(4 * PATIENCE_S),
        DecodingStreams("drain", client, prompts, max_tokens=MAX_TOKENS) as decoding,
    ):
        await decoding.settle()
        started = time.perf_counter()
        await asyncio.sleep(BEFORE_S)
        before = decoding.between(started, time.perf_counter())
        started = time.perf_counter()
        await drained(config, "m0", PATIENCE_S, lambda text: None)
        ended = time.perf_counter()
        during, status = decoding.between(started, ended), await client.status()
    p99_s, drained_p99_s = _p99(before), _p99(during)
    return {
        "transport": transport,
        "p50_ms": statistics.median(before) * 1e3,
        "p99_ms": p99_s * 1e3,
        "drained_p50_ms": statistics.median(during) * 1e3,
        "drained_p99_ms": drained_p99_s * 1e3,
        "ratio": drained_p99_s / p99_s,
        "moved_mb": status.moved_bytes / 1e6,
        "seconds": ended - started,
        "mb_per_s": status.moved_bytes / 1e6 / (ended - started),
        "bulk_mb_per_s": bulk_bytes_per_s / 1e6,
        "preemptions": status.preemptions,
    }


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[-1]


def _bulk_bytes_per_s(folder: Path, transport: str) -> float:
    program = Program.module("ends", msgspec.json.encode(find(transport, folder, (-1, -1), ())).decode())
    try:
        result = program.measure(Task("bandwidth", CHUNK_BYTES, 2 * CHUNKS_IN_FLIGHT, CHUNKS_IN_FLIGHT, 1.0))
    finally:
        program.close()
    return float(result["gbps"]) * 1e9


def _write_config(folder: Path, model: Path, transport: TransportKind, context: int) -> ClusterConfig:
    front, *others = free_addresses(1 + MEMORY_NODES)
    # Two nodes hold what three did.
    memory = SEQUENCES * (context + MAX_TOKENS) * MODEL.kv_bytes_per_token
    return write_cluster(
        folder / "cluster.toml",
        ModelConfig(path=str(model), context=context + MAX_TOKENS),
        [
            ComputeNodeConfig(name="c0", address=front, threads=1),
            *(
                MemoryNodeConfig(name=f"m{i}", address=address, threads=1, memory=memory)
                for i, address in enumerate(others)
            ),
        ],
        pipeline=PipelineConfig(max_batch=SEQUENCES, partition="requests"),
        transport=TransportConfig(kind=transport, peer_timeout=PATIENCE_S),
    )

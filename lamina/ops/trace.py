"""A trace of a running cluster: what each node's device did and when, as a file for Perfetto or Chrome."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lamina.admin import AdminClient
from lamina.config import ClusterConfig, NodeConfig
from lamina.errors import ConfigError, NodeError, TransportError
from lamina.runtime.spans import Span
from lamina.wire.admin import MAX_SPANS

R = TypeVar("R")

REACH_S = 5.0
"""How long a node may take to be reached."""
ROUND_TRIPS = 8
"""How many round trips compare two clocks; the shortest gives the best estimate."""
OTHER_ROW = 1000
"""The row of the spans that belong to no batch."""


@dataclass(frozen=True)
class Trace:
    """The spans of one node on the caller's clock, which may be off by up to ``round_trip_s`` between hosts."""

    spans: list[Span]
    round_trip_s: float


async def record(config: ClusterConfig, seconds: float) -> dict[str, Trace]:
    """Record every node of ``config`` for ``seconds``; return the traces by name. NodeError if a node fails."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(await _reach(config, node)) for node in config.node]

        async def of_all(ask: Callable[[AdminClient], Coroutine[Any, Any, R]]) -> list[R]:
            return list(await asyncio.gather(*map(_named, config.node, map(ask, clients))))

        await of_all(lambda client: client.record(seconds))
        await asyncio.sleep(seconds)
        traces = await of_all(_fetch)
    return {node.name: trace for node, trace in zip(config.node, traces, strict=True)}


def chrome(traces: Mapping[str, Trace]) -> dict[str, Any]:
    """Convert to the format of Chrome's trace viewer: a process for each node, and a row for each batch."""
    first = min((span.start_s for trace in traces.values() for span in trace.spans), default=0.0)
    events: list[dict[str, Any]] = []
    for process, (name, trace) in enumerate(traces.items(), 1):
        events.append({"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}})
        for row in sorted({_row(span) for span in trace.spans}):
            label = "other" if row == OTHER_ROW else f"batch {row}"
            events.append({"ph": "M", "pid": process, "tid": row, "name": "thread_name", "args": {"name": label}})
        events += [_event(process, span, first) for span in trace.spans]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def run(config: ClusterConfig, seconds: float, out: Path) -> None:
    """Record a trace and write it to ``out``."""
    traces = asyncio.run(record(config, seconds))
    try:
        out.write_text(json.dumps(chrome(traces)))
    except OSError as e:
        raise ConfigError(f"--out: {out} cannot be written: {e.strerror}") from e


def _event(process: int, span: Span, first: float) -> dict[str, Any]:
    event: dict[str, Any] = {
        "ph": "X",
        "pid": process,
        "tid": _row(span),
        "name": span.name,
        "ts": (span.start_s - first) * 1e6,
        "dur": (span.end_s - span.start_s) * 1e6,
    }
    return event | ({"args": {"layer": span.layer}} if span.layer >= 0 else {})


def _row(span: Span) -> int:
    return span.batch if span.batch >= 0 else OTHER_ROW


async def _reach(config: ClusterConfig, node: NodeConfig) -> AdminClient:
    try:
        return await AdminClient.connect(node.address, config.options(), name="trace", deadline_s=REACH_S)
    except TransportError as e:
        raise NodeError(f"node {node.name} cannot be reached: {e}", node=node.name) from e


async def _fetch(client: AdminClient) -> Trace:
    """Return what a node recorded, on this process's clock."""
    trips = [await _compare_clocks(client) for _ in range(ROUND_TRIPS)]
    round_trip, ahead = min(trips)
    if abs(ahead) <= round_trip:
        ahead = 0.0  # the estimate cannot be told from zero, as on one host with one clock
    spans: list[Span] = []
    while more := (await client.spans(MAX_SPANS)).spans:
        spans += more
    return Trace([s._replace(start_s=s.start_s - ahead, end_s=s.end_s - ahead) for s in spans], round_trip)


async def _compare_clocks(client: AdminClient) -> tuple[float, float]:
    """Return the time of a round trip, and how far ahead the node's clock is if both directions take as long."""
    before = time.perf_counter()
    clock = (await client.spans(0)).clock_s
    after = time.perf_counter()
    return after - before, clock - (before + after) / 2


async def _named(node: NodeConfig, work: Coroutine[Any, Any, R]) -> R:
    """Return the result of ``work``. NodeError with the node's name if the node is lost."""
    try:
        return await work
    except TransportError as e:
        raise NodeError(f"node {node.name} was lost: {e}", node=node.name) from e

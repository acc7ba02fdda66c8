"""A trace of a running cluster: what the device of each node did and when, as a file for Perfetto or Chrome."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.config import ClusterConfig, NodeConfig
from lamina.errors import ConfigError, NodeError, TransportError
from lamina.runtime.spans import Span
from lamina.transport import Hello, Link, connect
from lamina.wire.admin import MAX_SPANS, AskSpans, Record, Spans
from lamina.wire.codec import decode, encode

REACH_S = 5.0
"""How long a node may take to be reached."""
ROUND_TRIPS = 8
"""Of which the shortest tells most about the other clock."""
OTHER_ROW = 1000
"""The row of what belongs to no batch."""


@dataclass(frozen=True)
class Trace:
    """Spans of one node, by the clock of whoever asked; ``round_trip_s``: as uncertain it is where hosts differ."""

    spans: list[Span]
    round_trip_s: float


async def record(config: ClusterConfig, seconds: float) -> dict[str, Trace]:
    """What every node of ``config`` did in the next ``seconds``, by name. NodeError if one cannot be asked."""
    async with AsyncExitStack() as stack:
        asking = [await stack.enter_async_context(_Asking(config, node)) for node in config.node]
        await asyncio.gather(*(one.record(seconds) for one in asking))
        await asyncio.sleep(seconds)
        traces = await asyncio.gather(*(one.fetch() for one in asking))
    return {node.name: trace for node, trace in zip(config.node, traces, strict=True)}


def chrome(traces: Mapping[str, Trace]) -> dict[str, Any]:
    """In the format of Chrome's trace viewer: a process for each node, a row for each batch, microseconds."""
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
    """Record and write ``out``."""
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


class _Asking:
    """Asks one node, one question after the other."""

    def __init__(self, config: ClusterConfig, node: NodeConfig) -> None:
        self._config = config
        self._node = node

    async def __aenter__(self) -> _Asking:
        hello = Hello("monitor", "trace")
        try:
            link = await connect(self._node.listen, hello, self._config.options(), deadline_s=REACH_S)
        except TransportError as e:
            raise NodeError(f"node {self._node.name} cannot be reached: {e}", node=self._node.name) from e
        self._link: Link = link
        self._answer: asyncio.Future[Spans] = asyncio.get_running_loop().create_future()
        link.deliver(on_message=self._on_message, on_lost=self._on_lost)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._link.close()

    async def record(self, seconds: float) -> None:
        """Have the node begin."""
        await self._ask(Record(seconds=seconds))

    async def fetch(self) -> Trace:
        """What it recorded."""
        trips = [await self._compare_clocks() for _ in range(ROUND_TRIPS)]
        round_trip, ahead = min(trips)
        if abs(ahead) <= round_trip:
            ahead = 0.0  # one host, one clock: the estimate is worse than that
        spans: list[Span] = []
        while more := (await self._ask(AskSpans(count=MAX_SPANS))).spans:
            spans += more
        return Trace([s._replace(start_s=s.start_s - ahead, end_s=s.end_s - ahead) for s in spans], round_trip)

    async def _compare_clocks(self) -> tuple[float, float]:
        """The time of a round trip, and by how much the node's clock is ahead if both ways take as long."""
        before = time.perf_counter()
        clock = (await self._ask(AskSpans(count=0))).clock_s
        after = time.perf_counter()
        return after - before, clock - (before + after) / 2

    async def _ask(self, message: Record | AskSpans) -> Spans:
        self._answer = asyncio.get_running_loop().create_future()
        self._link.send(encode(message))
        return await self._answer

    def _on_message(self, plain: dict[str, Any]) -> None:
        if not self._answer.done():
            self._answer.set_result(decode(plain, Spans))

    def _on_lost(self, error: TransportError) -> None:
        if not self._answer.done():
            self._answer.set_exception(NodeError(f"node {self._node.name} was lost: {error}", node=self._node.name))

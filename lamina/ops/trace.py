"""A trace of a running cluster: what each node's device did and when, as a file for Perfetto or Chrome."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console

from lamina.admin import AdminClient
from lamina.config import ClusterConfig, NodeConfig
from lamina.errors import LaminaError, NodeError, TransportError
from lamina.files import check_target, write_whole
from lamina.ops.perfetto import Trace, chrome
from lamina.runtime.network import Network
from lamina.runtime.spans import MAX_SPANS as MAX_KEPT
from lamina.runtime.spans import Activity, Span
from lamina.table import print_text
from lamina.wire.admin import MAX_SPANS

R = TypeVar("R")
Clock = Callable[[], float]

REACH_S = 5.0
"""How long a node may take to be reached."""
ROUND_TRIPS = 8
"""How many round trips compare two clocks; the shortest gives the best estimate."""


async def record(
    config: ClusterConfig, seconds: float, *, network: Network | None = None, clock: Clock = time.perf_counter
) -> dict[str, Trace]:
    """Record every node of ``config`` for ``seconds``; return the traces by name. NodeError if a node fails.

    Their times are on ``clock``, by default the monotonic one that all processes of a host share.
    """
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(await _reach(config, node, network)) for node in config.node]

        async def of_all(ask: Callable[[AdminClient], Coroutine[Any, Any, R]]) -> list[R]:
            return list(await asyncio.gather(*map(_named, config.node, map(ask, clients))))

        await of_all(lambda client: client.record(seconds))
        await asyncio.sleep(seconds)
        traces = await of_all(lambda client: _fetch(client, clock))
    return {node.name: trace for node, trace in zip(config.node, traces, strict=True)}


def run(config: ClusterConfig, seconds: float, out: Path) -> None:
    """Record a trace, write it to ``out`` and say on standard error what is in it."""
    check_target(out, "--out")
    console = Console(stderr=True, highlight=False)
    print_text(f"recording {len(config.node)} nodes for {seconds:g} s", console)
    traces = asyncio.run(record(config, seconds))
    write(traces, seconds, out)
    spans = [span for trace in traces.values() for span in trace.spans]
    steps = {(span.batch, span.step) for span in spans if span.activity is Activity.REQUEST}
    requests = {span.request for span in spans if span.activity is Activity.REQUEST}
    counted = f"{len(steps)} steps of {len(requests)} request{'s' * (len(requests) != 1)}"
    print_text(f"{out}: {counted}; open it in ui.perfetto.dev", console)
    for name, trace in traces.items():
        if trace.forgotten:
            missing = f"the first {trace.forgotten} spans of {name} are missing, as it has room for {MAX_KEPT}"
            print_text(f"{missing}; record for fewer --seconds", console)


def write(traces: Mapping[str, Trace], seconds: float, out: Path) -> None:
    """Write traces of ``seconds`` to a file. LaminaError if nothing was computed, or if it cannot be written."""
    if not any(span.batch >= 0 for trace in traces.values() for span in trace.spans):
        raise LaminaError(
            f"--out: {out} was not written, as no node computed anything in the {seconds:g} s; have requests answered "
            f"meanwhile, or record for more --seconds"
        )
    write_whole(out, msgspec.json.encode(chrome(traces)), "--out")


async def _reach(config: ClusterConfig, node: NodeConfig, network: Network | None) -> AdminClient:
    options = config.options()
    try:
        return await AdminClient.connect(node.address, options, name="trace", deadline_s=REACH_S, network=network)
    except TransportError as e:
        raise NodeError(f"node {node.name} cannot be reached: {e}", node=node.name) from e


async def _fetch(client: AdminClient, clock: Clock) -> Trace:
    """Return what a node recorded, on the caller's clock."""
    trips = [await _compare_clocks(client, clock) for _ in range(ROUND_TRIPS)]
    round_trip, ahead = min(trips)
    if abs(ahead) <= round_trip:
        ahead = 0.0  # the estimate cannot be told from zero, as on one host with one clock
    spans: list[Span] = []
    while (more := await client.spans(MAX_SPANS)).spans:
        spans += more.spans
    spans = [s._replace(start_s=s.start_s - ahead, end_s=s.end_s - ahead) for s in spans]
    return Trace(spans, round_trip, more.forgotten)


async def _compare_clocks(client: AdminClient, clock: Clock) -> tuple[float, float]:
    """Return the time of a round trip, and how far ahead the node's clock is if both directions take as long."""
    before = clock()
    there = (await client.spans(0)).clock_s
    after = clock()
    return after - before, there - (before + after) / 2


async def _named(node: NodeConfig, work: Coroutine[Any, Any, R]) -> R:
    """Return the result of ``work``. NodeError with the node's name if the node is lost."""
    try:
        return await work
    except TransportError as e:
        raise NodeError(f"node {node.name} was lost: {e}", node=node.name) from e

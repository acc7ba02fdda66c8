"""Record what the devices of a running cluster do, by asking all its nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from lamina.admin import AdminClient
from lamina.config import ClusterConfig, NodeConfig
from lamina.errors import NodeError, TransportError
from lamina.runtime.network import Network
from lamina.runtime.spans import Activity, Span
from lamina.wire.admin import MAX_SPANS

R = TypeVar("R")
Clock = Callable[[], float]

REACH_S = 5.0
"""How long a node may take to be reached."""
ROUND_TRIPS = 8
"""How many round trips compare two clocks; the shortest gives the best estimate."""


@dataclass(frozen=True)
class Trace:
    """The spans of one node on the caller's clock, which may be off by up to ``round_trip_s`` between hosts.

    ``forgotten`` counts older spans for which the node had no room.
    """

    spans: list[Span]
    round_trip_s: float
    forgotten: int = 0

    def of(self, activity: Activity) -> list[Span]:
        """Return the spans of one kind."""
        return [span for span in self.spans if span.activity is activity]


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

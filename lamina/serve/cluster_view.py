"""What the page shows of the cluster: its nodes at this moment, and what all devices do in one step."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lamina.config import ClusterConfig
from lamina.errors import LaminaError
from lamina.recording import Trace, record
from lamina.runtime.network import Network
from lamina.runtime.spans import DECODE, Activity, Span
from lamina.watch import ClusterWatch, NodeView, front_of

FRESH_S = 0.5
"""However many ask, the nodes are asked no more often than this."""
RECORD_S = 0.5
"""How long the devices are recorded for a timeline."""
MAX_SHOWN = 4000
"""The most spans of one node in a timeline."""


class ClusterView:
    """Asks the nodes of ``config`` for the page. It is closed by `close`."""

    def __init__(self, config: ClusterConfig, *, network: Network | None = None) -> None:
        self._config = config
        self._network = network
        self._watch = ClusterWatch(config, name="page", network=network)
        self._views: list[NodeView] = []
        self._looked_s = float("-inf")
        self._looking = asyncio.Lock()
        self._recording = asyncio.Lock()

    def routes(self) -> list[Route]:
        """Return the routes of GET /cluster and POST /cluster/timeline."""
        return [
            Route("/cluster", self._get_cluster, methods=["GET"], include_in_schema=False),
            Route("/cluster/timeline", self._post_timeline, methods=["POST"], include_in_schema=False),
        ]

    async def close(self) -> None:
        """End the links to the nodes."""
        await self._watch.close()

    async def cluster(self) -> dict[str, Any]:
        """Return what all nodes say, at most half a second old."""
        now = asyncio.get_running_loop().time
        async with self._looking:
            if now() - self._looked_s > FRESH_S:
                self._views = await self._watch.look()
                self._looked_s = now()
        return described(self._views)

    async def timeline(self) -> dict[str, Any]:
        """Record all devices for half a second and return one step; an empty object if there was none.

        LaminaError if a node fails.
        """
        async with self._recording:
            return step_of(await record(self._config, RECORD_S, network=self._network))

    async def _get_cluster(self, request: Request) -> Response:
        return JSONResponse(await self.cluster())

    async def _post_timeline(self, request: Request) -> Response:
        if self._recording.locked():
            return _problem(429, "a step is being recorded already; try again in a second")
        try:
            return JSONResponse(await self.timeline())
        except LaminaError as e:
            return _problem(503, str(e))


def _problem(status: int, sentence: str) -> Response:
    error = {"message": sentence, "type": "cluster_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status)


def described(views: list[NodeView]) -> dict[str, Any]:
    """Return views of nodes as plain values. Rates are per second, and None before the second look."""
    front = front_of(views)
    status, rates = (front.status, front.rates) if front else (None, None)
    return {
        "object": "cluster",
        "ready": all(view.is_ready for view in views),
        "requests": {
            "running": status.requests_running if status else None,
            "waiting": status.requests_waiting if status else None,
            "preemptions": status.preemptions if status else None,
        },
        "tokens_per_s": rates.tokens if rates else None,
        "prompt_tokens_per_s": rates.prompt_tokens if rates else None,
        "shared_tokens_per_s": rates.shared_tokens if rates else None,
        "nodes": [_described(view) for view in views],
    }


def _described(view: NodeView) -> dict[str, Any]:
    status, rates = view.status, view.rates
    found: dict[str, Any] = {"name": view.node.name, "role": view.node.role, "state": "away", "text": view.state}
    if status is None:
        return found
    links = {link.peer: msgspec.to_builtins(link) for link in rates.links} if rates else {}
    return found | {
        "state": status.state,
        "busy": rates.busy if rates else None,
        "sequences": status.sequences,
        "kv_tokens_used": status.kv_tokens_total - status.kv_tokens_free,
        "kv_tokens_total": status.kv_tokens_total,
        "links": [links.get(p.name, {"peer": p.name, "transport": p.transport}) for p in status.peers],
    }


def step_of(traces: Mapping[str, Trace]) -> dict[str, Any]:
    """Return one decode step of a recording, the one of median length: what each device did meanwhile.

    Times are microseconds from the beginning of the step. ``other`` marks operations of other steps.
    """
    parts: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for trace in traces.values():
        for span in trace.of(Activity.REQUEST):
            parts[span.batch, span.step].append(span)
    steps = [spans for spans in parts.values() if any(span.name == DECODE for span in spans)]
    if not steps:
        return {}
    # Of a step that had begun before, devices have recorded only the rest.
    firsts = [operations[0].start_s for t in traces.values() if (operations := t.of(Activity.OPERATION))]
    steps = [spans for spans in steps if spans[0].start_s > max(firsts)] or steps
    steps.sort(key=lambda spans: spans[0].end_s - spans[0].start_s)
    spans = steps[len(steps) // 2]
    chosen = spans[0]
    nodes = [
        {"name": name, "spans": [_shown(span, chosen) for span in _meanwhile(trace, chosen)][:MAX_SHOWN]}
        for name, trace in traces.items()
    ]
    return {
        "batch": chosen.batch,
        "step": chosen.step,
        "requests": len(spans),
        "duration_us": _us(chosen.end_s - chosen.start_s),
        "clock_error_us": max(_us(trace.round_trip_s) for trace in traces.values()),
        "nodes": nodes,
    }


def _meanwhile(trace: Trace, step: Span) -> list[Span]:
    return [s for s in trace.of(Activity.OPERATION) if s.end_s > step.start_s and s.start_s < step.end_s]


def _shown(span: Span, step: Span) -> dict[str, Any]:
    start, end = max(span.start_s, step.start_s), min(span.end_s, step.end_s)
    return {
        "name": span.name,
        "layer": span.layer,
        "start_us": _us(start - step.start_s),
        "duration_us": _us(end - start),
        "other": (span.batch, span.step) != (step.batch, step.step),
    }


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)

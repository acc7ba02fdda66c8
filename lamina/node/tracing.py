"""Send a trace of each request to a collector of OpenTelemetry, where the environment names one.

The front makes the spans of a request when it ends, from times that it has taken anyway: nothing is done per token.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from lamina.errors import install_extra
from lamina.front.meter import EndedRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger("lamina.node")

VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""The standard variables, of which one names the collector. The exporter reads all others too."""
FLUSH_S = 2.0
"""How long the end of a node waits for the last spans to be sent."""


class RequestTraces:
    """Makes spans of requests: the whole, and within it queue, prefill and decode."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("lamina")
        self._propagator = TraceContextTextMapPropagator()

    def ended(self, request: EndedRequest) -> None:
        """Make the spans of a request that has just ended. Its client's ``traceparent`` is their parent."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        at = time.time_ns() - _ns(request.queued_s + request.prompt_s + request.answer_s)
        parent = self._propagator.extract({"traceparent": request.traceparent}) if request.traceparent else None
        whole = self._tracer.start_span(
            "request", parent, kind=SpanKind.SERVER, attributes=_attributes(request), start_time=at
        )
        within = set_span_in_context(whole)
        if request.reason:
            parts = (("queue", request.queued_s), ("prefill", request.prompt_s), ("decode", request.answer_s))
            for name, seconds in parts:
                self._tracer.start_span(name, within, start_time=at).end(at := at + _ns(seconds))
        else:
            at += _ns(request.answer_s)
        if request.error:
            whole.set_status(Status(StatusCode.ERROR, request.error))
        whole.end(at)

    async def close(self) -> None:
        """Send what is left, for a bounded time."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, FLUSH_S)


def open_traces(node: str) -> RequestTraces | None:
    """Return what sends traces, as the node called ``node``, if the environment names a collector.

    None as well where the packages for it are missing, which is logged.
    """
    if not any(os.environ.get(name) for name in VARIABLES):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        log.warning("event=no_traces reason=%r", f"{e.name} is missing; {install_extra('otel')}")
        return None
    named = {"service.instance.id": node} | ({} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "lamina"})
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    log.info("event=traces collector=%s", next(filter(None, map(os.environ.get, VARIABLES))))
    return RequestTraces(provider)


def _attributes(request: EndedRequest) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.output_tokens": request.tokens,
        "lamina.shared_tokens": request.shared_tokens,
        "lamina.preemptions": request.preemptions,
    }
    if request.name:
        attributes["gen_ai.request.id"] = request.name
    if request.reason:
        attributes["gen_ai.response.finish_reasons"] = [request.reason]
    return attributes


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)

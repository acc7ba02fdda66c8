"""Traces of requests for OpenTelemetry: what they hold, where they go, and what is said where packages are missing."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from lamina.demo.run import CHECKPOINT
from lamina.front.meter import EndedRequest
from lamina.node import tracing
from lamina.sim.cluster import SimCluster
from lamina.wire.requests import Request
from tests import harness
from tests.sim.clusters import eventually, make_config, simulate

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
INSTALLED = "the extra otel is not installed (CONTRIBUTING.md)"


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """In one line of the log, if a collector is named; else nothing is said or imported."""
    for name in tracing.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO):
        assert tracing.open_traces("c0") is None
        assert caplog.messages == []
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
        assert tracing.open_traces("c0") is None
    assert len(caplog.messages) == 1
    assert "pip install '.[otel]'" in caplog.messages[0]


def test_the_spans_of_a_request() -> None:
    """Queue, prefill and decode within the whole, which hangs on the client's span; and a request that was given up."""
    export = pytest.importorskip("opentelemetry.sdk.trace.export", reason=INSTALLED)
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason=INSTALLED)
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason=INSTALLED)
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    traces = tracing.RequestTraces(provider)
    ended: list[EndedRequest] = []

    class Nobody:
        """Takes an answer and does nothing with it."""

        def token(self, token: int, score: object = None) -> None: ...
        def prompt_scored(self, scores: object) -> None: ...
        def finished(self, end: object) -> None: ...
        def failed(self, error: object) -> None: ...

    async def work(cluster: SimCluster) -> None:
        intake = cluster.nodes["c0"].intake()  # type: ignore[union-attr]
        intake.meter.on_end = lambda request: (ended.append(request), traces.ended(request))
        request = Request([1, 2, 3], max_tokens=4, name="req-1", traceparent=f"00-{TRACE}-{SPAN}-01")
        await intake.submit(request, [1, 2, 3], Nobody())
        await eventually(lambda: has_ended(1))
        intake.cancel(await intake.submit(Request([1], max_tokens=100), [1], Nobody()))

    async def has_ended(count: int) -> bool:
        return len(ended) == count

    simulate(make_config(), work)
    spans = {span.name: span for span in exporter.get_finished_spans() if span.context.trace_id == int(TRACE, 16)}
    whole, parts = spans["request"], [spans[name] for name in ("queue", "prefill", "decode")]

    assert whole.parent.span_id == int(SPAN, 16)
    assert whole.attributes == {
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.request.id": "req-1",
        "gen_ai.response.finish_reasons": ("length",),
        "lamina.shared_tokens": 0,
        "lamina.preemptions": 0,
    }
    assert [part.parent.span_id for part in parts] == [whole.context.span_id] * 3
    assert [part.start_time for part in parts] == [whole.start_time, parts[0].end_time, parts[1].end_time]
    assert parts[-1].end_time == whole.end_time
    (other,) = (span for span in exporter.get_finished_spans() if span.context.trace_id != int(TRACE, 16))
    assert (other.name, other.status.description) == ("request", "the client gave it up")


def test_a_node_sends_its_traces(tmp_path: Path) -> None:
    """To the collector that the environment names, at the latest when it stops."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason=INSTALLED)
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    names: list[str] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names.extend(span.name for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        config = harness.write_config(tmp_path, CHECKPOINT, harness.free_ports(1))
        memory = harness.start_node(config, "m0")
        environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}"}
        command = [sys.executable, "-P", "-m", "lamina", "node", str(config.file), "--name", "c0"]
        with (
            harness.running(memory),
            (tmp_path / "c0.log").open("wb") as log,
            subprocess.Popen(command, env=environment, stderr=log) as front,
        ):
            try:
                asyncio.run(_ask(config))
            finally:
                front.terminate()
            assert front.wait(20) == 0
        collector.shutdown()
    assert sorted(names) == ["decode", "prefill", "queue", "request"]
    assert "event=traces" in (tmp_path / "c0.log").read_text()


async def _ask(config: Any) -> None:
    async with harness.client(config, deadline_s=60) as client:
        while (await client.status()).state != "ready":  # noqa: ASYNC110 - another process makes it so
            await asyncio.sleep(0.05)
        await client.generate("Once upon a time", max_tokens=4)

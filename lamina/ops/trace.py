"""A trace of a running cluster: what each node's device did and when, as a file for Perfetto or Chrome."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import msgspec
from rich.console import Console

from lamina.config import ClusterConfig
from lamina.errors import LaminaError
from lamina.files import check_target, write_whole
from lamina.ops.perfetto import chrome
from lamina.recording import Trace, record
from lamina.runtime.spans import MAX_SPANS as MAX_KEPT
from lamina.runtime.spans import Activity
from lamina.table import print_text


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

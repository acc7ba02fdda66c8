"""Recording of what a device computes: what is kept, and how it is written for a trace viewer."""

from __future__ import annotations

import asyncio

import pytest

from lamina.ops.perfetto import chrome
from lamina.recording import Trace
from lamina.runtime.cpu import CpuDevice
from lamina.runtime.crossing import Crossing
from lamina.runtime.spans import MAX_SPANS, Activity, Place, Recorder, Span


def test_the_last_spans_stay() -> None:
    """A ring: what does not fit any more is the oldest, and the order stays."""
    recorder = Recorder()
    added = [
        Span("head" if i % 2 else "tail", i % 3, i % 7, float(i), i + 0.5, i, f"m{i % 2}", Activity(i % 3), i)
        for i in range(MAX_SPANS + 10)
    ]
    for name, batch, layer, start, end, step, peer, activity, request in added:
        recorder.add(name, Place(batch, layer, step, peer), start, end, activity, request)
    assert list(recorder) == added[10:]
    assert recorder.forgotten == 10


def test_a_span_without_place() -> None:
    """What belongs to no batch, or to no layer, says -1."""
    recorder = Recorder()
    recorder.add("release", None, 1.0, 2.0)
    recorder.add("sample", Place(3), 2.0, 3.0)
    assert list(recorder) == [Span("release", -1, -1, 1.0, 2.0), Span("sample", 3, -1, 2.0, 3.0)]


def test_a_device_records_when_it_is_asked() -> None:
    """Spans of operations, failed ones too, in their order, and none before or after."""

    def work(number: int) -> int:
        return 1 // number

    async def main() -> list[Span]:
        device = CpuDevice(threads=1)
        device.start()
        there = Crossing(device.loop)
        await there.start(device.run(work, 1))
        device.recorder = recorder = Recorder()
        await there.start(device.run(work, 2, at=Place(1, 5)))
        with pytest.raises(ZeroDivisionError):
            await there.start(device.run(work, 0))
        device.recorder = None
        await there.start(device.run(work, 3))
        device.close()
        return list(recorder)

    first, second = asyncio.run(main())
    assert (first.name, first.batch, first.layer) == ("work", 1, 5)
    assert (second.name, second.batch, second.layer) == ("work", -1, -1)
    assert 0 < first.start_s <= first.end_s <= second.start_s <= second.end_s


def test_chrome_format() -> None:
    """A process for each node with a track for its device, in microseconds from the first span on."""
    traces = {
        "c0": Trace([Span("head", 0, 2, 10.0, 10.001), Span("load", -1, -1, 10.5, 11.0)], 1e-4),
        "m0": Trace([Span("past", 1, 2, 10.002, 10.004)], 1e-4),
    }
    events = chrome(traces)["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert [(e["pid"], e["tid"], e["name"]) for e in spans] == [(1, 1, "head"), (1, 1, "load"), (2, 1, "past")]
    assert [e["ts"] for e in spans] == pytest.approx([0, 500_000, 2_000])
    assert [e["dur"] for e in spans] == pytest.approx([1_000, 500_000, 2_000])
    assert [e["args"] for e in spans] == [{"batch": 0, "layer": 2}, {}, {"batch": 1, "layer": 2}]
    named = ("process_name", "thread_name")
    names = {(e["pid"], e["tid"], e["name"]): e["args"]["name"] for e in events if e["name"] in named}
    assert names == {
        (1, 0, "process_name"): "c0",
        (1, 1, "thread_name"): "device",
        (2, 0, "process_name"): "m0",
        (2, 1, "thread_name"): "device",
    }

"""What both daemons answer to whoever asks for a trace of their device."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import islice

from lamina.runtime.device import Device
from lamina.runtime.spans import Recorder, Span
from lamina.wire.admin import AskSpans, Record, Spans


class Tracing:
    """Records spans of one device for whoever asked last, for a bounded time."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._timer: asyncio.TimerHandle | None = None
        self._left: Iterator[Span] = iter(())

    def reply(self, asked: Record | AskSpans) -> Spans:
        """Begin to record, or stop and give out spans."""
        spans: list[Span] = []
        if isinstance(asked, Record):
            self._begin(asked.seconds)
        else:
            self._end()
            spans = list(islice(self._left, asked.count))
        return Spans(clock_s=time.perf_counter(), spans=spans)

    def _begin(self, seconds: float) -> None:
        self._end()
        self._device.recorder = Recorder()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._end)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        recorder, self._device.recorder = self._device.recorder, None
        if recorder is not None:
            self._left = iter(recorder)

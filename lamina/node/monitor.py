"""Both daemons answer operators: with their status, a trace of their device, and measurements of their links."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from lamina.errors import ConfigError, LaminaError
from lamina.node.probe import measure
from lamina.runtime.crossing import Crossing
from lamina.runtime.device import Device
from lamina.runtime.network import Network
from lamina.runtime.spans import Recorder, Span
from lamina.transport import Address, Link, Options
from lamina.wire.admin import AskSpans, AskStatus, Drain, Draining, Probe, Probed, Record, Spans, Status
from lamina.wire.codec import Message, decode
from lamina.wire.members import Accepted, Candidate
from lamina.wire.questions import send_unless_gone

CALLER_TIMEOUT_S = 30.0
"""The seconds of silence that clients and operators are allowed: their loops may be busy with other things than Lamina,
and a user may suspend them for a moment."""
MAX_PROBES = 64
"""The number of measurements that may wait for their turn."""

Asked = AskStatus | Record | AskSpans | Probe | Drain | Candidate


class Monitor:
    """Answers the questions of operators about one node, and those of nodes that would join, on the node's loop.

    The node is called ``name``, and ``status`` returns its state. It measures links to the nodes in ``ways`` and to no
    others. ``drain`` lets memory nodes leave, on the front alone; ``admit`` takes in the node that asks over a link.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        network: Network,
        options: Options,
        status: Callable[[], Coroutine[Any, Any, Status]],
        ways: Mapping[str, Address] | None = None,
        drain: Callable[[Drain], Coroutine[Any, Any, Draining]] | None = None,
        admit: Callable[[Link, Candidate], Coroutine[Any, Any, Accepted]] | None = None,
    ) -> None:
        self._name = name
        self._network = network
        self._options = options
        self._status = status
        self._ways = ways or {}
        self._drain = drain
        self._admit = admit
        self._tracing = _Tracing(device)
        self._probing = asyncio.Lock()
        self._probes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, link: Link) -> None:
        """Answer what comes over ``link`` from now on."""
        link.deliver(
            on_message=lambda plain: self.ask(link, decode(plain, Asked)),
            peer_timeout=CALLER_TIMEOUT_S,
        )

    def ask(self, link: Link, asked: Asked) -> None:
        """Answer one question over ``link``."""
        if isinstance(asked, Probe):
            if self._probes >= MAX_PROBES:
                error = f"{MAX_PROBES} measurements wait already; try again later"
                send_unless_gone(link, Probed(kind=asked.kind, error=error))
                return
            self._probes += 1
        task = asyncio.get_running_loop().create_task(self._answer(link, asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Stop answering."""
        for task in self._tasks:
            task.cancel()

    async def _answer(self, link: Link, asked: Asked) -> None:
        reply: Message
        match asked:
            case AskStatus():
                reply = await self._status()
            case Probe():
                reply = await self._probe(asked)
            case Drain() if self._drain is not None:
                reply = await self._drain(asked)
            case Drain():
                reply = Draining(error=f"{self._name} is not the front of a cluster, which decides what nodes hold")
            case Candidate() if self._admit is not None:
                reply = await self._admit(link, asked)
            case Candidate():
                reply = Accepted(error=f"{self._name} is not the front of a cluster, which takes nodes in")
            case _:
                reply = await self._tracing.reply(asked)
        send_unless_gone(link, reply)

    async def _probe(self, asked: Probe) -> Probed:
        """Measure a link to a node of this node's file, one at a time."""
        try:
            if asked.node not in self._ways:
                raise ConfigError(f"{self._name} knows no memory node called {asked.node!r}")
            async with self._probing:
                options = replace(self._options, kind=asked.kind)
                return await measure(self._network, self._ways[asked.node], self._name, options)
        except LaminaError as e:
            return Probed(kind=asked.kind, error=str(e))
        finally:
            self._probes -= 1


class _Tracing:
    """Records spans of one device for the last operator that asked, for a bounded time."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._there = Crossing(device.loop)
        self._timer: asyncio.TimerHandle | None = None
        self._left: Iterator[Span] = iter(())
        self._forgotten = 0

    async def reply(self, asked: Record | AskSpans) -> Spans:
        """Begin to record, or stop and return spans."""
        loop = asyncio.get_running_loop()
        recorded = await self._there.call(self._swap, Recorder() if isinstance(asked, Record) else None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        spans: list[Span] = []
        if isinstance(asked, Record):
            self._timer = loop.call_later(asked.seconds, self._stop)
            self._left, self._forgotten = iter(()), 0
        else:
            if recorded is not None:
                self._keep(recorded)
            spans = list(islice(self._left, asked.count))
        return Spans(clock_s=loop.time(), spans=spans, forgotten=self._forgotten)

    def _stop(self) -> None:
        """Stop recording when the time is over, and keep the spans until they are asked for."""

        async def stop() -> None:
            recorded = await self._there.call(self._swap, None)
            if recorded is not None:
                self._keep(recorded)

        self._stopping = asyncio.get_running_loop().create_task(stop())

    def _keep(self, recorded: Recorder) -> None:
        self._left, self._forgotten = iter(recorded), recorded.forgotten

    def _swap(self, recorder: Recorder | None) -> Recorder | None:
        """Record into ``recorder`` from now on, and return the recorder before; called on the device's loop."""
        before, self._device.recorder = self._device.recorder, recorder
        return before

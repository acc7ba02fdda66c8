"""Convert what nodes recorded to the JSON format of trace viewers, which Perfetto and Chrome read.

Every node is a process with a track for its device and one for each batch. Two more processes show what no node sees
alone: the wire, with a track for each batch of each pair of nodes, and the requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from lamina.recording import Trace
from lamina.runtime.spans import ANSWER, DECODE, PREFILL, QUERY, Activity, Span
from lamina.wire.tags import STEP_MASK

LEGEND = {
    "device": "what the node's device runs, one operation after the other; args say for which batch, layer and step",
    "begin, head, tail, sample": "a compute node: lay out a step; compute q; compute k, v; choose tokens",
    "attend_to_prompts": "a compute node: attention of chunks of prompts",
    "plan, past, finish": "a memory node: lay out a step; attend to the past; store k, v, attend to them, answer",
    "batch": "steps of a batch slot, on the front, with the requests in them; within, what the step waits for",
    "wire": "a query from its sending to its arrival, and the answer back",
    "requests": "what the front has done for a request: prefill, then decode",
    "arrows": "from the operation that made a query to the attention, and from there to the operation that needed it",
}
"""What a reader finds in a trace; the viewer shows it among the trace's data."""

_DEVICE = 1
_FIRST_BATCH = 10
"""The track of batch 0; the device has a lower one."""
_NANOSECOND = 1e-9

_Args = dict[str, Any]
_Event = dict[str, Any]


def chrome(traces: Mapping[str, Trace]) -> dict[str, Any]:
    """Convert the traces of nodes, by name, to one object in the format of Chrome's trace viewer."""
    viewer = _Viewer(min((span.start_s for trace in traces.values() for span in trace.spans), default=0.0))
    for name, trace in traces.items():
        _add_node(viewer, name, trace)
    _add_wire(viewer, traces)
    _add_requests(viewer, traces)
    data = {f"the clock of {name} is off by at most": f"{t.round_trip_s * 1e6:.0f} µs" for name, t in traces.items()}
    return {"displayTimeUnit": "ms", "otherData": LEGEND | data, "traceEvents": viewer.events}


class _Viewer:
    """Collects events in the units of the format: microseconds from the first span on."""

    def __init__(self, first_s: float) -> None:
        self.events: list[_Event] = []
        self._first_s = first_s
        self._flows = 0
        self._processes: dict[str, int] = {}
        self._threads: dict[tuple[str, str], int] = {}

    def track(self, process: str, thread: str, order: int | None = None) -> _Event:
        """Return what places an event on a track, which gets its names at the first call.

        ``order`` sorts a process's tracks, each of which has its own; without it, they are in the order of their
        first calls.
        """
        pid = self._processes.get(process)
        if pid is None:
            pid = self._processes[process] = len(self._processes) + 1
            self._name(pid, 0, "process_name", name=process)
            self._name(pid, 0, "process_sort_index", sort_index=pid)
        tid = self._threads.get((process, thread))
        if tid is None:
            tid = self._threads[process, thread] = len(self._threads) + 1 if order is None else order
            self._name(pid, tid, "thread_name", name=thread)
            self._name(pid, tid, "thread_sort_index", sort_index=tid)
        return {"pid": pid, "tid": tid}

    def slice(self, track: _Event, name: str, start_s: float, end_s: float, args: _Args) -> None:
        """Show that something took from ``start_s`` to ``end_s``."""
        ts, end = self._us(start_s), self._us(max(start_s, end_s))
        self.events.append({"ph": "X", **track, "name": name, "ts": ts, "dur": round(end - ts, 3), "args": args})

    def arrow(self, name: str, *points: tuple[_Event, float]) -> None:
        """Draw an arrow through the slices that are on these tracks at these times."""
        self._flows += 1
        phases = ["s", *["t"] * (len(points) - 2), "f"]
        for phase, (track, time_s) in zip(phases, points, strict=True):
            event = {"ph": phase, **track, "cat": "flow", "name": name, "id": self._flows, "ts": self._us(time_s)}
            self.events.append(event | ({} if phase == "s" else {"bp": "e"}))

    def _us(self, time_s: float) -> float:
        return round((time_s - self._first_s) * 1e6, 3)

    def _name(self, pid: int, tid: int, what: str, **args: Any) -> None:
        self.events.append({"ph": "M", "pid": pid, "tid": tid, "name": what, "args": args})


# -- a node


def _device(viewer: _Viewer, node: str) -> _Event:
    return viewer.track(node, "device", _DEVICE)


def _batch(viewer: _Viewer, node: str, batch: int) -> _Event:
    return viewer.track(node, f"batch {batch}", _FIRST_BATCH + batch)


def _add_node(viewer: _Viewer, node: str, trace: Trace) -> None:
    """Show the operations of a node's device, and for each batch its steps and what they wait for."""
    for span in trace.of(Activity.OPERATION):
        viewer.slice(_device(viewer, node), span.name, span.start_s, span.end_s, _args(span))
    for (batch, step), parts in _steps(trace):
        requests = {name: [part.request for part in parts if part.name == name] for name in (PREFILL, DECODE)}
        args = {"step": step} | {name: numbers for name, numbers in requests.items() if numbers}
        track = _batch(viewer, node, batch)
        viewer.slice(track, f"step {step}", parts[0].start_s, parts[0].end_s, args)
    for span in trace.of(Activity.WAIT):
        track, name = _batch(viewer, node, span.batch), f"wait for {span.peer}"
        viewer.slice(track, name, span.start_s, span.end_s, {"for": span.name, **_args(span)})


def _steps(trace: Trace) -> Iterator[tuple[tuple[int, int], list[Span]]]:
    """Return, by batch and step, what the steps did for requests."""
    parts = sorted(trace.of(Activity.REQUEST), key=lambda span: (span.batch, span.step))
    for key, group in groupby(parts, key=lambda span: (span.batch, span.step)):
        yield key, list(group)


def _args(span: Span) -> _Args:
    known = {"batch": span.batch, "layer": span.layer, "step": span.step}
    args: _Args = {name: number for name, number in known.items() if number >= 0}
    return args | ({"peer": span.peer} if span.peer else {})


# -- the wire


_Key = tuple[int, int, int]
"""Batch, layer, and the step as far as tags have it."""


class _Index:
    """Finds spans of a node by what they belong to."""

    def __init__(self, node: str, spans: Iterable[Span]) -> None:
        self.node = node
        self._spans: dict[tuple[Activity, str, _Key], list[Span]] = defaultdict(list)
        for span in spans:
            self._spans[span.activity, span.name, _key(span)].append(span)

    def find(self, activity: Activity, name: str, key: _Key, near_s: float, peer: str = "") -> Span | None:
        """Return the span nearest to a time, since step numbers of tags come again; of ``peer`` if it is given."""
        found = [s for s in self._spans.get((activity, name, key), ()) if not peer or s.peer == peer]
        return min(found, key=lambda span: abs(span.start_s - near_s), default=None)


def _key(span: Span, layers: int = 0) -> _Key:
    return span.batch, span.layer + layers, span.step & STEP_MASK if span.step >= 0 else -1


def _add_wire(viewer: _Viewer, traces: Mapping[str, Trace]) -> None:
    """Show the queries that the traced compute nodes sent and the answers that reached them, with arrows."""
    nodes = {name: _Index(name, trace.spans) for name, trace in traces.items()}
    for name, trace in traces.items():
        for sent in trace.of(Activity.SENT):
            if sent.name == QUERY and sent.peer in nodes:
                _add_query(viewer, nodes[name], nodes[sent.peer], sent)
        for arrived in trace.of(Activity.ARRIVED):
            if arrived.name == ANSWER and arrived.peer in nodes:
                _add_answer(viewer, nodes[name], nodes[arrived.peer], arrived)


def _add_query(viewer: _Viewer, compute: _Index, memory: _Index, sent: Span) -> None:
    key = _key(sent)
    arrived = memory.find(Activity.ARRIVED, QUERY, key, sent.start_s, compute.node)
    if arrived is None:
        return
    track = _travel(viewer, compute, memory, QUERY, sent, arrived)
    head = compute.find(Activity.OPERATION, "head", key, sent.start_s)
    past = memory.find(Activity.OPERATION, "past", key, arrived.start_s, compute.node)
    if head and past:
        points = (_device(viewer, compute.node), _last(head)), (track, sent.start_s)
        viewer.arrow(QUERY, *points, (_device(viewer, memory.node), past.start_s))


def _add_answer(viewer: _Viewer, compute: _Index, memory: _Index, arrived: Span) -> None:
    key = _key(arrived)
    sent = memory.find(Activity.SENT, ANSWER, key, arrived.start_s, compute.node)
    if sent is None:
        return
    track = _travel(viewer, compute, memory, ANSWER, sent, arrived)
    finish = memory.find(Activity.OPERATION, "finish", key, sent.start_s)
    needs = compute.find(Activity.OPERATION, "head", _key(arrived, layers=1), arrived.start_s) or compute.find(
        Activity.OPERATION, "sample", (key[0], -1, key[2]), arrived.start_s
    )
    if finish and needs:
        points = (_device(viewer, memory.node), _last(finish)), (track, sent.start_s)
        viewer.arrow(ANSWER, *points, (_device(viewer, compute.node), needs.start_s))


def _travel(viewer: _Viewer, compute: _Index, memory: _Index, name: str, sent: Span, arrived: Span) -> _Event:
    """Show something on its way. Return the track."""
    track = viewer.track("wire", f"{compute.node} – {memory.node}, batch {sent.batch}")
    viewer.slice(track, name, sent.start_s, arrived.start_s, _args(sent._replace(peer="")))
    return track


def _last(span: Span) -> float:
    """Return the last moment at which a span goes on, where an arrow can start."""
    return max(span.start_s, span.end_s - _NANOSECOND)


# -- requests


def _add_requests(viewer: _Viewer, traces: Mapping[str, Trace]) -> None:
    """Show for each request from when to when it was prefilled and decoded, without a break for every step."""
    parts = [span for trace in traces.values() for span in trace.of(Activity.REQUEST)]
    parts.sort(key=lambda span: (span.request, span.start_s))
    for request, own in groupby(parts, key=lambda span: span.request):
        track = viewer.track("requests", f"request {request}", request + 1)
        for name, group in groupby(own, key=lambda span: span.name):
            steps: Sequence[Span] = list(group)
            args = {
                "request": request,
                "batch": ", ".join(str(batch) for batch in sorted({span.batch for span in steps})),
                "steps": len(steps),
            }
            viewer.slice(track, name, steps[0].start_s, steps[-1].end_s, args)

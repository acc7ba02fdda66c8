"""Moving bytes between two nodes of this machine by each transport, beside minimal programs over the same medium.

Each end is a separate process, as a node is, on its own processor if there are two. A round trip is one write to the
far end and one of as many bytes back. Bandwidth is that of writes which are answered by empty ones, with a given number
of them in flight. The yardsticks do the same, on the same processors, in turns with Lamina. The figure of each is the
median over the turns of the turns' medians.

A ratio is one of times for round trips (1 is the yardstick, more is slower) and one of bandwidths for bandwidth (1 is
the yardstick, less is slower).
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from lamina.bench import plots, report
from lamina.bench.ends import Task
from lamina.bench.variants import VARIANTS, Setting, emulated, find, ports, two_processors
from lamina.bench.yardsticks import Mover, Program, Result, Tool, build
from lamina.errors import ConfigError, LaminaError, TransportError
from lamina.table import print_text

KIB, MIB = 1 << 10, 1 << 20
SIZES = (64, 512, 4 * KIB, 8 * KIB, 32 * KIB, 256 * KIB, 2 * MIB, 8 * MIB)
DEPTHS = (1, 4, 16)
QUICK_TRIPS, QUICK_FLOODS, QUICK_DEPTHS = (64, 8 * KIB, 256 * KIB), (8 * KIB, 2 * MIB), (1, 16)
SECONDS, QUICK_SECONDS = 0.2, 0.05
"""The duration of each turn."""
TURNS, QUICK_TURNS = 5, 3
SPAN = 32 * MIB
"""Writes use as many places in turn as are in flight at once, but no more than fit into this many bytes."""

PHASES = ("round_trip", "bandwidth")

COLUMNS = {
    "round_trip": {
        "size": "bytes",
        "p50_us": "p50 µs",
        "p99_us": "p99 µs",
        "yardstick": "yardstick",
        "yardstick_p50_us": "its p50",
        "ratio": "ratio",
        "cpu_write_us": "CPU near",
        "cpu_arrival_us": "CPU far",
    },
    "bandwidth": {
        "size": "bytes",
        "depth": "depth",
        "gbps": "GB/s",
        "yardstick": "yardstick",
        "yardstick_gbps": "its GB/s",
        "ratio": "ratio",
        "cpu_write_us": "CPU near",
        "cpu_arrival_us": "CPU far",
    },
}
"""The columns of each phase's table. CPU is the processor time of an end, in microseconds for each round trip, or for
each write and the empty one that answers it."""
TITLES = {"round_trip": "round trips", "bandwidth": "bandwidth"}

KEYS = (
    "phase",
    "transport",
    "size",
    "depth",
    "p50_us",
    "p99_us",
    "gbps",
    "cpu_write_us",
    "cpu_arrival_us",
    "yardstick",
    "yardstick_p50_us",
    "yardstick_p99_us",
    "yardstick_gbps",
    "ratio",
    "unavailable",
)
"""The keys of each row."""


def run(
    only: Sequence[str] | None, devices: Sequence[str] | None, *, as_json: bool, plot: Path | None, quick: bool
) -> None:
    """Measure the transports in ``only``, by default all, and print; draw into ``plot`` if it is given."""
    plots.check(plot)
    unknown = sorted(set(only or ()) - set(VARIANTS))
    if unknown:
        raise ConfigError(f"--transport: expected one of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    if devices and len(devices) > 2:
        raise ConfigError(f"--rdma-device: expected at most two, one for each end, got {', '.join(devices)}")
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as folder:
        bench = _TransportBench(Path(folder), console, devices or (), quick=quick)
        rows = bench.measure([name for name in VARIANTS if name in (only or VARIANTS)])
    how = "each end on its own processor" if two_processors()[0] >= 0 else "both ends on one processor"
    result = report.Result("transport", how, rows, bench.machine)
    if as_json:
        report.print_json(result)
    else:
        _print(rows, bench.machine)
    if plot:
        plots.draw(plot, result)


@dataclass
class _LinkYardstick:
    """What a transport is compared with, and in which phases."""

    name: str
    phases: tuple[str, ...]
    start: Callable[[], Mover]
    main: bool = True
    """Whether a quick run measures it as well."""


@dataclass
class _MeasuredTransport:
    """A transport as it can be used here, and its yardsticks."""

    name: str
    setting: Setting
    yardsticks: list[_LinkYardstick] = field(default_factory=list)


class _TransportBench:
    """One run over the transports of this machine."""

    def __init__(self, folder: Path, console: Console, devices: Sequence[str], *, quick: bool) -> None:
        self._folder = folder
        self._console = console
        self._quick = quick
        self._cpus = two_processors()
        self._wanted = devices
        self._pingpong: Path | None = None
        self.machine: dict[str, Any] = {
            **report.machine(),
            "pinned_to": list(self._cpus) if self._cpus[0] >= 0 else None,
            "tcp_congestion_control": _first_line("/proc/sys/net/ipv4/tcp_congestion_control"),
        }

    def measure(self, names: Sequence[str]) -> list[report.Row]:
        """Return a row for each transport, point and yardstick; an unavailable transport has one row that says why."""
        try:
            self._pingpong = build(self._folder)
        except LaminaError as error:
            print_text(f"the yardsticks in C are left out: {error}", self._console)
        rows: list[report.Row] = []
        points = _points(quick=self._quick)
        with report.progress(self._console, transient=False, auto_refresh=False) as progress:
            for name in names:
                task = progress.add_task(name, total=len(points))
                try:
                    with ExitStack() as stack:
                        transport = self._find(name)
                        for row in self._rows(transport, points, stack):
                            rows += row
                            progress.advance(task)
                            progress.refresh()
                except TransportError as error:
                    rows.append(_unavailable(name, str(error)))
                    progress.update(task, description=f"{name}: not available", completed=len(points))
                    progress.refresh()
        return rows

    def _rows(
        self, transport: _MeasuredTransport, points: Sequence[Task], stack: ExitStack
    ) -> Iterator[list[report.Row]]:
        """Measure one point after the other, and yield the rows of each."""
        setting = msgspec.json.encode(transport.setting).decode()
        ours = stack.enter_context(contextlib.closing(Program.module("ends", setting)))
        yardsticks: dict[str, tuple[_LinkYardstick, Mover]] = {}
        for yardstick in transport.yardsticks:
            if yardstick.main or not self._quick:
                mover = stack.enter_context(contextlib.closing(yardstick.start()))
                yardsticks[yardstick.name] = yardstick, mover
        for task in points:
            found: dict[str, list[Result]] = {"": []}
            for _ in range(QUICK_TURNS if self._quick else TURNS):
                found[""].append(ours.measure(task))
                for name, (yardstick, mover) in list(yardsticks.items()):
                    if task.phase not in yardstick.phases:
                        continue
                    try:
                        found.setdefault(name, []).append(mover.measure(task))
                    except TransportError as error:
                        self._leave_out(name, str(error))
                        del yardsticks[name]
                        found.pop(name, None)
            medians = {name: _medians(results) for name, results in found.items()}
            own = medians.pop("")
            yield [_row(transport.name, task, own, name, medians[name]) for name in medians] or [
                _row(transport.name, task, own, None, {})
            ]

    # -- what can be measured

    def _find(self, name: str) -> _MeasuredTransport:
        """Return the transport and its yardsticks. TransportError says why it cannot be measured here."""
        setting = find(name, self._folder, self._cpus, self._wanted)
        if setting.kind == "rdma":
            yardsticks = self._tools()
        elif self._pingpong is None:
            yardsticks = []
        elif setting.kind == "shm":
            yardsticks = [_LinkYardstick("eventfd", PHASES, self._c("eventfd"))]
            if setting.busy_poll:
                yardsticks.append(_LinkYardstick("polling", PHASES[:1], self._c("polling")))
            yardsticks.append(_LinkYardstick("memcpy", PHASES[1:], self._c("memcpy")))
        else:
            yardsticks = [_LinkYardstick("socket", PHASES, self._c("tcp"))]
        return _MeasuredTransport(name, setting, yardsticks)

    def _tools(self) -> list[_LinkYardstick]:
        """Return the yardsticks of RDMA that are installed."""
        near, far = ports(self._wanted)
        self.machine["rdma"] = {"near": near.device, "far": far.device, "emulated": emulated(near) and emulated(far)}
        places = (near.device, near.gid_index), (far.device, far.gid_index)
        arguments = near.device, far.device, *map(str, self._cpus)
        yardsticks = [_LinkYardstick("pyverbs", PHASES, lambda: Program.module("yardsticks.verbs", *arguments))]
        for tool, phases, main in (
            ("ib_write_bw", PHASES[1:], True),
            ("ibv_rc_pingpong", PHASES[:1], False),
            ("ib_write_lat", PHASES[:1], False),
        ):
            if not shutil.which(tool):
                self._leave_out(tool, "it is not installed")
            elif tool == "ib_write_lat" and self._cpus[0] < 0:
                self._leave_out(tool, "it polls, and both ends would share one processor")
            else:
                yardsticks.append(_LinkYardstick(tool, phases, functools.partial(Tool, tool, places, self._cpus), main))
        return yardsticks

    def _leave_out(self, yardstick: str, why: str) -> None:
        print_text(f"{yardstick} is left out: {why}", self._console)

    def _c(self, medium: str) -> Callable[[], Mover]:
        return lambda: Program([str(self._pingpong), medium, *map(str, self._cpus)])


def _points(*, quick: bool) -> list[Task]:
    seconds = QUICK_SECONDS if quick else SECONDS
    trips = [Task("round_trip", size, 1, 1, seconds) for size in (QUICK_TRIPS if quick else SIZES)]
    floods = [
        Task("bandwidth", size, max(1, min(depth, SPAN // size)), depth, seconds)
        for size in (QUICK_FLOODS if quick else SIZES)
        for depth in (QUICK_DEPTHS if quick else DEPTHS)
    ]
    return trips + floods


# -- results


def _medians(results: Sequence[Result]) -> Result:
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def _row(transport: str, task: Task, own: Result, yardstick: str | None, beside: Result) -> report.Row:
    trips = task.phase == "round_trip"
    ratio = None
    if trips and "p50_us" in beside:
        ratio = own["p50_us"] / beside["p50_us"]
    elif "gbps" in beside:
        ratio = own["gbps"] / beside["gbps"]
    return {
        "phase": task.phase,
        "transport": transport,
        "size": task.size,
        "depth": task.depth,
        "p50_us": own["p50_us"],
        "p99_us": own["p99_us"],
        "gbps": None if trips else own["gbps"],
        "cpu_write_us": own["cpu_write_us"],
        "cpu_arrival_us": own["cpu_arrival_us"],
        "yardstick": yardstick,
        "yardstick_p50_us": beside.get("p50_us"),
        "yardstick_p99_us": beside.get("p99_us"),
        "yardstick_gbps": None if trips else beside.get("gbps"),
        "ratio": ratio,
        "unavailable": None,
    }


def _unavailable(transport: str, why: str) -> report.Row:
    """Return the row of a transport that cannot be measured, which says why."""
    return {**dict.fromkeys(KEYS), "transport": transport, "unavailable": why}


def _print(rows: list[report.Row], machine: dict[str, Any]) -> None:
    for transport in dict.fromkeys(row["transport"] for row in rows):
        own = [row for row in rows if row["transport"] == transport]
        for phase, columns in COLUMNS.items():
            if there := [row for row in own if row["phase"] == phase]:
                report.print_table(f"{transport}: {TITLES[phase]}", there, columns)
        if why := own[-1]["unavailable"]:
            print_text(f"{transport}: not available: {why}")
    rdma = machine.get("rdma")
    if rdma and rdma["emulated"]:
        devices = " and ".join(dict.fromkeys((rdma["near"], rdma["far"])))
        print_text(f"{devices}: emulated by software, so only ratios are meaningful")


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None

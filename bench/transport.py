"""Moving bytes between two nodes of this machine by each transport, beside the least that the same medium can do.

Each end is a process of its own, as a node is, and on a processor of its own where there are two. A round trip is one
write there and one of as many bytes back. Bandwidth is that of writes to which only empty ones come back, so many of
them under way at once. The yardsticks do the same, on the same processors, in turns with Lamina: the median over the
turns of what each turn's median was is compared.

A ratio is of times for round trips (1 is the yardstick, more is slower), of bandwidths for bandwidth (less is slower).
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress

from lamina.bench import report
from lamina.bench.ends import Setting, Task
from lamina.bench.yardsticks import Contender, Program, Result, Tool, build
from lamina.errors import ConfigError, LaminaError, TransportError
from lamina.transport import RdmaOptions
from lamina.transport.lanes import UpgradeError
from lamina.transport.verbs import Port, find_port

KIB, MIB = 1 << 10, 1 << 20
SIZES = (64, 512, 4 * KIB, 8 * KIB, 32 * KIB, 256 * KIB, 2 * MIB, 8 * MIB)
DEPTHS = (1, 4, 16)
QUICK_TRIPS, QUICK_FLOODS, QUICK_DEPTHS = (64, 8 * KIB, 256 * KIB), (8 * KIB, 2 * MIB), (1, 16)
SECONDS, QUICK_SECONDS = 0.25, 0.08
"""Of each turn."""
TURNS, QUICK_TURNS = 7, 3
SPAN = 32 * MIB
"""Writes go to one place after the other, as many as are under way, but to no more bytes than this."""

PHASES = ("round_trip", "bandwidth")
TRANSPORTS = ("tcp", "tcp+tls", "shm", "shm+busy_poll", "rdma", "rdma+busy_poll")
DEVICES = Path("/sys/class/infiniband")

COLUMNS = {
    "round_trip": {
        "size": "bytes",
        "p50_us": "p50 µs",
        "p99_us": "p99 µs",
        "yardstick": "yardstick",
        "yardstick_p50_us": "p50 µs",
        "ratio": "ratio",
        "cpu_write_us": "CPU near",
        "cpu_arrival_us": "CPU far",
    },
    "bandwidth": {
        "size": "bytes",
        "depth": "depth",
        "gbps": "GB/s",
        "yardstick": "yardstick",
        "yardstick_gbps": "GB/s",
        "ratio": "ratio",
        "cpu_write_us": "CPU/write",
        "cpu_arrival_us": "CPU/arrival",
    },
}
"""By phase. A round trip is a write and an arrival at either end; for bandwidth an empty write comes back."""
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
"""Of each row."""


def run(
    only: Sequence[str] | None, devices: Sequence[str] | None, *, as_json: bool, plot: Path | None, quick: bool
) -> None:
    """Measure ``only`` these transports or all, print, and draw if asked."""
    if plot:
        report.figure_class()
    unknown = sorted(set(only or ()) - set(TRANSPORTS))
    if unknown:
        raise ConfigError(f"--transport: expected one of {', '.join(TRANSPORTS)}, got {', '.join(unknown)}")
    if devices and len(devices) > 2:
        raise ConfigError(f"--rdma-device: expected at most two, one of each end, got {', '.join(devices)}")
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="lamina-bench-") as folder:
        bench = _Bench(Path(folder), console, devices or (), quick=quick)
        rows = bench.measure([name for name in TRANSPORTS if name in (only or TRANSPORTS)])
    if as_json:
        report.print_json(rows, bench.machine)
    else:
        _print(rows, bench.machine)
    if plot:
        _draw(plot, rows)


@dataclass
class _Yardstick:
    name: str
    phases: tuple[str, ...]
    start: Callable[[], Contender]
    main: bool = True
    """Whether it is measured in a quick run, too."""


@dataclass
class _Transport:
    name: str
    setting: Setting
    yardsticks: list[_Yardstick] = field(default_factory=list)


class _Bench:
    def __init__(self, folder: Path, console: Console, devices: Sequence[str], *, quick: bool) -> None:
        self._folder = folder
        self._console = console
        self._quick = quick
        self._cpus = _two_processors()
        self._wanted = devices
        self._pingpong: Path | None = None
        self.machine: dict[str, Any] = {
            **report.machine(),
            "pinned_to": list(self._cpus) if self._cpus[0] >= 0 else None,
            "tcp_congestion_control": _first_line("/proc/sys/net/ipv4/tcp_congestion_control"),
        }

    def measure(self, names: Sequence[str]) -> list[report.Row]:
        """A row for each transport, point and yardstick; one that says why for each transport that is not there."""
        try:
            self._pingpong = build(self._folder)
        except LaminaError as error:
            self._console.print(f"there are no yardsticks in C: {error}", highlight=False, markup=False, soft_wrap=True)
        rows: list[report.Row] = []
        points = _points(quick=self._quick)
        with Progress(console=self._console, auto_refresh=False) as progress:
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

    def _rows(self, transport: _Transport, points: Sequence[Task], stack: ExitStack) -> Iterator[list[report.Row]]:
        """Of one point after the other."""
        setting = msgspec.json.encode(transport.setting).decode()
        ours = stack.enter_context(contextlib.closing(Program.module("ends", setting)))
        yardsticks: dict[str, tuple[_Yardstick, Contender]] = {}
        for yardstick in transport.yardsticks:
            if yardstick.main or not self._quick:
                contender = stack.enter_context(contextlib.closing(yardstick.start()))
                yardsticks[yardstick.name] = yardstick, contender
        for task in points:
            found: dict[str, list[Result]] = {"": []}
            for _ in range(QUICK_TURNS if self._quick else TURNS):
                found[""].append(ours.measure(task))
                for name, (yardstick, contender) in list(yardsticks.items()):
                    if task.phase not in yardstick.phases:
                        continue
                    try:
                        found.setdefault(name, []).append(contender.measure(task))
                    except TransportError as error:
                        self._console.print(
                            f"{name} is left out: {error}", highlight=False, markup=False, soft_wrap=True
                        )
                        del yardsticks[name]
                        found.pop(name, None)
            medians = {name: _medians(results) for name, results in found.items()}
            own = medians.pop("")
            yield [_row(transport.name, task, own, name, medians[name]) for name in medians] or [
                _row(transport.name, task, own, None, {})
            ]

    # -- what there is

    def _find(self, name: str) -> _Transport:
        """Raises TransportError with the reason why it cannot be measured here."""
        kind, _, variant = name.partition("+")
        cpus = self._cpus
        if variant == "busy_poll" and cpus[0] < 0:
            raise TransportError("who polls takes a processor, and there is but one for both ends")
        if kind == "rdma":
            return self._rdma(name, variant == "busy_poll")
        if kind == "shm":
            trips = [_Yardstick("eventfd", PHASES, self._c("eventfd"))]
            if variant == "busy_poll":
                trips.append(_Yardstick("polling", PHASES[:1], self._c("polling")))
            floods = _Yardstick("memcpy", PHASES[1:], self._c("memcpy"))
            setting = Setting(kind, busy_poll=variant == "busy_poll", cpus=cpus)
            return _Transport(name, setting, [*trips, floods] if self._pingpong else [])
        tls = str(make_certificate(self._folder)) if variant == "tls" else None
        yardsticks = [_Yardstick("socket", PHASES, self._c("tcp"))] if self._pingpong else []
        return _Transport(name, Setting(kind, tls=tls, cpus=cpus), yardsticks)

    def _rdma(self, name: str, busy_poll: bool) -> _Transport:
        ports = _ports(self._wanted)
        near, far = ports[0], ports[-1]
        emulated = all("/virtual/" in os.path.realpath(DEVICES / port.device) for port in (near, far))
        self.machine["rdma"] = {"near": near.device, "far": far.device, "emulated": emulated}
        devices = near.device, far.device
        cpus = [str(cpu) for cpu in self._cpus]
        yardsticks = [
            _Yardstick("pyverbs", PHASES, lambda: Program.module("yardsticks.verbs", *devices, *cpus)),
        ]
        for tool, phase, main in (("ib_write_bw", 1, True), ("ibv_rc_pingpong", 0, False), ("ib_write_lat", 0, False)):
            if tool == "ib_write_lat" and self._cpus[0] < 0:
                why = "it polls, and there is one processor for both ends"
            elif not shutil.which(tool):
                why = "it is not installed"
            else:
                places = (near.device, near.gid_index), (far.device, far.gid_index)
                start = functools.partial(Tool, tool, places, self._cpus)
                yardsticks.append(_Yardstick(tool, PHASES[phase : phase + 1], start, main))
                continue
            self._console.print(f"{tool} is left out: {why}", highlight=False)
        return _Transport(name, Setting("rdma", busy_poll=busy_poll, devices=devices, cpus=self._cpus), yardsticks)

    def _c(self, medium: str) -> Callable[[], Contender]:
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


def _two_processors() -> tuple[int, int]:
    """For the near and the far end: of two cores where there are, -1 where there is only one processor."""
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        return -1, -1
    siblings = _first_line(f"/sys/devices/system/cpu/cpu{first}/topology/thread_siblings_list") or ""
    twins = {int(cpu) for part in siblings.split(",") for cpu in part.split("-") if cpu}
    return first, next((cpu for cpu in others if cpu not in twins), others[0])


def _ports(wanted: Sequence[str]) -> list[Port]:
    """Ports that can be used: of the devices wanted, or of all there are. UpgradeError if there is none."""
    if wanted:
        return [find_port(RdmaOptions(device=name)) for name in wanted]
    ports = [find_port(RdmaOptions())]
    for name in sorted(entry.name for entry in DEVICES.iterdir()):
        with contextlib.suppress(UpgradeError):
            if name != ports[0].device:
                ports.append(find_port(RdmaOptions(device=name)))
    return ports[:2]


def make_certificate(folder: Path) -> Path:
    """Make ``node.pem`` and ``node.key`` in ``folder``; TransportError where that cannot be."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise TransportError("the command openssl, which would make a certificate, is not installed")
    request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-subj", "/CN=lamina", "-keyout", str(folder / "node.key"), "-out", str(folder / "node.pem")]
    done = subprocess.run([openssl, *request, *files], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TransportError(f"openssl made no certificate: {done.stderr.strip()[-300:]}")
    return folder


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
    """Says why there is nothing, in the place of what there might be."""
    return {**dict.fromkeys(KEYS), "transport": transport, "unavailable": why}


def _print(rows: list[report.Row], machine: dict[str, Any]) -> None:
    console = Console()
    for transport in dict.fromkeys(row["transport"] for row in rows):
        own = [row for row in rows if row["transport"] == transport]
        for phase, columns in COLUMNS.items():
            if there := [row for row in own if row["phase"] == phase]:
                report.print_table(f"{transport}: {TITLES[phase]}", there, columns)
        if why := own[-1]["unavailable"]:
            console.print(f"{transport}: not available: {why}", highlight=False, markup=False, soft_wrap=True)
    rdma = machine.get("rdma")
    if rdma and rdma["emulated"]:
        devices = " and ".join(dict.fromkeys((rdma["near"], rdma["far"])))
        console.print(f"{devices}: emulated by software, so that only ratios mean anything", highlight=False)


def _draw(path: Path, rows: list[report.Row]) -> None:
    """Round trips and bandwidth over the size; yardsticks are dashed."""
    figure = report.figure_class()(figsize=(11, 4.5), layout="constrained")
    for axes, (phase, key, label) in zip(
        figure.subplots(1, 2),
        (("round_trip", "p50_us", "round trip, p50 µs"), ("bandwidth", "gbps", "GB/s, most writes under way")),
        strict=True,
    ):
        there = [row for row in rows if row["phase"] == phase]
        deepest = max((row["depth"] for row in there), default=0)
        lines: dict[tuple[str, str], dict[int, float]] = {}
        for row in there:
            if row["depth"] == deepest:
                lines.setdefault((row["transport"], "o-"), {})[row["size"]] = row[key]
                if row[f"yardstick_{key}"] is not None:
                    lines.setdefault((row["yardstick"], ".--"), {})[row["size"]] = row[f"yardstick_{key}"]
        for (name, style), values in lines.items():
            axes.plot(list(values), list(values.values()), style, label=name)
        axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None

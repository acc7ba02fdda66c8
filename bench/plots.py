"""Pictures of benchmark results, all in one style: what is measured, under which conditions, on which machine.

A result comes from the run itself or from files that ``--json`` runs wrote. Where several runs of a benchmark are
given, or a run measured a point several times, a picture shows the medians and every single value's range.
"""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.bench.report import Result, Row
from lamina.bench.timeline import draw_timeline
from lamina.errors import ConfigError, install_extra
from lamina.files import check_target, write_whole

WIDTH, HEIGHT, DPI = 5.6, 3.9, 120
"""Inches of a chart, and pixels of an inch."""
LEGEND_WIDTH, LETTERS = 2.4, 11
"""Inches beside the charts, and letters of the heading in an inch."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b", "#7f7f7f", "#9467bd")
"""Okabe and Ito's, which readers with any vision can tell apart, and some more."""
BYTES = {1 << 20: "MiB", 1 << 10: "KiB"}

Values = dict[Any, list[float]]
"""What was measured at each x, one value for each run."""


@dataclass
class Chart:
    """One pair of axes. ``series`` maps what the legend says to the values; ``dashed`` ones are yardsticks."""

    title: str
    x: str
    y: str
    series: dict[str, Values] = field(default_factory=dict)
    bars: bool = False
    """Bars side by side over categories; otherwise lines, with both axes logarithmic."""
    dashed: set[str] = field(default_factory=set)
    level: float | None = None
    """Where a horizontal line says what the values are compared with."""
    in_bytes: bool = False
    """Whether x is a number of bytes."""

    def add(self, label: str, x: Any, value: float | Iterable[float] | None) -> None:
        """Add a value, or those of several runs; None is left out."""
        values = [] if value is None else [value] if isinstance(value, int | float) else list(value)
        if values:
            self.series.setdefault(label, {}).setdefault(x, []).extend(values)


def check(path: Path | None, option: str = "--plot") -> None:
    """Raise ConfigError if no picture can be drawn into ``path``; called before measuring, so that no run is lost."""
    if path is None:
        return
    formats = figure_class()().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise ConfigError(f"{option}: expected a file that ends in one of .{', .'.join(sorted(formats))}; got {path}")
    check_target(path, option)


def figure_class() -> Any:
    """Return matplotlib's Figure. ConfigError if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError(f"--plot: needs matplotlib, which is not installed; {install_extra('bench')}") from e

    def figure(**options: Any) -> Any:
        made = Figure(**options)
        FigureCanvasAgg(made)
        return made

    return figure


def draw(path: Path, result: Result, option: str = "--plot") -> None:
    """Draw a result into a file, whose name says the format."""
    charts = [chart for chart in CHARTS[result.bench](result.rows) if chart.series]
    if not charts and not result.timeline:
        raise ConfigError(f"{option}: bench {result.bench} measured nothing that could be drawn")
    columns = min(2, max(1, len(charts)))
    lines = -(-len(charts) // columns)
    size = (WIDTH * max(columns, 2 if result.timeline else 1) + LEGEND_WIDTH, HEIGHT * (lines + bool(result.timeline)))
    figure = figure_class()(figsize=size, layout="constrained")
    grid = figure.add_gridspec(lines + bool(result.timeline), columns)
    colours: dict[str, str] = {}
    if result.timeline:
        draw_timeline(figure.add_subplot(grid[0, :]), result.timeline, lambda label: _colour(colours, label))
    for i, chart in enumerate(charts):
        axes = figure.add_subplot(grid[i // columns + bool(result.timeline), i % columns])
        (_draw_bars if chart.bars else _draw_lines)(axes, chart, colours)
        axes.set_title(chart.title, fontsize=10, loc="left")
        axes.set(xlabel=chart.x, ylabel=chart.y)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=9)
    letters = int((size[0] - LEGEND_WIDTH) * LETTERS)
    heading = "\n".join(textwrap.fill(text, letters) for text in (result.title, result.conditions))
    figure.suptitle(heading, x=0.01, ha="left", fontsize=11)
    contents = io.BytesIO()
    figure.savefig(contents, dpi=DPI, format=path.suffix.removeprefix("."))
    write_whole(path, contents.getvalue(), option)


def _colour(colours: dict[str, str], label: str) -> str:
    """Return the colour of a label, the same in all charts of a picture."""
    return colours.setdefault(label, COLOURS[len(colours) % len(COLOURS)])


def _draw_lines(axes: Any, chart: Chart, colours: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for label, values in chart.series.items():
        xs = sorted(values)
        middle = [statistics.median(values[x]) for x in xs]
        spread = [[m - min(values[x]) for x, m in zip(xs, middle, strict=True)]]
        spread.append([max(values[x]) - m for x, m in zip(xs, middle, strict=True)])
        style = {"linestyle": "--", "marker": "."} if label in chart.dashed else {"linestyle": "-", "marker": "o"}
        several = spread if any(len(values[x]) > 1 for x in xs) else None
        axes.errorbar(
            xs, middle, yerr=several, label=label, color=_colour(colours, label), markersize=5, capsize=3, **style
        )
    axes.set(xscale="log", yscale="log")
    if chart.level is not None:
        axes.axhline(chart.level, color="black", linewidth=0.8)
    ticks = sorted({x for values in chart.series.values() for x in values})
    labels = [_bytes(x) if chart.in_bytes else f"{x:,}" for x in ticks]
    axes.set_xticks(ticks, labels, rotation=45 if len(ticks) > 6 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def _draw_bars(axes: Any, chart: Chart, colours: dict[str, str]) -> None:
    categories = list(dict.fromkeys(x for values in chart.series.values() for x in values))
    width = 0.8 / len(chart.series)
    for i, (label, values) in enumerate(chart.series.items()):
        at = {x: n + (i - (len(chart.series) - 1) / 2) * width for n, x in enumerate(categories) if x in values}
        heights = [statistics.median(values[x]) for x in at]
        axes.bar(list(at.values()), heights, width * 0.95, label=label, color=_colour(colours, label))
        single = [(place, value) for x, place in at.items() if len(values[x]) > 1 for value in values[x]]
        if single:
            axes.plot(*zip(*single, strict=True), ".", color="black", markersize=3, label="a single run")
    if chart.level is not None:
        axes.axhline(chart.level, color="black", linewidth=0.8)
    axes.set_xticks(range(len(categories)), categories, rotation=45 if len(categories) > 6 else 0)
    axes.grid(alpha=0.3, axis="y")


def _bytes(number: int) -> str:
    """Return a number of bytes in the unit that readers count them in."""
    for unit, name in BYTES.items():
        if number >= unit:
            return f"{number / unit:g} {name}"
    return f"{number} B"


# -- what is drawn of each benchmark


def _decode(rows: Sequence[Row]) -> list[Chart]:
    rates = Chart("throughput", "sequences in the batch", "tokens/s of all sequences")
    parts = Chart("parts of a layer's time, Lamina", "sequences in the batch", "µs", bars=True)
    for row in rows:
        rates.add("Lamina", row["batch"], row.get("runs") or row["tokens_per_s"])
        rates.add("transformers", row["batch"], row.get("transformers_runs") or row["transformers_tokens_per_s"])
        for part in ("compute", "attention", "wire"):
            parts.add(part, str(row["batch"]), row[f"layer_{part}_us"])
    rates.dashed = {"transformers"}
    return [rates, parts]


def _attention(rows: Sequence[Row]) -> list[Chart]:
    batches = {row["context"]: row["batch"] for row in rows if _is_main(row)}
    usual = statistics.mode(batches.values()) if batches else 0
    others = ", ".join(f"{batch} at {context:,}" for context, batch in batches.items() if batch != usual)
    shape = f"batch {usual}" + (f" ({others})" if others else "")
    chart = Chart(f"decode, {shape}, GQA 4, heads of 128", "context in tokens", "share of a plain read's bandwidth")
    threads = max((row["threads"] for row in rows), default=0)
    for row in rows:
        if _is_main(row) and row["threads"] == threads:
            label = f"{row['backend']}, {row['kv_dtype']}"
            chart.add(label, row["context"], row["ratio"])
            if row["backend"] not in ("native", "torch"):
                chart.dashed.add(label)
    return [chart]


def _is_main(row: Row) -> bool:
    """Return whether a row is one of those that are drawn: the usual heads, and the main batch of each context."""
    main = {(16, 512), (16, 2048), (16, 8192), (1, 32768)}
    return (row["phase"], row["gqa"], row["head_dim"]) == ("decode", 4, 128) and (row["batch"], row["context"]) in main


def _slices(rows: Sequence[Row]) -> list[Chart]:
    charts: dict[tuple[str, str], Chart] = {}
    for row in rows:
        title = f"{row['part']} of model {row['model']}"
        chart = charts.setdefault((row["model"], row["part"]), Chart(title, "rows in the batch", "share or speed-up"))
        chart.level = 1.0
        chart.add("of the read bandwidth", row["batch"], row["read_ratio"])
        chart.add("of peak arithmetic", row["batch"], row["peak_ratio"])
        chart.add("times oneDNN's products", row["batch"], row["products_ratio"])
    return list(charts.values())


def _transport(rows: Sequence[Row]) -> list[Chart]:
    trips = Chart("round trip, median", "bytes of each write", "µs", in_bytes=True)
    floods = Chart("bandwidth, most writes in flight", "bytes of each write", "GB/s", in_bytes=True)
    for chart, phase, key in ((trips, "round_trip", "p50_us"), (floods, "bandwidth", "gbps")):
        there = [row for row in rows if row["phase"] == phase]
        deepest = max((row["depth"] for row in there), default=0)
        for row in (row for row in there if row["depth"] == deepest):
            chart.add(row["transport"], row["size"], row[key])
            if row["yardstick"]:
                label = f"{row['yardstick']} (yardstick)"
                chart.add(label, row["size"], row[f"yardstick_{key}"])
                chart.dashed.add(label)
    return [trips, floods]


def _endpoint(rows: Sequence[Row]) -> list[Chart]:
    chart = Chart("tokens of all streams", "through", "tokens/s", bars=True)
    for row in rows:
        if not row["failed"]:
            chart.add("median and range", row["system"], [turn["tokens_per_s"] for turn in row["rounds"]])
    return [chart]


def _exchange(rows: Sequence[Row]) -> list[Chart]:
    charts: dict[int, Chart] = {}
    for row in rows:
        where = "each node on its own core" if row["cores"] > 1 else "both nodes on one core"
        chart = charts.setdefault(row["cores"], Chart(where, "batch x batches in flight", "µs a layer", bars=True))
        x = f"{row['batch']} x {row['batches']}"
        chart.add("a layer without work", x, row["exchange_us"])
        chart.add("bare round trip", x, row["round_trip_us"])
    return list(charts.values())


def _simulate(rows: Sequence[Row]) -> list[Chart]:
    chart = Chart("speed of the simulation", "compute + memory nodes", "steps/s", bars=True)
    for row in rows:
        label = {"null": "operations and links take no time", "timed": "with modelled times"}[row["clock"]]
        chart.add(label, f"{row['compute']} + {row['memory']}", row["steps_per_s"])
    return [chart]


def _pipeline(rows: Sequence[Row]) -> list[Chart]:
    charts: dict[str, Chart] = {}
    for row in rows:
        chart = charts.setdefault(row["load"], Chart(row["load"], "batches in flight", "ms", bars=True))
        for part in ("step", "compute", "attention", "wire"):
            label = {"step": "whole step", "wire": "neither node"}.get(part, part)
            chart.add(label, str(row["batches"]), row[f"{part}_ms"])
    return list(charts.values())


def _drain(rows: Sequence[Row]) -> list[Chart]:
    chart = Chart("time between tokens", "transport", "ms, p99", bars=True)
    for row in rows:
        chart.add("before", row["transport"], row["p99_ms"])
        chart.add("while a memory node leaves", row["transport"], row["drained_p99_ms"])
    return [chart]


def _pool(rows: Sequence[Row]) -> list[Chart]:
    chart = Chart(
        "contexts with a long tail", "trace", "virtual tokens/s over those without moves", bars=True, level=1.0
    )
    for row in rows:
        chart.add(row["system"], row["trace"], row["ratio"])
    return [chart]


def _prefill(rows: Sequence[Row]) -> list[Chart]:
    chart = Chart("time between tokens of those who decode", "tokens of a prompt's chunk", "ms", bars=True)
    for row in rows:
        x = f"{row['prefill_tokens']:,}"
        chart.add("alone", x, row["alone_ms"])
        chart.add("beside prompts", x, row["beside_ms"])
        chart.add("step alone + chunk alone (bound)", x, row["bound_ms"])
    return [chart]


def _throughput(rows: Sequence[Row]) -> list[Chart]:
    charts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        found: dict[str, Values] = {}
        for row in rows:
            if row["model"] == model and not row["failed"]:
                rates = [turn["tokens_per_s"] for turn in row["rounds"] or ()] or [row["tokens_per_s"]]
                found.setdefault(row["system"], {}).setdefault((row["batch"], row["context"]), []).extend(rates)
        chart = Chart(f"model {model}", "batch x context", "tokens/s over the best peer's", bars=True, level=1.0)
        for shape in dict.fromkeys(shape for values in found.values() for shape in values):
            peers = [statistics.median(v[shape]) for name, v in found.items() if name != "lamina" and shape in v]
            for system, values in found.items():
                if peers and shape in values:
                    chart.add(system, f"{shape[0]} x {shape[1]:,}", [rate / max(peers) for rate in values[shape]])
        charts.append(chart)
    return charts


CHARTS: dict[str, Callable[[Sequence[Row]], list[Chart]]] = {
    "attention": _attention,
    "decode": _decode,
    "drain": _drain,
    "endpoint": _endpoint,
    "exchange": _exchange,
    "pipeline": _pipeline,
    "pool": _pool,
    "prefill": _prefill,
    "simulate": _simulate,
    "slices": _slices,
    "throughput": _throughput,
    "transport": _transport,
}

"""How results are shown: a table for people, one JSON object for programs, a plot for comparisons."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lamina.errors import ConfigError

Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    name = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def print_json(rows: Sequence[Row], on: Mapping[str, Any] | None = None) -> None:
    """``on``: what the figures were taken on, if more is known than `machine` says."""
    sys.stdout.write(json.dumps({"machine": on or machine(), "rows": list(rows)}, indent=2) + "\n")


def print_table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """``columns`` maps the keys to show to their headings."""
    table = Table(title=title)
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(_short(row[key]) for key in columns))
    Console().print(table)


def _short(value: Any) -> str:
    """Three digits are all that a noisy machine gives."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def figure_class() -> Any:
    """Of matplotlib; ConfigError without it. To be called before anything is measured in vain."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError("--plot: needs matplotlib; install it with: pip install 'lamina[bench]'") from e
    return Figure


def draw(path: Path, rows: Sequence[Row], *, x: str, ys: Sequence[str], ylabel: str, title: str) -> None:
    """Lines of the columns ``ys`` over the column ``x``, both axes logarithmic; a row may lack some of ``ys``.

    ConfigError without matplotlib.
    """
    figure = figure_class()(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for y in ys:
        there = [row for row in rows if y in row]
        axes.plot([row[x] for row in there], [row[y] for row in there], marker="o", label=y)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=ylabel, title=title)
    axes.set_xticks([row[x] for row in rows], [str(row[x]) for row in rows])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

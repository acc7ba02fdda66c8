"""How benchmarks show their results: a table for people, one JSON object for programs, a plot for comparisons."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lamina import table
from lamina.errors import ConfigError, install_extra

Row = dict[str, Any]

_BAR_WIDTH = 20
"""Short enough that a line of 80 columns has room for the longest description."""


def machine() -> dict[str, Any]:
    """Describe the machine on which the figures are taken."""
    name = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def progress(console: Console | None = None, *, transient: bool = True, auto_refresh: bool = True) -> Progress:
    """Return a progress bar on ``console``, by default standard error; it is shown only on a terminal.

    A transient bar leaves no line behind.
    """
    columns = (TextColumn("{task.description}"), BarColumn(_BAR_WIDTH), TaskProgressColumn(), TimeRemainingColumn())
    console = console or Console(stderr=True)
    shown = console.is_terminal
    return Progress(*columns, console=console, transient=transient, auto_refresh=auto_refresh, disable=not shown)


def print_json(rows: Sequence[Row], on: Mapping[str, Any] | None = None) -> None:
    """Print one JSON object; ``on`` describes the machine if more is known than `machine` says."""
    sys.stdout.write(json.dumps({"machine": on or machine(), "rows": list(rows)}, indent=2) + "\n")


def print_table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print the values of ``rows`` whose keys are in ``columns``, which maps them to headings; then an empty line."""
    table.print_table(list(columns.values()), [[row[key] for key in columns] for row in rows], title=title)
    sys.stdout.write("\n")


def figure_class() -> Any:
    """Matplotlib's Figure. ConfigError if matplotlib is missing; call this before measuring, so that no run is lost."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError(f"--plot: needs matplotlib, which is not installed; {install_extra('bench')}") from e
    return Figure


def draw(path: Path, rows: Sequence[Row], *, x: str, ys: Sequence[str], ylabel: str, title: str) -> None:
    """Draw the columns ``ys`` over the column ``x``, both axes logarithmic; a row may lack some of ``ys``.

    ConfigError if matplotlib is missing.
    """
    figure = figure_class()(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for y in ys:
        known = [row for row in rows if y in row]
        axes.plot([row[x] for row in known], [row[y] for row in known], marker="o", label=y)
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

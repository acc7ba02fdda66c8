"""How benchmarks show their results: a table for people, one JSON object for programs and pictures."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lamina import table
from lamina.errors import ConfigError

Row = dict[str, Any]

TITLES = {
    "attention": "Attention on a memory node's CPU",
    "decode": "Decoding over local nodes, beside transformers in one process",
    "drain": "Decoding while a memory node leaves",
    "endpoint": "Streams over HTTP, beside the Python client",
    "exchange": "What a layer of one batch costs besides its work",
    "pipeline": "Several batches in flight, on a compute and a memory node with one processor each",
    "pool": "All memory nodes as one pool, on the virtual clock",
    "prefill": "Decoding beside long prompts",
    "simulate": "Simulated clusters that compute nothing",
    "slices": "Slices on the CPU",
    "throughput": "Decode throughput of whole engines",
    "transport": "Moving bytes between two processes of one machine",
}
"""What pictures of each benchmark are called."""

_BAR_WIDTH = 20
"""Short enough that a line of 80 columns has room for the longest description."""


class Result(msgspec.Struct, frozen=True):
    """Holds what one run of the benchmark ``bench`` measured, or several runs of it.

    ``about`` says under which conditions, ``machine`` where. ``timeline`` has the blocks of `lamina.bench.timeline`.
    """

    bench: Literal[
        "attention",
        "decode",
        "drain",
        "endpoint",
        "exchange",
        "pipeline",
        "pool",
        "prefill",
        "simulate",
        "slices",
        "throughput",
        "transport",
    ]
    about: str
    rows: list[Row]
    machine: dict[str, Any]
    timeline: list[list[Any]] = []

    @property
    def title(self) -> str:
        """Return what a picture of it is called."""
        return TITLES[self.bench]

    @property
    def conditions(self) -> str:
        """Return the conditions in one line: of the benchmark, and of the machine as far as it is one."""
        known = {"cpu": "{}", "cores": "{} cores", "isa": "{}", "threads": "{} threads", "python": "Python {}"}
        machine = [text.format(self.machine[key]) for key, text in known.items() if self.machine.get(key)]
        return "; ".join(filter(None, (self.about, ", ".join(machine) or "several machines")))


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


def print_json(result: Result) -> None:
    """Print one JSON object, which `read` reads."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(result), indent=2) + "\n")


def print_table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print the values of ``rows`` whose keys are in ``columns``, which maps them to headings; then an empty line."""
    table.print_table(list(columns.values()), [[row[key] for key in columns] for row in rows], title=title)
    sys.stdout.write("\n")


def read(files: Sequence[Path]) -> Result:
    """Read what ``--json`` runs of one benchmark wrote. ConfigError says what is wrong with a file."""
    results = [_read(file) for file in files]
    first = results[0]
    for file, other in zip(files, results, strict=True):
        if (other.bench, other.about) != (first.bench, first.about):
            raise ConfigError(
                f"{file}: is a run of bench {other.bench} ({other.about}); {files[0]} is one of {first.bench} "
                f"({first.about}), and only runs of one benchmark under the same conditions go into one picture"
            )
    machine = first.machine if all(r.machine.get("cpu") == first.machine.get("cpu") for r in results) else {}
    return Result(first.bench, first.about, [row for r in results for row in r.rows], machine, first.timeline)


def _read(file: Path) -> Result:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Result)
    except OSError as e:
        raise ConfigError(f"{file}: cannot be read: {e.strerror}") from e
    except msgspec.DecodeError as e:
        raise ConfigError(f"{file}: is not what `lamina bench NAME --json` prints: {e}") from e


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

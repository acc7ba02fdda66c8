"""The lines of ``lamina doctor``, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lamina.config import load
from lamina.errors import ConfigError
from lamina.ops.doctor import cluster, machine
from lamina.ops.doctor.finding import Finding

_COLOURS = {"ok": "green", "none": "bright_black", "warn": "yellow", "fail": "bold red"}


def run(file: Path | None, *, step_ms: float, as_json: bool) -> int:
    """Look at this machine and, with a file, at its cluster; the exit status, 0 unless something fails."""
    config, trouble = None, []
    if file is not None:
        try:
            config = load(file)
        except ConfigError as e:
            trouble.append(Finding("cluster file", "fail", str(e), "correct the file; the cluster was not looked at"))
    findings = [*machine.look(config), *trouble]
    pairs: list[cluster.Pair] = []
    if config is not None:
        # A peer that refuses is told in the table, not beside it.
        logging.getLogger("lamina").setLevel(logging.CRITICAL)
        more, pairs = uvloop.run(cluster.look(config, step_ms))
        findings += more
    healthy = all(f.state != "fail" for f in findings)
    if as_json:
        facts: dict[str, Any] = {
            "healthy": healthy,
            "findings": [asdict(f) for f in findings],
            "pairs": [pair.as_json() for pair in pairs],
        }
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        _print(findings)
    return 0 if healthy else 1


def _print(findings: list[Finding]) -> None:
    table = Table()
    for name, ratio in (("item", None), ("state", None), ("found", 3), ("what to do", 2)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for f in findings:
        # Text, as what nodes say of themselves may look like markup.
        table.add_row(Text(f.item), Text(f.state, style=_COLOURS[f.state]), Text(f.found), Text(f.do))
    console = Console()
    console.print(table)
    counts = {state: sum(f.state == state for f in findings) for state in ("fail", "warn")}
    console.print(f"{counts['fail']} fail, {counts['warn']} warn")

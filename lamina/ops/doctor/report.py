"""The findings of ``lamina doctor``, as a table for people and as JSON for programs."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.text import Text

from lamina.config import load
from lamina.errors import ConfigError
from lamina.ops.doctor import cluster, machine
from lamina.ops.doctor.finding import Finding
from lamina.runtime.loop import PreciseLoop
from lamina.table import print_table, print_text

_COLOURS = {"ok": "green", "none": "bright_black", "warn": "yellow", "fail": "bold red"}


def run(file: Path | None, *, step_ms: float, as_json: bool) -> int:
    """Check this machine and, with a file, its cluster. Return the exit status, which is 0 unless a check fails."""
    config, trouble = None, []
    if file is not None:
        try:
            config = load(file)
        except ConfigError as e:
            trouble.append(Finding("cluster file", "fail", str(e), "correct the file; the cluster was not checked"))
    findings = [*machine.look(config), *trouble]
    pairs: list[cluster.Pair] = []
    if config is not None:
        # The table reports a peer that refuses; its log lines would only repeat that.
        logging.getLogger("lamina").setLevel(logging.CRITICAL)
        with asyncio.Runner(loop_factory=PreciseLoop) as runner:
            more, pairs = runner.run(cluster.look(config, step_ms))
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
    rows = [(f.item, Text(f.state, style=_COLOURS[f.state]), f.found, f.do) for f in findings]
    print_table(("item", "state", "found", "what to do"), rows, prose=("found", "what to do"))
    counts = {state: sum(f.state == state for f in findings) for state in ("fail", "warn")}
    print_text(f"{counts['fail']} fail, {counts['warn']} warn")

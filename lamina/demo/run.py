"""``lamina demo``: one compute and two memory nodes as processes of this machine decode the shipped checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from lamina.client import connect
from lamina.cluster.local import Cluster, local_config
from lamina.config import ClusterConfig
from lamina.demo.stories import DEMO_PROMPT
from lamina.errors import LaminaError
from lamina.ops.figures import between
from lamina.wire.admin import Status

CHECKPOINT = Path(__file__).parent / "checkpoint"
MAX_TOKENS = 320
MEMORY_NODES = 2
ORACLE_TIMEOUT_S = 300.0


@dataclass
class _Run:
    """What one answer of the cluster was like."""

    tokens: list[int]
    text: str
    seconds: float
    """From the first token to the last."""
    before: dict[str, Status]
    """Of all nodes, when the first token had come."""
    after: dict[str, Status]


def run(*, as_json: bool) -> int:
    """Run the demo; the exit status is 0 only if the tokens are those of ``transformers``."""
    with tempfile.TemporaryDirectory(prefix="lamina-demo-") as folder:
        config = local_config(
            Path(folder), CHECKPOINT, memory_nodes=MEMORY_NODES, dtype="float32", memory=2**26, compiled=False
        )
        log_path = Path(folder) / "nodes.log"
        console = Console(stderr=as_json, highlight=False)
        try:
            answer = uvloop.run(_decode(config, log_path, console))
        except LaminaError:
            sys.stderr.write(log_path.read_text())
            raise
        console.print("\n\nthe same files and prompt in transformers, in one process …")
        identical = _oracle() == answer.tokens
        facts = _facts(config, answer, identical)
        if as_json:
            sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        else:
            _print(console, facts)
    return 0 if identical else 1


async def _decode(config: ClusterConfig, log_path: Path, console: Console) -> _Run:
    with log_path.open("wb") as log_file:
        async with Cluster(config, log_file=log_file) as cluster:
            with console.status(f"starting {len(config.node)} nodes …"):
                await cluster.ready()
            async with connect(config.front.address) as client:
                console.print(DEMO_PROMPT, end="", style="bold")
                stream = client.stream(DEMO_PROMPT, max_tokens=MAX_TOKENS)
                tokens: list[int] = []
                text, first, before = "", 0.0, {}
                async for token in stream:
                    if not tokens:
                        before = await cluster.statuses()
                        first = time.perf_counter()
                    tokens.append(token.id)
                    text += token.text
                    console.print(token.text, end="", markup=False, soft_wrap=True)
                seconds = time.perf_counter() - first
                return _Run(tokens, text + stream.held_back, seconds, before, await cluster.statuses())


def _oracle() -> list[int]:
    """The whole answer of ``transformers``: it ends by itself, or after MAX_TOKENS."""
    command = [sys.executable, "-m", "lamina.demo.oracle", str(CHECKPOINT), DEMO_PROMPT, str(MAX_TOKENS)]
    failed = "transformers could not decode the checkpoint for comparison"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ORACLE_TIMEOUT_S)
    except subprocess.TimeoutExpired as e:
        raise LaminaError(f"{failed} within {ORACLE_TIMEOUT_S:g} s") from e
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise LaminaError(f"{failed}: {reason}")
    ids: list[int] = json.loads(done.stdout.splitlines()[-1])
    return ids


def _facts(config: ClusterConfig, answer: _Run, identical: bool) -> dict[str, Any]:
    figures = between(answer.before, answer.after, answer.seconds)
    memory_nodes = [
        {"name": p.name, "role": "memory", "transport": p.transport, "kv_heads": p.kv_heads}
        for p in answer.after[config.front.name].peers
    ]
    return {
        "identical": identical,
        "text": DEMO_PROMPT + answer.text,
        "tokens": len(answer.tokens),
        "tokens_per_s": figures.tokens_per_s,
        "wire_bytes_per_token": figures.wire_bytes_per_token,
        "layer_us": figures.layer_us,
        "nodes": [{"name": config.front.name, "role": "compute", "transport": None, "kv_heads": 0}, *memory_nodes],
    }


def _print(console: Console, facts: dict[str, Any]) -> None:
    nodes = Table("node", "role", "transport", "KV heads")
    for n in facts["nodes"]:
        nodes.add_row(n["name"], n["role"], n["transport"] or "", str(n["kv_heads"] or ""))
    figures = Table(show_header=False)
    layer = facts["layer_us"]
    figures.add_row("tokens/s", f"{facts['tokens_per_s']:.1f}")
    figures.add_row("bytes per token on the wire", f"{facts['wire_bytes_per_token']:,.0f}")
    figures.add_row("time per layer", f"{layer['whole']:.0f} µs")
    figures.add_row("  compute", f"{layer['compute']:.0f} µs")
    figures.add_row("  attention (slowest memory node)", f"{layer['attention']:.0f} µs")
    figures.add_row("  wire and waiting", f"{layer['wire']:.0f} µs")
    console.print(nodes, figures)
    console.print(f"{facts['tokens']} tokens, identical: {'yes' if facts['identical'] else 'no'}")

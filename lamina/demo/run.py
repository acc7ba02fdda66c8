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

from lamina.client import connect
from lamina.cluster.local import Cluster, local_config
from lamina.config import ClusterConfig
from lamina.demo.stories import DEMO_PROMPT
from lamina.errors import LaminaError
from lamina.ops.figures import between
from lamina.table import print_facts, print_table, print_text
from lamina.wire.admin import Status

CHECKPOINT = Path(__file__).parent / "checkpoint"
MAX_TOKENS = 320
MEMORY_NODES = 2
ORACLE_TIMEOUT_S = 300.0


@dataclass
class _DemoAnswer:
    """One answer of the cluster, with the counters of the nodes around it."""

    tokens: list[int]
    text: str
    seconds: float
    """The time from the first token to the last."""
    before: dict[str, Status]
    """The statuses of all nodes after the first token."""
    after: dict[str, Status]
    """The statuses of all nodes after the last token."""
    warnings: list[str]
    """What the nodes warned of while they started."""


def run(*, as_json: bool) -> int:
    """Run the demo. Return the exit status, which is 0 only if the tokens equal those of ``transformers``."""
    with tempfile.TemporaryDirectory(prefix="lamina-demo-") as folder:
        config = local_config(
            Path(folder), CHECKPOINT, memory_nodes=MEMORY_NODES, dtype="float32", memory=2**26, compiled=False
        )
        log_path = Path(folder) / "nodes.log"
        console = Console(stderr=as_json, highlight=False)
        answer = uvloop.run(_decode(config, log_path, console))
        console.print("\n\nthe same files and prompt in transformers, in one process:")
        identical = _oracle() == answer.tokens
        facts = _facts(config, answer, identical)
        if as_json:
            sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        else:
            _print(facts)
    return 0 if identical else 1


async def _decode(config: ClusterConfig, log_path: Path, console: Console) -> _DemoAnswer:
    with log_path.open("wb") as log_file:
        async with Cluster(config, log_file=log_file) as cluster:
            with console.status(f"starting {len(config.node)} nodes"):
                await cluster.ready()
            warnings = _warnings(log_path)
            async with connect(config.front.address) as client:
                console.print(DEMO_PROMPT, end="", style="bold", soft_wrap=True)
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
                after = await cluster.statuses()
                return _DemoAnswer(tokens, text + stream.held_back, seconds, before, after, warnings)


def _warnings(log_path: Path) -> list[str]:
    """Return the warnings of the nodes, each once; they may say that the attention kernel was not compiled."""
    lines = (line for line in log_path.read_text().splitlines() if " level=warning " in line)
    return list(dict.fromkeys(line[line.find("event=") :] for line in lines))


def _oracle() -> list[int]:
    """Return the whole answer of ``transformers``, which ends by itself or after MAX_TOKENS."""
    command = [sys.executable, "-P", "-m", "lamina.demo.oracle", str(CHECKPOINT), DEMO_PROMPT, str(MAX_TOKENS)]
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


def _facts(config: ClusterConfig, answer: _DemoAnswer, identical: bool) -> dict[str, Any]:
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
        "warnings": answer.warnings,
        "nodes": [{"name": config.front.name, "role": "compute", "transport": None, "kv_heads": 0}, *memory_nodes],
    }


def _print(facts: dict[str, Any]) -> None:
    rows = [(node["name"], node["role"], node["transport"], node["kv_heads"] or None) for node in facts["nodes"]]
    print_table(("node", "role", "transport", "KV heads"), rows)
    sys.stdout.write("\n")
    layer = facts["layer_us"]
    print_facts(
        {
            "tokens/s": f"{facts['tokens_per_s']:.1f}",
            "bytes per token on the wire": facts["wire_bytes_per_token"],
            "time per layer": f"{layer['whole']:.0f} µs",
            "  compute": f"{layer['compute']:.0f} µs",
            "  attention (slowest memory node)": f"{layer['attention']:.0f} µs",
            "  wire and waiting": f"{layer['wire']:.0f} µs",
        }
    )
    for warning in facts["warnings"]:
        print_text(f"warning: {warning}")
    print_text(f"{facts['tokens']} tokens, identical: {'yes' if facts['identical'] else 'no'}")

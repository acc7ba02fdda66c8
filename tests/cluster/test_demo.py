"""The commands of the README, on the checkpoint that ships with the package."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lamina.demo.run import CHECKPOINT
from lamina.demo.stories import DEMO_PROMPT
from lamina.transport import Options
from lamina.transport.choice import offers
from tests import harness


def test_the_demo_is_identical_to_transformers() -> None:
    """What `make demo` runs, as a program would read it."""
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "demo", "--json"], capture_output=True, text=True, timeout=110, check=False
    )

    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["identical"] is True
    assert facts["text"].startswith(DEMO_PROMPT)
    assert facts["tokens"] > 50
    assert facts["warnings"] == []
    assert facts["tokens_per_s"] > 1
    # Of 4 layers and more, q, k, v and o of 8 query and 4 KV heads in float32, and little beside.
    config = json.loads((CHECKPOINT / "config.json").read_text())
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    payload = 4 * heads * config["hidden_size"] // config["num_attention_heads"] * config["num_hidden_layers"]
    # The first look at the counters may fall into a step, of which bytes are missing then.
    assert payload * (1 - 1 / facts["tokens"]) < facts["wire_bytes_per_token"] < 1.5 * payload
    taken = next(name for name, offer in offers(Options()).items() if "missing" not in offer)
    assert [(n["name"], n["role"], n["transport"], n["kv_heads"]) for n in facts["nodes"]] == [
        ("c0", "compute", None, 0),
        ("m0", "memory", taken, 2),
        ("m1", "memory", taken, 2),
    ]


@pytest.mark.slow
def test_the_demo_says_that_the_attention_kernel_is_missing(tmp_path: Path) -> None:
    """Installed without a C++ compiler it is several times slower, which it says in one line."""
    done = subprocess.run(
        [sys.executable, "-m", "lamina", "demo"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**os.environ, "LAMINA_NATIVE_LIBRARY": str(tmp_path / "liblamina_attention.so")},
    )

    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "attention" in line and "native" in line)
    assert line.startswith("warning: event=attention_fallback backend=torch reason=")
    assert "install g++ and run: python -m lamina.attention.native.build" in line


def test_text_comes_as_it_is_generated(memory_ports: list[int], tmp_path: Path) -> None:
    """`lamina generate` prints what the client streams, and the pieces are the whole text of the tokens."""
    from tokenizers import Tokenizer

    config = harness.write_config(tmp_path, CHECKPOINT, memory_ports)
    node = harness.start_node(config, "c0")
    settings = ["--max-tokens", "60", "--temperature", "0.9", "--top-p", "0.9", "--top-k", "40", "--seed", "5"]

    async def stream() -> tuple[str, list[int]]:
        await harness.ready(config, node)
        async with harness.client(config) as client:
            answer = client.stream(DEMO_PROMPT, max_tokens=60, temperature=0.9, top_p=0.9, top_k=40, seed=5)
            tokens = [token async for token in answer]
            return "".join(t.text for t in tokens) + answer.held_back, [t.id for t in tokens]

    with harness.running(node):
        text, tokens = asyncio.run(stream())
        command = ["generate", str(config.file), DEMO_PROMPT, *settings]
        printed = subprocess.run(
            [sys.executable, "-m", "lamina", *command], capture_output=True, text=True, timeout=60, check=False
        )
        empty = subprocess.run(
            [sys.executable, "-m", "lamina", "generate", str(config.file), ""],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == text + "\n"
    assert text == Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).decode(tokens)
    assert empty.returncode == 2
    assert empty.stderr == "lamina: the prompt is empty; expected at least one token\n"

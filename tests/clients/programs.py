"""Runs programs in the environments of clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.clients.environments import environment
from tests.clients.server import KNOWN_MODEL, MODEL, PROMPT, QUESTION, Server

FOLDER = Path(__file__).parent
TOKENS = 12
"""The tokens of an ordinary answer."""
ROOM = 1000
"""The tokens that an answer of a given form may have: the model likes to write blanks where they are allowed."""
MANY = 8000
"""The tokens of an answer that is interrupted: far more than come until then."""
TIMEOUT_S = 300

_SETTINGS = {
    # What would ask the internet, which is not what is tested here.
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "AI_SDK_TELEMETRY": "0",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}


def environ(home: Path) -> dict[str, str]:
    """The variables of a program whose home is ``home``: none that would lead it to another server."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return kept | _SETTINGS | {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "NO_COLOR": "1"}


def run(
    command: Sequence[str], home: Path, *, more: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> str:
    """Run a program to its end in the folder ``home``; its output."""
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        command,
        cwd=home,
        env=environ(home) | (more or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    output = f"{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{output}"
    return done.stdout


def drive(client: str, cases: Sequence[str], server: Server, home: Path) -> dict[str, Any]:
    """Run cases of ``drivers/CLIENT`` in the client's environment; what each returned or raised."""
    output = home / "results.json"
    home.mkdir(exist_ok=True)
    given = {
        "root": server.root,
        "url": server.url,
        "key": "unused-key",
        "model": MODEL,
        "known_model": KNOWN_MODEL,
        "question": QUESTION,
        "prompt": PROMPT,
        "tokens": TOKENS,
        "room": ROOM,
        "closing": server.closing,
        "many": MANY,
        "checkpoint": str(server.checkpoint),
        "victim": server.nodes["c0"].process.pid,
    }
    name = client.replace("-", "_")
    if client == "ai-sdk":
        folder = environment(client)
        driver = folder / "driver.mjs"  # modules are found from where the file lies
        driver.write_text((FOLDER / "drivers" / "ai_sdk.mjs").read_text())
        command = ["node", str(driver)]
    else:
        python = sys.executable if client == "openai" else str(environment(client) / "bin" / "python")
        command = [python, "-P", str(FOLDER / "drive.py"), str(FOLDER / "drivers" / f"{name}.py")]
    run([*command, json.dumps(given), str(output), *cases], home)
    results = json.loads(output.read_text())
    assert isinstance(results, dict)
    return results

"""The benchmark of prompts beside decoding: a quick run reports what it promises."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lamina.bench.prefill import PREFILL_TOKENS


@pytest.mark.slow
def test_a_quick_run() -> None:
    """Two sizes of chunks; those who decode go on, more slowly, and hardly more so than the bound says."""
    command = [sys.executable, "-m", "lamina", "bench", "prefill", "--quick", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=110, check=True)
    rows = json.loads(done.stdout)["rows"]
    assert [row["prefill_tokens"] for row in rows] == list(PREFILL_TOKENS)
    for row in rows:
        assert 0 < row["alone_ms"] < row["beside_ms"] <= row["longest_ms"]
        assert row["bound_ms"] == pytest.approx(row["alone_ms"] + row["chunk_ms"])
        assert row["of_bound"] < 2

"""The endpoint beside the Python client: what is compared with what, and a small run from end to end."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lamina.bench.endpoint import YARDSTICK, StreamedTurn, row_of

CPU_S = {"endpoint": 0.0003, "engine": 0.001, "client": 0.0001}


def turn(step_s: float) -> StreamedTurn:
    """Two streams with five tokens each, from 1 s after they were asked for."""
    times = [[11 + step_s * i for i in range(5)] for _ in range(2)]
    return StreamedTurn(10.0, times, 10, CPU_S)


def test_the_ratio_is_that_of_rounds() -> None:
    """And processor time is that of a token."""
    turns = {YARDSTICK: [turn(0.25), turn(1.0), turn(1.0)], "lamina serve": [turn(0.25), turn(2.25), turn(1.0)]}
    row = row_of("lamina serve", turns, {})

    assert row["ratio"] == 1.0  # of 1, 0.5 and 1
    assert row["tokens_per_s"] == pytest.approx(10 / 5)
    assert row["endpoint_us"] == pytest.approx(30)
    assert row["first_ms"] == pytest.approx(1000)
    assert row["next_p99_ms"] == pytest.approx(2250)


def test_a_server_that_does_not_start_is_a_row_that_says_why() -> None:
    row = row_of("vllm serve", {YARDSTICK: [turn(1.0)]}, {"vllm serve": "it has no such option"})

    assert (row["failed"], row["tokens_per_s"], row["ratio"]) == ("it has no such option", None, None)


@pytest.mark.slow
def test_a_small_run() -> None:
    """Both ways give all tokens, and only the endpoint takes time for HTTP."""
    command = [sys.executable, "-P", "-m", "lamina", "bench", "endpoint", "--quick", "--streams", "4", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=110).stdout)

    assert found["bench"] == "endpoint"
    native, http = found["rows"]
    assert (native["system"], http["system"]) == (YARDSTICK, "lamina serve")
    assert (native["ratio"], native["endpoint_us"]) == (1.0, 0.0)
    assert http["tokens_per_s"] > 0
    assert http["endpoint_us"] > 0

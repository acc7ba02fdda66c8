"""The pipeline benchmarks: what is read from a trace, and that quick runs report what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from lamina.bench.pipeline import Window
from lamina.errors import LaminaError
from lamina.recording import Trace
from lamina.runtime.spans import Span


def traces(compute: list[Span], memory: list[Span]) -> dict[str, Trace]:
    return {"c0": Trace(compute, 1e-4), "m0": Trace(memory, 1e-4)}


def alternating(steps: int) -> tuple[list[Span], list[Span]]:
    """One batch: 3 s computing, 0.5 nothing, 2 attending, 0.5 nothing; a step is the layer that ends in sampling."""
    compute, memory = [], []
    for i in range(steps):
        at = 6.0 * i
        compute += [Span("head", 0, 0, at, at + 2), Span("sample", 0, -1, at + 2, at + 3)]
        memory.append(Span("past", 0, 0, at + 3.5, at + 5.5))
    return compute, memory


def test_one_batch_takes_turns() -> None:
    """A step is from sampling to sampling; with one batch its parts add up to it."""
    window = Window.of(traces(*alternating(5)), 8)
    assert (window.steps, window.tokens) == (4, 8)
    assert window.step_ms == pytest.approx(6000)
    assert window.compute_ms == pytest.approx(3000)
    assert window.attention_ms == pytest.approx(2000)
    assert window.neither_ms == pytest.approx(1000)


def test_overlapping_batches() -> None:
    """Where both nodes compute at once, that is busy time of each and idle time of none."""
    compute = [Span("sample", i % 2, -1, 3.0 * i, 3.0 * i + 3) for i in range(6)]
    memory = [Span("past", i % 2, 0, 3.0 * i + 0.5, 3.0 * i + 2.5) for i in range(6)]
    window = Window.of(traces(compute, memory), 8)
    assert window.step_ms == pytest.approx(3000)
    assert window.compute_ms == pytest.approx(3000)
    assert window.attention_ms == pytest.approx(2000)
    assert window.neither_ms == pytest.approx(0)


def test_control_work_does_not_count() -> None:
    """What belongs to no batch, such as reserving space, is part of no step."""
    compute, memory = alternating(4)
    memory.append(Span("reserve", -1, -1, 3.2, 3.4))
    assert Window.of(traces(compute, memory), 8).attention_ms == pytest.approx(2000)


def test_what_cannot_be_measured() -> None:
    """Too few steps, and steps beside which prompts are processed, are no result."""
    compute, memory = alternating(2)
    with pytest.raises(LaminaError, match="2 steps were completed"):
        Window.of(traces(compute, memory), 8)
    compute, memory = alternating(4)
    compute.append(Span("attend_to_prompts", 1, 0, 3.1, 3.2))
    with pytest.raises(LaminaError, match="a prompt was still being processed"):
        Window.of(traces(compute, memory), 8)


def bench(name: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "lamina", "bench", name, "--quick", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=110, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


@pytest.mark.slow
def test_a_quick_run_of_exchange() -> None:
    """Each exchange takes as long as what is known of it, at least, and no longer than a bad day."""
    rows = bench("exchange")
    assert {(row["batch"], row["batches"]) for row in rows} == {(b, n) for b in (1, 32) for n in (1, 2, 4)}
    for row in rows:
        assert row["round_trip_us"] > 0
        assert max(row["compute_us"], row["attention_us"]) < row["exchange_us"] < 1e5
        assert row["per_s"] == pytest.approx(1e6 / row["exchange_us"])


@pytest.mark.slow
def test_a_quick_run_of_pipeline() -> None:
    """Every load, and for the balanced one what two batches gain, of equal size and of equal total."""
    rows = bench("pipeline")
    kinds = {(row["load"], row["batches"]) for row in rows}
    assert kinds >= {("compute-bound", 1), ("balanced", 1), ("balanced", 2), ("balanced, equal total", 2)}
    for row in rows:
        assert max(row["compute_ms"], row["attention_ms"]) <= row["step_ms"] * 1.001
        assert row["wire_ms"] <= row["step_ms"]
        assert row["busy_compute"] == pytest.approx(row["compute_ms"] / row["step_ms"])
        assert row["step_over_max"] >= 0.999
        if row["load"] == "balanced":
            assert row["batch"] == pytest.approx(8, abs=0.2)

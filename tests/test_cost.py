"""Predictions grow with the load, come close to the measured machine, and are always finite times."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.front.cost import CostModel, StepLoad, ThroughputEstimate

times = st.floats(0, 1e3) | st.sampled_from([math.nan, math.inf, -1.0, 1e-12, 1e12])
observations = st.lists(
    st.tuples(st.integers(0, 4096), st.integers(0, 4096), st.integers(0, 2**40), times, times, times), max_size=60
)
loads = st.builds(StepLoad, st.integers(0, 4096), st.integers(0, 4096), st.integers(0, 2**40))


@settings(deadline=None)
@given(observations, loads, st.integers(0, 100), st.integers(0, 100), st.integers(0, 2**30))
def test_more_work_never_takes_less_time(
    seen: list[tuple[int, int, int, float, float, float]], load: StepLoad, rows: int, prompt: int, context: int
) -> None:
    """Whatever was observed, a larger load never gets a smaller prediction, and every prediction is a finite time."""
    model = CostModel()
    for observation in seen:
        model.observe(*observation)
    more = StepLoad(load.rows + rows, load.prompt_tokens + prompt, load.context_tokens + context)
    for part in ("compute_s", "wire_s", "attention_s", "memory_s", "alone_s"):
        less_s, more_s = getattr(model.cost(load), part), getattr(model.cost(more), part)
        assert 0 <= less_s <= more_s * (1 + 1e-9) < math.inf
    assert 0 <= model.step_s([load]) <= model.step_s([load, more]) * (1 + 1e-9) < math.inf
    assert 1 <= model.batches(load, least=1, most=4, present=2) <= 4


def machine(rows: int, prompt: int, context: int) -> tuple[float, float, float]:
    """Compute reads the weights in 5 ms and then pays per token; attention reads the context; the wire carries rows."""
    tokens = rows + prompt
    return 5e-3 + max(0, tokens - 24) * 1e-4, 2e-4 + rows * 1e-5 + context * 2e-7, 1e-4 + rows * 2e-6


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_it_comes_close_to_a_machine(noise: float, outliers: float) -> None:
    """Predictions come close to the machine despite noise, and despite steps that took 50 times as long."""
    chosen, model = random.Random(4), CostModel()

    def measured(seconds: float) -> float:
        return seconds * chosen.lognormvariate(0, noise) * (50 if chosen.random() < outliers else 1)

    for _ in range(3000):
        rows, prompt = chosen.randint(1, 64), chosen.choice([0, 0, 0, 64, 512])
        context = rows * chosen.randint(16, 4096)
        compute_s, attention_s, wire_s = map(measured, machine(rows, prompt, context))
        model.observe(rows, prompt, context, compute_s, attention_s, wire_s)

    allowed = 0.1 + noise / 3 + 2 * outliers
    for rows, prompt, context in ((1, 0, 500), (8, 0, 8 * 2048), (32, 0, 32 * 2048), (64, 512, 64 * 1024)):
        cost, truth = model.cost(StepLoad(rows, prompt, context)), machine(rows, prompt, context)
        assert cost.compute_s == pytest.approx(truth[0], rel=allowed)
        assert cost.attention_s == pytest.approx(truth[1], rel=allowed, abs=3e-4)


def test_it_follows_a_machine_that_changes() -> None:
    """After a hundred steps on a machine that has become twice as slow, predictions have doubled."""
    model = CostModel()
    for slower in (1, 2):
        for i in range(100):
            context = 8 * (100 + i)
            model.observe(8, 0, context, 1e-2 * slower, 1e-6 * context * slower)
    cost = model.cost(StepLoad(8, 0, 1200))
    assert cost.compute_s == pytest.approx(2e-2, rel=0.2)
    assert cost.attention_s == pytest.approx(2.4e-3, rel=0.2)


def test_a_step_takes_as_long_as_its_busier_side() -> None:
    """Several batches in flight take the time of the busier side; one alone takes the sum of both."""
    model = CostModel()
    for rows in (1, 2, 4, 8, 16):
        model.observe(rows, 0, 100 * rows, rows * 1e-3, rows * 2e-3)
    batch = StepLoad(8, 0, 800)
    assert model.step_s([batch]) == pytest.approx(24e-3, rel=0.05)
    assert model.step_s([batch, batch]) == pytest.approx(32e-3, rel=0.05)
    assert model.step_s([]) == 0


def test_how_many_batches_are_worth_flying() -> None:
    """Two batches are chosen where they hide attention, and one where reading the weights twice gains nothing.

    There are never more batches than rows, and their number does not change for a small gain.
    """
    hiding, reading = CostModel(), CostModel()
    for rows in (1, 2, 4, 8, 16, 32):
        hiding.observe(rows, 0, 100 * rows, rows * 1e-3, rows * 1e-3)
        reading.observe(rows, 0, 100 * rows, 1e-2, rows * 1e-4)
    load = StepLoad(16, 0, 1600)
    assert CostModel().batches(load, least=1, most=4, present=4) == 4
    assert hiding.batches(load, least=1, most=4, present=1) == 2
    assert hiding.batches(StepLoad(1, 0, 100), least=1, most=4, present=4) == 1
    assert reading.batches(load, least=1, most=4, present=4) == 1
    assert reading.batches(load, least=2, most=4, present=1) == 2

    several = CostModel(compute_nodes=2)
    for rows in (1, 2, 4, 8, 16, 32):
        several.observe(rows, 0, 100 * rows, rows * 1e-3, rows * 1e-4)
    assert several.batches(load, least=1, most=8, present=1) >= 2  # each has something to do
    assert several.step_s([StepLoad(8, 0, 800)] * 2) == pytest.approx(8.8e-3, rel=0.1)

    # Each sequence is on one of two memory nodes: one batch keeps the other node idle, two do not.
    apart, together = CostModel(), CostModel()
    for rows in (1, 2, 4, 8, 16, 32):
        apart.observe(rows, 0, 100 * rows, 1e-3, rows * 1e-3, memory_s=rows * 5e-4)
        together.observe(rows, 0, 100 * rows, 1e-3, rows * 1e-3)
    assert apart.batches(load, least=1, most=4, present=1) == 4
    assert together.batches(load, least=1, most=4, present=1) == 2

    close = CostModel()
    for rows in (1, 2, 4, 8, 16, 32):
        close.observe(rows, 0, 100 * rows, 8e-3 + rows * 1e-3, 9.3e-3)
    assert [close.batches(load, least=1, most=2, present=present) for present in (1, 2)] == [1, 2]


def test_when_to_try_again() -> None:
    """The time to retry follows the rate at which requests end; time without any request does not count."""
    throughput = ThroughputEstimate()
    assert throughput.retry_after_s(100) == 1
    for i in range(50):
        throughput.note_ended(10.0 * i, 5)
    assert throughput.retry_after_s(80) == pytest.approx(20)
    throughput.note_idle()
    throughput.note_ended(1e6, 1)
    assert throughput.retry_after_s(80) == pytest.approx(20)

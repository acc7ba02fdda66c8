"""The cost model is fitted before the first request, in limited time on any machine, and leaves no space reserved."""

from __future__ import annotations

import asyncio

import pytest

from lamina.errors import CapacityError
from lamina.front.blocks import BlockManager
from lamina.front.cost import StepLoad
from lamina.front.fit import ANSWER_TOKENS, fit
from lamina.front.scheduler import Scheduler
from lamina.front.sequence import ReservationRequest, ScheduledStep
from lamina.front.team import StepResult


class Machine:
    """Nodes on a clock of their own, by the factor ``slower`` than a machine that reads its weights in 5 ms.

    The first step takes longer than the others.
    """

    def __init__(self, slower: float = 1.0, batches: int = 2, blocks: int = 256) -> None:
        self.now = 0.0
        self.slower = slower
        self.space: dict[int, int] = {}
        self.blocks = blocks
        self.longest_step_s = 0.0
        self.steps = 0
        self.slots = batches
        block_manager = BlockManager({0: 256, 1: 256}, 16)
        limits = {"batches": batches, "max_batch": 64, "prefill_tokens": 512, "max_waiting": 64}
        self.scheduler = Scheduler(block_manager=block_manager, **limits)

    def clock(self) -> float:
        return self.now

    async def reserve(self, request: ReservationRequest) -> int:
        self.space[request.id] = request.tokens
        if sum(-(-tokens // 16) for tokens in self.space.values()) > self.blocks:
            raise CapacityError("another tenant has it")
        return 0

    def release(self, sequence: int) -> None:
        del self.space[sequence]

    async def run(self, slot: int, number: int, step: ScheduledStep) -> StepResult:
        assert 0 <= slot < self.slots
        assert number == self.steps
        self.steps += 1
        load = step.load
        for row in step.decode:
            assert self.space[row.sequence.id] > row.position
        times = [s * self.slower for s in self.costs(load)]
        if self.steps == 1:
            times[0] += 0.2
        self.now += sum(times)
        self.longest_step_s = max(self.longest_step_s, sum(times))
        return StepResult([1] * len(step.sampled), *times, memory_s=times[1])

    @staticmethod
    def costs(load: StepLoad) -> tuple[float, float, float]:
        compute_s = 5e-3 + max(0, load.rows + load.prompt_tokens - 24) * 1e-4
        if not load.rows:
            return compute_s, 0.0, 0.0
        return compute_s, 2e-4 + load.rows * 1e-5 + load.context_tokens * 2e-6, 1e-4 + load.rows * 2e-6

    def fit(self, most_rows: int = 64, most_tokens: int = 512) -> None:
        limits = {"slots": self.slots, "most_rows": most_rows, "most_tokens": most_tokens}
        asyncio.run(fit(self.scheduler, self.run, self.reserve, self.release, self.clock, **limits))
        assert not self.space
        assert self.scheduler.running == self.scheduler.waiting == self.scheduler.prompt_tokens == 0
        assert self.scheduler.free_blocks == 256


@pytest.mark.parametrize("batches", [1, 3])
def test_what_steps_will_cost_is_known_before_the_first_request(batches: int) -> None:
    """The costs of steps with few and many rows, short and long contexts, and prompts are known within a quarter."""
    machine = Machine(batches=batches)
    assert not machine.scheduler.cost.fitted

    machine.fit()

    assert machine.scheduler.cost.fitted
    for load in (
        StepLoad(1, 0, 30),
        StepLoad(16, 0, 400),
        StepLoad(48, 0, 48 * 20),
        StepLoad(4, 0, 4 * 200),
        StepLoad(0, 256, 0),
    ):
        cost, truth = machine.scheduler.cost.cost(load), machine.costs(load)
        assert cost.compute_s == pytest.approx(truth[0], rel=0.25)
        assert cost.attention_s == pytest.approx(truth[1], rel=0.25)
        assert cost.wire_s == pytest.approx(truth[2], rel=0.25)


@pytest.mark.parametrize("slower", [0.1, 1, 10, 100, 1000])
def test_it_ends_in_time(slower: float) -> None:
    """Fitting ends with the step in which the time runs out, however slow the machine is."""
    machine = Machine(slower)

    machine.fit()

    assert machine.now <= 2.0 + machine.longest_step_s
    assert machine.scheduler.cost.fitted == (slower <= 100)


def test_fitting_keeps_to_the_limits_of_a_small_cluster() -> None:
    """Where one sequence with one prompt token is the limit, only rounds of that size are made."""
    machine = Machine()
    machine.fit(most_rows=1, most_tokens=1)
    assert machine.steps == 2 * ANSWER_TOKENS


def test_a_refused_reservation_ends_it() -> None:
    """Fitting ends when another tenant holds the memory, and keeps what was observed until then."""
    machine = Machine(blocks=8)
    machine.fit()
    assert machine.scheduler.cost.fitted

"""The engine alone, on a virtual clock: it keeps every batch slot going that has something to do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from lamina.compute.schedule import Schedule
from lamina.errors import CapacityError
from lamina.front.blocks import BlockManager
from lamina.front.cost import CostModel
from lamina.front.engine import Engine
from lamina.front.scheduler import Scheduler
from lamina.front.sequence import CacheChanges, Sequence, StepOutcome
from lamina.front.team import Formation, Team
from lamina.runtime.crossing import Crossing
from lamina.runtime.workers import ParallelWorkers
from lamina.sim.world import World
from lamina.wire.orders import Done, Order
from lamina.wire.requests import Request, Sampling

STEP_S = 1e-3


class TimedSteps:
    """Runs steps that take ``STEP_S``, and notes the slot of each; every token is token 1."""

    def __init__(self) -> None:
        self.slots: list[int] = []

    async def run(self, order: Order) -> Done:
        await asyncio.sleep(STEP_S)
        self.slots.append(order.slot)
        tokens = [1 for run in order.runs if run.choice]
        return Done(slot=order.slot, step=order.step, tokens=tokens, compute_s=STEP_S, attention_s=[(1, 1e-5, 1e-5)])

    async def send_prompts(self) -> None:
        await asyncio.Event().wait()

    def reform(self, schedule: object, shards: object, peers: object) -> None:
        pass

    def forget(self, sequences: Iterable[int]) -> None:
        pass


class RoomyDesk:
    """Confirms every reservation at once."""

    def __init__(self) -> None:
        self.engine: Engine

    def apply(self, changes: CacheChanges) -> None:
        for request in changes.reservations:
            self.engine.reserved(request, 0)

    def answer(self, outcome: StepOutcome) -> None:
        self.apply(outcome.changes)

    def refuse(self, sequence: Sequence, error: CapacityError) -> None:
        raise error


def learn(cost: CostModel, *, fixed_s: float, row_s: float, attention_s: float) -> None:
    """Show steps that take so long, and so long for each row."""
    for _ in range(300):
        for rows in (1, 2, 4, 8, 16):
            cost.observe(rows, 0, rows * 100, fixed_s + row_s * rows, attention_s * rows)


def sequence(prompt: int, max_tokens: int) -> Sequence:
    tokens = [0] * prompt
    request = Request(tokens, max_tokens, Sampling(seed=0), share_prefix=False)
    return Sequence(request, tokens, max_tokens, frozenset())


def test_a_slot_that_comes_into_use_wakes() -> None:
    """A request that waits when the costs come to speak for a second batch is begun within two steps, although the
    slot that finds this out is not the one that takes it."""

    async def main(world: World) -> tuple[float, list[int]]:
        cost = CostModel()
        learn(cost, fixed_s=STEP_S, row_s=0.0, attention_s=1e-7)
        scheduler = Scheduler(
            batches=2,
            max_batch=8,
            prefill_tokens=512,
            block_manager=BlockManager({1: 10_000}, 16),
            max_waiting=8,
            cost=cost,
            ahead_blocks=64,
        )
        steps, desk, home = TimedSteps(), RoomyDesk(), Crossing(world.loop)
        formation = Formation(0, Schedule(layers=1), {1: 10_000}, {}, frozenset())
        team = Team(steps, world.device("c0", lambda name, at: 0.0), home, formation, member=0)
        desk.engine = engine = Engine(scheduler, team, home, desk, batches=2, workers=ParallelWorkers())
        running = asyncio.ensure_future(engine.run())
        engine.submit(sequence(100, 900))
        await asyncio.sleep(20.5 * STEP_S)
        assert scheduler.batches_in_use == 1

        new, begun_s, before = sequence(10, 5), world.loop.time(), len(steps.slots)
        engine.submit(new)
        await asyncio.sleep(0.1 * STEP_S)  # the other slot has looked, while this one is in a step
        learn(cost, fixed_s=0.0, row_s=STEP_S, attention_s=STEP_S)
        while not new.output:
            assert world.loop.time() < begun_s + 1, "the request waits for the other to end"
            await asyncio.sleep(0.1 * STEP_S)
        assert scheduler.batches_in_use == 2
        running.cancel()
        return world.loop.time() - begun_s, steps.slots[before:]

    with World(1, tracing=False) as world:
        waited_s, slots = world.run(main(world))
    assert waited_s < 2.5 * STEP_S
    assert len(set(slots)) == 2

"""The most layer exchanges per second that the engine can do: a decode with nothing to compute.

Two real nodes over shared memory, whose operations are stand-ins: slices that return tensors made before, and a
backend that keeps account of the cache but stores nothing and attends to nothing. What is left is what every layer of
every batch costs besides its work: the engine, the scheduler, both event loops, staging, framing and the wire. The
yardstick is a bare round trip of the same bytes over the same transport: no exchange can be shorter.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Coroutine
from contextlib import closing, suppress
from itertools import product
from pathlib import Path
from random import SystemRandom
from typing import Any

import msgspec
import torch
from torch import Tensor

from lamina.admin import AdminClient
from lamina.attention import KVLayout, LayerShape, Partial, Rows
from lamina.attention.backend import Plan
from lamina.attention.native_backend import NativeBackend, NativePlan
from lamina.bench import report
from lamina.bench.ends import Task
from lamina.bench.variants import Setting, two_processors
from lamina.bench.yardsticks import Program
from lamina.cluster.local import free_ports
from lamina.compute.schedule import Schedule
from lamina.compute.shard_control import ShardControl
from lamina.compute.step import StepRunner
from lamina.config import MemoryNodeConfig
from lamina.errors import LaminaError
from lamina.front.blocks import BlockManager
from lamina.front.constraints import Constraints
from lamina.front.engine import Engine
from lamina.front.intake import End, Intake
from lamina.front.scheduler import Scheduler
from lamina.front.space import Space
from lamina.front.team import Formation, Team
from lamina.model.tokenizer import Tokenizer
from lamina.node.memory import MemoryNode
from lamina.runtime.cpu import CpuDevice
from lamina.runtime.crossing import Crossing
from lamina.runtime.loop import PreciseLoop
from lamina.runtime.sockets import Sockets
from lamina.runtime.workers import BackgroundWorkers, ParallelWorkers
from lamina.sim.empty import EmptyForward
from lamina.transport import Address, Hello, Options
from lamina.wire.geometry import shard_by_heads
from lamina.wire.requests import Request, Score

BATCHES, FLIGHTS = (1, 32), (1, 2, 4)
"""Sequences of a batch, and batches in flight."""
LAYERS, SHAPE = 32, LayerShape(q_heads=32, kv_heads=8, qk_dim=128, v_dim=128, scale=1.0)
"""As of a model with 8 billion parameters."""
DTYPE, BLOCK_TOKENS, VOCABULARY, MAX_TOKENS, MEMORY = "bfloat16", 16, 16, 8192, 2**28
NEAR, FAR = 0, 1
"""Member ids of the compute node and the memory node."""
WARM_UP_S, MEASURE_S = 0.3, 1.0
PEER_TIMEOUT_S, CONNECT_S = 20.0, 30.0

COLUMNS = {
    "cores": "cores",
    "batch": "batch",
    "batches": "flight",
    "exchange_us": "µs",
    "per_s": "per s",
    "compute_us": "compute",
    "attention_us": "attend",
    "outside_us": "outside",
    "round_trip_us": "bare µs",
    "ratio": "ratio",
}


def run(*, as_json: bool, quick: bool) -> None:
    """Measure and print."""
    rows = _measure(quick=quick)
    if as_json:
        report.print_json(
            report.Result(
                "exchange",
                f"{LAYERS} layers of a model with 8 billion parameters, links over shm",
                rows,
                report.machine(),
            )
        )
    else:
        report.print_table("a layer of one batch that computes nothing", rows, COLUMNS)


def _measure(*, quick: bool) -> list[report.Row]:
    rows = []
    near, far = two_processors()
    places = [(near, far)] if quick or near < 0 else [(near, near), (near, far)]
    seconds = MEASURE_S / 4 if quick else MEASURE_S
    points = list(product(BATCHES, FLIGHTS))
    with report.progress() as progress:
        task = progress.add_task("exchange", total=len(places) * len(points))
        for cpus in places:
            trips = {batch: _round_trip_us(batch, cpus) for batch in BATCHES}
            with _Far(cpus[1]) as address:
                for batch, batches in points:
                    rows.append(_row(_near(address, cpus[0], batch, batches, seconds), cpus, batch, batches, trips))
                    progress.advance(task)
    return rows


def _row(
    found: dict[str, float], cpus: tuple[int, int], batch: int, batches: int, trips: dict[int, float]
) -> report.Row:
    whole = found["exchange_us"]
    return {
        "cores": len(set(cpus)) if cpus[0] >= 0 else 1,
        "batch": batch,
        "batches": batches,
        **found,
        "per_s": 1e6 / whole,
        # With one batch in flight one end waits for the other, so that the parts add up.
        "outside_us": whole - found["compute_us"] - found["attention_us"] if batches == 1 else None,
        "round_trip_us": trips[batch],
        "ratio": whole / trips[batch],
    }


def _round_trip_us(batch: int, cpus: tuple[int, int]) -> float:
    """Of the bytes of q with k and v there, and of as many back."""
    nbytes = 2 * batch * SHAPE.qk_dim * (SHAPE.q_heads + 2 * SHAPE.kv_heads)
    setting = Setting("shm", cpus=cpus)
    with closing(Program.module("ends", msgspec.json.encode(setting).decode())) as program:
        return program.measure(Task("round_trip", nbytes, 1, 1, MEASURE_S / 4))["p50_us"]


# -- the processes


class _Far:
    """The memory node, in a process of its own."""

    def __init__(self, cpu: int) -> None:
        (self._port,) = free_ports(1)
        self._process = subprocess.Popen([sys.executable, "-P", "-m", __name__, "far", str(self._port), str(cpu)])

    def __enter__(self) -> int:
        return self._port

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _near(port: int, cpu: int, batch: int, batches: int, seconds: float) -> dict[str, float]:
    """What the compute node, in a process of its own, measures."""
    arguments = [str(value) for value in (port, cpu, batch, batches, seconds)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, "near", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise LaminaError(f"the compute node that is measured ended with status {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


# -- the memory node


class Accounts(NativeBackend):
    """The native backend with its attention left out. It keeps account of the cache: sequences, blocks, watermarks."""

    name = "accounts"

    @staticmethod
    def layer_bytes(shape: LayerShape, dtype: str, block_tokens: int) -> int:
        """Return the bytes of a block in which nothing is stored."""
        return 64

    def append(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        self.cache.advance(layer, self.cache.place(rows, attend=False))

    def past(self, plan: Plan, layer: int, q: Tensor) -> Partial:
        shape, rows = self.cache.shape(layer), plan.rows.tokens
        return _partial(rows, shape.q_heads, shape.v_dim)

    def finish(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        assert isinstance(plan, NativePlan)
        self.cache.advance(layer, plan.placement)
        return past


_partials: dict[tuple[int, int, int], Partial] = {}


def _partial(rows: int, heads: int, v_dim: int) -> Partial:
    key = (rows, heads, v_dim)
    if key not in _partials:
        _partials[key] = Partial.empty(*key, device=torch.device("cpu"))
    return _partials[key]


async def _be_far(port: int, cpu: int) -> None:
    node = MemoryNodeConfig(name="far", address=Address("tcp", "127.0.0.1", port), memory=MEMORY)
    device = CpuDevice(cpus=None if cpu < 0 else frozenset({cpu}), threads=1)
    options = Options(kind="shm", peer_timeout=PEER_TIMEOUT_S)
    await MemoryNode(node, options, device=device, network=Sockets(), backend=Accounts).serve(asyncio.Event())


# -- the compute node


class _FirstToken:
    """The answer to a request of which only the first token is awaited."""

    def __init__(self) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def token(self, token: int, score: Score | None = None) -> None:
        if not self.begun.done():
            self.begun.set_result(None)

    def prompt_scored(self, scores: list[Score]) -> None:
        pass

    def finished(self, end: End) -> None:
        pass

    def failed(self, error: LaminaError) -> None:
        if not self.begun.done():
            self.begun.set_exception(error)


async def _be_near(port: int, cpu: int, batch: int, batches: int, seconds: float) -> None:
    device = CpuDevice(cpus=None if cpu < 0 else frozenset({cpu}), threads=1)
    device.start()
    there, home = Crossing(device.loop), Crossing(asyncio.get_running_loop())
    address, hello = Address.parse(f"tcp://127.0.0.1:{port}"), Hello("compute", "near")
    options = Options(kind="shm", peer_timeout=PEER_TIMEOUT_S)
    watching = await AdminClient.connect(address, Options(kind="control"), name="near", deadline_s=CONNECT_S)
    intake = Intake(
        "near",
        there,
        context=MAX_TOKENS + 1,
        vocabulary=VOCABULARY,
        stop_tokens=frozenset(),
        repetition_penalty=1.0,
        max_waiting=batch * batches,
        random=SystemRandom(),
        constraints=Constraints(BackgroundWorkers(), Tokenizer(Path("/nonexistent"), MAX_TOKENS), VOCABULARY, ()),
    )
    async with await Sockets().connect(address, hello, options, deadline_s=CONNECT_S) as link:
        shard = ShardControl(FAR, "far", link, device, lambda member, error: intake.fail(error))
        (heads,) = shard_by_heads([SHAPE] * LAYERS, ["far"])
        layout = KVLayout(layers=heads.layers, dtype=DTYPE, block_tokens=BLOCK_TOKENS)
        lane = await shard.attach(
            heads,
            layout,
            tenant="none",
            token=bytes(16),
            model="none",
            dtype=DTYPE,
            slots=batches,
            max_rows=batch,
            member=NEAR,
            front=NEAR,
        )
        dtype = getattr(torch, DTYPE)
        forward = EmptyForward([SHAPE] * LAYERS, rows=batch + 1, vocabulary=VOCABULARY, dtype=dtype)
        schedule = Schedule(LAYERS, (NEAR,), batches)
        runner = StepRunner(forward, device, dtype, member=NEAR)
        runner.reform(schedule, {FAR: lane}, {})
        scheduler = Scheduler(
            batches=batches,
            max_batch=batch,
            prefill_tokens=batch,
            block_manager=BlockManager({FAR: shard.capacity_tokens // BLOCK_TOKENS}, BLOCK_TOKENS),
            max_waiting=batch * batches,
        )
        formation = Formation(0, schedule, {FAR: shard.capacity_tokens // BLOCK_TOKENS}, {}, frozenset())
        team = Team(runner, device, home, formation, member=NEAR)
        engine = Engine(scheduler, team, home, intake, batches=batches, workers=ParallelWorkers())
        intake.open(engine, Space({FAR: shard}, BLOCK_TOKENS, intake.reserved))
        running = asyncio.create_task(intake.run())
        answers = [_FirstToken() for _ in range(batch * batches)]
        request = Request(prompt=[1], max_tokens=MAX_TOKENS)
        await asyncio.gather(*(intake.submit(request, [1], answer) for answer in answers))
        await asyncio.gather(*(answer.begun for answer in answers))
        await asyncio.sleep(WARM_UP_S)
        before, far_before, started = (runner.layers, device.busy_s), await watching.status(), time.perf_counter()
        await asyncio.sleep(seconds)
        after, far_after, ended = (runner.layers, device.busy_s), await watching.status(), time.perf_counter()
        if intake.counters.running < len(answers):
            raise LaminaError("the sequences were over before the end of the measurement; ask for more memory")
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
    await watching.close()
    device.close()
    layers = after[0] - before[0]
    found = {
        "exchange_us": (ended - started) / layers * 1e6,
        "compute_us": (after[1] - before[1]) / layers * 1e6,
        "attention_us": (far_after.busy_s - far_before.busy_s) / layers * 1e6,
    }
    sys.stdout.write(json.dumps(found) + "\n")


def _run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=PreciseLoop) as runner:
        runner.run(work)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["far", port, cpu]:
            _run(_be_far(int(port), int(cpu)))
        case ["near", port, cpu, batch, batches, seconds]:
            _run(_be_near(int(port), int(cpu), int(batch), int(batches), float(seconds)))

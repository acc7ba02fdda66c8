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
from contextlib import closing, suppress
from itertools import product
from typing import Any, NamedTuple, cast

import msgspec
import torch
import uvloop
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from lamina.attention import KVLayout, LayerShape, Partial, Rows
from lamina.attention.backend import BACKENDS, Plan
from lamina.attention.native_backend import NativeBackend, NativePlan
from lamina.bench import report
from lamina.bench.ends import Task
from lamina.bench.variants import Setting, two_processors
from lamina.bench.yardsticks import Program
from lamina.cluster.local import free_ports
from lamina.compute.shard import RemoteShard
from lamina.compute.step import StepRunner
from lamina.config import NodeConfig
from lamina.errors import LaminaError
from lamina.front.blocks import Room
from lamina.front.engine import Engine
from lamina.front.scheduler import Scheduler
from lamina.front.team import Team
from lamina.model.slices import Head, SlicedModel, StepConstants, Tail
from lamina.node.memory import MemoryNode
from lamina.runtime.device import Device
from lamina.transport import Address, Hello, Link, Options, connect
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import decode, encode
from lamina.wire.geometry import shard_by_heads
from lamina.wire.requests import Sampling

BATCHES, FLIGHTS = (1, 32), (1, 2, 4)
"""Sequences of a batch, and batches in flight."""
LAYERS, SHAPE = 32, LayerShape(q_heads=32, kv_heads=8, qk_dim=128, v_dim=128, scale=1.0)
"""As of a model with 8 billion parameters."""
DTYPE, BLOCK_TOKENS, VOCABULARY, MAX_TOKENS, MEMORY = "bfloat16", 16, 16, 8192, "256MiB"
WARM_UP_S, MEASURE_S = 0.3, 1.0
PEER_TIMEOUT_S, CONNECT_S = 20.0, 30.0

COLUMNS = {
    "cores": "cores",
    "batch": "batch",
    "batches": "in flight",
    "exchange_us": "µs per exchange",
    "per_s": "exchanges/s",
    "compute_us": "compute",
    "attention_us": "attention",
    "outside_us": "outside",
    "round_trip_us": "round trip",
    "ratio": "ratio",
}


def run(*, as_json: bool, quick: bool) -> None:
    """Measure and print."""
    rows = _measure(quick=quick)
    if as_json:
        report.print_json(rows)
    else:
        report.print_table("a layer of one batch that computes nothing", rows, COLUMNS)


def _measure(*, quick: bool) -> list[report.Row]:
    rows = []
    near, far = two_processors()
    places = [(near, far)] if quick or near < 0 else [(near, near), (near, far)]
    seconds = MEASURE_S / 4 if quick else MEASURE_S
    points = list(product(BATCHES, FLIGHTS))
    with Progress(console=Console(stderr=True), transient=True) as progress:
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
        self._process = subprocess.Popen([sys.executable, "-m", __name__, "far", str(self._port), str(cpu)])

    def __enter__(self) -> int:
        return self._port

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def _near(port: int, cpu: int, batch: int, batches: int, seconds: float) -> dict[str, float]:
    """What the compute node, in a process of its own, measures."""
    arguments = [str(value) for value in (port, cpu, batch, batches, seconds)]
    done = subprocess.run(
        [sys.executable, "-m", __name__, "near", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise LaminaError(f"the compute node that is measured ended with status {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


# -- the memory node


class Accounts(NativeBackend):
    """The native backend with its attention left out. It keeps account of the cache: sequences, blocks, watermarks."""

    def append(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        self.cache.advance(layer, self.cache.place(rows, attend=False))

    def past(self, plan: Plan, layer: int, q: Tensor) -> Partial:
        shape, rows = self.cache.shape(layer), plan.rows.tokens
        return _partial(rows, shape.q_heads, shape.v_dim)

    def finish(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor, past: Partial) -> Partial:
        assert isinstance(plan, NativePlan)
        self.cache.advance(layer, plan.placement)
        return past


def layer_bytes(shape: LayerShape, dtype: str, block_tokens: int) -> int:
    """Of a block in which nothing is stored."""
    return 64


_partials: dict[tuple[int, int, int], Partial] = {}


def _partial(rows: int, heads: int, v_dim: int) -> Partial:
    key = (rows, heads, v_dim)
    if key not in _partials:
        _partials[key] = Partial.empty(*key, device=torch.device("cpu"))
    return _partials[key]


async def _be_far(port: int, cpu: int) -> None:
    BACKENDS["accounts"] = ("lamina.bench.exchange", "Accounts")
    node = NodeConfig(
        name="far",
        role="memory",
        address=f"tcp://127.0.0.1:{port}",
        memory=MEMORY,
        cpus=None if cpu < 0 else str(cpu),
        threads=1,
        attention="accounts",  # type: ignore[arg-type]
    )
    await MemoryNode(node, Options(kind="shm", peer_timeout=PEER_TIMEOUT_S)).serve(asyncio.Event())


# -- the compute node


class _Slice:
    """Stands for a slice: tensors that were made before, cut to the rows of the step."""

    def __init__(self, shape: LayerShape | None, rows: int) -> None:
        self.shape = shape
        dtype = getattr(torch, DTYPE)
        if shape is None:
            self._out = torch.zeros(rows, VOCABULARY, dtype=dtype)
            return
        self._out = torch.zeros(rows, shape.q_heads, shape.qk_dim, dtype=dtype)
        self._k = torch.zeros(rows, shape.kv_heads, shape.qk_dim, dtype=dtype)
        self._v = torch.zeros(rows, shape.kv_heads, shape.v_dim, dtype=dtype)

    def head(self, constants: StepConstants, carry: tuple[Tensor, ...] = (), o: Tensor | None = None) -> Head:
        return Head(self._out[: constants[self.shape is None]], ())

    def tail(self, constants: StepConstants, kept: tuple[Tensor, ...]) -> Tail:
        return Tail(self._k[: constants[0]], self._v[: constants[0]], ())


class _Model(NamedTuple):
    """Stands for a model. The constants of a step are the numbers of its rows and of those that are sampled."""

    slices: tuple[_Slice, ...]
    device: torch.device

    @property
    def shapes(self) -> list[LayerShape]:
        return [piece.shape for piece in self.slices if piece.shape]

    def slice(self, index: int) -> _Slice:
        return self.slices[index]

    def begin(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> StepConstants:
        return len(token_ids), len(rows)


class _Answer:
    """Nobody who asked."""

    def __init__(self) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def token(self, token: int) -> None:
        if not self.begun.done():
            self.begun.set_result(None)

    def finished(self, reason: str) -> None:
        pass

    def failed(self, error: LaminaError) -> None:
        if not self.begun.done():
            self.begun.set_exception(error)


async def _be_near(port: int, cpu: int, batch: int, batches: int, seconds: float) -> None:
    device = Device(cpus=None if cpu < 0 else frozenset({cpu}), threads=1)
    address, hello = Address.parse(f"tcp://127.0.0.1:{port}"), Hello("compute", "near")
    options = Options(kind="shm", peer_timeout=PEER_TIMEOUT_S)
    watching = await connect(address, Hello("monitor", "near"), Options(kind="control"), deadline_s=CONNECT_S)
    async with await connect(address, hello, options, deadline_s=CONNECT_S) as link:
        link.deliver(lane_loop=device.loop)
        (heads,) = shard_by_heads([SHAPE] * LAYERS, ["far"])
        layout = KVLayout(layers=heads.layers, dtype=DTYPE, block_tokens=BLOCK_TOKENS)
        shard = RemoteShard("far", link, heads, layout, device, dtype=DTYPE, slots=batches, max_rows=batch)
        await shard.attach("none", "none")
        rows = batch + 1
        model = _Model((*(_Slice(SHAPE, rows) for _ in range(LAYERS)), _Slice(None, rows)), device.torch_device)
        runner = StepRunner(cast(SlicedModel, model), device, [shard], getattr(torch, DTYPE))
        scheduler = Scheduler(
            batches=batches,
            max_batch=batch,
            prefill_tokens=batch,
            room=Room([shard.capacity_tokens // BLOCK_TOKENS], BLOCK_TOKENS),
            max_waiting=batch * batches,
        )
        engine = Engine(
            "near",
            Team(runner),
            [shard],
            scheduler,
            batches=batches,
            context=MAX_TOKENS + 1,
            vocabulary=VOCABULARY,
            stop_tokens=frozenset(),
        )
        running = asyncio.create_task(engine.run())
        answers = [_Answer() for _ in range(batch * batches)]
        for answer in answers:
            engine.submit([1], MAX_TOKENS, Sampling(), answer)
        await asyncio.gather(*(answer.begun for answer in answers))
        await asyncio.sleep(WARM_UP_S)
        before, far_before, started = (runner.layers, device.busy_s), await _status(watching), time.perf_counter()
        await asyncio.sleep(seconds)
        after, far_after, ended = (runner.layers, device.busy_s), await _status(watching), time.perf_counter()
        if engine.running < len(answers):
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


async def _status(link: Link) -> Status:
    answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    link.deliver(on_message=answered.set_result)
    link.send(encode(AskStatus()))
    status: Status = decode(await answered, Status)
    return status


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["far", port, cpu]:
            uvloop.run(_be_far(int(port), int(cpu)))
        case ["near", port, cpu, batch, batches, seconds]:
            uvloop.run(_be_near(int(port), int(cpu), int(batch), int(batches), float(seconds)))

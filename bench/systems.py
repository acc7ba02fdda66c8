"""The systems that ``lamina bench throughput`` compares: started, asked for measurements, stopped."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lamina import __version__
from lamina.bench.checkpoints import RandomLlama
from lamina.bench.clusters import FilledCluster
from lamina.bench.installed import Environment, UnavailableError, last_line
from lamina.client import AsyncClient, AsyncStream, connect
from lamina.cluster.local import Cluster, free_addresses
from lamina.config import (
    ClusterConfig,
    ComputeNodeConfig,
    MemoryNodeConfig,
    ModelConfig,
    PipelineConfig,
    TransportConfig,
    write_cluster,
)
from lamina.errors import LaminaError
from lamina.limits import MAX_PREFILL_TOKENS
from lamina.ops.figures import between

PEER_TIMEOUT_S = 60.0
"""How long Lamina's links may be silent, as other systems start on the same cores."""
START_TIMEOUT_S, MEASURE_TIMEOUT_S = 900.0, 900.0

SKEW_TOKENS = 64
"""The tokens that the first sequences may generate before the last one begins."""
BLOCK_TOKENS = 16
KV_SLACK = 1.05
"""The size of a KV cache over the bytes of its keys and values, to allow for blocks and alignment."""
PADDING_TOKENS = 256
"""The tokens to add to each sequence for partly filled blocks in other engines."""


@dataclass(frozen=True, slots=True)
class Work:
    """Decode ``batch`` sequences with ``context`` tokens each: ``warm`` steps, and then ``steps`` steps to be timed."""

    batch: int
    context: int
    warm: int
    steps: int

    @property
    def room(self) -> int:
        """The most tokens that one sequence may have."""
        return self.context + self.warm + self.steps + SKEW_TOKENS

    @property
    def tokens(self) -> int:
        """The tokens of all sequences, in whole blocks."""
        return self.batch * -(-self.room // BLOCK_TOKENS) * BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class CacheDemand:
    """What a KV cache must hold: ``tokens`` of at most ``batch`` sequences, with at most ``room`` each."""

    batch: int
    room: int
    tokens: int

    @classmethod
    def of(cls, works: Sequence[Work]) -> CacheDemand:
        """Return the demand that covers each of ``works``, one at a time."""
        return cls(max(w.batch for w in works), max(w.room for w in works), max(w.tokens for w in works))


@dataclass(frozen=True, slots=True)
class Sample:
    """The result of one measurement."""

    tokens_per_s: float
    parts_ms: Mapping[str, float] = field(default_factory=dict)
    """The parts of a step's time, if they are known."""
    detail: str = ""
    """How the system ran, in words."""


class System(Protocol):
    """One system with one model."""

    name: str
    version: str

    @property
    def candidates(self) -> Sequence[str]:
        """The names of thread settings from which a sweep chooses; the first is used without a sweep."""
        ...

    async def start(self) -> None:
        """Start the system. LaminaError says why it cannot start."""
        ...

    async def measure(self, work: Work, threads: str) -> Sample:
        """Measure with one of ``candidates``. LaminaError says why that failed."""
        ...

    async def close(self) -> None: ...


class PeerEngine:
    """Another engine: a script that runs under the Python of its own environment and answers line by line."""

    def __init__(self, environment: Environment, model: RandomLlama, checkpoint: Path, demand: CacheDemand) -> None:
        self.name = environment.name
        self.version = ""
        self._environment = environment
        tokens = int(demand.tokens * KV_SLACK) + demand.batch * PADDING_TOKENS
        nbytes = tokens * model.kv_bytes_per_token
        self._command = environment.command(checkpoint, [demand.batch, demand.room, nbytes])
        self._process: Process | None = None
        cores = len(os.sched_getaffinity(0))
        self._threads = {str(threads): threads for threads in dict.fromkeys((cores, max(1, cores // 2)))}
        self._started_with = 0

    @property
    def candidates(self) -> list[str]:
        return list(self._threads)

    async def start(self) -> None:
        if not self._environment.recipe.fixed:
            await self._start(len(os.sched_getaffinity(0)))

    async def _start(self, threads: int) -> None:
        self._started_with = threads
        with self._environment.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=self._environment.variables(threads),
            )
        self.version = (await self._answer(START_TIMEOUT_S))["version"]

    async def measure(self, work: Work, threads: str) -> Sample:
        count = self._threads[threads]
        if self._environment.recipe.fixed and self._started_with != count:
            await self.close()
            await self._start(count)
        assert self._process
        assert self._process.stdin
        asked = {
            "batch": work.batch,
            "context": work.context,
            "warm": work.warm,
            "steps": work.steps,
            "threads": count,
        }
        try:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            await self._process.stdin.drain()
        except OSError as e:
            raise self._ended() from e
        answer = await self._answer(MEASURE_TIMEOUT_S)
        return Sample(work.batch * work.steps / answer["seconds"], detail=answer.get("detail", ""))

    async def close(self) -> None:
        if self._process and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process
        assert self._process.stdout
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
        except TimeoutError as e:
            await self.close()  # a late answer would be taken for the next one
            raise UnavailableError(f"{self.name} gave no answer within {timeout_s:g} s") from e
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise UnavailableError(f"{self.name}: {answer['failed']} (full log: {self._environment.log})")
        return answer

    def _ended(self) -> UnavailableError:
        log = self._environment.log
        return UnavailableError(f"{self.name} has ended: {last_line(log)} (full log: {log})")


@dataclass(frozen=True, slots=True)
class Wiring:
    """How Lamina's two nodes share one machine."""

    compute: int
    """Threads of the compute node."""
    memory: int
    """Threads of the memory node."""
    batches: int
    """Batches in flight."""
    cpus: tuple[frozenset[int], frozenset[int]] | None = None
    """The processors that each node is pinned to; None lets both use all."""

    def __str__(self) -> str:
        pinned = " pinned" if self.cpus else ""
        return f"{self.compute}+{self.memory}{pinned}, {self.batches} batch{'es' if self.batches > 1 else ''}"


def wirings() -> list[Wiring]:
    """Return the wirings that suit one machine: both nodes on all cores, with one or two batches, or on a half each."""
    cpus = sorted(os.sched_getaffinity(0))
    found = [Wiring(len(cpus), len(cpus), batches) for batches in (1, 2)]
    if len(cpus) > 1:
        half = len(cpus) // 2
        found.append(Wiring(half, len(cpus) - half, 2, (frozenset(cpus[:half]), frozenset(cpus[half:]))))
    return found


class Lamina:
    """One compute node that fills prompts in at random (`lamina.bench.filled`), and one memory node."""

    name = "lamina"

    def __init__(self, model: RandomLlama, checkpoint: Path, demand: CacheDemand) -> None:
        self.version = __version__
        self._checkpoint = checkpoint
        self._demand = demand
        self._memory = int(demand.tokens * model.kv_bytes_per_token * KV_SLACK) + 2**24
        self._wirings = {str(wiring): wiring for wiring in wirings()}
        self._running = ""
        self._stack = AsyncExitStack()
        self._cluster: Cluster | None = None
        self._client: AsyncClient | None = None

    @property
    def candidates(self) -> list[str]:
        return list(self._wirings)

    async def start(self) -> None:
        """Start nothing yet: the processes start for the first measurement, and again when the threads change."""

    async def measure(self, work: Work, threads: str) -> Sample:
        if self._running != threads:
            await self.close()
            await self._start(self._wirings[threads])
            self._running = threads
        assert self._client
        assert self._cluster
        try:
            async with asyncio.timeout(MEASURE_TIMEOUT_S):
                return await self._decode(self._client, self._cluster, work)
        except TimeoutError as e:
            raise LaminaError(f"lamina did not finish decoding within {MEASURE_TIMEOUT_S:g} s") from e

    async def close(self) -> None:
        self._running = ""
        await self._stack.aclose()

    async def _start(self, wiring: Wiring) -> None:
        stack = self._stack
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lamina-bench-")))
        log = stack.enter_context((folder / "nodes.log").open("wb"))
        config = self._config(folder, wiring)
        self._cluster = await stack.enter_async_context(FilledCluster(config, log_file=log))
        await self._cluster.ready()
        self._client = await stack.enter_async_context(connect(config.front.address, peer_timeout=PEER_TIMEOUT_S))

    def _config(self, folder: Path, wiring: Wiring) -> ClusterConfig:
        front, other = free_addresses(2)
        near, far = wiring.cpus or (None, None)
        demand = self._demand
        return write_cluster(
            folder / "cluster.toml",
            ModelConfig(path=str(self._checkpoint), context=demand.room),
            [
                ComputeNodeConfig(name="c0", address=front, threads=wiring.compute, cpus=near),
                MemoryNodeConfig(name="m0", address=other, threads=wiring.memory, cpus=far, memory=self._memory),
            ],
            pipeline=PipelineConfig(
                batches=wiring.batches,
                max_batch=-(-demand.batch // wiring.batches),
                # Prompts cost nothing here, so all of them are done in a step or two.
                prefill_tokens=min(MAX_PREFILL_TOKENS, demand.tokens),
                prefill_kv=2**40,
            ),
            transport=TransportConfig(peer_timeout=PEER_TIMEOUT_S, start_timeout=START_TIMEOUT_S),
        )

    async def _decode(self, client: AsyncClient, cluster: Cluster, work: Work) -> Sample:
        clock = _Stopwatch(work)
        most = work.room - work.context
        # Each sequence must have its own keys and values.
        streams = [client.stream([0] * work.context, max_tokens=most, share_prefix=False) for _ in range(work.batch)]
        followers = [asyncio.create_task(_follow(clock, i, stream)) for i, stream in enumerate(streams)]
        try:
            await _first_of(clock.started, followers)
            before, started = await cluster.statuses(), time.perf_counter()
            await _first_of(clock.finished, followers)
            after, seconds = await cluster.statuses(), time.perf_counter() - started
        finally:
            for follower in followers:
                follower.cancel()
            await asyncio.gather(*followers, return_exceptions=True)
        while (await client.status()).requests_running:  # noqa: ASYNC110  # the node reports it only when asked
            await asyncio.sleep(0.01)
        figures = between(before, after, seconds)
        scale = figures.layers / (figures.tokens / work.batch) / 1e3
        parts = {part: figures.layer_us[part] * scale for part in ("compute", "attention", "wire")}
        return Sample(clock.tokens_per_s, parts)


class _Stopwatch:
    """Times ``work.steps`` tokens of each sequence, from the moment at which all sequences decode."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._times: list[list[float]] = [[] for _ in range(work.batch)]
        self._first: list[int] = []
        """For each sequence, the token at which its time starts."""
        self.started, self.finished = asyncio.Event(), asyncio.Event()
        self._missing = {self.started: work.batch, self.finished: work.batch}

    def token(self, sequence: int) -> None:
        own = self._times[sequence]
        own.append(time.perf_counter())
        if not self._first:
            if len(own) == 1 and all(self._times):
                self._first = [len(times) + self._work.warm - 1 for times in self._times]
            return
        if len(own) == self._first[sequence] + 1:
            self._arrived(self.started)
        elif len(own) == self._first[sequence] + 1 + self._work.steps:
            self._arrived(self.finished)

    @property
    def tokens_per_s(self) -> float:
        """The tokens per second of all sequences together."""
        steps = self._work.steps
        return sum(
            steps / (times[first + steps] - times[first]) for times, first in zip(self._times, self._first, strict=True)
        )

    def _arrived(self, event: asyncio.Event) -> None:
        """Count one more sequence for ``event``, which is set when all sequences have arrived."""
        self._missing[event] -= 1
        if not self._missing[event]:
            event.set()


async def _follow(clock: _Stopwatch, sequence: int, stream: AsyncStream) -> None:
    async with stream:
        async for _ in stream:
            clock.token(sequence)
    raise LaminaError(f"lamina ended an answer ({stream.finish_reason}) before all of them could be measured")


async def _first_of(event: asyncio.Event, followers: Sequence[asyncio.Task[None]]) -> None:
    """Wait for ``event``, or raise the error of a follower that fails before it."""
    waiting = asyncio.create_task(event.wait())
    try:
        done, _ = await asyncio.wait({waiting, *followers}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {waiting}:
            task.result()
    finally:
        waiting.cancel()

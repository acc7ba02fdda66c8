"""The HTTP endpoint beside the Python client: tokens/s of many streams, and what the endpoint costs.

One compute and one memory node serve both with the demo's model, or another one; other servers serve the same
checkpoint if they are asked for. All decode greedily in bfloat16: prompts of token ids, and answers of a fixed length.
The contestants take turns, in another order each round, and ratios are those of rounds. One process asks all of them;
its processor time stands beside that of the servers, as all share the cores.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import uvloop
from rich.console import Console

from lamina.bench import report
from lamina.bench.bandwidth import MAX_OTHERS
from lamina.bench.http_streams import HttpAnswer, HttpConnection
from lamina.bench.installed import Environment, install, last_line
from lamina.client import AsyncClient, AsyncStream, connect
from lamina.cluster.child import Child
from lamina.cluster.local import Cluster, free_addresses, free_ports
from lamina.config import ClusterConfig, ComputeNodeConfig, MemoryNodeConfig, ModelConfig, PipelineConfig, write_cluster
from lamina.demo.run import CHECKPOINT
from lamina.errors import ConfigError, LaminaError
from lamina.table import print_text

PEERS = ("vllm",)
STREAMS, TOKENS, PROMPT_TOKENS = 64, 256, 32
QUICK_TOKENS = 64
ROUNDS, QUICK_ROUNDS = 5, 2
CONTEXT = 1024
START_S, TURN_S = 300.0, 600.0
SETTLE_S = 0.3
"""How long processes may still be busy with the turn before."""
SEED = 13
YARDSTICK = "Python client"

COLUMNS = {
    "system": "through",
    "tokens_per_s": "tokens/s",
    "ratio": "of the Python client",
    "endpoint_us": "endpoint µs/token",
    "engine_us": "engine",
    "client_us": "client",
    "first_ms": "TTFT ms p50",
    "first_p99_ms": "p99",
    "next_ms": "ITL ms p50",
    "next_p99_ms": "p99",
}
"""Processor times are those of a token: of the processes that speak HTTP, of those behind them, and of this one."""


def run(peers: Sequence[str], *, model: Path | None, streams: int, tokens: int, as_json: bool, quick: bool) -> None:
    """Measure and print. ``model`` is a checkpoint directory, by default that of the demo."""
    if unknown := sorted(set(peers) - set(PEERS)):
        raise ConfigError(f"--peer: expected {', '.join(PEERS)}, got {', '.join(unknown)}")
    if tokens + PROMPT_TOKENS > CONTEXT:
        raise ConfigError(f"--tokens: expected at most {CONTEXT - PROMPT_TOKENS}, got {tokens}")
    console = Console(stderr=True)
    tokens = min(tokens, QUICK_TOKENS) if quick else tokens
    comparison = _SourceComparison(console, model or CHECKPOINT, streams, tokens, QUICK_ROUNDS if quick else ROUNDS)
    rows = uvloop.run(comparison.run(list(dict.fromkeys(peers))))
    for row in rows:
        if row["failed"]:
            print_text(f"{row['system']}: {row['failed']}", console)
    others = comparison.other_cores
    if others > MAX_OTHERS:
        busy = f"other work kept {others:.2f} cores busy during the turns"
        print_text(f"{busy}; processor times hold, the others are better on a quiet machine", console)
    name = f"the model {model.resolve().name}" if model else "the demo's model"
    about = f"{name}, bfloat16, {streams} streams, prompts of {PROMPT_TOKENS} tokens, answers of {tokens}"
    result = report.Result("endpoint", about, rows, {**report.machine(), "other_cores": others})
    if as_json:
        report.print_json(result)
    else:
        report.print_table(f"endpoint: {about}; medians of {comparison.rounds} rounds", rows, COLUMNS)


@dataclass
class StreamedTurn:
    """What came in one turn."""

    begun_s: float
    times: list[list[float]]
    """When the tokens of each stream came. Some servers send several in one event, which counts once here."""
    tokens: int
    """The tokens of all streams."""
    cpu_s: dict[str, float] = field(default_factory=dict)
    """The processor time of endpoint, engine and client."""

    @property
    def tokens_per_s(self) -> float:
        """The tokens of all streams, from the moment when they were asked for to the last one."""
        return self.tokens / (max(times[-1] for times in self.times) - self.begun_s)

    def first_s(self) -> list[float]:
        """The times to the first tokens."""
        return [times[0] - self.begun_s for times in self.times]

    def next_s(self) -> list[float]:
        """The times between the tokens of a stream."""
        return [later - before for times in self.times for before, later in itertools.pairwise(times)]


class TokenSource(Protocol):
    """A way to ask for tokens."""

    name: str

    async def start(self) -> None:
        """Start what it needs. LaminaError says why that is impossible."""
        ...

    async def ask(self, prompts: list[list[int]], tokens: int) -> StreamedTurn:
        """Answer all prompts at the same time; return when the tokens of each came."""
        ...

    def processes(self) -> dict[str, list[int]]:
        """Return the process ids of endpoint and engine."""
        ...

    async def close(self) -> None:
        """End what was started."""
        ...


class PythonClient:
    """The native protocol, straight to the front."""

    name = YARDSTICK

    def __init__(self, config: ClusterConfig, cluster: Cluster) -> None:
        self._config = config
        self._cluster = cluster
        self._stack = AsyncExitStack()
        self._client: AsyncClient
        self._engine: list[int] = []

    async def start(self) -> None:
        self._client = await self._stack.enter_async_context(connect(self._config.front.address, peer_timeout=60.0))
        self._engine = await engine_of(self._cluster, self._config)

    async def ask(self, prompts: list[list[int]], tokens: int) -> StreamedTurn:
        async def read(stream: AsyncStream) -> list[float]:
            return [time.perf_counter() async for _ in stream]

        streams = [self._client.stream(prompt, max_tokens=tokens, ignore_eos=True) for prompt in prompts]
        begun = time.perf_counter()
        times = await asyncio.gather(*(read(stream) for stream in streams))
        return StreamedTurn(begun, times, sum(map(len, times)))

    def processes(self) -> dict[str, list[int]]:
        return {"endpoint": [], "engine": self._engine}

    async def close(self) -> None:
        await self._stack.aclose()


class HttpServer:
    """A server of OpenAI's API on this machine."""

    name: str
    model: str

    def __init__(self) -> None:
        self.port = free_ports(1)[0]

    async def ask(self, prompts: list[list[int]], tokens: int) -> StreamedTurn:
        connections = [await HttpConnection.open(self.port) for _ in prompts]
        begun = time.perf_counter()
        for connection, prompt in zip(connections, prompts, strict=True):
            connection.send("/v1/completions", self._body(prompt, tokens))
        answers = await asyncio.gather(*(connection.end() for connection in connections))
        for connection in connections:
            connection.drop()
        return StreamedTurn(begun, [self._times(answer, tokens) for answer in answers], tokens * len(answers))

    def _times(self, answer: HttpAnswer, tokens: int) -> list[float]:
        """Return when the tokens of an answer came. LaminaError if they are not as many as were asked for."""
        if answer.status != 200 or not answer.complete:
            raise LaminaError(f"{self.name}: status {answer.status}: {answer.body[:500].decode(errors='replace')}")
        *events, usage, _ = answer.events
        count = json.loads(usage[6:])["usage"]["completion_tokens"]
        if count != tokens:
            raise LaminaError(f"{self.name}: expected {tokens} tokens, got {count}")
        return answer.times[: min(tokens, len(events))]

    def _body(self, prompt: list[int], tokens: int) -> bytes:
        asked = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(asked).encode()

    async def wait_until(self, path: str, ended: asyncio.Future[Any]) -> None:
        """Wait until the server answers ``path`` with 200. LaminaError if it ends, or takes too long."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and not ended.done():
            try:
                connection = await HttpConnection.open(self.port)
                answer = await connection.ask(path, method="GET")
                connection.drop()
                if answer.status == 200:
                    return
            except (OSError, LaminaError):
                pass
            await asyncio.sleep(0.1)
        raise LaminaError(f"{self.name} {'has ended' if ended.done() else f'was not ready within {START_S:g} s'}")


class LaminaServe(HttpServer):
    """``lamina serve`` before the same cluster."""

    name = "lamina serve"

    def __init__(self, config: ClusterConfig, cluster: Cluster, log: IO[bytes]) -> None:
        super().__init__()
        self.model = config.model_path.resolve().name
        self._config = config
        self._cluster = cluster
        self._log = log
        self._child: Child | None = None
        self._engine: list[int] = []

    async def start(self) -> None:
        words = ["-m", "lamina", "serve", str(self._config.file), "--port", str(self.port)]
        words += ["--files", str(self._config.file.parent / "files")]
        child = self._child = await Child.start(words, threads=1, log_file=self._log, on_report=lambda report: None)
        await self.wait_until("/ready", asyncio.ensure_future(child.wait()))
        self._engine = await engine_of(self._cluster, self._config)

    def processes(self) -> dict[str, list[int]]:
        assert self._child
        return {"endpoint": [self._child.process.pid], "engine": self._engine}

    async def close(self) -> None:
        if self._child is not None:
            await self._child.end(5.0)
            self._child.close()


class VllmServe(HttpServer):
    """``vllm serve`` for the same checkpoint, in the environment of `lamina.bench.installed`."""

    name = "vllm serve"

    def __init__(self, environment: Environment, model: Path, streams: int) -> None:
        super().__init__()
        self.model = str(model)
        self._environment = environment
        self._streams = streams
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        environment = self._environment
        settings = {
            "host": "127.0.0.1",
            "port": self.port,
            "dtype": "bfloat16",
            "max-model-len": CONTEXT,
            "max-num-seqs": self._streams,
            "kv-cache-memory-bytes": 1 << 30,
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        variables = environment.variables(len(os.sched_getaffinity(0)))
        del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]  # as a server it has the engine in a process of its own
        variables["PATH"] = f"{environment.folder / 'bin'}{os.pathsep}{variables['PATH']}"
        with environment.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                str(environment.folder / "bin" / "python"),
                "-m",
                "vllm.entrypoints.openai.api_server",  # `vllm serve`, which this distribution's other name breaks
                "--model",
                self.model,
                "--no-enable-prefix-caching",
                "--disable-uvicorn-access-log",
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=variables,
                start_new_session=True,
            )
        try:
            await self.wait_until("/health", asyncio.ensure_future(self._process.wait()))
        except LaminaError as e:
            raise LaminaError(f"{e}: {last_line(environment.log)} (full log: {environment.log})") from e

    def processes(self) -> dict[str, list[int]]:
        assert self._process
        pid = self._process.pid
        return {"endpoint": [pid], "engine": descendants(pid)}

    async def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), 20)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


class _SourceComparison:
    """All turns of one run."""

    def __init__(self, console: Console, model: Path, streams: int, tokens: int, rounds: int) -> None:
        self.rounds = rounds
        self._model = model
        self._console = console
        self._streams = streams
        self._tokens = tokens
        self._random = random.Random(SEED)  # noqa: S311 - for prompts
        self._others: list[float] = []

    @property
    def other_cores(self) -> float:
        """The average number of cores that were busy with other things during the turns."""
        return statistics.mean(self._others) if self._others else 0.0

    async def run(self, peers: Sequence[str]) -> list[report.Row]:
        """Return a row for each contestant."""
        failed: dict[str, str] = {}
        turns: dict[str, list[StreamedTurn]] = {}
        async with AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lamina-bench-")))
            log = stack.enter_context((folder / "nodes.log").open("wb"))
            config = self._config(folder)
            progress = stack.enter_context(report.progress(self._console))
            cluster = await stack.enter_async_context(Cluster(config, log_file=log))
            await cluster.ready()
            contestants: list[TokenSource] = [PythonClient(config, cluster), LaminaServe(config, cluster, log)]
            for peer in peers:
                try:
                    with self._console.status(f"installing {peer}, which takes minutes the first time"):
                        contestants.append(
                            VllmServe(await asyncio.to_thread(install, peer), self._model, self._streams)
                        )
                except LaminaError as e:
                    failed[VllmServe.name] = str(e)
            task = progress.add_task("starting", total=len(contestants) * (1 + self.rounds))
            there: list[TokenSource] = []
            for contestant in contestants:
                stack.push_async_callback(contestant.close)
                progress.update(task, description=f"starting {contestant.name}")
                try:
                    await contestant.start()
                    await self._turn(contestant)  # the first turn warms up
                    there.append(contestant)
                except LaminaError as e:
                    failed[contestant.name] = str(e)
                progress.advance(task)
            for number in range(self.rounds):
                first = number % len(there)
                for contestant in there[first:] + there[:first]:
                    progress.update(task, description=contestant.name)
                    turns.setdefault(contestant.name, []).append(await self._turn(contestant))
                    progress.advance(task)
        rows = [row_of(contestant.name, turns, failed) for contestant in contestants]
        return rows + [row_of(name, turns, failed) for name in failed if name not in {row["system"] for row in rows}]

    def _config(self, folder: Path) -> ClusterConfig:
        front, other = free_addresses(2)
        return write_cluster(
            folder / "cluster.toml",
            ModelConfig(path=str(self._model.resolve()), dtype="bfloat16"),
            [
                ComputeNodeConfig(name="c0", address=front, threads=1),
                MemoryNodeConfig(name="m0", address=other, threads=1, memory=1 << 30),
            ],
            pipeline=PipelineConfig(max_batch=self._streams),
        )

    async def _turn(self, contestant: TokenSource) -> StreamedTurn:
        # Prompts are never the same twice, so that no server has the keys and values of one already.
        prompts = [[self._random.randrange(4, 1000) for _ in range(PROMPT_TOKENS)] for _ in range(self._streams)]
        await asyncio.sleep(SETTLE_S)
        gc.collect()
        processes = contestant.processes() | {"client": [os.getpid()]}
        before = {role: cpu_seconds(pids) for role, pids in processes.items()}
        all_before, begun = busy_seconds(), time.perf_counter()
        async with asyncio.timeout(TURN_S):
            turn = await contestant.ask(prompts, self._tokens)
        seconds, busy = time.perf_counter() - begun, busy_seconds() - all_before
        turn.cpu_s = {role: cpu_seconds(pids) - before[role] for role, pids in processes.items()}
        self._others.append(max(0.0, busy - sum(turn.cpu_s.values())) / seconds)
        return turn


def row_of(name: str, turns: dict[str, list[StreamedTurn]], failed: dict[str, str]) -> report.Row:
    """Return what was measured of one contestant, or why nothing was."""
    own, yardstick = turns.get(name, []), turns.get(YARDSTICK, [])
    row: report.Row = {"system": name, **dict.fromkeys(list(COLUMNS)[1:]), "rounds": [], "failed": failed.get(name, "")}
    if not own:
        return row
    rates = [turn.tokens_per_s for turn in own]
    pairs = zip(rates, (turn.tokens_per_s for turn in yardstick), strict=False)
    row |= {
        "tokens_per_s": statistics.median(rates),
        "ratio": statistics.median(ours / theirs for ours, theirs in pairs) if yardstick else None,
        "rounds": [{"tokens_per_s": rate} for rate in rates],
    }
    for role in ("endpoint", "engine", "client"):
        row[f"{role}_us"] = statistics.median(turn.cpu_s[role] / turn.tokens * 1e6 for turn in own)
    for key, values in (
        ("first", [s for turn in own for s in turn.first_s()]),
        ("next", [s for turn in own for s in turn.next_s()]),
    ):
        row[f"{key}_ms"], row[f"{key}_p99_ms"] = (1e3 * percentile(values, share) for share in (0.5, 0.99))
    return row


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of all values do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def engine_of(cluster: Cluster, config: ClusterConfig) -> list[int]:
    """Return the process ids of the nodes of a cluster."""
    statuses = await cluster.statuses()
    return [statuses[node.name].pid for node in config.node]


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes below one."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, file.read_text().split()):
            found += [child, *descendants(child)]
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the processor time that processes have taken so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """Return the processor time that all processes of this machine have taken."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return sum(int(fields[i]) for i in (1, 2, 3, 6, 7)) / os.sysconf("SC_CLK_TCK")

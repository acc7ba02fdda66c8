"""Nodes are killed while clients stream: every request is answered, with the tokens of ``transformers``."""

from __future__ import annotations

import asyncio
import math
import random
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lamina import AsyncClient
from lamina.config import ClusterConfig, PipelineConfig, RecoveryConfig
from lamina.errors import LaminaError, NodeError
from lamina.transport import Options
from lamina.transport.choice import offers
from tests import harness
from tests.families import FAMILIES, VOCABULARY
from tests.oracle import Agreement, Oracle

STREAMS = 16
TOKENS = 150


@dataclass
class Run:
    """What clients saw while nodes were killed."""

    answers: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """Prompts and answers, which are compared when all is over: that takes time, of which clients would lose theirs."""
    refused: int = 0
    """How often a front that was starting took no request."""
    is_whole: bool = True
    """Whether no node is missing."""
    struck: list[tuple[str, float]] = field(default_factory=list)
    """Which nodes were killed when."""
    steps_s: list[float] = field(default_factory=list)
    """The mean time between two tokens, of each answer during which no node was killed or missing."""
    arrivals: list[list[float]] = field(default_factory=lambda: [[] for _ in range(STREAMS)])
    """When each client got tokens."""

    def gaps(self, role: str) -> list[float]:
        """The time without a token of each client that spans the kill of a node of a role."""
        found = []
        for struck in (at_s for name, at_s in self.struck if name.startswith(role)):
            for times in self.arrivals:
                before = max((t for t in times if t <= struck), default=None)
                after = min((t for t in times if t > struck), default=None)
                if before is not None and after is not None:
                    found.append(after - before)
        return sorted(found)

    def report(self) -> str:
        kills = Counter(name for name, _ in self.struck)
        step_s = statistics.median(self.steps_s) if self.steps_s else math.nan
        lines = [
            (
                f"{kills.total()} kills ({', '.join(f'{n} of {name}' for name, n in sorted(kills.items()))}); "
                f"{len(self.answers)} answers of {TOKENS} tokens, all as transformers gives them; between tokens of "
                f"answers without a kill: p50 {1000 * step_s:.1f} ms; {self.refused} times a starting front took none"
            )
        ]
        for what, role in (("compute nodes", "c"), ("memory nodes", "m")):
            gaps = self.gaps(role)
            missed = sum(gap > 3 * step_s for gap in gaps)
            lines.append(
                f"time to the next token over the kill of {what}: p50 {statistics.median(gaps):.2f} s, "
                f"p99 {gaps[int(0.99 * (len(gaps) - 1))]:.2f} s; {missed} of {len(gaps)} streams waited for "
                "more than 3 steps"
            )
        return "\n".join(lines)


async def stream(client: AsyncClient, number: int, run: Run, over: asyncio.Event) -> None:
    """Ask again and again, until it is over."""
    chance = random.Random(number)
    while not over.is_set():
        prompt = [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 48))]
        tokens, begun_s = [], math.inf
        try:
            async for piece in client.stream(prompt, max_tokens=TOKENS):
                tokens.append(piece.id)
                begun_s = min(begun_s, time.monotonic())
                run.arrivals[number].append(time.monotonic())
        except NodeError as error:  # what is asked of a front that starts is not taken, and says so
            if tokens or "still starting" not in str(error):
                raise
            run.refused += 1
            await asyncio.sleep(0.1)
            continue
        assert len(tokens) == TOKENS
        run.answers.append((prompt, tokens))
        if run.is_whole and all(at_s < begun_s for _, at_s in run.struck):
            run.steps_s.append((time.monotonic() - begun_s) / (TOKENS - 1))


async def whole(config: ClusterConfig) -> bool:
    """Whether all nodes serve."""
    try:
        status = await harness.status_of(config, config.front)
    except LaminaError:
        return False
    return status.state == "ready" and all(member.state == "serving" for member in status.members)


async def strike(config: ClusterConfig, nodes: dict[str, harness.Node], run: Run, kills: int, seed: int) -> None:
    """Kill one node after the other at random moments, and start each again."""
    chance = random.Random(seed)
    names = list(nodes)
    for number in range(kills):
        await asyncio.sleep(chance.uniform(0.1, 2.0))
        victim = names[number] if number < len(names) else chance.choice(names)
        nodes[victim].signal(signal.SIGKILL)
        run.struck.append((victim, time.monotonic()))
        run.is_whole = False
        await asyncio.to_thread(nodes[victim].wait)
        nodes[victim] = harness.start_node(config, victim)
        await harness.eventually(lambda: whole(config), timeout_s=120)
        run.is_whole = True


@pytest.mark.parametrize(
    ("kind", "partition", "kills"),
    [
        ("shm", "requests", 4),
        pytest.param("tcp", "heads", 4, marks=pytest.mark.slow),
        pytest.param("shm", "requests", 50, marks=(pytest.mark.slow, pytest.mark.timeout(3000))),
        pytest.param("tcp", "tokens", 50, marks=(pytest.mark.slow, pytest.mark.timeout(3000))),
        pytest.param("rdma", "requests", 10, marks=(pytest.mark.slow, pytest.mark.timeout(3000))),
    ],
)
def test_kills_cost_no_request(
    kind: str,
    partition: str,
    kills: int,
    tmp_path: Path,
    agreement: Agreement,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each node once, then any: the front, a replica, memory nodes."""
    if kind == "rdma" and "missing" in offers(Options("rdma"))["rdma"]:
        pytest.skip("there is no RDMA here; tests/rdma runs this where there is")
    checkpoint = FAMILIES["llama"].save(tmp_path / "checkpoint")
    pipeline = PipelineConfig(batches=2, partition=partition)
    config = harness.write_config(
        tmp_path,
        checkpoint,
        harness.free_ports(2),
        compute=(None, None),
        pipeline=pipeline,
        wiring=harness.wire(kind, tmp_path),
        recovery=RecoveryConfig(),
    )
    run = Run()
    nodes = {node.name: harness.start_node(config, node.name) for node in config.node}

    async def main() -> None:
        await harness.ready(config, nodes["c0"])
        over = asyncio.Event()
        async with harness.client(config) as client, asyncio.TaskGroup() as clients:
            for number in range(STREAMS):
                clients.create_task(stream(client, number, run, over))
            try:
                await strike(config, nodes, run, kills, seed=kills)
            finally:
                over.set()

    try:
        asyncio.run(main())
    except BaseException:
        for name in nodes:
            print(f"--- {name}\n{(tmp_path / f'{name}.log').read_text()[-3000:]}")  # noqa: T201
        raise
    finally:
        for node in nodes.values():
            if node.process.is_alive():
                node.kill()
    assert len(run.answers) >= STREAMS
    oracle = Oracle(checkpoint)
    for number, (prompt, tokens) in enumerate(run.answers):
        agreement.check(oracle, prompt, tokens, f"answer {number}")
    with capsys.disabled():
        print("\n" + run.report())  # noqa: T201

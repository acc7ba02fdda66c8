"""The front is killed, or a link is lost: clients come back for the rest, and get what an undisturbed run gives."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lamina.client import AsyncClient, Completion
from lamina.config import ClusterConfig, PipelineConfig, RecoveryConfig
from lamina.demo.run import CHECKPOINT as DEMO
from lamina.errors import NodeError
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from lamina.wire.requests import Regex, Score
from tests.sim.clusters import JITTER, eventually, make_config, new_cluster, settled, simulate

PIPELINE = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, max_waiting=64)
PROMPT = "Once upon a time"
LONG = "Once upon a time there was a little girl named Lily. She loved to play outside in the park."
MESSAGES = [{"role": "user", "content": "Tell me a story."}]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
TOKENS = 60
SEEDS, SLOW_SEEDS = range(10), range(10, 300)

Ask = Callable[[AsyncClient], Awaitable[list[Completion]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, which can chat."""
    path = tmp_path_factory.mktemp("demo") / "checkpoint"
    shutil.copytree(DEMO, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def one(prompt: Any, **settings: Any) -> Ask:
    async def ask(client: AsyncClient) -> list[Completion]:
        return [await client.generate(prompt, **{"max_tokens": TOKENS, "ignore_eos": True} | settings)]

    return ask


async def chat(client: AsyncClient) -> list[Completion]:
    async with client.chat_stream(MESSAGES, max_tokens=TOKENS, temperature=1.0, seed=5) as stream:
        return [await stream.completion()]


async def branches(client: AsyncClient) -> list[Completion]:
    streams = await client.branches(LONG, 3, max_tokens=TOKENS, temperature=1.0, seed=7)
    return await asyncio.gather(*(stream.completion() for stream in streams))


ASKED: dict[str, Ask] = {
    "greedy": one(PROMPT),
    "long prompt": one([1, *range(3, 203)]),
    "sampled": one(LONG, temperature=1.2, top_p=0.95, seed=3),
    "penalties": one(LONG, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, bad_words=["Lily"]),
    "logprobs": one(PROMPT, logprobs=2, prompt_logprobs=1),
    "scored prompt": one([1, *range(3, 153)], prompt_logprobs=0, max_tokens=5),
    "stop": one(PROMPT, stop=["happy", "park", "nowhere"], max_tokens=200),
    "never stops": one(PROMPT, stop=["nowhere to be found"]),
    "constraint": one(PROMPT, constraint=Regex("[a-z ]{50,200}"), ignore_eos=False),
    "chat": chat,
    "branches": branches,
    "short": one(PROMPT, max_tokens=1),
}
"""What clients ask for: whatever has a state that the front must find again."""


@dataclass
class Answer:
    """The parts of an answer that do not depend on when it was computed."""

    exact: tuple[Any, ...]
    logprobs: list[float]

    @classmethod
    def of(cls, whole: Completion) -> Answer:
        scores: list[Score] = [*(whole.prompt_logprobs or []), *(whole.logprobs or [])]
        exact = whole.tokens, whole.text, whole.finish_reason, whole.stopped_by, whole.prompt_tokens, len(scores)
        return cls(exact, [value for s in scores for value in (s.logprob, *(p for _, p in s.top))])


async def ask_all(cluster: SimCluster, chance: Random, *, clients: int = 3) -> dict[str, list[Answer]]:
    """Ask for everything, with several clients, within a while."""
    found: dict[str, list[Answer]] = {}

    async def ask(client: AsyncClient, name: str, within_s: float) -> None:
        await asyncio.sleep(within_s)
        while name not in found:
            try:
                found[name] = [Answer.of(whole) for whole in await ASKED[name](client)]
            except NodeError as e:
                assert "is still starting" in str(e)  # so it was never taken
                await asyncio.sleep(0.01)

    names = list(ASKED)
    chance.shuffle(names)

    async def use(number: int) -> None:
        async with cluster.client(f"client{number}") as client, asyncio.TaskGroup() as tasks:
            for name in names[number::clients]:
                tasks.create_task(ask(client, name, 0.02 * chance.random()))

    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(use(number))
    return found


def config_of(model: Path, **recovery: Any) -> ClusterConfig:
    return make_config(model, memory=4 << 20, pipeline=PIPELINE, recovery=RecoveryConfig(**recovery))


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> dict[str, list[Answer]]:
    """What a run without losses gives."""
    return simulate(config_of(model), lambda cluster: ask_all(cluster, Random(0)))


def check(found: dict[str, list[Answer]], expected: dict[str, list[Answer]], what: str) -> None:
    assert found.keys() == expected.keys()
    for name, answers in found.items():
        for answer, other in zip(answers, expected[name], strict=True):
            assert answer.exact == other.exact, f"{what}: {name}"
            assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-3), f"{what}: {name}"


def run_with_kills(model: Path, seed: int) -> tuple[dict[str, list[Answer]], int]:
    """All answers of a run in which the front is killed at random moments, and how many requests were resumed."""
    chance = Random(f"resume {seed}")
    config = config_of(model, journal=chance.choice(("process", "machine")))
    kills = chance.choice((1, 1, 2, 3))
    resumed = 0

    async def main(world: World) -> dict[str, list[Answer]]:
        nonlocal resumed
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            asking = asyncio.create_task(ask_all(cluster, chance))
            for _ in range(kills):
                await asyncio.sleep(0.12 * chance.random())
                cluster.kill("c0")
                await asyncio.sleep(chance.choice((0.0, 0.01, 2.0)))
                await cluster.start("c0")
                # Sometimes it is killed while it starts.
                if chance.random() < 0.7:
                    await cluster.ready()
            found = await asking
            await cluster.ready()
            resumed = cluster.nodes["c0"].intake().meter.resumed  # type: ignore[union-attr]
            await settled(cluster)
            assert all(error is None for error in (await cluster.stop_all()).values()), cluster.ended
            return found

    with World(seed, model=JITTER, tracing=False) as world:
        return world.run(main(world)), resumed


@pytest.mark.parametrize("seeds", [SEEDS, pytest.param(SLOW_SEEDS, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_a_front_that_is_killed_at_any_moment_goes_on(
    seeds: range, model: Path, undisturbed: dict[str, list[Answer]]
) -> None:
    """Once or several times, also while it starts: each client gets every token once, and the same texts, scores and
    ends, for whatever it has asked."""
    resumed = 0
    for seed in seeds:
        found, count = run_with_kills(model, seed)
        check(found, undisturbed, f"seed {seed}")
        resumed += count
    assert resumed > 3 * len(seeds)

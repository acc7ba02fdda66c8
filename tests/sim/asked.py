"""What clients ask a simulated cluster that loses its front, and what they have to get."""

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
from lamina.config import PipelineConfig
from lamina.demo.run import CHECKPOINT as DEMO
from lamina.errors import NodeError
from lamina.sim.cluster import SimCluster
from lamina.wire.requests import Regex, Score

PIPELINE = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, max_waiting=64)
PROMPT = "Once upon a time"
LONG = "Once upon a time there was a little girl named Lily. She loved to play outside in the park."
MESSAGES = [{"role": "user", "content": "Tell me a story."}]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
TOKENS = 60

Ask = Callable[[AsyncClient], Awaitable[list[Completion]]]


def save_model(folder: Path) -> Path:
    """The shipped checkpoint, which can chat."""
    path = folder / "checkpoint"
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


LOST = ("it has come back without this request", "so what it had begun is lost")


async def ask_all(
    cluster: SimCluster, chance: Random, *, clients: int = 3, is_lossy: bool = False
) -> dict[str, list[Answer]]:
    """Ask for everything, with several clients, within a while. With ``is_lossy``, a front may come back without what
    has begun: then there is no answer."""
    found: dict[str, list[Answer]] = {}

    async def ask(client: AsyncClient, name: str, within_s: float) -> None:
        await asyncio.sleep(within_s)
        while name not in found:
            try:
                found[name] = [Answer.of(whole) for whole in await ASKED[name](client)]
            except NodeError as e:
                if is_lossy and any(words in str(e) for words in LOST):
                    return
                if "is still starting" not in str(e):  # else it was never taken
                    raise
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


def check(found: dict[str, list[Answer]], expected: dict[str, list[Answer]], what: str) -> None:
    assert found.keys() == expected.keys()
    for name, answers in found.items():
        for answer, other in zip(answers, expected[name], strict=True):
            assert answer.exact == other.exact, f"{what}: {name}"
            assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-3), f"{what}: {name}"

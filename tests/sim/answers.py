"""What the front gives out for a request, before any client: tokens, scores, and the end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from lamina.errors import LaminaError
from lamina.front.intake import End
from lamina.node.compute import ComputeNode
from lamina.sim.cluster import SimCluster
from lamina.wire.requests import Request, Sampling, Score

SAMPLING = set(Sampling.__struct_fields__)


class Recorded:
    """Records what becomes of a request; if ``breaks``, it raises an error at the end, as a tokenizer might."""

    def __init__(self, *, breaks: bool = False) -> None:
        self.breaks = breaks
        self.tokens: list[int] = []
        self.scores: list[Score | None] = []
        self.prompt_scores: list[Score] = []
        self.end: asyncio.Future[End | LaminaError] = asyncio.get_running_loop().create_future()

    def token(self, token: int, score: Score | None = None) -> None:
        self.tokens.append(token)
        self.scores.append(score)

    def prompt_scored(self, scores: list[Score]) -> None:
        assert not self.tokens
        self.prompt_scores += scores

    def finished(self, end: End) -> None:
        if self.breaks:
            raise ValueError("no such character")
        self.end.set_result(end)

    def failed(self, error: LaminaError) -> None:
        self.end.set_result(error)

    async def ended(self) -> End:
        """How it ended; raises the error with which it failed."""
        end = await self.end
        if isinstance(end, LaminaError):
            raise end
        return end


async def submit(cluster: SimCluster, prompt: Sequence[int], **wanted: Any) -> Recorded:
    """Ask the front for an answer, with any fields of `Request` and `Sampling`."""
    front = cluster.nodes[cluster.config.front.name]
    assert isinstance(front, ComputeNode)
    sampling = Sampling(**{key: wanted.pop(key) for key in SAMPLING & wanted.keys()})
    answer, tokens = Recorded(), list(prompt)
    await front.intake().submit(Request(tokens, sampling=sampling, **wanted), tokens, answer)
    return answer


async def ask(cluster: SimCluster, prompt: Sequence[int], **wanted: Any) -> tuple[Recorded, End]:
    """The whole answer, and how it ended."""
    answer = await submit(cluster, prompt, **wanted)
    return answer, await answer.ended()


async def answers_to(cluster: SimCluster, prompts: Sequence[list[int]]) -> list[list[int]]:
    """What a client gets that asks for all at once, greedy and seeded in turns."""
    async with cluster.client() as client:
        found = await asyncio.gather(
            *(client.generate(p, max_tokens=60, temperature=0.7 * (i % 2), seed=i) for i, p in enumerate(prompts))
        )
    return [answer.tokens for answer in found]

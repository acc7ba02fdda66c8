"""Streams that are read while nodes are lost."""

from __future__ import annotations

import random

import lamina
from tests.families import VOCABULARY


class Streams:
    """So many random prompts, the same in each test, and how many tokens of each answer have come."""

    def __init__(self, count: int, tokens: int) -> None:
        """Each answer has ``tokens`` tokens."""
        chosen = random.Random(3)
        self.asked = [[chosen.randrange(VOCABULARY) for _ in range(chosen.randint(1, 60))] for _ in range(count)]
        self.counts = [0] * count
        self._tokens = tokens

    async def have_begun(self) -> bool:
        """Whether each answer has a few tokens."""
        return min(self.counts) >= 5

    async def read(self, client: lamina.AsyncClient, number: int) -> list[int]:
        """The whole answer to a prompt."""
        tokens = []
        async for token in client.stream(self.asked[number], max_tokens=self._tokens):
            tokens.append(token.id)
            self.counts[number] = len(tokens)
        return tokens

    def read_without_loop(self, client: lamina.Client, number: int) -> list[int]:
        """The same, from a thread."""
        tokens = []
        for token in client.stream(self.asked[number], max_tokens=self._tokens):
            tokens.append(token.id)
            self.counts[number] = len(tokens)
        return tokens

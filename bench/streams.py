"""Answers that a client reads while something else happens to the cluster, with the time of every token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import pairwise

from lamina.client import AsyncClient, AsyncStream
from lamina.errors import LaminaError

SETTLE_TOKENS = 4


class DecodingStreams:
    """Sequences that decode, with the arrival times of their tokens. ``bench`` is the name of the benchmark."""

    def __init__(self, bench: str, client: AsyncClient, prompts: Sequence[list[int]], *, max_tokens: int) -> None:
        self._bench = bench
        self._client = client
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._times: list[list[float]] = [[] for _ in prompts]

    async def __aenter__(self) -> DecodingStreams:
        streams = [
            self._client.stream(prompt, max_tokens=self._max_tokens, share_prefix=False) for prompt in self._prompts
        ]
        self._readers = [asyncio.create_task(self._read(*one)) for one in zip(streams, self._times, strict=True)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def settle(self) -> None:
        """Wait until all sequences decode."""
        while min(map(len, self._times)) < SETTLE_TOKENS:
            self._check()
            await asyncio.sleep(0.01)

    def between(self, start: float, stop: float) -> list[float]:
        """Return the seconds from token to token, for each gap that overlaps the time from ``start`` to ``stop``."""
        self._check()
        gaps = [
            after - before
            for times in self._times
            for before, after in pairwise(times)
            if start < after and before < stop
        ]
        if not gaps:
            raise LaminaError(f"bench {self._bench}: no sequence got two tokens within {stop - start:.1f} s")
        return gaps

    def _check(self) -> None:
        for reader in self._readers:
            if reader.done():
                reader.result()
                raise LaminaError(f"bench {self._bench}: an answer ended before it was measured")

    @staticmethod
    async def _read(stream: AsyncStream, times: list[float]) -> None:
        async with stream:
            async for _ in stream:
                times.append(time.perf_counter())

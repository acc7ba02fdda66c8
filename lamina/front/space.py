"""Space on the memory nodes, set aside for sequences."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lamina.compute.shard import RemoteShard
from lamina.front.scheduler import Ask


async def reserve(shards: Sequence[RemoteShard], ask: Ask, block_tokens: int) -> int:
    """Have memory nodes set aside what was asked for; returns how many leading positions of it they share.

    Of a prompt that begins like others, only what all of them still have can be shared, and each forgets when it needs
    the space. So where one has less than another they are told to start anew with the keys that all had; what they
    share gets less each time, so this ends. As soon as ``ask`` no longer stands nothing more is asked: it has been
    released. CapacityError where one has too little space; the others hold theirs until the release.
    """
    keys, place = ask.keys, ask.placement
    held = {n: tokens for n in place.nodes if (tokens := place.held(n, ask.tokens)) > place.held(n, ask.had)}
    while ask.stands():
        # Nothing may come between this and the sending: a Release would be overtaken.
        asked = [
            shards[node].reserve(ask.id, tokens, place.keys_on(node, keys, block_tokens), ask.ahead)
            for node, tokens in held.items()
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        found = {node: answer for node, answer in zip(held, answers, strict=True) if isinstance(answer, int)}
        shared = place.usable(len(keys) * block_tokens, found)
        if all(tokens == place.held(node, shared) for node, tokens in found.items()):
            return shared
        if ask.stands():
            keys = keys[: shared // block_tokens]
            for node in held:
                shards[node].release(ask.id)
    return 0

"""Space on the memory nodes, set aside for sequences."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lamina.compute.shard import RemoteShard
from lamina.front.sequence import ReservationRequest


async def reserve(shards: Sequence[RemoteShard], request: ReservationRequest, block_tokens: int) -> int:
    """Have memory nodes set aside what was asked for; returns how many leading positions of it they share.

    Of a prompt that begins like others, only what all of them still have can be shared, and each forgets when it needs
    the space. So where one has less than another they are told to start anew with the keys that all had; what they
    share gets less each time, so this ends. Nothing more is asked once the request is no longer current: it has
    been released. CapacityError where one has too little space; the others hold theirs until the release.
    """
    keys, place = request.keys, request.placement
    held = {
        member: tokens
        for member in place.members
        if (tokens := place.held(member, request.tokens)) > place.held(member, request.reserved)
    }
    while request.is_current:
        # Nothing may come between this and the sending: a Release would be overtaken.
        asked = [
            shards[member].reserve(request.id, tokens, place.keys_on(member, keys, block_tokens), request.ahead)
            for member, tokens in held.items()
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        found = {member: answer for member, answer in zip(held, answers, strict=True) if isinstance(answer, int)}
        shared = place.usable(len(keys) * block_tokens, found)
        if all(tokens == place.held(member, shared) for member, tokens in found.items()):
            return shared
        if request.is_current:
            keys = keys[: shared // block_tokens]
            for member in held:
                shards[member].release(request.id)
    return 0

"""Compile the constraints of requests, off the loop, and keep those that come again."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from lamina.constrain.matcher import Compiled, Matcher, Vocabulary
from lamina.errors import RequestError
from lamina.model.tokenizer import Tokenizer
from lamina.runtime.workers import BackgroundWorkers
from lamina.wire.requests import Constraint

log = logging.getLogger("lamina.front")

MAX_KEPT = 32
"""The most constraints that are kept, with some megabytes each."""
COMPILE_S = 20.0
"""How long a request waits for its constraint. The library's limits let one take a few seconds, and the first one also
waits for the vocabulary."""


class Constraints:
    """Compiles constraints for one model, one after the other, on the node's loop and in a thread of ``workers``."""

    def __init__(
        self, workers: BackgroundWorkers, tokenizer: Tokenizer, vocabulary: int, end_tokens: Iterable[int]
    ) -> None:
        """``vocabulary`` is the width of the model's logits."""
        self._workers = workers
        self._tokenizer = tokenizer
        self._width = vocabulary
        self._end_tokens = tuple(end_tokens)
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[bytes, asyncio.Task[Compiled]] = OrderedDict()

    async def compiled(self, constraint: Constraint) -> Compiled:
        """Return a constraint, compiled. Raises RequestError, as `Compiled` does, or if it takes too long."""
        key = hashlib.blake2b(msgspec.msgpack.encode(constraint), digest_size=16).digest()
        task = self._kept.get(key)
        if task is None:
            work = self._workers.run(self._compile, constraint, long=True)
            task = self._kept[key] = asyncio.get_running_loop().create_task(work)
            task.add_done_callback(lambda task: self._note(key, task))
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        done, _ = await asyncio.wait((task,), timeout=COMPILE_S)  # others may wait for it too
        if not done:
            raise RequestError(f"the constraint was not compiled within {COMPILE_S:.0f} s; use a simpler one, or retry")
        return task.result()

    async def begin(self, constraint: Constraint, answer: Sequence[int], *, min_tokens: int) -> tuple[Matcher, bytes]:
        """Return what follows an answer that has some tokens, and the mask of the next one. Raises RequestError, as
        `compiled` does, or if the answer cannot go on."""
        compiled = await self.compiled(constraint)
        if not answer:
            return compiled.matcher(min_tokens=min_tokens), compiled.first_mask(min_tokens=min_tokens)
        return await self._workers.run(_follow, compiled, answer, min_tokens, long=True)

    def _compile(self, constraint: Constraint) -> Compiled:
        """Compile, in the thread. The vocabulary is made when it is first needed, as most models may do without."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self._tokenizer, self._width, self._end_tokens)
        return Compiled(constraint, self._vocabulary)

    def _note(self, key: bytes, task: asyncio.Task[Compiled]) -> None:
        """Forget what failed, so that only what works takes space."""
        if (task.cancelled() or task.exception() is not None) and self._kept.get(key) is task:
            del self._kept[key]


def _follow(compiled: Compiled, answer: Sequence[int], min_tokens: int) -> tuple[Matcher, bytes]:
    matcher = compiled.matcher(answer, min_tokens=min_tokens)
    return matcher, matcher.mask()

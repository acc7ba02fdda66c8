"""The answers of one HTTP request, gathered for the one task that writes them.

The client puts every token in as it comes, in a plain call; the task is woken once for all that came meanwhile. There
is no queue and no task per answer. If the reader at the other end is slow, unread tokens are joined.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias

from lamina.client.asynchronous import AsyncClient
from lamina.errors import LaminaError, TransportError
from lamina.wire.requests import Finished, Piece, PromptScored, Request, Score

LAG = 64
"""So many unread events are given out one by one. Behind them, the tokens of an answer are joined."""
MAX_LAG_TOKENS = 1 << 17
"""An answer of which so many tokens are unread is given up."""
MAX_LAG_SCORES = 1 << 12
"""The same for tokens with scores, which are not joined."""


class Part:
    """Holds tokens of the answer ``index`` that come next: one, or several where the reader is slow."""

    __slots__ = ("index", "scores", "texts", "tokens")

    def __init__(self, index: int, piece: Piece) -> None:
        self.index = index
        self.texts = [piece.text]
        self.tokens = [piece.token]
        self.scores: list[Score] | None = None if piece.score is None else [piece.score]

    @property
    def text(self) -> str:
        """Return the text that the tokens complete."""
        return self.texts[0] if len(self.texts) == 1 else "".join(self.texts)

    def join(self, piece: Piece) -> None:
        """Take the next token as well."""
        self.texts.append(piece.text)
        self.tokens.append(piece.token)
        if len(self.texts) > 256:
            self.texts = ["".join(self.texts)]


class End:
    """Says how the answer ``index`` ended."""

    __slots__ = ("finished", "index")

    def __init__(self, index: int, finished: Finished) -> None:
        self.index = index
        self.finished = finished


class Scored:
    """Holds the next scores of the prompt of the answer ``index``."""

    __slots__ = ("index", "scores")

    def __init__(self, index: int, scores: list[Score]) -> None:
        self.index = index
        self.scores = scores


Event: TypeAlias = Part | End | Scored


class Gathering:
    """Runs requests and gives out what comes of them, as a context manager that aborts what is not over."""

    def __init__(self, client: AsyncClient, requests: Sequence[Request]) -> None:
        """Begin all requests. Raises the LaminaError of a client that has lost the front."""
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._events: list[Event] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ids: set[int] = set()
        self.left = len(requests)
        """The number of answers that are not over."""
        try:
            for index, request in enumerate(requests):
                inbox = _Inbox(self, index)
                inbox.id = client.begin(request, inbox)
                self._ids.add(inbox.id)
        except LaminaError:
            self.abort()
            raise

    def __enter__(self) -> Gathering:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
        if self._timer is not None:
            self._timer.cancel()

    @property
    def has_events(self) -> bool:
        """Whether `next` would return something, or raise, at once."""
        return bool(self._events) or self._error is not None

    def abort(self) -> None:
        """Stop all answers that are not over."""
        for id_ in self._ids:
            self._client.abort(id_)
        self._ids.clear()

    def stop(self, error: Exception) -> None:
        """Stop all answers, and raise ``error`` where they are read."""
        if self._error is None:
            self._error = error
        self.abort()
        self._wake()

    async def next(self, patience_s: float | None = None) -> list[Event]:
        """Return what has come since the last call, and wait if that is nothing; at most about ``patience_s`` seconds,
        after which the list is empty.

        Raises the error of the first answer that failed, once everything before it has been given out.
        """
        if not self._events and self._error is None:
            self._waiter = self._loop.create_future()
            if patience_s is not None and self._timer is None:
                self._timer = self._loop.call_later(patience_s, self._tick)
            await self._waiter
        events, self._events = self._events, []
        if not events and self._error is not None:
            raise self._error
        return events

    def _tick(self) -> None:
        self._timer = None
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)


class _Inbox:
    """Takes what the client has for one answer."""

    __slots__ = ("_gathering", "_index", "_last", "id")

    def __init__(self, gathering: Gathering, index: int) -> None:
        self._gathering = gathering
        self._index = index
        self._last: Part | None = None
        """The part that the next tokens are joined to while it is unread."""
        self.id = 0

    def put_nowait(self, item: Piece | PromptScored | Finished | LaminaError) -> None:
        gathering = self._gathering
        events = gathering._events
        if isinstance(item, Piece):
            if len(events) < LAG or not self._join(item, events):
                events.append(Part(self._index, item))
        elif isinstance(item, Finished):
            gathering._ids.discard(self.id)
            gathering.left -= 1
            events.append(End(self._index, item))
        elif isinstance(item, PromptScored):
            events.append(Scored(self._index, item.scores))
        else:
            gathering._ids.discard(self.id)
            gathering.stop(item)
            return
        gathering._wake()

    def _join(self, piece: Piece, events: list[Event]) -> bool:
        """Join a token to the last unread part. Returns whether that was possible."""
        if piece.score is not None:
            if len(events) > MAX_LAG_SCORES:
                self._gathering.stop(_too_slow())
            return False
        last = self._last
        if last is None or not any(event is last for event in events[LAG:]):
            self._last = Part(self._index, piece)
            events.append(self._last)
            return True
        last.join(piece)
        if len(last.tokens) > MAX_LAG_TOKENS:
            self._gathering.stop(_too_slow())
        return True


def _too_slow() -> TransportError:
    return TransportError("the client reads its answer too slowly, so the server gave it up")

"""The answers of one HTTP request, gathered for the one task that writes them.

The link puts every token in as it comes, in a plain call; the task is woken once for all that came meanwhile.
There is no queue and no task per answer. If the reader at the other end is slow, unread tokens are joined.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import TypeAlias

from lamina.client.front_link import FrontLink, Inbox, Item
from lamina.errors import LaminaError, TransportError
from lamina.wire.requests import Finished, Piece, Request, Score

LAG = 64
"""So many unread events are given out one by one. Behind them, the tokens of an answer are joined."""
MAX_LAG_TOKENS = 1 << 17
"""An answer of which so many tokens are unread is given up."""
MAX_LAG_SCORES = 1 << 12
"""The same for tokens with scores, which are not joined."""
SHARED_TOKENS = 32
"""Several answers to a prompt of so many tokens wait for the first one, and then share its keys and values."""
_JOINED = 256


class NewTokens:
    """Holds tokens of the answer ``index`` that come next: one, or several where the reader is slow."""

    __slots__ = ("index", "scores", "texts", "tokens")

    def __init__(self, index: int, piece: Piece) -> None:
        self.index = index
        self.texts = [piece.text]
        """The text that each token completes; where many were joined, texts are too."""
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
        if len(self.texts) > _JOINED:
            self.texts = ["".join(self.texts)]


class AnswerEnd:
    """Says how the answer ``index`` ended."""

    __slots__ = ("finished", "index")

    def __init__(self, index: int, finished: Finished) -> None:
        self.index = index
        self.finished = finished


Event: TypeAlias = NewTokens | AnswerEnd


class Gathering:
    """Runs requests and gives out what comes of them, as a context manager that aborts what is not over."""

    def __init__(self, link: FrontLink, ids: itertools.count[int], requests: Sequence[Request]) -> None:
        """Begin all requests, which get the next of ``ids``. Raises the LaminaError of a link that was lost.

        Requests with the same list as their prompt are several answers to it. Where it is long, they begin when the
        first one has its first token, as they then find the prompt on the memory nodes.
        """
        self._link = link
        self._ids = ids
        self._loop = asyncio.get_running_loop()
        self._events: list[Event] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[int] = set()
        self.left = len(requests)
        """The number of answers that are not over."""
        self.inboxes = [_AnswerInbox(self, index) for index in range(len(requests))]
        first: _AnswerInbox | None = None
        try:
            for inbox, request in zip(self.inboxes, requests, strict=True):
                shares = first is not None and requests[first.index].prompt is request.prompt
                if first is not None and shares and len(request.prompt) >= SHARED_TOKENS:
                    first.followers.append((inbox, request))
                    continue
                if not shares:
                    first = inbox
                self._begin(inbox, request)
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
        for inbox in self.inboxes:
            inbox.followers.clear()
        for id_ in self._running:
            self._link.abort(id_)
        self._running.clear()

    def stop(self, error: Exception) -> None:
        """Stop all answers, and raise ``error`` where they are read."""
        if self._error is None:
            self._error = error
        self.abort()
        self._wake()

    def cut(self, index: int) -> None:
        """End one answer here, as if the model had stopped."""
        inbox = self.inboxes[index]
        if inbox.id in self._running:
            self._link.abort(inbox.id)
            inbox.put(Finished(id=inbox.id, reason="stop", text="", prompt_tokens=0))

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

    # -- from the inboxes

    def add(self, event: Event) -> None:
        """Take an event, and wake the task that waits for it."""
        self._events.append(event)
        self._wake()

    def ended(self, inbox: _AnswerInbox) -> None:
        """Note that an answer is over."""
        self._link.leave(inbox.id)
        self._running.discard(inbox.id)
        self.left -= 1

    def begin_followers(self, inbox: _AnswerInbox) -> None:
        """Begin the other answers to the same prompt."""
        followers, inbox.followers = inbox.followers, []
        try:
            for follower, request in followers:
                self._begin(follower, request)
        except LaminaError as e:
            self.stop(e)

    def unread(self) -> list[Event]:
        """Return what has come and was not taken."""
        return self._events

    def _begin(self, inbox: _AnswerInbox, request: Request) -> None:
        inbox.id = next(self._ids)
        self._link.ask(inbox.id, request, inbox)
        self._running.add(inbox.id)

    def _tick(self) -> None:
        self._timer = None
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)


class _AnswerInbox(Inbox):
    """Passes what comes for one answer on to the gathering."""

    def __init__(self, gathering: Gathering, index: int) -> None:
        super().__init__()
        self.index = index
        self.id = 0
        """The number of the request on the link."""
        self.followers: list[tuple[_AnswerInbox, Request]] = []
        """Other answers to the same prompt, which begin when this one has begun."""
        self._gathering = gathering
        self._last: NewTokens | None = None
        """What the next tokens are joined to while it is unread."""

    def put(self, item: Item) -> None:
        gathering = self._gathering
        if isinstance(item, Piece):
            if self.followers:
                gathering.begin_followers(self)
            unread = gathering.unread()
            if len(unread) < LAG or not self._join(item, unread):
                gathering.add(NewTokens(self.index, item))
        elif isinstance(item, Finished):
            if self.followers:
                gathering.begin_followers(self)
            gathering.ended(self)
            gathering.add(AnswerEnd(self.index, item))
        else:
            gathering.ended(self)
            gathering.stop(item)

    def _join(self, piece: Piece, unread: list[Event]) -> bool:
        """Join a token to the last unread ones of this answer. Returns whether that was done."""
        if piece.score is not None:
            if len(unread) > MAX_LAG_SCORES:
                self._gathering.stop(_too_slow())
            return False
        last = self._last
        if last is None or not any(event is last for event in unread[LAG:]):
            self._last = NewTokens(self.index, piece)
            self._gathering.add(self._last)
            return True
        last.join(piece)
        if len(last.tokens) > MAX_LAG_TOKENS:
            self._gathering.stop(_too_slow())
        return True


def _too_slow() -> TransportError:
    return TransportError("the client reads its answer too slowly, so the server gave it up")

"""The tokens of one answer, while they come."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from lamina.client.front_link import FrontLink, Inbox
from lamina.client.results import Completion, Timings, Token
from lamina.client.settings import Wanted
from lamina.errors import DeadlineError, LaminaError
from lamina.wire.requests import Finished, Piece, Rendered, Score


class AsyncStream:
    """A stream gives the tokens of one answer. It is an asynchronous iterator and context manager.

    The request is sent when the first token is asked for. ``aclose``, leaving an ``async with`` on the stream,
    cancelling the task that waits for a token, or dropping the last reference to the stream (as a loop over
    ``client.stream(...)`` does when it is left) aborts the request and frees its KV cache on every node.
    """

    def __init__(
        self,
        connected: Callable[[], Awaitable[FrontLink]],
        id_: int,
        asked: Wanted,
        *,
        after: asyncio.Event | None = None,
    ) -> None:
        """The request, numbered ``id_``, is sent on what ``connected`` returns, once ``after`` is set."""
        self.finish_reason = ""
        """Why the answer is over: "stop", "length", or "cancelled" if it was left; empty while it goes on."""
        self.prompt_tokens = 0
        """The length of the prompt, once the answer is over."""
        self.held_back = ""
        """Text behind that of the last token, once the answer is over: what might have become a text of ``stop``, or
        stands for an unfinished character."""
        self.stopped_by: str | int | None = None
        """The text of ``stop`` or the token that ended the answer, once it is over."""
        self.shared_tokens = 0
        """How many tokens of the prompt the cluster still had keys and values of, once the answer is over."""
        self.timings = Timings()
        """How long the answer took, once it is over."""
        self._front: FrontLink | None = None
        self._connected = connected
        self._id = id_
        self._asked = asked
        self._after = after
        self._inbox = Inbox()
        self._error: LaminaError | None = None
        """Why the answer ended early; every later attempt to read raises it again."""
        self._loop = asyncio.get_running_loop()

    @property
    def prompt_logprobs(self) -> list[Score] | None:
        """Return the scores of the prompt's tokens from the second on, which are here with the first token, if they
        were asked for."""
        return None if self._asked.request.prompt_logprobs is None else self._inbox.prompt_scores

    @property
    def rendered(self) -> Rendered | None:
        """Return what became of a conversation, which is here with the first token."""
        return self._inbox.rendered

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Token:
        if self._error is not None:
            raise self._error
        if self.finish_reason:
            raise StopAsyncIteration
        inbox = self._inbox
        try:
            if self._front is None:
                await self._start()
            item = inbox.items.popleft() if inbox.items else await inbox.get()
        except asyncio.CancelledError:
            self._abort()
            raise
        if isinstance(item, Piece):
            return Token(item.token, item.text, item.score)
        self._leave()
        if isinstance(item, Finished):
            self._finish(item)
            raise StopAsyncIteration
        self._error = item
        raise item

    async def completion(self) -> Completion:
        """Return the whole answer, of all tokens that were not read yet."""
        return self.whole([token async for token in self])

    def whole(self, tokens: list[Token]) -> Completion:
        """Return the answer that has these tokens, once it is over."""
        return Completion(
            text="".join([token.text for token in tokens]) + self.held_back,
            tokens=[token.id for token in tokens],
            finish_reason=self.finish_reason,
            prompt_tokens=self.prompt_tokens,
            stopped_by=self.stopped_by,
            logprobs=None if self._asked.request.logprobs is None else [t.score for t in tokens if t.score is not None],
            prompt_logprobs=self.prompt_logprobs,
            shared_tokens=self.shared_tokens,
            timings=self.timings,
        )

    async def aclose(self) -> None:
        """Abort the request if it is not over. Closing twice is fine."""
        self._abort()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # `break` in an `async for` drops the iterator and tells it nothing else.
        front = self._front
        if front is not None and front.answers(self._id) and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(front.abort, self._id)

    async def start(self, begun: asyncio.Event | None = None) -> None:
        """Send the request now. ``begun`` is set when its first token is here, or none will come."""
        self._inbox.begun = begun
        await self._start()

    async def _start(self) -> None:
        deadline_s = self._asked.deadline_s
        ends_at = None if deadline_s is None else self._loop.time() + deadline_s
        try:
            async with asyncio.timeout_at(ends_at):
                if self._after is not None:
                    await self._after.wait()
                front = await self._connected()
            front.ask(self._id, self._asked.request, self._inbox)
        except TimeoutError:
            self._error = self._too_late()
            raise self._error from None
        except LaminaError as e:
            self._error = e
            raise
        finally:
            if self._error is not None:
                self._inbox.close()
        self._front = front
        if ends_at is not None:
            self._inbox.timer = self._loop.call_at(ends_at, front.abort, self._id, self._too_late())

    def _too_late(self) -> DeadlineError:
        return DeadlineError(
            f"the answer was not complete within {self._asked.deadline_s:g} s and was cancelled; raise deadline_s, or "
            "ask for fewer max_tokens"
        )

    def _finish(self, end: Finished) -> None:
        self.finish_reason, self.stopped_by, self.held_back = end.reason, end.stopped_by, end.text
        self.prompt_tokens, self.shared_tokens = end.prompt_tokens, end.shared_tokens
        self.timings = Timings(end.queued_s, end.prompt_s, end.answer_s)

    def _leave(self) -> None:
        if self._front is not None:
            self._front.leave(self._id)

    def _abort(self) -> None:
        if self._front is not None:
            self._front.abort(self._id)
        self._inbox.close()
        self.finish_reason = self.finish_reason or "cancelled"

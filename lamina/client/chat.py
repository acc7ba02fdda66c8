"""The answer to messages, while it comes."""

from __future__ import annotations

from collections import deque

from lamina.chat.events import ChatAnswer, ChatEvent
from lamina.chat.reader import AnswerReader, answer_reader
from lamina.chat.request import ChatRequest
from lamina.client.results import ChatCompletion, Token
from lamina.client.stream import AsyncStream


class AsyncChatStream:
    """A stream gives what the model says, thinks and calls, as a `ChatEvent` each. It is an asynchronous iterator and
    context manager, and is sent, left and closed as an `AsyncStream` is.

    The front renders the messages, and says in which format the model answers. This reads the answer, so that no step
    of the cluster waits for it.
    """

    def __init__(self, stream: AsyncStream, asked: ChatRequest) -> None:
        """``stream`` has the tokens of the answer to ``asked``."""
        self._stream = stream
        self._asked = asked
        self._reader: AnswerReader | None = None
        self._tokens: list[Token] = []
        self._answer = ChatAnswer()
        self._events: deque[ChatEvent] = deque()
        """Those that were not read yet."""
        self._is_over = False

    @property
    def finish_reason(self) -> str:
        """Why the answer is over: "stop", "length", "tool_calls" if it has calls and was not cut off, or "cancelled" if
        it was left; empty while it goes on."""
        if not self._is_over:
            return ""
        if self._reader is not None and self._reader.over:
            return "tool_calls"
        reason = self._stream.finish_reason
        return "tool_calls" if reason == "stop" and self._answer.calls else reason

    def __aiter__(self) -> AsyncChatStream:
        return self

    async def __anext__(self) -> ChatEvent:
        while not self._events and not self._is_over:
            await self._read()
        if self._events:
            return self._events.popleft()
        raise StopAsyncIteration

    async def completion(self) -> ChatCompletion:
        """Return the whole answer, also what of it has been read.

        If it ended before the model did, as it was left or was to have one call only, there are no ``timings``.
        """
        while not self._is_over:
            await self._read()
        rendered, answer = self._stream.rendered, self._answer
        about = vars(self._stream.whole(self._tokens)) | {
            "text": answer.content,
            "reasoning": answer.reasoning,
            "tool_calls": answer.calls,
            "finish_reason": self.finish_reason,
            "prompt_tokens": rendered.prompt_tokens if rendered is not None else 0,
        }
        return ChatCompletion(**about)

    async def aclose(self) -> None:
        """Abort the request if it is not over. Closing twice is fine."""
        await self._stream.aclose()

    async def __aenter__(self) -> AsyncChatStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _read(self) -> None:
        """Wait for the next token, or the end, and take what it completes."""
        token = await anext(self._stream, None)
        rendered = self._stream.rendered
        if self._reader is None and rendered is not None:
            self._reader = answer_reader(rendered.form, self._asked)
        reader, events = self._reader, list[ChatEvent]()
        if token is not None:
            assert reader is not None, "the front tells of the prompt first"
            self._tokens.append(token)
            events = reader.push(token.text)
            if reader.over:  # the rest is no part of the answer
                await self._stream.aclose()
        elif reader is not None:
            events = reader.push(self._stream.held_back)
        if token is None or (reader is not None and reader.over):
            self._is_over = True
            events += reader.finish() if reader is not None else []
        self._answer.take(events)
        self._events += events

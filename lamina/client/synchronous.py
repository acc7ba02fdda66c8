"""Scripts use this client, which needs no event loop of theirs: it has one in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar, Unpack

from lamina.chat.events import ChatEvent
from lamina.client.asynchronous import CONCURRENCY, RECONNECT_S, AsyncClient, Secret, Where, open_client
from lamina.client.chat import AsyncChatStream
from lamina.client.results import ChatCompletion, Completion, Timings, Token
from lamina.client.settings import ChatSettings, Prompt, Settings
from lamina.client.stream import AsyncStream
from lamina.errors import LaminaError, TransportError
from lamina.transport import TlsFiles
from lamina.wire.admin import Status
from lamina.wire.requests import Score

R = TypeVar("R")


class Client:
    """A client holds a connection to the front; ``with lamina.Client("tcp://127.0.0.1:7070") as client``.

    Its methods wait for what they return. Several threads may call them at the same time; with asyncio, `connect` does
    it without threads. The arguments and errors are those of `connect`.
    """

    def __init__(
        self,
        address: Where,
        *,
        secret: Secret = None,
        tls: TlsFiles | None = None,
        deadline_s: float = 10.0,
        peer_timeout: float = 2.0,
        reconnect_s: float = RECONNECT_S,
    ) -> None:
        """Connect to the front at ``address``."""
        self._loop = asyncio.new_event_loop()
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lamina-client", daemon=True)
        self._thread.start()
        try:
            self._client: AsyncClient = self._wait(
                open_client(
                    address,
                    secret=secret,
                    tls=tls,
                    deadline_s=deadline_s,
                    peer_timeout=peer_timeout,
                    reconnect_s=reconnect_s,
                )
            )
        except BaseException:
            self._stop()
            raise

    def stream(self, prompt: Prompt, **settings: Unpack[Settings]) -> Stream:
        """Stream the tokens of an answer: ``for token in client.stream(...)``. See `AsyncClient.stream`."""

        async def begin() -> AsyncStream:
            return self._client.stream(prompt, **settings)

        return Stream(self, self._wait(begin()))

    def generate(self, prompt: Prompt, **settings: Unpack[Settings]) -> Completion:
        """Return the whole answer. See `AsyncClient.stream`."""
        return self._wait(self._client.generate(prompt, **settings))

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], **settings: Unpack[ChatSettings]) -> ChatStream:
        """Stream the answer to messages. See `AsyncClient.chat_stream`."""

        async def begin() -> AsyncChatStream:
            return self._client.chat_stream(messages, **settings)

        return ChatStream(self, self._wait(begin()))

    def chat(self, messages: Sequence[Mapping[str, Any]], **settings: Unpack[ChatSettings]) -> ChatCompletion:
        """Return the whole answer to messages. See `AsyncClient.chat_stream`."""
        return self._wait(self._client.chat(messages, **settings))

    def generate_many(
        self, prompts: Iterable[Prompt], *, concurrency: int = CONCURRENCY, **settings: Unpack[Settings]
    ) -> Generator[Completion | LaminaError]:
        """Answer many prompts: ``for answer in client.generate_many(prompts)``. See `AsyncClient.generate_many`.

        The prompts are read in the thread of the client.
        """
        return self._each(self._client.generate_many(prompts, concurrency=concurrency, **settings))

    def _each(self, answers: AsyncGenerator[R]) -> Generator[R]:
        async def one() -> R:
            return await anext(answers)

        try:
            while True:
                try:
                    answer = self._wait(one())
                except StopAsyncIteration:
                    return
                yield answer
        finally:
            if not self._loop.is_closed():
                self._wait(_closed(answers))

    def branches(self, prompt: Prompt, n: int, **settings: Unpack[Settings]) -> list[Stream]:
        """Ask for ``n`` answers to one prompt, and return their streams. See `AsyncClient.branches`."""
        return [Stream(self, stream) for stream in self._wait(self._client.branches(prompt, n, **settings))]

    @property
    def closed(self) -> bool:
        """Return whether `close` was called. A client whose front was lost is not closed."""
        return self._client.closed

    def status(self) -> Status:
        """Return the state and the counters of the front."""
        return self._wait(self._client.status())

    def close(self) -> None:
        """Cancel what still runs and leave. Closing twice is fine."""
        with self._closing:
            if not self._loop.is_closed():
                try:
                    self._wait(self._client.close())
                finally:
                    self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine on the client's loop and return its result. An interrupt of this thread cancels it."""
        try:
            running = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise TransportError("the client is closed") from None
        try:
            return running.result()
        except BaseException:
            running.cancel()
            raise

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _AsyncReading(Protocol):
    """What an `AsyncStream` and an `AsyncChatStream` have in common."""

    @property
    def finish_reason(self) -> str: ...

    def __anext__(self) -> Coroutine[Any, Any, Any]: ...

    def aclose(self) -> Coroutine[Any, Any, None]: ...


Reader = TypeVar("Reader", bound=_AsyncReading)
Item = TypeVar("Item")


class _Reading(Generic[Reader, Item]):
    """Reads an answer without an event loop: an iterator and context manager over a stream of the client's loop."""

    def __init__(self, client: Client, stream: Reader) -> None:
        self._client = client
        self._stream = stream

    @property
    def finish_reason(self) -> str:
        """Return why the answer is over, or nothing while it goes on."""
        return self._stream.finish_reason

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        try:
            item: Item = self._client._wait(self._stream.__anext__())
            return item
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """Abort the request if it is not over. Closing twice is fine."""
        if not self._client._loop.is_closed():
            self._client._wait(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream(_Reading[AsyncStream, Token]):
    """A stream gives the tokens of one answer. It is an iterator and context manager; see `AsyncStream`.

    ``close``, leaving a ``with`` on it, an interrupt, or dropping the last reference to it (as a loop over
    ``client.stream(...)`` does when it is left) aborts the request.
    """

    @property
    def prompt_tokens(self) -> int:
        """See `AsyncStream`, as for the other properties."""
        return self._stream.prompt_tokens

    @property
    def held_back(self) -> str:
        return self._stream.held_back

    @property
    def stopped_by(self) -> str | int | None:
        return self._stream.stopped_by

    @property
    def shared_tokens(self) -> int:
        return self._stream.shared_tokens

    @property
    def timings(self) -> Timings:
        return self._stream.timings

    @property
    def prompt_logprobs(self) -> list[Score] | None:
        return self._stream.prompt_logprobs

    def completion(self) -> Completion:
        """Return the whole answer, of all tokens that were not read yet."""
        return self._client._wait(self._stream.completion())


class ChatStream(_Reading[AsyncChatStream, ChatEvent]):
    """A stream gives what the model says, thinks and calls. It is an iterator and context manager; see
    `AsyncChatStream`. It is left and closed as a `Stream` is."""

    def completion(self) -> ChatCompletion:
        """Return the whole answer, also what of it has been read."""
        return self._client._wait(self._stream.completion())


async def _closed(answers: AsyncGenerator[Any]) -> None:
    await answers.aclose()

"""Programs with asyncio use this client: ``async with lamina.connect("tcp://127.0.0.1:7070") as client``."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias, Unpack

from lamina import errors
from lamina.client.settings import Prompt, Settings, request_for
from lamina.config import read_secret
from lamina.errors import CapacityError, ConfigError, LaminaError, NodeError, TransportError, UsageError
from lamina.transport import Address, Hello, Link, Options, TlsFiles
from lamina.transport import connect as connect_link
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import decode, encode
from lamina.wire.questions import Questions
from lamina.wire.requests import (
    Cancel,
    Failed,
    Finished,
    Generated,
    Piece,
    PromptScored,
    Request,
    ToClient,
    messages_for,
)

Secret: TypeAlias = bytes | str | os.PathLike[str] | None
"""The cluster's secret itself, as bytes, or the path of the file that holds it."""


class Token(NamedTuple):
    """Holds one generated token. ``text`` is what the token completes, and may be empty."""

    id: int
    text: str


@dataclass(frozen=True)
class Completion:
    """Holds a whole answer. ``finish_reason`` is "stop" (an end-of-sequence token) or "length"."""

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int


def connect(
    address: str | Address,
    *,
    secret: Secret = None,
    tls: TlsFiles | None = None,
    deadline_s: float = 10.0,
    peer_timeout: float = 2.0,
) -> AbstractAsyncContextManager[AsyncClient]:
    """Connect to the front at ``address``, such as ``tcp://127.0.0.1:7070``, with ``async with``.

    ``secret`` is the cluster's secret as bytes, or the path of the file that holds it, and ``tls`` (from
    ``lamina.transport``) names this client's certificate, if the cluster has these. Raises ConnectError if there is no
    answer within ``deadline_s`` seconds; after ``peer_timeout`` seconds of silence the front is lost. Leaving the block
    cancels what still runs.
    """
    return _Connecting(
        lambda: open_client(address, secret=secret, tls=tls, deadline_s=deadline_s, peer_timeout=peer_timeout)
    )


async def open_client(
    address: str | Address, *, secret: Secret, tls: TlsFiles | None, deadline_s: float, peer_timeout: float
) -> AsyncClient:
    """Return a connected client, which its caller closes. See `connect`."""
    if not isinstance(address, str | Address):
        raise ConfigError(f'address: expected one like "tcp://127.0.0.1:7070", got {address!r:.200}')
    if isinstance(secret, str | os.PathLike):
        secret = read_secret(Path(secret))
    elif not isinstance(secret, bytes | None):
        raise ConfigError(f"secret: expected bytes, or the path of a file, got {type(secret).__name__}")
    options = Options(kind="control", secret=secret, tls=tls, peer_timeout=peer_timeout)
    hello = Hello("client", f"client-{os.getpid()}")
    front = Address.parse(address) if isinstance(address, str) else address
    return AsyncClient(await connect_link(front, hello, options, deadline_s=deadline_s))


class _Connecting(AbstractAsyncContextManager["AsyncClient"]):
    """Connects when it is entered, and says so if it is used in another way."""

    _HINT = "lamina.connect(...) connects in an `async with lamina.connect(...) as client:` block"

    def __init__(self, open_: Callable[[], Awaitable[AsyncClient]]) -> None:
        self._open = open_

    async def __aenter__(self) -> AsyncClient:
        self._client = await self._open()
        return self._client

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    def __await__(self) -> Generator[Any, Any, NoReturn]:
        raise UsageError(f"{self._HINT}, and cannot be awaited")

    def __enter__(self) -> NoReturn:
        raise UsageError(f"{self._HINT}; without asyncio, use `with lamina.Client(...) as client:`")

    def __exit__(self, *_: object) -> None:
        """Nothing: it cannot be entered so."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{self._HINT}; it has no {name!r} itself")


class AsyncClient:
    """A client holds a connection to the front. Any number of requests may run on it at the same time."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._ids = itertools.count(1)
        self._streams: dict[int, asyncio.Queue[Piece | PromptScored | Finished | LaminaError]] = {}
        self._questions = Questions(link)
        self._failure: LaminaError | None = None
        link.deliver(on_message=self._on_message, on_lost=self._on_lost)

    def stream(self, prompt: Prompt, **settings: Unpack[Settings]) -> AsyncStream:
        """Stream the tokens of an answer: ``async for token in client.stream(...)``.

        ``prompt`` is text, or token ids in any sequence or array of integers; `Settings` describes the settings.
        Leaving the loop aborts the request. Raises RequestError, here or when the stream is read, for what cannot be
        asked.
        """
        return AsyncStream(self, next(self._ids), request_for(prompt, settings))

    async def generate(self, prompt: Prompt, **settings: Unpack[Settings]) -> Completion:
        """Return the whole answer. See `stream`."""
        async with self.stream(prompt, **settings) as stream:
            tokens = [token async for token in stream]
            text = "".join(token.text for token in tokens) + stream.held_back
            return Completion(text, [t.id for t in tokens], stream.finish_reason, stream.prompt_tokens)

    async def status(self) -> Status:
        """Return the state and the counters of the front."""
        status: Status = await self._questions.ask(AskStatus())
        return status

    async def close(self) -> None:
        """Cancel what still runs and leave."""
        if not self._link.state.closed:
            for id_ in self._streams:
                self._link.send(encode(Cancel(id=id_)))
        await self._link.close()
        self._fail(TransportError("the client is closed"))

    def _check(self) -> None:
        if self._failure:
            raise self._failure

    def _on_message(self, plain: dict[str, Any]) -> None:
        match decode(plain, ToClient):
            case Status() as status:
                self._questions.answer(status)
            case Failed(id=None) as failure:
                self._fail(_error(failure))
            case Failed(id=int(id_)) as failure:
                if stream := self._streams.get(id_):
                    stream.put_nowait(_error(failure))
            case Generated(pieces=pieces):
                for piece in pieces:
                    if stream := self._streams.get(piece.id):
                        stream.put_nowait(piece)
            case (PromptScored(id=id_) | Finished(id=id_)) as message:
                if stream := self._streams.get(id_):
                    stream.put_nowait(message)

    def _on_lost(self, error: TransportError) -> None:
        peer = self._link.info.peer
        self._fail(NodeError(f"{peer.role} node {peer.name} was lost: {error}", node=peer.name))

    def _fail(self, error: LaminaError) -> None:
        if self._failure is None:
            self._failure = error
        for stream in self._streams.values():
            stream.put_nowait(error)
        self._questions.fail(error)


class AsyncStream:
    """A stream gives the tokens of one answer. It is an asynchronous iterator and context manager.

    After the last token, ``finish_reason``, ``prompt_tokens`` and ``held_back`` (text of an unfinished character) are
    set. ``aclose``, leaving an ``async with`` on it, cancelling the task that waits for a token, or dropping the last
    reference to it (as a loop over ``client.stream(...)`` does when it is left) aborts the request and frees its KV
    cache on every node.
    """

    def __init__(self, client: AsyncClient, id_: int, request: Request) -> None:
        self.finish_reason = ""
        self.prompt_tokens = 0
        self.held_back = ""
        self._client = client
        self._id = id_
        self._request = request
        self._queue: asyncio.Queue[Piece | PromptScored | Finished | LaminaError] | None = None
        self._error: LaminaError | None = None
        """Why the answer ended early; every later attempt to read raises it again."""
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Token:
        if self._error is not None:
            raise self._error
        if self.finish_reason:
            raise StopAsyncIteration
        if self._queue is None:
            self._start()
        assert self._queue is not None
        try:
            item = await self._queue.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        match item:
            case Piece(token=token, text=text):
                return Token(token, text)
            case PromptScored():
                return await self.__anext__()
            case Finished() as end:
                self._leave()
                self.finish_reason, self.prompt_tokens, self.held_back = end.reason, end.prompt_tokens, end.text
                raise StopAsyncIteration
        self._leave()
        self._error = item
        raise item

    def _start(self) -> None:
        self._client._check()
        for message in messages_for(self._id, self._request):
            self._client._link.send(encode(message))
        self._queue = self._client._streams[self._id] = asyncio.Queue()

    async def aclose(self) -> None:
        """Abort the request if it is not over. Closing twice is fine."""
        self._abort()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # `break` in an `async for` drops the iterator and tells it nothing else.
        if self._id in self._client._streams and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_abort, self._client, self._id)

    def _abort(self) -> None:
        _abort(self._client, self._id)
        self.finish_reason = self.finish_reason or "cancelled"

    def _leave(self) -> None:
        self._client._streams.pop(self._id, None)


def _abort(client: AsyncClient, id_: int) -> None:
    if client._streams.pop(id_, None) is not None and not client._link.state.closed:
        client._link.send(encode(Cancel(id=id_)))


def _error(failure: Failed) -> LaminaError:
    """Return the error that a node reported, in the class that it raised."""
    kind = getattr(errors, failure.kind, LaminaError)
    if kind is NodeError:
        return NodeError(failure.message, node=failure.node or "")
    if kind is CapacityError:
        return CapacityError(failure.message, retry_after_s=failure.retry_after_s)
    if not (isinstance(kind, type) and issubclass(kind, LaminaError)):
        kind = LaminaError
    return kind(failure.message)

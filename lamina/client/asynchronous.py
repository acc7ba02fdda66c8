"""Programs with asyncio use this client: ``async with lamina.connect("tcp://127.0.0.1:7070") as client``."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, Unpack

from msgspec.structs import replace

from lamina.client.chat import AsyncChatStream
from lamina.client.finder import FrontFinder
from lamina.client.front_link import FrontLink
from lamina.client.many import answers_in_order
from lamina.client.results import ChatCompletion, Completion
from lamina.client.settings import ChatSettings, Prompt, Settings, Wanted, asked_for, asked_in_chat
from lamina.client.stream import AsyncStream
from lamina.config import ClusterConfig, read_secret
from lamina.errors import ConfigError, ConnectError, LaminaError, NodeError, RequestError, TransportError, UsageError
from lamina.transport import Address, Hello, Link, Options, TlsFiles
from lamina.wire.admin import Status

Secret: TypeAlias = bytes | str | os.PathLike[str] | None
"""The cluster's secret itself, as bytes, or the path of the file that holds it."""
Where: TypeAlias = str | Address | Sequence[str | Address] | ClusterConfig
"""The address of the front; those of all compute nodes; or the cluster file."""


RECONNECT_S = 60.0
"""How long answers wait for a front that is lost, as clusters keep them for so long by default."""
RETRY_S = 0.25
"""The pause between two attempts to reach it."""
CONCURRENCY = 64
"""How many prompts of `AsyncClient.generate_many` are asked at a time."""

_CLOSED = "the client is closed"


def connect(
    address: Where,
    *,
    secret: Secret = None,
    tls: TlsFiles | None = None,
    deadline_s: float = 10.0,
    peer_timeout: float = 2.0,
    reconnect_s: float = RECONNECT_S,
) -> AbstractAsyncContextManager[AsyncClient]:
    """Connect to the front at ``address``, such as ``tcp://127.0.0.1:7070``, with ``async with``.

    Where another compute node can take the front's part, give the addresses of all, or what
    `lamina.config.load` returns of the cluster file: then secret and certificate come from there, too.

    ``secret`` is the cluster's secret as bytes, or the path of the file that holds it, and ``tls`` (from
    ``lamina.transport``) names this client's certificate, if the cluster has these. Raises ConnectError if there is no
    answer within ``deadline_s`` seconds; after ``peer_timeout`` seconds of silence the front is lost. When it was lost,
    the client connects anew by itself, and answers that are under way go on where they were; for ``reconnect_s``
    seconds without a front they wait, then they fail. Leaving the block cancels what still runs.
    """
    return _Connecting(
        lambda: open_client(
            address,
            secret=secret,
            tls=tls,
            deadline_s=deadline_s,
            peer_timeout=peer_timeout,
            reconnect_s=reconnect_s,
        )
    )


async def open_client(
    address: Where,
    *,
    secret: Secret,
    tls: TlsFiles | None,
    deadline_s: float,
    peer_timeout: float,
    reconnect_s: float,
) -> AsyncClient:
    """Return a connected client, which its caller closes. See `connect`."""
    if isinstance(address, ClusterConfig):
        links = address.links
        secret, tls = links.secret if secret is None else secret, links.tls if tls is None else tls
        address = [node.address for node in address.compute_nodes]
    several = [address] if isinstance(address, str | Address) else address
    if not (isinstance(several, Sequence) and several and all(isinstance(each, str | Address) for each in several)):
        raise ConfigError(f'address: expected one like "tcp://127.0.0.1:7070", or several, got {address!r:.200}')
    if isinstance(secret, str | os.PathLike):
        secret = read_secret(Path(secret))
    elif not isinstance(secret, bytes | None):
        raise ConfigError(f"secret: expected bytes, or the path of a file, got {type(secret).__name__}")
    if not (isinstance(reconnect_s, int | float) and 0 <= reconnect_s < math.inf):
        raise ConfigError(f"reconnect_s: expected seconds >= 0, got {reconnect_s!r:.200}")
    options = Options(kind="control", secret=secret, tls=tls, peer_timeout=peer_timeout)
    hello = Hello("client", f"client-{os.getpid()}")
    addresses = [Address.parse(each) if isinstance(each, str) else each for each in several]
    finder = FrontFinder(addresses, hello, options)

    def open_link() -> Awaitable[Link]:
        return finder.find(deadline_s)

    return AsyncClient(await open_link(), open_link, reconnect_s=reconnect_s)


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
    """A client holds a connection to the front. Any number of requests may run on it at the same time.

    When the front is lost, the client connects anew, and the answers that are under way go on behind the last token
    that has come. They fail with a NodeError if the front does not come back in time, or without them. A new request
    fails with it if no connection can be made at once; until the front is ready again, it answers with a NodeError that
    says so. After `close`, everything fails with a TransportError.
    """

    def __init__(
        self,
        link: Link,
        reconnect: Callable[[], Awaitable[Link]] | None = None,
        *,
        reconnect_s: float = RECONNECT_S,
    ) -> None:
        """Nothing may be delivered from ``link`` yet. ``reconnect`` makes another link when it is lost, for which
        answers wait for ``reconnect_s`` seconds; without it, all requests fail from then on."""
        self._front = FrontLink(patience_s=reconnect_s if reconnect else 0.0, on_wait=self._begin_resuming)
        self._front.use(link)
        self._reconnect = reconnect
        self._opening: asyncio.Task[FrontLink] | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._closed = False
        self._ids = itertools.count(1)

    @property
    def closed(self) -> bool:
        """Return whether `close` was called. A client whose front was lost is not closed."""
        return self._closed

    def stream(self, prompt: Prompt, **settings: Unpack[Settings]) -> AsyncStream:
        """Stream the tokens of an answer: ``async for token in client.stream(...)``.

        ``prompt`` is text, or token ids in any sequence or array of integers; `Settings` describes the settings.
        Leaving the loop aborts the request. Raises RequestError, here or when the stream is read, for what cannot be
        asked.
        """
        return self._stream(asked_for(prompt, settings))

    async def generate(self, prompt: Prompt, **settings: Unpack[Settings]) -> Completion:
        """Return the whole answer. See `stream`."""
        async with self.stream(prompt, **settings) as stream:
            return await stream.completion()

    def chat_stream(self, messages: Sequence[Mapping[str, Any]], **settings: Unpack[ChatSettings]) -> AsyncChatStream:
        """Stream the answer to messages: ``async for event in client.chat_stream(messages)``.

        ``messages`` are maps with ``role`` and ``content``, as in the API of OpenAI. The cluster makes a prompt of them
        with the chat template of its checkpoint; one without a template cannot chat. `ChatSettings` describes the
        settings. Raises RequestError, here or when the stream is read, for what cannot be asked.
        """
        asked, chat = asked_in_chat(messages, settings)
        return AsyncChatStream(self._stream(asked), chat)

    async def chat(self, messages: Sequence[Mapping[str, Any]], **settings: Unpack[ChatSettings]) -> ChatCompletion:
        """Return the whole answer to messages. See `chat_stream`."""
        async with self.chat_stream(messages, **settings) as stream:
            return await stream.completion()

    def generate_many(
        self, prompts: Iterable[Prompt], *, concurrency: int = CONCURRENCY, **settings: Unpack[Settings]
    ) -> AsyncGenerator[Completion | LaminaError]:
        """Answer many prompts, ``concurrency`` at a time: ``async for answer in client.generate_many(prompts)``.

        The answers come in the order of the prompts, which are read as they are needed. If a prompt fails, the error
        comes in the place of its answer, and harms no other. While the cluster's queue is full, its prompts wait, as
        it asks for. Leaving the loop aborts what still runs once the iterator is closed (``aclose``) or collected.
        Raises RequestError for settings that cannot be.
        """
        asked_for([0], settings)  # a mistake in the settings is none of a prompt
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise RequestError(f"concurrency: expected int >= 1, got {concurrency!r:.200}")
        if isinstance(prompts, str | bytes):
            raise RequestError(f"prompts: expected several prompts, got {type(prompts).__name__}")
        return answers_in_order(lambda prompt: self.generate(prompt, **settings), prompts, concurrency)

    async def branches(self, prompt: Prompt, n: int, **settings: Unpack[Settings]) -> list[AsyncStream]:
        """Ask for ``n`` answers to one prompt, and return their streams, of which the first has been started.

        The others start when the first token of the first one is here, so that they find the keys and values of the
        prompt on the memory nodes. With a ``seed``, the answer at index i has the seed ``seed + i``.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise RequestError(f"n: expected int >= 1, got {n!r:.200}")
        asked = asked_for(prompt, settings)
        begun = asyncio.Event()
        first = self._stream(asked)
        await first.start(begun)
        return [first, *(self._stream(_branch(asked, i), after=begun) for i in range(1, n))]

    async def status(self) -> Status:
        """Return the state and the counters of the front."""
        return await (await self._connected()).status()

    async def close(self) -> None:
        """Cancel what still runs and leave. Closing twice is fine."""
        self._closed = True
        if tasks := [task for task in (self._resuming, self._opening) if task is not None]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await self._front.close(TransportError(_CLOSED))

    def _stream(self, asked: Wanted, after: asyncio.Event | None = None) -> AsyncStream:
        return AsyncStream(self._connected, next(self._ids), asked, after=after)

    async def _connected(self) -> FrontLink:
        """Return a connection on which requests can be sent. All that need a new one wait for the same."""
        failure = self._front.failure
        if self._closed:
            raise TransportError(_CLOSED)
        if failure is None:
            return self._front
        if self._reconnect is None or isinstance(failure, UsageError):  # the front would say the same again
            raise failure
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(self._reconnect))
            self._opening.add_done_callback(self._opened)
        opening = self._opening
        await asyncio.wait((opening,))
        if self._closed:
            raise TransportError(_CLOSED)
        opening.result()
        return await self._connected()  # it may be lost again already

    async def _open(self, reconnect: Callable[[], Awaitable[Link]]) -> FrontLink:
        front = self._front
        try:
            front.use(await reconnect())
        except LaminaError as e:
            front.attempt = str(e)
            if isinstance(e, ConnectError) and isinstance(front.failure, NodeError):
                # Why it is gone says more than that it is.
                raise NodeError(f"{front.failure}; since then, {e}", node=front.failure.node) from e
            raise
        return front

    def _opened(self, opening: asyncio.Task[FrontLink]) -> None:
        self._opening = None
        if not opening.cancelled():
            opening.exception()  # whoever waits for it gets it, if anybody still does

    def _begin_resuming(self) -> None:
        if self._resuming is None and not self._closed:
            self._resuming = asyncio.create_task(self._resume())
            self._resuming.add_done_callback(self._resumed)

    async def _resume(self) -> None:
        """Connect anew while answers wait for it, and the front might take them."""
        while self._front.is_awaited:
            try:
                await self._connected()
            except LaminaError:
                await asyncio.sleep(RETRY_S)

    def _resumed(self, resuming: asyncio.Task[None]) -> None:
        self._resuming = None
        if not resuming.cancelled():
            resuming.result()


def _branch(asked: Wanted, number: int) -> Wanted:
    """Return the same with another seed."""
    request, sampling = asked.request, asked.request.sampling
    if sampling.seed is None:
        return asked
    sampling = replace(sampling, seed=(sampling.seed + number) % 2**63)
    return asked._replace(request=replace(request, sampling=sampling))

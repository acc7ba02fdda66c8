"""Find the compute node of a cluster that is the front."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

from lamina.client.front_link import error_of
from lamina.errors import ConnectError, HandshakeError, LaminaError, NotFrontError, PeerLostError
from lamina.transport import Address, Hello, Link, Options
from lamina.transport import connect as connect_link
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import decode, encode
from lamina.wire.requests import Failed, ToClient

RETRY_S = 0.25
"""The pause before a node is asked again that is not the front."""
PREFER_S = 1.0
"""How long a front that is still starting waits for another node to be the front."""


class Connect(Protocol):
    """Makes links, as `lamina.transport.connect` does."""

    async def __call__(self, address: Address, hello: Hello, options: Options, *, deadline_s: float) -> Link: ...


class _Found(NamedTuple):
    """A node that is the front, or is to be it."""

    link: Link
    status: Status


class FrontFinder:
    """Makes links to the front of a cluster, whose compute nodes are at ``addresses``.

    All are asked at the same time, as any of them may be lost. What another node says of where the front is counts as
    well.
    """

    def __init__(
        self, addresses: Sequence[Address], hello: Hello, options: Options, *, connect: Connect = connect_link
    ) -> None:
        self._addresses = list(addresses)
        self._hello = hello
        self._options = options
        self._connect = connect

    def __str__(self) -> str:
        return ", ".join(map(str, self._addresses))

    async def find(self, deadline_s: float) -> Link:
        """Return a link to the front, from which nothing was delivered but its status.

        Raises the error of the address, if there is one, and ConnectError if none of several is the front within
        ``deadline_s`` seconds; HandshakeError only if all of them refuse.
        """
        search = _Search(self.ask, asyncio.get_running_loop().time() + deadline_s)
        try:
            return await search.run(self._addresses)
        finally:
            search.close()

    async def ask(self, address: Address, deadline_s: float) -> _Found:
        """Return a link to the node at ``address`` and its status, if it is the front or is to be. NotFrontError if
        not."""
        link = await self._connect(address, self._hello, self._options, deadline_s=deadline_s)
        told: asyncio.Future[Status] = asyncio.get_running_loop().create_future()

        def on_message(plain: dict[str, Any]) -> None:
            message = decode(plain, ToClient)
            if told.done():
                return
            if isinstance(message, Status):
                told.set_result(message)
            elif isinstance(message, Failed):
                told.set_exception(error_of(message))

        def on_lost(error: LaminaError) -> None:
            if not told.done():
                told.set_exception(error)

        try:
            link.deliver(on_message=on_message, on_lost=on_lost)
            link.send(encode(AskStatus()))
            async with asyncio.timeout(deadline_s):
                status = await told
            if status.front != status.name:  # operators are answered by every node
                raise NotFrontError(f"{status.name} is not the front, but {status.front}", node=status.name)
            return _Found(link, status)
        except TimeoutError as e:
            link.abort("it does not say whether it is the front")
            raise ConnectError(f"{address}: it was reached, but did not say whether it is the front") from e
        except BaseException:
            link.abort("it is not the front")
            raise


class _Search:
    """Asks all nodes at once, until ``end_s`` on the loop's clock. `close` ends all links but the one that is found."""

    def __init__(self, ask: Callable[[Address, float], Awaitable[_Found]], end_s: float) -> None:
        self._ask = ask
        self._end_s = end_s
        self._loop = asyncio.get_running_loop()
        self._known: set[Address] = set()
        self._asking: dict[asyncio.Task[_Found], Address] = {}
        self._failures: dict[Address, LaminaError] = {}
        self._starting: Link | None = None
        """The link to a front that is not ready."""

    async def run(self, addresses: Sequence[Address]) -> Link:
        """Return the link to the front."""
        prefer_until_s = 0.0
        for address in addresses:
            self._begin(address)
        while self._asking:
            timeout_s = None if self._starting is None else max(0.0, prefer_until_s - self._loop.time())
            done, _ = await asyncio.wait(self._asking, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            for task in done:
                found = self._take(task)
                if found is None:
                    continue
                if found.status.state in ("ready", "draining"):
                    return found.link
                if self._starting is not None:
                    found.link.abort("another node is the front")
                    continue
                self._starting, prefer_until_s = found.link, self._loop.time() + PREFER_S
        if self._starting is not None:
            starting, self._starting = self._starting, None
            return starting
        raise self._error()

    def close(self) -> None:
        """Ask no more."""
        for task in self._asking:
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().link.abort("another node is the front")
            task.cancel()
        if self._starting is not None:
            self._starting.abort("another node is the front")

    def _begin(self, address: Address, pause_s: float = 0.0) -> None:
        self._known.add(address)
        self._asking[self._loop.create_task(self._ask_after(address, pause_s))] = address

    async def _ask_after(self, address: Address, pause_s: float) -> _Found:
        await asyncio.sleep(pause_s)
        return await self._ask(address, max(0.0, self._end_s - self._loop.time()))

    def _take(self, task: asyncio.Task[_Found]) -> _Found | None:
        """Take in what a node has said; ask it again if that may change, and another one if it names one."""
        address = self._asking.pop(task)
        try:
            return task.result()
        except LaminaError as error:
            self._failures[address] = error
            if isinstance(error, NotFrontError) and error.address:
                named = Address.parse(error.address)
                if named not in self._known:
                    self._begin(named)
            may_change = isinstance(error, NotFrontError | PeerLostError)
            if may_change and self._loop.time() + RETRY_S < self._end_s:
                self._begin(address, RETRY_S)
        return None

    def _error(self) -> LaminaError:
        errors = list(self._failures.values())
        if len(errors) == 1 or all(isinstance(error, HandshakeError) for error in errors):
            return errors[0]
        return ConnectError("no node is the front: " + "; ".join(map(str, errors)))

"""A client's link to the front, and the answers that come on it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, TypeAlias

from lamina import errors
from lamina.errors import CapacityError, LaminaError, NodeError, ProtocolError, RequestError, TransportError, UsageError
from lamina.transport import Link
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
    Rendered,
    Request,
    Score,
    ToClient,
    messages_for,
)

Item: TypeAlias = Piece | Finished | LaminaError


class Inbox:
    """Keeps what has come of one answer until it is read, by one task at a time."""

    def __init__(self) -> None:
        self.items: deque[Item] = deque()
        """The tokens, and then the end of the answer."""
        self.prompt_scores: list[Score] = []
        """They are complete when the first item is here."""
        self.rendered: Rendered | None = None
        """What became of a conversation; is here before the first item, unless that is an error."""
        self.begun: asyncio.Event | None = None
        """Is set when the first item is here, or none will come."""
        self.timer: asyncio.TimerHandle | None = None
        """Ends the request at its deadline."""
        self._waiting: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        """Take what has come."""
        self.items.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
        if self.begun is not None:
            self.begun.set()
            self.begun = None

    async def get(self) -> Item:
        """Wait for the next item, and take it out."""
        while not self.items:
            if self._waiting is not None:
                raise UsageError("another task reads this stream; one at a time may")
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        return self.items.popleft()

    def close(self) -> None:
        """Nothing more will come."""
        if self.timer is not None:
            self.timer.cancel()
        if self.begun is not None:
            self.begun.set()


class FrontLink:
    """Holds a link to the front, which ends once. ``failure`` says why no more can be asked on it."""

    def __init__(self, link: Link) -> None:
        """Nothing may be delivered from ``link`` yet."""
        self.failure: LaminaError | None = None
        self._link = link
        self._inboxes: dict[int, Inbox] = {}
        self._questions = Questions(link)
        link.deliver(on_message=self._on_message, on_lost=self._on_lost)

    def ask(self, id_: int, request: Request, inbox: Inbox) -> None:
        """Send a request, whose answer goes to ``inbox``. RequestError if it is too long for a message."""
        if self.failure is not None:
            raise self.failure
        try:
            for message in messages_for(id_, request):
                self._link.send(encode(message))
        except ProtocolError as e:
            raise RequestError(f"the settings of this request are too long: {e}") from e
        self._inboxes[id_] = inbox

    def answers(self, id_: int) -> bool:
        """Return whether the answer to a request is not over, or was not read to its end."""
        return id_ in self._inboxes

    def leave(self, id_: int) -> Inbox | None:
        """Forget a request that is over."""
        inbox = self._inboxes.pop(id_, None)
        if inbox is not None:
            inbox.close()
        return inbox

    def abort(self, id_: int, error: LaminaError | None = None) -> None:
        """Have the front forget a request if it is not over; whoever reads the answer gets ``error``."""
        inbox = self.leave(id_)
        if inbox is None:
            return
        if not self._link.state.closed:
            self._link.send(encode(Cancel(id=id_)))
        if error is not None:
            inbox.put(error)

    async def status(self) -> Status:
        """Return the state and the counters of the front."""
        status: Status = await self._questions.ask(AskStatus())
        return status

    def end(self, reason: str) -> None:
        """End the link now, if it has not ended."""
        if not self._link.state.closed:
            self._link.abort(reason)

    async def close(self, error: LaminaError) -> None:
        """Cancel what still runs, which gets ``error``, and end the link."""
        if not self._link.state.closed:
            for id_ in self._inboxes:
                self._link.send(encode(Cancel(id=id_)))
        await self._link.close()
        self._fail(error)

    def _on_message(self, plain: dict[str, Any]) -> None:
        match decode(plain, ToClient):
            case Generated(pieces=pieces):
                inboxes = self._inboxes
                for piece in pieces:
                    if inbox := inboxes.get(piece.id):
                        inbox.put(piece)
            case Finished(id=id_) as end:
                if inbox := self._inboxes.get(id_):
                    inbox.put(end)
            case PromptScored(id=id_, scores=scores):
                if inbox := self._inboxes.get(id_):
                    inbox.prompt_scores += scores
            case Rendered(id=id_) as rendered:
                if inbox := self._inboxes.get(id_):
                    inbox.rendered = rendered
            case Failed(id=None) as failure:
                self._fail(_error(failure))
            case Failed(id=int(id_)) as failure:
                if inbox := self._inboxes.get(id_):
                    inbox.put(_error(failure))
            case Status() as status:
                self._questions.answer(status)

    def _on_lost(self, error: TransportError) -> None:
        peer = self._link.info.peer
        self._fail(NodeError(f"{peer.role} node {peer.name} was lost: {error}", node=peer.name))

    def _fail(self, error: LaminaError) -> None:
        if self.failure is None:
            self.failure = error
        for inbox in list(self._inboxes.values()):  # some leave when they get it
            inbox.put(error)
        self._questions.fail(error)


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

"""A client's link to the front, and the answers that come on it."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from lamina import errors
from lamina.errors import (
    CapacityError,
    LaminaError,
    NodeError,
    NotFrontError,
    PeerSilentError,
    ProtocolError,
    RequestError,
    TransportError,
    UsageError,
)
from lamina.transport import Link
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import Message, decode, encode
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
    Resume,
    Resumed,
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


class _UnderWay:
    """A request that is not over, or whose answer was not read to its end."""

    __slots__ = ("inbox", "is_lost", "is_over", "prompt_scores", "request", "ticket", "tokens")

    def __init__(self, request: Request, inbox: Inbox) -> None:
        self.request = request
        self.inbox = inbox
        self.ticket = secrets.token_hex(16)
        self.tokens = 0
        """So many have come."""
        self.prompt_scores = 0
        self.is_over = False
        """Whether nothing more will come."""
        self.is_lost = False
        """Whether the link was lost, and the front has not said yet that it goes on."""


class FrontLink:
    """Holds what is asked of the front, over one link after the other. ``failure`` says why there is none now.

    When the link is lost, what is under way waits for the next one, which the owner gives to `use`: the front then goes
    on behind the last token that has come. It may be away for ``patience_s`` seconds, not counting those in which it
    starts, unless the start fails; then all that waits fails with the error of the loss.
    """

    def __init__(self, *, patience_s: float = 0.0, on_wait: Callable[[], None] = lambda: None) -> None:
        """``on_wait`` is called when something waits for another link. With no patience, nothing does."""
        self.failure: LaminaError | None = TransportError("there is no link to the front yet")
        self.attempt = ""
        """Why the last attempt to make another one has failed."""
        self._patience_s = self._left_s = patience_s
        self._on_wait = on_wait
        self._link: Link | None = None
        self._questions: Questions
        self._asked: dict[int, _UnderWay] = {}
        self._given_up: list[tuple[int, str]] = []
        """What was given up while there was no link, by id and ticket."""
        self._timer: asyncio.TimerHandle | None = None
        self._away_s = self._back_s = 0.0
        """When the link was lost, and when there was the last one."""
        self._loss: LaminaError = self.failure
        """Why it was lost the last time."""

    @property
    def is_awaited(self) -> bool:
        """Return whether something waits for another link."""
        return self.failure is not None and any(asked.is_lost for asked in self._asked.values())

    def use(self, link: Link) -> None:
        """Go on with a new link, from which nothing may have been delivered yet."""
        self.end("a new connection is made")
        self._link, self._questions, self.failure, self.attempt = link, Questions(link), None, ""
        self._back_s = asyncio.get_running_loop().time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._left_s -= self._back_s - self._away_s

        def on_message(plain: dict[str, Any]) -> None:
            if self._link is link:
                self._on_message(plain)

        def on_lost(error: TransportError) -> None:
            if self._link is link:
                peer = link.info.peer
                self._lose(NodeError(f"{peer.role} node {peer.name} was lost: {error}", node=peer.name))
                if peer.details.get("journal") == "off" and not isinstance(error, PeerSilentError):  # it has ended
                    self._fail_begun()

        link.deliver(on_message=on_message, on_lost=on_lost)
        for id_, asked in self._asked.items():
            if asked.is_lost:
                self._send(Resume(id=id_, ticket=asked.ticket, tokens=asked.tokens, prompt_scores=asked.prompt_scores))
        given_up, self._given_up = self._given_up, []
        for id_, ticket in given_up:
            self._send(Resume(id=id_, ticket=ticket, tokens=0))
            self._send(Cancel(id=id_))

    def ask(self, id_: int, request: Request, inbox: Inbox) -> None:
        """Send a request, whose answer goes to ``inbox``. RequestError if it is too long for a message."""
        if self.failure is not None:
            raise self.failure
        asked = _UnderWay(request, inbox)
        self._send_request(id_, asked)
        self._asked[id_] = asked

    def answers(self, id_: int) -> bool:
        """Return whether the answer to a request is not over, or was not read to its end."""
        return id_ in self._asked

    def leave(self, id_: int) -> None:
        """Forget a request that is over."""
        asked = self._asked.pop(id_, None)
        if asked is not None:
            asked.inbox.close()

    def abort(self, id_: int, error: LaminaError | None = None) -> None:
        """Have the front forget a request if it is not over; whoever reads the answer gets ``error``."""
        asked = self._asked.get(id_)
        if asked is None:
            return
        self.leave(id_)
        if not asked.is_over:
            if asked.is_lost and self.failure is not None:
                self._given_up.append((id_, asked.ticket))
            else:
                self._send(Cancel(id=id_))
        if error is not None:
            asked.inbox.put(error)

    async def status(self) -> Status:
        """Return the state and the counters of the front."""
        if self.failure is not None:
            raise self.failure
        status: Status = await self._questions.ask(AskStatus())
        return status

    def end(self, reason: str) -> None:
        """End the link now, if it has not ended."""
        if self._link is not None and not self._link.state.closed:
            self._link.abort(reason)

    async def close(self, error: LaminaError) -> None:
        """Cancel what still runs, which gets ``error``, and end the link."""
        for id_, asked in self._asked.items():
            if not asked.is_over:
                self._send(Cancel(id=id_))
        if self._link is not None:
            await self._link.close()
        self._patience_s = 0.0
        self._lose(error)
        self._give_up(error)

    def _give_up(self, error: LaminaError) -> None:
        """Nothing waits for another link any more: all that did fails with ``error``."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._left_s = self._patience_s
        self._fail(error)

    def _send(self, message: Message) -> None:
        if self._link is not None and not self._link.state.closed:
            self._link.send(encode(message))

    def _send_request(self, id_: int, asked: _UnderWay) -> None:
        assert self._link is not None
        try:
            for message in messages_for(id_, asked.request, asked.ticket):
                self._link.send(encode(message))
        except ProtocolError as e:
            raise RequestError(f"the settings of this request are too long: {e}") from e

    def _on_message(self, plain: dict[str, Any]) -> None:
        match decode(plain, ToClient):
            case Generated(pieces=pieces):
                every = self._asked
                for piece in pieces:
                    if asked := every.get(piece.id):
                        asked.tokens += 1
                        asked.inbox.put(piece)
            case Finished(id=id_) as end:
                self._take_end(id_, end)
            case PromptScored(id=id_, scores=scores):
                if asked := self._asked.get(id_):
                    asked.prompt_scores += len(scores)
                    asked.inbox.prompt_scores += scores
            case Rendered(id=id_) as rendered:
                if asked := self._asked.get(id_):
                    asked.inbox.rendered = rendered
            case Resumed(id=id_, known=known):
                if asked := self._asked.get(id_):
                    self._go_on(id_, asked, known)
            case Failed(id=None) as failure:
                self._lose(error_of(failure))
            case Failed(id=int(id_)) as failure:
                self._take_end(id_, error_of(failure))
            case Status() as status:
                self._questions.answer(status)

    def _take_end(self, id_: int, end: Finished | LaminaError) -> None:
        """An answer is over, and the front need not keep it any longer."""
        self._send(Cancel(id=id_))
        if asked := self._asked.get(id_):
            asked.is_over, asked.is_lost = True, False
            asked.inbox.put(end)

    def _go_on(self, id_: int, asked: _UnderWay, known: bool) -> None:
        """The front goes on with an answer; or does not know it, and is asked anew if nothing has come of it."""
        if known:
            asked.is_lost = False
        elif asked.tokens or asked.prompt_scores:
            reason = "it has come back without this request"
            asked.is_over, asked.is_lost = True, False
            asked.inbox.put(self._lost(reason))
        else:
            asked.is_lost = False
            self._send_request(id_, asked)
        if not any(asked.is_lost for asked in self._asked.values()):
            self._left_s = self._patience_s

    def _lose(self, error: LaminaError) -> None:
        """There is no link any more: what is under way waits for the next one, or fails."""
        if self.failure is not None:
            return
        self.failure = self._loss = error
        self._questions.fail(error)
        if any(asked.is_lost for asked in self._asked.values()):  # a start that has failed
            self._left_s -= asyncio.get_running_loop().time() - self._back_s
        for asked in self._asked.values():
            asked.is_lost = not asked.is_over
        if not self._patience_s or isinstance(error, UsageError):  # the front would say the same again
            self._fail(error)
        elif self.is_awaited:
            loop = asyncio.get_running_loop()
            self._away_s = loop.time()
            self._timer = loop.call_later(max(0.0, self._left_s), self._lose_patience)
            self._on_wait()

    def _fail_begun(self) -> None:
        """The front that had the answers is gone, and has kept nothing: those that have begun are lost, and the others
        can be asked anew."""
        for asked in list(self._asked.values()):
            if asked.is_lost and (asked.tokens or asked.prompt_scores):
                asked.is_over, asked.is_lost = True, False
                asked.inbox.put(self._lost("it keeps no journal (recovery.journal), so what it had begun is lost"))

    def _lose_patience(self) -> None:
        attempt = f", last attempt: {self.attempt}" if self.attempt else ""
        self._give_up(self._lost(f"it has not come back within {self._patience_s:g} s{attempt}"))

    def _lost(self, reason: str) -> NodeError:
        """Return the error of what was under way when the link was lost, and what has come of it since."""
        return NodeError(f"{self._loss}; {reason}", node=getattr(self._loss, "node", ""))

    def _fail(self, error: LaminaError) -> None:
        """All that waits has waited in vain."""
        for asked in list(self._asked.values()):  # some leave when they get it
            if asked.is_lost:
                asked.is_over, asked.is_lost = True, False
                asked.inbox.put(error)


def error_of(failure: Failed) -> LaminaError:
    """Return the error that a node reported, in the class that it raised."""
    kind = getattr(errors, failure.kind, LaminaError)
    if not (isinstance(kind, type) and issubclass(kind, LaminaError)):
        kind = LaminaError
    if issubclass(kind, NotFrontError):
        return NotFrontError(failure.message, node=failure.node or "", address=failure.address)
    if issubclass(kind, NodeError):
        return NodeError(failure.message, node=failure.node or "")
    if kind is CapacityError:
        return CapacityError(failure.message, retry_after_s=failure.retry_after_s)
    return kind(failure.message)

"""Serve the clients of the front: take their requests in, and give text and tokens out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from msgspec.structs import replace

from lamina.errors import LaminaError, ProtocolError, RequestError, TransportError
from lamina.front.intake import Intake
from lamina.front.sequence import Sequence
from lamina.model.tokenizer import LONG_TEXT, TextStream, Tokenizer
from lamina.runtime.workers import BackgroundWorkers
from lamina.transport import Link
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import Message, decode
from lamina.wire.questions import send_unless_gone
from lamina.wire.requests import (
    Cancel,
    Failed,
    Finished,
    FromClient,
    Generate,
    Generated,
    Piece,
    Prompt,
    PromptPart,
    Request,
    length_of,
)

log = logging.getLogger("lamina.front")


class ClientSession:
    """Serves one client on its link, on the node's loop. When the link ends, its requests are cancelled.

    ``intake`` and ``tokenizer`` return those of the front. While there are none, they raise the error that the client
    gets. Texts are encoded by ``workers``.
    """

    def __init__(
        self,
        link: Link,
        workers: BackgroundWorkers,
        intake: Callable[[], Intake],
        tokenizer: Callable[[], Tokenizer],
        status: Callable[[], Status],
    ) -> None:
        self._link = link
        self._workers = workers
        self._intake = intake
        self._tokenizer = tokenizer
        self._status = status
        self._requests: dict[int, Sequence | asyncio.Task[None]] = {}
        """The requests by the client's id. A request is a task until the engine has it."""
        self._coming: _ComingPrompt | None = None
        """The request of which parts are still to come."""

    def on_message(self, plain: dict[str, Any]) -> None:
        """Take in a message of the client."""
        try:
            message = decode(plain, FromClient)
        except ProtocolError as e:
            id_ = plain.get("id")
            if not isinstance(id_, int) or id_ < 0:
                raise
            if self._is_coming(id_):
                self._coming = None
            self._refuse(id_, RequestError(str(e)))  # one bad request harms no other
            return
        match message:
            case Generate(id=id_) | PromptPart(id=id_):
                try:
                    self._take(message)
                except LaminaError as e:
                    if self._is_coming(id_):
                        self._coming = None
                    self._refuse(id_, e, message.request.name if isinstance(message, Generate) else "")
            case Cancel(id=id_):
                self._cancel(id_)
            case AskStatus():
                self._send(self._status())

    def on_lost(self, error: TransportError) -> None:
        """The link has ended."""
        if self._requests:
            log.info("event=client_lost requests=%d reason=%r", len(self._requests), str(error))
        self._cancel_all()

    def _take(self, message: Generate | PromptPart) -> None:
        """Take in a request, or a part of its prompt, and begin with the request if it is complete."""
        if isinstance(message, PromptPart):
            coming = self._coming
            if coming is not None and coming.id == message.id and coming.add(message.part):
                self._coming = None
                self._begin(coming.id, coming.whole())
            return
        id_, request, length = message.id, message.request, message.length
        if id_ in self._requests or self._is_coming(id_):
            raise RequestError(f"request id {id_} is in use on this connection")
        if length is None:
            self._begin(id_, request)
            return
        self._require_fit(request.prompt, length)
        if self._coming is not None:
            raise RequestError(f"the prompt of request {self._coming.id} is still coming on this connection; wait")
        coming = _ComingPrompt(id_, request, length)
        if coming.add(request.prompt):
            self._begin(id_, request)
        else:
            self._coming = coming

    def _is_coming(self, id_: int) -> bool:
        return self._coming is not None and self._coming.id == id_

    def _require_fit(self, prompt: Prompt, length: int) -> None:
        """Raise the error for a prompt that is too long, or cannot be served, before it is kept or encoded."""
        intake, tokenizer = self._intake(), self._tokenizer()
        if isinstance(prompt, str):
            tokenizer.require_fit(length)
            intake.require_place(tokenizer.at_work)
        else:
            intake.require_fit(length)

    def _begin(self, id_: int, request: Request) -> None:
        """Encode the prompt if it is text, and submit the request."""
        prompt, loop = request.prompt, asyncio.get_running_loop()
        length = length_of(prompt)
        self._require_fit(prompt, length)
        intake, tokenizer = self._intake(), self._tokenizer()
        tokens: list[int] | asyncio.Future[list[int]]
        if isinstance(prompt, str):
            work = self._workers.run(tokenizer.encode, prompt, request.parse_special, long=length > LONG_TEXT)
            tokens = loop.create_task(work)
            tokenizer.at_work += 1
            tokens.add_done_callback(tokenizer.done)
        else:
            tokens = prompt
        self._requests[id_] = loop.create_task(self._submit(intake, tokenizer, id_, request, tokens))

    async def _submit(
        self,
        intake: Intake,
        tokenizer: Tokenizer,
        id_: int,
        request: Request,
        prompt: list[int] | asyncio.Future[list[int]],
    ) -> None:
        try:
            tokens = prompt if isinstance(prompt, list) else await prompt
            answer = _TextAnswer(self, id_, len(tokens), TextStream(tokenizer, tokens))
            sequence = await intake.submit(request, tokens, answer)
        except LaminaError as e:
            self._requests.pop(id_, None)
            self._refuse(id_, e, request.name)
        else:
            if id_ in self._requests:  # else it is over already
                self._requests[id_] = sequence

    def _cancel(self, id_: int) -> None:
        if self._is_coming(id_):
            self._coming = None
        match self._requests.pop(id_, None):
            case Sequence() as sequence:
                self._intake().cancel(sequence)
            case asyncio.Task() as submitting:
                submitting.cancel()

    def _cancel_all(self) -> None:
        for id_ in list(self._requests):
            self._cancel(id_)

    def _send(self, message: Message) -> None:
        if not send_unless_gone(self._link, message):
            self._cancel_all()

    def _refuse(self, id_: int, error: LaminaError, name: str = "") -> None:
        """Say why a request is not answered."""
        with suppress(LaminaError):  # a node that is starting counts nothing
            self._intake().meter.failed_with(error, name=name)
        self._send(failed(error, id_))

    def token(self, message: Generated) -> None:
        """Pass a token on."""
        self._send(message)

    def end(self, id_: int, message: Message) -> None:
        """Pass on how a request ended."""
        self._requests.pop(id_, None)
        self._send(message)


@dataclass
class _ComingPrompt:
    """Collects the parts of a request's prompt, up to the length that it was announced to have."""

    id: int
    request: Request
    length: int
    parts: list[Prompt] = field(default_factory=list)
    arrived: int = 0

    def add(self, part: Prompt) -> bool:
        """Take the next part; return whether it is the last. Raises RequestError for one that does not fit."""
        if type(part) is not type(self.request.prompt):
            raise RequestError("the parts of a prompt must be all text, or all token ids")
        self.parts.append(part)
        self.arrived += length_of(part)
        if self.arrived > self.length:
            raise RequestError(f"the prompt is longer than announced: {self.arrived} instead of {self.length}")
        return self.arrived == self.length

    def whole(self) -> Request:
        """Return the request with its whole prompt."""
        if isinstance(self.request.prompt, str):
            return replace(self.request, prompt="".join(cast("list[str]", self.parts)))
        return replace(self.request, prompt=[token for part in cast("list[list[int]]", self.parts) for token in part])


class _TextAnswer:
    """Passes one request's tokens on to its client."""

    def __init__(self, session: ClientSession, id_: int, prompt_tokens: int, text: TextStream) -> None:
        self._session = session
        self._id = id_
        self._prompt_tokens = prompt_tokens
        self._text = text

    def token(self, token: int) -> None:
        self._session.token(Generated(pieces=[Piece(self._id, token, self._text.push(token))]))

    def finished(self, reason: str) -> None:
        how = cast(Literal["stop", "length"], reason)
        done = Finished(id=self._id, reason=how, prompt_tokens=self._prompt_tokens, text=self._text.rest())
        self._session.end(self._id, done)

    def failed(self, error: LaminaError) -> None:
        self._session.end(self._id, failed(error, self._id))


def failed(error: LaminaError, id_: int | None = None) -> Failed:
    """Return an error as it travels to a client."""
    return Failed(
        kind=type(error).__name__,
        message=str(error),
        id=id_,
        node=getattr(error, "node", None),
        retry_after_s=getattr(error, "retry_after_s", None),
    )

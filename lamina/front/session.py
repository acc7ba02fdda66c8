"""Serve the clients of the front: take their requests in, and give text and tokens out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Literal, cast

from lamina.errors import LaminaError, ProtocolError, RequestError, TransportError
from lamina.front.intake import Intake
from lamina.front.sequence import Sequence
from lamina.front.text import TextStream, Tokenizer
from lamina.runtime.crossing import Crossing
from lamina.transport import Link
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import Message, decode
from lamina.wire.questions import send_unless_gone
from lamina.wire.requests import Cancel, Failed, Finished, FromClient, Generate, Generated, Request

log = logging.getLogger("lamina.front")


class ClientSession:
    """Serves one client on its link, on the node's loop. When the link ends, its requests are cancelled.

    ``intake`` and ``tokenizer`` return those of the front. While there are none, they raise the error that the client
    gets.
    """

    def __init__(
        self,
        link: Link,
        device: Crossing,
        intake: Callable[[], Intake],
        tokenizer: Callable[[], Tokenizer],
        status: Callable[[], Status],
    ) -> None:
        self._link = link
        self._there = device
        self._intake = intake
        self._tokenizer = tokenizer
        self._status = status
        self._requests: dict[int, Sequence | asyncio.Task[None]] = {}
        """The requests by the client's id. A request is a task until the engine has it."""

    def on_message(self, plain: dict[str, Any]) -> None:
        """Take in a message of the client."""
        try:
            message = decode(plain, FromClient)
        except ProtocolError as e:
            id_ = plain.get("id")
            if not isinstance(id_, int) or id_ < 0:
                raise
            self._send(failed(RequestError(str(e)), id_))  # one bad request harms no other
            return
        match message:
            case Generate() as generate:
                try:
                    self._generate(generate.id, generate.request)
                except LaminaError as e:
                    self._send(failed(e, generate.id))
            case Cancel(id=id_):
                self._cancel(id_)
            case AskStatus():
                self._send(self._status())

    def on_lost(self, error: TransportError) -> None:
        """The link has ended."""
        if self._requests:
            log.info("event=client_lost requests=%d reason=%r", len(self._requests), str(error))
        self._cancel_all()

    def _generate(self, id_: int, request: Request) -> None:
        intake, tokenizer = self._intake(), self._tokenizer()
        if id_ in self._requests:
            raise RequestError(f"request id {id_} is in use on this connection")
        prompt: list[int] | asyncio.Future[list[int]]
        if isinstance(request.prompt, str):
            intake.require_place(tokenizer.at_work)
            # Long texts take long, so not on this loop.
            prompt = self._there.call(tokenizer.encode, request.prompt)
            tokenizer.at_work += 1
            prompt.add_done_callback(tokenizer.done)
        else:
            prompt = request.prompt
        submitting = self._submit(intake, tokenizer, id_, request, prompt)
        self._requests[id_] = asyncio.get_running_loop().create_task(submitting)

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
            answer = _TextAnswer(self, id_, len(tokens), TextStream(tokenizer))
            sequence = await intake.submit(request, tokens, answer)
        except LaminaError as e:
            self.end(id_, failed(e, id_))
        else:
            if id_ in self._requests:  # else it is over already
                self._requests[id_] = sequence

    def _cancel(self, id_: int) -> None:
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

    def token(self, message: Generated) -> None:
        """Pass a token on."""
        self._send(message)

    def end(self, id_: int, message: Message) -> None:
        """Pass on how a request ended."""
        self._requests.pop(id_, None)
        self._send(message)


class _TextAnswer:
    """Passes one request's tokens on to its client."""

    def __init__(self, session: ClientSession, id_: int, prompt_tokens: int, text: TextStream) -> None:
        self._session = session
        self._id = id_
        self._prompt_tokens = prompt_tokens
        self._text = text

    def token(self, token: int) -> None:
        self._session.token(Generated(id=self._id, token=token, text=self._text.push(token)))

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

"""Clients of the front: their requests in, text and tokens out."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any, Literal, cast

from lamina.errors import LaminaError, ProtocolError, RequestError, TransportError
from lamina.front.engine import Engine
from lamina.front.scheduler import Sequence
from lamina.front.text import TextStream, Tokenizer
from lamina.runtime.device import Device
from lamina.transport import Link
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import Message, decode
from lamina.wire.questions import answer
from lamina.wire.requests import Cancel, Failed, Finished, FromClient, Generate, Generated, Sampling

log = logging.getLogger("lamina.front")


class ClientSession:
    """One client on its link. When the link ends, its requests are cancelled.

    ``engine`` gives the engine, or raises the error to be told while there is none.
    """

    def __init__(
        self,
        link: Link,
        device: Device,
        engine: Callable[[], Engine],
        tokenizer: Callable[[], Tokenizer],
        status: Callable[[], Status],
        ended: Callable[[], None],
    ) -> None:
        """``ended`` is called when the client is gone."""
        self._link = link
        self._device = device
        self._engine = engine
        self._tokenizer = tokenizer
        self._status = status
        self._ended = ended
        self._requests: dict[int, Sequence | asyncio.Task[None]] = {}
        """By the client's id; a task while the prompt is being turned into tokens."""
        link.deliver(on_message=self._on_message, on_lost=self._on_lost)

    def _on_message(self, plain: dict[str, Any]) -> None:
        try:
            message = decode(plain, FromClient)
        except ProtocolError as e:
            id_ = plain.get("id")
            if not isinstance(id_, int) or id_ < 0:
                raise
            self._send(failed(RequestError(str(e)), id_))  # one bad request harms no other
            return
        match message:
            case Generate() as request:
                try:
                    self._generate(request)
                except LaminaError as e:
                    self._send(failed(e, request.id))
            case Cancel(id=id_):
                self._cancel(id_)
            case AskStatus():
                self._send(self._status())

    def _generate(self, request: Generate) -> None:
        engine, tokenizer = self._engine(), self._tokenizer()
        if request.id in self._requests:
            raise RequestError(f"request id {request.id} is in use on this connection")
        if isinstance(request.prompt, str):
            engine.require_place(tokenizer.at_work)
            # Long texts take long, so not on the loop.
            encoding = self._device.run(tokenizer.encode, request.prompt)
            tokenizer.at_work += 1
            encoding.add_done_callback(tokenizer.done)
            submitting = self._submit_encoded(engine, tokenizer, request, encoding)
            self._requests[request.id] = asyncio.get_running_loop().create_task(submitting)
        else:
            self._submit(engine, tokenizer, request, request.prompt)

    async def _submit_encoded(
        self, engine: Engine, tokenizer: Tokenizer, request: Generate, encoding: asyncio.Future[list[int]]
    ) -> None:
        try:
            self._submit(engine, tokenizer, request, await encoding)
        except LaminaError as e:
            self.end(request.id, failed(e, request.id))

    def _submit(self, engine: Engine, tokenizer: Tokenizer, request: Generate, prompt: list[int]) -> None:
        seed = secrets.randbits(63) if request.seed is None else request.seed
        sampling = Sampling(request.temperature, request.top_k, request.top_p, seed)
        passing_on = _Answer(self, request.id, len(prompt), TextStream(tokenizer))
        self._requests[request.id] = engine.submit(
            prompt,
            request.max_tokens,
            sampling,
            passing_on,
            priority=request.priority,
            share_prefix=request.share_prefix,
            salt=request.salt,
        )

    def _on_lost(self, error: TransportError) -> None:
        if self._requests:
            log.info("event=client_lost requests=%d reason=%r", len(self._requests), str(error))
        self._cancel_all()
        self._ended()

    def _cancel(self, id_: int) -> None:
        match self._requests.pop(id_, None):
            case Sequence() as sequence:
                self._engine().cancel(sequence)
            case asyncio.Task() as encoding:
                encoding.cancel()

    def _cancel_all(self) -> None:
        for id_ in list(self._requests):
            self._cancel(id_)

    def _send(self, message: Message) -> None:
        if not answer(self._link, message):
            self._cancel_all()

    def token(self, message: Generated) -> None:
        """Pass a token on."""
        self._send(message)

    def end(self, id_: int, message: Message) -> None:
        """Pass on how a request ended."""
        self._requests.pop(id_, None)
        self._send(message)


class _Answer:
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
    """An error as it travels to a client."""
    return Failed(
        kind=type(error).__name__,
        message=str(error),
        id=id_,
        node=getattr(error, "node", None),
        retry_after_s=getattr(error, "retry_after_s", None),
    )

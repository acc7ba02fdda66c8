"""Clients of the front: their requests in, text and tokens out."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from lamina.device import Device
from lamina.engine.engine import Engine
from lamina.engine.sampler import Sampling
from lamina.engine.scheduler import Sequence
from lamina.errors import CheckpointError, LaminaError, ProtocolError, RequestError, TransportError
from lamina.node.daemon import answer
from lamina.protocol import (
    AskStatus,
    Cancel,
    Failed,
    Finished,
    FromClient,
    Generate,
    Message,
    Status,
    Token,
    decode,
)
from lamina.transport import Link

log = logging.getLogger("lamina.front")


class Tokenizer:
    """The tokenizer of a checkpoint; without tokenizer.json, prompts are token ids and answers have no text."""

    def __init__(self, path: Path, context: int) -> None:
        from transformers import AutoTokenizer

        self._path = path
        self._context = context
        self._library: Any = None
        self.at_work = 0
        """Prompts that it has been given and not yet turned into tokens."""
        if (path / "tokenizer.json").is_file():
            try:
                self._library = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            except Exception as e:
                raise CheckpointError(f"{path / 'tokenizer.json'}: the tokenizer cannot be read: {e}") from e
            self._longest_token = max(map(len, self._library.get_vocab()))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the checkpoint asks for. Takes a while for a long one."""
        if self._library is None:
            raise RequestError(f"{self._path} has no tokenizer.json, so the prompt must be token ids")
        if len(text) > self._context * self._longest_token:
            raise RequestError(
                f"the prompt has {len(text)} characters, which cannot fit the context of {self._context} tokens"
            )
        ids: list[int] = self._library(text, verbose=False)["input_ids"] if text else []
        return ids

    def done(self, encoding: asyncio.Future[list[int]]) -> None:
        """One less is at work. Its error matters only to who still waits for it."""
        self.at_work -= 1
        if not encoding.cancelled():
            encoding.exception()

    def decode(self, ids: list[int]) -> str:
        """Text of tokens, without special ones; empty without tokenizer.json."""
        text: str = self._library.decode(ids, skip_special_tokens=True) if self._library else ""
        return text


class TextStream:
    """Text of one answer, token by token.

    Where a token ends inside a character, its text comes with a later one. Text is decoded together with the tokens
    before it, as some tokenizers join words by what precedes them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = 0
        """Tokens from here on are decoded again, for what follows them."""
        self._given = 0
        """Tokens up to here have been given as text."""

    def push(self, token: int) -> str:
        """The text that ``token`` completes, which may be empty."""
        self._ids.append(token)
        text = self._fresh()
        if not text or text.endswith("\ufffd"):
            return ""
        self._before, self._given = self._given, len(self._ids)
        return text

    def rest(self) -> str:
        """What was held back, an unfinished character at most."""
        return self._fresh()

    def _fresh(self) -> str:
        old = self._tokenizer.decode(self._ids[self._before : self._given])
        return self._tokenizer.decode(self._ids[self._before :])[len(old) :]


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
    ) -> None:
        self._link = link
        self._device = device
        self._engine = engine
        self._tokenizer = tokenizer
        self._status = status
        self._requests: dict[int, Sequence | asyncio.Task[None]] = {}
        """By the client's id; a task while the prompt is being turned into tokens."""
        link.on_message, link.on_lost = self._on_message, self._on_lost

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

    def token(self, message: Token) -> None:
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
        self._session.token(Token(id=self._id, token=token, text=self._text.push(token)))

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

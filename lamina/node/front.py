"""Clients of the front: their requests in, text and tokens out."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from lamina.engine.engine import Engine
from lamina.engine.sampler import Sampling
from lamina.engine.scheduler import Sequence
from lamina.errors import LaminaError, ProtocolError, RequestError, TransportError
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
    encode,
)
from lamina.transport import Link

log = logging.getLogger("lamina.front")

MAX_PENDING_BYTES = 4 * 2**20
"""What a client may leave unread before its link is ended."""


class Tokenizer:
    """The tokenizer of a checkpoint; without tokenizer.json, prompts are token ids and answers have no text."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        self._path = path
        self._library: Any = None
        if (path / "tokenizer.json").is_file():
            try:
                self._library = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            except Exception as e:
                raise LaminaError(f"{path / 'tokenizer.json'}: the tokenizer cannot be read: {e}") from e

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the checkpoint asks for."""
        if self._library is None:
            raise RequestError(f"{self._path} has no tokenizer.json, so the prompt must be token ids")
        ids: list[int] = self._library(text)["input_ids"] if text else []
        return ids

    def stream(self) -> TextStream:
        return TextStream(self._library)


class TextStream:
    """Text of one answer, token by token: a token that ends inside a character gives no text yet."""

    def __init__(self, library: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._library = library
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._given = ""

    def push(self, token: int) -> str:
        if self._library is None:
            return ""
        self._ids.append(token)
        text = self._stream.step(self._library.backend_tokenizer, token) or ""
        self._given += text
        return text

    def rest(self) -> str:
        """What was held back."""
        if self._library is None:
            return ""
        whole: str = self._library.backend_tokenizer.decode(self._ids, skip_special_tokens=True)
        return whole[len(self._given) :] if whole.startswith(self._given) else ""


class ClientSession:
    """One client on its link. When the link ends, its requests are cancelled.

    ``engine`` gives the engine, or raises the error to be told while there is none.
    """

    def __init__(
        self, link: Link, engine: Callable[[], Engine], tokenizer: Callable[[], Tokenizer], status: Callable[[], Status]
    ) -> None:
        self._link = link
        self._engine = engine
        self._tokenizer = tokenizer
        self._status = status
        self._requests: dict[int, Sequence] = {}
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
                if sequence := self._requests.pop(id_, None):
                    self._engine().cancel(sequence)
            case AskStatus():
                self._send(self._status())

    def _generate(self, request: Generate) -> None:
        engine = self._engine()
        if request.id in self._requests:
            raise RequestError(f"request id {request.id} is in use on this connection")
        tokenizer = self._tokenizer()
        prompt = tokenizer.encode(request.prompt) if isinstance(request.prompt, str) else request.prompt
        seed = secrets.randbits(63) if request.seed is None else request.seed
        sampling = Sampling(request.temperature, request.top_k, request.top_p, seed)
        answer = _Answer(self, request.id, len(prompt), tokenizer.stream())
        self._requests[request.id] = engine.submit(prompt, request.max_tokens, sampling, answer)

    def _on_lost(self, error: TransportError) -> None:
        if self._requests:
            log.info("event=client_lost requests=%d reason=%r", len(self._requests), str(error))
        self._cancel_all()

    def _cancel_all(self) -> None:
        for sequence in self._requests.values():
            self._engine().cancel(sequence)
        self._requests.clear()

    def _send(self, message: Message) -> None:
        if self._link.closed:
            return
        if self._link.pending_bytes > MAX_PENDING_BYTES:
            self._link.abort(f"the client has left {self._link.pending_bytes} bytes unread")
            self._cancel_all()
            return
        self._link.send(encode(message))

    def _over(self, id_: int, message: Message) -> None:
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
        self._session._send(Token(id=self._id, token=token, text=self._text.push(token)))

    def finished(self, reason: str) -> None:
        how = cast(Literal["stop", "length"], reason)
        done = Finished(id=self._id, reason=how, prompt_tokens=self._prompt_tokens, text=self._text.rest())
        self._session._over(self._id, done)

    def failed(self, error: LaminaError) -> None:
        self._session._over(self._id, failed(error, self._id))


def failed(error: LaminaError, id_: int | None = None) -> Failed:
    """An error as it travels to a client."""
    return Failed(kind=type(error).__name__, message=str(error), id=id_, node=getattr(error, "node", None))

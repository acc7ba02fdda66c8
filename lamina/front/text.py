"""Prompts become tokens, and tokens become text."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from lamina.errors import CheckpointError, RequestError
from lamina.model.library import quiet

log = logging.getLogger("lamina.front")


_VOCABULARIES = ("tokenizer.json", "vocab.*", "merges.txt", "tekken.json", "*.model", "*.tiktoken")
"""The files of which the library makes tokenizers."""


class Tokenizer:
    """Wraps the tokenizer of a checkpoint, of whatever files the library makes one.

    Without one, which the log says, prompts are token ids and answers have no text. A CheckpointError says that
    tokenizer.json is there but cannot be read.
    """

    def __init__(self, path: Path, context: int) -> None:
        self._context = context
        self._library: Any = None
        self._missing = ""
        self.at_work = 0
        """The number of prompts that it has been given and not yet turned into tokens."""
        files = sorted(file.name for pattern in _VOCABULARIES for file in path.glob(pattern))
        if not files:
            self._missing = f"{path} has no tokenizer.json, nor other files of a tokenizer"
        else:
            try:
                self._library = _load(path)
            except Exception as e:
                reason = " ".join(str(e).split())
                if "tokenizer.json" in files:
                    raise CheckpointError(f"{path / 'tokenizer.json'}: the tokenizer cannot be read: {reason}") from e
                self._missing = (
                    f"{path} has no tokenizer.json, and the transformers library makes no tokenizer of "
                    f"{', '.join(files)} ({reason})"
                )
        if self._library is None:
            log.warning("event=no_tokenizer reason=%r", f"{self._missing}; prompts must be token ids")
            return
        self._longest_token = max(map(len, self._library.get_vocab()))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt, with the special tokens that the checkpoint asks for. A long prompt takes
        long."""
        if self._library is None:
            raise RequestError(f"{self._missing}, so the prompt must be token ids")
        if len(text) > self._context * self._longest_token:
            raise RequestError(
                f"the prompt has {len(text)} characters, which cannot fit the context of {self._context} tokens"
            )
        ids: list[int] = self._library(text, verbose=False)["input_ids"] if text else []
        return ids

    def done(self, encoding: asyncio.Future[list[int]]) -> None:
        """A prompt has been encoded. The task that waits for it, if any, gets its error."""
        self.at_work -= 1
        if not encoding.cancelled():
            encoding.exception()

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, without special ones. It is empty without a tokenizer."""
        text: str = self._library.decode(ids, skip_special_tokens=True) if self._library else ""
        return text


def _load(path: Path) -> Any:
    """Return the library's tokenizer of a directory. ValueError if it has no vocabulary but special tokens, as the
    library makes also of files that are not those of the model's tokenizer."""
    from transformers import AutoTokenizer

    with quiet():
        library = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if not library.get_vocab().keys() - library.get_added_vocab().keys():
        raise ValueError("they are not those of this model's tokenizer")
    return library


class TextStream:
    """Produces the text of one answer, token by token.

    Where a token ends inside a character, its text comes with a later one. Text is decoded together with the tokens
    before it, as some tokenizers join words by what precedes them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = 0
        """Tokens from here on are decoded again, together with those that follow them."""
        self._given = 0
        """Tokens up to here have been given as text."""

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes, which may be empty."""
        self._ids.append(token)
        text = self._fresh()
        if not text or text.endswith("\ufffd"):
            return ""
        self._before, self._given = self._given, len(self._ids)
        return text

    def rest(self) -> str:
        """Return what was held back, an unfinished character at most."""
        return self._fresh()

    def _fresh(self) -> str:
        old = self._tokenizer.decode(self._ids[self._before : self._given])
        return self._tokenizer.decode(self._ids[self._before :])[len(old) :]

"""Prompts become tokens, and tokens become text."""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from lamina.errors import CheckpointError, RequestError
from lamina.model.library import quiet

log = logging.getLogger("lamina.front")

_VOCABULARIES = ("tokenizer.json", "vocab.*", "merges.txt", "tekken.json", "*.model", "*.tiktoken")
"""The files of which the library makes tokenizers."""

MARK = "\ufdd0"
"""A noncharacter: in the spelling of a special token, it makes that text. It is in no token, and no text has it."""

LONG_TEXT = 1 << 14
"""The bytes above which a text takes some milliseconds to encode, in which others should not have to wait."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SAME_CHARACTER = 3
"""Normalisation to NFC shortens text in UTF-8 to no less than this part of it (a Hangul syllable in three letters)."""
_SLACK = 8
"""By how much longer text may be if the tokenizer drops some of it, so that no length is certain to be too much."""


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """Replace each byte that is part of no character, as SentencePiece does; Python would replace some together."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("lamina.each_byte", _each_byte)


class Tokenizer:
    """Wraps the tokenizer of a checkpoint, of whatever files the library makes one. Any thread may call it.

    Without one, which the log says, prompts are token ids and answers have no text. A CheckpointError says that
    tokenizer.json is there but cannot be read. ``read`` makes the library's tokenizer of a directory: what has
    ``backend_tokenizer``, ``unk_token_id``, ``special_tokens_map`` and ``chat_template``.
    """

    def __init__(self, path: Path, context: int, read: Callable[[Path], Any] | None = None) -> None:
        self._context = context
        self._library: Any = None
        self._missing = ""
        self.at_work = 0
        """The number of prompts that it has been given and not yet turned into tokens."""
        self.max_bytes = 0
        """The most bytes that the text of a prompt may have."""
        self.byte_errors = "replace"
        """How `codecs` treats the bytes of tokens that make no character."""
        self.special_tokens: dict[str, int] = {}
        """All special tokens by their spellings."""
        self.added_tokens: dict[str, int] = {}
        """All tokens that were added to the vocabulary: the special ones, and others such as marks around calls of
        tools."""
        self.named_tokens: dict[str, str] = {}
        """The spellings of special tokens by their names, such as ``bos_token``."""
        self.chat_template: str | dict[str, str] | None = None
        """The template of chats, or several by name."""
        files = sorted(file.name for pattern in _VOCABULARIES for file in path.glob(pattern))
        if not files:
            self._missing = f"{path} has no tokenizer.json, nor other files of a tokenizer"
        else:
            try:
                self._take((read or read_tokenizer)(path))
            except Exception as e:
                self._library = None
                reason = " ".join(str(e).split())
                if "tokenizer.json" in files:
                    raise CheckpointError(f"{path / 'tokenizer.json'}: the tokenizer cannot be read: {reason}") from e
                self._missing = (
                    f"{path} has no tokenizer.json, and the transformers library makes no tokenizer of "
                    f"{', '.join(files)} ({reason})"
                )
        if self._library is None:
            log.warning("event=no_tokenizer reason=%r", f"{self._missing}; prompts must be token ids")

    def _take(self, tokenizer: Any) -> None:
        """Take the library's tokenizer, and find out how it spells bytes and special tokens."""
        from tokenizers import Tokenizer as Library

        self._library = tokenizer.backend_tokenizer
        self._library.no_truncation()
        self._library.no_padding()
        # Whether special tokens are found in text is a property of a tokenizer, which other threads use.
        self._parsing = Library.from_str(self._library.to_str())
        self._library.encode_special_tokens = True
        self._parsing.encode_special_tokens = False
        added = self._library.get_added_tokens_decoder()
        self._special = frozenset(id_ for id_, token in added.items() if token.special)
        self.special_tokens = {token.content: id_ for id_, token in added.items() if token.special}
        self.added_tokens = {token.content: id_ for id_, token in added.items()}
        self._unknown = tokenizer.unk_token_id
        self.chat_template, self.named_tokens = template_and_tokens(tokenizer)
        self._added: list[int] = self._library.encode("").ids
        """The special tokens that every prompt gets."""
        decoders = _parts(self._library.decoder)
        names = {part["type"] for part in decoders}
        self._alphabet: dict[str, int] | None = None
        """The bytes that the characters of tokens stand for, if all tokens are spelled so."""
        if "ByteLevel" in names <= {"ByteLevel", "Fuse"}:
            self._alphabet = _byte_level_alphabet()
        self._has_byte_tokens = "ByteFallback" in names
        if self._has_byte_tokens:
            self.byte_errors = "lamina.each_byte"
        self.max_bytes = self._context * self._most_bytes_per_token()

    # -- prompts

    def require_fit(self, nbytes: int) -> None:
        """Raise RequestError if a text of ``nbytes`` bytes cannot be a prompt: encoding it would take long, in vain."""
        self._require_library()
        if nbytes > self.max_bytes:
            raise RequestError(
                f"the prompt has {nbytes} bytes of text, the context of {self._context} tokens takes {self.max_bytes} "
                "at most; shorten it"
            )

    def encode(self, text: str, parse_special: bool = False, add_special: bool = True) -> list[int]:
        """Return the token ids of a prompt, with the special tokens that the checkpoint asks for, if ``add_special``.

        The text of a special token is text like any other, unless ``parse_special`` makes it that token. A long text
        takes long, without the interpreter's lock. Raises RequestError for text that cannot be told from a special
        token.
        """
        self._require_library()
        if not text:
            return []
        # Only the functions for batches release the interpreter's lock while they work.
        if parse_special:
            ids: list[int] = self._parsing.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
            return ids
        ids = self._library.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        # Some vocabularies have special tokens among their words. The unknown token comes from any text.
        for token in self._special.intersection(ids) - {self._unknown}:
            if ids.count(token) > (self._added.count(token) if add_special else 0):
                raise RequestError(
                    f"this tokenizer cannot read {self._library.id_to_token(token)!r} in the prompt as text; give "
                    "token ids, or let parse_special make it the special token"
                )
        return ids

    def spellings(self, word: str, parse_special: bool = False) -> list[list[int]]:
        """Return the token ids of a word at the beginning of a text and behind a space, without special tokens around
        it. Raises RequestError if it has none."""
        self._require_library()
        library = self._parsing if parse_special else self._library
        texts = [word.lstrip(" ") or word, f" {word.lstrip(' ')}"]
        found = [encoded.ids for encoded in library.encode_batch_fast(texts, add_special_tokens=False)]
        if not all(found):
            raise RequestError(f"bad_words: this tokenizer has no tokens for {word!r:.200}; give token ids")
        return found[:1] if found[0] == found[1] else found

    def require_text(self, setting: str) -> None:
        """Raise RequestError if a setting of a request is of no use, as answers have no text."""
        if self._library is None:
            raise RequestError(f"{setting}: {self._missing}, so answers have no text")

    def to_json(self) -> str:
        """Return the tokenizer in the library's format. Raises RequestError if there is none."""
        if self._library is None:
            raise RequestError(f"{self._missing}, so answers cannot be constrained")
        text: str = self._library.to_str()
        return text

    def encode_marked(self, text: str) -> list[int]:
        """Return the token ids of a rendered chat, which has all its special tokens in its text.

        Each special token is that token, except where `MARK` stands in its spelling or beside a part of it; the marks
        themselves are left out. Raises RequestError for text that cannot be told from a special token.
        """
        self._require_library()
        if MARK not in text:
            ids: list[int] = self._parsing.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return ids
        ids = self._marked.encode_batch_fast([text], add_special_tokens=False)[0].ids
        spelled = sum(1 for _ in self.special_spelling.finditer(text))
        if sum(token in self._special and token != self._unknown for token in ids) > spelled:
            raise RequestError(
                "this tokenizer cannot read the spelling of a special token as text; leave it out of the messages"
            )
        return ids

    @cached_property
    def _marked(self) -> Any:
        """The tokenizer for text with marks. Few need it, and that of a large vocabulary takes a second to make."""
        from tokenizers import Tokenizer as Library

        return Library.from_str(_without_marks(self._library.to_str()))

    @cached_property
    def special_spelling(self) -> re.Pattern[str]:
        """What matches the spelling of any special token, the longest first."""
        return spelling(self.special_tokens)

    def done(self, encoding: asyncio.Future[Any]) -> None:
        """A prompt has been encoded. The task that waits for it, if any, gets its error."""
        self.at_work -= 1
        if not encoding.cancelled():
            encoding.exception()

    def _require_library(self) -> None:
        if self._library is None:
            raise RequestError(f"{self._missing}, so the prompt must be token ids, which the Python client takes")

    def _most_bytes_per_token(self) -> int:
        """Return how many bytes of text one token stands for at most.

        That is certain where no byte of the text gets lost on its way to the tokens; else it is a generous guess.
        """
        library, vocabulary = self._library, self._library.get_vocab()
        if self._alphabet is not None:
            longest = max(map(len, vocabulary))
            complete = self._alphabet.keys() <= vocabulary.keys()
        else:
            longest = max(len(token.replace("▁", " ").encode()) for token in vocabulary)
            complete = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)) and library.model.byte_fallback
        added = library.get_added_tokens_decoder().values()
        normalizers, splitters = _parts(library.normalizer), _parts(library.pre_tokenizer)
        keeps_all = (
            type(library.model).__name__ == "BPE"
            and complete
            and not any(token.lstrip or token.rstrip for token in added)
            and all(map(_keeps_length, normalizers))
            and all(map(_keeps_text, splitters))
        )
        if not keeps_all:
            return longest * _SLACK
        return longest * (_SAME_CHARACTER if any(part["type"] == "NFC" for part in normalizers) else 1)

    # -- answers

    def is_special(self, token: int) -> bool:
        """Return whether a token is a special one, which text does not have unless it is asked for."""
        return self._library is not None and token in self._special

    def has_text(self, token: int, special: bool = False) -> bool:
        """Return whether a token is part of text: in the vocabulary, and not special unless ``special`` ones are."""
        library = self._library
        return (
            library is not None and (special or token not in self._special) and library.id_to_token(token) is not None
        )

    def bytes_of(self, token: int) -> bytes | None:
        """Return the bytes that a token stands for, which need not be whole characters; None if it stands for text."""
        spelled: str = self._library.id_to_token(token)
        if self._alphabet is not None:
            try:
                return bytes([self._alphabet[character] for character in spelled])
            except KeyError:  # an added token, which is spelled as it is
                return spelled.encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(spelled)):
            return bytes.fromhex(match[1])
        return None

    def text_of(self, token: int, before: int | None) -> str:
        """Return the text that a token adds behind the token ``before``, or at the beginning. Both have text."""
        if before is None:
            return self._decode([token])
        return self._decode([before, token])[len(self._decode([before])) :]

    def last_with_text(self, tokens: Sequence[int], count: int, special: bool = False) -> list[int]:
        """Return the last ``count`` tokens that are part of text, or all if there are fewer. See `has_text`."""
        if self._library is None:
            return []
        return [*islice((t for t in reversed(tokens) if self.has_text(t, special)), count)][::-1]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, with that of special ones. Raises RequestError if there is no tokenizer."""
        self._require_library()
        return self._decode(list(tokens))

    def spelled(self, token: int) -> str | None:
        """Return how the vocabulary spells a token; None if it has no such token."""
        spelled: str | None = self._library.id_to_token(token) if self._library is not None else None
        return spelled

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._library.decode(tokens, skip_special_tokens=False)
        return text


def spelling(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return what matches any of these tokens, the longest first, and nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _without_marks(description: str) -> str:
    """Return the description of a tokenizer that leaves `MARK` out after it has found the special tokens."""
    library = json.loads(description)
    for token in library["added_tokens"]:
        token["normalized"] = token["normalized"] and not token["special"]
    leave_out = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
    rest = [library["normalizer"]] if library["normalizer"] else []
    library["normalizer"] = {"type": "Sequence", "normalizers": [leave_out, *rest]}
    return json.dumps(library)


def read_tokenizer(path: Path) -> Any:
    """Return the library's tokenizer of a directory. ValueError if it has no vocabulary but special tokens, as the
    library makes also of files that are not those of the model's tokenizer."""
    from transformers import AutoTokenizer

    with quiet():
        library = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if not library.get_vocab().keys() - library.get_added_vocab().keys():
        raise ValueError("they are not those of this model's tokenizer")
    return library


def template_and_tokens(library: Any) -> tuple[str | dict[str, str] | None, dict[str, str]]:
    """Return the chat template of the library's tokenizer, or several by name, and the special tokens by theirs."""
    template = library.chat_template
    named = {name: str(token) for name, token in library.special_tokens_map.items() if isinstance(token, str)}
    return template if isinstance(template, str | dict) else None, named


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for, as in GPT-2: itself, if it can be
    seen, else the next character behind all bytes."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class TextStream:
    """Produces the text of one answer, token by token; the last takes no longer than the first.

    The texts of all tokens, and then `rest`, make the answer's part of the text of prompt and answer together. What has
    been given never changes. Where a token ends inside a character, its bytes are held back until another token
    completes it, or until they can no longer become a character: then U+FFFD stands for them.

    Of bytes that make no character, only these are replaced. The `tokenizers` library would replace whole runs of byte
    tokens for one wrong byte, also characters that have long been given.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, special: bool = False) -> None:
        """``special``: special tokens have text too."""
        self._tokenizer = tokenizer
        self._special = special
        self._bytes = codecs.getincrementaldecoder("utf-8")(tokenizer.byte_errors)
        self._before: int | None = None
        """The last token that is part of text. Whether there is one decides about the space before a word."""
        for token in tokenizer.last_with_text(prompt, 4, special):  # a character has 4 bytes at most
            self.push(token)

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes, which may be empty."""
        tokenizer = self._tokenizer
        if not tokenizer.has_text(token, self._special):
            return ""
        before, self._before = self._before, token
        spelled = tokenizer.bytes_of(token)
        if spelled is None or (before is None and spelled == b" "):  # a space, of which the beginning may have none
            return self.rest() + tokenizer.text_of(token, before)
        text = self._bytes.decode(spelled)
        held, _ = self._bytes.getstate()
        if len(held) == 2 and held[0] == 0xED and held[1] >= 0xA0:
            text += self.rest()  # half a surrogate, for which Python would wait
        return text

    def rest(self) -> str:
        """Return what stands for the bytes that are held back, U+FFFD, or nothing."""
        return self._bytes.decode(b"", final=True)


def _parts(component: Any) -> list[dict[str, Any]]:
    """Return the descriptions of a tokenizer's component, or of all in a sequence of them."""
    return list(_flat(json.loads(component.__getstate__()))) if component is not None else []


def _flat(description: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if description["type"] != "Sequence":
        yield description
        return
    for parts in description.values():
        if isinstance(parts, list):
            for part in parts:
                yield from _flat(part)


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    """Return whether a normalizer makes no text shorter, except that NFC composes characters."""
    if normalizer["type"] == "Replace":
        old: str = normalizer["pattern"].get("String", "")
        return bool(old) and len(normalizer["content"].encode()) >= len(old.encode())
    return normalizer["type"] in ("Prepend", "NFC", "ByteLevel")


def _keeps_text(splitter: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer leaves nothing out."""
    return splitter["type"] in ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation") and (
        splitter.get("behavior") != "Removed"
    )

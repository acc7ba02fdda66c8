"""Vocabularies for tests of masks, and walks along them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lamina.constrain.matcher import Compiled, Matcher, Vocabulary
from lamina.demo.run import CHECKPOINT
from lamina.model.tokenizer import Tokenizer
from lamina.wire.requests import Constraint

END = "</s>"


class Words:
    """A vocabulary, with the bytes of its tokens. ``spare`` logits have no token."""

    def __init__(self, tokenizer: Tokenizer, size: int, end: int, spare: int = 0) -> None:
        self.end = end
        self.spelled = {token: tokenizer.bytes_of(token) or b"" for token in range(size) if tokenizer.has_text(token)}
        self.single = {text: token for token, text in self.spelled.items() if len(text) == 1}
        self.vocabulary = Vocabulary(tokenizer, size + spare, [end])

    def compile(self, constraint: Constraint) -> Compiled:
        return Compiled(constraint, self.vocabulary)

    def allowed(self, mask: bytes) -> list[int]:
        """The tokens of a mask."""
        assert len(mask) == (self.vocabulary.width + 7) // 8
        return [token for token in range(len(mask) * 8) if mask[token // 8] >> token % 8 & 1]

    def takes(self, compiled: Compiled, text: str) -> bool:
        """Whether a text, byte by byte, is an answer."""
        matcher = compiled.matcher()
        for byte in text.encode():
            token = self.single[bytes([byte])]
            if token not in self.allowed(matcher.mask()):
                return False
            matcher.accept(token)
        return self.end in self.allowed(matcher.mask())

    def walk(self, matcher: Matcher, chosen: random.Random, hurry: Iterable[str] = (), limit: int = 3000) -> str | None:
        """A random answer, or None if it does not end. After some tokens it makes for the end, by what ends JSON values
        and by the characters of ``hurry``."""
        ends = [self.end, *(self.single[c.encode()] for c in '}]"0123456789ntf')]
        useful = [self.single[c.encode()] for c in hurry if c.encode() in self.single]
        text = b""
        calm = chosen.randint(0, 25)
        for step in range(limit):
            tokens = self.allowed(matcher.mask())
            assert tokens, f"nothing is allowed after {text!r}"
            token = chosen.choice(tokens)
            if step >= calm and chosen.random() < 0.95:
                known = set(tokens)
                fitting = [t for t in useful if t in known]
                ending = next((t for t in ends if t in known and chosen.random() < 0.8), None)
                token = ending if ending is not None else chosen.choice(fitting) if fitting else token
            matcher.accept(token)
            if token == self.end:
                return text.decode()
            text += self.spelled[token]
        return None


@cache
def demo_words() -> Words:
    """The vocabulary of the demo's checkpoint: 1536 tokens, all bytes among them."""
    return Words(Tokenizer(CHECKPOINT, 2048), 1536, 1)


def few_words(folder: Path, tokens: Sequence[bytes], spare: int = 5) -> Words:
    """A vocabulary of these tokens and an end."""
    alphabet = bytes_to_unicode()
    vocabulary = {"".join(alphabet[byte] for byte in token): i for i, token in enumerate(tokens)}
    vocabulary[END] = len(vocabulary)
    library = Library(models.BPE(vocabulary, []))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens([END])
    PreTrainedTokenizerFast(tokenizer_object=library, eos_token=END).save_pretrained(folder)
    return Words(Tokenizer(folder, 64), len(vocabulary), len(tokens), spare)

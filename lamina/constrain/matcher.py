"""Which tokens may come next in a constrained answer, as the library finds out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from lamina.constrain.grammar import explained, grammar_of
from lamina.errors import RequestError
from lamina.model.tokenizer import Tokenizer
from lamina.wire.requests import Constraint

_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    max_items_in_row=10_000,
    step_max_items=100_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""What bounds time and memory of one compilation, and of one mask."""


class Vocabulary:
    """Holds the tokens of a model as the library wants them, for logits that are ``width`` wide.

    Tokens that the tokenizer does not know, and special ones but ``end_tokens``, are in no mask. Making one takes a
    second where there are many tokens. Raises RequestError if answers of this model cannot be constrained.
    """

    def __init__(self, tokenizer: Tokenizer, width: int, end_tokens: Iterable[int]) -> None:
        self.end_tokens = sorted(end_tokens)
        self.width = width
        text = tokenizer.to_json()
        if not self.end_tokens:
            raise RequestError("the checkpoint names no end token, with which a constrained answer would end")
        try:
            self.library = LLTokenizer(text, n_vocab=width, eos_token=self.end_tokens)
        except Exception as e:  # the library raises what it likes for tokenizers that it cannot read
            raise RequestError(f"answers of this model cannot be constrained, because of its tokenizer: {e}") from e
        ends = bytearray((width + 7) // 8)
        for token in self.end_tokens:
            ends[token // 8] |= 1 << token % 8
        self._ends = int.from_bytes(ends, "little")

    def trimmed(self, mask: bytes, *, without_ends: bool) -> bytes:
        """Return a mask in as many bytes as the logits need, if asked without end tokens, unless it has only those."""
        nbytes = (self.width + 7) // 8
        if without_ends and (others := int.from_bytes(mask, "little") & ~self._ends):
            return others.to_bytes(len(mask), "little")[:nbytes]
        return mask[:nbytes]


class Compiled:
    """Holds a constraint, compiled for a vocabulary. Any thread may use it.

    Compiling takes long; `_LIMITS` bound it to some seconds. Raises RequestError if it cannot be enforced, needs more
    than they allow, or no answer fits it.
    """

    def __init__(self, constraint: Constraint, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._start = LLMatcher(vocabulary.library, grammar_of(constraint), log_level=0, limits=_LIMITS)
        self._first = b"" if self._start.is_error() else self._start.compute_bitmask()
        if self._start.is_error():
            reason = self._start.get_error()
            if "NoExtension" in reason:
                reason = "no answer fits it"
            raise RequestError(f"the {_KINDS[type(constraint).__name__]} is refused: {explained(constraint, reason)}")

    def first_mask(self, *, min_tokens: int = 0) -> bytes:
        """Return the mask of the first token of an answer, as `Matcher.mask` would."""
        return self.vocabulary.trimmed(self._first, without_ends=min_tokens > 0)

    def matcher(self, tokens: Sequence[int] = (), *, min_tokens: int = 0) -> Matcher:
        """Return the matcher of an answer that has ``tokens`` so far. It is cheap without any."""
        return Matcher(self.vocabulary, self._start.deep_copy(), tokens, min_tokens)


_KINDS = {
    "JsonSchema": "JSON schema",
    "JsonObject": "JSON object",
    "Regex": "regular expression",
    "OneOf": "choice of texts",
    "Grammar": "grammar",
}


class Matcher:
    """Follows one answer. One thread at a time may call it; its calls take from microseconds to milliseconds."""

    def __init__(self, vocabulary: Vocabulary, library: LLMatcher, tokens: Sequence[int], min_tokens: int) -> None:
        self._vocabulary = vocabulary
        self._library = library
        self._min_tokens = min_tokens
        self._accepted = 0
        for token in tokens:
            self.accept(token)

    def mask(self) -> bytes:
        """Return which tokens may come next: token i is bit ``i % 8`` of byte ``i // 8``, and there are as many bits as
        logits, rounded up to bytes.

        If nothing but the end may come, or the end may, there are end tokens in it. Before ``min_tokens`` tokens these
        are left out where something else may come. Raises RequestError if the constraint has become too complex.
        """
        bits = self._library.compute_bitmask()
        self._require_no_error()
        return self._vocabulary.trimmed(bits, without_ends=self._accepted < self._min_tokens)

    def accept(self, token: int) -> None:
        """Take the next token of the answer. Raises RequestError for one that the mask did not allow."""
        if not self._library.consume_token(token):
            self._require_no_error(token)
        self._accepted += 1

    @property
    def end_tokens(self) -> Sequence[int]:
        """Return the tokens that end an answer."""
        return self._vocabulary.end_tokens

    @property
    def is_complete(self) -> bool:
        """Return whether the answer may end here."""
        return self._library.is_accepting()

    @property
    def is_over(self) -> bool:
        """Return whether the answer has ended, or nothing may come but its end."""
        return self._library.is_stopped()

    def _require_no_error(self, token: int | None = None) -> None:
        if self._library.is_error():
            where = f"token {token} as token" if token is not None else "token"
            reason = " ".join(self._library.get_error().split("\n", 1)[0].split())[:400]
            raise RequestError(f"the constraint cannot go on with {where} {self._accepted + 1} of the answer: {reason}")

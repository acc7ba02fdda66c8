"""How tokens are shown one by one, in lists of logprobs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

from lamina.model.tokenizer import Tokenizer
from lamina.wire.requests import Score

LEAST_LOGPROB = -9999.0
"""What stands for a probability of 0, as JSON has no infinite numbers."""

Shown: TypeAlias = dict[str, Any]


class TokenTexts:
    """Knows the text of each token, and puts scores into both dialects of the API."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._of = lru_cache(1 << 16)(self._find)

    def spelled(self, token: int) -> str:
        """Return a token as text; ``bytes:\\xe2\\x82`` if it is a part of a character."""
        return self._of(token)[0]

    def _find(self, token: int) -> tuple[str, bytes | None]:
        """Return the text of a token, and its bytes if there are any."""
        tokenizer = self._tokenizer
        spelling = tokenizer.spelled(token)
        if spelling is None:
            return f"token_id:{token}", None
        if not tokenizer.has_text(token):
            return spelling, spelling.encode()
        raw = tokenizer.bytes_of(token)
        if raw is None:
            raw = tokenizer.text_of(token, self._letter).encode()
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    @property
    def _letter(self) -> int | None:
        """A token behind which every other shows all of its text, also the space before a word."""
        ids = self._tokenizer.encode("x", add_special=False)
        return ids[-1] if ids else None

    def chat(self, token: int, score: Score, top: int) -> Shown:
        """Return an entry of a chat's ``logprobs.content``."""
        shown = self._chat_entry(token, score.logprob)
        shown["top_logprobs"] = [self._chat_entry(other, logprob) for other, logprob in score.top[:top]]
        return shown

    def _chat_entry(self, token: int, logprob: float) -> Shown:
        text, raw = self._of(token)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": None if raw is None else list(raw)}

    def top(self, token: int, score: Score, top: int) -> dict[str, float]:
        """Return an entry of a completion's ``top_logprobs``, which also has the token itself."""
        likeliest = {self.spelled(other): max(logprob, LEAST_LOGPROB) for other, logprob in score.top[:top]}
        likeliest.setdefault(self.spelled(token), max(score.logprob, LEAST_LOGPROB))
        return likeliest

    def prompt(self, token: int, score: Score, top: int) -> dict[str, Shown]:
        """Return an entry of ``prompt_logprobs``: by token id, also for the token itself."""
        entries: dict[str, Shown] = {}
        for rank, (other, logprob) in enumerate(score.top[:top], 1):
            entries[str(other)] = self._prompt_entry(other, logprob, rank)
        entries.setdefault(str(token), self._prompt_entry(token, score.logprob, score.rank))
        return entries

    def _prompt_entry(self, token: int, logprob: float, rank: int) -> Shown:
        return {"logprob": max(logprob, LEAST_LOGPROB), "rank": rank, "decoded_token": self.spelled(token)}

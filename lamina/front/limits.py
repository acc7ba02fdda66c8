"""What a request may ask for, by the model that answers it."""

from __future__ import annotations

from collections.abc import Iterable

from lamina.errors import RequestError
from lamina.wire.requests import Request


class RequestLimits:
    """Checks requests to a model with so many positions of ``context`` and tokens in its ``vocabulary``."""

    def __init__(self, context: int, vocabulary: int) -> None:
        self._context = context
        self._vocabulary = vocabulary

    def require_fit(self, prompt_tokens: int) -> None:
        """Raise RequestError if a prompt of so many tokens leaves no room for an answer."""
        if prompt_tokens >= self._context:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens, the context is {self._context} and must leave room for an "
                f"answer; use at most {self._context - 1}"
            )

    def max_tokens(self, request: Request, prompt: list[int]) -> int:
        """Return the most tokens that the answer may have; raise RequestError for what cannot be served."""
        if not prompt:
            raise RequestError("the prompt is empty; expected at least one token")
        self.require_fit(len(prompt))
        if max(prompt) >= self._vocabulary:
            position, token = next((i, t) for i, t in enumerate(prompt) if t >= self._vocabulary)
            raise RequestError(
                f"token {token} at position {position} of the prompt is not in the vocabulary of {self._vocabulary}"
            )
        self._require_known("stop_token_ids", request.stop_token_ids)
        self._require_known("sampling.logit_bias", request.sampling.logit_bias)
        for i, word in enumerate(request.bad_words):
            if isinstance(word, str):
                raise RequestError(f"bad_words[{i}] is the text {word!r}; here only its token ids are understood")
            self._require_known(f"bad_words[{i}]", word)
        left, max_tokens = self._context - len(prompt), request.max_tokens
        if max_tokens is not None and max_tokens > left:
            raise RequestError(
                f"{len(prompt)} prompt tokens and max_tokens {max_tokens} exceed the context of {self._context}; "
                f"ask for at most {left}"
            )
        most = max_tokens or left
        if request.min_tokens > most:
            raise RequestError(
                f"min_tokens is {request.min_tokens}, but the answer can have {most} tokens at most; ask for {most} or "
                "fewer"
            )
        return most

    def _require_known(self, field: str, tokens: Iterable[int]) -> None:
        """Raise RequestError for a token that the vocabulary lacks."""
        for token in tokens:
            if token >= self._vocabulary:
                raise RequestError(
                    f"{field} has token {token}, which is not in the vocabulary; expected less than {self._vocabulary}"
                )

"""An answer on its way to a client: tokens become text, which ends where the request says so."""

from __future__ import annotations

from lamina.front.intake import End
from lamina.front.stops import StopStrings
from lamina.model.tokenizer import TextStream, Tokenizer
from lamina.wire.requests import Finished, Piece, Request, Score


class AnswerText:
    """Makes the pieces of one answer out of its tokens, and what is said at its end.

    ``id_`` is the client's number of the request, and ``prompt`` has the tokens of its prompt.
    """

    def __init__(self, id_: int, request: Request, prompt: list[int], tokenizer: Tokenizer) -> None:
        self._id = id_
        self._request = request
        self._prompt_tokens = len(prompt)
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, prompt, special=request.show_special)
        self._stops = StopStrings(request.stop, include=request.include_stop)
        self._tokens = 0

    @property
    def found(self) -> str | None:
        """Return the text of ``stop`` that was found; no token behind it belongs to the answer."""
        return self._stops.found

    def piece(self, token: int, score: Score | None, end: End | None = None) -> Piece:
        """Return the next piece. With the last one comes the ``end``, as the text of a token that stops the answer is
        left out, unless the request asks for it. Special tokens have a setting of their own."""
        self._tokens += 1
        stopped = end is not None and end.stopped_by == token
        hidden = stopped and not self._request.include_stop and not self._tokenizer.is_special(token)
        text = "" if hidden else self._text.push(token)
        return Piece(self._id, token, self._stops.push(text, active=self._counts), score)

    def finished(self, end: End) -> Finished:
        """Return the end. If a text of ``stop`` was found, that is what ended the answer."""
        text = self._stops.push(self._text.rest(), active=self._counts) + self._stops.rest()
        return Finished(
            id=self._id,
            reason=end.reason if self.found is None else "stop",
            stopped_by=end.stopped_by if self.found is None else self.found,
            text=text,
            prompt_tokens=self._prompt_tokens,
            shared_tokens=end.shared_tokens,
            queued_s=end.queued_s,
            prompt_s=end.prompt_s,
            answer_s=end.answer_s,
        )

    @property
    def _counts(self) -> bool:
        return self._tokens >= self._request.min_tokens

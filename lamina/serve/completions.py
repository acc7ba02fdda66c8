"""POST /v1/completions: continue texts or token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lamina.errors import HttpError
from lamina.model.tokenizer import TextStream
from lamina.serve import parameters
from lamina.serve.exchange import Exchange
from lamina.serve.gathering import NewTokens
from lamina.serve.generate import Fields, Job, run
from lamina.serve.parameters import Body, constraint_of, parse, request_of, with_seed
from lamina.serve.service import Model, Service
from lamina.wire.codec import Count
from lamina.wire.requests import Finished, Score, Top

DEFAULT_TOKENS = 16
"""What OpenAI's API takes for ``max_tokens`` if a completion does not say."""

Prompts = str | list[str | Count | list[Count]]


class CompletionBody(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parameters of a completion."""

    prompt: Prompts
    """A text, token ids, or a list of either."""
    echo: bool = False
    """Whether the answer begins with the prompt. With ``logprobs``, also with those of its tokens."""
    logprobs: Top | None = None
    """Give the logprob of each token, and so many of the likeliest ones."""


async def completions(service: Service, exchange: Exchange) -> None:
    """Answer a completion."""
    body = parse(await exchange.json(), CompletionBody)
    name = service.require_name(body.model)
    model = service.model
    if body.stream and body.prompt_logprobs is not None:
        raise HttpError(
            "prompt_logprobs: not possible in a stream; use echo with logprobs, or no stream", param="prompt_logprobs"
        )
    texts = _prompts(body.prompt)
    if len(texts) * body.n > parameters.MAX_ANSWERS:
        raise HttpError(
            f"prompt: {len(texts)} prompts with n = {body.n} are more than {parameters.MAX_ANSWERS} answers; send "
            "several requests",
            param="prompt",
        )
    add_special = body.add_special_tokens is not False
    prompts = [
        await service.encode(prompt, add_special=add_special) if isinstance(prompt, str) else prompt for prompt in texts
    ]
    constraint = constraint_of(body)
    scores = body.logprobs if body.echo else None
    top_of_prompt = max((top for top in (scores, body.prompt_logprobs) if top is not None), default=None)
    requests, choices = [], []
    for prompt, ids in zip(texts, prompts, strict=True):
        asked = min(DEFAULT_TOKENS, max(1, model.context - len(ids))) if body.max_tokens is None else body.max_tokens
        request = request_of(
            body,
            ids,
            model.recommended,
            max_tokens=max(1, asked),  # the front always generates one, which is then not shown
            logprobs=body.logprobs,
            prompt_logprobs=top_of_prompt,
            constraint=constraint,
            show_special=not body.skip_special_tokens,
        )
        shown = _EchoedPrompt(model, ids, prompt if isinstance(prompt, str) else None)
        for answer in range(body.n):
            requests.append(with_seed(request, body.seed, answer))
            choices.append(_CompletionAnswer(model, body, shown, is_shown=asked > 0))
    job = Job(
        object="text_completion",
        chunk_object="text_completion",
        id=f"cmpl-{exchange.id}",
        model=name,
        requests=requests,
        choices=choices,
        prompt_tokens=sum(map(len, prompts)),
        prompts=len(prompts),
        stream=body.stream,
        options=body.stream_options,
    )
    await run(service, exchange, job)


def _prompts(given: Prompts) -> list[str | list[int]]:
    """Return the prompts, each a text or token ids."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise HttpError("prompt: expected a text or token ids, got an empty list", param="prompt")
    if all(isinstance(part, int) for part in given):
        return [[part for part in given if isinstance(part, int)]]
    if any(isinstance(part, int) for part in given):
        raise HttpError("prompt: token ids stand among texts or lists; give a list of one kind", param="prompt")
    return [part for part in given if not isinstance(part, int)]


class _EchoedPrompt:
    """One prompt, as ``echo`` shows it."""

    def __init__(self, model: Model, ids: list[int], text: str | None) -> None:
        self._model = model
        self.ids = ids
        self._text = text

    @property
    def text(self) -> str:
        """The text of the prompt."""
        return self._model.tokenizer.decode(self.ids) if self._text is None else self._text

    def offsets(self) -> list[int]:
        """Return where the text of each token begins."""
        stream = TextStream(self._model.tokenizer)
        found, length = [], 0
        for token in self.ids:
            found.append(length)
            length += len(stream.push(token))
        return found


class _CompletionAnswer:
    """One answer: see `lamina.serve.generate.AnswerForm`."""

    def __init__(self, model: Model, body: CompletionBody, prompt: _EchoedPrompt, *, is_shown: bool) -> None:
        self.prompt_scores: list[Score] = []
        self._model = model
        self._body = body
        self._prompt = prompt
        self._is_shown = is_shown
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._scores: list[Score] = []
        self._echoes = body.echo
        """Whether the prompt is still to be shown."""
        self._offset = len(prompt.text) if body.echo else 0
        self._told = False

    over = False

    # -- streams

    def opening(self) -> Iterable[Fields]:
        return self._echo() if self._body.logprobs is None else ()

    def part(self, part: NewTokens) -> Iterable[Fields]:
        yield from self._echo()
        if not self._is_shown:
            return
        yield self._fields(part.text, self._logprobs(part.tokens, part.scores, part.texts), part.tokens)

    def end(self, finished: Finished) -> Iterable[Fields]:
        yield from self._echo()
        yield {
            **self._fields(finished.text if self._is_shown else "", None, []),
            "finish_reason": finished.reason,
            "stop_reason": finished.stopped_by,
        }

    # -- whole answers

    def take(self, part: NewTokens) -> None:
        if self._is_shown:
            self._texts += part.texts
            self._ids += part.tokens
            self._scores += part.scores or ()

    def whole(self, finished: Finished) -> Fields:
        body, prompt = self._body, self._prompt
        text = "".join(self._texts) + (finished.text if self._is_shown else "")
        logprobs = None
        if body.logprobs is not None:
            logprobs = self._logprobs(self._ids, self._scores, self._texts)
            if body.echo:
                logprobs = {key: values + (logprobs or {}).get(key, []) for key, values in self._of_prompt().items()}
        fields: Fields = {
            "text": prompt.text + text if body.echo else text,
            "logprobs": logprobs,
            "finish_reason": finished.reason,
            "stop_reason": finished.stopped_by,
        }
        if body.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs(
                self._model, prompt.ids, self.prompt_scores, body.prompt_logprobs
            )
        if body.return_token_ids:
            fields |= {"token_ids": self._ids, "prompt_token_ids": prompt.ids}
        return fields

    # -- parts

    def _echo(self) -> Iterable[Fields]:
        """Return the prompt, once, as soon as all that is to be said of it is known."""
        if not self._echoes:
            return
        self._echoes = False
        yield self._fields(self._prompt.text, None if self._body.logprobs is None else self._of_prompt(), [])

    def _fields(self, text: str, logprobs: Any, tokens: list[int]) -> Fields:
        fields: Fields = {"text": text, "logprobs": logprobs, "finish_reason": None}
        if self._body.return_token_ids:
            fields["token_ids"] = tokens
            if not self._told:
                self._told = True
                fields["prompt_token_ids"] = self._prompt.ids
        return fields

    def _logprobs(self, tokens: list[int], scores: list[Score] | None, texts: list[str]) -> Fields | None:
        top = self._body.logprobs
        if top is None or scores is None:
            return None
        shown = self._model.texts
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "text_offset": offsets,
            "token_logprobs": [max(score.logprob, -9999.0) for score in scores],
            "tokens": [shown.spelled(token) for token in tokens],
            "top_logprobs": [shown.top(token, score, top) for token, score in zip(tokens, scores, strict=False)],
        }

    def _of_prompt(self) -> Fields:
        """Return the logprobs of the prompt, whose first token has none."""
        ids, scores, shown = self._prompt.ids, self.prompt_scores, self._model.texts
        top = self._body.logprobs or 0
        return {
            "text_offset": self._prompt.offsets(),
            "token_logprobs": [None, *(max(score.logprob, -9999.0) for score in scores)],
            "tokens": [shown.spelled(token) for token in ids],
            "top_logprobs": [
                None,
                *(shown.top(token, score, top) for token, score in zip(ids[1:], scores, strict=False)),
            ],
        }


def prompt_logprobs(model: Model, ids: list[int], scores: list[Score], top: int) -> list[Any]:
    """Return the scores of the tokens of a prompt by token id; the first has none."""
    return [None, *(model.texts.prompt(token, score, top) for token, score in zip(ids[1:], scores, strict=False))]

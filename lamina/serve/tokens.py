"""POST /tokenize, POST /detokenize, GET /tokenizer_info: the tokenizer of the model for those who have none."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from lamina.errors import HttpError
from lamina.serve.exchange import Exchange
from lamina.serve.parameters import Text, parse
from lamina.serve.service import Service
from lamina.wire.codec import Count


class TokenizeBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of /tokenize."""

    prompt: Text
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of /detokenize."""

    tokens: Annotated[list[Count], Meta(max_length=1 << 22)]
    model: str | None = None


async def tokenize(service: Service, exchange: Exchange) -> None:
    """Return the token ids of a text, in which special tokens count as such, as this shows what they are."""
    body = parse(await exchange.json(), TokenizeBody)
    service.require_name(body.model)
    model = service.model
    ids = await service.encode(body.prompt, add_special=body.add_special_tokens, parse_special=True)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.context, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [model.tokenizer.spelled(token) for token in ids]
    await exchange.reply_json(answer)


async def detokenize(service: Service, exchange: Exchange) -> None:
    """Return the text of token ids, with that of special tokens."""
    body = parse(await exchange.json(), DetokenizeBody)
    service.require_name(body.model)
    model = service.model
    if (most := max(body.tokens, default=0)) >= model.facts.vocabulary:
        raise HttpError(
            f"tokens: expected token ids below {model.facts.vocabulary}, the size of the vocabulary, got {most}",
            param="tokens",
        )
    await exchange.reply_json({"prompt": await service.workers.run(model.tokenizer.decode, body.tokens, long=True)})


async def tokenizer_info(service: Service, exchange: Exchange) -> None:
    """Describe the tokenizer: its special tokens and the chat template."""
    model = service.model
    facts = model.facts
    if facts.tokenizer is None:
        raise HttpError(facts.missing, status=404, kind="not_found_error")
    template = facts.chat_template
    info: dict[str, Any] = {
        "tokenizer_class": "TokenizersBackend",
        "vocab_size": facts.vocabulary,
        "model_max_length": model.context,
        **{name: facts.special.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        **facts.special,
        "chat_template": template.get("default") if isinstance(template, dict) else template,
    }
    await exchange.reply_json(info)

"""A client and the front exchange these messages: requests, tokens, and how requests end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import Count, Message, Positive

PART = 1 << 14
"""The most token ids or characters of a prompt in one message: far below what a message may have, and few enough that
a loop has taken them in within a millisecond or two."""

Prompt = str | list[Count]
"""Text or token ids."""


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """Says how the tokens of a request are chosen."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """0 is greedy."""
    top_k: Count = 0
    """Only the k likeliest tokens; 0 is all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that together have this probability."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """None: a random one, which the front draws when it takes the request."""


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    """Holds what a client asks for. It travels whole, from the client to the sequence that answers it."""

    prompt: Prompt
    max_tokens: Positive | None = None
    """None: as many as the context allows."""
    sampling: Sampling = Sampling()
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    """The request with the highest priority goes first; equal ones go in the order of their arrival."""
    share_prefix: bool = True
    """Whether it may share the keys and values of a prompt with the same beginning."""
    salt: Annotated[str, Meta(max_length=256)] = ""
    """Only requests with the same salt share anything."""
    parse_special: bool = False
    """Whether the text of a special token, such as ``</s>``, in a prompt's text is that token, and not text."""


class Generate(Message):
    """Answer a request, which the client calls ``id`` on this link. `lamina.front.session` receives it."""

    id: Count
    request: Request
    length: Count | None = None
    """The length of the whole prompt, as `length_of` gives it, if it begins here and goes on in `PromptPart` messages.
    On one link, one prompt at a time comes in parts."""


class PromptPart(Message):
    """Holds the next part of the prompt of a request. It is ignored if the request is over, or was refused."""

    id: Count
    part: Prompt


class Cancel(Message):
    """Stop answering a request."""

    id: Count


class Generated(Message):
    """Holds one generated token and the text that it completes, which may be empty."""

    id: Count
    token: Count
    text: str


class Finished(Message):
    """The whole answer has been sent."""

    id: Count
    reason: Literal["stop", "length"]
    prompt_tokens: Count
    text: str
    """Text that was held back until the end."""


class Failed(Message):
    """A request failed, or everything on this link if ``id`` is None. ``kind`` names a class of lamina.errors."""

    kind: str
    message: str
    id: Count | None = None
    node: str | None = None
    retry_after_s: float | None = None
    """Seconds after which the same request may be accepted."""


FromClient = Generate | PromptPart | Cancel | AskStatus
ToClient = Generated | Finished | Failed | Status


def length_of(prompt: Prompt) -> int:
    """Return the number of token ids, or of bytes in UTF-8."""
    return len(prompt.encode()) if isinstance(prompt, str) else len(prompt)


def messages_for(id_: int, request: Request) -> Iterator[Message]:
    """Return the messages that ask for a request: several if its prompt is long."""
    prompt = request.prompt
    if len(prompt) <= PART:
        yield Generate(id=id_, request=request)
        return
    yield Generate(id=id_, request=replace(request, prompt=prompt[:PART]), length=length_of(prompt))
    for start in range(PART, len(prompt), PART):
        yield PromptPart(id=id_, part=prompt[start : start + PART])

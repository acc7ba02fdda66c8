"""Between a client and the front: requests, tokens, and how requests end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import Count, Message, Positive


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are chosen. Temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Generate(Message):
    """A request. ``id`` is the client's; a prompt is text or token ids."""

    id: Count
    prompt: str | list[Count]
    max_tokens: Positive | None = None
    """None: as many as the context allows."""
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """0 is greedy."""
    top_k: Count = 0
    """Only the k likeliest tokens; 0 is all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that together have this probability."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """None: a random one."""
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    """Higher goes first; equal ones in the order of their arrival."""
    share_prefix: bool = True
    """Whether it may share the keys and values of a prompt that begins alike."""
    salt: Annotated[str, Meta(max_length=256)] = ""
    """Only requests with the same salt share anything."""


class Cancel(Message):
    id: Count


class Generated(Message):
    """One generated token and the text that it completes, which may be empty."""

    id: Count
    token: Count
    text: str


class Finished(Message):
    id: Count
    reason: Literal["stop", "length"]
    prompt_tokens: Count
    text: str
    """Text that was held back until the end."""


class Failed(Message):
    """The request, or with ``id`` None everything on this link, failed. ``kind`` names a class of lamina.errors."""

    kind: str
    message: str
    id: Count | None = None
    node: str | None = None
    retry_after_s: float | None = None
    """After so many seconds the same request may be taken."""


FromClient = Generate | Cancel | AskStatus
ToClient = Generated | Finished | Failed | Status

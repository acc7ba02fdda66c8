"""A client and the front exchange these messages: requests, tokens, and how requests end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from lamina.errors import LaminaError
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import Count, Message, Positive

PART = 1 << 14
"""The most token ids or characters of a prompt in one message: far below what a message may have, and few enough that
a loop has taken them in within a millisecond or two."""

Prompt = str | list[Count]
"""Text or token ids."""


class Sampling(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Says how the tokens of a request are chosen. `lamina.compute.sampler` documents the order in which the fields
    take effect, which is that of the `transformers` library where both have them."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """0 is greedy."""
    top_k: Count = 0
    """Only the k likeliest tokens; 0 is all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that together have this probability."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """None: a random one, which the front draws when it takes the request."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Only tokens with at least this part of the probability of the likeliest one."""
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    """Divides the positive logits of tokens of prompt and answer, and multiplies the negative ones. None: what
    generation_config.json of the checkpoint says, else 1, which the front fills in when it takes the request."""
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    """Is subtracted from the logits of the tokens of the answer so far."""
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    """Is subtracted from the logit of a token as often as the answer has it so far."""
    logit_bias: Annotated[dict[Count, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] = {}
    """Is added to the logits of these tokens."""

    @property
    def repetition(self) -> float:
        """Return the repetition penalty, which is 1 where there is none."""
        return 1.0 if self.repetition_penalty is None else self.repetition_penalty


class JsonSchema(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The answer is a JSON text that fits a schema."""

    schema: Annotated[str, Meta(max_length=1 << 18)]
    """The schema as JSON text."""


class JsonObject(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The answer is any JSON object."""


class Regex(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The whole answer matches a regular expression."""

    pattern: Annotated[str, Meta(min_length=1, max_length=1 << 14)]


class OneOf(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The answer is one of these texts."""

    texts: Annotated[list[Annotated[str, Meta(max_length=1 << 14)]], Meta(min_length=1, max_length=1024)]


class Grammar(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The answer fits a context-free grammar, in the Lark dialect."""

    grammar: Annotated[str, Meta(min_length=1, max_length=1 << 18)]
    schemas: Annotated[dict[str, Annotated[str, Meta(max_length=1 << 18)]], Meta(max_length=2048)] = {}
    """Rules that are no part of ``grammar``: by their names, the JSON schemas that what they stand for has to fit."""


Constraint = JsonSchema | JsonObject | Regex | OneOf | Grammar
TRACEPARENT = "^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?$"
"""What the recommendation of the W3C on trace contexts allows in version 00, or nothing."""
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Top = Annotated[int, Meta(ge=0, le=20)]
TICKET = "^[0-9a-f]{32}$"
"""128 random bits, by which a client finds its request again on another link, also at a front that started anew."""


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
    chat: bool = False
    """Whether the prompt is a conversation: the fields of `lamina.chat.request.ChatFields` as JSON text, of which the
    front makes a prompt with the chat template of the checkpoint."""
    parse_special: bool = False
    """Whether the text of a special token, such as ``</s>``, in a prompt's text is that token, and not text."""
    min_tokens: Count = 0
    """The answer has at least so many tokens: nothing stops it earlier."""
    ignore_eos: bool = False
    """Whether the model's end-of-sequence tokens do not end the answer."""
    stop: Annotated[list[Stop], Meta(max_length=16)] = []
    """The answer ends where its text has one of these, of which nothing is given out."""
    stop_token_ids: Annotated[list[Count], Meta(max_length=1024)] = []
    """The answer ends with one of these tokens."""
    include_stop: bool = False
    """Whether the text of the answer includes what stopped it: the text of ``stop``, or that of a token, unless it is a
    special one."""
    bad_words: Annotated[
        list[Stop | Annotated[list[Count], Meta(min_length=1, max_length=256)]], Meta(max_length=256)
    ] = []
    """Texts, or their token ids, that the answer does not have."""
    show_special: bool = False
    """Whether the text of the answer has special tokens, such as ``</s>``."""
    logprobs: Top | None = None
    """Give the logarithm of each token's probability, by the model alone, and so many of the likeliest tokens."""
    prompt_logprobs: Top | None = None
    """The same for the tokens of the prompt, which then shares no keys and values of others."""
    constraint: Constraint | None = None
    """What the answer has to be."""
    name: Annotated[str, Meta(max_length=256)] = ""
    """How logs and traces call the request. One with a name gets a line in the front's log when it ends."""
    traceparent: Annotated[str, Meta(pattern=TRACEPARENT)] = ""
    """The span of the client that the trace of the request hangs on, as in the HTTP header of this name; or nothing."""


class Generate(Message):
    """Answer a request, which the client calls ``id`` on this link. `lamina.front.session` receives it."""

    id: Count
    request: Request
    length: Count | None = None
    """The length of the whole prompt, as `length_of` gives it, if it begins here and goes on in `PromptPart` messages.
    On one link, one prompt at a time comes in parts."""
    ticket: Annotated[str, Meta(pattern=f"{TICKET}|^$")] = ""
    """By this, `Resume` names the request. Without one, the request ends with its link. With one, the answer is kept
    for a while when its link is lost; and when it is over, until the client has sent `Cancel`, as it has all of it."""


class PromptPart(Message):
    """Holds the next part of the prompt of a request. It is ignored if the request is over, or was refused."""

    id: Count
    part: Prompt


class Cancel(Message):
    """Nothing more is wanted of a request: stop answering it, or forget the answer."""

    id: Count


class Resume(Message):
    """Go on with the answer to a request of an earlier link, which is called ``id`` on this one. `Resumed` answers."""

    id: Count
    ticket: Annotated[str, Meta(pattern=TICKET)]
    tokens: Count
    """So many tokens of it have come; the next message has the one behind them."""
    prompt_scores: Count = 0
    """So many scores of tokens of the prompt have come."""


class Score(Struct, frozen=True, array_like=True):
    """Says how likely the model found a token, before any processor."""

    logprob: float
    """The natural logarithm of its probability."""
    rank: Positive
    """1 for the likeliest token, 2 for the next, ..."""
    top: list[tuple[Count, float]]
    """The likeliest tokens in order, with their logarithms."""


class Piece(Struct, frozen=True, array_like=True):
    """Holds one generated token of request ``id``, and the text that it completes, which may be empty."""

    id: Count
    token: Count
    text: str
    score: Score | None = None


class Generated(Message):
    """Holds what one step brought for the requests on this link."""

    pieces: list[Piece]


class ChatForm(Struct, frozen=True, forbid_unknown_fields=True):
    """Says how the answer to a conversation is to be read, as `lamina.chat.reader` does."""

    tools: str
    """The name of the format in which the model calls tools."""
    reasoning: str
    """The name of that in which it shows its reasoning."""
    opened: bool = False
    """Whether the prompt ends with the beginning of reasoning."""
    closed: bool = False
    """Whether no reasoning follows the prompt."""
    hidden: list[str] = []
    """The special tokens in the answer's text that the model does not say."""


class Resumed(Message):
    """The rest of an answer follows; or the request is not ``known``, and nothing does."""

    id: Count
    known: bool = True


class Rendered(Message):
    """The conversation of a request has become a prompt. This comes before anything else of the answer."""

    id: Count
    prompt_tokens: Count
    form: ChatForm


class PromptScored(Message):
    """Holds the scores of the next tokens of a prompt, from its second token on, before any token of the answer."""

    id: Count
    scores: list[Score]


class Finished(Message):
    """The whole answer has been sent. Times are seconds."""

    id: Count
    reason: Literal["stop", "length"]
    text: str
    """Text that was held back until the end."""
    prompt_tokens: Count
    shared_tokens: Count = 0
    """How many tokens of the prompt were found on the memory nodes."""
    stopped_by: str | Count | None = None
    """The text of ``stop`` or the token that ended the answer."""
    queued_s: float = 0.0
    """From the arrival of the request to its admission."""
    prompt_s: float = 0.0
    """From there to the first token."""
    answer_s: float = 0.0
    """From the first token to the last."""


class Failed(Message):
    """A request failed, or everything on this link if ``id`` is None. ``kind`` names a class of lamina.errors."""

    kind: str
    message: str
    id: Count | None = None
    node: str | None = None
    retry_after_s: float | None = None
    """Seconds after which the same request may be accepted."""
    address: Annotated[str, Meta(max_length=512)] = ""
    """Where the front is, if this node is not it."""

    @classmethod
    def of(cls, error: LaminaError, id_: int | None = None) -> Failed:
        """Return an error as it travels."""
        return cls(
            kind=type(error).__name__,
            message=str(error),
            id=id_,
            node=getattr(error, "node", None),
            retry_after_s=getattr(error, "retry_after_s", None),
            address=getattr(error, "address", ""),
        )


FromClient = Generate | PromptPart | Cancel | Resume | AskStatus
ToClient = Generated | Rendered | PromptScored | Finished | Failed | Resumed | Status


def length_of(prompt: Prompt) -> int:
    """Return the number of token ids, or of bytes in UTF-8."""
    return len(prompt.encode()) if isinstance(prompt, str) else len(prompt)


def messages_for(id_: int, request: Request, ticket: str = "") -> Iterator[Message]:
    """Return the messages that ask for a request: several if its prompt is long."""
    prompt = request.prompt
    if len(prompt) <= PART:
        yield Generate(id=id_, request=request, ticket=ticket)
        return
    first = replace(request, prompt=prompt[:PART])
    yield Generate(id=id_, request=first, length=length_of(prompt), ticket=ticket)
    for start in range(PART, len(prompt), PART):
        yield PromptPart(id=id_, part=prompt[start : start + PART])

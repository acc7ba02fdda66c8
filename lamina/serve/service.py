"""What all endpoints of one server share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lamina.chat.chat import Chat
from lamina.errors import HttpError
from lamina.model.tokenizer import LONG_TEXT, Tokenizer
from lamina.runtime.workers import BackgroundWorkers
from lamina.serve import problems
from lamina.serve.exchange import BodyRoom
from lamina.serve.facts import Facts, make_tokenizer
from lamina.serve.front import FrontKeeper
from lamina.serve.gathering import Gathering
from lamina.serve.metrics import Metrics
from lamina.serve.options import ChatOptions
from lamina.serve.token_texts import TokenTexts


@dataclass(frozen=True)
class Model:
    """The checkpoint that is served, once it has been read."""

    facts: Facts
    context: int
    """The most tokens of prompt and answer together."""
    tokenizer: Tokenizer
    texts: TokenTexts
    chat: Chat

    @classmethod
    def make(cls, path: Path, facts: Facts, context: int | None, chat: ChatOptions | None = None) -> Model:
        """Describe the checkpoint at ``path`` with the ``context`` of the cluster, or its own.

        CheckpointError for a tokenizer or a chat template that cannot be read.
        """
        chat = chat or ChatOptions()
        served = context or facts.context
        tokenizer = make_tokenizer(path, facts, served)
        how = Chat.of(tokenizer, chat.read_template(), tools=chat.tools, reasoning=chat.reasoning)
        return cls(facts, served, tokenizer, TokenTexts(tokenizer), how)

    @property
    def recommended(self) -> Mapping[str, float | int]:
        """The sampling that the checkpoint recommends."""
        return self.facts.sampling


@dataclass
class Service:
    """Holds what endpoints need: the front, the model, threads for texts, and counters."""

    front: FrontKeeper
    names: list[str]
    """The names of the model that requests may use; the first is what answers say."""
    max_body: int
    workers: BackgroundWorkers = field(default_factory=BackgroundWorkers)
    metrics: Metrics = field(default_factory=Metrics)
    bodies: BodyRoom = field(init=False)
    """Bounds the bodies of all requests."""
    created: int = field(default_factory=lambda: int(time.time()))
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Is set when the server is to end after its last answer."""
    running: set[Gathering] = field(default_factory=set)
    """The answers that are being written."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Is set while there are none."""
    read: Model | None = None
    failure: str = ""
    """Why the model cannot be served."""
    offline: object | None = None
    """The files and batches, an `lamina.serve.batch.offline.Offline`, which needs this in turn."""
    offline_failure: str = ""
    """Why there are none."""

    def __post_init__(self) -> None:
        self.idle.set()
        self.bodies = BodyRoom(self.max_body)

    @property
    def model(self) -> Model:
        """The model. HttpError while it is being read."""
        if self.read is None:
            raise problems.unavailable(self.failure or "the server is starting; retry in a moment")
        return self.read

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken."""
        return self.read is not None and not self.draining.is_set() and self.front.state == "ready"

    def require_running(self) -> None:
        """Raise HttpError if the server is about to end, and takes no more work."""
        if self.draining.is_set():
            raise problems.unavailable("the server is draining and takes no requests")

    def began(self, gathering: Gathering) -> None:
        """Note that answers are being written."""
        self.running.add(gathering)
        self.idle.clear()

    def ended(self, gathering: Gathering) -> None:
        """Note that they are over."""
        self.running.discard(gathering)
        if not self.running:
            self.idle.set()

    def stop_answers(self) -> None:
        """End all answers with an error, as the server cannot wait for them any longer."""
        for gathering in list(self.running):
            gathering.stop(problems.unavailable("the server was stopped before the answer was complete"))

    def require_name(self, name: str | None) -> str:
        """Return the name that answers have. HttpError for a model that is not served."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            known = ", ".join(map(repr, self.names))
            raise HttpError(
                f"the model {name!r:.200} does not exist here; expected one of {known}",
                status=404,
                kind="not_found_error",
                param="model",
            )
        return name

    async def encode(self, text: str, *, add_special: bool, parse_special: bool = False) -> list[int]:
        """Return the token ids of a text, in a thread. RequestError if it is longer than any context."""
        tokenizer = self.model.tokenizer
        length = len(text.encode())
        tokenizer.require_fit(length)
        return await self.workers.run(tokenizer.encode, text, parse_special, add_special, long=length > LONG_TEXT)

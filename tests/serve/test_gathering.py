"""What a stream does with a reader that is slow, and with a prompt that is long."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from lamina.errors import NodeError, TransportError
from lamina.serve import gathering, generate
from lamina.serve.exchange import Exchange
from lamina.serve.gathering import AnswerEnd, Gathering, NewTokens
from lamina.serve.generate import Job, run
from lamina.serve.service import Service
from lamina.wire.requests import Finished, Piece, Request, Score


class RecordingConnection:
    """Keeps what is asked on it, and answers nothing by itself."""

    def __init__(self) -> None:
        self.inboxes: dict[int, Any] = {}
        self.aborted: list[int] = []

    def ask(self, id_: int, request: Request, inbox: Any) -> None:
        self.inboxes[id_] = inbox

    def leave(self, id_: int) -> None:
        self.inboxes.pop(id_)

    def abort(self, id_: int) -> None:
        self.aborted.append(id_)

    def send(self, id_: int, count: int, score: Score | None = None) -> None:
        for token in range(count):
            self.inboxes[id_].put(Piece(id_, token, f"{token} ", score))


def gathered(connection: RecordingConnection, *prompts: list[int]) -> Gathering:
    return Gathering(connection, itertools.count(1), [Request(prompt) for prompt in prompts])  # type: ignore[arg-type]


def test_unread_tokens_are_joined() -> None:
    """All of them are there, in few events."""

    async def main() -> None:
        connection = RecordingConnection()
        with gathered(connection, [1], [2]) as answers:
            connection.send(1, 10_000)
            connection.send(2, 10_000)
            events = await answers.next()
            connection.send(1, 1)
            more = await answers.next()

        assert len(events) == gathering.LAG + 2
        for index in range(2):
            mine = [event for event in events if isinstance(event, NewTokens) and event.index == index]
            assert [token for event in mine for token in event.tokens] == list(range(10_000))
            assert "".join(event.text for event in mine) == "".join(f"{token} " for token in range(10_000))
        assert [event.index for event in more] == [0]

    asyncio.run(main())


@pytest.mark.parametrize("score", [None, Score(-1.0, 1, [])])
def test_an_answer_that_is_never_read_is_given_up(score: Score | None) -> None:
    """What has come can still be read; then the error comes."""

    async def main() -> None:
        connection = RecordingConnection()
        with gathered(connection, [1]) as answers:
            connection.send(1, gathering.MAX_LAG_TOKENS + 200)
            assert connection.aborted == [1]
            await answers.next()
            with pytest.raises(TransportError, match="too slowly"):
                await answers.next()

    asyncio.run(main())


def test_answers_to_one_long_prompt_wait_for_the_first() -> None:
    """So that they share its keys and values; those to a short one do not wait."""

    async def main() -> None:
        connection = RecordingConnection()
        long, short = list(range(100)), [1, 2]
        with gathered(connection, long, long, long, short, short) as answers:
            assert sorted(connection.inboxes) == [1, 2, 3]
            connection.send(1, 1)
            assert sorted(connection.inboxes) == [1, 2, 3, 4, 5]
            for id_ in (1, 2, 3, 4, 5):
                connection.inboxes[id_].put(Finished(id=id_, reason="stop", text="", prompt_tokens=1))
            events = await answers.next()
            assert answers.left == 0

        assert sorted(event.index for event in events if isinstance(event, AnswerEnd)) == [0, 1, 2, 3, 4]
        assert connection.aborted == []

    asyncio.run(main())


def test_one_failure_ends_all_answers() -> None:
    async def main() -> None:
        connection = RecordingConnection()
        with gathered(connection, [1], [2]) as answers:
            connection.inboxes[1].put(NodeError("it is gone", node="c0"))
            assert connection.aborted == [2]
            with pytest.raises(NodeError, match="it is gone"):
                await answers.next()

    asyncio.run(main())


def test_waiting_ends_after_a_while() -> None:
    """With nothing, so that the writer can send a comment."""

    async def main() -> None:
        with gathered(RecordingConnection(), [1]) as answers:
            assert await answers.next(0.01) == []

    asyncio.run(main())


class _ListeningFront:
    """A front whose link is a `RecordingConnection`."""

    def __init__(self) -> None:
        self.connection = RecordingConnection()
        self.ids = itertools.count(1)
        self.state = "ready"

    def link(self) -> RecordingConnection:
        return self.connection


def test_a_stream_without_news_sends_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status goes out although there is no token, and the comments keep the connection alive."""
    monkeypatch.setattr(generate, "PATIENCE_S", 0.02)
    monkeypatch.setattr(generate, "PING_S", 0.02)

    async def main() -> list[bytes]:
        front, sent = _ListeningFront(), []
        service = Service(front, ["m"], 100)  # type: ignore[arg-type]

        async def send(message: dict[str, Any]) -> None:
            sent.append(message.get("body", b"status"))

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(60)
            return {}

        exchange = Exchange({"headers": [], "lamina.id": "1"}, receive, send, max_body=100)
        choice = _PlainChoice()
        job = Job("a", "b", "1", "m", [Request([1])], [choice], prompt_tokens=1, prompts=1, stream=True)
        running = asyncio.create_task(run(service, exchange, job))
        await asyncio.sleep(0.1)
        front.connection.send(1, 1)
        front.connection.inboxes[1].put(Finished(id=1, reason="stop", text="", prompt_tokens=1))
        await running
        service.workers.close()
        return sent

    status, *comments, tokens, end = asyncio.run(main())

    assert status == b"status"
    assert len(comments) >= 2
    assert set(comments) == {b": ping\n\n"}
    assert tokens.endswith(b"data: [DONE]\n\n")
    assert end == b""


class _PlainChoice:
    """Shows the text of tokens alone."""

    over = False

    def __init__(self) -> None:
        self.prompt_scores: list[Score] = []

    def opening(self) -> list[dict[str, Any]]:
        return []

    def part(self, part: NewTokens) -> list[dict[str, Any]]:
        return [{"text": part.text}]

    def end(self, finished: Finished) -> list[dict[str, Any]]:
        return [{"finish_reason": finished.reason}]

    def take(self, part: NewTokens) -> None:
        """Only streams are written."""

    def whole(self, finished: Finished) -> dict[str, Any]:
        return {}

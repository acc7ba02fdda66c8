"""Questions on a link: every one of them ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lamina.errors import NodeError, ProtocolError
from lamina.transport import Address, Hello, Link, Listener, Options, connect
from lamina.wire.admin import AskStatus, Status
from lamina.wire.codec import Message, decode, encode
from lamina.wire.questions import Questions
from lamina.wire.tenants import Reserve, Reserved

LOST = NodeError.lost("memory", "m0", "it is gone")


class _Echoing:
    """A node that answers each Reserve with as many shared positions as it asks tokens; a Status question never."""

    def __init__(self) -> None:
        self.links: list[Link] = []

    def take(self, link: Link) -> None:
        self.links.append(link)

        def on_message(plain: dict[str, Any]) -> None:
            message = decode(plain, Reserve | AskStatus)
            if isinstance(message, Reserve):
                link.send(encode(Reserved(sequence=message.sequence, shared=message.tokens)))

        link.deliver(on_message=on_message)


def _run(work: Any) -> None:
    """Run ``work(questions, link, node)`` over a real link."""

    async def main() -> None:
        node, options = _Echoing(), Options(kind="tcp")
        async with await Listener.open(
            Address.parse("127.0.0.1:0"), Hello("memory", "m0"), node.take, options
        ) as listener:
            link = await connect(listener.address, Hello("compute", "c0"), options, deadline_s=5)
            questions = Questions(link)

            def on_message(plain: dict[str, Any]) -> None:
                message: Message = decode(plain, Reserved | Status)
                assert questions.answer(message, getattr(message, "sequence", None))

            link.deliver(on_message=on_message, on_lost=lambda error: questions.fail(LOST))
            try:
                await asyncio.wait_for(work(questions, link, node), 10)
            finally:
                await link.close()

    asyncio.run(main())


def test_answers_go_to_their_questions() -> None:
    """By key, and among questions of one key in the order in which they were asked."""

    async def work(questions: Questions, link: Link, node: _Echoing) -> None:
        asked = [Reserve(sequence=i % 3, tokens=i + 1) for i in range(30)]
        answers = await asyncio.gather(*(questions.ask(message, message.sequence) for message in asked))
        assert [answer.shared for answer in answers] == [message.tokens for message in asked]

    _run(work)


def test_a_lost_link_fails_every_question_and_all_that_come_later() -> None:
    """Whether it was asked before or after the peer is gone."""

    async def work(questions: Questions, link: Link, node: _Echoing) -> None:
        waiting = [asyncio.ensure_future(questions.ask(AskStatus(), key)) for key in (None, 1, 1)]
        expected = questions.expect("unasked")
        await asyncio.sleep(0.05)
        node.links[0].abort("killed")
        for each in (*waiting, expected):
            with pytest.raises(NodeError, match="memory node m0 was lost: it is gone"):
                await each
        with pytest.raises(NodeError, match="it is gone"):
            await questions.ask(AskStatus())

    _run(work)


def test_a_question_whose_asker_gave_up_keeps_its_place() -> None:
    """Its answer is dropped, and does not go to the next question with the same key."""

    async def work(questions: Questions, link: Link, node: _Echoing) -> None:
        first = asyncio.ensure_future(questions.ask(Reserve(sequence=1, tokens=5), 1))
        second = asyncio.ensure_future(questions.ask(Reserve(sequence=1, tokens=6), 1))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).shared == 6

    _run(work)


def test_a_message_that_cannot_be_sent_leaves_no_question_behind() -> None:
    """The asker gets the error, and the next question with the same key its own answer."""

    async def work(questions: Questions, link: Link, node: _Echoing) -> None:
        with pytest.raises(ProtocolError):
            await questions.ask(Reserve(sequence=1, tokens=1, keys=bytes(2**21)), 1)
        assert (await questions.ask(Reserve(sequence=1, tokens=9), 1)).shared == 9

    _run(work)


def test_an_answer_without_a_question_is_told_apart() -> None:
    """So that its receiver can refuse it."""

    async def work(questions: Questions, link: Link, node: _Echoing) -> None:
        assert not questions.answer(Reserved(sequence=4), 4)
        assert not questions.refuse(LOST, 4)

    _run(work)

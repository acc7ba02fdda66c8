"""What programs get from the Python client: where answers end, many of them, deadlines, and a front that comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from lamina.client import AsyncClient, AsyncStream, Completion, Token
from lamina.config import PipelineConfig, RecoveryConfig
from lamina.demo.run import CHECKPOINT as DEMO
from lamina.errors import DeadlineError, LaminaError, NodeError, RequestError, TransportError, UsageError
from lamina.front.answers import AnswerKeeper
from lamina.front.session import ClientSession
from lamina.model.tokenizer import Tokenizer
from lamina.runtime.workers import BackgroundWorkers
from lamina.sim.cluster import SimCluster
from lamina.sim.world import World
from lamina.transport import Address, Hello, Link, Options
from lamina.wire.codec import decode, encode
from lamina.wire.requests import Finished, Generate, Generated, Piece, Request, ToClient
from tests.sim.clusters import LINK, eventually, make_config, simulate

PROMPT = "Once upon a time"
PLACE = Address("tcp", "127.0.0.1", 7000)
OPTIONS = Options(kind="control")
PIPELINE = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, max_waiting=16)


def ask(model: Any, work: Callable[[AsyncClient], Awaitable[None]]) -> None:
    """Run ``work`` with a client of a cluster. Then no KV cache may be left in use on any node."""

    async def with_client(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            await work(client)

    simulate(make_config(model, pipeline=PIPELINE), with_client)


async def collect(stream: AsyncStream, tokens: list[Token]) -> None:
    async for token in stream:
        tokens.append(token)


# -- what travels


def test_a_step_is_one_message() -> None:
    """However many requests of a client it answers; each ends behind its last token."""
    config = make_config(pipeline=PipelineConfig(batches=1, max_batch=64))
    count, length = 50, 8

    async def work(cluster: SimCluster) -> None:
        network, messages = cluster.world.network, []
        link = await network.connect(config.front.address, Hello("client", "raw"), config.options(), deadline_s=1)
        link.deliver(on_message=lambda plain: messages.append(decode(plain, ToClient)))
        for id_ in range(count):
            link.send(encode(Generate(id=id_, request=Request([1], length))))
        await eventually(lambda: asyncio.sleep(0, sum(isinstance(m, Finished) for m in messages) == count))
        left = dict.fromkeys(range(count), length)
        for message in messages:
            if isinstance(message, Finished):
                assert left.pop(message.id) == 0
            else:
                assert isinstance(message, Generated)
                for piece in message.pieces:
                    left[piece.id] -= 1
        assert not left
        assert sum(isinstance(m, Generated) for m in messages) < 3 * length
        await link.close()

    simulate(config, work)


def test_what_one_message_cannot_hold_comes_in_several() -> None:
    """Pieces of many answers with long texts, which stop strings held back: all of them, in order."""
    pieces = [Piece(id_, 7, "\U0001f600" * 1024) for id_ in range(600)]

    async def work(world: World) -> None:
        links: list[Link] = []
        await world.network.listen(PLACE, Hello("compute", "c0"), links.append, OPTIONS)
        client = await world.network.connect(PLACE, Hello("client", "raw"), OPTIONS, deadline_s=1)
        messages: list[Generated] = []
        client.deliver(on_message=lambda plain: messages.append(decode(plain, ToClient)))
        await eventually(lambda: asyncio.sleep(0, links))
        session = ClientSession(links[0], BackgroundWorkers(), AnswerKeeper("c0", 0.0), *[pytest.fail] * 3)
        session._send_pieces(pieces)
        await eventually(lambda: asyncio.sleep(0, sum(len(m.pieces) for m in messages) == len(pieces)))
        assert [piece for message in messages for piece in message.pieces] == pieces
        assert 2 < len(messages) < 9
        client.abort("done")

    with World(1, model=LINK, tracing=False) as world:
        world.run(work(world))


def test_a_checkpoint_without_a_template_cannot_chat() -> None:
    """The error says what to do, and the next request is answered."""

    async def work(client: AsyncClient) -> None:
        with pytest.raises(RequestError, match=r"no chat template; .* add a chat_template\.jinja to the checkpoint"):
            await client.chat([{"role": "user", "content": PROMPT}])
        assert (await client.generate(PROMPT, max_tokens=2)).tokens

    ask(DEMO, work)


# -- where an answer ends


def test_stop_strings_end_an_answer_and_its_request() -> None:
    """Nothing of them is seen unless it is asked for, and nothing behind them; the first one counts, wherever tokens
    are cut."""
    limit = 30

    async def work(client: AsyncClient) -> None:
        async def idle() -> bool:
            return (await client.status()).requests_running == 0

        whole = await client.generate(PROMPT, max_tokens=limit)
        assert (whole.stopped_by, whole.finish_reason) == (None, "length")
        for start, end, include in ((10, 11, False), (17, 24, True), (24, 60, False)):
            stop = whole.text[start:end]
            at = whole.text.index(stop)
            stops = [whole.text[at + 8 : end + 10], stop, "nowhere"]
            stream = client.stream(PROMPT, max_tokens=limit, stop=stops, include_stop=include)
            answer = await stream.completion()
            assert answer.text == whole.text[: at + len(stop) if include else at]
            assert (answer.finish_reason, answer.stopped_by) == ("stop", stop)
            assert answer.tokens == whole.tokens[: len(answer.tokens)]
            assert len(answer.tokens) < limit
            assert answer.timings.prompt_s > 0
            assert answer.timings.answer_s > 0
            await eventually(idle, 0.1)
        untouched = await client.generate(PROMPT, max_tokens=limit, stop=[whole.text[-6:] + "x", "nowhere"])
        assert untouched == whole

    ask(DEMO, work)


def test_stop_strings_count_from_min_tokens_on() -> None:
    """An earlier one is text like any other."""

    async def work(client: AsyncClient) -> None:
        whole = await client.generate(PROMPT, max_tokens=30)
        stop = " "
        for least in (1, 5, 20):
            answer = await client.generate(PROMPT, max_tokens=30, stop=stop, min_tokens=least)
            assert len(answer.tokens) >= least
            assert whole.text.startswith(answer.text + stop)
            assert answer.text.count(stop) >= (least > 5)

    ask(DEMO, work)


def test_words_that_are_banned_are_not_in_an_answer() -> None:
    """Without a tokenizer they are refused, and so is what needs the text of an answer."""

    async def work(client: AsyncClient) -> None:
        whole = await client.generate(PROMPT, max_tokens=12)
        word = whole.text.split()[2]
        other = await client.generate(PROMPT, max_tokens=12, bad_words=[word])
        by_ids = await client.generate(PROMPT, max_tokens=12, bad_words=Tokenizer(DEMO, 2048).spellings(word))
        assert f" {word}" in whole.text
        assert f" {word}" not in other.text
        assert by_ids == other
        with pytest.raises(RequestError, match=r"the settings of this request are too long: .* 1048576 are allowed"):
            await client.generate(PROMPT, bad_words=["\U0001f600" * 1024] * 256)

    ask(DEMO, work)

    async def without(client: AsyncClient) -> None:
        for settings in ({"stop": "a"}, {"show_special": True}, {"bad_words": ["a"]}):
            with pytest.raises(RequestError, match=f"^{next(iter(settings))}: .* so answers have no text"):
                await client.generate([1], **settings)

    ask("empty", without)


def test_special_tokens_are_seen_if_asked_for() -> None:
    """The end of a story, which stops it, but not before it has its fewest tokens."""
    end = Tokenizer(DEMO, 2048).encode("</s>", parse_special=True)[-1]

    async def work(client: AsyncClient) -> None:
        hidden, seen = [
            await client.generate(PROMPT, show_special=show, logit_bias={end: 100.0}, min_tokens=5)
            for show in (False, True)
        ]
        assert hidden.finish_reason == "stop"
        assert hidden.tokens[-1] == hidden.stopped_by == end
        assert len(hidden.tokens) >= 5
        assert hidden.tokens == seen.tokens
        assert seen.text == hidden.text + "</s>"

    ask(DEMO, work)


# -- many answers


def test_many_prompts_are_answered_in_order() -> None:
    """A bounded number at a time, also more than the queue takes; one that fails harms no other, and prompts are read
    as they are needed."""
    read = 0

    def prompts() -> Iterator[list[int]]:
        nonlocal read
        for read in range(1, 101):
            yield [1] * (read % 7) if read != 50 else [10**6]

    async def work(client: AsyncClient) -> None:
        number = 0
        async for answer in client.generate_many(prompts(), concurrency=40, max_tokens=4):
            number += 1
            if number % 7 == 0:
                assert isinstance(answer, RequestError)
                assert "the prompt is empty" in str(answer)
            elif number == 50:
                assert "token 1000000" in str(answer)
            else:
                assert isinstance(answer, Completion)
                assert answer.prompt_tokens == number % 7
        assert number == 100

        answers = client.generate_many(([1, 2] for _ in iter(int, 1)), concurrency=2, max_tokens=2)  # without an end
        assert isinstance(await anext(answers), Completion)
        await asyncio.sleep(1)
        await answers.aclose()

        for wrong, settings, message in (
            ([[1]], {"temprature": 1.0}, "unknown setting 'temprature'"),
            ([[1]], {"concurrency": 0}, "concurrency: expected int >= 1, got 0"),
            ("text", {}, "prompts: expected several prompts, got str"),
        ):
            with pytest.raises(RequestError, match=message):
                client.generate_many(wrong, **settings)

        def failing() -> Iterator[list[int]]:
            yield [1]
            raise ValueError("no more prompts")

        answers = client.generate_many(failing(), max_tokens=1)
        assert isinstance(await anext(answers), Completion)
        with pytest.raises(ValueError, match="no more prompts"):
            await anext(answers)

    ask("empty", work)
    assert read == 100


def test_one_prompt_may_have_several_answers() -> None:
    """They share its keys and values, and have the seeds from the given one on."""
    prompt = "Once upon a time there was a little girl named Lily. She loved to play outside in the park. " * 2

    async def work(client: AsyncClient) -> None:
        settings = {"temperature": 1.0, "max_tokens": 12}
        streams = await client.branches(prompt, 3, seed=7, **settings)
        answers = await asyncio.gather(*(stream.completion() for stream in streams))
        alone = [await client.generate(prompt, seed=seed, **settings) for seed in (7, 8, 9)]
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
        assert len({answer.text for answer in answers}) == 3
        assert answers[0].shared_tokens == 0
        assert min(answer.shared_tokens for answer in answers[1:]) >= 16

        first, *others = await client.branches(prompt, 3, **settings)
        await first.aclose()  # the others begin all the same
        assert [len((await other.completion()).tokens) for other in others] == [12, 12]
        with pytest.raises(RequestError, match="n: expected int >= 1, got 0"):
            await client.branches(prompt, 0)

    ask(DEMO, work)


# -- deadlines, and what is lost


def test_a_request_ends_at_its_deadline() -> None:
    """With an error, and on every node; the tokens that came before can be read."""

    async def work(client: AsyncClient) -> None:
        begun = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineError, match=r"was not complete within 0\.02 s"):
            await client.generate([1, 2, 3], max_tokens=400, deadline_s=0.02)
        assert asyncio.get_running_loop().time() - begun == pytest.approx(0.02)
        await asyncio.sleep(0.005)
        assert (await client.status()).requests_running == 0

        stream = client.stream([1, 2, 3], max_tokens=400, deadline_s=0.02)
        await anext(stream)
        await asyncio.sleep(0.1)
        read: list[Token] = []
        with pytest.raises(DeadlineError):
            await collect(stream, read)
        assert 0 < len(read) < 400
        with pytest.raises(DeadlineError):
            await anext(stream)
        assert len((await client.generate([1], max_tokens=4, deadline_s=5.0)).tokens) == 4

    ask("empty", work)


def test_a_stream_has_one_reader() -> None:
    """A second one is told so, and the first goes on."""

    async def work(client: AsyncClient) -> None:
        stream = client.stream([1], max_tokens=30)
        await anext(stream)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(UsageError, match="another task reads this stream"):
            await anext(stream)
        await first
        assert len([token async for token in stream]) == 28

    ask("empty", work)


def test_a_front_that_starts_again_is_found_again() -> None:
    """Where nothing is kept, requests that ran have failed; the next one connects anew, all at the same time on one
    connection."""
    config = make_config(pipeline=PIPELINE, recovery=RecoveryConfig(lease=0))

    async def work(cluster: SimCluster) -> None:
        async with cluster.client(reconnect_s=0) as client:
            running = asyncio.create_task(client.generate([1], max_tokens=400))
            await asyncio.sleep(0.01)
            cluster.kill("c0")
            with pytest.raises(NodeError, match="compute node c0 was lost"):
                await running
            assert not client.closed
            await cluster.start("c0")
            await cluster.ready()
            answers = await asyncio.gather(*(client.generate([i], max_tokens=3) for i in range(8)))
            assert [len(answer.tokens) for answer in answers] == [3] * 8
            assert (await client.status()).requests_running == 0

            cluster.kill("c0")
            await asyncio.sleep(0.01)
            waiting = asyncio.create_task(client.generate([1]))
            with pytest.raises(DeadlineError):
                await client.generate([1], deadline_s=0.5)
            await asyncio.sleep(1)
            await client.close()
            for lost in (waiting, client.generate([1])):
                with pytest.raises(LaminaError) as caught:
                    await lost
            assert isinstance(caught.value, TransportError)
            assert str(caught.value) == "the client is closed"
            assert client.closed
        await cluster.start("c0")
        await cluster.ready()

    simulate(config, work)

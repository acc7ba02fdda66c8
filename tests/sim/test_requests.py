"""What clients can ask of a cluster, and what happens when they leave or ask for the impossible."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lamina.client import AsyncClient, Completion
from lamina.config import PipelineConfig
from lamina.demo.run import CHECKPOINT as DEMO
from lamina.errors import CapacityError, LaminaError, NodeError, NotFrontError, RequestError
from lamina.front.intake import End
from lamina.model.tokenizer import Tokenizer
from lamina.node.compute import ComputeNode
from lamina.sim.cluster import SimCluster
from lamina.transport import Hello
from lamina.wire.admin import AskStatus
from lamina.wire.codec import Message, encode
from lamina.wire.requests import PART, Cancel, Generate, PromptPart, Request, Sampling
from tests.families import FAMILIES, MAX_CONTEXT, VOCABULARY
from tests.oracle import Agreement, Oracle
from tests.sim.answers import Recorded, submit
from tests.sim.clusters import (
    eventually,
    is_idle,
    make_config,
    settled,
    simulate,
    statuses,
    whole_blocks,
)

SEED = 11
MANY = 10_000


def ask(llama: Path | str, work: Callable[[AsyncClient], Awaitable[None]]) -> None:
    """Run ``work`` with a client of a cluster with two batches in flight, and prompts in chunks shorter than they are.
    Then no KV cache may be left in use on any node."""
    pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, max_waiting=16)

    async def with_client(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            await work(client)

    simulate(make_config(llama, memory=2 << 20, pipeline=pipeline), with_client)


def prompts(count: int, longest: int = 120) -> list[list[int]]:
    chosen = random.Random(SEED)
    return [[chosen.randrange(VOCABULARY) for _ in range(chosen.randint(1, longest))] for _ in range(count)]


def test_more_requests_than_a_batch_holds(llama: Path, oracle: Oracle, agreement: Agreement) -> None:
    """Continuous admission over two batches in flight, prompts in chunks among decoding: all answers are right."""

    async def work(client: AsyncClient) -> None:
        asked = prompts(12)
        answers = await asyncio.gather(*(client.generate(p, max_tokens=5 + i) for i, p in enumerate(asked)))
        for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            assert (len(answer.tokens), answer.finish_reason) == (5 + i, "length")
            assert answer.prompt_tokens == len(prompt)
            agreement.check(oracle, prompt, answer.tokens, f"request {i}")

    ask(llama, work)


def test_sampling_depends_on_seed_and_position_alone(llama: Path) -> None:
    """Alone or among others, a seeded request gets the same tokens; another seed gives others."""

    async def work(client: AsyncClient) -> None:
        settings = {"max_tokens": 20, "temperature": 1.2, "top_k": 50, "top_p": 0.95}
        prompt, *others = prompts(7, longest=30)
        alone = await client.generate(prompt, seed=3, **settings)
        together, other, *_ = await asyncio.gather(
            client.generate(prompt, seed=3, **settings),
            client.generate(prompt, seed=4, **settings),
            *(client.generate(p, seed=5, **settings) for p in others),
        )
        assert together.tokens == alone.tokens
        assert other.tokens != alone.tokens
        greedy = await client.generate(prompt, max_tokens=20)
        first_only = await client.generate(prompt, seed=9, **{**settings, "top_k": 1})
        assert first_only.tokens == greedy.tokens

    ask(llama, work)


def test_leaving_the_iterator_aborts() -> None:
    """By break, by closing and by cancellation; the KV cache is free again on every node."""

    async def work(client: AsyncClient) -> None:
        prompt = [1, 2, 3]
        async for _ in client.stream(prompt, max_tokens=300):
            break
        async with client.stream(prompt, max_tokens=300) as stream:
            await anext(stream)
        task = asyncio.create_task(client.generate(prompt, max_tokens=300))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)
        assert (await client.status()).requests_running == 0

    ask("empty", work)


def test_an_answer_that_has_failed_fails_again() -> None:
    """Every further attempt to read raises the same error; none waits for a token that cannot come."""

    async def work(client: AsyncClient) -> None:
        stream = client.stream([1] * 5000, max_tokens=1)
        with pytest.raises(RequestError, match="the prompt has 5000 tokens") as first:
            await anext(stream)
        for _ in range(2):
            with pytest.raises(RequestError) as again:
                await asyncio.wait_for(anext(stream), 60)
            assert again.value is first.value

    ask("empty", work)


def test_an_answer_that_cannot_be_completed_harms_no_other() -> None:
    """It fails alone; the others of its step end in order, and all space is free again."""

    async def work(cluster: SimCluster) -> None:
        front = cluster.nodes["c0"]
        assert isinstance(front, ComputeNode)
        answers = [Recorded(breaks=i == 0) for i in range(3)]
        for i, answer in enumerate(answers):
            await front.intake().submit(Request([i], 5, Sampling(seed=0)), [i], answer)
        ends = await asyncio.gather(*(answer.end for answer in answers))
        assert str(ends[0]) == "compute node c0 failed: ValueError('no such character')"
        assert [end.reason for end in ends[1:] if isinstance(end, End)] == ["length", "length"]
        assert all(len(answer.tokens) == 5 for answer in answers)

    simulate(make_config(pipeline=PipelineConfig(batches=1)), work)


def test_giving_up_on_a_status_harms_no_request() -> None:
    """Its answer comes when it is not awaited any more."""

    async def work(client: AsyncClient) -> None:
        stream = client.stream([1, 2, 3], max_tokens=20)
        await anext(stream)
        asked = asyncio.create_task(client.status())
        await asyncio.sleep(0)
        asked.cancel()
        assert len([token async for token in stream]) == 19

    ask("empty", work)


def test_cancelling_at_any_moment_harms_no_other(llama: Path, oracle: Oracle, agreement: Agreement) -> None:
    """While waiting, in mid-prompt and in mid-answer; the others' tokens stay right."""

    async def work(client: AsyncClient) -> None:
        chosen = random.Random(SEED)
        asked = prompts(14)

        async def one(i: int) -> None:
            if i % 2:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.generate(asked[i], max_tokens=300), 0.05 * chosen.random())
            else:
                answer = await client.generate(asked[i], max_tokens=12)
                agreement.check(oracle, asked[i], answer.tokens, f"request {i}")

        await asyncio.gather(*(one(i) for i in range(len(asked))))

    ask(llama, work)


@pytest.mark.parametrize("leaves", ["killed", "cut off", "frozen"])
def test_a_client_that_is_lost_frees_its_requests(leaves: str) -> None:
    """No goodbye is needed; one that is silent is forgiven for a while."""

    async def work(cluster: SimCluster) -> None:
        network = cluster.world.network
        async with cluster.client() as client:
            asked = [asyncio.create_task(client.generate([i], max_tokens=400)) for i in range(6)]
            await asyncio.sleep(0.02)
            assert (await client.status()).requests_running == 6
            if leaves == "killed":
                network.kill("client")
            elif leaves == "frozen":
                network.freeze("client")
            else:
                network.cut("client", "c0")
            await eventually(lambda: is_idle(cluster), 60)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            network.thaw("client")
            network.mend("client", "c0")
        async with cluster.client() as client:
            assert len((await client.generate([1], max_tokens=2)).tokens) == 2

    simulate(make_config(pipeline=PipelineConfig(batches=2, prefill_tokens=24)), work)


IMPOSSIBLE: list[tuple[list[int] | str, dict[str, Any], str]] = [
    ([], {}, "the prompt is empty"),
    ([1] * MAX_CONTEXT, {}, f"the prompt has {MAX_CONTEXT} tokens, the context is {MAX_CONTEXT}"),
    ([1, 2], {"max_tokens": MAX_CONTEXT}, f"ask for at most {MAX_CONTEXT - 2}"),
    ([1, VOCABULARY], {}, f"token {VOCABULARY} at position 1"),
    ("text", {}, "no tokenizer.json"),
    ("a" * 2**21, {}, "no tokenizer.json"),
    ("a\ud800", {}, "prompt: '\\ud800' at position 1 is half of a surrogate pair and no character"),
    ([1] * 2**21, {}, f"the prompt has {2**21} tokens, the context is {MAX_CONTEXT}"),
    ([1], {"temprature": 1.0}, "unknown setting 'temprature'; did you mean 'temperature'?"),
    ([1], {"temperature": -1.0}, "temperature: expected float >= 0"),
    ([1], {"top_p": 1.5}, "top_p: expected float <= 1"),
    ([1], {"max_tokens": 0}, "max_tokens: expected int >= 1"),
    ([1], {"seed": -1}, "seed: expected int >= 0"),
    ([-1], {}, "prompt[0]: expected int >= 0, got -1"),
]


def test_an_impossible_request_is_refused_alone(llama: Path) -> None:
    """A sentence says what is wrong, while another request on the same connection goes on."""

    async def work(client: AsyncClient) -> None:
        for prompt, settings, message in IMPOSSIBLE:
            good = asyncio.create_task(client.generate([1, 2, 3], max_tokens=10))
            with pytest.raises(RequestError) as caught:
                await client.generate(prompt, **settings)
            assert message in str(caught.value)
            assert len((await good).tokens) == 10

    ask(llama, work)


def test_whatever_fits_the_context_can_be_sent() -> None:
    """Also where one message could not hold it, to the last token id; one more is refused."""
    context, vocabulary = 1 << 18, 1 << 18
    pipeline = PipelineConfig(max_batch=1, prefill_tokens=16)
    longest = [vocabulary - 1 - i % 1000 for i in range(context - 1)]

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            asked = asyncio.create_task(client.generate(longest))

            async def is_prefilled() -> bool:
                return (await client.status()).prompt_tokens == len(longest)

            await eventually(is_prefilled)
            asked.cancel()  # it would take a while
            with pytest.raises(RequestError, match=f"the prompt has {context} tokens, the context is {context}"):
                await client.generate([*longest, 1])

    simulate(make_config(memory=64 << 20, pipeline=pipeline), work, context=context, vocabulary=vocabulary)


def test_a_long_text_comes_whole() -> None:
    """In several messages, cut between any two characters; its tokens are those of the whole text."""
    tokenizer = Tokenizer(DEMO, 2048)
    words = sorted(tokenizer._library.get_vocab(), key=len)[-1].replace("Ġ", " ") * 1500
    text = f"há muito {words} 很久以前 {words[:5000]}"
    assert len(text) > PART

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            tokens = tokenizer.encode(text)
            by_text, by_tokens = [await client.generate(prompt, max_tokens=4) for prompt in (text, tokens)]
            assert by_text.prompt_tokens == len(tokens)
            assert by_text == by_tokens

    simulate(make_config(DEMO), work)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    """A client that breaks off, sends more than it said, or mixes text and token ids: each request fails alone."""
    config = make_config()

    async def work(cluster: SimCluster) -> None:
        failures: dict[int | None, str] = {}
        network = cluster.world.network
        link = await network.connect(config.front.address, Hello("client", "raw"), config.options(), deadline_s=1)
        link.deliver(on_message=lambda plain: failures.__setitem__(plain.get("id"), plain.get("message", "")))
        messages: list[Message] = [
            Generate(id=1, request=Request([1, 2], 1), length=3),
            PromptPart(id=1, part=[3, 4]),
            PromptPart(id=1, part=[5]),  # too late, and ignored
            Generate(id=2, request=Request([1, 2], 1), length=3),
            PromptPart(id=2, part="text"),
            Generate(id=3, request=Request([1, 2], 1), length=10_000),
            PromptPart(id=3, part=[3]),
            Generate(id=4, request=Request([1, 2], 1), length=4),
            Generate(id=5, request=Request([1, 2], 1), length=3),
            Cancel(id=4),
            PromptPart(id=4, part=[3, 4]),
            Generate(id=6, request=Request([1], 1), length=3),
            PromptPart(id=6, part=[2]),
            PromptPart(id=6, part=[3]),
        ]
        for message in messages:
            link.send(encode(message))
        await eventually(lambda: asyncio.sleep(0, 6 in failures))
        assert failures == {
            1: "the prompt is longer than announced: 4 instead of 3",
            2: "the parts of a prompt must be all text, or all token ids",
            3: "the prompt has 10000 tokens, the context is 512 and must leave room for an answer; use at most 511",
            5: "the prompt of request 4 is still coming on this connection; wait",
            6: "",  # finished
            None: "",  # its token
        }
        await link.close()

    simulate(config, work)


@pytest.mark.parametrize("compute", [(None,), (range(2), range(2, 4))])
def test_a_request_whose_logits_are_no_numbers_fails_alone(
    compute: Sequence[range | None], tmp_path: Path, oracle: Oracle, agreement: Agreement
) -> None:
    """The others of its batch get what they should, and so do those that get its space later; wherever the last slice
    runs."""
    asked, later = prompts(6), [1, 2, 3]
    seen = {token for prompt in [*asked, later] for token in [*prompt, *oracle.greedy(prompt, 6)]}
    poison = min(set(range(VOCABULARY)) - seen)
    model = FAMILIES["llama"].model()
    with torch.no_grad():
        cast("torch.nn.Embedding", model.get_input_embeddings()).weight[poison] = math.nan
    model.save_pretrained(tmp_path)

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            await with_client(client)
        unscored = await submit(cluster, [1, poison, *range(2, 60)], max_tokens=5, prompt_logprobs=1)
        with pytest.raises(NodeError, match="are not finite numbers"):
            await unscored.ended()
        assert not any(math.isnan(score.logprob) for score in unscored.prompt_scores)

    async def with_client(client: AsyncClient) -> None:
        for temperature in (0.0, 1.0):
            good = [asyncio.create_task(client.generate(prompt, max_tokens=6)) for prompt in asked]
            with pytest.raises(NodeError, match="logits for position 3 are not finite numbers") as caught:
                await client.generate([1, poison, 2], temperature=temperature)
            assert caught.value.node == "c0"
            for prompt, answer in zip(asked, await asyncio.gather(*good), strict=True):
                agreement.check(oracle, prompt, answer.tokens, "among others")
        again = await client.generate(later, max_tokens=6)
        agreement.check(oracle, later, again.tokens, "afterwards")

    simulate(make_config(tmp_path, compute=compute, pipeline=PipelineConfig(prefill_tokens=24)), work)


def test_a_client_that_leaves_is_no_cause_for_alarm(caplog: pytest.LogCaptureFixture) -> None:
    """One that says goodbye is logged, and nothing is warned of."""
    caplog.set_level(logging.INFO, "lamina")

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            await client.generate([1], max_tokens=2)
        caplog.clear()
        async with cluster.client() as client:
            await client.status()
        await asyncio.sleep(1)
        assert "event=link_closed" in caplog.text
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []

    simulate(make_config(), work)


def test_a_client_after_its_end() -> None:
    """Says so, and does not wait."""

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            pass
        with pytest.raises(LaminaError, match="closed"):
            await client.generate([1])

    simulate(make_config(), work)


def test_other_nodes_send_clients_away() -> None:
    """A memory node, and a compute node that is not the front; both instead of leaving them to wait."""
    config = make_config(compute=(None, None))

    async def refusal(cluster: SimCluster, name: str) -> str:
        address, hello = config.find(name).address, Hello("client", "astray")
        client = AsyncClient(await cluster.world.network.connect(address, hello, config.options(), deadline_s=1))
        with pytest.raises((RequestError, NotFrontError)) as refused:
            await client.generate([1])
        await client.close()
        return str(refused.value)

    async def work(cluster: SimCluster) -> None:
        assert await refusal(cluster, "m0") == "m0 is a memory node; clients talk to the compute node"
        assert await refusal(cluster, "c1") == f"c1 is not the front; clients talk to c0 at {config.front.address}"

    simulate(config, work)


# -- what is kept for clients is bounded


async def ask_for_one(client: AsyncClient, i: int, text: str = "") -> str:
    """How one of many small requests ends."""
    try:
        return (await client.generate(text or [1 + i % 50], max_tokens=1)).finish_reason
    except CapacityError as e:
        hint = "" if (e.retry_after_s or 0) >= 1 else ", and no hint"
        return str(e).split(";")[0] + hint


def test_ten_thousand_requests_are_refused_beyond_the_limit() -> None:
    """At once, each with a hint when to ask again; a request that is being answered goes on, and a later one is
    taken."""
    config = make_config(pipeline=PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, max_waiting=64))

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client, cluster.client() as flooding:
            stream = client.stream([1, 2, 3], max_tokens=200)
            await anext(stream)
            asked = [asyncio.create_task(ask_for_one(flooding, i)) for i in range(MANY)]
            await asyncio.sleep(0.01)
            assert (await client.status()).requests_waiting <= 64
            ends = Counter(await asyncio.gather(*asked))
            assert set(ends) == {"length", "64 requests are waiting already, the limit is 64"}
            assert 64 <= ends["length"] < MANY
            assert len([token async for token in stream]) == 199
            assert await ask_for_one(client, 0) == "length"

    simulate(config, work)


def test_texts_that_become_tokens_count_as_waiting() -> None:
    """They are refused before that, beyond the limit; those that were taken are answered."""
    pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=24, max_waiting=16)

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            ends = Counter(await asyncio.gather(*(ask_for_one(client, i, "Once upon a time") for i in range(500))))
            assert set(ends) == {"length", "16 requests are waiting already, the limit is 16"}
            assert ends["length"] >= 16
            assert await ask_for_one(client, 0, "The end") == "length"

    simulate(make_config(DEMO, pipeline=pipeline), work)


def test_a_full_queue_refuses() -> None:
    """The limit is told; what was taken is answered."""

    async def work(client: AsyncClient) -> None:
        asked = [asyncio.create_task(client.generate([1, 2], max_tokens=30)) for _ in range(40)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        refused = [a for a in answers if isinstance(a, CapacityError)]
        assert refused
        assert "the limit is 16; retry in " in str(refused[0])
        assert (refused[0].retry_after_s or 0) >= 1
        assert all(len(a.tokens) == 30 for a in answers if isinstance(a, Completion))
        assert len(refused) < len(answers)

    ask("empty", work)


def test_a_client_that_stops_reading_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """When it has left some megabytes unread: its requests are cancelled, and another client's go on."""
    config = make_config(pipeline=PipelineConfig(batches=2, max_batch=8, prefill_tokens=24))

    async def work(cluster: SimCluster) -> None:
        network = cluster.world.network
        async with cluster.client() as client:
            stream = client.stream([1, 2, 3], max_tokens=400)
            await anext(stream)
            deaf = await network.connect(config.front.address, Hello("client", "deaf"), config.options(), deadline_s=1)
            for i in range(4):
                deaf.send(encode(Generate(id=i, request=Request([i + 1], 500))))
            await asyncio.sleep(0.02)
            assert (await client.status()).requests_running == 5
            # Its answers would fill the buffers in a while; what else it asks for does so at once. A client that
            # stands still takes nothing that was sent to it.
            for _ in range(40_000):
                deaf.send(encode(AskStatus()))
            await asyncio.sleep(0.001)
            network.freeze("deaf")

            async def cancelled() -> bool:
                return (await client.status()).requests_running <= 1

            await eventually(cancelled, 2.0)
            assert "bytes are left unread" in caplog.text
            assert len([token async for token in stream]) == 399
            network.kill("deaf")

    simulate(config, work)


@pytest.mark.parametrize("partition", ["heads", "requests"])
def test_cancelling_in_the_middle_of_a_prompt_frees_every_block(partition: str) -> None:
    """The account of every node is exact while the prompt goes through the slices, and afterwards."""
    prompt = [i % 50 for i in range(MAX_CONTEXT - 10)]
    pipeline = PipelineConfig(batches=2, max_batch=4, prefill_tokens=1, partition=partition)
    config = make_config(pipeline=pipeline)

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            async with cluster.client() as leaving:
                asked = [asyncio.create_task(leaving.generate(prompt, max_tokens=8)) for _ in range(2)]
                stream = client.stream([1, 2, 3], max_tokens=60)
                await anext(stream)  # a step or more after the others have begun
                states = await statuses(cluster, ["m0", "m1"])
                holding = [s.kv_tokens_total - s.kv_tokens_free for s in states]
                assert sum(holding) >= 2 * whole_blocks(len(prompt) + 8)
                assert sum(s.sequences for s in states) == (6 if partition == "heads" else 3)
                tokens = (await client.status()).tokens_generated
                assert not any(task.done() for task in asked)
                asked[0].cancel()
                await asyncio.gather(asked[0], return_exceptions=True)
            # The client that left cancelled the other one.
            assert len([token async for token in stream]) == 59
            await settled(cluster)
            assert (await client.status()).tokens_generated - tokens <= 60
            # All of it can be had again.
            assert (await client.generate([1], max_tokens=MAX_CONTEXT - 1)).finish_reason == "length"

    simulate(config, work)

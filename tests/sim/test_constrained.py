"""Constrained answers on a simulated cluster: masks are made beside the steps, and no other sequence waits for them."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace as replaced

from lamina.config import ClusterConfig, PipelineConfig
from lamina.constrain.matcher import Matcher
from lamina.demo.run import CHECKPOINT
from lamina.errors import RequestError
from lamina.front.masks import PATIENCE_S
from lamina.node.model import ModelSource, OpenModel
from lamina.runtime.workers import ParallelWorkers
from lamina.sim.cluster import SimCluster
from lamina.sim.empty import EmptyBackend, EmptyModel
from lamina.sim.world import World
from lamina.transport import Hello
from lamina.wire.codec import Message, decode, encode
from lamina.wire.requests import (
    Failed,
    Finished,
    Generated,
    Grammar,
    JsonObject,
    JsonSchema,
    OneOf,
    Regex,
    Request,
    ToClient,
    messages_for,
)
from tests.sim.clusters import LINK, Work, empty_model, make_config, seconds, settled, simulate

T = TypeVar("T")
R = TypeVar("R")

DIGITS = Regex("[0-9]{40}")


def with_words(config: ClusterConfig) -> OpenModel:
    """An empty model with the tokens of the demo's checkpoint. It chooses the first token that is allowed."""

    def open_(config: ClusterConfig) -> ModelSource:
        model = empty_model(config, vocabulary=1536)(config)
        assert isinstance(model, EmptyModel)
        facts = replace(model.facts, path=CHECKPOINT, stop_tokens=frozenset([1]))
        return EmptyModel(facts, model.rows)

    return open_


def simulate_words(config: ClusterConfig, work: Work[R]) -> R:
    async def main(world: World) -> R:
        opened = with_words(config)
        async with SimCluster(world, config, open_model=opened, backend=EmptyBackend, seconds=seconds) as cluster:
            await cluster.ready()
            result = await work(cluster)
            cluster.check()
            await settled(cluster)
            assert all(error is None for error in (await cluster.stop_all()).values()), cluster.ended
            return result

    with World(1, model=LINK, tracing=False) as world:
        return world.run(main(world))


def slow(monkeypatch: pytest.MonkeyPatch, mask_s: float) -> None:
    """Each job of the mask workers takes ``mask_s`` virtual seconds longer."""
    each = ParallelWorkers.each

    def slowly(
        self: ParallelWorkers, function: Callable[[T], None], values: Iterable[T], on_some: Callable[[], object]
    ) -> list[asyncio.Future[None]]:
        async def job() -> None:
            await asyncio.sleep(mask_s)
            for ended in each(self, function, values, on_some):
                await ended

        return [asyncio.ensure_future(job())]

    monkeypatch.setattr(ParallelWorkers, "each", slowly)


async def times(cluster: SimCluster, prompt: list[int], **asked: Any) -> list[float]:
    """Ask, and note when each token comes."""
    loop, noted = asyncio.get_running_loop(), list[float]()
    async with cluster.client() as client, client.stream(prompt, **asked) as stream:
        async for _ in stream:
            noted.append(loop.time())
    return noted


def gaps(noted: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(noted)]


@pytest.mark.parametrize("mask_s", [0.0004, 0.05])
def test_a_slow_mask_keeps_others_waiting_for_a_millisecond_at_most(
    monkeypatch: pytest.MonkeyPatch, mask_s: float
) -> None:
    """Two sequences of one batch, of which one has masks that take long: the other gets its tokens all the same."""
    config = make_config(pipeline=PipelineConfig(batches=1, max_batch=4))

    async def work(cluster: SimCluster) -> list[list[float]]:
        alone = await times(cluster, [5], max_tokens=60)
        both = await asyncio.gather(
            times(cluster, [5], max_tokens=60), times(cluster, [5], max_tokens=60, constraint=DIGITS)
        )
        return [alone, *both]

    slow(monkeypatch, mask_s)
    alone, beside, constrained = map(gaps, simulate_words(config, work))
    step_s = max(alone)
    assert len(beside) == 59
    assert max(beside) <= step_s + PATIENCE_S + 1e-4
    assert len(constrained) >= 5
    if mask_s > 0.01:  # it sits out
        assert min(constrained) >= mask_s
        assert sum(beside) < 0.3 * sum(constrained)
        assert sorted(beside)[len(beside) // 2] <= step_s + 1e-4  # each mask is waited for once
    else:  # each mask comes in time for the next step
        assert max(constrained) <= step_s + mask_s + 1e-4


def test_all_kinds_of_constraints_are_fulfilled() -> None:
    """On two batches, together, with prompts in chunks."""
    config = make_config(pipeline=PipelineConfig(batches=2, max_batch=4, prefill_tokens=16))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    checks: list[tuple[Any, Callable[[str], object]]] = [
        (OneOf(["no", "never"]), lambda text: text in ("no", "never")),
        (Regex("[0-9]{3}[a-f]{3}"), lambda text: len(text) == 6),
        (JsonObject(), lambda text: text.startswith("{")),
        (JsonSchema(json.dumps(schema)), lambda text: text.startswith("{")),
        (Grammar('start: "(" start ")" | "x"'), lambda text: set(text) <= set("(x)")),
    ]

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            answers = await asyncio.gather(*(client.generate([7] * 40, max_tokens=30, constraint=c) for c, _ in checks))
        for (constraint, fits), answer in zip(checks, answers, strict=True):
            assert fits(answer.text), (constraint, answer.text)
        assert answers[0].finish_reason == answers[1].finish_reason == "stop"

    simulate_words(config, work)


def test_a_constraint_that_cannot_go_on_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client gets the reason; the others of its batch go on."""
    accept = Matcher.accept

    def give_up(self: Matcher, token: int) -> None:
        accept(self, token)
        if self._accepted == 5:
            raise RequestError("the constraint cannot go on with token 6 of the answer: too complex")

    monkeypatch.setattr(Matcher, "accept", give_up)
    config = make_config(pipeline=PipelineConfig(batches=1, max_batch=4))

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            free = asyncio.create_task(client.generate([5], max_tokens=40))
            with pytest.raises(RequestError, match="token 6 of the answer: too complex"):
                await client.generate([5], max_tokens=60, constraint=Regex("([a-z] ?){50}"))
            assert len((await free).tokens) == 40

    simulate_words(config, work)


def test_what_cannot_be_enforced_is_refused() -> None:
    """Compiling is no part of a step; its error is the client's, and nothing is left of the request."""
    config = make_config()

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            for _ in range(2):
                with pytest.raises(RequestError, match=r"at \$.items.uniqueItems: the keyword is not supported"):
                    await client.generate([5], constraint=JsonSchema('{"items": {"uniqueItems": true}}'))
            assert (await client.generate([5], max_tokens=9, constraint=OneOf(["yes"]))).text == "yes"

    simulate_words(config, work)


async def outcome(cluster: SimCluster, request: Request) -> tuple[int, Message]:
    """The number of tokens of an answer, and how it ends."""
    config, came, ended = cluster.config, list[Generated](), asyncio.get_running_loop().create_future()

    def take(plain: dict[str, Any]) -> None:
        match decode(plain, ToClient):
            case Generated() as generated:
                came.append(generated)
            case message:
                ended.set_result(message)

    link = await cluster.world.network.connect(
        config.front.address, Hello("client", "raw"), config.options(), deadline_s=1
    )
    link.deliver(on_message=take)
    for message in messages_for(1, request):
        link.send(encode(message))
    end = await ended
    await link.close()
    return sum(len(generated.pieces) for generated in came), end


def test_the_constraint_wins_over_what_would_make_the_answer_longer() -> None:
    """When nothing else fits, it ends, whatever ignore_eos and min_tokens say; what forbids all tokens is an error."""

    async def work(cluster: SimCluster) -> None:
        yes = Request([5], 20, constraint=OneOf(["yes"]))
        some = Request([5], 20, constraint=Regex("1{0,5}"))
        for asked in (yes, replaced(yes, ignore_eos=True), replaced(yes, min_tokens=15)):
            tokens, end = await outcome(cluster, asked)
            assert isinstance(end, Finished)
            assert (end.reason, end.stopped_by) == ("stop", 1)
            assert tokens <= 4
        tokens, end = await outcome(cluster, replaced(some, min_tokens=5))
        assert isinstance(end, Finished)
        assert tokens >= 5
        _, end = await outcome(cluster, replaced(yes, bad_words=[[token] for token in range(256)]))
        assert isinstance(end, Failed)
        assert end.kind == "RequestError"
        assert "no token is allowed at position 2, after 1 tokens" in end.message

    simulate_words(make_config(), work)


def test_a_model_without_text_has_no_constraints() -> None:
    """The client is told why."""

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            with pytest.raises(RequestError, match="answers cannot be constrained"):
                await client.generate([5], constraint=OneOf(["yes"]))

    simulate(make_config(), work)


def test_preempted_answers_go_on_where_they_were() -> None:
    """Sequences that lose their space in the middle of an answer end as if they had been alone."""
    chosen = random.Random(3)
    config = make_config(
        memory=7 << 10, context=192, pipeline=PipelineConfig(batches=2, max_batch=8, prefill_tokens=32)
    )
    patterns = [Regex(f"[{a}-z]{{80}}[0-9]{{80}}") for a in "abcdefgh"]
    prompts = [[chosen.randrange(2, 1000) for _ in range(4)] for _ in patterns]

    async def work(cluster: SimCluster) -> None:
        async with cluster.client() as client:
            asked = list(zip(prompts, patterns, strict=True))
            alone = [(await client.generate(p, max_tokens=170, constraint=c)).tokens for p, c in asked[:3]]
            together = await asyncio.gather(*(client.generate(p, max_tokens=170, constraint=c) for p, c in asked))
            assert [answer.tokens for answer in together[:3]] == alone
            assert all(answer.finish_reason == "stop" for answer in together)
            assert (await client.status()).preemptions > 0

    simulate_words(config, work)

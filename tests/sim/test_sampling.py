"""Which tokens requests get, and the scores that come with them, over simulated clusters of real nodes."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.config import PipelineConfig
from lamina.errors import RequestError
from lamina.front.scheduler import Scheduler
from lamina.front.sequence import ScheduledStep, StepOutcome
from lamina.sim.cluster import SimCluster
from lamina.wire import parts
from lamina.wire.requests import Score
from tests.families import VOCABULARY
from tests.oracle import Oracle
from tests.sim.answers import ask, submit
from tests.sim.clusters import EMPTY_VOCABULARY, make_config, simulate

RANGES = (range(2), range(2, 4))
REPLICAS = (None, None)
EVERYTHING: dict[str, Any] = {
    "temperature": 1.3,
    "top_k": 200,
    "top_p": 0.98,
    "min_p": 0.001,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "logit_bias": {5: 1.0, 9: -2.0},
    "bad_words": [[7], [8, 9], [1, 2, 3]],
}


def prompts(count: int, shortest: int = 1, longest: int = 120) -> list[list[int]]:
    chosen = random.Random(11)
    return [[chosen.randrange(VOCABULARY) for _ in range(chosen.randint(shortest, longest))] for _ in range(count)]


def check_scores(scores: list[Score], logits: torch.Tensor, tokens: list[int], top: int) -> None:
    """The scores of tokens are those of the library's logits [len(tokens), vocabulary]."""
    assert len(scores) == len(tokens)
    wanted = logits.double().log_softmax(-1)
    for score, row, token in zip(scores, wanted, tokens, strict=True):
        assert score.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert abs(score.rank - int((row > row[token]).sum()) - 1) <= 1  # it may be as likely as the next one
        assert [p for _, p in score.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-3)
        assert [p for _, p in score.top] == pytest.approx(row[[i for i, _ in score.top]].tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "pipeline"),
    [
        ({}, {"prefill_tokens": 24}),
        ({}, {"prefill_tokens": 512}),
        ({}, {"prefill_tokens": 70, "prefill_kv": 200 << 10}),
        ({"compute": RANGES}, {"prefill_tokens": 24, "partition": "tokens"}),
        ({"compute": REPLICAS}, {"prefill_tokens": 24, "batches": 3, "partition": "requests"}),
    ],
    ids=["chunks", "whole prompts", "remote", "two ranges, tokens", "replicas in rotation, requests"],
)
def test_prompts_are_scored(changes: dict[str, Any], pipeline: dict[str, Any], llama: Path, oracle: Oracle) -> None:
    """Every token from the second on, once and in order, as the library's model does, although another request has
    published the same prompt; and so are the tokens of the answer."""
    config = make_config(llama, pipeline=PipelineConfig(**{"batches": 2, **pipeline}), **changes)
    asked = [*prompts(3, 60), [3]]

    async def work(cluster: SimCluster) -> None:
        await asyncio.gather(*(ask(cluster, prompt, max_tokens=2) for prompt in asked[:2]))
        wanted = {"max_tokens": 6, "logprobs": 4, "prompt_logprobs": 3, "temperature": 1.0, "min_p": 0.01}
        answers = await asyncio.gather(*(ask(cluster, prompt, **wanted) for prompt in asked))
        for prompt, (answer, end) in zip(asked, answers, strict=True):
            assert end.shared_tokens == 0
            if len(prompt) > 1:
                check_scores(answer.prompt_scores, oracle.logits(prompt[:1], prompt[1:]), prompt[1:], 3)
            else:
                assert answer.prompt_scores == []
            scores = [score for score in answer.scores if score]
            check_scores(scores, oracle.logits(prompt, answer.tokens), answer.tokens, 4)
        _, end = await ask(cluster, asked[0], max_tokens=2)
        assert end.shared_tokens > 0

    simulate(config, work)


def test_preempted_prompts_are_scored_once(llama: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request loses its space in mid-prompt and in mid-answer; no score comes twice, none is missing, and seeded
    answers are those of requests that never lost any."""
    asked = prompts(3, 60, 90)
    pipeline = PipelineConfig(batches=2, max_batch=8, prefill_tokens=24)
    wanted = {**EVERYTHING, "prompt_logprobs": 0, "logprobs": 2, "seed": 6, "max_tokens": 15}
    finish = Scheduler.finish

    def yield_twice(scheduler: Scheduler, slot: int, step: ScheduledStep, *brought: Any) -> StepOutcome:
        for sequence in [chunk.sequence for chunk in step.prompts] + [row.sequence for row in step.decode]:
            is_half_done = sequence.output[6:] if sequence.preemptions else sequence.prefilled
            if sequence.preemptions < 2 and is_half_done:
                sequence.yielding = True
        return finish(scheduler, slot, step, *brought)

    async def work(cluster: SimCluster) -> None:
        undisturbed = [(await ask(cluster, prompt, **wanted))[0] for prompt in asked]
        monkeypatch.setattr(Scheduler, "finish", yield_twice)
        answers = [answer for answer, _ in await asyncio.gather(*(ask(cluster, prompt, **wanted) for prompt in asked))]
        assert (await cluster.status("c0")).preemptions == 2 * len(asked)
        for prompt, answer, other in zip(asked, answers, undisturbed, strict=True):
            assert answer.tokens == other.tokens
            check_scores(answer.prompt_scores, oracle.logits(prompt[:1], prompt[1:]), prompt[1:], 0)
            scores = [score for score in answer.scores if score]
            check_scores(scores, oracle.logits(prompt, answer.tokens), answer.tokens, 2)

    simulate(make_config(llama, pipeline=pipeline), work)


@pytest.mark.parametrize(
    ("compute", "partition"), [(RANGES, "heads"), (REPLICAS, "tokens")], ids=["ranges", "replicas"]
)
def test_a_seed_decides_alone(compute: tuple[range | None, ...], partition: Any, llama: Path) -> None:
    """With every parameter: alone, in a full batch, and over several compute nodes, any of which samples."""
    asked = prompts(5, 1, 60)

    async def work(cluster: SimCluster) -> list[list[int]]:
        alone = [(await ask(cluster, prompt, max_tokens=12, seed=4, **EVERYTHING))[0].tokens for prompt in asked[:2]]
        asking = [ask(cluster, prompt, max_tokens=12, seed=4, **EVERYTHING) for prompt in asked]
        together = [answer.tokens for answer, _ in await asyncio.gather(*asking)]
        assert together[:2] == alone
        other, _ = await ask(cluster, asked[0], max_tokens=12, seed=5, **EVERYTHING)
        assert other.tokens != alone[0]
        for tokens in together:
            pairs = list(itertools.pairwise(tokens))
            assert 7 not in tokens
            assert (8, 9) not in pairs
        return together

    pipeline = PipelineConfig(batches=3, max_batch=8, prefill_tokens=32, partition=partition)
    several = simulate(make_config(llama, compute=compute, pipeline=pipeline), work)
    assert several == simulate(make_config(llama, pipeline=PipelineConfig(max_batch=8)), work)


def test_what_ends_an_answer(llama: Path) -> None:
    """Stop tokens end it, but not before min_tokens; bad words bend it, only where all their tokens would come."""

    async def work(cluster: SimCluster) -> None:
        prompt = [5, 6, 7]
        free, end = await ask(cluster, prompt, max_tokens=20)
        tokens = free.tokens
        assert (end.reason, end.stopped_by, len(tokens)) == ("length", None, 20)
        stop = tokens[4]
        first = tokens.index(stop)

        answer, end = await ask(cluster, prompt, max_tokens=20, stop_token_ids=[stop, 299])
        assert answer.tokens == tokens[: first + 1]
        assert (end.reason, end.stopped_by) == ("stop", stop)

        answer, end = await ask(cluster, prompt, max_tokens=20, stop_token_ids=[stop], min_tokens=first + 2)
        assert answer.tokens[:first] == tokens[:first]
        assert stop not in answer.tokens[: first + 2]
        assert len(answer.tokens) >= first + 2

        pair = tokens[1:3]
        answer, _ = await ask(cluster, prompt, max_tokens=20, bad_words=[pair])
        assert answer.tokens[:2] == tokens[:2]
        assert answer.tokens[2] != tokens[2]
        backwards, _ = await ask(cluster, prompt, max_tokens=3, bad_words=[[VOCABULARY - 1, *pair]])
        assert backwards.tokens == tokens[:3] or tokens[0] == VOCABULARY - 1

    simulate(make_config(llama), work)


def test_times_and_shared_tokens_come_with_the_end() -> None:
    """By the loop's clock: until admission, from there to the first token, and from it to the last."""
    config = make_config(pipeline=PipelineConfig(max_batch=1))

    async def work(cluster: SimCluster) -> None:
        begun_s = asyncio.get_running_loop().time()
        first, second = [await submit(cluster, [1] * 40, max_tokens=10) for _ in range(2)]
        end, later = await first.ended(), await second.ended()
        whole_s = asyncio.get_running_loop().time() - begun_s
        assert end.queued_s < later.queued_s
        assert (end.shared_tokens, later.shared_tokens) == (0, 32)
        for each in (end, later):
            assert min(each.queued_s, each.prompt_s) >= 0
            assert each.answer_s == pytest.approx(9 * end.prompt_s, rel=0.5)
            assert each.queued_s + each.prompt_s + each.answer_s <= whole_s
        assert later.queued_s >= end.prompt_s + end.answer_s
        assert math.isfinite(later.queued_s)

    simulate(config, work)


def test_a_request_that_allows_no_token_fails_alone() -> None:
    """With a sentence that says why."""

    async def work(cluster: SimCluster) -> None:
        words = [[token] for token in range(EMPTY_VOCABULARY)]
        stuck = [await submit(cluster, [1, 2], max_tokens=5, bad_words=words, temperature=t) for t in (0.0, 1.0)]
        good = await submit(cluster, [1, 2], max_tokens=5)
        for answer in stuck:
            with pytest.raises(RequestError, match="no token is allowed at position 2, after 0 tokens"):
                await answer.ended()
        assert (await good.ended()).reason == "length"

    simulate(make_config(), work)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"stop_token_ids": [1, 64]},
            "stop_token_ids has token 64, which is not in the vocabulary; expected less than 64",
        ),
        ({"logit_bias": {70: 1.0}}, "sampling.logit_bias has token 70"),
        ({"bad_words": [[1], [2, 99]]}, r"bad_words\[1\] has token 99"),
        ({"bad_words": ["text"]}, r"bad_words\[0\] is the text 'text'"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens is 6, but the answer can have 5 tokens at most"),
    ],
)
def test_what_cannot_be_is_refused(wanted: dict[str, Any], message: str) -> None:
    """Before it is queued, with the field that is wrong."""

    async def work(cluster: SimCluster) -> None:
        with pytest.raises(RequestError, match=message):
            await submit(cluster, [1, 2], **wanted)

    simulate(make_config(), work)


def test_orders_that_are_too_long_for_a_message_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of rows with a thousand biases each, and their scores."""
    sent = []
    make_part = parts.Part
    monkeypatch.setattr(parts, "Part", lambda **fields: sent.append(len(fields["data"])) or make_part(**fields))
    bias = dict.fromkeys(range(1000), 0.0)
    pipeline = PipelineConfig(batches=1, max_batch=100)

    async def work(cluster: SimCluster) -> None:
        wanted = {"max_tokens": 3, "temperature": 1.0, "seed": 1, "logit_bias": bias, "logprobs": 20}
        answers = [await submit(cluster, [i], **wanted) for i in range(100)]
        for answer in answers:
            assert (await answer.ended()).reason == "length"
            assert len(answer.scores) == 3
        assert len({tuple(answer.tokens) for answer in answers}) == 1

    simulate(make_config(compute=RANGES, pipeline=pipeline, memory=64 << 20), work, vocabulary=1024)
    assert sum(sent) > 1 << 20

"""Answers of real processes with the shipped checkpoint, and a front that is started again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

import lamina
from lamina.config import ClusterConfig, PipelineConfig
from lamina.demo.run import CHECKPOINT
from lamina.errors import DeadlineError, NodeError, RequestError
from tests import harness

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def cluster(
    memory_ports: list[int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ClusterConfig, list[harness.Node]]]:
    """Its front is the last of the nodes in the list."""
    pipeline = PipelineConfig(batches=2, max_batch=8, max_waiting=16)
    config = harness.write_config(tmp_path_factory.mktemp("cluster"), CHECKPOINT, memory_ports[:2], pipeline=pipeline)
    nodes = [harness.start_node(config, "c0")]
    try:
        asyncio.run(harness.ready(config, nodes[-1]))
        yield config, nodes
        assert nodes[-1].stop() == 0
    finally:
        with harness.running(*nodes):
            pass


def test_an_answer_ends_where_it_is_told_to(cluster: tuple[ClusterConfig, list[harness.Node]]) -> None:
    """At a text, with or without it, at a token, and not before it has its fewest tokens; requests end with it."""
    config, _ = cluster
    with lamina.Client(config.front.address, secret=config.links.secret, tls=config.links.tls) as client:
        whole = client.generate(PROMPT, max_tokens=40, logprobs=2, prompt_logprobs=1)
        assert whole.logprobs is not None
        assert whole.prompt_logprobs is not None
        assert [score.rank for score in whole.logprobs] == [1] * 40  # it is greedy
        assert len(whole.prompt_logprobs) == whole.prompt_tokens - 1
        assert min(whole.timings) >= 0

        stop = whole.text[12:19]
        at = whole.text.index(stop)
        before = client.generate(PROMPT, max_tokens=40, stop=stop)
        behind = client.generate(PROMPT, max_tokens=40, stop=["nowhere", stop], include_stop=True)
        late = client.generate(PROMPT, max_tokens=40, stop=" ", min_tokens=10)
        token = client.generate(PROMPT, max_tokens=40, stop_token_ids=[whole.tokens[4]])
        assert (before.text, before.finish_reason, before.stopped_by) == (whole.text[:at], "stop", stop)
        assert (behind.text, behind.tokens) == (whole.text[: at + len(stop)], before.tokens)
        assert len(late.tokens) >= 10
        assert token.tokens == whole.tokens[: whole.tokens.index(whole.tokens[4]) + 1]
        assert token.stopped_by == whole.tokens[4]
        assert whole.text.startswith(token.text)
        with client.stream(PROMPT, max_tokens=40, stop=stop) as stream:
            assert "".join(token.text for token in stream) + stream.held_back == before.text
            assert (stream.stopped_by, stream.prompt_tokens) == (stop, whole.prompt_tokens)
        deadline = time.monotonic() + 2
        while client.status().requests_running:  # the last leaves with the step in which it is
            assert time.monotonic() < deadline


def test_many_prompts_and_branches_without_asyncio(cluster: tuple[ClusterConfig, list[harness.Node]]) -> None:
    """In order, beside an error and beyond what the queue takes; and several answers to one prompt."""
    config, _ = cluster
    with lamina.Client(config.front.address, secret=config.links.secret, tls=config.links.tls) as client:
        prompts = [f"{PROMPT} there were {i} cats" if i != 30 else "" for i in range(60)]
        answers = list(client.generate_many(prompts, concurrency=60, max_tokens=4))
        assert isinstance(answers.pop(30), RequestError)
        alone = client.generate(prompts[7], max_tokens=4)
        assert answers[7] == alone
        assert all(isinstance(answer, lamina.Completion) and len(answer.tokens) == 4 for answer in answers)
        for answer in client.generate_many(prompts, max_tokens=4):
            assert answer == answers[0]
            break
        branches = client.branches(PROMPT, 3, temperature=1.0, seed=5, max_tokens=6)
        drawn = [branch.completion() for branch in branches]
        assert drawn[2] == client.generate(PROMPT, temperature=1.0, seed=7, max_tokens=6)


def test_a_front_that_was_restarted(cluster: tuple[ClusterConfig, list[harness.Node]]) -> None:
    """Requests that ran fail, and the same client goes on when it is back."""
    config, nodes = cluster

    async def work() -> None:
        async with harness.client(config, reconnect_s=2.0) as client:
            stream = client.stream(PROMPT, ignore_eos=True)
            await anext(stream)
            await asyncio.to_thread(nodes[-1].kill)
            with pytest.raises(NodeError, match="compute node c0 was lost"):
                await stream.completion()
            with pytest.raises(DeadlineError):
                await client.generate(PROMPT, deadline_s=0.2)
            nodes.append(harness.start_node(config, "c0"))
            await harness.ready(config, nodes[-1])
            answers = await asyncio.gather(*(client.generate(PROMPT, max_tokens=3) for _ in range(4)))
            assert [len(answer.tokens) for answer in answers] == [3] * 4
            assert not client.closed
        assert client.closed

    asyncio.run(work())

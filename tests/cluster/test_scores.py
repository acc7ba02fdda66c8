"""Scores travel from real nodes to a client, as the library's model gives them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from lamina.config import PipelineConfig
from lamina.demo.run import CHECKPOINT
from lamina.transport import Hello, connect
from lamina.wire.codec import decode, encode
from lamina.wire.requests import Failed, Finished, Generate, Generated, PromptScored, Request, Sampling, Score, ToClient
from tests import harness
from tests.oracle import Oracle


def test_scores_of_the_demo_are_those_of_the_library(memory_ports: list[int], tmp_path: Path) -> None:
    """Of a prompt in chunks, and of an answer, sampled with penalties; a second answer, greedy, is the library's."""
    pipeline = PipelineConfig(prefill_tokens=50)
    config = harness.write_config(tmp_path, CHECKPOINT, memory_ports[:2], pipeline=pipeline)
    prompt = [(7 * i) % 1500 + 5 for i in range(130)]
    drawn = Sampling(0.8, 40, seed=3, repetition_penalty=1.2, logit_bias={3: 2.0})
    wanted = {
        1: Request(prompt, 8, drawn, prompt_logprobs=5, logprobs=2, ignore_eos=True),
        2: Request(prompt[:20], 8, logprobs=0, ignore_eos=True),
    }
    prompt_scores: list[Score] = []
    tokens: dict[int, list[int]] = {1: [], 2: []}
    scores: dict[int, list[Score]] = {1: [], 2: []}

    async def main() -> None:
        await harness.ready(config, node)
        ended: set[int] = set()
        done = asyncio.Event()

        def take(plain: dict[str, object]) -> None:
            match decode(plain, ToClient):
                case PromptScored(scores=some):
                    prompt_scores.extend(some)
                case Generated(pieces=pieces):
                    for piece in pieces:
                        tokens[piece.id].append(piece.token)
                        assert piece.score is not None
                        scores[piece.id].append(piece.score)
                case Finished(id=id_, reason="length"):
                    ended.add(id_)
                case Failed() as failed:
                    pytest.fail(failed.message)
            if len(ended) == 2:
                done.set()

        link = await connect(config.front.address, Hello("client", "raw"), config.options(), deadline_s=10)
        async with link:
            link.deliver(on_message=take)
            for id_, request in wanted.items():
                link.send(encode(Generate(id=id_, request=request)))
            await asyncio.wait_for(done.wait(), 60)

    node = harness.start_node(config, "c0")
    with harness.running(node):
        asyncio.run(main())
        assert node.stop() == 0

    oracle = Oracle(CHECKPOINT)
    compared = [(prompt[:1], prompt[1:], prompt_scores, 5), (prompt, tokens[1], scores[1], 2)]
    compared.append((prompt[:20], tokens[2], scores[2], 0))
    for before, after, found, top in compared:
        logprobs = oracle.logits(before, after).double().log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(after)[:, None])[:, 0]
        assert [score.logprob for score in found] == pytest.approx(chosen.tolist(), abs=1e-3)
        for score, row in zip(found, logprobs, strict=True):
            assert [p for _, p in score.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-3)
    assert all(score.rank == 1 for score in scores[2])

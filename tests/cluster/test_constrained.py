"""Constrained answers of real processes, with the checkpoint that ships."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Iterator

import jsonschema
import pytest

from lamina.client import AsyncClient
from lamina.config import ClusterConfig, PipelineConfig
from lamina.demo.run import CHECKPOINT
from lamina.errors import RequestError
from lamina.wire.requests import JsonSchema, OneOf, Regex
from tests import harness

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "kind", "born"],
    "additionalProperties": False,
}
STORY = "Once upon a time"


@pytest.fixture(scope="module")
def cluster(memory_ports: list[int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterConfig]:
    pipeline = PipelineConfig(batches=2, max_batch=8)
    config = harness.write_config(
        tmp_path_factory.mktemp("cluster"), CHECKPOINT, memory_ports[:2], pipeline=pipeline, memory=4 << 20
    )
    node = harness.start_node(config, "c0")
    with harness.running(node):
        asyncio.run(harness.ready(config, node))
        yield config
        assert node.stop() == 0


def test_answers_fit_and_neighbours_do_not_notice(cluster: ClusterConfig) -> None:
    """A schema, texts and a pattern, greedy and sampled; others in their batches get the tokens that they get alone."""

    async def work() -> None:
        async with harness.client(cluster) as client:
            free = {"max_tokens": 60, "temperature": 0.8, "seed": 5}
            alone = await client.generate(STORY, **free)
            asked = []
            for seed in range(4):
                sampled = {"max_tokens": 900, "temperature": seed / 2, "seed": seed}
                for constraint in (JsonSchema(json.dumps(SCHEMA)), OneOf(["happy", "sad"]), Regex("[A-Z][a-z]{2,8}!")):
                    asked.append(client.generate(STORY, constraint=constraint, **sampled))
            neighbours = [client.generate(STORY, **free) for _ in range(4)]
            answers = await asyncio.gather(*asked, *neighbours)
            for i in range(0, 12, 3):
                person, mood, word = answers[i : i + 3]
                value = json.loads(person.text)
                jsonschema.validate(value, SCHEMA, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
                assert mood.text in ("happy", "sad")
                assert re.fullmatch("[A-Z][a-z]{2,8}!", word.text)
                assert person.finish_reason == mood.finish_reason == word.finish_reason == "stop"
            assert all(neighbour.tokens == alone.tokens for neighbour in answers[12:])

    asyncio.run(work())


def test_a_schema_that_cannot_be_enforced_is_the_clients_error(cluster: ClusterConfig) -> None:
    """By name and place."""

    async def work() -> None:
        async with harness.client(cluster) as client:
            with pytest.raises(RequestError, match=r"at \$.properties.a.not: the keyword is not supported"):
                await client.generate(STORY, constraint=JsonSchema('{"properties": {"a": {"not": {}}}}'))

    asyncio.run(work())


@pytest.mark.slow
def test_steps_of_others_take_as_long_beside_constrained_answers(cluster: ClusterConfig) -> None:
    """One that streams beside six that are constrained has gaps like those beside six that are not."""

    async def gaps(client: AsyncClient, constraint: JsonSchema | None) -> list[float]:
        loop = asyncio.get_running_loop()
        others = [
            asyncio.create_task(client.generate(STORY, max_tokens=150, temperature=1.0, seed=i, constraint=constraint))
            for i in range(6)
        ]
        noted = []
        async with client.stream(STORY, max_tokens=120) as stream:
            async for _ in stream:
                noted.append(loop.time())
        await asyncio.gather(*others)
        return [after - before for before, after in itertools.pairwise(noted)]

    async def work() -> None:
        async with harness.client(cluster) as client:
            wide = JsonSchema('{"type": "array", "items": {"type": "string"}, "minItems": 50}')
            free, beside = [], []
            for _ in range(5):
                free += await gaps(client, None)
                beside += await gaps(client, wide)
            middle = len(free) // 2
            assert sorted(beside)[middle] <= sorted(free)[middle] * 1.5 + 0.001

    asyncio.run(work())

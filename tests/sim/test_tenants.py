"""Several clusters, each with a file of its own, on one memory node."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.config import ClusterConfig
from lamina.errors import LaminaError
from lamina.wire.admin import Status
from tests import harness
from tests.cluster.test_families import PROMPTS
from tests.families import FAMILIES
from tests.harness import eventually
from tests.oracle import Agreement, Oracle

TOKENS = 64
MODELS = ("llama", "gemma2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: FAMILIES[name].save(tmp_path_factory.mktemp(name) / "checkpoint") for name in MODELS}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[tuple[int, harness.Node]]:
    """A memory node of 16 MiB and its port."""
    (port,) = harness.free_ports(1)
    node = harness.start_memory(tmp_path, port)
    with harness.running(node):
        yield port, node
        assert node.stop() == 0


def cluster(folder: Path, name: str, checkpoint: Path, port: int, quota: int | None, **more: int) -> ClusterConfig:
    """A cluster with a file of its own, whose memory node is the one that they share."""
    (folder / name).mkdir()
    return harness.write_config(folder / name, checkpoint, [port], quota=quota, **more)


async def status(config: ClusterConfig) -> Status:
    return await harness.status_of(config, config.memory_nodes[0])


async def generate(config: ClusterConfig, times: int = 1) -> list[list[int]]:
    """Answers to all prompts, ``times`` times one after the other."""
    async with harness.client(config) as client:
        for _ in range(times):
            answers = await asyncio.gather(*(client.generate(p, max_tokens=TOKENS) for p in PROMPTS))
    return [answer.tokens for answer in answers]


def check(agreement: Agreement, oracle: Oracle, answers: list[list[int]], what: str) -> None:
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) == TOKENS
        agreement.check(oracle, prompt, answer, f"{what}, prompt of {len(prompt)}")


def test_two_models_share_a_memory_node(
    checkpoints: dict[str, Path], memory: tuple[int, harness.Node], agreement: Agreement, tmp_path: Path
) -> None:
    """Both at the same time, with quotas of their own. One is killed in the middle of its answers: the other goes on,
    and a third has what the dead one had."""
    oracles = {name: Oracle(path) for name, path in checkpoints.items()}
    configs = {name: cluster(tmp_path, name, checkpoints[name], memory[0], 6 << 20) for name in MODELS}
    nodes = {name: harness.start_node(config, "c0") for name, config in configs.items()}
    one, other = MODELS

    async def both() -> None:
        for name in MODELS:
            await harness.ready(configs[name], nodes[name])
        answers = await asyncio.gather(*(generate(configs[name]) for name in MODELS))
        for name, own in zip(MODELS, answers, strict=True):
            check(agreement, oracles[name], own, f"{name} beside another")
        seen = await status(configs[one])
        assert {tenant.quota for tenant in seen.tenants} == {6 << 20}
        assert len({tenant.model for tenant in seen.tenants}) == 2
        assert all(tenant.busy_s > 0 and tenant.compute_nodes == ["c0"] for tenant in seen.tenants)
        assert seen.kv_tokens_free == seen.kv_tokens_total == sum(t.kv_tokens_total for t in seen.tenants)

    async def kill() -> None:
        dying = asyncio.ensure_future(generate(configs[other], 100))
        living = asyncio.ensure_future(generate(configs[one], 3))
        async with harness.client(configs[one]) as client:
            async for _ in client.stream([1, 2, 3], max_tokens=8):
                pass
        nodes[other].kill()
        with pytest.raises(LaminaError):
            await dying
        check(agreement, oracles[one], await living, f"{one} beside one that was killed")

        async def gone() -> bool:
            return len((await status(configs[one])).tenants) == 1

        await eventually(gone, 20)

    async def third() -> None:
        config = cluster(tmp_path, "third", checkpoints[other], memory[0], 6 << 20)
        nodes["third"] = harness.start_node(config, "c0")
        with harness.running(nodes["third"]):
            await harness.ready(config, nodes["third"])
            check(agreement, oracles[other], await generate(config), f"{other} after one that was killed")
            assert nodes["third"].stop() == 0

    with harness.running(*nodes.values()):
        asyncio.run(both())
        asyncio.run(kill())
        asyncio.run(third())
        assert nodes[one].stop() == 0


def test_a_quota_that_cannot_be_had_is_refused_with_the_numbers(
    checkpoints: dict[str, Path], memory: tuple[int, harness.Node], tmp_path: Path
) -> None:
    """The one that is there goes on; when it has left, the other can have what it asked for."""
    first = cluster(tmp_path, "first", checkpoints["llama"], memory[0], 12 << 20, context=64)
    second = cluster(tmp_path, "second", checkpoints["gemma2"], memory[0], 6 << 20, context=64)
    greedy = cluster(tmp_path, "greedy", checkpoints["gemma2"], memory[0], None, context=64)

    async def main() -> None:
        node = harness.start_node(first, "c0")
        with harness.running(node):
            await harness.ready(first, node)
            refused = harness.start_node(second, "c0")
            with harness.running(refused):
                assert await asyncio.to_thread(refused.wait, 60) == 1
            numbers = rf"a quota of {6 << 20} bytes cannot be had: of {16 << 20} bytes {4 << 20} are free"
            told = rf"memory node m0: {numbers}, {4 << 20} of them in one piece \(c0-\w+ has {12 << 20}\)"
            assert re.search(told, refused.log.read_text())
            # Without a quota it gets what is left.
            content = harness.start_node(greedy, "c0")
            with harness.running(content):
                await harness.ready(greedy, content)
                assert sorted(t.quota for t in (await status(first)).tenants) == [4 << 20, 12 << 20]
                async with harness.client(first) as client:
                    assert len((await client.generate([1], max_tokens=3)).tokens) == 3
                assert await asyncio.to_thread(content.stop) == 0
            assert await asyncio.to_thread(node.stop) == 0
        node = harness.start_node(second, "c0")
        with harness.running(node):
            await harness.ready(second, node)
            assert [t.quota for t in (await status(second)).tenants] == [6 << 20]
            assert await asyncio.to_thread(node.stop) == 0

    asyncio.run(main())

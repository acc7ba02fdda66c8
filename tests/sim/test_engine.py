"""What the engine makes of several batches and nodes, to the virtual second; and what one refused request costs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamina.attention import KVCache
from lamina.client import Completion
from lamina.config import ClusterConfig, NodeConfig, PipelineConfig
from lamina.errors import CapacityError
from lamina.runtime.spans import Place
from lamina.sim.cluster import SimCluster
from lamina.sim.empty import EmptyBackend
from lamina.sim.link import LinkModel
from lamina.sim.world import World
from tests.sim.clusters import LINK, empty_model, generate, make_config, new_cluster, seconds, settled

LAYERS = 4
REQUESTS, TOKENS = 8, 100


def decode_s(config: ClusterConfig, costs: dict[str, float], link: LinkModel = LINK) -> float:
    """Virtual seconds that ``REQUESTS`` answers of ``TOKENS`` tokens take, all asked at once."""

    def takes(node: NodeConfig) -> Callable[[str, Place | None], float]:
        return lambda name, at: costs.get(name.lstrip("_"), 0.0)

    async def main(world: World) -> float:
        model = empty_model(config, layers=LAYERS)
        async with SimCluster(world, config, open_model=model, backend=EmptyBackend, seconds=takes) as cluster:
            await cluster.ready()
            async with cluster.client() as client:
                begun_s = world.loop.time()
                answers = await generate(client, [[i, 1] for i in range(REQUESTS)], max_tokens=TOKENS)
                lasted_s = world.loop.time() - begun_s
            assert [len(tokens) for tokens in answers] == [TOKENS] * REQUESTS
            await settled(cluster)
            return lasted_s

    with World(1, model=link, tracing=False) as world:
        return world.run(main(world))


def file_of(batches: int, max_batch: int, compute: tuple[range | None, ...] = (None,)) -> ClusterConfig:
    pipeline = PipelineConfig(batches=batches, max_batch=max_batch, prefill_tokens=32)
    return make_config(compute=compute, memory_nodes=1, pipeline=pipeline)


def test_a_step_takes_what_its_parts_take() -> None:
    """With one batch: for every layer the head, then the longer of tail and attention, and the ways to and fro."""
    costs = {"head": 1e-3, "tail": 2e-3, "past": 5e-3, "finish": 1e-3}
    latency_s = 1e-4
    lasted_s = decode_s(file_of(1, REQUESTS), costs, LinkModel(latency_s=latency_s))
    layer_s = 1e-3 + max(2e-3, 5e-3) + 1e-3 + 2 * latency_s
    assert lasted_s == pytest.approx(TOKENS * LAYERS * layer_s, rel=0.03)


def test_two_batches_compute_while_the_other_is_attended_to() -> None:
    """For every layer one batch takes head and attention one after the other; two take two heads and an attention.

    They could do without the latter: a tail waits behind the other batch's head, as the device takes operations in
    their order, and so k and v come after the other batch's attention has begun.
    """
    costs = {"head": 2e-3, "past": 2e-3}
    one_s, two_s = (decode_s(file_of(batches, REQUESTS // 2), costs) for batches in (1, 2))
    assert two_s / one_s < 0.76


def test_batches_that_gain_nothing_are_gathered_in_one() -> None:
    """Where rows cost nothing, as many as fit run in one batch, and a second one does not slow them."""
    costs = {"head": 2e-3, "past": 2e-3}
    one_s, two_s = (decode_s(file_of(batches, REQUESTS), costs) for batches in (1, 2))
    assert two_s == pytest.approx(one_s, rel=0.01)


def test_replicas_share_the_work_of_several_batches() -> None:
    """Two nodes compute two batches in half of the time that one takes for both."""
    costs = {"head": 4e-3, "past": 1e-4}
    one_s, two_s = (decode_s(file_of(2, REQUESTS // 2, compute), costs) for compute in ((None,), (None, None)))
    assert two_s / one_s == pytest.approx(0.5, abs=0.05)


def test_ranges_of_layers_run_side_by_side() -> None:
    """While one node computes its layers for one batch, the other computes its own for another one."""
    costs = {"head": 4e-3, "past": 1e-4}
    ranges = (range(LAYERS // 2), range(LAYERS // 2, LAYERS))
    one_s, two_s = (decode_s(file_of(2, REQUESTS // 2, compute), costs) for compute in ((None,), ranges))
    assert two_s / one_s < 0.65


class Choosy(EmptyBackend):
    """The second of these to be made has no space for more than 150 tokens of a sequence, against its account."""

    made = 0

    def __init__(self, cache: KVCache, **more: Any) -> None:
        super().__init__(cache, **more)
        Choosy.made += 1
        if Choosy.made == 2:
            cache.reserve, cache.extend = _checked(cache.reserve), _checked(cache.extend)  # type: ignore[method-assign]


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    def checked(sequence: int, tokens: int, **more: Any) -> Any:
        if tokens > 150:
            raise CapacityError(f"sequence {sequence} needs {tokens} tokens of KV cache, 100 of 1000 are free")
        return method(sequence, tokens, **more)

    return checked


@pytest.mark.parametrize("prompt", [[1, 2, 3], [1] * 120], ids=["later", "at once"])
def test_a_refused_reservation_fails_its_request_alone(prompt: list[int]) -> None:
    """With the memory node's sentence; the others are answered, and no node holds anything for it."""
    config = make_config(pipeline=PipelineConfig(batches=2, prefill_tokens=32))
    Choosy.made = 0

    async def main(world: World) -> None:
        model = empty_model(config)
        async with SimCluster(world, config, open_model=model, backend=Choosy, seconds=seconds) as cluster:
            await cluster.ready()
            async with cluster.client() as client:
                long, short = {"prompt": prompt, "max_tokens": 300}, {"prompt": [1, 2, 3], "max_tokens": 20}
                asked = [client.generate(**(long if i % 3 == 1 else short)) for i in range(9)]
                answers = await asyncio.gather(*asked, return_exceptions=True)
                assert [isinstance(a, CapacityError) for a in answers] == [i % 3 == 1 for i in range(9)]
                refusal = r"memory node m1: sequence \d+ needs \d+ tokens of KV cache, 100 of 1000 are free"
                assert re.search(refusal, str(answers[1]))
                assert all(len(a.tokens) == 20 for a in answers if isinstance(a, Completion))
                await settled(cluster)
                assert (await client.status()).requests_running == 0
            assert set((await cluster.stop_all()).values()) == {None}

    with World(1, model=LINK, tracing=False) as world:
        world.run(main(world))


def test_a_front_that_is_told_to_stop_answers_what_was_asked(llama: Path) -> None:
    """Followers go on until it has left; then every node ends without an error."""
    config = make_config(llama, compute=(range(2), range(2, 4)), pipeline=PipelineConfig(batches=2, prefill_tokens=32))

    async def main(world: World) -> None:
        async with new_cluster(world, config) as cluster:
            await cluster.ready()
            async with cluster.client() as client:
                asked = [asyncio.ensure_future(client.generate([i], max_tokens=50)) for i in range(4)]
                await asyncio.sleep(0.01)
                stopping = asyncio.ensure_future(cluster.stop_all())
                assert [len(answer.tokens) for answer in await asyncio.gather(*asked)] == [50] * 4
            assert set((await stopping).values()) == {None}

    with World(1, model=LINK, tracing=False) as world:
        world.run(main(world))

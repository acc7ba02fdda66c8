"""What the front's metrics say of requests, to the virtual second."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lamina.config import PipelineConfig
from lamina.errors import RequestError
from lamina.metrics import exposition
from lamina.node.compute import ComputeNode
from lamina.sim.cluster import SimCluster
from tests.sim.clusters import EMPTY_VOCABULARY, eventually, make_config, simulate

TOKENS = 5
LAYERS = 4


async def samples(cluster: SimCluster, name: str = "c0") -> dict[str, float]:
    """The samples of a node's metrics by name, with their labels as Prometheus writes them."""
    text = exposition(await cluster.nodes[name].metrics()).decode()
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_are_counted_by_their_ends() -> None:
    """Answered, refused and cancelled ones, the tokens of prompts and answers, and one duration for each."""

    async def work(cluster: SimCluster) -> dict[str, float]:
        async with cluster.client() as client:
            await asyncio.gather(*(client.generate([1, 2, 3 + i], max_tokens=TOKENS) for i in range(3)))
            with pytest.raises(RequestError):
                await client.generate([EMPTY_VOCABULARY], max_tokens=TOKENS)
            with pytest.raises(RequestError):
                await client.generate([1], max_tokens=10**6)
            async for _ in client.stream([1, 2], max_tokens=200):
                break
            await eventually(lambda: is_cancelled(cluster))
        return await samples(cluster)

    async def is_cancelled(cluster: SimCluster) -> bool:
        return (await samples(cluster))["lamina_requests_cancelled_total"] == 1

    found = simulate(make_config(), work, layers=LAYERS)

    assert found["lamina_request_success_total finished_reason=length"] == 3
    assert found["lamina_request_success_total finished_reason=stop"] == 0
    assert found["lamina_request_failures_total kind=RequestError"] == 2
    assert found["lamina_prompt_tokens_total"] == 3 * 3 + 2
    assert found["lamina_generation_tokens_total"] >= 3 * TOKENS + 1
    assert found["lamina_e2e_request_latency_seconds_count"] == 3
    assert found["lamina_time_to_first_token_seconds_count"] == found["lamina_queue_time_seconds_count"] == 4
    assert found["lamina_inter_token_latency_seconds_count"] >= 3 * (TOKENS - 1)
    assert found["lamina_steps_total"] > TOKENS


def test_times_add_up_to_those_of_the_client() -> None:
    """Of one request: the first token, then the gaps, make the whole; the client's clock adds the two ways."""

    async def work(cluster: SimCluster) -> tuple[dict[str, float], float]:
        async with cluster.client() as client:
            begun_s = cluster.world.loop.time()
            await client.generate([1, 2, 3], max_tokens=TOKENS)
            return await samples(cluster), cluster.world.loop.time() - begun_s

    found, lasted_s = simulate(make_config(), work, layers=LAYERS)
    whole, first, gaps = (
        found[f"lamina_{name}_seconds_sum"]
        for name in ("e2e_request_latency", "time_to_first_token", "inter_token_latency")
    )

    assert whole == pytest.approx(first + gaps)
    assert gaps > 4 * LAYERS * 1e-4  # four steps of four layers, each of them a head at least
    assert lasted_s - 1e-4 < whole < lasted_s


def test_a_request_that_waits_is_seen_in_the_queue() -> None:
    """With room for one sequence, the second waits as long as the first is answered."""

    async def work(cluster: SimCluster) -> tuple[dict[str, float], dict[str, float]]:
        async with cluster.client() as client:
            answers = [asyncio.ensure_future(client.generate([i, 1], max_tokens=50)) for i in range(2)]
            await asyncio.sleep(0.01)
            meanwhile = await samples(cluster)
            await asyncio.gather(*answers)
            return meanwhile, await samples(cluster)

    meanwhile, after = simulate(make_config(pipeline=PipelineConfig(max_batch=1)), work, layers=LAYERS)

    assert (meanwhile["lamina_requests_running"], meanwhile["lamina_requests_waiting"]) == (1, 1)
    assert (after["lamina_requests_running"], after["lamina_requests_waiting"]) == (0, 0)
    waited_s, whole_s = after["lamina_queue_time_seconds_sum"], after["lamina_e2e_request_latency_seconds_sum"]
    assert waited_s == pytest.approx(whole_s / 3, rel=0.05)  # one of three equal times: its own, and twice the first's


def test_both_ends_of_a_link_count_the_same_bytes() -> None:
    """By lane and direction; and steps have waited for each memory node."""

    async def work(cluster: SimCluster) -> list[dict[str, float]]:
        async with cluster.client() as client:
            await client.generate(list(range(40)), max_tokens=TOKENS)
        return [await samples(cluster, name) for name in ("c0", "m0")]

    front, memory = simulate(make_config(), work, layers=LAYERS)

    for lane in ("decode", "bulk"):
        sent = front[f"lamina_link_bytes_total direction=sent lane={lane} peer=m0"]
        assert sent == memory[f"lamina_link_bytes_total direction=received lane={lane} peer=c0"] > 0
    assert front["lamina_link_wait_seconds_total lane=decode peer=m0"] > 0
    assert front["lamina_kv_tokens state=free"] == memory["lamina_kv_tokens state=free"]


def test_a_follower_has_no_metrics_of_requests() -> None:
    """Only the front counts them, so that sums over nodes are right."""

    async def work(cluster: SimCluster) -> dict[str, float]:
        assert isinstance(cluster.nodes["c1"], ComputeNode)
        return await samples(cluster, "c1")

    found = simulate(make_config(compute=(None, None)), work, layers=LAYERS)

    assert "lamina_steps_total" in found
    assert [name for name in found if name.startswith(("lamina_request", "lamina_kv"))] == []

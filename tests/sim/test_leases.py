"""A memory node keeps the tenant of a front that is gone for its lease, and a new front takes it over."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lamina.attention import LayerShape
from lamina.sim.cluster import SimCluster
from lamina.transport import Hello, Options, Region
from lamina.wire.admin import TenantStatus
from lamina.wire.codec import encode
from lamina.wire.geometry import Geometry
from lamina.wire.tenants import Attach, Detach, Publish, Reserve, Reserved
from tests.sim.clusters import (
    BLOCK_TOKENS,
    eventually,
    has_no_tenant,
    simulate_memory,
)
from tests.sim.raw import RawCompute, asking, raw_compute
from tests.sim.test_tenant_links import LAYERS, MEMORY, Rows, refusal

LEASE_S = 5.0
KEYS = bytes(range(32))
"""The keys of two blocks."""
PUBLISHED = 2 * BLOCK_TOKENS
OTHER = bytes(16)
"""A token that is not the tenant's."""


async def only_tenant(memory: SimCluster) -> TenantStatus:
    (tenant,) = (await memory.status("m0")).tenants
    return tenant


async def lose(front: RawCompute) -> None:
    """The front's link ends, without a word to the memory node."""
    await front.link.close()


async def is_leased(memory: SimCluster) -> bool:
    return (await only_tenant(memory)).lease_s is not None


async def shared(front: RawCompute, sequence: int = 1) -> int:
    """Reserve space for a new sequence that begins with the published blocks; how much of that was found."""
    front.send(Reserve(sequence=sequence, tokens=PUBLISHED + BLOCK_TOKENS, keys=KEYS))
    reply = await front._replies.get()
    assert isinstance(reply, Reserved)
    return reply.shared


async def publish(front: RawCompute, rows: Rows) -> None:
    """Store two blocks as sequence 1, publish them, and go on a little."""
    await front.reserve(1, PUBLISHED + BLOCK_TOKENS)
    for position in range(PUBLISHED):
        await rows.decode(front, position)
    front.send(Publish(sequence=1, keys=KEYS))
    await rows.decode(front, PUBLISHED)


# -- what a new front finds


def test_a_new_front_finds_published_blocks_and_all_space_free() -> None:
    """Within the lease. What it attends to is what the front before has stored."""
    rows = Rows(PUBLISHED + 3)

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, lease=LEASE_S) as front:
            await publish(front, rows)
            await lose(front)
            await eventually(lambda: is_leased(memory))
        await asyncio.sleep(LEASE_S / 2)
        async with raw_compute(memory, LAYERS, term=2, lease=LEASE_S) as front:
            tenant = await only_tenant(memory)
            assert (tenant.sequences, tenant.lease_s, tenant.compute_nodes) == (0, None, ["t0"])
            assert tenant.kv_tokens_free == tenant.kv_tokens_total
            assert await shared(front) == PUBLISHED
            for position in range(PUBLISHED, PUBLISHED + 3):
                await rows.decode(front, position)
            # The lease that began before has no effect any more.
            await asyncio.sleep(2 * LEASE_S)
            await rows.decode(front, PUBLISHED + 3 - 1)
            front.send(Detach())
            await front.end()

    simulate_memory(work)


@pytest.mark.parametrize("lease", [0.0, LEASE_S])
def test_the_end_of_a_front_that_was_superseded_ends_nothing(lease: float) -> None:
    """The tenant is the new front's, and only the loss of that one begins a lease."""
    rows = Rows(1)

    async def work(memory: SimCluster) -> None:
        async with (
            raw_compute(memory, LAYERS, lease=lease) as front,
            raw_compute(memory, LAYERS, term=2, lease=LEASE_S) as new,
        ):
            assert await front.end() == "superseded by t0, the front of tenant t in term 2"
            await new.reserve(1, 1)
            await asyncio.sleep(2 * LEASE_S)
            await rows.decode(new, 0)
            assert (await only_tenant(memory)).lease_s is None

    simulate_memory(work)


def test_what_was_not_complete_is_not_found() -> None:
    """A publication that still waits for keys and values dies with its term, although the new front has a sequence of
    the same number."""
    rows = Rows(PUBLISHED + 1)

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, lease=LEASE_S) as front:
            await front.reserve(1, PUBLISHED + 1)
            for position in range(PUBLISHED - 1):
                await rows.decode(front, position)
            front.send(Publish(sequence=1, keys=KEYS))
            await lose(front)
        async with raw_compute(memory, LAYERS, term=2) as front:
            assert await shared(front) == 0
            for layer in range(len(LAYERS)):
                front.chunk(layer, 1, layer, 0, rows.k[layer, :PUBLISHED, 0], rows.v[layer, :PUBLISHED, 0])
            await rows.decode(front, PUBLISHED)
            assert await shared(front, 2) == 0
            front.send(Publish(sequence=1, keys=KEYS))
            assert await shared(front, 3) == PUBLISHED

    simulate_memory(work)


CHANGES: dict[str, dict[str, Any]] = {
    "a smaller quota": {"quota": MEMORY // 2},
    "another model": {"model": "n"},
    "more slots": {"slots": 3},
    "more rows": {"max_rows": 9},
    "other heads of the same shape": {"first_heads": [2, 2, 2]},
    "larger blocks": {"block_tokens": 32},
}


@pytest.mark.parametrize("alive", [False, True], ids=["lost", "alive"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_front_that_asks_for_another_cache_gets_a_new_one(what: str, alive: bool) -> None:
    """In the place of the one before, whose blocks nobody finds, whether that one's front is there or not."""
    rows = Rows(PUBLISHED + 1)

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, lease=LEASE_S) as front:
            await publish(front, rows)
            if not alive:
                await lose(front)
            async with raw_compute(memory, LAYERS, term=2, **CHANGES[what]) as new:
                assert await shared(new) == 0
                assert (await only_tenant(memory)).quota == CHANGES[what].get("quota", MEMORY)
                if alive:
                    assert "superseded by t0, the front of tenant t in term 2" in await front.end()
                await rows.decode(new, 0)

    simulate_memory(work)


def test_layers_of_another_shape_get_a_new_cache() -> None:
    rows = Rows(PUBLISHED + 1)
    narrow = [LayerShape(q_heads=2, kv_heads=1, qk_dim=16, v_dim=16, scale=0.25)] * 3

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, lease=LEASE_S) as front:
            await publish(front, rows)
            before = (await only_tenant(memory)).kv_tokens_total
            await lose(front)
        async with raw_compute(memory, narrow, term=2) as new:
            assert await shared(new) == 0
            assert (await only_tenant(memory)).kv_tokens_total > before

    simulate_memory(work)


# -- who may take over


def test_a_front_without_the_token_is_refused() -> None:
    """In any term, whether the tenant's front is there or gone; and so is another compute node."""
    rows = Rows(PUBLISHED + 2)
    refused = "tenant t is here, and compute node t{} does not have its token"

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, lease=LEASE_S) as front:
            await publish(front, rows)
            for term in (0, 1, 2, 1000):
                assert refused.format(0) in await refusal(memory, token=OTHER, term=term)
            assert refused.format(1) in await refusal(memory, token=OTHER, member=1)
            await rows.decode(front, PUBLISHED + 1)
            await lose(front)
            assert refused.format(0) in await refusal(memory, token=OTHER, term=2)
        async with raw_compute(memory, LAYERS, term=2) as front:
            assert await shared(front) == PUBLISHED

    simulate_memory(work)


def test_a_front_of_an_older_term_is_refused() -> None:
    """And told the present term; the tenant goes on."""
    rows = Rows(2)

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, term=7, lease=LEASE_S) as front:
            await front.reserve(1, 2)
            await rows.decode(front, 0)
            for term in (0, 6, 7):
                told = await refusal(memory, term=term)
                assert (
                    told == f"tenant t is in term 7 already; to take it over, t0 has to begin a later one, got {term}"
                )
            await rows.decode(front, 1)
            await lose(front)
            assert "tenant t is in term 7 already" in await refusal(memory, term=7)
        async with raw_compute(memory, LAYERS, term=8):
            pass

    simulate_memory(work)


def test_a_front_that_was_refused_may_ask_again_on_its_link() -> None:
    """As it learns the present term from the refusal."""

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, term=7, lease=LEASE_S) as front:
            await lose(front)
        network, address = memory.world.network, memory.config.find("m0").address
        async with await network.connect(address, Hello("compute", "t0"), Options(), deadline_s=1) as link:
            told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
            link.deliver(on_message=told.put_nowait)
            outputs = link.expose(Region("outputs", Geometry(tuple(LAYERS), "float32", 1, 8).output_bytes))
            for term, answer in ((3, "Refused"), (7, "Refused"), (8, "Attached")):
                link.send(encode(Attach(**asking(LAYERS, term=term), outputs=outputs)))
                reply = await told.get()
                assert (reply["type"], reply.get("term")) == (answer, 7 if answer == "Refused" else None)

    simulate_memory(work)


def test_another_compute_node_joins_in_the_present_term_only() -> None:
    """With the token. In a term that is over it is refused, and in one that the front has not begun."""
    rows = Rows(3)

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, term=4, lease=LEASE_S) as front:
            await front.reserve(1, 3)
            join = "compute node 1 wants to join tenant t in term {}, which is in term 4; "
            told = await refusal(memory, member=1, term=3)
            assert told == join.format(3) + "attach again, in the present term"
            told = await refusal(memory, member=1, term=5)
            assert told == join.format(5) + "its front has to attach first"
            async with raw_compute(memory, LAYERS, member=1, term=4) as other:
                await rows.decode(front, 0)
                await rows.decode(other, 1)
                # It stays when the front is gone, and so does its way in.
                await lose(front)
                await eventually(lambda: is_leased(memory))
                await rows.decode(other, 2)
            async with raw_compute(memory, LAYERS, member=1, term=4) as other, raw_compute(memory, LAYERS, term=5):
                assert await other.end() == "superseded by t0, the front of tenant t in term 5"
                told = await refusal(memory, member=1, term=4)
                assert "in term 4, which is in term 5; attach again, in the present term" in told

    simulate_memory(work)


# -- how a tenant ends


def test_a_lease_ends_on_time() -> None:
    """Not before; then memory and quota are free, and compute nodes that have stayed are told why."""

    async def work(memory: SimCluster) -> None:
        loop = asyncio.get_running_loop()
        async with (
            raw_compute(memory, LAYERS, lease=LEASE_S) as front,
            raw_compute(memory, LAYERS, member=1) as other,
        ):
            await front.reserve(1, 100)
            await lose(front)
            await eventually(lambda: is_leased(memory))
            began_s = loop.time()
            told = await other.end()
            assert "tenant t has ended, as its front t0 is gone: " in told
            assert "it did not come back within 5 s" in told
            assert LEASE_S - 0.1 < loop.time() - began_s <= LEASE_S
        assert await has_no_tenant(memory)
        async with raw_compute(memory, LAYERS, tenant="u", quota=MEMORY):
            pass
        # A tenant that comes anew may begin with any term.
        async with raw_compute(memory, LAYERS) as front:
            assert await shared(front) == 0

    simulate_memory(work)


def test_the_status_counts_a_lease_down() -> None:
    """And the memory node waits for that front, if it has no other."""

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, tenant="c0-0123456789abcdef", lease=LEASE_S) as front:
            assert (await memory.status("m0")).state == "ready"
            await lose(front)
            await eventually(lambda: is_leased(memory))
        await asyncio.sleep(2)
        status = await memory.status("m0")
        assert (status.state, status.waiting_for) == ("waiting", "the front of c0-01234567")
        (tenant,) = status.tenants
        assert tenant.lease_s == pytest.approx(3, abs=0.1)

    simulate_memory(work)


def test_a_front_that_leaves_ends_its_tenant_at_once() -> None:
    """Whatever its lease; the others are told."""

    async def work(memory: SimCluster) -> None:
        async with (
            raw_compute(memory, LAYERS, lease=1000) as front,
            raw_compute(memory, LAYERS, member=1) as other,
        ):
            front.send(Detach())
            assert await other.end() == "tenant t has ended, as its front t0 is gone: it has left"
            assert await has_no_tenant(memory)

    simulate_memory(work)


def test_only_the_front_ends_its_tenant(caplog: pytest.LogCaptureFixture) -> None:
    """Another compute node that says so loses its link."""
    rows = Rows(2)

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS) as front, raw_compute(memory, LAYERS, member=1) as other:
            await front.reserve(1, 2)
            await rows.decode(front, 0)
            other.send(Detach())
            await other.end()
            assert "a Detach from compute node 1 of tenant t; expected it only from the tenant's front" in caplog.text
            await rows.decode(front, 1)

    simulate_memory(work)


def test_a_memory_node_stops_without_waiting_for_leases() -> None:
    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, lease=1000) as front:
            await lose(front)
            await eventually(lambda: is_leased(memory))
        began_s = asyncio.get_running_loop().time()
        await memory.stop("m0")
        assert memory.ended == {"m0": None}
        assert asyncio.get_running_loop().time() - began_s < 1

    simulate_memory(work)


def test_a_lease_keeps_others_out_only_of_its_quota() -> None:
    """An unrelated cluster attaches beside it; one that asks for too much is told who has it, and for how long."""
    rows = Rows(2)

    async def work(memory: SimCluster) -> None:
        half = MEMORY // 2
        async with raw_compute(memory, LAYERS, quota=half, lease=LEASE_S) as front:
            await lose(front)
            await eventually(lambda: is_leased(memory))
        told = await refusal(memory, tenant="u", quota=half + 1)
        assert f"(t has {half})" in told
        assert "kept for fronts that may come back: t for 5 s more" in told
        async with raw_compute(memory, LAYERS, tenant="u", quota=half) as other:
            assert (await memory.status("m0")).state == "ready"
            await other.reserve(1, 2)
            await rows.decode(other, 0)
            await asyncio.sleep(LEASE_S)
            await rows.decode(other, 1)
            assert [tenant.name for tenant in (await memory.status("m0")).tenants] == ["u"]

    simulate_memory(work)


def test_another_compute_node_becomes_the_front_only_where_the_present_one_is_gone() -> None:
    """In whatever term it asks; then it has what was published, and the one before has nothing."""
    rows = Rows(PUBLISHED + 1)

    async def work(memory: SimCluster) -> None:
        async with raw_compute(memory, LAYERS, lease=LEASE_S) as front:
            await publish(front, rows)
            for term in (1, 2, 100):
                with pytest.raises(AssertionError, match="has a front, t0, whose part t1 can take only when"):
                    async with raw_compute(memory, LAYERS, member=1, front=1, term=term):
                        pass
            await front.reserve(7, BLOCK_TOKENS)
            await lose(front)
        async with raw_compute(memory, LAYERS, member=1, front=1, term=2, lease=LEASE_S) as other:
            assert await shared(other) == PUBLISHED
            with pytest.raises(AssertionError, match="has a front, t1, whose part t0 can take only when"):
                async with raw_compute(memory, LAYERS, term=100):
                    pass
            other.send(Detach())
            await other.end()

    simulate_memory(work)

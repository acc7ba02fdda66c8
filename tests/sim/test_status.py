"""The front tells what it knows of the members, and since when."""

from __future__ import annotations

import asyncio

from lamina.sim.cluster import SimCluster
from lamina.watch import ClusterWatch
from tests.sim.clusters import make_config, simulate


def test_the_front_tells_the_members() -> None:
    """Of all of them since when they serve; the other compute nodes know the epoch alone."""

    async def work(cluster: SimCluster) -> None:
        before = await cluster.status("c0")
        await asyncio.sleep(100.0)
        front, follower = await cluster.status("c0"), await cluster.status("c1")
        async with ClusterWatch(cluster.config, name="test", network=cluster.world.network) as watch:
            views = await watch.look()

        assert [(member.name, member.state) for member in front.members] == [
            (name, "serving") for name in ("c0", "c1", "m0", "m1")
        ]
        for earlier, later in zip(before.members, front.members, strict=True):
            assert 100.0 <= later.for_s - earlier.for_s < 101.0
        assert front.epoch == follower.epoch > 0
        assert follower.members == []
        assert [view.member and view.member.name for view in views] == ["c0", "c1", "m0", "m1"]
        assert all(view.is_ready for view in views)

    simulate(make_config(compute=(None, None)), work)

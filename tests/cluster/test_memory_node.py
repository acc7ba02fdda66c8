"""A memory node outlives its compute nodes, and gives back what they took."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests import harness
from tests.families import FAMILIES

CACHE_MIB = 512


def resident_mib(node: harness.Node) -> float:
    """Memory of a process that is really there."""
    lines = Path(f"/proc/{node.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def test_the_cache_of_a_compute_node_goes_with_it(tmp_path: Path) -> None:
    """Attach by attach, the memory node is no larger than one cache."""
    path = FAMILIES["llama"].save(tmp_path / "checkpoint")
    (port,) = harness.free_ports(1)
    memory = harness.start_memory(tmp_path, port, memory=f"{CACHE_MIB}MiB")
    config = harness.write_config(tmp_path, path, [port])
    sizes = []
    with harness.running(memory):
        for _ in range(2):
            compute = harness.start_node(config, "c0")
            with harness.running(compute):
                asyncio.run(harness.ready(config, compute))
                sizes.append(resident_mib(memory))
                assert compute.stop() == 0
        assert memory.stop() == 0

    assert sizes[0] > CACHE_MIB
    assert max(sizes) < sizes[0] + CACHE_MIB / 2

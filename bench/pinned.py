"""A cluster of one compute and one memory node on this machine, each pinned to one processor, over shared memory."""

from __future__ import annotations

from pathlib import Path

from lamina.bench.variants import two_processors
from lamina.cluster.local import free_addresses
from lamina.config import (
    ClusterConfig,
    ComputeNodeConfig,
    MemoryNodeConfig,
    ModelConfig,
    PipelineConfig,
    TransportConfig,
    write_cluster,
)


def write_pinned(
    folder: Path, model: ModelConfig, pipeline: PipelineConfig, *, memory: int, peer_timeout: float
) -> ClusterConfig:
    """Write ``folder``/cluster.toml. ``memory`` is bytes of KV cache, ``peer_timeout`` seconds."""
    near, far = (frozenset({cpu}) for cpu in two_processors())
    front, other = free_addresses(2)
    return write_cluster(
        folder / "cluster.toml",
        model,
        [
            ComputeNodeConfig(name="c0", address=front, threads=1, cpus=near),
            MemoryNodeConfig(name="m0", address=other, threads=1, cpus=far, memory=memory),
        ],
        pipeline=pipeline,
        transport=TransportConfig(kind="shm", peer_timeout=peer_timeout),
    )

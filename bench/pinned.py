"""A cluster of one compute and one memory node on this machine, each pinned to one processor, over shared memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lamina.bench.variants import two_processors
from lamina.cluster.local import free_ports
from lamina.config import ClusterConfig, load


def write_pinned(
    folder: Path,
    model: Mapping[str, str | int],
    pipeline: Mapping[str, int],
    *,
    memory: int,
    peer_timeout: float,
) -> ClusterConfig:
    """Write ``folder``/cluster.toml with these keys of ``[model]`` and ``[pipeline]``.

    ``memory`` is the KV cache in bytes, ``peer_timeout`` is in seconds.
    """
    near, far = two_processors()
    front, port = free_ports(2)
    lines = ["[model]", *(f"{key} = {json.dumps(value)}" for key, value in model.items())]
    lines += ["[pipeline]", *(f"{key} = {value}" for key, value in pipeline.items())]
    lines += [
        f'[transport]\nkind = "shm"\npeer_timeout = {peer_timeout}',
        f'[[node]]\nname = "c0"\nrole = "compute"\naddress = "tcp://127.0.0.1:{front}"\nthreads = 1\ncpus = "{near}"',
        f'[[node]]\nname = "m0"\nrole = "memory"\naddress = "tcp://127.0.0.1:{port}"\nthreads = 1\ncpus = "{far}"',
        f'memory = "{memory >> 20}MiB"',
    ]
    file = folder / "cluster.toml"
    file.write_text("\n".join(lines) + "\n")
    return load(file)

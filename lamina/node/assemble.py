"""Join a compute node to its cluster: agree on terms with the others, and attach to memory nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import msgspec

from lamina.compute.peer_control import PeerControl
from lamina.compute.shard_control import ShardControl
from lamina.config import ClusterConfig, format_range
from lamina.errors import ConfigError
from lamina.front.members import Members
from lamina.node.model import BLOCK_TOKENS, ServedModel
from lamina.wire.geometry import shard_by_heads, shard_whole
from lamina.wire.orders import Limits

REMOTE_TOKENS = 64
"""The most prompt tokens of a step whose past lies on memory nodes. More would keep these from other steps for long."""


def step_tokens(config: ClusterConfig) -> int:
    """Return the most tokens of one step."""
    pipeline = config.pipeline
    return pipeline.max_batch + REMOTE_TOKENS + pipeline.prefill_tokens


def limits(config: ClusterConfig, served: ServedModel, members: Members) -> Limits:
    """Return the limits of the front's orders."""
    return Limits(
        slots=config.pipeline.batches,
        tokens=step_tokens(config),
        memory_nodes=frozenset(entry.id for entry in members.entries if entry.role == "memory"),
        context=served.context,
        vocabulary=served.facts.vocabulary,
        block_tokens=BLOCK_TOKENS,
    )


async def agree(config: ClusterConfig, served: ServedModel, peer: PeerControl) -> None:
    """Agree with another compute node on terms, and exchange the regions for carries, if that is still to be done. A
    ConfigError names what differs."""
    if not peer.is_open:
        await peer.meet(partial(_agree, config, served))


async def _agree(config: ClusterConfig, served: ServedModel, peer: PeerControl) -> None:
    nbytes = served.source.carry_bytes(step_tokens(config))
    terms = _terms(config, served)
    theirs = await peer.greet(terms, config.pipeline.batches, nbytes)
    for key in sorted({*terms, *theirs}):
        here, there = terms.get(key, "nothing"), theirs.get(key, "nothing")
        if here != there:
            raise ConfigError(
                f"{config.file}: {key}: {here} here, but {there} on {peer.name}; all compute nodes of a "
                "cluster need the same model and settings"
            )
    peer.open()


class TenantKey(NamedTuple):
    """Names a cluster to its memory nodes, and proves that a compute node belongs to it."""

    name: str
    token: bytes

    @classmethod
    def of(cls, config: ClusterConfig, model: str) -> TenantKey:
        """Return the key of the cluster of a file with the model of this fingerprint. It is the same at every start, so
        that a front that starts anew finds what memory nodes have kept, and whatever memory nodes there are.

        Only those who know the cluster's secret can make it. A cluster without one is open to all of this machine.
        """
        nodes = [(node.name, str(node.address)) for node in config.compute_nodes]
        told = msgspec.json.encode((model, nodes))
        secret = hashlib.blake2b(config.links.secret or b"").digest()

        def digest(purpose: bytes, nbytes: int) -> bytes:
            return hashlib.blake2b(told, digest_size=nbytes, key=secret, person=purpose).digest()

        return cls(f"{config.front.name}-{digest(b'lamina tenant', 16).hex()}", digest(b"lamina token", 32))


async def attach(
    config: ClusterConfig,
    served: ServedModel,
    shard: ShardControl,
    division: Mapping[int, str],
    *,
    member: int,
    front: int,
    key: TenantKey,
    term: int,
    quota: int | None,
) -> None:
    """Attach to a memory node as ``member`` of a tenant, in ``term``, or, as the front, in the next one that it allows;
    in ``quota`` bytes, or all that is free. Raises NodeError if it refuses.

    Where heads are divided, ``division`` has the names of all memory nodes that have some, by member id.
    """
    pipeline = config.pipeline
    if pipeline.partition == "heads":
        place = sorted(division).index(shard.member)
        own = shard_by_heads(served.facts.layers, [division[id_] for id_ in sorted(division)])[place]
    else:
        own = shard_whole(served.facts.layers)
    await shard.attach(
        own,
        served.layout(own.layers),
        tenant=key.name,
        token=key.token,
        term=term,
        lease=config.recovery.lease,
        model=served.facts.fingerprint,
        dtype=served.facts.dtype,
        slots=pipeline.batches,
        max_rows=pipeline.max_batch + REMOTE_TOKENS,
        member=member,
        front=front,
        quota=quota,
    )


def _terms(config: ClusterConfig, served: ServedModel) -> dict[str, str]:
    """Return the settings that must be the same on all compute nodes."""
    terms = {
        "model": served.facts.fingerprint,
        "model.dtype": served.facts.dtype,
        "model.kv_dtype": served.kv_dtype,
        "model.context": served.context,
        "layers of compute nodes": {n.name: format_range(n.layers) for n in config.compute_nodes if n.layers},
    }
    for key in ("batches", "max_batch", "prefill_tokens", "partition"):
        terms[f"pipeline.{key}"] = getattr(config.pipeline, key)
    return {key: str(value) for key, value in terms.items()}

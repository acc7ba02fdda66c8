"""Checks of the nodes of a cluster file: which answer, how fast the links are, and how fast they must be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lamina.admin import AdminClient
from lamina.config import ClusterConfig, NodeConfig
from lamina.errors import CheckpointError, ConfigError, ConnectError, HandshakeError, LaminaError
from lamina.node.probe import CONNECT_S, MEASURE_S, measure
from lamina.ops.doctor.finding import Finding, State, guarded
from lamina.ops.doctor.machine import is_here
from lamina.runtime.sockets import Sockets
from lamina.transport.choice import TRANSPORTS
from lamina.wire.admin import Probed

REACH_S = 2.0
"""How long a node may take to listen, and to answer."""

_HINTS = {
    "secret": "give all nodes and this machine a copy of the same secret file",
    "version": "install the same release of Lamina everywhere",
    "TLS": "give all nodes and this machine certificates of the same authority, or none of them",
    "certificate": "give all nodes and this machine certificates of the same authority, or none of them",
}
"""The advice for a refused handshake, by a word of the refusal."""


@dataclass(frozen=True)
class Pair:
    """The measured link from a compute node to a memory node by one transport."""

    compute: str
    memory: str
    transport: str
    p50_us: float
    p99_us: float
    gb_per_s: float
    error: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


async def look(config: ClusterConfig, step_ms: float) -> tuple[list[Finding], list[Pair]]:
    """Ask every node, measure every pair of a compute and a memory node, and compare with what is needed."""
    reached = await asyncio.gather(*(_reach(config, node) for node in config.node))
    findings = [finding for _, finding in reached]
    links = {node.name: link for node, (link, _) in zip(config.node, reached, strict=True) if link}
    try:
        pairs = await _measure_all(config, links)
    finally:
        await asyncio.gather(*(link.close() for link in links.values()))
    findings += [_told(config, pair) for pair in pairs]
    findings += guarded("minimum bandwidth", partial(_enough, config, pairs, step_ms))
    return findings, pairs


# -- which nodes answer


async def _reach(config: ClusterConfig, node: NodeConfig) -> tuple[AdminClient | None, Finding]:
    item = f"node {node.name}"
    place = f"{node.role} node at {node.address}"
    try:
        client = await AdminClient.connect(node.address, config.options(), name="doctor", deadline_s=REACH_S)
    except HandshakeError as e:
        hint = next((hint for word, hint in _HINTS.items() if word in str(e)), "something else listens there")
        return None, Finding(item, "fail", f"{place}: reached by TCP, but {_reason(e, node)}", hint)
    except ConnectError as e:
        # Before the first run, it is normal that only the memory nodes are running.
        state: State = "fail" if node.role == "memory" else "warn"
        if isinstance(e.__cause__, ConnectionRefusedError):
            start = f"lamina node {config.file} --name {node.name}"
            advice = f"start it with `{start}`; if it runs, correct the address"
            return None, Finding(item, state, f"{place}: no process listens there", advice)
        advice = "check for a firewall, a wrong address, or a process that hangs"
        return None, Finding(item, state, f"{place}: no answer: {_reason(e, node)}", advice)
    except LaminaError as e:
        return None, Finding(item, "fail", f"{place}: {e}")
    if client.peer.role != node.role:
        await client.close()
        return None, Finding(
            item, "fail", f"{place}: a {client.peer.role} node answers, {client.peer.name}", "correct it"
        )
    try:
        async with asyncio.timeout(REACH_S):
            status = await client.status()
    except (LaminaError, TimeoutError) as e:
        client.abort("it did not report its status")
        return None, Finding(item, "fail", f"{place}: does not report its status: {e or 'no answer'}", "read its log")
    waiting = f" for {status.waiting_for}" if status.waiting_for else ""
    known_as = "" if status.name == node.name else f", calls itself {status.name}"
    return client, Finding(item, "ok", f"{place}: {status.state}{waiting}{known_as}")


def _reason(error: LaminaError, node: NodeConfig) -> str:
    return str(error).removeprefix(f"{node.address}: ")


# -- how fast


async def _measure_all(config: ClusterConfig, links: dict[str, AdminClient]) -> list[Pair]:
    """Measure one pair after the other, so that measurements do not disturb each other."""
    kinds = TRANSPORTS if config.links.kind == "auto" else (config.links.kind,)
    compute = {n.name: links[n.name] for n in config.compute_nodes if n.name in links}
    pairs = []
    for name, client in compute.items() or {"": None}.items():
        for node in config.memory_nodes:
            if node.name in links:
                pairs += [await _measure(config, name, client, node, kind) for kind in kinds]
    return pairs


async def _measure(config: ClusterConfig, name: str, client: AdminClient | None, node: NodeConfig, kind: Any) -> Pair:
    """Measure from the compute node ``name``, or from this process if no compute node runs."""
    try:
        async with asyncio.timeout(CONNECT_S + 2 * MEASURE_S):
            if client is None:
                probed = await measure(
                    Sockets(), node.address, "doctor", replace(config.options(config.front), kind=kind)
                )
            else:
                probed = await client.probe(node.name, kind)
    except TimeoutError:
        probed = Probed(kind=kind, error="no answer in time")
        if client:
            client.abort("it does not answer in time")  # a late answer would be taken for the next one
    except LaminaError as e:
        probed = Probed(kind=kind, error=_reason(e, node))
    return Pair(
        compute=name,
        memory=node.name,
        transport=kind,
        p50_us=probed.p50_s * 1e6,
        p99_us=probed.p99_s * 1e6,
        gb_per_s=probed.bytes_per_s / 1e9,
        error=probed.error.removeprefix(f"{node.address}: "),
    )


def _told(config: ClusterConfig, pair: Pair) -> Finding:
    item = f"{pair.compute or 'this machine'} to {pair.memory} by {pair.transport}"
    if pair.error:
        return Finding(item, "none" if config.links.kind == "auto" else "fail", pair.error)
    found = f"8 KiB and back in {pair.p50_us:.0f} µs (p99 {pair.p99_us:.0f} µs), {pair.gb_per_s:.3g} GB/s"
    return Finding(item, "ok", found, "" if pair.compute else f"measure again when {config.front.name} runs")


# -- how fast it must be


def _enough(config: ClusterConfig, pairs: list[Pair], step_ms: float) -> Iterator[Finding]:
    """Check that the link to each memory node has its share of the minimum bandwidth, by the transport that is used."""
    from lamina.model.checkpoint import Checkpoint
    from lamina.model.report import SLOWDOWN, report

    batch = config.pipeline.max_batch
    try:
        model = report(config.model_path, config.model.dtype, batch, step_ms)
        shares = _shares(Checkpoint.open(config.model_path, config.model.dtype), config)
    except CheckpointError as e:
        state: State = "fail" if is_here(config.front.address) else "warn"
        yield Finding("minimum bandwidth", state, str(e), "run the doctor on a machine that has the model")
        return
    needed = model.bandwidth / 1e9
    yield Finding(
        "minimum bandwidth",
        "ok",
        f"{needed:.3g} GB/s over all memory nodes, for batch {batch}, steps of {step_ms:g} ms (--step-ms) and a "
        f"slowdown of {SLOWDOWN:g}",
    )
    ways: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        if not pair.error:
            ways.setdefault(
                (pair.compute, pair.memory), pair
            )  # pairs are in the order in which links choose their transport
    for node in config.memory_nodes:
        own = [taken for taken in ways.values() if taken.memory == node.name]
        if not own:
            continue
        taken = min(own, key=lambda pair: pair.gb_per_s)
        share = needed * shares[node.name] / len(own)
        found = f"{taken.gb_per_s:.3g} GB/s by {taken.transport}, its share of the minimum is {share:.3g} GB/s"
        if taken.gb_per_s < share:
            advice = "use a faster network, a smaller max_batch, or more memory nodes on more network cards"
            yield Finding(f"bandwidth to {node.name}", "fail", found, advice)
        else:
            yield Finding(f"bandwidth to {node.name}", "ok", found)


def _shares(checkpoint: Any, config: ClusterConfig) -> dict[str, float]:
    """Return each memory node's share of the traffic: that of its KV heads, if the model's configuration has them."""
    from lamina.wire.geometry import split_heads

    names = [n.name for n in config.memory_nodes]
    heads = getattr(checkpoint.config.get_text_config(), "num_key_value_heads", None)
    if not isinstance(heads, int):
        return dict.fromkeys(names, 1 / len(names))
    if heads < len(names):
        raise ConfigError(f"{heads} KV heads cannot be split over {len(names)} memory nodes; use at most {heads}")
    return {name: len(own) / heads for name, own in zip(names, split_heads(heads, len(names)), strict=True)}

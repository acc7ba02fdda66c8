"""The nodes of a cluster file: who answers, how fast the ways between them are, and how fast they must be."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lamina.config import ClusterConfig, NodeConfig
from lamina.errors import CheckpointError, ConfigError, ConnectError, HandshakeError, LaminaError, TransportError
from lamina.node.probe import CONNECT_S, MEASURE_S, measure
from lamina.ops.doctor.finding import Finding, State, guarded
from lamina.ops.doctor.machine import is_here
from lamina.transport import Hello, Link, connect
from lamina.transport.choice import TRANSPORTS
from lamina.wire.admin import AskStatus, Probe, Probed, Status
from lamina.wire.codec import decode, encode

REACH_S = 2.0
"""How long a node may take to answer, or to begin to listen."""

_HINTS = {
    "secret": "give all nodes and this machine a copy of the same secret file",
    "version": "install the same release of Lamina everywhere",
    "TLS": "give all nodes and this machine certificates of the same authority, or none of them",
    "certificate": "give all nodes and this machine certificates of the same authority, or none of them",
}
"""What helps against a refused handshake, by a word of the refusal."""


@dataclass(frozen=True)
class Pair:
    """The way from a compute node to a memory node by one transport, as it was measured."""

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
    """Ask every node of the file, measure every pair of compute and memory node, compare with what the model needs."""
    reached = await asyncio.gather(*(_reach(config, node) for node in config.node))
    findings = [finding for _, finding in reached]
    links = {node.name: link for node, (link, _) in zip(config.node, reached, strict=True) if link}
    try:
        pairs = await _measure_all(config, links)
    finally:
        await asyncio.gather(*(link.close() for link in links.values()))
    findings += [_told(config, pair) for pair in pairs]
    findings += guarded("least bandwidth", partial(_enough, config, pairs, step_ms))
    return findings, pairs


# -- who answers


async def _reach(config: ClusterConfig, node: NodeConfig) -> tuple[Link | None, Finding]:
    item = f"node {node.name}"
    place = f"{node.role} node at {node.address}"
    try:
        link = await connect(node.listen, Hello("doctor", "doctor"), config.options(), deadline_s=REACH_S)
    except HandshakeError as e:
        hint = next((hint for word, hint in _HINTS.items() if word in str(e)), "something else listens there")
        return None, Finding(item, "fail", f"{place}: reached by TCP, but {_reason(e, node)}", hint)
    except ConnectError as e:
        # Whoever comes before the first run may well have the memory nodes alone.
        state: State = "fail" if node.role == "memory" else "warn"
        if isinstance(e.__cause__, ConnectionRefusedError):
            start = f"lamina node --role {node.role} --config {config.file} --name {node.name}"
            advice = f"start it with `{start}`; if it runs, correct the address"
            return None, Finding(item, state, f"{place}: nobody listens there", advice)
        advice = "look for a firewall, a wrong address, or a process that hangs"
        return None, Finding(item, state, f"{place}: no answer: {_reason(e, node)}", advice)
    except LaminaError as e:
        return None, Finding(item, "fail", f"{place}: {e}")
    if link.info.peer.role != node.role:
        await link.close()
        return None, Finding(
            item, "fail", f"{place}: a {link.info.peer.role} node answers, {link.info.peer.name}", "correct it"
        )
    try:
        async with asyncio.timeout(REACH_S):
            status = await _ask(link, AskStatus(), Status)
    except (LaminaError, TimeoutError) as e:
        link.abort("it gave no status")
        return None, Finding(item, "fail", f"{place}: gives no status: {e or 'no answer'}", "look into its log")
    waiting = f" for {status.waiting_for}" if status.waiting_for else ""
    known_as = "" if status.name == node.name else f", calls itself {status.name}"
    return link, Finding(item, "ok", f"{place}: {status.state}{waiting}{known_as}")


def _reason(error: LaminaError, node: NodeConfig) -> str:
    return str(error).removeprefix(f"{node.listen}: ")


async def _ask(link: Link, message: AskStatus | Probe, kind: Any) -> Any:
    """The answer to one message; the link's error if it ends first."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def on_message(plain: dict[str, Any]) -> None:
        if not answer.done():
            answer.set_result(decode(plain, kind))

    def on_lost(error: TransportError) -> None:
        if not answer.done():
            answer.set_exception(error)

    link.deliver(on_message=on_message, on_lost=on_lost)
    link.send(encode(message))
    return await answer


# -- how fast


async def _measure_all(config: ClusterConfig, links: dict[str, Link]) -> list[Pair]:
    """One after the other, so that measurements do not disturb each other."""
    kinds = TRANSPORTS if config.links.kind == "auto" else (config.links.kind,)
    compute = {n.name: links[n.name] for n in config.compute_nodes if n.name in links}
    pairs = []
    for name, link in compute.items() or {"": None}.items():
        for node in config.memory_nodes:
            if node.name in links:
                pairs += [await _measure(config, name, link, node, kind) for kind in kinds]
    return pairs


async def _measure(config: ClusterConfig, name: str, link: Link | None, node: NodeConfig, kind: Any) -> Pair:
    """By the compute node of that name; from here where none runs."""
    try:
        async with asyncio.timeout(CONNECT_S + 2 * MEASURE_S):
            if link is None:
                probed = await measure(node.listen, "doctor", replace(config.options(config.front), kind=kind))
            else:
                probed = await _ask(link, Probe(node=node.name, kind=kind), Probed)
    except TimeoutError:
        probed = Probed(kind=kind, error="no answer in time")
        if link:
            link.abort("it does not answer in time")  # a late answer would be taken for the next one
    except LaminaError as e:
        probed = Probed(kind=kind, error=_reason(e, node))
    return Pair(
        compute=name,
        memory=node.name,
        transport=kind,
        p50_us=probed.p50_s * 1e6,
        p99_us=probed.p99_s * 1e6,
        gb_per_s=probed.bytes_per_s / 1e9,
        error=probed.error.removeprefix(f"{node.listen}: "),
    )


def _told(config: ClusterConfig, pair: Pair) -> Finding:
    item = f"{pair.compute or 'this machine'} to {pair.memory} by {pair.transport}"
    if pair.error:
        return Finding(item, "none" if config.links.kind == "auto" else "fail", pair.error)
    found = f"8 KiB and back in {pair.p50_us:.0f} µs (p99 {pair.p99_us:.0f} µs), {pair.gb_per_s:.3g} GB/s"
    return Finding(item, "ok", found, "" if pair.compute else f"measure again when {config.front.name} runs")


# -- how fast it must be


def _enough(config: ClusterConfig, pairs: list[Pair], step_ms: float) -> Iterator[Finding]:
    """Whether each memory node's share of the least bandwidth is there, by the transport that links take."""
    from lamina.model.checkpoint import Checkpoint
    from lamina.model.report import SLOWDOWN, report

    batch = config.pipeline.max_batch
    try:
        model = report(config.model_path, config.model.dtype, batch, step_ms)
        shares = _shares(Checkpoint.open(config.model_path, config.model.dtype), config)
    except CheckpointError as e:
        state: State = "fail" if is_here(config.front.listen) else "warn"
        yield Finding("least bandwidth", state, str(e), "look from a machine that has the model")
        return
    needed = model.bandwidth / 1e9
    yield Finding(
        "least bandwidth",
        "ok",
        f"{needed:.3g} GB/s over all memory nodes, for batch {batch}, steps of {step_ms:g} ms (--step-ms) and a "
        f"slowdown of {SLOWDOWN:g}",
    )
    ways: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        if not pair.error:
            ways.setdefault((pair.compute, pair.memory), pair)  # measured in the order in which links choose
    for node in config.memory_nodes:
        own = [taken for taken in ways.values() if taken.memory == node.name]
        if not own:
            continue
        taken = min(own, key=lambda pair: pair.gb_per_s)
        share = needed * shares[node.name] / len(own)
        found = f"{taken.gb_per_s:.3g} GB/s by {taken.transport}, its share of the least is {share:.3g} GB/s"
        if taken.gb_per_s < share:
            advice = "a faster network, a smaller max_batch, or more memory nodes over more network cards"
            yield Finding(f"bandwidth to {node.name}", "fail", found, advice)
        else:
            yield Finding(f"bandwidth to {node.name}", "ok", found)


def _shares(checkpoint: Any, config: ClusterConfig) -> dict[str, float]:
    """Of each memory node in what is sent: as its KV heads, where the model's configuration tells their number."""
    from lamina.wire.geometry import split_heads

    names = [n.name for n in config.memory_nodes]
    heads = getattr(checkpoint.config.get_text_config(), "num_key_value_heads", None)
    if not isinstance(heads, int):
        return dict.fromkeys(names, 1 / len(names))
    if heads < len(names):
        raise ConfigError(f"{heads} KV heads cannot be split over {len(names)} memory nodes; use at most {heads}")
    return {name: len(own) / heads for name, own in zip(names, split_heads(heads, len(names)), strict=True)}

"""The work of a cluster between two moments, from the counters of its nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lamina.errors import LaminaError
from lamina.wire.admin import Status


@dataclass(frozen=True)
class Figures:
    """The work of a cluster over ``seconds``.

    ``layer_us`` divides the time of a layer, in microseconds: ``whole`` is the wall time, ``compute`` the busy time of
    the busiest compute node's device, ``attention`` that of the busiest memory node, and ``wire`` the rest: the wire,
    the event loops, and waiting. If attention overlaps with computing, the parts may add up to more than the whole.
    """

    seconds: float
    steps: int
    tokens: int
    layers: int
    wire_bytes: int
    layer_us: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def wire_bytes_per_token(self) -> float:
        return self.wire_bytes / self.tokens


def between(before: Mapping[str, Status], after: Mapping[str, Status], seconds: float) -> Figures:
    """Return the figures from two sets of statuses by node name, taken ``seconds`` apart.

    Every difference is between counters of the same node, so no clocks are compared. LaminaError if no token was
    generated in between.
    """
    compute_nodes = [name for name, status in after.items() if status.role == "compute"]
    layers = sum(after[n].layers - before[n].layers for n in compute_nodes)
    tokens = sum(after[n].tokens_generated - before[n].tokens_generated for n in compute_nodes)
    if not layers or not tokens:
        raise LaminaError("no token was generated while the cluster was measured; ask for a longer answer")
    busy = {n: (after[n].busy_s - before[n].busy_s) / layers for n in after}
    compute = max(busy[n] for n in compute_nodes)
    attention = max(busy[n] for n in after if n not in compute_nodes)
    whole = seconds / layers
    parts = {
        "whole": whole,
        "compute": compute,
        "attention": attention,
        "wire": max(0.0, whole - compute - attention),
    }
    return Figures(
        seconds=seconds,
        steps=max(after[n].steps - before[n].steps for n in compute_nodes),  # the front counts all steps
        tokens=tokens,
        layers=layers,
        wire_bytes=sum(_wire_bytes(after[n]) - _wire_bytes(before[n]) for n in compute_nodes),
        layer_us={name: part * 1e6 for name, part in parts.items()},
    )


def _wire_bytes(status: Status) -> int:
    """Count the bytes on a node's links; of a link between two compute nodes, each counts what it sends."""
    return sum(peer.bytes_sent + (peer.bytes_received if peer.kv_heads else 0) for peer in status.peers)

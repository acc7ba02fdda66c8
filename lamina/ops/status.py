"""``lamina status``: the state of every node of a cluster file, once or again and again."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from msgspec import to_builtins
from rich.console import Group, RenderableType
from rich.text import Text

from lamina.config import ClusterConfig
from lamina.ops.live import COLOURS, can_draw, compact, draw_until_q, epoch_of, head, look_once, look_until_q, number
from lamina.table import Cell, draw_table, print_table, print_text
from lamina.watch import NodeView

_HEADINGS = ("node", "role", "state", "for", "KV", "requests", "links", "rate")


def run(config: ClusterConfig, *, as_json: bool, watch: bool) -> int:
    """Ask all nodes and print their states. Return the exit status, which is 0 only if all nodes are ready.

    With ``watch`` this is done every second until q or Ctrl-C, and the exit status is 0.
    """

    def show(views: list[NodeView], *, indent: int | None = None) -> None:
        if as_json:
            sys.stdout.write(json.dumps(_as_json(views), indent=indent) + "\n")
        else:
            _print(config, views)

    def show_next(views: list[NodeView]) -> None:
        show(views)
        if not as_json:
            sys.stdout.write("\n")
        sys.stdout.flush()

    if not watch:
        views = look_once(config, "status")
        show(views, indent=2)
        return 0 if _all_ready(views) else 1
    if can_draw() and not as_json:
        draw_until_q(config, "status", lambda views: _drawn(config, views))
    else:
        look_until_q(config, "status", show_next)
    return 0


def _all_ready(views: Sequence[NodeView]) -> bool:
    return all(view.is_ready for view in views)


def _print(config: ClusterConfig, views: Sequence[NodeView]) -> None:
    print_text(head(config.file, views).plain)
    print_table(_HEADINGS, map(_row, views))
    for sentence in _sentences(views):
        print_text(sentence)


def _drawn(config: ClusterConfig, views: Sequence[NodeView]) -> RenderableType:
    rest = [Text(sentence) for sentence in _sentences(views)]
    quits = Text("q quits", style="dim")
    return Group(head(config.file, views), Text(), draw_table(_HEADINGS, map(_row, views)), *rest, Text(), quits)


def _row(view: NodeView) -> tuple[Cell, ...]:
    status, rates, member = view.status, view.rates, view.member
    state = Text(view.word, style=COLOURS.get(view.word, "red"))
    lasts = _lasting(member.for_s) if member else None
    if status is None:
        return (view.node.name, view.node.role, state, lasts)
    kv = rate = requests = None
    if total := status.kv_tokens_total:
        kv = f"{(total - status.kv_tokens_free) / total:.0%}"
        requests = compact(status.sequences)
        if status.requests_waiting:
            requests += f", {compact(status.requests_waiting)} wait"
    if rates and (total or status.state == "ready"):
        is_front = status.role == "compute" and total  # the others count no tokens
        per_s, unit = (rates.tokens, "tokens/s") if is_front else (rates.layers, "layers/s")
        rate = f"{number(per_s) if per_s < 1000 else compact(round(per_s))} {unit}"
    links = ", ".join(sorted({peer.transport for peer in status.peers}))
    return (view.node.name, view.node.role, state, lasts, kv, requests, links, rate)


def _sentences(views: Sequence[NodeView]) -> list[str]:
    """Return what has to be known of nodes beside the table."""
    found = []
    for view in views:
        name, status, member = view.node.name, view.status, view.member
        if status is None:
            found.append(f"{name}, {view.node.address}: {view.reason}")
            continue
        if status.waiting_for:
            found.append(f"{name} waits for {status.waiting_for}")
        leased = [tenant for tenant in status.tenants if tenant.lease_s is not None]
        found += [f"{name} keeps what {t.name} has there for {t.lease_s:.0f} s without its front" for t in leased]
        if status.journal_failure:
            found.append(f"{name} cannot write its journal: {status.journal_failure}")
        if member and not view.is_ready and (status.state == "ready" or member.state == "lost"):
            found.append(f"{name} is {status.state}, but {member.state} to the front")
    return found


def _lasting(seconds: float) -> str:
    """Return a duration in two units at most: 12s, 3m12s, 2h05m, 4d03h."""
    whole = int(seconds)
    for size, unit, part, of_part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02}{of_part}"
    return f"{whole}s"


def _as_json(views: Sequence[NodeView]) -> dict[str, Any]:
    return {"ready": _all_ready(views), "epoch": epoch_of(views), "nodes": [_node_as_json(view) for view in views]}


def _node_as_json(view: NodeView) -> dict[str, Any]:
    known = {
        "name": view.node.name,
        "role": view.node.role,
        "address": str(view.node.address),
        "member": to_builtins(view.member),
        "rates": to_builtins(view.rates),
    }
    if view.status is None:
        return known | {"state": view.word, "reason": view.reason}
    counters: dict[str, Any] = to_builtins(view.status)
    del counters["type"]
    return counters | known

"""``lamina top``: what the nodes of a cluster do right now, refreshed on a terminal; elsewhere one snapshot."""

from __future__ import annotations

import shutil
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lamina.config import ClusterConfig
from lamina.ops.live import COLOURS, can_draw, compact, draw_until_q, head, look_once, number
from lamina.watch import NodeView, front_of

HISTORY = 60
"""How many looks the curve of tokens per second shows."""

_LEVELS = " ▁▂▃▄▅▆▇█"
_PARTS = " ▏▎▍▌▋▊▉█"
_BAR = 10
"""Characters of a bar."""


def run(config: ClusterConfig) -> int:
    """Show the cluster until q or Ctrl-C. Without a terminal that can be drawn on, print what it does in one second."""
    if can_draw():
        curve: deque[float] = deque(maxlen=HISTORY)

        def draw(views: list[NodeView]) -> RenderableType:
            curve.append(sum(view.rates.tokens for view in views if view.rates))
            return screen(config.file, views, curve, footer="q quits")

        draw_until_q(config, "top", draw)
    else:
        console = Console(width=max(80, shutil.get_terminal_size().columns), highlight=False, force_terminal=False)
        with console.capture() as printed:
            console.print(screen(config.file, look_once(config, "top"), []))
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in printed.get().splitlines())
    return 0


# -- what is shown


def screen(file: Path, views: Sequence[NodeView], curve: Sequence[float], footer: str = "") -> RenderableType:
    """Return what ``views`` say: the cluster, its nodes, its links. It fits 80 columns."""
    parts: list[RenderableType] = [head(file, views), _summary(views, curve), Text(), _nodes(views)]
    links = _links(views)
    if links.row_count:
        parts += [Text(), links]
    if footer:
        parts += [Text(), Text(footer, style="dim")]
    return Group(*parts)


def _summary(views: Sequence[NodeView], curve: Sequence[float]) -> RenderableType:
    """Return what the front says about the requests of the cluster."""
    front = front_of(views)
    status, rates = (front.status, front.rates) if front else (None, None)
    if status is None:
        return Text("the front does not answer, so nothing is known of requests", style="red")
    table = Table.grid(padding=(0, 2, 0, 0))
    shared = f"{rates.shared_tokens / rates.prompt_tokens:.0%}" if rates and rates.prompt_tokens else "–"
    table.add_row(
        _fact("running", f"{status.requests_running:,}"),
        _fact("waiting", f"{status.requests_waiting:,}"),
        _fact("preempted", f"{status.preemptions:,}"),
        _fact("tokens/s", number(rates.tokens) if rates else "–"),
        _fact("prefill/s", number(rates.prompt_tokens) if rates else "–"),
        _fact("shared", shared),
    )
    if not any(curve):
        return table
    return Group(table, Text.assemble(("tokens/s  ", "dim"), (sparkline(curve), "cyan"), f"  {number(max(curve))} max"))


def _fact(name: str, value: str) -> Text:
    return Text.assemble((value, "bold"), (f" {name}", "dim"))


def _nodes(views: Sequence[NodeView]) -> Table:
    table = _table("node", "role", "state", "busy", "KV cache", "seqs")
    table.columns[2].no_wrap = False
    table.columns[2].overflow = "fold"
    table.columns[5].justify = "right"
    for view in views:
        status, rates = view.status, view.rates
        if status is None:
            table.add_row(view.node.name, view.node.role, Text(view.reason, style="red"))
            continue
        busy = bar(rates.busy, "cyan") if rates else Text("–", style="dim")
        used, total = status.kv_tokens_total - status.kv_tokens_free, status.kv_tokens_total
        kv = Text.assemble(bar(used / total, "magenta"), (f" of {compact(total)}", "dim")) if total else Text()
        table.add_row(
            view.node.name,
            view.node.role,
            Text(view.state, style=COLOURS.get(status.state, "")),
            busy,
            kv,
            f"{status.sequences:,}" if total else "",
        )
    return table


def _links(views: Sequence[NodeView]) -> Table:
    """Return a row for each link, as the compute node sees it; of two compute nodes, the earlier one."""
    table = _table("link", "transport", "sent", "received", "steps wait")
    for i in (2, 3, 4):
        table.columns[i].justify = "right"
    order = {view.node.name: i for i, view in enumerate(views)}
    for i, view in enumerate(views):
        if view.status is None or view.node.role != "compute":
            continue
        rates = {link.peer: link for link in view.rates.links} if view.rates else {}
        for peer in view.status.peers:
            if not peer.kv_heads and order.get(peer.name, 0) < i:
                continue
            link = rates.get(peer.name)
            figures = (f"{link.sent / 1e6:,.2f} MB/s", f"{link.received / 1e6:,.2f} MB/s") if link else ("–", "–")
            table.add_row(
                f"{view.node.name} – {peer.name}", peer.transport, *figures, f"{link.waited:.0%}" if link else "–"
            )
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    return table


def bar(part: float, colour: str) -> Text:
    """Return a bar for a part from 0 to 1, and the part in per cent."""
    part = min(1.0, max(0.0, part))
    eighths = round(part * _BAR * 8)
    full = "█" * (eighths // 8) + (_PARTS[eighths % 8] if eighths % 8 else "")
    return Text.assemble((full, colour), ("·" * (_BAR - len(full)), "dim"), f"{part:5.0%}")


def sparkline(values: Sequence[float]) -> str:
    """Return a curve of one line; its highest value fills the line."""
    highest = max(values) or 1.0
    return "".join(_LEVELS[round(value / highest * (len(_LEVELS) - 1))] for value in values)

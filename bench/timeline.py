"""The timeline of a pipeline: what each node computes in one step of every batch, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

SHADES = {"head": 1.0, "past": 1.0, "tail": 0.6, "finish": 0.6}
OTHER_SHADE = 0.3
LABEL_SHARE = 0.012
"""The least width, as a share of the timeline, in which a layer's number can be read."""


class Block(NamedTuple):
    """One operation, in milliseconds from the beginning of the timeline."""

    node: str
    name: str
    batch: int
    layer: int
    start_ms: float
    end_ms: float


def draw_timeline(axes: Any, blocks: Sequence[Sequence[Any]], colour_of: Callable[[str], str]) -> None:
    """Draw blocks: a band for each node, in it a row and a colour for each batch, and the layers' numbers."""
    shown = [Block(*block) for block in blocks]
    end = max(block.end_ms for block in shown)
    batches = sorted({block.batch for block in shown})
    nodes = list(dict.fromkeys(block.node for block in shown))
    height = 0.9 / len(batches)
    labelled: set[int] = set()
    for block in shown:
        bottom = nodes.index(block.node) + height * batches.index(block.batch)
        width = block.end_ms - block.start_ms
        shade, name = SHADES.get(block.name, OTHER_SHADE), f"batch {block.batch}"
        label, colour = name if shade == 1.0 and block.batch not in labelled else None, colour_of(name)
        labelled |= {block.batch} if label else set()
        axes.barh(bottom, width, height * 0.9, block.start_ms, align="edge", color=colour, alpha=shade, label=label)
        if shade == 1.0 and width > LABEL_SHARE * end:
            middle = block.start_ms + width / 2
            axes.text(middle, bottom + height * 0.45, str(block.layer), ha="center", va="center", fontsize=7, color="w")
    axes.set_yticks([i + 0.45 for i in range(len(nodes))], nodes)
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.set_title(
        f"one step of {len(batches)} batches; numbers are layers; dark: head and past, middle: tail and finish, light: "
        f"the rest",
        fontsize=10,
        loc="left",
    )
    axes.set(xlabel="ms", ylabel="node")
    axes.spines[["top", "right"]].set_visible(False)

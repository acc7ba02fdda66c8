"""The report on a cut checkpoint: its slices, what they move, and the network bandwidth that this needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from lamina.errors import UsageError
from lamina.model.capture import capture
from lamina.model.checkpoint import Checkpoint
from lamina.model.slices import SliceBlueprint, SliceSizes, cut_into_slices
from lamina.table import Cell, print_table, print_text

SLOWDOWN = 0.2
"""The share of a step's time that transfers may add, as in figure 4 of the Lamina paper (arXiv 2405.01814)."""


@dataclass(frozen=True)
class SliceGroup:
    """Slices ``first..last``, which are the same functions of different weights; ``sizes`` holds those of one slice."""

    first: int
    last: int
    sizes: SliceSizes


@dataclass(frozen=True)
class Report:
    """A model cut into slices.

    ``parameters`` counts tied tensors once. ``attention_bytes`` is the size of q, k, v and o of one token in all
    layers, and ``kv_bytes`` the part of it that stays in the KV cache.
    """

    model: str
    architecture: str
    dtype: str
    slices: int
    functions: int
    groups: tuple[SliceGroup, ...]
    parameters: int
    parameter_bytes: int
    attention_bytes: int
    kv_bytes: int
    batch: int
    step_ms: float

    @property
    def bandwidth(self) -> float:
        """The minimum bytes per second between compute and memory nodes that keep the slowdown within `SLOWDOWN`.

        This is section 3.1 of the Lamina paper: q, k, v and o of all layers and of the whole batch, over the allowed
        share of the time that a step takes without the network (MTIME + ATIME).
        """
        return self.attention_bytes * self.batch / (SLOWDOWN * self.step_ms / 1000)

    def as_json(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        return {**asdict(self), "slowdown": SLOWDOWN, "bandwidth_bytes_per_s": self.bandwidth}

    def print_tables(self) -> None:
        """Print all figures for people."""
        print_text(
            f"{self.model}: {self.architecture} in {self.dtype}, {self.slices} slices of {self.functions} functions"
        )
        rows: list[list[Cell]] = []
        for group in self.groups:
            one, sizes = group.first == group.last, group.sizes
            rows.append(
                [
                    str(group.first) if one else f"{group.first}-{group.last}",
                    f"{sizes.parameters:,}" + ("" if one else " each"),
                    _bytes(sizes.parameter_bytes) + ("" if one else " each"),
                    *(_bytes(n) for n in (sizes.carry, sizes.q, sizes.k, sizes.v, sizes.o)),
                ]
            )
        rows.append(["all", f"{self.parameters:,}", _bytes(self.parameter_bytes)])
        print_table(("slices", "parameters", "weights", "carry", "q", "k", "v", "o"), rows)
        print_text("Bytes of carry, q, k, v and o are per token.")
        print_text(f"KV cache: {_bytes(self.kv_bytes)} per token.")
        print_text(
            f"Network: at least {self.bandwidth / 1e9:.3g} GB/s, for {_bytes(self.attention_bytes)} of q, k, v and o "
            f"per token, batch {self.batch}, steps of {self.step_ms:g} ms and a slowdown of {SLOWDOWN:g} "
            "(Lamina, arXiv 2405.01814, section 3.1)."
        )


def report(path: Path, dtype: str | None, batch: int, step_ms: float) -> Report:
    """Cut the checkpoint at ``path`` without reading its weights, and return the report.

    ``step_ms`` is the time of a decode step of ``batch`` sequences when the network costs nothing.
    """
    if batch < 1:
        raise UsageError(f"batch: expected an integer >= 1, got {batch}")
    if not step_ms > 0:
        raise UsageError(f"step_ms: expected a time > 0, got {step_ms}")
    checkpoint = Checkpoint.open(path, dtype)
    blueprint = cut_into_slices(capture(checkpoint))
    module = blueprint.capture.module
    used = blueprint.weights_of()
    # Tied parameters are one object; the dictionary holds it once.
    parameters = {id(p): p for name, p in module.named_parameters(remove_duplicate=False) if name in used}.values()
    sizes = [s.sizes for s in blueprint.slices]
    return Report(
        model=path.resolve().name,
        architecture=type(module).__name__,
        dtype=checkpoint.dtype,
        slices=len(blueprint.slices),
        functions=blueprint.kinds,
        groups=tuple(_groups(blueprint.slices)),
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.nbytes for p in parameters),
        attention_bytes=sum(s.q + s.k + s.v + s.o for s in sizes),
        kv_bytes=sum(s.k + s.v for s in sizes),
        batch=batch,
        step_ms=step_ms,
    )


def _groups(slices: tuple[SliceBlueprint, ...]) -> list[SliceGroup]:
    def kind(s: SliceBlueprint) -> tuple[object, ...]:
        return s.head.key, s.tail and s.tail.key, s.shape, s.sizes

    runs = [list(run) for _, run in groupby(slices, kind)]
    return [SliceGroup(run[0].index, run[-1].index, run[0].sizes) for run in runs]


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.4g} {units[0]}"

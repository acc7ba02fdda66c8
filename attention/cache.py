"""The paged KV cache of one tenant: memory, reservations and block tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lamina.attention.layout import KVLayout, LayerShape
from lamina.attention.rows import Rows
from lamina.errors import CapacityError, UsageError


@dataclass(slots=True, eq=False)
class Reservation:
    """What one sequence holds. ``blocks``: int64 [blocks], its block table; ``filled``: watermark per layer."""

    tokens: int
    blocks: Tensor
    filled: list[int]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the rows of a step live: ``held[i]`` belongs to ``rows.runs[i]``, ``slots`` is int64 [T]."""

    rows: Rows
    held: tuple[Reservation, ...]
    slots: Tensor


class KVCache:
    """Keys and values of many sequences in blocks of ``layout.block_tokens`` positions.

    All memory is taken at once; a sequence gets all blocks that it may ever need at `reserve`, or none. A block
    holds its positions in every layer, so a sequence has one block table. A *slot* is the place of one position,
    ``block * block_tokens + position % block_tokens``: the first index of ``keys[layer]`` and ``values[layer]``.
    Belongs to one thread. A refused operation changes nothing.
    """

    def __init__(self, layout: KVLayout, nbytes: int, *, device: torch.device | str = "cpu") -> None:
        """Take at most ``nbytes``. `CapacityError` when that is less than one block or cannot be had."""
        blocks = nbytes // layout.bytes_per_block
        if blocks < 1:
            raise CapacityError(
                f"a KV cache of {nbytes} bytes cannot hold one block: "
                f"{layout.block_tokens} tokens take {layout.bytes_per_block} bytes"
            )
        self.layout = layout
        self.device = torch.device(device)
        self.capacity_tokens = blocks * layout.block_tokens
        self.keys = [self._take(layer.kv_heads, layer.qk_dim) for layer in layout.layers]
        """Per layer: [capacity_tokens, Hkv, Dk]. Only slots below a watermark hold anything."""
        self.values = [self._take(layer.kv_heads, layer.v_dim) for layer in layout.layers]
        """Per layer: [capacity_tokens, Hkv, Dv]."""
        self._free = list(range(blocks))
        self._held: dict[int, Reservation] = {}

    def close(self) -> None:
        """Give the memory back, whoever still holds the cache. Nothing else may be called afterwards."""
        self.keys.clear()
        self.values.clear()

    @property
    def free_tokens(self) -> int:
        """Positions that can still be reserved, in whole blocks."""
        return len(self._free) * self.layout.block_tokens

    @property
    def sequences(self) -> Collection[int]:
        """The sequences that hold a reservation."""
        return self._held.keys()

    def reserve(self, sequence: int, tokens: int) -> None:
        """Hold space for the positions 0..tokens-1; `CapacityError` if there is too little."""
        if sequence in self._held:
            raise UsageError(f"sequence {sequence} already holds a reservation; release it first")
        if tokens < 1:
            raise UsageError(f"sequence {sequence}: expected a reservation of at least 1 token, got {tokens}")
        needed = -(-tokens // self.layout.block_tokens)
        if needed > len(self._free):
            raise CapacityError(
                f"sequence {sequence} needs {tokens} tokens of KV cache, "
                f"{self.free_tokens} of {self.capacity_tokens} are free"
            )
        blocks = torch.tensor(self._free[-needed:], device=self.device)
        del self._free[-needed:]
        self._held[sequence] = Reservation(tokens, blocks, [0] * len(self.layout.layers))

    def release(self, sequence: int) -> None:
        """Give all blocks of a sequence back; `UsageError` if it holds none."""
        self._free.extend(self._reservation(sequence).blocks.tolist())
        del self._held[sequence]

    def filled(self, sequence: int, layer: int) -> int:
        """The watermark of a layer: its positions 0..filled-1 are all there."""
        self.shape(layer)
        return self._reservation(sequence).filled[layer]

    def append(self, layer: int, rows: Rows, k: Tensor, v: Tensor) -> None:
        """Store keys and values, rounded to the layout's type. k: [T, Hkv, Dk]; v: [T, Hkv, Dv].

        A position below the watermark is overwritten, so that a step may be replayed. `CapacityError` beyond a
        reservation; `UsageError` where positions between the watermark and the start of a run would be left out.
        """
        self.write(layer, self.place(rows), k, v)

    # What follows is for backends: find the rows of a step once, use what was found in every layer.

    def place(self, rows: Rows) -> Placement:
        """Find the slots of ``rows``; `CapacityError` where they go beyond their reservations."""
        held = tuple(self._reservation(run.sequence) for run in rows.runs)
        for run, reservation in zip(rows.runs, held, strict=True):
            if run.stop > reservation.tokens:
                raise CapacityError(
                    f"sequence {run.sequence} has space reserved for {reservation.tokens} tokens, "
                    f"position {run.stop - 1} needs {run.stop}"
                )
        which = [index for index, run in enumerate(rows.runs) for _ in range(run.count)]
        positions = [position for run in rows.runs for position in range(run.start, run.stop)]
        return Placement(rows, held, self.slots(held, self._tensor(which), self._tensor(positions)))

    def slots(self, held: Sequence[Reservation], which: Tensor, positions: Tensor) -> Tensor:
        """The slots of ``positions`` of ``held[which]``; both int64, of shapes that broadcast."""
        tables = pad_sequence([reservation.blocks for reservation in held], batch_first=True)
        size = self.layout.block_tokens
        return tables[which, positions // size] * size + positions % size

    def write(self, layer: int, placement: Placement, k: Tensor, v: Tensor) -> None:
        """`append` to a place that is known already."""
        shape, tokens = self.shape(layer), placement.rows.tokens
        for name, tensor, dim in (("k", k, shape.qk_dim), ("v", v, shape.v_dim)):
            if tensor.shape != (tokens, shape.kv_heads, dim):
                raise UsageError(
                    f"layer {layer}: expected {name} of shape {[tokens, shape.kv_heads, dim]}, got {list(tensor.shape)}"
                )
        self.require_past(layer, placement)
        self.keys[layer].index_copy_(0, placement.slots, k.to(self.keys[layer].dtype))
        self.values[layer].index_copy_(0, placement.slots, v.to(self.values[layer].dtype))
        for run, reservation in zip(placement.rows.runs, placement.held, strict=True):
            reservation.filled[layer] = max(reservation.filled[layer], run.stop)

    def require_past(self, layer: int, placement: Placement) -> None:
        """`UsageError` unless every position before each run is there, in the blocks that were found for it."""
        for run, reservation in zip(placement.rows.runs, placement.held, strict=True):
            if self._held.get(run.sequence) is not reservation:
                raise UsageError(f"sequence {run.sequence} was released after its step had been planned")
            if run.start > reservation.filled[layer]:
                raise UsageError(
                    f"sequence {run.sequence}, layer {layer}: position {run.start} comes after "
                    f"{reservation.filled[layer]} stored ones; the positions between are missing"
                )

    def shape(self, layer: int) -> LayerShape:
        """The shape of a layer; `UsageError` if there is no such layer."""
        if not 0 <= layer < len(self.layout.layers):
            raise UsageError(f"layer {layer}: expected 0 <= layer < {len(self.layout.layers)}")
        return self.layout.layers[layer]

    def _reservation(self, sequence: int) -> Reservation:
        if sequence not in self._held:
            raise UsageError(f"sequence {sequence} holds no reservation in this KV cache")
        return self._held[sequence]

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def _take(self, heads: int, dim: int) -> Tensor:
        size = (self.capacity_tokens, heads, dim)
        try:
            # Zeroed, because the system hands out pages only when they are touched: memory that is not there has
            # to fail here and not in the middle of a step.
            return torch.empty(size, dtype=getattr(torch, self.layout.dtype), device=self.device).zero_()
        except RuntimeError as error:
            nbytes = self.capacity_tokens * self.layout.bytes_per_token
            raise CapacityError(f"{nbytes} bytes of KV cache cannot be had on {self.device}: {error}") from error

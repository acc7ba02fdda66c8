"""Change logits as a choice says: everything that does not depend on how likely the tokens are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lamina.wire.orders import Choice


def edit(logits: Tensor, choices: Sequence[Choice], vocabulary: int) -> None:
    """Change logits [n, width >= vocabulary] in place, by all that does not depend on the other logits."""
    if masks := [(row, choice.mask) for row, choice in enumerate(choices) if choice.mask is not None]:
        packed = np.zeros((len(masks), -(-vocabulary // 8)), np.uint8)
        for own, (_, mask) in zip(packed, masks, strict=True):
            bits = np.frombuffer(mask, np.uint8)[: len(own)]
            own[: len(bits)] = bits
        refused = np.unpackbits(packed, axis=1, count=vocabulary, bitorder="little") == 0
        for (row, _), each_refused in zip(masks, torch.from_numpy(refused).to(logits.device), strict=True):
            logits[row, :vocabulary].masked_fill_(each_refused, -torch.inf)
    flat = logits.view(-1)
    width = logits.shape[1]

    def at(tokens: Callable[[Choice], Sequence[np.ndarray]], of: Callable[[Choice], bool]) -> tuple[Tensor, Tensor]:
        """Return the rows and the places in ``flat`` of the tokens of some choices."""
        own = [(row, part) for row, c in enumerate(choices) if of(c) for part in tokens(c) if len(part)]
        if not own:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        rows = np.repeat([row for row, _ in own], [len(part) for _, part in own])
        place = rows * width + np.concatenate([part for _, part in own])
        return torch.from_numpy(rows).to(logits.device), torch.from_numpy(place).to(logits.device)

    def each(value: Callable[[Choice], float]) -> Tensor:
        return torch.tensor([value(choice) for choice in choices], dtype=torch.float32, device=logits.device)

    _, place = at(lambda c: [np.array(c.banned, np.int64)], lambda c: bool(c.banned))
    if len(place):
        flat[place] = -torch.inf
    _, place = at(lambda c: [np.array(list(c.sampling.logit_bias), np.int64)], lambda c: bool(c.sampling.logit_bias))
    if len(place):
        bias = [value for choice in choices for value in choice.sampling.logit_bias.values()]
        flat[place] += torch.tensor(bias, dtype=torch.float32, device=logits.device)
    rows, place = at(lambda c: [_tokens(c.prompt), _tokens(c.answer)], lambda c: c.sampling.repetition != 1)
    if len(place):
        value, penalty = flat[place], each(lambda c: c.sampling.repetition)[rows]
        flat[place] = torch.where(value < 0, value * penalty, value / penalty)
    _, place = at(
        lambda c: [_tokens(c.answer)], lambda c: bool(c.sampling.presence_penalty or c.sampling.frequency_penalty)
    )
    if len(place):
        place, count = place.unique(return_counts=True)
        rows = place // width
        frequency, presence = each(lambda c: c.sampling.frequency_penalty), each(lambda c: c.sampling.presence_penalty)
        flat[place] -= count * frequency[rows] + presence[rows]


def _tokens(history: bytes) -> np.ndarray:
    return np.frombuffer(history, "<i4")

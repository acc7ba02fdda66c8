"""Pure functions divide the prompt tokens of a step over the prompts that are being prefilled."""

from __future__ import annotations

from collections.abc import Iterable

from lamina.front.sequence import PromptChunk, Sequence


def divide_prefill(sequences: Iterable[Sequence], budget: int) -> list[PromptChunk]:
    """Divide ``budget`` tokens over prompts.

    The oldest prompt gets half of them, the next one half of the rest, and so on; what short prompts leave over goes to
    the oldest again. So a short prompt does not wait for a long one, and few prompts are unfinished at once.
    """
    ordered = sorted(sequences, key=lambda s: s.arrival)
    limits = [_max_chunk(s) for s in ordered]
    lengths = []
    left = budget
    for i, limit in enumerate(limits):
        share = left if i + 1 == len(limits) else -(-left // 2)
        lengths.append(min(limit, share))
        left -= lengths[-1]
    for i, limit in enumerate(limits):
        more = min(limit - lengths[i], left)
        lengths[i] += more
        left -= more
    return [
        PromptChunk(s, s.prefilled, s.tokens[s.prefilled : s.prefilled + length])
        for s, length in zip(ordered, lengths, strict=True)
        if length
    ]


def _max_chunk(sequence: Sequence) -> int:
    """Return the longest next chunk of a sequence: local tokens only, or only positions that the same memory nodes
    store."""
    if sequence.prefilled < sequence.local_tokens:
        return sequence.local_tokens - sequence.prefilled
    rest, same = len(sequence.tokens) - sequence.prefilled, sequence.placement.until_next(sequence.prefilled)
    return rest if same is None else min(rest, same)

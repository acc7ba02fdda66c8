"""Pure functions choose the sequences that give way when another one needs their space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lamina.front.blocks import BlockManager
from lamina.front.sequence import Sequence


def choose_victims(
    sequence: Sequence, tokens: int, running: Iterable[Sequence], block_manager: BlockManager
) -> list[Sequence]:
    """Return the sequences to preempt so that ``sequence`` can hold the positions 0..tokens-1, the lowest rank first.

    Only sequences of a lower rank give way, and no more of them than necessary. The space of those that leave anyway
    counts first. The list is empty if all of them together have too little.
    """
    shortage = block_manager.shortage(sequence, tokens)
    below = [s for s in running if s.rank > sequence.rank]
    if _reduced(shortage, block_manager.held_by(below)):
        return []
    leaving = [s for s in below if s.yielding or s.cancelled]
    shortage = _reduced(shortage, block_manager.held_by(leaving))
    victims = []
    for victim in sorted(below, key=lambda s: s.rank, reverse=True):
        if not shortage:
            break
        rest = _reduced(shortage, block_manager.held_by([victim]))
        if victim.yielding or victim.cancelled or rest == shortage:
            continue
        shortage = rest
        victims.append(victim)
    return victims


def _reduced(shortage: Mapping[int, int], freed: Mapping[int, int]) -> dict[int, int]:
    """Return, by member id, the blocks that are still missing when others come free."""
    return {member: rest for member, n in shortage.items() if (rest := n - freed.get(member, 0)) > 0}

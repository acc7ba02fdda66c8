"""Pure functions choose the sequences that give way when another one needs their space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lamina.front.blocks import BlockManager
from lamina.front.sequence import Sequence


def choose_victims(
    sequence: Sequence, shortage: Mapping[int, int], running: Iterable[Sequence], block_manager: BlockManager
) -> list[Sequence] | None:
    """Return the sequences to preempt so that the blocks come free that ``sequence`` lacks, by member id, the lowest
    rank first.

    Only sequences of a lower rank give way, and no more of them than necessary. The space of those that leave anyway
    counts first. None says that all of them together have too little.
    """
    below = [s for s in running if s.rank > sequence.rank]
    if _reduced(shortage, block_manager.held_by(below)):
        return None
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

"""Pure functions say which compute node runs which slice of which batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


def replica(batch: int, turn: int, *, batches: int, replicas: int) -> int:
    """Return the number of the replica that runs the ``turn``-th slice of a batch, counted since the batch began.

    With more batches than replicas this is rotational staggered pipelining (Lamina, section 4.3). Time is cut into
    intervals of which a slice takes as many as there are replicas; a batch's next slice begins ``batches`` intervals
    after the last one, and interval i begins on replica i mod ``replicas``. So every replica always has work, and never
    two slices at once, if the attention between two slices takes no longer than what is left of these intervals: one
    slice's time divided by the replicas with one batch more than replicas, a whole slice's time with twice as many, and
    then every batch stays where it is.

    With no more batches than replicas each has one to itself, as nothing else would run there.
    """
    if batches <= replicas:
        return batch % replicas
    return (batch + batches * turn) % replicas


@dataclass(frozen=True)
class Schedule:
    """Divides steps over the compute nodes of one model, named by member id: they are replicas, or each has its layers
    from ``first_layers`` on.

    A step of ``layers`` layers has one slice more; its last one and the first one of the next step are one turn.
    """

    layers: int
    members: tuple[int, ...] = (0,)
    batches: int = 1
    first_layers: tuple[int, ...] | None = None

    def route(self, batch: int, step: int) -> tuple[int, ...]:
        """Return the member that runs each slice, 0..layers, of a step; steps count since the batch began."""
        if len(self.members) == 1 or self.first_layers is not None:
            return _route(self, 0, 0)
        return _route(self, batch, step % len(self.members))  # after as many steps as nodes it begins anew

    def slices(self, member: int) -> range:
        """Return the slices whose weights a member needs."""
        if self.first_layers is None:
            return range(self.layers + 1)
        place = self.members.index(member)
        following = (*self.first_layers[1:], self.layers + 1)
        return range(self.first_layers[place], following[place])

    @property
    def is_settled(self) -> bool:
        """Return whether each layer of a batch is run by the same node in every step."""
        return all(
            self.route(batch, step)[:-1] == self.route(batch, 0)[:-1]
            for batch in range(self.batches)
            for step in range(len(self.members))
        )


@cache
def _route(schedule: Schedule, batch: int, step: int) -> tuple[int, ...]:
    members = schedule.members
    if schedule.first_layers is not None:
        return tuple(members[_last_at(schedule.first_layers, piece)] for piece in range(schedule.layers + 1))
    turns = range(step * schedule.layers, (step + 1) * schedule.layers + 1)
    return tuple(members[replica(batch, turn, batches=schedule.batches, replicas=len(members))] for turn in turns)


def _last_at(first_layers: Sequence[int], piece: int) -> int:
    """Return the place of the last node whose layers begin at or before a slice."""
    return max(place for place, first in enumerate(first_layers) if first <= piece)

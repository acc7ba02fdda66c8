"""Pure functions say where the keys and values of a sequence lie, and so which memory node does what in a step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lamina.attention import Run
from lamina.wire.plan import StepPlan

Range = tuple[int, int]
"""Positions from the first one up to the second one, which is not among them."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Names the memory nodes that hold one sequence, by their member ids.

    Without ``stripe`` each member holds all positions: those of its own KV heads if heads are divided, else there is
    only one member. With ``stripe`` the positions go round the members in stripes of this length. A memory node knows
    nothing about stripes: it numbers the positions that it holds from 0, because rotary positions are already applied
    to the keys it gets.

    ``moved`` has the exceptions: (start, stop, member) says that the positions from start up to stop lie on this member
    alone, and not where the rule would have them. They are whole blocks, in ascending order, and no two of them could
    be one. Where heads are divided, nothing is ever moved.
    """

    members: tuple[int, ...]
    stripe: int | None = None
    moved: tuple[tuple[int, int, int], ...] = ()

    @property
    def all_members(self) -> tuple[int, ...]:
        """Return the members that hold positions by the rule, and then those that only hold moved ones."""
        if not self.moved:
            return self.members
        others = {member for _, _, member in self.moved}.difference(self.members)
        return self.members + tuple(sorted(others))

    def held(self, member: int, tokens: int) -> int:
        """Return how many of the first ``tokens`` positions lie on ``member``; also the number there of its next
        position."""
        return self.shares(tokens).get(member, 0) if self.moved else self._by_rule(member, tokens)

    def shares(self, tokens: int) -> dict[int, int]:
        """Return, by member, how many of the first ``tokens`` positions lie there."""
        by_rule = self._by_rule
        shares = {member: by_rule(member, tokens) for member in self.members}
        for start, stop, there in self.moved:
            stop = min(stop, tokens)
            if start >= stop:
                break
            for member in self.members:
                shares[member] -= by_rule(member, stop) - by_rule(member, start)
            shares[there] = shares.get(there, 0) + stop - start
        return shares

    def _by_rule(self, member: int, tokens: int) -> int:
        """Return how many of the first ``tokens`` positions would lie on ``member`` if nothing had moved."""
        if member not in self.members:
            return 0
        if self.stripe is None:
            return tokens
        rounds, rest = divmod(tokens, self.stripe * len(self.members))
        own = rest - self.members.index(member) * self.stripe
        return rounds * self.stripe + min(max(own, 0), self.stripe)

    def position(self, member: int, index: int) -> int:
        """Return the position that is number ``index`` on ``member``: the inverse of `held`."""
        if self.moved:
            behind = self.moved[-1][1]
            if index < (before := self.held(member, behind)):
                return bisect_left(range(behind), index + 1, key=lambda p: self.held(member, p + 1))
            index += self._by_rule(member, behind) - before
        if self.stripe is None:
            return index
        rounds, rest = divmod(index, self.stripe)
        return (rounds * len(self.members) + self.members.index(member)) * self.stripe + rest

    def owners(self, position: int) -> tuple[int, ...]:
        """Return the members that hold a position."""
        for start, stop, member in self.moved:
            if start <= position < stop:
                return (member,)
        if self.stripe is None:
            return self.members
        return (self.members[position // self.stripe % len(self.members)],)

    def usable(self, tokens: int, found: Mapping[int, int]) -> int:
        """Return how many of the first ``tokens`` positions are there, if each member has found as many of its own as
        ``found`` says."""
        return min(
            (self.position(member, n) for member, n in found.items() if n < self.held(member, tokens)),
            default=tokens,
        )

    def keys_on(self, member: int, keys: Sequence[bytes], block_tokens: int, first: int = 0) -> list[bytes]:
        """Return the keys of the blocks that lie on ``member``, out of the keys of blocks from number ``first`` on."""
        return [key for block, key in enumerate(keys, first) if member in self.owners(block * block_tokens)]

    def until_next(self, position: int) -> int | None:
        """Return how many positions from ``position`` on have the same owners, at least; None means all of them."""
        same = None if self.stripe is None else self.stripe - position % self.stripe
        for start, stop, _ in self.moved:
            if position < stop:
                if start <= position:
                    return stop - position
                return start - position if same is None else min(same, start - position)
        return same

    def divide(self, start: int, count: int) -> Iterable[tuple[int, int]]:
        """Cut positions into pieces (start, count), each with the same owners throughout."""
        stop = start + count
        while start < stop:
            same = self.until_next(start)
            piece = stop - start if same is None else min(same, stop - start)
            yield start, piece
            start += piece

    # -- other placements of the same sequence

    def relocated(self, ranges: Iterable[Range], member: int) -> Placement:
        """Return where the sequence lies when these positions have moved to ``member``."""
        pieces = list(self.moved)
        for start, stop in ranges:
            kept = []
            for first, last, there in pieces:
                kept += [(a, b, there) for a, b in ((first, min(last, start)), (max(first, stop), last)) if a < b]
            pieces = [*kept, (start, stop, member)]
        return Placement(self.members, self.stripe, self._exceptions(pieces))

    def redirected(self, members: tuple[int, ...], stripe: int | None, start: int) -> Placement:
        """Return where the sequence lies if it goes on from position ``start`` by another rule."""
        lies = [(first, first + count, self.owners(first)[0]) for first, count in self.divide(0, start)]
        return Placement(members, stripe, Placement(members, stripe)._exceptions(lies))

    def _exceptions(self, pieces: Iterable[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
        """Return ``moved`` for pieces that lie on these members, of which some may lie where the rule has them."""
        rule = Placement(self.members, self.stripe)
        found: list[tuple[int, int, int]] = []
        for start, stop, member in sorted(pieces):
            for first, count in rule.divide(start, stop - start):
                if rule.owners(first) == (member,):
                    continue
                joined = found.pop()[0] if found and found[-1][1:] == (first, member) else first
                found.append((joined, first + count, member))
        return tuple(found)


class RemoteRun(NamedTuple):
    """Describes rows of a step whose past lies on memory nodes: ``count`` positions from ``start`` with the same
    owners."""

    sequence: int
    placement: Placement
    start: int
    count: int  # type: ignore[assignment]  # no run is asked how often it holds a value


@dataclass(frozen=True, slots=True)
class MemberRows:
    """Says what one memory node does in a step: its plan, and the step's numbers of its rows, in the order of the plan.

    A row is whole if only the members that store it hold any of its past. All others come back as partials.
    """

    plan: StepPlan
    rows: Sequence[int]


def route(runs: Sequence[RemoteRun]) -> dict[int, MemberRows]:
    """Divide the rows of a step over the memory nodes that take part in it: by member id, in ascending order."""
    if runs and all(run.placement.stripe is None and not run.placement.moved for run in runs):
        members = runs[0].placement.members
        if all(run.placement.members == members for run in runs):  # as where heads are divided: all have the same rows
            storing = tuple([Run(run.sequence, run.start, run.count) for run in runs])
            count = sum(run.count for run in runs)
            return dict.fromkeys(sorted(members), MemberRows(StepPlan(storing, (), count), range(count)))
    parts: dict[int, _Parts] = {}
    row = 0
    for run in runs:
        place, rows = run.placement, range(row, row + run.count)
        row += run.count
        members, stripe = place.members, place.stripe
        if place.moved:
            _divide_moved(run, rows, parts)
            continue
        if stripe is None:
            # All members hold the same positions, so that they can share one description.
            same = Run(run.sequence, run.start, run.count)
            for member in members:
                part = parts.get(member) or parts.setdefault(member, _Parts())
                part.whole.append(same)
                part.whole_rows += rows
            continue
        # As `Placement.held` for every member, in one pass.
        rounds, rest = divmod(run.start, stripe * len(members))
        owner, into = divmod(rest, stripe)
        before = rounds * stripe
        for index, member in enumerate(members):
            held = before + (stripe if index < owner else into if index == owner else 0)
            if not held and index != owner:
                continue
            part = parts.get(member) or parts.setdefault(member, _Parts())
            own = Run(run.sequence, held, run.count)
            if index != owner:
                part.reading.append(own)
                part.reading_rows += rows
            elif (rounds or owner) and len(members) > 1:
                part.partial.append(own)
                part.partial_rows += rows
            else:
                part.whole.append(own)
                part.whole_rows += rows
    return {member: parts[member].rows() for member in sorted(parts)}


def _divide_moved(run: RemoteRun, rows: range, parts: dict[int, _Parts]) -> None:
    """Add a run of a sequence of which something has moved to the parts of the members that have to do with it."""
    place, start = run.placement, run.start
    owners = place.owners(start)
    shares = dict.fromkeys(owners, 0) | place.shares(start)
    held = {member: n for member, n in shares.items() if n or member in owners}
    for member, before in held.items():
        part = parts.get(member) or parts.setdefault(member, _Parts())
        own = Run(run.sequence, before, run.count)
        if member not in owners:
            part.reading.append(own)
            part.reading_rows += rows
        elif len(held) > len(owners):
            part.partial.append(own)
            part.partial_rows += rows
        else:
            part.whole.append(own)
            part.whole_rows += rows


@dataclass(slots=True)
class _Parts:
    """Collects the runs of one member and the numbers of their rows: whole ones, other stored ones, and those it only
    reads."""

    whole: list[Run] = field(default_factory=list)
    whole_rows: list[int] = field(default_factory=list)
    partial: list[Run] = field(default_factory=list)
    partial_rows: list[int] = field(default_factory=list)
    reading: list[Run] = field(default_factory=list)
    reading_rows: list[int] = field(default_factory=list)

    def rows(self) -> MemberRows:
        plan = StepPlan(
            storing=tuple(self.whole + self.partial), reading=tuple(self.reading), whole=len(self.whole_rows)
        )
        return MemberRows(plan, self.whole_rows + self.partial_rows + self.reading_rows)

"""The front keeps account of the nodes of its cluster: their ids, their states, and the epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Literal, NamedTuple

from msgspec import structs

from lamina.errors import ConfigError, NodeError
from lamina.wire.orders import MemberEntry, Membership

log = logging.getLogger("lamina.front")

Role = Literal["compute", "memory"]


class State(StrEnum):
    """Says how far a member takes part in the cluster."""

    JOINING = "joining"
    """The cluster file names it; it is not ready."""
    SERVING = "serving"
    """It takes part in steps."""
    LEAVING = "leaving"
    """It takes part in steps, and takes nothing new, until it has nothing more to do."""
    GONE = "gone"
    """It has left, and nothing was lost with it."""
    LOST = "lost"
    """It is gone, together with what it held."""


class Change(NamedTuple):
    """A member went from one state to another. ``error`` says why a member was lost."""

    entry: MemberEntry
    before: State
    after: State
    epoch: int
    error: NodeError | None = None


class Members:
    """Holds the members of a cluster. Placements, schedules, orders and step plans name them by their ids.

    An id belongs to a name for as long as the cluster runs; a node that comes back under its name has its id again.
    Every change begins a new ``epoch``. ``on_change`` is the one function that is called for changes: of states, if any
    is in the list, and of terms. It belongs to the node's loop.
    """

    def __init__(
        self, entries: Iterable[MemberEntry], on_change: Callable[[list[Change]], None], *, epoch: int = 0
    ) -> None:
        self.epoch = epoch
        self._entries = {entry.id: entry for entry in entries}
        self._ids = {entry.name: entry.id for entry in self._entries.values()}
        self._states = dict.fromkeys(self._entries, State.JOINING)
        self._terms = dict.fromkeys(self._entries, 0)
        self._on_change = on_change

    @staticmethod
    def of_names(compute: Sequence[str], memory: Sequence[str]) -> list[MemberEntry]:
        """Return the entries of a cluster with these nodes, numbered in their order."""
        roles: list[tuple[str, Role]] = [(name, "compute") for name in compute]
        roles += [(name, "memory") for name in memory]
        return [MemberEntry(id_, name, role) for id_, (name, role) in enumerate(roles)]

    @property
    def entries(self) -> list[MemberEntry]:
        """Return all members, by id, whatever their state."""
        return [self._entries[id_] for id_ in sorted(self._entries)]

    def id_of(self, name: str) -> int:
        """Return the id of the member called ``name``; raise KeyError if there is none."""
        return self._ids[name]

    def entry(self, id_: int) -> MemberEntry:
        """Return the member with this id."""
        return self._entries[id_]

    def state(self, id_: int) -> State:
        """Return the state of a member."""
        return self._states[id_]

    def of_role(self, role: Role) -> tuple[int, ...]:
        """Return the ids of the members of a role that are not lost, in ascending order."""
        return tuple(e.id for e in self.entries if e.role == role and self._states[e.id] is not State.LOST)

    def membership(self) -> Membership:
        """Return what the other compute nodes are told."""
        entries = [
            structs.replace(entry, state=self._states[entry.id].value, term=self._terms[entry.id])
            for entry in self.entries
        ]
        return Membership(epoch=self.epoch, members=entries)

    def adopt(self, told: Membership) -> None:
        """Take over what the front says, on another compute node. Raises ConfigError if it has other nodes in its
        file."""
        theirs = {entry.id: structs.replace(entry, state="joining", term=0) for entry in told.members}
        if theirs != self._entries:
            raise ConfigError(
                f"the front knows the nodes {_names(theirs.values())}, this node {_names(self._entries.values())}; "
                "all compute nodes of a cluster need the same file"
            )
        self._set(
            {entry.id: State(entry.state) for entry in told.members},
            terms={entry.id: entry.term for entry in told.members},
            errors={
                entry.id: NodeError.lost(entry.role, entry.name, "the front has lost it")
                for entry in told.members
                if entry.state == "lost"
            },
            epoch=told.epoch,
        )

    def term(self, id_: int) -> int:
        """Return the number of the front's latest attachment to a memory node."""
        return self._terms[id_]

    def in_state(self, role: Role, *states: State) -> tuple[int, ...]:
        """Return the ids of the members of a role in one of these states, in ascending order."""
        return tuple(e.id for e in self.entries if e.role == role and self._states[e.id] in states)

    def of_others(self, role: Role, state: State) -> tuple[int, ...]:
        """Return the ids of the members of a role that are not in this state, in ascending order."""
        return tuple(e.id for e in self.entries if e.role == role and self._states[e.id] is not state)

    # -- changes

    def join(self, terms: Mapping[int, int]) -> None:
        """Members are there, and get ready, all at once. For a memory node, the term counts the attachments of the
        front to it; 0 says that it is not attached."""
        self._set(dict.fromkeys(terms, State.JOINING), terms=terms)

    def serve(self, *ids: int) -> None:
        """Members are ready."""
        self._set(dict.fromkeys(ids, State.SERVING))

    def leave(self, id_: int) -> None:
        """A member is to leave, and finishes what it has begun. A lost one stays lost."""
        if self._states[id_] is not State.LOST:
            self._set({id_: State.LEAVING})

    def part(self, id_: int) -> None:
        """A member that was leaving has nothing more to do."""
        if self._states[id_] is State.LEAVING:
            self._set({id_: State.GONE})

    def lose(self, id_: int, error: NodeError) -> None:
        """A member is gone. A second report of the same loss changes nothing."""
        self._set({id_: State.LOST}, errors={id_: error})

    def _set(
        self,
        states: Mapping[int, State],
        *,
        terms: Mapping[int, int] | None = None,
        errors: Mapping[int, NodeError] | None = None,
        epoch: int | None = None,
    ) -> None:
        """Change states and terms at once, and begin an epoch if any differs: the next one, or ``epoch``."""
        new_terms = {id_: term for id_, term in (terms or {}).items() if self._terms[id_] != term}
        changes = [(id_, self._states[id_], after) for id_, after in states.items() if self._states[id_] is not after]
        self._terms.update(new_terms)
        self._states.update(states)
        if epoch is None:
            if not (changes or new_terms):
                return
            epoch = self.epoch + 1
        self.epoch = epoch
        for id_, before, after in changes:
            name = self._entries[id_].name
            log.info("event=member member=%s before=%s after=%s epoch=%d", name, before, after, epoch)
        errors = errors or {}
        self._on_change(
            [Change(self._entries[id_], before, after, epoch, errors.get(id_)) for id_, before, after in changes]
        )


def _names(entries: Iterable[MemberEntry]) -> str:
    return ", ".join(f"{entry.name} ({entry.id}, {entry.role})" for entry in entries)

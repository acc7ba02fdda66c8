"""The front keeps account of the nodes of its cluster: their ids, their states, and the epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import count
from typing import Literal, NamedTuple

from msgspec import structs

from lamina.config import MemoryNodeConfig, NodeConfig
from lamina.errors import ConfigError, NodeError
from lamina.wire.members import MemberEntry
from lamina.wire.orders import Membership

log = logging.getLogger("lamina.front")

Role = Literal["compute", "memory"]


class State(StrEnum):
    """Says how far a member takes part in the cluster."""

    JOINING = "joining"
    """The cluster file names it, or it has asked to be taken in; it is not ready."""
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

    An id belongs to a name for as long as the front runs; a node that comes back under its name has its id again, also
    one that was forgotten meanwhile. Every change begins a new ``epoch``. ``on_change`` is the one function that is
    called for changes: of states, if any is in the list, of terms, and of who the members are. It belongs to the node's
    loop.
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
    def of_nodes(nodes: Sequence[NodeConfig]) -> list[MemberEntry]:
        """Return the entries of a cluster with these nodes, numbered in their order, compute nodes first."""
        return [entry_of(id_, node) for id_, node in enumerate(sorted(nodes, key=lambda node: node.role))]

    @property
    def entries(self) -> list[MemberEntry]:
        """Return all members, by id, whatever their state."""
        return [self._entries[id_] for id_ in sorted(self._entries)]

    def id_of(self, name: str) -> int:
        """Return the id of the member called ``name``, or of a forgotten one; raise KeyError if there was none."""
        return self._ids[name]

    def find(self, name: str) -> MemberEntry | None:
        """Return the member called ``name``; None if there is none."""
        return next((entry for entry in self._entries.values() if entry.name == name), None)

    def has_left(self, name: str) -> bool:
        """Return whether ``name`` is that of a member that was forgotten."""
        return name in self._ids and self._ids[name] not in self._entries

    def free_id(self, wanted: int | None = None) -> int:
        """Return an id that no member has had: ``wanted``, if that is one."""
        used = set(self._ids.values())
        return wanted if wanted is not None and wanted not in used else next(i for i in count() if i not in used)

    def has(self, id_: int) -> bool:
        """Return whether there is a member with this id."""
        return id_ in self._entries

    def entry(self, id_: int) -> MemberEntry:
        """Return the member with this id."""
        return self._entries[id_]

    def state(self, id_: int) -> State:
        """Return the state of a member; one that was forgotten is gone."""
        return self._states.get(id_, State.GONE)

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

    def adopt(self, told: Membership, *, fixed: Collection[int] = ()) -> None:
        """Take over what the front says, on another compute node: who the members are, and their states. Raises
        ConfigError if one of the ids ``fixed`` belongs to another node there."""
        theirs = {entry.id: structs.replace(entry, state="joining", term=0) for entry in told.members}
        if any(id_ not in theirs or theirs[id_].name != self._entries[id_].name for id_ in fixed):
            raise ConfigError(
                f"the front knows the nodes {_names(theirs.values())}, this node {_names(self._entries.values())}; "
                "all compute nodes of a cluster need the same file"
            )
        for id_ in self._entries.keys() - theirs.keys():
            self._drop(id_)
        for entry in theirs.values():
            self._put(entry)
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

    def take_in(self, entry: MemberEntry) -> None:
        """A node that was no member is one from now on, and is joining; or one that was lost or had left comes back
        under what is new of it."""
        self._put(entry)
        self._set({entry.id: State.JOINING}, terms={entry.id: 0}, epoch=self.epoch + 1)

    def forget(self, id_: int) -> None:
        """A member that has left is none any more."""
        self._drop(id_)
        self._set({}, epoch=self.epoch + 1)

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

    def _put(self, entry: MemberEntry) -> None:
        self._entries[entry.id] = entry
        self._ids[entry.name] = entry.id
        self._states.setdefault(entry.id, State.JOINING)
        self._terms.setdefault(entry.id, 0)

    def _drop(self, id_: int) -> None:
        """Forget all of a member but that its id was its own."""
        del self._entries[id_], self._states[id_], self._terms[id_]

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


def entry_of(id_: int, node: NodeConfig) -> MemberEntry:
    """Return the entry of a node of the cluster file."""
    quota = node.quota if isinstance(node, MemoryNodeConfig) else None
    return MemberEntry(id_, node.name, node.role, address=str(node.address), quota=quota)


def _names(entries: Iterable[MemberEntry]) -> str:
    return ", ".join(f"{entry.name} ({entry.id}, {entry.role})" for entry in entries)

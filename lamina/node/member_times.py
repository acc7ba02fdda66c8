"""Since when each member of a cluster is in its state."""

from __future__ import annotations

import asyncio

from lamina.front.members import Members, State
from lamina.wire.admin import MemberStatus


class MemberTimes:
    """Remembers when members changed their states, for the status of the front; on the node's loop."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._since: dict[int, tuple[State, float]] = {}
        self.note()

    def note(self) -> None:
        """Take the states of now; called after every change."""
        now = asyncio.get_running_loop().time()
        for entry in self._members.entries:
            state = self._members.state(entry.id)
            if self._since.get(entry.id, (None,))[0] is not state:
                self._since[entry.id] = state, now

    def describe(self) -> list[MemberStatus]:
        """Return what the status says about the members, by id."""
        now = asyncio.get_running_loop().time()
        described = []
        for entry in self._members.entries:
            state, since_s = self._since[entry.id]
            described.append(
                MemberStatus(
                    name=entry.name, state=state.value, for_s=now - since_s, role=entry.role, address=entry.address
                )
            )
        return described

"""Faults that are made on purpose, each in one place of the product, which `tests.sim.chaos` has to find."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from unittest import mock

from lamina.attention.cache import KVCache
from lamina.attention.rows import Rows, Run
from lamina.attention.transfers import Transfers
from lamina.front.journal import RequestJournal
from lamina.memory.tenant import Tenant


class Mutant(NamedTuple):
    """``kinds`` are the faults that show it, among those of ``seeds``."""

    made: Callable[[], AbstractContextManager[Any]]
    kinds: str
    seeds: range


@contextmanager
def _term_not_ended() -> Iterator[None]:
    """A memory node goes on with the sequences of an earlier term."""
    with mock.patch.object(Tenant, "take_over", lambda self: self.members.clear()):
        yield


@contextmanager
def _append_behind() -> Iterator[None]:
    """What is stored again goes behind what was stored before, instead of into its place."""
    usual = KVCache.place

    def place(self: KVCache, rows: Rows, *, attend: bool = True, store: bool = True) -> Any:
        runs = []
        for run in rows.runs:
            filled = int(self._filled[:, self._reservation(run.sequence).slot].min())
            runs.append(Run(run.sequence, max(run.start, filled), run.count))
        return usual(self, Rows(tuple(runs)), attend=attend, store=store)

    with mock.patch.object(KVCache, "place", place):
        yield


@contextmanager
def _transfer_not_reserved() -> Iterator[None]:
    """A memory node gives the blocks that another one sends to others meanwhile."""
    usual = Transfers.expect

    def expect(self: Transfers, transfer: int, blocks: int) -> None:
        usual(self, transfer, blocks)
        for group, own in zip(self._pools.groups, self._blocks[transfer], strict=True):
            group.free(own.tolist())

    with mock.patch.object(Transfers, "expect", expect):
        yield


@contextmanager
def _journal_line_lost() -> Iterator[None]:
    """One of five steps is not written to the journal."""
    usual, count = RequestJournal.write, itertools.count()

    def write(self: RequestJournal, step: Any, then: Callable[[], object]) -> None:
        if next(count) % 5:
            usual(self, step, then)
        else:
            then()

    with mock.patch.object(RequestJournal, "write", write):
        yield


MUTANTS = {
    "sequences of an earlier term go on": Mutant(_term_not_ended, "front,network", range(60)),
    "what is stored again is stored twice": Mutant(_append_behind, "memory,network,compute", range(20, 80)),
    "a move is not reserved": Mutant(_transfer_not_reserved, "memory.drain", range(100)),
    "a line of the journal is lost": Mutant(_journal_line_lost, "front.kill", range(60)),
}

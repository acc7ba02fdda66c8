"""Random clusters, random requests and random faults: every request ends as it would have without the faults.

    python -m tests.sim.chaos --seeds 1000 --kinds memory,network
    python -m tests.sim.chaos --seed 17 --kinds memory
    python -m tests.sim.chaos --mutants

A seed gives a `Case`, and a case always runs in the same way, to the byte of its trace. The model is `tests.sim.exact`,
so that tokens tell of every wrong key and value. A case that fails is made smaller while it still fails.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.sim.cases import Case, Part, draw
from tests.sim.faults import KINDS, kinds_of
from tests.sim.mutants import MUTANTS, Mutant
from tests.sim.trials import BrokenPromiseError, Outcome, attempt, run

# -- smaller cases


def shrink(case: Case, failure: BrokenPromiseError, part: Part) -> tuple[Part, BrokenPromiseError]:
    """Leave out faults, requests and nodes, one after the other, as long as a case fails in the same way."""

    def fails(smaller: Part) -> BrokenPromiseError | None:
        try:
            run(smaller.of(case))
        except ValueError:
            return None
        except BrokenPromiseError as found:
            return found if found.what == failure.what else None
        return None

    shrunk = True
    while shrunk:
        shrunk = False
        for smaller in part.smaller():
            if (found := fails(smaller)) is not None:
                part, failure, shrunk = smaller, found, True
                break
    return part, failure


# -- faults that are made on purpose


def catch(mutant: Mutant) -> tuple[Case, BrokenPromiseError] | None:
    """The first case that a mutant fails, and how; None if it fails none that the product itself does not."""
    kinds = kinds_of(mutant.kinds)
    for case in (draw(seed, kinds) for seed in mutant.seeds):
        with mutant.made():
            failure = attempt(case)[1]
        if failure is not None and attempt(case)[1] is None:
            return case, failure
    return None


def _catch_all() -> int:
    """Say which seed shows each mutant; 1 if one is not found."""
    missed = 0
    for name, mutant in MUTANTS.items():
        caught = catch(mutant)
        missed += caught is None
        how = (
            f"not found among {len(mutant.seeds)} seeds"
            if caught is None
            else f"seed {caught[0].seed}, {caught[1]!s:.160}"
        )
        _say(f"{name}: {how}")
    return 1 if missed else 0


# -- the command


@dataclass
class Total:
    """What came of many seeds."""

    seeds: int = 0
    asked: int = 0
    recovered: int = 0
    failed: int = 0
    left: int = 0
    steps: int = 0
    preemptions: int = 0
    moves: int = 0
    redirections: int = 0
    virtual_s: float = 0.0
    struck: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.asked += len(outcome.asked)
        self.left += sum(asked.left for asked in outcome.asked)
        self.recovered += outcome.recovered
        self.failed += outcome.failed
        self.steps += outcome.steps
        self.preemptions += outcome.preemptions
        self.moves += outcome.moves
        self.redirections += outcome.redirections
        self.virtual_s += outcome.virtual_s
        self.struck += outcome.struck

    def __str__(self) -> str:
        struck = ", ".join(f"{kind} {count}" for kind, count in sorted(self.struck.items()))
        return (
            f"{self.seeds} seeds, {self.virtual_s:.0f} virtual seconds, {self.steps} steps, {self.preemptions} "
            f"preemptions, {self.moves} moves, {self.redirections} redirections; requests: {self.asked}, of which "
            f"{self.recovered} were answered across a fault, {self.left} left by their clients, {self.failed} failed "
            f"as they may; faults: {struck or 'none'}"
        )


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _tell(whole: Case, part: Part, failure: BrokenPromiseError, command: str, *, shrinks: bool) -> None:
    """Say how a case fails, and how its smallest part does."""
    _say(f"\nseed {whole.seed} fails: {failure}\n{part.of(whole)}\nagain: {command}")
    if not shrinks:
        return
    one, other = (attempt(part.of(whole), tracing=True)[0].digest for _ in range(2))
    _say(f"two traces: {one}, {'which are equal' if one == other else f'not {other}'}")
    small, smallest = shrink(whole, failure, part)
    _say(f"the smallest part that fails so: {smallest}\n{small.of(whole)}\nagain: {command} {small.options()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 if a seed fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=100, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="one alone")
    parser.add_argument("--kinds", default="", help=f"of faults, or groups of them: {', '.join(KINDS)}")
    parser.add_argument("--faults", help="the numbers of those to keep, or none")
    parser.add_argument("--asks", help="the numbers of the requests to keep, or none")
    parser.add_argument("--nodes", help="the names of those to keep")
    parser.add_argument("--mutants", action="store_true", help="break the product on purpose, and find each fault")
    parser.add_argument("--keep-going", action="store_true", help="also behind a seed that fails")
    parser.add_argument("--no-shrink", action="store_true", help="do not look for smaller cases that fail")
    parser.add_argument("--show", action="store_true", help="print each case")
    parser.add_argument("--trace", action="store_true", help="print the trace of each run")
    options = parser.parse_args(arguments)
    try:
        kinds = kinds_of(options.kinds)
    except ValueError as error:
        parser.error(str(error))
    if options.mutants:
        return _catch_all()
    seeds = range(options.first, options.first + options.seeds) if options.seed is None else [options.seed]
    total, failed, begun_s = Total(), 0, time.perf_counter()
    gc.collect()
    gc.freeze()
    for seed in seeds:
        whole = draw(seed, kinds)
        part = Part.whole(whole)
        part = part._replace(
            faults=_numbers(options.faults, part.faults),
            asks=_numbers(options.asks, part.asks),
            nodes=tuple(options.nodes.split(",")) if options.nodes else part.nodes,
        )
        case = part.of(whole)
        if options.show:
            _say(f"seed {seed}\n{case}")
        outcome, failure = attempt(case, tracing=options.trace)
        if options.trace:
            _say("\n".join(outcome.trace))
        if failure is None:
            total.add(outcome)
            continue
        failed += 1
        command = f"python -m tests.sim.chaos --seed {seed}" + (f" --kinds {options.kinds}" if kinds else "")
        _tell(whole, part, failure, command, shrinks=not options.no_shrink)
        if not options.keep_going:
            break
    seconds = time.perf_counter() - begun_s
    _say(f"{total}; {total.seeds / seconds:.2f} seeds/s" + (f"; {failed} FAILED" if failed else ""))
    return 1 if failed else 0


def _numbers(told: str | None, every: tuple[int, ...]) -> tuple[int, ...]:
    if told is None:
        return every
    return () if told == "none" else tuple(map(int, told.split(",")))


if __name__ == "__main__":
    sys.exit(main())

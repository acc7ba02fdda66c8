"""Random faults in random clusters; see `tests.sim.chaos`, whose command runs as many as are asked for."""

from __future__ import annotations

import pytest

from tests.sim.cases import Part, draw
from tests.sim.chaos import catch, shrink
from tests.sim.faults import KINDS
from tests.sim.mutants import MUTANTS
from tests.sim.trials import attempt, run

ALL = list(KINDS)


@pytest.mark.parametrize("seeds", [range(first, first + 12) for first in range(0, 60, 12)])
def test_every_request_ends_as_it_would_without_faults(seeds: range) -> None:
    """With the right tokens, in time, and with nothing left anywhere."""
    struck = 0
    for seed in seeds:
        struck += sum(run(draw(seed, ALL)).struck.values())
    assert struck > len(seeds)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seeds", [range(first, first + 100) for first in range(0, 1000, 100)])
def test_a_thousand_seeds(seeds: range) -> None:
    """As the test above."""
    for seed in seeds:
        run(draw(seed, ALL))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_that_is_made_on_purpose_is_found(name: str) -> None:
    """Each mutant fails a case that the product passes."""
    assert catch(MUTANTS[name]) is not None, f"{name}: not found"


def test_a_case_is_the_same_whenever_it_runs() -> None:
    """To the last line of its trace."""
    case = draw(7, ALL)
    one, other = (attempt(case, tracing=True)[0] for _ in range(2))
    assert len(one.trace) > 100
    assert one.digest == other.digest


def test_a_case_that_fails_is_made_smaller() -> None:
    """What is left fails in the same way, and nothing of it can be left out."""
    mutant = MUTANTS["a line of the journal is lost"]
    caught = catch(mutant)
    assert caught is not None
    case, failure = caught
    with mutant.made():
        part, smaller = shrink(case, failure, Part.whole(case))
    assert smaller.what == failure.what
    assert len(part.faults) == len(part.asks) == 1
    assert len(part.nodes) <= 1 + case.least_memory  # one compute node, and as many memory nodes as a request needs

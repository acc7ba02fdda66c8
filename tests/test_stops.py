"""An answer ends at a stop string, of which nothing gets out."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lamina.front.stops import StopStrings

LETTERS = st.text("abé", max_size=40)
TEXTS = st.lists(st.text("abé", min_size=1, max_size=6), min_size=1, max_size=4)


def first_end(text: str, stops: list[str], after: int) -> tuple[int, str] | None:
    """Where the first of the texts ends, behind so many characters, and which; the longest of those that end there."""
    for end in range(after + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@given(st.lists(LETTERS, max_size=12), TEXTS, st.integers(0, 4), st.booleans())
@example(["ab", "ab", "a"], ["abé", "ba"], 0, False)
def test_an_answer_ends_at_the_first_stop_string(
    pieces: list[str], stops: list[str], quiet: int, include: bool
) -> None:
    """However it is cut into pieces, and whatever the first pieces have, where none counts. At every moment all text is
    out that can be in no stop string, and no other."""
    found = first_end("".join(pieces), stops, len("".join(pieces[:quiet])))
    stream = StopStrings(stops, include=include)
    given = come = ""
    for number, piece in enumerate(pieces):
        given += stream.push(piece, active=number >= quiet)
        come += piece
        if stream.found is None:
            held = max(n for stop in stops for n in range(len(stop)) if come.endswith(stop[:n]))
            assert given == come[: len(come) - held]
    given += stream.rest()

    if found is None:
        assert (given, stream.found) == (come, None)
    else:
        end, stop = found
        assert (given, stream.found) == (come[: end if include else end - len(stop)], stop)


@pytest.mark.parametrize("stop", ["a" * 1000 + "b", ("a" * 50 + "c") * 19 + "b", "x" * 1000])
def test_long_stop_strings_cost_no_more_for_long_answers(stop: str) -> None:
    """A character of an answer that always looks like the beginning takes no longer at the end of a long answer."""

    def seconds(tokens: int) -> float:
        stream = StopStrings([stop, "x" * 900])
        begun = time.perf_counter()
        for _ in range(tokens):
            stream.push("aaaac")
            stream.push("aaaaa")
        return time.perf_counter() - begun

    seconds(100)
    assert min(seconds(4000) for _ in range(5)) < 20 * min(seconds(500) for _ in range(5))

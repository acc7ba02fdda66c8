"""Two keys are equal if and only if everything up to the end of their blocks is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from lamina.front.prefix import PrefixKeys

FACTS = {"model": "m", "dtype": "bfloat16", "kv_dtype": "int8", "block_tokens": 3}
tokens = st.lists(st.integers(0, 2), max_size=12)
salts = st.sampled_from(["", "a", "b"])


def make(**changes: object) -> PrefixKeys:
    return PrefixKeys(**{**FACTS, **changes})  # type: ignore[arg-type]


def alike(a: Sequence[object], b: Sequence[object]) -> int:
    """How many leading elements are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@given(tokens, tokens, salts, salts)
def test_equal_up_to_where_the_prompts_are(a: list[int], b: list[int], salt: str, other: str) -> None:
    """Each full block has one key; two are equal if the salt and all tokens up to the block's end are."""
    first, second = make().keys(a, salt), make().keys(b, other)
    assert len(first) == len(a) // 3
    assert len(set(first)) == len(first)
    same = alike(a, b) // 3 if salt == other else 0
    assert alike(first, second) == same
    assert not set(first[same:]) & set(second[same:])


@given(tokens, st.integers(0, 4), salts)
def test_what_is_known_need_not_be_computed_again(a: list[int], known: int, salt: str) -> None:
    """Keys computed from known leading ones equal those computed from nothing."""
    keys = make().keys(a, salt)
    assert make().keys(a, salt, keys[:known]) == keys


def test_everything_counts_that_keys_and_values_depend_on() -> None:
    """A change of any fact changes the keys, even where the facts written one after the other look the same."""
    prompt = list(range(12))
    changed = [make(model="n"), make(dtype="float32"), make(kv_dtype="float32"), make(block_tokens=4)]
    changed += [make(model="mb", dtype="float16"), make(model="m", dtype="bfloat16in", kv_dtype="t8")]
    every = [prefix.keys(prompt)[0] for prefix in [make(), *changed]] + [make().keys(prompt, "3")[0]]
    assert len(set(every)) == len(every)
    assert {len(key) for key in every} == {16}

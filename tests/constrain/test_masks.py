"""A mask has exactly the tokens with which an answer can go on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lamina.constrain.matcher import Vocabulary
from lamina.demo.run import CHECKPOINT
from lamina.errors import RequestError
from lamina.model.tokenizer import Tokenizer
from lamina.wire.requests import Constraint, Grammar, JsonObject, JsonSchema, OneOf, Regex
from tests.constrain.words import Words, demo_words, few_words
from tests.test_text import KINDS, SPECIAL

LETTERS = "abé\n"
"""One of them has two bytes."""
LONGEST = 3000
"""The most texts of a language that is compared."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """All bytes of the letters, some words of several, one that ends within a letter, and one of other bytes."""
    single = sorted({bytes([byte]) for byte in LETTERS.encode()})
    longer = [b"ab", b"ba", b"aab", b"bb\n", "é".encode(), "aé".encode(), b"a\xc3", b"\xa9b", b"x", b"\n\n"]
    return few_words(tmp_path_factory.mktemp("words"), single + longer)


def check(words: Words, constraint: Constraint, language: set[str]) -> None:
    """Compare the masks behind every prefix that tokens can make with those that follow from the whole language."""
    texts = {text.encode() for text in language}
    prefixes = {text[:end] for text in texts for end in range(len(text) + 1)}
    compiled = words.compile(constraint)
    seen, waiting = {b""}, [(b"", list[int]())]
    while waiting and len(seen) < 200:
        before, tokens = waiting.pop()
        expected = {token for token, spelled in words.spelled.items() if spelled and before + spelled in prefixes}
        if before in texts:
            expected.add(words.end)
        matcher = compiled.matcher(tokens)
        assert set(words.allowed(matcher.mask())) == expected, (constraint, before)
        assert matcher.is_complete == (before in texts)
        for token in expected - {words.end}:
            if (after := before + words.spelled[token]) not in seen:
                seen.add(after)
                waiting.append((after, [*tokens, token]))


@settings(deadline=None, max_examples=40)
@given(texts=st.lists(st.text(LETTERS, max_size=6), min_size=1, max_size=8))
def test_one_of_some_texts(words: Words, texts: list[str]) -> None:
    """Also where texts are empty, begin alike, or are the same."""
    check(words, OneOf(texts), set(texts))


Language = tuple[str, set[str]]
"""A regular expression, and all texts that match it."""


def literal(text: str) -> Language:
    return text.replace("\n", r"\n"), {text}


def one_of(letters: set[str]) -> Language:
    return "[" + "".join(sorted(letters)).replace("\n", r"\n") + "]", letters


def either(parts: list[Language]) -> Language:
    return "(?:" + "|".join(p for p, _ in parts) + ")", set[str]().union(*(texts for _, texts in parts))


def joined(parts: list[Language]) -> Language:
    texts = {"".join(some) for some in itertools.islice(itertools.product(*(t for _, t in parts)), LONGEST + 1)}
    return "".join(f"(?:{p})" for p, _ in parts), texts


def repeated(part: Language, least: int, more: int) -> Language:
    texts = set[str]()
    for count in range(least, least + more + 1):
        texts |= joined([part] * count)[1]
    return f"(?:{part[0]}){{{least},{least + more}}}", texts


def few(language: Language) -> bool:
    return len(language[1]) <= LONGEST


EXPRESSIONS = st.recursive(
    st.text(LETTERS, min_size=1, max_size=3).map(literal) | st.sets(st.sampled_from(LETTERS), min_size=1).map(one_of),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(either)
        | st.lists(inner, min_size=1, max_size=3).map(joined).filter(few)
        | st.builds(repeated, inner, st.integers(0, 2), st.integers(0, 2)).filter(few)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(EXPRESSIONS.filter(few))
def test_regular_expressions(words: Words, language: Language) -> None:
    """Of which the texts are known by how the expression was made."""
    check(words, Regex(language[0]), language[1])


@pytest.mark.parametrize(
    ("grammar", "language"),
    [
        ('start: "a" start "b" | "é"', {"a" * n + "é" + "b" * n for n in range(40)}),
        ('start: x+\nx: "a" | "b" y\ny: /[é\\n]{1,2}/', None),
        ('root ::= "a" ("b" | "é")? "\\n"', {"a\n", "ab\n", "aé\n"}),
    ],
)
def test_grammars(words: Words, grammar: str, language: set[str] | None) -> None:
    """In the Lark dialect, and in that with ``::=``."""
    if language is None:
        parts = ["a", *("b" + a + b for a in "é\n" for b in ("", "é", "\n"))]
        language = {"".join(some) for count in range(1, 5) for some in itertools.product(parts, repeat=count)}
        with pytest.raises(AssertionError):  # the language is infinite, so the longest of these can go on
            check(words, Grammar(grammar), language)
        return
    check_within(words, Grammar(grammar), language, longest=20)


def check_within(words: Words, constraint: Constraint, language: set[str], longest: int) -> None:
    """The same for the beginnings of a language that are not too long."""
    prefixes = {text.encode()[:end] for text in language for end in range(len(text.encode()) + 1)}
    compiled, chosen = words.compile(constraint), random.Random(1)
    for _ in range(20):
        matcher, before = compiled.matcher(), b""
        while len(before) < longest:
            expected = {t for t, spelled in words.spelled.items() if spelled and before + spelled in prefixes}
            expected |= {words.end} if before.decode(errors="replace") in language else set()
            assert set(words.allowed(matcher.mask())) == expected, before
            token = chosen.choice(sorted(expected))
            if token == words.end:
                break
            matcher.accept(token)
            before += words.spelled[token]


def test_all_kinds_of_constraints_end_in_what_they_ask_for() -> None:
    """And only an end token is allowed behind it."""
    words, chosen = demo_words(), random.Random(3)
    cases: list[tuple[Constraint, Callable[[str], bool]]] = [
        (OneOf(["yes", "no", "no, never"]), lambda text: text in ("yes", "no", "no, never")),
        (Regex(r"[0-9]{3}-[a-f]{2}"), lambda text: len(text) == 6 and text[3] == "-"),
        (JsonObject(), lambda text: text.startswith("{") and text.endswith("}")),
        (JsonSchema('{"enum": [1, "a", null]}'), lambda text: text in ("1", '"a"', "null")),
    ]
    for constraint, fits in cases:
        for _ in range(5):
            matcher = words.compile(constraint).matcher()
            text = words.walk(matcher, chosen)
            assert text is not None
            assert fits(text), text
            assert matcher.is_over


def test_an_answer_can_be_followed_again_from_its_tokens() -> None:
    """After a preemption or elsewhere, the masks are the same."""
    words, chosen = demo_words(), random.Random(4)
    compiled = words.compile(JsonObject())
    first, tokens = compiled.matcher(), list[int]()
    assert compiled.first_mask() == first.mask()
    for _ in range(30):
        tokens.append(chosen.choice([t for t in words.allowed(first.mask()) if t != words.end]))
        first.accept(tokens[-1])
        assert compiled.matcher(tokens).mask() == first.mask()


def test_the_end_waits_for_the_least_number_of_tokens_where_it_can() -> None:
    """A constraint that is fulfilled ends all the same: nothing else fits it."""
    words = demo_words()
    digit = words.single[b"1"]
    matcher = words.compile(Regex("1{1,3}")).matcher(min_tokens=3)
    for ends in (False, False, False):
        assert (words.end in words.allowed(matcher.mask())) is ends
        matcher.accept(digit)
    assert words.allowed(matcher.mask()) == [words.end]
    short = words.compile(OneOf(["1"])).matcher([digit], min_tokens=9)
    assert words.allowed(short.mask()) == [words.end]


def test_a_token_that_the_mask_forbids_is_an_error() -> None:
    """It says which one it was."""
    words = demo_words()
    matcher = words.compile(OneOf(["yes"])).matcher()
    with pytest.raises(RequestError, match="token 5 as token 1 of the answer"):
        matcher.accept(5)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Regex("("), "the regular expression is refused: .*invalid regex"),
        (Regex("a(?=b)"), "look-around"),
        (Regex("[a&&b]"), "no answer fits it"),
        (Grammar('begin: "a"'), "the grammar is refused: no start rule"),
        (Grammar('start: "a" %json {"type": "string", "not": {}}'), "%json"),
        (Grammar('start[temperature=0.5]: "a"'), "temperature"),
        (Grammar("root ::= ("), "the grammar cannot be read"),
        (OneOf(["x" * (1 << 14)] * 17), "the limit is 262144"),
    ],
)
def test_what_cannot_be_enforced_is_refused(constraint: Constraint, message: str) -> None:
    """With the reason."""
    with pytest.raises(RequestError, match=message):
        demo_words().compile(constraint)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_are_understood_or_refused(kind: str, tmp_path: Path) -> None:
    """Tokens are the bytes that answers are written with; where the library cannot tell, it does not guess."""
    library = KINDS[kind]()
    folder = CHECKPOINT
    if kind != "byte level":
        folder = tmp_path
        PreTrainedTokenizerFast(tokenizer_object=library, unk_token=SPECIAL[0]).save_pretrained(folder)
    tokenizer = Tokenizer(folder, 64)
    size = library.get_vocab_size()
    if not kind.startswith("byte"):
        with pytest.raises(RequestError, match="because of its tokenizer"):
            Vocabulary(tokenizer, size, [2])
        return
    vocabulary = Vocabulary(tokenizer, size + 3, [2])
    for token in filter(tokenizer.has_text, range(size)):
        spelled = tokenizer.bytes_of(token)
        if spelled is None:
            spelled = library.id_to_token(token).replace("▁", " ").encode()
        if spelled != b"\xff":  # which no text has
            assert vocabulary.library.decode_bytes([token]) == spelled


def test_no_tokenizer_and_no_end_token_are_refused() -> None:
    """As answers have no text then, or no end."""
    with pytest.raises(RequestError, match="so answers cannot be constrained"):
        Vocabulary(Tokenizer(Path("/nonexistent"), 64), 64, [1])
    with pytest.raises(RequestError, match="names no end token"):
        Vocabulary(Tokenizer(CHECKPOINT, 64), 1536, [])

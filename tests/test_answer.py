"""What a client is told of an answer: the text of its tokens, up to what ends it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.front.answer import AnswerText
from lamina.front.intake import End
from lamina.model.tokenizer import TextStream, Tokenizer
from lamina.wire.requests import Request
from tests.test_stops import first_end
from tests.test_text import BYTES, SPECIAL, library_of, tokenizer_of

KIND = "byte fallback"
END = SPECIAL.index("</s>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One that marks words by a space before them, and spells some characters byte by byte."""
    return tokenizer_of(KIND, tmp_path_factory.mktemp("tokenizers"))


def ids(*names: str) -> list[int]:
    return [id_ for name in names if (id_ := library_of(KIND).token_to_id(name)) is not None]


def told(tokenizer: Tokenizer, request: Request, tokens: list[int], end: End) -> tuple[str, object, str, int]:
    """The text of an answer, what stopped it and why it ended, and how many tokens there were to that point."""
    answer = AnswerText(1, request, [1], tokenizer)
    text = ""
    for count, token in enumerate(tokens, 1):
        text += answer.piece(token, None, end if count == len(tokens) else None).text
        if answer.found is not None:
            break
    finished = answer.finished(end)
    return text + finished.text, finished.stopped_by, finished.reason, count


TOKENS = st.lists(
    st.sampled_from(
        [*ids("▁a", "b", "er", "é", "▁", "¶", "</s>"), *(ids(BYTES[byte])[0] for byte in b"a\xc3\xa9\xff")]
    ),
    min_size=1,
    max_size=16,
)
STOPS = st.lists(st.text(" abeéÿr\ufffd", min_size=1, max_size=4), max_size=3)


@given(TOKENS, STOPS, st.integers(0, 8), st.booleans())
def test_the_text_ends_at_the_first_stop_string(
    tokenizer: Tokenizer, tokens: list[int], stops: list[str], least: int, include: bool
) -> None:
    """Also where its characters come byte by byte, and behind as many tokens as were asked for."""
    stream = TextStream(tokenizer, [1])
    parts = [*map(stream.push, tokens), stream.rest()]
    quiet = "" if len(tokens) < least else "".join(parts[: max(least - 1, 0)])
    found = first_end("".join(parts), stops, len(quiet)) if len(tokens) >= least else None

    request = Request([1], stop=stops, min_tokens=least, include_stop=include)
    text, stopped_by, reason, count = told(tokenizer, request, tokens, End("length"))

    if found is None:
        assert (text, stopped_by, reason, count) == ("".join(parts), None, "length", len(tokens))
    else:
        end, stop = found
        whole = "".join(parts)
        assert (text, stopped_by, reason) == (whole[: end if include else end - len(stop)], stop, "stop")
        assert len("".join(parts[:count])) >= end or count == len(tokens)


@pytest.mark.parametrize(
    ("last", "settings", "text"),
    [
        ("</s>", {}, "a"),
        ("</s>", {"include_stop": True}, "a"),
        ("</s>", {"show_special": True}, " a</s>"),
        ("er", {}, "a"),
        ("er", {"show_special": True}, " a"),
        ("er", {"include_stop": True}, "aer"),
    ],
)
def test_the_token_that_stops_an_answer_has_no_text(
    tokenizer: Tokenizer, last: str, settings: dict[str, bool], text: str
) -> None:
    """Unless it is asked for: a word by ``include_stop``, a special token by ``show_special``. It is one of the tokens
    in any case. Where special tokens are seen, the one of the prompt is no beginning of a text, so the space of the
    word stays."""
    (stop,) = ids(last)
    request = Request([1], stop=["</x>", "ab"], **settings)
    end = End("stop", stopped_by=stop)

    assert told(tokenizer, request, [*ids("▁a"), stop], end) == (text, stop, "stop", 2)


def test_other_special_tokens_are_hidden_or_shown(tokenizer: Tokenizer) -> None:
    """In the middle of an answer."""
    tokens = [*ids("▁a"), END, *ids("b")]

    assert told(tokenizer, Request([1]), tokens, End("length"))[0] == "ab"
    assert told(tokenizer, Request([1], show_special=True), tokens, End("length"))[0] == " a</s>b"

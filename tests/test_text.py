"""The text of an answer is its part of the text of all tokens, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from lamina.demo.run import CHECKPOINT
from lamina.errors import RequestError
from lamina.model.tokenizer import TextStream, Tokenizer

CONTEXT = 64
SPECIAL = ["<unk>", "<s>", "</s>"]
UNKNOWN = SPECIAL[0]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁a", "▁story", "b", "er", "é", "▁", "¶", "、", "▁once"]


def byte_fallback(*, strip: bool) -> Library:
    """A tokenizer as SentencePiece models have it: words with ▁, and single bytes for what has no token. Llama 2 drops
    the space at the beginning of a text, Gemma does not."""
    pieces = {word: i for i, word in enumerate([*SPECIAL, *BYTES, *WORDS, "<", "/", "s", ">"])}
    library = Library(models.BPE(pieces, [], unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    marked = [normalizers.Replace(" ", "▁")]
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *marked] if strip else marked)
    stripped = [decoders.Strip(" ", 1, 0)] if strip else []
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def metaspace() -> Library:
    """A Unigram model whose words begin with ▁, as T5 has it."""
    library = Library(models.Unigram([(word, -1.0) for word in [*SPECIAL, *WORDS, *"xyz"]], 0))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return library


def word_pieces() -> Library:
    """Words without a mark, and the rest of words with one, as BERT has it."""
    words = ["the", "story", "##s", ".", "##ly", "'", "é"]
    library = Library(models.WordPiece({word: i for i, word in enumerate(SPECIAL + words)}, unk_token=UNKNOWN))
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return library


def suffixes() -> Library:
    """Words that end with a mark, as the first GPT has it."""
    words = ["the</w>", "st", "ory</w>", "é</w>", "s"]
    library = Library(models.BPE({word: i for i, word in enumerate(SPECIAL + words)}, [], unk_token=UNKNOWN))
    library.decoder = decoders.BPEDecoder()
    return library


def whole_words() -> Library:
    """A vocabulary of words, without anything that says how they are joined."""
    words = ["the", "story", ".", "é"]
    library = Library(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token=UNKNOWN))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return library


KINDS: dict[str, Callable[[], Library]] = {
    "byte level": lambda: Library.from_file(str(CHECKPOINT / "tokenizer.json")),
    "byte fallback": lambda: byte_fallback(strip=True),
    "byte fallback, all spaces": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "word pieces": word_pieces,
    "suffixes": suffixes,
    "whole words": whole_words,
}


@cache
def library_of(kind: str) -> Library:
    library = KINDS[kind]()
    library.add_special_tokens([token for token in SPECIAL if library.token_to_id(token) is not None])
    return library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def tokenizer_of(kind: str, folder: Path, context: int = CONTEXT) -> Tokenizer:
    if kind == "byte level":
        return Tokenizer(CHECKPOINT, context)
    if not (folder / kind).exists():
        PreTrainedTokenizerFast(tokenizer_object=library_of(kind), unk_token=UNKNOWN).save_pretrained(folder / kind)
    return Tokenizer(folder / kind, context)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def tokenizer(kind: str, folder: Path) -> Tokenizer:
    return tokenizer_of(kind, folder)


def streamed(tokenizer: Tokenizer, prompt: list[int], answer: list[int], *, special: bool = False) -> str:
    stream = TextStream(tokenizer, prompt, special=special)
    return "".join(map(stream.push, answer)) + stream.rest()


PARTS = st.lists(st.one_of(st.integers(0, 2**30), st.characters(codec="utf-8")), max_size=20)


@given(PARTS, PARTS, st.booleans())
def test_prompt_and_answer_make_the_whole(
    kind: str, tokenizer: Tokenizer, asked: list[int | str], answered: list[int | str], special: bool
) -> None:
    """For any tokens, special ones among them, and characters that come byte by byte: the text of the prompt and that
    of the answer are what the library makes of all tokens together, also where special tokens are to be seen."""
    library = library_of(kind)
    prompt, answer = (
        [t for part in parts for t in ([whole_token(library, part)] if isinstance(part, int) else spelled(kind, part))]
        for parts in (asked, answered)
    )

    text = streamed(tokenizer, prompt, answer, special=special)

    asked_text, whole = (library.decode(ids, skip_special_tokens=not special) for ids in (prompt, prompt + answer))
    assert asked_text + text == whole


def whole_token(library: Library, number: int) -> int:
    """Some token that ends no character in the middle."""
    choices = [id_ for id_ in library.get_vocab().values() if "\ufffd" not in library.decode([id_])]
    return sorted(choices)[number % len(choices)]


def spelled(kind: str, character: str) -> list[int]:
    """Tokens of one character: its bytes, where the tokenizer has them."""
    library = library_of(kind)
    if kind.startswith("byte fallback"):
        return [library.token_to_id(BYTES[byte]) for byte in character.encode()]
    return library.encode(character, add_special_tokens=False).ids


@given(st.lists(st.integers(0, 300), max_size=40), st.integers(0, 40))
def test_any_tokens_have_the_text_of_their_bytes(kind: str, tokenizer: Tokenizer, ids: list[int], cut: int) -> None:
    """Bytes that make no character become U+FFFD, whether the prompt ends among them or not; no text gets lost."""
    whole = streamed(tokenizer, [], ids)

    assert whole == reference(kind, ids)
    if not ends_inside_a_character(kind, ids[:cut]):
        assert streamed(tokenizer, [], ids[:cut]) + streamed(tokenizer, ids[:cut], ids[cut:]) == whole


def reference(kind: str, ids: list[int]) -> str:
    """The text of all tokens at once. Of a run of bytes, only those that make no character are replaced."""
    library = library_of(kind)
    if not kind.startswith("byte fallback"):
        return library.decode(ids)
    names = [library.id_to_token(id_) for id_ in ids if id_ >= len(SPECIAL)]
    raw = b"".join(
        bytes.fromhex(match[1]) if (match := re.fullmatch("<0x(..)>", name)) else name.replace("▁", " ").encode()
        for name in names
        if name is not None
    )
    text = raw.decode(errors="lamina.each_byte")
    return text.removeprefix(" ") if kind == "byte fallback" else text


def ends_inside_a_character(kind: str, ids: list[int]) -> bool:
    return reference(kind, ids).endswith("\ufffd")


def begins_a_character(raw: bytes) -> bool:
    """Whether more bytes can make a character of these."""
    for count in range(1, 4):
        for more in itertools.product(b"\x80\x90\x9f\xa0\x8f\xbf", repeat=count):
            try:
                if len((raw + bytes(more)).decode()) == 1:
                    return True
            except UnicodeDecodeError:
                pass
    return False


@given(st.lists(st.sampled_from([*b"a\xc3\xa9\xed\xa0\x80\xe2\x82\xac\xf0\x9f\x98\x80\xf4\x90\xff"]), max_size=12))
def test_nothing_is_held_back_that_can_become_no_character(folder: Path, raw: list[int]) -> None:
    """After every byte, U+FFFD stands for those that are in vain, and only the beginning of a character is missing."""
    tokenizer = tokenizer_of("byte fallback", folder)
    stream = TextStream(tokenizer)
    given_bytes, text = b"", ""
    for byte in raw:
        given_bytes += bytes([byte])
        text += stream.push(len(SPECIAL) + byte)
        held = next((given_bytes[i:] for i in range(-3, 0) if begins_a_character(given_bytes[i:])), b"")
        assert text == given_bytes[: len(given_bytes) - len(held)].decode(errors="lamina.each_byte")


def test_a_character_of_several_tokens_comes_whole(folder: Path) -> None:
    """Not as replacement characters."""
    tokenizer = tokenizer_of("byte fallback", folder)
    stream = TextStream(tokenizer)
    a, b = (library_of("byte fallback").token_to_id(word) for word in ("▁a", "b"))
    euro = [len(SPECIAL) + byte for byte in "€".encode()]

    assert [stream.push(token) for token in [a, *euro, b]] == ["a", "", "", "€", "b"]
    assert stream.rest() == ""


def split(folder: Path, model_type: str) -> Path:
    """The demo's tokenizer as older checkpoints have it, in vocab.json and merges.txt, with a model of some type."""
    model = json.loads((CHECKPOINT / "tokenizer.json").read_text())["model"]
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return folder


def test_a_vocabulary_and_merges_are_a_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As for the library, which makes one of the files of older checkpoints."""
    text = "Once upon a time, Élodie said: 3 + 4 = 7?"

    old, new = Tokenizer(split(tmp_path, "qwen2"), CONTEXT), Tokenizer(CHECKPOINT, CONTEXT)

    assert old.encode(text) == new.encode(text)[1:]  # it does not ask for the token of the beginning
    stream = TextStream(old)
    assert "".join(map(stream.push, old.encode(text))) + stream.rest() == text
    assert not caplog.records


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder, "has no tokenizer.json, nor other files of a tokenizer"),
        (
            lambda folder: split(folder, "gemma2"),
            r"makes no tokenizer of merges.txt, vocab.json (they are not those of",
        ),
        (lambda folder: split(folder, "llama"), "makes no tokenizer of merges.txt, vocab.json (Couldn't instantiate"),
    ],
)
def test_a_checkpoint_without_tokenizer_says_so(
    make: Callable[[Path], Path], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When it is opened, and again to those who send text; also where the library makes one that knows no word."""
    tokenizer = Tokenizer(make(tmp_path), CONTEXT)

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("event=no_tokenizer ")
    assert reason in record.getMessage()
    with pytest.raises(RequestError) as caught:
        tokenizer.encode("Once upon a time")
    assert reason in str(caught.value)
    assert TextStream(tokenizer).push(1) == ""


def test_the_space_before_the_first_word_of_an_answer_stays(folder: Path) -> None:
    """The tokenizer drops it only at the beginning of a text, which the prompt is."""
    tokenizer = tokenizer_of("byte fallback", folder)
    story = library_of("byte fallback").token_to_id("▁story")

    assert TextStream(tokenizer, tokenizer.encode("once a")).push(story) == " story"
    assert TextStream(tokenizer, [1]).push(story) == "story"


@pytest.mark.parametrize("byte", [0x80, 0xE2, 0xFF])
def test_bytes_that_make_no_character_cost_no_more_each(folder: Path, byte: int) -> None:
    """However many there are; it once took a quadratic time, minutes for these."""
    stream = TextStream(tokenizer_of("byte fallback", folder))
    begun = time.perf_counter()
    text = "".join(stream.push(len(SPECIAL) + byte) for _ in range(20_000)) + stream.rest()

    assert text == "\ufffd" * 20_000
    assert time.perf_counter() - begun < 5.0


# -- prompts


def test_the_spellings_of_a_word(folder: Path) -> None:
    """At the beginning and behind a space, as whole tokens where the vocabulary has them, without special tokens."""
    for kind, word, spelt in (
        ("byte level", "Lily", {"L|il|y", "ĠL|il|y"}),
        ("byte level", " Lily", {"L|il|y", "ĠL|il|y"}),
        ("byte fallback", "a", {"▁|<0x61>", "▁|▁|<0x61>"}),
        ("word pieces", "story", {"story"}),
    ):
        tokenizer, library = tokenizer_of(kind, folder), library_of(kind)
        found = tokenizer.spellings(word)
        assert {"|".join(map(library.id_to_token, ids)) for ids in found} == spelt, kind
        assert len(found) == len(spelt)
    assert tokenizer_of("byte level", folder).spellings("</s>", parse_special=True)[0] == [
        library_of("byte level").token_to_id("</s>")
    ]
    with pytest.raises(RequestError, match="no tokens for the text ' '"):
        tokenizer_of("word pieces", folder).spellings(" ")


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_special_tokens_in_text_are_text(kind: str, folder: Path) -> None:
    """Unless they are asked for. Those that begin every prompt stay."""
    tokenizer, library = tokenizer_of(kind, folder), library_of(kind)
    end = library.token_to_id("</s>")

    plain, parsed = tokenizer.encode("a</s>"), tokenizer.encode("a</s>", parse_special=True)

    assert end not in plain
    assert parsed[-1] == end
    assert plain[0] == parsed[0] == library.token_to_id("<s>")
    assert library.decode(plain) == "a</s>"


def test_text_that_can_only_be_a_special_token_is_refused(folder: Path) -> None:
    """A Unigram model has its special tokens among its words, and finds them where it was told not to look."""
    tokenizer = tokenizer_of("metaspace", folder)

    with pytest.raises(RequestError, match="cannot read '</s>' in the prompt as text"):
        tokenizer.encode("a</s>")
    assert library_of("metaspace").token_to_id("</s>") in tokenizer.encode("a</s>", parse_special=True)
    assert 0 in tokenizer.encode("a?")  # the unknown token comes from any text


@given(st.text(max_size=200))
def test_a_length_is_refused_only_if_it_is_too_much(folder: Path, text: str) -> None:
    """For any text that takes no more tokens than the context has."""
    for kind in ("byte level", "byte fallback"):
        tokenizer = tokenizer_of(kind, folder)
        tokens = tokenizer.encode(text)
        if len(tokens) <= CONTEXT:
            tokenizer.require_fit(len(text.encode()))


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(tokenizer: Tokenizer) -> None:
    """However long it is."""
    with pytest.raises(RequestError, match=r"1000000 bytes of text, the context of 64 tokens takes \d+ at most"):
        tokenizer.require_fit(1_000_000)


def test_text_that_a_tokenizer_drops_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """Where a mark swallows spaces, or words are cut at them, no length is certain to be too much."""
    certain = tokenizer_of("byte fallback", tmp_path).max_bytes
    library = byte_fallback(strip=True)
    library.add_special_tokens([*SPECIAL, AddedToken("<mask>", lstrip=True)])
    PreTrainedTokenizerFast(tokenizer_object=library, unk_token=UNKNOWN).save_pretrained(tmp_path / "mask")

    assert Tokenizer(tmp_path / "mask", CONTEXT).max_bytes > certain

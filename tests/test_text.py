"""The text of an answer is that of its tokens, however it is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from lamina.demo.run import CHECKPOINT
from lamina.errors import RequestError
from lamina.front.text import TextStream, Tokenizer

CONTEXT = 64


def byte_fallback() -> Library:
    """A tokenizer as SentencePiece models have it: words with ▁, and single bytes for what has no token."""
    words = ["<s>", "▁a", "▁story", "b", "er", "é", "▁", "¶", "、"]
    pieces = {word: i for i, word in enumerate(words)}
    pieces |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    library = Library(models.BPE(pieces, [], byte_fallback=True))
    library.add_special_tokens(["<s>"])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return library


@pytest.fixture(scope="module", params=["byte level", "byte fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "byte level":
        return Tokenizer(CHECKPOINT, CONTEXT)
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=byte_fallback()).save_pretrained(folder)
    return Tokenizer(folder, CONTEXT)


@given(st.lists(st.one_of(st.integers(1, 8), st.characters(codec="utf-8")), max_size=30))
def test_pieces_make_the_whole(tokenizer: Tokenizer, parts: list[int | str]) -> None:
    """For any words and characters, also those that have no token and come byte by byte."""
    ids = [token for part in parts for token in ([part] if isinstance(part, int) else spelled(tokenizer, part))]
    stream = TextStream(tokenizer)

    pieces = [stream.push(token) for token in ids]

    assert "".join(pieces) + stream.rest() == tokenizer.decode(ids)


def spelled(tokenizer: Tokenizer, character: str) -> list[int]:
    """Tokens of one character: its bytes, where the tokenizer has them."""
    vocabulary = tokenizer._library.get_vocab()
    if "<0x00>" in vocabulary:
        return [vocabulary[f"<0x{byte:02X}>"] for byte in character.encode()]
    ids: list[int] = tokenizer._library(character, add_special_tokens=False)["input_ids"]
    return ids


@given(st.lists(st.integers(0, 264), max_size=40))
def test_any_tokens_have_some_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Bytes that make no character are no reason to fail."""
    stream = TextStream(tokenizer)

    assert all(isinstance(stream.push(token), str) for token in ids)
    assert isinstance(stream.rest(), str)


def test_a_character_of_several_tokens_comes_whole(tmp_path: Path) -> None:
    """Not as replacement characters."""
    PreTrainedTokenizerFast(tokenizer_object=byte_fallback()).save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path, CONTEXT)
    stream = TextStream(tokenizer)
    euro = [9 + byte for byte in "€".encode()]

    assert [stream.push(token) for token in [1, *euro, 3]] == ["a", "", "", "€", "b"]
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
    assert old.decode(old.encode(text)) == text
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
    assert tokenizer.decode([1, 2]) == ""


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(tokenizer: Tokenizer) -> None:
    """However long it is."""
    with pytest.raises(RequestError, match=r"1000000 characters, which cannot fit the context of 64 tokens"):
        tokenizer.encode("a" * 1_000_000)

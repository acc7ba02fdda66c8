"""The shipped demo checkpoint is a trained model, and the stories that it learned from are deterministic."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from lamina.demo.stories import DEMO_PROMPT, MAX_TALES, book, documents
from lamina.demo.train import CHECKPOINT, CONTEXT_TOKENS, SHORT_ROWS, greedy, held_out_loss

MAX_LOSS = 0.25
"""Nats per token over held-out stories; the grammar itself has about 0.15, an untrained model 7.3."""


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def demo_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    return greedy(model, tokenizer, DEMO_PROMPT, max_new_tokens=400)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def test_stories_are_the_same_for_the_same_seed() -> None:
    """A seed determines the documents, and another seed tells others."""
    once, again, other = (list(islice(documents(seed, books=0.3), 20)) for seed in (7, 7, 8))

    assert once == again
    assert not set(once) & set(other)


def test_every_symbol_is_expanded() -> None:
    """No document shows the notation of the grammar, an empty expansion or the wrong article."""
    for text in islice(documents(0, books=0.1), 500):
        assert not re.search(r"[{}|¶]|\ba [aeiou]|\ban (?!hour)[^aeiou]| [ .,\n]", text), text


def test_a_book_ends_with_everything_its_tales_earned() -> None:
    """The last sentence names the keepsake of every tale, the last one first."""
    text = book(random.Random(3), tales=4)

    earned = re.findall(r"(?:given|gave \w+|put) a (\w+ \w+)(?:\.| into the hand)", text)
    assert len(earned) == 4
    assert text.endswith(
        f" put the {earned[3]} on the shelf, beside the {earned[0]}, the {earned[1]} and the {earned[2]}."
    )


def test_the_longest_books_fit_into_the_context(tokenizer: PreTrainedTokenizerFast) -> None:
    """A book of ``MAX_TALES`` tales leaves the model its first word to look back on."""
    rng = random.Random(0)

    assert max(len(tokenizer.encode(book(rng, MAX_TALES))) for _ in range(20)) < CONTEXT_TOKENS


def test_the_shipped_files_are_small_and_in_bfloat16(model: LlamaForCausalLM) -> None:
    """The checkpoint stays below 6 MB and holds the shapes that the demo is about."""
    config = model.config
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118

    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 6_000_000
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert config.num_hidden_layers >= 4
    assert config.max_position_embeddings == CONTEXT_TOKENS


def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Encoding adds the beginning-of-sequence token, and decoding gives the text back."""
    text = next(documents(5, books=1.0))
    tokens = tokenizer.encode(text)

    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_the_model_tells_a_tale_of_known_words_to_its_end(demo_text: str) -> None:
    """Greedy decoding of the demo prompt ends by itself, after a whole sentence, in words that the grammar knows."""
    known = words(" ".join(islice(documents(0, books=0.1), 400)))

    assert words(demo_text) <= known
    assert len(demo_text) > len(DEMO_PROMPT) + 500
    assert demo_text.endswith((".", '."'))
    assert demo_text.count("\n\n") >= 5


def test_held_out_loss_is_that_of_a_trained_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stories that the model has never seen surprise it no more than the choices of the grammar must."""
    loss = held_out_loss(model, tokenizer, rows=8, row_tokens=SHORT_ROWS[1], books=0.0)

    assert loss < MAX_LOSS

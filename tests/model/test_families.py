"""The slices of every family give what the whole model of transformers gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.model.slices import SlicedModel
from lamina.model.weights import load_weights
from tests.families import FAMILIES, VARIANTS, VOCABULARY
from tests.model.compose import CPU, compose, cut_checkpoint, load

TOLERANCE = 1e-5


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None], use_cache=False).logits[0]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


# What decodes over nodes in tests/sim need not all be composed here by default, too.
EACH_FAMILY = [
    pytest.param(name, marks=pytest.mark.slow if name in {*VARIANTS, "starcoder2", "granite", "olmo2"} else ())
    for name in FAMILIES
]


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_slices_compose_to_the_whole_model(family, blueprint, original):
    """In every family and with prompts longer than its windows, all logits are those of transformers."""
    tokens = prompt(60)

    logits, _ = compose(load(blueprint(family)), [tokens], torch.arange(60))

    assert relative_error(logits, whole(original(family), tokens)) < TOLERANCE


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_repeated_layers_share_their_functions(family, blueprint):
    """A model has as many head functions as kinds of layer, plus one for the first slice and one for the last."""
    cut = blueprint(family)
    shapes = {(s.shape, s.carry == ()) for s in cut.slices}

    attentions = 2 if family == "diffllama" else 1  # in a layer
    assert len(cut.slices) == attentions * FAMILIES[family].config().num_hidden_layers + 1
    assert cut.kinds <= 2 * len(shapes) + 2


def test_layer_ranges_compose_to_the_whole_model(blueprint):
    """Two nodes that hold a range of the slices each do what one node does that holds them all."""
    cut = blueprint("llama")
    tokens, rows = prompt(30), torch.arange(30)
    ranges = [
        SlicedModel(cut, load_weights(cut.capture, cut.weights_of(*span), CPU), CPU, *span) for span in ((0, 1), (2, 4))
    ]
    joined = SimpleNamespace(begin=ranges[1].begin, slices=ranges[0].slices + ranges[1].slices)

    logits, _ = compose(joined, [tokens], rows)

    assert logits.equal(compose(load(cut), [tokens], rows)[0])


@pytest.fixture(scope="module")
def pairs(blueprint, original):
    return {family: (load(blueprint(family)), original(family)) for family in ("llama", "gemma2")}


@settings(max_examples=12, deadline=None)
@given(data=st.data(), family=st.sampled_from(["llama", "gemma2"]))
def test_packed_sequences_do_not_see_each_other(data, family, pairs):
    """Any number of tokens, sequences and sampled rows: each sequence gets the logits that it gets alone."""
    sliced, model = pairs[family]
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    total = sum(lengths)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=total)))
    sequences = [prompt(length, seed) for seed, length in enumerate(lengths)]

    logits, _ = compose(sliced, sequences, rows)

    want = torch.cat([whole(model, tokens) for tokens in sequences])[rows]
    assert logits.shape == (len(rows), VOCABULARY)
    assert relative_error(logits, want) < TOLERANCE


def test_carry_of_pre_norm_llama_is_the_residual_stream(blueprint, original):
    """The minimum cut finds what the papers say: one tensor of hidden_size numbers per token, the residual."""
    cut = blueprint("llama")
    config = FAMILIES["llama"].config()
    tokens = prompt(20)

    _, carries = compose(load(cut), [tokens], torch.tensor([19]))

    with torch.no_grad():
        states = original("llama")(tokens[None], output_hidden_states=True, use_cache=False).hidden_states
    for piece, carry, residual in zip(cut.slices[:-1], carries, states, strict=False):
        assert piece.sizes.carry == config.hidden_size * 4
        (value,) = carry
        torch.testing.assert_close(value, residual, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_no_further_from_the_library_than_rounding(saved, original):
    """In bfloat16 the slices round where the library rounds, up to attention, which is in float32 here.

    Gemma 2 does the most in between: norms in float32, an embedding factor that is a rounded buffer, two soft-caps.
    """
    from transformers import AutoModelForCausalLM

    tokens = prompt(60)
    half = AutoModelForCausalLM.from_pretrained(saved("gemma2"), dtype="bfloat16").eval()

    logits, _ = compose(load(cut_checkpoint(saved("gemma2"), "bfloat16")), [tokens], torch.arange(60))

    want = whole(half, tokens)
    error, rounding = relative_error(logits, want), relative_error(want, whole(original("gemma2"), tokens))
    assert logits.dtype == torch.bfloat16
    assert error <= rounding

"""Tokens are drawn from the distribution that was asked for, by seed and position alone."""

from __future__ import annotations

import collections
from array import array
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.compute import sampler
from lamina.compute.draws import Draws, uniform
from lamina.compute.rows import in_blocks, level_of
from lamina.compute.sampler import sample
from lamina.wire.orders import NONE_ALLOWED, Choice
from lamina.wire.requests import Sampling

LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0])
DRAWS = 4000
PROMPT, ANSWER = [3, 5, 5, 8, 21, 30], [8, 2, 2, 2, 17, 3]
MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"logit_bias": {1: 4.0, 8: -100.0, 30: 1.5}},
    {"banned": [2, 7]},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.6, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": -0.4, "banned": [4]},
    {"top_k": 20, "min_p": 0.02, "presence_penalty": -1.0, "logit_bias": {3: -2.0, 9: 2.0}, "repetition_penalty": 2.0},
    {"top_k": 100, "top_p": 0.95, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {0: 1.0}},
]


def choice(position: int = 0, *, mask: bytes | None = None, banned: list[int] | None = None, **more: Any) -> Choice:
    """A choice after ``PROMPT`` and ``ANSWER``."""
    sampling = Sampling(**{"temperature": 1.0, "seed": 9, **more})
    prompt, answer = array("i", set(PROMPT)).tobytes(), array("i", ANSWER).tobytes()
    return Choice(sampling, position, prompt=prompt, answer=answer, banned=banned or [], mask=mask)


def reference(logits: torch.Tensor, wanted: dict[str, Any]) -> torch.Tensor:
    """The probabilities that processors of ``transformers`` leave of logits [V], in float64."""
    from transformers.generation import logits_process as library

    s = Sampling(**{key: value for key, value in wanted.items() if key != "banned"})
    scores = logits[None].double()
    history = torch.tensor([PROMPT + ANSWER])
    processors = library.LogitsProcessorList()
    if s.logit_bias:
        processors.append(library.SequenceBiasLogitsProcessor({(i,): bias for i, bias in s.logit_bias.items()}))
    if s.repetition_penalty not in (None, 1):
        processors.append(library.RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    scores = processors(history, scores)
    for token, count in collections.Counter(ANSWER).items():  # which the library does not have
        if s.presence_penalty or s.frequency_penalty:
            scores[0, token] -= s.presence_penalty + count * s.frequency_penalty
    processors = library.LogitsProcessorList()
    if banned := wanted.get("banned"):
        processors.append(library.SuppressTokensLogitsProcessor(banned))
    processors.append(library.TemperatureLogitsWarper(s.temperature or 1.0))
    if s.top_k:
        processors.append(library.TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        processors.append(library.TopPLogitsWarper(s.top_p))
    if s.min_p:
        processors.append(library.MinPLogitsWarper(s.min_p))
    kept: torch.Tensor = processors(history, scores)[0].softmax(-1)
    return kept


def draw(sampling: Sampling, count: int = 4000) -> dict[int, float]:
    """Shares of the tokens over many positions."""
    tokens = sample(LOGITS.repeat(count, 1), [Choice(sampling, position) for position in range(count)])
    return {token: n / count for token, n in collections.Counter(tokens).items()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_follow_the_distribution(temperature: float) -> None:
    """Softmax of the logits over the temperature."""
    shares = draw(Sampling(temperature, seed=5))

    for token, probability in enumerate((LOGITS / temperature).softmax(-1).tolist()):
        assert shares.get(token, 0) == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize("temperature", [1e-38, 1e-300, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    """Numbers that overflow stand for probability 0."""
    logits = torch.tensor([[1.0, 5.0, 3.0, -2.0]]).repeat(100, 1)

    assert sample(logits, [Choice(Sampling(temperature, seed=5), position) for position in range(100)]) == [1] * 100


def test_top_k_leaves_the_likeliest() -> None:
    """Renormalised among themselves."""
    shares = draw(Sampling(1.0, top_k=2, seed=5))

    assert shares.keys() == {0, 2}
    assert shares[0] == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()), abs=0.03)


def test_top_p_leaves_the_fewest_that_reach_it() -> None:
    """The token that crosses the sum stays."""
    first, second = LOGITS.softmax(-1).sort(descending=True).values[:2].tolist()

    assert draw(Sampling(1.0, top_p=first - 0.01, seed=0)).keys() == {0}
    assert draw(Sampling(1.0, top_p=first + 0.01, seed=0)).keys() == {0, 2}
    assert draw(Sampling(1.0, top_p=first + second + 0.01, seed=0)).keys() == {0, 1, 2}


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_randomness_is_a_function_of_seed_and_position(seed: int, position: int) -> None:
    """In [0, 1), and different for the next position and the next seed."""
    u = uniform(seed, position)

    assert 0 <= u < 1
    assert u == uniform(seed, position)
    assert u != uniform(seed, position + 1)
    assert u != uniform((seed + 1) % 2**63, position)


@pytest.mark.parametrize("wanted", MIXED, ids=str)
def test_tokens_are_drawn_as_the_library_would_draw_them(wanted: dict[str, Any]) -> None:
    """Chi-square: thousands of draws fit the probabilities after the library's processors, and none is impossible."""
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(len(str(wanted))))

    tokens = sample(logits.repeat(DRAWS, 1), [choice(i, **wanted) for i in range(DRAWS)])

    expected = DRAWS * reference(logits, wanted)
    drawn = torch.bincount(torch.tensor([t for t in tokens if t is not None]), minlength=40)
    assert drawn.sum() == DRAWS
    assert not drawn[expected == 0].any()
    frequent = expected >= 5
    found = torch.cat([drawn[frequent].double(), drawn[~frequent].sum()[None]])
    wished = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    found, wished = found[wished > 0], wished[wished > 0]
    statistic = ((found - wished) ** 2 / wished).sum()
    freedom = torch.tensor(max(1, len(wished) - 1), dtype=torch.float64)
    assert float(torch.special.gammaincc(freedom / 2, statistic / 2)) > 1e-4


NUMBERS = st.integers(-40, 40).map(lambda n: n / 8) | st.floats(-30, 30, width=32) | st.just(float("-inf"))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(NUMBERS, min_size=1, max_size=200).filter(lambda logits: max(logits) > float("-inf")),
    st.sampled_from([1e-3, 0.1, 0.7, 1.0, 1.9, 50.0]),
    st.integers(0, 250),
    st.just(1.0) | st.floats(0.001, 1.0),
    st.just(0.0) | st.floats(0.0, 1.0),
)
def test_the_kept_tokens_are_those_of_the_library(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Whatever the logits, with equal and impossible ones among them: the likeliest tokens up to the same edge."""
    logits = torch.tensor(values)
    wanted = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    blocks = in_blocks(logits[None], [0])
    draws = Draws(blocks, blocks.amax(-1), [choice(**wanted)], len(values))
    everything = ((logits - logits.max()) / temperature).double().exp().sum()[None]
    ids, weights, _ = draws.keep(torch.tensor([-torch.inf]), everything)
    kept = ids[0, weights[0] > 0].tolist()

    counts = []
    for slack in (-1e-6, 1e-6):  # sums in another order may be on the other side of the edge
        edge = {"top_p": min(1.0, max(1e-9, top_p + slack)) if top_p < 1 else 1.0, "min_p": max(0.0, min_p - slack)}
        left = reference(logits, {**wanted, **edge, "min_p": min(1.0, edge["min_p"]) if min_p else 0.0})
        counts.append(int((left > 0).sum()))
    assert counts[0] <= len(kept) <= counts[1]
    assert kept == logits.sort(descending=True, stable=True).indices[: len(kept)].tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.5, 3.0, 8.0]),
    st.sampled_from([0.3, 1.0, 5.0]),
    st.integers(0, 70) | st.sampled_from([700, 69_999, 70_000, 2**40]),
    st.sampled_from([0.2, 0.9, 0.999, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_how_tokens_were_found_does_not_matter(
    seed: int, spread: float, temperature: float, top_k: int, top_p: float, dtype: torch.dtype
) -> None:
    """Looking at a few likely tokens and at all of them gives the same one, also where many are equally likely."""
    logits = (spread * torch.randn(1, 70_000, generator=torch.Generator().manual_seed(seed))).to(dtype)
    if top_p == 1 and not 0 < top_k < logits.shape[1]:
        top_k = 1  # else all tokens are kept, which is another way
    own = choice(seed % 1000, temperature=temperature, top_k=top_k, top_p=top_p)
    blocks = in_blocks(logits, [0])
    draws = Draws(blocks, blocks.amax(-1), [own], logits.shape[1])
    every = draws.from_nearly_all()

    if not 500 < top_k < logits.shape[1]:
        some, is_complete = draws.from_largest()
        assert not is_complete or some.tolist() == every.tolist()
    assert sample(logits, [own]) == every.tolist()


def test_a_level_is_reached_by_as_many_as_wanted() -> None:
    """And by not many more: else nothing would be gained."""
    logits = torch.randn(4, 64_000, generator=torch.Generator().manual_seed(2))
    blocks = in_blocks(logits, range(4))
    counts = torch.tensor([1, 20, 100, 300])

    reached = (logits >= level_of(blocks.amax(-1), counts)[:, None]).sum(-1)

    assert (reached >= counts).all()
    assert (reached <= 2 * counts).all()


@given(st.integers(1, 6), st.data())
def test_rows_do_not_influence_each_other(rows: int, data: st.DataObject) -> None:
    """A row gets the same token alone and in a batch of all kinds of rows, also if the batch is taken in parts."""
    seed = data.draw(st.integers(0, 2**32))
    logits = torch.randn(rows, 200, generator=torch.Generator().manual_seed(seed))
    logits[data.draw(st.integers(0, rows - 1)), 7] = data.draw(st.sampled_from([0.0, float("nan"), float("inf")]))
    kinds = [{"temperature": 0.0}, *MIXED, {"temperature": 0.0, "repetition_penalty": 9.0}, {"mask": b"\x11" * 25}]
    choices = [choice(i, seed=seed, **data.draw(st.sampled_from(kinds))) for i in range(rows)]

    together = sample(logits, choices)

    assert together == [sample(logits[i : i + 1], [choices[i]])[0] for i in range(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "rows_at_once", lambda vocabulary: 2)
        assert together == sample(logits, choices)
    for row, own in enumerate(choices):
        if not logits[row].isfinite().all():
            assert together[row] is None
        elif own.sampling.temperature == 0 and not own.changes_logits:
            assert together[row] == int(logits[row].argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("vocabulary", "nbytes"), [(40, 5), (40, 8), (64, 8), (100, 16), (100, 5), (37, 5)])
def test_a_mask_decides_before_everything_else(temperature: float, vocabulary: int, nbytes: int) -> None:
    """Bit i % 8 of byte i // 8 allows token i, and none allows tokens beyond the mask; no bias brings them back."""
    allowed = [1, 9, 31, 36]
    mask = bytearray(nbytes)
    for token in allowed:
        mask[token // 8] |= 1 << token % 8
    logits = torch.arange(float(vocabulary)).repeat(200, 1)
    wanted = {"temperature": 50 * temperature, "logit_bias": {4: 100.0}, "mask": bytes(mask)}

    tokens = sample(logits, [choice(i, **wanted) for i in range(200)])

    assert set(tokens) == (set(allowed) if temperature else {36})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_allow_nothing_or_have_no_numbers_fail_alone(temperature: float) -> None:
    """A mask of zeros, bans of all that a mask leaves, NaN, and both together."""
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    logits[4, 20] = logits[5, 3] = float("nan")
    wanted: list[dict[str, Any]] = [
        {},
        {"mask": bytes(5)},
        {"mask": b"\x06\0\0\0\0", "banned": [1, 2]},
        {"mask": b"\x06\0\0\0\0", "banned": [1]},
        {},
        {"mask": bytes(5)},
    ]

    tokens = sample(logits, [choice(i, temperature=temperature, **own) for i, own in enumerate(wanted)])

    assert tokens[1:] == [NONE_ALLOWED, NONE_ALLOWED, 2, None, None]
    assert tokens[0] is not None
    assert tokens[0] >= 0


def test_bfloat16_logits_are_sampled_as_float32() -> None:
    """Penalties and temperatures are not rounded to 8 bits."""
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(4)).bfloat16()
    choices = [choice(i, repetition_penalty=1.1, top_p=0.9) for i in range(50)]

    assert sample(logits, choices) == sample(logits.float(), choices)

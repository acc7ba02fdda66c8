"""Tokens are drawn from the distribution that was asked for, by seed and position alone."""

from __future__ import annotations

import collections

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.compute.sampler import sample, uniform
from lamina.wire.orders import Choice
from lamina.wire.requests import Sampling

LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0])


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


@given(st.integers(1, 6), st.data())
def test_rows_do_not_influence_each_other(rows: int, data: st.DataObject) -> None:
    """A row gets the same token alone and in a batch of greedy and sampled rows."""
    seed = data.draw(st.integers(0, 2**32))
    logits = torch.randn(rows, 9, generator=torch.Generator().manual_seed(seed))
    settings = st.builds(
        Sampling,
        st.sampled_from([0.0, 0.7, 1.5]),
        st.integers(0, 12),
        st.floats(0.05, 1.0),
        st.integers(0, 2**63 - 1),
    )
    choices = [Choice(data.draw(settings), data.draw(st.integers(0, 1000))) for _ in range(rows)]

    together = sample(logits, choices)

    assert together == [sample(logits[i : i + 1], [choices[i]])[0] for i in range(rows)]
    greedy = [i for i, c in enumerate(choices) if c.sampling.temperature == 0 or c.sampling.top_k == 1]
    assert [together[i] for i in greedy] == [int(logits[i].argmax()) for i in greedy]

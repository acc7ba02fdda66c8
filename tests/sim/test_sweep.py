"""The page of models is current: every decoder of the installed library does what it says there."""

from __future__ import annotations

import pytest

from tests.oracle import Agreement
from tests.sweep import attempt, written

OUTCOMES = written()


def test_the_page_names_every_decoder() -> None:
    from tests.decoders import decoders

    assert {name: outcome.architecture for name, outcome in OUTCOMES.items()} == decoders()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OUTCOMES)
def test_the_page_says_what_happens(model_type: str, agreement: Agreement) -> None:
    assert attempt(model_type, agreement) == OUTCOMES[model_type]

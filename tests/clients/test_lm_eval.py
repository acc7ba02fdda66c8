"""lm-eval scores the same through the endpoint as with its own backend on the same checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.programs import drive
from tests.clients.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

WAYS = {
    "server_tokenizer": "own",
    "local_tokenizer": "own",
    "local_tokenizer_with_begin": "own_with_begin",
    "many_at_a_time": "own",
}
"""Ways through the server, and with what each is compared."""


@pytest.fixture(scope="module")
def results(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = ("own", "own_with_begin", *WAYS, "own_chat", "chat")
    return drive("lm-eval", cases, server, tmp_path_factory.mktemp("lm-eval"))


@pytest.mark.parametrize("way", WAYS)
def test_lm_eval_finds_what_its_own_backend_finds(way: str, results: dict[str, Any]) -> None:
    """Log-likelihoods to 1e-3, whether each token is the likeliest one, and texts until a stop."""
    for case in (WAYS[way], way):
        assert "value" in results[case], results[case]["traceback"]
    own, found = results[WAYS[way]]["value"], results[way]["value"]

    for expected, answers in zip(own["choose"]["answers"], found["choose"]["answers"], strict=True):
        for (likelihood, greedy), (other, other_greedy) in zip(expected, answers, strict=True):
            assert other == pytest.approx(likelihood, abs=1e-3)
            assert other_greedy == greedy
    assert len(found["choose"]["answers"]) == 4
    for name, score in own["weigh"]["scores"].items():
        assert found["weigh"]["scores"][name] == pytest.approx(score, rel=1e-4)
    assert found["continue"]["answers"] == own["continue"]["answers"]


def test_lm_eval_chats(results: dict[str, Any]) -> None:
    """The server makes the same prompt of the messages as lm-eval's backend, by the same template."""
    assert "value" in results["own_chat"], results["own_chat"]["traceback"]
    assert "value" in results["chat"], results["chat"]["traceback"]
    assert results["chat"]["value"] == results["own_chat"]["value"]

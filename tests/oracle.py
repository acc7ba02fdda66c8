"""``transformers`` in one process: what a cluster must reproduce token for token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

TIE = 1e-4
"""Where the oracle's two largest logits differ by less, either token is right."""


class Oracle:
    """The library's model of a checkpoint, in float32 unless said otherwise."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._answers: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()

    def greedy(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """What ``generate`` gives, over a cache; the same question is computed once."""
        question = (tuple(prompt), tokens)
        if question not in self._answers:
            self._answers[question] = self._generate(prompt, tokens)
        return [*self._answers[question]]

    @torch.inference_mode()
    def _generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        answer: list[int] = out[0, len(prompt) :].tolist()
        return answer

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Logits [len(answer), vocabulary] that each token of ``answer`` is chosen from, all at once, with no cache."""
        out = self._model(torch.tensor([[*prompt, *answer]]), use_cache=False)
        logits: torch.Tensor = out.logits[0, len(prompt) - 1 : -1]
        return logits

    @torch.inference_mode()
    def next_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Logits [vocabulary] that ``generate`` chooses from after ``answer``: over a cache, token by token."""
        out = self._model(torch.tensor([list(prompt)]), use_cache=True)
        for token in answer:
            out = self._model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        logits: torch.Tensor = out.logits[0, -1]
        return logits


@dataclass
class Agreement:
    """Counts tokens that were compared and ties among them, over a whole test run."""

    tokens: int = 0
    ties: list[str] = field(default_factory=list)

    def check(self, oracle: Oracle, prompt: Sequence[int], answer: Sequence[int], what: str) -> None:
        """Fail unless ``answer`` is that of ``generate``, token for token but for ties, each of which is counted.

        After a tie the rest is compared with what ``generate`` goes on with. No token may be worse than a tie where the
        oracle computes without a cache, either.
        """
        self.tokens += len(answer)
        agreed = 0
        while (expected := oracle.greedy([*prompt, *answer[:agreed]], len(answer) - agreed)) != [*answer[agreed:]]:
            assert len(expected) == len(answer) - agreed, (
                f"{what}: the oracle ends after {agreed + len(expected)} tokens"
            )
            first = next(i for i, (a, b) in enumerate(zip(answer[agreed:], expected, strict=True)) if a != b)
            logits = oracle.next_logits([*prompt, *answer[:agreed]], expected[:first])
            token, other = answer[agreed + first], expected[first]
            behind = float(logits[other] - logits[token])
            assert behind < TIE, f"{what}: token {agreed + first} is {token}, the oracle prefers {other} by {behind}"
            agreed += first + 1
            self.ties.append(f"{what}: token {agreed - 1}, logits apart by {behind:.1e}")
            if agreed == len(answer):
                break
        uncached = oracle.logits(prompt, answer)
        behind_best = uncached.max(-1).values - uncached.gather(-1, torch.tensor([*answer])[:, None])[:, 0]
        worst = int(behind_best.argmax())
        assert behind_best[worst] < TIE, (
            f"{what}: token {worst} is {answer[worst]}, without a cache the oracle prefers "
            f"{int(uncached[worst].argmax())} by {float(behind_best[worst])}"
        )


class Gaps(NamedTuple):
    """How far the logits of chosen tokens lie behind the best, in standard deviations of the logits."""

    worst: float
    mean: float

    def __str__(self) -> str:
        return f"{self.worst:.3f} σ (mean {self.mean:.5f} σ)"


def gaps(oracle: Oracle, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Gaps:
    """How good ``answers`` to ``prompts`` are, as ``oracle`` sees them."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = oracle.logits(prompt, answer)
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        found.append((logits.max(-1).values - chosen) / logits.std(-1))
    every = torch.cat(found)
    return Gaps(float(every.max()), float(every.mean()))

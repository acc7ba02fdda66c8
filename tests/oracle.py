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
        """What ``generate`` gives; the same question is computed once."""
        question = (tuple(prompt), tokens)
        if question not in self._answers:
            self._answers[question] = self._generate(prompt, tokens)
        return self._answers[question]

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
        """Logits [len(answer), vocabulary] that each token of ``answer`` was chosen from, given those before it."""
        logits: torch.Tensor = self._model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        return logits


@dataclass
class Agreement:
    """Counts tokens that were compared and ties among them, over a whole test run."""

    tokens: int = 0
    ties: list[str] = field(default_factory=list)

    def check(self, oracle: Oracle, prompt: Sequence[int], answer: Sequence[int], what: str) -> None:
        """Fail unless ``answer`` is the oracle's, token for token but for ties."""
        self.tokens += len(answer)
        if list(answer) == oracle.greedy(prompt, len(answer)):
            return
        logits = oracle.logits(prompt, answer)
        for i, token in enumerate(answer):
            best = float(logits[i].max())
            if token == int(logits[i].argmax()):
                continue
            behind = best - float(logits[i, token])
            assert behind < TIE, (
                f"{what}: token {i} is {token}, the oracle prefers {int(logits[i].argmax())} by {behind}"
            )
            self.ties.append(f"{what}: token {i}, logits apart by {behind:.1e}")


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

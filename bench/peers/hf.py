"""transformers: ``generate`` over a static cache. The argument is the checkpoint.

One prompt of the longest context so far is prefilled once, and its keys and values are copied into the cache of every
sequence.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import transformers
from lines import Answer, serve  # type: ignore[import-not-found]  # in the folder of this script
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache, StoppingCriteria


class _TokenTimes(StoppingCriteria):  # type: ignore[misc]
    """Records the time of each token, and never stops the generation."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class _TransformersDecoder:
    """A model with the cache of one prefilled prompt."""

    def __init__(self, path: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True)
        self._model = model.eval()
        self._prefilled: list[tuple[Tensor, Tensor]] = []
        self._context = 0

    @torch.inference_mode()
    def measure(self, batch: int, context: int, warm: int, steps: int, threads: int) -> Answer:
        torch.set_num_threads(threads)
        if context > self._context:
            self._prefill(context)
        clock = _TokenTimes()
        self._model.generate(
            torch.zeros(batch, context + 1, dtype=torch.long),
            attention_mask=torch.ones(batch, context + 1, dtype=torch.long),
            past_key_values=self._cache(batch, context, context + warm + steps + 1),
            max_new_tokens=warm + steps,
            do_sample=False,
            disable_compile=True,
            stopping_criteria=[clock],
        )
        return {"seconds": clock.times[-1] - clock.times[warm - 1]}

    def _prefill(self, context: int) -> None:
        self._prefilled = []
        cache = StaticCache(config=self._model.config, max_cache_len=context)
        self._model(torch.zeros(1, context, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        self._prefilled = [(layer.keys, layer.values) for layer in cache.layers]
        self._context = context

    def _cache(self, batch: int, context: int, room: int) -> StaticCache:
        cache = StaticCache(config=self._model.config, max_cache_len=room)
        for layer, stored in zip(cache.layers, self._prefilled, strict=True):
            k, v = (once.expand(batch, -1, -1, -1) for once in stored)
            layer.lazy_initialization(k, v)
            layer.keys[:, :, :context] = k[:, :, :context]
            layer.values[:, :, :context] = v[:, :, :context]
            layer.cumulative_length.fill_(context)
        return cache


def _start() -> tuple[Answer, Any]:
    decoder = _TransformersDecoder(sys.argv[1])
    return {"version": transformers.__version__}, decoder.measure


serve(_start)

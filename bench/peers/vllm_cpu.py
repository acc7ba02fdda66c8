"""vLLM for CPUs, with its engine in this process. The arguments are the checkpoint, the most sequences, the most tokens
of a sequence, and the bytes of KV cache.

vLLM has a connector for this purpose, which fills the cache at random, so that prompts need not be prefilled.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import torch
from lines import Answer, serve  # type: ignore[import-not-found]  # in the folder of this script


class _VllmDecoder:
    """The engine with one model."""

    def __init__(self, path: str, batch: int, context: int, kv_bytes: int) -> None:
        from vllm import LLM

        self._ids = itertools.count()
        self._engine = LLM(
            model=path,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=context,
            max_num_seqs=batch,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=kv_bytes,
            kv_transfer_config={
                "kv_connector": "DecodeBenchConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"fill_mean": 0.0, "fill_std": 1.0},
            },
        ).llm_engine

    def measure(self, batch: int, context: int, warm: int, steps: int, threads: int) -> Answer:
        from vllm import SamplingParams

        if threads != torch.get_num_threads():  # its matrix products keep the threads of their first run
            raise RuntimeError(f"asked for {threads} threads, but vLLM was started with {torch.get_num_threads()}")
        settings = SamplingParams(temperature=0.0, max_tokens=warm + steps, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": [0] * context}
        names = [str(next(self._ids)) for _ in range(batch)]
        for name in names:
            self._engine.add_request(name, dict(prompt), settings)
        counts = dict.fromkeys(names, 0)
        times: list[float] = []
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            for output in outputs:
                counts[output.request_id] = len(output.outputs[0].token_ids)
            while len(times) < min(counts.values()):
                times.append(time.perf_counter())
        return {"seconds": times[-1] - times[warm - 1]}


def _start() -> tuple[Answer, Any]:
    import vllm

    path, batch, context, kv_bytes = sys.argv[1:]
    decoder = _VllmDecoder(path, int(batch), int(context), int(kv_bytes))
    return {"version": vllm.__version__}, decoder.measure


serve(_start)

"""Tiny random checkpoints of every model family that the tests run.

All have at least three KV heads, so that they split over three memory nodes by heads; 2 to 4 layers; sliding windows
of 16 to 32 tokens, shorter than the prompts of the tests; and no token that ends a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 300
MAX_CONTEXT = 512


@dataclass(frozen=True)
class Family:
    """A model type of the transformers library and the settings in which it differs from the library's defaults."""

    name: str
    model_type: str
    settings: dict[str, Any]

    def config(self, **changes: Any) -> Any:
        """The library's configuration object, with ``changes`` on top of the family's settings."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **{**self.settings, **changes})

    def model(self, seed: int = 0, **changes: Any) -> torch.nn.Module:
        """A float32 model of the library with random weights, none of which is negligible."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self.config(**changes), dtype=torch.float32).eval()
        randomise(model, seed)
        return model

    def save(self, path: Path, *, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
        """Write a checkpoint directory into ``path`` and return it. The same arguments give the same weights."""
        self.model(seed, **changes).to(getattr(torch, dtype)).save_pretrained(path)
        return path


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give ``model`` weights that all matter: attention not flat, norms and biases not neutral, logits well spread."""
    generator = torch.Generator().manual_seed(seed)
    unembedding = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    tied = unembedding is embedding
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        width = parameter.shape[-1] ** -0.5
        if parameter.ndim == 1:  # norm weights (1, or 0 where the family adds the 1 itself) and biases
            parameter.add_(0.3 * noise)
        elif parameter is embedding:
            parameter.copy_(noise * (width if tied else 1.0))
        elif parameter is unembedding:
            parameter.copy_(4 * width * noise)
        else:
            parameter.copy_(1.5 * width * noise)
    if tied:
        # The last norm spreads the logits instead, and flips signs: else the model would repeat its last token.
        last_norm = [module for module in model.modules() if "Norm" in type(module).__name__][-1]
        last_norm.weight.copy_(4 * torch.randn(last_norm.weight.shape, generator=generator))


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 4}
_SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": MAX_CONTEXT,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "llama", {**_GROUPED, "num_hidden_layers": 4}),
        Family("llama_scaled_rope", "llama", {**_GROUPED, "rope_parameters": _SCALED_ROPE}),
        Family("llama_tied", "llama", {**_GROUPED, "tie_word_embeddings": True}),
        Family("mistral", "mistral", {**_GROUPED, "sliding_window": 16}),
        Family("qwen2", "qwen2", _GROUPED),
        Family("qwen3", "qwen3", {**_GROUPED, "head_dim": 16}),
        Family(
            "gemma2",
            "gemma2",
            {
                **_GROUPED,
                "head_dim": 16,
                "query_pre_attn_scalar": 24,
                "sliding_window": 24,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 20.0,
                "tie_word_embeddings": True,
            },
        ),
        Family(
            "gemma3_text",
            "gemma3_text",
            {
                **_GROUPED,
                "num_hidden_layers": 3,
                "head_dim": 16,
                "query_pre_attn_scalar": 24,
                "sliding_window": 16,
                "layer_types": _ALTERNATING,
                "tie_word_embeddings": True,
            },
        ),
        Family("phi3", "phi3", _GROUPED),
        Family("olmo2", "olmo2", _GROUPED),
        Family(
            "granite",
            "granite",
            {
                **_GROUPED,
                "embedding_multiplier": 3.0,
                "attention_multiplier": 0.25,
                "residual_multiplier": 0.5,
                "logits_scaling": 0.5,
            },
        ),
        Family("starcoder2", "starcoder2", {**_GROUPED, "sliding_window": 32}),
        Family("gpt_neox", "gpt_neox", {**_COMMON, "num_attention_heads": 4}),
        Family(
            "gpt_neox_sequential", "gpt_neox", {**_COMMON, "num_attention_heads": 4, "use_parallel_residual": False}
        ),
        Family("opt", "opt", {**_COMMON, "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64}),
        Family("mixtral", "mixtral", {**_GROUPED, "num_local_experts": 6, "num_experts_per_tok": 2}),
        Family(
            "qwen3_moe",
            "qwen3_moe",
            {
                **_GROUPED,
                "head_dim": 16,
                "num_experts": 6,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "norm_topk_prob": True,
            },
        ),
        Family("llama_dynamic_rope", "llama", {**_GROUPED, "rope_parameters": _DYNAMIC_ROPE}),
        Family(
            "phi3_long_rope",
            "phi3",
            {**_GROUPED, "rope_parameters": _LONG_ROPE, "max_position_embeddings": 8 * MAX_CONTEXT},
        ),
        Family(
            "gpt_oss",
            "gpt_oss",
            {
                **_GROUPED,
                "num_hidden_layers": 3,
                "head_dim": 16,
                "sliding_window": 16,
                "layer_types": _ALTERNATING,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        ),
        Family(
            "llama4_text",
            "llama4_text",
            {
                **_GROUPED,
                "num_hidden_layers": 3,
                "head_dim": 16,
                "intermediate_size_mlp": 96,
                "num_local_experts": 4,
                "attention_chunk_size": 32,
                "no_rope_layers": [1, 0, 1],
                "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
                "floor_scale": 16,
            },
        ),
        Family("diffllama", "diffllama", _GROUPED),
        Family(
            "dbrx",
            "dbrx",
            {
                **{name: value for name, value in _COMMON.items() if name not in ("hidden_size", "intermediate_size")},
                "d_model": 64,
                "n_heads": 8,
                "n_layers": 2,
                "max_seq_len": MAX_CONTEXT,
                "attn_config": {"kv_n_heads": 4, "rope_theta": 10_000.0, "clip_qkv": 8.0},
                "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 6, "moe_top_k": 2, "hidden_size": 64},
            },
        ),
    )
}

VARIANTS = {"llama_scaled_rope", "llama_dynamic_rope", "llama_tied", "phi3_long_rope", "gpt_neox_sequential"}
"""What differs from a family above by one setting."""

"""A tiny random checkpoint of every causal language model of the installed ``transformers`` library.

The settings are the library's defaults, made small by the names that families share; what does not fit into that is
written down for the family. All have several layers, and windows and chunks shorter than the prompts of the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.families import MAX_CONTEXT, VOCABULARY, randomise

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "d_model": 96,
    "n_embd": 96,
    "dim": 96,
    "embedding_size": 96,
    "word_embed_proj_dim": 96,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "ffn_dim": 128,
    "ffn_hidden_size": 128,
    "d_ff": 128,
    "n_inner": 128,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_attention_heads": 6,
    "num_heads": 6,
    "n_head": 6,
    "n_heads": 6,
    "attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": MAX_CONTEXT,
    "n_positions": MAX_CONTEXT,
    "n_ctx": MAX_CONTEXT,
    "max_seq_len": MAX_CONTEXT,
    "sliding_window": 16,
    "attention_chunk_size": 32,
    "num_experts": 6,
    "n_routed_experts": 6,
    "num_local_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "first_k_dense_replace": 1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

_OF_FAMILY: dict[str, dict[str, Any]] = {}
"""What a family needs besides; None in the place of a setting leaves the library's default."""


def decoders() -> dict[str, str]:
    """The class of each causal language model of the library, by model type, but for parts of encoder-decoders."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))


def tiny_config(model_type: str) -> Any:
    """The configuration of a tiny model."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(model_type).get_text_config().to_dict()
    names = {name: value for name, value in _SMALL.items() if name in known}
    config = AutoConfig.for_model(model_type, **{**names, **_OF_FAMILY.get(model_type, {})})
    return config


def save_tiny(model_type: str, path: Path, seed: int = 0) -> Path:
    """Write the checkpoint of a tiny model with random weights into ``path``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    randomise(model, seed)
    model.save_pretrained(path)
    return path
